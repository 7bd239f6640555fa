import logging
import pathlib
import pickle

import numpy as np
import pytest
from scipy import io

from jaxshape.data import descriptor_files
from jaxshape.errors import InputError


def unit(*shape, seed=0):
  rows = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
  return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def _part(path, rows, order=None):
  np.save(path, rows)
  return descriptor_files.read(path)._replace(order=order)


def _table(*parts, normalize=True, memory=2**30):
  return descriptor_files.table(parts, normalize=normalize, memory=memory)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_of_any_float_is_read(dtype, order, tmp_path):
  rows = unit(5, 4)
  got = _table(_part(tmp_path / "a.npy", np.asarray(rows, dtype, order=order)))
  assert got.dtype == np.float32
  assert not got.flags.writeable
  np.testing.assert_array_equal(got, rows.astype(dtype).astype(np.float32))


def test_mat_holds_columns(tmp_path):
  database, queries = unit(5, 4), unit(2, 4, seed=1)
  path = tmp_path / "a.mat"
  for compressed in (True, False):
    held = {"X": database.T, "Q": queries.T, "o": np.array([{}], object)}
    io.savemat(path, held, do_compression=compressed)
    for key, want in (("X", database), ("Q", queries)):
      got = _table(descriptor_files.read(path, key=key))
      np.testing.assert_array_equal(got, want)


def test_large_tables_stay_in_their_files(tmp_path):
  rows, more = unit(6, 4), unit(3, 4, seed=1)
  plain = _part(tmp_path / "a.npy", rows)
  assert isinstance(_table(plain, memory=0), np.memmap)
  assert not isinstance(_table(plain, memory=6 * 4 * 4), np.memmap)
  turned = _part(tmp_path / "b.npy", rows, np.array([5, 0, 3]))
  lazy = _table(turned, _part(tmp_path / "c.npy", more), memory=0)
  want = np.concatenate([rows[[5, 0, 3]], more])
  assert type(lazy) is descriptor_files.Rows
  assert (lazy.shape, lazy.ndim, len(lazy)) == (want.shape, 2, 6)
  assert lazy.dtype == want.dtype
  assert lazy.nbytes == want.nbytes
  for index in (
    0, -1, np.int64(4), slice(None), slice(1, 5), slice(4, 2), slice(5, None),
    slice(None, None, -2), [5, 0, 0, -2], np.array([[1, 4], [2, 3]]),
    np.zeros(0, int), want[:, 0] > 0,
  ):  # fmt: skip
    got = lazy[index]
    np.testing.assert_array_equal(got, want[index])
    assert got.dtype == np.float32
  np.testing.assert_array_equal(np.asarray(lazy), want)
  again = pickle.dumps(lazy)
  np.testing.assert_array_equal(pickle.loads(again)[:], want)
  assert rows[1].tobytes() not in again
  for wrong in (6, [-7], [0.5], want[:5, 0] > 0):
    with pytest.raises(IndexError):
      lazy[wrong]


@pytest.mark.parametrize("memory", [0, 2**30])
def test_other_lengths_are_warned_of_and_normalized(memory, tmp_path, caplog):
  rows = unit(4, 8)
  part = _part(tmp_path / "a.npy", rows * np.array([[1], [2], [0.5], [1]]))
  fine = _part(tmp_path / "b.npy", rows * np.float32(1.0005))
  with caplog.at_level(logging.WARNING):
    got = _table(fine, part, memory=memory)[:]
  assert "a.npy: descriptors have lengths 0.5..2 rather than 1" in caplog.text
  assert "b.npy" not in caplog.text
  # A file whose rows are nearly of length 1 is left as it is.
  np.testing.assert_array_equal(got[:4], rows * np.float32(1.0005))
  np.testing.assert_allclose(got[4:], rows, rtol=1e-6)
  caplog.clear()
  got = _table(part, normalize=False, memory=memory)
  np.testing.assert_allclose(np.linalg.norm(got, axis=1), [1, 2, 0.5, 1])
  assert "used as they are" in caplog.text


def test_chunks_do_not_change_anything(tmp_path, monkeypatch):
  monkeypatch.setattr(descriptor_files, "_CHUNK", 8 * 4 * 2)
  rows = 3 * unit(7, 4)
  got = _table(_part(tmp_path / "a.npy", rows))
  np.testing.assert_allclose(got, rows / 3, rtol=1e-6)
  rows[5, 2] = np.inf
  with pytest.raises(InputError, match=r"a.npy: row 5 is not finite"):
    _table(_part(tmp_path / "a.npy", rows))


def test_rows_that_are_no_descriptors_are_refused(tmp_path):
  for value, text in ((np.nan, "row 2 is not finite"), (0, "row 2 is zero")):
    rows = unit(4, 3)
    rows[2] = value
    with pytest.raises(InputError, match=text):
      _table(_part(tmp_path / "a.npy", rows), normalize=False)
  huge = unit(4, 3).astype(np.float64)
  huge[1] *= 1e60  # Finite, but not in float32.
  with pytest.raises(InputError, match="row 1 is not finite"):
    _table(_part(tmp_path / "a.npy", huge))
  wide, narrow = unit(4, 3), unit(4, 2)
  with pytest.raises(InputError, match=r"b.npy has .* 2 numbers, .*a.npy of 3"):
    _table(_part(tmp_path / "a.npy", wide), _part(tmp_path / "b.npy", narrow))
  with pytest.raises(
    InputError, match="memory must be 0 or more bytes, got -1"
  ):
    _table(_part(tmp_path / "a.npy", wide), memory=-1)


