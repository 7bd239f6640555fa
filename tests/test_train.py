import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import jax
import ml_collections
import numpy as np
import pytest

from jaxshape.engine import checkpoints, logs
from jaxshape.errors import InputError
from tests.tiny import settings
import train

TRAINED = ("regression", "adversaries", "contrast", "clusters", "replay")


def _same(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(checkpoints.whole(x), checkpoints.whole(y))


@pytest.mark.parametrize("kind", TRAINED)
def test_stopped_and_resumed_equals_never_stopped(kind, tmp_path):
  options = {"refresh_every": 2, "averaging": 0.0}
  straight = train.train(settings.config(kind, **options), tmp_path / "a")
  train.train(settings.config(kind, steps=4, **options), tmp_path / "b")
  resumed = train.train(settings.config(kind, **options), tmp_path / "b")
  _same(resumed, straight)
  assert int(straight.step) == 6
  if kind == "clusters":
    assert straight.extra["refreshed"] == 3  # Before steps 1, 3 and 5.


def test_learning_lowers_the_loss_and_leaves_logs_and_checkpoints(tmp_path):
  config = settings.config(steps=60, log_every=20, eval_every=30, save_every=99)
  config.best_metric, config.best_mode = "test/error", "min"
  train.train(config, tmp_path)
  rows = logs.read(tmp_path)
  losses = [row["train/net/loss"] for row in rows if "train/net/loss" in row]
  assert len(losses) == 4  # Steps 20, 30, 40 and 60.
  assert losses[-1] < 0.3 * losses[0]
  errors = [row["test/error"] for row in rows if "test/error" in row]
  assert errors[1] < errors[0]
  assert {"train/images_per_second", "train/share_waiting_for_data"} <= set(
    rows[1]
  )
  run = checkpoints.Checkpoints(tmp_path)
  assert run.steps()[-1] == 60
  assert run.metadata(60)["config"]["steps"] == 60
  assert any(p.name.startswith("events") for p in tmp_path.iterdir())
  assert json.loads((tmp_path / "config.json").read_text())["steps"] == 60


def test_resumed_logs_have_every_step_once(tmp_path):
  train.train(settings.config(steps=5, log_every=1, save_every=2), tmp_path)
  # As after a kill: step 5 was logged, its checkpoint is gone.
  run = checkpoints.Checkpoints(tmp_path)
  (run.folder / "5").rmtree()
  with open(tmp_path / logs.FILE, "a", encoding="utf-8") as file:
    file.write('{"step": 6, "train/ne')
  train.train(settings.config(steps=7, log_every=1), tmp_path)
  steps = [r["step"] for r in logs.read(tmp_path) if "train/net/loss" in r]
  assert steps == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("mesh", [(8, 1), (2, 4), (1, 8)])
def test_any_mesh_gives_the_same_parameters(mesh, tmp_path):
  sizes = ml_collections.ConfigDict({"data": mesh[0], "model": mesh[1]})
  got = train.train(settings.config(mesh=sizes), tmp_path)
  one = settings.config()
  system = train.system_lib.load(one)
  init_key, key = jax.random.split(jax.random.key(0))
  state = system.init(init_key)
  batches = system.train_data(0)
  for i in range(6):
    state, _ = system.train_step(
      state, next(batches), jax.random.fold_in(key, i)
    )
  np.testing.assert_allclose(
    got.params["net"], state.params["net"], rtol=1e-5, atol=1e-6
  )


def test_starts_from_another_runs_parameters(tmp_path, capsys):
  first = train.train(settings.config(), tmp_path / "a")
  config = settings.config(init_from=str(tmp_path / "a"), seed=3)
  config.optimizer.learning_rate = 0.0
  second = train.train(config, tmp_path / "b")
  np.testing.assert_array_equal(first.params["net"], second.params["net"])
  assert int(second.step) == 6
  assert "from step 6 of" in capsys.readouterr().out


def test_another_config_on_a_run_is_named(tmp_path, capsys):
  train.train(settings.config(), tmp_path)
  other = settings.config(noise=0.5, steps=6)
  train.train(other, tmp_path)
  said = capsys.readouterr().out
  assert "began with another config: noise: 0.1 then, 0.5 now" in said
  # Nothing was trained, so the run is what it was.
  kept = json.loads((tmp_path / "config.json").read_text())
  assert kept["noise"] == 0.1


def test_an_error_does_not_lose_the_save_under_way(tmp_path, monkeypatch):
  config = settings.config()
  system = train.system_lib.load(config)

  def breaks(step):
    for number, batch in enumerate(system.train_data(step)):
      if number == 5:
        raise InputError("a damaged image")
      yield batch

  broken = train.System(**{**vars(system), "train_data": breaks})
  monkeypatch.setattr(train.system_lib, "load", lambda _: broken)
  with pytest.raises(InputError, match="a damaged image"):
    train.train(config, tmp_path)
  assert checkpoints.Checkpoints(tmp_path).steps() == [3]


def test_a_metric_that_is_not_measured_cannot_choose_the_best(tmp_path):
  config = settings.config(eval_every=3, best_metric="test/errors")
  with pytest.raises(InputError, match="is not measured; there are: test/err"):
    train.train(config, tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(tmp_path):
  config = settings.config(breaks_at=4)
  message = r"player 'net' is not finite at step 5; .*good checkpoint is step 3"
  with pytest.raises(InputError, match=message):
    train.train(config, tmp_path)
  assert checkpoints.Checkpoints(tmp_path).steps() == [3]


def test_a_trace_is_written(tmp_path):
  train.train(settings.config(), tmp_path, profile=True)
  assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_what_does_not_fit_is_refused(tmp_path):
  with pytest.raises(InputError, match="trains nothing; evaluate it"):
    train.train(settings.config("closed_form"), tmp_path)
  with pytest.raises(InputError, match="multiple of the 8 devices.* got 9"):
    train.train(settings.config(batch_size=9), tmp_path)
  mesh = ml_collections.ConfigDict({"data": 3, "model": 1})
  with pytest.raises(InputError, match="all 8 devices"):
    train.train(settings.config(mesh=mesh), tmp_path)
  train.train(settings.config(), tmp_path / "run")
  with pytest.raises(
    InputError, match=r"of the system 'tests.tiny.regression'"
  ):
    train.train(settings.config("contrast"), tmp_path / "run")


CHILD = """
import sys
from tests.tiny import settings
import train
class Slow:
  pass
config = settings.config(steps=4000, save_every=50)
train.train(config, sys.argv[1])
"""


def _child(folder):
  env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  return subprocess.Popen(
    [sys.executable, "-c", CHILD, str(folder)],
    env=env,
    stdout=subprocess.PIPE,
    text=True,
  )


def _wait_for_step(folder, step):
  run, until = checkpoints.Checkpoints(folder), time.monotonic() + 60
  while not any(s >= step for s in run.steps()):
    assert time.monotonic() < until
    time.sleep(0.05)


def test_told_to_stop_it_saves_and_asks_to_be_started_again(tmp_path):
  with _child(tmp_path) as child:
    _wait_for_step(tmp_path, 50)
    child.send_signal(signal.SIGTERM)
    out, _ = child.communicate(timeout=60)
  assert child.returncode == train.AGAIN
  assert "start me again" in out
  at = checkpoints.Checkpoints(tmp_path).steps()[-1]
  assert f"step {at} is saved" in out


def test_killed_it_goes_on_from_the_last_checkpoint(tmp_path):
  with _child(tmp_path / "killed") as child:
    _wait_for_step(tmp_path / "killed", 50)
    child.kill()
  last = checkpoints.Checkpoints(tmp_path / "killed").steps()[-1]
  one = ml_collections.ConfigDict({"data": -1, "model": 1})
  config = settings.config(steps=last + 60, save_every=50, mesh=one)
  resumed = train.train(config, tmp_path / "killed")
  straight = train.train(config, tmp_path / "straight")
  # The child had one device, this process has eight: the sums' order differs.
  np.testing.assert_allclose(
    resumed.params["net"], straight.params["net"], rtol=1e-4, atol=1e-6
  )


def _with(monkeypatch, config, **fields):
  system = train.system_lib.load(config)
  changed = train.System(**{**vars(system), **fields})
  monkeypatch.setattr(train.system_lib, "load", lambda _: changed)
  return system


class _Named:
  """Batches that say whose they are."""

  def __init__(self, batches, fingerprint):
    self.batches, self.fingerprint = batches, fingerprint

  def __iter__(self):
    return self

  def __next__(self):
    return next(self.batches)


def test_other_data_than_it_began_with_are_refused(tmp_path, monkeypatch):
  files = {"examples": 8, "folders": {"cat": "8 files"}}
  config = settings.config(steps=4)
  system = train.system_lib.load(config)
  named = lambda step: _Named(system.train_data(step), files)
  _with(monkeypatch, config, train_data=named)
  train.train(config, tmp_path)
  stored = checkpoints.Checkpoints(tmp_path).metadata(4)["data"]
  assert stored == {"examples": 8, "folders": {"cat": "8 files"}}
  files = {"examples": 7, "folders": {"cat": "7 files"}}
  longer = settings.config(steps=5)
  message = (
    "8 then, 7 now; folders cat: 8 files then, 7 files now; .*check_data"
  )
  with pytest.raises(InputError, match=message):
    train.train(longer, tmp_path)
  assert checkpoints.Checkpoints(tmp_path).steps()[-1] == 4
  train.train(settings.config(steps=5, check_data=False), tmp_path)
  train.train(settings.config(steps=6), tmp_path)


@pytest.mark.parametrize("steps", [3, 6])
def test_an_evaluation_is_given_up_and_made_good(steps, tmp_path, monkeypatch):
  options = {"eval_every": 3, "steps": steps, "save_every": 100}
  config = settings.config(best_metric="test/error", **options)
  straight = train.train(config, tmp_path / "straight")
  system = train.system_lib.load(config)
  evaluator, seen = system.evaluators["test"], []

  def interrupted():
    for batch in evaluator.data():
      seen.append(1)
      if len(seen) == 3:  # The first one only rehearsed.
        signal.raise_signal(signal.SIGTERM)
      yield batch

  told = dataclasses.replace(evaluator, data=interrupted)
  _with(monkeypatch, config, evaluators={"test": told})
  with pytest.raises(train.Preempted) as stop:
    train.train(config, tmp_path / "told")
  assert stop.value.code == train.AGAIN
  assert len(seen) < 5  # Of four in all.
  assert checkpoints.Checkpoints(tmp_path / "told").steps() == [3]
  again = train.train(config, tmp_path / "told")
  _same(again, straight)
  rows = [logs.read(tmp_path / name) for name in ("told", "straight")]
  got, want = (
    [(r["step"], r["test/error"]) for r in run if "test/error" in r]
    for run in rows
  )
  assert got == want
  metadata = checkpoints.Checkpoints(tmp_path / "told").metadata(steps)
  assert "test/error" in metadata["metrics"]
  # What is there is not evaluated twice.
  count = len(seen)
  train.train(config, tmp_path / "told")
  assert len(seen) == count
