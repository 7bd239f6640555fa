"""The classifier of images that a run has trained, for use outside that run."""

from collections.abc import Callable, Mapping
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxshape import system as system_lib
from jaxshape.engine import classifiers, command, runtime
from jaxshape.errors import InputError, reading_config
from jaxshape.system import TrainState
from jaxshape.typing import Array, Config


class Trained(NamedTuple):
  """A run's network.

  Attributes:
    config: Of the run.
    splits: Its data.
    logits: `(state, images 0..255) -> [batch, classes]`.
    state: On the devices of the mesh, without the optimizer's.
    mesh: As `runtime.make_mesh` gives it.
  """

  config: Config
  splits: classifiers.Splits
  logits: Callable[[TrainState, Any], Array]
  state: TrainState
  mesh: Mesh


def classifier(
  workdir: str | os.PathLike[str],
  *,
  mesh: Mapping[str, int] | None = None,
  step: int | str | None = None,
) -> Trained:
  """The network of a run, whatever its system and architecture.

  Args:
    workdir: The run's folder.
    mesh: As `config.mesh`; without it all devices share the batch.
    step: Which checkpoint; "best" by the run's metric, the newest intact one
      by default.

  Returns:
    The network.

  Raises:
    InputError: Nothing intact was trained there, or no classifier of images.
  """
  config = command.read_config(workdir)
  devices = runtime.make_mesh(mesh or {"data": -1, "model": 1})
  refused = InputError(
    f"{os.fspath(workdir)} is a run of {config.system!r}, which gives no "
    "logits of images; name a run of a classifier."
  )
  data = config.get("data", {})
  if "train_split" not in data or "image_size" not in data:
    raise refused
  system = system_lib.load(config)
  with reading_config():
    splits = classifiers.Splits(config)

  def logits(state: TrainState, images: Any) -> Array:
    return system.predict(state, {"image": images})

  images = jax.ShapeDtypeStruct(
    (1, data.image_size, data.image_size, 3), jnp.float32
  )
  like = runtime.abstract_state(system.init, jax.random.key(0), devices)
  try:
    shape = jax.eval_shape(logits, like, images).shape
  except (AttributeError, KeyError) as error:
    raise refused from error
  if shape != (1, len(splits.classes)):
    raise refused
  state = runtime.restored(system, config, workdir, devices, step=step)
  state = state.replace(opt_state={})  # Twice the parameters, and not read.
  return Trained(config, splits, logits, state, devices)
