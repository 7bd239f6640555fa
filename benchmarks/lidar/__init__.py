"""LiDAR segmentation against its peers: what a case is made of."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, NamedTuple

import numpy as np

from benchmarks.filters import Peer


class Size(NamedTuple):
  """How large the cases are.

  Attributes:
    points: Of a scan.
    height: Rows of the range image.
    width: Columns of the range image.
    block: Columns where a block alone is measured.
  """

  points: int = 120_000
  height: int = 64
  width: int = 2048
  block: int = 512


QUICK = Size(points=2000, height=16, width=64, block=64)


@dataclasses.dataclass(frozen=True)
class Setup:
  """A case with its data.

  Attributes:
    ours: Our form, a function of arrays, timed under jit.
    arguments: Those arrays.
    peers: By the name of their column.
    goals: The largest ratio to a peer, by the peer's column; "ms" is the
      longest time and "MB" the most temporary memory.
    read: What is compared of a result, as `values` would else take it whole.
  """

  ours: Callable[..., Any]
  arguments: tuple[Any, ...]
  peers: Mapping[str, Peer]
  goals: Mapping[str, float] = dataclasses.field(default_factory=dict)
  read: Callable[[Any], Any] = lambda raw: raw


class Case(NamedTuple):
  """A line of the tables.

  Attributes:
    name: Its first word is what the command line calls it.
    build: Makes it at a size.
    quick: Whether it is fit for tests.
  """

  name: str
  build: Callable[[Size], Setup]
  quick: bool = True


def values(raw: Any) -> np.ndarray:
  """A result as an array of its own kind, whichever library it is of."""
  return np.asarray(raw.detach().cpu() if hasattr(raw, "detach") else raw)


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
  """How far two results are apart, between 0 and about 2.

  Of whole numbers, the share that is not the same; of others, the mean
  distance by the mean size, as single kinks of ReLU may turn over. NaN where
  one of them has it, infinity where they cannot be compared.
  """
  if ours.shape != theirs.shape or not ours.size:
    return float("inf")
  if np.issubdtype(ours.dtype, np.integer):
    return float(np.mean(ours != theirs))
  a, b = ours.astype(np.float64), theirs.astype(np.float64)
  return float(np.abs(a - b).mean() / max(np.abs(b).mean(), 1e-30))
