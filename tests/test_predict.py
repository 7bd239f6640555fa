"""Folders of images in, tables of classes out."""

import csv
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from configs import texture_suppression as configs
from jaxshape import predict
from jaxshape import system as system_lib
from jaxshape.data import decode
from jaxshape.engine import checkpoints, classifiers, command, runtime
from jaxshape.errors import InputError
from jaxshape.metrics import categories

RNG = np.random.default_rng(0)
FILES = ["a.png", "b/c, d.jpg", "b/e/f.webp", "b/e/g.PNG", "ü.bmp"]
FILES = sorted(FILES + [f"z{i}.png" for i in range(6)])
SIZE = 6
CLASSES = ("ant", "bee", "cow", "dog")
MESH = runtime.make_mesh({"data": -1, "model": 1})
DECODER = decode.Decoder(image_size=SIZE, resize_to=7)


def _logits(state, images):
  flat = jnp.asarray(images, jnp.float32).reshape(len(images), -1)
  return flat @ state["w"]


def _network(classes=CLASSES, **changed):
  w = RNG.normal(size=(3 * SIZE**2, len(classes))) / 200
  state = {"w": jnp.asarray(w, jnp.float32)}
  made = predict.Network(_logits, state, classes, DECODER, MESH)
  return made._replace(**changed)


NETWORK = _network()


@pytest.fixture
def folder(tmp_path):
  """Pictures of all sizes, and files that are none."""
  for name in FILES:
    path = tmp_path / "photos" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (*RNG.integers(5, 12, 2).tolist(), 3)
    Image.fromarray(RNG.integers(0, 256, shape, dtype=np.uint8)).save(path)
  (tmp_path / "photos" / "notes.txt").write_text("no photo")
  (tmp_path / "photos" / ".hidden.png").write_text("no photo")
  return tmp_path / "photos"


def _table(path):
  with open(path, newline="", encoding="utf-8") as file:
    return list(csv.reader(file))


def _cut(root, decoder=DECODER):
  files = [(root / name).read_bytes() for name in FILES]
  return np.stack([decoder(data, name="x") for data in files])


def _softmax(logits):
  p = np.exp(logits - logits.max(axis=-1, keepdims=True))
  return p / p.sum(axis=-1, keepdims=True)


def _check_rows(rows, p, classes, top):
  """The highest of probabilities [images, classes], in their order."""
  assert [row[0] for row in rows] == FILES
  for row, each in zip(rows, p, strict=True):
    best = np.argsort(-each)[:top]
    assert row[1::2] == [classes[k] for k in best]
    np.testing.assert_allclose(
      np.float64(row[2::2]), each[best], rtol=1e-4, atol=1e-7
    )


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_every_image_gets_its_likeliest_classes(folder, tmp_path, batch_size):
  path, left_out = predict.predict(
    folder,
    tmp_path / "new" / "out.csv",
    network=NETWORK,
    top=3,
    batch_size=batch_size,
  )
  assert left_out == []
  assert [p.name for p in path.parent.iterdir()] == ["out.csv"]
  header, *rows = _table(path)
  assert header == [
    "file", "class1", "probability1", "class2", "probability2", "class3",
    "probability3",
  ]  # fmt: skip
  flat = _cut(folder).reshape(len(FILES), -1).astype(np.float64)
  p = _softmax(flat @ np.asarray(NETWORK.state["w"]))
  _check_rows(rows, p, CLASSES, 3)


def test_classes_that_may_be_there_at_once_have_their_own_probability(
  folder, tmp_path
):
  network = NETWORK._replace(independent=True)
  path, _ = predict.predict(folder, tmp_path / "o.csv", network=network)
  header, *rows = _table(path)
  assert len(header) == 1 + 2 * len(CLASSES)  # No more than there are.
  flat = _cut(folder).reshape(len(FILES), -1).astype(np.float64)
  p = 1 / (1 + np.exp(-flat @ np.asarray(NETWORK.state["w"])))
  _check_rows(rows, p, CLASSES, len(CLASSES))


def test_categories_gather_the_classes_of_imagenet(folder, tmp_path):
  network = _network(tuple(map(str, range(1000))))
  path, _ = predict.predict(
    folder, tmp_path / "o.csv", network=network, top=2, categories="imagenet"
  )
  header, *rows = _table(path)
  assert header == ["file", "category1", "score1", "category2", "score2"]
  flat = _cut(folder).reshape(len(FILES), -1).astype(np.float64)
  p = _softmax(flat @ np.asarray(network.state["w"]))
  score = [p[:, k == categories.IMAGENET_TO_16].mean(axis=1) for k in range(16)]
  _check_rows(rows, np.stack(score, axis=-1), categories.CATEGORIES, 2)


