import pickle

import numpy as np
import pytest
import yaml

from jaxshape.data import scan_files, semantic_kitti, sources
from jaxshape.errors import InputError

COUNTS = {"00/000000": 40, "00/000001": 33, "08/000000": 20, "11/000005": 10}


def write(root):
  """A tiny data set: points that count up, labels of the built-in table."""
  rng = np.random.default_rng(0)
  for scan, n in COUNTS.items():
    sequence, frame = scan.split("/")
    folder = root / "sequences" / sequence
    points = rng.normal(size=(n, 3)).astype(np.float32)
    scan_files.write(folder / "velodyne" / f"{frame}.bin", points, np.ones(n))
    if sequence != "11":
      raw = np.resize([10, 252, 40, 60, 99, 81], n)
      scan_files.write_labels(
        folder / "labels" / f"{frame}.label", raw, instances=np.arange(n)
      )
  return root


@pytest.fixture
def root(tmp_path):
  return write(tmp_path / "data")


def open_it(root, split="train", **options):
  if split == "train":
    options.setdefault("sequences", [0])
  return semantic_kitti.open_source(str(root), split=split, **options)


def test_examples_are_padded_scans_with_train_ids(root):
  source = open_it(root)
  assert source.scans == ("00/000000", "00/000001")
  assert source.points == 40  # Two less, and the step of 4 would end at 36.
  example = source[1]
  path = root / "sequences" / "00" / "velodyne" / "000001.bin"
  points, remission = scan_files.read(path)
  np.testing.assert_array_equal(example["points"][:33], points)
  np.testing.assert_array_equal(example["remission"][:33], remission)
  # car, moving-car, road, lane-marking, other-object, traffic-sign
  want = np.resize([1, 1, 9, 9, 0, 19], 33)
  np.testing.assert_array_equal(example["label"][:33], want)
  assert example["valid"].tolist() == [True] * 33 + [False] * 7
  for name in ("points", "remission", "label"):
    assert not example[name][33:].any()
  dtypes = {name: str(array.dtype) for name, array in example.items()}
  assert dtypes == {
    "points": "float32", "remission": "float32", "valid": "bool",
    "label": "int32",
  }  # fmt: skip
  with pytest.raises(IndexError):
    source[2]


def test_the_table_says_what_the_data_set_says():
  labels = semantic_kitti.builtin_labels()
  assert len(labels.classes) == 20
  assert labels.classes[0] == "unlabeled"
  assert labels.classes[1] == "car"
  assert labels.classes[19] == "traffic-sign"
  np.testing.assert_array_equal(labels.colors[1], [100, 150, 245])
  # By hand: car and moving-car; pole, rider of a motorcycle.
  shares = labels.frequencies
  np.testing.assert_allclose(shares[1], 0.0408185 + 0.0017893, rtol=1e-5)
  np.testing.assert_allclose(shares[18], 0.0028554982, rtol=1e-6)
  np.testing.assert_allclose(shares[8], 3.7461e-5, rtol=1e-4)
  np.testing.assert_allclose(shares.sum(), 1, atol=1e-5)
  assert np.sum(labels.to_train >= 0) == 34
  every = np.arange(20)
  assert labels.to_train[labels.raw_labels(every)].tolist() == every.tolist()
  with pytest.raises(ValueError, match="train_ids must be in 0..19"):
    labels.raw_labels(np.array([20]))


def test_the_yaml_of_the_folder_is_read(root):
  small = {
    "labels": {0: "nothing", 10: "car", 40: "ground", 252: "moving"},
    "color_map": {0: [0, 0, 0], 10: [1, 2, 3]},
    "content": {0: 0.5, 10: 0.2, 252: 0.1, 40: 0.2},
    "learning_map": {0: 0, 10: 1, 252: 1, 40: 2, 60: 2, 99: 0, 81: 0},
    "learning_map_inv": {0: 0, 1: 10, 2: 40},
    "learning_ignore": {0: True, 1: False, 2: True},
    "split": {"train": [0], "valid": [8]},
  }
  path = root / "semantic-kitti.yaml"
  path.write_text(yaml.safe_dump(small))
  source = open_it(root, sequences=None)
  assert source.classes == ("unlabeled", "car", "ground")
  assert source.colors[1].tolist() == [3, 2, 1]
  np.testing.assert_allclose(source.frequencies, [0.5, 0.3, 0.2])
  assert source.ignore == (0, 2)
  assert source[0]["label"][:6].tolist() == [1, 1, 2, 2, 0, 0]
  assert len(open_it(root, "val")) == 1
  with pytest.raises(InputError, match="no split 'test'.*train, valid"):
    open_it(root, "test")
  # A file that is given goes first.
  other = root / "other.yaml"
  del small["content"], small["color_map"]
  other.write_text(yaml.safe_dump({**small, "split": {"mine": [11]}}))
  given = open_it(root, "mine", labels_yaml=str(other), labelled=False)
  assert given.frequencies is None
  assert len({tuple(color) for color in given.colors.tolist()}) == 3


