"""Scans in, labels and pictures out."""

import logging
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import squeezesegv3 as configs
from jaxshape import segment
from jaxshape import system as system_lib
from jaxshape.data import lidar_scenes, scan_files, semantic_kitti
from jaxshape.engine import checkpoints, command, runtime
from jaxshape.errors import InputError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A workdir with a network as it is before training."""
  workdir = tmp_path_factory.mktemp("run")
  config = configs.get_config("tiny").lock()
  mesh = runtime.make_mesh(config.mesh)
  system = system_lib.load(config)
  state = runtime.initialize(system.init, jax.random.key(0), mesh)
  saved = checkpoints.Checkpoints(workdir)
  saved.save(state, config=config.to_dict(), metrics={})
  saved.wait()
  command.write_config(config, workdir)
  return workdir, config


@pytest.fixture
def scan():
  """Points and remissions of a simulated scan."""
  scene = lidar_scenes.open_source(
    split="test", beams=16, width=64, num_examples=1
  )[0]
  valid = scene["valid"]
  return scene["points"][valid], scene["remission"][valid]


def test_every_point_of_every_scan_gets_a_raw_label(run, scan, tmp_path):
  workdir, config = run
  points, remission = scan
  drive = tmp_path / "drive"
  scan_files.write(drive / "a.bin", points, remission)
  points = points.copy()
  points[5] = np.nan  # One that no range image shows.
  np.save(drive / "b.npy", np.c_[points, remission][:-100])
  out = tmp_path / "out"
  written = segment.segment(
    config, str(workdir), str(drive), output=out, pictures=1
  )
  assert written == [out / "a.label", out / "b.label"]
  known = set(semantic_kitti.builtin_labels().to_raw.tolist())
  for path, count in zip(
    written, (len(points), len(points) - 100), strict=True
  ):
    raw, instances = scan_files.read_labels(path, count=count)
    assert set(raw.tolist()) <= known
    assert not instances.any()
  assert raw[5] == 0
  assert (out / "a.png").stat().st_size > 10_000
  assert not (out / "b.png").exists()


def test_the_benchmark_gets_its_own_layout(run, tmp_path):
  workdir, config = run
  root = tmp_path / "kitti"
  lidar_scenes.write(root, scans=1, sequence=11, beams=16, width=64)
  out = tmp_path / "out"
  (path,) = segment.segment(
    config,
    str(workdir),
    f"semantic_kitti:{root}",
    output=out,
    split="test",
    pictures=0,
  )
  assert path == out / "sequences" / "11" / "predictions" / "000000.label"
  scan = root / "sequences" / "11" / "velodyne" / "000000.bin"
  points, _ = scan_files.read(scan)
  scan_files.read_labels(path, count=len(points))


def test_a_scan_of_another_sensor_gets_a_warning(run, scan, caplog):
  _, config = run
  points, _ = scan
  with caplog.at_level(logging.WARNING):
    segment._check_density(config, points)
    assert not caplog.records
    flat = np.abs(points[:, 2]) < 0.1 * np.linalg.norm(points, axis=1)
    segment._check_density(config, points[flat])
    assert "rows of the range image hold points" in caplog.text
    caplog.clear()
    segment._check_density(config, points * np.float32([1, 1, 3]))
    assert "outside the field of view" in caplog.text
    assert "vlp16" in caplog.text


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("gone.bin", "gone.bin"),
    ("web.bin", "web.bin"),
    ("cut.bin", "cut.bin.*16"),
    ("empty.bin", "empty.bin"),
    ("scan.jpg", "scan.jpg.*bin"),
    ("semantic_kitti:nowhere", "nowhere"),
  ],
)
def test_what_is_no_scan_is_refused_by_name(run, tmp_path, name, message):
  workdir, config = run
  (tmp_path / "web.bin").write_text("<!DOCTYPE html><html>404</html>" * 4)
  (tmp_path / "cut.bin").write_bytes(np.ones(10, np.float32).tobytes()[:-3])
  (tmp_path / "empty.bin").write_bytes(b"")
  (tmp_path / "scan.jpg").write_bytes(b"\xff\xd8")
  scans = name if ":" in name else str(tmp_path / name)
  with pytest.raises(InputError, match=message):
    segment.segment(config, str(workdir), scans, output=tmp_path / "out")
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ([], "name one scan"),
    (["a.bin"], "name a trained run with --workdir"),
    (["a.bin", "--workdir=nowhere"], "nowhere is not there"),
    (["a.bin", "--workdir=.", "--sensor=vlp17"], "sensor"),
  ],
)
def test_the_command_says_in_one_line_what_is_missing(
  arguments, message, tmp_path
):
  done = subprocess.run(
    [sys.executable, "-m", "jaxshape.segment", *arguments],
    capture_output=True,
    text=True,
    check=False,
    cwd=tmp_path,
  )
  assert done.returncode == 1
  assert message in done.stderr
  assert len(done.stderr.strip().splitlines()) == 1
  assert "Traceback" not in done.stderr


@pytest.mark.parametrize("labels", [None, [77] * 7, [10] * 6])
def test_labels_are_not_read(tmp_path, labels):
  folder = tmp_path / "sequences" / "08"
  points = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
  scan_files.write(folder / "velodyne" / "000000.bin", points, np.zeros(7))
  if labels is not None:  # Unknown ones, or too few.
    path = folder / "labels" / "000000.label"
    scan_files.write_labels(path, np.array(labels))
  source = segment._source(f"semantic_kitti:{tmp_path}", "valid")
  assert source.scans == ("08/000000",)
  assert source[0]["valid"].sum() == 7
  assert not source[0]["label"].any()


def test_the_lower_end_of_the_view_may_have_no_sign(run, scan, caplog):
  config = run[1].copy_and_resolve_references()
  with config.unlocked():
    config.sensor.fov_down = abs(config.sensor.fov_down)
  with caplog.at_level(logging.WARNING):
    segment._check_density(config, scan[0])
  assert not caplog.records
