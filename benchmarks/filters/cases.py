"""What is measured: one entry of `CASES` for each filter and its options.

The limit on paper of each case is counted in its builder: n is the number of
values (pixels times channels) of the batch, 4 n the bytes of float32 images.
Goals were set before the filters were written, from prototypes.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.filters import Case, Peer, Setup, Work, peers
from jaxshape.filters import (
  bilateral,
  blur,
  cartoon,
  diffusion,
  median,
  pyramid,
  stylization,
  threshold,
)

Images = np.ndarray
ITERATIONS = 20


def _goals(
  cpu: Mapping[str, float], gpu: Mapping[str, float] | None = None
) -> Mapping[str, float]:
  return (gpu or {}) if jax.default_backend() == "gpu" else cpu


def _convolved() -> float:
  """The tolerance for convolutions, which GPUs do with 10 bits as a default."""
  return 0.5 if jax.default_backend() == "gpu" else 1e-2


def _diffusion_work(images: Images, steps: float, conduction: str) -> Work:
  """The state stays in a cache: the image is read and written once.

  Per value and step two fluxes d * c(d / kappa): difference, scaling, square
  and product, and c itself ("rational" an addition and a division, "tukey"
  five more); then two differences, a sum, a product and a sum.
  """
  n = images.size
  inner = {"exponential": 0, "rational": 2, "tukey": 5}[conduction]
  exps = 2 * n * steps if conduction == "exponential" else 0
  return Work(8 * n, ops=n * steps * (2 * (4 + inner) + 5), exps=exps)


def _perona_malik(conduction: str, images: Images) -> Setup:
  option = ["exponential", "rational", "tukey"].index(conduction) + 1
  beside: dict[str, Peer] = {
    "OpenCV": peers.contrib(images, ITERATIONS),
    "MedPy": peers.medpy(images, ITERATIONS, option),
  }
  goals = {"OpenCV": 0.25, "MedPy": 0.12}
  if conduction == "exponential":
    goals = {"OpenCV": 0.50, "MedPy": 0.30}
    beside["torch"] = peers.on_tensor(
      lambda torch: lambda x: peers.torch_diffusion(torch, x, ITERATIONS),
      images,
      tolerance=2e-3,
    )
    if len(images) == 1:
      beside["SimpleITK"] = peers.itk(images, ITERATIONS)
  alone = len(images) == 1
  on_gpu = {"ms": 0.08 if alone else 0.012, "torch": 0.1 if alone else 0.15}
  return Setup(
    lambda x: diffusion.perona_malik(
      x, iterations=ITERATIONS, conduction=conduction
    ),
    (images,),
    beside,
    _diffusion_work(images, ITERATIONS, conduction),
    _goals(goals, on_gpu if "torch" in beside else None),
  )


def _counts(images: Images) -> Setup:
  """A strength of its own for each image, as in training."""
  counts = np.linspace(10, 20, len(images)).round().astype(np.int32)
  counts = np.random.default_rng(0).permutation(counts)
  return Setup(
    lambda x, n: diffusion.perona_malik(x, iterations=n),
    (images, counts),
    {
      "OpenCV": peers.contrib(images, counts),
      "MedPy": peers.medpy(images, counts, 1),
    },
    _diffusion_work(images, float(counts.mean()), "exponential"),
    _goals({"OpenCV": 0.65}),
  )


def _coupled(images: Images) -> Setup:
  work = _diffusion_work(images, ITERATIONS, "exponential")
  return Setup(
    lambda x: diffusion.perona_malik(x, iterations=ITERATIONS, coupled=True),
    (images,),
    {"OpenCV": peers.contrib(images, ITERATIONS)},
    # One exponential serves all channels.
    work._replace(exps=work.exps / images.shape[-1]),
  )


def _robust(images: Images) -> Setup:
  return Setup(
    lambda x: diffusion.robust(x, iterations=ITERATIONS),
    (images,),
    {"OpenCV": peers.contrib(images, ITERATIONS)},
    _diffusion_work(images, ITERATIONS, "tukey"),
  )


def _gradient(images: Images) -> Setup:
  """By the image, of a product with fixed weights."""
  weights = np.random.default_rng(1).normal(size=images.shape)
  weights = weights.astype(np.float32)

  def ours(x: Any) -> jax.Array:
    out = diffusion.perona_malik(x, iterations=ITERATIONS)
    return jnp.vdot(weights, out)

  def of_torch(torch: Any) -> Any:
    _, against = peers.tensor(weights)

    def run(x: Any) -> Any:
      x = x.clone().requires_grad_()
      out = peers.torch_diffusion(torch, x, ITERATIONS)
      return torch.autograd.grad((out * against).sum(), x)[0]

    return run

  def of_scan(x: jax.Array) -> jax.Array:
    out = peers.jax_diffusion(jnp.moveaxis(x, -1, 1), ITERATIONS)
    return jnp.vdot(weights, jnp.moveaxis(out, 1, -1))

  work = _diffusion_work(images, ITERATIONS, "exponential")
  # Forward, and the adjoint with the fluxes' derivatives (once more as much,
  # and three operations per flux); every state is written and read.
  work = Work(
    bytes=images.size * (12 + 8 * ITERATIONS),
    ops=2 * work.ops + 6 * images.size * ITERATIONS,
    exps=2 * work.exps,
  )
  cpu = {"torch": 0.40} | ({"MB": 14.0} if len(images) == 1 else {})
  return Setup(
    jax.grad(ours),
    (images,),
    {
      "torch": peers.on_tensor(
        of_torch, images, inference=False, tolerance=1e-3
      ),
      "plain JAX": peers.jitted(
        "jax", lambda _: jax.grad(of_scan), images, tolerance=1e-3
      ),
    },
    work,
    _goals(cpu, {"torch": 0.30}),
  )


def _from_numpy(images: Images) -> Setup:
  """As in a notebook: NumPy in, NumPy out, no jit around it."""
  setup = _perona_malik("exponential", images)
  return Setup(
    setup.ours,
    setup.arguments,
    {name: setup.peers[name] for name in ("OpenCV", "MedPy")},
    setup.work,
    _goals({"OpenCV": 0.75}),
    call=lambda: np.asarray(setup.ours(images)),
  )


def _gaussian(sigma: float, images: Images) -> Setup:
  radius = int(4 * sigma + 0.5)
  side = 2 * radius + 1
  n, width = images.size, images.shape[2]
  # Per axis and value, pairs of taps share a product; or a row of a matrix.
  by_taps = Work(8 * n, ops=2 * n * (3 * radius + 1))
  by_matrix = Work(8 * n, flops=2 * n * 2 * width)
  goals = {"OpenCV": 1.4 if sigma < 5 else 0.6, "dm_pix": 0.06, "Kornia": 0.4}
  return Setup(
    lambda x: blur.gaussian(x, sigma=sigma),
    (images,),
    {
      "OpenCV": peers.each(
        "cv2",
        images,
        lambda cv2: lambda x: cv2.GaussianBlur(x, (side, side), sigma),
        tolerance=1e-2,
      ),
      "SciPy": peers.each(
        "scipy.ndimage",
        images,
        lambda scipy: (
          lambda x: scipy.gaussian_filter(x, (sigma, sigma, 0), mode="mirror")
        ),
        tolerance=1e-2,
      ),
      "Kornia": peers.kornia(
        lambda kornia: (
          lambda x: kornia.filters.gaussian_blur2d(
            x, (side, side), (sigma, sigma)
          )
        ),
        images,
        tolerance=_convolved(),
      ),
      # Zeros beyond the border.
      "dm_pix": peers.jitted(
        "dm_pix",
        lambda pix: lambda x: pix.gaussian_blur(x, sigma, side),
        images,
        tolerance=_convolved(),
        margin=radius,
      ),
    },
    by_matrix if sigma >= 10 else by_taps,
    _goals(goals, {"Kornia": 0.7}),
  )


def _box(images: Images) -> Setup:
  return Setup(
    lambda x: blur.box(x, size=9),
    (images,),
    {
      "OpenCV": peers.each(
        "cv2",
        images,
        lambda cv2: lambda x: cv2.blur(x, (9, 9)),
        tolerance=1e-2,
      ),
      "SciPy": peers.each(
        "scipy.ndimage",
        images,
        lambda scipy: (
          lambda x: scipy.uniform_filter(x, (9, 9, 1), mode="mirror")
        ),
        tolerance=1e-2,
      ),
      "Kornia": peers.kornia(
        lambda kornia: lambda x: kornia.filters.box_blur(x, (9, 9)),
        images,
        tolerance=_convolved(),
      ),
    },
    # Running sums: one pixel enters and one leaves, per axis; one product.
    Work(8 * images.size, ops=5 * images.size),
  )


def _bilateral(images: Images) -> Setup:
  def of_kornia(kornia: Any) -> Any:
    return lambda x: kornia.filters.bilateral_blur(
      x, (9, 9), 75.0, (75.0, 75.0)
    )

  def of_skimage(module: Any) -> Any:
    return lambda x: module.denoise_bilateral(
      x, win_size=9, sigma_color=75, sigma_spatial=75, channel_axis=-1
    )

  beside = {
    "OpenCV": peers.each(
      "cv2",
      images,
      lambda cv2: lambda x: cv2.bilateralFilter(x, 9, 75, 75),
      tolerance=2e-2,
    ),
    # A square window.
    "Kornia": peers.kornia(of_kornia, images),
  }
  if len(images) == 1:
    beside["scikit-image"] = peers.each(
      "skimage.restoration", images, of_skimage
    )
  pixels = images.size / images.shape[-1]
  return Setup(
    lambda x: bilateral.bilateral(
      x, diameter=9, sigma_color=75.0, sigma_space=75.0
    ),
    (images,),
    beside,
    # 49 places: a weight of each pair of pixels is computed once; per place
    # and channel a distance, a product and a sum.
    Work(8 * images.size, ops=49 * 8 * pixels, exps=24 * pixels),
    _goals({"OpenCV": 0.95, "Kornia": 0.15}, {"Kornia": 0.1}),
  )


def _median(dtype: str, images: Images) -> Setup:
  small = dtype == "uint8"
  images = np.round(images).astype(dtype) if small else images

  def plain(_: Any) -> Any:
    def run(x: jax.Array) -> jax.Array:
      wide = jnp.pad(x, [(0, 0), (2, 2), (2, 2), (0, 0)], mode="edge")
      height, width = x.shape[1:3]
      shifts = [
        wide[:, i : i + height, j : j + width]
        for i in range(5)
        for j in range(5)
      ]
      return jnp.median(jnp.stack(shifts), 0)

    return run

  beside = {
    "OpenCV": peers.each(
      "cv2", images, lambda cv2: lambda x: cv2.medianBlur(x, 5), tolerance=0
    ),
  }
  if len(images) == 1:
    beside["SciPy"] = peers.each(
      "scipy.ndimage",
      images,
      lambda scipy: (
        lambda x: scipy.median_filter(x, size=(5, 5, 1), mode="nearest")
      ),
      tolerance=0,
    )
    beside["plain JAX"] = peers.jitted("jax", plain, images, tolerance=0)
  if not small:
    beside["Kornia"] = peers.kornia(
      lambda kornia: (
        lambda x: kornia.filters.median_blur(x, (5, 5), border_type="replicate")
      ),
      images,
      tolerance=0,
    )
  cpu = {"OpenCV": 0.70 if small else 1.6}
  if "Kornia" in beside:
    cpu["Kornia"] = 0.15
  if "plain JAX" in beside:
    cpu["plain JAX"] = 0.01
  return Setup(
    lambda x: median.median(x, size=5),
    (images,),
    beside,
    # 82 comparators of a minimum and a maximum each.
    Work(2 * images.nbytes, ops=2 * 82 * images.size / (4 if small else 1)),
    _goals(cpu, {"Kornia": 0.1} if not small else None),
  )


def _grey(images: Images) -> Images:
  return np.round(images.mean(-1, keepdims=True)).astype(np.uint8)


def _threshold(method: str, images: Images) -> Setup:
  images = _grey(images)

  def of_opencv(cv2: Any) -> Any:
    kind = {
      "mean": cv2.ADAPTIVE_THRESH_MEAN_C,
      "gaussian": cv2.ADAPTIVE_THRESH_GAUSSIAN_C,
    }[method]
    return lambda x: cv2.adaptiveThreshold(
      x, 255, kind, cv2.THRESH_BINARY, 9, 9
    )

  def of_skimage(module: Any) -> Any:
    return lambda x: (
      255
      * (
        x[..., 0]
        > module.threshold_local(
          x[..., 0], 9, method=method, offset=9, mode="nearest"
        )
      )
    )

  return Setup(
    lambda x: threshold.adaptive(x, block_size=9, offset=9.0, method=method),
    (images,),
    {
      "OpenCV": peers.each("cv2", images, of_opencv, tolerance=0),
      # The local mean is not rounded.
      "scikit-image": peers.each("skimage.filters", images, of_skimage),
    },
    # One byte in, a float out; a mean, a rounding, a comparison, a choice.
    Work(
      5 * images.size, ops=images.size * (8 if method == "mean" else 2 * 13 + 3)
    ),
  )


def _cartoon(images: Images) -> Setup:
  images = np.round(images).astype(np.uint8)

  def of_opencv(cv2: Any) -> Any:
    def run(x: np.ndarray) -> np.ndarray:
      colours = cv2.bilateralFilter(x, 9, 75, 75)
      grey = cv2.medianBlur(cv2.cvtColor(x, cv2.COLOR_RGB2GRAY), 5)
      kind = cv2.ADAPTIVE_THRESH_MEAN_C
      edges = cv2.adaptiveThreshold(grey, 255, kind, cv2.THRESH_BINARY, 9, 9)
      return cv2.bitwise_and(colours, colours, mask=edges)

    return run

  pixels = images.size / 3
  return Setup(
    lambda x: cartoon.cartoon(x, preset="classic"),
    (images,),
    # Colours at a tie may be rounded the other way.
    {"OpenCV": peers.each("cv2", images, of_opencv, tolerance=1)},
    # The bilateral filter's, and some of a grey median and threshold.
    Work(
      5 * images.size,
      ops=pixels * (49 * 8 + 2 * 82 / 4 + 8),
      exps=24 * pixels,
    ),
  )


def _pyramid(images: Images) -> Setup:
  return Setup(
    pyramid.down,
    (images,),
    {
      "OpenCV": peers.each(
        "cv2", images, lambda cv2: cv2.pyrDown, tolerance=1e-2
      ),
      # Interpolates after the blur.
      "Kornia": peers.kornia(
        lambda kornia: kornia.geometry.transform.pyrdown, images
      ),
    },
    # Five taps as two pairs and one: half of the rows, then half of the
    # columns of those; a quarter is written.
    Work(5 * images.size, ops=images.size * 7 * 0.75),
  )


def _match_statistics(images: Images) -> Setup:
  style = np.ascontiguousarray(images[:, ::-1, :, ::-1])
  return Setup(
    stylization.match_statistics,
    (images, style),
    {},
    # Two images read and one written; nothing less is known.
    Work(12 * images.size),
    _goals({"ms": 30.0}),
  )


CASES = (
  *(
    Case(f"perona_malik {name}", partial(_perona_malik, name))
    for name in ("exponential", "rational", "tukey")
  ),
  Case("perona_malik counts 10..20", _counts, (32,)),
  Case("perona_malik coupled", _coupled),
  Case("perona_malik gradient", _gradient),
  Case("perona_malik numpy to numpy", _from_numpy, (1,)),
  Case("robust", _robust),
  Case("bilateral d 9", _bilateral),
  Case("median 5 float32", partial(_median, "float32")),
  Case("median 5 uint8", partial(_median, "uint8")),
  Case("gaussian sigma 2", partial(_gaussian, 2.0)),
  Case("gaussian sigma 10", partial(_gaussian, 10.0)),
  Case("box 9", _box),
  *(
    Case(f"adaptive {name} block 9", partial(_threshold, name))
    for name in ("mean", "gaussian")
  ),
  Case("cartoon classic", _cartoon),
  Case("down", _pyramid),
  Case("match_statistics", _match_statistics),
)
