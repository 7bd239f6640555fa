import io as streams

import numpy as np
import pytest
from scipy import io

from jaxshape.data import mat_files
from jaxshape.errors import InputError

X = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
HELD = {
  "a": np.array([{"b": 1}], object), "text": "abc", "X": X, "D": X * 2.0,
  "a_longer_name": X[:, :1], "whole": np.arange(6.0).reshape(2, 3),
  "i": np.arange(3), "z": X + 1j,
}  # fmt: skip


def _bytes(compressed):
  file = streams.BytesIO()
  io.savemat(file, HELD, do_compression=compressed)
  return file.getvalue()


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("key", ["X", "D", "a_longer_name", "whole"])
def test_matrices_are_read_as_scipy_wrote_them(key, compressed, tmp_path):
  path = tmp_path / "a.mat"
  path.write_bytes(_bytes(compressed))
  got = mat_files.read(path, key)
  assert got.dtype == HELD[key].dtype
  np.testing.assert_array_equal(got, HELD[key])


def test_whole_numbers_in_fewer_bytes_and_the_other_order(tmp_path):
  # By hand: the doubles [1 2; 3 4] as MATLAB stores them, one byte each.
  def element(kind, data):
    size = len(data).to_bytes(4, "big")
    return kind.to_bytes(4, "big") + size + data + bytes(-len(data) % 8)

  body = element(6, bytes([0, 0, 0, 6, 0, 0, 0, 0]))
  body += element(5, bytes([0, 0, 0, 2] * 2))
  body += bytes([0, 1, 0, 1]) + b"X\0\0\0"  # A name in the small form.
  body += bytes([0, 4, 0, 2, 1, 3, 2, 4])
  path = tmp_path / "a.mat"
  path.write_bytes(bytes(124) + b"\x01\x00MI" + element(14, body))
  np.testing.assert_array_equal(mat_files.read(path, "X"), [[1.0, 2], [3, 4]])


@pytest.mark.parametrize("key", ["i", "z", "a", "text", "none"])
def test_what_is_no_matrix_of_floats_is_refused(key, tmp_path):
  path = tmp_path / "a.mat"
  path.write_bytes(_bytes(True))
  with pytest.raises(InputError, match=rf"no matrix {key} of floats; .*X \(s"):
    mat_files.read(path, key)


@pytest.mark.parametrize("compressed", [False, True])
def test_damaged_files_are_refused_or_read(compressed, tmp_path):
  whole, rng = _bytes(compressed), np.random.default_rng(0)
  path, refused = tmp_path / "a.mat", 0
  for _ in range(300):
    data = bytearray(whole)
    for at in rng.integers(120, len(data), 3):
      data[at] = rng.integers(256)
    path.write_bytes(data)
    try:
      assert mat_files.read(path, "D").dtype.kind == "f"
    except InputError:
      refused += 1
  assert refused > 30


@pytest.mark.parametrize("compressed", [False, True])
def test_truncated_files_are_refused(compressed, tmp_path):
  whole, path = _bytes(compressed), tmp_path / "a.mat"
  for size in (0, 50, 127, 128, 130, 140, len(whole) // 4):
    path.write_bytes(whole[:size])
    with pytest.raises(InputError, match="a.mat"):
      mat_files.read(path, "D")
  path.write_bytes(b"MATLAB 7.3" + whole[10:])
  with pytest.raises(InputError, match="version 7.3"):
    mat_files.read(path, "D")
  for gone, text in ((tmp_path / "b.mat", "not there"), (tmp_path, "no file")):
    with pytest.raises(InputError, match=text):
      mat_files.read(gone, "D")
