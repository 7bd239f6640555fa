"""Blur of images: averages over a window, rows and columns after each other.

Source: `scipy.ndimage.gaussian_filter` and `cv2.blur` give the same numbers.
"""

import functools
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from jaxshape import images
from jaxshape.filters import batches, windows
from jaxshape.typing import Array, ArrayLike, Float, Image, Num, Size, typed


def _weights(sigma: jax.Array, reach: jax.Array, *, radius: int) -> jax.Array:
  """The taps 0..radius; those after `reach` are 0, and they sum to 1 mirrored.

  A sigma of 0 leaves only the tap 0.
  """
  k = jnp.arange(radius + 1)
  spread = jnp.where(sigma > 0, sigma, 1)
  taps = jnp.exp(-0.5 * (k / spread) ** 2)
  taps = jnp.where((k <= reach) & ((sigma > 0) | (k == 0)), taps, 0)
  return taps / (taps[0] + 2 * taps[1:].sum())


def _by_matrix(size: int, radius: int) -> bool:
  """Whether a product with a banded matrix costs less than adding shifts.

  Measured on CPUs, where a product does some 30 times as much per second; on
  accelerators matrices suit tensor cores.
  """
  return radius > max(24, size // 32)


def _matrix(taps: jax.Array, source: np.ndarray, size: int) -> jax.Array:
  """The blur of one axis as a matrix, the border folded into its rows."""
  radius = len(taps) - 1
  row, shift = np.arange(size)[:, None], np.arange(-radius, radius + 1)
  columns = source[row + shift + radius]
  weights = jnp.where(columns < 0, 0, taps[np.abs(shift)])
  empty = jnp.zeros((size, size), taps.dtype)
  return empty.at[row, np.maximum(columns, 0)].add(weights)


def _blur_rows(x: jax.Array, taps: jax.Array, border: str) -> jax.Array:
  """Blurs [n, m, k] along its first axis."""
  size, radius = x.shape[0], len(taps) - 1
  flat = x.reshape(size, -1)
  if _by_matrix(size, radius):
    matrix = _matrix(taps, windows.places(size, radius, radius, border), size)
    out = jnp.matmul(matrix, flat, precision=lax.Precision.HIGHEST)
    return out.reshape(x.shape)
  wide = windows.extend(
    flat, axis=0, before=radius, after=radius, border=border
  )
  out = taps[0] * flat
  for k in range(1, radius + 1):
    before = wide[radius - k : radius - k + size]
    out = out + taps[k] * (before + wide[radius + k : radius + k + size])
  return out.reshape(x.shape)


def _blur_columns(x: jax.Array, taps: jax.Array, border: str) -> jax.Array:
  """Blurs [h, w, c] along its second axis.

  Rows of interleaved pixels: a shift by k columns is one by k * c numbers, so
  every access is contiguous and nothing is transposed.
  """
  height, size, channels = x.shape
  radius = len(taps) - 1
  if _by_matrix(size, radius):
    matrix = _matrix(taps, windows.places(size, radius, radius, border), size)
    return jnp.einsum("wj,hjc->hwc", matrix, x, precision=lax.Precision.HIGHEST)
  wide = windows.extend(x, axis=1, before=radius, after=radius, border=border)
  wide = wide.reshape(height, -1)
  length = size * channels
  out = taps[0] * x.reshape(height, length)
  for k in range(1, radius + 1):
    before, after = (radius - k) * channels, (radius + k) * channels
    pair = wide[:, before : before + length] + wide[:, after : after + length]
    out = out + taps[k] * pair
  return out.reshape(x.shape)


def _average(
  x: jax.Array, taps: jax.Array, border: str, *, even: bool
) -> jax.Array:
  """Blurs images [B, h, w, c] by the same taps, or by each one's [B, k].

  `even` says that no window has room to spare.
  """
  radius = taps.shape[-1] - 1
  shifts = not any(_by_matrix(n, radius) for n in x.shape[1:3])
  both = lambda x, t: _blur_columns(_blur_rows(x, t, border), t, border)

  def blur(x: jax.Array, taps: jax.Array) -> jax.Array:
    # Of taps that are shared, one matrix does for the whole batch.
    each = jax.vmap(both, (0, 0 if taps.ndim > 1 else None))
    if even and shifts:
      return each(x, taps)
    return windows.through_wrong_numbers(lambda x: each(x, taps), x)

  if taps.ndim > 1:
    return batches.in_groups(blur, x, taps)
  return batches.in_groups(lambda x: blur(x, taps), x)


@functools.partial(jax.jit, static_argnames=("radius", "even", "border"))
def _gaussian(
  image: jax.Array,
  sigma: jax.Array,
  reach: jax.Array,
  *,
  radius: int,
  even: bool,
  border: str,
) -> jax.Array:
  *leading, height, width, channels = image.shape
  size = math.prod(leading)
  x = images.as_float32(image).reshape(size, height, width, channels)
  sigma = jnp.asarray(sigma, jnp.float32)
  weights = functools.partial(_weights, radius=radius)
  if sigma.ndim == 0:
    taps = weights(sigma, reach)
  else:
    each = lambda a: jnp.broadcast_to(a, leading).reshape(-1)
    taps = jax.vmap(weights)(each(sigma), each(reach))
  out = _average(x, taps, border, even=even)
  return out.reshape(image.shape).astype(images.result_type(image))


@functools.partial(jax.jit, static_argnames=("radius", "border"))
def _box(image: jax.Array, *, radius: int, border: str) -> jax.Array:
  *leading, height, width, channels = image.shape
  size = math.prod(leading)
  x = images.as_float32(image).reshape(size, height, width, channels)
  # Whole numbers are summed exactly before they are divided.
  out = _average(x, jnp.ones(radius + 1), border, even=True)
  out = out / (2 * radius + 1) ** 2
  return out.reshape(image.shape).astype(images.result_type(image))


@typed
def gaussian(
  image: Image | images.Picture,
  *,
  sigma: Num[ArrayLike, "*#batch"],
  radius: Size | None = None,
  truncate: float | int = 4.0,
  border: str = "reflect",
) -> Float[Array, "*batch height width channels"]:
  """Blurs with a Gaussian.

  y(p) = sum over |k| <= radius of w(k) x(p + k), w(k) ~ exp(-k^2 / 2 sigma^2),
  the weights summing to 1. Computed in float32, whatever the type.

  Equal to `scipy.ndimage.gaussian_filter` with the same `truncate`, and to
  `cv2.GaussianBlur` with `ksize = 2 * radius + 1`, except for its sizes 3 to 9
  with sigma 0, where OpenCV has tables. The cost per pixel does not grow with
  sigma once the blur is wide.

  Args:
    image: In any unit; pictures of PIL are taken as 0..255.
    sigma: In pixels, above 0. In an array that broadcasts to the leading axes
      there may be zeros, which leave their images as they are. May be traced,
      then `radius` has to be given, and values are not checked. Each radius
      compiles anew, so give one where many sigmas are to come.
    radius: The window reaches this far; without it, as far as
      `truncate * sigma`, rounded, for each image by itself.
    truncate: Unused if `radius` is given.
    border: How the image goes on beyond its border: "reflect", "symmetric",
      "edge", "constant" (zeros) or "wrap", as `numpy.pad` has it.

  Returns:
    The blurred image, in the image's type if that is a float type and float32
    otherwise.

  Raises:
    ValueError: An option is outside its range.

  Reference:
    Gonzalez and Woods, "Digital Image Processing", 4th ed., 2018, Section 3.5.
  """
  values = images.read(image)
  windows.check_border(border)
  if not 0 < truncate < math.inf:
    raise ValueError(f"truncate must be above 0 and finite, got {truncate}.")
  if radius is not None and radius < 0:
    raise ValueError(f"radius must be at least 0, got {radius}.")
  known = images.concrete(sigma)
  if known is None and radius is None:
    raise ValueError("radius must be given where sigma is traced, got None.")
  if known is not None:
    low = known >= 0 if known.ndim else known > 0
    if not np.all(low & np.isfinite(known)):
      raise ValueError(f"sigma must be above 0 and finite, got {sigma}.")
  if values.size == 0:
    return jnp.asarray(values, images.result_type(values))
  if radius is not None:
    radius = int(radius)
    reach: Any = radius
  else:
    reach = np.floor(truncate * np.asarray(known) + 0.5).astype(np.int32)
    radius = int(reach.max())
  even = bool(np.min(reach) == radius)
  return _gaussian(
    values, sigma, reach, radius=radius, even=even, border=border
  )


@typed
def box(
  image: Image | images.Picture, *, size: Size, border: str = "reflect"
) -> Float[Array, "*batch height width channels"]:
  """Averages over a square: `cv2.blur`, `scipy.ndimage.uniform_filter`.

  y(p) = sum of x over the size x size pixels around p / size^2. Computed in
  float32, whatever the type.

  Args:
    image: In any unit; pictures of PIL are taken as 0..255.
    size: The square's side in pixels, odd.
    border: How the image goes on beyond its border, as in `gaussian`.

  Returns:
    The blurred image, in the image's type if that is a float type and float32
    otherwise.

  Raises:
    ValueError: An option is outside its range.

  Reference:
    Gonzalez and Woods, "Digital Image Processing", 4th ed., 2018, Section 3.5.
  """
  values = images.read(image)
  windows.check_border(border)
  side = windows.odd("size", size)
  if values.size == 0:
    return jnp.asarray(values, images.result_type(values))
  return _box(values, radius=side // 2, border=border)
