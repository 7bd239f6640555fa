"""The shape bench against its peers: what a case is made of."""

from collections.abc import Callable
import dataclasses
from typing import NamedTuple

from benchmarks import lidar


class Size(NamedTuple):
  """How large the cases are.

  Attributes:
    batch: Images of a training step of the small network.
    network: That is trained beside the small one, and attacked.
    deep: Images of a training step of it, and of an attack.
    side: Pixels of those along each side.
    small: Channels of the small network's first stage.
    width: Channels of the first stage, of it and of VGG-19.
    restyled: Images that are restyled.
    large: Pixels of the larger ones along each side.
    rows: Of the representations that share information.
    channels: Of those.
    corrupted: Images that are corrupted.
    pixels: Of those along each side.
  """

  batch: int = 32
  network: str = "resnet18"
  deep: int = 16
  side: int = 64
  small: int = 16
  width: int = 64
  restyled: int = 4
  large: int = 256
  rows: int = 256
  channels: int = 2048
  corrupted: int = 8
  pixels: int = 224


QUICK = Size(
  batch=4,
  network="resnet8",
  deep=2,
  side=32,
  small=4,
  width=4,
  restyled=2,
  large=40,
  rows=8,
  channels=32,
  corrupted=2,
  pixels=64,
)


@dataclasses.dataclass(frozen=True)
class Setup(lidar.Setup):
  """A case with its data.

  Attributes:
    images: Of a call.
  """

  images: int = 1


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


values, difference = lidar.values, lidar.difference
