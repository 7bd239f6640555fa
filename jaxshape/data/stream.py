"""Batches as a function of the step: deterministic, resumable, closeable.

Training: example number `step * batch_size + row` of an endless list of
shuffled epochs is row `row` of batch `step`, whatever the number of processes,
worker processes and threads. So the step is the position, and nothing else is
stored for an exact resume. Each process gets a contiguous run of rows.
"""

from collections.abc import Iterator
import functools
import os
import signal
from typing import Any
import weakref

from absl import flags
import grain
import jax
import numpy as np

from jaxshape.data import sources
from jaxshape.errors import InputError

# More steps than any run has; Grain wants a length.
_FOREVER = 2**50
# What a seed is used for.
_ORDER, _DRAWS = 0, 1


class Batches(Iterator[dict[str, np.ndarray]]):
  """An iterator with `close()`, which also ends by itself after an error.

  Use with `contextlib.closing`: threads and worker processes are behind it.
  """

  def __init__(self, iterator: Any):
    self._iterator = iterator
    # Grain's own clean-up prints a traceback if it comes at the very end.
    self._finish = weakref.finalize(self, iterator.close)
    iterator.start_prefetch()

  def __next__(self) -> dict[str, np.ndarray]:
    if not self._finish.alive:
      raise StopIteration
    try:
      return next(self._iterator)
    # Including StopIteration. Grain would go on with the batch after the one
    # that failed, as if nothing had happened.
    except BaseException:
      self.close()
      raise

  def close(self) -> None:
    """Stops the threads and processes; may be called more than once."""
    self._finish()


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
  return _iterate(steps.map(batch), workers, threads, prefetch)


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
  return _iterate(steps.map(batch), workers, threads, prefetch)


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


def _leave_ctrl_c(index: int, count: int) -> None:
  """Ctrl-C goes to all processes; only the first decides what follows."""
  del index, count
  signal.signal(signal.SIGINT, signal.SIG_IGN)


def _iterate(
  batches: grain.MapDataset,
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
  dataset = batches.to_iter_dataset(
    grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
  )
  if workers:
    if not flags.FLAGS.is_parsed():  # Grain asks, in notebooks and tests too.
      flags.FLAGS.mark_as_parsed()
    options = grain.MultiprocessingOptions(
      num_workers=workers, per_worker_buffer_size=prefetch
    )
    dataset = dataset.mp_prefetch(options, _leave_ctrl_c)
  return Batches(iter(dataset))
