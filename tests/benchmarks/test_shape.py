import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import shape
from benchmarks.filters import Peer, report
from benchmarks.lidar import peers as torch_peers
from benchmarks.shape import QUICK, Case, Setup, cases, peers
from benchmarks.shape import __main__ as command
from jaxshape.filters import corruption


def _case(peer=1.0, name="plus one", column="NumPy", **options):
  x = np.arange(6, dtype=np.float32)
  beside = {column: Peer(lambda: lambda: x + peer, tolerance=1e-3)}
  return Case(
    name, lambda size: Setup(lambda x: x + 1, (x,), beside, images=3, **options)
  )


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


# What is compared.


@pytest.mark.parametrize(
  ("name", "peer"),
  [
    ("mmsi of channels", "textbook in JAX"),
    ("mmsi of the batch", "textbook in JAX"),
    ("corruption jpeg_compression", "PIL"),
    ("corruption pixelate", "PIL"),
    ("corruption contrast", "NumPy"),
  ],
)
def test_cases_agree_with_their_peers(name, peer):
  row = _measure(_named(name))
  assert not row.failures
  assert row.peers[peer].state == "equal"
  assert row.images == (QUICK.rows if "mmsi" in name else QUICK.corrupted)
  assert row.ms > 0


@pytest.mark.parametrize(
  "name",
  [
    "adain large",
    "attack fgsm",
    "attack pgd, 10 steps",
    "attack momentum_fgsm, 5 steps",
  ],
)
def test_the_forms_of_torch_give_the_same(name):
  pytest.importorskip("torch")
  row = _measure(_named(name))
  assert not row.failures
  assert row.peers["torch"].state == "equal"


@pytest.mark.parametrize("wrong", ["value", "gradient"])
def test_the_comparison_sees_a_loss_that_is_off(monkeypatch, wrong):
  right = peers.jax_mmsi
  off = {
    "value": lambda *given, **options: right(*given, **options) - 1,
    "gradient": lambda *given, **options: 1.01 * right(*given, **options),
  }
  monkeypatch.setattr(peers, "jax_mmsi", off[wrong])
  row = _measure(_named("mmsi of channels"))
  assert any("textbook in JAX: differs by" in text for text in row.failures)