class _Made:
  def __reduce__(self):
    return pathlib.Path.touch, (pathlib.Path("made"),)


def test_files_that_are_no_descriptors_are_refused(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  path = tmp_path / "a.npy"
  for rows, text in (
    (np.zeros((2, 3), int), "holds int64"),
    (np.zeros(3), r"shape \[3\]"),
    (np.zeros((0, 3)), r"shape \[0, 3\]"),
    (np.zeros((2, 3), complex), "holds complex128"),
  ):
    np.save(path, rows)
    with pytest.raises(InputError, match=text):
      descriptor_files.read(path)
  np.save(path, np.array([[_Made()]], object), allow_pickle=True)
  with pytest.raises(InputError, match="cannot be read"):
    descriptor_files.read(path)
  path.write_bytes(pickle.dumps(_Made()))
  with pytest.raises(InputError, match="no .npy file"):
    descriptor_files.read(path)
  assert not (tmp_path / "made").exists()
  np.savez(tmp_path / "b", a=np.zeros((2, 3)))
  (tmp_path / "b.npz").rename(path)
  with pytest.raises(InputError, match="no .npy file"):
    descriptor_files.read(path)
  path.write_bytes(b"")
  with pytest.raises(InputError, match="is empty"):
    descriptor_files.read(path)
  with pytest.raises(InputError, match="is no file"):
    descriptor_files.read(tmp_path)
  with pytest.raises(InputError, match="not there"):
    descriptor_files.read(tmp_path / "c.npy")


def test_every_truncation_is_told(tmp_path):
  path = tmp_path / "a.npy"
  np.save(path, unit(4, 3))
  data = path.read_bytes()
  for size in (0, 5, 8, 9, 64, 128, len(data) - 1):
    path.write_bytes(data[:size])
    with pytest.raises(InputError, match="a.npy"):
      descriptor_files.read(path)
  path = tmp_path / "a.mat"
  io.savemat(path, {"X": unit(3, 4)}, do_compression=True)
  data = path.read_bytes()
  for size in (0, 50, 128, 130, len(data) // 2):
    path.write_bytes(data[:size])
    with pytest.raises(InputError, match=r"a.mat"):
      descriptor_files.read(path)


def test_other_matrices_are_refused(tmp_path):
  path = tmp_path / "a.mat"
  io.savemat(path, {"Y": unit(3, 4), "X": np.array([{}], object)})
  with pytest.raises(InputError, match=r"no matrix X of floats; it has Y \(s"):
    descriptor_files.read(path)
  with pytest.raises(InputError, match="is not there"):
    descriptor_files.read(tmp_path / "b.mat")


def test_rows_are_found_by_the_names_of_their_files(tmp_path):
  rows = unit(4, 3)
  part = _part(tmp_path / "a.npy", rows)
  text = tmp_path / "a.txt"
  text.write_text("jpg/b.1.JPG\nc\n\\x\\a.png\nd.jpg\n")
  got = descriptor_files.ordered(part, ["a", "b.1", "jpg/c"], "list")
  np.testing.assert_array_equal(_table(got), rows[[2, 0, 1]])
  same = descriptor_files.ordered(part, ["b.1", "c", "a", "d"], "list")
  assert same.order is None
  with pytest.raises(InputError, match=r"a.txt has no file called e, .* list"):
    descriptor_files.ordered(part, ["a", "e"], "the list")
  text.write_text("x/a.jpg\ny/a.jpg\nb\nc\n")
  with pytest.raises(InputError, match="more than one file called a"):
    descriptor_files.ordered(part, ["a"], "list")
  text.write_text("a\nb\nc\n")
  with pytest.raises(InputError, match=r"has 3 names, .*a.npy has 4 rows"):
    descriptor_files.ordered(part, ["a"], "list")
  text.write_bytes(b"\xff\xfe\x00")
  with pytest.raises(InputError, match="no text in UTF-8"):
    descriptor_files.ordered(part, ["a"], "list")


def test_another_number_of_rows_is_refused(tmp_path):
  part = _part(tmp_path / "a.npy", unit(4, 3))
  with pytest.raises(InputError, match="has 4 descriptors, but list lists 2"):
    descriptor_files.ordered(part, ["a", "b"], "list")
  with pytest.raises(InputError, match="looks transposed"):
    descriptor_files.ordered(part, ["a", "b", "c"], "list")


def test_missing_files_are_listed(tmp_path):
  (tmp_path / "other.npy").touch()
  (tmp_path / "below").mkdir()
  folders = [tmp_path, tmp_path / "below"]
  with pytest.raises(
    InputError, match=r"no x: looked for a.npy, a.mat .* below; .* other.npy"
  ):
    descriptor_files.features(folders, ["a"], given="", what="x")
  (tmp_path / "below" / "a.mat").touch()
  find = descriptor_files.features
  assert find(folders, ["a"], given="", what="x") == folders[1] / "a.mat"
  assert find(folders, ["a"], given="other.npy", what="x").parent == tmp_path
  with pytest.raises(InputError, match="wanted a .npy or .mat file"):
    find(folders, ["a"], given="a.h5", what="x")
  with pytest.raises(InputError, match=r"kind needs a folder: kind:/path"):
    descriptor_files.folder("", None, "kind")
  with pytest.raises(InputError, match="There is no folder"):
    descriptor_files.folder("none", str(tmp_path), "kind")
