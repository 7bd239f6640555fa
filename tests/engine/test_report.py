import json
import math
import re

from matplotlib.figure import Figure
import numpy as np
import pytest

from jaxshape.engine import comparison, report
from jaxshape.errors import InputError

RNG = np.random.default_rng(0)


def _figure():
  return report.image_sheet(RNG.integers(0, 255, (1, 2, 8, 8, 3)))


def _result(name="plain", **changes):
  fields = {
    "metrics": {
      "plain/top1": 0.75,
      "plain/loss": 0.5,
      "cue_conflict/shape_bias": math.nan,
      "cue_conflict/decisions": 1000.0,
    },
    "step": 1200,
    "history": [
      {"step": i, "train/loss": 1 / i, "outline/top1": 0.5} for i in (1, 2, 3)
    ],
    "config": {"system": "some_system", "seed": 0, "optimizer": {"lr": 0.1}},
  }
  return report.Result(name, **{**fields, **changes})


def _page(folder, *results, title="A title", notes=()):
  path = report.write(folder, results, title=title, notes=notes)
  return path.read_text(encoding="utf-8")


def test_text_table_by_hand():
  other = _result("union", metrics={"plain/top1": 0.5, "plain/loss": 0.25})
  got = report.text_table([_result(), other]).splitlines()
  assert [line.split() for line in got] == [
    ["plain", "union"],
    ["plain"],
    ["top1", "%", "75.00*", "50.00"],
    ["loss", "0.5", "0.25*"],
    ["cue_conflict"],
    ["shape_bias", "%", report.MISSING, report.MISSING],
    ["decisions", "1,000", report.MISSING],
  ]
  assert len({len(line) for line in got}) == 1


def test_markdown_table_by_hand():
  a = report.Result("a|b", {"x/error": 0.25, "steps": 3.5})
  b = report.Result("c", {"x/error": 0.125})
  assert report.markdown_table([a, b]).splitlines() == [
    r"| metric | a\|b | c |",
    "| --- | ---: | ---: |",
    "| x/error % | 25.00 | **12.50** |",
    f"| steps | 3.5 | {report.MISSING} |",
  ]


@pytest.mark.parametrize(
  ("metric", "percent", "better"),
  [
    ("plain/top1", True, 1),
    ("plain/top1_error", True, -1),
    ("seg/IoU/car", True, 1),
    ("cue_conflict/shape_bias/star", True, 1),
    ("plain/confidence_correct", True, 0),
    ("plain/entropy", False, 0),
    ("plain/cross_entropy", False, -1),
    ("top1/speed", True, 1),
    ("plain/speed", False, 0),
  ],
)
def test_kinds_from_names(metric, percent, better):
  assert report.kind(metric) == (percent, better)


def test_the_best_is_one_that_differs():
  tables = report.table([_result("a"), _result("b")])
  assert not any(c.best for rows in tables.values() for r in rows for c in r[1])
  alone = report.table([_result()])
  assert not any(c.best for rows in alone.values() for r in rows for c in r[1])


def test_numbers_survive_the_way_through_json(tmp_path):
  metrics = {"a/top1": 1 / 3, "a/loss": math.inf, "b": np.float32(0.5)}
  one = report.Result("one", {**metrics, "c": math.nan})
  page = report.write(tmp_path / "deep" / "er", [one, _result()], title="t")
  assert page == tmp_path / "deep" / "er" / "report.html"
  text = (page.parent / "metrics.json").read_text(encoding="utf-8")
  got = json.loads(text, parse_constant=pytest.fail)
  want = {"a/top1": 1 / 3, "a/loss": None, "b": 0.5, "c": None}
  assert got["one"] == want
  assert got["plain"]["cue_conflict/shape_bias"] is None


def test_the_page_needs_nothing_else(tmp_path):
  pictures = {"cam": _figure(), "a/b": _figure()}
  page = _page(tmp_path, _result(pictures=pictures), _result("union"))
  sources = re.findall(
    r"(?:src|href|srcset|url)\s*[=(]\s*[\"']?([^\"')]*)", page
  )
  assert len(sources) == 2
  assert all(s.startswith("data:image/png;base64,") for s in sources)
  for word in ("http", "//", "@import", "<script", "<link", "<iframe"):
    assert word not in re.sub(r"base64,[\w+/=]*", "", page), word
  assert len(page) < report.MAX_BYTES
  files = sorted(p.name for p in (tmp_path / "figures").iterdir())
  assert files == ["plain-a-b.png", "plain-cam.png"]