# Runs that stop.


def _predict(folder, output, network=NETWORK, **options):
  return predict.predict(folder, output, network=network, **options)


def test_a_stopped_run_goes_on(folder, tmp_path, monkeypatch):
  monkeypatch.setattr(predict.runtime, "place", _alone)
  alone = NETWORK._replace(mesh=_One())
  whole, _ = _predict(folder, tmp_path / "whole.csv", alone)
  out, part = tmp_path / "out.csv", tmp_path / "out.csv.part"
  read, seen = predict._Images.__getitem__, []

  def stopping(self, i):
    seen.append(self._files[i])
    if self._files[i] == "z1.png" and seen[0] != "again":
      raise KeyboardInterrupt
    return read(self, i)

  monkeypatch.setattr(predict._Images, "__getitem__", stopping)
  with pytest.raises(KeyboardInterrupt):
    _predict(folder, out, alone, batch_size=1)
  assert not out.exists()
  done = part.read_text().count('\n"') - 1
  assert 0 < done < len(FILES)
  for options, message in (
    ({"top": 1}, "other top; give the same command"),
    ({"network": _network(mesh=_One())}, "other network; give the same"),
  ):
    with pytest.raises(InputError, match=message):
      _predict(folder, out, **{"network": alone, **options})
  # A row that is half there, as after a loss of power, and one of an image
  # that is another now.
  with part.open("a") as file:
    file.write('"z5.png,ant,0.9')
  Image.new("RGB", (9, 9), "red").save(folder / "a.png")
  seen[:] = ["again"]
  _predict(folder, out, alone, batch_size=1)
  assert set(seen[1:]) < set(FILES)
  assert {"a.png", "z1.png", "z5.png"} <= set(seen)
  assert not part.exists()
  (_, first, *old), (_, other, *new) = _table(whole), _table(out)
  assert [other[0], *(row[0] for row in new)] == FILES
  assert first != other
  assert [row[1::2] for row in old] == [row[1::2] for row in new]
  old, new = (np.float64([row[2::2] for row in rows]) for rows in (old, new))
  np.testing.assert_allclose(old, new, rtol=1e-4)
  with pytest.raises(InputError, match=r"out\.csv is there already"):
    _predict(folder, out)


class _One:
  """A mesh of one device, so that batches may be of one image."""

  shape = {"data": 1}  # noqa: RUF012 (nobody changes it)


def _alone(batch, mesh):
  del mesh
  return {name: jnp.asarray(leaf) for name, leaf in batch.items()}


def test_a_part_of_something_else_is_refused(folder, tmp_path):
  (tmp_path / "o.csv.part").write_text("half\n")
  with pytest.raises(InputError, match=r"o\.csv\.part is damaged; remove it"):
    _predict(folder, tmp_path / "o.csv")


def test_damaged_images_are_named_or_left_out(folder, tmp_path):
  whole, _ = _predict(folder, tmp_path / "whole.csv")
  (folder / "ab.png").write_bytes((folder / "a.png").read_bytes()[:60])
  (folder / "web.jpg").write_text("<html>404</html>")
  out = tmp_path / "out.csv"
  with pytest.raises(InputError, match=r"(ab\.png|web\.jpg) .*--skip_damaged"):
    _predict(folder, out)
  assert not list(tmp_path.glob("out*"))  # Nothing was done yet.
  _, left_out = _predict(folder, out, skip_damaged=True)
  assert left_out == ["ab.png", "web.jpg"]
  assert out.read_text() == whole.read_text()
  for name in FILES:
    (folder / name).unlink()
  with pytest.raises(InputError, match="all 2 images are damaged"):
    _predict(folder, tmp_path / "none.csv", skip_damaged=True)


def test_no_numbers_are_refused_by_the_images_name(folder, tmp_path):
  def logits(state, images):
    bad = jnp.all(images == 9, axis=(1, 2, 3))[:, None]
    return jnp.where(bad, jnp.nan, _logits(state, images))

  Image.new("RGB", (9, 9), (9, 9, 9)).save(folder / "z3.png")
  with pytest.raises(InputError, match=r"no finite numbers for .*z3\.png"):
    _predict(folder, tmp_path / "o.csv", NETWORK._replace(logits=logits))


