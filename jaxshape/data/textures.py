"""Families of texture: sixteen to learn from, ten that are never learned.

A texture is a field of one number per pixel. Every drawing has its own period,
orientation, phase and bend, all in units of 1/64 of the picture's side, so that
a drawing looks the same at any size. Within a family the fields u and v are the
pixels' coordinates in periods, and `soft` is the width of a pixel in periods,
over which edges are blended.
"""

from collections.abc import Callable
import functools

import numpy as np

from jaxshape.typing import Float, typed

_Field = np.ndarray
_Family = Callable[
  [np.random.Generator, np.ndarray, np.ndarray, np.float32], np.ndarray
]
_TURN = np.float32(2 * np.pi)
# Things in photographs stand more or less upright, and so does their texture.
_TILT = 0.3
# How far a period is from the middle of its family's, at most, as a factor.
_SPREAD = 1.18


def _fraction(x: _Field) -> _Field:
  return x - np.floor(x)


def _step(distance: _Field, soft: np.float32) -> _Field:
  """0 where the distance is negative, 1 where positive, blended in between."""
  return np.clip(distance / soft + np.float32(0.5), 0, 1)


def _bars(x: _Field, duty: float, soft: np.float32) -> _Field:
  """1 on the given share of each period, around its middle."""
  return _step(np.float32(duty / 2) - np.abs(_fraction(x) - 0.5), soft)


def _noise(draw: np.random.Generator, u: _Field, v: _Field) -> _Field:
  """Smooth random hills, one per unit square; repeats after 64."""
  table = draw.random((64, 64), dtype=np.float32).ravel()
  column, row = np.floor(u), np.floor(v)
  x, y = u - column, v - row
  x, y = x * x * (3 - 2 * x), y * y * (3 - 2 * y)
  left, top = column.astype(np.int32) & 63, row.astype(np.int32) & 63
  right, bottom = (left + 1) & 63, ((top + 1) & 63) * 64
  top *= 64
  upper = table[top + left]
  upper += x * (table[top + right] - upper)
  lower = table[bottom + left]
  lower += x * (table[bottom + right] - lower)
  return upper + y * (lower - upper)


def _clouds(draw: np.random.Generator, u: _Field, v: _Field) -> _Field:
  """Hills with smaller hills on them."""
  return (_noise(draw, u, v) + 0.5 * _noise(draw, 2 * u, 2 * v)) / 1.5


def _per_cell(draw: np.random.Generator, u: _Field, v: _Field) -> _Field:
  """One random number for each unit square."""
  table = draw.random(64 * 64, dtype=np.float32)
  column = np.floor(u).astype(np.int32) & 63
  row = np.floor(v).astype(np.int32) & 63
  return table[row * 64 + column]


def _staggered(u: _Field, v: _Field) -> tuple[_Field, _Field]:
  """Offsets from the middle of the square, every other row shifted by half."""
  shift = (np.floor(v).astype(np.int32) & 1) * np.float32(0.5)
  return _fraction(u + shift) - 0.5, _fraction(v) - 0.5


def _stripes(draw, u, v, soft):
  del v
  return _bars(u, draw.uniform(0.3, 0.7), soft)


def _checks(draw, u, v, soft):
  del draw
  across, down = (2 * _bars(x / 2, 0.5, soft / 2) - 1 for x in (u, v))
  return 0.5 + 0.5 * across * down


def _dots(draw, u, v, soft):
  x, y = _staggered(u, v)
  return _step(np.float32(draw.uniform(0.24, 0.38)) - np.hypot(x, y), soft)


def _cells(draw, u, v, soft):
  places = draw.uniform(-0.35, 0.35, (2, 64 * 64)).astype(np.float32)
  tones = draw.random(64 * 64, dtype=np.float32)
  column, row = np.floor(u), np.floor(v)
  x, y = u - column - np.float32(0.5), v - row - np.float32(0.5)
  column, row = column.astype(np.int32), row.astype(np.int32)
  nearest = np.full_like(u, 9)
  second = nearest.copy()
  tone = np.zeros_like(u)
  for down in (-1, 0, 1):
    line = ((row + down) & 63) * 64
    for right in (-1, 0, 1):
      cell = line + ((column + right) & 63)
      away = (places[0][cell] + (right - x)) ** 2
      away += (places[1][cell] + (down - y)) ** 2
      closer = away < nearest
      second = np.where(closer, nearest, np.minimum(second, away))
      tone = np.where(closer, tones[cell], tone)
      nearest = np.where(closer, away, nearest)
  rim = np.sqrt(second) - np.sqrt(nearest)
  return _step(rim - np.float32(0.14), 2 * soft) * (0.55 + 0.45 * tone)