def test_the_built_in_table_survives_its_own_yaml(tmp_path):
  path = tmp_path / "a.yaml"
  path.write_text(yaml.safe_dump(semantic_kitti.builtin_yaml()))
  got, want = semantic_kitti.read_yaml(path), semantic_kitti.builtin_labels()
  for name, value in vars(want).items():
    np.testing.assert_equal(getattr(got, name), value)
  assert got.splits["train"] == (0, 1, 2, 3, 4, 5, 6, 7, 9, 10)


def changed(**entries):
  table = {
    "labels": {0: "none", 10: "car"},
    "learning_map": {0: 0, 10: 1},
    "learning_map_inv": {0: 0, 1: 10},
    **entries,
  }
  return yaml.safe_dump({k: v for k, v in table.items() if v is not None})


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("a: [1", "no yaml of plain values"),
    ("!!python/object/apply:os.system ['false']", "no yaml of plain values"),
    (b"\x00\x01\xff".decode("latin1"), "no yaml of plain values"),
    ("- 1", "holds list"),
    ("", "holds NoneType"),
    (changed(learning_map=None), "has no 'learning_map'"),
    (changed(labels=None), "has no 'labels'"),
    (changed(labels=[1]), "labels must map ids to str"),
    (changed(learning_map={0: 0, "car": 1}), "learning_map must map ids"),
    (changed(learning_map={0: 0, 10: 2}), "must map ids of 0..65535 to 0..1"),
    (changed(learning_map={0: 0, 99999: 1}), "must map ids of 0..65535"),
    (changed(learning_map_inv={0: 0, 2: 10}), "train ids .0, 2."),
    (changed(learning_map_inv={0: 0, 1: 11}), "maps 1 to 11"),
    (changed(color_map={10: [1, 2, 300]}), "color_map of 10"),
    (changed(content={10: 1.5}), "content must hold shares"),
    (changed(split={"train": "00"}), "split must map"),
  ],
)
def test_a_yaml_that_does_not_fit_is_refused_by_name(tmp_path, text, message):
  path = tmp_path / "a.yaml"
  path.write_text(text, encoding="utf-8")
  with pytest.raises(InputError, match=message) as error:
    semantic_kitti.read_yaml(path)
  assert str(path) in str(error.value)


def test_the_test_split_has_no_labels(root):
  source = open_it(root, "test", sequences=["11"])
  assert not source.labelled
  assert source.scans == ("11/000005",)
  assert not source[0]["label"].any()
  assert source[0]["valid"].sum() == 10
  unlabelled = open_it(root, labelled=False)
  assert not unlabelled[0]["label"].any()


@pytest.mark.parametrize("place", ["", "sequences", "dataset"])
def test_roots_that_are_found(tmp_path, place):
  folder = tmp_path / "kitti"
  write(folder / place if place == "dataset" else folder)
  given = folder / place if place == "sequences" else folder
  assert len(open_it(given)) == 2
  source = sources.load(
    f"semantic_kitti:{given.relative_to(tmp_path)}", split="train",
    data_dir=str(tmp_path), sequences=(0,), image_size=224,
  )  # fmt: skip
  assert len(source) == 2


