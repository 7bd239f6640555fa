"""Batches as a function of the step: deterministic, resumable, closeable.

Training: example number `step * batch_size + row` of an endless list of
shuffled epochs is row `row` of batch `step`, whatever the number of processes,
worker processes and threads. So the step is the position, and nothing else is
stored for an exact resume. Each process gets a contiguous run of rows.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import fcntl
import functools
import multiprocessing
import os
import pathlib
import shutil
import signal
import tempfile
import threading
from typing import Any, NamedTuple
import weakref

from absl import flags
import grain
import jax
import numpy as np

from jaxshape.data import decode, sources
from jaxshape.errors import InputError

# More steps than any run has; Grain wants a length.
_FOREVER = 2**50
# Grain's own shared memory outlives a killed run, and every other reports it as
# leaked: no array is so large that it is used.
_NO_SHARED_MEMORY = 2**62
# Arrays of more bytes go through files in memory: a pipe that is full would
# keep a worker from ending.
_SMALL = 4096
_FOLDER = "jaxshape-batches-"
# What a seed is used for.
_ORDER, _DRAWS = 0, 1


class Batches(Iterator[dict[str, np.ndarray]]):
  """An iterator with `close()`, which also ends by itself after an error.

  Use with `contextlib.closing`: threads and worker processes are behind it.

  Attributes:
    fingerprint: What tells the examples of training from others; a run that
      goes on needs the same ones.
  """

  def __init__(self, iterator: Any, parcels: "_Parcels | None" = None):
    self._iterator: Any = iterator
    self.fingerprint: Mapping[str, Any] | None = None
    # Grain's own clean-up prints a traceback if it comes at the very end.
    self._finish = weakref.finalize(self, _finish, iterator, parcels)
    iterator.start_prefetch()

  def __next__(self) -> dict[str, np.ndarray]:
    if not self._finish.alive:
      raise StopIteration
    try:
      batch = next(self._iterator)
      return {name: _unpacked(value) for name, value in batch.items()}
    # Including StopIteration. Grain would go on with the batch after the one
    # that failed, as if nothing had happened.
    except BaseException as error:
      self.close()
      if "Worker process was terminated" in str(error):
        raise InputError(
          "a process that reads data was ended from outside, as by a machine "
          f"out of memory; give fewer workers. {str(error).split('. ')[0]}."
        ) from error
      raise

  def close(self) -> None:
    """Stops the threads and processes; may be called more than once."""
    self._finish()
    self._iterator = None  # What is left of it at the very end complains.


def fingerprint(source: sources.Source) -> dict[str, Any]:
  """What tells the examples of a source from others, for comparison later.

  Args:
    source: Its `name` and its `fingerprint`, a mapping that JSON can say, are
      part of the answer if it has them. A view's is that of its `source`.

  Returns:
    The number of examples, a digest of the classes, and what the source says.
  """
  while (seen := getattr(source, "source", None)) is not None:
    source = seen
  return {
    "name": getattr(source, "name", ""),
    "examples": len(source),
    "classes": decode.digest(source.classes),
    **getattr(source, "fingerprint", {}),
  }


def check_same(now: Mapping[str, Any], then: Mapping[str, Any]) -> None:
  """Refuses to go on with other examples: their order would be another one.

  Args:
    now: The fingerprint of what is there.
    then: That of what there was.

  Raises:
    InputError: They differ; it names in what, and how to go on.
  """
  old, new = dict(_flat(then)), dict(_flat(now))
  changed = [
    f"{name}: {old.get(name, 'nothing')} then, {new.get(name, 'nothing')} now"
    for name in sorted(set(old) | set(new))
    if old.get(name) != new.get(name)
  ]
  if changed:
    more = f"; ... ({len(changed)} in all)" if len(changed) > 5 else ""
    raise InputError(
      "the examples are not those that the run began with (or that process 0 "
      f"has): {'; '.join(changed[:5])}{more}; bring them back, give another "
      "--workdir, or go on in another order with --config.check_data=False."
    )


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
  for name, value in values.items():
    if isinstance(value, Mapping):
      yield from ((f"{name} {k}", v) for k, v in _flat(value))
    else:
      yield name, value


def train(
  source: sources.Source,
  *,
  batch_size: int,
  seed: int,
  start_step: int = 0,
  shuffle: bool = True,
  workers: int = 0,
  threads: int | None = None,
  prefetch: int | None = None,
  process_index: int | None = None,
  process_count: int | None = None,
) -> Batches:
  """Gives this process's rows of every batch, for ever.

  Args:
    source: The examples. If it has `sample`, that is called with a generator
      that is a function of the seed and the position.
    batch_size: Rows of a batch over all processes.
    seed: Of the order and of what sources draw, 0..2^32-1.
    start_step: Step of the first batch.
    shuffle: Whether each epoch has an order of its own, or all the source's.
    workers: Processes that read beside this one; 0 reads in threads of this
      one, which is enough unless Python itself is the limit.
    threads: Batches that are read at a time, in each worker; by default as many
      as there are processor cores, at most 16.
    prefetch: Batches that are kept ready; by default as many as `threads`.
    process_index: Number of this process, JAX's by default.
    process_count: How many processes share a batch, JAX's by default.

  Returns:
    Batches: every key of the examples, stacked.

  Raises:
    InputError: The options do not fit, here; data are damaged, when it is
      their turn.
  """
  rows = _rows(batch_size, process_index, process_count)
  if not 0 <= seed < 2**32:
    raise InputError(f"seed must be in 0..2^32-1, got {seed}.")
  if start_step < 0:
    raise InputError(f"start_step must be >= 0, got {start_step}.")
  _check_not_empty(source)
  batch = _TrainBatch(source, batch_size, rows, seed, shuffle)
  steps = grain.MapDataset.range(start_step, _FOREVER)
  batches = _iterate(steps, batch, workers, threads, prefetch)
  batches.fingerprint = fingerprint(source)
  return batches


def evaluate(
  source: sources.Source,
  *,
  batch_size: int,
  workers: int = 0,
  threads: int | None = None,
  prefetch: int | None = None,
  process_index: int | None = None,
  process_count: int | None = None,
) -> Batches:
  """Gives each example once, in the source's order.

  All processes get the same number of batches of the same size.

  Args:
    source: The examples; a "mask" of theirs is respected.
    batch_size: See `train`, like all other options.
    workers: See `train`.
    threads: See `train`.
    prefetch: See `train`.
    process_index: See `train`.
    process_count: See `train`.

  Returns:
    Batches with "mask", a float32 that is 0 where a row is padding, and
    "index", an int32, each row's number in the source (-1 for padding).

  Raises:
    InputError: As in `train`.
  """
  rows = _rows(batch_size, process_index, process_count)
  _check_not_empty(source)
  batch = _EvalBatch(source, batch_size, rows)
  steps = grain.MapDataset.range(-(-len(source) // batch_size))
  return _iterate(steps, batch, workers, threads, prefetch)


class _TrainBatch:
  """Step -> batch. A class, because worker processes need to pickle it."""

  def __init__(
    self,
    source: sources.Source,
    batch_size: int,
    rows: range,
    seed: int,
    shuffle: bool,
  ):
    self._source, self._batch_size, self._rows = source, batch_size, rows
    self._seed, self._shuffle = seed, shuffle
    self._draws = getattr(source, "sample", None) is not None

  def __call__(self, step: int) -> dict[str, np.ndarray]:
    start = step * self._batch_size
    examples = [self._example(start + row) for row in self._rows]
    batch = _stack(examples)
    batch.pop("mask", None)  # What stands in for a damaged image counts.
    return batch

  def _example(self, position: int) -> sources.Example:
    epoch, i = divmod(position, len(self._source))
    if self._shuffle:
      i = int(_order(len(self._source), self._seed, epoch)[i])
    rng = None
    if self._draws:
      rng = np.random.default_rng((self._seed, _DRAWS, position))
    return sources.read(self._source, i, rng)


@functools.lru_cache(maxsize=3)
def _order(n: int, seed: int, epoch: int) -> np.ndarray:
  # From raw bits, the part of NumPy that is promised never to change. Grain's
  # own shuffle takes 0.7 ms per example if there are only 64 of them.
  bits = np.random.PCG64(np.random.SeedSequence((seed, _ORDER, epoch)))
  return np.argsort(bits.random_raw(n), kind="stable")


class _Parcels:
  """A folder in memory through which workers hand over large arrays.

  Its lock says that the first process lives; what a killed one left is removed
  when the next one starts.
  """

  def __init__(self):
    memory = "/dev/shm"
    self._parent = memory if os.access(memory, os.W_OK) else None
    for left in pathlib.Path(self._parent or tempfile.gettempdir()).glob(
      f"{_FOLDER}*"
    ):
      # Another user's, or one that lives.
      with contextlib.suppress(OSError), open(left / "lock", "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(left, ignore_errors=True)
    while True:
      self.folder = tempfile.mkdtemp(prefix=_FOLDER, dir=self._parent)
      path = os.path.join(self.folder, "lock")
      self._lock = open(path, "wb")  # noqa: SIM115 (held until it closes)
      fcntl.flock(self._lock, fcntl.LOCK_EX)
      if os.path.exists(path):  # Not taken for one that was left.
        return
      self._lock.close()

  def close(self) -> None:
    """Removes what nobody has taken."""
    shutil.rmtree(self.folder, ignore_errors=True)
    self._lock.close()


class _Packed:
  """Step -> batch, in a worker, with its large arrays in files."""

  def __init__(self, batch: Callable[[int], dict[str, Any]], folder: str):
    self._batch, self._folder = batch, folder

  def __call__(self, step: int) -> dict[str, Any]:
    batch = self._batch(step)
    for number, (name, value) in enumerate(batch.items()):
      if value.nbytes > _SMALL and not value.dtype.hasobject:
        path = os.path.join(self._folder, f"{step}-{number}")
        try:
          value.tofile(path)
          batch[name] = _Parcel(path, value.shape, value.dtype)
        except OSError:  # Full, as in small containers: through the pipe.
          with contextlib.suppress(OSError):
            os.unlink(path)
    return batch


class _Parcel(NamedTuple):
  """Where an array lies."""

  path: str
  shape: tuple[int, ...]
  dtype: np.dtype


def _unpacked(value: Any) -> np.ndarray:
  if not isinstance(value, _Parcel):
    return value
  array = np.memmap(value.path, value.dtype, mode="c", shape=value.shape)
  os.unlink(value.path)  # The memory lives as long as the array.
  return array.view(np.ndarray)


def _finish(iterator: Any, parcels: _Parcels | None) -> None:
  iterator.close()
  if parcels is not None:
    parcels.close()


class _EvalBatch:
  """Step -> batch with a mask."""

  def __init__(self, source: sources.Source, batch_size: int, rows: range):
    self._source, self._batch_size, self._rows = source, batch_size, rows

  def __call__(self, step: int) -> dict[str, np.ndarray]:
    start = step * self._batch_size
    there = [start + r for r in self._rows if start + r < len(self._source)]
    examples = [dict(self._source[i]) for i in there]
    for i, example in zip(there, examples, strict=True):
      example.setdefault("mask", np.float32(1))
      example["index"] = np.int32(i)
    # Padding repeats an example, so that no formula meets what no data has.
    last = examples[-1] if examples else dict(self._source[0])
    padding = {**last, "mask": np.float32(0), "index": np.int32(-1)}
    return _stack(examples + [padding] * (len(self._rows) - len(examples)))


def _stack(examples: list[sources.Example]) -> dict[str, np.ndarray]:
  return {key: np.stack([e[key] for e in examples]) for key in examples[0]}


def _rows(
  batch_size: int, process_index: int | None, process_count: int | None
) -> range:
  count = jax.process_count() if process_count is None else process_count
  index = jax.process_index() if process_index is None else process_index
  if batch_size < 1 or batch_size % count:
    raise InputError(
      f"batch_size must be a positive multiple of the {count} processes, "
      f"got {batch_size}."
    )
  if not 0 <= index < count:
    raise ValueError(f"process_index must be in 0..{count - 1}, got {index}.")
  size = batch_size // count
  return range(index * size, (index + 1) * size)


def _check_not_empty(source: sources.Source) -> None:
  if len(source) == 0:
    raise InputError("The data hold no examples.")


def _follow(index: int, count: int) -> None:
  """Lets the first process alone decide when a worker ends.

  Ctrl-C, and SIGTERM on clusters, go to all processes of a group.
  """
  del index, count
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
  first = multiprocessing.parent_process()

  def leave() -> None:
    assert first is not None
    first.join()
    os._exit(1)

  # Killed, the first process can end nobody.
  threading.Thread(target=leave, daemon=True).start()


def _iterate(
  steps: grain.MapDataset,
  batch: Callable[[int], dict[str, np.ndarray]],
  workers: int,
  threads: int | None,
  prefetch: int | None,
) -> Batches:
  threads = min(os.cpu_count() or 1, 16) if threads is None else threads
  prefetch = threads if prefetch is None else prefetch
  for name, value in (("threads", threads), ("prefetch", prefetch)):
    if value < 1:
      raise InputError(f"{name} must be >= 1, got {value}.")
  if workers < 0:
    raise InputError(f"workers must be >= 0, got {workers}.")
  parcels = _Parcels() if workers else None
  function = batch if parcels is None else _Packed(batch, parcels.folder)
  dataset = steps.map(function).to_iter_dataset(
    grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
  )
  if workers:
    if not flags.FLAGS.is_parsed():  # Grain asks, in notebooks and tests too.
      flags.FLAGS.mark_as_parsed()
    options = grain.MultiprocessingOptions(
      num_workers=workers, per_worker_buffer_size=prefetch
    )
    dataset = grain.experimental.WithOptionsIterDataset(
      dataset,
      grain.experimental.DatasetOptions(min_shm_size=_NO_SHARED_MEMORY),
    ).mp_prefetch(options, _follow)
  return Batches(iter(dataset), parcels)
