import dataclasses
import hashlib
import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import eval as evaluation
from jaxshape import weights
from jaxshape.engine import checkpoints, command, pytorch
from jaxshape.errors import InputError
from tests.tiny import settings
import train

BODY = np.array([[0.5, -1.0, 2.0, 3.0]], np.float32)
TENSORS = {"body.weight": BODY, "head.seen": np.float32(4.0)}


def _config(**changes):
  return settings.config("pretrained", **changes)


def _file(folder, tensors=TENSORS, name="a.pth"):
  pytorch.save(folder / name, tensors)
  return folder / name


# Golden.


def test_a_file_becomes_a_run_that_is_evaluated_and_trained_on(
  tmp_path, capsys
):
  file, run = _file(tmp_path), tmp_path / "run"
  report = weights.load(_config(), [file], run)
  np.testing.assert_array_equal(report.state.params["net"], BODY.T)
  assert float(report.state.extra["seen"]) == 4.0
  assert [row.state for row in report.rows] == ["taken", "taken"]
  assert checkpoints.Checkpoints(run).steps() == [0]
  # By hand: rows of the test set against sum(x); the weights are known.
  x = np.stack([np.random.default_rng(i).normal(size=4) for i in range(22)])
  error = np.mean((x @ BODY[0] - x.sum(1)) ** 2)
  result = evaluation.evaluate(command.read_config(run), run)
  assert result.step == 0
  assert result.metrics["test/error"] == pytest.approx(error, rel=1e-5)
  config = settings.config(init_from=str(run), steps=1, noise=0.0)
  config.optimizer.learning_rate = 0.0
  state = train.train(config, tmp_path / "tuned")
  np.testing.assert_array_equal(state.params["net"], BODY.T)
  assert "from step 0 of" in capsys.readouterr().out


def test_a_run_is_written_and_read_back(tmp_path):
  state = train.train(_config(), tmp_path / "run")
  for name in ("out.pth", "out.safetensors"):
    report = weights.save(_config(), tmp_path / "run", tmp_path / name)
    assert [row.state for row in report.rows] == ["written", "written"]
    found = pytorch.load(tmp_path / name)
    np.testing.assert_array_equal(found["body.weight"].T, state.params["net"])
    again = weights.load(_config(), [tmp_path / name], tmp_path / f"of {name}")
    np.testing.assert_array_equal(
      again.state.params["net"], state.params["net"]
    )


def test_the_averaged_parameters_are_written_and_made_anew(tmp_path):
  config = _config(averaging=0.9)
  state = train.train(config, tmp_path / "run")
  weights.save(config, tmp_path / "run", tmp_path / "out.pth")
  found = pytorch.load(tmp_path / "out.pth")["body.weight"]
  np.testing.assert_array_equal(found.T, state.extra["ema"]["net"])
  assert (np.asarray(state.params["net"]) != found.T).any()
  report = weights.load(config, [tmp_path / "out.pth"], None)
  np.testing.assert_array_equal(report.state.extra["ema"]["net"], found.T)


def test_a_folder_of_the_public_code_is_read_and_written(tmp_path):
  run, folder = tmp_path / "run", f"{tmp_path / 'public'}/"
  weights.load(_config(), [_file(tmp_path)], run)
  report = weights.save(_config(), run, folder)
  body = pytorch.load(tmp_path / "public" / "body")
  assert list(body) == ["weight"]
  assert list(pytorch.load(tmp_path / "public" / "head_last")) == ["seen"]
  assert len(report.digests) == 2
  both = [tmp_path / "public" / n for n in ("body", "head_last")]
  for files in ([folder], both):
    got = weights.load(_config(), files, None)
    np.testing.assert_array_equal(got.state.params["net"], BODY.T)


