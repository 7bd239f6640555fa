"""Pixels out of place: motion, zoom, glass and elastic distortions.

Images are [..., H, W, 3] in 0..255. The first three functions move pixels of
any image; the others are corruptions of ImageNet-C, with parameters for some
224 pixels as in `corruption`, and draw anew for every image of a batch.

Reference for the corruptions: Hendrycks and Dietterich, "Benchmarking Neural
Network Robustness to Common Corruptions and Perturbations", ICLR 2019, Section
4.1; the parameters are those of the code that made the published set.
"""

import functools
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from jaxshape import images
from jaxshape.filters import blur, severities
from jaxshape.typing import (
  Array,
  ArrayLike,
  Float,
  Image,
  Key,
  Num,
  Size,
  typed,
)

Rgb = Num[ArrayLike, "*batch height width 3"]
Corrupted = Float[Array, "*batch height width 3"]
Plane = Num[ArrayLike, "*batch new_height new_width"]


def _unit(image: Any) -> jax.Array:
  return images.as_float32(image) / 255


def _full(x: jax.Array) -> jax.Array:
  return 255 * jnp.clip(x, 0, 1)


def _each(run: Any, image: jax.Array, *rest: Any) -> jax.Array:
  """Maps over the leading axes, to which the rest is broadcast."""
  *leading, height, width, channels = image.shape
  size = math.prod(leading)
  if image.size == 0:
    return image
  flat = image.reshape(size, height, width, channels)
  return jax.vmap(run)(flat, *rest).reshape(*leading, height, width, channels)


# Moving pixels.


def _smeared(x: jax.Array, angle: Any, weights: jax.Array) -> jax.Array:
  """Adds up shifted copies of [h, w, c]."""
  n, (height, width, _) = len(weights), x.shape
  i = jnp.arange(n)
  # Halves are rounded down.
  down = jnp.ceil(i * jnp.sin(angle) - 0.5).astype(jnp.int32)
  right = jnp.ceil(i * jnp.cos(angle) - 0.5).astype(jnp.int32)
  wide = jnp.pad(x, [(n, n), (n, n), (0, 0)], mode="edge")

  def add(i: Any, out: jax.Array) -> jax.Array:
    start = (n + down[i], n + right[i], 0)
    part = lax.dynamic_slice(wide, start, (height, width, x.shape[2]))
    return out + weights[i] * part

  return lax.fori_loop(0, n, add, jnp.zeros_like(x))


def _one_sided(radius: int, sigma: Any) -> jax.Array:
  """Half a Gaussian of 2 radius + 1 taps that sum to 1."""
  taps = jnp.exp(-0.5 * (jnp.arange(2 * radius + 1) / sigma) ** 2)
  return taps / taps.sum()


@functools.partial(jax.jit, static_argnames=("radius",))
def _smear(image: Any, angle: Any, sigma: Any, *, radius: int) -> jax.Array:
  x = images.as_float32(image)
  angles = jnp.broadcast_to(jnp.deg2rad(angle), x.shape[:-3]).reshape(-1)
  weights = _one_sided(radius, sigma)
  return _each(lambda x, a: _smeared(x, a, weights), x, angles)


@typed
def smear(
  image: Image,
  *,
  angle: Num[ArrayLike, "*#batch"],
  sigma: Num[ArrayLike, ""],
  radius: Size,
) -> Float[Array, "*batch height width channels"]:
  """Blurs along a line, as what moves while it is looked at.

  y(p) = sum over i = 0..2 radius of w(i) x(p + round(i (sin a, cos a))) with
  w(i) ~ exp(-i^2 / 2 sigma^2), the weights summing to 1.

  Args:
    image: In any unit; it goes on beyond its border as its edge does.
    angle: Of the line in degrees, from right to down; may be one per image.
    sigma: In pixels, above 0; not checked where it is traced.
    radius: Half as far as the line reaches.

  Returns:
    The blurred image, float32.

  Raises:
    ValueError: An option is outside its range.

  Reference:
    Hendrycks and Dietterich 2019, "Motion blur"; the formula is that of
    ImageMagick's `-motion-blur`, which they call.
  """
  known = images.concrete(sigma)
  if known is not None and not 0 < known < math.inf:
    raise ValueError(f"sigma must be above 0 and finite, got {sigma}.")
  if radius < 0:
    raise ValueError(f"radius must be at least 0, got {radius}.")
  return _smear(image, angle, sigma, radius=int(radius))


