import logging
import os
import pickle

import numpy as np
import pytest
from scipy import io

from jaxshape.data import landmarks, revisited, sources
from jaxshape.errors import InputError

IMAGES, QUERIES = ["i0", "i1", "i2", "i3", "i4"], ["q0", "q1"]
GROUND = [
  {"bbx": [0.5, 1, 2, 3], "easy": [1], "hard": np.array([3, 0]), "junk": []},
  {"bbx": np.ones(4), "easy": np.array([]), "hard": [2], "junk": [4, 1]},
]


def unit(*shape, seed=0):
  rows = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
  return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


DATABASE, ASKED = unit(5, 6), unit(2, 6, seed=1)


def ground(folder, split="roxford5k", protocol=2, **changes):
  content = {"imlist": IMAGES, "qimlist": QUERIES, "gnd": GROUND, **changes}
  content = {k: v for k, v in content.items() if v is not None}
  data = pickle.dumps(content, protocol)
  (folder / f"gnd_{split}.pkl").write_bytes(data)


@pytest.fixture
def root(tmp_path):
  ground(tmp_path)
  np.save(tmp_path / "roxford5k.npy", DATABASE)
  np.save(tmp_path / "roxford5k_queries.npy", ASKED)
  return tmp_path


def open_it(root, **options):
  options = {"split": "roxford5k", "neighbours": 3, **options}
  return sources.load(f"revisited:{root}", **options)


def same(source, database=DATABASE, queries=ASKED):
  np.testing.assert_array_equal(source.database[:], database)
  np.testing.assert_array_equal(source.queries, queries)
  assert source.names == tuple(QUERIES)
  assert len(source) == 2
  got = [[part.tolist() for part in source.truth(i)] for i in range(2)]
  assert got == [[[1], [3, 0], []], [[], [2], [4, 1]]]
  assert all(p.dtype == np.int64 for i in range(2) for p in source.truth(i))


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_the_ground_truth_and_descriptors_are_read(protocol, root):
  ground(root, protocol=protocol)
  same(open_it(root))


def test_examples_know_what_is_relevant(root):
  example = open_it(root)[0]
  # By hand: the inner products, best first.
  order = np.argsort(-DATABASE @ ASKED[0])[:3]
  np.testing.assert_allclose(example["neighbours"], DATABASE[order])
  assert example["relevant"].tolist() == [i in (0, 1, 3) for i in order]
  assert example["valid"].all()


def test_the_public_features_are_columns(root):
  for name in ("roxford5k.npy", "roxford5k_queries.npy"):
    (root / name).unlink()
  (root / "features").mkdir()
  (root / "datasets" / "roxford5k").mkdir(parents=True)
  name = "gnd_roxford5k.pkl"
  (root / name).rename(root / "datasets" / "roxford5k" / name)
  path = root / "features" / "roxford5k_resnet_rsfm120k_gem.mat"
  io.savemat(path, {"X": DATABASE.T, "Q": ASKED.T})
  same(open_it(root))
  path.rename(root / "features" / "other.mat")
  same(open_it(root, features="other.mat"))
  same(open_it(root, features=str(root / "features" / "other.mat")))


def test_one_file_of_all_images_is_read_by_names(root):
  for name in ("roxford5k.npy", "roxford5k_queries.npy"):
    (root / name).unlink()
  rows = np.concatenate([ASKED, unit(1, 6, seed=2), DATABASE])[::-1]
  np.save(root / "descriptors.npy", rows)
  names = [f"jpg/{name}.jpg" for name in [*QUERIES, "more", *IMAGES]][::-1]
  (root / "descriptors.txt").write_text("\n".join(names) + "\n")
  same(open_it(root))


@pytest.mark.parametrize("memory", [0, 2**30])
def test_distractors_lie_below_the_database(memory, root):
  distractors = unit(4, 6, seed=3)
  np.save(root / "r1m.npy", distractors)
  source = open_it(root, distractors="r1m.npy", memory=memory)
  same(source, np.concatenate([DATABASE, distractors]))
  assert isinstance(source.database, np.ndarray) == (memory > 0)


def test_rows_of_a_table_in_files_are_found_as_in_memory(root):
  np.save(root / "r1m.npy", unit(4, 6, seed=3))
  sources = [open_it(root, distractors="r1m.npy", memory=m) for m in (0, 2**30)]
  for key, value in sources[0][1].items():
    np.testing.assert_array_equal(value, sources[1][1][key], err_msg=key)


def test_older_ground_truths_have_ok_images(root):
  old = [{"bbx": [], "ok": [1, 2], "junk": [3]}, {"ok": [], "junk": []}]
  ground(root, gnd=old)
  truth = open_it(root).truth(0)
  assert [part.tolist() for part in truth] == [[1, 2], [], [3]]


