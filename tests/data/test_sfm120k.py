import os
import pickle

import numpy as np
import pytest

from jaxshape.data import landmarks, sources
from jaxshape.errors import InputError

TRAIN = {
  "cids": ["t0", "t1", "t2", "t3", "t4", "t5"],
  "cluster": [7, 7, 7, 9, 9, 11],
  # Twice the same pair; 5 alone in its model; 3 with itself.
  "qidxs": [2, 0, 2, 2, 3, 3],
  "pidxs": [0, 1, 0, 1, 4, 3],
  "bbxs": [None] * 6,
}
VAL = {
  "cids": ["v0", "v1", "v2"], "cluster": [1, 1, 2], "qidxs": [1], "pidxs": [0],
}  # fmt: skip


def unit(*shape, seed=0):
  rows = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
  return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


ROWS, VAL_ROWS = unit(6, 5), unit(3, 5, seed=1)


def pairs(root, name="retrieval-SfM-120k", protocol=2, **changes):
  train = {k: v for k, v in {**TRAIN, **changes}.items() if v is not None}
  data = pickle.dumps({"train": train, "val": VAL}, protocol)
  (root / f"{name}.pkl").write_bytes(data)


@pytest.fixture
def root(tmp_path):
  pairs(tmp_path)
  np.save(tmp_path / "train.npy", ROWS)
  np.save(tmp_path / "val.npy", VAL_ROWS)
  return tmp_path


def open_it(root, split="train", **options):
  return sources.load(f"sfm120k:{root}", split=split, neighbours=2, **options)


def drawn(source, i, count=60):
  """Which rows are drawn as positives."""
  rng = np.random.default_rng(0)
  seen = [source.sample(i, rng)["positive"] for _ in range(count)]
  same = np.array(seen)[:, None] == source.database[:]
  return sorted(set(np.nonzero(same.all(axis=2))[1].tolist()))


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_the_queries_are_the_different_ones(protocol, root):
  pairs(root, protocol=protocol)
  source = open_it(root)
  assert source.query_rows.tolist() == [0, 2, 3]
  assert source.names == ("t0", "t2", "t3")
  assert source.clusters.tolist() == [0, 0, 0, 1, 1, 2]
  np.testing.assert_array_equal(source.database, ROWS)
  # Relevant is the model, without oneself.
  truth = [[part.tolist() for part in source.truth(i)] for i in range(3)]
  assert truth == [[[1, 2], [], [0]], [[0, 1], [], [2]], [[4], [], [3]]]


def test_positives_are_pairs_or_the_model(root):
  assert [drawn(open_it(root), i) for i in range(3)] == [[1], [0, 1], [4]]
  source = open_it(root, positives="cluster")
  assert [drawn(source, i) for i in range(3)] == [[1, 2], [0, 1], [4]]
  with pytest.raises(InputError, match="positives must be one of pairs, clu"):
    open_it(root, positives="all")


def test_no_query_is_its_own_neighbour(root):
  example = open_it(root)[1]
  order = [i for i in np.argsort(-ROWS @ ROWS[2]) if i != 2][:2]
  np.testing.assert_allclose(example["neighbours"], ROWS[order])
  assert example["relevant"].tolist() == [i in (0, 1) for i in order]
  assert example["cluster"] == 0


@pytest.mark.parametrize("split", ["val", "valid"])
@pytest.mark.parametrize("file", ["val", "valid"])
def test_the_validation_split_has_two_names(split, file, root):
  (root / "val.npy").rename(root / f"{file}.npy")
  source = open_it(root, split)
  np.testing.assert_array_equal(source.database, VAL_ROWS)
  assert source.query_rows.tolist() == [1]


def test_one_file_holds_both_splits(root):
  for name in ("train.npy", "val.npy"):
    (root / name).unlink()
  both = np.concatenate([ROWS, VAL_ROWS])
  np.save(root / "retrieval-SfM-120k.npy", both)
  np.testing.assert_array_equal(open_it(root).database, ROWS)
  np.testing.assert_array_equal(open_it(root, "val").database, VAL_ROWS)


