import json
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import lidar
from benchmarks.filters import Peer, report
from benchmarks.lidar import Case, Setup, Size, cases, memory, peers
from benchmarks.lidar import __main__ as command

TINY = Size(points=600, height=8, width=32, block=16)


def _case(peer=1.0, name="plus one", column="NumPy", **options):
  x = np.arange(6, dtype=np.float32)
  compared = {"tolerance": 1e-3} | options.pop("compared", {})
  beside = {column: Peer(lambda: lambda: x + peer, **compared)}
  return Case(
    name, lambda size: Setup(lambda x: x + 1, (x,), beside, **options)
  )


def _measure(case, **options) -> Any:
  options = {"rounds": 2, "least": 1e-4, "with_memory": False} | options
  return command.measure(case, TINY, **options)


def _named(name):
  (case,) = [case for case in cases.CASES if case.name == name]
  return case


def _page(rows):
  return command.markdown(
    rows, command="c", date="2026-01-01", busy=0.5, size=TINY
  )


def _cells(text, first, table=0):
  lines = [x for x in text.splitlines() if x.startswith(f"| {first} |")]
  return [cell.strip() for cell in lines[table].strip("|").split("|")]


# What is compared.


def test_differences_are_shares_of_labels_and_means_of_numbers():
  labels = np.array([1, 2, 3, 4])
  assert lidar.difference(labels, np.array([1, 2, 3, 5])) == 0.25
  x = np.array([1.0, -1.0, 2.0])
  assert lidar.difference(x, x) == 0
  assert lidar.difference(x, x + 0.04) == pytest.approx(0.03, abs=2e-3)
  assert math.isnan(lidar.difference(x, x * np.nan))
  assert lidar.difference(x, x[:2]) == math.inf
  assert lidar.difference(x[:0], x[:0]) == math.inf


def test_a_scan_fills_the_image_and_hides_some_points():
  points, remission = cases.scan(3000)
  assert points.shape == (3000, 3)
  assert points.dtype == remission.dtype == np.float32
  ranges = np.linalg.norm(points, axis=1)
  assert ranges.min() > 1
  assert ranges.max() < 100
  image, index, row, column, _ = peers.numpy_projection(
    points, remission, 16, 64
  )
  assert (index >= 0).mean() > 0.6
  assert len(np.unique(row * 64 + column)) < 3000
  np.testing.assert_array_equal(image[index < 0], -1)
  shown = index[index >= 0]
  np.testing.assert_array_equal(image[index >= 0][:, 1:4], points[shown])


def test_the_projection_is_that_of_numpy():
  row = _measure(_named("projection"))
  assert not row.failures
  assert row.peers["NumPy"].state == "equal"


def test_the_block_is_that_of_im2col_and_so_is_its_gradient():
  for name in ("block forward", "block gradient"):
    row = _measure(_named(name))
    assert not row.failures, name
    assert row.peers["im2col in JAX"].state == "equal"
    assert row.temporary_mb > 0


def test_the_comparison_sees_a_block_that_is_off(monkeypatch):
  right = peers.jax_block
  off = lambda *given, **options: right(*given, **options) * 1.01
  monkeypatch.setattr(peers, "jax_block", off)
  row = _measure(_named("block forward"))
  assert any("im2col in JAX: differs by" in text for text in row.failures)


def test_every_case_builds_for_the_weights_of_the_public_names():
  assert len({case.name for case in cases.CASES}) == len(cases.CASES)
  for case in cases.CASES:
    if case.quick:
      setup = case.build(TINY)
      assert set(setup.goals) <= {*setup.peers, "ms", "MB"}
  tensors = cases.weights(21)[2]
  assert tensors["backbone.enc1.residual_0.attention_x.0.weight"].shape == (
    288, 3, 7, 7
  )  # fmt: skip
  scales = [v for n, v in tensors.items() if n.endswith("running_var")]
  assert min(v.min() for v in scales) > 0.5


@pytest.mark.parametrize(
  "name",
  ["knn 5 x 5, 5 neighbours", "network 21", "whole 21, points to labels"],
)
def test_the_forms_of_torch_give_the_same(name):
  pytest.importorskip("torch")
  row = _measure(_named(name))
  assert not row.failures
  assert all(peer.state == "equal" for peer in row.peers.values())


# Rows and pages.


def test_a_row_holds_ratio_memory_and_goals():
  row = _measure(_case(goals={"NumPy": 1e9, "ms": 0.0}))
  assert row.peers["NumPy"].rounds == 2
  assert 0 < row.peers["NumPy"].ratio < math.inf
  assert row.ms > 0
  assert row.first_call_s > 0
  cells = _cells(_page([row]), "plus one")
  assert "NumPy ≤ 1e+09: met" in cells[-1]
  assert "≤ 0 ms: **missed**" in cells[-1]


