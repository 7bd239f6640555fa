"""The common corruptions of ImageNet-C, on the device.

Images are [..., H, W, 3] in 0..255 and stay in it. `severity` is 1 to 5 and
indexes the published parameters *for images of about 224 pixels*, written here
as published, for values in 0..1. The sets for 32 and 64 pixels (CIFAR-10-C,
Tiny-ImageNet-C) have milder ones of their own.

The published pictures were truncated to uint8 and stored as JPEG afterwards,
which changes what networks make of them: compare only numbers that were both
computed this way. Each function draws anew for every image of a batch, and the
severities are neither equally far apart nor always further: `saturate` fades
colours at 1 and 2 and deepens them from 3 on, `elastic_transform` moves the
whole image at 1 and 2, `fog` gets thicker and less smooth, and `spatter` is
water up to 3 and mud from 4 on.

`IMAGENET_C` are the fifteen that the benchmark averages, in its order, and
`EXTRA` its four for validation. What moves pixels is in `distortion`, what
falls on the lens in `weather`.

Reference for all: Hendrycks and Dietterich, "Benchmarking Neural Network
Robustness to Common Corruptions and Perturbations", ICLR 2019, Section 4.1;
the parameters are those of the code that made the published set.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from jaxshape import images
from jaxshape.filters import blur, distortion, jpeg, severities, weather
from jaxshape.typing import Array, ArrayLike, Float, Key, Num, typed

Rgb = Num[ArrayLike, "*batch height width 3"]
Corrupted = Float[Array, "*batch height width 3"]


def _unit(image: Any) -> jax.Array:
  return images.as_float32(image) / 255


def _full(x: jax.Array) -> jax.Array:
  return 255 * jnp.clip(x, 0, 1)


# The formulas. Their parameters are traced, so that a severity compiles nothing
# anew.


@jax.jit
def _gaussian_noise(key: Any, image: Any, c: Any) -> jax.Array:
  x = _unit(image)
  return _full(x + c * jax.random.normal(key, x.shape))


@jax.jit
def _shot_noise(key: Any, image: Any, c: Any) -> jax.Array:
  return _full(jax.random.poisson(key, c * _unit(image)) / c)


@jax.jit
def _impulse_noise(key: Any, image: Any, share: Any) -> jax.Array:
  x = _unit(image)
  draw = jax.random.uniform(key, x.shape)
  impulse = jnp.where(draw < share / 2, 0.0, 1.0)
  return _full(jnp.where(draw < share, impulse, x))


@jax.jit
def _speckle_noise(key: Any, image: Any, c: Any) -> jax.Array:
  x = _unit(image)
  return _full(x + c * x * jax.random.normal(key, x.shape))


@jax.jit
def _spread(image: Any, disk: Any) -> jax.Array:
  x = jnp.moveaxis(_unit(image), -1, -3)
  reach = len(disk) // 2
  border = [(0, 0)] * (x.ndim - 2) + [(reach, reach)] * 2
  planes = jnp.pad(x, border, mode="reflect")
  planes = planes.reshape(-1, 1, *planes.shape[-2:])
  out = lax.conv_general_dilated(
    planes,
    disk[None, None],
    (1, 1),
    "VALID",
    precision=lax.Precision.HIGHEST,
  )
  return _full(jnp.moveaxis(out.reshape(x.shape), -3, -1))


@jax.jit
def _contrast(image: Any, c: Any) -> jax.Array:
  x = _unit(image)
  mean = x.mean((-3, -2), keepdims=True)
  return _full(c * (x - mean) + mean)


@jax.jit
def _brightness(image: Any, c: Any) -> jax.Array:
  x = _unit(image)
  # At constant hue and saturation, colours are proportional to their value.
  value = x.max(-1, keepdims=True)
  brighter = jnp.minimum(value + c, 1)
  some = value > 0
  x = jnp.where(some, x * brighter / jnp.where(some, value, 1), brighter)
  return _full(x)


@jax.jit
def _saturate(image: Any, a: Any, b: Any) -> jax.Array:
  x = _unit(image)
  value = x.max(-1, keepdims=True)
  # What a colour lacks to its value, per unit of saturation; hue 0 for grey.
  lack = value - x
  chroma = lack.max(-1, keepdims=True)
  some = chroma > 0
  grey = value * jnp.array([0.0, 1.0, 1.0])
  full = jnp.where(some, lack * value / jnp.where(some, chroma, 1), grey)
  saturation = chroma / jnp.where(value > 0, value, 1)
  return _full(value - jnp.clip(a * saturation + b, 0, 1) * full)


@jax.jit
def _by_matrices(image: Any, of_rows: Any, of_columns: Any) -> jax.Array:
  x = jnp.einsum(
    "hi,wj,...ijc->...hwc",
    of_rows,
    of_columns,
    _unit(image),
    precision=lax.Precision.HIGHEST,
  )
  return _full(x)


@typed
def gaussian_noise(
  key: Key[Array, ""], image: Rgb, *, severity: int
) -> Corrupted:
  """Adds normal noise: x + c n.

  Args:
    key: A PRNG key.
    image: Values in 0..255.
    severity: 1 to 5; c = .08, .12, .18, .26, .38.

  Returns:
    The image with noise of its own in every number.

  Reference:
    Hendrycks and Dietterich 2019, "Gaussian noise".
  """
  c = severities.pick(severity, (0.08, 0.12, 0.18, 0.26, 0.38))
  return _gaussian_noise(key, image, c)


@typed
def shot_noise(key: Key[Array, ""], image: Rgb, *, severity: int) -> Corrupted:
  """Counts photons: Poisson(c x) / c.

  Args:
    key: A PRNG key.
    image: Values in 0..255.
    severity: 1 to 5; c = 60, 25, 12, 5, 3.

  Returns:
    The counts, scaled back.

  Reference:
    Hendrycks and Dietterich 2019, "Shot noise".
  """
  c = severities.pick(severity, (60, 25, 12, 5, 3))
  return _shot_noise(key, image, c)


@typed
def impulse_noise(
  key: Key[Array, ""], image: Rgb, *, severity: int
) -> Corrupted:
  """Replaces numbers by 0 or 255, each with the same chance.

  Args:
    key: A PRNG key.
    image: Values in 0..255.
    severity: 1 to 5; a share of .03, .06, .09, .17, .27 is replaced.

  Returns:
    The image, each channel hit by itself.

  Reference:
    Hendrycks and Dietterich 2019, "Impulse noise".
  """
  share = severities.pick(severity, (0.03, 0.06, 0.09, 0.17, 0.27))
  return _impulse_noise(key, image, share)


@typed
def speckle_noise(
  key: Key[Array, ""], image: Rgb, *, severity: int
) -> Corrupted:
  """Adds noise that is louder where it is bright: x + c x n.

  Args:
    key: A PRNG key.
    image: Values in 0..255.
    severity: 1 to 5; c = .15, .2, .35, .45, .6.

  Returns:
    The noisy image.

  Reference:
    Hendrycks and Dietterich 2019, "Speckle noise" (an extra corruption).
  """
  c = severities.pick(severity, (0.15, 0.2, 0.35, 0.45, 0.6))
  return _speckle_noise(key, image, c)


@typed
def gaussian_blur(image: Rgb, *, severity: int) -> Corrupted:
  """Blurs with a Gaussian; the border repeats the edge.

  Args:
    image: Values in 0..255.
    severity: 1 to 5; sigma = 1, 2, 3, 4, 6 pixels.

  Returns:
    The blurred image.

  Reference:
    Hendrycks and Dietterich 2019, "Gaussian blur" (an extra corruption).
  """
  sigma = severities.pick(severity, (1, 2, 3, 4, 6))
  x = images.as_float32(image)
  return blur.gaussian(x, sigma=sigma, border="edge")


@functools.cache
def _disk(radius: int, softness: float) -> np.ndarray:
  """A disk that sums to 1, its rim softened by a small Gaussian."""
  reach, rim = (8, 1) if radius <= 8 else (radius, 2)
  y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
  disk = (x * x + y * y <= radius * radius).astype(np.float64)
  taps = np.exp(-0.5 * (np.arange(-rim, rim + 1) / softness) ** 2)
  taps /= taps.sum()
  disk /= disk.sum()
  for axis in (0, 1):
    widths = [(rim, rim) if a == axis else (0, 0) for a in (0, 1)]
    wide = np.pad(disk, widths, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(wide, len(taps), axis)
    disk = windows @ taps
  return disk.astype(np.float32)


@typed
def defocus_blur(image: Rgb, *, severity: int) -> Corrupted:
  """Spreads every point over a disk, as a lens out of focus does.

  Args:
    image: Values in 0..255.
    severity: 1 to 5; the radius is 3, 4, 6, 8, 10 pixels.

  Returns:
    The blurred image; beyond the border it is reflected.

  Reference:
    Hendrycks and Dietterich 2019, "Defocus blur".
  """
  radius, softness = severities.pick(
    severity, ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))
  )
  return _spread(image, _disk(radius, softness))


@typed
def contrast(image: Rgb, *, severity: int) -> Corrupted:
  """Draws every channel towards its mean: c (x - mean) + mean.

  Args:
    image: Values in 0..255.
    severity: 1 to 5; c = .4, .3, .2, .1, .05.

  Returns:
    The image with less contrast.

  Reference:
    Hendrycks and Dietterich 2019, "Contrast".
  """
  c = severities.pick(severity, (0.4, 0.3, 0.2, 0.1, 0.05))
  return _contrast(image, c)


@typed
def brightness(image: Rgb, *, severity: int) -> Corrupted:
  """Adds c to the value of HSV, hue and saturation staying.

  Args:
    image: Values in 0..255.
    severity: 1 to 5; c = .1, .2, .3, .4, .5.

  Returns:
    The brighter image.

  Reference:
    Hendrycks and Dietterich 2019, "Brightness".
  """
  c = severities.pick(severity, (0.1, 0.2, 0.3, 0.4, 0.5))
  return _brightness(image, c)


@typed
def saturate(image: Rgb, *, severity: int) -> Corrupted:
  """Changes the saturation of HSV: s <- a s + b; grey becomes red if b > 0.

  Args:
    image: Values in 0..255.
    severity: 1 to 5; (a, b) = (.3, 0), (.1, 0), (2, 0), (5, .1), (20, .2).

  Returns:
    The image, paler at 1 and 2 and more colourful from 3 on.

  Reference:
    Hendrycks and Dietterich 2019, "Saturate" (an extra corruption).
  """
  a, b = severities.pick(
    severity, ((0.3, 0.0), (0.1, 0.0), (2.0, 0.0), (5.0, 0.1), (20.0, 0.2))
  )
  return _saturate(image, a, b)


@typed
def pixelate(image: Rgb, *, severity: int) -> Corrupted:
  """Averages over boxes and enlarges them again.

  Args:
    image: Values in 0..255.
    severity: 1 to 5; sides shrink to .6, .5, .4, .3, .25, rounded down.

  Returns:
    The image in blocks.

  Reference:
    Hendrycks and Dietterich 2019, "Pixelate".
  """
  share = severities.pick(severity, (0.6, 0.5, 0.4, 0.3, 0.25))
  height, width = np.shape(image)[-3:-1]
  matrices = _pixelation(height, share), _pixelation(width, share)
  return _by_matrices(image, *matrices)


def _boxes(size: int, new_size: int) -> np.ndarray:
  """Means over boxes: as rows, which pixels make up each new one.

  A box takes whole pixels, those whose centres lie in it, as PIL's does.
  """
  step = size / new_size
  centre = (np.arange(new_size)[:, None] + 0.5) * step
  away = (np.arange(size) - centre + 0.5) * (1 / max(step, 1))
  inside = (away > -0.5) & (away <= 0.5)
  return inside / inside.sum(1, keepdims=True)


@functools.cache
def _pixelation(size: int, share: float) -> np.ndarray:
  small = max(1, int(size * share))
  there_and_back = _boxes(small, size) @ _boxes(size, small)
  return there_and_back.astype(np.float32)


@typed
def jpeg_compression(image: Rgb, *, severity: int) -> Corrupted:
  """Gives what is left of an image in a small JPEG file: `jpeg.compress`.

  Args:
    image: Values in 0..255, rounded first.
    severity: 1 to 5; the quality is 25, 18, 15, 10, 7.

  Returns:
    The image as it is decoded.

  Reference:
    Hendrycks and Dietterich 2019, "JPEG".
  """
  quality = severities.pick(severity, (25, 18, 15, 10, 7))
  return jpeg.compress(image, quality=quality)


IMAGENET_C = (
  "gaussian_noise",
  "shot_noise",
  "impulse_noise",
  "defocus_blur",
  "glass_blur",
  "motion_blur",
  "zoom_blur",
  "snow",
  "frost",
  "fog",
  "brightness",
  "contrast",
  "elastic_transform",
  "pixelate",
  "jpeg_compression",
)
EXTRA = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
NAMES = (*IMAGENET_C, *EXTRA)

_DRAWN: dict[str, Callable[..., Corrupted]] = {
  "gaussian_noise": gaussian_noise,
  "shot_noise": shot_noise,
  "impulse_noise": impulse_noise,
  "glass_blur": distortion.glass_blur,
  "motion_blur": distortion.motion_blur,
  "snow": weather.snow,
  "frost": weather.frost,
  "fog": weather.fog,
  "elastic_transform": distortion.elastic_transform,
  "speckle_noise": speckle_noise,
  "spatter": weather.spatter,
}
_FIXED: dict[str, Callable[..., Corrupted]] = {
  "defocus_blur": defocus_blur,
  "zoom_blur": distortion.zoom_blur,
  "brightness": brightness,
  "contrast": contrast,
  "pixelate": pixelate,
  "jpeg_compression": jpeg_compression,
  "gaussian_blur": gaussian_blur,
  "saturate": saturate,
}


@typed
def corrupt(
  key: Key[Array, ""], image: Rgb, *, name: str, severity: int
) -> Corrupted:
  """Applies the corruption of that name.

  Args:
    key: A PRNG key; the corruptions that draw nothing ignore it.
    image: Values in 0..255.
    name: One of `NAMES`.
    severity: 1 to 5.

  Returns:
    The corrupted image, float32 in 0..255.

  Raises:
    ValueError: There is no such corruption or severity.

  Reference:
    Hendrycks and Dietterich 2019, Section 4.1.
  """
  if name not in NAMES:
    raise ValueError(f"name must be one of {', '.join(NAMES)}, got {name!r}.")
  if name in _DRAWN:
    return _DRAWN[name](key, image, severity=severity)
  return _FIXED[name](image, severity=severity)
