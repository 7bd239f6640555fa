"""Outlines of sixteen things, each drawn anew with its own pose and build.

A drawing is a list of parts. A part is a closed polygon and whether it adds to
the figure or cuts a hole; later parts act on earlier ones. x points right, y
down, and the picture spans -1..1 on both axes, so one drawing serves any size.
"""

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw

from jaxshape.typing import Float, typed

Part = tuple[np.ndarray, bool]
# Draws a number between two bounds.
_Between = Callable[[float, float], float]
_LONGEST_SEGMENT = 0.12


def _polygon(*points: tuple[float, float]) -> np.ndarray:
  """Straight edges, cut into short segments so that a warp can bend them."""
  corners = np.array(points)
  following = np.roll(corners, -1, axis=0)
  steps = following - corners
  pieces = np.hypot(steps[:, 0], steps[:, 1]) / _LONGEST_SEGMENT
  pieces = pieces.astype(int) + 1
  which = np.repeat(np.arange(len(corners)), pieces)
  first = np.repeat(np.cumsum(pieces) - pieces, pieces)
  part = (np.arange(len(which)) - first) / pieces[which]
  return corners[which] + part[:, None] * steps[which]


# Catmull-Rom weights of the four nearest points at six places of a segment.
_T = np.arange(6)[:, None] / 6.0
_CATMULL_ROM = 0.5 * np.concatenate(
  [
    -_T + 2 * _T**2 - _T**3,
    2 - 5 * _T**2 + 3 * _T**3,
    _T + 4 * _T**2 - 3 * _T**3,
    -(_T**2) + _T**3,
  ],
  axis=1,
)


def _curve(*points: tuple[float, float]) -> np.ndarray:
  """A smooth closed curve through the points."""
  knots = np.array(points)
  near = np.stack([np.roll(knots, shift, axis=0) for shift in (1, 0, -1, -2)])
  return np.einsum("tk,knd->ntd", _CATMULL_ROM, near).reshape(-1, 2)


_ANGLES = np.linspace(0, 2 * np.pi, 28, endpoint=False)
_CIRCLE = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1)


def _ellipse(
  x: float, y: float, rx: float, ry: float, turn: float = 0.0
) -> np.ndarray:
  """An ellipse whose first axis points `turn` radians below the x axis."""
  cos, sin = np.cos(turn), np.sin(turn)
  return (_CIRCLE * (rx, ry)) @ np.array([[cos, sin], [-sin, cos]]) + (x, y)


def _stroke(
  points: Sequence[tuple[float, float]], start: float, end: float
) -> np.ndarray:
  """A line with round ends whose half width goes from `start` to `end`."""
  path = np.array(points, dtype=float)
  along = np.gradient(path, axis=0)
  along /= np.hypot(along[:, 0], along[:, 1])[:, None]
  across = np.stack([-along[:, 1], along[:, 0]], axis=1)
  widths = np.linspace(start, end, len(path))[:, None]
  bow = np.linspace(-np.pi / 2, np.pi / 2, 7)[1:-1, None]
  cap = end * (np.cos(bow) * along[-1] - np.sin(bow) * across[-1]) + path[-1]
  heel = start * (np.sin(bow) * across[0] - np.cos(bow) * along[0]) + path[0]
  return np.concatenate(
    [path + widths * across, cap, (path - widths * across)[::-1], heel]
  )


def _mirrored(*points: tuple[float, float]) -> tuple[tuple[float, float], ...]:
  """The points of the right half, top to bottom, then the left half."""
  return (*points, *((-x, y) for x, y in reversed(points)))


def _airplane(between: _Between) -> list[Part]:
  sweep, span = between(0.1, 0.45), between(0.8, 0.98)
  chord = between(0.32, 0.46)
  tail = between(0.3, 0.42)
  width = between(0.12, 0.17)
  body = _mirrored(
    (0.0, -0.98), (width * 0.8, -0.8), (width, -0.45), (width, 0.3), (0.04, 0.9)
  )
  wing = _mirrored(
    (0.0, -0.28),
    (span, -0.2 + sweep),
    (span, -0.04 + sweep),
    (0.0, -0.28 + chord + 0.15),
  )
  fin = _mirrored((0.0, 0.55), (tail, 0.78), (tail, 0.93), (0.0, 0.84))
  return [
    (_curve(*body[:5], *body[6:]), True),
    (_polygon(*wing), True),
    (_polygon(*fin), True),
  ]


