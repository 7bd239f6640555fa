"""The table of the measurements, for people and as JSON."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import importlib.metadata
import math
import os
import platform
import re
from typing import Any

import jax

from benchmarks import machine
from benchmarks.filters import Peer, peers, step, timing

MISSING = "\N{EN DASH}"
NOT_INSTALLED = "not installed"


@dataclasses.dataclass
class Beside:
  """A peer in a row.

  Attributes:
    state: "equal", "other definition", "not installed", or what went wrong.
    difference: The largest, where results were compared.
    ms: Per image, the minimum over rounds.
    ratio: Our time by its time, the median over rounds.
    rounds: How many there were.
    temporary_mb: The most memory of one call, where that was measured.
  """

  state: str
  difference: float | None = None
  ms: float | None = None
  ratio: float | None = None
  rounds: int = 0
  temporary_mb: float | None = None

  @property
  def failed(self) -> bool:
    """Whether it neither agrees nor is known to differ."""
    return self.state not in ("equal", "other definition", NOT_INSTALLED)


@dataclasses.dataclass
class Row:
  """A case for one number of images."""

  case: str
  images: int
  ms: float | None = None
  peers: dict[str, Beside] = dataclasses.field(default_factory=dict)
  goals: Mapping[str, float] = dataclasses.field(default_factory=dict)
  limit_ms: float | None = None
  limit_by: str = ""
  temporary_mb: float | None = None
  first_call_s: float | None = None
  error: str = ""

  @property
  def failures(self) -> list[str]:
    """What went wrong, in words."""
    wrong = [
      f"{name}: {peer.state}"
      for name, peer in self.peers.items()
      if peer.failed
    ]
    return ([self.error] if self.error else []) + wrong

  def reached(self, goal: str) -> float | None:
    """The number that a goal is about."""
    if goal == "ms":
      return self.ms
    if goal == "MB":
      return self.temporary_mb
    return self.peers[goal].ratio if goal in self.peers else None

  def put_times(
    self, times: Mapping[str, Sequence[float]], *, count: int = 1
  ) -> None:
    """Takes what `timing.interleaved` measured.

    Args:
      times: Ours under the name "", and the peers'.
      count: Of images in a call.
    """
    ours = times[""]
    self.ms = 1e3 * min(ours) / count
    for name, each in times.items():
      if name:
        beside = self.peers[name]
        beside.ms, beside.rounds = 1e3 * min(each) / count, len(each)
        beside.ratio = timing.ratio(ours, each)


def compared(
  peer: Peer, difference: Callable[[Any], float]
) -> tuple[Beside, Callable[[], Any] | None]:
  """What became of a peer, and its call if it is to be timed.

  Args:
    peer: Any.
    difference: Of its result to ours.
  """
  try:
    call = peer.make()
  except ImportError:
    return Beside(NOT_INSTALLED), None
  try:
    apart = difference(call())
  except Exception as error:
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    return Beside(f"does not run ({text})"), None
  if peer.tolerance is None:
    return Beside("other definition"), call
  if not apart <= peer.tolerance:
    text = f"differs by {apart:.3g}, allowed is {peer.tolerance:g}"
    return Beside(text, apart), None
  return Beside("equal", apart), call


def device() -> str:
  """What the filters run on, in words that name no machine."""
  if jax.default_backend() != "cpu":
    return jax.devices()[0].device_kind
  name = machine.processor() or platform.machine()
  count = (
    len(os.sched_getaffinity(0))
    if hasattr(os, "sched_getaffinity")
    else os.cpu_count()
  )
  return f"{name}, {count} cores"


def slug(text: str) -> str:
  """The text as a part of a file's name."""
  return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def versions() -> dict[str, str]:
  """Of Python, JAX and every peer that is there."""
  found = {"Python": platform.python_version()}
  ours = {name: (name,) for name in ("jax", "jaxlib", "numpy")}
  for name, packages in (ours | peers.PACKAGES).items():
    for package in packages:
      try:
        found[name] = importlib.metadata.version(package)
        break
      except importlib.metadata.PackageNotFoundError:
        continue
  return found


def spell(value: float | None, form: str = ".2f") -> str:
  """At least two digits that count, whatever the size."""
  if value is None:
    return MISSING
  if form == ".2f" and 0 < abs(value) < 0.1:
    return f"{value:.2g}"
  return f"{value:{form}}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
  """Markdown's lines of a table, numbers to the right."""
  rule = ["---", *("---:" for _ in head[1:])]
  return [
    "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |"
    for line in (head, rule, *rows)
  ]


def ratio(peer: Beside | None) -> str:
  """A peer's cell: our time by its time, or why there is none."""
  if peer is None:
    return MISSING
  if peer.failed:
    return "**wrong**"
  if peer.state == NOT_INSTALLED:
    return NOT_INSTALLED
  return ("~" if peer.state == "other definition" else "") + spell(peer.ratio)


def fastest(row: Row) -> str:
  """The fastest peer and its milliseconds."""
  timed = {k: p.ms for k, p in row.peers.items() if p.ms is not None}
  if not timed:
    return MISSING
  name = min(timed, key=lambda k: timed[k])
  return f"{name} {spell(timed[name])}"


