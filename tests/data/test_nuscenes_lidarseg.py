import json
import pickle

import numpy as np
import pytest

from jaxshape.data import nuscenes_lidarseg
from jaxshape.errors import InputError

# Index in the label files, category, train id by the challenge's table.
CATEGORIES = (
  (0, "noise", 0), (1, "animal", 0), (2, "human.pedestrian.adult", 7),
  (17, "vehicle.car", 4), (24, "flat.driveable_surface", 11),
  (30, "static.vegetation", 16), (31, "vehicle.ego", 0),
)  # fmt: skip
SCENES = ("scene-0061", "scene-0103", "scene-0916")
COUNTS = (12, 30, 21)


@pytest.fixture
def root(tmp_path):
  rows = {name: [] for name in ("scene", "sample", "sample_data", "lidarseg")}
  for k, (scene, n) in enumerate(zip(SCENES, COUNTS, strict=True)):
    rows["scene"].append({"token": f"sc{k}", "name": scene})
    rows["sample"].append(
      {"token": f"sa{k}", "scene_token": f"sc{k}", "timestamp": 10 - k}
    )
    scan = f"samples/LIDAR_TOP/{k}.pcd.bin"
    for token, file in (
      (f"sd{k}", scan), (f"ca{k}", "samples/CAM_FRONT/0.jpg"),
      (f"sw{k}", "sweeps/LIDAR_TOP/0.pcd.bin"),
    ):  # fmt: skip
      rows["sample_data"].append(
        {"token": token, "sample_token": f"sa{k}", "filename": file}
      )
    label = f"lidarseg/v1.0-mini/sd{k}_lidarseg.bin"
    rows["lidarseg"].append({"sample_data_token": f"sd{k}", "filename": label})
    for part in (scan, label):
      (tmp_path / part).parent.mkdir(parents=True, exist_ok=True)
    points = np.arange(5 * n, dtype="<f4").reshape(n, 5)
    points[:, 3] = 51
    (tmp_path / scan).write_bytes(points.tobytes())
    raw = np.resize([index for index, _, _ in CATEGORIES], n)
    (tmp_path / label).write_bytes(raw.astype(np.uint8).tobytes())
  rows["category"] = [{"name": n, "index": i} for i, n, _ in CATEGORIES]
  (tmp_path / "v1.0-mini").mkdir()
  for name, table in rows.items():
    path = tmp_path / "v1.0-mini" / f"{name}.json"
    path.write_text(json.dumps(table, indent=1))
  return tmp_path


def open_it(root, split="mini_val", **options):
  return nuscenes_lidarseg.open_source(str(root), split=split, **options)


@pytest.mark.parametrize("piece", [7, 2**22])
def test_key_frames_of_the_splits_scenes(root, monkeypatch, piece):
  monkeypatch.setattr(nuscenes_lidarseg, "_PIECE", piece)
  source = open_it(root)
  assert source.scans == ("sd1", "sd2")
  assert source.points == 30
  example = pickle.loads(pickle.dumps(source))[1]
  assert example["valid"].sum() == 21
  np.testing.assert_array_equal(example["points"][20], [100, 101, 102])
  np.testing.assert_allclose(example["remission"][:21], 0.2)
  want = np.resize([train for _, _, train in CATEGORIES], 21)
  np.testing.assert_array_equal(example["label"][:21], want)
  assert open_it(root, "mini_train").scans == ("sd0",)
  names = source.classes
  assert (len(names), names[0], names[7]) == (17, "unlabeled", "pedestrian")
  assert source.colors.shape == (17, 3)
  assert not open_it(root, labelled=False)[0]["label"].any()


def test_every_category_of_the_challenge_is_mapped(root):
  # Barrier is 1, vegetation 16; 32 categories in all.
  known = [line.split()[2:] for line in nuscenes_lidarseg._lines()]
  assert sum(map(len, known)) + len(nuscenes_lidarseg._VOID) == 32
  assert len(nuscenes_lidarseg._numbers(nuscenes_lidarseg._VAL)) == 150
  path = root / "v1.0-mini" / "category.json"
  path.write_text(json.dumps([{"name": "ufo", "index": 3}]))
  with pytest.raises(InputError, match="category.json has the category 'ufo'"):
    open_it(root)


def test_labels_need_no_data():
  labels = nuscenes_lidarseg.builtin_labels()
  assert labels.classes == nuscenes_lidarseg.CLASSES
  assert labels.colors[4].tolist() == [255, 158, 0]  # A car's orange.
  every = np.arange(17)
  assert labels.raw_labels(every).tolist() == every.tolist()
  assert labels.train_ids(every, name="x").tolist() == every.tolist()
  with pytest.raises(InputError, match="17"):
    labels.train_ids(np.array([17]), name="x")


def test_what_does_not_fit_is_named(root):
  tables, labels = root / "v1.0-mini", root / "lidarseg" / "v1.0-mini"
  with pytest.raises(InputError, match="no split 'dev'"):
    open_it(root, "dev")
  with pytest.raises(InputError, match="no folder .*v1.0-trainval"):
    open_it(root, "train")
  source = open_it(root)
  raw = np.full(30, 9, np.uint8)
  (labels / "sd1_lidarseg.bin").write_bytes(raw.tobytes())
  with pytest.raises(InputError, match=r"sd1_lidarseg.bin .*9 \(30 points\)"):
    source[0]
  (labels / "sd1_lidarseg.bin").write_bytes(raw.tobytes()[:-1])
  for again in (lambda: source[0], lambda: open_it(root)):
    with pytest.raises(InputError, match="sd1_lidarseg.bin has 29 .* 30"):
      again()
  (labels / "sd1_lidarseg.bin").unlink()
  with pytest.raises(InputError, match="no file .*sd1_lidarseg.bin"):
    open_it(root)
  scan = root / "samples" / "LIDAR_TOP" / "1.pcd.bin"
  scan.write_bytes(scan.read_bytes()[:-1])
  with pytest.raises(InputError, match="1.pcd.bin has 599 bytes"):
    open_it(root)
  text = (tables / "scene.json").read_text()
  (tables / "lidarseg.json").write_text("[]")
  with pytest.raises(InputError, match="1.pcd.bin .*not in lidarseg.json"):
    open_it(root)
  for wrong, message in (
    (text[:-30], "scene.json .*cut off"), ("<html>", "scene.json .*cut off"),
    (text.replace('"name"', '"title"'), "scene.json: .*lacks name"),
    (text.replace(":", "="), "scene.json is no table"),
  ):  # fmt: skip
    (tables / "scene.json").write_text(wrong)
    with pytest.raises(InputError, match=message):
      open_it(root)
