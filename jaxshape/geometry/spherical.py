"""LiDAR scans as range images: which pixel a point falls into, and back.

Notation: a point (x, y, z) has the range r = |(x, y, z)|, the azimuth
atan2(y, x) and the pitch asin(z / r). x points forward, y to the left, z up.
Columns run over the azimuth, forward in the middle and left of it on the left;
rows run over the pitch from the top down.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from jaxshape.typing import (
  Array,
  ArrayLike,
  Bool,
  Float,
  Int,
  Integer,
  Num,
  Size,
  typed,
)

Points = (
  Float[ArrayLike, "*batch points 3"] | Integer[ArrayLike, "*batch points 3"]
)
Remission = (
  Float[ArrayLike, "*batch points"] | Integer[ArrayLike, "*batch points"]
)
Valid = Bool[ArrayLike, "*batch points"] | Num[ArrayLike, "*batch points"]

# atan(t) = t sum_k c_k t^2k on 0..1 within a rounding of float32. The library's
# atan2 is not vectorized on CPUs and would take most of the time.
_ATAN = (
  1.0, -0.333332837, 0.199982658, -0.142619327, 0.109420307, -0.0837731585,
  0.0575521104, -0.0308046006, 0.0107269445, -0.00175392989,
)  # fmt: skip
# Coordinates beyond these powers of two are scaled before they are squared.
_HUGE, _TINY, _SCALE = 2.0**62, 2.0**-60, 2.0**66


class Projection(NamedTuple):
  """A range image, what lies in its pixels, and where the points went.

  Attributes:
    image: Range, x, y, z in metres and remission; -1 where a pixel is empty.
    index: The point that each pixel shows, -1 where it is empty.
    mask: Whether a pixel shows a point.
    row: The row of each point, -1 for points without a pixel. Also points that
      are hidden behind another one have a pixel.
    column: The column of each point, likewise.
  """

  image: Float[Array, "*batch height width 5"]
  # The name hides the search in tuples, which nobody needs here.
  index: Int[Array, "*batch height width"]  # pyright: ignore[reportIncompatibleMethodOverride]
  mask: Bool[Array, "*batch height width"]
  row: Int[Array, "*batch points"]
  column: Int[Array, "*batch points"]


def _atan2(y: jax.Array, x: jax.Array) -> jax.Array:
  """The angle of (x, y) in float32, with the signs that zeros give it."""
  across, along = jnp.abs(y), jnp.abs(x)
  large = jnp.maximum(across, along)
  t = jnp.minimum(across, along) / jnp.where(large > 0, large, 1)
  s = t * t
  p = jnp.full_like(s, _ATAN[-1])
  for c in _ATAN[-2::-1]:
    p = p * s + c
  angle = p * t
  angle = jnp.where(across > along, np.float32(np.pi / 2) - angle, angle)
  angle = jnp.where(jnp.signbit(x), np.float32(np.pi) - angle, angle)
  return jnp.copysign(angle, y)


def _ranges(x: jax.Array, y: jax.Array, z: jax.Array) -> tuple[jax.Array, ...]:
  """The range, and the coordinates scaled so that their squares are finite."""
  size = jnp.maximum(jnp.maximum(jnp.abs(x), jnp.abs(y)), jnp.abs(z))
  scale = jnp.where(size < _TINY, np.float32(_SCALE), np.float32(1))
  scale = jnp.where(size > _HUGE, np.float32(1 / _SCALE), scale)
  back = jnp.where(size < _TINY, np.float32(1 / _SCALE), np.float32(1))
  back = jnp.where(size > _HUGE, np.float32(_SCALE), back)
  x, y, z = x * scale, y * scale, z * scale
  square = x * x + y * y + z * z
  root = jnp.sqrt(jnp.where(square > 0, square, 1))
  ranges = jnp.where(square > 0, root * back, 0)
  return jnp.minimum(ranges, np.finfo(np.float32).max), x, y, z


def _project_one(
  points: jax.Array,
  remission: jax.Array,
  valid: jax.Array,
  *,
  height: int,
  width: int,
  up: float,
  down: float,
  keep: str,
  rows: str,
  clamp: bool,
  drop_first_point: bool,
) -> Projection:
  """Projects one scan."""
  count, pixels = len(points), height * width
  # Points that are not finite become ones of range 0.
  finite = jnp.all(jnp.isfinite(points), axis=-1) & jnp.isfinite(remission)
  axes = (jnp.where(finite, points[:, i], 0) for i in range(3))
  r, x, y, z = _ranges(*axes)

  azimuth = _atan2(y, x)
  pitch = _atan2(z, jnp.sqrt(x * x + y * y))
  u = np.float32(0.5 * width) * (1 - azimuth * np.float32(1 / np.pi))
  offset = down if rows == "public" else up
  v = height * (1 - (pitch + offset) * np.float32(1 / (up + down)))

  seen = (r > 0) & (valid != 0)
  if not clamp:
    seen &= (v >= 0) & (v <= height)
  place = lambda a, size: jnp.clip(jnp.floor(a), 0, size - 1).astype(jnp.int32)
  row = jnp.where(seen, place(v, height), -1)
  column = jnp.where(seen, place(u, width), -1)

  # A buffer of depths, then the last point among those that reach its depth.
  # The barrier has both steps see the very same numbers.
  depth = r if keep == "nearest" else -r
  depth = lax.optimization_barrier(lax.stop_gradient(depth))
  cell = jnp.where(seen, row * width + column, pixels)
  buffer = jnp.full(pixels, jnp.inf, jnp.float32)
  buffer = buffer.at[cell].min(depth, mode="drop")
  first = buffer.at[cell].get(mode="fill", fill_value=-jnp.inf)
  winner = jnp.where(depth <= first, cell, pixels)
  index = jnp.full(pixels, -1, jnp.int32)
  index = index.at[winner].max(jnp.arange(count, dtype=jnp.int32), mode="drop")

  filled = index >= 0
  if count:
    table = [r[:, None], points, remission[:, None]]
    table = jnp.concatenate(table, axis=-1)
    image = table.at[jnp.maximum(index, 0)].get(mode="clip")
    image = jnp.where(filled[:, None], image, -1)
  else:
    image = jnp.full((pixels, 5), -1, jnp.float32)
  mask = index > 0 if drop_first_point else filled
  grid = lambda a: a.reshape(height, width, *a.shape[1:])
  return Projection(grid(image), grid(index), grid(mask), row, column)


@functools.partial(
  jax.jit,
  static_argnames=(
    "height", "width", "up", "down", "keep", "rows", "clamp",
    "drop_first_point",
  ),
)  # fmt: skip
def _project(
  points: jax.Array, remission: jax.Array, valid: jax.Array, **options: Any
) -> Projection:
  *leading, count, _ = points.shape
  one = functools.partial(_project_one, **options)
  # Not one long scan, which could not be split among devices by its batch.
  out = jax.vmap(one)(
    jnp.asarray(points, jnp.float32).reshape(math.prod(leading), count, 3),
    jnp.asarray(remission, jnp.float32).reshape(math.prod(leading), count),
    valid.reshape(math.prod(leading), count),
  )
  return jax.tree.map(lambda a: a.reshape(*leading, *a.shape[1:]), out)


@typed
def project(
  points: Points,
  remission: Remission | None,
  *,
  height: Size = 64,
  width: Size = 2048,
  fov_up: float | int = 3.0,
  fov_down: float | int = -25.0,
  keep: str = "nearest",
  rows: str = "public",
  clamp: bool = True,
  drop_first_point: bool = True,
  valid: Valid | None = None,
) -> Projection:
  """Projects a LiDAR scan onto a sphere around the sensor.

  column = floor((1 - atan2(y, x) / pi) / 2 W),
  row = floor((1 - (asin(z / r) + f_down) / f) H), f = f_up + f_down.

  Where several points fall into one pixel, it shows the nearest one, and the
  last of equally near ones. Points that are not finite, of range 0 or not
  `valid` take no pixel, so that scans may be padded to one size. The image can
  be differentiated by the points; which point it shows is constant.

  Args:
    points: x, y, z in metres, x forward, y left, z up.
    remission: How much light came back, in any unit; points where it is not
      finite take no pixel. None stands for zeros.
    height: H, the number of rows, mostly the number of beams.
    width: W, the number of columns.
    fov_up: f_up, the upper end of the field of view in degrees above the
      horizon; below 0 for a sensor that looks down only.
    fov_down: The lower end in degrees below the horizon. Only its size f_down
      counts, so that 25 and -25 are the same.
    keep: "nearest", or "farthest" as in the paper.
    rows: "public", the formula above, or "paper", which has f_up in the place
      of f_down in the row, as printed in Eq. 1.
    clamp: Whether points above and below the field of view go to the border
      rows. They take no pixel otherwise.
    drop_first_point: Whether the mask leaves out the pixel of point 0, as that
      of the public code does; with False, the mask is `index >= 0`. The image
      and the index show the point in any case.
    valid: 0 where a row is padding.

  Returns:
    The range image with the index and the mask of its pixels, and the pixel of
    each point.

  Raises:
    ValueError: An option is outside its range.

  Reference:
    Xu et al., "SqueezeSegV3: Spatially-Adaptive Convolution for Efficient
    Point-Cloud Segmentation", ECCV 2020, Eq. 1.

  Note:
    The paper keeps the farthest point of a pixel and adds f_up to the pitch;
    its public code keeps the nearest and adds f_down, and so do we. Of f_up,
    too, it takes the size only, which leaves rows empty where f_up is below 0;
    here f is the true height of the field of view.
  """
  for name, size in (("height", height), ("width", width)):
    if isinstance(size, bool) or size < 1:
      raise ValueError(f"{name} must be 1 or more, got {size}.")
  if not -90 <= fov_down <= 90:
    raise ValueError(f"fov_down must be within -90..90, got {fov_down}.")
  if not -abs(fov_down) < fov_up <= 90:
    raise ValueError(
      f"fov_up must be above the lower end, {-abs(fov_down)}, and at most 90, "
      f"got {fov_up}."
    )
  if keep not in ("nearest", "farthest"):
    raise ValueError(f"keep must be 'nearest' or 'farthest', got {keep!r}.")
  if rows not in ("public", "paper"):
    raise ValueError(f"rows must be 'public' or 'paper', got {rows!r}.")
  if remission is None:
    remission = np.zeros(np.shape(points)[:-1], np.float32)
  if valid is None:
    valid = np.ones(np.shape(points)[:-1], bool)
  return _project(
    points,
    remission,
    valid,
    height=int(height),
    width=int(width),
    up=math.radians(fov_up),
    down=math.radians(abs(fov_down)),
    keep=keep,
    rows=rows,
    clamp=clamp,
    drop_first_point=drop_first_point,
  )


@typed
def unproject_labels(
  labels: Num[ArrayLike, "*batch height width"]
  | Bool[ArrayLike, "*batch height width"],
  row: Integer[ArrayLike, "*batch points"],
  column: Integer[ArrayLike, "*batch points"],
  *,
  fill: float | int | bool = 0,
) -> Num[Array, "*batch points"] | Bool[Array, "*batch points"]:
  """Gives every point the value of the pixel that it falls into.

  Args:
    labels: An image of labels, or of any other number per pixel.
    row: From `project`.
    column: From `project`.
    fill: What a point gets whose row or column is outside the image.

  Returns:
    One value per point, in the type of the image.

  Reference:
    Xu et al., "SqueezeSegV3: Spatially-Adaptive Convolution for Efficient
    Point-Cloud Segmentation", ECCV 2020, Fig. 1.
  """
  labels = jnp.asarray(labels)
  row, column = jnp.asarray(row, jnp.int32), jnp.asarray(column, jnp.int32)
  *leading, height, width = labels.shape
  inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
  fill_ = jnp.asarray(fill, labels.dtype)
  if height * width == 0:
    return jnp.full(row.shape, fill_)
  cell = jnp.where(inside, row * width + column, 0)
  flat = labels.reshape(*leading, height * width)
  return jnp.where(inside, jnp.take_along_axis(flat, cell, axis=-1), fill_)
