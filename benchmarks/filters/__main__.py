"""Times each filter against its peers and writes what came out.

python -m benchmarks.filters [--filters=gaussian,median] [--quick]

A peer that is not installed is named in the table and is no error; `pip install
-e .[peers]` brings them all. The exit status is 1 if a result differs from that
of a peer that computes the same. Ratios are worth something on a machine that
does nothing else.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
import sys
from typing import Any

import jax

from benchmarks import command as line
from benchmarks.filters import Case, report, step, timing
from benchmarks.filters.cases import CASES

RESULTS, PART = line.places("filters")


def measure(
  case: Case,
  count: int,
  *,
  rates: timing.Rates,
  rounds: int,
  size: int = 224,
  least: float = timing.LEAST,
) -> report.Row:
  """Compares and times one case; what goes wrong is told in the row.

  Args:
    case: What to measure.
    count: Number of images.
    rates: The machine's.
    rounds: How often each call gets its turn.
    size: Pixels of an image's side.
    least: Seconds of a turn.

  Returns:
    The row of the tables.
  """
  row = report.Row(case.name, count)
  try:
    setup = case.build(timing.pictures(count, size))
    arrays = jax.device_put(setup.arguments)
    jitted = jax.jit(setup.ours)
    jax.clear_caches()
    ours = setup.call or (lambda: jitted(*arrays))
    row.first_call_s = timing.once(ours)
    compiled = jitted.lower(*arrays).compile()
    memory: Any = compiled.memory_analysis()
    row.temporary_mb = memory.temp_size_in_bytes / 1e6
    result = timing.values(ours())
  except Exception as error:
    row.error = line.wrong(error)
    return row
  seconds, row.limit_by = timing.limit(setup.work, rates)
  row.limit_ms = 1e3 * seconds / count
  row.goals = setup.goals
  calls: dict[str, Callable[[], Any]] = {"": ours}
  for name, peer in setup.peers.items():
    row.peers[name], call = report.compared(
      peer,
      lambda raw, margin=peer.margin: timing.difference(
        result, timing.values(raw), margin=margin
      ),
    )
    if call is not None:
      calls[name] = call
  times = timing.interleaved(calls, rounds=rounds, least=least)
  row.put_times(times, count=count)
  return row


def run(
  cases: Sequence[Case], *, rounds: int, quick: bool, with_step: bool
) -> Mapping[str, Any]:
  """Measures everything; what `report.markdown` and `report.data` take."""
  size, least = (96, 1e-3) if quick else (224, timing.LEAST)
  busy = line.load()
  rates = timing.measure_rates(quick=quick)
  rows = []
  for case in cases:
    for count in sorted({min(n, 3) if quick else n for n in case.batches}):
      row = measure(
        case, count, rates=rates, rounds=rounds, size=size, least=least
      )
      rows.append(row)
      line.show(row, label=f"{row.case}, {count}")
  share = step.measure(rounds=min(rounds, 5)) if with_step else None
  return {
    "rows": rows,
    "rates": rates,
    "share": share,
    "busy": busy,
    "size": size,
  }


def main(arguments: Sequence[str] | None = None) -> int:
  """The command line; gives the exit status."""
  given = line.read(
    arguments,
    name="filters",
    doc=__doc__,
    names=sorted(case.name.split()[0] for case in CASES),
    tiny="images",
    rounds=9,
    flag="filters",
    more={
      "--step": {
        "action": argparse.BooleanOptionalAction,
        "help": "the training step too; done if everything is measured",
      }
    },
  )
  with_step = given.options.step
  measured = run(
    [case for case in CASES if given.takes(case.name)],
    rounds=given.rounds,
    quick=given.quick,
    with_step=given.whole if with_step is None else with_step,
  )
  about: dict[str, Any] = {**given.about, **measured}
  page, numbers = report.markdown(**about), report.data(**about)
  rows = measured["rows"]
  return line.write(given, page, numbers, rows, whole=RESULTS, part=PART)


if __name__ == "__main__":
  # First calls are measured, and some users keep a cache.
  jax.config.update("jax_enable_compilation_cache", False)
  sys.exit(main())
