import logging
import os
import pickle
import random
import re

import numpy as np
from PIL import Image
import pytest

from jaxshape.data import decode, folder, sources
from jaxshape.errors import InputError


def write(path, value=0, size=(12, 10)):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new("RGB", size, (value,) * 3).save(path)


def grey(example):
  return int(example["image"][0, 0, 0])


@pytest.fixture
def photos(tmp_path):
  """Two splits of two classes; the grey value is the number of the file."""
  value = 0
  for split in ("train", "val"):
    for name in ("cat", "dog"):
      for file in ("a.png", "b.bmp", "deep/er/c.PNG"):
        write(tmp_path / split / name / file, value)
        value += 1
  write(tmp_path / "train" / "cat" / ".hidden.png")
  write(tmp_path / "train" / ".cache" / "x.png")
  (tmp_path / "train" / "dog" / "notes.txt").write_text("no image")
  return tmp_path


def open_source(path, split="train", **options):
  return folder.open_source(str(path), split=split, image_size=8, **options)


def test_examples_in_the_order_of_names(photos):
  source = open_source(photos)
  assert source.classes == ("cat", "dog")
  assert list(source.files) == [
    *("cat/a.png", "cat/b.bmp", "cat/deep/er/c.PNG"),
    *("dog/a.png", "dog/b.bmp", "dog/deep/er/c.PNG"),
  ]
  assert [grey(source[i]) for i in range(6)] == [0, 1, 2, 3, 4, 5]
  assert [int(source[i]["label"]) for i in range(6)] == [0, 0, 0, 1, 1, 1]
  assert source[0]["label"].dtype == np.int32
  assert grey(open_source(photos, "val")[0]) == 6


def test_a_folder_without_splits_serves_any_split(photos):
  one = open_source(photos / "train", "whatever")
  assert one.files == open_source(photos).files


def test_a_class_may_be_called_train(tmp_path):
  for name in ("bus", "train"):
    write(tmp_path / name / "a.png")
  assert open_source(tmp_path).classes == ("bus", "train")


def test_images_without_labels(tmp_path):
  write(tmp_path / "photos" / "b.png", 2)
  write(tmp_path / "photos" / "a.png", 1)
  source = folder.open_source(
    "photos", split="test", image_size=8, data_dir=str(tmp_path)
  )
  assert source.classes == ()
  assert [grey(e) for e in source] == [1, 2]
  assert source[0]["label"] == -1
  splits = tmp_path / "splits"
  write(splits / "train" / "a.png")
  write(splits / "test" / "a.png", 7)
  assert grey(open_source(splits, "test")[0]) == 7


def test_a_file_that_comes_or_goes_is_told_by_class(photos):
  before = open_source(photos).fingerprint["folders"]
  assert {k: v.split(" (")[0] for k, v in before.items()} == {
    "cat": "3 files",
    "dog": "3 files",
  }
  assert open_source(photos).fingerprint == {"folders": before}
  (photos / "train/dog/a.png").rename(photos / "train/dog/z.png")
  (photos / "train/cat/a.png").unlink()
  after = open_source(photos).fingerprint["folders"]
  assert after["cat"].startswith("2 files (")
  assert after["dog"].startswith("3 files (")
  assert after["dog"] != before["dog"]
  loose = photos / "loose"
  write(loose / "a.png")
  assert list(open_source(loose).fingerprint["folders"]) == ["."]


def test_classes_fix_the_order_of_labels(photos):
  source = open_source(photos, classes=("dog", "bird", "cat"))
  assert source.classes == ("dog", "bird", "cat")
  assert [int(source[i]["label"]) for i in (0, 5)] == [2, 0]


def test_home_is_expanded(photos, monkeypatch):
  monkeypatch.setenv("HOME", str(photos.parent))
  assert len(open_source(f"~/{photos.name}")) == 6


def test_the_order_does_not_depend_on_the_disk(photos, monkeypatch):
  want = open_source(photos).files
  for target, module in (("scandir", os), ("listdir", os)):
    original = getattr(module, target)

    def shuffled(path=".", original=original):
      entries = list(original(path))
      random.Random(len(entries)).shuffle(entries)
      entries.reverse()
      return Entries(entries)

    monkeypatch.setattr(module, target, shuffled)
  assert open_source(photos).files == want


class Entries(list):
  """A list that closes, as what `os.scandir` gives."""

  def __enter__(self):
    return iter(self)

  def __exit__(self, *_):
    pass

  def __next__(self):
    if not self:
      raise StopIteration
    return self.pop(0)


