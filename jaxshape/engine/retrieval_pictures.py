"""Pictures of a search: who is relevant, how many neighbours, who gains.

Drawn without a display.
"""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.patches import Patch
import numpy as np

from jaxshape.data.retrieval_examples import Truth
from jaxshape.metrics import retrieval as metrics

COLORS = {"easy": "#1a9850", "hard": "#91cf60", "junk": "#bbbbbb"}
OTHER = "#d73027"
SHOWN = 50


def rankings(
  truths: Sequence[Truth], before: np.ndarray, after: np.ndarray
) -> Figure:
  """The first rows of each ranking, by whether they are relevant.

  Args:
    truths: Of the queries.
    before: Similarities, [Q, N].
    after: The same with the expanded queries.

  Returns:
    Two columns of strips, one line per query.
  """
  figure = Figure(figsize=(9, 0.6 + 0.35 * len(before)), layout="constrained")
  for axes, scores, title in zip(
    figure.subplots(1, 2), (before, after), ("before", "after"), strict=True
  ):
    strips = np.array(
      [_strip(t, row) for t, row in zip(truths, scores, strict=False)]
    )
    axes.imshow(strips, aspect="auto", interpolation="nearest")
    axes.set_yticks(
      range(len(strips)), [f"query {i}" for i in range(len(strips))]
    )
    axes.set(title=f"ranking {title}", xlabel="rank")
    axes.tick_params(length=0, labelsize=8)
  figure.legend(
    handles=[
      Patch(color=color, label=name)
      for name, color in {**COLORS, "other": OTHER}.items()
    ],
    loc="outside lower center",
    ncols=4,
    fontsize=8,
  )
  return figure


def curves(found: Mapping[str, Mapping[int, float]], plain: float) -> Figure:
  """MAP over the number of neighbours (Fig. 3 of the paper).

  Args:
    found: Method -> number of neighbours -> mAP, 0..1.
    plain: mAP without expansion.

  Returns:
    One line per method.
  """
  figure = Figure(figsize=(6, 4), layout="constrained")
  axes = figure.subplots()
  for name, points in found.items():
    numbers = sorted(points)
    ours = name == "network"
    axes.plot(
      numbers,
      [100 * points[n] for n in numbers],
      marker=".",
      linestyle="-" if ours else "--",
      linewidth=2.5 if ours else 1.5,
      label=name,
    )
  axes.axhline(100 * plain, color="#888888", linewidth=1, label="no expansion")
  axes.set(xlabel="number of neighbours", ylabel="mAP (%)")
  axes.grid(alpha=0.3)
  axes.legend(fontsize=8)
  return figure


def groups(
  before: Mapping[str, np.ndarray],
  after: Mapping[str, Mapping[str, np.ndarray]],
  by: Mapping[tuple[str, str], np.ndarray],
) -> Figure:
  """Relative gain in groups of queries (Fig. 4 of the paper).

  Args:
    before: Average precisions without expansion, by protocol.
    after: The same, by method.
    by: What the queries are grouped by, at the percentiles 33 and 66, for
      pairs of a name and a protocol.

  Returns:
    One panel for each grouping.
  """
  figure = Figure(figsize=(4.2 * len(by), 3.4), layout="constrained")
  panels = figure.subplots(1, len(by), squeeze=False)[0]
  for axes, ((name, protocol), values) in zip(panels, by.items(), strict=True):
    for i, (method, aps) in enumerate(after.items()):
      gained = metrics.grouped_gain(before[protocol], aps[protocol], values)
      gains = 100 * np.asarray(gained.gain)
      places = np.arange(len(gains)) + (i - len(after) / 2 + 0.5) * 0.15
      axes.bar(places, gains, 0.14, label=method)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(3), ["low", "middle", "high"])
    label = {"relevant": "number of relevant rows", "ap": "AP before"}[name]
    axes.set(title=protocol, xlabel=label, ylabel="relative gain of mAP (%)")
  panels[0].legend(fontsize=8)
  return figure


def _strip(truth: Truth, scores: np.ndarray) -> np.ndarray:
  """Colors of the first rows, [SHOWN, 3]."""
  kinds = np.full(len(scores), 3)
  for number, rows in enumerate(truth):
    kinds[rows] = number
  first = np.argsort(-scores, kind="stable")[:SHOWN]
  colors = [*COLORS.values(), OTHER]
  return np.array(
    [[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in colors], np.uint8
  )[kinds[first]]
