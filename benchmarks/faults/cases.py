"""The faults, each a function of a lab that fills a row."""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import os
import pathlib
import re
import resource
import shutil
import signal
import statistics
import subprocess
import time

import numpy as np
from PIL import Image

from benchmarks.faults import Row
from benchmarks.faults.lab import (
  AGAIN,
  PATIENCE,
  Attempt,
  Lab,
  finished,
  last_line,
  logged,
  one_line,
)

# A lost process has to be noticed within a minute.
NOTICED = 60.0
# About what a save takes here.
SAVE_SECONDS = 0.08


class Interruptions:
  """Runs that are stopped again and again until each has come to its end."""

  def __init__(self, lab: Lab, number: int, row: Row):
    """Prepares.

    Args:
      lab: Where and what to train.
      number: SIGKILL or SIGTERM.
      row: Takes what was wrong.
    """
    self.lab, self.number, self.row = lab, number, row
    self.sent = self.saving = self.restarts = self.ended = self.wrong = 0
    self.early = 0
    self.lost: list[int] = []
    self.noticed: list[float] = []
    # (step reached, newest finished step, whether it was saving) at signals
    # from which no attempt has gone on yet.
    self._open: list[tuple[int, int, bool]] = []

  def run(self, count: int) -> None:
    """Stops runs `count` times in all, and lets the last one end."""
    while self.sent < count and len(self.row.failures) < 5:
      workdir = self.lab.fresh()
      self._open = []
      first = True
      while True:
        attempt = self.lab.start(workdir)
        self.restarts += not first
        first = False
        if self.sent < count and self._stop(attempt):
          self._settle(attempt)
          self._note(attempt)
          continue
        codes = attempt.wait()
        self._settle(attempt)
        if any(codes):
          self.row.failures.append(
            f"restart ended with {codes}: {last_line(attempt.complained())}"
          )
          break
        self.ended += 1
        if wrong := self.lab.judge(workdir):
          self.wrong += int(wrong.split()[0]) if wrong[0].isdigit() else 1
          self.row.failures.append(f"run {self.ended}: {wrong}")
        break
      shutil.rmtree(workdir, ignore_errors=True)

  def _stop(self, attempt: Attempt) -> bool:
    """Sends the signal at its moment; whether the run was still there."""
    rng, kind = self.lab.rng, self.sent % 2
    if kind == 0:  # Any moment of the run, its start included.
      moment = self._start(attempt) + rng.uniform(0, self.lab.seconds)
      attempt.wait_for(lambda: time.monotonic() > moment)
    else:  # While it saves, or just after.
      for _ in range(rng.randint(1, 3)):
        attempt.wait_for(lambda: not attempt.saving())
        attempt.wait_for(attempt.saving)
      time.sleep(rng.uniform(0, SAVE_SECONDS))
    if not attempt.running:
      return False
    return self._send(attempt)

  def _start(self, attempt: Attempt) -> float:
    return attempt.began

  def _send(self, attempt: Attempt) -> bool:
    attempt.send(self.number)
    codes = attempt.wait()
    if not any(codes):  # It came to its end in between.
      return False
    # SIGTERM itself ends a run that starts or has ended; that nothing was lost
    # is seen by the next start.
    allowed = {-self.number}
    if self.number == signal.SIGTERM:
      allowed.add(AGAIN)
      self.early += codes[0] == -signal.SIGTERM
    if not set(codes) <= allowed:
      self.row.failures.append(
        f"ended with {codes}: {last_line(attempt.complained())}"
      )
    return True

  def _note(self, attempt: Attempt) -> None:
    self.sent += 1
    saving = bool(attempt.saving())
    self.saving += saving
    self._open.append(
      (
        max(logged(attempt.workdir), default=0),
        max(finished(attempt.workdir), default=0),
        saving,
      )
    )

  def _settle(self, attempt: Attempt) -> None:
    """Counts what the signals before this attempt have cost."""
    origin = attempt.origin
    if origin is None or not self._open:
      return
    done = max(step for _, step, _ in self._open)
    if origin < done:
      self.row.failures.append(
        f"went on from step {origin}, but step {done} had been saved"
      )
    reached, _, _ = max(self._open)
    lost = max(0, reached - origin)
    saving = any(saving for *_, saving in self._open)
    most = 0
    if self.number == signal.SIGKILL:
      # A save that was under way does not count, nor what came before it.
      most = self.lab.save_every * (2 if saving else 1)
    if lost > most:
      self.row.failures.append(f"{lost} steps lost, at most {most} allowed")
    self.lost += [lost, *[0] * (len(self._open) - 1)]
    self._open = []


