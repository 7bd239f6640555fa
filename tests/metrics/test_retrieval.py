import jax.numpy as jnp
from jaxtyping import TypeCheckError
import numpy as np
import pytest
from sklearn import metrics

from jaxshape.errors import InputError
from jaxshape.metrics import retrieval

N = 40
NONE = np.zeros(0, np.int64)


def _example(seed, queries=9):
  """Scores with ties, and rows of which no two lists share one."""
  rng = np.random.default_rng(seed)
  scores = rng.integers(0, 25, (queries, N)).astype(np.float32)
  truth = []
  for _ in range(queries):
    rows = rng.permutation(N)
    ends = np.cumsum(rng.integers(0, 7, 3))
    truth.append(np.split(rows, ends)[:3])
  return scores, truth


SCORES, TRUTH = _example(0)
RANKINGS = np.argsort(-SCORES, axis=1, kind="stable")


def _divided(entry, protocol):
  easy, hard, junk = (set(map(int, rows)) for rows in entry)
  return {
    "easy": (easy, junk | hard),
    "medium": (easy | hard, junk),
    "hard": (hard, junk | easy),
  }[protocol]


def _protocol(ranking, positives, junk, k):
  """Goes down a list place by place; AP and precision at k."""
  place, hits, area, at = 0, 0, 0.0, []
  for row in ranking:
    if row in junk:
      continue
    if row in positives:
      left = hits / place if place else 1.0
      area += (left + (hits + 1) / (place + 1)) / 2 / len(positives)
      hits += 1
      at.append(place + 1)
    place += 1
  missing = hits < len(positives)
  reach = k if missing else min(k, at[-1])
  return area, sum(p <= reach for p in at) / reach


@pytest.mark.parametrize("protocol", ["easy", "medium", "hard"])
@pytest.mark.parametrize("seed", range(4))
def test_protocol_transcribed(protocol, seed):
  scores, truth = _example(seed)
  rankings = np.argsort(-scores, axis=1, kind="stable")
  ks = (1, 5, 10, N)
  aps, precisions, counts = [], [], []
  for ranking, entry in zip(rankings, truth, strict=True):
    positives, junk = _divided(entry, protocol)
    counts.append(len(positives))
    if not positives:
      aps.append(np.nan)
      precisions.append([np.nan] * len(ks))
      continue
    numbers = [_protocol(ranking, positives, junk, k) for k in ks]
    aps.append(numbers[0][0])
    precisions.append([p for _, p in numbers])
    args = ranking, list(positives), list(junk)
    got = retrieval.revisited_average_precision(*args)
    np.testing.assert_allclose(got, aps[-1], rtol=1e-12)
    got = [retrieval.precision_at(*args, k=k) for k in ks]
    np.testing.assert_allclose(got, precisions[-1], rtol=1e-12)
  assert np.nanmin(precisions) < np.nanmax(precisions)
  np.testing.assert_array_equal(
    retrieval.relevant_counts(truth, protocol=protocol), counts
  )
  options = {"protocol": protocol, "ks": ks}
  for got in (
    retrieval.revisited_map(rankings, truth, size=N, **options),
    retrieval.revisited_map_of_scores(scores, truth, **options),
  ):
    np.testing.assert_allclose(got.aps, aps, rtol=1e-12)
    np.testing.assert_allclose(got.precisions, precisions, rtol=1e-12)
    np.testing.assert_allclose(got.map, np.nanmean(aps), rtol=1e-12)
    want = np.nanmean(precisions, axis=0)
    np.testing.assert_allclose(got.mean_precisions, want, rtol=1e-12)


def test_the_examples_hold_what_matters():
  counts = retrieval.relevant_counts(
    _example(0)[1] + _example(1)[1], protocol="hard"
  )
  assert 0 in counts
  assert max(counts) > 3
  assert any(len(np.unique(row)) < N for row in SCORES)


def test_average_precision_by_hand():
  # Places 0 and 3 of [4, 0, 2, 1, 3]; without row 0, places 0 and 2.
  ranking = [4, 0, 2, 1, 3]
  f = retrieval.revisited_average_precision
  got = f(ranking, [1, 4], [])
  np.testing.assert_allclose(got, ((1 + 1) / 2 + (1 / 3 + 2 / 4) / 2) / 2)
  got = f(ranking, [1, 4], [0])
  np.testing.assert_allclose(got, ((1 + 1) / 2 + (1 / 2 + 2 / 3) / 2) / 2)
  usual = retrieval.average_precision
  np.testing.assert_allclose(usual(ranking, [1, 4]), (1 + 2 / 4) / 2)
  np.testing.assert_allclose(usual(ranking, [1, 4], junk=[0]), (1 + 2 / 3) / 2)
  # The divisor is the last positive's place where that comes before k.
  p = retrieval.precision_at
  assert p(ranking, [4], [], k=5) == 1.0
  assert p(ranking, [1, 4], [], k=3) == 1 / 3
  assert p(ranking, [1, 4], [], k=5) == 2 / 4
  assert p(ranking, [1, 4], [0, 2], k=5) == 1.0


