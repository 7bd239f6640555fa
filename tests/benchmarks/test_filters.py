import dataclasses
import json
import math
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.filters import (
  Case,
  Peer,
  Setup,
  Work,
  cases,
  peers,
  report,
  step,
  timing,
)
from benchmarks.filters import __main__ as command
from jaxshape.filters import diffusion

RATES = timing.Rates(bytes=1e9, ops=1e9, exps=1e8, flops=1e10)


def _missing(*_) -> Any:
  raise ModuleNotFoundError("No module named 'other'")


def _case(beside, ours=lambda x: x + 1, **options):
  return Case(
    "plus one",
    lambda images: Setup(
      ours,
      (images,),
      {name: make(images) for name, make in beside.items()},
      Work(8 * images.size, ops=images.size),
      **options,
    ),
    (2,),
  )


def _peer(change=1.0, **compared):
  """A peer in NumPy that adds `change`."""
  return lambda images: Peer(lambda: lambda: images + change, **compared)


def _measure(case, **options) -> Any:
  options = {"rounds": 2, "size": 16, "least": 1e-4} | options
  return command.measure(case, 2, rates=RATES, **options)


def _page(rows, share=None):
  return report.markdown(
    rows,
    command="c",
    date="2026-01-01",
    rates=RATES,
    share=share,
    busy=0.5,
    size=224,
  )


def _cells(text, first, table=0):
  lines = [x for x in text.splitlines() if x.startswith(f"| {first} |")]
  return [cell.strip() for cell in lines[table].strip("|").split("|")]


# Timing.


def test_calls_take_turns_and_short_ones_are_repeated():
  order = []
  calls = {name: lambda name=name: order.append(name) for name in "abc"}
  times = timing.interleaved(calls, rounds=3, least=0.0)
  assert "".join(order) == "aabbcc" + 3 * "abc"
  assert [len(each) for each in times.values()] == [3, 3, 3]
  order.clear()
  timing.interleaved({"a": calls["a"]}, rounds=1, least=1e-3)
  assert len(order) > 20


def test_a_call_out_of_patience_stops_after_the_fewest_rounds(monkeypatch):
  monkeypatch.setattr(timing, "PATIENCE", -1.0)
  times = timing.interleaved({"a": lambda: 0}, rounds=9, least=0.0)
  assert len(times["a"]) == timing.FEWEST


def test_the_ratio_is_the_median_of_each_rounds_own():
  assert timing.ratio([1, 2, 30, 4], [2, 4, 3]) == 0.5


def test_times_are_those_of_the_clock(monkeypatch):
  now = iter(range(100))
  clock = types.SimpleNamespace(
    perf_counter=lambda: next(now), sleep=lambda _: None
  )
  monkeypatch.setattr(timing, "time", clock)
  times = timing.interleaved({"a": lambda: 0}, rounds=2, least=4.0)
  # One tick for four calls.
  assert times["a"] == [0.25, 0.25]


def test_results_of_every_library_become_the_same_array():
  x = np.arange(24.0).reshape(2, 3, 4, 1)
  tensor = np.moveaxis(x, -1, 1)
  torch = types.SimpleNamespace(
    detach=lambda: types.SimpleNamespace(
      cpu=lambda: types.SimpleNamespace(numpy=lambda: tensor)
    )
  )
  for raw in (x, jnp.asarray(x), [x[0, ..., 0], x[1]], torch):
    np.testing.assert_array_equal(timing.values(raw), x)
  assert timing.values(x[0, ..., 0]).shape == (1, 3, 4, 1)


def test_difference_sees_nan_shapes_and_nothing_but_the_border():
  x, y = np.zeros((1, 5, 6, 1)), np.zeros((1, 5, 6, 1))
  y[0, 2, 2], y[0, 0, 3] = 0.5, 9.0
  assert timing.difference(x, y) == 9.0
  assert timing.difference(x, y, margin=1) == 0.5
  y[0, 2, 3] = np.nan
  assert math.isnan(timing.difference(x, y, margin=1))
  assert timing.difference(x, y[:, :4]) == math.inf
  assert timing.difference(x, x, margin=3) == math.inf


def test_the_limit_is_the_term_that_takes_longest():
  work = Work(bytes=2e9, ops=1e9, exps=1e8, flops=1e9)
  assert timing.limit(work, RATES) == (2.0, "bytes")
  assert timing.limit(work._replace(exps=4e8), RATES) == (4.0, "exps")


