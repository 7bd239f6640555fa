"""Black and white by comparing each pixel with the mean around it.

Notation: x is the image, m the mean around a pixel, r how far it reaches.
"""

import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from jaxshape import images
from jaxshape.filters import windows
from jaxshape.typing import Array, ArrayLike, Float, Image, Num, Size, typed

_METHODS = ("mean", "gaussian")

# OpenCV's Gaussian windows of few pixels are not samples of a Gaussian.
_TABLES = {
  3: (1, 2, 1),
  5: (1, 4, 6, 4, 1),
  7: (2, 7, 14, 18, 14, 7, 2),
  9: (4, 13, 30, 51, 60, 51, 30, 13, 4),
}


def _gaussian(size: int) -> np.ndarray:
  """OpenCV's weights for a window of this size, which sum to 1."""
  if size in _TABLES:
    weights = np.array(_TABLES[size], np.float64)
  else:
    sigma = 0.3 * ((size - 1) / 2 - 1) + 0.8
    weights = np.exp(-0.5 * ((np.arange(size) - size // 2) / sigma) ** 2)
  return (weights / weights.sum()).astype(np.float32)


def _sums(x: jax.Array, axis: int, size: int, step: int) -> jax.Array:
  """Sums of `size` numbers that lie `step` apart.

  Sums of 1, 2, 4, .. numbers make up one of any size, and each is the sum of
  two before it. Unlike differences of running sums they are exact wherever
  the result is, and a NaN stays in its window.
  """
  length = x.shape[axis] - (size - 1) * step
  out, start = None, 0
  for bit in range(size.bit_length()):
    width = (1 << bit) * step
    if size >> bit & 1:
      part = lax.slice_in_dim(x, start, start + length, axis=axis)
      out = part if out is None else out + part
      start += width
    if size >> (bit + 1):
      rest = x.shape[axis] - width
      x = lax.slice_in_dim(x, 0, rest, axis=axis) + lax.slice_in_dim(
        x, width, width + rest, axis=axis
      )
  assert out is not None
  return out


def _local_mean(x: jax.Array, size: int, method: str, border: str) -> jax.Array:
  """The mean around each pixel of images [B, H, W, C]."""
  number, height, width, channels = x.shape
  r = size // 2
  for axis in (1, 2):
    x = windows.extend(x, axis=axis, before=r, after=r, border=border)
  # Rows of interleaved pixels: every access is contiguous.
  x = x.reshape(number, height + 2 * r, (width + 2 * r) * channels)
  x = images.as_float32(x)
  if method == "mean":
    sums = _sums(_sums(x, 2, size, channels), 1, size, 1)
    return (sums * (1 / size**2)).reshape(number, height, width, channels)
  # In OpenCV's order of summation, so that halves are rounded as there.
  length, weights = width * channels, _gaussian(size)
  rows = weights[0] * x[..., :length]
  for k in range(1, size):
    rows += weights[k] * x[..., k * channels : k * channels + length]
  out = weights[r] * rows[:, r : r + height]
  for k in range(1, r + 1):
    pair = rows[:, r - k : r - k + height] + rows[:, r + k : r + k + height]
    out += weights[r + k] * pair
  return out.reshape(number, height, width, channels)


@functools.partial(
  jax.jit, static_argnames=("size", "method", "invert", "border")
)
def _adaptive(
  image: jax.Array,
  offset: Any,
  max_value: Any,
  *,
  size: int,
  method: str,
  invert: bool,
  border: str,
) -> jax.Array:
  height, width, channels = image.shape[-3:]
  per_image = lambda a: jnp.asarray(a, jnp.float32)[..., None, None, None]
  offset, high = per_image(offset), per_image(max_value)
  x = lax.stop_gradient(image)
  mean = _local_mean(
    x.reshape(-1, height, width, channels), size, method, border
  ).reshape(image.shape)
  x = images.as_float32(x)
  if image.dtype == jnp.uint8:
    mean = jnp.round(mean)
    offset = jnp.floor(offset) if invert else jnp.ceil(offset)
  bright = x > mean - offset
  out = jnp.where(bright != invert, high, 0)
  if image.dtype != jnp.uint8:
    out = jnp.where(jnp.isfinite(mean), out, jnp.nan)
  return out.astype(images.result_type(image))


@typed
def adaptive(
  image: Image | images.Picture,
  *,
  block_size: Size = 9,
  offset: Num[ArrayLike, "*#batch"] = 9.0,
  method: str = "mean",
  max_value: Num[ArrayLike, "*#batch"] = 255.0,
  invert: bool = False,
  border: str = "edge",
) -> Float[Array, "*batch height width channels"]:
  """Tells pixels from those clearly darker than what surrounds them.

  y = max_value where x > m - offset and 0 elsewhere, each channel by itself,
  with m the mean of the window around the pixel; with a positive offset only
  lines and the dark sides of edges become 0.

  For uint8 this is `cv2.adaptiveThreshold`: m is rounded to whole numbers
  first, and so is the offset (up, or down if inverted). Other types are
  compared as they are. `gaussian` has OpenCV's weights, which are tables for
  windows of 3 to 9 pixels and have sigma = 0.3 (block_size / 2 - 1.5) + 0.8
  above.

  The result is a step function: gradients are zero. Where a window holds a
  number that is NaN or infinite, the result is NaN.

  Args:
    image: In any unit; uint8 arrays and pictures of PIL are taken as 0..255.
    block_size: The window's side in pixels, odd and at least 3.
    offset: What to take from the mean, in the image's units; OpenCV's C.
    method: "mean" weighs all pixels of the window alike, "gaussian" those near
      its middle more.
    max_value: What bright pixels get; one number per image, as with `offset`.
    invert: Swaps bright and dark, as OpenCV's `THRESH_BINARY_INV` does.
    border: How the image goes on beyond its border, in NumPy's words.

  Returns:
    0 and max_value, in the image's type if that is a float type and float32
    otherwise.

  Raises:
    ValueError: An option is outside its range.
    InputError: A picture of PIL has more than eight bits per channel.

  Reference:
    Gonzalez and Woods, "Digital Image Processing", 4th ed., 2018, Section
    10.3, "Variable thresholding based on local image properties", with a
    difference in place of the factors.
  """
  values = images.read(image)
  side = windows.odd("block_size", block_size, least=3)
  if method not in _METHODS:
    raise ValueError(
      f"method must be one of {', '.join(_METHODS)}, got {method!r}."
    )
  windows.check_border(border)
  images.warn_of_units(values, "offset", images.concrete(offset))
  for name, value in (("offset", offset), ("max_value", max_value)):
    known = images.concrete(value)
    if known is not None and not np.isfinite(known).all():
      raise ValueError(f"{name} must be finite, got {value}.")
  if values.size == 0:
    return jnp.asarray(values, images.result_type(values))
  return _adaptive(
    values,
    offset,
    max_value,
    size=side,
    method=method,
    invert=invert,
    border=border,
  )
