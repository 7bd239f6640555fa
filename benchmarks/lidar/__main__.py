"""Times LiDAR segmentation against its peers and writes what came out.

python -m benchmarks.lidar [--cases=knn,block] [--quick]

A peer that is not installed is named in the table and is no error; torch has to
be in the environment for its columns. The exit status is 1 if a result differs
from that of a peer. Ratios are worth something on a machine that does nothing
else.
"""

import argparse
from collections.abc import Mapping, Sequence
import dataclasses
import datetime
import json
import os
import pathlib
import sys
import time
from typing import Any

import jax

from benchmarks.filters import report, timing
from benchmarks.lidar import QUICK, Case, Size, difference, memory, values
from benchmarks.lidar.cases import CASES

RESULTS = pathlib.Path(__file__).parent.parent / "results" / "lidar"
# What is not the whole table does not overwrite the one in the repository.
PART = pathlib.Path("runs/benchmarks/lidar")


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
  try:
    setup = case.build(size)
    arrays = jax.device_put(setup.arguments)
    jax.clear_caches()
    began = time.perf_counter()
    compiled = jax.jit(setup.ours).lower(*arrays).compile()
    ours = lambda: compiled(*arrays)
    timing.wait(ours())
    row.first_call_s = time.perf_counter() - began
    used: Any = compiled.memory_analysis()
    row.temporary_mb = used.temp_size_in_bytes / 1e6
    result = values(setup.read(ours()))
  except Exception as error:
    row.error = f"{type(error).__name__}: {error}".splitlines()[0]
    return row
  row.goals, calls = setup.goals, {"": ours}
  for name, peer in setup.peers.items():
    row.peers[name], call = report.compared(
      peer, lambda raw: difference(result, values(setup.read(raw)))
    )
    if call is not None:
      calls[name] = call
  row.put_times(timing.interleaved(calls, rounds=rounds, least=least))
  for name in calls:
    if with_memory and name.endswith("torch"):
      row.peers[name].temporary_mb = memory.measure(
        case.name, name, quick=size == QUICK
      )
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
    print(
      f"{row.case}: "
      + (f"{row.ms:.3g} ms" if row.ms else "")
      + "".join(
        f"  {name} x{peer.ratio:.2g}"
        for name, peer in row.peers.items()
        if peer.ratio is not None
      )
      + "".join(f"  FAILED {text}" for text in row.failures),
      flush=True,
    )
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
  columns = list(dict.fromkeys(name for row in rows for name in row.peers))
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
  wrong = [f"- {row.case}: {text}" for row in rows for text in row.failures]
  versions = report.versions()
  there = {k: versions[k] for k in _LIBRARIES if k in versions}
  lines = [
    "# LiDAR segmentation against its peers",
    "",
    f"`{command}`",
    "",
    f"{report.device()}; "
    + ", ".join(f"{k} {v}" for k, v in there.items())
    + f"; {date}; load at the start {busy:.1f}.",
    "",
    *(["**Failed:**", "", *wrong, ""] if wrong else []),
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


def data(
  rows: Sequence[report.Row],
  *,
  command: str,
  date: str,
  busy: float,
  size: Size,
) -> Mapping[str, Any]:
  """The same for programs; numbers that are not finite become None."""
  return report.finite(
    {
      "command": command,
      "device": report.device(),
      "versions": report.versions(),
      "date": date,
      "load_at_start": busy,
      "size": size._asdict(),
      "rows": [dataclasses.asdict(row) for row in rows],
    }
  )


def _theirs(row: report.Row) -> float | None:
  return next(
    (p.temporary_mb for p in row.peers.values() if p.temporary_mb), None
  )


def _by(ours: float | None, theirs: float | None) -> float | None:
  return ours / theirs if ours is not None and theirs else None


def main(arguments: Sequence[str] | None = None) -> int:
  """The command line; gives the exit status."""
  names = list(dict.fromkeys(case.name.split()[0] for case in CASES))
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.lidar",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    "--cases", default="", help=f"some of {', '.join(names)}; all if left out"
  )
  parser.add_argument("--rounds", type=int, help="7, or 2 with --quick")
  parser.add_argument(
    "--output", type=pathlib.Path, help="where the files' names begin"
  )
  parser.add_argument(
    "--quick", action="store_true", help="tiny images: does it run?"
  )
  parser.add_argument("--memory", default="", help=argparse.SUPPRESS)
  parser.add_argument("--peer", default="", help=argparse.SUPPRESS)
  given = parser.parse_args(arguments)
  size = QUICK if given.quick else Size()
  if given.memory:  # Of `memory.measure`.
    (case,) = [case for case in CASES if case.name == given.memory]
    print(memory.of_call(case.build(size).peers[given.peer]))
    return 0
  chosen = [name for name in given.cases.split(",") if name]
  if unknown := sorted(set(chosen) - set(names)):
    parser.error(f"no cases {', '.join(unknown)}; there are: {names}")
  if given.rounds is not None and given.rounds < 1:
    parser.error(f"--rounds must be at least 1, got {given.rounds}.")
  whole = not chosen and not given.quick
  words = sys.argv[1:] if arguments is None else arguments
  about: dict[str, Any] = {
    "command": " ".join(["python -m benchmarks.lidar", *words]),
    "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    "busy": os.getloadavg()[0],
    "size": size,
  }
  rows = run(
    [
      case
      for case in CASES
      if (not chosen or case.name.split()[0] in chosen)
      and (case.quick or not given.quick)
    ],
    rounds=given.rounds or (2 if given.quick else 7),
    quick=given.quick,
  )
  text = markdown(rows, **about)
  output = given.output or (RESULTS if whole else PART)
  name = f"{output.name}-{report.slug(report.device())}"
  output.parent.mkdir(parents=True, exist_ok=True)
  (output.parent / f"{name}.md").write_text(text, encoding="utf-8")
  lines = json.dumps(data(rows, **about), indent=1, ensure_ascii=False) + "\n"
  (output.parent / f"{name}.json").write_text(lines, encoding="utf-8")
  print("\n" + text)
  return int(any(row.failures for row in rows))


if __name__ == "__main__":
  # First calls are measured, and some users keep a cache.
  jax.config.update("jax_enable_compilation_cache", False)
  sys.exit(main())