def _bird(between: _Between) -> list[Part]:
  plump, head = between(-0.06, 0.1), between(-0.06, 0.06)
  tail = between(-0.12, 0.16)
  legs = between(0.3, 0.42)
  body = _curve(
    (-0.72, -0.5 + head),
    (-0.56, -0.74 + head),
    (-0.3, -0.66 + head),
    (-0.1, -0.38),
    (0.3, -0.16),
    (0.62, 0.02 + tail / 2),
    (0.4, 0.26),
    (0.05, 0.42 + plump),
    (-0.35, 0.32 + plump),
    (-0.58, 0.0 + plump / 2),
    (-0.62, -0.26 + head / 2),
  )
  beak = _polygon(
    (-0.6, -0.62 + head), (-1.0, -0.42 + head), (-0.6, -0.4 + head)
  )
  feathers = _polygon(
    (0.35, -0.12), (1.0, 0.1 + tail), (0.93, 0.28 + tail), (0.3, 0.28)
  )
  parts = [(body, True), (beak, True), (feathers, True)]
  for x in (-0.12, 0.1):
    foot = 0.42 + plump + legs
    leg = [(x, 0.3), (x - 0.03, foot), (x - 0.16, foot + 0.04)]
    parts.append((_stroke(leg, 0.05, 0.04), True))
  return parts


def _boat(between: _Between) -> list[Part]:
  top, boom = between(-0.98, -0.85), between(0.26, 0.34)
  bow, keel = between(0.8, 0.95), between(0.78, 0.9)
  hull = _curve(
    (-0.85, 0.44),
    (-0.3, 0.48),
    (0.3, 0.48),
    (bow, 0.4),
    (0.72, 0.66),
    (0.5, keel),
    (-0.45, keel),
    (-0.72, 0.68),
  )
  leech = between(0.6, 0.78)
  sail = _polygon((0.06, top), (0.35, -0.3), (leech, boom), (0.06, boom))
  jib = _polygon((-0.1, top + 0.18), (-0.1, boom), (-leech - 0.05, boom))
  mast = _polygon((-0.045, top), (0.03, top), (0.03, 0.55), (-0.045, 0.55))
  return [(hull, True), (sail, True), (jib, True), (mast, True)]


def _bottle(between: _Between) -> list[Part]:
  neck, body = between(0.1, 0.15), between(0.29, 0.4)
  shoulder = between(-0.4, -0.1)
  lip = neck + 0.04
  profile = _mirrored(
    (lip, -0.97),
    (lip, -0.88),
    (neck, -0.86),
    (neck, shoulder - 0.15),
    (neck + 0.05, shoulder - 0.02),
    (body - 0.05, shoulder + 0.16),
    (body, shoulder + 0.3),
    (body, 0.88),
    (body - 0.06, 0.97),
  )
  return [(_polygon(*profile), True)]


def _car(between: _Between) -> list[Part]:
  roof, hood = between(-0.46, -0.32), between(-0.06, 0.04)
  front, rear = between(-0.66, -0.5), between(0.55, 0.72)
  wheel = between(0.18, 0.23)
  body = _polygon(
    (-0.97, 0.32),
    (-0.95, hood + 0.1),
    (-0.86, hood + 0.02),
    (front, hood - 0.04),
    (front + 0.27, roof + 0.02),
    (front + 0.34, roof),
    (rear - 0.32, roof),
    (rear - 0.24, roof + 0.03),
    (rear, hood - 0.06),
    (0.9, hood - 0.02),
    (0.96, hood + 0.1),
    (0.97, 0.32),
  )
  sill, lintel, post = hood - 0.04, roof + 0.09, between(-0.06, 0.06)
  windshield = _polygon(
    (front + 0.13, sill), (front + 0.33, lintel), (post, lintel), (post, sill)
  )
  window = _polygon(
    (post + 0.08, sill),
    (post + 0.08, lintel),
    (rear - 0.31, lintel),
    (rear - 0.13, sill),
  )
  parts = [(body, True), (windshield, False), (window, False)]
  for x in (-0.54, 0.55):
    parts.append((_ellipse(x, 0.33, wheel, wheel), True))
    parts.append((_ellipse(x, 0.33, wheel * 0.38, wheel * 0.38), False))
  return parts


