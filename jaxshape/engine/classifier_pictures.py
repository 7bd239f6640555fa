"""What evaluators of classifiers draw, from rows and tables.

Drawn without a display.
"""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import math

from matplotlib.figure import Figure
import numpy as np

from jaxshape.data import stream
from jaxshape.engine import comparison, report
from jaxshape.metrics import classification, published

# Images in a row of a sheet.
COLUMNS = 8
SHAPE, TEXTURE, NEITHER = comparison.COLORS[0], comparison.COLORS[1], "#666666"


def decisions(
  data: Callable[[], stream.Batches],
  rows: Mapping[str, np.ndarray],
  classes: Sequence[str],
  *,
  most: int,
) -> Figure | None:
  """Images whose shape and texture disagree, and what they were named.

  Args:
    data: Batches with "image" and "index"; read until all that are shown are
      found.
    rows: "index", "shape", "texture" and "prediction" of what was evaluated.
    classes: Names of the numbers; those outside are none.
    most: So many images at most, evenly from the first to the last.

  Returns:
    The images with their shape, texture and name above them, by the colour of
    what decided; None where there is none in conflict.
  """
  conflict = (rows["texture"] >= 0) & (rows["texture"] != rows["shape"])
  places = np.flatnonzero(conflict & (rows["shape"] >= 0))
  spaced = np.linspace(0, len(places) - 1, min(most, len(places)))
  chosen = {int(rows["index"][i]): i for i in places[spaced.astype(int)]}
  images: dict[int, np.ndarray] = {}
  with contextlib.closing(data()) as batches:
    while len(images) < len(chosen) and (batch := next(batches, None)):
      numbers = np.asarray(batch["index"]).tolist()
      for number, image in zip(numbers, batch["image"], strict=True):
        if number in chosen:
          images[number] = np.asarray(image)
  shown = sorted(images)  # Of several processes each has read its own.
  if not shown:
    return None
  titles, colors = [], []
  for number in shown:
    shape, texture, named = (
      int(rows[name][chosen[number]])
      for name in ("shape", "texture", "prediction")
    )
    names = [
      classes[n].replace("_", " ") if 0 <= n < len(classes) else "none"
      for n in (shape, texture, named)
    ]
    titles.append(" / ".join(names))
    colors.append({texture: TEXTURE, shape: SHAPE}.get(named, NEITHER))
  blank = [None] * (-len(shown) % min(COLUMNS, len(shown)))
  sheet = report.image_sheet(
    _lines([*(images[number] for number in shown), *blank]),
    titles=_lines([*titles, *blank]),
    inches=1.8,
  )
  for axes, color in zip(sheet.axes, colors, strict=False):
    axes.title.set(color=color, fontsize=7)
  sheet.suptitle(
    "shape / texture / named (blue: by its shape, orange: by its texture)",
    fontsize=9,
  )
  return sheet


def beside(
  own: float, others: Sequence[published.Value], *, value: str
) -> Figure:
  """A number among those that others have published.

  Args:
    own: A fraction; left out if it is none.
    others: With their sources.
    value: What the numbers are.

  Returns:
    Bars in order, the own one in colour.
  """
  rows = [(f"{x.name} ({x.source})", x.value) for x in others]
  if math.isfinite(own):
    rows.append(("this network", own))
  rows.sort(key=lambda row: row[1])
  names, values = zip(*rows, strict=True)
  figure = Figure(figsize=(7, 0.27 * len(rows) + 0.7), layout="constrained")
  axes = figure.subplots()
  colors = [SHAPE if name == "this network" else "#c4c4c4" for name in names]
  bars = axes.barh(range(len(rows)), values, color=colors)
  axes.bar_label(bars, [f"{100 * x:.1f}" for x in values], padding=3)
  axes.set_yticks(range(len(rows)), names, fontsize=8)
  axes.set_xlim(0, 1.12 * max(1.0, *values))
  axes.set_xlabel(f"{value} (at the bars: per cent)")
  return figure


def confusion(
  labels: np.ndarray, predictions: np.ndarray, classes: Sequence[str]
) -> Figure:
  """How often each class was taken for each other one.

  Args:
    labels: One number per image.
    predictions: Likewise.
    classes: Names of the numbers; many are not written.

  Returns:
    A table of shares of the true class.
  """
  table = np.asarray(
    classification.confusion_matrix(
      labels, predictions, num_classes=len(classes)
    ),
    np.float64,
  )
  table /= np.maximum(table.sum(axis=1, keepdims=True), 1)
  figure = Figure(figsize=(5, 4.5), layout="constrained")
  axes = figure.subplots()
  shown = axes.imshow(table, cmap="Blues", vmin=0, vmax=1)
  if len(classes) <= 32:
    axes.set_xticks(range(len(classes)), classes, rotation=90, fontsize=7)
    axes.set_yticks(range(len(classes)), classes, fontsize=7)
  axes.set_xlabel("named")
  axes.set_ylabel("true")
  figure.colorbar(shown, label="share of the true class")
  return figure


def calibration(confidence: np.ndarray, right: np.ndarray) -> Figure:
  """How often a network is right, by how sure it is.

  Args:
    confidence: One number per image, 0..1.
    right: 1 where it was right.

  Returns:
    Bars, and the line on which they would stand if it knew.
  """
  table = np.asarray(classification.reliability_table(confidence, right))
  bins = len(table)
  heights = table[:, 2] / np.maximum(table[:, 0], 1)
  figure = Figure(figsize=(4, 3.6), layout="constrained")
  axes = figure.subplots()
  edges = np.arange(bins) / bins
  axes.bar(edges, heights, width=1 / bins, align="edge", edgecolor="white")
  axes.plot([0, 1], [0, 1], "--", color="gray")
  axes.set_xlim(0, 1)
  axes.set_ylim(0, 1)
  axes.set_xlabel("confidence")
  axes.set_ylabel("accuracy")
  return figure


def curves(
  errors: Mapping[str, Sequence[float]], severities: Sequence[int]
) -> Figure:
  """Errors over severities.

  Args:
    errors: By name, one for each severity, NaN for none; what is called "mean"
      is dashed.
    severities: In any order.

  Returns:
    One line per name.
  """
  figure = Figure(figsize=(5.5, 3.6), layout="constrained")
  axes = figure.subplots()
  for name, row in errors.items():
    style = "k--" if name == "mean" else "o-"
    axes.plot(severities, row, style, label=name)
  axes.set_xticks(list(severities))
  axes.set_ylim(0, 1)
  axes.set_xlabel("severity")
  axes.set_ylabel("error")
  axes.legend(fontsize=7, ncols=2)
  return figure


def _lines(items: Sequence[object]) -> list[Sequence[object]]:
  return [items[i : i + COLUMNS] for i in range(0, len(items), COLUMNS)]