def test_tensors_that_no_part_holds_are_not_lost(tmp_path):
  with pytest.raises(InputError, match="keeps neck.w in none of its files"):
    weights._write_files(
      {"body.w": BODY, "neck.w": BODY}, f"{tmp_path}/x/", {"body": "body."}
    )
  assert not (tmp_path / "x").exists()
  with pytest.raises(InputError, match="keeps one file, got the folder"):
    weights._write_files({"w": BODY}, f"{tmp_path}/x/", {})


def test_prefixes_are_those_of_the_longest_part():
  parts = {"head": "a.", "head_last": "b.", "body": "c."}
  names = {"head": "a.", "head_last": "b.", "head_last.pth": "b."}
  names |= {"head_best": "a.", "body-3": "c.", "bodywork": "", "x.pth": ""}
  for name, prefix in names.items():
    assert weights._prefix(name, parts) == prefix, name


def test_a_wrapper_of_several_devices_is_taken_off(tmp_path):
  wrapped = {f"module.{name}": x for name, x in TENSORS.items()}
  report = weights.load(_config(), [_file(tmp_path, wrapped)], None)
  np.testing.assert_array_equal(report.state.params["net"], BODY.T)


# Law: what is reported is what is there.


def test_rows_tell_what_is_taken_left_and_different():
  held = {"a": np.ones((2, 1)), "b": np.ones(3), "c": np.zeros(2)}
  files = {
    "a": np.ones((2, 1), np.float16),
    "n": np.int64(3),
    "b": np.array([1, 1.5, 1]),
    "d": np.ones(1),
  }
  rows = weights.compare(held, files)
  assert [(row.name, row.state) for row in rows] == [
    ("a", "taken"),
    ("n", "not used"),
    ("b", "differs by 0.5"),
    ("d", "not used"),
    ("c", "not in the file"),
  ]
  assert [row.wrong for row in rows] == [False, False, True, False, True]
  (row,) = weights.compare({"a": np.ones(2)}, {"a": np.ones((1, 2))})
  assert row.wrong
  lines = weights.table(rows).splitlines()
  assert lines[0].split() == ["a", "2", "x", "1", "taken"]
  assert lines[1].split() == ["n", "number", "not", "used"]


def test_the_record_tells_which_file_it_was(tmp_path):
  report = weights.load(_config(), [_file(tmp_path)], tmp_path / "run")
  (told,) = report.digests.values()
  sha = hashlib.sha256((tmp_path / "a.pth").read_bytes()).hexdigest()
  record = json.loads((tmp_path / "run" / weights.RECORD).read_text())
  assert record == {"sha256": {"a.pth": told}}
  assert told == sha


def test_checking_writes_nothing_and_sees_a_difference(tmp_path):
  file, run = _file(tmp_path), tmp_path / "run"
  weights.load(_config(), [file], None)
  assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]
  weights.load(_config(), [file], run)
  report = weights.save(_config(), run, file, check=True)
  assert [row.state for row in report.rows] == ["taken", "taken"]
  other = _file(tmp_path, {**TENSORS, "body.weight": BODY + 0.25}, "b.pth")
  before = other.read_bytes()
  report = weights.save(_config(), run, other, check=True)
  assert report.rows[0].state == "differs by 0.25"
  with pytest.raises(InputError, match="1 tensors are not.*body.weight differ"):
    weights._tell(report)
  assert other.read_bytes() == before


# Refusals.


def test_what_does_not_fit_is_refused_and_leaves_no_run(tmp_path):
  run = tmp_path / "run"
  other = _file(tmp_path, {"body.weight": BODY}, "b.pth")
  with pytest.raises(InputError, match=r"wanted body.weight and head.seen"):
    weights.load(_config(), [other], run)
  with pytest.raises(InputError, match=r"another file does, too"):
    weights.load(_config(), [_file(tmp_path), other], run)
  with pytest.raises(InputError, match=r"keep 1 of the.*body.weight differs"):
    weights.load(_config(forgets=True), [tmp_path / "a.pth"], run)
  holed = _file(tmp_path, {**TENSORS, "head.seen": np.float32("nan")}, "c.pth")
  with pytest.raises(InputError, match="not finite"):
    weights.load(_config(), [holed], run)
  with pytest.raises(InputError, match="'tests.tiny.regression' knows no w"):
    weights.load(settings.config(), [other], run)
  with pytest.raises(InputError, match=r"no.pth is not there"):
    weights.load(_config(), [tmp_path / "no.pth"], run)
  assert not run.exists()


