"""Generated streets as a LiDAR sees them, with a label for every point.

A car with the sensor on its roof stands in a street: road with markings,
parking lanes, kerb, sidewalk, yards of grass; houses, fences, hedges; trees,
bushes; poles and signs; cars, vans, trucks, trailers, buses; people, bicycles,
people who ride them. Sizes and places are drawn, bodies hide each other, and
things are told apart by shape and surroundings rather than by how strongly they
reflect: vans and trucks, poles and trunks, walkers and riders are alike, and
the remissions of all materials overlap. Labels are SemanticKITTI's, mapped to
its train ids, and as there they end 50 m from the sensor (0 beyond).

The splits "train", "val" and "test" are other scenes of the same kind. On the
command line, a folder in SemanticKITTI's layout:

  python -m jaxshape.data.lidar_scenes <folder> --scans=100

Remissions per material follow three scans of SemanticKITTI (sequence 00).

Reference:
  Behley et al., "SemanticKITTI", ICCV 2019 (labels, sensor, remissions).
"""

import argparse
from collections.abc import Sequence
import math
import os
import pathlib
import sys
from typing import Any

import numpy as np
import yaml

from jaxshape.data import (
  lidar_casting,
  lidar_examples,
  lidar_streets,
  scan_files,
  semantic_kitti,
)
from jaxshape.errors import InputError

# In this order: a split's place here is part of its scenes' seeds.
SIZES = {"train": 2000, "val": 200, "test": 200}
SPLITS = tuple(SIZES)
# The official numbers of sequences, of which one is enough for each split.
SEQUENCES = {"train": 0, "val": 8, "test": 11}
FOV_UP, FOV_DOWN = 3.0, -25.0
_LABELLED = 50.0
# Share of the points of each train id in 400 scenes of "train".
_SHARES = (
  0.00814, 0.086, 0.0035, 0.000952, 0.0217, 0.0102, 0.00618, 0.00373, 0.00178,
  0.309, 0.069, 0.123, 0.00931, 0.0836, 0.0556, 0.106, 0.0105, 0.0834,
  0.00788, 0.000821
)  # fmt: skip


