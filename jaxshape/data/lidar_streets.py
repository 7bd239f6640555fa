"""Streets drawn at random, and cast against the rays of a LiDAR.

Places are given along the street (s) and across it (l, to the left of its
middle) in metres; the sensor is at s = 0 in the right lane. What is to the left
of the street is side 0. Raw labels are SemanticKITTI's.

Reference:
  Behley et al., "SemanticKITTI", ICCV 2019 (the labels; remissions of materials
  follow three scans of its sequence 00).
"""

from collections.abc import Callable, Sequence
import math

import numpy as np

from jaxshape.data import lidar_casting

MAX_RANGE = 80.0
_HEIGHT = 1.73
_STREET = 62.0
# Raw label: mean remission, deviation from body to body and point to point.
_MATERIALS = {
  10: (0.20, 0.12, 0.13), 11: (0.26, 0.10, 0.14), 13: (0.24, 0.10, 0.12),
  15: (0.24, 0.10, 0.14), 18: (0.24, 0.10, 0.13), 20: (0.28, 0.12, 0.13),
  30: (0.30, 0.11, 0.11), 31: (0.28, 0.10, 0.13), 32: (0.27, 0.10, 0.13),
  40: (0.26, 0.04, 0.07), 44: (0.30, 0.04, 0.07), 48: (0.32, 0.04, 0.07),
  49: (0.31, 0.05, 0.07), 50: (0.42, 0.09, 0.12), 51: (0.33, 0.10, 0.12),
  60: (0.40, 0.05, 0.11), 70: (0.37, 0.05, 0.11), 71: (0.35, 0.05, 0.12),
  72: (0.36, 0.04, 0.08), 80: (0.26, 0.12, 0.15), 81: (0.42, 0.20, 0.22),
  99: (0.32, 0.12, 0.11),
}  # fmt: skip
_MOVING = {
  252: 10, 253: 31, 254: 30, 255: 32, 257: 13, 258: 18, 259: 20
}  # fmt: skip


