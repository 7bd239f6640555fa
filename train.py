"""Trains the system that a config names.

python train.py --config=configs/texture_suppression.py:tiny --workdir=runs/a

The only training loop. Started again on the same workdir it goes on where it
stopped, as if nothing had happened.
"""

from collections.abc import Mapping
import contextlib
import functools
import math
import os
import signal
import threading
import time
from typing import Any

from absl import flags
import jax
from ml_collections import config_flags

from jaxshape import system as system_lib
from jaxshape.engine import checkpoints, command, logs, runtime, steps
from jaxshape.errors import InputError
from jaxshape.system import System, TrainState
from jaxshape.typing import Config

# What a preempted run exits with: start me again.
AGAIN = 75


class Preempted(SystemExit):
  """The run was told to stop; its state is saved."""


def train(
  config: Config, workdir: str | os.PathLike[str], *, profile: bool = False
) -> TrainState:
  """Trains from the newest intact checkpoint, or from the start, to the end.

  Args:
    config: With the fields of `engine/settings.py` and those of its system.
    workdir: The run's folder; made if it is not there.
    profile: Writes a trace of a few steps to `<workdir>/profile`.

  Returns:
    The last state.

  Raises:
    InputError: The config, the data or the workdir does not fit, or a loss is
      not finite (with the step, the player and the last good checkpoint).
    Preempted: SIGTERM came; the state is saved.
  """
  mesh = runtime.make_mesh(config.mesh)
  runtime.check_batch_size(config.batch_size, mesh)
  system = system_lib.load(config)
  if system.train_step is None:
    raise InputError(
      f"the system {config.system!r} trains nothing; evaluate it with eval.py."
    )
  with contextlib.ExitStack() as stack:
    stack.enter_context(checkpoints.lock(workdir))
    command.write_config(config, workdir)
    saved = checkpoints.Checkpoints(
      workdir,
      keep=config.keep,
      best_metric=config.best_metric,
      best_mode=config.best_mode,
    )
    state, origin = start(config, system, mesh, saved)
    first = int(state.step)
    log = logs.Logs(workdir, start=first, total=config.steps)
    stack.callback(log.close)
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    log.say(
      f"{config.system}: {count:,} parameters, {origin}, steps {first} to "
      f"{config.steps} on {mesh.size} {jax.devices()[0].device_kind} device(s)"
    )
    if first >= config.steps:
      return state
    stopped = stack.enter_context(_stop_signal())
    batches = runtime.placed(system.train_data(first), mesh)
    stack.enter_context(contextlib.closing(batches))
    loop = _Loop(config, system, mesh, saved, log)
    return loop.run(state, batches, stopped, workdir if profile else None)


def start(
  config: Config,
  system: System,
  mesh: jax.sharding.Mesh,
  saved: checkpoints.Checkpoints,
) -> tuple[TrainState, str]:
  """The state to go on from: a checkpoint, another run's parameters, or fresh.

  Args:
    config: The run's config.
    system: What it names.
    mesh: Where the state shall lie, whatever devices it was saved from.
    saved: The run's checkpoints.

  Returns:
    The state, and in words where it is from.
  """
  key, _ = jax.random.split(jax.random.key(config.seed))
  like = runtime.abstract_state(system.init, key, mesh)
  restored = saved.restore(like, system=config.system)
  if restored is not None:
    return restored[0], f"resumed from step {int(restored[0].step)}"
  state = runtime.initialize(system.init, key, mesh)
  if config.init_from:
    return checkpoints.initialize_from(
      state, config.init_from, include=config.init_include
    )
  return state, "new"


