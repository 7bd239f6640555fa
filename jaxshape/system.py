"""The protocol: what a system gives to the loop, and nothing more.

A system is a set of pure functions over one `TrainState`. `train.py`, `eval.py`
and the engine know this file and no system; a paper's file knows this file and
the engine's parts, and no other paper.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import importlib
import importlib.util
import pkgutil
from typing import TYPE_CHECKING

import flax.struct
import jax
import numpy as np

from jaxshape.errors import InputError, reading_config
from jaxshape.typing import Batch, Config, Metrics, PyTree

if TYPE_CHECKING:  # Drawing is not needed to train.
  from matplotlib.figure import Figure

  from jaxshape.engine.comparison import Plot


class TrainState(flax.struct.PyTreeNode):
  """All that changes during training, and so all that a checkpoint holds.

  Attributes:
    step: Number of finished steps.
    params: Parameters of each player, by the player's name.
    opt_state: Optimizer state of each player, by the player's name.
    extra: What changes without descending a loss: batch statistics, averaged
      parameters (`"ema"`), teachers, queues, pools, pseudo-labels.
  """

  step: jax.Array
  params: PyTree
  opt_state: PyTree
  extra: PyTree


Pictures = Callable[[TrainState, Sequence[PyTree]], "Mapping[str, Figure]"]
Plots = Callable[[Sequence[PyTree]], "Mapping[str, Plot]"]


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """One evaluation: batches in, sums on the device, numbers on the host.

  Attributes:
    data: Gives the batches from the start, the same ones each time. Every leaf
      has the examples first; `"mask"` is 0 where a row is padding.
    step: What one batch adds. It is compiled, so it has to be one function
      object, and its output has to be exact whatever the batch size: sums, or
      rows together with their mask.
    summarize: The numbers to report, from the outputs of all batches (NumPy).
    pictures: Figures that a person would rather look at than at the numbers,
      from the state and the outputs of all batches.
    plots: What several runs are drawn together by, from the outputs.
    then: Another evaluator, made from the outputs of this one, whose numbers
      are added: where data go through the network twice.
  """

  data: Callable[[], Iterator[Batch]]
  step: Callable[[TrainState, Batch], PyTree]
  summarize: Callable[[Sequence[PyTree]], Mapping[str, float]]
  pictures: Pictures | None = None
  plots: Plots | None = None
  then: "Callable[[Sequence[PyTree]], Evaluator] | None" = None


TrainStep = Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]]


Tensors = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Weights:
  """A state's parameters under the names of the paper's public code.

  Attributes:
    load: A state with those tensors; it names what is missing, what fits
      nowhere, and what has another shape.
    save: The tensors of a state, all that `load` needs.
    parts: Where the public code keeps several files: the beginnings that the
      names of each lack, by the file's name.
  """

  load: Callable[[TrainState, Tensors], TrainState]
  save: Callable[[TrainState], Tensors]
  parts: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class System:
  """A paper as functions.

  Attributes:
    init: The state before the first step, a pure function of its key.
    train_step: One step, from a state, a batch and a key that is a function of
      the seed and the step; None for systems that train nothing.
    predict: What one calls in a notebook, from a state and a batch.
    train_data: Batches from a step on, those of this process only.
    evaluators: By name; the names prefix the reported numbers.
    refresh: A stage on the host between epochs (clustering, mining, pools).
    weights: To and from files of the paper's public code.
  """

  init: Callable[[jax.Array], TrainState]
  train_step: TrainStep | None
  predict: Callable[[TrainState, Batch], PyTree]
  train_data: Callable[[int], Iterator[Batch]]
  evaluators: Mapping[str, Evaluator]
  refresh: Callable[[TrainState], TrainState] | None = None
  weights: Weights | None = None


def names() -> list[str]:
  """The systems that exist, in alphabetical order."""
  package = importlib.import_module("jaxshape.systems")
  return sorted(m.name for m in pkgutil.iter_modules(package.__path__))


def load(config: Config) -> System:
  """Makes the system that a config names.

  Args:
    config: A `ConfigDict` with `system`, the name of a file in
      `jaxshape/systems`, or the full name of a module outside the package
      (one with a dot in it).

  Returns:
    What the module's `make(config)` returns.

  Raises:
    InputError: `config.system` is missing or names no module, or the system
      refuses the config.
  """
  name = config.get("system")
  if not isinstance(name, str) or not name:
    raise InputError(
      f"config.system must be the name of a system, got {name!r}; there are: "
      + ", ".join(names())
    )
  module = name if "." in name else f"jaxshape.systems.{name}"
  unknown = InputError(
    f"config.system={name!r} is no system; there are: " + ", ".join(names())
  )
  try:
    if importlib.util.find_spec(module) is None:
      raise unknown
  except ImportError as error:  # A package on the way is missing, or "..".
    raise unknown from error
  found = importlib.import_module(module)
  if not hasattr(found, "make"):
    raise unknown
  with reading_config():
    return found.make(config)
