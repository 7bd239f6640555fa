import pickle

import numpy as np
import pytest

from jaxshape.data import retrieval_examples, stream
from jaxshape.errors import InputError


def _unit(draw, *shape):
  x = draw.standard_normal(shape).astype(np.float32)
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _clustered(k=4, **options):
  draw = np.random.default_rng(0)
  clusters = np.int32([0, 1, 0, 2, 1, 0, -1, -1])
  return retrieval_examples.Queries(
    database=_unit(draw, 8, 4),
    query_rows=np.array([0, 1, 2]),
    clusters=clusters,
    k=k,
    **options,
  )


def test_neighbours_are_the_most_similar_rows_but_the_query_itself():
  source = _clustered()
  assert len(source) == 3
  for i, row in enumerate([0, 1, 2]):
    scores = source.database @ source.database[row]
    scores[row] = -np.inf
    order = np.argsort(-scores)[:4]
    example = source[i]
    np.testing.assert_array_equal(example["query"], source.database[row])
    np.testing.assert_array_equal(example["neighbours"], source.database[order])
    np.testing.assert_allclose(
      example["similarities"], scores[order], rtol=1e-5
    )
    same = source.clusters[order] == source.clusters[row]
    np.testing.assert_array_equal(example["relevant"], same)
    assert example["valid"].all()
    assert example["cluster"] == source.clusters[row]


def test_truth_of_clusters_leaves_the_query_out():
  truth = _clustered().truth(0)
  np.testing.assert_array_equal(truth.easy, [2, 5])
  np.testing.assert_array_equal(truth.hard, [])
  np.testing.assert_array_equal(truth.junk, [0])
  np.testing.assert_array_equal(truth.relevant, [2, 5])


def test_too_few_rows_are_padded():
  example = _clustered(k=12)[0]
  assert example["neighbours"].shape == (12, 4)
  np.testing.assert_array_equal(example["valid"], np.arange(12) < 7)
  assert not example["neighbours"][7:].any()
  assert not example["relevant"][7:].any()
  assert not example["similarities"][7:].any()


def test_positives_are_drawn_from_the_relevant_rows():
  source = _clustered()
  found = {
    tuple(source.sample(0, np.random.default_rng(i))["positive"])
    for i in range(20)
  }
  assert found == {tuple(source.database[i]) for i in (2, 5)}
  pairs = _clustered(positives=[np.array([5])] * 3)
  got = pairs.sample(1, np.random.default_rng(0))["positive"]
  np.testing.assert_array_equal(got, pairs.database[5])


def test_held_out_queries_with_a_truth():
  draw = np.random.default_rng(1)
  truth = [
    retrieval_examples.Truth(*map(np.array, ([0], [3], [1]))),
    retrieval_examples.Truth(*map(np.array, ([2, 4], [], []))),
  ]
  source = retrieval_examples.Queries(
    database=_unit(draw, 6, 4), queries=_unit(draw, 2, 4), truth=truth, k=6
  )
  rows = source.found().indices
  np.testing.assert_array_equal(source[0]["relevant"], np.isin(rows[0], [0, 3]))
  assert source[0]["cluster"] == -1
  other = source.with_database(source.database[::-1].copy())
  np.testing.assert_array_equal(other.found().indices, 5 - rows)
  assert other.truth(0) is truth[0]


def test_every_row_as_a_query_and_another_database():
  source = _clustered()
  rows = source.rows(3)
  assert len(rows) == 8
  assert rows[6]["neighbours"].shape == (3, 4)
  other = source.with_database(-source.database)
  np.testing.assert_array_equal(other[1]["query"], source[1]["query"])
  assert other.truth(1).easy == [4]
  # Its own row stays out, though it is another vector now.
  assert not (other.found().indices == [[0], [1], [2]]).any()


def test_batches_and_copies_hold_the_same():
  source = _clustered()
  batch = next(stream.evaluate(source, batch_size=2))
  assert batch["neighbours"].shape == (2, 4, 4)
  copy = pickle.loads(pickle.dumps(source))
  for name, value in source[2].items():
    np.testing.assert_array_equal(copy[2][name], value)
  assert copy.fingerprint == source.fingerprint
  changed = _clustered()
  changed.database[0] *= -1
  assert changed.fingerprint != source.fingerprint


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"k": 0}, "neighbours must be at least 1, got 0"),
    ({"query_rows": None}, "either queries or query_rows"),
    ({"query_rows": [9]}, r"query_rows must be in 0..7, got 9..9"),
    ({"queries": np.ones((3, 5), np.float32)}, r"\[Q, 4\].* got \[3, 5\]"),
    ({"clusters": np.zeros(7)}, "clusters must be of length 8, got 7"),
    ({"truth": []}, "truth must be of length 3, got 0"),
  ],
)
def test_parts_that_do_not_fit_are_refused(changes, message):
  given = {
    "database": np.eye(8, 4, dtype=np.float32),
    "query_rows": np.array([0, 1, 2]),
    **changes,
  }
  with pytest.raises(InputError, match=message):
    retrieval_examples.Queries(**given)


def test_a_query_without_relevant_rows_cannot_be_learned_from():
  source = _clustered(names=("a", "b", "c"))
  source.query_clusters = np.int32([0, 2, 3])
  with pytest.raises(InputError, match="query c has no relevant row"):
    source.sample(2, np.random.default_rng(0))
  with pytest.raises(IndexError, match=r"0..2, got 3"):
    source[3]
