import functools

import jax
import numpy as np
import pytest

from jaxshape.retrieval import sampling


def _unit(draw, *shape):
  x = draw.standard_normal(shape).astype(np.float32)
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_hardest_negatives_by_hand():
  queries = np.float32([[1, 0], [0, 1]])
  angles = np.float32([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
  rows = np.stack([np.cos(angles), np.sin(angles)], axis=1)
  cluster = np.int32([0, 1, 1, 2, -1, sampling.EMPTY])
  got, there = sampling.hardest(
    queries, np.int32([0, 2]), rows, cluster, count=4
  )
  # Query 0 is of cluster 0; of cluster 1 only the nearer row is taken.
  np.testing.assert_array_equal(there[0], [True, True, True, False])
  np.testing.assert_allclose(got[0, :3], rows[[1, 3, 4]])
  # Query 1 is of cluster 2 and sees from the other side.
  np.testing.assert_allclose(got[1, :3], rows[[4, 2, 0]])


def test_rows_that_are_alone_do_not_hide_each_other():
  draw = np.random.default_rng(0)
  pool, query = _unit(draw, 20, 4), _unit(draw, 3, 4)
  hardest = jax.jit(functools.partial(sampling.hardest, count=6))
  alone = np.full(20, sampling.ALONE)
  got, there = hardest(query, np.zeros(3, int), pool, alone)
  assert bool(there.all())
  for row, near in zip(query, got, strict=True):
    want = -np.sort(-(pool @ row))[:6]
    np.testing.assert_allclose(near @ row, want, rtol=1e-5)


def test_an_empty_pool_has_no_negatives():
  _, there = sampling.hardest(
    np.ones((2, 2)),
    np.int32([0, 1]),
    np.zeros((4, 2)),
    np.full(4, sampling.EMPTY),
    count=2,
  )
  assert not there.any()


def test_thinning_keeps_a_prefix_and_drops_some():
  mask = np.ones((4000, 64), bool)
  mask[:, 60:] = False
  none = sampling.thin(jax.random.key(0), mask, neighbours=(32, 64), drop=0.0)
  counts = np.asarray(none.sum(axis=1))
  assert counts.min() == 32
  assert counts.max() == 60  # Where there are no more.
  np.testing.assert_array_equal(none, np.arange(64) < counts[:, None])
  some = sampling.thin(jax.random.key(1), mask, neighbours=(60, 60), drop=0.6)
  share = 1 - np.asarray(some[:, :60]).mean(axis=1)
  # Uniform in 0..0.6, so that the mean is 0.3 and the deviation 0.173 or more.
  assert abs(share.mean() - 0.3) < 0.01
  assert abs(share.std() - np.hypot(0.6 / 12**0.5, 0.054)) < 0.01


@pytest.mark.parametrize(
  ("neighbours", "drop"), [((0, 4), 0.1), ((5, 4), 0.1), ((2, 4), 1.0)]
)
def test_thinning_refuses(neighbours, drop):
  with pytest.raises(ValueError, match="fewest <= most"):
    sampling.thin(
      jax.random.key(0),
      np.ones((1, 4), bool),
      neighbours=neighbours,
      drop=drop,
    )