def _chair(between: _Between) -> list[Part]:
  top, seat = between(-0.97, -0.82), between(0.0, 0.14)
  deep, shift = between(0.18, 0.26), between(0.16, 0.28)
  half = between(0.06, 0.075)
  left, right = -0.5, 0.32
  back = _polygon(
    (left, top), (right, top), (right, seat + 0.08), (left, seat + 0.08)
  )
  parts = [(back, True)]
  first, last = top + 0.2, seat - 0.12
  bars = int(between(2, 4))
  gap = (right - left - 2 * half) / bars
  for i in range(bars):
    x = left + half * 1.4 + i * gap
    wide = gap - half * 0.8
    hole = [(x, first), (x + wide, first), (x + wide, last), (x, last)]
    parts.append((_polygon(*hole), False))
  cushion = _polygon(
    (left - 0.02, seat),
    (right, seat),
    (right + shift, seat + deep),
    (right + shift, seat + deep + 0.1),
    (left + shift, seat + deep + 0.1),
    (left - 0.02, seat + 0.1),
  )
  parts.append((cushion, True))
  for x, y, foot in (
    (left + half, seat + 0.05, 0.72),
    (right - half, seat + deep, 0.72),
    (left + shift + half, seat + deep, 0.98),
    (right + shift - half, seat + deep, 0.98),
  ):
    leg = [(x - half, y), (x + half, y), (x + half, foot), (x - half, foot)]
    parts.append((_polygon(*leg), True))
  return parts


def _cup(between: _Between) -> list[Part]:
  tall, taper = between(0.55, 0.75), between(0.04, 0.2)
  y = between(-0.12, 0.05)
  rx, ry = between(0.3, 0.42), between(0.3, 0.42) * tall / 0.65
  rim = 0.42
  body = [
    (-0.7, -tall),
    (rim, -tall),
    (rim - taper * 0.7, tall - 0.14),
    (rim - taper - 0.1, tall),
    (-0.6 + taper, tall),
    (-0.7 + taper * 0.7, tall - 0.14),
  ]
  return [
    (_ellipse(rim - 0.04, y, rx + 0.1, ry + 0.02), True),
    (_ellipse(rim - 0.04, y, rx - 0.05, ry - 0.13), False),
    (_polygon(*body), True),
  ]


def _fish(between: _Between) -> list[Part]:
  high, tail = between(0.3, 0.46), between(0.32, 0.46)
  fork = between(0.72, 0.86)
  body = _curve(
    (-0.93, 0.02),
    (-0.68, -high * 0.66),
    (-0.25, -high),
    (0.2, -high * 0.68),
    (0.58, -0.09),
    (0.58, 0.09),
    (0.2, high * 0.66),
    (-0.25, high),
    (-0.68, high * 0.64),
  )
  fluke = _polygon((0.5, 0.0), (0.97, -tail), (fork, 0.0), (0.97, tail))
  dorsal = _polygon(
    (-0.42, -high * 0.8),
    (-0.1, -high - between(0.18, 0.3)),
    (0.32, -high * 0.85),
    (0.2, -high * 0.5),
  )
  x = between(-0.3, -0.1)
  belly = _polygon(
    (x, high * 0.8),
    (x + 0.28, high + between(0.12, 0.24)),
    (x + 0.3, high * 0.6),
  )
  return [(body, True), (fluke, True), (dorsal, True), (belly, True)]


def _guitar(between: _Between) -> list[Part]:
  low, high = between(0.44, 0.54), between(0.33, 0.4)
  waist = between(0.24, 0.3)
  body = _curve(
    *_mirrored(
      (0.12, -0.16),
      (high, 0.02),
      (waist, 0.24),
      (low * 0.88, 0.42),
      (low, 0.64),
      (low * 0.7, 0.9),
      (0.14, 0.98),
    )
  )
  neck, head = between(0.065, 0.085), between(0.13, 0.17)
  arm = _polygon((-neck, -0.82), (neck, -0.82), (neck, 0.0), (-neck, 0.0))
  pegs = _polygon(
    (-head, -0.99), (head, -0.99), (head * 0.9, -0.76), (-head * 0.9, -0.76)
  )
  rose = between(0.09, 0.12)
  hole = _ellipse(0.0, 0.3, rose, rose)
  return [(body, True), (hole, False), (arm, True), (pegs, True)]


