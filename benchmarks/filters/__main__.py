"""Times each filter against its peers and writes what came out.

python -m benchmarks.filters [--filters=gaussian,median] [--quick]

A peer that is not installed is named in the table and is no error; `pip install
-e .[peers]` brings them all. The exit status is 1 if a result differs from that
of a peer that computes the same. Ratios are worth something on a machine that
does nothing else.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
import datetime
import json
import os
import pathlib
import sys
from typing import Any

import jax

from benchmarks.filters import Case, report, step, timing
from benchmarks.filters.cases import CASES

RESULTS = pathlib.Path(__file__).parent.parent / "results" / "filters"
# What is not the whole table does not overwrite the one in the repository.
PART = pathlib.Path("runs/benchmarks/filters")


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
    row.error = f"{type(error).__name__}: {error}".splitlines()[0]
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
  busy = os.getloadavg()[0]
  rates = timing.measure_rates(quick=quick)
  rows = []
  for case in cases:
    for count in sorted({min(n, 3) if quick else n for n in case.batches}):
      row = measure(
        case, count, rates=rates, rounds=rounds, size=size, least=least
      )
      rows.append(row)
      print(
        f"{row.case}, {count}: "
        + (f"{row.ms:.3g} ms" if row.ms else "")
        + "".join(
          f"  {name} x{peer.ratio:.2g}"
          for name, peer in row.peers.items()
          if peer.ratio is not None
        )
        + "".join(f"  FAILED {text}" for text in row.failures),
        flush=True,
      )
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
  names = sorted({case.name.split()[0] for case in CASES})
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.filters",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    "--filters", default="", help=f"some of {', '.join(names)}; all if left out"
  )
  parser.add_argument("--rounds", type=int, help="9, or 2 with --quick")
  parser.add_argument(
    "--output", type=pathlib.Path, help="where the files' names begin"
  )
  parser.add_argument(
    "--quick", action="store_true", help="tiny images: does it run?"
  )
  parser.add_argument(
    "--step",
    action=argparse.BooleanOptionalAction,
    help="the training step too; done if everything is measured",
  )
  given = parser.parse_args(arguments)
  chosen = [name for name in given.filters.split(",") if name]
  if unknown := sorted(set(chosen) - set(names)):
    parser.error(f"no filters {', '.join(unknown)}; there are: {names}")
  if given.rounds is not None and given.rounds < 1:
    parser.error(f"--rounds must be at least 1, got {given.rounds}.")
  whole = not chosen and not given.quick
  words = sys.argv[1:] if arguments is None else arguments
  measured = run(
    [c for c in CASES if not chosen or c.name.split()[0] in chosen],
    rounds=given.rounds or (2 if given.quick else 9),
    quick=given.quick,
    with_step=whole if given.step is None else given.step,
  )
  about: dict[str, Any] = {
    "command": " ".join(["python -m benchmarks.filters", *words]),
    "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    **measured,
  }
  text = report.markdown(**about)
  output = given.output or (RESULTS if whole else PART)
  name = f"{output.name}-{report.slug(report.device())}"
  output.parent.mkdir(parents=True, exist_ok=True)
  (output.parent / f"{name}.md").write_text(text, encoding="utf-8")
  lines = json.dumps(report.data(**about), indent=1, ensure_ascii=False) + "\n"
  (output.parent / f"{name}.json").write_text(lines, encoding="utf-8")
  print("\n" + text)
  return int(any(row.failures for row in measured["rows"]))


if __name__ == "__main__":
  # First calls are measured, and some users keep a cache.
  jax.config.update("jax_enable_compilation_cache", False)
  sys.exit(main())
