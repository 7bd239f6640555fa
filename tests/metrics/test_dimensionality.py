import jax
from jaxtyping import TypeCheckError
import numpy as np
import pytest

from jaxshape.errors import InputError
from jaxshape.metrics import dimensionality


def _pairs(seed=0, n=120, d=24, factors=4):
  """Latents of which a third follow the factor 0 and a sixth the factor 1."""
  rng = np.random.default_rng(seed)
  factor = rng.integers(0, factors, n)
  a, b = rng.normal(size=(2, n, d)) * rng.uniform(0.5, 3, d) + 4
  for k, mine in ((0, slice(0, 8)), (1, slice(8, 12))):
    b[factor == k, mine] = a[factor == k, mine] + 0.3
  return a.astype(np.float32), b.astype(np.float32), factor


def _transcribed(a, b, factor, num_factors):
  """Scores and counts by loops over neurons, in float64."""
  a, b, d = a.astype(float), b.astype(float), a.shape[1]
  total = sum(np.concatenate([a[:, i], b[:, i]]).var() for i in range(d))
  scores = []
  for k in range(num_factors):
    x, y = a[factor == k], b[factor == k]
    score = 0.0
    for i in range(d):
      mean = (x[:, i].mean() + y[:, i].mean()) / 2
      score += np.mean((x[:, i] - mean) * (y[:, i] - mean))
    scores.append(score / total)
  scores.append(1.0)
  share = np.exp(scores) / np.exp(scores).sum()
  counts = [int(s * d) for s in share[:-1]]
  return scores, [*counts, d - sum(counts)]


def test_by_hand():
  # Every neuron agrees on pairs of shape and opposes on pairs of texture.
  a = np.repeat([[1], [-1], [1], [-1]], 10, axis=1).astype(np.float32)
  b = np.repeat([[1], [-1], [-1], [1]], 10, axis=1).astype(np.float32)
  factor = np.array([0, 0, 1, 1])
  got = dimensionality.factor_scores(a, b, factor)
  np.testing.assert_allclose(got, [1, -1, 1], atol=1e-6)
  # exp: 2.718, 0.368, 2.718; shares 0.468, 0.063, 0.468.
  got = dimensionality.count_neurons(a, b, factor)
  np.testing.assert_array_equal(got, [4, 0, 6])
  got = dimensionality.correlation_scores(a, b, factor)
  np.testing.assert_allclose(got, [1, -1, 1], atol=1e-6)


@pytest.mark.parametrize(("seed", "num_factors"), [(0, 2), (1, 4), (2, 1)])
def test_transcription(seed, num_factors):
  a, b, factor = _pairs(seed)
  scores, counts = _transcribed(a, b, factor, num_factors)
  got = dimensionality.factor_scores(a, b, factor, num_factors=num_factors)
  np.testing.assert_allclose(got, scores, atol=1e-6)
  got = dimensionality.count_neurons(a, b, factor, num_factors=num_factors)
  np.testing.assert_array_equal(got, counts)
  assert got.sum() == a.shape[1]


def test_correlations_transcribed():
  a, b, factor = _pairs()
  want = []
  for k in range(2):
    x, y = a[factor == k].astype(float), b[factor == k]
    rho = [np.corrcoef(x[:, i], y[:, i])[0, 1] for i in range(a.shape[1])]
    want.append(np.mean(rho))
    got = dimensionality.correlation_per_neuron(a[factor == k], b[factor == k])
    np.testing.assert_allclose(got, rho, atol=1e-6)
  assert want[0] > want[1] > 0.1
  got = dimensionality.correlation_scores(a, b, factor)
  np.testing.assert_allclose(got, [*want, 1], atol=1e-6)
  e = np.exp([*want, 1])
  got = dimensionality.share_by_correlation(a, b, factor)
  np.testing.assert_allclose(got, e / e.sum(), atol=1e-6)


def test_scales_of_neurons_weigh_in_one_estimator_and_not_in_the_other():
  a, b, factor = _pairs()
  scale = np.where(np.arange(24) < 8, 10, 1).astype(np.float32)
  public = dimensionality.factor_scores
  paper = dimensionality.correlation_scores
  np.testing.assert_allclose(
    paper(a * scale, b * scale, factor), paper(a, b, factor), atol=1e-6
  )
  heavier = public(a * scale, b * scale, factor)
  assert heavier[0] > public(a, b, factor)[0] + 0.1
  for f in (public, paper):
    want = f(a, b, factor)
    got = f(-3 * a + 500, -3 * b + 500, factor)
    np.testing.assert_allclose(got, want, atol=1e-5)
    got = f(b[:, ::-1], a[:, ::-1], factor)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_pairs_of_other_factors_count_in_the_variance_alone():
  a, b, factor = _pairs()
  assert set(factor) == {0, 1, 2, 3}
  inside = factor < 2
  want = np.asarray(dimensionality.factor_scores(a, b, factor))
  only = dimensionality.factor_scores(a[inside], b[inside], factor[inside])
  factors = [np.concatenate([x, y]).var(0).sum() for x, y in (
    (a, b), (a[inside], b[inside])
  )]  # fmt: skip
  ratio = factors[1] / factors[0]
  np.testing.assert_allclose(want[:2], only[:2] * ratio, rtol=1e-4)
  for wrong in (-1, 7):
    other = np.where(inside, factor, wrong)
    got = dimensionality.factor_scores(a, b, other)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_what_nothing_tells_of_has_a_fifth_of_the_neurons():
  got = dimensionality.shares(np.array([0, 0, 1], np.float32))
  np.testing.assert_allclose(got, [0.2119, 0.2119, 0.5761], atol=1e-4)


def test_neurons_that_do_not_vary():
  a, b, factor = _pairs()
  a[:, :3], b[:, :3], b[:, 3] = 0.1, 0.3, 1e4
  rho = dimensionality.correlation_per_neuron(a, b)
  np.testing.assert_array_equal(rho[:4], 0)
  assert np.all(rho[4:] != 0)
  a[:], b[:] = 0.1, 0.1
  got = dimensionality.count_neurons(a, b, factor)
  np.testing.assert_array_equal(got, [-1, -1, -1])
  got = dimensionality.correlation_scores(a, b, factor)
  np.testing.assert_array_equal(got, [0, 0, 1])


def test_under_jit():
  a, b, factor = _pairs()
  for f in (dimensionality.count_neurons, dimensionality.correlation_scores):
    jitted = jax.jit(f)
    want = f(a, b, factor)
    np.testing.assert_allclose(jitted(a, b, factor), want, atol=1e-6)
    # A factor without pairs cannot be refused there.
    got = np.asarray(jitted(a, b, factor * 0))
    if np.issubdtype(got.dtype, np.floating):
      assert np.isnan(got[1])
    else:
      np.testing.assert_array_equal(got, [-1, -1, -1])


def test_refuses():
  a, b, factor = _pairs()
  for f in (dimensionality.count_neurons, dimensionality.share_by_correlation):
    with pytest.raises(InputError, match="got 120 pairs and none of 1"):
      f(a, b, factor * 0)
    with pytest.raises(InputError, match="got 0 pairs and none of 0, 1"):
      f(a[:0], b[:0], factor[:0])
    with pytest.raises(ValueError, match="num_factors must .*, got 0"):
      f(a, b, factor, num_factors=0)
    with pytest.raises(TypeCheckError, match="factor"):
      f(a, b, factor.astype(np.float32))
    with pytest.raises(TypeCheckError, match="latents_b"):
      f(a, b[:, :3], factor)