def kills(lab: Lab, row: Row, *, count: int) -> None:
  """SIGKILL to the process group, half of the times in the middle of a save."""
  lab.unbroken()
  seen = Interruptions(lab, signal.SIGKILL, row)
  seen.run(count)
  row.tries = seen.sent
  row.found = (
    f"{seen.sent} kills, {seen.saving} of them during a save; "
    f"{seen.restarts} restarts, {seen.ended} runs to their end; steps lost per "
    f"kill: {_spread(seen.lost)}; {seen.wrong} wrong values"
  )


def terminations(lab: Lab, row: Row, *, count: int) -> None:
  """SIGTERM, half of the times in the middle of a save."""
  lab.unbroken()
  seen = Interruptions(lab, signal.SIGTERM, row)
  seen.run(count)
  row.tries = seen.sent
  row.found = (
    f"{seen.sent - seen.early} ended with {AGAIN}, {seen.early} at once, "
    "starting or ended, with nothing to save; steps lost: "
    f"{max(seen.lost, default=0)}; "
    f"{seen.ended} runs to their end, {seen.wrong} wrong values"
  )


class _OneOfTwo(Interruptions):
  """Kills one process; the other has to notice and to say who is missing."""

  def _start(self, attempt: Attempt) -> float:
    # Nobody can miss a process that has not come yet.
    attempt.wait_for(lambda: attempt.origin is not None)
    return time.monotonic() - self.lab.seconds / 2

  def _send(self, attempt: Attempt) -> bool:
    victim = self.sent % 2 if self.sent < 2 else self.lab.rng.randrange(2)
    other = 1 - victim
    attempt.send(signal.SIGKILL, victim)
    began = time.monotonic()
    codes = attempt.wait(NOTICED)
    took = time.monotonic() - began
    if not any(codes):
      return False
    self.noticed.append(took)
    said = attempt.complained(other)
    if codes[victim] != -signal.SIGKILL or codes[other] in (0, "hangs"):
      self.row.failures.append(
        f"process {victim} killed, exit {codes} after {took:.0f} s: "
        + last_line(said)
      )
    elif attempt.origin is not None and not names(said, other, victim):
      self.row.failures.append(
        f"process {victim} killed, and the other does not name it: "
        + last_line(said)
      )
    return True


def names(said: str, by: int, victim: int) -> bool:
  """Whether one process of two says of the other that it is missing."""
  for line in said.splitlines():
    if line.startswith("error: "):
      text = line.removeprefix(f"error: process {by} of 2:")
      if re.search(rf"\bprocess(es)? (\d+(,| and) )*{victim}\b", text):
        return True
  return False


def one_of_two(lab: Lab, row: Row, *, count: int) -> None:
  """One of two processes is killed."""
  lab.unbroken()
  seen = _OneOfTwo(lab, signal.SIGKILL, row)
  seen.run(count)
  row.tries = seen.sent
  row.found = (
    f"{seen.sent} kills of one, {seen.saving} of them during a save; the other "
    f"ended after {_spread(seen.noticed)} s; {seen.ended} runs to their end; "
    f"steps lost per kill: {_spread(seen.lost)}; {seen.wrong} wrong values"
  )