def _zoom_taps(size: int, factor: float) -> tuple[np.ndarray, ...]:
  """Between which two pixels each new one lies, and how far from the first."""
  crop = math.ceil(size / factor)
  start = (size - crop) // 2
  new_size = round(crop * factor)
  # The enlarged crop has a few pixels too many.
  place = np.arange(size) + (new_size - size) // 2
  place = place * ((crop - 1) / max(new_size - 1, 1))
  low = np.minimum(np.floor(place).astype(np.int32), max(crop - 2, 0))
  high = np.minimum(low + 1, crop - 1)
  share = (place - low).astype(np.float32)
  return (start + low).astype(np.int32), (start + high).astype(np.int32), share


def _between(x: jax.Array, axis: int, taps: Any) -> jax.Array:
  low, high, share = taps
  share = share.reshape(-1, *[1] * (-axis - 1))
  first, second = (jnp.take(x, i, axis=axis, mode="clip") for i in (low, high))
  return first + share * (second - first)


def _zoomed(x: jax.Array, rows: Any, columns: Any) -> jax.Array:
  return _between(_between(x, -3, rows), -2, columns)


_zoom = jax.jit(lambda x, *taps: _zoomed(images.as_float32(x), *taps))


@typed
def zoom(
  image: Image, *, factor: float | int
) -> Float[Array, "*batch height width channels"]:
  """Enlarges the middle of an image to the image's own size, bilinearly.

  Equal to `scipy.ndimage.zoom(crop, factor, order=1)`, with crop the middle
  ceil(size / factor) rows and columns, cut to the size around its middle.

  Args:
    image: In any unit.
    factor: At least 1.

  Returns:
    The enlarged middle, float32.

  Raises:
    ValueError: The factor is outside its range.

  Reference:
    Hendrycks and Dietterich 2019, "Zoom blur", as in the code that made the
    published set.
  """
  if not 1 <= factor < math.inf:
    raise ValueError(f"factor must be at least 1 and finite, got {factor}.")
  if 0 in np.shape(image):
    return jnp.zeros(np.shape(image), jnp.float32)
  height, width = np.shape(image)[-3:-1]
  return _zoom(image, _zoom_taps(height, factor), _zoom_taps(width, factor))


def _mirrored(index: jax.Array, size: int, border: str) -> jax.Array:
  """Where in a line the pixel of an index beyond it is found."""
  if border == "edge":
    return jnp.clip(index, 0, size - 1)
  again = int(border == "symmetric")
  period = max(2 * (size - 1 + again), 1)
  index = index % period
  return jnp.where(index < size, index, period - again - index)


def _warped(
  x: jax.Array, rows: jax.Array, columns: jax.Array, border: str
) -> jax.Array:
  """Reads [h, w, c] at places [H, W] in between."""
  height, width = x.shape[:2]
  # Far beyond the border one place is as good as another, and integers end.
  rows, columns = (jnp.clip(a, -1e6, 1e6) for a in (rows, columns))
  top, left = jnp.floor(rows), jnp.floor(columns)
  down, right = (rows - top)[..., None], (columns - left)[..., None]
  i, j = top.astype(jnp.int32), left.astype(jnp.int32)
  i, below = (_mirrored(a, height, border) for a in (i, i + 1))
  j, beside = (_mirrored(a, width, border) for a in (j, j + 1))
  flat = x.reshape(height * width, -1)
  at = lambda i, j: jnp.take(flat, i * width + j, axis=0, mode="clip")
  upper = at(i, j) + right * (at(i, beside) - at(i, j))
  lower = at(below, j) + right * (at(below, beside) - at(below, j))
  return upper + down * (lower - upper)


