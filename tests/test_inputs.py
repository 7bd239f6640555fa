"""What a stranger with bad luck gives: one line that says what and what to do.

Each case names what the line has to contain; nothing here may leave a traceback
or run on in silence.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
from PIL import Image
import pytest

from configs import texture_suppression
import eval as evaluation
from jaxshape import system
from jaxshape.data import sources
from jaxshape.engine import checkpoints, command, logs
from jaxshape.errors import InputError, reading_config
from jaxshape.filters import diffusion
from tests.tiny import settings
import train


@contextlib.contextmanager
def refused(message):
  with pytest.raises(InputError) as caught:
    yield
  text = str(caught.value)
  assert message in text
  assert "\n" not in text


def _tiny(**changes):
  config = texture_suppression.get_config("tiny")
  config.update_from_flattened_dict(changes)
  return config.lock()


# Refused before anything is compiled.
@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("steps", 0, "config.steps must be at least 1, got 0"),
    ("steps", -3, "config.steps must be at least 1, got -3"),
    ("batch_size", 0, "config.batch_size must be at least 1, got 0"),
    ("batch_size", 9, "multiple of the 8 devices that share it, got 9"),
    ("accumulate", 0, "config.accumulate must be at least 1, got 0"),
    ("averaging", 2.0, "averaging must be in [0, 1), got 2.0"),
    ("log_every", -1, "config.log_every must be at least 0, got -1"),
    ("eval_every", -1, "config.eval_every must be at least 0, got -1"),
    ("save_every", -3, "config.save_every must be at least 0, got -3"),
    ("seed", -1, "config.seed must be in 0..4294967295, got -1"),
    ("seed", 2**40, "config.seed must be in 0..4294967295, got 1099"),
    ("keep", 0, "config.keep must be at least 1, got 0"),
    ("best_mode", "x", "config.best_mode must be max or min, got 'x'"),
    ("best_metric", "x", "config.best_metric='x' needs config.eval_every"),
    ("init_include", ("(",), "config.init_include: '(' is no regular"),
    ("mesh.data", 3, "config.mesh must give sizes of data and model"),
    ("mesh.data", -2, "make up all 8 devices (one may be -1), got"),
    (
      "system",
      "",
      "must be the name of a system, got ''; there are: ",
    ),
    (
      "system",
      "nets",
      "config.system='nets' is no system; there are: ",
    ),
    ("system", "no.where", "config.system='no.where' is no system"),
    ("optimizer.name", "x", "optimizer.name must be one of sgd, "),
    ("optimizer.schedule", "x", "optimizer.schedule must be constant, cosine"),
    ("optimizer.learning_rate", -1.0, "must be a number from 0 up, got -1.0"),
    ("optimizer.learning_rate", float("nan"), "a number from 0 up, got nan"),
    ("optimizer.warmup_steps", 99, "must be more than warmup_steps=99"),
    ("optimizer.boundaries", ("a",), "boundaries must be steps, got ('a',)"),
    ("optimizer.frozen", ("(",), "'(' is no regular expression"),
    ("backbone", "resnet51", "'resnet51' is no backbone; did you mean"),
    ("width", -3, "config.width must be at least 0, got -3"),
    ("dtype", "float31", "config.dtype must be one of float32, bfloat16"),
    ("mean", (1.0, 2.0), "must be three numbers each, std above 0, got (1.0,"),
    ("std", (0.0, 0.0, 0.0), "three numbers each, std above 0"),
    ("suppression.policy", "x", "policy must be one of original, union"),
    ("suppression.filter", "x", "filter must be one of perona_malik"),
    ("suppression.iterations", (5, 2), "a range (low, high) from 0 up, got (5"),
    ("suppression.iterations", (5,), "range (low, high) from 0 up, got (5,)"),
    ("suppression.sigma", (-1.0, 2.0), "suppression.sigma must be a range"),
    ("suppression.probability", 2.0, "probability must be in 0..1, got 2.0"),
    ("bench.corruptions", ("fogg",), "there is no 'fogg'; there are: gaussian"),
    ("bench.severities", (9,), "severities must be some of 1 to 5, got (9,)"),
    ("data.source", "", "data must be 'kind:name' or a path, got ''"),
    ("data.source", "photos", "write kind:name or a path such as ./photos"),
    ("data.source", "tfds:x", "data 'tfds' has no option 'num_examples'"),
    ("data.image_size", 1, "must be in 32..224, got 1"),
    ("data.options.num_examples", 0, "num_examples must be at least 1, got 0"),
    ("init_from", "nowhere", "nowhere/checkpoints holds no checkpoint; give"),
  ],
)
def test_a_config_that_no_run_could_use(field, value, message, tmp_path):
  config = texture_suppression.get_config("tiny")
  with config.unlocked():
    config.update_from_flattened_dict({field: value})
  with refused(message):
    train.train(config.lock(), tmp_path)
  assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"stem": "x"}, "stem must be one of imagenet, small, got 'x'"),
    ({"label_smoothing": 3.0}, "label_smoothing must be between 0 and 1"),
    ({"accumulate": 3}, "accumulate must divide the batch, got 3 for 16"),
    ({"suppression.kappa": -1.0}, "kappa must be above 0, got -1.0"),
    ({"suppression.step_size": 0.5}, "step_size must be above 0 and at most"),
    ({"suppression.conduction": "x"}, "conduction must be one of exponential"),
    ({"augment.random_crop.padding": -1}, "padding must be at least 0, got -1"),
    ({"data.train_split": "tran"}, "has no split 'tran'; it has train, test"),
    ({"optimizer.frozen": ("x",)}, "the pattern 'x' matches no parameter"),
    (
      {"eval_every": 3, "data.eval_splits": ("tst",)},
      "has no split 'tst'; it has train, test",
    ),
    (
      {"eval_every": 3, "best_metric": "val/top1"},
      "config.best_metric must be <evaluator>/<metric>, got 'val/top1'; the",
    ),
  ],
)
def test_an_option_that_a_function_refuses(changes, message, tmp_path):
  with refused(message):
    train.train(_tiny(**changes), tmp_path)
  assert checkpoints.Checkpoints(tmp_path).steps() == []


def test_only_refusals_count_as_input():
  with pytest.raises(ValueError, match="unpack") as caught, reading_config():
    _, _ = (1,)
  assert not isinstance(caught.value, InputError)
  image = np.zeros((4, 4, 3), np.float32)
  with refused("the config does not fit: kappa must be"), reading_config():
    diffusion.perona_malik(image, kappa=-1.0)
  with refused("config lacks a field"), reading_config():
    _ = settings.config().suppression


def _photos(root, splits=("train", "val"), classes=("cat", "dog"), count=3):
  draw = np.random.default_rng(0)
  for split in splits:
    for name in classes:
      folder = root / split / name
      folder.mkdir(parents=True)
      for i in range(count):
        pixels = draw.integers(0, 256, (20, 24, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.{('png', 'jpg')[i % 2]}")


def _folder(root, **changes):
  config = texture_suppression.get_config("folder")
  config.update_from_flattened_dict(
    {
      "data.source": f"folder:{root}",
      "data.workers": 0,
      "data.image_size": 16,
      "backbone": "resnet8",
      "width": 4,
      "steps": 2,
      "eval_every": 1,
      "batch_size": 8,
      "optimizer.warmup_steps": 0,
      "suppression.policy": "original",
      **changes,
    }
  )
  return config.lock()


def _write(path, data):
  return lambda root: (root / path).write_bytes(data)


def _cut(path):
  return lambda root: os.truncate(root / path, 200)


def _empty(path):
  def change(root):
    shutil.rmtree(root / path)
    (root / path).mkdir()

  return change


def _rename(path, to):
  return lambda root: (root / path).rename(root / to)


def _pipe(root):
  (root / "train/cat/0.png").unlink()
  os.mkfifo(root / "train/cat/0.png")


def _huge(root):
  Image.new("1", (9000, 9000)).save(root / "train/dog/0.png")


def _flat(root):
  for name in ("train", "val"):
    shutil.rmtree(root / name)
    shutil.copytree(root.parent / "pool", root / name)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (_cut("train/cat/1.jpg"), "train/cat/1.jpg is damaged: "),
    (_cut("val/cat/1.jpg"), "set data.options.skip_damaged=True"),
    (_write("train/cat/1.jpg", b""), "train/cat/1.jpg is no image of a known"),
    (_write("train/dog/0.png", b"<html>404"), "Replace it, or set"),
    (_huge, "train/dog/0.png has more than max_pixels=50000000 pixels"),
    (_pipe, "train/cat/0.png is gone or is no regular file"),
    (_empty("train/dog"), "train/dog has no images"),
    (_empty("val/dog"), "val/dog has no images"),
    (_empty("train"), "/train holds neither class folders nor images"),
    (_rename("val", "vall"), "has no split 'val'; there are: train"),
    (_rename("val", "test"), "has no split 'val'; there are: test, train"),
    (_rename("train", "fit"), "has no split 'train'; there are: val"),
    (_rename("val/dog", "val/wolf"), "they differ in dog, wolf"),
    (_rename("val/dog", "train/eel"), "differ in dog, eel"),
    (_flat, "must have two classes or more to tell apart, got 0"),
    (lambda root: shutil.rmtree(root / "train/cat"), "two classes or more"),
    (shutil.rmtree, "There is no folder"),
  ],
)
def test_own_pictures_with_a_flaw(change, message, tmp_path):
  root = tmp_path / "photos"
  _photos(root)
  _photos(tmp_path, splits=("",), classes=("pool",))
  change(root)
  with refused(message):
    train.train(_folder(root), tmp_path / "run")
  assert checkpoints.Checkpoints(tmp_path / "run").steps() == []


@pytest.mark.parametrize(
  ("name", "options", "message"),
  [
    ("", {}, "folder needs a path: folder:/path/to/images"),
    ("train/cat/0.png", {}, "0.png is a file; give the folder that holds"),
    ("trian", {}, "There is no folder"),
    (
      "",
      {"skip_bad": 1},
      "has no option 'skip_bad' (did you mean skip_damaged?)",
    ),
    ("train", {"classes": ("cat",)}, "not in classes: dog"),
    ("train", {"crop": "middle"}, "crop must be one of center, random"),
    ("train", {"resize_to": 3}, "resize_to must be an integer >= image_size=8"),
    ("train", {"cache": -1}, "cache must be a number of bytes >= 0, got -1"),
  ],
)
def test_a_source_that_cannot_be_opened(name, options, message, tmp_path):
  _photos(tmp_path)
  spec = f"folder:{tmp_path / name}" if name else "folder:"
  with refused(message):
    sources.load(spec, split="train", image_size=8, **options)


@pytest.fixture(scope="module")
def photo_run(tmp_path_factory):
  """A run that has met a damaged picture; its pictures are beside it."""
  folder = tmp_path_factory.mktemp("photos")
  _photos(folder / "photos")
  _cut("train/cat/1.jpg")(folder / "photos")
  config = _folder(
    folder / "photos", **{"steps": 1, "data.options.skip_damaged": True}
  )
  train.train(config, folder / "run")
  return folder / "run"


def test_damaged_pictures_are_skipped_if_told(photo_run):
  assert "val/top1" in logs.read(photo_run)[-1]


def test_damaged_pictures_are_named_and_counted(photo_run, caplog):
  source = sources.load(
    f"folder:{photo_run.parent / 'photos'}",
    split="train",
    image_size=8,
    skip_damaged=True,
  )
  masks = [float(source[i]["mask"]) for i in range(len(source))]
  assert masks == [1, 0, 1, 1, 1, 1]
  assert source.damaged == ("cat/1.jpg",)
  assert "Skipped (1 so far)" in caplog.text
  assert "cat/1.jpg is damaged" in caplog.text


def test_classes_missing_in_a_split_keep_their_numbers(tmp_path):
  _photos(tmp_path / "photos")
  shutil.rmtree(tmp_path / "photos/val/cat")
  with refused("they differ in cat"):
    train.train(_folder(tmp_path / "photos"), tmp_path / "run")
  source = sources.load(
    f"folder:{tmp_path / 'photos'}",
    split="val",
    image_size=16,
    classes=("cat", "dog"),
  )
  assert [int(source[i]["label"]) for i in range(len(source))] == [1, 1, 1]


def test_no_splits_are_said(tmp_path, caplog):
  _photos(tmp_path, splits=("",))
  sources.load(f"folder:{tmp_path}", split="val", image_size=8)
  assert "all its images serve as 'val', in training too" in caplog.text


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  folder = tmp_path_factory.mktemp("inputs") / "run"
  train.train(settings.config(), folder)
  return folder


@pytest.fixture
def copy(run, tmp_path):
  return shutil.copytree(run, tmp_path / "copy")


def _damage(folder):
  for path in (folder / "checkpoints").rglob("*"):
    if path.is_file() and path.stat().st_size > 20:
      os.truncate(path, 10)


def test_a_workdir_that_cannot_be_used(copy, tmp_path):
  (tmp_path / "file").write_text("")
  with refused("file cannot be written (File exists); give another one"):
    train.train(settings.config(), tmp_path / "file")
  with refused("below cannot be written (Not a directory)"):
    train.train(settings.config(), tmp_path / "file" / "below")
  (tmp_path / "checkpoints").write_text("")
  with refused("checkpoints is no folder; move it out of the way"):
    train.train(settings.config(), tmp_path)
  with checkpoints.lock(copy), refused("is in use by process"):
    train.train(settings.config(), copy)


def test_a_checkpoint_that_does_not_fit_or_is_damaged(copy):
  kept = (copy / "config.json").read_text()
  with refused("is of the system 'tests.tiny.regression', the config names"):
    train.train(settings.config("contrast"), copy)
  with refused("extra/ema/net: stored nothing, wanted float32(4, 1)"):
    train.train(settings.config(averaging=0.9), copy)
  with refused("does not fit this config in "):
    evaluation.evaluate(settings.config(averaging=0.9), copy)
  # A refused config does not take the place of the run's own.
  assert (copy / "config.json").read_text() == kept
  with refused("holds no step 5; it holds: 3, 6"):
    evaluation.evaluate(settings.config(), copy, step=5)
  with refused("holds no step -1"):
    evaluation.evaluate(settings.config(), copy, step=-1)
  _damage(copy)
  for use in (train.train, evaluation.evaluate):
    with refused("holds no intact checkpoint: 6 ("):
      use(settings.config(), copy)
  with refused("holds no intact checkpoint: 6 ("):
    train.train(settings.config(init_from=str(copy)), copy.parent / "other")


def test_another_backbone_or_number_of_classes_is_refused(photo_run, tmp_path):
  _photos(tmp_path)
  with refused("does not fit this config in "):
    train.train(_folder(tmp_path, backbone="resnet14"), photo_run)
  with refused("nothing in"):
    train.train(settings.config(init_from=str(photo_run)), tmp_path / "other")
  for split in ("train", "val"):
    _photos(tmp_path, splits=(split,), classes=("eel",))
  with refused("stored float32(2,), wanted float32(3,)"):
    train.train(_folder(tmp_path), photo_run)


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("", "config.json is no readable config: "),
    ("[]", "config.json is no readable config: no object"),
    ('{"system": ', "config.json is no readable config: "),
    ("{}", "config.steps must be at least 1, got 0"),
    (None, "train first with train.py"),
  ],
)
def test_a_damaged_config_of_a_run(text, message, copy):
  (copy / "config.json").unlink()
  if text is not None:
    (copy / "config.json").write_text(text)
  with refused(message):
    evaluation.evaluate(command.read_config(copy), copy)


@pytest.mark.parametrize(
  ("name", "value", "message"),
  [
    ("steps", "6", "config.steps must be of type int, got '6'"),
    ("steps", True, "config.steps must be of type int, got True"),
    ("mesh", 8, "config.mesh must be of type ConfigDict, got 8"),
    ("optimizer", None, "config.optimizer must be of type ConfigDict"),
  ],
)
def test_an_edited_config_of_a_run(name, value, message, copy):
  values = json.loads((copy / "config.json").read_text())
  (copy / "config.json").write_text(json.dumps({**values, name: value}))
  with refused(message):
    evaluation.evaluate(command.read_config(copy), copy)


def test_a_config_without_the_systems_fields_is_refused(copy):
  config = settings.config(system="texture_suppression")
  with refused("the config lacks a field"):
    system.load(config)


def test_an_empty_workdir_has_no_checkpoint(tmp_path):
  with refused("holds no checkpoint; train first with train.py --workdir="):
    evaluation.evaluate(settings.config(), tmp_path)
  with refused("nowhere is not there"):
    command.read_config(tmp_path / "nowhere")


CONFIG = "--config=configs/texture_suppression.py:tiny"


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (
      ["train.py", CONFIG, "--workdir="],
      "give the run a folder with --workdir",
    ),
    (["train.py", CONFIG, "--config.mesh.data=x"], "--config.mesh.data=x"),
    (["train.py", "--config={tmp}/bad.py", "--workdir=w"], "bad.py"),
    (
      ["train.py", "--config={tmp}/none.py", "--workdir=w"],
      "none.py has no function get_config",
    ),
    (["eval.py", "--workdir={run}", "--checkpoint=abc"], "--checkpoint=abc"),
    (["eval.py", "--workdir={run},{run}"], "must have last parts that differ"),
  ],
)
def test_a_command_line_with_a_slip(arguments, message, run, tmp_path):
  (tmp_path / "bad.py").write_text("def get_config(:\n")
  (tmp_path / "none.py").write_text("x = 1\n")
  done = subprocess.run(
    [sys.executable, *(a.format(run=run, tmp=tmp_path) for a in arguments)],
    capture_output=True,
    text=True,
    env={**os.environ, "XLA_FLAGS": ""},
    check=False,
  )
  assert done.returncode == 1
  lines = done.stderr.strip().splitlines()
  assert len(lines) == 1, done.stderr
  assert lines[0].startswith("error: ")
  assert message in lines[0]


CHILD = """
import sys
from absl import flags
from jaxshape.engine import command
from tests.tiny import settings
import train
config = settings.config(steps=10**6, save_every=50, log_every=0)
workdir = sys.argv.pop()
command.run(lambda: train.train(config, workdir))
"""


def test_ctrl_c_is_one_line_and_loses_nothing(tmp_path):
  with subprocess.Popen(
    [sys.executable, "-c", CHILD, str(tmp_path)],
    env={**os.environ, "XLA_FLAGS": ""},
    stderr=subprocess.PIPE,
    stdout=subprocess.DEVNULL,
    text=True,
  ) as child:
    saved, until = checkpoints.Checkpoints(tmp_path), time.monotonic() + 60
    while not saved.steps():
      assert time.monotonic() < until
      time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    _, error = child.communicate(timeout=60)
  assert child.returncode == 130
  step = saved.steps()[-1]
  # The compiler may warn of what the cache holds; we say one line.
  said = [line for line in error.splitlines() if "cpu_aot_loader" not in line]
  assert said == [
    f"error: stopped by Ctrl-C; step {step} is saved; start me again."
  ]
  config = settings.config(steps=step, save_every=50)
  state = train.train(config, tmp_path)
  assert int(state.step) == step
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
