"""What JPEG does to an image, without the file.

Notation: Y, Cb, Cr are lightness and the two colour differences; a block is
8 x 8 pixels; Q is the table of step sizes by which its coefficients are divided
before they are rounded.
"""

import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from jaxshape import images
from jaxshape.typing import Array, ArrayLike, Float, Num, Size, typed

# Step sizes at quality 50, rows by vertical frequency.
_LUMA = np.array(
  [
    [16, 11, 10, 16, 24, 40, 51, 61],
    [12, 12, 14, 19, 26, 58, 60, 55],
    [14, 13, 16, 24, 40, 57, 69, 56],
    [14, 17, 22, 29, 51, 87, 80, 62],
    [18, 22, 37, 56, 68, 109, 103, 77],
    [24, 35, 55, 64, 81, 104, 113, 92],
    [49, 64, 78, 87, 103, 121, 120, 101],
    [72, 92, 95, 98, 112, 100, 103, 99],
  ]
)
_CHROMA = np.full((8, 8), 99)
_CHROMA[:4, :4] = [
  [17, 18, 24, 47],
  [18, 21, 26, 66],
  [24, 26, 56, 99],
  [47, 66, 99, 99],
]


def _table(table: np.ndarray, quality: int) -> np.ndarray:
  """Step sizes at a quality, as libjpeg scales them."""
  percent = 5000 // quality if quality < 50 else 200 - 2 * quality
  scaled = (table * percent + 50) // 100
  # Rows and columns within blocks, as `_coded` keeps them.
  return np.clip(scaled, 1, 255).astype(np.float32)[:, None, :]


@functools.cache
def _cosines() -> np.ndarray:
  """The orthonormal DCT-II of eight values: frequencies are rows."""
  k, i = np.mgrid[:8, :8]
  basis = np.cos((2 * i + 1) * k * np.pi / 16) / 2
  basis[0] /= np.sqrt(2)
  return basis.astype(np.float32)


def _extended(x: jax.Array, *, height: int, width: int) -> jax.Array:
  """Repeats the last row and column of [..., h, w]."""
  more = [(0, 0)] * (x.ndim - 2)
  more += [(0, height - x.shape[-2]), (0, width - x.shape[-1])]
  return jnp.pad(x, more, mode="edge")


