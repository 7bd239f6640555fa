"""Pictures of LiDAR scans: range images and views from above, by class.

Drawn without a display. Colors are RGB, 0..255, one row per class.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
import numpy as np

EMPTY = np.array((20, 20, 20), np.uint8)
WRONG = np.array((230, 60, 50), np.uint8)
RIGHT = np.array((90, 110, 120), np.uint8)


def paint(
  labels: np.ndarray, colors: np.ndarray, mask: Any = True
) -> np.ndarray:
  """The color of each label, dark where the mask is 0.

  Args:
    labels: Any shape; numbers of classes.
    colors: `[classes, 3]`.
    mask: Of the labels' shape.

  Returns:
    uint8 `[..., 3]`.
  """
  colors = np.asarray(colors, np.uint8)
  painted = colors[np.clip(labels, 0, len(colors) - 1)]
  return np.where(np.asarray(mask, bool)[..., None], painted, EMPTY)


def difference(
  labels: np.ndarray, truth: np.ndarray, mask: Any = True
) -> np.ndarray:
  """Red where a labelled pixel or point is named wrongly.

  Args:
    labels: What was said.
    truth: Of the same shape; 0 where nobody knows.
    mask: Where there is something.

  Returns:
    uint8 `[..., 3]`.
  """
  known = np.asarray(mask, bool) & (truth > 0)
  wrong = known & (labels != truth)
  out = np.where(known[..., None], RIGHT, EMPTY)
  return np.where(wrong[..., None], WRONG, out)


def depth(ranges: np.ndarray, mask: np.ndarray) -> np.ndarray:
  """A range image in grey, near things bright, on a logarithmic scale.

  Args:
    ranges: `[height, width]`, metres.
    mask: Where there is a return.

  Returns:
    uint8 `[height, width, 3]`.
  """
  near = np.log(np.clip(np.where(mask, ranges, 1.0), 1.0, 80.0)) / np.log(80.0)
  grey = np.repeat((255 - 215 * near)[..., None], 3, axis=-1).astype(np.uint8)
  return np.where(mask[..., None], grey, EMPTY)


def sheet(rows: Mapping[str, np.ndarray]) -> Figure:
  """Range images below one another, each under its name.

  Args:
    rows: Names to uint8 `[height, width, 3]`, all of one shape.

  Returns:
    The figure; pixels are stretched upwards, as beams are few.
  """
  tall = _height(rows)
  figure = Figure(figsize=(9.5, tall * len(rows)), layout="constrained")
  axes = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
  _show(axes, rows)
  return figure


def from_above(
  points: np.ndarray,
  painted: Mapping[str, np.ndarray],
  *,
  classes: Sequence[str] = (),
  colors: np.ndarray | None = None,
  radius: float = 40.0,
) -> Figure:
  """Points seen from above, once for each way of painting them.

  Args:
    points: `[points, 3]`, metres; the sensor looks along +x, which is up here.
    painted: Names to uint8 `[points, 3]`.
    classes: Names for the legend; those given are shown.
    colors: Of these classes, `[classes, 3]`.
    radius: Metres from the sensor to the edge of the picture.

  Returns:
    The figure.
  """
  width = 4.6 * len(painted) + (1.6 if len(classes) else 0.0)
  figure = Figure(figsize=(width, 4.8), layout="constrained")
  axes = figure.subplots(1, len(painted), squeeze=False)[0]
  for panel, (name, rgb) in zip(axes, painted.items(), strict=True):
    _scatter(panel, points, rgb, radius)
    panel.set_title(f"{name} (from above, {2 * radius:.0f} m)", fontsize=9)
  _legend(figure, classes, colors)
  return figure


def overview(
  rows: Mapping[str, np.ndarray],
  points: np.ndarray,
  rgb: np.ndarray,
  *,
  classes: Sequence[str],
  colors: np.ndarray,
  radius: float = 40.0,
) -> Figure:
  """One scan on one page: its range images, and below the points from above.

  Args:
    rows: As in `sheet`.
    points: As in `from_above`.
    rgb: Their colors, uint8 `[points, 3]`.
    classes: As in `from_above`.
    colors: As in `from_above`.
    radius: As in `from_above`.

  Returns:
    The figure.
  """
  tall = _height(rows)
  figure = Figure(figsize=(11, tall * len(rows) + 7.2), layout="constrained")
  ratios = [tall] * len(rows) + [7.0]
  axes = figure.subplots(len(ratios), 1, height_ratios=ratios)
  _show(axes[:-1], rows)
  _scatter(axes[-1], points, rgb, radius)
  axes[-1].set_title(f"from above, {2 * radius:.0f} m", fontsize=9)
  _legend(figure, classes, colors)
  return figure


def _stretch(shape: Sequence[int]) -> float:
  """How much taller than wide a pixel is drawn, as beams are few."""
  return max(1.0, shape[1] / shape[0] / 8)


def _height(rows: Mapping[str, np.ndarray]) -> float:
  """Inches of one range image with its title."""
  shape = next(iter(rows.values())).shape
  return 9.5 / shape[1] * shape[0] * _stretch(shape) + 0.3


def _show(axes: Iterable[Axes], rows: Mapping[str, np.ndarray]) -> None:
  for panel, (name, picture) in zip(axes, rows.items(), strict=True):
    panel.imshow(
      picture, aspect=_stretch(picture.shape), interpolation="nearest"
    )
    panel.set_title(name, fontsize=9, loc="left")
    panel.set_axis_off()


def _scatter(
  panel: Axes, points: np.ndarray, rgb: np.ndarray, radius: float
) -> None:
  shown = np.isfinite(points).all(-1) & (np.abs(points[:, :2]) < radius).all(-1)
  # High points last, as from above they hide what is below.
  order = np.flatnonzero(shown)[np.argsort(points[shown, 2])]
  panel.scatter(
    -points[order, 1],
    points[order, 0],
    c=rgb[order] / 255.0,
    s=0.8 if len(order) > 20_000 else 2.5,
    linewidths=0,
  )
  panel.set_facecolor(tuple(EMPTY / 255.0))
  panel.set_xlim(-radius, radius)
  panel.set_ylim(-radius, radius)
  panel.set_aspect("equal")
  panel.set_xticks([])
  panel.set_yticks([])


def _legend(
  figure: Figure, classes: Sequence[str], colors: np.ndarray | None
) -> None:
  if colors is None or not len(classes):
    return
  patches = [
    Patch(color=tuple(color / 255.0), label=name)
    for name, color in zip(classes, colors, strict=True)
  ]
  figure.legend(handles=patches, loc="outside right center", fontsize=7)


def bars(values: Mapping[str, float], *, label: str) -> Figure:
  """A bar per class, best first; classes without a number are left out.

  Args:
    values: Fractions by name.
    label: What they are.

  Returns:
    The figure.
  """
  known = {name: v for name, v in values.items() if np.isfinite(v)}
  names = sorted(known, key=known.__getitem__)
  figure = Figure(figsize=(5.5, 0.24 * len(names) + 0.9), layout="constrained")
  axes = figure.subplots()
  axes.barh(names, [known[name] for name in names])
  axes.set_xlim(0, 1)
  axes.set_xlabel(label)
  axes.tick_params(axis="y", labelsize=8)
  axes.grid(axis="x", alpha=0.3)
  return figure