def goal(row: Row) -> str:
  """The goals, and whether they are met."""
  cells = []
  for name, most in row.goals.items():
    reached = row.reached(name)
    unit = f" {name}" if name in ("ms", "MB") else ""
    label = "" if unit else f"{name} "
    verdict = "met" if reached is not None and reached <= most else "**missed**"
    if reached is None:
      verdict = "not measured"
    cells.append(f"{label}≤ {most:g}{unit}: {verdict}")
  return ", ".join(cells) or MISSING


def markdown(
  rows: Sequence[Row],
  *,
  command: str,
  date: str,
  rates: timing.Rates,
  share: step.Share | None,
  busy: float,
  size: int,
) -> str:
  """The whole page.

  Args:
    rows: In the order of the tables.
    command: What was typed.
    date: Of the run.
    rates: The machine's.
    share: Of diffusion in a training step, where that was measured.
    busy: How many other processes ran when the measurements began.
    size: Pixels of an image's side.

  Returns:
    GitHub's Markdown.
  """
  columns = [c for c in peers.PACKAGES if any(c in row.peers for row in rows)]
  columns += sorted({c for row in rows for c in row.peers} - set(columns))
  fast = [
    [
      row.case, str(row.images), spell(row.ms),
      *(ratio(row.peers.get(name)) for name in columns),
      fastest(row), goal(row),
    ]
    for row in rows
  ]  # fmt: skip
  slow = [
    [
      row.case, str(row.images), spell(row.ms), spell(row.limit_ms),
      row.limit_by or MISSING,
      spell(
        row.ms / row.limit_ms if row.ms and row.limit_ms else None, ".1f"
      ),
      spell(row.temporary_mb), spell(row.first_call_s),
    ]
    for row in rows
  ]  # fmt: skip
  wrong = [
    f"- {row.case}, {row.images} images: {text}"
    for row in rows
    for text in row.failures
  ]
  there = versions()
  lines = [
    "# Filters against their peers",
    "",
    f"`{command}`",
    "",
    f"{device()}; "
    + ", ".join(f"{k} {v}" for k, v in there.items())
    + f"; {date}; load at the start {busy:.1f}.",
    "",
    *(["**Failed:**", "", *wrong, ""] if wrong else []),
    f"Images of {size} x {size} x 3 float32 unless the name says otherwise "
    "(the threshold's are grey, uint8). `ms` is the minimum over rounds, per "
    "image. Each peer's column holds our time by its time, the median over "
    "rounds in which all take turns: below 1 we are faster. Results were "
    "compared before anything was timed; `~` marks a peer that computes "
    "something else (other neighbours, windows or borders). Peers are called "
    "as their users do, with their own number of threads, and in a Python "
    "loop where they know no batches; Kornia and torch run where JAX does, "
    "the others on the CPU. Goals were set before the filters were written.",
    "",
    *table(
      ["case", "images", "ms", *columns, "fastest peer, ms", "goals"], fast
    ),
    "",
    "The limit is what the machine needs on paper (the counts are in "
    "`benchmarks/filters/cases.py`) for the term that takes longest, at the "
    "rates measured at the start: "
    f"{rates.bytes / 1e9:.0f} GB/s read and written, "
    f"{rates.ops / 1e9:.0f} G operations/s, {rates.exps / 1e9:.1f} G "
    f"exponentials/s, {rates.flops / 1e9:.0f} GFLOP/s in products of matrices. "
    "Temporary memory is what the compiler reserves between input and output; "
    "the first call traces and compiles, without a cache.",
    "",
    *table(
      [
        "case", "images", "ms", "limit, ms", "by", "times the limit",
        "temporary MB", "first call, s",
      ],
      slow,
    ),
    "",
  ]  # fmt: skip
  if share is not None:
    verdict = "met" if share.share <= share.goal else "**missed**"
    lines += [
      f"Diffusion of the batch as a share of a training step: {share.network}, "
      f"{share.images} images, {share.dtype}, SGD with momentum: "
      f"{1e3 * share.diffusion:.1f} ms of {1e3 * share.step:.0f} ms, "
      f"{100 * share.share:.2f} % (goal ≤ {100 * share.goal:g} %: {verdict}).",
      "",
    ]
  return "\n".join(lines)


def data(
  rows: Sequence[Row],
  *,
  command: str,
  date: str,
  rates: timing.Rates,
  share: step.Share | None,
  busy: float,
  size: int,
) -> dict[str, Any]:
  """The same for programs; numbers that are not finite become None."""
  return finite(
    {
      "command": command,
      "device": device(),
      "versions": versions(),
      "date": date,
      "load_at_start": busy,
      "size": size,
      "rates": rates._asdict(),
      "rows": [dataclasses.asdict(row) for row in rows],
      "share_of_step": share._asdict() if share else None,
    }
  )


def finite(value: Any) -> Any:
  """The same without numbers that JSON lacks."""
  if isinstance(value, Mapping):
    return {k: finite(v) for k, v in value.items()}
  if isinstance(value, list):
    return [finite(v) for v in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None  # JSON has no NaN.
  return value