def _bricks(draw, u, v, soft):
  u = u / 2 + (np.floor(v).astype(np.int32) & 1) * np.float32(0.5)
  joint = draw.uniform(0.14, 0.24)
  block = _bars(u, 1 - joint / 2, soft / 2) * _bars(v, 1 - joint, soft)
  return block * (0.7 + 0.3 * _per_cell(draw, u, v))


def _waves(draw, u, v, soft):
  del soft
  bend = np.float32(draw.uniform(0.6, 1.0))
  length = np.float32(draw.uniform(4.0, 6.0))
  swing = bend * np.sin(_TURN / length * u)
  return 0.5 + 0.5 * np.sin(_TURN * (v + swing))


def _noise_field(draw, u, v, soft):
  del soft
  return _clouds(draw, u, v)


def _scales(draw, u, v, soft):
  del draw
  out = np.zeros_like(u)
  row = np.floor(2 * v).astype(np.int32)
  # From the far rows to the near ones, which lie over them.
  for back in (1, 0, -1):
    line = row - back
    x = _fraction(u + (line & 1) * np.float32(0.5)) - np.float32(0.5)
    away = np.hypot(x, v - line * np.float32(0.5))
    inside = _step(np.float32(0.56) - away, soft)
    out += inside * ((away / np.float32(0.56)) ** 3 - out)
  return out


def _grid(draw, u, v, soft):
  thick = draw.uniform(0.18, 0.3)
  return 1 - np.maximum(_bars(u, thick, soft), _bars(v, thick, soft))


def _triangles(draw, u, v, soft):
  del draw
  x = _fraction(u - v * np.float32(0.57735))
  y = _fraction(v * np.float32(1.1547))
  return _step(x + y - 1, 2 * soft)


def _hexagons(draw, u, v, soft):
  wall = np.float32(draw.uniform(0.08, 0.14))
  height = np.float32(3**0.5)
  inside = np.full_like(u, 9)
  for shift in (0.0, 0.5):
    x = np.abs(_fraction(u + np.float32(shift)) - 0.5)
    y = np.abs(_fraction(v / height + np.float32(shift)) - 0.5) * height
    inside = np.minimum(inside, np.maximum(x, x / 2 + y * height / 2))
  return _step(np.float32(0.5) - wall - inside, soft)


def _zigzag(draw, u, v, soft):
  swing = np.float32(draw.uniform(0.5, 0.9))
  bend = np.abs(_fraction(u / 2) - np.float32(0.5)) * 2
  return _bars(v + swing * bend, draw.uniform(0.4, 0.6), soft)


def _wood(draw, u, v, soft):
  bend = np.float32(draw.uniform(1.5, 2.5))
  rings = _fraction(v + bend * _noise(draw, u * 0.12, v * 0.35))
  # A slow rise and a sudden fall, as from early to late wood.
  late = np.minimum(rings, (1 - rings) / np.maximum(soft, np.float32(0.15)))
  return late + 0.35 * _noise(draw, u * 0.5, v * 4)


def _weave(draw, u, v, soft):
  gap = draw.uniform(0.12, 0.24)
  over = (np.floor(u).astype(np.int32) + np.floor(v).astype(np.int32)) & 1
  x, y = _fraction(u), _fraction(v)
  across, along = np.where(over, y, x), np.where(over, x, y)
  round_ = 1 - (2 * across - 1) ** 2 * np.float32(0.5)
  dips = 1 - (2 * along - 1) ** 4 * np.float32(0.4)
  thread = _step((1 - gap) / 2 - np.abs(across - 0.5), soft)
  return thread * round_ * dips * np.where(over, 1, np.float32(0.75))


