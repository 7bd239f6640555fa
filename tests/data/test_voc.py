import pickle
import re
from typing import Any

import numpy as np
from PIL import Image
import pytest

from jaxshape.data import decode, sources, stream, voc
from jaxshape.errors import InputError

SIZE = 16
CAT, DOG = voc.CLASSES.index("cat"), voc.CLASSES.index("dog")


def annotation(*things, extra=""):
  objects = "".join(
    f"<object><name>{name}</name><difficult>{hard}</difficult>"
    "<part><name>head</name></part></object>"
    for name, hard in things
  )
  return f"<annotation>{extra}{objects}</annotation>"


@pytest.fixture
def root(tmp_path):
  """Two pictures, 24 x 12 and 12 x 20, with a cat's left half."""
  year = tmp_path / "VOCdevkit" / "VOC2007"
  for name in ("JPEGImages", "Annotations", "SegmentationClass"):
    (year / name).mkdir(parents=True)
  sets = {"Main": "a\nb\n", "Segmentation": "a\n\nb\n"}
  for name, text in sets.items():
    (year / "ImageSets" / name).mkdir(parents=True)
    (year / "ImageSets" / name / "train.txt").write_text(text)
  (year / "ImageSets" / "Main" / "cat_train.txt").write_text("a 1\nb -1\n")
  for name, size in (("a", (24, 12)), ("b", (12, 20))):
    Image.new("RGB", size, (200, 100, 50)).save(
      year / "JPEGImages" / f"{name}.jpg", quality=100
    )
    found = np.zeros(size[::-1], np.uint8)
    found[:, : size[0] // 2] = CAT + 1
    found[0] = voc.VOID
    image = Image.fromarray(found)
    image.putpalette(voc.palette().ravel().tolist())
    image.save(year / "SegmentationClass" / f"{name}.png")
  (year / "Annotations" / "a.xml").write_text(
    annotation(("cat", 0), ("dog", 1), ("cat", 1))
  )
  (year / "Annotations" / "b.xml").write_text(annotation(("dog", 1)))
  return tmp_path


def year_of(root):
  return root / "VOCdevkit" / "VOC2007"


def open_source(root, split="train", **options) -> Any:
  options = {"image_size": SIZE, "year": 2007, **options}
  return sources.load(f"voc:{root}", split=split, **options)


def test_labels_are_those_of_the_challenge(root):
  source = open_source(root)
  assert source.classes == voc.CLASSES
  assert len(source.classes) == 20
  assert list(source.classes) == sorted(source.classes)
  want = np.zeros((2, 20), np.float32)
  want[0, CAT], want[0, DOG], want[1, DOG] = 1, -1, -1
  for example, labels in zip((source[0], source[1]), want, strict=True):
    assert example["image"].shape == (SIZE, SIZE, 3)
    assert example["image"].dtype == np.uint8
    np.testing.assert_array_equal(example["labels"], labels)
    assert example["labels"].dtype == np.float32
  with pytest.raises(IndexError):
    source[2]


def test_maps_follow_their_pictures(root):
  source = open_source(root, task="segmentation", resize_to=SIZE)
  assert source.classes == ("background", *voc.CLASSES)
  # 24 x 12 scaled by 4 / 3 to 32 x 16; columns 8..24, the middle at 8.
  found = source[0]["segmentation"]
  assert found.dtype == np.int32
  np.testing.assert_array_equal(found[2:, :8], CAT + 1)
  np.testing.assert_array_equal(found[2:, 8:], 0)
  np.testing.assert_array_equal(found[0], voc.VOID)
  # 12 x 20 scaled to 16 x 26; the void row is cut away.
  assert set(np.unique(source[1]["segmentation"])) == {0, CAT + 1}
  np.testing.assert_array_equal(np.flatnonzero(source[0]["labels"]), [CAT])


def test_maps_are_never_interpolated(root):
  for size in (9, 16, 37):
    source = open_source(
      root, task="segmentation", image_size=size, interpolation="bicubic"
    )
    for i in range(2):
      values = set(np.unique(source[i]["segmentation"]))
      assert values <= {0, CAT + 1, voc.VOID}


def test_padded_pictures_are_whole(root):
  source = open_source(root, task="segmentation", fit="pad", image_size=24)
  example = source[0]
  found = example["segmentation"]
  want = np.asarray(
    Image.open(year_of(root) / "SegmentationClass" / "a.png"), np.int32
  )
  np.testing.assert_array_equal(found[:12], want)
  np.testing.assert_array_equal(found[12:], voc.VOID)
  np.testing.assert_array_equal(
    example["image"][12:], np.broadcast_to((124, 116, 104), (12, 24, 3))
  )
  np.testing.assert_allclose(
    example["image"][:12].astype(int),
    np.broadcast_to((200, 100, 50), (12, 24, 3)),
    atol=3,
  )


def test_a_random_box_is_the_same_for_picture_and_map(root):
  # The picture says what the map says.
  found = np.kron(
    np.random.default_rng(0).integers(0, 2, (6, 12)), np.ones((10, 10))
  ).astype(np.uint8)
  for name, image in (
    ("JPEGImages/a.jpg", Image.fromarray(255 * found)),
    ("SegmentationClass/a.png", Image.fromarray(found)),
  ):
    image.save(year_of(root) / name)
  source = open_source(
    root, task="segmentation", crop="random", image_size=60, scale=(0.2, 0.6)
  )
  boxes = []
  for seed in range(3):
    got = source.sample(0, np.random.default_rng(seed))
    white = got["image"][..., 0] > 127
    assert np.mean(white == (got["segmentation"] == 1)) > 0.97
    boxes.append(white)
  assert not np.array_equal(boxes[0], boxes[1])
  again = source.sample(0, np.random.default_rng(2))
  np.testing.assert_array_equal(again["image"][..., 0] > 127, boxes[2])
  assert open_source(root).sample is None


def test_the_folder_is_found_from_three_places(root):
  names = [
    tuple(open_source(at).ids)
    for at in (root, root / "VOCdevkit", year_of(root))
  ]
  assert names == [("a", "b")] * 3
  relative: Any = sources.load(
    "voc:VOCdevkit",
    split="train",
    image_size=SIZE,
    data_dir=str(root),
    year=2007,
  )
  assert relative.ids == ("a", "b")
  first = stream.fingerprint(open_source(root))
  assert first == stream.fingerprint(pickle.loads(pickle.dumps(relative)))
  (year_of(root) / "ImageSets/Main/train.txt").write_text("b\na\n")
  assert first != stream.fingerprint(open_source(root))


def test_the_palette_is_the_challenges():
  colors = voc.palette()
  # As its documentation lists them: aeroplane, bicycle, person, monitor, void.
  for number, color in {
    0: (0, 0, 0),
    1: (128, 0, 0),
    2: (0, 128, 0),
    15: (192, 128, 128),
    20: (0, 64, 128),
    255: (224, 224, 192),
  }.items():
    assert tuple(colors[number]) == color


@pytest.mark.parametrize("task", voc.TASKS)
def test_what_is_written_is_read_again(tmp_path, task):
  voc.write(tmp_path, splits=("train", "val"), num_examples=9, image_size=48)
  options = {"image_size": 48, "task": task}
  for split in ("train", "val"):
    drawn = sources.load(
      "voc:generated", split=split, num_examples=9, **options
    )
    read = sources.load(f"voc:{tmp_path}", split=split, resize_to=48, **options)
    assert len(read) == len(drawn) == 9
    assert read.classes == drawn.classes
    for i in range(9):
      a, b = drawn[i], read[i]
      assert a.keys() == b.keys()
      for name in a.keys() - {"image"}:
        np.testing.assert_array_equal(a[name], b[name])
        assert a[name].dtype == b[name].dtype
      apart = np.abs(a["image"].astype(int) - b["image"])
      assert apart.mean() < 6


def test_generated_pictures_hold_one_or_two_things():
  load = lambda task, split="train": sources.load(
    "voc:generated", split=split, image_size=32, num_examples=96, task=task
  )
  source, maps = load("classification"), load("segmentation")
  labels = np.stack([source[i]["labels"] for i in range(96)])
  counts = (labels != 0).sum(axis=1)
  assert set(counts) == {1, 2}
  assert (labels == -1).any()
  assert ((labels == 1).sum(axis=1) >= 1).all()
  for i in range(96):
    example = maps[i]
    np.testing.assert_array_equal(example["image"], source[i]["image"])
    there = np.flatnonzero(labels[i]) + 1
    known = set(np.unique(example["segmentation"]))
    assert known <= {0, voc.VOID, *there}
    assert 0.05 < np.mean(example["segmentation"] == 0) < 0.98
  other = load("classification", "val")
  assert np.any(other[0]["image"] != source[0]["image"])


def test_generated_splits_refuse():
  for match, options in {
    "has no split 'x'; it has train": {"split": "x"},
    "num_examples must be at least 1, got 0": {"num_examples": 0},
    "seed must be 0 or more, got -1": {"seed": -1},
    "must be in 32..512, got 16": {"image_size": 16},
  }.items():
    given = {"split": "train", "image_size": 32, **options}
    with pytest.raises(InputError, match=match):
      sources.load("voc:generated", **given)


@pytest.mark.parametrize(
  ("options", "match"),
  [
    ({"task": "detection"}, "task of voc must be one of classification, segm"),
    ({"fit": "stretch"}, "fit of voc must be one of crop, pad, got 'stretch'"),
    ({"fit": "pad", "crop": "random"}, "fit='pad' of voc cuts nothing"),
    ({"split": "test"}, "Main has no split 'test'; there are: train"),
    ({"split": "../Main/train"}, "has no split"),
    ({"year": 2012}, "VOC2012 .*of other years there are: VOC2007"),
    ({"image_size": 0}, "image_size must be an integer >= 1"),
  ],
)
def test_options_are_refused_by_name(root, options, match):
  with pytest.raises(InputError, match=match):
    open_source(root, **options)


def test_folders_that_are_not_there_are_named(tmp_path):
  with pytest.raises(InputError, match="voc needs the folder"):
    sources.load("voc:", split="train", image_size=SIZE)
  missing = tmp_path / "nowhere"
  with pytest.raises(
    InputError, match=f"There is no {re.escape(str(missing))}"
  ):
    open_source(missing)


@pytest.mark.parametrize(
  ("file", "text", "match"),
  [
    ("ImageSets/Main/train.txt", "", "names no picture"),
    ("ImageSets/Main/train.txt", "../../x", "must name pictures, got '../"),
    (
      "ImageSets/Main/train.txt",
      "a\nc\nd",
      "JPEGImages lacks 2 of the 3 files of 'train': c.jpg, d.jpg",
    ),
    ("Annotations/a.xml", "<annotation>", "a.xml is no XML in UTF-8"),
    ("Annotations/a.xml", "<html></html>", "must begin with <annotation>"),
    ("Annotations/a.xml", annotation(("unicorn", 0)), "a.xml names 'unicorn'"),
    ("Annotations/a.xml", annotation(("cat", 7)), "<difficult> must be 0 or 1"),
    (
      "Annotations/a.xml",
      '<!DOCTYPE a [<!ENTITY b "c">]><annotation>&b;</annotation>',
      "a.xml has a document type",
    ),
    ("Annotations/a.xml", " " * 2**20 + annotation(), "more than 1048576 b"),
    ("Annotations/a.xml", annotation().encode("utf-16"), "no XML in UTF-8"),
    ("JPEGImages/a.jpg", "no picture", "a.jpg is damaged: cannot identify"),
  ],
)
def test_files_are_refused_by_name(root, file, text, match):
  path = year_of(root) / file
  path.write_bytes(text if isinstance(text, bytes) else text.encode())
  with pytest.raises(InputError, match=match):
    open_source(root)[0]


def test_missing_and_damaged_maps_are_named(root):
  path = year_of(root) / "SegmentationClass" / "a.png"
  whole = path.read_bytes()
  refused = lambda match: pytest.raises(decode.DamagedError, match=match)
  picture = Image.open(path)
  indices = np.array(picture)
  source = open_source(root, task="segmentation")
  picture.convert("RGB").save(path)
  with refused("a.png is of mode RGB; a map of the classes has a palette"):
    source[0]
  Image.fromarray(indices[:5]).save(path)
  with refused(r"a.png is 24 x 5 pixels large, its picture .*a.jpg is 24 x 12"):
    source[0]
  Image.fromarray(indices + 40).save(path)
  with refused("a.png holds the class 4[0-9]; known are 0..20 and 255"):
    source[0]
  path.write_bytes(whole[: len(whole) // 2])
  with refused("a.png is damaged"):
    source[0]
  path.write_bytes(whole)
  source[0]
  with refused("a.jpg has more than max_pixels=100 pixels"):
    open_source(root, task="segmentation", max_pixels=100)[0]
  path.unlink()
  with pytest.raises(InputError, match="SegmentationClass lacks 1 of the 2"):
    open_source(root, task="segmentation")


def test_cut_off_pictures_are_named(root):
  path = year_of(root) / "JPEGImages" / "a.jpg"
  path.write_bytes(path.read_bytes()[:-200])
  for fit in voc.FITS:
    with pytest.raises(decode.DamagedError, match="a.jpg is damaged"):
      open_source(root, fit=fit)[0]
