import functools
import itertools

import jax
from jax import test_util
import jax.numpy as jnp
from jaxtyping import TypeCheckError
import numpy as np
import pytest

from jaxshape.errors import InputError
from jaxshape.retrieval import descriptors

RNG = np.random.default_rng(0)
# As after a rectifier: many zeros.
X = np.maximum(RNG.normal(size=(2, 7, 9, 5)), 0).astype(np.float32)
ROWS = RNG.normal(size=(60, 6)) * [1, 0.9, 0.8, 0.7, 0.6, 0.5] + 0.3
ROWS = (ROWS / np.linalg.norm(ROWS, axis=1, keepdims=True)).astype(np.float32)
QUERIES, POSITIVES = RNG.integers(0, 60, (2, 40))


def _unit(x):
  return x / (np.linalg.norm(x, axis=-1, keepdims=True) + 1e-6)


def _gem(x, p):
  return (np.maximum(np.float64(x), 1e-6) ** p).mean((-3, -2)) ** (1 / p)


# Golden.


@pytest.mark.parametrize("p", [1.0, 2.5, 3, 5.0, [1.0, 2.0, 3.0, 4.0, 9.0]])
def test_gem_is_the_generalized_mean(p):
  p = np.asarray(p)
  got = descriptors.gem(X, p=p)
  np.testing.assert_allclose(got, _gem(X, p), rtol=2e-6)


def test_gem_mac_and_spoc_by_hand():
  x = np.zeros((2, 2, 1), np.float32)
  x[0] = [[3], [4]]
  cube = (91 / 4) ** (1 / 3)  # 3^3 + 4^3 = 91, and two zeros.
  np.testing.assert_allclose(descriptors.gem(x), [cube], rtol=1e-6)
  np.testing.assert_array_equal(descriptors.mac(x), [4])
  np.testing.assert_array_equal(descriptors.spoc(x), [1.75])


# Of 4 x 6, two squares of side 4 overlap by a half, three by three quarters: a
# half is nearer to 0.4.
def test_regions_by_hand():
  square = descriptors.regions(4, 4, levels=2)
  assert square == [
    (0, 0, 4),
    *[(top, left, 2) for top in (0, 2) for left in (0, 2)],
  ]
  assert descriptors.regions(4, 6, levels=1) == [(0, 0, 4), (0, 2, 4)]
  assert descriptors.regions(6, 4, levels=1) == [(0, 0, 4), (2, 0, 4)]
  # 2 and 4 steps of 11 x 47 differ by rounding only: what PyTorch has.
  assert descriptors.regions(11, 47, levels=1)[:2] == [(0, 0, 11), (0, 6, 11)]
  assert descriptors.regions(1, 1, levels=3) == [(0, 0, 1)]


@pytest.mark.parametrize("shape", [(4, 6), (6, 4)])
def test_rmac_transcribed(shape):
  x = X[:, : shape[0], : shape[1]]
  squares = {
    (4, 6): [(0, 0, 4), (0, 2, 4)]
    + [(t, l, 2) for t in (0, 2) for l in (0, 2, 4)],
    (6, 4): [(0, 0, 4), (2, 0, 4)]
    + [(t, l, 2) for t in (0, 2, 4) for l in (0, 2)],
  }[shape]
  want = _unit(x.max((1, 2))) + sum(
    _unit(x[:, t : t + s, l : l + s].max((1, 2))) for t, l, s in squares
  )
  np.testing.assert_allclose(
    descriptors.rmac(x, levels=2), want, rtol=1e-5, atol=1e-6
  )


def test_regional_pooling_transcribed():
  x = X[:, :4, :6]
  squares = [(0, 0, 4), (0, 2, 4)]
  parts = [_gem(x, 3)] + [
    _gem(x[:, t : t + s, l : l + s], 3) for t, l, s in squares
  ]
  want = _unit(sum(_unit(part) for part in parts))
  got = descriptors.regional(x, levels=1)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  matrix = RNG.normal(size=(5, 3)).astype(np.float32)
  bias = np.float32([0.1, -0.2, 0.3])
  want = _unit(sum(_unit(_unit(part) @ matrix + bias) for part in parts))
  got = descriptors.regional(x, whiten=lambda v: v @ matrix + bias, levels=1)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


