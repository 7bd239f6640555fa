"""Casts the rays of a spinning LiDAR against simple bodies, in NumPy.

The ray of beam b and column c is t (cos a_c, sin a_c, tan e_b) with the
horizontal distance t: azimuth and elevation separate. So what stands upright (a
box, a cylinder) is met at a t that depends on the column alone, and only the
height is compared for each ray. A body costs only the columns and beams that
can see it.

Reference:
  Kay and Kajiya, "Ray Tracing Complex Scenes", SIGGRAPH 1986 (the slabs).
"""

from collections.abc import Iterator
import math

import numpy as np

# Nearer, bodies would enclose the sensor.
_NEAREST = 0.5
_FAR = np.float32(1e9)
Span = tuple[slice, slice]


class Caster:
  """The nearest hit of each ray so far.

  Attributes:
    distance: Horizontal distance of the hit, float32 [beams, width].
    body: Number of the body that is hit, int32, -1 where there is none.
    cosine: Between the ray and the surface's normal, float32.
    cos_a: Cosine of each column's azimuth, float32 [width].
    sin_a: Its sine.
    tan_e: Tangent of each beam's elevation, falling, float32 [beams].
    sec_e: Range / horizontal distance, float32 [beams].
  """

  def __init__(
    self, azimuth: np.ndarray, elevation: np.ndarray, draw: np.random.Generator
  ):
    self._azimuth = azimuth
    self.cos_a = np.cos(azimuth).astype(np.float32)
    self.sin_a = np.sin(azimuth).astype(np.float32)
    self.tan_e = np.tan(elevation).astype(np.float32)
    self.sec_e = (1 / np.cos(elevation)).astype(np.float32)
    self._rising = -self.tan_e.astype(np.float64)
    self._draw = draw
    shape = (len(elevation), len(azimuth))
    self.distance = np.full(shape, _FAR, np.float32)
    self.body = np.full(shape, -1, np.int32)
    self.cosine = np.zeros(shape, np.float32)

  @property
  def hit(self) -> np.ndarray:
    """Where anything was hit."""
    return self.body >= 0

  def offer(
    self,
    span: Span,
    distance: np.ndarray,
    cosine: np.ndarray | float,
    body: np.ndarray | int,
  ) -> None:
    """Takes hits where they are nearer than what there is.

    Args:
      span: Beams and columns.
      distance: Of each ray of the span; very far where it misses.
      cosine: Of each ray, or what broadcasts to it.
      body: The body's number, or one for each ray.
    """
    held = self.distance[span]
    nearer = distance < held
    np.copyto(held, distance, where=nearer)
    np.copyto(self.cosine[span], cosine, where=nearer)
    np.copyto(self.body[span], body, where=nearer)

  def _spans(
    self, x: float, y: float, radius: float, low: float, high: float
  ) -> Iterator[Span]:
    """Beams and columns that can see a body within an upright cylinder."""
    away = math.hypot(x, y)
    near, far = max(away - radius, _NEAREST), away + radius
    # Steepest and flattest line of sight to its top and bottom.
    top = high / (near if high > 0 else far)
    bottom = low / (far if low > 0 else near)
    first, last = np.searchsorted(self._rising, (-top, -bottom))
    beams = slice(int(first), int(last))
    if beams.start >= beams.stop:
      return
    width = len(self._azimuth)
    if away <= radius:
      yield beams, slice(0, width)
      return
    # Columns run from azimuth pi down to -pi.
    half = math.asin(min(1.0, radius / away))
    middle = (math.pi - math.atan2(y, x)) / (2 * math.pi) * width
    reach = half / (2 * math.pi) * width
    start, stop = math.floor(middle - reach) - 1, math.ceil(middle + reach) + 1
    if stop - start >= width:
      yield beams, slice(0, width)
      return
    for turn in (-width, 0, width):
      a, b = max(0, start + turn), min(width, stop + turn)
      if a < b:
        yield beams, slice(a, b)

  def box(
    self,
    body: int,
    *,
    x: float,
    y: float,
    angle: float,
    length: float,
    width: float,
    low: float,
    high: float,
    density: float = math.inf,
  ) -> None:
    """Casts against an upright box.

    Args:
      body: Its number.
      x: Middle, like `y`, in metres from the sensor.
      y: See `x`.
      angle: Of its length, radians from the x axis.
      length: Metres, like `width`.
      width: See `length`.
      low: Height of its bottom above the sensor.
      high: Height of its top.
      density: Hits per metre inside of it; infinite is a solid body.
    """
    c, s = math.cos(angle), math.sin(angle)
    along, across = c * x + s * y, c * y - s * x
    radius = math.hypot(length, width) / 2
    for span in self._spans(x, y, radius, low, high):
      cos_a, sin_a = self.cos_a[span[1]], self.sin_a[span[1]]
      u, v = c * cos_a + s * sin_a, c * sin_a - s * cos_a
      with np.errstate(divide="ignore", invalid="ignore"):
        one = _ends(along, length) / u
        two = _ends(across, width) / v
      # 0 / 0 is a ray along a face: no bound.
      one, two = np.nan_to_num(one, nan=0), np.nan_to_num(two, nan=0)
      enter_one, enter_two = one.min(axis=0), two.min(axis=0)
      enter = np.maximum(enter_one, enter_two)
      leave = np.minimum(one.max(axis=0), two.max(axis=0))
      face = np.where(enter_one > enter_two, np.abs(u), np.abs(v))
      self._prism(body, span, enter, leave, face, low, high, density)

  def cylinder(
    self,
    body: int,
    *,
    x: float,
    y: float,
    radius: float,
    low: float,
    high: float,
    density: float = math.inf,
  ) -> None:
    """Casts against an upright cylinder.

    Args:
      body: Its number.
      x: See `box`, like all but `radius`.
      y: See `box`.
      radius: Metres.
      low: See `box`.
      high: See `box`.
      density: See `box`.
    """
    for span in self._spans(x, y, radius, low, high):
      cos_a, sin_a = self.cos_a[span[1]], self.sin_a[span[1]]
      middle = x * cos_a + y * sin_a
      aside = x * sin_a - y * cos_a
      half = np.sqrt(np.maximum(radius**2 - aside**2, 0))
      meets = np.abs(aside) < radius
      enter = np.where(meets, middle - half, _FAR)
      leave = np.where(meets, middle + half, -_FAR)
      self._prism(body, span, enter, leave, half / radius, low, high, density)

  def _prism(
    self,
    body: int,
    span: Span,
    enter: np.ndarray,
    leave: np.ndarray,
    face: np.ndarray,
    low: float,
    high: float,
    density: float,
  ) -> None:
    """What stands upright, given where each column enters and leaves it."""
    tan_e = self.tan_e[span[0], None]
    meets = (leave > enter) & (enter > _NEAREST)
    height = tan_e * enter
    if density < math.inf:
      # Inside, heights change little: what enters below its top counts.
      inside = self._draw.standard_exponential(height.shape, np.float32)
      enter = enter + inside * np.float32(1 / density)
      height = tan_e * enter
      within = meets & (enter < leave) & (height > low) & (height < high)
      distance = np.where(within, enter, _FAR)
      self.offer(span, distance, _leaves(self._draw, distance), body)
      return
    side = meets & (height >= low) & (height <= high)
    distance = np.where(side, enter, _FAR)
    cosine = face / self.sec_e[span[0], None]
    # The lid: its top if it is below the sensor, its bottom if above.
    lid = high if high < 0 else low if low > 0 else None
    if lid is not None:
      with np.errstate(divide="ignore"):
        there = lid / tan_e
      on_lid = (there > enter) & (there < leave) & meets
      distance = np.where(on_lid, there, distance)
      slope = np.abs(tan_e) / self.sec_e[span[0], None]
      cosine = np.where(on_lid, slope, cosine)
    self.offer(span, distance, cosine, body)

  def ellipsoid(
    self,
    body: int,
    *,
    x: float,
    y: float,
    z: float,
    radius: float,
    half_height: float,
    density: float = math.inf,
  ) -> None:
    """Casts against an ellipsoid of revolution.

    Args:
      body: Its number.
      x: Middle, like `y` and `z`.
      y: See `x`.
      z: See `x`.
      radius: Half its horizontal width.
      half_height: Half its height.
      density: See `box`.
    """
    squeeze = (radius / half_height) ** 2
    spans = self._spans(x, y, radius, z - half_height, z + half_height)
    for span in spans:
      cos_a, sin_a = self.cos_a[span[1]], self.sin_a[span[1]]
      tan_e = self.tan_e[span[0], None]
      # a t^2 - 2 b t + c = 0
      a = 1 + np.float32(squeeze) * tan_e**2
      b = (x * cos_a + y * sin_a).astype(np.float32) + np.float32(
        squeeze * z
      ) * tan_e
      c = np.float32(x * x + y * y + squeeze * z * z - radius**2)
      root = b * b - a * c
      half = np.sqrt(np.maximum(root, 0)) / a
      middle = b / a
      enter = middle - half
      meets = (root > 0) & (enter > _NEAREST)
      if density < math.inf:
        inside = self._draw.standard_exponential(enter.shape, np.float32)
        enter = enter + inside * np.float32(1 / density)
        meets &= enter < middle + half
        distance = np.where(meets, enter, _FAR)
        self.offer(span, distance, _leaves(self._draw, distance), body)
      else:
        distance = np.where(meets, enter, _FAR)
        # Nearly that of a sphere.
        cosine = np.minimum(half / radius, 1)
        self.offer(span, distance, cosine, body)


def _ends(middle: float, length: float) -> np.ndarray:
  ends = [[middle - length / 2], [middle + length / 2]]
  return np.array(ends, np.float32)


def _leaves(draw: np.random.Generator, like: np.ndarray) -> np.ndarray:
  """Cosines of leaves, which look anywhere."""
  return np.float32(0.3) + np.float32(0.7) * draw.random(like.shape, np.float32)