@functools.partial(jax.jit, static_argnames=("border",))
def _warp(image: Any, rows: Any, columns: Any, *, border: str) -> jax.Array:
  x = images.as_float32(image)
  *leading, height, width, channels = x.shape
  rows, columns = (images.as_float32(a) for a in (rows, columns))
  new = rows.shape[-2:]
  if 0 in (x.size, rows.size):
    return jnp.zeros((*leading, *new, channels), jnp.float32)
  run = jax.vmap(functools.partial(_warped, border=border))
  out = run(
    x.reshape(-1, height, width, channels),
    rows.reshape(-1, *new),
    columns.reshape(-1, *new),
  )
  return out.reshape(*leading, *new, channels)


@typed
def warp(
  image: Image, rows: Plane, columns: Plane, *, border: str = "reflect"
) -> Float[Array, "*batch new_height new_width channels"]:
  """Reads an image at places between its pixels, bilinearly.

  Equal to `scipy.ndimage.map_coordinates(order=1)` for each channel.

  Args:
    image: In any unit.
    rows: The row of each new pixel, in pixels from 0.
    columns: Its column.
    border: How the image goes on beyond its border: "reflect", "symmetric" or
      "edge", as `numpy.pad` has it.

  Returns:
    The warped image, float32, of the size of `rows`.

  Raises:
    ValueError: There is no such border.

  Reference:
    Gonzalez and Woods, "Digital Image Processing", 4th ed., 2018, Section 2.4.
  """
  if border not in ("reflect", "symmetric", "edge"):
    raise ValueError(
      f"border must be reflect, symmetric or edge, got {border!r}."
    )
  return _warp(image, rows, columns, border=border)


# The corruptions.


@functools.partial(jax.jit, static_argnames=("radius",))
def _motion_blur(key: Any, image: Any, sigma: Any, *, radius: int) -> jax.Array:
  weights = _one_sided(radius, sigma)

  def run(key: Any, x: jax.Array) -> jax.Array:
    angle = jax.random.uniform(key, (), minval=-45, maxval=45)
    return _smeared(x, jnp.deg2rad(angle), weights)

  return _full(severities.per_image(key, run, _unit(image)))


@typed
def motion_blur(key: Key[Array, ""], image: Rgb, *, severity: int) -> Corrupted:
  """Blurs along a line that a camera moves by: `smear`.

  Args:
    key: A PRNG key; gives the angle, even within -45..45 degrees.
    image: Values in 0..255.
    severity: 1 to 5; (radius, sigma) = (10, 3), (15, 5), (15, 8), (15, 12),
      (20, 15) pixels.

  Returns:
    The blurred image; beyond the border it goes on as its edge does.

  Reference:
    Hendrycks and Dietterich 2019, "Motion blur".
  """
  radius, sigma = severities.pick(
    severity, ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))
  )
  return _motion_blur(key, image, sigma, radius=radius)


@jax.jit
def _zoom_blur(image: Any, rows: Any, columns: Any) -> jax.Array:
  x = _unit(image)
  add = lambda total, taps: (total + _zoomed(x, *taps), None)
  total, _ = lax.scan(add, x, (rows, columns))
  return _full(total / (len(rows[0]) + 1))


def _all_taps(size: int, factors: np.ndarray) -> tuple[np.ndarray, ...]:
  taps = zip(*(_zoom_taps(size, factor) for factor in factors), strict=True)
  return tuple(np.stack(part) for part in taps)


