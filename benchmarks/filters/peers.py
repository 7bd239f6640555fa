"""How peers are called: as their users do, each imported when it is needed."""

from collections.abc import Callable
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.filters import Peer

# Columns, and the packages whose versions are noted (one of each is there).
PACKAGES = {
  "OpenCV": (
    "opencv-contrib-python-headless", "opencv-contrib-python",
    "opencv-python-headless", "opencv-python",
  ),
  "MedPy": ("MedPy",),
  "SciPy": ("scipy",),
  "Kornia": ("kornia",),
  "torch": ("torch",),
  "scikit-image": ("scikit-image",),
  "dm_pix": ("dm_pix",),
  "SimpleITK": ("SimpleITK",),
  "plain JAX": (),
}  # fmt: skip

Images = np.ndarray
load: Callable[[str], Any] = importlib.import_module


def each(
  package: str,
  images: Images,
  form: Callable[[Any], Callable[[Any], Any]],
  **compared: Any,
) -> Peer:
  """A library without batches: `form(module)` is called image by image."""

  def make() -> Callable[[], Any]:
    one = form(load(package))
    rows = [np.ascontiguousarray(image) for image in images]
    return lambda: [one(image) for image in rows]

  return Peer(make, **compared)


def contrib(
  images: Images, iterations: Any, kappa: float = 20, step_size: float = 0.1
) -> Peer:
  """OpenCV's diffusion: on uint8, eight neighbours, one conduction."""
  rows = list(np.round(images).astype(np.uint8))
  counts = np.broadcast_to(iterations, len(rows)).tolist()

  def make() -> Callable[[], Any]:
    module = getattr(load("cv2"), "ximgproc", None)
    if module is None:
      raise ImportError("OpenCV is here without its contrib modules.")
    return lambda: [
      module.anisotropicDiffusion(image, step_size, kappa / 255, n)
      for image, n in zip(rows, counts, strict=True)
    ]

  return Peer(make)


def medpy(images: Images, iterations: Any, option: int) -> Peer:
  """MedPy's diffusion, channel by channel; it gives our numbers."""
  counts = np.broadcast_to(iterations, len(images)).tolist()

  def make() -> Callable[[], Any]:
    diffuse = load("medpy.filter.smoothing").anisotropic_diffusion
    planes = np.ascontiguousarray(np.moveaxis(images, -1, 1))
    return lambda: [
      np.stack([diffuse(p, n, 20, 0.1, option=option) for p in image], -1)
      for image, n in zip(planes, counts, strict=True)
    ]

  return Peer(make, tolerance=2e-3)


def itk(images: Images, iterations: int) -> Peer:
  """SimpleITK's diffusion, whose conductance adapts to the image."""

  def make() -> Callable[[], Any]:
    module = load("SimpleITK")
    planes = [
      [module.GetImageFromArray(np.ascontiguousarray(p)) for p in planar]
      for planar in np.moveaxis(images, -1, 1)
    ]
    one = lambda plane: module.GetArrayFromImage(
      module.GradientAnisotropicDiffusion(plane, 0.1, 1.0, 1, iterations)
    )
    return lambda: [np.stack([one(p) for p in image], -1) for image in planes]

  return Peer(make)


def tensor(images: Images) -> tuple[Any, Any]:
  """Torch, and images as a contiguous [B, C, H, W] where JAX computes."""
  torch = load("torch")
  on_gpu = jax.default_backend() == "gpu" and torch.cuda.is_available()
  x = torch.from_numpy(np.ascontiguousarray(np.moveaxis(images, -1, 1)))
  return torch, x.to("cuda" if on_gpu else "cpu")


def on_tensor(
  form: Callable[[Any], Callable[[Any], Any]],
  images: Images,
  *,
  inference: bool = True,
  **compared: Any,
) -> Peer:
  """Something of torch, given `form(torch)` of the whole batch."""

  def make() -> Callable[[], Any]:
    torch, x = tensor(images)
    run = form(torch)

    def call() -> Any:
      with torch.inference_mode(inference):
        out = run(x)
      if x.is_cuda:
        torch.cuda.synchronize()
      return out

    return call

  return Peer(make, **compared)


def kornia(
  form: Callable[[Any], Callable[[Any], Any]], images: Images, **compared: Any
) -> Peer:
  """Something of Kornia, given `form(kornia)` of the whole batch."""
  return on_tensor(lambda _: form(load("kornia")), images, **compared)


def jitted(
  package: str,
  form: Callable[[Any], Callable[[Any], Any]],
  images: Images,
  **compared: Any,
) -> Peer:
  """Something of a JAX library, given `form(module)` of the whole batch."""

  def make() -> Callable[[], Any]:
    run = jax.jit(form(load(package)))
    x = jnp.asarray(images)
    return lambda: run(x)

  return Peer(make, **compared)


def torch_diffusion(torch: Any, u: Any, iterations: int) -> Any:
  """Perona-Malik in plain eager torch, each flux computed once."""
  pad = torch.nn.functional.pad

  def flux(d: Any) -> Any:
    return d * torch.exp(-((d / 20) ** 2))

  for _ in range(iterations):
    down = pad(flux(u[..., 1:, :] - u[..., :-1, :]), (0, 0, 1, 1))
    right = pad(flux(u[..., 1:] - u[..., :-1]), (1, 1))
    u = u + 0.1 * (
      (down[..., 1:, :] - down[..., :-1, :])
      + (right[..., 1:] - right[..., :-1])
    )
  return u


def jax_diffusion(u: jax.Array, iterations: int) -> jax.Array:
  """The same in plain JAX, [B, C, H, W], for its automatic derivative."""

  def flux(d: jax.Array) -> jax.Array:
    return d * jnp.exp(-((d / 20) ** 2))

  def step(u: jax.Array, _: None) -> tuple[jax.Array, None]:
    down = flux(u[..., 1:, :] - u[..., :-1, :])
    down = jnp.pad(down, [(0, 0), (0, 0), (1, 1), (0, 0)])
    right = flux(u[..., 1:] - u[..., :-1])
    right = jnp.pad(right, [(0, 0), (0, 0), (0, 0), (1, 1)])
    change = down[..., 1:, :] - down[..., :-1, :]
    return u + 0.1 * (change + right[..., 1:] - right[..., :-1]), None

  return jax.lax.scan(step, u, None, length=iterations)[0]
