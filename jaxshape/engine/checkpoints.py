"""Checkpoints that are whole or not there, and that say when they are damaged.

Orbax writes each step into a folder of its own and renames it when it is
complete, but it reads back flipped bits without a word and one damaged file
can hide every step. So a digest of every leaf is stored in the step and
compared on load, steps are listed here, and the newest intact one is used.
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import fcntl
import functools
import gc
import importlib.metadata
import json
import logging
import math
import os
import pathlib
import re
import socket
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp
import xxhash

from jaxshape.engine import processes
from jaxshape.engine.optimizers import path_name
from jaxshape.errors import InputError
from jaxshape.system import TrainState
from jaxshape.typing import PyTree

FOLDER = "checkpoints"
_METADATA = "_CHECKPOINT_METADATA"
_TEMPORARY = re.compile(r"^\d+\.orbax-checkpoint-tmp")


class SaveError(InputError):
  """A checkpoint could not be written; threads of the writer may still hang."""


class Checkpoints:
  """The checkpoints of one run.

  Only the process that trains may save; `lock` keeps a second one away.

  Attributes:
    data: What tells the run's examples from others, stored in each step.
  """

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    *,
    keep: int = 2,
    best_metric: str = "",
    best_mode: str = "max",
  ):
    """Looks into a run's folder.

    Args:
      workdir: The run's folder, local or on a bucket.
      keep: Number of the newest steps to keep, at least 1.
      best_metric: The step that is best by this metric is kept too.
      best_mode: "max" or "min".
    """
    if keep < 1:
      raise InputError(f"config.keep must be at least 1, got {keep}.")
    if best_mode not in ("max", "min"):
      raise InputError(
        f"config.best_mode must be max or min, got {best_mode!r}."
      )
    self.folder = _absolute(workdir) / FOLDER
    if self.folder.exists() and not self.folder.is_dir():
      raise InputError(f"{self.folder} is no folder; move it out of the way.")
    self.keep, self.best_metric, self.best_mode = keep, best_metric, best_mode
    self.data: Mapping[str, Any] | None = None
    self._pending: tuple[int, Any] | None = None

  def steps(self) -> list[int]:
    """The finished steps on disk, oldest first, intact or not."""
    if not self.folder.is_dir():
      return []
    names = [p.name for p in self.folder.iterdir() if p.is_dir()]
    return sorted(int(name) for name in names if name.isdigit())

  def metadata(self, step: int) -> Mapping[str, Any]:
    """What was stored beside the state of a step: config, metrics, versions."""
    text = (self.folder / str(step) / _METADATA).read_text()
    stored = json.loads(text)["custom_metadata"]
    if stored["digest"] != _digest(stored["json"].encode()):
      raise ValueError("its digest differs")
    return json.loads(stored["json"])

  def save(
    self,
    state: TrainState,
    *,
    config: Mapping[str, Any],
    metrics: Mapping[str, float],
  ) -> None:
    """Begins to write a state; `wait`, or the next save, says how it went.

    Args:
      state: May be donated as soon as this returns.
      config: The run's config, stored in the step.
      metrics: Of this step; `best_metric` is looked up in them.

    Raises:
      SaveError: This save or the one before it failed.
    """
    self.wait()
    step = int(state.step)
    metadata = {
      "data": self.data,
      "leaves": describe(state),
      "config": dict(config),
      "system": config["system"],
      "metrics": {k: float(v) for k, v in metrics.items()},
      "versions": versions(),
    }
    path = self.folder / str(step)
    try:
      self.folder.mkdir(parents=True, exist_ok=True)
      self._clear(step)
      text = json.dumps(metadata)
      response = ocp.save_async(
        path,
        state,
        custom_metadata={"json": text, "digest": _digest(text.encode())},
      )
    except Exception as error:
      raise SaveError(_why(path, error)) from error
    self._pending = (step, response)

  def wait(self) -> None:
    """Waits until the save under way is on disk, then drops old steps."""
    if self._pending is None:
      return
    step, response = self._pending
    self._pending = None
    path = self.folder / str(step)
    try:
      response.result()
      _synchronize(path)
    except Exception as error:
      raise SaveError(_why(path, error)) from error
    if processes.index() == 0:
      for old in set(self.steps()) - self._kept():
        (self.folder / str(old)).rmtree()

  def best(self) -> int | None:
    """The step with the best value of `best_metric`, if any has it."""
    values = {}
    for step in self.steps():
      # What cannot be read is not the best.
      with contextlib.suppress(Exception):
        value = self.metadata(step)["metrics"][self.best_metric]
        if math.isfinite(value):
          values[step] = value
    if not values:
      return None
    sign = 1 if self.best_mode == "max" else -1
    return max(values, key=lambda step: (sign * values[step], step))

  def restore(
    self, like: TrainState, *, system: str, step: int | None = None
  ) -> tuple[TrainState, Mapping[str, Any]] | None:
    """Loads the newest intact step.

    Args:
      like: Shapes, dtypes and shardings to restore to.
      system: The name of the system that the state has to be of.
      step: This step alone, and no other.

    Returns:
      The state and what was stored beside it; None if there is no step at all.

    Raises:
      InputError: The step is not there, no step is intact, or the checkpoint
        is of another system or of other shapes.
    """
    # All read the same step: what one of them cannot read is damaged for all.
    steps = processes.gather(self.steps())[0]
    if step is not None:
      if step not in steps:
        raise InputError(
          f"{self.folder} holds no step {step}; it holds: "
          + (", ".join(map(str, steps)) or "none")
        )
      steps = [step]
    damaged = []
    for number in reversed(steps):
      metadata, state = {}, None
      with _agreed(damaged, f"{number} ({_METADATA}: ") as well:
        metadata = self.metadata(number)
        _ = metadata["leaves"]
      if not well:
        continue
      self._compare(number, metadata, like, system)
      with _agreed(damaged, f"{number} (") as well:
        with _quiet(), _alone():
          state = ocp.load(self.folder / str(number), like)
        _verify(state, metadata["leaves"])
      if not well:
        continue
      assert state is not None
      if damaged and not processes.index():
        logging.warning(
          "%s: skipped damaged checkpoints %s; step %d is used.",
          self.folder,
          ", ".join(damaged),
          number,
        )
      return state, metadata
    if damaged:
      raise InputError(
        f"{self.folder} holds no intact checkpoint: {', '.join(damaged)}; "
        "delete the folder to start anew."
      )
    return None

  def _clear(self, step: int) -> None:
    """Removes what a killed save left, and steps that can only be damaged."""
    if processes.index():
      return
    for left in self.folder.iterdir():
      # Restore would have started from a later step, were it intact.
      later = left.name.isdigit() and int(left.name) >= step
      if later or _TEMPORARY.match(left.name):
        left.rmtree()

  def _kept(self) -> set[int]:
    steps = self.steps()
    kept = set(steps[-self.keep :])
    if self.best_metric and (best := self.best()) is not None:
      kept.add(best)
    return kept

  def _compare(
    self,
    step: int,
    metadata: Mapping[str, Any],
    like: TrainState,
    system: str,
  ) -> None:
    """Refuses a state of another system or other shapes before it is read."""
    where = f"checkpoint {step} of {self.folder}"
    if metadata["system"] != system:
      raise InputError(
        f"{where} is of the system {metadata['system']!r}, the config names "
        f"{system!r}; give the config it was trained with, or another workdir."
      )
    stored = {path: leaf[:2] for path, leaf in metadata["leaves"].items()}
    wanted = {path: leaf[:2] for path, leaf in _shapes(like).items()}
    if stored == wanted:
      return
    differences = [
      f"{path}: stored {_spell(stored.get(path))}, wanted "
      f"{_spell(wanted.get(path))}"
      for path in sorted(set(stored) | set(wanted))
      if stored.get(path) != wanted.get(path)
    ]
    raise InputError(
      f"{where} does not fit this config in {len(differences)} places: "
      + "; ".join(differences[:5])
      + "; give the config it was trained with, or another workdir."
    )


@contextlib.contextmanager
def lock(workdir: str | os.PathLike[str]) -> Iterator[None]:
  """Keeps a second run away from a local workdir, until the process ends.

  Raises:
    InputError: Another process holds it (named), or it cannot be written.
  """
  path = _absolute(workdir)
  if not _is_local(path) or processes.index():
    yield  # Buckets have no locks, and one process per run is enough.
    return
  try:
    path.mkdir(parents=True, exist_ok=True)
    handle = open(path / ".lock", "a+", encoding="utf-8")  # noqa: SIM115
  except OSError as error:
    raise InputError(
      f"workdir {path} cannot be written ({error.strerror}); give another one."
    ) from error
  with handle:
    try:
      fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      handle.seek(0)
      raise InputError(
        f"workdir {path} is in use by {handle.read().strip() or 'a process'}; "
        "wait for it, or give another workdir."
      ) from error
    handle.truncate(0)
    handle.write(f"process {os.getpid()} on {socket.gethostname()}")
    handle.flush()
    yield


def initialize_from(
  state: TrainState,
  workdir: str | os.PathLike[str],
  *,
  include: Sequence[str] = (".*",),
) -> tuple[TrainState, str]:
  """Takes another run's parameters and `extra` where path and shape fit.

  Args:
    state: A fresh state; its optimizer state and step stay as they are.
    workdir: The other run's folder.
    include: Patterns of the paths to take, such as "params/net/stage.*".

  Returns:
    The state, and a line per leaf group that says what was and was not taken.

  Raises:
    InputError: There is no intact checkpoint, or nothing fits.
  """
  run = Checkpoints(workdir)
  steps = processes.gather(run.steps())[0]
  if not steps:
    raise InputError(
      f"config.init_from: {run.folder} holds no checkpoint; give the --workdir "
      "of a run that train.py has made."
    )
  other, step = _load_any(run, steps)
  theirs = {path_name(p): leaf for p, leaf in _leaves(other)}
  taken, left = [], []

  def pick(path, leaf):
    name = path_name(path)
    if not name.startswith(("params/", "extra/")):
      return leaf
    if not any(re.search(pattern, name) for pattern in include):
      left.append(f"{name} (not included)")
    elif name not in theirs:
      left.append(f"{name} (not there)")
    elif theirs[name].shape != leaf.shape:
      left.append(f"{name} (theirs {theirs[name].shape}, ours {leaf.shape})")
    else:
      taken.append(name)
      # What was evaluated there: the averaged parameters, if there are any.
      averaged = name.replace("params/", "extra/ema/", 1)
      value = np.asarray(theirs.get(averaged, theirs[name]), leaf.dtype)
      return jax.make_array_from_callback(
        value.shape, leaf.sharding, value.__getitem__
      )
    return leaf

  state = jax.tree_util.tree_map_with_path(pick, state)
  if not taken:
    raise InputError(
      f"config.init_from: nothing in {run.folder} step {step} fits; "
      + "; ".join(left[:5])
    )
  if isinstance(state.extra, Mapping) and "ema" in state.extra:
    average = jax.tree.map(jnp.copy, state.params)
    state = state.replace(extra={**state.extra, "ema": average})
  report = f"from step {step} of {run.folder}: {len(taken)} leaves taken"
  if left:
    report += f", {len(left)} left as they were: " + "; ".join(left[:5])
    report += "; ..." if len(left) > 5 else ""
  return state, report


def describe(state: PyTree) -> dict[str, list[Any]]:
  """Dtype, shape and digest of every leaf, by its path.

  The digest is over the logical array, so that any number of devices can check
  it.
  """
  out = {}
  for path, leaf in _leaves(state):
    value = np.ascontiguousarray(whole(leaf))
    digest = _digest(value.tobytes())
    out[path_name(path)] = [str(leaf.dtype), list(leaf.shape), digest]
  return out


def _verify(state: PyTree, stored: Mapping[str, Any]) -> None:
  """Refuses leaves that are not what was stored."""
  for path, found in describe(state).items():
    if stored[path] != found:
      raise ValueError(f"the digest of {path} differs")


@functools.cache
def versions() -> dict[str, str]:
  """What decides the numbers: the libraries, and a digest of this package."""
  out = {"code": _code()}
  for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint"):
    out[name] = importlib.metadata.version(name)
  return out


def _code() -> str:
  root = pathlib.Path(__file__).parent.parent
  digest = xxhash.xxh3_64()
  for path in sorted(root.rglob("*.py")):
    digest.update(path.relative_to(root).as_posix().encode())
    digest.update(path.read_bytes())
  return digest.hexdigest()


def _load_any(run: Checkpoints, steps: list[int]) -> tuple[PyTree, int]:
  """The newest intact state as nested dicts of arrays, whatever its shape."""
  damaged, state = [], None
  for step in reversed(steps):
    with _agreed(damaged, f"{step} (") as well, _alone():
      stored = run.metadata(step)["leaves"]
      like: dict[str, Any] = {}
      for path, (dtype, shape, _) in stored.items():
        if dtype.startswith("key<"):  # A key of theirs is of no use here.
          continue
        *parents, last = path.split("/")
        node = like
        for parent in parents:
          node = node.setdefault(parent, {})
        node[last] = np.empty(shape, dtype)
      # The optimizer's state has other node types, and nobody wants it; nor
      # can `extra` be read if there are lists in it.
      try:
        state = _load_part(run.folder / str(step), like, ("params", "extra"))
      except Exception:
        state = _load_part(run.folder / str(step), like, ("params",))
      _verify(state, stored)
    if well:
      return state, step
  raise InputError(
    f"{run.folder} holds no intact checkpoint: {', '.join(damaged)}."
  )


@contextlib.contextmanager
def _agreed(damaged: list[str], where: str) -> Iterator[list[bool]]:
  """Takes what fails inside as damage, for all processes if for one.

  Args:
    damaged: Gets a line if it failed.
    where: How that line begins.

  Yields:
    A list that is empty at the end if it failed, and else is not.
  """
  well, said = [True], None
  try:
    yield well
  except (MemoryError, PermissionError, jax.errors.JaxRuntimeError):
    raise  # Of the machine, not of the checkpoint.
  except Exception as error:
    said = _first_line(error)
  if errors := [e for e in processes.gather(said) if e is not None]:
    well.clear()
    damaged.append(f"{where}{errors[0]})")


def _alone() -> Any:
  """Orbax without its barriers, where one process would wait for another.

  Each reads all, so that one that fails keeps no other waiting.
  """
  if processes.count() == 1:
    return contextlib.nullcontext()
  return ocp.Context(
    multiprocessing_options=ocp.options.MultiprocessingOptions(
      primary_host=processes.index(), active_processes={processes.index()}
    )
  )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Orbax's reader leaves failed tasks behind, which asyncio would print."""
  logger = logging.getLogger("asyncio")
  before = logger.level
  logger.setLevel(logging.CRITICAL + 1)
  try:
    yield
  except Exception:
    gc.collect()
    raise
  finally:
    logger.setLevel(before)


