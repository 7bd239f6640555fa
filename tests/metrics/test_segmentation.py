import jax
from jaxtyping import TypeCheckError
import numpy as np
import pytest

from jaxshape.errors import InputError
from jaxshape.metrics import segmentation

# Rows are labels. Class 0 is ignored, class 3 does not occur.
TABLE = np.array([[7, 2, 1, 0], [3, 8, 2, 0], [1, 4, 5, 0], [0, 0, 0, 0]])
MEASURES = (
  segmentation.iou, segmentation.mean_iou, segmentation.accuracy,
  segmentation.precision, segmentation.recall,
)  # fmt: skip


def _pixels(seed=0):
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, 7, (3, 4, 16))
  predictions = np.where(
    rng.uniform(size=labels.shape) < 0.5, labels, rng.integers(0, 7, (3, 4, 16))
  )
  return labels, predictions


def _transcribed(labels, predictions, *, classes, ignore, convention):
  """IoU and accuracy from sets of pixels."""
  kept = ~np.isin(labels, ignore)
  if convention == "public":
    kept &= ~np.isin(predictions, ignore)
  each = np.zeros(classes)
  for k in range(classes):
    label, called = kept & (labels == k), kept & (predictions == k)
    union = np.sum(label | called)
    each[k] = np.sum(label & called) / union if union else 0
  both = ~np.isin(labels, ignore) & ~np.isin(predictions, ignore)
  right = np.mean((labels == predictions)[both])
  return each, np.delete(each, ignore).mean(), right


def test_confusion_matrix_counts_pixel_after_pixel():
  labels, predictions = _pixels()
  mask = np.random.default_rng(1).uniform(size=labels.shape) < 0.7
  want = np.zeros((7, 7), int)
  for i in np.ndindex(labels.shape):
    want[labels[i], predictions[i]] += mask[i]
  got = segmentation.confusion_matrix(
    labels, predictions, num_classes=7, mask=mask
  )
  np.testing.assert_array_equal(got, want)


def test_confusion_matrix_leaves_out_what_is_no_class():
  labels = np.array([[0, 1, 2, 3], [-1, 255, 1, 2]])
  predictions = np.array([[0, 2, 2, 1], [0, 0, 3, -1]])
  got = segmentation.confusion_matrix(labels, predictions, num_classes=3)
  np.testing.assert_array_equal(got, [[1, 0, 0], [0, 0, 1], [0, 0, 1]])
  # 19 * 20 + 19 does not fit into 8 bits.
  last = np.full(4, 19, np.uint8)
  got = segmentation.confusion_matrix(last, last, num_classes=20)
  assert got[19, 19] == np.sum(got) == 4


@pytest.mark.parametrize("convention", ["public", "benchmark"])
@pytest.mark.parametrize("ignore", [(0,), (), (0, 5)])
def test_measures_transcribed(convention, ignore):
  labels, predictions = _pixels(2)
  each, mean, right = _transcribed(
    labels, predictions, classes=7, ignore=ignore, convention=convention
  )
  table = segmentation.confusion_matrix(labels, predictions, num_classes=7)
  options = {"ignore": ignore, "convention": convention}
  np.testing.assert_allclose(
    segmentation.iou(table, **options), each, rtol=1e-6
  )
  np.testing.assert_allclose(
    segmentation.mean_iou(table, **options), mean, rtol=1e-6
  )
  np.testing.assert_allclose(
    segmentation.accuracy(table, ignore=ignore), right, rtol=1e-6
  )


