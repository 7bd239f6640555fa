"""Whether reading and computing overlap: steps behind a slow source.

python -m benchmarks.input [--output=benchmarks/results/input.md]

A source that sleeps for every example feeds `stream.train` and
`runtime.placed`, as in train.py, and a jitted step that sleeps too uses the
batches. With prefetch a step should take the longer of the two; without, their
sum. Neither takes a processor, so that a busy machine changes little.
"""

import argparse
from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import datetime
import os
import pathlib
import platform
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import machine
from jaxshape.data import stream
from jaxshape.engine import runtime

OUTPUT = pathlib.Path(__file__).parent / "results" / "input.md"
BATCH = 4


class Slow:
  """Examples that take their time."""

  classes: tuple[str, ...] = ()

  def __init__(self, seconds: float):
    self.seconds = seconds

  def __len__(self) -> int:
    return 1024

  def __getitem__(self, i: int) -> dict[str, Any]:
    time.sleep(self.seconds)
    return {"image": np.full((8, 8, 3), i % 256, np.uint8)}


class Step:
  """A jitted step that takes so long, whatever else the machine does."""

  def __init__(self, seconds: float):
    def wait(_: Any) -> np.float32:
      time.sleep(seconds)
      return np.float32(0)

    def advance(state, batch):
      state = state + batch["image"].mean() / 255
      scalar = jax.ShapeDtypeStruct((), jnp.float32)
      return state + jax.pure_callback(wait, scalar, state)

    self._advance = jax.jit(advance)
    self._state = jnp.float32(0)
    self._batch = {"image": np.zeros((BATCH, 8, 8, 3), np.uint8)}
    self.measure(1)
    self.seconds = self.measure(5)

  def __call__(self, batch: Any) -> jax.Array:
    """Begins; done when its result is."""
    self._state = self._advance(self._state, batch)
    return self._state

  def measure(self, rounds: int) -> float:
    """Seconds on a batch that is there already."""
    times = []
    for _ in range(rounds):
      began = time.perf_counter()
      jax.block_until_ready(self(self._batch))
      times.append(time.perf_counter() - began)
    return statistics.median(times)


@dataclasses.dataclass(frozen=True)
class Result:
  """One row.

  Attributes:
    sleep: Seconds for an example.
    workers: Processes that read; 0 for threads of this one.
    threads: Batches that are read at a time, in each of them.
    read: Seconds of reading for a batch, all threads and processes together.
    step: Seconds of the step alone.
    measured: Seconds for both, with prefetch.
    waiting: Share of that in which the loop waited for data.
  """

  sleep: float
  workers: int
  threads: int
  read: float
  step: float
  measured: float
  waiting: float

  @property
  def hidden(self) -> float:
    """How much of the shorter of the two was hidden: 1 for all of it."""
    total, most = self.read + self.step, max(self.read, self.step)
    return (total - self.measured) / (total - most)

  @property
  def tells(self) -> bool:
    """Whether the shorter of the two is long enough to be seen."""
    return min(self.read, self.step) >= 0.15 * max(self.read, self.step)


def overlap(
  step: Step, sleep: float, *, workers: int, threads: int, steps: int = 20
) -> Result:
  """Trains behind a slow source, as train.py does.

  Args:
    step: What computes.
    sleep: Seconds for an example.
    workers: See `stream.train`.
    threads: See `stream.train`.
    steps: That are measured, after those that live on what was read ahead.
  """
  batches = stream.train(
    Slow(sleep), batch_size=BATCH, seed=0, workers=workers, threads=threads
  )
  one = jax.make_mesh((1, 1), ("data", "model"), devices=jax.devices()[:1])
  feed = runtime.placed(batches, one)
  with contextlib.closing(feed):
    # Each process has read up to `threads` batches ahead, and as many again
    # may be on their way between the processes.
    head = 3 + 2 * threads * max(1, workers)
    _steps(step, feed, head)
    took, waited = _steps(step, feed, steps)
  return Result(
    sleep,
    workers,
    threads,
    BATCH * sleep / (threads * max(1, workers)),
    step.seconds,
    took / steps,
    waited / took,
  )


