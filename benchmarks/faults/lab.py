"""Runs of train.py that can be watched, stopped and compared.

Only the command line and the files of a run are used: parameters are read by
Orbax alone and the log as plain JSON, so that what is tested does not judge
itself.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

ROOT = pathlib.Path(__file__).parent.parent.parent
# Longer than any run here takes; what still runs then hangs.
PATIENCE = 120.0
# What a run exits with that saved its state when told to stop.
AGAIN = 75
# Measured by a clock, so no two runs log the same.
CLOCKED = (
  "time",
  "train/compile_seconds",
  "train/seconds_per_step",
  "train/images_per_second",
  "train/share_waiting_for_data",
)
TINY = (
  "--config=configs/texture_suppression.py:tiny",
  "--config.suppression.iterations=1,2",
)

_ATTEMPTS: list["Attempt"] = []


class Attempt:
  """One start of train.py, as one process or several."""

  def __init__(self, lab: "Lab", workdir: pathlib.Path, more: Sequence[str]):
    self.workdir, self.began = workdir, time.monotonic()
    self._saves_before = _unfinished(workdir)
    lab.started += 1
    self._files = [
      lab.folder / "said" / f"{lab.name}-{lab.started}-{index}"
      for index in range(lab.processes)
    ]
    flags = [*lab.flags, f"--workdir={workdir}", *more]
    port = _free_port() if lab.processes > 1 else 0
    self.processes: list[subprocess.Popen[bytes]] = []
    _ATTEMPTS.append(self)
    for index, file in enumerate(self._files):
      if lab.processes > 1:
        own = [
          f"--coordinator=127.0.0.1:{port}",
          f"--process_id={index}",
          f"--num_processes={lab.processes}",
        ]
      else:
        own = []
      file.parent.mkdir(exist_ok=True)
      with (
        file.with_suffix(".out").open("w") as out,
        file.with_suffix(".err").open("w") as err,
      ):
        self.processes.append(
          subprocess.Popen(
            [sys.executable, "train.py", *flags, *own],
            cwd=lab.code,
            env=lab.environment(),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
          )
        )

  @property
  def running(self) -> bool:
    """Whether all of its processes are there."""
    return all(p.poll() is None for p in self.processes)

  def send(self, number: int, which: int | None = None) -> None:
    """Sends a signal; SIGKILL to the whole process group."""
    for index, process in enumerate(self.processes):
      if which not in (None, index) or process.poll() is not None:
        continue
      if number == signal.SIGKILL:
        _signal_group(process.pid, number)
      else:
        process.send_signal(number)

  def wait(self, limit: float = PATIENCE) -> list[int | str]:
    """The exit codes; "hangs" or "leaves processes" where that is so."""
    until = time.monotonic() + limit
    codes: list[int | str] = []
    for process in self.processes:
      try:
        codes.append(process.wait(max(0.01, until - time.monotonic())))
      except subprocess.TimeoutExpired:
        codes.append("hangs")
    for index, process in enumerate(self.processes):
      grace = time.monotonic() + 5
      while _signal_group(process.pid, 0) and time.monotonic() < grace:
        if codes[index] == "hangs":
          break
        time.sleep(0.05)
      if _signal_group(process.pid, signal.SIGKILL) and codes[index] != "hangs":
        codes[index] = "leaves processes"
      process.wait()
    return codes

  def end(self) -> None:
    """Ends what may still be there."""
    self.send(signal.SIGKILL)
    self.wait()

  def said(self, index: int = 0) -> str:
    """What a process printed."""
    return self._files[index].with_suffix(".out").read_text()

  def complained(self, index: int = 0) -> str:
    """What a process printed to its error output."""
    return self._files[index].with_suffix(".err").read_text()

  @property
  def origin(self) -> int | None:
    """The step it went on from; None if it did not come that far."""
    found = re.search(r"\b(new|resumed from step (\d+)), steps", self.said())
    return int(found[2] or 0) if found else None

  def wait_for(
    self, ready: Callable[[], object], limit: float = PATIENCE
  ) -> bool:
    """Whether `ready()` came true while the attempt was running."""
    until = time.monotonic() + limit
    while self.running and time.monotonic() < until:
      if ready():
        return True
      time.sleep(0.001)
    return False

  def wait_for_step(self, step: int) -> bool:
    """Whether the log reached a step while the attempt was running."""
    return self.wait_for(lambda: max(logged(self.workdir), default=0) >= step)

  def saving(self) -> set[Any]:
    """The saves under way that this attempt has begun."""
    return _unfinished(self.workdir) - self._saves_before


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What is left of a run that came to its end.

  Attributes:
    step: Of the newest checkpoint.
    leaves: Every array in it by its path.
    logged: Every number of the log that no clock has measured, by step and
      name.
  """

  step: int
  leaves: Mapping[str, np.ndarray]
  logged: Mapping[tuple[int, str], float | None]