def test_rates_are_measured():
  rates = timing.measure_rates(quick=True)
  assert all(1e6 < rate < 1e16 for rate in rates)


def test_pictures_are_the_same_each_time_and_fill_the_range():
  x = timing.pictures(2, 40)
  assert x.shape == (2, 40, 40, 3)
  assert x.dtype == np.float32
  assert x.min() >= 0
  assert x.max() <= 255
  assert x.std() > 20
  np.testing.assert_array_equal(x, timing.pictures(2, 40))
  assert (x[0] != x[1]).any()


# Rows.


def test_a_row_holds_ratio_limit_memory_and_goals():
  case = _case(
    {"OpenCV": _peer(tolerance=1e-3), "Kornia": _peer(5.0)},
    goals={"OpenCV": 1e9, "Kornia": 0.0, "ms": 1e9, "SciPy": 1.0},
  )
  row = _measure(case)
  assert not row.failures
  assert row.peers["OpenCV"].state == "equal"
  assert row.peers["Kornia"].state == "other definition"
  assert row.peers["OpenCV"].rounds == 2
  assert 0 < row.peers["OpenCV"].ratio < math.inf
  assert row.limit_ms == pytest.approx(1e3 * 8 * 16 * 16 * 3 / 1e9)
  assert row.limit_by == "bytes"
  assert row.temporary_mb >= 0
  assert row.first_call_s > 0
  goals = _cells(_page([row]), "plus one")[-1]
  assert "OpenCV ≤ 1e+09: met" in goals
  assert "Kornia ≤ 0: **missed**" in goals
  assert "≤ 1e+09 ms: met" in goals
  assert "SciPy ≤ 1: not measured" in goals


def test_a_peer_that_is_missing_is_named_and_no_failure():
  row = _measure(_case({"MedPy": lambda _: Peer(_missing, tolerance=0)}))
  assert not row.failures
  assert row.ms > 0
  assert _cells(_page([row]), "plus one")[3] == "not installed"
  assert "Failed" not in _page([row])


@pytest.mark.parametrize(
  ("change", "text"), [(1.1, "differs by 0.1"), (np.nan, "differs by nan")]
)
def test_a_wrong_result_is_not_timed_and_fails_loudly(change, text):
  row = _measure(_case({"OpenCV": _peer(change, tolerance=0.01)}))
  assert row.peers["OpenCV"].ratio is None
  page = _page([row])
  assert "**Failed:**" in page
  assert f"- plus one, 2 images: OpenCV: {text}" in page
  assert _cells(page, "plus one")[3] == "**wrong**"


def test_errors_of_ours_and_of_a_peer_leave_the_others_alone():
  def broken(x):
    raise RuntimeError("no such thing\nmore")

  row = _measure(_case({"OpenCV": _peer(tolerance=0)}, ours=broken))
  assert row.failures == ["RuntimeError: no such thing"]
  _page([row])
  peer = lambda images: Peer(lambda: lambda: broken(images), tolerance=0)
  row = _measure(_case({"OpenCV": peer, "SciPy": _peer(tolerance=1e-3)}))
  assert row.failures == ["OpenCV: does not run (RuntimeError: no such thing)"]
  assert row.peers["SciPy"].ratio > 0


# Pages.


def _row(ratio=0.5):
  beside = {"OpenCV": report.Beside("equal", 0.0, 4.0, ratio, 9)}
  beside["Kornia"] = report.Beside("other definition", None, 3.0, 0.04, 9)
  return report.Row(
    "x", 32, 2.0, beside, {"OpenCV": 0.5}, 0.5, "exps", 1.7, 0.25
  )


def test_the_page_tells_the_ratio_the_fastest_peer_and_the_limit():
  page = _page([_row()])
  assert _cells(page, "x") == [
    "x", "32", "2.00", "0.50", "~0.04", "Kornia 3.00", "OpenCV ≤ 0.5: met"
  ]  # fmt: skip
  assert _cells(page, "x", 1)[2:] == [
    "2.00", "0.50", "exps", "4.0", "1.70", "0.25"
  ]  # fmt: skip
  assert "**missed**" in _page([_row(0.51)])
  head = page.splitlines()[:6]
  assert "`c`" in head
  assert any(report.device() in x and jax.__version__ in x for x in head)


