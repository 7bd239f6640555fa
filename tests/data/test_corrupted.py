import pickle

import numpy as np
from PIL import Image
import pytest

from jaxshape.data import corrupted, imagenet, sources, stream
from jaxshape.errors import InputError

CASES = tuple((name, s) for name in ("blur", "fog", "snow") for s in (1, 2, 10))
COUNT = 3  # Rows of one severity.


def write(path, value=0):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new("RGB", (8, 8), (value,) * 3).save(path)


def load(root, split, **options):
  options = {"image_size": 8, **options}
  return sources.load(f"corrupted:{root}", split=split, **options)


def fill(root, classes):
  """Two pictures of each class in each case, in groups or without."""
  for k, (name, severity) in enumerate(CASES):
    group = "weather/" if name == "snow" else ""
    for c, label in enumerate(classes):
      for file in ("a.png", "b.png"):
        folder = root / f"{group}{name}" / str(severity) / label
        write(folder / file, 20 * k + c)


@pytest.fixture
def root(tmp_path):
  fill(tmp_path, ("cat", "dog"))
  return tmp_path


@pytest.fixture
def arrays(tmp_path):
  """Rows whose pixels tell corruption and row."""
  draw = np.random.default_rng(0)
  for name in ("fog", "blur"):
    rows = draw.integers(0, 256, (5 * COUNT, 8, 8, 3)).astype(np.uint8)
    np.save(tmp_path / f"{name}.npy", rows)
  np.save(tmp_path / "labels.npy", np.tile([2, 0, 9], 5))
  return tmp_path


def test_one_case(root):
  source = load(root, "snow/10")
  assert source.classes == ("cat", "dog")
  assert source.cases == (("snow", 10),)
  assert [int(e["label"]) for e in source] == [0, 0, 1, 1]
  assert [int(e["image"][0, 0, 0]) for e in source] == [160, 160, 161, 161]
  assert sorted(source[0]) == ["image", "label"]
  assert source.files[0] == "weather/snow/10/cat/a.png"


