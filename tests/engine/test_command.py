import os
import pathlib
import sys

from absl import flags
from ml_collections import config_flags
import pytest

from jaxshape.engine import checkpoints, command
from jaxshape.errors import InputError

# How ml_collections opens a config's file.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module")
CONFIG = "configs/texture_suppression.py:tiny"


@pytest.fixture
def script(monkeypatch):
  """Runs a script's main with flags of its own, as `app.run` would."""

  def run(main, *arguments):
    argv = ["script.py", *arguments]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
      "config", None, "", flag_values=values, sys_argv=argv
    )
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    monkeypatch.setattr(flags, "FLAGS", values)
    monkeypatch.setattr(
      command.app, "run", lambda main, flags_parser: main(flags_parser(argv))
    )
    command.run(main)

  return run


def _fails(error):
  def main():
    raise error

  return main


def test_main_sees_the_flags_and_the_config(script):
  seen = []

  def main():
    config = command.require_config()
    seen.append((config.steps, config.optimizer.name, flags.FLAGS.workdir))

  script(main, f"--config={CONFIG}", "--workdir=w", "--config.steps=4")
  assert seen == [(4, "adamw", "w")]


@pytest.mark.parametrize(
  ("error", "message"),
  [
    (InputError("say this."), "say this.\n"),
    (MemoryError(), "out of memory; lower --config.batch_size"),
    (OSError(13, "No right", "runs/a"), "runs/a: No right.\n"),
  ],
)
def test_what_is_no_defect_is_one_line(script, capsys, error, message):
  with pytest.raises(SystemExit) as stop:
    script(_fails(error))
  assert stop.value.code == 1
  out, err = capsys.readouterr()
  assert out == ""
  assert err.startswith(f"error: {message}")
  assert err.count("\n") == 1


def test_an_interrupted_script_says_so_and_where_it_stopped(script, capsys):
  with pytest.raises(SystemExit) as stop:
    script(_fails(KeyboardInterrupt("step 3 is saved")))
  assert stop.value.code == 130  # As shells have it.
  err = capsys.readouterr().err
  assert err == "error: stopped by Ctrl-C; step 3 is saved\n"


@pytest.mark.parametrize(
  "error",
  [ValueError("a defect"), KeyError("k"), RuntimeError("r"), OSError("o")],
)
def test_a_defect_keeps_its_traceback(script, capsys, error):
  with pytest.raises(type(error)) as caught:
    script(_fails(error))
  assert caught.value is error
  assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
  ("error", "message"),
  [
    (checkpoints.SaveError("could not save"), "could not save\n"),
    (OSError(28, "No space left", "runs/a"), "runs/a: No space left.\n"),
  ],
)
def test_a_failed_write_ends_the_process_at_once(
  script, capsys, monkeypatch, error, message
):
  class Ended(BaseException):
    pass

  def end(code):
    raise Ended(code)

  monkeypatch.setattr(os, "_exit", end)
  with pytest.raises(Ended) as ended:
    script(_fails(error))
  assert ended.value.args == (1,)
  assert capsys.readouterr().err == f"error: {message}"


def test_other_writes_of_a_failed_save_are_not_heard(script, monkeypatch):
  heard = []
  monkeypatch.setattr(
    sys, "unraisablehook", lambda failed: heard.append(str(failed.exc_value))
  )

  class Late:
    def __init__(self, text):
      self.text = text

    def __del__(self):
      raise RuntimeError(self.text)

  def main():
    for text in ("Event loop is closed", "a defect"):
      late = Late(text)
      del late

  script(main)
  assert heard == ["a defect"]


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["extra"], "unknown argument 'extra'; see --help."),
    (["--wrkdir=w"], "command line: Unknown command line flag 'wrkdir'"),
    (
      [f"--config={CONFIG}", "--config.optimizer.lr=1"],
      "the config has no field --config.optimizer.lr",
    ),
    ([f"--config={CONFIG}", "--config.steps=many"], "--config.steps=many"),
  ],
)
def test_what_a_person_mistypes_is_one_line(script, capsys, arguments, message):
  with pytest.raises(SystemExit) as stop:
    script(lambda: pytest.fail("main ran"), *arguments)
  assert stop.value.code == 1
  out, err = capsys.readouterr()
  assert out == ""
  assert err.startswith("error: ")
  assert message in err
  assert err.count("\n") == 1


def test_without_a_config_those_that_exist_are_named(script, capsys):
  with pytest.raises(SystemExit):
    script(command.require_config)
  err = capsys.readouterr().err
  assert "name a config, such as --config=" in err
  for path in pathlib.Path("configs").glob("[!_]*.py"):
    assert str(path) in err


def test_a_folder_without_configs_says_so(
  script, capsys, monkeypatch, tmp_path
):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(SystemExit):
    script(command.require_config, "--config=configs/missing.py")
  err = capsys.readouterr().err
  assert "there are: none in this folder" in err
  assert err.count("\n") == 1


def test_a_config_of_no_object_is_refused(tmp_path):
  (tmp_path / command.CONFIG_FILE).write_text("[1, 2]")
  with pytest.raises(InputError, match="no readable config: no object"):
    command.read_config(tmp_path)
  (tmp_path / command.CONFIG_FILE).write_bytes(b"\xff\xfe{")
  with pytest.raises(InputError, match="no readable config"):
    command.read_config(tmp_path)


def test_the_config_that_is_read_is_locked(tmp_path):
  command.write_config({"a": {"b": [1, [2, 3]]}}, tmp_path)
  config = command.read_config(tmp_path)
  assert config.a.b == (1, (2, 3))
  with pytest.raises(AttributeError):
    config.c = 1