def _hammer(between: _Between) -> list[Part]:
  grip, face = between(0.12, 0.16), between(-0.62, -0.48)
  thick = between(0.18, 0.23)
  claw = between(0.66, 0.8)
  y = -0.64
  handle = _polygon(
    (-grip * 0.7, y), (grip * 0.7, y), (grip, 0.96), (-grip, 0.96)
  )
  head = _polygon(
    (face, y - thick),
    (face + 0.16, y - thick),
    (face + 0.2, y - thick * 0.65),
    (-0.14, y - thick * 0.9),
    (0.14, y - thick),
    (0.4, y - thick * 0.95),
    (claw - 0.1, y - 0.02),
    (claw, y + 0.28),
    (claw - 0.22, y + 0.13),
    (0.32, y + thick * 0.45),
    (0.14, y + thick),
    (-0.14, y + thick * 0.9),
    (face + 0.2, y + thick * 0.65),
    (face + 0.16, y + thick),
    (face, y + thick),
  )
  return [(handle, True), (head, True)]


def _hand(between: _Between) -> list[Part]:
  spread, width = between(0.12, 0.26), between(0.085, 0.105)
  long = between(0.6, 0.75)
  palm = _curve(
    (-0.38, 0.0),
    (0.0, -0.06),
    (0.38, 0.02),
    (0.4, 0.42),
    (0.25, 0.7),
    (0.25, 0.96),
    (-0.22, 0.96),
    (-0.24, 0.7),
    (-0.41, 0.4),
  )
  parts = [(palm, True)]
  for i, size in enumerate((0.8, 0.97, 1.0, 0.84)):
    x = -0.29 + 0.195 * i
    turn = (i - 1.5) * spread + between(-0.04, 0.04)
    tip = (x + size * long * np.sin(turn), 0.05 - size * long * np.cos(turn))
    parts.append((_stroke([(x, 0.1), tip], width, width * 0.85), True))
  turn = between(0.5, 1.0)
  thumb = [
    (0.2, 0.55),
    (0.45, 0.3),
    (0.45 + 0.4 * np.sin(turn), 0.3 - 0.4 * np.cos(turn)),
  ]
  parts.append((_stroke(thumb, 0.15, 0.085), True))
  return parts


def _key(between: _Between) -> list[Part]:
  bow, flat = between(0.4, 0.5), between(0.8, 1.0)
  shaft, bit = between(0.1, 0.13), between(0.24, 0.34)
  y = -0.97 + bow * flat
  hole = bow * between(0.32, 0.46)
  parts = [
    (_ellipse(0.0, y, bow, bow * flat), True),
    (_ellipse(0.0, y - 0.04, hole, hole * flat), False),
    (
      _polygon(
        (-shaft, y + bow * flat - 0.06),
        (shaft, y + bow * flat - 0.06),
        (shaft, 0.96),
        (-shaft, 0.96),
      ),
      True,
    ),
  ]
  place = 0.93
  for _ in range(int(between(2, 4))):
    tall, long = between(0.1, 0.15), shaft + bit * between(0.7, 1.2)
    tooth = [
      (0.0, place - tall),
      (long, place - tall),
      (long, place),
      (0.0, place),
    ]
    parts.append((_polygon(*tooth), True))
    place -= tall + between(0.08, 0.12)
  return parts


def _mushroom(between: _Between) -> list[Part]:
  tall, rim = between(0.7, 0.95), between(0.02, 0.14)
  wide = between(0.75, 0.95)
  cap = _curve(
    (-wide, rim),
    (-wide * 0.86, -tall * 0.45),
    (-wide * 0.4, -tall * 0.92),
    (wide * 0.1, -tall),
    (wide * 0.6, -tall * 0.8),
    (wide * 0.93, -tall * 0.35),
    (wide, rim),
    (wide * 0.6, rim + 0.12),
    (0.0, rim + 0.06),
    (-wide * 0.6, rim + 0.12),
  )
  slim, foot = between(0.15, 0.23), between(0.22, 0.34)
  stem = _curve(
    (-slim, rim),
    (slim, rim),
    (slim * 0.95, 0.45),
    (foot, 0.8),
    (foot * 0.6, 0.96),
    (-foot * 0.6, 0.96),
    (-foot, 0.8),
    (-slim * 0.95, 0.45),
  )
  return [(cap, True), (stem, True)]