def test_the_page_shows_everything(tmp_path):
  other = _result("union", config={"system": "some_system", "seed": 7})
  page = _page(tmp_path, _result(), other, notes=["First.", "Second."])
  for text in ("A title", "some_system", "First.", "Second.", "step 1,200"):
    assert text in page
  assert page.count("<polyline") == 4  # Two metrics of two runs.
  differing, common = page.split("<details>")
  assert "<td>seed</td><td>0</td><td>7</td>" in differing
  absent = f"<td>{report.MISSING}</td>"
  assert f"<td>optimizer.lr</td><td>0.1</td>{absent}" in differing
  assert "<td>system</td><td>some_system</td>" in common
  for name in ("jaxshape", "jax", "python", "device"):
    assert f"<span>{name} " in common


def test_hostile_names_are_text(tmp_path):
  evil = "<script>alert(1)</script>\"'&{{ 7 * 7 }}"
  result = report.Result(
    evil,
    {f"{evil}/{evil}": 1.0},
    pictures={"../../" + evil: _figure()},
    history=[{"step": s, evil: s} for s in (1, 2)],
    config={evil: evil},
  )
  page = _page(tmp_path / "report", result, title=evil, notes=[evil])
  assert "<script" not in page
  assert "&lt;script&gt;" in page
  assert "{{ 7 * 7 }}" in page
  (picture,) = (tmp_path / "report" / "figures").iterdir()
  assert re.fullmatch(r"[\w.-]+\.png", picture.name)
  assert [p.name for p in tmp_path.iterdir()] == ["report"]


@pytest.mark.parametrize(
  ("path", "shown"),
  [
    ("/home/somebody/pacs/train", "…/train"),
    ("folder:/home/somebody/train", "folder:…/train"),
    ("/home/somebody", "…/"),
    ("~/somebody/runs/x", "…/x"),
    ("~somebody/x", "…/x"),
    (r"C:\Users\somebody\runs", "…/runs"),
    ("see /root/somebody/x, please", "see …/x, please"),
    ("('/mnt/somebody/a b', 1)", "('…/a b', 1)"),
  ],
)
def test_no_path_is_shown(tmp_path, path, shown):
  page = _page(tmp_path, _result(config={"data": path}), notes=[path])
  assert "somebody" not in page
  assert page.replace("&#39;", "'").count(shown) >= 2


@pytest.mark.parametrize(
  "text", ["eval/top1", "1/2", "gs://some/where", "a / b"]
)
def test_what_is_no_path_stays(tmp_path, text):
  assert text in _page(tmp_path, _result(), notes=[text])


def test_curves_break_where_they_are_not_finite(tmp_path):
  values = [1.0, 2.0, math.nan, 3.0, None, math.inf, 4.0, 5.0]
  history = [{"step": i, "loss": v} for i, v in enumerate(values)]
  page = _page(tmp_path, _result(history=history))
  lines = re.findall(r"<polyline[^>]*points=\"([^\"]*)\"", page)
  assert [len(line.split()) for line in lines] == [
    2,
    2,
    2,
  ]  # The second: a dot.
  assert "nan" not in page
  assert "inf" not in page.replace("inform", "")


def test_curves_run_from_corner_to_corner_and_stay_small(tmp_path):
  history = [{"step": i, "loss": 10.0 - i / 1000} for i in range(10001)]
  page = _page(tmp_path, _result(history=history))
  (line,) = re.findall(r"<polyline[^>]*points=\"([^\"]*)\"", page)
  points = np.array([p.split(",") for p in line.split()], float)
  assert len(points) <= report.MAX_POINTS
  right = report.CHART_WIDTH - report.RIGHT
  bottom = report.CHART_HEIGHT - report.BOTTOM
  np.testing.assert_allclose(points[0], [report.LEFT, report.TOP], atol=1)
  np.testing.assert_allclose(points[-1], [right, bottom], atol=1)
  assert np.all(np.diff(points[:, 1]) > 0)


def test_large_pictures_are_coded_smaller_and_then_left_out(
  tmp_path, monkeypatch
):
  noise = report.image_sheet(RNG.integers(0, 255, (1, 2, 64, 64, 3)))
  result = _result(pictures={"noise": noise})
  full = len(_page(tmp_path, result).encode())
  monkeypatch.setattr(report, "MAX_BYTES", full - 1)
  assert "data:image/jpeg;base64," in _page(tmp_path, result)
  monkeypatch.setattr(report, "MAX_BYTES", 1000)
  page = _page(tmp_path, result)
  assert "<img" not in page
  assert "too large for this page" in page
  data = (tmp_path / "figures" / "plain-noise.png").read_bytes()
  assert data.startswith(b"\x89PNG")