def test_norm_adds_epsilon():
  x = np.float32([[3, 4], [0, 0], [3e-6, 4e-6]])
  want = [[3 / 5, 4 / 5], [0, 0], [0.5, 4 / 6]]
  np.testing.assert_allclose(descriptors.l2_normalize(x), want, rtol=1e-6)
  got = descriptors.l2_normalize(x, epsilon=0.0)
  np.testing.assert_allclose(got, [[0.6, 0.8], [0, 0], [0.6, 0.8]], rtol=1e-6)


@pytest.mark.parametrize("power", [1, 2.92])
def test_scales_are_averaged(power):
  v = np.abs(RNG.normal(size=(3, 4, 5))).astype(np.float32)
  mean = (v**power).mean(0) ** (1 / power)
  want = mean / np.linalg.norm(mean, axis=-1, keepdims=True)
  got = descriptors.aggregate_scales(v, power=power)
  np.testing.assert_allclose(got, want, rtol=1e-5)


def _learned(x, queries, positives):
  """The public formula, on columns and in 64 bits."""
  x = np.float64(x).T
  mean = x[:, queries].mean(1, keepdims=True)
  d = x[:, queries] - x[:, positives]
  inverse = np.linalg.inv(np.linalg.cholesky(d @ d.T / d.shape[1]))
  d = inverse @ (x - mean)
  values, vectors = np.linalg.eig(d @ d.T)
  return mean[:, 0], vectors[:, values.argsort()[::-1]].T @ inverse


def test_learned_whitening_is_the_public_one():
  mean, projection = _learned(ROWS, QUERIES, POSITIVES)
  got = descriptors.learn_whitening(ROWS, QUERIES, POSITIVES)
  np.testing.assert_allclose(got.mean, mean, rtol=1e-5)
  signs = np.sign(np.sum(got.projection * projection, axis=1))
  np.testing.assert_allclose(
    got.projection, signs[:, None] * projection, rtol=1e-4, atol=1e-5
  )
  out = descriptors.whiten(ROWS, got, dimensions=4)
  want = _unit((ROWS - mean) @ projection[:4].T) * signs[:4]
  np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-5)


def test_whitening_in_parts_is_whitening(monkeypatch):
  whole = descriptors.learn_whitening(ROWS, QUERIES, POSITIVES)
  plain = descriptors.pca_whitening(ROWS)
  monkeypatch.setattr(descriptors, "_ROWS", 7)
  parts = descriptors.learn_whitening(jnp.asarray(ROWS), QUERIES, POSITIVES)
  np.testing.assert_allclose(parts.mean, whole.mean, rtol=1e-6)
  for one, two in (
    (parts, whole),
    (descriptors.pca_whitening(ROWS), plain),
  ):
    np.testing.assert_allclose(
      one.projection.T @ one.projection,
      two.projection.T @ two.projection,
      rtol=1e-4,
    )


# Laws.


def test_gem_lies_between_the_mean_and_the_maximum():
  positive = X + 0.01
  powers = [descriptors.gem(positive, p=p) for p in (1, 2, 4, 400)]
  for low, high in itertools.pairwise(powers):
    assert np.all(low < high)
  np.testing.assert_allclose(powers[0], descriptors.spoc(positive), rtol=1e-5)
  np.testing.assert_allclose(powers[-1], positive.max((1, 2)), rtol=0.02)


@pytest.mark.parametrize("scale", [1e-4, 1e10])
def test_gem_neither_overflows_nor_vanishes(scale):
  got = descriptors.gem(X * np.float32(scale), p=20)
  np.testing.assert_allclose(got, _gem(X * scale, 20), rtol=1e-4)