def _rabbit(between: _Between) -> list[Part]:
  plump, ear = between(0.38, 0.46), between(0.32, 0.42)
  lean, apart = between(-0.1, 0.35), between(0.25, 0.45)
  parts = [
    (_ellipse(0.24, 0.42, 0.54, plump), True),
    (_ellipse(0.42, 0.55, 0.38, 0.36), True),
    (_ellipse(-0.1, 0.3, 0.38, 0.42, 0.6), True),
    (_ellipse(-0.44, -0.06, 0.34, 0.25, between(-0.35, -0.05)), True),
    (_ellipse(0.82, 0.5, between(0.13, 0.18), 0.15), True),
    (_stroke([(-0.2, 0.4), (-0.3, 0.88), (-0.44, 0.9)], 0.14, 0.07), True),
    (_stroke([(0.55, 0.85), (0.05, 0.88)], 0.1, 0.07), True),
  ]
  for turn in (lean, lean + apart):
    x = -0.34 + ear * np.sin(turn)
    y = -0.2 - ear * np.cos(turn)
    parts.append((_ellipse(x, y, 0.095, ear, turn), True))
  return parts


def _tree(between: _Between) -> list[Part]:
  tiers = int(between(3, 5))
  bottom, wide = between(0.55, 0.66), between(0.55, 0.75)
  notch, droop = between(0.48, 0.62), between(0.02, 0.08)
  side: list[tuple[float, float]] = [(0.0, -0.98)]
  for i in range(1, tiers + 1):
    y = -0.98 + (bottom + 0.98) * i / tiers
    reach = wide * (0.3 + 0.7 * i / tiers)
    side.append((reach, y + droop))
    if i < tiers:
      side.append((reach * notch, y - 0.02))
  crown = _polygon(*side, *((-x, y) for x, y in reversed(side[1:])))
  trunk = between(0.09, 0.14)
  stem = _polygon(
    (-trunk, bottom - 0.05),
    (trunk, bottom - 0.05),
    (trunk, 0.97),
    (-trunk, 0.97),
  )
  return [(crown, True), (stem, True)]


def _umbrella(between: _Between) -> list[Part]:
  rim, tall = between(0.0, 0.12), between(0.72, 0.9)
  scallops = int(between(3, 6))
  rise = between(0.1, 0.16)
  dome = np.linspace(np.pi, 2 * np.pi, 24)
  top = np.stack([0.95 * np.cos(dome), rim + tall * np.sin(dome)], axis=1)
  across = np.linspace(0.95, -0.95, 6 * scallops + 1)[1:-1]
  phase = np.linspace(0, np.pi * scallops, 6 * scallops + 1)[1:-1]
  hem = np.stack([across, rim - rise * np.abs(np.sin(phase))], axis=1)
  half, hook = 0.055, between(0.12, 0.18)
  bend = np.linspace(np.pi, 0, 9)
  handle = [
    (0.0, rim - 0.3),
    (0.0, 0.4),
    *((hook + hook * np.cos(a), 0.75 + hook * np.sin(a)) for a in bend),
  ]
  tip = [(0.0, rim - tall - 0.1), (0.0, rim - tall + 0.1)]
  return [
    (np.concatenate([top, hem]), True),
    (_stroke(handle, half, half * 1.2), True),
    (_stroke(tip, half * 0.7, half), True),
  ]


_DRAWN_BY: dict[str, Callable[[_Between], list[Part]]] = {
  "airplane": _airplane,
  "bird": _bird,
  "boat": _boat,
  "bottle": _bottle,
  "car": _car,
  "chair": _chair,
  "cup": _cup,
  "fish": _fish,
  "guitar": _guitar,
  "hammer": _hammer,
  "hand": _hand,
  "key": _key,
  "mushroom": _mushroom,
  "rabbit": _rabbit,
  "tree": _tree,
  "umbrella": _umbrella,
}
CLASSES = tuple(_DRAWN_BY)


