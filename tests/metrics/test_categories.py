import jax
from jaxtyping import TypeCheckError
import numpy as np
import pytest

from jaxshape.errors import InputError
from jaxshape.metrics import categories, shape_bias


def _probabilities(n=20, seed=0):
  logits = 3 * np.random.default_rng(seed).normal(size=(n, 1000))
  p = np.exp(logits)
  return (p / p.sum(axis=1, keepdims=True)).astype(np.float32)


def test_the_table_is_that_of_the_public_protocol():
  assert list(categories.CATEGORIES) == sorted(categories.CATEGORIES)
  table = categories.IMAGENET_TO_16
  sizes = [np.sum(table == c) for c in range(16)]
  assert sizes == [1, 4, 2, 49, 5, 7, 3, 6, 4, 3, 109, 2, 2, 1, 1, 8]
  assert np.sum(table == -1) == 1000 - 207
  # Airliner, polar bear, mountain bike, bulbul, speedboat, wine bottle, sports
  # car, Egyptian cat, rocking chair, wall clock, beagle, African elephant,
  # typewriter keyboard, cleaver, rotisserie, pickup.
  known = [404, 296, 671, 16, 814, 907, 817, 285, 765, 892, 162, 386, 878,
           499, 766, 717]  # fmt: skip
  np.testing.assert_array_equal(table[known], np.arange(16))
  # Cock and ostrich, timber wolf, lynx, tench and toilet tissue.
  np.testing.assert_array_equal(table[[7, 9, 269, 287, 0, 999]], -1)
  with pytest.raises(ValueError, match="read-only"):
    table[0] = 3


@pytest.mark.parametrize("aggregate", ["mean", "sum", "max"])
def test_transcribed(aggregate):
  p = _probabilities()
  want = np.empty((20, 16))
  for i, c in np.ndindex(20, 16):
    of = [p[i, k] for k in range(1000) if categories.IMAGENET_TO_16[k] == c]
    want[i, c] = getattr(np, aggregate)(np.array(of, np.float64))
  got = categories.scores(p, aggregate=aggregate)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  order = np.argsort(want, axis=1)[:, ::-1]
  for ties in ("last", "first"):
    options = {"aggregate": aggregate, "ties": ties}
    got = categories.ranking(p, **options)
    np.testing.assert_array_equal(got, order)
    got = categories.decide(p, **options)
    np.testing.assert_array_equal(got, order[:, 0])


def test_mean_favours_no_category_for_its_size():
  p = np.full(1000, 2.0**-10, np.float32)
  got = categories.scores(p)
  np.testing.assert_array_equal(got, np.full(16, 2.0**-10, np.float32))
  dog = categories.CATEGORIES.index("dog")
  assert categories.decide(p, aggregate="sum") == dog
  p[499] *= 1.5
  knife = categories.CATEGORIES.index("knife")
  for aggregate in ("mean", "max"):
    assert categories.decide(p, aggregate=aggregate) == knife


def test_ties_go_to_either_end_of_the_alphabet():
  p = np.zeros((2, 1000), np.float32)
  p[1, [294, 499]] = [1, 0.25]  # Bear of 4 classes, knife of one.
  np.testing.assert_array_equal(categories.decide(p), [15, 13])
  np.testing.assert_array_equal(categories.decide(p, ties="first"), [0, 1])
  got = categories.ranking(p[0], ties="first")
  np.testing.assert_array_equal(got, np.arange(16))
  np.testing.assert_array_equal(categories.ranking(p[0]), np.arange(16)[::-1])


def test_decisions_count_in_the_shape_bias():
  p = np.zeros((4, 1000), np.float32)
  p[[0, 1, 2], [281, 385, 0]] = 1
  p[3] = np.nan
  cat, elephant = map(categories.CATEGORIES.index, ("cat", "elephant"))
  decisions = categories.decide(p)
  np.testing.assert_array_equal(decisions, [cat, elephant, 15, -1])
  counts = shape_bias.count_decisions(
    decisions, np.full(4, cat), np.full(4, elephant), num_classes=16
  )
  np.testing.assert_array_equal(counts[cat], [1, 1, 2])


def test_under_jit_and_vmap_and_in_short_floats():
  p = _probabilities()
  for aggregate in ("mean", "max"):
    f = lambda p, a=aggregate: categories.decide(p, aggregate=a)
    want = f(p)
    np.testing.assert_array_equal(jax.jit(f)(p), want)
    np.testing.assert_array_equal(jax.vmap(f)(p), want)
  got = categories.scores(p.reshape(4, 5, 1000).astype(np.float16))
  assert got.shape == (4, 5, 16)
  assert got.dtype == np.float32


def test_refuses():
  p = _probabilities(2)
  with pytest.raises(ValueError, match="aggregate must be .*, got 'median'"):
    categories.decide(p, aggregate="median")
  with pytest.raises(ValueError, match="ties must be .*, got 'any'"):
    categories.decide(p, ties="any")
  with pytest.raises(InputError, match=r"probabilities must .* got -1\.\.2;"):
    categories.scores(np.linspace(-1, 2, 1000, dtype=np.float32))
  with pytest.raises(InputError, match=r"softmax of logits"):
    categories.decide(5 * p / p.max())
  with pytest.raises(TypeCheckError, match="probabilities"):
    categories.decide(p[:, :10])
