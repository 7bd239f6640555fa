"""Times the shape bench against its peers and writes what came out.

python -m benchmarks.shape [--cases=step,attack] [--quick]

A peer that is not installed is named in the table and is no error; torch has to
be in the environment for its columns. The exit status is 1 if a result differs
from that of a peer that computes the same. Ratios are worth something on a
machine that does nothing else.
"""

from collections.abc import Sequence
import itertools
import sys
from typing import Any

import jax

from benchmarks import command as line
from benchmarks.filters import report, timing
from benchmarks.shape import QUICK, Case, Size, difference, values
from benchmarks.shape.cases import CASES, EPSILON, SEVERITY

RESULTS, PART = line.places("shape")
_LIBRARIES = ("Python", "jax", "jaxlib", "numpy", "torch", "Pillow")


def measure(
  case: Case, size: Size, *, rounds: int, least: float = timing.LEAST
) -> report.Row:
  """Compares and times one case; what goes wrong is told in the row.

  Args:
    case: What to measure.
    size: Of the data.
    rounds: How often each call gets its turn.
    least: Seconds of a turn.

  Returns:
    The row of the tables.
  """
  row = report.Row(case.name, 1)

  def build() -> Any:
    setup = case.build(size)
    row.images = setup.images
    return setup

  line.measure(row, build, values, difference, rounds=rounds, least=least)
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
    size: Of the data.

  Returns:
    GitHub's Markdown.
  """
  versions = report.versions()
  lines = [
    *line.head(
      rows,
      title="The shape bench against its peers",
      command=command,
      versions={k: versions[k] for k in _LIBRARIES if k in versions},
      date=date,
      busy=busy,
    ),
    "`ms` is the minimum over rounds, for all images of a call. Each peer's "
    "column holds our time by its time, the median over rounds in which all "
    "take turns: below 1 we are faster. Results were compared before anything "
    "was timed; `~` marks what computes something else. Everything is float32; "
    "torch is eager, written from the equations, and has our weights by their "
    "public names.",
    "",
  ]
  for kind, group in itertools.groupby(rows, lambda row: row.case.split()[0]):
    lines += _table(list(group), _about(kind, size))
  lines += [
    "Temporary memory is what the compiler reserves between input and output. "
    "The first call traces and compiles, without a cache.",
    "",
    *report.table(
      ["case", "temporary MB", "first call, s"],
      [
        [
          row.case,
          report.spell(row.temporary_mb),
          report.spell(row.first_call_s),
        ]
        for row in rows
      ],
    ),
    "",
  ]
  return "\n".join(lines)


def _table(rows: Sequence[report.Row], about: str) -> list[str]:
  columns = line.columns(rows)
  cells = [
    [
      row.case, str(row.images), report.spell(row.ms),
      report.spell(1e3 * row.images / row.ms if row.ms else None, ".3g"),
      *(report.ratio(row.peers.get(name)) for name in columns),
    ]
    for row in rows
  ]  # fmt: skip
  head = ["case", "images", "ms", "images/s", *columns]
  return [about, "", *report.table(head, cells), ""]


def _about(kind: str, size: Size) -> str:
  """What the cases of a kind have in common."""
  side = f"{size.side} x {size.side}"
  return {
    "step": f"Training steps on {side} pixels: the paper's objective, an image "
    "and two styles of it by matched statistics in three forward passes; the "
    "plain step is cross-entropy of the images alone, with the same network, "
    "optimizer and augmentation. Images are counted once, not per view. Small "
    f"is a ResNet-8 of width {size.small}, deep {size.network} of width "
    f"{size.width}.",
    "adain": "AdaIN, VGG-19 to relu4_1 and its mirror, of width "
    f"{size.width}; large is {size.large} x {size.large} pixels, small {side}.",
    "statistics": "Restyling without a network, of the same images.",
    "attack": f"Attacks on {size.network} of width {size.width}, {side} "
    f"pixels, epsilon {EPSILON:g} of 0..255; equal if what is added differs by "
    "1 % on average, after several steps by 3 % (on GPUs, where both round "
    "products, by 50 %).",
    "mmsi": f"The loss and its gradient, of {size.rows} x {size.channels} "
    "numbers; images are rows.",
    "corruption": f"Corruptions at severity {SEVERITY}, {size.pixels} x "
    f"{size.pixels} pixels; PIL and NumPy go image by image, or at once.",
  }.get(kind, "")


data = line.data


def main(arguments: Sequence[str] | None = None) -> int:
  """The command line; gives the exit status."""
  given = line.read(
    arguments,
    name="shape",
    doc=__doc__,
    names=(case.name for case in CASES),
    tiny="images and networks",
  )
  size = QUICK if given.quick else Size()
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
