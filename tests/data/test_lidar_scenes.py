import pickle
import subprocess
import sys

import numpy as np
import pytest

from jaxshape.data import lidar_casting, lidar_scenes, semantic_kitti, sources
from jaxshape.errors import InputError


def caster(beams=33, width=360, up=10.0, down=-30.0):
  elevation = np.deg2rad(np.linspace(up, down, beams))
  azimuth = np.pi - 2 * np.pi * (np.arange(width) + 0.5) / width
  return lidar_casting.Caster(azimuth, elevation, np.random.default_rng(0))


def directions(c):
  shape = c.distance.shape
  rays = np.stack(
    [
      np.broadcast_to(c.cos_a, shape),
      np.broadcast_to(c.sin_a, shape),
      np.broadcast_to(c.tan_e[:, None], shape),
    ],
    axis=-1,
  )
  return rays.astype(np.float64)


def marched(c, inside, step=0.004, far=14.0):
  """The first point of each ray inside a body, found step by step."""
  t = np.arange(0.5, far, step)
  rays = directions(c)
  first = np.full(c.distance.shape, np.inf)
  for place in t[::-1]:
    first[inside(rays * place)] = place
  return first


BODIES = {
  "box": (
    {
      "x": -6.0,
      "y": 0.5,
      "angle": 0.7,
      "length": 4.0,
      "width": 1.5,
      "low": -1.5,
      "high": -0.4,
    },
    lambda p: _in_box(p, -6.0, 0.5, 0.7, 4.0, 1.5, -1.5, -0.4),
  ),
  "cylinder": (
    {"x": 1.0, "y": 5.0, "radius": 0.8, "low": -1.7, "high": 0.6},
    lambda p: (
      (np.hypot(p[..., 0] - 1, p[..., 1] - 5) < 0.8)
      & (p[..., 2] > -1.7)
      & (p[..., 2] < 0.6)
    ),
  ),
  "ellipsoid": (
    {"x": 3.0, "y": -5.0, "z": -0.5, "radius": 2.0, "half_height": 1.0},
    lambda p: (
      np.hypot(p[..., 0] - 3, p[..., 1] + 5) ** 2 / 4 + (p[..., 2] + 0.5) ** 2
      < 1
    ),
  ),
}


def _in_box(p, x, y, angle, length, width, low, high):
  c, s = np.cos(angle), np.sin(angle)
  u = c * (p[..., 0] - x) + s * (p[..., 1] - y)
  v = c * (p[..., 1] - y) - s * (p[..., 0] - x)
  near = (np.abs(u) < length / 2) & (np.abs(v) < width / 2)
  return near & (p[..., 2] > low) & (p[..., 2] < high)


@pytest.mark.parametrize("name", BODIES)
def test_rays_end_where_marching_along_them_does(name):
  options, inside = BODIES[name]
  c = caster()
  getattr(c, name)(7, **options)
  want = marched(c, inside)
  hit = np.isfinite(want)
  assert hit.sum() > 100
  # Steps miss a corner that is thinner than they are.
  differ = hit != c.hit
  assert differ.sum() <= 0.03 * hit.sum()
  both = hit & c.hit
  np.testing.assert_allclose(c.distance[both], want[both], atol=0.006)
  assert set(c.body[c.hit].tolist()) == {7}
  assert np.all((c.cosine[c.hit] >= 0) & (c.cosine[c.hit] <= 1.001))


def test_the_nearest_body_is_seen_in_any_order():
  near = {"x": 4.0, "y": 0.0, "radius": 0.5, "low": -2.0, "high": 1.0}
  far = {**near, "x": 8.0, "radius": 2.0}
  both = [caster(), caster()]
  for c, order in zip(both, ([1, 2], [2, 1]), strict=True):
    for body in order:
      c.cylinder(body, **(near if body == 1 else far))
  np.testing.assert_array_equal(both[0].body, both[1].body)
  assert set(np.unique(both[0].body).tolist()) == {-1, 1, 2}
  assert both[0].body[16, 180] == 1


def test_one_sees_through_hedges_as_far_as_they_are_thin():
  # 1 - exp(-density * length) of the rays are stopped.
  c = caster(beams=200, up=1.0, down=-1.0)
  wall = {
    "x": 10.0,
    "y": 0.0,
    "angle": 0.0,
    "length": 1.0,
    "width": 8.0,
    "low": -5.0,
  }
  c.box(0, **wall, high=5.0, density=0.7)
  middle = c.hit[:, 170:190]
  np.testing.assert_allclose(middle.mean(), 1 - np.exp(-0.7), atol=0.02)


def source(split="train", **options):
  options = {"beams": 16, "width": 256, "num_examples": 6} | options
  return lidar_scenes.open_source(split=split, **options)


def test_a_scan_is_a_function_of_its_number():
  one, two = source(), source(num_examples=3)
  for name, array in one[2].items():
    np.testing.assert_array_equal(array, two[2][name])
  copy = pickle.loads(pickle.dumps(one))
  np.testing.assert_array_equal(copy[2]["points"], one[2]["points"])
  for other in (source("val"), source(seed=1)):
    assert not np.array_equal(other[2]["points"], one[2]["points"])
  assert not np.array_equal(one[1]["points"], one[2]["points"])