@typed
def zoom_blur(image: Rgb, *, severity: int) -> Corrupted:
  """Averages the image and what a camera sees that moves towards it.

  y = (x + sum over f of zoom(x, f)) / (n + 1), for n factors f from 1 on.

  Args:
    image: Values in 0..255.
    severity: 1 to 5; factors to 1.1 and 1.15 in steps of .01, to 1.2 and 1.24
      in steps of .02, to 1.3 in steps of .03.

  Returns:
    The blurred image.

  Reference:
    Hendrycks and Dietterich 2019, "Zoom blur".
  """
  end, step = severities.pick(
    severity,
    ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
  )
  # Whether the end is one of them is up to rounding, as it was then.
  factors = np.arange(1, end, step)
  if 0 in np.shape(image):
    return jnp.zeros(np.shape(image), jnp.float32)
  height, width = np.shape(image)[-3:-1]
  return _zoom_blur(
    image, _all_taps(height, factors), _all_taps(width, factors)
  )


def _sources(down: jax.Array, right: jax.Array, reach: int) -> jax.Array:
  """Where each pixel comes from if they are overwritten one after the other.

  From the last pixel to the first, x(p) <- x(p + offset(p)), pixels near the
  border excepted. A pixel thus gets what another one has already got, if that
  one comes later in the image; the chain ends at one that has not been
  reached. All chains are followed at once, twice as far each time.
  """
  height, width = down.shape
  row, column = np.mgrid[:height, :width]
  inside = (row > reach) & (row <= height - reach)
  inside &= (column > reach) & (column <= width - reach)
  here = row * width + column
  goal = jnp.where(inside, here + down * width + right, here).reshape(-1)
  here = here.reshape(-1)
  last = jnp.where(goal > here, goal, here)
  # Each step is forward with a chance below .43: 64 in a row do not happen.
  for _ in range(6):
    last = last[last]
  return goal[last]


@functools.partial(jax.jit, static_argnames=("reach", "times"))
def _glass_blur(
  key: Any, image: Any, sigma: Any, *, reach: int, times: int
) -> jax.Array:
  def shuffle(key: Any, x: jax.Array) -> jax.Array:
    height, width, channels = x.shape
    source = jnp.arange(height * width)
    for part in jax.random.split(key, times):
      shape = (2, height, width)
      offset = jax.random.randint(part, shape, -reach, reach)
      source = source[_sources(offset[0], offset[1], reach)]
    return x.reshape(-1, channels)[source].reshape(x.shape)

  soft = functools.partial(blur.gaussian, sigma=sigma, radius=6, border="edge")
  x = soft(_unit(image))
  return _full(soft(severities.per_image(key, shuffle, x)))


@typed
def glass_blur(key: Key[Array, ""], image: Rgb, *, severity: int) -> Corrupted:
  """Looks through frosted glass: blur, local shuffling, blur.

  Several times, from the last pixel to the first, each one becomes what stands
  at an offset drawn evenly from -reach..reach - 1 in rows and columns; within
  the reach of the border none does.

  Args:
    key: A PRNG key.
    image: Values in 0..255.
    severity: 1 to 5; (sigma, reach, times) = (.7, 1, 2), (.9, 2, 1), (1, 2, 3),
      (1.1, 3, 2), (1.5, 4, 2).

  Returns:
    The distorted image.

  Reference:
    Hendrycks and Dietterich 2019, "Glass blur".

  Note:
    The published code means to swap the two pixels, but its views of one array
    make it copy, and so does this one: in parallel, the outcome for given
    offsets is the same. Not rounded to bytes after the first blur.
  """
  sigma, reach, times = severities.pick(
    severity, ((0.7, 1, 2), (0.9, 2, 1), (1.0, 2, 3), (1.1, 3, 2), (1.5, 4, 2))
  )
  return _glass_blur(key, image, sigma, reach=reach, times=times)