@dataclasses.dataclass
class Lab:
  """A system to train, and where.

  Attributes:
    folder: For everything that is written.
    flags: Of train.py, but for the workdir.
    steps: Of a run.
    save_every: In steps.
    rng: Draws the moments.
    name: Part of the names of its files.
    processes: That share a run.
    started: How many attempts there were.
  """

  folder: pathlib.Path
  flags: Sequence[str] = TINY
  steps: int = 80
  save_every: int = 8
  rng: random.Random = dataclasses.field(default_factory=random.Random)
  name: str = "one"
  processes: int = 1
  started: int = 0
  seconds: float = 0.0
  _unbroken: Outcome | None = None
  _half: pathlib.Path | None = None
  _count: int = 0

  def __post_init__(self):
    """Copies the code, so that nobody changes it under a run."""
    self.folder = self.folder.absolute()
    self.code = self.folder / "code"
    self.flags = (
      *self.flags,
      f"--config.steps={self.steps}",
      f"--config.save_every={self.save_every}",
      "--config.log_every=1",
    )
    if not self.code.exists():
      self.code.mkdir(parents=True)
      shutil.copy(ROOT / "train.py", self.code)
      for part in ("jaxshape", "configs"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / part, self.code / part, ignore=ignore)

  def environment(self) -> dict[str, str]:
    """Of the runs: one CPU device each, and a cache of compiled programs."""
    kept = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return {
      **kept,
      "JAX_PLATFORMS": "cpu",
      "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "TF_CPP_MIN_LOG_LEVEL": "3",
      # The copy's, whatever is installed.
      "PYTHONPATH": str(self.code),
      "PYTHONUNBUFFERED": "1",
    }

  def fresh(self, parent: pathlib.Path | None = None) -> pathlib.Path:
    """A workdir that nobody has used."""
    self._count += 1
    return (parent or self.folder) / f"{self.name}-{self._count}"

  def start(self, workdir: pathlib.Path, *more: str) -> Attempt:
    """Starts train.py, on a workdir that may hold a run."""
    return Attempt(self, workdir, more)

  def unbroken(self) -> Outcome:
    """The run that all others are compared with; `seconds` is its time."""
    if self._unbroken is None:
      found = self._straight(3)  # Compiles, so its time says little.
      if wrong := differences(self._straight(1), found):
        raise RuntimeError(
          "two unbroken runs differ, so nothing can be compared: "
          + "; ".join(wrong[:3])
        )
      self._unbroken = found
    return self._unbroken

  def _straight(self, tries: int) -> Outcome:
    """A run from start to end without a fault, timed."""
    while True:
      tries -= 1
      workdir = self.fresh()
      attempt = self.start(workdir)
      codes = attempt.wait()
      self.seconds = time.monotonic() - attempt.began
      if not any(codes):
        found = read(workdir)
        shutil.rmtree(workdir)
        return found
      if not tries:
        raise RuntimeError(
          f"the unbroken run ended with {codes}: "
          + last_line(attempt.complained())
        )

  def half(self, parent: pathlib.Path | None = None) -> pathlib.Path:
    """A copy of a run that was stopped in the middle and can go on."""
    if self._half is None:
      self._half = self.fresh()
      attempt = self.start(self._half)
      attempt.wait_for_step(self.steps // 2)
      attempt.send(signal.SIGTERM)
      codes = attempt.wait()
      if set(codes) != {AGAIN} or len(finished(self._half)) < 2:
        raise RuntimeError(f"half a run: {codes}, steps {finished(self._half)}")
    copy = self.fresh(parent)
    shutil.copytree(self._half, copy)
    return copy

  def finish(self, workdir: pathlib.Path, *more: str) -> tuple[Attempt, str]:
    """Runs to the end; what was wrong on the way, or with the end."""
    attempt = self.start(workdir, *more)
    codes = attempt.wait()
    if any(codes):
      return attempt, (
        f"did not go on: exit {codes}, {last_line(attempt.complained())}"
      )
    return attempt, self.judge(workdir)

  def judge(self, workdir: pathlib.Path) -> str:
    """How the end of a run differs from that of the unbroken one."""
    try:
      wrong = differences(read(workdir), self.unbroken())
    except Exception as error:
      return f"the end cannot be read: {type(error).__name__}: {error}"
    if not wrong:
      return ""
    return f"{len(wrong)} wrong values: " + "; ".join(wrong[:3])


def end_all() -> None:
  """Ends every attempt that still runs."""
  for attempt in _ATTEMPTS:
    if any(process.poll() is None for process in attempt.processes):
      attempt.end()
  _ATTEMPTS.clear()


def read(workdir: pathlib.Path) -> Outcome:
  """What a run has left."""
  steps = finished(workdir)
  path = str((workdir / "checkpoints" / str(steps[-1])).absolute())
  stored = ocp.metadata(path).metadata
  like = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), stored)
  leaves = jax.tree_util.tree_flatten_with_path(ocp.load(path, like))[0]
  rows: dict[tuple[int, str], float | None] = {}
  text = (workdir / "metrics.jsonl").read_text(encoding="utf-8")
  for line in text.splitlines():
    row = json.loads(line)  # After a restart no half line may be left.
    step = row.pop("step")
    for name, value in row.items():
      if name in CLOCKED:
        continue
      if (step, name) in rows:
        raise ValueError(f"{name} of step {step} is logged twice")
      rows[step, name] = value
  return Outcome(
    steps[-1],
    {jax.tree_util.keystr(p): np.asarray(leaf) for p, leaf in leaves},
    rows,
  )