def test_a_mask_is_as_if_the_rest_were_not_there():
  mask = np.zeros(X.shape[:3], bool)
  mask[:, :4, :6] = True
  padded = np.where(mask[..., None], X, 1e9).astype(np.float32)
  for pool in (descriptors.gem, descriptors.mac, descriptors.spoc):
    want = pool(X[:, :4, :6])
    np.testing.assert_allclose(pool(padded, mask=mask), want, rtol=1e-5)
    assert not np.allclose(pool(padded), want)


def test_learned_whitening_makes_matching_differences_white():
  got = descriptors.learn_whitening(ROWS, QUERIES, POSITIVES)
  d = (ROWS[QUERIES] - ROWS[POSITIVES]) @ got.projection.T
  np.testing.assert_allclose(d.T @ d / len(d), np.eye(6), atol=1e-4)
  projected = (ROWS - got.mean) @ got.projection.T
  spread = projected.T @ projected
  diagonal = np.diag(spread)
  assert np.all(np.diff(diagonal) < 0)
  np.testing.assert_allclose(
    spread, np.diag(diagonal), atol=1e-4 * diagonal.max()
  )


def test_pca_whitening_makes_rows_white():
  got = descriptors.pca_whitening(ROWS)
  projected = (ROWS - got.mean) @ got.projection.T
  covariance = projected.T @ projected / len(ROWS)
  np.testing.assert_allclose(covariance, np.eye(6), atol=1e-4)
  # The directions in which rows vary most come first.
  assert np.all(np.diff(np.linalg.norm(got.projection, axis=1)) > 0)
  few = descriptors.pca_whitening(ROWS, dimensions=2)
  np.testing.assert_array_equal(few.projection, got.projection[:2])


# Transforms.


@pytest.mark.parametrize(
  "pool",
  [
    functools.partial(descriptors.gem, p=2.5),
    descriptors.mac,
    descriptors.spoc,
    functools.partial(descriptors.rmac, levels=2),
    functools.partial(descriptors.regional, levels=1),
    descriptors.l2_normalize,
  ],
)
def test_jit_and_vmap_agree(pool):
  x = X[:, :4, :6]
  want = pool(x)
  np.testing.assert_allclose(
    jax.jit(jax.vmap(pool))(x), want, rtol=1e-5, atol=1e-6
  )


def test_whiten_and_scales_under_jit():
  whitening = descriptors.pca_whitening(ROWS)
  want = descriptors.whiten(ROWS, whitening)
  got = jax.jit(jax.vmap(descriptors.whiten, (0, None)))(ROWS, whitening)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
  v = np.abs(ROWS[:3])
  got = jax.jit(lambda v, p: descriptors.aggregate_scales(v, power=p))(v, 2.0)
  want = descriptors.aggregate_scales(v, power=2.0)
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_gem_has_gradients_for_x_and_p():
  x = jnp.asarray(X[0, :3, :4] + 0.1)
  p = jnp.float32([1.5, 2, 3, 4, 5])
  gem = lambda x, p: descriptors.gem(x, p=p)
  test_util.check_grads(gem, (x, p), 1, modes=["rev"], rtol=2e-2, eps=1e-2)


@pytest.mark.parametrize("p", [0.5, 3.0, 30.0])
def test_gradients_of_zeros_are_finite(p):
  loss = lambda x, p: jnp.sum(
    descriptors.l2_normalize(descriptors.gem(x, p=p)) ** 2
  )
  for x in (jnp.asarray(X), jnp.zeros((3, 3, 5))):
    for gradient in jax.jit(jax.grad(loss, (0, 1)))(x, p):
      assert np.all(np.isfinite(gradient))
  of_p = jax.grad(lambda p: jnp.sum(descriptors.gem(X, p=p)))(p)
  assert of_p > 0  # The mean grows with p.
  v = jnp.zeros((3, 4))
  scales = lambda v: jnp.sum(descriptors.aggregate_scales(v, power=2.0))
  np.testing.assert_array_equal(jax.jit(jax.grad(scales))(v), v)