def test_the_page_tells_rates_ratios_and_memory():
  beside = {
    "NumPy": report.Beside("equal", 0.0, 8.0, 0.25, 7),
    "torch": report.Beside("equal", 0.0, 4.0, 0.5, 7, temporary_mb=100.0),
  }
  row = report.Row(
    "x", 1, 2.0, beside, {"torch": 0.4}, temporary_mb=20.0, first_call_s=1.5
  )
  page = _page([row])
  assert _cells(page, "x") == [
    "x", "2.00", "500", "0.25", "0.50", "torch 4.00",
    "torch ≤ 0.4: **missed**",
  ]  # fmt: skip
  assert _cells(page, "x", 1) == ["x", "20.00", "100.00", "0.20", "1.50"]
  assert "8 x 32 (blocks: 8 x 16" in page
  found = command.data([row], command="c", date="d", busy=math.nan, size=TINY)
  text = json.loads(json.dumps(found, allow_nan=False))
  assert text["rows"][0]["peers"]["torch"]["temporary_mb"] == 100
  assert text["size"]["points"] == 600


def test_a_missing_peer_is_named_and_a_wrong_one_fails(monkeypatch):
  def missing(name):
    raise ModuleNotFoundError(name)

  monkeypatch.setattr(peers, "load", missing)
  row = _measure(_named("knn 5 x 5, 5 neighbours"))
  assert not row.failures
  assert _cells(_page([row]), row.case)[3] == "not installed"
  row = _measure(_case(peer=1.1))
  assert row.peers["NumPy"].ratio is None
  assert "**Failed:**\n\n- plus one: NumPy: differs by" in _page([row])

  def broken(size):
    raise RuntimeError("no such thing\nmore")

  row = _measure(Case("x", broken))
  assert row.failures == ["RuntimeError: no such thing"]
  _page([row])


# Memory.


@pytest.mark.skipif(not memory.RESET.exists(), reason="only Linux tells")
def test_the_memory_of_a_call_is_what_it_takes_besides():
  def call():
    return np.ones(8_000_000).sum()  # 64 MB for a while.

  kept = np.ones(4_000_000)
  assert memory.of_call(Peer(lambda: call)) == pytest.approx(64, abs=8)
  assert memory.of_call(Peer(lambda: kept.sum)) < 8


def test_memory_that_cannot_be_measured_is_none(monkeypatch):
  monkeypatch.setattr(
    memory.subprocess,
    "run",
    lambda *_, **__: type("Done", (), {"stdout": "x\n"})(),
  )
  assert memory.measure("x", "y", quick=True) is None
  monkeypatch.setattr(
    memory.subprocess,
    "run",
    lambda *_, **__: type("Done", (), {"stdout": "said\n12.5\n"})(),
  )
  want = 12.5 if memory.RESET.exists() else None
  assert memory.measure("x", "y", quick=True) == want


def test_the_process_that_measures_prints_megabytes(monkeypatch, capsys):
  monkeypatch.setattr(command, "CASES", (_case(name="a b"),))
  monkeypatch.setattr(memory, "of_call", lambda peer: float(peer.make()()[0]))
  assert command.main(["--memory=a b", "--peer=NumPy", "--quick"]) == 0
  assert capsys.readouterr().out == "1.0\n"


# The command.


def test_the_command_writes_both_files_and_its_status(tmp_path, monkeypatch):
  some = (_case(), _case(name="slow", peer=2.0)._replace(quick=False))
  monkeypatch.setattr(command, "CASES", some)
  assert command.main(["--quick", f"--output={tmp_path / 'some'}"]) == 0
  name = f"some-{report.slug(report.device())}"
  assert "| plus one |" in (tmp_path / f"{name}.md").read_text()
  data = json.loads((tmp_path / f"{name}.json").read_text())
  assert [row["case"] for row in data["rows"]] == ["plus one"]
  status = command.main(
    ["--cases=slow", "--rounds=1", f"--output={tmp_path / 'wrong'}"]
  )
  assert status == 1


def test_a_part_does_not_overwrite_the_whole_table(tmp_path, monkeypatch):
  monkeypatch.setattr(command, "CASES", (_case(),))
  monkeypatch.setattr(command, "PART", tmp_path / "part")
  monkeypatch.setattr(command, "RESULTS", tmp_path / "whole")
  command.main(["--quick"])
  command.main(["--cases=plus"])
  assert {p.name.split("-")[0] for p in tmp_path.iterdir()} == {"part"}
  command.main([])
  assert any(p.name.startswith("whole") for p in tmp_path.iterdir())


@pytest.mark.parametrize("given", ["--cases=radar", "--rounds=0"])
def test_a_wrong_option_is_refused(given, capsys):
  with pytest.raises(SystemExit):
    command.main([given])
  assert given.split("=")[0].strip("-") in capsys.readouterr().err


def test_values_of_every_library_become_arrays():
  x = np.arange(3, dtype=np.int32)

  class Tensor:
    detach = lambda self: self
    cpu = lambda self: x

  for raw in (x, jnp.asarray(x), Tensor()):
    np.testing.assert_array_equal(lidar.values(raw), x)
  assert lidar.values(Tensor()).dtype == np.int32