def differences(found: Outcome, wanted: Outcome | None) -> list[str]:
  """Every array and every logged number that is not the same, bit for bit."""
  assert wanted is not None
  wrong = []
  if found.step != wanted.step:
    wrong.append(f"ended at step {found.step}, not {wanted.step}")
  for path in sorted(set(found.leaves) | set(wanted.leaves)):
    a, b = found.leaves.get(path), wanted.leaves.get(path)
    if a is None or b is None:
      wrong.append(f"{path} is only in one")
    elif (a.dtype, a.shape) != (b.dtype, b.shape):
      wrong.append(f"{path} is {a.dtype}{a.shape}, not {b.dtype}{b.shape}")
    elif a.tobytes() != b.tobytes():
      wrong.append(f"{path} differs")
  for step, name in sorted(set(found.logged) | set(wanted.logged)):
    key = (step, name)
    if key not in found.logged or key not in wanted.logged:
      wrong.append(f"{name} of step {step} is only in one")
    elif found.logged[key] != wanted.logged[key]:
      wrong.append(f"{name} of step {step} differs")
  return wrong


def finished(workdir: pathlib.Path) -> list[int]:
  """The steps of finished checkpoints, oldest first."""
  names = _names(workdir / "checkpoints")
  return sorted(int(name) for name in names if name.isdigit())


def logged(workdir: pathlib.Path) -> list[int]:
  """The steps whose loss is in the log so far."""
  try:
    text = (workdir / "metrics.jsonl").read_text(encoding="utf-8")
  except OSError:
    return []
  steps = []
  for line in text.splitlines(keepends=True):
    if line.endswith("}\n") and "/loss" in line:
      steps.append(json.loads(line)["step"])
  return steps


def last_line(text: str) -> str:
  """The last line that is not empty."""
  lines = [line for line in text.splitlines() if line.strip()]
  return lines[-1][:300] if lines else "nothing said"


def one_line(text: str, *names: str) -> str:
  """What is wrong with an error output that should be one line.

  Args:
    text: The error output; warnings in it do not count.
    *names: What the line has to hold.
  """
  lines = [
    line
    for line in text.splitlines()
    if line.strip() and not re.match(r"WARNING|W\d{4} ", line)
  ]
  if "Traceback" in text:
    return f"said with a traceback: {last_line(text)}"
  if len(lines) != 1 or not lines[0].startswith("error: "):
    return f"said in {len(lines)} lines: {last_line(text)}"
  missing = [name for name in names if name not in lines[0]]
  return f"does not name {missing}: {lines[0]}" if missing else ""


def _unfinished(workdir: pathlib.Path) -> set[Any]:
  """Saves under way, and what is left of killed ones."""
  folder = workdir / "checkpoints"
  found = set()
  for name in _names(folder):
    if ".orbax-checkpoint-tmp" in name:
      try:
        status = (folder / name).stat()
        found.add((name, status.st_ino, status.st_mtime_ns))
      except OSError:  # It was renamed in between.
        continue
  return found


def _names(folder: pathlib.Path) -> list[str]:
  try:
    return os.listdir(folder)
  except OSError:
    return []


def _signal_group(leader: int, number: int) -> bool:
  """Whether there was anybody to send it to."""
  try:
    os.killpg(leader, number)
  except ProcessLookupError:
    return False
  except PermissionError:  # What is left is a zombie, on some systems.
    return False
  return True


def _free_port() -> int:
  with socket.socket() as server:
    server.bind(("127.0.0.1", 0))
    return server.getsockname()[1]