def _up(n: int, step: int) -> int:
  return -(-n // step) * step


def _coded(x: jax.Array, steps: Any) -> jax.Array:
  """A plane [..., h, w] in 0..255 through the coefficients of its blocks."""
  height, width = x.shape[-2:]
  x = _extended(x, height=_up(height, 8), width=_up(width, 8))
  rows, columns = x.shape[-2] // 8, x.shape[-1] // 8
  blocks = x.reshape(*x.shape[:-2], rows, 8, columns, 8) - 128
  cosines = _cosines()
  product = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
  out = product("vj,...aibj->...aibv", cosines, blocks)
  out = product("ui,...aibv->...aubv", cosines, out)
  # In eighths, as libjpeg has them, coefficients half way between two steps
  # are exactly that, and go away from 0: rounding errors would toss a coin.
  share = jnp.round(8 * jnp.abs(out)) + 4 * steps
  out = jnp.sign(out) * jnp.floor(share / (8 * steps)) * steps
  out = product("ui,...aubv->...aibv", cosines, out)
  out = product("vj,...aibv->...aibj", cosines, out)
  out = jnp.clip(jnp.round(out) + 128, 0, 255)
  return out.reshape(x.shape)[..., :height, :width]


def _halved(x: jax.Array) -> jax.Array:
  """Means of 2 x 2 pixels, as integers."""
  height, width = x.shape[-2:]
  x = _extended(x, height=_up(height, 2), width=_up(width, 16))
  height, width = x.shape[-2] // 2, x.shape[-1] // 2
  total = x.reshape(*x.shape[:-2], height, 2, width, 2).sum((-3, -1))
  # Halves and quarters are rounded down and up in turn.
  return jnp.floor((total + 1 + np.arange(width) % 2) / 4)


def _doubled(x: jax.Array) -> jax.Array:
  """Twice as many rows and columns: 3/4 of the nearest, 1/4 of the next."""
  height, width = x.shape[-2:]
  # So narrow ones are repeated by libjpeg.
  if width <= 2:
    return jnp.repeat(jnp.repeat(x, 2, -2), 2, -1)
  border = [(0, 0)] * (x.ndim - 2)
  wide = jnp.pad(x, [*border, (1, 1), (0, 0)], mode="edge")
  pair = [3 * x + wide[..., :-2, :], 3 * x + wide[..., 2:, :]]
  x = jnp.stack(pair, -2).reshape(*x.shape[:-2], 2 * height, width)
  wide = jnp.pad(x, [*border, (0, 0), (1, 1)], mode="edge")
  before = jnp.floor((3 * x + wide[..., :-2] + 8) / 16)
  after = jnp.floor((3 * x + wide[..., 2:] + 7) / 16)
  return jnp.stack([before, after], -1).reshape(*x.shape[:-1], 2 * width)


@jax.jit
def _compress(image: Any, luma: Any, chroma: Any) -> jax.Array:
  x = jnp.clip(jnp.round(images.as_float32(image)), 0, 255)
  height, width = x.shape[-3:-1]
  red, green, blue = x[..., 0], x[..., 1], x[..., 2]
  y = jnp.round(0.299 * red + 0.587 * green + 0.114 * blue)
  cb = jnp.round(-0.168736 * red - 0.331264 * green + 0.5 * blue) + 128
  cr = jnp.round(0.5 * red - 0.418688 * green - 0.081312 * blue) + 128
  y = _coded(y, luma)
  colours = _halved(jnp.stack([cb, cr]))
  # What goes beyond the image is coded, but not looked at again.
  colours = _coded(colours, chroma)[..., : _up(width, 2) // 2]
  colours = _doubled(colours)[..., :height, :width]
  cb, cr = colours[0] - 128, colours[1] - 128
  red = y + jnp.floor(1.402 * cr + 0.5)
  green = y + jnp.floor(0.5 - 0.344136 * cb - 0.714136 * cr)
  blue = y + jnp.floor(1.772 * cb + 0.5)
  return jnp.clip(jnp.stack([red, green, blue], -1), 0, 255)


@typed
def compress(
  image: Num[ArrayLike, "*batch height width 3"], *, quality: Size = 75
) -> Float[Array, "*batch height width 3"]:
  """Gives the image that comes back from a JPEG file.

  Y = .299 R + .587 G + .114 B, Cb and Cr averaged over 2 x 2 pixels; of every
  block, round(DCT / Q) Q is kept; Cb and Cr are interpolated on the way back.
  Q is the standard's table times 5000 / quality percent below 50 and
  200 - 2 quality percent from there, at least 1 and at most 255.

  Rounded where libjpeg rounds, so that it differs from Pillow's
  `save(..., "JPEG", quality=quality)` by a quarter of a grey level on average:
  its DCT is of integers. No derivative: it is 0 almost everywhere.

  Args:
    image: Values in 0..255, rounded first.
    quality: 1 to 100.

  Returns:
    The image as it is decoded, whole numbers in 0..255.

  Raises:
    ValueError: The quality is outside its range.

  Reference:
    ITU-T T.81, "Digital Compression and Coding of Continuous-tone Still
    Images", 1992, Annex A.3 and K.1; Wallace, "The JPEG Still Picture
    Compression Standard", Communications of the ACM, 1991.
  """
  if not 1 <= quality <= 100:
    raise ValueError(f"quality must be within 1..100, got {quality}.")
  if 0 in np.shape(image):
    return jnp.zeros(np.shape(image), jnp.float32)
  quality = int(quality)
  return _compress(image, _table(_LUMA, quality), _table(_CHROMA, quality))
