import numpy as np
import pytest

from jaxshape.data import scan_files, scans, sources
from jaxshape.errors import InputError


def points(n):
  return np.random.default_rng(n).normal(size=(n, 3)).astype(np.float32)


@pytest.fixture
def folder(tmp_path):
  scan_files.write(tmp_path / "b" / "2.bin", points(20), np.full(20, 0.5))
  scan_files.write(tmp_path / "b" / "1.bin", points(9), np.full(9, 0.5))
  np.save(tmp_path / "a.npy", points(5))
  rows = np.concatenate([points(7), np.full((7, 2), 51)], axis=1)
  (tmp_path / "c.pcd.bin").write_bytes(rows.astype("<f4").tobytes())
  (tmp_path / ".hidden.bin").write_bytes(b"?")
  (tmp_path / "notes.txt").write_text("no scan")
  return tmp_path


def test_a_folder_of_any_scans(folder):
  source = scans.open_source(str(folder))
  assert source.scans == ("a", "b/1", "b/2", "c.pcd")
  assert source.points == 20
  for i, n in enumerate((5, 9, 20, 7)):
    example = source[i]
    assert example["valid"].sum() == n
    np.testing.assert_array_equal(example["points"][:n], points(n))
    assert not example["label"].any()
  assert len(source.classes) == len(source.colors) == 20


def test_scans_that_differ_in_their_ending_alone_have_names_of_their_own(
  folder,
):
  np.save(folder / "b" / "1.npy", points(3))
  source = scans.open_source(str(folder))
  assert source.scans == ("a", "b/1.bin", "b/1.npy", "b/2", "c.pcd")


def test_remissions_are_brought_to_the_range_of_kitti(folder, caplog):
  source = scans.open_source(str(folder))
  assert source[1]["remission"][0] == 0.5
  assert not caplog.records
  np.testing.assert_allclose(source[3]["remission"][:7], 51 / 255)
  assert "divided by 255" in caplog.text
  source = scans.open_source(str(folder), full_remission=102)
  np.testing.assert_allclose(source[3]["remission"][:7], 0.5)
  with pytest.raises(InputError, match="full_remission must be above 0"):
    scans.open_source(str(folder), full_remission=0)


def test_one_file(folder):
  source = sources.load("scans:b/2.bin", split="", data_dir=str(folder))
  assert source[0]["points"].shape == (20, 3)
  np.testing.assert_array_equal(source[0]["points"], points(20))


def test_what_is_missing_or_damaged_is_named(folder):
  for name, message in (
    ("x", "no file or folder .*x"),
    ("", "needs a path"),
    ("notes.txt", "notes.txt is no scan"),
  ):
    with pytest.raises(InputError, match=message):
      scans.open_source(name and str(folder / name))
  (folder / "empty").mkdir()
  with pytest.raises(InputError, match="holds no scans"):
    scans.open_source(str(folder / "empty"))
  source = scans.open_source(str(folder))
  (folder / "a.npy").unlink()
  with pytest.raises(InputError, match="no file .*a.npy"):
    source[0]
  (folder / "b" / "1.bin").write_bytes(b"123")
  with pytest.raises(InputError, match=r"1.bin has 3 bytes"):
    scans.open_source(str(folder))