def scan(
  draw: np.random.Generator, *, beams: int, width: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Draws a street and scans it once.

  Args:
    draw: All randomness.
    beams: Of the sensor, from 3 degrees above the horizon to 25 below.
    width: Shots of each beam in a turn.

  Returns:
    Points [N, 3] in metres, remissions [N] in 0..1 and raw labels [N], beam by
    beam from the top, each turning from behind over left, ahead and right.
  """
  high, low = math.radians(FOV_UP), math.radians(FOV_DOWN)
  gap = (high - low) / beams
  elevation = high - gap * (np.arange(beams) + 0.5)
  elevation += draw.normal(0, 0.08 * gap, beams)
  turn = 2 * math.pi / width
  azimuth = math.pi - turn * (np.arange(width) + 0.5)
  azimuth += draw.normal(0, 0.08 * turn, width)
  elevation = np.sort(elevation)[::-1]
  caster = lidar_casting.Caster(azimuth, elevation, draw)
  street = lidar_streets.Street(draw, caster)
  street.build()
  reach = caster.distance * caster.sec_e[:, None]
  level, spread = np.array(street.reflects, np.float32).T
  body = caster.body
  base = level[body]
  # Light that comes back: dark, slanted and distant surfaces lose it.
  signal = base * caster.cosine / np.maximum(reach, 1) ** 2
  faint = np.exp(np.float32(-8e-6) / np.maximum(signal, np.float32(1e-9)))
  kept = caster.hit & (reach < lidar_streets.MAX_RANGE) & (reach > 1)
  kept &= draw.random(reach.shape, np.float32) < faint * (
    1 - np.float32(draw.uniform(0.01, 0.05))
  )
  row, column = np.nonzero(kept)
  noise = draw.standard_normal((2, len(row)), np.float32)
  reach, body = reach[kept] + np.float32(0.02) * noise[0], body[kept]
  distance = reach / caster.sec_e[row]
  points = np.stack(
    [
      distance * caster.cos_a[column],
      distance * caster.sin_a[column],
      distance * caster.tan_e[row],
    ],
    axis=1,
  )
  remission = base[kept] * (0.85 + 0.15 * caster.cosine[kept])
  remission = np.clip(remission + spread[body] * noise[1], 0, 0.99)
  raw = np.array(street.raw, np.int32)[body]
  raw[reach > _LABELLED] = 0
  return points.astype(np.float32), remission.astype(np.float32), raw


class Source(lidar_examples.Scans):
  """Generated scans, drawn when asked for and then kept.

  A scan is a function of (seed, split, index, beams, width) alone.

  Attributes:
    beams: Rows of its range image.
    width: Columns of its range image.
    labels: What the raw labels mean.
    split: Which scenes these are.
  """

  def __init__(
    self,
    *,
    split: str,
    beams: int,
    width: int,
    num_examples: int,
    seed: int,
    cache: int,
  ):
    self.labels = semantic_kitti.builtin_labels()
    self.split, self.beams, self.width, self._seed = split, beams, width, seed
    sequence = SEQUENCES[split]
    super().__init__(
      classes=self.labels.classes,
      colors=self.labels.colors,
      frequencies=np.array(_SHARES),
      scans=tuple(f"{sequence:02d}/{i:06d}" for i in range(num_examples)),
      points=beams * width,
      cache=cache,
    )

  @property
  def fingerprint(self) -> dict[str, dict[str, Any]]:
    """What the scans are drawn from."""
    drawn = {
      "split": self.split,
      "beams": self.beams,
      "width": self.width,
      "seed": self._seed,
    }
    return {**super().fingerprint, "drawn": drawn}

  def raw(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A scan as files hold it.

    Args:
      i: Its number.

    Returns:
      Points [N, 3], remissions [N] and raw labels [N], without padding.
    """
    seeds = [self._seed, SPLITS.index(self.split), i]
    draw = np.random.default_rng(seeds)
    return scan(draw, beams=self.beams, width=self.width)

  def _read(self, i: int) -> lidar_examples.Labelled:
    points, remission, raw = self.raw(i)
    return points, remission, self.labels.train_ids(raw, name=self.scans[i])


def open_source(
  name: str = "",
  *,
  split: str,
  data_dir: str | None = None,
  beams: int = 32,
  width: int = 512,
  num_examples: int | None = None,
  seed: int = 0,
  cache: int = 2**30,
) -> Source:
  """Opens a split of the generated streets.

  Args:
    name: Empty: there is one variant.
    split: One of `SPLITS`.
    data_dir: Not needed, as nothing is read.
    beams: Of the sensor, 4..256: rows of the range image.
    width: Shots per turn, 32..8192: columns of the range image.
    num_examples: How many scans; by default `SIZES`.
    seed: Another seed gives other scenes in every split. 0 or more.
    cache: Bytes of memory for scans once drawn; 0 draws them anew each time.

  Returns:
    A source; safe to share between threads and processes. Its examples have
    `beams * width` points.

  Raises:
    InputError: There is no such split, or an option does not fit.
  """
  del data_dir
  if name:
    raise InputError(
      f"lidar_scenes has no variants, got {name!r}; write lidar_scenes."
    )
  if split not in SIZES:
    raise InputError(
      f"lidar_scenes has no split {split!r}; it has {', '.join(SPLITS)}."
    )
  count = SIZES[split] if num_examples is None else num_examples
  for option, value, least, most in (
    ("beams", beams, 4, 256), ("width", width, 32, 8192),
    ("num_examples", count, 1, 10**6), ("seed", seed, 0, 2**63),
  ):  # fmt: skip
    if not least <= value <= most:
      raise InputError(f"{option} must be in {least}..{most}, got {value}.")
  return Source(
    split=split,
    beams=beams,
    width=width,
    num_examples=count,
    seed=seed,
    cache=cache,
  )


def write(
  root: str | os.PathLike[str],
  *,
  scans: int,
  sequence: int | None = None,
  split: str = "train",
  beams: int = 32,
  width: int = 512,
  seed: int = 0,
) -> None:
  """Writes scans in SemanticKITTI's layout, with a small yaml.

  Args:
    root: The folder; it is made.
    scans: How many, at least 1.
    sequence: Number of the sequence, 0..99; by default `SEQUENCES`, which the
      yaml says are the splits.
    split: Which scenes, one of `SPLITS`; "test" gets no labels.
    beams: See `open_source`, like all that follows.
    width: See `open_source`.
    seed: See `open_source`.
  """
  source = open_source(
    split=split, beams=beams, width=width, num_examples=scans, seed=seed,
    cache=0,
  )  # fmt: skip
  number = SEQUENCES[split] if sequence is None else sequence
  if not 0 <= number <= 99:
    raise InputError(f"sequence must be in 0..99, got {number}.")
  table = semantic_kitti.builtin_yaml()
  raw_ids = source.labels.to_raw.tolist()
  table["content"] = dict(zip(raw_ids, _SHARES, strict=True))
  names = {"train": "train", "val": "valid", "test": "test"}
  table["split"] = {names[s]: [n] for s, n in SEQUENCES.items()}
  folder = pathlib.Path(root) / "sequences" / f"{number:02d}"
  for i in range(scans):
    points, remission, raw = source.raw(i)
    scan_files.write(folder / "velodyne" / f"{i:06d}.bin", points, remission)
    if split != "test":
      scan_files.write_labels(folder / "labels" / f"{i:06d}.label", raw)
  text = yaml.safe_dump(table, sort_keys=False, default_flow_style=None)
  path = pathlib.Path(root) / semantic_kitti.YAML
  scan_files.write_bytes(path, text.encode())


def main(arguments: Sequence[str]) -> None:
  """Writes all splits to a folder, as the command line says.

  Args:
    arguments: Without the program's name.
  """
  parser = argparse.ArgumentParser(
    prog="python -m jaxshape.data.lidar_scenes",
    description="Writes generated LiDAR scans in SemanticKITTI's layout.",
  )
  parser.add_argument("folder")
  parser.add_argument("--scans", type=int, default=100, help="for training")
  parser.add_argument("--others", type=int, default=20, help="val and test")
  parser.add_argument("--beams", type=int, default=32)
  parser.add_argument("--width", type=int, default=512)
  parser.add_argument("--seed", type=int, default=0)
  args = parser.parse_args(arguments)
  for split in SPLITS:
    write(
      args.folder,
      scans=args.scans if split == "train" else args.others,
      split=split,
      beams=args.beams,
      width=args.width,
      seed=args.seed,
    )


if __name__ == "__main__":
  try:
    main(sys.argv[1:])
  except InputError as error:
    sys.exit(f"error: {error}")
