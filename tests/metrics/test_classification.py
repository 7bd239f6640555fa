import jax
from jaxtyping import TypeCheckError
import numpy as np
import pytest

from jaxshape.metrics import classification


def _example(n=64, classes=7, seed=0):
  rng = np.random.default_rng(seed)
  logits = rng.normal(size=(n, classes)).astype(np.float32)
  return logits, rng.integers(0, classes, n, dtype=np.int32)


@pytest.mark.parametrize("k", [1, 2, 5, 7])
def test_top_k_correct_by_sorting(k):
  logits, labels = _example()
  order = np.argsort(-logits, axis=-1)[:, :k]
  want = (order == labels[:, None]).any(-1)
  assert want.any()
  got = classification.top_k_correct(logits, labels, k=k)
  np.testing.assert_array_equal(got, want)


def test_top_k_correct_of_equal_logits_takes_the_first_classes():
  logits, labels = np.zeros((4, 4), np.float32), np.arange(4)
  for k in (1, 2, 3):
    got = classification.top_k_correct(logits, labels, k=k)
    np.testing.assert_array_equal(got, np.arange(4) < k)


def test_top_k_correct_counts_nothing_that_cannot_be_read():
  logits = np.array([[np.nan, 0, 0], [1, 0, 0], [1, 0, 0]], np.float32)
  got = classification.top_k_correct(logits, np.array([0, -1, 3]), k=3)
  assert not np.any(got)


def test_confidence_and_entropy_by_hand():
  p = np.array([[0.5, 0.25, 0.25], [1, 0, 0], [1 / 3, 1 / 3, 1 / 3]])
  with np.errstate(divide="ignore"):
    logits = np.log(p).astype(np.float32) + 5
  got = classification.confidence(logits)
  np.testing.assert_allclose(got, [0.5, 1, 1 / 3], rtol=1e-6)
  got = classification.entropy(logits)
  np.testing.assert_allclose(got, [1.5 * np.log(2), 0, np.log(3)], rtol=1e-6)


def test_confusion_matrix_by_hand():
  labels = np.array([0, 0, 1, 2, 2, 2, 9, -1])
  predictions = np.array([0, 1, 1, 2, 0, 2, 0, 0])
  mask = np.array([1, 1, 1, 1, 1, 0, 1, 1], np.float32)
  got = classification.confusion_matrix(
    labels, predictions, num_classes=3, mask=mask
  )
  np.testing.assert_array_equal(got, [[1, 1, 0], [0, 1, 0], [1, 0, 1]])


def test_calibration_error_transcribed():
  rng = np.random.default_rng(1)
  confidence = rng.uniform(size=200).astype(np.float32)
  correct = rng.uniform(size=200) < confidence**2
  want = 0.0
  for m in range(1, 16):
    inside = (confidence > (m - 1) / 15) & (confidence <= m / 15)
    if inside.any():
      gap = abs(correct[inside].mean() - confidence[inside].mean())
      want += inside.mean() * gap
  table = classification.reliability_table(confidence, correct)
  got = classification.calibration_error(table)
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_reliability_table_keeps_the_ends_and_the_edges():
  confidence = np.array([0.0, 0.5, 1.0, 0.50001], np.float32)
  got = classification.reliability_table(confidence, np.ones(4), bins=2)
  np.testing.assert_array_equal(got[:, 0], [2, 2])


def test_tables_add_up_over_padded_batches():
  logits, labels = _example()
  confidence = np.asarray(classification.confidence(logits))
  predictions = logits.argmax(-1)
  correct = predictions == labels
  first = np.arange(64) < 20
  tables = [
    classification.reliability_table(
      np.where(mask, confidence, np.nan), correct, mask=mask
    )
    for mask in (first, ~first)
  ]
  want = classification.reliability_table(confidence, correct)
  np.testing.assert_allclose(sum(tables), want, rtol=1e-6)
  matrices = [
    classification.confusion_matrix(
      labels, predictions, num_classes=7, mask=mask.astype(np.float32)
    )
    for mask in (first, ~first)
  ]
  want = classification.confusion_matrix(labels, predictions, num_classes=7)
  np.testing.assert_array_equal(sum(matrices), want)
  assert np.sum(want) == 64


def test_calibration_error_of_nothing_is_nan():
  table = np.zeros((15, 3), np.float32)
  assert np.isnan(classification.calibration_error(table))


def test_metrics_under_jit_and_vmap():
  logits, labels = _example()
  for f in (
    lambda l, y: classification.top_k_correct(l, y, k=2),
    lambda l, _: classification.confidence(l),
    lambda l, _: classification.entropy(l),
  ):
    want = f(logits, labels)
    np.testing.assert_allclose(jax.jit(f)(logits, labels), want, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(f)(logits, labels), want, rtol=1e-6)
  f = lambda y, p: classification.confusion_matrix(y, p, num_classes=7)
  args = labels, logits.argmax(-1)
  np.testing.assert_array_equal(jax.jit(f)(*args), f(*args))
  f = classification.reliability_table
  args = np.abs(np.tanh(logits[:, 0])), labels == 0
  np.testing.assert_allclose(jax.jit(f)(*args), f(*args), rtol=1e-6)


def test_metrics_refuse():
  logits, labels = _example()
  with pytest.raises(ValueError, match="k must be 1 or more, got 0"):
    classification.top_k_correct(logits, labels, k=0)
  with pytest.raises(ValueError, match="bins must be 1 or more, got 0"):
    classification.reliability_table(logits[:, 0], labels == 0, bins=0)
  with pytest.raises(TypeCheckError, match="labels"):
    classification.top_k_correct(logits, labels[:3], k=1)
  with pytest.raises(TypeCheckError, match="predictions"):
    classification.confusion_matrix(labels, labels[:3], num_classes=7)