def test_rankings_that_end_early_never_find_the_rest():
  short = [4, 0, 2]
  got = retrieval.revisited_average_precision(short, [1, 4], [])
  assert got == 0.5
  assert retrieval.average_precision(short, [1, 4]) == 0.5
  assert retrieval.precision_at(short, [1, 4], [], k=2) == 1 / 2
  assert retrieval.precision_at(short, [1, 4], [], k=10) == 1 / 10
  assert retrieval.revisited_average_precision(short, [1], []) == 0.0
  assert retrieval.revisited_average_precision([], [1], []) == 0.0
  # Padding at the end is nothing.
  padded = np.array([4, 0, 2, -1, -1])
  got = retrieval.revisited_average_precision(
    padded, np.array([1, 4, -1]), np.array([-1])
  )
  assert got == 0.5


def test_average_precision_as_scikit_learn_has_it():
  rng = np.random.default_rng(3)
  for _ in range(5):
    scores = rng.permutation(N).astype(np.float32)
    positives = rng.choice(N, 8, replace=False)
    want = metrics.average_precision_score(
      np.isin(np.arange(N), positives), scores
    )
    got = retrieval.average_precision(np.argsort(-scores), positives)
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_trapezoids_are_never_above_the_usual_and_perfect_is_1():
  for ranking, entry in zip(RANKINGS, TRUTH, strict=True):
    easy, _, junk = entry
    if not len(easy):
      continue
    low = retrieval.revisited_average_precision(ranking, easy, junk)
    high = retrieval.average_precision(ranking, easy, junk=junk)
    assert 0 < low <= high <= 1
    first = [*junk, *easy, *np.setdiff1d(ranking, [*easy, *junk])]
    got = retrieval.revisited_average_precision(first, easy, junk)
    np.testing.assert_allclose(got, 1, rtol=1e-12)
    assert retrieval.precision_at(first, easy, junk, k=10) == 1


def test_nothing_to_be_found_is_nan():
  for rows in ([], NONE, np.zeros(0), np.array([-1])):
    assert np.isnan(retrieval.revisited_average_precision([0, 1], rows, [0]))
    assert np.isnan(retrieval.average_precision([0, 1], rows))
    assert np.isnan(retrieval.precision_at([0, 1], rows, [0], k=1))
  assert np.isnan(retrieval.average_precision_of_ranks([], [1]))
  assert np.isnan(retrieval.precision_of_ranks([], [1], k=1))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "int32"])
def test_ranks_without_sorting_are_those_of_a_stable_sort(dtype):
  rng = np.random.default_rng(5)
  for row in SCORES:
    rows = rng.choice(N, rng.integers(0, N + 1), replace=False)
    order = np.argsort(-row, kind="stable")
    want = np.argsort(order)[rows]
    values = row.astype(jnp.dtype(dtype))
    got = retrieval.ranks_of(values, rows)
    np.testing.assert_array_equal(got, want)
  levels = np.array([-np.inf, 1, -np.inf, np.inf, -0.0, 0.0])
  got = retrieval.ranks_of(levels, [0, 1, 2, 3, 4, 5, 4])
  np.testing.assert_array_equal(got, [4, 1, 5, 0, 2, 3, 2])


def test_ranks_and_rankings_give_the_same():
  for scores, ranking, entry in zip(SCORES, RANKINGS, TRUTH, strict=True):
    easy, _, junk = entry
    ranks = [retrieval.ranks_of(scores, rows) for rows in (easy, junk)]
    np.testing.assert_array_equal(
      retrieval.average_precision_of_ranks(*ranks),
      retrieval.revisited_average_precision(ranking, easy, junk),
    )
    np.testing.assert_array_equal(
      retrieval.average_precision_of_ranks(*ranks, trapezoidal=False),
      retrieval.average_precision(ranking, easy, junk=junk),
    )
    np.testing.assert_array_equal(
      retrieval.precision_of_ranks(*ranks, k=5),
      retrieval.precision_at(ranking, easy, junk, k=5),
    )
  got = retrieval.average_precision_of_ranks([0, -1], [])
  assert got == 0.5