def _digest(data: bytes) -> str:
  return xxhash.xxh3_128_hexdigest(data)


def _load_part(path: Any, like: PyTree, names: Sequence[str]) -> PyTree:
  context = ocp.Context()
  context.pytree.loading.partial_load = True
  with context, _quiet():
    return ocp.load(path, {name: like[name] for name in names if name in like})


def _leaves(tree: PyTree) -> list[tuple[Any, Any]]:
  return jax.tree_util.tree_flatten_with_path(tree)[0]


def _shapes(tree: PyTree) -> dict[str, list[Any]]:
  return {
    path_name(path): [str(leaf.dtype), list(leaf.shape)]
    for path, leaf in _leaves(tree)
  }


def whole(leaf: Any) -> np.ndarray:
  """A leaf on the host; of a key, its data.

  No process has to ask another, as each holds all parts of the parameters.
  """
  if isinstance(leaf, jax.Array) and leaf.is_fully_replicated:
    leaf = leaf.addressable_data(0)
  if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    leaf = jax.random.key_data(leaf)
  if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
    return np.asarray(leaf)
  out = np.empty(leaf.shape, leaf.dtype)
  for shard in leaf.addressable_shards:
    out[shard.index] = shard.data
  return out


def _absolute(path: str | os.PathLike[str]) -> Any:
  """The path as Orbax wants it: absolute, and local or on a bucket."""
  text = os.fspath(path)
  return epath.Path(os.path.abspath(text) if _is_local(text) else text)


def _is_local(path: str | os.PathLike[str]) -> bool:
  return "://" not in os.fspath(path)


def _synchronize(path: Any) -> None:
  """Makes the commit of a local step survive a power loss."""
  if not _is_local(path) or processes.index():
    return
  files = [p for p in path.iterdir() if p.is_file()]
  for entry in (*files, path, path.parent):
    descriptor = os.open(entry, os.O_RDONLY)
    try:
      os.fsync(descriptor)
    finally:
      os.close(descriptor)


def _spell(leaf: Sequence[Any] | None) -> str:
  return "nothing" if leaf is None else f"{leaf[0]}{tuple(leaf[1])}"


def _first_line(error: BaseException) -> str:
  """The innermost cause, in one line."""
  while error.__cause__ is not None:
    error = error.__cause__
  lines = str(error).strip().splitlines()
  text = lines[0] if lines else ""
  if len(text) > 400:  # What went wrong often comes last.
    text = f"{text[:150]} ... {text[-200:]}"
  return f"{type(error).__name__}: {text}"


def _why(path: Any, error: Exception) -> str:
  return f"could not save {path}: {_first_line(error)}"