def test_pictures_whose_names_collide_are_all_kept(tmp_path):
  pictures = {"a/b": _figure(), "a b": _figure(), "A-b": _figure()}
  report.write(tmp_path, [_result(pictures=pictures)], title="t")
  files = sorted(p.name for p in (tmp_path / "figures").iterdir())
  assert files == ["plain-A-b-3.png", "plain-a-b-2.png", "plain-a-b.png"]


def test_the_same_report_twice_is_the_same(tmp_path):
  result = _result(pictures={"cam": _figure()})
  assert _page(tmp_path / "a", result) == _page(tmp_path / "b", result)


def test_image_sheet_places_images_and_maps():
  images = [[np.full((4, 6, 3), 255.0), None], [np.zeros((4, 6, 1))]]
  maps = [[None, None], [np.eye(2)]]
  figure = report.image_sheet(
    images,
    titles=[["one", ""], ["two"]],
    maps=maps,
    row_names=["r0", "r1"],
    column_names=["c0", "c1"],
  )
  assert isinstance(figure, Figure)
  axes = np.reshape(figure.axes, (2, 2))
  count = [[len(a.images) for a in row] for row in axes]
  assert count == [[1, 0], [2, 0]]
  picture, heat = axes[1, 0].images
  np.testing.assert_array_equal(picture.get_array(), np.zeros((4, 6, 3)))
  assert heat.get_extent() == picture.get_extent() == [-0.5, 5.5, 3.5, -0.5]
  np.testing.assert_array_equal(axes[0, 0].images[0].get_array(), 1.0)
  assert [a.get_ylabel() for a in axes[:, 0]] == ["r0", "r1"]
  assert axes[1, 0].get_title() == "two"


def test_report_refuses(tmp_path):
  with pytest.raises(InputError, match="no results were given"):
    report.write(tmp_path, [], title="t")
  with pytest.raises(InputError, match="Two results are called 'plain'"):
    report.write(tmp_path, [_result(), _result()], title="t")
  (tmp_path / "file").write_text("")
  with pytest.raises(InputError, match="name a folder that can be made"):
    report.write(tmp_path / "file", [_result()], title="t")
  with pytest.raises(ValueError, match="images must hold one image or more"):
    report.image_sheet([])


def _bias(values, places=("cat", "dog")):
  return comparison.Plot(
    "rows", places, values, place="class", value="share of shape"
  )


def test_what_several_results_share_is_drawn_into_one_figure(tmp_path):
  metrics = {"plain/top1": 0.75, "outline/top1": 0.5, "plain/loss": 0.1}
  one = _result(
    "one", metrics=metrics, plots={"cue-by class": _bias([0.1, 0.2])}
  )
  two = _result(
    "two", metrics=metrics, plots={"cue-by class": _bias([0.3, 0.4])}
  )
  other = _result("other", plots={"cue-by class": _bias([1], ("owl",))})
  page = _page(tmp_path, one, two, other)
  files = sorted(p.name for p in (tmp_path / "figures").iterdir())
  assert files == ["all-cue-by-class.png", "all-top1.png"]
  assert page.count("data:image/png;base64,") == 2
  assert "<h2>Compared</h2>" in page
  alone = _page(tmp_path / "alone", one)
  assert "Compared" not in alone
  assert "data:image" not in alone
  assert list((tmp_path / "alone" / "figures").iterdir()) == []


def test_headlines_have_every_evaluator_of_any_result():
  one = report.Result("a", {"x/top1": 0.5, "y/top1": 0.25, "x/mAP": 0.5})
  two = report.Result("b", {"x/top1": 0.75, "z/top1": 0.5})
  none = report.Result("c", {"x/loss": 1.0})
  figures = report._together([one, two, none])
  assert list(figures) == ["top1"]  # Of mAP there is one evaluator.
  axes = figures["top1"].axes[0]
  assert [t.get_text() for t in axes.get_xticklabels()] == ["x", "y", "z"]
  heights = [[bar.get_height() for bar in c] for c in axes.containers]
  want = [[0.5, 0.25, math.nan], [0.75, math.nan, 0.5]]
  np.testing.assert_array_equal(heights, want)