def test_the_share_of_a_step_is_told_with_its_goal():
  share = step.Share("resnet50", 8, "float32", 1.0, 0.015, 0.015, 0.02)
  page = _page([_row()], share)
  assert "15.0 ms of 1000 ms, 1.50 % (goal ≤ 2 %: met)" in page
  assert "**missed**" in _page([_row()], share._replace(share=0.03))


def test_json_holds_the_same_and_no_nan():
  row = dataclasses.replace(_row(), first_call_s=math.nan)
  data = report.data(
    [row], command="c", date="d", rates=RATES, share=None, busy=0.5, size=224
  )
  text = json.dumps(data, allow_nan=False)
  found = json.loads(text)["rows"][0]
  assert found["peers"]["OpenCV"]["ratio"] == 0.5
  assert found["first_call_s"] is None


def test_devices_become_file_names():
  assert report.slug("AMD EPYC, 2 cores") == "amd-epyc-2-cores"
  assert report.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


# The command.


def test_quick_writes_both_files_and_gives_status_0(tmp_path, monkeypatch):
  case = _case({"OpenCV": _peer(tolerance=1e-3)})
  monkeypatch.setattr(command, "CASES", (case, Case("other", _missing)))
  status = command.main(
    ["--quick", "--filters=plus", f"--output={tmp_path / 'some'}"]
  )
  assert status == 0
  name = f"some-{report.slug(report.device())}"
  text = (tmp_path / f"{name}.md").read_text()
  assert "--quick --filters=plus" in text
  data = json.loads((tmp_path / f"{name}.json").read_text())
  assert [row["case"] for row in data["rows"]] == ["plus one"]


def test_a_wrong_result_ends_with_status_1(tmp_path, monkeypatch):
  case = _case({"OpenCV": _peer(2.0, tolerance=1e-3)})
  monkeypatch.setattr(command, "CASES", (case,))
  status = command.main(["--quick", f"--output={tmp_path / 'some'}"])
  assert status == 1


def test_a_part_does_not_overwrite_the_whole_table(tmp_path, monkeypatch):
  monkeypatch.setattr(command, "CASES", (_case({}),))
  monkeypatch.setattr(command, "PART", tmp_path / "part")
  monkeypatch.setattr(command, "RESULTS", tmp_path / "whole")
  command.main(["--quick"])
  assert {p.name.split("-")[0] for p in tmp_path.iterdir()} == {"part"}


@pytest.mark.parametrize("given", ["--filters=sharpen", "--rounds=0"])
def test_a_wrong_option_is_refused(given, capsys):
  with pytest.raises(SystemExit):
    command.main([given])
  assert given.split("=")[0].strip("-") in capsys.readouterr().err


# Cases and peers.


def test_every_case_builds_and_names_known_columns():
  assert len({case.name for case in cases.CASES}) == len(cases.CASES)
  for case in cases.CASES:
    for count in case.batches:
      setup = case.build(timing.pictures(min(count, 2), 32))
      assert min(setup.work) >= 0
      assert set(setup.peers) <= set(peers.PACKAGES)
      assert set(setup.goals) <= {*setup.peers, "ms", "MB"}


def test_the_gaussian_against_peers_that_are_there(monkeypatch):
  name = "gaussian sigma 2"
  (case,) = [c for c in cases.CASES if c.name == name]
  row = _measure(case, size=48)
  assert not row.failures
  # Installed for the tests.
  assert row.peers["SciPy"].state == row.peers["OpenCV"].state == "equal"
  # The comparison has to see a filter that is off by a little.
  right = cases.blur.gaussian
  off = lambda x, sigma: 1.001 * right(x, sigma=sigma)
  monkeypatch.setattr(cases.blur, "gaussian", off)
  assert len(_measure(case, size=48).failures) >= 2


def test_plain_diffusion_is_ours():
  x = timing.pictures(1, 24)
  planar = peers.jax_diffusion(jnp.moveaxis(x, -1, 1), 20)
  got = diffusion.perona_malik(x, iterations=20)
  np.testing.assert_allclose(got, jnp.moveaxis(planar, 1, -1), atol=1e-3)


def test_the_share_of_a_small_step_is_measured(monkeypatch):
  monkeypatch.setattr(timing, "LEAST", 0.0)
  share = step.measure(rounds=1, size=16, network="resnet8")
  assert share.step > 0
  assert share.share == pytest.approx(share.diffusion / share.step)
