"""Generated descriptors of landmarks, with the truth of the revisited data.

A stand-in for the descriptors that a network gives of photographs (unit
vectors, whitened), to train, validate and test query expansion where there are
neither photographs nor a network. A descriptor is

  x = l2(s (sqrt(I) identity + sqrt(S) style + sqrt(V) light) + e n)

with n ~ N(0, 1/D), I + S + V = 1 and e^2 = 1 - s^2 + noise^2. What is assumed,
and why:

- *identity*: a landmark is a curved sheet, not a ball. Views lie on a sphere in
  a subspace, spread along two coordinates: the angle (around the building) and
  the detail (near or far), most of them before the main front. Views a quarter
  turn apart are as good as orthogonal and joined only by those in between: the
  manifolds that diffusion follows (Iscen et al.).
- *style*: landmarks come in groups of similar architecture. They share a style
  and in part the place of their front, so a query's neighbours mix them.
- *light*: angle, detail, night and more move all landmarks alike, in a subspace
  of its own. The whitening was learned on other data and leaves it.
- *s*: how much of the picture the landmark fills; the rest is background.
- How many views a landmark has is long-tailed, 2 to 200.
- *distractors*: in each group two clusters of their own size and density, rows
  alone of which some share the style, and a few panoramas, similar to many
  queries at once (hubs: Radovanovic et al.).

Subspaces and light are the same in all splits, as one network would have it;
groups, landmarks and distractors of the splits are drawn apart and share
nothing else. Labels follow from how a picture was taken, never from its
descriptor. Of a query's landmark, a view is junk if it shows little of it or
another side, easy if it is near the query's in angle, detail and light and
nothing hides it, hard otherwise. "test" has held-out queries and such truth;
in "train" and "valid" rows of the database are the queries, clusters are the
truth, and views that show too little are not there, as reconstructions of the
scene would not register them.

On the command line, a folder in the layout of the public files:

  python -m jaxshape.data.landmarks <folder>

Constants were set on seeds from 1000 up, by classical expansion alone. On 1000
to 1004, mean average precision (of Medium and Hard, in percent) is 51 without
expansion; of AQE 60 at its best, with 4 neighbours, and 43 with 64; of alpha-QE
(3) 59 with 8 and 56 with 72; 76 if a query adds the relevant ones among its 64
neighbours, a third of them, and no other. Unlike on the public data alpha-QE is
not flat: in 128 dimensions even chance neighbours have a similarity of 0.25.

Reference:
  Radenovic et al., "Revisiting Oxford and Paris: Large-Scale Image Retrieval
  Benchmarking", CVPR 2018 (labels, protocol); Iscen et al., "Efficient
  Diffusion on Region Manifolds", CVPR 2017; Radovanovic et al., "Hubs in
  Space", JMLR 2010.
"""

import argparse
from collections.abc import Sequence
import dataclasses
import os
import pathlib
import pickle
import sys
from typing import Any, NamedTuple

import numpy as np

from jaxshape.data import retrieval_examples
from jaxshape.errors import InputError

# In this order: a split's place here is part of its seeds.
SPLITS = ("train", "valid", "test")
LANDMARKS = {"train": 3000, "valid": 100, "test": 70}
DISTRACTORS = {"train": 45_000, "valid": 2000, "test": 4000}
# At most: of "train" and "valid" they are views of landmarks in the database.
QUERIES = {"train": 20_000, "valid": 200, "test": 100}
_GROUP, _LANDMARK, _DISTRACTORS, _QUERY, _PAIRS = range(5)

_IDENTITY, _STYLE, _LIGHT = 0.75, 0.10, 0.15
_NOISE = 0.4
# The share of views from aside, and the spread of angles of those and others.
_ASIDE, _SPREAD = 0.4, (1.7, 0.4)
# The share that something hides.
_HIDDEN = 0.55
_LOG_SIZE = 3.3, 1.1
# Landmarks in a group, and how near their fronts may be to its centre.
_GROUP_SIZE, _CLOSE = 2, 0.7
_FEWEST, _MOST = 2, 200
# Views nearer than this overlap enough to be paired.
_OVERLAP = 1.25
# Rows of distractors are drawn by the hundred: clusters, alone, panoramas.
_HUNDRED, _CLUSTERED, _PANORAMAS, _SAME_STYLE = 100, 50, 4, 10


