import collections
import os
import pathlib
import pickle
import struct
import sys

import numpy as np
import pytest

from jaxshape.data import plain_pickle
from jaxshape.errors import InputError


def _load(folder, data):
  (folder / "a.pkl").write_bytes(data)
  return plain_pickle.load(folder / "a.pkl")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_containers_and_arrays_are_read(protocol, tmp_path):
  names = ["all_souls_000013", "ü"]
  content = {
    "names": names, "again": names, "tuple": ("x", "y"), "set": {3},
    "ordered": collections.OrderedDict(z=[1.5, None, True]),
    "default": collections.defaultdict(list, {1: [2]}),
    "array": np.arange(6).reshape(2, 3), "column": np.array([[4], [5]]),
    "big": np.array([1, 2], ">i4"), "fortran": np.asfortranarray(np.eye(2)),
    "empty": np.array([]), "scalars": [np.int64(3), np.int32(-4), 5],
    "texts": np.array(["ab", "c"]), "long": 2**70,
  }  # fmt: skip
  got = _load(tmp_path, pickle.dumps(content, protocol))
  assert got["names"] == got["again"] == names
  assert got["tuple"] == ("x", "y")
  assert got["set"] == [3]
  assert got["ordered"] == {"z": [1.5, None, True]}
  assert got["default"] == {1: [2]}
  assert got["long"] == 2**70
  np.testing.assert_array_equal(got["array"].array(), [[0, 1, 2], [3, 4, 5]])
  np.testing.assert_array_equal(got["fortran"].array(), np.eye(2))
  for key, want in (
    ("column", [4, 5]), ("big", [1, 2]), ("empty", []), ("scalars", [3, -4, 5]),
  ):  # fmt: skip
    rows = plain_pickle.integers(got[key])
    assert rows.tolist() == want
    assert rows.dtype == np.int64
  assert plain_pickle.texts(got["texts"]) == ["ab", "c"]
  assert plain_pickle.texts(got["names"]) == names


def test_bytes_of_python_2_are_texts(tmp_path):
  # {'a': ['b']} as Python 2 writes it.
  got = _load(tmp_path, b"\x80\x02}U\x01a]U\x01bas.")
  assert plain_pickle.texts(got["a"]) == ["b"]