class Street:
  """One scene: what is drawn of it, and the rays cast against it."""

  def __init__(
    self,
    draw: np.random.Generator,
    caster: lidar_casting.Caster,
  ):
    self._draw, self._caster = draw, caster
    self.raw: list[int] = []
    self.reflects: list[tuple[float, float]] = []
    self._angle = draw.normal(0, 0.07)
    if draw.random() < 0.15:
      self._angle = draw.uniform(-math.pi, math.pi)
    self._tilt = draw.normal(0, 0.008, 2)
    self._kerb = draw.uniform(0.06, 0.17)
    self._half_road = draw.uniform(2.4, 4.4)
    # Right of the middle, as one drives.
    self._lane = -self._half_road * draw.uniform(0.3, 0.6)
    self._cross = None
    if draw.random() < 0.45:
      self._cross = (draw.uniform(-28, 28), draw.uniform(2.8, 4.5))
    self._parking = [
      draw.uniform(2.1, 2.6) if draw.random() < 0.5 else 0.0 for _ in range(2)
    ]
    self._verge = [
      draw.uniform(0.8, 2.5) if draw.random() < 0.3 else 0.0 for _ in range(2)
    ]
    self._walk = [
      draw.uniform(1.6, 4.2) if draw.random() < 0.92 else 0.0 for _ in range(2)
    ]
    self._yard = [draw.uniform(0.3, 9.0) for _ in range(2)]

  def _uniform(self, low: float, high: float) -> float:
    return float(self._draw.uniform(low, high))

  def _chance(self, probability: float) -> bool:
    return bool(self._draw.random() < probability)

  def _places(self, rate: float) -> np.ndarray:
    """Places along the street, in random number: `rate` on average."""
    count = self._draw.poisson(rate)
    return self._draw.uniform(-0.8 * _STREET, 0.8 * _STREET, count)

  def _new(self, raw: int) -> int:
    mean, bodies, points = _MATERIALS[_MOVING.get(raw, raw)]
    self.raw.append(raw)
    level = max(0.03, self._draw.normal(mean, bodies))
    self.reflects.append((level, points))
    return len(self.raw) - 1

  def _at(self, s: float, l: float) -> tuple[float, float]:
    """Metres along and across the street to the sensor's frame."""
    c, n = math.cos(self._angle), math.sin(self._angle)
    l = l - self._lane
    return c * s - n * l, n * s + c * l

  def _ground(self, x: float, y: float, *, raised: bool) -> float:
    level = self._tilt[0] * x + self._tilt[1] * y - _HEIGHT
    return level + (self._kerb if raised else 0.0)

  def _free(self, s: float, margin: float = 0.0) -> bool:
    """Whether a place along the street is off the cross street."""
    if self._cross is None:
      return True
    return abs(s - self._cross[0]) > self._cross[1] + margin

  def _box(
    self, body: int, s: float, l: float, size: Sequence[float], **options: float
  ) -> None:
    """A box: length, width, bottom and top over the ground.

    It may be turned, and lie `ahead` of the place in the direction it looks.
    """
    turn, ahead = options.pop("turn", 0.0), options.pop("ahead", 0.0)
    x, y = self._at(s + ahead * math.cos(turn), l + ahead * math.sin(turn))
    length, width, low, high = size
    level = self._ground(x, y, raised=bool(options.pop("raised", 0)))
    self._caster.box(
      body, x=x, y=y, angle=self._angle + turn, length=length, width=width,
      low=level + low, high=level + high, **options,
    )  # fmt: skip

  def _round(
    self, body: int, s: float, l: float, size: Sequence[float], **options: float
  ) -> None:
    """A cylinder: radius, bottom and top over the ground."""
    x, y = self._at(s, l)
    radius, low, high = size
    level = self._ground(x, y, raised=bool(options.pop("raised", 0)))
    self._caster.cylinder(
      body, x=x, y=y, radius=radius, low=level + low, high=level + high,
      **options,
    )  # fmt: skip

  def _blob(
    self, body: int, s: float, l: float, size: Sequence[float], density: float
  ) -> None:
    """An ellipsoid: radius, half its height, its middle over the ground."""
    x, y = self._at(s, l)
    radius, half, middle = size
    self._caster.ellipsoid(
      body, x=x, y=y, z=self._ground(x, y, raised=True) + middle,
      radius=radius, half_height=half, density=density,
    )  # fmt: skip

  def build(self) -> None:
    """Casts the rays against all there is."""
    self._pave()
    for side in (0, 1):
      self._park(side)
      self._line_the_kerb(side)
      self._people_the_walk(side)
      self._build_houses(side)
    self._drive()

  def _strips(self) -> tuple[list[float], list[int], list[bool]]:
    """Across the street: where each strip ends, what it is, if raised."""
    ends, strips, raised = [], [], []
    for side, sign in ((1, -1), (0, 1)):
      edge = self._half_road + self._parking[side]
      verge = edge + self._verge[side]
      walk = verge + self._walk[side]
      yard = 72 if self._chance(0.85) else 49
      outward = [
        (self._half_road, edge, 44, False), (edge, verge, 72, True),
        (verge, walk, 48, True), (walk, math.inf, yard, True),
      ]  # fmt: skip
      if sign < 0:
        ends += [-near for near, _, _, _ in outward[::-1]]
        outward = outward[::-1]
      else:
        ends += [far for _, far, _, _ in outward]
      strips += [raw for _, _, raw, _ in outward]
      raised += [up for _, _, _, up in outward]
      if sign < 0:
        ends.append(self._half_road)
        strips.append(40)
        raised.append(False)
    return ends, strips, raised

  def _pave(self) -> None:
    """The ground: two levels, road and what the kerb raises."""
    cast, draw = self._caster, self._draw
    kinds = {raw: self._new(raw) for raw in (40, 60, 44, 48, 72, 49)}
    ends, strips, raised = self._strips()
    bounds = np.array(ends[:-1], np.float32)
    strip_body = np.array([kinds[raw] for raw in strips], np.int32)
    strip_up = np.array(raised, bool)
    c, n = math.cos(self._angle), math.sin(self._angle)
    along = c * cast.cos_a + n * cast.sin_a
    across = c * cast.sin_a - n * cast.cos_a
    tilt = self._tilt.astype(np.float32)
    slope = cast.tan_e[:, None] - (tilt[0] * cast.cos_a + tilt[1] * cast.sin_a)
    # Only these beams look down; others meet no ground near enough.
    down = slope < -_HEIGHT / (1.3 * MAX_RANGE)
    rows = np.flatnonzero(down.any(axis=1))
    if not rows.size:
      return
    span = (slice(int(rows[0]), None), slice(None))
    slope = np.minimum(slope[span], -_HEIGHT / (1.3 * MAX_RANGE))

    def zone(distance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
      l = distance * across + np.float32(self._lane)
      strip = np.searchsorted(bounds, l)
      body, up = strip_body[strip], strip_up[strip]
      s = distance * along
      if self._cross is not None:
        crossing = np.abs(s - self._cross[0]) < self._cross[1]
        body = np.where(crossing, kinds[40], body)
        up = up & ~crossing
      marked = (body == kinds[40]) & (np.abs(l) < 0.09)
      marked &= np.floor(s / 3).astype(np.int32) % 2 == 0
      return np.where(marked, kinds[60], body), up

    low = np.float32(-_HEIGHT) / slope
    high = np.float32(self._kerb - _HEIGHT) / slope
    body_high, up_high = zone(high)
    body_low, up_low = zone(low)
    kerb = ~up_high & up_low
    distance = np.where(up_high, high, np.where(kerb, (low + high) / 2, low))
    body = np.where(up_high, body_high, body_low)
    rough = np.where(body == kinds[72], 0.045, 0.004).astype(np.float32)
    rough *= draw.standard_normal(rough.shape, np.float32)
    distance = np.where(kerb, distance, distance - rough / slope)
    distance = np.where(down[span], distance, np.float32(1e9))
    cosine = np.abs(slope) / cast.sec_e[span[0], None]
    cast.offer(span, distance, np.where(kerb, 0.8, cosine), body)

  def _car(self, raw: int, s: float, l: float, **options: float) -> float:
    """A car or van; gives its length."""
    body = self._new(raw)
    if self._chance(0.15):  # A van: high all along.
      length, width = self._uniform(4.4, 5.6), self._uniform(1.75, 2.05)
      high = self._uniform(1.75, 2.4)
      nose = self._uniform(0.5, 1.0)
      self._box(body, s, l, (length, width, 0.3, 0.5 * high), **options)
      self._box(
        body, s, l, (length - nose, width - 0.1, 0.5 * high, high),
        ahead=-nose / 2, **options,
      )  # fmt: skip
      return length
    length, width = self._uniform(3.4, 4.9), self._uniform(1.6, 1.9)
    waist, high = self._uniform(0.75, 0.98), self._uniform(1.35, 1.75)
    self._box(body, s, l, (length, width, 0.22, waist), **options)
    cabin = length * self._uniform(0.45, 0.6)
    back = self._uniform(0.02, 0.2)
    size = (cabin, width - 0.2, waist, (waist + high) / 2)
    self._box(body, s, l, size, ahead=-back, **options)
    size = (0.75 * cabin, width - 0.35, (waist + high) / 2, high)
    self._box(body, s, l, size, ahead=-back, **options)
    return length

  def _truck(self, raw: int, s: float, l: float, **options: float) -> float:
    """A truck: cab and load, from van's size up; gives its length."""
    body = self._new(raw)
    load, width = self._uniform(3.2, 8.0), self._uniform(1.9, 2.5)
    high, cab = self._uniform(2.1, 3.6), self._uniform(1.4, 2.1)
    self._box(body, s, l, (load, width, 0.75, high), **options)
    size = (cab, width - 0.1, 0.4, min(high, self._uniform(1.9, 2.8)))
    ahead = load / 2 + cab / 2 + 0.1
    self._box(body, s, l, size, ahead=ahead, **options)
    self._box(body, s, l, (0.9 * load, 0.8 * width, 0.3, 0.75), **options)
    return load + cab

  def _other(self, raw: int, s: float, l: float, **options: float) -> float:
    """A bus or a trailer; gives its length."""
    body = self._new(raw)
    if raw in (13, 257) or self._chance(0.3):
      length, high = self._uniform(7.5, 12.0), self._uniform(2.8, 3.3)
      self._box(body, s, l, (length, 2.5, 0.3, high), **options)
      return length
    length, high = self._uniform(2.0, 5.5), self._uniform(0.9, 2.6)
    size = (length, self._uniform(1.5, 2.3), 0.5, high)
    self._box(body, s, l, size, **options)
    return length

  def _bike(self, raw: int, s: float, l: float, **options: float) -> None:
    """A bicycle or motorcycle, through which one sees, with its rider."""
    body = self._new(raw)
    motor = raw in (15, 32, 255)
    length = self._uniform(1.9, 2.2) if motor else self._uniform(1.5, 1.85)
    size = (length, 0.4 if motor else 0.14, 0.05, 0.75 if motor else 0.7)
    options["density"] = 9.0 if motor else 8.0
    self._box(body, s, l, size, **options)
    size = (0.12, 0.65 if motor else 0.5, 0.8, self._uniform(1.0, 1.1))
    self._box(body, s, l, size, ahead=0.3 * length, **options)
    if raw in (11, 15):
      return
    lift = self._uniform(0.72, 0.95)
    height = lift + self._uniform(0.5, 0.68)
    raised = options.get("raised", 0.0)
    radius = self._uniform(0.18, 0.26)
    self._round(body, s, l, (radius, lift, height), raised=raised)
    self._round(
      body, s, l, (0.11, height, height + 0.24), raised=raised
    )  # fmt: skip

  def _person(self, raw: int, s: float, l: float, **options: float) -> None:
    body = self._new(raw)
    tall = self._uniform(1.5, 1.95) if self._chance(0.85) else 1.15
    radius = tall * self._uniform(0.11, 0.16)
    self._round(body, s, l, (0.7 * radius, 0.0, 0.48 * tall), **options)
    self._round(
      body, s, l, (radius, 0.48 * tall, 0.85 * tall), **options
    )  # fmt: skip
    self._round(body, s, l, (0.11, 0.85 * tall, tall), **options)

  def _parked(self, s: float, l: float, **options: float) -> float:
    kind = self._draw.random()
    if kind < 0.84:
      return self._car(10, s, l, **options)
    if kind < 0.90:
      return self._truck(18, s, l, **options)
    if kind < 0.94:
      return self._other(20, s, l, **options)
    self._bike(15, s, l, **options)
    return 2.2

  def _park(self, side: int) -> None:
    """Cars that stand along the kerb, or in yards."""
    sign = 1 if side == 0 else -1
    if not self._parking[side]:
      for s in self._places(1.2):
        l = self._half_road + self._walk[side] + self._yard[side] * 0.6 + 2
        turn = math.pi / 2 + self._draw.normal(0, 0.1)
        self._parked(s, sign * l, raised=1, turn=turn)
      return
    taken = self._uniform(0.15, 0.8)
    s = -0.7 * _STREET
    while s < 0.7 * _STREET:
      if not self._chance(taken) or not self._free(s, 3.5):
        s += 5.5
        continue
      l = self._half_road + self._parking[side] / 2 + self._draw.normal(0, 0.12)
      turn = self._draw.normal(0, 0.03) + math.pi * self._chance(0.2)
      length = self._parked(s, sign * l, turn=turn)
      s += length / 2 + 3.0 + self._uniform(0.4, 2.0)

  def _drive(self) -> None:
    """What moves on the road, ahead and behind."""
    makes: list[tuple[float, Callable[[float, float, float], object]]] = [
      (1.6, lambda s, l, turn: self._car(252, s, l, turn=turn)),
      (0.25, lambda s, l, turn: self._truck(258, s, l, turn=turn)),
      (0.2, lambda s, l, turn: self._other(257, s, l, turn=turn)),
    ]
    for rate, make in makes:
      for s in self._places(rate):
        sign = 1 if self._chance(0.5) else -1
        if abs(s) > 8 or sign > 0:
          make(s, sign * self._half_road / 2, math.pi * (sign > 0))
    for raw, rate in ((253, 1.3), (255, 0.5)):
      for s in self._places(rate) * 0.7:
        sign = 1 if self._chance(0.5) else -1
        if abs(s) > 3 or sign > 0:
          l = sign * (self._half_road - self._uniform(0.4, 1.4))
          self._bike(raw, s, l, turn=self._draw.normal(0, 0.1))
    for s in self._places(0.8):
      if abs(s) > 4:
        self._person(254, s, self._draw.uniform(-1, 1) * self._half_road)

  def _line_the_kerb(self, side: int) -> None:
    """Poles, signs, trees and bins between road and houses."""
    sign = 1 if side == 0 else -1
    edge = self._half_road + self._parking[side] + 0.35
    back = edge + self._verge[side] + self._walk[side]
    s = -_STREET + self._uniform(0, 15)
    while s < _STREET:
      tall = self._uniform(3.0, 8.0)
      size = (self._uniform(0.05, 0.13), 0.0, tall)
      place = s, sign * (edge if self._chance(0.7) else back)
      self._round(self._new(80), *place, size, raised=1)
      s += self._uniform(10, 28)
    for s in self._places(3.0):
      self._sign(s, sign * edge)
    for s in self._places(0.8):
      size = (0.5, self._uniform(0.5, 0.9), 0.0, self._uniform(0.8, 1.3))
      self._box(self._new(99), s, sign * back, size, raised=1)
    lush = self._uniform(2, 15)
    for s in self._places(lush):
      if self._free(s, 1):
        far = self._uniform(0.5, 6) if self._chance(0.6) else edge - back
        self._tree(s, sign * (back + far))
    for s in self._places(0.7 * lush):
      if self._free(s, 1):
        radius, half = self._uniform(0.4, 1.6), self._uniform(0.4, 1.2)
        l = sign * (back + self._uniform(0.5, 5))
        size = (radius, half, 0.7 * half)
        self._blob(self._new(70), s, l, size, self._uniform(2, 6))

  def _sign(self, s: float, l: float) -> None:
    top = self._uniform(2.1, 3.2)
    self._round(self._new(80), s, l, (0.04, 0.0, top), raised=1)
    high, wide = self._uniform(0.4, 0.8), self._uniform(0.4, 0.9)
    size = (0.04, wide, top - high, top)
    turn = self._draw.normal(0, 0.3)
    self._box(self._new(81), s, l, size, raised=1, turn=turn)

  def _tree(self, s: float, l: float) -> None:
    stem, radius = self._uniform(1.4, 3.4), self._uniform(0.06, 0.3)
    self._round(self._new(71), s, l, (radius, 0.0, stem + 0.8), raised=1)
    leaves = self._new(70)
    wide, half = self._uniform(0.9, 3.2), self._uniform(1.0, 3.2)
    self._blob(
      leaves, s, l, (wide, half, stem + 0.75 * half), self._uniform(0.5, 2.2)
    )

  def _people_the_walk(self, side: int) -> None:
    sign = 1 if side == 0 else -1
    edge = self._half_road + self._parking[side]
    wide = self._verge[side] + self._walk[side] + 0.6
    for s in 0.75 * self._places(2.4):
      raw = 254 if self._chance(0.6) else 30
      for _ in range(1 + self._chance(0.3)):
        place = s + self._draw.normal(0, 0.5), edge + wide * self._uniform(0, 1)
        self._person(raw, place[0], sign * place[1], raised=1)
    for s in 0.75 * self._places(2.0):
      turn = self._uniform(0, math.pi)
      l = edge + wide * (0.15 if self._chance(0.5) else 0.9)
      self._bike(11, s, sign * l, raised=1, turn=turn)
    for s in self._places(0.4):
      l = edge + wide * self._uniform(0.3, 0.7)
      self._bike(253, s, sign * l, raised=1)

  def _build_houses(self, side: int) -> None:
    """Houses in a row; in front and between them hedges, fences, walls."""
    sign = 1 if side == 0 else -1
    front = self._half_road + self._parking[side]
    front += self._verge[side] + self._walk[side] + 0.2
    dense = self._uniform(0.1, 1.0)
    s = -_STREET + self._uniform(-5, 5)
    while s < _STREET:
      length = self._uniform(6, 22)
      middle = s + length / 2
      if self._free(middle, length / 2 + 1):
        if self._chance(dense):
          depth = self._uniform(7, 12)
          l = sign * (front + self._yard[side] + depth / 2)
          size = (length, depth, 0.0, self._uniform(3.0, 12.0))
          turn = self._draw.normal(0, 0.02)
          self._box(self._new(50), middle, l, size, raised=1, turn=turn)
        if self._yard[side] > 1.2:
          self._fence(middle, sign * front, length)
        if self._yard[side] > 3 and self._chance(0.6):
          l = sign * (front + 0.6 * self._yard[side])
          self._tree(middle + self._draw.normal(0, 2), l)
      s += length + (0.0 if self._chance(0.4) else self._uniform(1, 7))
    # What closes the view: woods, or other houses.
    far = sign * (front + self._yard[side] + self._uniform(14, 26))
    raw = 70 if self._chance(0.7) else 50
    high = self._uniform(3, 9)
    density = 0.5 if raw == 70 else math.inf
    size = (2 * _STREET, 6.0, 0.0, high)
    self._box(self._new(raw), 0.0, far, size, raised=1, density=density)

  def _fence(self, s: float, l: float, length: float) -> None:
    kind = self._draw.random()
    high = self._uniform(0.8, 1.9)
    if kind < 0.35:  # Pickets or wire.
      size, density = (length, 0.06, 0.05, high), self._uniform(8, 40)
      self._box(self._new(51), s, l, size, raised=1, density=density)
    elif kind < 0.55:  # Boards or a wall.
      self._box(self._new(51), s, l, (length, 0.15, 0.0, high), raised=1)
    elif kind < 0.9:  # A hedge.
      size = (length, self._uniform(0.5, 1.0), 0.0, high)
      self._box(self._new(70), s, l, size, raised=1, density=7.0)