def one_of_two_told(lab: Lab, row: Row, *, count: int) -> None:
  """SIGTERM to one of two processes."""
  lab.unbroken()
  both = 0
  for number in range(count):
    workdir = lab.fresh()
    attempt = lab.start(workdir)
    attempt.wait_for_step(lab.rng.randint(1, lab.steps // 2))
    attempt.send(signal.SIGTERM, number % 2)
    codes = attempt.wait()
    both += codes == [AGAIN, AGAIN]
    if codes != [AGAIN, AGAIN]:
      row.failures.append(f"exit {codes}: {last_line(attempt.complained())}")
    _go_on(lab, workdir, row, lost=0)
  row.tries = count
  row.found = f"{both} of {count} times both ended with {AGAIN}"
  _tell_end(row)


def disk_full(lab: Lab, row: Row) -> None:
  """The disk is full at some moment, and has room again later."""
  lab.unbroken()
  ends = lines = 0
  with _mounted(lab.folder / "disk", "size=16m") as disk:
    # What is left may do for the log but not for a checkpoint.
    for left in (0, 30_000, 120_000) if disk else (None,):
      row.tries += 1
      workdir = lab.fresh(disk)
      attempt = lab.start(workdir)
      attempt.wait_for(lambda w=workdir: len(finished(w)) > 1)
      if disk is None:
        _limit_files(attempt)
      else:
        _fill(disk / "ballast", left or 0, attempt)
      codes = attempt.wait(30)
      # Which run, and why.
      reason = "File too large" if left is None else "No space left"
      wrong = one_line(attempt.complained(), str(workdir), reason)
      if not codes[0] or isinstance(codes[0], str):
        wrong = f"exit {codes}: {last_line(attempt.complained())}"
      lines += not wrong
      if wrong:
        where = "files limited" if left is None else f"{left} bytes left"
        row.failures.append(f"{where}: {wrong}")
      if disk:
        (disk / "ballast").unlink()
      ends += _go_on(lab, workdir, row)
      shutil.rmtree(workdir)
  how = "a tmpfs of 16 MB" if disk else "RLIMIT_FSIZE (no right to mount)"
  row.found = (
    f"{how}: {lines} of {row.tries} ended with one line, {ends} went on from "
    "the last finished step once there was room"
  )
  _tell_end(row)


def damaged_file(lab: Lab, row: Row, *, damage: str, count: int) -> None:
  """The newest checkpoint is damaged between two runs."""
  lab.unbroken()
  skipped = 0
  for number in range(count):
    row.tries += 1
    workdir = lab.half()
    before, newest = finished(workdir)[-2:]
    what = DAMAGES[damage](workdir / "checkpoints" / str(newest), lab, number)
    attempt, wrong = lab.finish(workdir)
    if wrong:
      row.failures.append(f"{what}: {wrong}")
    said = f"skipped damaged checkpoints {newest} " in attempt.complained()
    skipped += said
    fits = (said, attempt.origin) in ((True, before), (False, newest))
    # What is never read may be damaged unseen, but the first try hits arrays.
    if not fits or (number == 0 and not said):
      row.failures.append(
        f"{what}: went on from step {attempt.origin} of {before} and {newest}, "
        f"saying {last_line(attempt.complained())!r}"
      )
    shutil.rmtree(workdir)
  row.found = f"{skipped} skipped with a warning and the one before used"
  if count > skipped:
    row.found += f", {count - skipped} where nothing is read"
  _tell_end(row)


def _truncated(step: pathlib.Path, lab: Lab, number: int) -> str:
  files = _files(step)
  # The arrays first, then the others at random.
  file = files[-1] if number == 0 else lab.rng.choice(files[-5:])
  size = file.stat().st_size
  os.truncate(file, size // 2)
  return f"{file.relative_to(step)} cut to {size // 2} bytes"


def _flipped(step: pathlib.Path, lab: Lab, number: int) -> str:
  files = _files(step)
  weights = [f.stat().st_size for f in files]
  file = files[-1] if number == 0 else lab.rng.choices(files, weights)[0]
  data = bytearray(file.read_bytes())
  place, bit = lab.rng.randrange(len(data)), lab.rng.randrange(8)
  data[place] ^= 1 << bit
  file.write_bytes(bytes(data))
  return f"bit {bit} of byte {place} of {file.relative_to(step)}"


def _emptied(step: pathlib.Path, lab: Lab, number: int) -> str:
  del lab
  shutil.rmtree(step)
  if number % 2 == 0:
    step.mkdir()
    return "an empty folder"
  (step / "state" / "d").mkdir(parents=True)
  return "folders without files"


def _files(step: pathlib.Path) -> list[pathlib.Path]:
  """Files that are not empty, the largest last."""
  files = [p for p in step.rglob("*") if p.is_file() and p.stat().st_size]
  return sorted(files, key=lambda p: (p.stat().st_size, p.name))


DAMAGES: Mapping[str, Callable[[pathlib.Path, Lab, int], str]] = {
  "truncated": _truncated,
  "flipped": _flipped,
  "emptied": _emptied,
}


def read_only(lab: Lab, row: Row) -> None:
  """The workdir cannot be written."""
  lab.unbroken()
  blocked = lab.fresh()
  blocked.write_text("a file\n")
  lines = int(_refused(lab.start(blocked / "run"), row, "below a file"))
  how = ["a path below a file"]
  with _mounted(lab.folder / "disk", "size=64m") as disk:
    if disk is None:
      how.append("no right to mount")
    else:
      workdir = lab.half(disk)
      there = _contents(workdir)
      _mount("-o", "remount,ro", str(disk))
      lines += _refused(lab.start(workdir), row, "a run on a read-only disk")
      lines += _refused(
        lab.start(disk / "new"), row, "a new run on a read-only disk"
      )
      _mount("-o", "remount,rw", str(disk))
      if _contents(workdir) != there:
        row.failures.append("the run's files changed")
      _go_on(lab, workdir, row)
      how.append(
        "a tmpfs mounted read-only under a run and where there was none "
        "(root may write anything else); writable again, the run went on"
      )
  row.found = f"{lines} of {row.tries} refused with one line: {'; '.join(how)}"
  if disk is not None or row.failures:
    _tell_end(row)


def _refused(attempt: Attempt, row: Row, what: str) -> bool:
  row.tries += 1
  codes = attempt.wait(60)
  wrong = one_line(attempt.complained(), "workdir")
  if codes[0] in (0, "hangs", "leaves processes") or attempt.origin is not None:
    wrong = f"exit {codes}: {last_line(attempt.complained())}"
  if wrong:
    row.failures.append(f"{what}: {wrong}")
  return not wrong


def pictures(folder: pathlib.Path, *, count: int = 24, size: int = 40) -> None:
  """Writes a small data set of noise, in folders of classes."""
  rng = np.random.default_rng(0)
  for split in ("train", "val"):
    for i in range(count):
      path = folder / split / "abc"[i % 3] / f"{i:03}.png"
      path.parent.mkdir(parents=True, exist_ok=True)
      values = rng.integers(0, 256, (size, size, 3), np.uint8)
      Image.fromarray(values).save(path)


def folder_flags(data: pathlib.Path) -> tuple[str, ...]:
  """Flags that train on `pictures`."""
  return (
    "--config=configs/texture_suppression.py:folder",
    f"--config.data.source=folder:{data}",
    "--config.data.image_size=32",
    "--config.data.workers=0",
    "--config.backbone=resnet8",
    "--config.width=4",
    "--config.batch_size=8",
    "--config.eval_every=0",
    "--config.suppression.iterations=1,2",
    "--config.optimizer.warmup_steps=2",
  )


def vanished_data(lab: Lab, row: Row, *, data: pathlib.Path) -> None:
  """A file of the data set disappears while a run reads it, and comes back."""
  lab.unbroken()
  ends = lines = 0
  for number in range(3):
    row.tries += 1
    # The last try reads in processes beside the first.
    more = ["--config.data.workers=2"] if number == 2 else []
    workdir = lab.fresh()
    attempt = lab.start(workdir, *more)
    attempt.wait_for_step(lab.rng.randint(lab.save_every, lab.steps // 2))
    file = lab.rng.choice(sorted((data / "train").rglob("*.png")))
    away = data / "away"
    file.rename(away)
    codes = attempt.wait(60)
    away.rename(file)
    wrong = one_line(attempt.complained(), str(file))
    if codes[0] in (0, "hangs", "leaves processes"):
      wrong = f"exit {codes}: {last_line(attempt.complained())}"
    lines += not wrong
    if wrong:
      row.failures.append(f"{' '.join(more)} {wrong}".strip())
    ends += _go_on(lab, workdir, row, more=more)
    shutil.rmtree(workdir, ignore_errors=True)
  row.found = (
    f"{lines} of {row.tries} ended with one line that names the file, {ends} "
    "went on once it was back"
  )
  _tell_end(row)


def _go_on(
  lab: Lab,
  workdir: pathlib.Path,
  row: Row,
  *,
  lost: int | None = None,
  more: list[str] | None = None,
) -> bool:
  """Whether a run goes on where it should and ends as if nothing had been."""
  reached = max(logged(workdir), default=0)
  done = max(finished(workdir), default=0)
  attempt, wrong = lab.finish(workdir, *(more or []))
  if wrong:
    row.failures.append(wrong)
  origin = attempt.origin
  if origin is None or origin != done:
    row.failures.append(f"went on from {origin}, but {done} had been saved")
    return False
  if lost is not None and reached - origin > lost:
    row.failures.append(f"{reached - origin} steps lost")
    return False
  return not wrong


def _tell_end(row: Row) -> None:
  row.found += (
    "; see below" if row.failures else "; every end equal to the unbroken one"
  )


def _spread(values: list[int] | list[float]) -> str:
  if not values:
    return "none"
  middle, most = statistics.mean(values), max(values)
  return f"{middle:.1f} on average, at most {most:.3g}"


def _contents(folder: pathlib.Path) -> dict[str, bytes]:
  files = sorted(p for p in folder.rglob("*") if p.is_file())
  return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def _mount(*arguments: str) -> bool:
  try:
    done = subprocess.run(
      ["mount", *arguments], capture_output=True, check=False
    )
  except OSError:
    return False
  return done.returncode == 0


@contextlib.contextmanager
def _mounted(
  folder: pathlib.Path, options: str
) -> Iterator[pathlib.Path | None]:
  """A small disk of its own, or None where nobody may mount one."""
  folder.mkdir(exist_ok=True)
  if not _mount("-t", "tmpfs", "-o", options, "tmpfs", str(folder)):
    yield None
    return
  try:
    yield folder
  finally:
    subprocess.run(["umount", "-l", str(folder)], check=False)


def _fill(path: pathlib.Path, left: int, attempt: Attempt) -> None:
  """Fills a disk for as long as the attempt runs, as it deletes old steps."""
  until = time.monotonic() + PATIENCE
  with path.open("ab", buffering=0) as file:
    while attempt.running and time.monotonic() < until:
      status = os.statvfs(path)
      room = status.f_bavail * status.f_frsize - left
      if room > 0:
        with contextlib.suppress(OSError):
          file.write(bytes(room))
      time.sleep(0.001)


def _limit_files(attempt: Attempt) -> None:
  """No file may grow larger than what a checkpoint needs."""
  newest = attempt.workdir / "checkpoints" / str(finished(attempt.workdir)[-1])
  largest = _files(newest)[-1].stat().st_size
  limit = int(0.9 * largest)
  _, most = resource.prlimit(attempt.processes[0].pid, resource.RLIMIT_FSIZE)
  resource.prlimit(
    attempt.processes[0].pid, resource.RLIMIT_FSIZE, (limit, most)
  )