def test_what_is_missing_is_named(root):
  with pytest.raises(InputError, match="lacks 01/velodyne.*has 00, 08, 11"):
    open_it(root, sequences=None)
  with pytest.raises(InputError, match="lacks 03/velodyne"):
    open_it(root, sequences="3")
  with pytest.raises(InputError, match="no folder 'sequences'.*has 00, 08"):
    open_it(root / "sequences" / "00" / "..")
  with pytest.raises(InputError, match="There is no folder"):
    open_it(root / "nowhere")
  with pytest.raises(InputError, match="no folder 'labels'.*labelled=False"):
    open_it(root, sequences=[11])
  labels = root / "sequences" / "00" / "labels"
  (labels / "000001.label").rename(labels / "000007.label")
  with pytest.raises(InputError, match="lacks the partners.*000001.label"):
    open_it(root)
  (labels / "000007.label").rename(labels / "000001.label")
  (labels / "000002.label").write_bytes(b"")
  with pytest.raises(InputError, match="velodyne lacks.*000002.bin"):
    open_it(root)


def test_damage_is_named_at_the_start(root):
  folder = root / "sequences" / "00"
  label, scan = folder / "labels/000001.label", folder / "velodyne/000001.bin"
  whole = label.read_bytes()
  label.write_bytes(whole[:-8])
  with pytest.raises(InputError, match="000001.label has 31 labels.* 33"):
    open_it(root)
  label.write_bytes(whole)
  scan.write_bytes(scan.read_bytes()[:-5])
  with pytest.raises(InputError, match="000001.bin has 523 bytes"):
    open_it(root)
  scan.write_bytes(b"")
  with pytest.raises(InputError, match="000001.bin is empty"):
    open_it(root)
  scan.write_bytes(b"<html>" + b" " * 26)
  with pytest.raises(InputError, match="000001.bin.*web page"):
    open_it(root)
  for file in (folder / "velodyne").iterdir():
    file.unlink()
  with pytest.raises(InputError, match="has no .bin files"):
    open_it(root)


def test_damage_is_named_when_it_is_met(root):
  source = open_it(root)
  path = root / "sequences" / "00" / "labels" / "000001.label"
  raw, _ = scan_files.read_labels(path)
  scan_files.write_labels(path, np.where(raw == 40, 41, raw))
  # 6 of 33 labels in turns of six begin with 2, 8, ..., 32.
  with pytest.raises(InputError, match=r"000001.label.*41 \(6 points\)"):
    source[1]
  (root / "sequences" / "00" / "velodyne" / "000000.bin").unlink()
  with pytest.raises(InputError, match="no file .*000000.bin"):
    source[0]


def test_larger_scans_are_cut_the_same_way_each_time(root, caplog):
  source = open_it(root, points=24)
  first, again = source[0], source[0]
  assert first["valid"].all()
  np.testing.assert_array_equal(first["points"], again["points"])
  whole = open_it(root)[0]
  at = [
    np.flatnonzero((whole["points"] == p).all(1))[0] for p in first["points"]
  ]
  assert at == sorted(set(at))
  np.testing.assert_array_equal(first["label"], whole["label"][at])
  assert caplog.text.count("more than points=24") == 1
  with pytest.raises(InputError, match="points must be at least 1"):
    open_it(root, points=0)


def test_points_that_are_not_finite_are_counted_once(root, caplog):
  path = root / "sequences" / "00" / "velodyne" / "000000.bin"
  points, remission = scan_files.read(path)
  points[3] = np.nan
  scan_files.write(path, points, remission)
  source = open_it(root)
  assert source[0]["valid"].sum() == 40
  assert np.isnan(source[0]["points"][3]).all()
  assert caplog.text.count("1 of 40 points are not finite") == 1


def test_a_source_is_sent_to_other_processes(root):
  source = open_it(root, cache=10**6)
  first = source[0]
  assert source[0]["points"] is first["points"]
  copy = pickle.loads(pickle.dumps(source))
  np.testing.assert_array_equal(copy[0]["points"], first["points"])
  with pytest.raises(InputError, match="cache must be"):
    open_it(root, cache=-1)


def test_predictions_are_written_as_the_benchmark_wants_them(root, tmp_path):
  source = open_it(root, "test", sequences=[11])
  ids = np.arange(10)
  path = semantic_kitti.write_predictions(
    tmp_path / "out", source.scans[0], source.labels.raw_labels(ids)
  )
  place = "out/sequences/11/predictions/000005.label"
  assert path == tmp_path / place
  want = np.array([0, 10, 11, 15, 18, 20, 30, 31, 32, 40], "<u4")
  assert path.read_bytes() == want.tobytes()
  with pytest.raises(ValueError, match="scan must be like"):
    semantic_kitti.write_predictions(tmp_path, "../x/1", ids)