class Views(NamedTuple):
  """How pictures were taken, float32 [n] each.

  Attributes:
    angle: Where around the landmark, in radians from its front.
    detail: From the whole (below 0) to a part of it (above), in radians.
    night: From 0, by day, to 1.
    seen: The share s of the landmark in the picture, 0..1.
  """

  angle: np.ndarray
  detail: np.ndarray
  night: np.ndarray
  seen: np.ndarray


@dataclasses.dataclass(frozen=True)
class World:
  """What all landmarks of a seed share; each is a function of its number.

  Attributes:
    seed: What everything is drawn from.
    split: Which landmarks these are, one of `SPLITS`.
    identity: Orthonormal rows [5/8 D, D].
    style: Orthonormal rows [D/4, D].
    light: Unit rows [6, D], how each cause moves a descriptor.
  """

  seed: int
  split: str
  identity: np.ndarray
  style: np.ndarray
  light: np.ndarray

  def draw(self, kind: int, *number: int) -> np.random.Generator:
    """The generator of one thing."""
    split = SPLITS.index(self.split)
    return np.random.default_rng([self.seed, split, kind, *number])


def world(*, seed: int, split: str, dimensions: int) -> World:
  """Draws what is shared.

  Args:
    seed: 0 or more.
    split: One of `SPLITS`; the subspaces do not depend on it.
    dimensions: D, at least 16.

  Returns:
    The world.
  """
  draw = np.random.default_rng([seed])
  square = draw.standard_normal((dimensions, dimensions))
  columns, upper = np.linalg.qr(square)
  # The signs of a decomposition are the library's choice.
  basis = (columns * np.sign(np.diag(upper))).T.astype(np.float32)
  style, light = dimensions // 4, dimensions // 8
  ends = [dimensions - style - light, dimensions - light]
  identity, style, light = np.split(basis, ends)
  return World(seed, split, identity, style, _directions(draw, light, 6))