def alternating(step: Step, sleep: float, *, steps: int = 5) -> Result:
  """Reads a batch, computes on it, and so on: what prefetch is to beat."""
  source = Slow(sleep)

  def batches() -> Iterator[dict[str, np.ndarray]]:
    while True:
      examples = [source[i] for i in range(BATCH)]
      yield {"image": np.stack([e["image"] for e in examples])}

  feed = batches()
  began, waited = time.perf_counter(), 0.0
  for _ in range(steps):
    before_read = time.perf_counter()
    batch = next(feed)
    waited += time.perf_counter() - before_read
    jax.block_until_ready(step(batch))
  took = time.perf_counter() - began
  read = BATCH * sleep
  return Result(sleep, 0, 0, read, step.seconds, took / steps, waited / took)


def _steps(step: Step, feed: Iterator[Any], count: int) -> tuple[float, float]:
  """Seconds of so many steps, and of those the seconds of waiting."""
  pending: list[jax.Array] = []
  began, waited = time.perf_counter(), 0.0
  for _ in range(count):
    before = time.perf_counter()
    batch = next(feed)
    waited += time.perf_counter() - before
    pending.append(step(batch))
    if len(pending) > 2:  # As in train.py.
      jax.block_until_ready(pending[-3])
  jax.block_until_ready(pending)
  return time.perf_counter() - began, waited


def markdown(results: Sequence[Result], *, command: str) -> str:
  """The page."""
  device = jax.devices()[0]
  name = machine.processor() or platform.machine()
  lines = [
    "# Reading behind a step",
    "",
    f"`{command}`, {datetime.datetime.now(datetime.UTC).date()}; {name}, "
    f"{os.cpu_count()} cores, device {device.device_kind}; Python "
    f"{platform.python_version()}, jax {jax.__version__}; load "
    f"{os.getloadavg()[0]:.1f} at the end.",
    "",
    f"Batches of {BATCH} examples that sleep so long each; milliseconds for a "
    "batch. `read` is the sleep of a batch shared by all threads and workers, "
    "`step` the step alone. Without prefetch a step takes their sum, at best "
    "it takes the longer one; `hidden` is the share of the shorter one that "
    "disappears, where that is long enough to tell.",
    "",
    "| ms an example | workers | threads | read | step | sum | longer "
    "| measured | hidden | waiting for data |",
    "|" + "---:|" * 10,
  ]
  for r in results:
    cells = [
      f"{1e3 * r.sleep:.0f}",
      str(r.workers),
      str(r.threads) if r.threads else "no prefetch",
      *(
        f"{1e3 * x:.0f}"
        for x in (r.read, r.step, r.read + r.step, max(r.read, r.step))
      ),
      f"**{1e3 * r.measured:.0f}**",
      f"{100 * r.hidden:.0f} %" if r.threads and r.tells else "",
      f"{100 * r.waiting:.0f} %",
    ]
    lines.append("| " + " | ".join(cells) + " |")
  return "\n".join([*lines, ""])


def main(arguments: Sequence[str] | None = None) -> int:
  """The command line; gives the exit status."""
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.input",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    "--sleep", type=float, nargs="+", default=[5, 20, 50], help="ms an example"
  )
  parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 8])
  parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
  parser.add_argument("--step", type=float, default=50.0, help="ms")
  parser.add_argument("--steps", type=int, default=20, help="of each row")
  parser.add_argument("--output", type=pathlib.Path, default=OUTPUT)
  given = parser.parse_args(arguments)
  step = Step(given.step / 1e3)
  results = []
  for milliseconds in given.sleep:
    sleep = milliseconds / 1e3
    results.append(alternating(step, sleep))
    for workers in given.workers:
      for threads in given.threads:
        result = overlap(
          step, sleep, workers=workers, threads=threads, steps=given.steps
        )
        results.append(result)
        print(
          f"{milliseconds:g} ms, {workers} workers, {threads} threads: "
          f"{1e3 * result.measured:.0f} ms a step",
          flush=True,
        )
  words = sys.argv[1:] if arguments is None else arguments
  text = markdown(
    results, command=" ".join(["python -m benchmarks.input", *words])
  )
  given.output.parent.mkdir(parents=True, exist_ok=True)
  given.output.write_text(text, encoding="utf-8")
  print("\n" + text)
  return 0


if __name__ == "__main__":
  sys.exit(main())
