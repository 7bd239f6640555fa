"""Steps of a Gaussian pyramid: an image at half and at twice its size.

Notation: w = (1, 4, 6, 4, 1) / 16 along rows and columns, i and j places in
the smaller and the larger image.
"""

from collections.abc import Callable, Sequence
import functools
import math

import jax
from jax import lax
import jax.numpy as jnp

from jaxshape import images
from jaxshape.filters import batches, windows
from jaxshape.typing import Array, Float, Image, Size, typed


def _whole(x: jax.Array, image: jax.Array) -> jax.Array:
  """Rounds halves up, as integer arithmetic does, what comes of uint8."""
  return jnp.floor(x + 0.5) if image.dtype == jnp.uint8 else x


def _halve(x: jax.Array, axis: int, border: str) -> jax.Array:
  """Sixteen times the smaller image, along one axis."""
  size = (x.shape[axis] + 1) // 2
  wide = windows.extend(x, axis=axis, before=2, after=2, border=border)
  a, b, c, d, e = (
    lax.slice_in_dim(wide, k, k + 2 * size - 1, stride=2, axis=axis)
    for k in range(5)
  )
  return (a + e) + 4 * (b + d) + 6 * c


def _double(x: jax.Array, axis: int, border: str, size: int) -> jax.Array:
  """Eight times the larger image, along one axis."""
  n = x.shape[axis]
  if border == "reflect":
    # The larger image is mirrored: at its end about a pixel that has no
    # counterpart here, beyond which the last one comes again.
    first = lax.slice_in_dim(x, min(1, n - 1), min(1, n - 1) + 1, axis=axis)
    last = lax.slice_in_dim(x, n - 1, n, axis=axis)
    wide = jnp.concatenate([first, x, last], axis=axis)
  else:
    wide = windows.extend(x, axis=axis, before=1, after=1, border=border)
  before, at, after = (
    lax.slice_in_dim(wide, k, k + n, axis=axis) for k in range(3)
  )
  both = jnp.stack([before + 6 * at + after, 4 * (at + after)], axis=axis + 1)
  shape = list(x.shape)
  shape[axis] = 2 * n
  return lax.slice_in_dim(both.reshape(shape), 0, size, axis=axis)


def _in_groups(run: Callable[..., jax.Array], image: jax.Array) -> jax.Array:
  """Runs a filter of [B, h, w, c] over any leading axes."""
  leading = image.shape[:-3]
  x = images.as_float32(image)
  x = x.reshape(math.prod(leading), *image.shape[-3:])
  out = batches.in_groups(run, x)
  return out.reshape(*leading, *out.shape[1:])


@functools.partial(jax.jit, static_argnames=("border",))
def _down(image: jax.Array, *, border: str) -> jax.Array:
  x = _in_groups(lambda x: _halve(_halve(x, 1, border), 2, border), image)
  return _whole(x / 256, image).astype(images.result_type(image))


@functools.partial(jax.jit, static_argnames=("size", "border"))
def _up(image: jax.Array, *, size: tuple[int, int], border: str) -> jax.Array:
  def both(x: jax.Array) -> jax.Array:
    return _double(_double(x, 2, border, size[1]), 1, border, size[0])

  x = _in_groups(both, image)
  return _whole(x / 64, image).astype(images.result_type(image))


@typed
def down(
  image: Image | images.Picture, *, border: str = "reflect"
) -> Float[Array, "*batch down_height down_width channels"]:
  """Blurs an image and keeps every other pixel of every other row.

  y(i) = sum over |k| <= 2 of w(k) x(2 i + k) along rows and columns. Equal to
  `cv2.pyrDown`; what comes of uint8 is rounded as there, halves up.

  Args:
    image: In any unit; pictures of PIL are taken as 0..255.
    border: How the image goes on beyond its border, in NumPy's words.

  Returns:
    The image of (height + 1) // 2 rows and (width + 1) // 2 columns, in the
    image's type if that is a float type and float32 otherwise.

  Raises:
    ValueError: An option is outside its range.
    InputError: A picture of PIL has more than eight bits per channel.

  Reference:
    Burt and Adelson, "The Laplacian Pyramid as a Compact Image Code", IEEE
    Trans. Communications 1983, Eq. 1, with a = 0.375.
  """
  values = images.read(image)
  windows.check_border(border)
  if values.size == 0:
    half = [(n + 1) // 2 for n in values.shape[-3:-1]]
    shape = (*values.shape[:-3], *half, values.shape[-1])
    return jnp.zeros(shape, images.result_type(values))
  return _down(values, border=border)


@typed
def up(
  image: Image | images.Picture,
  *,
  size: Sequence[Size] | None = None,
  border: str = "reflect",
) -> Float[Array, "*batch up_height up_width channels"]:
  """Enlarges an image to twice its size, smoothly.

  y(j) = 2 * sum over |k| <= 2 of w(k) z(j + k) along rows and columns, where
  z(2 i) = x(i) and z is 0 between. Equal to `cv2.pyrUp`; what comes of uint8
  is rounded as there, halves up.

  Args:
    image: In any unit; pictures of PIL are taken as 0..255.
    size: Height and width of the result: each twice the image's, as without
      it, or one less, so that `down` gives the image's size again.
    border: How the image goes on beyond its border, in NumPy's words; only
      "reflect" is z's border instead, as in OpenCV: z ends with a 0 about
      which it is mirrored, so x's last pixel comes twice.

  Returns:
    The larger image, in the image's type if that is a float type and float32
    otherwise.

  Raises:
    ValueError: An option is outside its range.
    InputError: A picture of PIL has more than eight bits per channel.

  Reference:
    Burt and Adelson, "The Laplacian Pyramid as a Compact Image Code", IEEE
    Trans. Communications 1983, Eq. 2, with a = 0.375.
  """
  values = images.read(image)
  windows.check_border(border)
  whole = tuple(2 * n for n in values.shape[-3:-1])
  if size is None:
    size = whole
  elif len(size) != 2 or any(
    n not in (m, m - 1) for n, m in zip(size, whole, strict=True)
  ):
    raise ValueError(f"size must be {whole} or one less, got {size}.")
  height, width = (int(n) for n in size)
  if values.size == 0:
    shape = (*values.shape[:-3], height, width, values.shape[-1])
    return jnp.zeros(shape, images.result_type(values))
  return _up(values, size=(height, width), border=border)
