"""Times LiDAR segmentation against its peers and writes what came out.

python -m benchmarks.lidar [--cases=knn,block] [--quick]

A peer that is not installed is named in the table and is no error; torch has to
be in the environment for its columns. The exit status is 1 if a result differs
from that of a peer. Ratios are worth something on a machine that does nothing
else.
"""

import argparse
from collections.abc import Sequence
import sys

import jax

from benchmarks import command as line
from benchmarks.filters import report, timing
from benchmarks.lidar import QUICK, Case, Size, difference, memory, values
from benchmarks.lidar.cases import CASES

RESULTS, PART = line.places("lidar")


def measure(
  case: Case,
  size: Size,
  *,
  rounds: int,
  least: float = timing.LEAST,
  with_memory: bool = True,
) -> report.Row:
  """Compares and times one case; what goes wrong is told in the row.

  Args:
    case: What to measure.
    size: Of the scan and its image.
    rounds: How often each call gets its turn.
    least: Seconds of a turn.
    with_memory: Whether torch's memory is measured, each in a process.

  Returns:
    The row of the tables.
  """
  row = report.Row(case.name, 1)
  line.measure(
    row,
    lambda: case.build(size),
    values,
    difference,
    rounds=rounds,
    least=least,
  )
  for name, peer in row.peers.items():
    if with_memory and name.endswith("torch") and peer.ms is not None:
      peer.temporary_mb = memory.measure(case.name, name, quick=size == QUICK)
  return row


def run(cases: Sequence[Case], *, rounds: int, quick: bool) -> list[report.Row]:
  """Measures everything, a line on the screen for each case."""
  rows = []
  for case in cases:
    row = measure(
      case,
      QUICK if quick else Size(),
      rounds=rounds,
      least=1e-3 if quick else timing.LEAST,
      with_memory=not quick,
    )
    rows.append(row)
    line.show(row)
  return rows


def markdown(
  rows: Sequence[report.Row],
  *,
  command: str,
  date: str,
  busy: float,
  size: Size,
) -> str:
  """The whole page.

  Args:
    rows: In the order of the tables.
    command: What was typed.
    date: Of the run.
    busy: How many other processes ran when the measurements began.
    size: Of the scan and its image.

  Returns:
    GitHub's Markdown.
  """
  columns = line.columns(rows)
  fast = [
    [
      row.case, report.spell(row.ms),
      report.spell(1e3 / row.ms if row.ms else None, ".3g"),
      *(report.ratio(row.peers.get(name)) for name in columns),
      report.fastest(row), report.goal(row),
    ]
    for row in rows
  ]  # fmt: skip
  large = [
    [
      row.case, report.spell(row.temporary_mb),
      report.spell(_theirs(row)),
      report.spell(_by(row.temporary_mb, _theirs(row))),
      report.spell(row.first_call_s),
    ]
    for row in rows
  ]  # fmt: skip
  versions = report.versions()
  lines = [
    *line.head(
      rows,
      title="LiDAR segmentation against its peers",
      command=command,
      versions={k: versions[k] for k in _LIBRARIES if k in versions},
      date=date,
      busy=busy,
    ),
    f"One scan of {size.points:,} points, range images of {size.height} x "
    f"{size.width} (blocks: {size.height} x {size.block}, 32 channels), "
    "float32. `ms` is the minimum over rounds. Each peer's column holds our "
    "time by its time, the median over rounds in which all take turns: below 1 "
    "we are faster. Results were compared before anything was timed. The peers "
    "are written from the equations, as the public code computes them: NumPy "
    "sorts the points by range, torch (eager) unfolds, takes the k nearest and "
    "scatters votes; its networks have our weights by their public names. "
    "Goals were set before the functions were written.",
    "",
    *report.table(
      ["case", "ms", "per second", *columns, "fastest peer, ms", "goals"], fast
    ),
    "",
    "Temporary memory is what our compiler reserves between input and output; "
    "of torch it is how far the resident memory (on GPUs, what is allocated) "
    "rises in a call. The first call traces and compiles, without a cache.",
    "",
    *report.table(
      ["case", "temporary MB", "torch's MB", "ratio", "first call, s"], large
    ),
    "",
  ]
  return "\n".join(lines)


_LIBRARIES = ("Python", "jax", "jaxlib", "numpy", "torch")


data = line.data


def _theirs(row: report.Row) -> float | None:
  return next(
    (p.temporary_mb for p in row.peers.values() if p.temporary_mb), None
  )


def _by(ours: float | None, theirs: float | None) -> float | None:
  return ours / theirs if ours is not None and theirs else None


def main(arguments: Sequence[str] | None = None) -> int:
  """The command line; gives the exit status."""
  hidden = {"default": "", "help": argparse.SUPPRESS}
  given = line.read(
    arguments,
    name="lidar",
    doc=__doc__,
    names=(case.name for case in CASES),
    tiny="images",
    more={"--memory": hidden, "--peer": hidden},
  )
  size = QUICK if given.quick else Size()
  if given.options.memory:  # Of `memory.measure`.
    (case,) = [case for case in CASES if case.name == given.options.memory]
    print(memory.of_call(case.build(size).peers[given.options.peer]))
    return 0
  about = {**given.about, "busy": line.load(), "size": size}
  rows = run(
    [
      case
      for case in CASES
      if given.takes(case.name) and (case.quick or not given.quick)
    ],
    rounds=given.rounds,
    quick=given.quick,
  )
  page, numbers = markdown(rows, **about), data(rows, **about)
  return line.write(given, page, numbers, rows, whole=RESULTS, part=PART)


if __name__ == "__main__":
  # First calls are measured, and some users keep a cache.
  jax.config.update("jax_enable_compilation_cache", False)
  sys.exit(main())
