"""What all tables against peers share: their command line, rows and files."""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import datetime
import json
import os
import pathlib
import sys
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.filters import Peer, report, timing


class Given(NamedTuple):
  """What was asked for.

  Attributes:
    chosen: Names of cases; none for all of them.
    rounds: How often each call gets its turn.
    quick: Whether all is tiny.
    whole: Whether it is the table that the repository keeps.
    output: Where the files' names begin, if that was said.
    about: The command and the date, for the page.
    options: Everything as it was parsed.
  """

  chosen: tuple[str, ...]
  rounds: int
  quick: bool
  whole: bool
  output: pathlib.Path | None
  about: dict[str, Any]
  options: argparse.Namespace

  def takes(self, name: str) -> bool:
    """Whether a case is wanted, by the first word of its name."""
    return not self.chosen or name.split(maxsplit=1)[0] in self.chosen


def read(
  arguments: Sequence[str] | None,
  *,
  name: str,
  doc: str | None,
  names: Iterable[str],
  tiny: str,
  rounds: int = 7,
  flag: str = "cases",
  more: Mapping[str, Mapping[str, Any]] | None = None,
) -> Given:
  """Reads a command line; a wrong one ends the process.

  Args:
    arguments: The words; None for those of the process.
    name: Of the table, a module beside this one.
    doc: What --help tells first.
    names: Of the cases; their first words can be chosen.
    tiny: What --quick makes small.
    rounds: How many there are unless the command says so.
    flag: What the option is called that chooses.
    more: Further options of this table alone.
  """
  program = f"python -m benchmarks.{name}"
  parser = argparse.ArgumentParser(
    prog=program,
    description=doc,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  known = list(dict.fromkeys(name.split()[0] for name in names))
  parser.add_argument(
    f"--{flag}",
    default="",
    help=f"some of {', '.join(known)}; all if left out",
  )
  parser.add_argument("--rounds", type=int, help=f"{rounds}, or 2 with --quick")
  parser.add_argument(
    "--output", type=pathlib.Path, help="where the files' names begin"
  )
  parser.add_argument(
    "--quick", action="store_true", help=f"tiny {tiny}: does it run?"
  )
  for option, settings in (more or {}).items():
    parser.add_argument(option, **settings)
  given = parser.parse_args(arguments)
  chosen = [name for name in getattr(given, flag).split(",") if name]
  if unknown := sorted(set(chosen) - set(known)):
    parser.error(f"no {flag} {', '.join(unknown)}; there are: {known}")
  if given.rounds is not None and given.rounds < 1:
    parser.error(f"--rounds must be at least 1, got {given.rounds}.")
  words = sys.argv[1:] if arguments is None else arguments
  return Given(
    tuple(chosen),
    given.rounds or (2 if given.quick else rounds),
    given.quick,
    not chosen and not given.quick,
    given.output,
    {
      "command": " ".join([program, *words]),
      "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    },
    given,
  )


def measure(
  row: report.Row,
  build: Callable[[], Any],
  values: Callable[[Any], np.ndarray],
  difference: Callable[[np.ndarray, np.ndarray], float],
  *,
  rounds: int,
  least: float,
) -> Any:
  """Compiles, compares and times a case; what goes wrong is told in the row.

  Args:
    row: Gets what comes out.
    build: Gives what has `ours`, a function, its `arguments`, `peers`, `goals`
      and what is to be `read` of a result.
    values: Of what was read.
    difference: Of two of those.
    rounds: How often each call gets its turn.
    least: Seconds of a turn.

  Returns:
    What was built, None if there is none.
  """
  try:
    setup = build()
    arrays = jax.device_put(setup.arguments)
    jax.clear_caches()
    began = time.perf_counter()
    program = jax.jit(setup.ours).lower(*arrays).compile()
    ours = lambda: program(*arrays)
    timing.wait(ours())
    row.first_call_s = time.perf_counter() - began
    used: Any = program.memory_analysis()
    row.temporary_mb = used.temp_size_in_bytes / 1e6
    result = values(setup.read(ours()))
  except Exception as error:
    row.error = wrong(error)
    return None
  row.goals = setup.goals
  apart = lambda raw: difference(result, values(setup.read(raw)))
  compete(row, ours, setup.peers, apart, rounds=rounds, least=least)
  return setup


def wrong(error: Exception) -> str:
  """What is told of an error, in one line."""
  return f"{type(error).__name__}: {error}".splitlines()[0]


def compete(
  row: report.Row,
  ours: Callable[[], Any],
  peers: Mapping[str, Peer],
  difference: Callable[[Any], float],
  *,
  rounds: int,
  least: float,
) -> None:
  """Compares with peers and times all in turns.

  Args:
    row: Gets what comes out.
    ours: Our call.
    peers: By the name of their column.
    difference: Of a peer's result to ours.
    rounds: How often each call gets its turn.
    least: Seconds of a turn.
  """
  calls = {"": ours}
  for name, peer in peers.items():
    row.peers[name], call = report.compared(peer, difference)
    if call is not None:
      calls[name] = call
  row.put_times(timing.interleaved(calls, rounds=rounds, least=least))


def show(row: report.Row, *, label: str = "") -> None:
  """A line on the screen."""
  print(
    f"{label or row.case}: "
    + (f"{row.ms:.3g} ms" if row.ms else "")
    + "".join(
      f"  {name} x{peer.ratio:.2g}"
      for name, peer in row.peers.items()
      if peer.ratio is not None
    )
    + "".join(f"  FAILED {text}" for text in row.failures),
    flush=True,
  )


def columns(rows: Sequence[report.Row]) -> list[str]:
  """The peers, in the order in which they first come."""
  return list(dict.fromkeys(name for row in rows for name in row.peers))


def head(
  rows: Sequence[report.Row],
  *,
  title: str,
  command: str,
  versions: Mapping[str, str],
  date: str,
  busy: float,
) -> list[str]:
  """The lines that a page begins with.

  Args:
    rows: Whose failures are told first.
    title: Of the page.
    command: What was typed.
    versions: Of what took part.
    date: Of the run.
    busy: How many other processes ran when the measurements began.
  """
  failed = [f"- {row.case}: {text}" for row in rows for text in row.failures]
  there = ", ".join(f"{name} {number}" for name, number in versions.items())
  return [
    f"# {title}",
    "",
    f"`{command}`",
    "",
    f"{report.device()}; {there}; {date}; load at the start {busy:.1f}.",
    "",
    *(["**Failed:**", "", *failed, ""] if failed else []),
  ]


def data(
  rows: Sequence[report.Row],
  *,
  command: str,
  date: str,
  busy: float,
  size: Any,
  versions: Mapping[str, str] | None = None,
) -> Mapping[str, Any]:
  """A page for programs; numbers that are not finite become None.

  Args:
    rows: In the order of the tables.
    command: What was typed.
    date: Of the run.
    busy: How many other processes ran when the measurements began.
    size: Of the cases, a named tuple.
    versions: Of what took part; without it of all that is there.
  """
  return report.finite(
    {
      "command": command,
      "device": report.device(),
      "versions": report.versions() if versions is None else versions,
      "date": date,
      "load_at_start": busy,
      "size": size._asdict(),
      "rows": [dataclasses.asdict(row) for row in rows],
    }
  )


def write(
  given: Given,
  page: str,
  numbers: Mapping[str, Any],
  rows: Sequence[report.Row],
  *,
  whole: pathlib.Path,
  part: pathlib.Path,
) -> int:
  """Writes both files and shows the page.

  Args:
    given: Of the command line.
    page: GitHub's Markdown.
    numbers: The same for programs.
    rows: What was measured.
    whole: Where the names begin for the whole table.
    part: The same for what must not overwrite it.

  Returns:
    The exit status: 1 if anything went wrong.
  """
  output = given.output or (whole if given.whole else part)
  name = f"{output.name}-{report.slug(report.device())}"
  output.parent.mkdir(parents=True, exist_ok=True)
  (output.parent / f"{name}.md").write_text(page, encoding="utf-8")
  lines = json.dumps(numbers, indent=1, ensure_ascii=False) + "\n"
  (output.parent / f"{name}.json").write_text(lines, encoding="utf-8")
  print("\n" + page)
  return int(any(row.failures for row in rows))


def places(name: str) -> tuple[pathlib.Path, pathlib.Path]:
  """Where the whole table goes, in the repository, and where a part of it."""
  results = pathlib.Path(__file__).parent / "results"
  return results / name, pathlib.Path("runs/benchmarks") / name


def load() -> float:
  """How many processes run, just now."""
  return os.getloadavg()[0]
