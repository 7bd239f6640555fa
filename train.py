"""Trains the system that a config names.

python train.py --config=configs/texture_suppression.py:tiny --workdir=runs/a

The only training loop. Started again on the same workdir it goes on where it
stopped, as if nothing had happened.
"""

from collections.abc import Iterator, Mapping
import contextlib
import functools
import logging
import math
import os
import signal
import threading
import time
from typing import Any

from absl import flags
import jax
import jax.numpy as jnp
from ml_collections import config_flags
import numpy as np

from jaxshape import system as system_lib
from jaxshape.data import stream
from jaxshape.engine import (
  checkpoints,
  command,
  logs,
  processes,
  runtime,
  settings,
  steps,
)
from jaxshape.errors import InputError, reading_config
from jaxshape.system import System, TrainState
from jaxshape.typing import Config

# What a preempted run exits with: start me again.
AGAIN = processes.AGAIN


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
    KeyboardInterrupt: Ctrl-C came; the state is saved, unless it came again.
  """
  settings.check(config)
  mesh = runtime.make_mesh(config.mesh)
  runtime.check_batch_size(config.batch_size, mesh)
  system = system_lib.load(config)
  if system.train_step is None:
    raise InputError(
      f"the system {config.system!r} trains nothing; evaluate it with eval.py."
    )
  with contextlib.ExitStack() as stack:
    stack.enter_context(checkpoints.lock(workdir))
    saved = checkpoints.Checkpoints(
      workdir,
      keep=config.keep,
      best_metric=config.best_metric,
      best_mode=config.best_mode,
    )
    stack.callback(_settle, saved)
    state, origin, before = start(config, system, mesh, saved)
    first = int(state.step)
    owed = _owed(config, workdir, first)
    log = logs.Logs(workdir, start=first, total=config.steps)
    stack.callback(log.close)
    if changed := command.differences(before.get("config"), config):
      log.say("the run began with another config: " + "; ".join(changed))
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    log.say(
      f"{config.system}: {count:,} parameters, {origin}, steps {first} to "
      f"{config.steps} on {mesh.size} {jax.devices()[0].device_kind} device(s)"
    )
    if first >= config.steps and not owed:
      return state
    data = system.train_data(first)
    batches = runtime.placed(data, mesh)
    stack.enter_context(contextlib.closing(batches))
    saved.data = getattr(data, "fingerprint", None)
    for other in (processes.gather(saved.data)[0], before.get("data")):
      if config.check_data and saved.data and other:
        stream.check_same(saved.data, other)
    command.write_config(config, workdir)  # Not before it fits what is there.
    if config.eval_every:
      _check_evaluators(config, system, state, mesh)
    stopped = stack.enter_context(_stop_signals())
    loop = _Loop(config, system, mesh, saved, log, stopped)
    if owed:
      loop.after(state, first, told=False, old=True)
    traced = profile and processes.index() == 0
    return loop.run(state, batches, workdir if traced else None)


def start(
  config: Config,
  system: System,
  mesh: jax.sharding.Mesh,
  saved: checkpoints.Checkpoints,
) -> tuple[TrainState, str, Mapping[str, Any]]:
  """The state to go on from: a checkpoint, another run's parameters, or fresh.

  Args:
    config: The run's config.
    system: What it names.
    mesh: Where the state shall lie, whatever devices it was saved from.
    saved: The run's checkpoints.

  Returns:
    The state, in words where it is from, and what was stored beside it.
  """
  key, _ = jax.random.split(jax.random.key(config.seed))
  like = runtime.abstract_state(system.init, key, mesh)
  restored = saved.restore(like, system=config.system)
  if restored is not None:
    state, metadata = restored
    return state, f"resumed from step {int(state.step)}", metadata
  state = runtime.initialize(system.init, key, mesh)
  if config.init_from:
    state, origin = checkpoints.initialize_from(
      state, config.init_from, include=config.init_include
    )
    return state, origin, {}
  return state, "new", {}


def _owed(config: Config, workdir: str | os.PathLike[str], step: int) -> bool:
  """Whether the evaluation of a saved step is due but not in the log."""
  rows = [row for row in logs.read(workdir) if row["step"] == step]
  seen = any(not any("train/" in name for name in row) for row in rows)
  due = step > 0 and _due(config.eval_every, step) and not seen
  return processes.gather(due)[0]  # Others may not see the log.


def _settle(saved: checkpoints.Checkpoints) -> None:
  """Waits for the save under way, also when the run ends by an error."""
  try:
    saved.wait()
  except checkpoints.SaveError as error:
    logging.warning("%s", error)


class _Loop:
  """One run of the loop; what it measures between two log lines."""

  def __init__(
    self,
    config: Config,
    system: System,
    mesh: jax.sharding.Mesh,
    saved: checkpoints.Checkpoints,
    log: logs.Logs,
    stopped: list[int],
  ):
    self.config, self.system, self.mesh = config, system, mesh
    self.saved, self.log, self.stopped = saved, log, stopped
    self.agreement = processes.Agreement(mesh)
    self.pending: list[tuple[int, Mapping[str, jax.Array]]] = []
    self.waited, self.since = 0.0, time.perf_counter()

  def run(
    self,
    state: TrainState,
    batches: Any,
    profile: str | os.PathLike[str] | None,
  ) -> TrainState:
    """From the state's step to the last one."""
    config, first = self.config, int(state.step)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    _, key = jax.random.split(jax.random.key(config.seed))
    # Given, not part of the program, which so is the same for every seed.
    words = np.asarray(jax.random.key_data(key))

    @functools.partial(
      jax.jit, donate_argnums=0, out_shardings=(shardings, None)
    )
    def advance(state, batch, words):
      assert self.system.train_step is not None
      key = jax.random.wrap_key_data(words)
      key_of_step = jax.random.fold_in(key, state.step)
      return self.system.train_step(state, batch, key_of_step)

    compiled = None
    for step in range(first + 1, config.steps + 1):
      processes.alive(config.stuck_seconds)
      if _due(config.refresh_every, step - 1) and self.system.refresh:
        # A copy, as the step donates it and a buffer may be there twice.
        copy = jax.jit(_copy, out_shardings=shardings)
        state = copy(self.system.refresh(state))
      batch = self._next(batches)
      if compiled is None:
        began = time.perf_counter()
        with reading_config():
          lowered = advance.lower(state, batch, words)
        compiled = lowered.compile()
        # On CPUs, the first collective waits half a minute for the others and
        # no longer; one that compiles may take more.
        processes.gather(None)
        took = time.perf_counter() - began
        self.log.write(step, {"train/compile_seconds": took})
        self.log.say(f"compiled in {took:.1f} s")
        self.waited, self.since = 0.0, time.perf_counter()
      if profile and step == min(first + 5, config.steps):
        jax.profiler.start_trace(os.path.join(profile, "profile"))
      with jax.profiler.StepTraceAnnotation("train", step_num=step):
        state, metrics = compiled(state, batch, words)
      processes.alive(config.stuck_seconds, waiting=True)
      self.pending.append((step, metrics))
      if len(self.pending) > 2:  # Stay close to the device, for an honest bar.
        jax.block_until_ready(self.pending[-3][1])
      if profile and step == min(first + 10, config.steps):
        jax.block_until_ready(state)
        jax.profiler.stop_trace()
      self.log.advance()
      # Asked once: what comes while it saves is for the next step.
      told = bool(self.agreement(bool(self.stopped)))
      self.after(state, step, told=told, old=False)
    return state

  def _go_on(self) -> None:
    if self.agreement(bool(self.stopped)):
      raise Preempted

  def _next(self, batches: Any) -> Any:
    """The next batch, and how long it took."""
    began = time.perf_counter()
    try:
      return next(batches)
    except Exception as error:  # Ctrl-C reaches starting workers, too.
      if signal.SIGINT not in self.stopped:
        raise
      raise KeyboardInterrupt("start me again.") from error
    finally:
      self.waited += time.perf_counter() - began

  def _stop(self, step: int) -> None:
    told = f"step {step} is saved; start me again."
    if signal.SIGINT in self.stopped and processes.count() == 1:
      raise KeyboardInterrupt(told)
    self.log.say(f"told to stop: {told}")
    raise Preempted(AGAIN)

  def after(
    self, state: TrainState, step: int, *, told: bool, old: bool
  ) -> None:
    """What is due after a step: log, evaluate, save; and stop, if told to."""
    config, last = self.config, step == self.config.steps
    evaluate = _due(config.eval_every, step)
    save = not old and (last or told or _due(config.save_every, step))
    save = save or (evaluate and bool(config.best_metric))
    if evaluate or save or _due(config.log_every, step):
      self._flush(step)
    results, stuck = {}, config.stuck_seconds
    try:
      if evaluate and not told:
        for name, evaluator in self.system.evaluators.items():
          numbers, _ = runtime.evaluate(
            evaluator, state, self.mesh, stuck=stuck, each=self._go_on
          )
          results |= {f"{name}/{k}": v for k, v in numbers.items()}
        self.log.write(step, results)
        if config.best_metric and config.best_metric not in results:
          raise InputError(
            f"config.best_metric={config.best_metric!r} is not measured; there "
            f"are: {', '.join(results)}"
          )
    except Preempted:  # The evaluation is given up, until the next start.
      told, save, results = True, not old, {}
    finally:  # An evaluation that fails costs no steps.
      if save:
        self._save(state, step, results)
    if last or told:
      self.saved.wait()
    if told and (evaluate or not last):
      self._stop(step)
    if evaluate or save:  # They took time that no step took.
      self.waited, self.since = 0.0, time.perf_counter()

  def _save(
    self, state: TrainState, step: int, results: Mapping[str, float]
  ) -> None:
    if not runtime.finite(state):
      raise InputError(
        f"the state is not finite after step {step}, so it is not saved; "
        + self._last_good()
      )
    self.saved.save(state, config=self.config.to_dict(), metrics=results)

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


def _due(every: int, step: int) -> bool:
  return every > 0 and step % every == 0


def _check_evaluators(
  config: Config, system: System, state: TrainState, mesh: jax.sharding.Mesh
) -> None:
  """Refuses before the first step what would else end the run hours later."""
  best = config.best_metric
  if best and best.split("/")[0] not in system.evaluators:
    raise InputError(
      f"config.best_metric must be <evaluator>/<metric>, got {best!r}; the "
      f"evaluators are: {', '.join(system.evaluators) or 'none'}"
    )
  for evaluator in system.evaluators.values():
    runtime.rehearse(evaluator, state, mesh)


def _copy(state: TrainState) -> TrainState:
  return jax.tree.map(jnp.copy, state)


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
  """Collects SIGTERM and Ctrl-C where this thread may listen to signals.

  The second Ctrl-C stops at once.
  """
  came: list[int] = []
  if threading.current_thread() is not threading.main_thread():
    yield came
    return

  def note(number: int, _: object) -> None:
    if number == signal.SIGINT and number in came:
      raise KeyboardInterrupt
    came.append(number)

  before = {n: signal.signal(n, note) for n in (signal.SIGTERM, signal.SIGINT)}
  try:
    yield came
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


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