def test_lengths_other_than_1_are_told(root, caplog):
  np.save(root / "roxford5k.npy", 2 * DATABASE)
  with caplog.at_level(logging.WARNING):
    source = open_it(root)
  assert "roxford5k.npy: descriptors have lengths 2..2" in caplog.text
  np.testing.assert_allclose(source.database, DATABASE, rtol=1e-6)


class _Made:
  def __reduce__(self):
    return os.system, ("touch made",)


def test_a_malicious_ground_truth_is_refused(root, monkeypatch):
  monkeypatch.chdir(root)
  for changes in ({"imlist": _Made()}, {"more": _Made()}):
    ground(root, **changes)
    with pytest.raises(InputError, match=r"gnd_roxford5k.pkl needs .*system"):
      open_it(root)
  assert not (root / "made").exists()


@pytest.mark.parametrize(
  ("changes", "text"),
  [
    ({"gnd": None}, "has no 'gnd'"),
    ({"imlist": [*IMAGES, "i5"]}, r"has 5 descriptors, but .*: imlist lists 6"),
    ({"imlist": []}, "imlist is empty"),
    ({"imlist": [1] * 5}, "imlist is a list with a int in it"),
    ({"qimlist": ["q"]}, "gnd has 2 entries, but qimlist 1"),
    ({"gnd": {}}, "gnd is a dict"),
    ({"gnd": [], "qimlist": []}, "qimlist is empty"),
    ({"gnd": [GROUND[0], 3]}, r"gnd\[1\] is a int"),
    ({"gnd": [GROUND[0], {"easy": []}]}, r"gnd\[1\] has 'easy'"),
    (
      {"gnd": [GROUND[0], {**GROUND[1], "hard": [5]}]},
      r"gnd\[1\]: hard has the numbers 5..5; .* 0..4",
    ),
    ({"gnd": [{**GROUND[0], "easy": [-1]}] * 2}, r"gnd\[0\]: easy"),
    ({"gnd": [{**GROUND[0], "junk": "ab"}] * 2}, r"gnd\[0\]: junk is a str"),
    ({"gnd": [{"ok": [], "junk": [1]}] * 2}, "no query has an easy or hard"),
  ],
)
def test_ground_truths_that_do_not_fit_are_refused(changes, text, root):
  ground(root, **changes)
  with pytest.raises(InputError, match=text):
    open_it(root)


def test_descriptors_that_do_not_fit_are_refused(root):
  np.save(root / "roxford5k_queries.npy", unit(2, 5))
  with pytest.raises(InputError, match=r"queries.npy has .* 5 numbers"):
    open_it(root)
  np.save(root / "roxford5k_queries.npy", unit(3, 6))
  with pytest.raises(InputError, match=r"has 3 descriptors, .*qimlist lists 2"):
    open_it(root)
  np.save(root / "r1m.npy", unit(4, 5))
  np.save(root / "roxford5k_queries.npy", ASKED)
  with pytest.raises(InputError, match=r"r1m.npy has .* 5 numbers, .* of 6"):
    open_it(root, distractors="r1m.npy")
  with pytest.raises(InputError, match=r"none.npy is not there"):
    open_it(root, distractors="none.npy")
  with pytest.raises(InputError, match="neighbours must be at least 1"):
    open_it(root, neighbours=0)


def test_missing_files_are_listed(root):
  (root / "roxford5k_queries.npy").unlink()
  with pytest.raises(InputError, match=r"looked for roxford5k_queries.npy, .*"):
    open_it(root)
  (root / "roxford5k.npy").unlink()
  with pytest.raises(InputError, match=r"no descriptors: .*roxford5k.npy, .*"):
    open_it(root)
  with pytest.raises(InputError, match=r"looked for gnd_rparis6k.pkl"):
    open_it(root, split="rparis6k")
  with pytest.raises(InputError, match="needs a folder"):
    revisited.open_source(split="roxford5k")


def test_lists_that_are_held_many_times_are_read_once(root):
  # 4000 entries of one list of 4000: 16 million numbers in a small file.
  rows = [0] * 4000
  entry = {"easy": rows, "hard": rows, "junk": rows}
  many = {"gnd": [dict(entry) for _ in range(4000)], "qimlist": ["q"] * 4000}
  ground(root, **many)
  np.save(root / "roxford5k_queries.npy", unit(4000, 6))
  source = open_it(root)
  assert source.truth(0).easy is source.truth(3999).junk


def test_generated_landmarks_are_read_back(tmp_path):
  landmarks.write(tmp_path, seed=3, dimensions=16, scale=0.02, extra=30)
  drawn = np.load(tmp_path / "test.npy")
  source = open_it(tmp_path, split="test", distractors="distractors.npy")
  np.testing.assert_array_equal(source.database[: len(drawn)], drawn)
  assert len(source.database) == len(drawn) + 30
  written = pickle.loads((tmp_path / "gnd_test.pkl").read_bytes())
  assert source.names == tuple(written["qimlist"])
  for i, entry in enumerate(written["gnd"]):
    for key in ("easy", "hard", "junk"):
      assert getattr(source.truth(i), key).tolist() == entry[key]
