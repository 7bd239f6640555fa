import jax
from jaxtyping import TypeCheckError
import numpy as np
import pytest

from jaxshape.losses import classification


def _example(seed=0):
  rng = np.random.default_rng(seed)
  logits = rng.normal(size=(5, 4)).astype(np.float32) * 3
  return logits, np.array([0, 3, 1, 1, 2], np.int32)


def _log_p(logits):
  logits = logits.astype(np.float64)
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_cross_entropy_by_hand():
  logits = np.log([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]).astype(np.float32)
  got = classification.cross_entropy(logits, np.array([0, 1]))
  np.testing.assert_allclose(got, [np.log(2), np.log(10)], rtol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_cross_entropy_transcribed(smoothing):
  logits, labels = _example()
  target = (1 - smoothing) * np.eye(4)[labels] + smoothing / 4
  want = -(target * _log_p(logits)).sum(-1)
  got = classification.cross_entropy(logits, labels, label_smoothing=smoothing)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  soft = classification.soft_cross_entropy(logits, target.astype(np.float32))
  np.testing.assert_allclose(soft, want, rtol=1e-5)


def test_cross_entropy_ignores_a_shift_and_stands_large_logits():
  logits, labels = _example()
  want = classification.cross_entropy(logits, labels)
  got = classification.cross_entropy(logits + 1000, labels)
  np.testing.assert_allclose(got, want, atol=2e-4)
  big = np.array([[1e30, -1e30]], np.float32)
  loss = classification.cross_entropy(big, np.array([0]))
  np.testing.assert_array_equal(loss, [0.0])


def test_cross_entropy_of_a_label_that_does_not_exist_is_nan():
  logits, _ = _example()
  labels = np.array([-1, 4, 0, 1, 255])
  got = classification.cross_entropy(logits, labels)
  np.testing.assert_array_equal(np.isnan(got), [True, True, False, False, True])


def test_cross_entropy_reads_bfloat16_as_float32():
  logits, labels = _example()
  half = jax.numpy.asarray(logits, jax.numpy.bfloat16)
  got = classification.cross_entropy(half, labels)
  assert got.dtype == np.float32
  want = classification.cross_entropy(np.asarray(half, np.float32), labels)
  np.testing.assert_array_equal(got, want)


def test_soft_cross_entropy_of_itself_is_the_entropy():
  targets = np.array([[0.5, 0.5, 0.0]], np.float32)
  logits = np.array([[0.0, 0.0, -np.inf]], np.float32)
  got = classification.soft_cross_entropy(logits, targets)
  np.testing.assert_allclose(got, [np.log(2)], rtol=1e-6)


def test_losses_under_jit_vmap_and_grad():
  logits, labels = _example()
  one = lambda l, y: classification.cross_entropy(l, y, label_smoothing=0.1)
  want = one(logits, labels)
  for f in (jax.jit(one), jax.vmap(one)):
    np.testing.assert_allclose(f(logits, labels), want, rtol=1e-6)
  got = jax.grad(lambda l: one(l, labels).sum())(logits)
  target = 0.9 * np.eye(4)[labels] + 0.1 / 4  # The gradient is p - target.
  np.testing.assert_allclose(got, np.exp(_log_p(logits)) - target, atol=1e-6)


def test_losses_refuse():
  logits, labels = _example()
  with pytest.raises(ValueError, match=r"label_smoothing must be .* got 1.5"):
    classification.cross_entropy(logits, labels, label_smoothing=1.5)
  with pytest.raises(TypeCheckError, match="labels"):
    classification.cross_entropy(logits, labels[:3])
  with pytest.raises(TypeCheckError, match="targets"):
    classification.soft_cross_entropy(logits, logits[:, :3])