# Refusal.


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"top": 0}, "top must be 1 or more, got 0"),
    ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
    ({"categories": "coco"}, "categories must be one of imagenet, got 'coco'"),
    ({"categories": "imagenet"}, "1,000 classes.* tells 4 classes apart"),
  ],
)
def test_bad_options_are_refused(folder, tmp_path, options, message):
  with pytest.raises(InputError, match=message):
    _predict(folder, tmp_path / "out.csv", **options)
  assert not list(tmp_path.glob("out*"))


def test_bad_folders_and_outputs_are_refused(folder, tmp_path):
  (tmp_path / "empty").mkdir()
  for source, output, message in (
    ("gone", "o.csv", "there is no folder .*gone"),
    ("photos/a.png", "o.csv", r"there is no folder .*a\.png"),
    ("empty", "o.csv", "holds no images"),
    ("photos", "o.txt", "must end with .csv"),
    ("photos", "photos/b/o.csv", "lies in the folder of the images"),
  ):
    with pytest.raises(InputError, match=message):
      _predict(tmp_path / source, tmp_path / output)
  assert not list(tmp_path.glob("o.*"))
  assert not list(folder.rglob("*.csv*"))


# Runs.


@pytest.fixture(scope="module", name="run")
def _run(tmp_path_factory):
  """A workdir with a network as it is before training."""
  root = tmp_path_factory.mktemp("data")
  for i, name in enumerate(CLASSES):
    for split in ("train", "val"):
      (root / split / name).mkdir(parents=True)
      Image.new("RGB", (9, 8), (60 * i, 9, 99)).save(
        root / split / name / "0.png"
      )
  config = configs.get_config("folder")
  config.data.source = f"folder:{root}"
  config.data.image_size = 16
  config.data.options.resize_to = 20
  config.data.options.interpolation = "bicubic"
  config.backbone, config.width = "resnet8", 4
  workdir = tmp_path_factory.mktemp("run")
  _save(config.lock(), workdir)
  return workdir, config


def _save(config, workdir):
  mesh = runtime.make_mesh(config.mesh)
  system = system_lib.load(config)
  state = runtime.initialize(system.init, jax.random.key(0), mesh)
  saved = checkpoints.Checkpoints(workdir)
  saved.save(state, config=config.to_dict(), metrics={})
  saved.wait()
  command.write_config(config, workdir)


def test_the_command_names_images_as_the_run_cuts_them(run, folder, tmp_path):
  (folder / "ab.png").write_bytes(b"no image")
  done = subprocess.run(
    [
      sys.executable, "-m", "jaxshape.predict", f"--workdir={run[0]}",
      "--images=photos", "--output=out.csv", "--top=2", "--skip_damaged",
      "--batch_size=4",
    ],
    capture_output=True, text=True, check=False, cwd=tmp_path,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert "left out, as they are damaged: 1, ab.png" in done.stdout
  decoder = decode.Decoder(image_size=16, resize_to=20, interpolation="bicubic")
  network = predict.load(run[0])
  assert network.decoder == decoder
  system = system_lib.load(run[1])
  images = {"image": _cut(folder, decoder)}
  p = _softmax(np.asarray(jax.jit(system.predict)(network.state, images)))
  _check_rows(_table(tmp_path / "out.csv")[1:], p, CLASSES, 2)


def test_generated_pictures_are_not_cut():
  config = configs.get_config("tiny").lock()
  got = predict._decoder(config, classifiers.Splits(config))
  assert got == decode.Decoder(image_size=32, resize_to=32)


def test_padded_pictures_are_refused(run):
  config = run[1].copy_and_resolve_references()
  splits = classifiers.Splits(config)
  with config.unlocked():
    config.data.options.fit = "pad"
  with pytest.raises(InputError, match="fit='pad'.*only networks of cut ones"):
    predict._decoder(config, splits)


def test_what_is_no_run_of_a_classifier_is_refused(run, tmp_path):
  with pytest.raises(InputError, match="nowhere is not there"):
    predict.load(tmp_path / "nowhere")
  with pytest.raises(InputError, match=r"holds no config\.json"):
    predict.load(tmp_path)
  with pytest.raises(InputError, match="has no best checkpoint"):
    predict.load(run[0], step="best")
  config = run[1].copy_and_resolve_references()
  command.write_config(config, tmp_path)
  with pytest.raises(InputError, match="holds no checkpoint; train first"):
    predict.load(tmp_path)
  # Before the checkpoint is looked for.
  with config.unlocked():
    config.system = "tests.tiny.regression"
  for name in (None, "image_size", "train_split"):
    if name is not None:
      with config.unlocked():
        del config.data[name]
    command.write_config(config, tmp_path)
    with pytest.raises(InputError, match="regression.* gives no logits of im"):
      predict.load(tmp_path)
