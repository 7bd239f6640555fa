"""Devices: where state and batches lie, and evaluation over all of them."""

from collections.abc import Callable, Generator, Iterator, Mapping
import contextlib
import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

from jaxshape.engine import abstract, checkpoints, processes
from jaxshape.errors import InputError, reading_config
from jaxshape.system import Evaluator, System, TrainState
from jaxshape.typing import Batch, Config, PyTree

Init = Callable[[jax.Array], TrainState]


def make_mesh(axes: Mapping[str, int]) -> Mesh:
  """All devices as a grid.

  Args:
    axes: Sizes of `data` and `model`; one of them may be -1 and takes the rest.

  Returns:
    A mesh with automatic axes, so that `jit` places the collectives. Of
    several processes each holds all parameters, and rows of the batch that
    follow those of the process before it.
  """
  sizes = {"data": -1, "model": 1, **dict(axes)}
  count = jax.device_count()
  known = int(np.prod([size for size in sizes.values() if size != -1]))
  if (
    set(sizes) != {"data", "model"}
    or min(sizes.values()) < -1
    or list(sizes.values()).count(-1) > 1
    or known < 1
    or count % known
  ):
    raise InputError(
      "config.mesh must give sizes of data and model that make up all "
      f"{count} devices (one may be -1), got {dict(axes)}."
    )
  shape = [count // known if size == -1 else size for size in sizes.values()]
  if np.prod(shape) != count:
    raise InputError(
      f"config.mesh must use all {count} devices, got {dict(axes)}."
    )
  types, here = (AxisType.Auto,) * 2, jax.local_device_count()
  if processes.count() == 1:
    return jax.make_mesh(tuple(shape), tuple(sizes), axis_types=types)
  if here % shape[1]:
    raise InputError(
      f"config.mesh.model must divide the {here} devices of a process, got "
      f"{dict(axes)}."
    )
  # In the order of the processes, which no other order of `make_mesh` keeps.
  devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
  grid = np.asarray(devices).reshape(shape)
  return Mesh(grid, tuple(sizes), axis_types=types)


def check_batch_size(size: int, mesh: Mesh) -> None:
  """Refuses a batch that the mesh cannot share evenly."""
  if size < 1 or size % mesh.shape["data"]:
    raise InputError(
      f"config.batch_size must be a multiple of the {mesh.shape['data']} "
      f"devices that share it, got {size}; change it or config.mesh."
    )


def state_shardings(mesh: Mesh, state: TrainState) -> TrainState:
  """Where each leaf of a state lies.

  Parameters and optimizer state are cut along `model` at their longest axis
  that it divides; everything else, and all of it when `model` is 1, is whole
  on every device.

  Args:
    mesh: As `make_mesh` gives it.
    state: Arrays or their shapes.

  Returns:
    The same tree, of shardings.
  """
  parts = mesh.shape["model"]
  whole = NamedSharding(mesh, PartitionSpec())

  def cut(leaf: Any) -> NamedSharding:
    axes = [a for a, n in enumerate(leaf.shape) if n % parts == 0 and n > parts]
    if parts == 1 or not axes:
      return whole
    longest = max(axes, key=lambda axis: leaf.shape[axis])
    return NamedSharding(mesh, PartitionSpec(*[None] * longest, "model"))

  return jax.tree.map(lambda _: whole, state).replace(
    params=jax.tree.map(cut, state.params),
    opt_state=jax.tree.map(cut, state.opt_state),
  )


def abstract_state(init: Init, key: jax.Array, mesh: Mesh) -> TrainState:
  """Shapes, dtypes and shardings of the state that `init` makes."""
  with reading_config():
    shapes = abstract.shapes(init, key)
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=sharding
    ),
    shapes,
    state_shardings(mesh, shapes),
  )


def initialize(init: Init, key: jax.Array, mesh: Mesh) -> TrainState:
  """The state that `init` makes, made where it shall lie."""
  like = abstract_state(init, key, mesh)
  shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
  # On CPUs, random numbers take the compiler far longer than they take to draw.
  quickly = {
    "xla_llvm_disable_expensive_passes": True,
    "xla_backend_optimization_level": 1,
  }
  platform = mesh.devices.flat[0].platform
  if platform != "cpu" or jax.config.read("jax_disable_most_optimizations"):
    quickly = {}
  return jax.jit(init, out_shardings=shardings, compiler_options=quickly)(key)


