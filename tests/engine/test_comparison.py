import math

import numpy as np
import pytest

from jaxshape.engine import comparison
from jaxshape.engine.comparison import Plot


def _plot(values, places=("cat", "dog"), kind="rows", **changes):
  given = {"place": "class", "value": "share", **changes}
  return Plot(kind, places, values, **given)


def test_rows_have_one_marker_per_run_and_class():
  plots = {
    "plain": _plot([0.2, math.nan], whole=0.3, other="texture"),
    "restyled": _plot([0.6, 0.8], whole=0.7, other="texture"),
  }
  axes = comparison.draw(plots, title="by class").axes[0]
  got = [np.ma.getdata(c.get_offsets()) for c in axes.collections]
  np.testing.assert_array_equal(
    got, [[[0.2, 0], [np.nan, 1]], [[0.6, 0], [0.8, 1]]]
  )
  assert [line.get_xdata()[0] for line in axes.lines] == [0.3, 0.7]
  assert [t.get_text() for t in axes.get_yticklabels()] == ["cat", "dog"]
  top, bottom = sorted(axes.get_ylim())
  assert axes.get_ylim() == (bottom, top)  # The first class is above.
  assert axes.child_axes[0].get_xlabel() == "texture"
  legend = axes.figure.legends[0]
  assert [t.get_text() for t in legend.get_texts()] == list(plots)
  colors = [tuple(c.get_facecolor()[0]) for c in axes.collections]
  assert len(set(colors)) == 2


def test_lines_and_bars_hold_the_values():
  lines = {
    "a": _plot([0.9, 0.5, 0.1], (0.0, 2.0, 8.0), "lines"),
    "b": _plot([0.8, 0.6, 0.4], (0.0, 2.0, 8.0), "lines"),
  }
  axes = comparison.draw(lines).axes[0]
  for line, (name, plot) in zip(axes.lines, lines.items(), strict=True):
    assert line.get_label() == name
    np.testing.assert_array_equal(line.get_xdata(), plot.places)
    np.testing.assert_array_equal(line.get_ydata(), plot.values)
  assert [t.get_text() for t in axes.get_xticklabels()] == ["0", "2", "8"]
  assert axes.get_ylim() == (0, 1)
  bars = {name: _plot([2.5, -0.5], kind="bars") for name in "abc"}
  axes = comparison.draw(bars).axes[0]
  places = [[bar.get_x() for bar in c] for c in axes.containers]
  assert len({x for row in places for x in row}) == 6
  for container in axes.containers:
    assert [bar.get_height() for bar in container] == [2.5, -0.5]
  assert axes.get_ylim() == (-0.5, 2.5)


def test_many_runs_are_still_told_apart():
  lines = {str(i): _plot([0, 1], (1, 2), "lines") for i in range(8)}
  drawn = comparison.draw(lines).axes[0].lines
  assert len({(line.get_color(), line.get_linestyle()) for line in drawn}) == 8


def test_only_runs_that_share_their_places_are_drawn_together():
  runs = {
    "a": {"by class": _plot([0.1, 0.2]), "alone": _plot([0.1, 0.2])},
    "other": {"by class": _plot([0.1], ("bird",))},
    "b": {"by class": _plot([0.3, 0.4])},
    "none": {},
  }
  figures = comparison.figures(runs)
  assert list(figures) == ["by class"]
  axes = figures["by class"].axes[0]
  assert [c.get_label() for c in axes.collections] == ["a", "b"]
  assert axes.get_title() == "by class (of another class: other)"
  assert comparison.figures({"a": runs["a"]}) == {}
  assert comparison.figures({"a": runs["a"], "other": runs["other"]}) == {}


def test_a_plot_alone_needs_no_legend():
  figure = comparison.draw({"": _plot([0.1, 0.2])})
  assert figure.legends == []
  with pytest.raises(ValueError, match="values must be as many as places.*1 "):
    _plot([0.5])
  with pytest.raises(ValueError, match="plots must hold one"):
    comparison.draw({})