def test_measures_by_hand():
  # Without class 0: [[8, 2], [4, 5]]; by the benchmark 3 and 1 more misses.
  close = lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-6)
  benchmark = {"convention": "benchmark"}
  close(segmentation.iou(TABLE), [0, 8 / 14, 5 / 11, 0])
  close(segmentation.iou(TABLE, **benchmark), [0, 8 / 17, 5 / 12, 0])
  close(segmentation.mean_iou(TABLE), (8 / 14 + 5 / 11) / 3)
  close(segmentation.mean_iou(TABLE, absent="skip"), (8 / 14 + 5 / 11) / 2)
  close(
    segmentation.iou(TABLE, ignore=(), absent="skip"),
    [7 / 14, 8 / 19, 5 / 13, np.nan],
  )
  close(segmentation.accuracy(TABLE), 13 / 19)
  close(segmentation.accuracy(TABLE, ignore=()), 20 / 33)
  close(segmentation.precision(TABLE), [0, 8 / 12, 5 / 7, 0])
  close(segmentation.recall(TABLE), [0, 8 / 10, 5 / 9, 0])
  close(segmentation.recall(TABLE, **benchmark), [0, 8 / 13, 5 / 10, 0])
  close(
    segmentation.recall(TABLE, ignore=(), absent="skip"),
    [7 / 10, 8 / 13, 5 / 10, np.nan],
  )


def test_measures_of_nothing():
  table = np.zeros((4, 4), int)
  np.testing.assert_array_equal(segmentation.iou(table), 0)
  assert segmentation.mean_iou(table) == 0
  assert np.isnan(segmentation.mean_iou(table, absent="skip"))
  assert segmentation.accuracy(table) == 0


def test_tables_of_batches_add_up():
  labels, predictions = _pixels(3)
  f = lambda y, p: segmentation.confusion_matrix(y, p, num_classes=7)
  parts = [f(y, p) for y, p in zip(labels, predictions, strict=True)]
  np.testing.assert_array_equal(sum(parts), f(labels, predictions))
  assert np.sum(f(labels, predictions)) == labels.size


def test_counts_may_be_more_than_32_bits_hold():
  table = np.array([[5, 1], [2, 3]], np.int64) * 10**12
  np.testing.assert_allclose(
    segmentation.iou(table, ignore=()), [5 / 8, 3 / 6], rtol=1e-6
  )


def test_metrics_under_jit_and_vmap():
  labels, predictions = _pixels(4)
  f = lambda y, p: segmentation.confusion_matrix(y, p, num_classes=7)
  want = f(labels, predictions)
  np.testing.assert_array_equal(jax.jit(f)(labels, predictions), want)
  tables = jax.vmap(f)(labels, predictions)
  np.testing.assert_array_equal(np.sum(tables, axis=0), want)
  for measure in MEASURES:
    each = np.stack([measure(np.asarray(t)) for t in tables])
    np.testing.assert_allclose(
      jax.jit(jax.vmap(measure))(tables), each, rtol=1e-6
    )


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"ignore": (4,)}, r"ignore must be classes in 0..3, got \(4,\)"),
    ({"ignore": (0, -1)}, r"ignore must be classes in 0..3, got \(0, -1\)"),
    ({"ignore": (0, 1, 2, 3)}, "ignore must leave one of the 4 classes"),
    ({"convention": "kitti"}, "convention must be .* got 'kitti'"),
    ({"absent": "drop"}, "absent must be 'zero' or 'skip', got 'drop'"),
  ],
)
def test_measures_refuse_options(options, message):
  with pytest.raises(ValueError, match=message):
    segmentation.mean_iou(TABLE, **options)


@pytest.mark.parametrize("measure", MEASURES)
def test_measures_refuse_tables(measure):
  with pytest.raises(InputError, match=r"counts of 0 or more, .* in -1..8"):
    measure(np.where(TABLE == 7, -1, TABLE))
  with pytest.raises(InputError, match="counts of 0 or more"):
    measure(np.where(TABLE == 7, np.nan, TABLE))
  with pytest.raises(TypeCheckError, match="confusion"):
    measure(TABLE[:3])


def test_confusion_matrix_refuses():
  labels, predictions = _pixels()
  with pytest.raises(ValueError, match="num_classes must be 1 or more, got 0"):
    segmentation.confusion_matrix(labels, predictions, num_classes=0)
  with pytest.raises(TypeCheckError, match="predictions"):
    segmentation.confusion_matrix(labels, predictions[0], num_classes=7)
  with pytest.raises(TypeCheckError, match="mask"):
    segmentation.confusion_matrix(
      labels, predictions, num_classes=7, mask=np.ones(3, bool)
    )
