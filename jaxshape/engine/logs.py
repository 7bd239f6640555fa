"""What a run says: a bar on a terminal, a line per log step, TensorBoard."""

from collections.abc import Mapping, Sequence
import contextlib
import json
import logging
import math
import os
import time
from typing import Any

from etils import epath
import numpy as np
import tensorboardX
from tqdm import tqdm

from jaxshape.engine import processes

FILE = "metrics.jsonl"


class Logs:
  """Writes metrics of process 0 to `metrics.jsonl` and TensorBoard."""

  def __init__(
    self, workdir: str | os.PathLike[str], *, start: int, total: int
  ):
    """Opens the logs of a run.

    Args:
      workdir: The run's folder.
      start: The step it goes on from; what was logged after it is dropped.
      total: The last step.
    """
    self._writes = processes.index() == 0
    self._path = epath.Path(workdir) / FILE
    # Silent where nobody looks (a pipe, another process than the first).
    self._bar = tqdm(
      total=total,
      initial=start,
      unit="step",
      dynamic_ncols=True,
      disable=None if self._writes else True,
    )
    self._board = None
    if self._writes:
      kept = [row for row in read(workdir) if row["step"] <= start]
      whole = self._path.with_name(FILE + ".tmp")
      whole.write_text("".join(_line(row) for row in kept))
      whole.replace(self._path)  # At once: a kill loses no history.
      if "://" not in os.fspath(workdir):
        self._board = tensorboardX.SummaryWriter(
          os.fspath(workdir), max_queue=1000, purge_step=start + 1
        )

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    """Adds a row; a number that is not finite is written as null."""
    if not self._writes:
      return
    row = {"step": step, "time": round(time.time(), 3), **metrics}
    if "://" in os.fspath(self._path):
      self._path.write_text(self._path.read_text() + _line(row))
    else:
      try:
        with open(self._path, "a", encoding="utf-8") as file:
          file.write(_line(row))
      except OSError as error:  # Once open, the file is not named.
        raise OSError(error.errno, error.strerror, str(self._path)) from error
    for name, value in metrics.items():
      if self._board is not None and math.isfinite(value) and self._heard():
        self._board.add_scalar(name, value, step)

  def _heard(self) -> bool:
    """Whether TensorBoard's thread lives; a full disk ends it."""
    writer: Any = self._board.file_writer if self._board else None
    return writer.event_writer._worker.is_alive()

  def advance(self) -> None:
    """Moves the bar by one step."""
    self._bar.update()

  def status(self, step: int, text: str) -> None:
    """Shows how it goes: at the bar's end, or as a line where no bar is."""
    self._bar.set_postfix_str(text)
    if self._bar.disable:
      self.say(f"step {step}: {text}")

  def say(self, text: str) -> None:
    """Prints a line without breaking the bar."""
    if self._writes:
      tqdm.write(text)

  def close(self) -> None:
    """Flushes everything."""
    self._bar.close()
    if self._board is not None:
      try:
        self._board.close()
      except OSError as error:  # It must not hide why the run ends.
        logging.warning("TensorBoard's log is not complete: %s", error)


def read(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """The rows that a run has logged, oldest first.

  Lines that are no rows, as after a kill, are left out.
  """
  path = epath.Path(workdir) / FILE
  rows = []
  if path.exists():
    for line in path.read_text().splitlines():
      with contextlib.suppress(json.JSONDecodeError):
        row = json.loads(line)
        if isinstance(row, dict) and isinstance(row.get("step"), int):
          rows.append(row)
  return rows


def mean(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
  """The mean of each metric over steps, leaving out players that rested."""
  out = {}
  for name in rows[0]:
    values = np.asarray([row[name] for row in rows], np.float64)
    seen = values[~np.isnan(values)]
    out[name] = float(seen.mean()) if seen.size else math.nan
  return out


def _line(row: Mapping[str, Any]) -> str:
  clean = {
    k: None if isinstance(v, float) and not math.isfinite(v) else v
    for k, v in row.items()
  }
  return json.dumps(clean) + "\n"