def _fur(draw, u, v, soft):
  del soft
  lean = _noise(draw, u * 0.15, v * 0.15)
  hairs = _noise(draw, 2 * (u + lean), v * 0.35)
  return hairs + 0.6 * _noise(draw, 3.7 * (u + lean), v * 0.5)


def _spots(draw, u, v, soft):
  level = np.float32(draw.uniform(0.5, 0.6))
  return _step(_noise(draw, u * 1.2, v * 1.2) - level, soft)


def _rings(draw, u, v, soft):
  turns = np.float32(draw.uniform(4.0, 5.0))
  x, y = _staggered(u, v)
  return _bars(np.hypot(x, y) * turns, 0.5, soft * turns)


def _crosses(draw, u, v, soft):
  long, thick = draw.uniform(0.34, 0.42), draw.uniform(0.1, 0.14)
  x, y = (np.abs(z) for z in _staggered(u, v))
  arms = np.maximum(np.minimum(x, y) - thick, np.maximum(x, y) - long)
  return _step(-arms.astype(np.float32), soft)


def _herringbone(draw, u, v, soft):
  joint = np.float32(draw.uniform(0.07, 0.12))
  column, row = np.floor(u), np.floor(v)
  x, y = u - column, v - row
  place = (column.astype(np.int32) - row.astype(np.int32)) & 3
  lying = place < 2
  along = np.where(lying, x + (place == 1), y + (place == 2))
  across = np.where(lying, y, x)
  rim = np.minimum(np.minimum(across, 1 - across), np.minimum(along, 2 - along))
  tone = np.where(lying, np.float32(1), np.float32(0.6))
  return _step(rim - joint, soft) * tone


def _marble(draw, u, v, soft):
  del soft
  fold = np.float32(draw.uniform(1.5, 2.5))
  veins = np.sin(_TURN * (u * 0.4 + fold * _clouds(draw, u * 0.45, v * 0.45)))
  return np.sqrt(np.abs(veins))


def _lenses(draw, u, v, soft):
  bulge = np.float32(draw.uniform(0.35, 0.6))
  over = (np.floor(u).astype(np.int32) + np.floor(v).astype(np.int32)) & 1
  x, y = _fraction(u) - np.float32(0.5), _fraction(v) - np.float32(0.5)
  x, y = np.where(over, y, x), np.abs(np.where(over, x, y))
  # Two arcs through (0, 1/2) and (0, -1/2) whose centres lie at -+bulge.
  radius = np.sqrt(bulge**2 + np.float32(0.23))
  return _step(radius - np.hypot(np.abs(x) + bulge, y), soft)


def _labyrinth(draw, u, v, soft):
  total = np.zeros_like(u)
  angles = np.pi * (np.arange(7) + draw.uniform(0, 1)) / 7
  for angle in angles:
    x, y = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    phase = np.float32(draw.uniform(0, 2 * np.pi))
    total += np.sin(_TURN * (x * u + y * v) + phase)
  # The slope of the sum is some 10 per period where it crosses zero.
  return _step(total / 10, soft)


def _arcs(draw, u, v, soft):
  thick = np.float32(draw.uniform(0.1, 0.17))
  x, y = _fraction(u), _fraction(v)
  x = np.where(_per_cell(draw, u, v) < 0.5, x, 1 - x)
  one = np.abs(np.hypot(x, y) - np.float32(0.5))
  other = np.abs(np.hypot(1 - x, 1 - y) - np.float32(0.5))
  return _step(thick - np.minimum(one, other), soft)


def _plaid(draw, u, v, soft):
  wide, thin = draw.uniform(0.4, 0.55), draw.uniform(0.1, 0.18)
  bands = (
    _bars(x, wide, soft) - 0.7 * _bars(x + np.float32(0.5), thin, soft)
    for x in (u, v)
  )
  return sum(bands, np.zeros_like(u))