class _Calls:
  def __init__(self, function, *arguments):
    self.call = function, arguments

  def __reduce__(self):
    return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize(
  ("function", "arguments"),
  [
    (os.system, ("touch made",)),
    (eval, ("open('made', 'w')",)),
    (exec, ("open('made', 'w')",)),
    (pathlib.Path("made").touch, ()),
    (np.load, ("made.npy",)),
    (getattr, ("", "join")),
  ],
)
def test_what_is_called_is_named_and_not_run(
  function, arguments, protocol, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  content = {"imlist": [_Calls(function, *arguments)]}
  data = pickle.dumps(content, protocol)
  with pytest.raises(InputError, match=r"a.pkl needs .*is not run"):
    _load(tmp_path, data)
  assert not (tmp_path / "made").exists()


def test_the_attack_of_the_test_above_works_on_pickle(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  pickle.loads(pickle.dumps(_Calls(os.system, "touch made")))
  assert (tmp_path / "made").exists()


@pytest.mark.parametrize(
  ("opcodes", "text"),
  [
    (b"cos\nsystem\n(S'true'\ntR.", "needs os.system"),
    (b"(S'true'\nios\nsystem\n.", "opcode INST"),
    (b"(cos\nsystem\nS'true'\no.", "needs os.system"),
    (b"\x80\x02\x82\x01.", "opcode EXT1"),
    (b"Pa\n.", "opcode PERSID"),
    (b"cnumpy\nload\n.", "needs numpy.load"),
    (b"cnumpy\nndarray\n)R.", "calls numpy.ndarray"),
    (b"}}b.", "changes what has no state"),
    (b"ccollections\nOrderedDict\n}b.", "changes what has no state"),
    (b"})K\x01s.", "key of type tuple"),
    (b"]K\x01K\x02s.", "damaged"),
    (b"K\x01.", "holds a int"),
    (b"].", "holds a list"),
    (b"0.", "damaged"),
    (b"", "damaged"),
    (b"<html>", "damaged"),
    (b"\x80\x02" + b"\x8a\xff" + b"1", "damaged"),
    (b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"a.", "damaged"),
    (b"\x80\x02j\xff\xff\xff\x7f.", "damaged"),
  ],
)
def test_other_pickles_are_refused(opcodes, text, tmp_path):
  with pytest.raises(InputError, match=text):
    _load(tmp_path, opcodes)


@pytest.mark.parametrize("protocol", [2, 4])
def test_every_truncation_is_told(protocol, tmp_path):
  data = pickle.dumps({"a": [1, "b"], "c": np.arange(3)}, protocol)
  for size in range(len(data)):
    with pytest.raises(InputError, match="a.pkl "):
      _load(tmp_path, data[:size])


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize(
  "value",
  [
    np.array([print], object),
    np.array([(1, 2)], "i4,f4"),
    np.array(["2020-01-01"], "M8[D]"),
    np.ma.array([1], mask=[True]),
  ],
)
def test_arrays_of_objects_and_records_are_refused(value, protocol, tmp_path):
  with pytest.raises(ValueError, match=r"no plain NumPy array|is not run"):
    plain_pickle.integers(
      _load(tmp_path, pickle.dumps({"a": value}, protocol))["a"]
    )


def test_arrays_that_claim_other_sizes_are_refused():
  dtype = plain_pickle.Array  # Any that is no dtype.
  for state in ((), (1, (2,), dtype, False, b""), (1, (2**60,), None, 0, b"a")):
    with pytest.raises(ValueError, match="no plain NumPy array"):
      plain_pickle.integers(plain_pickle.Array(state))


def test_a_short_file_does_not_become_long_work(tmp_path):
  # Lists in lists, each twice the one before: 2^40 leaves.
  twice = b"]h\x00ah\x00aq\x000"
  data = b"\x80\x02]q\x000" + twice * 40 + b"}U\x01ah\x00s."
  nested = _load(tmp_path, data)["a"]
  with pytest.raises(ValueError, match="a list with a list in it"):
    plain_pickle.integers(nested)


def test_nothing_is_imported(tmp_path):
  before = set(sys.modules)
  with pytest.raises(InputError, match="needs antigravity.fly"):
    _load(tmp_path, b"cantigravity\nfly\n.")
  # Looking up the code would import the module of its name.
  encoded = b"c_codecs\nencode\n(U\x01aU\x0bantigravitytR"
  dtype = b"cnumpy\ndtype\n(U\x02i1tR"
  scalar = b"cnumpy._core.multiarray\nscalar\n(" + dtype + encoded + b"tR"
  value = _load(tmp_path, b"}U\x01a" + scalar + b"s.")["a"]
  with pytest.raises(ValueError, match="no plain NumPy array"):
    plain_pickle.integers(value)
  assert "antigravity" not in set(sys.modules) - before


@pytest.mark.parametrize(
  ("value", "text"),
  [
    (3, "a int"),
    ([1, "b"], "a list with a str in it"),
    ([True], "a list with a bool in it"),
    ([1.5], "not whole numbers"),
    ([float("nan")], "not whole numbers"),
    ([2**63], "not whole numbers"),
    ({}, "a dict"),
  ],
)
def test_values_that_are_no_integers_are_named(value, text):
  with pytest.raises(ValueError, match=text):
    plain_pickle.integers(value)


def test_values_that_are_no_texts_are_named():
  with pytest.raises(ValueError, match="a list with a int in it"):
    plain_pickle.texts([1])
  with pytest.raises(ValueError, match="a dict"):
    plain_pickle.texts({})


def test_paths_that_are_no_files_are_refused(tmp_path):
  for path, text in ((tmp_path, "is no file"), (tmp_path / "b", "not there")):
    with pytest.raises(InputError, match=text):
      plain_pickle.load(path)