def test_a_state_of_other_shapes_is_a_defect_of_the_system(
  tmp_path, monkeypatch
):
  system = weights.system_lib.load(_config())
  assert system.weights is not None
  wide = dataclasses.replace(
    system.weights,
    load=lambda state, _: state.replace(params={"net": jnp.ones((1, 4))}),
  )
  broken = dataclasses.replace(system, weights=wide)
  monkeypatch.setattr(weights.system_lib, "load", lambda _: broken)
  with pytest.raises(TypeError, match=r"'net'.*\(1, 4\) after weights.load"):
    weights.load(_config(), [_file(tmp_path)], None)


def test_a_run_or_a_file_that_is_there_is_kept(tmp_path):
  file, run = _file(tmp_path), tmp_path / "run"
  weights.load(_config(), [file], run)
  with pytest.raises(InputError, match="holds a run already; give another"):
    weights.load(_config(), [file], run)
  with pytest.raises(InputError, match=r"a.pth is there already"):
    weights.save(_config(), run, file)
  with pytest.raises(InputError, match=r"holds no checkpoint"):
    weights.save(_config(), tmp_path / "none", tmp_path / "x.pth")
  with pytest.raises(InputError, match=r"holds no step 3"):
    weights.save(_config(), run, tmp_path / "x.pth", step=3)
  folder = f"{tmp_path / 'public'}/"
  weights.save(_config(), run, folder)
  with pytest.raises(InputError, match=r"public holds body, head_last already"):
    weights.save(_config(), run, folder)
  (tmp_path / "public" / "body").unlink()
  with pytest.raises(InputError, match=r"public holds no body; wanted are"):
    weights.load(_config(), [folder], None)


# The command.


def _run(*words):
  done = subprocess.run(
    [sys.executable, "-m", "jaxshape.weights", *words],
    capture_output=True,
    text=True,
    check=False,
  )
  return done.returncode, done.stdout, done.stderr.strip()


def test_the_command_prints_a_table_and_errors_in_one_line(tmp_path):
  file = _file(tmp_path)
  config = "--config=tests/tiny/settings.py:pretrained"
  code, out, _ = _run(
    "load", config, f"--file={file}", f"--workdir={tmp_path / 'run'}"
  )
  assert code == 0
  assert out.splitlines()[0].split() == ["body.weight", "1", "x", "4", "taken"]
  assert "2 tensors with 5 numbers; 4 parameters; 0 tensors not used" in out
  assert f"  {file}" in out
  code, out, error = _run("load", config, "--file=no.pth", "--check")
  assert (code, error) == (1, "error: no.pth is not there.")


@pytest.mark.parametrize(
  ("verb", "given", "text"),
  [
    ("", {}, "say load or save first"),
    ("lod", {}, "say load or save first, got 'lod'"),
    ("load", {}, "name the file with --file"),
    ("load", {"file": ["a"]}, "with --workdir"),
    ("save", {"file": ["a"], "check": True}, "with --workdir"),
    ("save", {"file": ["a", "b"], "workdir": "x"}, "save writes one"),
  ],
)
def test_a_wrong_command_line_is_told(verb, given, text, monkeypatch):
  values = {"file": None, "workdir": None, "check": False} | given
  flags = type("Flags", (), values)()
  monkeypatch.setattr(weights.flags, "FLAGS", flags)
  with pytest.raises(InputError, match=text):
    weights.main(verb)
