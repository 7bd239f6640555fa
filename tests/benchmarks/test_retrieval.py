import json
import math
from typing import Any

import numpy as np
import pytest

from benchmarks import retrieval
from benchmarks.filters import Peer, report
from benchmarks.retrieval import QUICK, Case, Setup, cases
from benchmarks.retrieval import __main__ as command

FOUND = np.arange(6).reshape(2, 3)


def _case(peer=FOUND, name="plus one", **options):
  beside = {"NumPy": Peer(lambda: lambda: (None, peer), tolerance=1e-3)}
  ours = lambda: (None, FOUND)
  return Case(name, lambda size: Setup(ours, beside, **options))


def _measure(case) -> Any:
  return command.measure(case, QUICK, rounds=2, least=1e-4)


def _named(name):
  (case,) = [case for case in cases.CASES if case.name == name]
  return case


def _page(rows):
  return command.markdown(
    rows, command="c", date="2026-01-01", busy=0.5, size=QUICK
  )


def _cells(text, first, table=0):
  lines = [x for x in text.splitlines() if x.startswith(f"| {first} |")]
  return [cell.strip() for cell in lines[table].strip("|").split("|")]


def test_differences_are_shares_of_rows_and_means_of_numbers():
  other = np.array([[2, 1, 0], [3, 4, 9]])
  assert retrieval.recall(FOUND, other) == pytest.approx(5 / 6)
  assert retrieval.difference(FOUND, other) == pytest.approx(1 / 6)
  x = np.array([1.0, -1.0, 2.0])
  assert retrieval.difference(x, x + 0.04) == pytest.approx(0.03, abs=2e-3)
  assert math.isnan(retrieval.difference(x, x * np.nan))
  assert retrieval.difference(x, x[:2]) == math.inf


def test_numpy_searches_in_falling_order():
  queries, database = cases.descriptors(200, QUICK)
  np.testing.assert_allclose(np.linalg.norm(database, axis=1), 1, atol=1e-5)
  scores, rows = cases.numpy_search(queries, database, 5)
  assert (np.diff(scores) <= 0).all()
  want = np.argsort(-(queries @ database.T), axis=1)[:, :5]
  np.testing.assert_array_equal(rows, want)
  # Queries lie in clusters, or there would be nothing to find.
  assert scores.mean() > 0.3


@pytest.mark.parametrize("name", ["top_k 200,000 rows", "disk 200,000 rows"])
def test_exact_searches_are_those_of_numpy(name):
  row = _measure(_named(name))
  assert not row.failures
  assert row.peers["NumPy"].state == "equal"
  assert row.recall == 1
  for peer in ("faiss", "faiss tuned"):
    assert name[:4] == "disk" or row.peers[peer].state in (
      "equal",
      report.NOT_INSTALLED,
    )


def test_narrow_rows_are_another_definition_with_a_recall():
  row = _measure(_named("stored int8, 200,000 rows"))
  assert not row.failures
  assert row.peers["float32"].state == "other definition"
  assert 0.85 < row.recall <= 1
  assert row.temporary_mb > 0


def test_the_encoder_is_that_of_torch():
  pytest.importorskip("torch")
  row = _measure(_named("encoder batch 8"))
  assert not row.failures
  assert row.peers["torch"].state == "equal"


def test_goals_are_about_peers():
  for case in cases.CASES:
    setup = case.build(QUICK)
    assert set(setup.goals) <= set(setup.peers)
  assert len({case.name for case in cases.CASES}) == len(cases.CASES)


def test_what_goes_wrong_is_in_the_row_and_on_the_page():
  row = _measure(_case(FOUND + 1))
  assert row.peers["NumPy"].ratio is None
  page = _page([row])
  assert "**Failed:**\n\n- plus one: NumPy: differs by" in page

  def broken(size):
    raise RuntimeError("no such thing\nmore")

  row = _measure(Case("x", broken))
  assert row.failures == ["RuntimeError: no such thing"]
  _page([row])


def test_the_page_tells_ratios_recall_and_goals():
  beside = {"NumPy": report.Beside("equal", 0.0, 8.0, 0.25, 7)}
  row = command.Row(
    "x", 1, 2.0, beside, {"NumPy": 0.2}, temporary_mb=20.0, first_call_s=1.5
  )
  row.recall = 0.98765
  assert _cells(_page([row]), "x") == [
    "x", "2.00", "0.25", "NumPy 8.00", "0.9877", "NumPy ≤ 0.2: **missed**",
  ]  # fmt: skip
  assert _cells(_page([row]), "x", 1) == ["x", "20.00", "1.50"]
  found = command.data([row], command="c", date="d", busy=math.nan, size=QUICK)
  text = json.loads(json.dumps(found, allow_nan=False))
  assert text["rows"][0]["recall"] == 0.98765


def test_the_command_writes_both_files_and_its_status(tmp_path, monkeypatch):
  monkeypatch.setattr(command, "PART", tmp_path / "part")
  monkeypatch.setattr(command, "RESULTS", tmp_path / "whole")
  some = (_case(goals={"NumPy": 1e9}), _case(FOUND + 1, name="wrong"))
  monkeypatch.setattr(command, "CASES", some)
  assert command.main(["--quick", "--cases=plus"]) == 0
  assert {p.name.split("-")[0] for p in tmp_path.iterdir()} == {"part"}
  name = f"part-{report.slug(report.device())}"
  assert "≤ 1e+09: met" in (tmp_path / f"{name}.md").read_text()
  data = json.loads((tmp_path / f"{name}.json").read_text())
  assert [row["case"] for row in data["rows"]] == ["plus one"]
  assert command.main(["--rounds=1"]) == 1
  assert any(p.name.startswith("whole") for p in tmp_path.iterdir())


@pytest.mark.parametrize("given", ["--cases=radar", "--rounds=0"])
def test_a_wrong_option_is_refused(given, capsys):
  with pytest.raises(SystemExit):
    command.main([given])
  assert given.split("=")[0].strip("-") in capsys.readouterr().err