def test_bfloat16_features_give_float32():
  x = jnp.asarray(X, jnp.bfloat16)
  got = descriptors.gem(x)
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(
    got, descriptors.gem(x.astype(jnp.float32)), rtol=1e-6
  )


def test_wrong_numbers_are_seen():
  x = X.copy()
  x[0, 0, 0, 0] = np.nan
  for pool in (descriptors.gem, descriptors.mac, descriptors.spoc):
    got = np.isnan(pool(x))
    assert got[0, 0]
    assert got.sum() == 1


# Refusal.


def _learn(x, q, p, **options):
  return lambda: descriptors.learn_whitening(x, q, p, **options)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: descriptors.gem(X, p=0.0), "p must be positive, got 0"),
    (lambda: descriptors.gem(X, epsilon=0.0), "epsilon must be positive"),
    (lambda: descriptors.rmac(X, levels=0), "levels must be 1 or more, got 0"),
    (
      lambda: descriptors.l2_normalize(X, epsilon=-1.0),
      "epsilon must be 0 or more",
    ),
    (
      lambda: descriptors.aggregate_scales(X[0], power=-1.0),
      "power must be positive",
    ),
    (
      lambda: descriptors.pca_whitening(ROWS, dimensions=7),
      r"dimensions must be in 1\.\.6, got 7",
    ),
    (_learn(ROWS, QUERIES, POSITIVES, ridge=-1.0), "ridge must be 0 or more"),
  ],
)
def test_bad_options_are_refused(call, message):
  with pytest.raises(ValueError, match=message) as error:
    call()
  assert not isinstance(error.value, InputError)


BROKEN = ROWS.copy()
BROKEN[17, 2] = np.inf


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: descriptors.gem(X[:, :0]), "0 x 9; the image is too small"),
    (lambda: descriptors.aggregate_scales(-X[0], power=2.0), "negative"),
    (lambda: descriptors.aggregate_scales(X[0, :0]), "got none"),
    (_learn(ROWS, [0, 60], [1, 2]), r"query_rows must be in 0\.\.59.*0\.\.60"),
    (_learn(ROWS, [0, 1], [-1, 2]), "positive_rows must be in"),
    (_learn(ROWS, np.zeros(0, int), np.zeros(0, int)), "query_rows is empty"),
    (_learn(ROWS, [0, 1], [2]), "equally many, got 2 and 1"),
    (_learn(BROKEN, QUERIES, POSITIVES), "row 17 of x"),
    (
      _learn(ROWS, QUERIES[:4], POSITIVES[:4]),
      "4 pairs differ in 4 directions.*6 channels.*at least 6",
    ),
    (_learn(ROWS, QUERIES, QUERIES), "differ in 0 directions"),
    (lambda: descriptors.pca_whitening(BROKEN), "row 17 of x"),
    (
      lambda: descriptors.pca_whitening(ROWS[:5]),
      "5 rows vary in 4 directions, and 6 dimensions.*dimensions=4",
    ),
    (lambda: descriptors.pca_whitening(ROWS[:0]), r"\(0, 6\)"),
    (
      lambda: descriptors.whiten(X, descriptors.pca_whitening(ROWS)),
      r"mean \(6,\).*5 channels",
    ),
  ],
)
def test_bad_data_are_refused_by_name(call, message):
  with pytest.raises(InputError, match=message):
    call()


def test_too_few_pairs_do_with_a_ridge():
  few = QUERIES[:4], POSITIVES[:4]
  got = descriptors.learn_whitening(ROWS, *few, ridge=1e-4)
  assert np.all(np.isfinite(got.projection))
  descriptors.pca_whitening(ROWS[:5], dimensions=4)


def test_wrong_shapes_name_the_argument():
  with pytest.raises(TypeCheckError, match="x"):
    descriptors.gem(X[0, 0])
  with pytest.raises(TypeCheckError, match="p"):
    descriptors.gem(X, p=np.ones(3))
  with pytest.raises(TypeCheckError, match="positive_rows"):
    descriptors.learn_whitening(ROWS, QUERIES, POSITIVES / 2)