def test_links_back_to_themselves_end(photos):
  (photos / "train" / "cat" / "loop").symlink_to(photos / "train" / "cat")
  assert len(open_source(photos)) == 6


def test_loose_images_are_told(photos, caplog):
  write(photos / "train" / "loose.png")
  assert len(open_source(photos)) == 6
  assert "loose.png" in caplog.text


def test_damaged_images_are_skipped_counted_and_named(photos, caplog):
  for name in ("cat/b.bmp", "dog/deep/er/c.PNG"):
    (photos / "train" / name).write_bytes(b"broken")
  source = open_source(photos, skip_damaged=True)
  assert source.damaged == ()
  with caplog.at_level(logging.WARNING):
    for _ in range(2):
      assert [grey(source[i]) for i in (5, 1, 0)] == [0, 2, 0]
  assert source.damaged == ("cat/b.bmp", "dog/deep/er/c.PNG")
  assert len(caplog.records) == 2  # Once per file.
  assert [float(source[i]["mask"]) for i in range(6)] == [1, 0, 1, 1, 1, 0]
  assert source[1]["label"] == source[2]["label"] == 0
  assert folder.verify(source) == ["cat/b.bmp", "dog/deep/er/c.PNG"]


def test_what_stands_in_does_not_depend_on_what_was_met_before(tmp_path):
  y, x = np.mgrid[:40, :40]
  picture = Image.fromarray(np.stack([x, y, x], -1).astype(np.uint8) * 6)
  for name in ("a.png", "b.png"):
    picture.save(tmp_path / name)
  data = (tmp_path / "a.png").read_bytes()
  (tmp_path / "a.png").write_bytes(data[: len(data) // 2])  # Header intact.
  source = open_source(tmp_path, crop="random", skip_damaged=True)
  first, again, direct = (
    sources.read(source, i, np.random.default_rng(0))["image"]
    for i in (0, 0, 1)
  )
  np.testing.assert_array_equal(first, again)
  np.testing.assert_array_equal(first, direct)


def test_verify_finds_nothing_in_intact_folders(photos):
  assert folder.verify(open_source(photos)) == []


def test_worker_processes_get_a_copy(photos):
  source = open_source(photos, skip_damaged=True, crop="random", scale=(0.2, 1))
  copy = pickle.loads(pickle.dumps(source))
  one, two = (
    sources.read(s, 2, np.random.default_rng(0))["image"]
    for s in (source, copy)
  )
  np.testing.assert_array_equal(one, two)


def test_only_random_boxes_are_drawn(photos):
  assert open_source(photos).sample is None


def test_cache_decodes_once(photos):
  source = open_source(photos, cache=10**6)
  want = source[0]["image"].copy()
  (photos / "train" / "cat" / "a.png").unlink()
  np.testing.assert_array_equal(source[0]["image"], want)


def test_a_damaged_image_is_named(photos):
  (photos / "train" / "dog" / "a.png").write_bytes(b"broken")
  source = open_source(photos)
  assert grey(source[2]) == 2
  with pytest.raises(decode.DamagedError, match=re.escape("dog/a.png")):
    source[3]
  with pytest.raises(IndexError, match=r"0\.\.5, got 6"):
    source[6]


def test_gone_files_and_pipes_are_named(photos):
  source = open_source(photos, skip_damaged=True)
  path = photos / "train" / "cat" / "a.png"
  path.unlink()
  os.mkfifo(path)
  with pytest.raises(InputError, match="a.png is gone or is no regular file"):
    source[0]


def test_nothing_but_damage(tmp_path):
  write(tmp_path / "a.png")
  (tmp_path / "a.png").write_bytes(b"")
  source = open_source(tmp_path, skip_damaged=True)
  with pytest.raises(InputError, match="all 1 images are damaged"):
    source[0]


def test_what_is_not_there(photos):
  near = f"no folder {photos}/trian; {photos} has train"
  with pytest.raises(InputError, match=re.escape(near)):
    open_source(photos / "trian")
  with pytest.raises(InputError, match="split 'test'; there are: train, val"):
    open_source(photos, "test")
  with pytest.raises(InputError, match="is a file; give the folder"):
    open_source(photos / "train" / "dog" / "notes.txt")
  with pytest.raises(InputError, match="folder needs a path"):
    open_source("")
  with pytest.raises(InputError, match="not in classes: dog"):
    open_source(photos, classes=("cat",))
  (photos / "train" / "emu").mkdir()
  with pytest.raises(InputError, match=r"train/emu has no images"):
    open_source(photos)
  with pytest.raises(InputError, match="neither class folders nor images"):
    open_source(photos / "train" / "emu")