def restored(
  system: System,
  config: Config,
  workdir: str | os.PathLike[str],
  mesh: Mesh,
  *,
  step: int | str | None = None,
) -> TrainState:
  """The state of a run's checkpoint, to be used rather than trained on.

  Args:
    system: What the config names.
    config: The run's.
    workdir: The run's folder.
    mesh: As `make_mesh` gives it.
    step: Which checkpoint; "best" by `config.best_metric`, the newest intact
      one by default.

  Returns:
    The state; a fresh one of systems that train nothing.

  Raises:
    InputError: There is no intact checkpoint, or none is known as the best.
  """
  key, _ = jax.random.split(jax.random.key(config.seed))
  if system.train_step is None:
    return initialize(system.init, key, mesh)
  saved = checkpoints.Checkpoints(
    workdir, best_metric=config.best_metric, best_mode=config.best_mode
  )
  if isinstance(step, str):
    step = saved.best() if step == "best" else None
    if step is None:
      raise InputError(
        f"{saved.folder} has no best checkpoint by config.best_metric="
        f"{config.best_metric!r}; evaluate the newest, or name a step."
      )
  like = abstract_state(system.init, key, mesh)
  found = saved.restore(like, system=config.system, step=step)
  if found is None:
    raise InputError(
      f"{saved.folder} holds no checkpoint; train first with train.py "
      f"--workdir={os.fspath(workdir)}"
    )
  return found[0]


def place(batch: Batch, mesh: Mesh) -> dict[str, jax.Array]:
  """Makes a global batch, shared over `data`, of this process's rows."""
  rows = NamedSharding(mesh, PartitionSpec("data"))
  return {
    name: jax.make_array_from_process_local_data(rows, np.asarray(leaf))
    for name, leaf in batch.items()
  }


def placed(
  batches: Iterator[Batch], mesh: Mesh
) -> Generator[dict[str, jax.Array], None, None]:
  """Batches on the devices, the next one under way while one is used."""
  with contextlib.ExitStack() as stack:
    if close := getattr(batches, "close", None):
      stack.callback(close)
    ahead = None
    for batch in batches:
      current, ahead = ahead, place(batch, mesh)
      if current is not None:
        yield current
    if ahead is not None:
      yield ahead


@functools.lru_cache(maxsize=64)
def _compiled(step: Any, mesh: Mesh) -> Any:
  # Rows are gathered, so that every process can summarize all of them.
  whole = NamedSharding(mesh, PartitionSpec())
  return jax.jit(step, out_shardings=whole)


def evaluate(
  evaluator: Evaluator,
  state: TrainState,
  mesh: Mesh,
  *,
  stuck: float = 1800,
  each: Callable[[], object] = lambda: None,
) -> tuple[dict[str, float], list[PyTree]]:
  """Runs an evaluator over all its batches.

  Args:
    evaluator: From a system.
    state: On the devices of the mesh.
    mesh: As `make_mesh` gives it.
    stuck: Seconds for a batch, after which one of several processes is ended.
    each: Called at every batch; what it raises gives the evaluation up.

  Returns:
    The numbers of its `summarize` and of what comes `then`, and its outputs.
  """
  step = _compiled(evaluator.step, mesh)
  outputs: list[PyTree] = []
  processes.alive(stuck)
  for batch in placed(evaluator.data(), mesh):
    with reading_config():  # The first call traces it.
      outputs.append(step(state, batch))
    processes.alive(stuck, waiting=True)
    if len(outputs) > 2:  # Batches wait on the host, not on the device.
      jax.block_until_ready(outputs[-3])
    each()
    processes.alive(stuck)
  if not outputs:
    raise InputError("an evaluator got no batch; its data set is empty.")
  outputs = jax.device_get(outputs)
  summary = evaluator.summarize(outputs)
  numbers = {name: float(value) for name, value in summary.items()}
  if evaluator.then is not None:
    after = evaluator.then(outputs)
    numbers |= evaluate(after, state, mesh, stuck=stuck, each=each)[0]
  return numbers, outputs


def rehearse(evaluator: Evaluator, state: TrainState, mesh: Mesh) -> None:
  """Opens an evaluator's data and traces its step, without computing.

  Args:
    evaluator: From a system.
    state: On the devices of the mesh.
    mesh: As `make_mesh` gives it.

  Raises:
    InputError: The data or the config do not fit.
  """
  batches = placed(evaluator.data(), mesh)
  with contextlib.closing(batches):
    batch = next(batches, None)
  if batch is None:
    raise InputError("an evaluator got no batch; its data set is empty.")
  with reading_config():
    _compiled(evaluator.step, mesh).eval_shape(state, batch)


def local(state: TrainState) -> TrainState:
  """The state on this process alone, for what the others do not compute."""
  if processes.count() == 1:
    return state
  device = jax.local_devices()[0]

  def here(leaf: jax.Array) -> jax.Array:
    value = jax.device_put(checkpoints.whole(leaf), device)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      return jax.random.wrap_key_data(value, impl=jax.random.key_impl(leaf))
    return value

  return jax.tree.map(here, state)


def finite(state: TrainState) -> bool:
  """Whether every parameter and statistic is a finite number."""
  return bool(_all_finite((state.params, state.opt_state, state.extra)))


@jax.jit
def _all_finite(tree: PyTree) -> jax.Array:
  good = [
    jnp.isfinite(leaf).all()
    for leaf in jax.tree.leaves(tree)
    if jnp.issubdtype(leaf.dtype, jnp.inexact)
  ]
  return jnp.stack(good).all() if good else jnp.bool_(True)