def test_attacks_are_compared_by_what_they_add():
  setup = _named("attack fgsm").build(QUICK)
  images = np.asarray(setup.arguments[1])
  added = np.where(np.arange(images.size) % 2, 8.0, -8.0)
  added = added.reshape(images.shape)
  other = added.copy()
  other.flat[: images.size // 100] *= -1
  apart = shape.difference(
    setup.read(images + added), setup.read(images + other)
  )
  assert apart == pytest.approx(0.02, rel=0.02)


def test_every_corruption_is_measured_and_names_differ():
  names = [case.name for case in cases.CASES]
  assert len(set(names)) == len(names)
  for name in corruption.IMAGENET_C:
    assert f"corruption {name}" in names
  kinds = {name.split()[0] for name in names}
  assert all(command._about(kind, QUICK) for kind in kinds)


# Training steps.


def test_the_plain_step_lacks_styles_and_three_has_as_many_images():
  made = {
    kind: cases._config(True, QUICK, kind)
    for kind in ("joint", "apart", "plain", "three")
  }
  for kind, given in made.items():
    styled = kind in ("joint", "apart")
    assert (given.weights.mutual > 0) == styled, kind
    assert (given.weights.stylized > 0) == styled, kind
    assert given.weights.original == 1, kind
    assert given.separate_views == (kind == "apart"), kind
    assert given.backbone == "resnet8"
    count = 3 * QUICK.batch if kind == "three" else QUICK.batch
    assert given.batch_size == count, kind
  deep = cases._config(False, shape.Size(), "joint")
  assert (deep.backbone, deep.width, deep.batch_size) == ("resnet18", 64, 16)


def test_a_step_takes_its_batch_and_two_styles():
  step, given = cases.step(True, QUICK, "joint")
  batch = given[1]
  side = QUICK.side
  assert batch["image"].shape == (QUICK.batch, side, side, 3)
  assert batch["style"].shape == (QUICK.batch, 2, side, side, 3)
  state, metrics = jax.eval_shape(step, *given)
  like = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert like(state.params) == like(given[0].params)
  assert any("mutual_information" in name for name in metrics)


# Rows and pages.


def test_the_page_has_a_table_per_kind_with_its_own_peers():
  beside = {"torch": report.Beside("equal", 0.0, 8.0, 0.25, 7)}
  other = {"plain step": report.Beside("other definition", None, 1.0, 3.1, 7)}
  rows = [
    report.Row("adain x", 4, 2.0, beside, temporary_mb=20.0, first_call_s=1.5),
    report.Row("step x", 8, 40.0, other),
  ]
  page = _page(rows)
  assert _cells(page, "adain x") == ["adain x", "4", "2.00", "2e+03", "0.25"]
  assert _cells(page, "step x") == ["step x", "8", "40.00", "200", "~3.10"]
  assert _cells(page, "adain x", 1) == ["adain x", "20.00", "1.50"]
  assert _cells(page, "step x", 1)[1:] == [report.MISSING] * 2
  found = command.data(rows, command="c", date="d", busy=math.nan, size=QUICK)
  text = json.loads(json.dumps(found, allow_nan=False))
  assert text["rows"][1]["images"] == 8
  assert text["load_at_start"] is None
  assert text["size"]["network"] == "resnet8"


def test_a_missing_peer_is_named_and_a_wrong_one_fails(monkeypatch):
  def missing(name):
    raise ModuleNotFoundError(name)

  monkeypatch.setattr(torch_peers, "load", missing)
  absent = torch_peers.torch_peer(lambda torch, to: torch, tolerance=0.0)
  x = jnp.ones(3)
  case = Case("attack x", lambda size: Setup(lambda x: x, (x,), {"t": absent}))
  row = _measure(case)
  assert not row.failures
  assert _cells(_page([row]), "attack x")[-1] == "not installed"
  row = _measure(_case(peer=1.1))
  assert row.peers["NumPy"].ratio is None
  assert "**Failed:**\n\n- plus one: NumPy: differs by" in _page([row])

  def broken(size):
    raise RuntimeError("no such thing\nmore")

  row = _measure(Case("x", broken))
  assert row.failures == ["RuntimeError: no such thing"]
  _page([row])


# The command.


def test_the_command_writes_both_files_and_its_status(
  tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(command, "PART", tmp_path / "part")
  monkeypatch.setattr(command, "RESULTS", tmp_path / "whole")
  some = (_case(), _case(name="slow", peer=2.0)._replace(quick=False))
  monkeypatch.setattr(command, "CASES", some)
  assert command.main(["--quick"]) == 0
  assert command.main(["--cases=plus", "--rounds=1"]) == 0
  assert {p.name.split("-")[0] for p in tmp_path.iterdir()} == {"part"}
  name = f"part-{report.slug(report.device())}"
  page = (tmp_path / f"{name}.md").read_text()
  assert "`python -m benchmarks.shape --cases=plus --rounds=1`" in page
  data = json.loads((tmp_path / f"{name}.json").read_text())
  assert [row["case"] for row in data["rows"]] == ["plus one"]
  assert data["rows"][0]["peers"]["NumPy"]["rounds"] == 1
  assert command.main(["--rounds=1"]) == 1
  assert any(p.name.startswith("whole") for p in tmp_path.iterdir())
  assert "slow:" in capsys.readouterr().out


@pytest.mark.parametrize("given", ["--cases=radar", "--rounds=0"])
def test_a_wrong_option_is_refused(given, capsys):
  with pytest.raises(SystemExit):
    command.main([given])
  assert given.split("=")[0].strip("-") in capsys.readouterr().err