def _deform(draw: np.random.Generator, points: np.ndarray) -> np.ndarray:
  """A smooth warp, then an affine map that keeps the figure in the picture."""
  warped = points.copy()
  for _ in range(2):
    wave = draw.uniform(-2.2, 2.2, 2)
    shift = draw.uniform(-0.05, 0.05, 2)
    phase = draw.uniform(0, 2 * np.pi)
    warped += shift * np.sin(points @ wave + phase)[:, None]
  turn = np.deg2rad(draw.uniform(-25, 25))
  cos, sin = np.cos(turn), np.sin(turn)
  stretch = np.exp(draw.uniform(-0.16, 0.16))
  mirror = draw.choice((-1.0, 1.0))
  shear = draw.uniform(-0.15, 0.15)
  matrix = np.array([[cos, -sin], [sin, cos]]) @ np.array(
    [[mirror * stretch, shear], [0.0, 1.0 / stretch]]
  )
  placed = warped @ matrix.T
  low, high = placed.min(axis=0), placed.max(axis=0)
  extent = 2 * draw.uniform(0.7, 0.94)
  scale = extent / (high - low).max()
  room = 0.97 - (high - low) * scale / 2
  centre = draw.uniform(-1, 1, 2) * room
  return (placed - (low + high) / 2) * scale + centre


@typed
def outline(draw: np.random.Generator, label: int) -> list[Part]:
  """Draws one thing of a class: its build, its pose, its place.

  The longer side of the figure spans 70 to 94 per cent of the picture; nothing
  touches the border.

  Args:
    draw: Where the chance comes from.
    label: Index into `CLASSES`.

  Returns:
    The parts, in the order in which they are painted.
  """
  if not 0 <= label < len(CLASSES):
    raise ValueError(f"label must be in 0..{len(CLASSES) - 1}, got {label}.")
  between = lambda low, high: low + (high - low) * draw.random()
  parts = _DRAWN_BY[CLASSES[label]](between)
  ends = np.cumsum([len(points) for points, _ in parts])[:-1]
  points = _deform(draw, np.concatenate([points for points, _ in parts]))
  kinds = (adds for _, adds in parts)
  return list(zip(np.split(points, ends), kinds, strict=True))


def _paint(parts: list[Part], size: int) -> Image.Image:
  picture = Image.new("L", (size, size))
  pen = ImageDraw.Draw(picture)
  for points, adds in parts:
    # The centre of pixel i lies at i + 1/2.
    corners = (points + 1) * (size / 2) - 0.5
    pen.polygon(corners.ravel().tolist(), fill=255 * adds)
  return picture


def _oversampling(size: int) -> int:
  return 4 if size <= 128 else 2


@typed
def mask(parts: list[Part], *, size: int) -> Float[np.ndarray, "size size"]:
  """Gives the share of each pixel that the figure covers.

  Args:
    parts: A drawing.
    size: Pixels along each side, 8 or more.

  Returns:
    Coverage, 0..1.
  """
  if size < 8:
    raise ValueError(f"size must be at least 8, got {size}.")
  factor = _oversampling(size)
  fine = _paint(parts, size * factor).reduce(factor)
  return np.asarray(fine, dtype=np.float32) / 255


@typed
def contour(
  parts: list[Part], *, size: int, width: float
) -> Float[np.ndarray, "size size"]:
  """Gives the share of each pixel that a line around the figure covers.

  Args:
    parts: A drawing.
    size: Pixels along each side, 8 or more.
    width: Of the line, as a fraction of the picture's side, at most 0.1.

  Returns:
    Coverage, 0..1.
  """
  if size < 8:
    raise ValueError(f"size must be at least 8, got {size}.")
  if not 0 < width <= 0.1:
    raise ValueError(f"width must be in (0, 0.1], got {width}.")
  factor = _oversampling(size)
  fine = np.asarray(_paint(parts, size * factor)) > 0
  reach = max(width * size * factor / 2, 1.0)
  # A pixel is on the line where something within reach is of another kind.
  around = np.pad(fine, int(np.ceil(reach)))
  line = np.zeros_like(fine)
  for angle in np.arange(12) * (np.pi / 6):
    x, y = (np.round(reach * f(angle)).astype(int) for f in (np.cos, np.sin))
    margin = int(np.ceil(reach))
    rows = slice(margin + y, margin + y + len(fine))
    columns = slice(margin + x, margin + x + len(fine))
    line |= around[rows, columns] != fine
  picture = Image.fromarray(line.astype(np.uint8) * 255).reduce(factor)
  return np.asarray(picture, dtype=np.float32) / 255