def test_examples_are_scans_in_the_sensors_order():
  s = source(beams=32, width=512)
  assert s.scans[3] == "00/000003"
  assert len(s.classes) == len(s.colors) == len(s.frequencies) == 20
  np.testing.assert_allclose(s.frequencies.sum(), 1, atol=2e-3)
  for example in (s[0], s[1]):
    valid = example["valid"]
    n = int(valid.sum())
    assert len(valid) == 32 * 512
    assert 0.75 * len(valid) < n < len(valid)
    assert valid[:n].all()
    p = example["points"][:n].astype(np.float64)
    reach = np.linalg.norm(p, axis=1)
    assert 0.9 < reach.min() < reach.max() < 80.5
    row = 3 - np.rad2deg(np.arcsin(p[:, 2] / reach))
    row = np.floor(row / 28 * 32).astype(int)
    column = np.floor((1 - np.arctan2(p[:, 1], p[:, 0]) / np.pi) * 256)
    order = row * 512 + column.astype(int)
    # Noise of the beams' and shots' angles moves some to the next pixel.
    assert (np.diff(order) > 0).mean() > 0.97
    r = example["remission"][:n]
    assert 0 <= r.min() < r.max() < 1
    far = reach > 50.2
    assert not example["label"][:n][far].any()


def test_streets_hold_what_streets_hold():
  s = source(num_examples=40)
  counts = np.zeros(20)
  for i in range(len(s)):
    counts += np.bincount(s[i]["label"][s[i]["valid"]], minlength=20)
  assert (counts[1:] > 0).all(), counts
  shares = counts / counts.sum()
  assert shares[9] == shares.max() < 0.45  # Road, and more than road.
  assert shares[[11, 13, 15, 17, 1]].min() > 0.03


def test_remission_does_not_give_classes_away():
  s = source(num_examples=12)
  label = np.concatenate([s[i]["label"][s[i]["valid"]] for i in range(12)])
  r = np.concatenate([s[i]["remission"][s[i]["valid"]] for i in range(12)])
  bins = np.minimum((r * 20).astype(int), 19)
  table = np.zeros((20, 20))
  np.add.at(table, (bins, label), 1)
  # The best guess from remission alone, against always saying road.
  assert table.max(axis=1).sum() / table.sum() < 0.55


def test_cached_examples_are_kept_and_read_only():
  s = source()
  assert s[0]["points"] is s[0]["points"]
  with pytest.raises(ValueError, match="read-only"):
    s[0]["points"][0] = 1
  assert source(cache=0)[0]["points"] is not source(cache=0)[0]["points"]


def test_it_is_loaded_without_an_image_size():
  s = sources.load(
    "lidar_scenes:", split="val", image_size=64, beams=4, width=32,
    num_examples=1,
  )  # fmt: skip
  assert s[0]["points"].shape == (128, 3)
  assert len(sources.load("lidar_scenes:", split="val", num_examples=2)) == 2
  assert "lidar_scenes" in sources.kinds()
  with pytest.raises(InputError, match="'folder' .* needs an image_size"):
    sources.load("folder:x", split="train")


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"split": "dev"}, "no split 'dev'"),
    ({"name": "night"}, "no variants"),
    ({"beams": 2}, "beams must be in 4..256, got 2"),
    ({"width": 9000}, "width must be"),
    ({"num_examples": 0}, "num_examples must be"),
    ({"seed": -1}, "seed must be"),
    ({"cache": -1}, "cache must be"),
  ],
)
def test_options_that_do_not_fit_are_refused(options, message):
  with pytest.raises(InputError, match=message):
    lidar_scenes.open_source(**{"split": "train", **options})


def test_a_written_folder_is_semantic_kitti(tmp_path):
  small = {"beams": 8, "width": 64}
  for split, scans in (("train", 3), ("val", 1), ("test", 1)):
    lidar_scenes.write(tmp_path, scans=scans, split=split, **small)
  for split, ours in (("train", "train"), ("valid", "val"), ("test", "test")):
    read = semantic_kitti.open_source(str(tmp_path), split=split)
    drawn = source(ours, **small)
    assert read.labelled == (split != "test")
    assert read.classes == drawn.classes
    np.testing.assert_allclose(read.frequencies, drawn.frequencies)
    n = int(read[0]["valid"].sum())
    assert n == int(drawn[0]["valid"].sum())
    np.testing.assert_array_equal(read[0]["points"][:n], drawn[0]["points"][:n])
    if read.labelled:
      np.testing.assert_array_equal(read[0]["label"][:n], drawn[0]["label"][:n])
  assert len(semantic_kitti.open_source(str(tmp_path), split="train")) == 3
  with pytest.raises(InputError, match="sequence must be in 0..99"):
    lidar_scenes.write(tmp_path, scans=1, sequence=100)


def test_the_command_line(tmp_path):
  lidar_scenes.main(
    [str(tmp_path), "--scans=2", "--others=1", "--beams=4", "--width=32"]
  )
  files = sorted(p.name for p in tmp_path.rglob("*.bin"))
  assert files == ["000000.bin", "000000.bin", "000000.bin", "000001.bin"]
  done = subprocess.run(
    [sys.executable, "-m", "jaxshape.data.lidar_scenes", tmp_path, "--beams=1"],
    capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert done.returncode == 1
  assert done.stderr == "error: beams must be in 4..256, got 1.\n"


def test_what_the_scans_are_drawn_from_tells_them_apart():
  def told(**options):
    return lidar_scenes.open_source(
      split="train", **{"num_examples": 2, **options}
    ).fingerprint

  assert told() == told()
  for other in ({"seed": 1}, {"beams": 16}, {"width": 64}):
    assert told(**other) != told()
  assert told(num_examples=3)["sequences"] != told()["sequences"]
