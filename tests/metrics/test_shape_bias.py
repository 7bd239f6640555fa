import jax
from jaxtyping import TypeCheckError
import numpy as np
import pytest

from jaxshape.metrics import shape_bias

# One hexadecimal digit per trial. The answers were scored by model-vs-human
# (commit 79ed7cd), ShapeBias.analysis of its evaluation module.
SHAPE = (
  "bfe8fff17946ac92ad385e07e62cffe5bf9e92794b6f3a128777d85fe533"
  "289aef8914fe077a1753cb2c83a775f2f3cf2e068b204e581df4d6452f16"
  "a71fde26640cb126ee2e43f10c39536821fb58fb910aa587d58ab9990143"
  "f196d721cac788990e89c1a28b359c08a60bc2d454368e7d6dbab0b4b80e"
)
TEXTURE = (
  "bfe8fff17946e8aaa7519e5f9dd50aeca02c51bfe3ffb338bd2f1b5dc60c"
  "f64e5c466c015e0bd5fa7c4abe36758584a70c4daa3c8f0a41cac01a3f57"
  "ce60af025d7426f2301cdb81f9c4be92195e28fa5cbbbd435ec8ce2b3b1f"
  "c1dd242d1307125cb4875cc57e48ff8c8f8b05480fae7404041af36b254d"
)
ANSWERS = (
  "b8e8f1f10946ee9aa7585e0b93d5ffe2ae28939f236f3a28b1d2180dc033"
  "f74a7c496106e70ad6facc4a8ea765f563bf4c06aa3c4e5211fac0153d57"
  "c01bac265decb62eee1eb381fcc952682d7e78fa9cabb5475cbac9260b4f"
  "d19df12a11c79c590889cc558435ff9c8f8ccf585fa68414041af0c4855d"
)
PUBLIC_SHAPE_BIAS = 0.448717952
PUBLIC_FRACTION_SHAPE = 0.291666657


def _trials():
  texts = (ANSWERS, SHAPE, TEXTURE)
  return tuple(np.array([int(c, 16) for c in t], np.int32) for t in texts)


def _count(*args, **options):
  return shape_bias.count_decisions(*args, num_classes=16, **options)


def test_shape_bias_of_stored_public_decisions():
  counts = _count(*_trials())
  bias, decisions = shape_bias.shape_bias(counts.sum(0))
  np.testing.assert_allclose(bias, PUBLIC_SHAPE_BIAS, rtol=1e-6)
  # The public code divides by all trials, in conflict or not.
  for_shape = PUBLIC_FRACTION_SHAPE * len(SHAPE)
  np.testing.assert_allclose(bias * decisions, for_shape, rtol=1e-6)


def test_shape_bias_by_hand():
  shape = np.array([0, 0, 0, 1, 1, 2])
  texture = np.array([1, 1, 2, 0, 1, 0])  # The fifth is not in conflict.
  answers = np.array([0, 1, 0, 2, 1, 1])
  counts = shape_bias.count_decisions(answers, shape, texture, num_classes=3)
  np.testing.assert_array_equal(counts, [[2, 1, 0], [0, 0, 1], [0, 0, 1]])
  bias, decisions = shape_bias.shape_bias(counts)
  np.testing.assert_allclose(bias, [2 / 3, np.nan, np.nan])
  np.testing.assert_array_equal(decisions, [3, 0, 0])


def test_shape_bias_swaps_with_the_cues():
  answers, shape, texture = _trials()
  one, n = shape_bias.shape_bias(_count(answers, shape, texture).sum(0))
  other, m = shape_bias.shape_bias(_count(answers, texture, shape).sum(0))
  np.testing.assert_allclose(one + other, 1.0, rtol=1e-6)
  assert n == m


def test_counts_add_up_over_padded_batches():
  trials = _trials()
  want = _count(*trials)
  first = np.arange(240) < 100
  halves = _count(*trials, mask=first) + _count(
    *trials, mask=(~first).astype(np.float32)
  )
  np.testing.assert_array_equal(halves, want)
  assert 0 < _count(*trials, mask=first).sum() < want.sum()


def test_shape_bias_under_jit():
  trials = _trials()
  np.testing.assert_array_equal(jax.jit(_count)(*trials), _count(*trials))


def test_shape_bias_refuses():
  answers, shape, texture = _trials()
  with pytest.raises(TypeCheckError, match="texture_labels"):
    _count(answers, shape, texture[:5])
  with pytest.raises(TypeCheckError, match="counts"):
    shape_bias.shape_bias(np.zeros((16, 2), np.int32))
