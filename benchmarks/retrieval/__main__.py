"""Times search and query expansion against their peers.

python -m benchmarks.retrieval [--cases=top_k,encoder] [--quick]

A peer that is not installed is named in the table and is no error; faiss and
torch have to be in the environment for their columns. The exit status is 1 if a
result differs from that of a peer. Ratios are worth something on a machine that
does nothing else; the whole takes 10 GB and some minutes.
"""

from collections.abc import Sequence
import dataclasses
import gc
import importlib.metadata
import sys
import time
from typing import Any

import jax

from benchmarks import command as line
from benchmarks.filters import report, timing
from benchmarks.retrieval import QUICK, Case, Size, difference, recall, values
from benchmarks.retrieval.cases import CASES, forget

RESULTS, PART = line.places("retrieval")
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
    row.error = line.wrong(error)
    return row
  row.goals = setup.goals
  apart = lambda raw: difference(result, values(raw))
  line.compete(row, setup.ours, setup.peers, apart, rounds=rounds, least=least)
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
    line.show(row)
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
  columns = line.columns(rows)
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
  lines = [
    *line.head(
      rows,
      title="Search and query expansion against their peers",
      command=command,
      versions=versions(),
      date=date,
      busy=busy,
    ),
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


def data(rows: Sequence[Row], **about: Any) -> Any:
  """The same for programs."""
  return line.data(rows, versions=versions(), **about)


def main(arguments: Sequence[str] | None = None) -> int:
  """The command line; gives the exit status."""
  given = line.read(
    arguments,
    name="retrieval",
    doc=__doc__,
    names=(case.name for case in CASES),
    tiny="databases",
  )
  size = QUICK if given.quick else Size()
  about = {**given.about, "busy": line.load(), "size": size}
  rows = run(
    [case for case in CASES if given.takes(case.name)],
    rounds=given.rounds,
    quick=given.quick,
  )
  page, numbers = markdown(rows, **about), data(rows, **about)
  return line.write(given, page, numbers, rows, whole=RESULTS, part=PART)


if __name__ == "__main__":
  # First calls are measured, and some users keep a cache.
  jax.config.update("jax_enable_compilation_cache", False)
  sys.exit(main())