def test_one_file_of_all_images_is_read_by_names(root):
  for name in ("train.npy", "val.npy"):
    (root / name).unlink()
  np.save(root / "descriptors.npy", np.concatenate([VAL_ROWS, ROWS])[::-1])
  names = [f"ims/a/{cid}" for cid in [*VAL["cids"], *TRAIN["cids"]]]
  (root / "descriptors.txt").write_text("\n".join(names[::-1]))
  np.testing.assert_array_equal(open_it(root).database, ROWS)
  np.testing.assert_array_equal(open_it(root, "val").database, VAL_ROWS)


def test_a_table_alone_without_models_counts_its_pairs(root):
  table = {k: v for k, v in TRAIN.items() if k != "cluster"}
  data = pickle.dumps(table, 2)
  (root / "retrieval-SfM-120k-whiten.pkl").write_bytes(data)
  np.save(root / "whiten.npy", ROWS)
  source = open_it(root, "whiten", pairs="retrieval-SfM-120k-whiten.pkl")
  assert source.clusters is None
  assert [part.tolist() for part in source.truth(1)] == [[0, 1], [], [2]]
  assert drawn(source, 1) == [0, 1]


def test_other_pickles_are_found_if_there_is_one(root):
  (root / "retrieval-SfM-120k.pkl").rename(root / "mine.pkl")
  assert len(open_it(root)) == 3
  pairs(root, name="other")
  with pytest.raises(InputError, match="several pickles, mine.pkl, other.pkl"):
    open_it(root)
  assert len(open_it(root, pairs="mine.pkl")) == 3


class _Made:
  def __reduce__(self):
    return os.system, ("touch made",)


def test_a_malicious_pickle_is_refused(root, monkeypatch):
  monkeypatch.chdir(root)
  pairs(root, bbxs=_Made())
  with pytest.raises(InputError, match=r"120k.pkl needs .*system"):
    open_it(root)
  assert not (root / "made").exists()


@pytest.mark.parametrize(
  ("changes", "text"),
  [
    ({"qidxs": None}, "train lacks qidxs"),
    ({"cids": TRAIN["cids"][:5]}, "cluster has 6 entries, but cids 5"),
    ({"cids": [], "cluster": []}, "cids is empty"),
    ({"cids": {}}, "cids is a dict"),
    ({"cluster": ["a"] * 6}, "cluster is a list with a str"),
    ({"pidxs": [1]}, "qidxs has 6 entries and pidxs 1"),
    ({"qidxs": [], "pidxs": []}, "qidxs has 0 entries and pidxs 0"),
    ({"pidxs": [6] * 6}, r"pidxs has the numbers 6..6; .* 0..5"),
    ({"qidxs": [-1] * 6}, r"qidxs has the numbers -1..-1"),
    ({"qidxs": [0.5] * 6}, "qidxs is float64 values"),
    ({"qidxs": [1], "pidxs": [1]}, "no pair of two images"),
  ],
)
def test_pairs_that_do_not_fit_are_refused(changes, text, root):
  pairs(root, **changes)
  with pytest.raises(InputError, match=text):
    open_it(root)


def test_files_that_do_not_fit_are_refused(root):
  with pytest.raises(InputError, match=r"no split 'test'; it has train, val"):
    open_it(root, "test")
  np.save(root / "train.npy", unit(5, 4))
  with pytest.raises(InputError, match=r"has 5 descriptors, .*train lists 6"):
    open_it(root)
  (root / "train.npy").unlink()
  with pytest.raises(InputError, match=r"no descriptors: looked for train.npy"):
    open_it(root)
  (root / "retrieval-SfM-120k.pkl").unlink()
  with pytest.raises(InputError, match=r"pickle of pairs: looked for retriev"):
    open_it(root)


def test_generated_landmarks_are_read_back(tmp_path):
  landmarks.write(tmp_path, seed=3, dimensions=16, scale=0.02)
  written = pickle.loads((tmp_path / "retrieval-SfM-120k.pkl").read_bytes())
  for split in ("train", "val"):
    source = open_it(tmp_path, split)
    table = written[split]
    np.testing.assert_array_equal(
      source.database, np.load(tmp_path / f"{split}.npy")
    )
    assert source.query_rows.tolist() == sorted(set(table["qidxs"]))
    _, want = np.unique(table["cluster"], return_inverse=True)
    np.testing.assert_array_equal(source.clusters, want)
