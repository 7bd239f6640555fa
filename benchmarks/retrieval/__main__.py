"""Times search and query expansion against their peers.

python -m benchmarks.retrieval [--cases=top_k,encoder] [--quick]

A peer that is not installed is named in the table and is no error; faiss and
torch have to be in the environment for their columns. The exit status is 1 if a
result differs from that of a peer. Ratios are worth something on a machine that
does nothing else; the whole takes 10 GB and some minutes.
"""

import argparse
from collections.abc import Mapping, Sequence
import dataclasses
import datetime
import gc
import importlib.metadata
import json
import os
import pathlib
import sys
import time
from typing import Any

import jax

from benchmarks.filters import report, timing
from benchmarks.retrieval import QUICK, Case, Size, difference, recall, values
from benchmarks.retrieval.cases import CASES, forget

RESULTS = pathlib.Path(__file__).parent.parent / "results" / "retrieval"
# What is not the whole table does not overwrite the one in the repository.
PART = pathlib.Path("runs/benchmarks/retrieval")
LIBRARIES = ("Python", "jax", "jaxlib", "numpy", "torch")


@dataclasses.dataclass
class Row(report.Row):
  """A case; `recall` is the share of the exact rows that it finds."""

  recall: float | None = None


def measure(
  case: Case, size: Size, *, rounds: int, least: float = timing.LEAST
) -> Row:
  """Compares and times one case; what goes wrong is told in the row.

  Args:
    case: What to measure.
    size: Of the data.
    rounds: How often each call gets its turn.
    least: Seconds of a turn.

  Returns:
    The row of the tables.
  """
  row = Row(case.name, 1)
  try:
    setup = case.build(size)
    jax.clear_caches()
    began = time.perf_counter()
    result = values(timing.wait(setup.ours()))
    row.first_call_s = time.perf_counter() - began
    if setup.compiled is not None:
      used: Any = setup.compiled().memory_analysis()
      row.temporary_mb = used.temp_size_in_bytes / 1e6
    if setup.exact is not None:
      row.recall = recall(result, setup.exact())
  except Exception as error:
    row.error = f"{type(error).__name__}: {error}".splitlines()[0]
    return row
  row.goals, calls = setup.goals, {"": setup.ours}
  for name, peer in setup.peers.items():
    row.peers[name], call = report.compared(
      peer, lambda raw: difference(result, values(raw))
    )
    if call is not None:
      calls[name] = call
  row.put_times(timing.interleaved(calls, rounds=rounds, least=least))
  return row


def run(cases: Sequence[Case], *, rounds: int, quick: bool) -> list[Row]:
  """Measures everything, a line on the screen for each case."""
  rows = []
  for case in cases:
    row = measure(
      case,
      QUICK if quick else Size(),
      rounds=rounds,
      least=1e-3 if quick else timing.LEAST,
    )
    rows.append(row)
    if "1,000,000" in case.name:
      forget()
    gc.collect()
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


def versions() -> dict[str, str]:
  """Of Python, JAX and the peers that are there."""
  found = report.versions()
  there = {name: found[name] for name in LIBRARIES if name in found}
  for package in ("faiss-cpu", "faiss-gpu"):
    try:
      there["faiss"] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      continue
  return there


def markdown(
  rows: Sequence[Row], *, command: str, date: str, busy: float, size: Size
) -> str:
  """The whole page.

  Args:
    rows: In the order of the tables.
    command: What was typed.
    date: Of the run.
    busy: How many other processes ran when the measurements began.
    size: Of the data.

  Returns:
    GitHub's Markdown.
  """
  columns = list(dict.fromkeys(name for row in rows for name in row.peers))
  fast = [
    [
      row.case, report.spell(row.ms),
      *(report.ratio(row.peers.get(name)) for name in columns),
      report.fastest(row), report.spell(row.recall, ".4f"), report.goal(row),
    ]
    for row in rows
  ]  # fmt: skip
  large = [
    [row.case, report.spell(row.temporary_mb), report.spell(row.first_call_s)]
    for row in rows
  ]
  wrong = [f"- {row.case}: {text}" for row in rows for text in row.failures]
  lines = [
    "# Search and query expansion against their peers",
    "",
    f"`{command}`",
    "",
    f"{report.device()}; "
    + ", ".join(f"{k} {v}" for k, v in versions().items())
    + f"; {date}; load at the start {busy:.1f}.",
    "",
    *(["**Failed:**", "", *wrong, ""] if wrong else []),
    f"Searches: top {size.k} of {size.queries} queries among {size.small:,} "
    f"rows (large: {size.large:,}) of {size.dim} numbers, called without jit, "
    "with all checks. Encoder: "
    f"{size.tokens} tokens of {size.width}, {size.layers} layers, float32. "
    "`ms` is the minimum over rounds. Each peer's column holds our time by its "
    "time, the median over rounds in which all take turns: below 1 we are "
    "faster. Results were compared before anything was timed; `~` marks a peer "
    "that computes something else (float32 beside rows that are stored in "
    "fewer bits). `faiss` is IndexFlatIP as it comes, `faiss tuned` the same "
    "with distance_compute_blas_threshold at 1000, `NumPy` a product with "
    "argpartition. Recall is the share of the exact rows that are found. Goals "
    "were set before the functions were written.",
    "",
    *report.table(
      ["case", "ms", *columns, "fastest peer, ms", "recall", "goals"], fast
    ),
    "",
    "Temporary memory is what the compiler reserves between input and output. "
    "The first call traces and compiles, without a cache.",
    "",
    *report.table(["case", "temporary MB", "first call, s"], large),
    "",
  ]
  return "\n".join(lines)


def data(
  rows: Sequence[Row], *, command: str, date: str, busy: float, size: Size
) -> Mapping[str, Any]:
  """The same for programs; numbers that are not finite become None."""
  return report.finite(
    {
      "command": command,
      "device": report.device(),
      "versions": versions(),
      "date": date,
      "load_at_start": busy,
      "size": size._asdict(),
      "rows": [dataclasses.asdict(row) for row in rows],
    }
  )


def main(arguments: Sequence[str] | None = None) -> int:
  """The command line; gives the exit status."""
  names = list(dict.fromkeys(case.name.split()[0] for case in CASES))
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.retrieval",
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
    "--quick", action="store_true", help="tiny databases: does it run?"
  )
  given = parser.parse_args(arguments)
  chosen = [name for name in given.cases.split(",") if name]
  if unknown := sorted(set(chosen) - set(names)):
    parser.error(f"no cases {', '.join(unknown)}; there are: {names}")
  if given.rounds is not None and given.rounds < 1:
    parser.error(f"--rounds must be at least 1, got {given.rounds}.")
  whole = not chosen and not given.quick
  words = sys.argv[1:] if arguments is None else arguments
  about: dict[str, Any] = {
    "command": " ".join(["python -m benchmarks.retrieval", *words]),
    "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    "busy": os.getloadavg()[0],
    "size": QUICK if given.quick else Size(),
  }
  rows = run(
    [c for c in CASES if not chosen or c.name.split()[0] in chosen],
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