def test_mean_average_precision_leaves_out_what_has_no_positives():
  positives = [easy for easy, _, _ in TRUTH]
  junk = [rows for _, _, rows in TRUTH]
  positives[2] = NONE
  each = [
    retrieval.average_precision(*args)
    for args in zip(RANKINGS, positives, strict=True)
  ]
  got = retrieval.mean_average_precision(RANKINGS, positives)
  np.testing.assert_allclose(got, np.nanmean(each), rtol=1e-12)
  without = retrieval.mean_average_precision(RANKINGS, positives, junk=junk)
  assert without > got


def test_truth_by_name_and_from_jax():
  want = retrieval.revisited_map(RANKINGS, TRUTH)
  named = [
    {"junk": junk.tolist(), "easy": easy.tolist(), "hard": hard, "bbx": 0}
    for easy, hard, junk in TRUTH
  ]
  got = retrieval.revisited_map(jnp.asarray(RANKINGS, jnp.int32), named)
  np.testing.assert_array_equal(got.aps, want.aps)
  got = retrieval.revisited_map(RANKINGS.astype(np.uint16), TRUTH)
  assert got.map == want.map


def test_grouped_gain_by_hand():
  before = np.array([0.2, 0.4, 0.5, 0.5, 0.8, 0.8, np.nan])
  after = np.array([0.4, 0.5, 0.5, 0.4, 0.4, 0.4, np.nan])
  by = np.array([1, 2, 3, 4, 5, 6, np.nan])
  got = retrieval.grouped_gain(before, after, by)
  np.testing.assert_allclose(got.edges, [2.65, 4.3])
  np.testing.assert_array_equal(got.queries, [2, 2, 2])
  np.testing.assert_allclose(got.before, [0.3, 0.5, 0.8])
  np.testing.assert_allclose(got.after, [0.45, 0.45, 0.4])
  np.testing.assert_allclose(got.gain, [0.5, -0.1, -0.5])
  np.testing.assert_allclose(got.mean, [1.5, 3.5, 5.5])
  # The order of the queries does not matter.
  order = [3, 6, 0, 5, 1, 4, 2]
  again = retrieval.grouped_gain(before[order], after[order], by[order])
  np.testing.assert_allclose(again.gain, got.gain)


def test_grouped_gain_of_ties_and_of_nothing_found():
  zeros = np.zeros(4)
  got = retrieval.grouped_gain(zeros, zeros, zeros + 7, percentiles=(50,))
  np.testing.assert_array_equal(got.queries, [4, 0])
  assert np.isnan(got.gain).all()
  assert np.isnan(got.mean[1])
  got = retrieval.grouped_gain(zeros, zeros + 0.5, zeros, percentiles=(50,))
  assert got.gain[0] == np.inf


@pytest.mark.parametrize(
  ("args", "words"),
  [
    (([0, 1, 0], [1], []), "the ranking holds row 0 more than once"),
    (([0, -1, 1], [1], []), "ranking must be at least 0, got -1"),
    (([0, 1, -2], [1], []), "ranking must be at least 0, got -2"),
    (([0, 1], [1, 1], []), "the positives hold row 1 more than once"),
    (([99, 1, 99], [1], []), "the ranking holds row 99 more than once"),
    (([0, 1], [-3, 1], []), "positives must be at least 0, got -3"),
    (([0, 1], [0, 1], [1, 2]), "positive and junk at once, got 1"),
    (([0, 1], np.array([0.5]), []), "positives must be whole numbers, got fl"),
    (([0, 1], np.array([[0]]), []), r"positives must be a list .* \(1, 1\)"),
    (([0, 1], [0], np.array([True])), "junk must be whole numbers, got bool"),
  ],
)
def test_one_query_refuses(args, words):
  with pytest.raises(InputError, match=words):
    retrieval.revisited_average_precision(*args)
  with pytest.raises(InputError, match=words):
    retrieval.precision_at(*args, k=3)
  with pytest.raises(InputError, match=words):
    retrieval.average_precision(*args[:2], junk=args[2])


def test_rows_are_checked_against_the_size():
  for args in (([0, 3], [1], []), ([0, 1], [3], []), ([0, 1], [1], [3])):
    retrieval.revisited_average_precision(*args)
    for f in (
      retrieval.revisited_average_precision,
      lambda *args, size: retrieval.precision_at(*args, k=1, size=size),
    ):
      with pytest.raises(InputError, match=r"must be in 0\.\.2, got 3"):
        f(*args, size=3)