def _spirals(draw, u, v, soft):
  arms, turns = np.float32(draw.integers(1, 3)), draw.uniform(1.6, 2.2)
  x, y = _staggered(u, v)
  away = np.hypot(x, y)
  swirl = np.sin(arms * np.arctan2(y, x) + _TURN * np.float32(turns) * away * 2)
  return _step(swirl * 0.1, soft) * _step(np.float32(0.5) - away, soft)


def _contours(draw, u, v, soft):
  lines = np.float32(draw.uniform(4.5, 6.0))
  hills = lines * _noise(draw, u * 0.45, v * 0.45)
  return np.minimum(_bars(hills, 0.6, 2 * soft), 1)


# Drawn by, and the middle of the periods, in 1/64 of the picture's side.
_TRAINING: dict[str, tuple[_Family, float]] = {
  "stripes": (_stripes, 5.1),
  "checks": (_checks, 4.2),
  "dots": (_dots, 6.3),
  "cells": (_cells, 7.0),
  "bricks": (_bricks, 5.0),
  "waves": (_waves, 5.6),
  "noise": (_noise_field, 5.1),
  "scales": (_scales, 7.4),
  "grid": (_grid, 6.3),
  "triangles": (_triangles, 7.0),
  "hexagons": (_hexagons, 7.4),
  "zigzag": (_zigzag, 6.0),
  "wood": (_wood, 6.3),
  "weave": (_weave, 5.3),
  "fur": (_fur, 6.0),
  "spots": (_spots, 6.3),
}
_NOVEL: dict[str, tuple[_Family, float]] = {
  "rings": (_rings, 10.6),
  "crosses": (_crosses, 7.4),
  "herringbone": (_herringbone, 5.0),
  "marble": (_marble, 6.3),
  "lenses": (_lenses, 6.0),
  "labyrinth": (_labyrinth, 6.0),
  "arcs": (_arcs, 6.0),
  "plaid": (_plaid, 7.7),
  "spirals": (_spirals, 10.6),
  "contours": (_contours, 6.3),
}
TRAINING = tuple(_TRAINING)
NOVEL = tuple(_NOVEL)
FAMILIES = TRAINING + NOVEL
_DRAWN_BY = (*_TRAINING.values(), *_NOVEL.values())


@functools.lru_cache(maxsize=8)
def _coordinates(size: int) -> tuple[np.ndarray, np.ndarray]:
  """Each pixel's centre, in 1/64 of the side, from the picture's centre."""
  line = (np.arange(size, dtype=np.float32) + 0.5) * (64 / size) - 32
  x, y = np.meshgrid(line, line)
  return x, y


@typed
def field(
  draw: np.random.Generator, family: int, *, size: int
) -> Float[np.ndarray, "size size"]:
  """Draws one texture of a family.

  Args:
    draw: Where the chance comes from.
    family: Index into `FAMILIES`.
    size: Pixels along each side, 8 or more.

  Returns:
    A float32 field whose mean is 0 and whose standard deviation is 1.
  """
  if not 0 <= family < len(FAMILIES):
    raise ValueError(f"family must be in 0..{len(FAMILIES) - 1}, got {family}.")
  if size < 8:
    raise ValueError(f"size must be at least 8, got {size}.")
  function, middle = _DRAWN_BY[family]
  period = middle * _SPREAD ** draw.uniform(-1, 1)
  angle = draw.uniform(-_TILT, _TILT)
  cos, sin = np.cos(angle) / period, np.sin(angle) / period
  # A gentle bend, as of cloth or bark, never shorter than half the picture.
  wave = draw.uniform(-0.14, 0.14, 2)
  depth = draw.uniform(0, 1.5) / period
  offsets = draw.uniform(0, 64, 2)
  x, y = _coordinates(size)
  bend = np.sin(np.float32(wave[0]) * x + np.float32(wave[1]) * y)
  bend *= np.float32(depth)
  u = np.float32(cos) * x + np.float32(sin) * y + np.float32(offsets[0]) + bend
  v = np.float32(cos) * y - np.float32(sin) * x + np.float32(offsets[1]) - bend
  values = function(draw, u, v, np.float32(64 / size / period))
  values = values.astype(np.float32, copy=False)
  values = values - values.mean()
  return values / np.maximum(np.sqrt(np.mean(values * values)), 1e-3)
