"""Numbers of one run that are drawn into one figure with those of others.

An evaluator says what it would plot; which runs there are, and which of them
can share axes, is seen here. Drawn without a display.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:  # Drawing is not needed to train.
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

# Those of the curves in report.html.
COLORS = ("#0b6bcb", "#d9541e", "#2a9154", "#8a4fd0", "#b58900", "#c2407c")
MARKERS = "osD^vP"


@dataclasses.dataclass(frozen=True)
class Plot:
  """What one run brings to a figure.

  Attributes:
    kind: "lines": values over numbers; "bars": values by name, upright;
      "rows": the same lying, one marker for each.
    places: The numbers or names, which runs must share to be drawn together.
    values: One for each place, NaN for none.
    place: What the places are.
    value: What the values are.
    whole: One value for all places, drawn through all rows.
    other: What the rest up to 1 is, where values are shares.
  """

  kind: Literal["lines", "bars", "rows"]
  places: Sequence[float] | Sequence[str]
  values: Sequence[float]
  place: str
  value: str
  whole: float | None = None
  other: str = ""

  def __post_init__(self):
    if len(self.places) != len(self.values):
      raise ValueError(
        "values must be as many as places, got "
        f"{len(self.values)} and {len(self.places)}."
      )


def draw(plots: Mapping[str, Plot], *, title: str = "") -> "Figure":
  """Plots of the same places, as one figure.

  Args:
    plots: By the name of the run, which the legend shows; alone, a plot needs
      none.
    title: Above the axes.

  Returns:
    The figure; the caller saves it.
  """
  from matplotlib.figure import Figure  # noqa: PLC0415 (takes a second)

  if not plots:
    raise ValueError("plots must hold one plot or more, got none.")
  first = next(iter(plots.values()))
  count = len(first.places)
  size = {
    "lines": (5.5, 3.6),
    "bars": (max(5.5, 1.5 + 0.16 * count * (2 + len(plots))), 3.6),
    "rows": (5.5, 0.25 * count + 1.2 + 0.2 * (len(plots) > 1)),
  }[first.kind]
  figure = Figure(figsize=size, layout="constrained")
  axes = figure.subplots()
  {"lines": _lines, "bars": _bars, "rows": _rows}[first.kind](axes, plots)
  if title:
    axes.set_title(title, fontsize=9)
  if len(plots) > 1:
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
  return figure


def figures(runs: Mapping[str, Mapping[str, Plot]]) -> "dict[str, Figure]":
  """One figure for each plot that two runs or more can share.

  Args:
    runs: Plots by name, by run.

  Returns:
    Figures by the name of the plot. Of runs whose places differ, such as other
    classes, the most that agree are drawn, and the title names the others.
  """
  out = {}
  for name in dict.fromkeys(n for plots in runs.values() for n in plots):
    having = {run: plots[name] for run, plots in runs.items() if name in plots}
    groups: dict[object, dict[str, Plot]] = {}
    for run, plot in having.items():
      groups.setdefault((plot.kind, tuple(plot.places)), {})[run] = plot
    most = max(groups.values(), key=len)
    if len(most) > 1:
      others = [run for run in having if run not in most]
      title = name
      if others:
        unit = next(iter(most.values())).place
        title += f" (of another {unit}: {', '.join(others)})"
      out[name] = draw(most, title=title)
  return out


def _colors(number: int) -> str:
  return COLORS[number % len(COLORS)]


def _lines(axes: "Axes", plots: Mapping[str, Plot]) -> None:
  for i, (run, plot) in enumerate(plots.items()):
    style = "-" if i < len(COLORS) else "--"
    places = np.asarray(plot.places, np.float64)
    axes.plot(
      places,
      plot.values,
      style,
      color=_colors(i),
      marker=MARKERS[i % len(MARKERS)],
      markersize=5,
      label=run,
    )
  first = next(iter(plots.values()))
  axes.set_xticks(list(first.places), [f"{p:g}" for p in first.places])
  axes.set(xlabel=first.place, ylabel=first.value, ylim=_limits(plots))
  axes.grid(alpha=0.3)


def _bars(axes: "Axes", plots: Mapping[str, Plot]) -> None:
  width = 0.8 / len(plots)
  for i, (run, plot) in enumerate(plots.items()):
    left = np.arange(len(plot.places)) + (i - len(plots) / 2) * width
    axes.bar(
      left,
      plot.values,
      0.92 * width,
      align="edge",
      color=_colors(i),
      hatch="" if i < len(COLORS) else "//",
      label=run,
    )
  first = next(iter(plots.values()))
  names = [str(place) for place in first.places]
  turned = sum(map(len, names)) > 45
  axes.set_xticks(
    range(len(names)),
    names,
    rotation=35 if turned else 0,
    ha="right" if turned else "center",
    fontsize=8,
  )
  axes.set(ylabel=first.value, ylim=_limits(plots))
  axes.grid(axis="y", alpha=0.3)
  axes.set_axisbelow(True)


def _rows(axes: "Axes", plots: Mapping[str, Plot]) -> None:
  for i, (run, plot) in enumerate(plots.items()):
    axes.scatter(
      plot.values,
      np.arange(len(plot.places)),
      s=32,
      color=_colors(i),
      marker=MARKERS[i % len(MARKERS)],
      alpha=0.85,
      label=run,
      zorder=3,
    )
    if plot.whole is not None and math.isfinite(plot.whole):
      axes.axvline(plot.whole, linestyle="--", color=_colors(i))
  first = next(iter(plots.values()))
  names = [str(place) for place in first.places]
  axes.set_yticks(range(len(names)), names, fontsize=8)
  axes.set(xlim=(-0.02, 1.02), ylim=(len(names) - 0.5, -0.5))
  axes.set_xlabel(first.value + " (dashed: all)" * (first.whole is not None))
  if first.other:
    rest = lambda share: 1 - share
    above = axes.secondary_xaxis("top", functions=(rest, rest))
    above.set_xlabel(first.other)
  axes.grid(axis="y", alpha=0.3)


def _limits(plots: Mapping[str, Plot]) -> tuple[float, float]:
  """From 0 to 1, or as far as the values go."""
  values = np.concatenate([np.asarray(p.values, float) for p in plots.values()])
  values = values[np.isfinite(values)]
  return min(0.0, *values, 0.0), max(1.0, *values, 1.0)
