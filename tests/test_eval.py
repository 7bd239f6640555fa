import dataclasses
import json
import os
import subprocess
import sys

import ml_collections
import numpy as np
import pytest

import eval as evaluation
from jaxshape.engine import command
from jaxshape.engine.comparison import Plot
from jaxshape.errors import InputError
from tests.tiny import regression, settings
import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  folder = tmp_path_factory.mktemp("runs") / "first"
  train.train(settings.config(), folder)
  return folder


def test_numbers_are_exact_whatever_the_batch_size(run):
  results = [
    evaluation.evaluate(settings.config(batch_size=size), run)
    for size in (8, 16, 40)
  ]
  values = [r.metrics["test/error"] for r in results]
  np.testing.assert_allclose(values, values[0], rtol=1e-6)
  assert results[0].step == 6
  assert results[0].history[-1]["step"] == 6


def test_a_system_that_trains_nothing_needs_no_checkpoint(tmp_path):
  got = evaluation.evaluate(settings.config("closed_form"), tmp_path)
  x = regression.rows(range(regression.ROWS))
  want = np.mean(regression.squared_error(np.ones((4, 1)), x))
  assert got.metrics["test/error"] == pytest.approx(want, abs=1e-10)


def test_evaluators_say_what_runs_are_compared_by(run, monkeypatch):
  def plots(outputs):
    return {"errors": Plot("lines", (1, 2), (len(outputs), 0), "x", "y")}

  def load(config):
    system = regression.make(config)
    (name,) = system.evaluators
    evaluator = dataclasses.replace(system.evaluators[name], plots=plots)
    return dataclasses.replace(system, evaluators={name: evaluator})

  monkeypatch.setattr(evaluation.system_lib, "load", load)
  (found,) = evaluation.evaluate(settings.config(), run).plots.items()
  assert found == ("test-errors", plots(range(3))["errors"])
  assert not evaluation.evaluate(settings.config(), run, pictures=False).plots


def test_an_older_step_can_be_named(run):
  assert evaluation.evaluate(settings.config(), run, step=3).step == 3
  with pytest.raises(InputError, match="holds no step 4; it holds: 3, 6"):
    evaluation.evaluate(settings.config(), run, step=4)


def test_no_checkpoint_is_refused(tmp_path):
  with pytest.raises(InputError, match=r"holds no checkpoint; train first"):
    evaluation.evaluate(settings.config(), tmp_path)


def test_the_config_of_a_run_is_read_back(run, tmp_path):
  config = command.read_config(run)
  assert config.optimizer.boundaries == ()
  assert config.to_dict() == settings.config().to_dict()
  with pytest.raises(InputError, match="is not there"):
    command.read_config(tmp_path / "nowhere")
  with pytest.raises(InputError, match="nothing was trained there"):
    command.read_config(tmp_path)
  (tmp_path / "config.json").write_text('{"system": ')
  with pytest.raises(InputError, match="is no readable config"):
    command.read_config(tmp_path)


def _script(*arguments, folder="."):
  env = {**os.environ, "XLA_FLAGS": ""}
  return subprocess.run(
    [sys.executable, *arguments],
    capture_output=True,
    text=True,
    env=env,
    cwd=folder,
    check=False,
  )


def test_one_command_compares_runs(run, tmp_path):
  second = run.parent / "second"
  train.train(settings.config(steps=3), second)
  out = tmp_path / "compared"
  done = _script("eval.py", f"--workdir={run},{second}", f"--output={out}")
  assert done.returncode == 0, done.stderr
  assert "first" in done.stdout
  assert f"report: {out}/report.html" in done.stdout
  numbers = json.loads((out / "metrics.json").read_text())
  assert set(numbers) == {"first", "second"}
  assert numbers["first"]["test/error"] < numbers["second"]["test/error"]


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["train.py"], "name a config, such as --config=configs/"),
    (
      ["train.py", "--config=configs/texture_supression.py"],
      "there are: configs/",
    ),
    (["train.py", "--config=configs/texture_suppression.py:big"], "mode must"),
    (["train.py", "--config=configs/texture_suppression.py:tiny"], "--workdir"),
    (
      [
        "train.py",
        "--config=configs/texture_suppression.py:tiny",
        "--workdir=w",
        "--config.optimizer.lr=1",
      ],
      "the config has no field --config.optimizer.lr",
    ),
    (
      [
        "train.py",
        "--config=configs/texture_suppression.py:tiny",
        "--workdir=w",
        "--config.steps=many",
      ],
      "--config.steps=many",
    ),
    (["train.py", "--cnfig=x"], "Unknown command line flag 'cnfig'"),
    (["eval.py"], "name the run to evaluate with --workdir"),
    (["eval.py", "--workdir=nowhere"], "nowhere is not there"),
  ],
)
def test_what_a_person_mistypes_is_one_line(arguments, message):
  done = _script(*arguments)
  assert done.returncode == 1
  assert done.stdout == ""
  lines = done.stderr.strip().splitlines()
  assert len(lines) == 1, done.stderr
  assert lines[0].startswith("error: ")
  assert message in lines[0]


def test_help_is_there():
  for script in ("train.py", "eval.py"):
    done = _script(script, "--help")
    assert "--workdir" in done.stdout


def test_config_values_survive_json(tmp_path):
  config = ml_collections.ConfigDict({"a": (1, 2), "b": {"c": ("x",)}, "d": ""})
  command.write_config(config, tmp_path)
  got = command.read_config(tmp_path).to_dict()
  assert {name: got[name] for name in config} == config.to_dict()
  assert got["log_every"] == 50  # What the run did not know has its default.