def _affine(
  corners: np.ndarray, moved: jax.Array, height: int, width: int
) -> tuple[jax.Array, jax.Array]:
  """Rows and columns that take each moved corner back to its place."""
  edges = np.stack([corners[1] - corners[0], corners[2] - corners[0]], 1)
  (a, b), (c, d) = jnp.stack([moved[1] - moved[0], moved[2] - moved[0]], 1)
  area = a * d - b * c
  # Corners in a line have no way back.
  area = jnp.where(jnp.abs(area) > 1e-3, area, 1e-3)
  inverse = jnp.stack([jnp.stack([d, -b]), jnp.stack([-c, a])]) / area
  matrix = jnp.matmul(edges, inverse, precision=lax.Precision.HIGHEST)
  row, column = np.mgrid[:height, :width].astype(np.float32)
  x, y = column - moved[0, 0], row - moved[0, 1]
  (a, b), (c, d) = matrix
  return corners[0, 1] + c * x + d * y, corners[0, 0] + a * x + b * y


@functools.partial(jax.jit, static_argnames=("sigma",))
def _elastic_transform(
  key: Any, image: Any, strength: Any, jitter: Any, *, sigma: float
) -> jax.Array:
  height, width = image.shape[-3:-1]
  middle = np.array([width // 2, height // 2], np.float32)
  side = min(height, width) // 3
  corners = middle + side * np.array([[1, 1], [1, -1], [-1, -1]], np.float32)

  def run(key: Any, x: jax.Array) -> jax.Array:
    of_corners, of_pixels = jax.random.split(key)
    draw = jax.random.uniform(of_corners, (3, 2), minval=-1, maxval=1)
    moved = corners + jitter * draw
    x = _warped(x, *_affine(corners, moved, height, width), "reflect")
    shape = (2, height, width, 1)
    noise = jax.random.uniform(of_pixels, shape, minval=-1, maxval=1)
    shift = strength * blur.gaussian(
      noise, sigma=sigma, truncate=3, border="symmetric"
    )
    row, column = np.mgrid[:height, :width]
    rows, columns = row + shift[1, ..., 0], column + shift[0, ..., 0]
    return _warped(x, rows, columns, "symmetric")

  return _full(severities.per_image(key, run, _unit(image)))


@typed
def elastic_transform(
  key: Key[Array, ""], image: Rgb, *, severity: int
) -> Corrupted:
  """Bends an image: an affine map, then a shift of its own for each pixel.

  Three corners of a square around the middle move by up to j pixels in each
  direction, and the image with them; then each pixel is read at p + a G(u),
  u even within -1..1 and G a Gaussian blur of deviation s.

  Args:
    key: A PRNG key.
    image: Values in 0..255.
    severity: 1 to 5; (a, s, j) = (488, 170.8, 24.4), (488, 19.52, 48.8),
      (12.2, 2.44, 4.88), (17.08, 2.44, 4.88), (29.28, 2.44, 4.88), times the
      image's shorter side / 224.

  Returns:
    The bent image, mirrored beyond its border.

  Reference:
    Hendrycks and Dietterich 2019, "Elastic"; Simard et al., "Best Practices
    for Convolutional Neural Networks Applied to Visual Document Analysis",
    ICDAR 2003.

  Note:
    The published code gives these numbers as shares of the side (of 244, for
    images of 224), hence the scaling. 1 and 2 move the whole image and are
    further from it, pixel by pixel, than 3 to 5.
  """
  strength, sigma, jitter = severities.pick(
    severity,
    (
      (488, 170.8, 24.4),
      (488, 19.52, 48.8),
      (12.2, 2.44, 4.88),
      (17.08, 2.44, 4.88),
      (29.28, 2.44, 4.88),
    ),
  )
  image = jnp.asarray(image)
  if image.size == 0:
    return jnp.zeros(image.shape, jnp.float32)
  scale = min(image.shape[-3:-1]) / 224
  return _elastic_transform(
    key, image, strength * scale, jitter * scale, sigma=sigma * scale
  )
