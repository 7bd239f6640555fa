import logging
import pathlib
import struct

import numpy as np
import pytest

from jaxshape.data import scan_files
from jaxshape.errors import InputError

# Three points and their remissions, exact in every format.
POINTS = np.array([[1, 2, -0.5], [-4, 0.25, 8], [0, 0, 0]], np.float32)
REMISSION = np.array([0.5, 0.25, 1], np.float32)
ROWS = np.concatenate([POINTS, REMISSION[:, None]], axis=1)


def save(path, data):
  path.write_bytes(data if isinstance(data, bytes) else data.encode())
  return path


def check(path, **options):
  points, remission = scan_files.read(path, **options)
  assert points.dtype == remission.dtype == np.float32
  np.testing.assert_array_equal(points, POINTS)
  np.testing.assert_array_equal(remission, REMISSION)


def test_kitti(tmp_path):
  data = b"".join(struct.pack("<4f", *row) for row in ROWS)
  check(save(tmp_path / "a.bin", data))
  scan_files.write(tmp_path / "new" / "b.bin", POINTS, REMISSION)
  assert (tmp_path / "new" / "b.bin").read_bytes() == data
  assert [p.name for p in (tmp_path / "new").iterdir()] == ["b.bin"]


def test_nuscenes_by_name_and_by_option(tmp_path):
  data = b"".join(struct.pack("<5f", *row, 31.0) for row in ROWS)
  check(save(tmp_path / "a.pcd.bin", data))
  check(save(tmp_path / "a.bin", data), columns=5)