class _Loop:
  """One run of the loop; what it measures between two log lines."""

  def __init__(
    self,
    config: Config,
    system: System,
    mesh: jax.sharding.Mesh,
    saved: checkpoints.Checkpoints,
    log: logs.Logs,
  ):
    self.config, self.system, self.mesh = config, system, mesh
    self.saved, self.log = saved, log
    self.pending: list[tuple[int, Mapping[str, jax.Array]]] = []
    self.waited, self.since = 0.0, time.perf_counter()

  def run(
    self,
    state: TrainState,
    batches: Any,
    stopped: threading.Event,
    profile: str | os.PathLike[str] | None,
  ) -> TrainState:
    """From the state's step to the last one."""
    config, first = self.config, int(state.step)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    _, key = jax.random.split(jax.random.key(config.seed))

    @functools.partial(
      jax.jit, donate_argnums=0, out_shardings=(shardings, None)
    )
    def advance(state, batch):
      assert self.system.train_step is not None
      key_of_step = jax.random.fold_in(key, state.step)
      return self.system.train_step(state, batch, key_of_step)

    compiled = None
    for step in range(first + 1, config.steps + 1):
      if self._due(config.refresh_every, step - 1) and self.system.refresh:
        state = jax.device_put(self.system.refresh(state), shardings)
      began = time.perf_counter()
      batch = next(batches)
      self.waited += time.perf_counter() - began
      if compiled is None:
        began = time.perf_counter()
        compiled = advance.lower(state, batch).compile()
        took = time.perf_counter() - began
        self.log.write(step, {"train/compile_seconds": took})
        self.log.say(f"compiled in {took:.1f} s")
        self.waited, self.since = 0.0, time.perf_counter()
      if profile and step == min(first + 5, config.steps):
        jax.profiler.start_trace(os.path.join(profile, "profile"))
      with jax.profiler.StepTraceAnnotation("train", step_num=step):
        state, metrics = compiled(state, batch)
      self.pending.append((step, metrics))
      if len(self.pending) > 2:  # Stay close to the device, for an honest bar.
        jax.block_until_ready(self.pending[-3][1])
      if profile and step == min(first + 10, config.steps):
        jax.block_until_ready(state)
        jax.profiler.stop_trace()
      self.log.advance()
      last = step == config.steps or stopped.is_set()
      self._after(state, step, last=last)
      if stopped.is_set() and step < config.steps:
        self.log.say(f"told to stop: step {step} is saved; start me again.")
        raise Preempted(AGAIN)
    return state

  def _after(self, state: TrainState, step: int, *, last: bool) -> None:
    """What is due after a step: log, evaluate, save."""
    config = self.config
    evaluate = self._due(config.eval_every, step)
    save = last or self._due(config.save_every, step)
    save = save or (evaluate and bool(config.best_metric))
    if evaluate or save or self._due(config.log_every, step):
      self._flush(step)
    results = {}
    if evaluate:
      for name, evaluator in self.system.evaluators.items():
        numbers, _ = runtime.evaluate(evaluator, state, self.mesh)
        results |= {f"{name}/{k}": v for k, v in numbers.items()}
      self.log.write(step, results)
    if save:
      if not runtime.finite(state):
        raise InputError(
          f"the state is not finite after step {step}, so it is not saved; "
          + self._last_good()
        )
      self.saved.save(state, config=config.to_dict(), metrics=results)
    if last:
      self.saved.wait()
    if evaluate or save:  # They took time that no step took.
      self.waited, self.since = 0.0, time.perf_counter()

  def _flush(self, step: int) -> None:
    """Reads the metrics of the steps since the last time, and logs them."""
    rows = [(n, jax.device_get(metrics)) for n, metrics in self.pending]
    self.pending = []
    if not rows:
      return
    for number, row in rows:
      for name, value in row.items():
        if name.endswith(steps.FINITE) and not value:
          raise InputError(
            f"loss or gradient of the player "
            f"{name.removesuffix(steps.FINITE)!r} is not finite at step "
            f"{number}; {self._last_good()}"
          )
    means = {
      f"train/{name}": value
      for name, value in logs.mean([row for _, row in rows]).items()
      if not name.endswith(steps.FINITE)
    }
    took = time.perf_counter() - self.since
    means["train/seconds_per_step"] = took / len(rows)
    means["train/images_per_second"] = (
      self.config.batch_size * len(rows) / took if took else math.nan
    )
    means["train/share_waiting_for_data"] = self.waited / took if took else 0.0
    self.waited, self.since = 0.0, time.perf_counter()
    self.log.write(step, means)
    losses = {k: v for k, v in means.items() if k.endswith("/loss")}
    text = "  ".join(
      f"{k.removeprefix('train/')} {v:.4g}" for k, v in losses.items()
    )
    rate = f"{means['train/images_per_second']:.0f} images/s"
    self.log.status(step, f"{text}  {rate}")

  def _last_good(self) -> str:
    self.saved.wait()
    good = self.saved.steps()
    where = (
      f"the last good checkpoint is step {good[-1]} in {self.saved.folder}"
      if good
      else "there is no checkpoint yet"
    )
    return f"{where}; try a lower --config.optimizer.learning_rate."

  @staticmethod
  def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


@contextlib.contextmanager
def _stop_signal():
  """An event that SIGTERM sets, where this thread may listen to signals."""
  event = threading.Event()
  if threading.current_thread() is not threading.main_thread():
    yield event
    return
  before = signal.signal(signal.SIGTERM, lambda *_: event.set())
  try:
    yield event
  finally:
    signal.signal(signal.SIGTERM, before)


def main() -> None:
  """The command line."""
  values = flags.FLAGS
  config = command.require_config()
  if not values.workdir:
    raise InputError("give the run a folder with --workdir=runs/<name>.")
  train(config, values.workdir, profile=values.profile)


if __name__ == "__main__":
  config_flags.DEFINE_config_file("config", None, "A file[:mode] of configs/.")
  flags.DEFINE_string("workdir", None, "Folder of the run; resumed if there.")
  flags.DEFINE_bool("profile", False, "Write a trace to <workdir>/profile.")
  command.run(main)
