"""Networks that others have trained: a run of this library, or PyTorch's file.

`config.pretrained` names the workdir of a run, of any system that keeps a
classifier under `classifiers.NET`, or a file with the names of the backbone's
public code that ends with .pth, .pt or .safetensors; it is empty for none.

Source: torchvision's residual networks, for the names in files.
"""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxshape.backbones import registry, tensors
from jaxshape.engine import (
  abstract,
  checkpoints,
  classifiers,
  command,
  optimizers,
  pytorch,
)
from jaxshape.errors import InputError, few
from jaxshape.system import TrainState
from jaxshape.typing import Config, PyTree

# What a network cannot be read without; a run's config knows it.
ADOPTED = ("backbone", "width", "stem", "mean", "std")
_FILES = (".pth", ".pt", ".safetensors")


def adopt(config: Config) -> Config:
  """Gives a config the backbone of the run that it starts from.

  What is adopted stays in the config, and so beside the run that is trained
  with it: that one can be used where the run it started from is gone.

  Args:
    config: With `pretrained` and what is `ADOPTED`; as it is where `pretrained`
      is empty or a file, else changed.

  Returns:
    The same config.

  Raises:
    InputError: There is no such run, or it trained no classifier.
  """
  if not config.get("pretrained") or _is_file(config.pretrained):
    return config
  try:
    theirs = command.read_config(config.pretrained)
  except InputError as error:
    if config.get("adopted_from") == config.pretrained:
      return config
    raise InputError(
      f"config.pretrained: {error} To go without it, as when a finished run is "
      f"evaluated, give config.pretrained='' and {', '.join(ADOPTED)}."
    ) from error
  if missing := [name for name in ADOPTED if name not in theirs]:
    raise InputError(
      f"config.pretrained: {config.pretrained} is a run of the system "
      f"{theirs.system!r}, whose config has no {', '.join(missing)}; give one "
      "that trained a classifier."
    )
  with config.unlocked():
    for name in ADOPTED:
      config[name] = theirs[name]
    config.adopted_from = config.pretrained
  return config


def start(config: Config, net: Any) -> classifiers.Start | None:
  """What training begins with: the backbone of `load` below a fresh head.

  Args:
    config: With `pretrained`, from `adopt`.
    net: The network that it is for.

  Returns:
    From fresh parameters and collections to those to begin with, or None where
    `pretrained` is empty.
  """
  if not config.get("pretrained"):
    return None

  def taken(params: PyTree, collections: PyTree) -> tuple[PyTree, PyTree]:
    if abstract.asked():
      return params, collections
    backbone, statistics = jax.tree.map(jnp.asarray, load(config, net))
    return {**params, **backbone}, statistics

  return taken


def load(config: Config, net: Any) -> tuple[PyTree, PyTree]:
  """What a trained network knows, but for its head.

  Args:
    config: With `pretrained`, from `adopt`.
    net: The network that it is for.

  Returns:
    The parameters without those of the head, and the other collections, in
    NumPy.

  Raises:
    InputError: The file or the checkpoint is not there, is damaged, or is of
      another network.
  """
  if _is_file(config.pretrained):
    found = pytorch.load(config.pretrained)
    backbone = registry.find(config.backbone)
    return backbone.from_state_dict(net, found, head=False)
  # Arrays that are known, also where `init` is only traced.
  with jax.ensure_compile_time_eval():
    return _of_run(config, net)


def _of_run(config: Config, net: Any) -> tuple[PyTree, PyTree]:
  path = config.pretrained
  params, collections = tensors.shapes(net)
  # A head of another number of classes is not even read.
  head = registry.find(config.backbone).HEAD
  params = {name: part for name, part in params.items() if name != head}
  # No checkpoint holds a NaN, so one that stays was not there.
  blank = jax.tree.map(
    lambda leaf: jnp.full(leaf.shape, jnp.nan, leaf.dtype),
    ({classifiers.NET: params}, {classifiers.NET: collections}),
  )
  state = TrainState(jnp.zeros((), jnp.int32), blank[0], {}, blank[1])
  try:
    state, _ = checkpoints.initialize_from(state, path)
  except InputError as error:
    text = str(error).replace("config.init_from", "config.pretrained")
    raise InputError(text) from error
  found = jax.device_get(
    (state.params[classifiers.NET], state.extra[classifiers.NET])
  )
  leaves = jax.tree_util.tree_flatten_with_path(found)[0]
  absent = [
    optimizers.path_name(path[1:])
    for path, leaf in leaves
    if np.isnan(leaf).any()
  ]
  if absent:
    raise InputError(
      f"config.pretrained: the newest checkpoint of {path} lacks {few(absent)} "
      f"of {config.backbone!r}, or has it in another shape."
    )
  return found


def _is_file(path: str) -> bool:
  return pathlib.PurePath(path).suffix in _FILES
