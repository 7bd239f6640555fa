import logging
import pickle
import struct
import zlib

import numpy as np
from PIL import Image
import pytest

from jaxshape.data import decode, imagenet, sources, stream
from jaxshape.errors import InputError
from jaxshape.metrics import categories

TENCH, TABBY, TISSUE = "n01440764", "n02123045", "n15075141"


def write(path, value=0):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new("RGB", (10, 8), (value,) * 3).save(path)


def load(root, split="val", **options):
  return sources.load(f"imagenet:{root}", split=split, image_size=4, **options)


def labels(source):
  return [int(source[i]["label"]) for i in range(len(source))]


def chunk(name, data):
  check = struct.pack(">I", zlib.crc32(name + data))
  return struct.pack(">I", len(data)) + name + data + check


def bomb(side):
  """A black picture of one bit per pixel."""
  rows = zlib.compress(bytes(side * (1 + (side + 7) // 8)), 9)
  header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
  parts = ((b"IHDR", header), (b"IDAT", rows), (b"IEND", b""))
  return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.fixture
def root(tmp_path):
  for i, name in enumerate((TISSUE, TENCH, TABBY)):
    write(tmp_path / "val" / name / f"ILSVRC2012_val_{i}.JPEG", i)
    write(tmp_path / "val" / name / "b.png", 100)
  write(tmp_path / "train" / TABBY / "a.png")
  return tmp_path


def test_classes_are_those_of_a_head():
  ids, names = imagenet.wordnet_ids(), imagenet.classes()
  assert len(ids) == len(set(ids)) == len(set(names)) == 1000
  assert list(ids) == sorted(ids)
  known = {0: "tench", 134: "crane bird", 517: "crane", 999: "toilet tissue"}
  assert {i: names[i] for i in known} == known
  # Two tables that nobody made from each other.
  members = [names[i] for i in np.flatnonzero(categories.IMAGENET_TO_16 == 7)]
  assert members[:4] == ["tabby", "tiger cat", "Persian cat", "Siamese cat"]
  assert categories.CATEGORIES[7] == "cat"


def test_labels_are_numbers_of_classes(root):
  source = load(root)
  assert labels(source) == [0, 0, 281, 281, 999, 999]
  assert source[0]["label"].dtype == np.int32
  assert source.present == (0, 281, 999)
  assert source.classes == imagenet.classes()
  assert source.files[0] == f"{TENCH}/ILSVRC2012_val_1.JPEG"
  assert labels(load(root, "train")) == [281]


def test_folders_without_splits_serve_any(root, caplog):
  assert labels(load(root / "val")) == labels(load(root))
  assert "in training too" in caplog.text


def test_folders_called_by_numbers(tmp_path):
  for i in ("7", "010", "999"):
    write(tmp_path / "matched-frequency" / i / "a.png")
  source = load(tmp_path, "matched-frequency")
  assert labels(source) == [10, 7, 999]
  assert source.present == (7, 10, 999)


def test_no_root_is_classes_alone():
  source = load("")
  assert (len(source), source.present) == (0, ())
  assert source.classes == imagenet.classes()
  assert stream.fingerprint(source)["examples"] == 0


def test_fingerprint_boxes_and_copies(root):
  source = load(root, crop="random", scale=(0.1, 1))
  before = stream.fingerprint(source)
  assert before["folders"][TABBY].startswith("2 files (")
  copy = pickle.loads(pickle.dumps(source))
  one, two = (
    sources.read(s, 3, np.random.default_rng(1))["image"]
    for s in (source, copy)
  )
  np.testing.assert_array_equal(one, two)
  assert copy.present == source.present
  (root / "val" / TABBY / "b.png").unlink()
  assert stream.fingerprint(load(root)) != before


def test_damage_is_counted_and_bombs_are_not_unpacked(root, caplog):
  data = bomb(13_000)
  assert len(data) < 25_000
  (root / "val" / TENCH / "b.png").write_bytes(data)
  with pytest.raises(decode.DamagedError, match=rf"{TENCH}/b.png has more tha"):
    load(root)[1]
  (root / "val" / TISSUE / "b.png").write_bytes(data[:40])
  source = load(root, skip_damaged=True)
  with caplog.at_level(logging.WARNING):
    masks = [float(source[i]["mask"]) for i in range(6)]
  assert masks == [1, 0, 1, 1, 1, 0]
  assert source.damaged == (f"{TENCH}/b.png", f"{TISSUE}/b.png")
  assert "max_pixels=50000000" in caplog.text


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (["val/n01440765/a.png"], r"n01440765 \(did you mean n0144076\d\?\)"),
    (["val/1000/a.png"], r"are not WordNet ids .* of ImageNet: 1000"),
    (["val/tench/a.png"], r"/val has folders .*: tench"),
    ([f"train/{TENCH}/a.png"], r"no split 'val'; there are: train"),
    ([f"sketch/{TENCH}/a.png"], r"no split 'val'; there are: sketch"),
    (["val/a.png"], r"/val holds 1 images and no class folders"),
    ([f"val/{TENCH}/a.txt"], rf"/val/{TENCH} has no images"),
  ],
)
def test_what_does_not_fit_is_named(tmp_path, make, message):
  for name in make:
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    path.touch()
  with pytest.raises(InputError, match=message):
    load(tmp_path)


def test_no_folder():
  with pytest.raises(InputError, match="There is no folder /nowhere"):
    load("/nowhere")
