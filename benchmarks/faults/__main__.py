"""Breaks training runs in every way a machine does, and compares their ends.

python -m benchmarks.faults [--kills=30] [--only=kill,disk] [--output=...]

A small system is trained through train.py, once unbroken and then again and
again killed, told to stop, starved of disk or given damaged files, and started
again until it ends. Every array of its last checkpoint and every number of its
log that no clock has measured must be those of the unbroken run, bit for bit.
The exit status is 1 if anything was lost, differs or was not said in one line.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
import contextlib
import datetime
import functools
import importlib.metadata
import os
import pathlib
import platform
import random
import signal
import sys
import tempfile
import time

from benchmarks.faults import Row, cases
from benchmarks.faults.lab import Lab, end_all

RESULTS = pathlib.Path(__file__).parent.parent / "results" / "faults.md"
# What is not the whole table does not overwrite the one in the repository.
PART = pathlib.Path("runs/benchmarks/faults.md")
KILLS = 30

Fault = tuple[str, Callable[[Row], None]]


def faults(
  folder: pathlib.Path, *, kills: int, seed: int
) -> tuple[Mapping[str, Fault], Lab]:
  """All faults by their short names, and the lab of most of them.

  Args:
    folder: For all runs.
    kills: How many, of one process alone.
    seed: Of the moments.
  """
  rng = random.Random(seed)
  lab = Lab(folder, rng=rng)
  pair = Lab(folder, rng=rng, name="two", processes=2, steps=40)
  data = folder / "pictures"
  cases.pictures(data)
  reader = Lab(folder, cases.folder_flags(data), rng=rng, name="folder")
  few = max(2, kills // 5)
  half = functools.partial(cases.damaged_file, lab)
  return {
    "kill": (
      "SIGKILL at random moments and in the middle of saves",
      lambda row: cases.kills(lab, row, count=kills),
    ),
    "term": (
      "SIGTERM at random moments and in the middle of saves",
      lambda row: cases.terminations(lab, row, count=2 * few),
    ),
    "pair": (
      "SIGKILL of one of two processes",
      lambda row: cases.one_of_two(pair, row, count=min(few, 4)),
    ),
    "pair_term": (
      "SIGTERM to one of two processes",
      lambda row: cases.one_of_two_told(pair, row, count=2),
    ),
    "disk": ("disk full while saving", lambda row: cases.disk_full(lab, row)),
    "truncated": (
      "a file of the newest checkpoint cut in half",
      lambda row: half(row, damage="truncated", count=3),
    ),
    "flipped": (
      "a bit of the newest checkpoint flipped",
      lambda row: half(row, damage="flipped", count=4),
    ),
    "emptied": (
      "the newest checkpoint's folder emptied",
      lambda row: half(row, damage="emptied", count=2),
    ),
    "read_only": (
      "a workdir that cannot be written",
      lambda row: cases.read_only(lab, row),
    ),
    "data": (
      "a data file that disappears",
      lambda row: cases.vanished_data(reader, row, data=data),
    ),
  }, lab


def measure(fault: Fault) -> Row:
  """Tries one fault; what breaks the harness itself counts as a failure."""
  text, function = fault
  row, began = Row(text), time.monotonic()
  try:
    function(row)
  except Exception as error:
    row.failures.append(f"not measured: {type(error).__name__}: {error}")
  row.seconds = time.monotonic() - began
  return row


def markdown(rows: Sequence[Row], *, command: str, lab: Lab) -> str:
  """The page."""
  want = lab.unbroken()
  lines = [
    "# What a run survives",
    "",
    f"`{command}`, {datetime.datetime.now(datetime.UTC).date()}; "
    f"{platform.machine()}, {os.cpu_count()} cores, Python "
    f"{platform.python_version()}, "
    + ", ".join(
      f"{name} {importlib.metadata.version(name)}"
      for name in ("jax", "flax", "orbax-checkpoint")
    )
    + ".",
    "",
    f"`train.py` on `texture_suppression:tiny`, {lab.steps} steps, a "
    f"checkpoint every {lab.save_every}; unbroken, it takes "
    f"{lab.seconds:.1f} s. After each fault the run is started "
    "again until it ends; then "
    f"{len(want.leaves)} arrays and {len(want.logged)} logged numbers are "
    "compared with those of the unbroken run, bit for bit.",
    "",
    "| fault | tries | what came out | seconds |",
    "|---|---:|---|---:|",
  ]
  for row in rows:
    found = f"not tried: {row.skipped}" if row.skipped else row.found
    if row.failures:
      found = f"**failed**: {found}"
    cells = row.fault, str(row.tries), found, f"{row.seconds:.0f}"
    lines.append("| " + " | ".join(c.replace("|", "/") for c in cells) + " |")
  if failures := [(r.fault, text) for r in rows for text in r.failures]:
    lines += ["", "**Failed:**", ""]
    lines += [f"- {fault}: {text}" for fault, text in failures]
  lines += [
    "",
    "A kill may cost the steps since the last finished save: up to "
    f"{lab.save_every}, or twice that if it hits a save under way. A stop by "
    "SIGTERM may cost none.",
    "",
  ]
  return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
  """The command line; gives the exit status."""
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.faults",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--kills", type=int, default=KILLS)
  parser.add_argument("--only", default="", help="some of the faults")
  parser.add_argument("--seed", type=int, default=0, help="of the moments")
  parser.add_argument("--output", type=pathlib.Path)
  given = parser.parse_args(arguments)
  if given.kills < 1:
    parser.error(f"--kills must be at least 1, got {given.kills}.")
  words = sys.argv[1:] if arguments is None else arguments
  with contextlib.ExitStack() as stack:
    folder = stack.enter_context(
      tempfile.TemporaryDirectory(prefix="faults-", ignore_cleanup_errors=True)
    )
    stack.callback(end_all)
    table, lab = faults(
      pathlib.Path(folder), kills=given.kills, seed=given.seed
    )
    chosen = [name for name in given.only.split(",") if name] or list(table)
    if unknown := sorted(set(chosen) - set(table)):
      parser.error(f"no faults {', '.join(unknown)}; there are: {list(table)}")
    rows = []
    for name in chosen:
      row = measure(table[name])
      rows.append(row)
      said = f"not tried: {row.skipped}" if row.skipped else row.found
      print(f"{name}: {said} ({row.seconds:.0f} s)", flush=True)
      for text in row.failures:
        print(f"  FAILED {text}", flush=True)
    text = markdown(
      rows, command=" ".join(["python -m benchmarks.faults", *words]), lab=lab
    )
    text = text.replace(str(pathlib.Path(folder).absolute()), "…")
  whole = set(chosen) == set(table) and given.kills >= KILLS
  output = given.output or (RESULTS if whole else PART)
  output.parent.mkdir(parents=True, exist_ok=True)
  output.write_text(text, encoding="utf-8")
  print("\n" + text)
  return int(any(row.failures for row in rows))


if __name__ == "__main__":
  os.environ.setdefault("JAX_PLATFORMS", "cpu")  # It only reads arrays.
  # Told to stop, it leaves neither runs nor mounts behind.
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
  sys.exit(main())
