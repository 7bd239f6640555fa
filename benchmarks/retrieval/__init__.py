"""Search and query expansion against their peers: what a case is made of."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, NamedTuple

import numpy as np

from benchmarks.filters import Peer


class Size(NamedTuple):
  """How large the cases are.

  Attributes:
    small: Rows of the smaller database.
    large: Rows of the larger one.
    dim: Numbers of a descriptor.
    queries: Number of queries.
    k: Rows to find.
    width: Of the encoder's tokens.
    tokens: Of a query: itself and its neighbours.
    layers: Of the encoder.
  """

  small: int = 200_000
  large: int = 1_000_000
  dim: int = 512
  queries: int = 70
  k: int = 100
  width: int = 2048
  tokens: int = 65
  layers: int = 3


QUICK = Size(3000, 4000, 32, 5, 10, 64, 5, 1)


@dataclasses.dataclass(frozen=True)
class Setup:
  """A case with its data.

  Attributes:
    ours: The call that is timed, as a user writes it.
    peers: By the name of their column.
    goals: The largest ratio to a peer, by the peer's column.
    compiled: What the temporary memory is read from, lowered and compiled.
    exact: The rows that an exact search finds, where recall is of interest.
  """

  ours: Callable[[], Any]
  peers: Mapping[str, Peer]
  goals: Mapping[str, float] = dataclasses.field(default_factory=dict)
  compiled: Callable[[], Any] | None = None
  exact: Callable[[], np.ndarray] | None = None


class Case(NamedTuple):
  """A line of the tables.

  Attributes:
    name: Its first word is what the command line calls it.
    build: Makes it at a size.
  """

  name: str
  build: Callable[[Size], Setup]


def values(raw: Any) -> np.ndarray:
  """The rows that were found, or tokens, whichever library they are of."""
  if isinstance(raw, list | tuple):
    raw = raw[1]
  return np.asarray(raw.detach().cpu() if hasattr(raw, "detach") else raw)


def recall(found: np.ndarray, exact: np.ndarray) -> float:
  """The share of the rows that were to be found."""
  pairs = zip(found, exact, strict=True)
  return float(np.mean([np.isin(b, a).mean() for a, b in pairs]))


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
  """How far two results are apart, between 0 and about 2.

  Of rows, the share that only one of them found; of other numbers, the mean
  distance by the mean size. Infinity where they cannot be compared.
  """
  if ours.shape != theirs.shape or not ours.size:
    return float("inf")
  if np.issubdtype(ours.dtype, np.integer):
    return 1 - recall(ours, theirs)
  a, b = ours.astype(np.float64), theirs.astype(np.float64)
  return float(np.abs(a - b).mean() / max(np.abs(b).mean(), 1e-30))
