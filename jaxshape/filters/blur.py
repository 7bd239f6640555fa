"""Gaussian blur of images, with borders in NumPy's words.

| here        | NumPy       | SciPy     | OpenCV      | kornia      |
|-------------|-------------|-----------|-------------|-------------|
| `reflect`   | `reflect`   | `mirror`  | REFLECT_101 | `reflect`   |
| `symmetric` | `symmetric` | `reflect` | REFLECT     | (none)      |
| `edge`      | `edge`      | `nearest` | REPLICATE   | `replicate` |
| `wrap`      | `wrap`      | `wrap`    | WRAP        | `circular`  |
"""

import functools
from typing import Any, Literal

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from jaxshape import images
from jaxshape.typing import Array, ArrayLike, Float, Image, Num, typed

_MODES = ("reflect", "symmetric", "edge", "wrap")
_Mode = Literal["reflect", "symmetric", "edge", "wrap"]


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
  row = np.arange(size)[:, None]
  shift = np.arange(-radius, radius + 1)
  columns = source[row + shift + radius]
  empty = jnp.zeros((size, size), taps.dtype)
  return empty.at[row, columns].add(taps[np.abs(shift)])


def _blur_rows(x: jax.Array, taps: jax.Array, mode: _Mode) -> jax.Array:
  """Blurs [n, m, k] along its first axis."""
  size, radius = x.shape[0], len(taps) - 1
  # The row that stands at each place once the border is extended.
  source = np.pad(np.arange(size), radius, mode=mode)
  flat = x.reshape(size, -1)
  if _by_matrix(size, radius):
    out = jnp.matmul(
      _matrix(taps, source, size), flat, precision=lax.Precision.HIGHEST
    )
    return out.reshape(x.shape)
  wide = jnp.concatenate(
    [flat[source[:radius]], flat, flat[source[size + radius :]]]
  )
  out = taps[0] * flat
  for k in range(1, radius + 1):
    before = wide[radius - k : radius - k + size]
    out = out + taps[k] * (before + wide[radius + k : radius + k + size])
  return out.reshape(x.shape)


def _blur_columns(x: jax.Array, taps: jax.Array, mode: _Mode) -> jax.Array:
  """Blurs [h, w, c] along its second axis.

  Rows of interleaved pixels: a shift by k columns is one by k * c numbers, so
  every access is contiguous and nothing is transposed.
  """
  height, size, channels = x.shape
  radius = len(taps) - 1
  source = np.pad(np.arange(size), radius, mode=mode)
  if _by_matrix(size, radius):
    return jnp.einsum(
      "wj,hjc->hwc",
      _matrix(taps, source, size),
      x,
      precision=lax.Precision.HIGHEST,
    )
  wide = jnp.concatenate(
    [x[:, source[:radius]], x, x[:, source[size + radius :]]], axis=1
  ).reshape(height, -1)
  length = size * channels
  out = taps[0] * x.reshape(height, length)
  for k in range(1, radius + 1):
    before, after = (radius - k) * channels, (radius + k) * channels
    pair = wide[:, before : before + length] + wide[:, after : after + length]
    out = out + taps[k] * pair
  return out.reshape(x.shape)


@functools.partial(jax.jit, static_argnames=("radius", "mode"))
def _gaussian(
  image: jax.Array,
  sigma: jax.Array,
  reach: jax.Array,
  *,
  radius: int,
  mode: _Mode,
) -> jax.Array:
  *leading, height, width, channels = image.shape
  x = images.as_float32(image).reshape(-1, height, width, channels)
  taps = functools.partial(_weights, radius=radius)

  def blur(x: jax.Array, taps: jax.Array) -> jax.Array:
    return _blur_columns(_blur_rows(x, taps, mode), taps, mode)

  sigma = jnp.asarray(sigma, jnp.float32)
  if sigma.ndim == 0:  # One matrix for the whole batch.
    out = jax.vmap(blur, (0, None))(x, taps(sigma, reach))
  else:
    each = lambda a: jnp.broadcast_to(a, leading).reshape(-1)
    out = jax.vmap(blur)(x, jax.vmap(taps)(each(sigma), each(reach)))
  return out.reshape(image.shape).astype(images.result_type(image))


@typed
def gaussian(
  image: Image | images.Picture,
  *,
  sigma: Num[ArrayLike, "*#batch"],
  radius: int | None = None,
  truncate: float = 4.0,
  mode: str = "reflect",
) -> Float[Array, "*batch height width channels"]:
  """Blurs with a Gaussian, rows and columns after each other.

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
      then `radius` has to be given, and values are not checked.
    radius: The window reaches this far; without it, as far as
      `truncate * sigma`, rounded, for each image by itself.
    truncate: Unused if `radius` is given.
    mode: How the image goes on beyond its border: "reflect", "symmetric",
      "edge" or "wrap", as `numpy.pad` has it.

  Returns:
    The blurred image, in the image's type if that is a float type and float32
    otherwise.

  Raises:
    ValueError: An option is outside its range.

  Reference:
    Gonzalez and Woods, "Digital Image Processing", 4th ed., 2018, Section 3.5.
  """
  values = images.read(image)
  if mode not in _MODES:
    raise ValueError(
      f"mode must be one of {', '.join(_MODES)}, in NumPy's words, got "
      f"{mode!r}; SciPy's 'reflect' is 'symmetric', OpenCV's REFLECT_101 and "
      "SciPy's 'mirror' are 'reflect', 'nearest' and 'replicate' are 'edge'."
    )
  if not truncate > 0:
    raise ValueError(f"truncate must be above 0, got {truncate}.")
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
    reach: Any = radius
  else:
    reach = np.floor(truncate * np.asarray(known) + 0.5).astype(np.int32)
    radius = int(reach.max())
  return _gaussian(values, sigma, reach, radius=radius, mode=mode)