def test_ranks_refuse():
  scores = np.array([0.0, np.nan, 1.0])
  with pytest.raises(
    InputError, match="not be NaN, got 1, the first for row 1"
  ):
    retrieval.ranks_of(scores, [0])
  with pytest.raises(InputError, match=r"rows must be in 0\.\.3, got 4, -1"):
    retrieval.ranks_of(np.zeros(4), [0, 4, -1])
  with pytest.raises(InputError, match="ranks must be -1 or more, got -2"):
    retrieval.average_precision_of_ranks([0, -2], [])
  with pytest.raises(InputError, match="ranks hold 4 more than once"):
    retrieval.average_precision_of_ranks([4], [4])


def test_means_refuse():
  f = retrieval.revisited_map
  empty = [(NONE, NONE, [1])] * len(TRUTH)
  with pytest.raises(
    InputError, match="none of the 9 queries has a positive u"
  ):
    f(RANKINGS, empty)
  with pytest.raises(InputError, match="'medium'.* no easy and no hard rows"):
    retrieval.revisited_map_of_scores(SCORES, empty)
  with pytest.raises(
    InputError, match="none of the 9 queries has a positive, "
  ):
    retrieval.mean_average_precision(RANKINGS, [NONE] * 9)
  with pytest.raises(InputError, match=r"of 40 queries \(one ranking is a row"):
    f(RANKINGS.T, TRUTH)
  with pytest.raises(InputError, match="each of 9 queries, got 8"):
    f(RANKINGS, TRUTH[:8])
  with pytest.raises(InputError, match="positives must be of one .*, got 8"):
    retrieval.mean_average_precision(RANKINGS, [NONE] * 8)
  changed = RANKINGS.copy()
  changed[3, 1] = changed[3, 0]
  with pytest.raises(InputError, match="query 3: the ranking holds row"):
    f(changed, TRUTH)
  positives = [easy for easy, _, _ in TRUTH]
  with pytest.raises(InputError, match="query 3: the ranking holds row"):
    retrieval.mean_average_precision(changed, positives)
  scores = SCORES.copy()
  scores[4, 2] = np.nan
  with pytest.raises(InputError, match="query 4: scores must not be NaN"):
    retrieval.revisited_map_of_scores(scores, TRUTH)
  with pytest.raises(
    InputError, match="query 0: no row may be positive and ju"
  ):
    retrieval.revisited_map_of_scores(SCORES[:1], [([1], [2], [1])])
  with pytest.raises(
    InputError, match=r"query 0: positives must be in 0\.\.39"
  ):
    retrieval.revisited_map_of_scores(SCORES[:1], [([40], [], [])])


def test_truth_refuses():
  f = retrieval.revisited_map
  with pytest.raises(InputError, match="query 0: .* junk rows, got 2 lists"):
    f(RANKINGS[:1], [([1], [2])])
  with pytest.raises(InputError, match="query 0: .* got no hard and no junk"):
    f(RANKINGS[:1], [{"easy": [1]}])
  with pytest.raises(
    InputError, match="query 0: the positives hold row 1 more"
  ):
    f(RANKINGS[:1], [([1], [1], [])])
  with pytest.raises(InputError, match="query 0: hard must be whole numbers"):
    f(RANKINGS[:1], [([1], np.array(["a"]), [])])


def test_options_are_checked():
  with pytest.raises(
    ValueError, match="protocol must be one of easy, medium, h"
  ):
    retrieval.revisited_map(RANKINGS, TRUTH, protocol="M")
  with pytest.raises(ValueError, match="protocol must be one of"):
    retrieval.relevant_counts(TRUTH, protocol="M")
  with pytest.raises(ValueError, match="k must be 1 or more, got 0"):
    retrieval.revisited_map(RANKINGS, TRUTH, ks=(1, 0))
  with pytest.raises(ValueError, match="k must be 1 or more, got 0"):
    retrieval.precision_at([0], [0], [], k=0)
  with pytest.raises(TypeCheckError, match="rankings"):
    retrieval.revisited_map(SCORES, TRUTH)
  with pytest.raises(TypeCheckError, match="scores"):
    retrieval.ranks_of(SCORES, [0])


def test_groups_refuse():
  aps = np.array([0.1, 0.2, np.nan])
  f = retrieval.grouped_gain
  with pytest.raises(InputError, match="NaN for the same queries, got 1 and 0"):
    f(aps, np.zeros(3), np.zeros(3))
  with pytest.raises(InputError, match="no query has an average precision"):
    f(np.full(3, np.nan), np.full(3, np.nan), np.zeros(3))
  with pytest.raises(InputError, match="by must be finite, got 1 values"):
    f(aps, aps, np.array([0, np.inf, 0]))
  for percentiles in ((), (66, 33), (0, 50), (50, 100), (np.nan,)):
    with pytest.raises(
      ValueError, match="percentiles must rise and be between"
    ):
      f(aps, aps, np.zeros(3), percentiles=percentiles)