def test_all_cases_are_numbered(root):
  source = load(root, "all")
  assert source.cases == CASES
  assert corrupted.list_cases(str(root)) == CASES
  assert len(source) == 4 * len(CASES)
  for i, example in enumerate(source):
    assert example["corruption"] == i // 4
    assert example["image"][0, 0, 0] == 20 * (i // 4) + example["label"]
  assert source[0]["corruption"].dtype == np.int32


def test_wordnet_ids(tmp_path):
  fill(tmp_path, ("n01440764", "n15075141"))
  for split in ("fog/2", "all"):
    source = load(tmp_path, split, wordnet=True)
    assert source.classes == imagenet.classes()
    assert {int(e["label"]) for e in source} == {0, 999}
  assert load(tmp_path, "fog/2").classes == ("n01440764", "n15075141")
  write(tmp_path / "fog" / "2" / "n01440765" / "a.png")
  with pytest.raises(InputError, match=r"fog/2 .*: n01440765 \(did you mean n"):
    load(tmp_path, "fog/2", wordnet=True)


def test_classes_fix_the_labels(root):
  source = load(root, "all", classes=("dog", "emu", "cat"))
  assert source.classes == ("dog", "emu", "cat")
  assert [int(source[i]["label"]) for i in range(4)] == [2, 2, 0, 0]
  with pytest.raises(InputError, match="not in classes: dog"):
    load(root, "fog/1", classes=("cat",))


def test_damage_and_fingerprint(root):
  before = stream.fingerprint(load(root, "all"))
  assert before["folders"]["weather"].startswith("12 files")
  (root / "fog" / "1" / "cat" / "b.png").write_bytes(b"")
  source = load(root, "fog/1", skip_damaged=True)
  assert [float(e["mask"]) for e in source] == [1, 0, 1, 1]
  assert source.damaged == ("fog/1/cat/b.png",)
  (root / "fog" / "1" / "cat" / "b.png").unlink()
  assert stream.fingerprint(load(root, "all")) != before


def test_severities_are_rows_of_arrays(arrays):
  fog = np.load(arrays / "fog.npy")
  source = load(arrays, "fog/3")
  assert (len(source), source.cases) == (COUNT, (("fog", 3),))
  for i, example in enumerate(source):
    np.testing.assert_array_equal(example["image"], fog[2 * COUNT + i])
    assert example["label"] == [2, 0, 9][i]
    assert example["label"].dtype == np.int32
    assert sorted(example) == ["image", "label"]
  assert source.classes == corrupted.CIFAR10


def test_all_arrays_are_numbered(arrays):
  source = load(arrays, "all")
  assert source.cases == corrupted.list_cases(str(arrays))
  assert source.cases[4:6] == (("blur", 5), ("fog", 1))
  rows = [np.load(arrays / f"{name}.npy") for name in ("blur", "fog")]
  got = list(source)
  np.testing.assert_array_equal([e["image"] for e in got], np.concatenate(rows))
  want = np.repeat(np.arange(10), COUNT)
  assert [int(e["corruption"]) for e in got] == want.tolist()
  with pytest.raises(IndexError, match=r"0\.\.29, got 30"):
    source[30]


def test_arrays_are_resized_as_files_are(arrays):
  row = np.load(arrays / "blur.npy")[1]
  got = load(arrays, "blur/1", image_size=6)[1]["image"]
  want = Image.fromarray(row).resize((6, 6), Image.Resampling.BILINEAR)
  np.testing.assert_array_equal(got, want)


def test_arrays_are_mapped_again_elsewhere(arrays):
  source = load(arrays, "all", crop="random", cache=0)
  sent = pickle.dumps(source)
  assert len(sent) < (arrays / "fog.npy").stat().st_size
  copy = pickle.loads(sent)
  one, two = (
    sources.read(s, 8, np.random.default_rng(0)) for s in (source, copy)
  )
  np.testing.assert_array_equal(one["image"], two["image"])
  assert (one["image"] != source[8]["image"]).any()
  assert load(arrays, "all").sample is None
  kept = load(arrays, "all", cache=10**6)
  assert kept[3]["image"] is kept[3]["image"]
  assert stream.fingerprint(copy) == stream.fingerprint(source)
  np.save(arrays / "labels.npy", np.tile([2, 0, 8], 5))
  assert stream.fingerprint(load(arrays, "all")) != stream.fingerprint(source)


def test_classes_of_arrays(arrays):
  np.save(arrays / "labels.npy", np.tile(np.uint8([3, 99, 0]), 5))
  assert load(arrays, "fog/1").classes == tuple(map(str, range(100)))
  classes = tuple(f"class {i}" for i in range(120))
  assert load(arrays, "fog/1", classes=classes).classes == classes
  with pytest.raises(InputError, match=r"labels within 0\.\.1, got 0\.\.99"):
    load(arrays, "fog/1", classes=("cat", "dog"))


@pytest.mark.parametrize(
  ("name", "value", "message"),
  [
    ("fog", np.zeros((15, 3, 8, 8), np.uint8), r"got uint8 \[15, 3, 8, 8\]"),
    ("fog", np.zeros((14, 8, 8, 3), np.uint8), r"uint8 \[15, height.*\[14, 8"),
    ("fog", np.zeros((15, 8, 8, 3), np.float32), r"got float32 \[15, 8, 8, 3"),
    ("fog", np.zeros((15, 192), np.uint8), r"got uint8 \[15, 192\]"),
    ("fog", np.zeros((15, 8, 0, 3), np.uint8), r"fog.npy .*"),
    ("fog", np.array([{}] * 15), r"fog.npy is no intact array .*objects"),
    ("fog", b"", r"fog.npy is no intact array"),
    ("fog", None, r"fog.npy is no intact array .*"),
    ("labels", np.zeros(14, np.int64), r"each of 5 severities, got 14"),
    ("labels", np.zeros(20, np.int64), r"fog.npy must hold uint8 \[20, "),
    ("labels", np.zeros((15, 1), np.int64), r"got int64 \[15, 1\]"),
    ("labels", np.zeros(15), r"one whole number per image, got float64 \[15\]"),
    ("labels", np.full(15, -1), r"labels within 0\.\.9, got -1\.\.-1"),
    ("labels", np.zeros(0, np.int64), r"labels.npy "),
    ("labels", np.full(15, 2**40), r"labels within 0\.\.9999"),
  ],
)
def test_arrays_of_another_form(arrays, name, value, message):
  path = arrays / f"{name}.npy"
  if isinstance(value, np.ndarray):
    np.save(path, value)
  else:  # Cut off, unless empty.
    data = path.read_bytes()
    path.write_bytes(data[:-1] if value is None else value)
  with pytest.raises(InputError, match=message):
    load(arrays, "fog/1")


def test_arrays_that_are_not_there(arrays):
  with pytest.raises(InputError, match="wordnet=True is for folders"):
    load(arrays, "fog/1", wordnet=True)
  with pytest.raises(InputError, match=r"'fog/6' .*there are: all, blur/1"):
    load(arrays, "fog/6")
  (arrays / "labels.npy").rename(arrays / "label.npy")
  with pytest.raises(
    InputError, match="holds blur, fog, label as .npy, but no"
  ):
    load(arrays, "fog/1")
  for name in ("fog", "blur"):
    (arrays / f"{name}.npy").unlink()
  (arrays / "label.npy").rename(arrays / "labels.npy")
  with pytest.raises(InputError, match=r"but no <corruption>\.npy"):
    load(arrays, "fog/1")


@pytest.mark.parametrize(
  ("folder", "split", "message"),
  [
    ("", "fogg/2", r"no split 'fogg/2' \(did you mean fog/2\?\); there are: a"),
    ("", "fog", r"no split 'fog'"),
    ("fog/low", "fog/1", r"/fog must hold one folder per severity .* got low"),
    ("fog/0", "fog/1", r"/fog must hold one folder per severity .* got 0"),
    ("mist/low", "fog/1", r"mist/low must hold .* got none"),
    ("weather/fog/1", "fog/1", r"corruption fog twice: fog and weather/fog"),
    ("fog/1/emu", "snow/1", r"fog/1 has other .*blur/1, in one only: emu"),
    ("fog/3", "fog/1", r"fog/3 holds no class folders"),
  ],
)
def test_folders_of_another_form(root, folder, split, message):
  (root / folder).mkdir(parents=True, exist_ok=True)
  with pytest.raises(InputError, match=message):
    load(root, split)


def test_what_is_not_there(tmp_path):
  with pytest.raises(InputError, match="holds neither <corruption>"):
    load(tmp_path, "all")
  with pytest.raises(InputError, match="There is no folder"):
    load(tmp_path / "nowhere", "all")
  with pytest.raises(InputError, match="both name the labels; give one"):
    load(tmp_path, "all", classes=("a", "b"), wordnet=True)
