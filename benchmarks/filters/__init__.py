"""Each filter against its peers: what a case is made of."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, NamedTuple

import numpy as np


class Work(NamedTuple):
  """The least that a machine must do for a case, on paper.

  Attributes:
    bytes: Input read once and output written once.
    ops: Float32 additions, products, minima; a quarter each on eight bits.
    exps: Exponentials.
    flops: Additions and products within matrix products.
  """

  bytes: float
  ops: float = 0
  exps: float = 0
  flops: float = 0


class Peer(NamedTuple):
  """Another library's form of the same filter.

  Attributes:
    make: Imports the library and gives the call that is timed; raises
      ImportError where the library is missing.
    tolerance: How far any value of its result may be from ours; None where it
      computes something else, which is then timed for orientation only.
    margin: Pixels along the border that are not compared.
  """

  make: Callable[[], Callable[[], Any]]
  tolerance: float | None = None
  margin: int = 0


@dataclasses.dataclass(frozen=True)
class Setup:
  """A case with its images.

  Attributes:
    ours: Our form, a function of arrays, timed under jit.
    arguments: Those arrays.
    peers: By the name of their column.
    work: Of the whole batch.
    goals: The largest ratio to a peer, by the peer's column; "ms" is the
      longest time per image and "MB" the most temporary memory.
    call: What is timed instead where users do not write jit.
  """

  ours: Callable[..., Any]
  arguments: tuple[Any, ...]
  peers: Mapping[str, Peer]
  work: Work
  goals: Mapping[str, float] = dataclasses.field(default_factory=dict)
  call: Callable[[], Any] | None = None


class Case(NamedTuple):
  """A line of the table for each number of images.

  Attributes:
    name: Its first word is the filter's name on the command line.
    build: Gives the setup for images [B, H, W, 3], float32 in 0..255.
    batches: Numbers of images.
  """

  name: str
  build: Callable[[np.ndarray], Setup]
  batches: tuple[int, ...] = (1, 32)