def landmark(
  shared: World, number: int
) -> tuple[np.ndarray, Views, np.ndarray]:
  """Draws all views of a landmark.

  Args:
    shared: What is not its own.
    number: Which landmark; those of a group follow each other.

  Returns:
    Descriptors [n, D], how they were taken, and the landmark's frame [4, D]:
    front, side, detail and style.
  """
  draw = shared.draw(_LANDMARK, number)
  views = _views(draw, _size(draw), junk=shared.split == "test")
  frame = _frame(shared, draw, number // _GROUP_SIZE)
  return _render(shared, draw, _on_sheet(frame, views), views), views, frame


def size(shared: World, number: int) -> int:
  """How many views a landmark has, without drawing them.

  Args:
    shared: What is not its own.
    number: Which landmark.

  Returns:
    The rows of `landmark`.
  """
  return _size(shared.draw(_LANDMARK, number))


def query(
  shared: World, number: int, frame: np.ndarray, *, index: int
) -> tuple[np.ndarray, Views]:
  """Draws a held-out picture, cut to the landmark.

  Args:
    shared: What is not the landmark's own.
    number: Which landmark.
    frame: As `landmark` gives it.
    index: Which of the landmark's queries.

  Returns:
    A descriptor [D], and how it was taken (of length 1).
  """
  draw = shared.draw(_QUERY, number, index)
  views = _views(draw, 1, junk=False)
  views = views._replace(
    angle=draw.normal(0, 0.5, 1).astype(np.float32),
    seen=draw.uniform(0.8, 1, 1).astype(np.float32),
  )
  return _render(shared, draw, _on_sheet(frame, views), views)[0], views


def distractors(shared: World, number: int) -> np.ndarray:
  """Draws a hundred rows that show none of the landmarks.

  Args:
    shared: What they have in common with landmarks.
    number: Which hundred; it belongs to the group of that number.

  Returns:
    Descriptors [100, D].
  """
  draw = shared.draw(_DISTRACTORS, number)
  style, centre = _group(shared, number)
  first = int(draw.integers(8, _CLUSTERED - 8))
  parts = []
  # The first cluster is the denser one.
  for n, spread in ((first, 0.5), (_CLUSTERED - first, 1.0)):
    frame = _frame(shared, draw, number)
    views = _views(draw, n, junk=True)
    views = views._replace(angle=np.float32(spread) * views.angle)
    parts.append(_render(shared, draw, _on_sheet(frame, views), views))
  alone = _HUNDRED - _CLUSTERED - _PANORAMAS
  identity = _unit(
    0.4 * centre + _directions(draw, shared.identity, alone)
  ) * np.float32(np.sqrt(_IDENTITY))
  styles = _directions(draw, shared.style, alone)
  styles[:_SAME_STYLE] = style
  views = _views(draw, alone, junk=True)
  content = identity + np.float32(np.sqrt(_STYLE)) * styles
  parts.append(_render(shared, draw, content, views))
  # A picture of a whole town: the centres of two groups at once.
  views = _views(draw, _PANORAMAS, junk=False)
  both = _unit(centre + _group(shared, number + 1)[1])
  content = np.sqrt(_IDENTITY) * both + np.sqrt(_STYLE) * style
  content = np.tile(content.astype(np.float32), (_PANORAMAS, 1))
  parts.append(_render(shared, draw, content, views))
  return np.concatenate(parts)


def labels(
  views: Views, query_views: Views
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """What views of a landmark are to a query of it.

  Args:
    views: Of the database.
    query_views: Of the query, of length 1.

  Returns:
    Easy, hard and junk, bool [n] each; every view is one of them.
  """
  turn = views.angle - query_views.angle
  gap = np.hypot(turn, views.detail - query_views.detail)
  junk = (views.seen < 0.4) | (gap > 1.9)
  light = np.abs(views.night - query_views.night)
  easy = ~junk & (views.seen >= 0.7) & (gap < 0.8) & (light < 0.5)
  return easy, ~junk & ~easy, junk


def _unit(x: np.ndarray) -> np.ndarray:
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _directions(
  draw: np.random.Generator, basis: np.ndarray, n: int
) -> np.ndarray:
  """Unit vectors [n, D] in the span of orthonormal rows."""
  return _unit(draw.standard_normal((n, len(basis)), np.float32)) @ basis


def _group(shared: World, number: int) -> tuple[np.ndarray, np.ndarray]:
  """Style and centre [D] of a group."""
  draw = shared.draw(_GROUP, number)
  style = _directions(draw, shared.style, 1)[0]
  return style, _directions(draw, shared.identity, 1)[0]


def _frame(shared: World, draw: np.random.Generator, group: int) -> np.ndarray:
  style, centre = _group(shared, group)
  close = _CLOSE * np.sqrt(draw.random())
  own = _directions(draw, shared.identity, 3)
  own[0] = _unit(close * centre + np.sqrt(1 - close**2) * own[0])
  sheet, upper = np.linalg.qr(own.T)
  sheet *= np.sign(np.diag(upper))
  return np.concatenate([sheet.T, style[None]]).astype(np.float32)


def _size(draw: np.random.Generator) -> int:
  return int(np.clip(np.exp(draw.normal(*_LOG_SIZE)), _FEWEST, _MOST))


def _views(draw: np.random.Generator, n: int, *, junk: bool) -> Views:
  aside = draw.random(n) < _ASIDE
  angle = draw.normal(0, np.where(aside, *_SPREAD))
  detail = draw.normal(0, 0.35, n)
  night = np.where(draw.random(n) < 0.2, draw.uniform(0.5, 1, n), 0)
  kind, place = draw.random(n), draw.random(n)
  seen = np.where(kind < _HIDDEN, 0.4 + 0.2 * place, 0.85 + 0.15 * place)
  if junk:
    seen = np.where(kind < 0.1, 0.1 + 0.3 * place, seen)
  return Views(*np.stack([angle, detail, night, seen]).astype(np.float32))


def _on_sheet(frame: np.ndarray, views: Views) -> np.ndarray:
  """Identity and style [n, D] of views of one landmark."""
  across = np.cos(views.detail)
  weights = np.sqrt(_IDENTITY) * np.stack(
    [
      across * np.cos(views.angle),
      across * np.sin(views.angle),
      np.sin(views.detail),
    ]
  )
  content = weights.T.astype(np.float32) @ frame[:3]
  return content + np.float32(np.sqrt(_STYLE)) * frame[3]


def _render(
  shared: World, draw: np.random.Generator, content: np.ndarray, views: Views
) -> np.ndarray:
  """Descriptors [n, D] of what is in the pictures."""
  n, dimensions = content.shape
  causes = np.stack(
    [
      0.7 * np.sin(1.5 * views.angle),
      0.7 * (np.cos(1.5 * views.angle) - 0.5),
      0.7 * np.sin(2 * views.detail),
      1.2 * views.night,
      *(0.4 * draw.standard_normal((2, n))),
    ],
    axis=1,
  )
  light = np.sqrt(_LIGHT) * _unit(causes)
  content = content + light.astype(np.float32) @ shared.light
  rest = np.sqrt((1 - views.seen**2 + _NOISE**2) / dimensions)
  x = draw.standard_normal((n, dimensions), np.float32)
  x *= rest[:, None].astype(np.float32)
  x += views.seen[:, None] * content
  return _unit(x)


def _fill(out: np.ndarray, shared: World, *, first: int) -> None:
  """Writes distractors, from the `first` one on, to the rows of an array."""
  at = 0
  while at < len(out):
    number, start = divmod(first + at, _HUNDRED)
    part = distractors(shared, number)[start : start + len(out) - at]
    out[at : at + len(part)] = part
    at += len(part)


class _Scene(NamedTuple):
  """All of a split, before it is made a source or files."""

  shared: World
  sizes: Sequence[int]
  database: np.ndarray
  clusters: np.ndarray

  def query_rows(self, count: int | None) -> np.ndarray:
    """Views as queries: the first of each landmark, the second of each, ..."""
    place = np.concatenate([np.arange(n) for n in self.sizes])
    return np.argsort(place, kind="stable")[:count]

  def queries(
    self, count: int
  ) -> tuple[np.ndarray, list[retrieval_examples.Truth]]:
    """Held-out queries [count, D] of the landmarks in turn, and their truth."""
    pictures, truth = [], []
    landmarks, start = len(self.sizes), np.cumsum([0, *self.sizes])
    known = [landmark(self.shared, n)[1:] for n in range(min(landmarks, count))]
    for q in range(count):
      index, number = divmod(q, landmarks)
      views, frame = known[number]
      x, taken = query(self.shared, number, frame, index=index)
      pictures.append(x)
      kinds = labels(views, taken)
      rows = (start[number] + np.flatnonzero(kind) for kind in kinds)
      truth.append(retrieval_examples.Truth(*rows))
    return np.stack(pictures), truth


def _scene(
  split: str,
  *,
  seed: int,
  dimensions: int,
  landmarks: int | None,
  distractor_rows: int | None,
) -> _Scene:
  if split not in SPLITS:
    raise InputError(
      f"landmarks has no split {split!r}; it has {', '.join(SPLITS)}."
    )
  count = LANDMARKS[split] if landmarks is None else landmarks
  rows = DISTRACTORS[split] if distractor_rows is None else distractor_rows
  for option, value, least, most in (
    ("seed", seed, 0, 2**63), ("dimensions", dimensions, 16, 4096),
    ("landmarks", count, 1, 10**6), ("distractors", rows, 0, 10**7),
  ):  # fmt: skip
    whole = isinstance(value, int | np.integer)
    if not whole or not least <= value <= most:
      raise InputError(f"{option} must be in {least}..{most}, got {value}.")
  shared = world(seed=seed, split=split, dimensions=dimensions)
  sizes = [size(shared, number) for number in range(count)]
  starts = np.cumsum([0, *sizes])
  total = int(starts[-1])
  database = np.empty((total + rows, dimensions), np.float32)
  clusters = np.full(len(database), -1, np.int32)
  for number in range(count):
    place = slice(starts[number], starts[number + 1])
    database[place], clusters[place] = landmark(shared, number)[0], number
  _fill(database[total:], shared, first=0)
  return _Scene(shared, sizes, database, clusters)


def open_source(
  name: str = "",
  *,
  split: str,
  data_dir: str | None = None,
  seed: int = 0,
  dimensions: int = 128,
  landmarks: int | None = None,
  distractors: int | None = None,
  queries: int | None = None,
  neighbours: int = 64,
) -> retrieval_examples.Queries:
  """Opens a split of the generated landmarks.

  Args:
    name: Empty: there is one variant.
    split: One of `SPLITS`.
    data_dir: Not needed, as nothing is read.
    seed: Another seed gives others in every split. 0 or more.
    dimensions: D of the descriptors, 16..4096.
    landmarks: How many; by default `LANDMARKS`. Fewer are the first of more.
    distractors: Rows that show no landmark, after the others; by default
      `DISTRACTORS`. A million of 128 numbers take 0.5 GB.
    queries: How many; by default `QUERIES`. Of "train" and "valid" at most the
      rows that show a landmark.
    neighbours: k of the examples.

  Returns:
    A source; safe to share between threads and processes.

  Raises:
    InputError: There is no such split, or an option does not fit.
  """
  del data_dir
  if name:
    raise InputError(
      f"landmarks has no variants, got {name!r}; write landmarks."
    )
  count = QUERIES.get(split) if queries is None else queries
  whole = count is None or isinstance(count, int | np.integer)
  if not whole or (count is not None and not 1 <= count <= 10**6):
    raise InputError(f"queries must be in 1..{10**6}, got {count}.")
  scene = _scene(
    split,
    seed=seed,
    dimensions=dimensions,
    landmarks=landmarks,
    distractor_rows=distractors,
  )
  if split != "test":
    return retrieval_examples.Queries(
      database=scene.database,
      query_rows=scene.query_rows(count),
      clusters=scene.clusters,
      k=neighbours,
    )
  pictures, truth = scene.queries(count or 1)
  return retrieval_examples.Queries(
    database=scene.database,
    queries=pictures,
    truth=truth,
    clusters=scene.clusters,
    query_clusters=np.arange(len(pictures), dtype=np.int32) % len(scene.sizes),
    k=neighbours,
  )


def write(
  root: str | os.PathLike[str],
  *,
  seed: int = 0,
  dimensions: int = 128,
  scale: float = 1.0,
  extra: int = 0,
) -> None:
  """Writes all splits in the layouts of the public files.

  `test.npy`, `test_queries.npy` and `gnd_test.pkl` are read by `revisited` (of
  the split "test"), `train.npy`, `val.npy` and `retrieval-SfM-120k.pkl` by
  `sfm120k`; there each distractor is a cluster of its own.

  Args:
    root: The folder; it is made.
    seed: See `open_source`.
    dimensions: See `open_source`.
    scale: Times as many landmarks, distractors and queries, above 0.
    extra: Rows of `distractors.npy`, which go on after those in `test.npy`.
      They are written piece by piece, so there may be more than memory holds.

  Raises:
    InputError: An option does not fit, or the folder cannot be written.
  """
  if not 0 < scale <= 1000:
    raise InputError(f"scale must be in 0..1000, above 0, got {scale}.")
  if not 0 <= extra <= 10**9:
    raise InputError(f"extra must be in 0..{10**9}, got {extra}.")
  sizes = {
    split: {
      "landmarks": max(2, round(scale * LANDMARKS[split])),
      "distractor_rows": round(scale * DISTRACTORS[split]),
    }
    for split in SPLITS
  }
  folder = pathlib.Path(root).expanduser()
  try:
    folder.mkdir(parents=True, exist_ok=True)
    tables = {}
    for split, name in (("train", "train"), ("valid", "val")):
      scene = _scene(split, seed=seed, dimensions=dimensions, **sizes[split])
      _save(folder / f"{name}.npy", scene.database)
      tables[name] = _pairs(scene)
    _dump(folder / "retrieval-SfM-120k.pkl", tables)
    scene = _scene("test", seed=seed, dimensions=dimensions, **sizes["test"])
    pictures, truth = scene.queries(max(2, round(scale * QUERIES["test"])))
    _save(folder / "test.npy", scene.database)
    _save(folder / "test_queries.npy", pictures)
    _dump(folder / "gnd_test.pkl", _ground_truth(scene, truth))
    if extra:
      first = sizes["test"]["distractor_rows"]
      _save_distractors(
        folder / "distractors.npy", scene.shared, rows=extra, first=first
      )
  except OSError as error:
    raise InputError(
      f"{error.filename or folder} cannot be written: {error.strerror}."
    ) from error


def _names(clusters: np.ndarray) -> list[str]:
  return [
    f"landmark{cluster:05d}_{row:07d}" if cluster >= 0 else f"other_{row:07d}"
    for row, cluster in enumerate(clusters.tolist())
  ]


def _pairs(scene: _Scene) -> dict[str, list[Any]]:
  """The table of a split: each view with one that shows the same in part."""
  apart, count = scene.clusters < 0, len(scene.sizes)
  clusters = scene.clusters.copy()
  clusters[apart] = count + np.arange(apart.sum())
  starts = np.cumsum([0, *scene.sizes])
  ends, others = [], []
  for number in range(count):
    draw = scene.shared.draw(_PAIRS, number)
    views = landmark(scene.shared, number)[1]
    turn = views.angle[:, None] - views.angle
    gap = np.hypot(turn, views.detail[:, None] - views.detail)
    near = (gap < _OVERLAP) & ~np.eye(len(gap), dtype=bool)
    for i in np.flatnonzero(near.any(1)):
      ends.append(int(starts[number] + i))
      other = draw.choice(np.flatnonzero(near[i]))
      others.append(int(starts[number] + other))
  return {
    "cids": _names(scene.clusters),
    "cluster": clusters.tolist(),
    "qidxs": ends,
    "pidxs": others,
  }


def _ground_truth(
  scene: _Scene, truth: Sequence[retrieval_examples.Truth]
) -> dict[str, list[Any]]:
  return {
    "imlist": _names(scene.clusters),
    "qimlist": [f"query_{q:05d}" for q in range(len(truth))],
    # There is no picture for the box to be in.
    "gnd": [
      {
        "bbx": [0.0, 0.0, 0.0, 0.0],
        "easy": easy.tolist(),
        "hard": hard.tolist(),
        "junk": junk.tolist(),
      }
      for easy, hard, junk in truth
    ],
  }


def _dump(path: pathlib.Path, content: Any) -> None:
  # Written aside, so that what is there under its name is whole.
  aside = path.with_name(f"{path.name}.part")
  aside.write_bytes(pickle.dumps(content, protocol=2))
  aside.replace(path)


def _save(path: pathlib.Path, rows: np.ndarray) -> None:
  aside = path.with_name(f"{path.name}.part")
  with aside.open("wb") as file:
    np.save(file, rows)
  aside.replace(path)


def _save_distractors(
  path: pathlib.Path, shared: World, *, rows: int, first: int
) -> None:
  aside = path.with_name(f"{path.name}.part")
  shape = (rows, shared.style.shape[1])
  with aside.open("wb") as file:
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    for at in range(0, rows, 10_000):
      part = np.empty((min(10_000, rows - at), shape[1]), np.float32)
      _fill(part, shared, first=first + at)
      file.write(part.tobytes())
  aside.replace(path)


def main(arguments: Sequence[str]) -> None:
  """Writes all splits to a folder, as the command line says.

  Args:
    arguments: Without the program's name.
  """
  parser = argparse.ArgumentParser(
    prog="python -m jaxshape.data.landmarks",
    description="Writes generated descriptors in the layouts of Revisited "
    "Oxford and of retrieval-SfM-120k.",
  )
  parser.add_argument("folder")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--dimensions", type=int, default=128)
  parser.add_argument("--scale", type=float, default=1.0)
  parser.add_argument("--extra", type=int, default=0, help="more distractors")
  args = parser.parse_args(arguments)
  write(
    args.folder,
    seed=args.seed,
    dimensions=args.dimensions,
    scale=args.scale,
    extra=args.extra,
  )


if __name__ == "__main__":
  try:
    main(sys.argv[1:])
  except InputError as error:
    sys.exit(f"error: {error}")
