import functools

import jax
from jaxtyping import TypeCheckError
import numpy as np
import pytest
from sklearn import metrics

from jaxshape.errors import InputError
from jaxshape.metrics import multilabel


def _example(n=53, classes=4, seed=0):
  draw = np.random.default_rng(seed)
  labels = draw.choice([-1, 0, 1], (n, classes), p=[0.1, 0.6, 0.3])
  scores = draw.normal(size=(n, classes)) + labels
  # Ties, which the order of the data decides.
  return np.round(scores, 1).astype(np.float32), labels.astype(np.float32)


def _slow(scores, labels, style):
  """The challenge's definition for one class, image by image."""
  order = sorted(range(len(scores)), key=lambda i: -scores[i])
  order = [i for i in order if labels[i] != -1]
  total = sum(labels[i] == 1 for i in order)
  curve, right = [], 0
  for place, i in enumerate(order, start=1):
    right += labels[i] == 1
    curve.append((right, right / place))
  if style == "voc07":
    best = [
      max((p for r, p in curve if 10 * r >= t * total), default=0)
      for t in range(11)
    ]
    return np.mean(best)
  return np.mean(
    [max(p for r, p in curve if r >= k) for k in range(1, int(total) + 1)]
  )


@pytest.mark.parametrize("style", multilabel.STYLES)
def test_average_precision_transcribed(style):
  scores, labels = _example()
  got = multilabel.average_precision(scores, labels, style=style)
  want = [_slow(s, l, style) for s, l in zip(scores.T, labels.T, strict=True)]
  np.testing.assert_allclose(got, want, rtol=1e-6)
  mean = multilabel.mean_average_precision(scores, labels, style=style)
  np.testing.assert_allclose(mean, np.mean(want), rtol=1e-6)


def test_average_precision_by_hand():
  # In order of the scores: there, not there, difficult, there.
  scores = np.array([[4.0], [3.0], [2.0], [1.0]], np.float32)
  labels = np.array([[1], [0], [-1], [1]])
  # Precision 1 up to recall 1/2 (six points), then 2/3 (five).
  got = multilabel.average_precision(scores, labels, style="voc07")
  np.testing.assert_allclose(got, [(6 + 5 * 2 / 3) / 11], rtol=1e-6)
  got = multilabel.average_precision(scores, labels, style="voc10")
  np.testing.assert_allclose(got, [(1 + 2 / 3) / 2], rtol=1e-6)


def test_recalls_that_are_met_exactly_count():
  # Three of ten found first: the recall of 0.3 has a precision of 1.
  labels = np.array([1, 1, 1, 0, 0, 0, *[1] * 7])[:, None]
  scores = -np.arange(13, dtype=np.float32)[:, None]
  # 0, 0.1, 0.2 and 0.3; then all ten among thirteen are the best.
  want = (4 + 7 * 10 / 13) / 11
  got = multilabel.average_precision(scores, labels, style="voc07")
  np.testing.assert_allclose(got, [want], rtol=1e-6)


def test_the_area_is_scikit_learns_under_the_envelope():
  draw = np.random.default_rng(3)
  scores = draw.permutation(200).astype(np.float32)[:, None]
  labels = draw.integers(0, 2, (200, 1))
  ours = float(multilabel.average_precision(scores, labels, style="voc10")[0])
  theirs = metrics.average_precision_score(labels[:, 0], scores[:, 0])
  assert theirs < ours < theirs + 0.05
  # With the envelope taken over their own curve it is the same.
  precision, recall, _ = metrics.precision_recall_curve(
    labels[:, 0], scores[:, 0]
  )
  # Theirs runs from the highest recall down.
  envelope = np.maximum.accumulate(precision)
  np.testing.assert_allclose(
    ours, -np.sum(np.diff(recall) * envelope[:-1]), rtol=1e-6
  )


def test_what_does_not_count_changes_nothing():
  scores, labels = _example()
  want = multilabel.average_precision(scores, labels)
  wild = np.where(labels == -1, np.nan, scores)
  np.testing.assert_array_equal(
    multilabel.average_precision(wild, labels), want
  )
  np.testing.assert_allclose(
    multilabel.average_precision(np.exp(3 * scores), labels), want, rtol=1e-6
  )
  padded = [np.concatenate([x, np.full((5, 4), 9.0)]) for x in (scores, labels)]
  mask = np.arange(len(scores) + 5) < len(scores)
  got = multilabel.average_precision(
    padded[0].astype(np.float32), padded[1], mask=mask
  )
  np.testing.assert_array_equal(got, want)


def test_classes_that_no_image_shows_are_left_out():
  scores, labels = _example()
  labels[:, 1] = np.minimum(labels[:, 1], 0)
  each = np.asarray(multilabel.average_precision(scores, labels))
  np.testing.assert_array_equal(np.isnan(each), [False, True, False, False])
  mean = multilabel.mean_average_precision(scores, labels)
  np.testing.assert_allclose(mean, np.nanmean(each), rtol=1e-6)
  assert np.isnan(
    multilabel.mean_average_precision(scores, np.zeros_like(labels))
  )
  nothing = np.zeros((0, 4), np.float32)
  assert np.isnan(multilabel.mean_average_precision(nothing, nothing))


def test_scores_that_are_nan_are_not_hidden():
  scores, labels = _example()
  scores[labels[:, 2] == 0, 2] = np.nan
  each = np.asarray(multilabel.average_precision(scores, labels))
  np.testing.assert_array_equal(np.isnan(each), [False, False, True, False])
  assert np.isnan(multilabel.mean_average_precision(scores, labels))


def test_average_precision_under_jit_and_vmap():
  a, b = _example(), _example(seed=1)
  for style in multilabel.STYLES:
    f = functools.partial(multilabel.average_precision, style=style)
    np.testing.assert_allclose(jax.jit(f)(*a), f(*a), rtol=1e-6)
    both = [np.stack(pair) for pair in zip(a, b, strict=True)]
    np.testing.assert_allclose(jax.vmap(f)(*both)[1], f(*b), rtol=1e-6)


def test_average_precision_refuses():
  scores, labels = _example()
  with pytest.raises(ValueError, match="style must be one of voc07, voc10"):
    multilabel.average_precision(scores, labels, style="area")
  with pytest.raises(InputError, match="labels must be 1 .*got 2"):
    multilabel.average_precision(scores, labels + 1)
  with pytest.raises(TypeCheckError, match="labels"):
    multilabel.average_precision(scores, labels[:3])
