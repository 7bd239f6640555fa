import jax
import jax.numpy as jnp
from jax.test_util import check_grads
from jaxtyping import TypeCheckError
import numpy as np
import pytest

from jaxshape.losses import contrastive

RNG = np.random.default_rng(0)


def _unit(*shape):
  x = RNG.normal(size=shape)
  return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


# Distances around 0.3, so that some pairs are within a margin of 0.3.
QUERY = _unit(5, 8)
OTHER = QUERY + RNG.normal(0, 0.1, (5, 8)).astype(np.float32)
LABEL = np.array([1, 0, 0, 1, 0])
SAMPLES = QUERY[:, None] + RNG.normal(0, 0.1, (5, 3, 8)).astype(np.float32)


def test_contrastive_by_hand():
  query = np.array([[0, 0], [0, 0], [0, 0], [0, 0]], np.float32)
  other = np.array([[3, 4], [3, 4], [3, 4], [0, 0]], np.float32)
  got = contrastive.contrastive(query, other, np.array([1, 0, 0, 0]), margin=7)
  np.testing.assert_allclose(got, [25, 4, 4, 49], rtol=1e-6)
  got = contrastive.contrastive(query, other, np.array([1, 0, 0, 1]), margin=4)
  np.testing.assert_allclose(got, [25, 0, 0, 0], rtol=1e-6)


@pytest.mark.parametrize("form", ["paper", "public"])
def test_contrastive_transcribed(form):
  shift, factor = (0, 1) if form == "paper" else (1e-6, 0.5)
  want = []
  for q, d, y in zip(QUERY, OTHER, LABEL, strict=True):
    z = np.sqrt(np.sum((q.astype(float) - d + shift) ** 2))
    want.append(factor * (z**2 if y else max(0, 0.3 - z) ** 2))
  assert sum(w > 0 for w in want) > 2
  got = contrastive.contrastive(QUERY, OTHER, LABEL, margin=0.3, form=form)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-9)
  got = contrastive.contrastive(QUERY, OTHER, LABEL == 1, margin=0.3, form=form)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-9)


def test_forms_differ_by_the_shift_where_two_are_the_same():
  same = np.zeros((1, 4), np.float32)
  f = contrastive.contrastive
  np.testing.assert_array_equal(f(same, same, np.ones(1)), [0])
  got = f(same, same, np.ones(1), form="public")
  np.testing.assert_allclose(got, [0.5 * 4e-12], rtol=1e-5)


def test_triplet_transcribed():
  positive, negative = OTHER, OTHER[::-1]
  want = [
    max(0, np.sum((q - p) ** 2) - np.sum((q - n) ** 2) + 0.2)
    for q, p, n in zip(QUERY.astype(float), positive, negative, strict=True)
  ]
  got = contrastive.triplet(QUERY, positive, negative, margin=0.2)
  np.testing.assert_allclose(got, want, atol=1e-6)
  assert 0 < sum(w > 0 for w in want) < 5
  got = contrastive.triplet(QUERY, positive, positive, margin=0.2)
  np.testing.assert_allclose(got, np.full(5, 0.2), rtol=1e-5)


def test_losses_broadcast_under_jit_and_vmap():
  label = RNG.integers(0, 2, (5, 3))
  f = lambda q, d, y: contrastive.contrastive(q[..., None, :], d, y, margin=0.4)
  want = np.stack(
    [
      contrastive.contrastive(QUERY, SAMPLES[:, i], label[:, i], margin=0.4)
      for i in range(3)
    ],
    axis=1,
  )
  assert want.shape == (5, 3)
  for g in (f, jax.jit(f), jax.vmap(f)):
    got = g(QUERY, SAMPLES, label)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-9)
  h = lambda q, p, n: contrastive.triplet(
    q[..., None, :], p[..., None, :], n, margin=0.1
  )
  want = np.stack(
    [
      contrastive.triplet(QUERY, OTHER, SAMPLES[:, i], margin=0.1)
      for i in range(3)
    ],
    axis=1,
  )
  for call in (h, jax.jit(h), jax.vmap(h)):
    got = call(QUERY, OTHER, SAMPLES)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("form", ["paper", "public"])
def test_contrastive_gradients(form):
  f = lambda q, d: contrastive.contrastive(q, d, LABEL, margin=0.5, form=form)
  check_grads(f, (QUERY, OTHER), order=1, modes=["rev"], rtol=0.02, eps=1e-3)


@pytest.mark.parametrize("form", ["paper", "public"])
@pytest.mark.parametrize("label", [0, 1])
def test_contrastive_gradients_where_two_are_the_same(form, label):
  # The difference is exactly 0, with the shift of the public form as well.
  other = QUERY[:1] * 0
  query = other - np.float32(1e-6 if form == "public" else 0)
  f = lambda q: jnp.sum(
    contrastive.contrastive(q, other, np.array([label]), form=form)
  )
  np.testing.assert_array_equal(jax.grad(f)(query), np.zeros((1, 8)))


def test_triplet_gradients():
  f = lambda q, p, n: contrastive.triplet(q, p, n, margin=0.2)
  args = QUERY, OTHER, OTHER[::-1]
  check_grads(f, args, order=1, modes=["rev"], rtol=0.02, eps=1e-3)


def test_losses_of_16_bit_descriptors_are_float32():
  query, other = (jnp.asarray(x, jnp.bfloat16) for x in (QUERY, OTHER))
  got = contrastive.contrastive(query, other, LABEL)
  assert got.dtype == jnp.float32
  wide = lambda x: np.asarray(x, np.float32)
  want = contrastive.contrastive(wide(query), wide(other), LABEL)
  np.testing.assert_array_equal(got, want)


def test_losses_refuse():
  f = contrastive.contrastive
  for margin in (0.0, -1, np.inf, np.nan):
    with pytest.raises(ValueError, match=f"margin must be above 0 .* {margin}"):
      f(QUERY, OTHER, LABEL, margin=margin)
    with pytest.raises(ValueError, match=f"margin must be above 0 .* {margin}"):
      contrastive.triplet(QUERY, OTHER, OTHER, margin=margin)
  with pytest.raises(
    ValueError, match="form must be one of paper, public, got"
  ):
    f(QUERY, OTHER, LABEL, form="other")
  with pytest.raises(TypeCheckError, match="label"):
    f(QUERY, OTHER, LABEL[:3])
  with pytest.raises(TypeCheckError, match="other"):
    f(QUERY, OTHER[:, :5], LABEL)
  with pytest.raises(TypeCheckError, match="negative"):
    contrastive.triplet(QUERY, OTHER, OTHER[:, :5])