@pytest.mark.parametrize("dtype", ["<f4", ">f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy(tmp_path, dtype, order):
  np.save(tmp_path / "a.npy", np.asarray(ROWS, dtype, order=order))
  check(tmp_path / "a.npy")


def test_missing_remission_is_zero_and_said(tmp_path, caplog):
  np.save(tmp_path / "a.npy", POINTS)
  points, remission = scan_files.read(tmp_path / "a.npy")
  np.testing.assert_array_equal(points, POINTS)
  np.testing.assert_array_equal(remission, 0)
  assert "no remission" in caplog.text


PCD = """# .PCD v0.7
VERSION 0.7
FIELDS _ x y z rgb _ intensity
SIZE 1 4 4 8 4 1 2
TYPE U F F F U U {kind}
COUNT 3 1 1 1 1 2 1
WIDTH 3
HEIGHT 1
VIEWPOINT 0 0 0 1 0 0 0
POINTS 3
DATA {form}
"""


def test_pcd(tmp_path):
  quarters = REMISSION * 4  # An integer field.
  data = PCD.format(kind="U", form="binary").encode()
  for (x, y, z), r in zip(POINTS, quarters, strict=True):
    data += struct.pack("<3x2fdI2xH", x, y, z, 7, int(r))
  text = PCD.format(kind="U", form="ascii")
  for (x, y, z), r in zip(POINTS, quarters, strict=True):
    text += f"0 0 0 {x} {y} {z} 7 0 0 {int(r)}\n"
  for path in (
    save(tmp_path / "a.pcd", data),
    save(tmp_path / "b.pcd", text),
    save(tmp_path / "c.pcd", text.replace("\n", "\r\n")),
  ):
    points, remission = scan_files.read(path)
    np.testing.assert_array_equal(points, POINTS)
    np.testing.assert_array_equal(remission, quarters)


PLY = """ply
format {form} 1.0
comment three points
element vertex 3
property uchar red
property float x
property float y
property double z
property float {field}
element face 1
property list uchar int vertex_indices
end_header
"""


def test_ply(tmp_path):
  for name, form, order in (
    ("a", "binary_little_endian", "<"), ("b", "binary_big_endian", ">"),
  ):  # fmt: skip
    data = PLY.format(form=form, field="intensity").encode()
    for x, y, z, r in ROWS:
      data += struct.pack(order + "B2fdf", 9, x, y, z, r)
    check(save(tmp_path / f"{name}.ply", data + b"\x03123456789012"))
  text = PLY.format(form="ascii", field="reflectance")
  for x, y, z, r in ROWS:
    text += f"9 {x} {y} {z} {r}\n"
  check(save(tmp_path / "c.ply", text + "3 0 1 2\n"))


def test_points_that_are_not_finite_are_kept_and_counted(tmp_path, caplog):
  rows = ROWS.copy()
  rows[1, 0] = np.nan
  rows[2, 3] = -np.inf
  save(tmp_path / "a.bin", rows.tobytes())
  points, remission = scan_files.read(tmp_path / "a.bin")
  np.testing.assert_array_equal(points, rows[:, :3])
  np.testing.assert_array_equal(remission, rows[:, 3])
  assert [r.levelno for r in caplog.records] == [logging.WARNING]
  assert "a.bin: 2 of 3 points are not finite" in caplog.text


HTML = (
  b"<!DOCTYPE html>\n<html><body>Not found, sorry</body></html>\n" + b" " * 4
)


@pytest.mark.parametrize(
  ("name", "data", "message"),
  [
    ("a.bin", b"", "is empty"),
    ("a.bin", ROWS.tobytes()[:-3], "has 45 bytes.*16.*cut off"),
    ("a.pcd.bin", ROWS.tobytes(), "has 48 bytes.*20"),
    ("a.bin", HTML, "'<!DOCTYPE html.*web page"),
    ("a.bin", (ROWS * 1e20).tobytes(), "up to .*wanted metres"),
    ("a.xyz", b"1 2 3", "no scan that can be read"),
    ("a.npy", b"\x93NUMPY" + HTML, "no .npy file"),
    ("a.npy", HTML, "no .npy file"),
    ("a.pcd", b"VERSION 0.7\nFIELDS x\n", "no PCD header"),
    ("a.pcd", b"FIELDS x y z\nDATA ascii\n", "does not fit.*SIZE"),
    ("a.pcd", PCD.format(kind="U", form="binary") + "xx", "promises 3"),
    ("a.pcd", PCD.format(kind="U", form="ascii") + "1 2", "promises 3"),
    ("a.pcd", PCD.format(kind="Q", form="ascii") + "1 2", "does not fit"),
    (
      "a.pcd",
      PCD.format(kind="U", form="binary_compressed"),
      "'binary_compressed'; wanted ascii or binary",
    ),
    ("a.ply", b"ply\nformat ascii 1.0\n", "no PLY header"),
    ("a.ply", PLY.format(form="zip", field="i"), "format.*'zip'"),
    ("a.ply", PLY.format(form="ascii", field="i") + "1 two", "promises 3"),
    ("a.ply", PLY.format(form="ascii", field="i") + "w " * 15, "could not"),
    (
      "a.ply",
      PLY.format(form="ascii", field="i").replace("float y", "float b")
      + "1 " * 15,
      "has the fields red, x, b, z, i; wanted x, y, z",
    ),
    (
      "a.ply",
      PLY.format(form="ascii", field="i").replace("vertex 3", "face 3"),
      "first the element vertex",
    ),
  ],
)  # fmt: skip
def test_what_is_no_scan_is_refused_by_name(tmp_path, name, data, message):
  path = save(tmp_path / name, data)
  with pytest.raises(InputError, match=message) as error:
    scan_files.read(path)
  assert str(path) in str(error.value)


def test_arrays_that_are_no_scans_are_refused(tmp_path):
  path = tmp_path / "a.npy"
  for array in (
    POINTS[:, :2], POINTS[0], np.array([["a"] * 3]), np.zeros((0, 4)),
    POINTS.astype(complex),
  ):  # fmt: skip
    np.save(path, array)
    with pytest.raises(InputError, match="a.npy.*wanted"):
      scan_files.read(path)
  # A pickle is never opened: this one would fail loudly if it were.
  np.save(path, np.array([[pathlib.Path("x")] * 3], object), allow_pickle=True)
  with pytest.raises(InputError, match="object"):
    scan_files.read(path)
  np.save(path, ROWS)
  save(path, path.read_bytes()[:-1])
  with pytest.raises(InputError, match="promises 48.*cut off"):
    scan_files.read(path)
  # A header that promises 2^60 points asks for no memory.
  save(path, path.read_bytes().replace(b"(3, 4)", b"(%d, 4)" % 2**60)[:170])
  with pytest.raises(InputError, match="a.npy"):
    scan_files.read(path)


def test_files_that_cannot_be_read_are_named(tmp_path):
  with pytest.raises(InputError, match="no file .*gone.bin"):
    scan_files.read(tmp_path / "gone.bin")
  (tmp_path / "folder.bin").mkdir()
  with pytest.raises(InputError, match="folder.bin is no regular file"):
    scan_files.read(tmp_path / "folder.bin")
  with pytest.raises(InputError, match="columns must be .* got 3"):
    scan_files.read(tmp_path / "gone.bin", columns=3)


def test_labels(tmp_path):
  path = tmp_path / "a.label"
  save(path, struct.pack("<3I", 10, 252 | 7 << 16, 0xFFFF | 0xFFFF << 16))
  labels, instances = scan_files.read_labels(path, count=3)
  assert labels.tolist() == [10, 252, 0xFFFF]
  assert instances.tolist() == [0, 7, 0xFFFF]
  assert labels.dtype == instances.dtype == np.int32
  again = tmp_path / "deep" / "b.label"
  scan_files.write_labels(again, labels, instances=instances)
  assert again.read_bytes() == path.read_bytes()
  scan_files.write_labels(again, labels)
  assert scan_files.read_labels(again)[1].tolist() == [0, 0, 0]


def test_labels_that_do_not_fit_are_refused(tmp_path):
  path = save(tmp_path / "a.label", struct.pack("<3I", 1, 2, 3))
  with pytest.raises(InputError, match="a.label has 3 labels.* 4 points"):
    scan_files.read_labels(path, count=4)
  with pytest.raises(InputError, match="11 bytes"):
    scan_files.read_labels(save(path, b"\0" * 11))
  with pytest.raises(InputError, match="0 bytes"):
    scan_files.read_labels(save(path, b""))
  with pytest.raises(InputError, match="web page"):
    scan_files.read_labels(save(path, HTML))
  for wrong in ([-1], [2**16], [1.0], [[1]]):
    with pytest.raises(ValueError, match="labels must be"):
      scan_files.write_labels(path, np.array(wrong))
  with pytest.raises(ValueError, match="one per label"):
    scan_files.write_labels(path, np.array([1]), instances=np.array([1, 2]))
  with pytest.raises(ValueError, match="must be"):
    scan_files.write(path, POINTS, REMISSION[:2])


def test_sensors_have_rows_columns_and_a_field_of_view():
  assert scan_files.SENSORS["hdl64"] == (64, 2048, 3, -25)
  for sensor in scan_files.SENSORS.values():
    assert sensor.fov_up > 0 > sensor.fov_down
    assert sensor.width % 256 == 0
