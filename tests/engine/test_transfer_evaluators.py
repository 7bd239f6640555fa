import jax
import jax.numpy as jnp
from matplotlib.figure import Figure
import numpy as np
import pytest
from sklearn import metrics

from jaxshape.data import stream, voc
from jaxshape.engine import evaluators, runtime, transfer_evaluators
from jaxshape.errors import InputError
from jaxshape.system import TrainState

CLASSES = ("a", "b", "c")
MESH = runtime.make_mesh({"data": -1, "model": 1})
KERNEL = np.random.default_rng(5).normal(size=(3, 3)).astype(np.float32)
STATE = TrainState(jnp.zeros((), jnp.int32), {}, {}, {})


class Source:
  """21 random images, two of which are not to be counted."""

  classes = CLASSES

  def __init__(self):
    draw = np.random.default_rng(0)
    n = 21
    self.rows = {
      "image": draw.integers(0, 256, (n, 8, 6, 3)).astype(np.uint8),
      "label": draw.choice(3, n, p=[0.7, 0.2, 0.1]).astype(np.int32),
      "labels": draw.choice([-1, 0, 1], (n, 3)).astype(np.float32),
      "segmentation": draw.choice([0, 1, 2, 3, 255], (n, 8, 6)).astype(
        np.int32
      ),
      "mask": np.ones(n, np.float32),
    }
    self.rows["mask"][[3, 10]] = 0

  def __len__(self):
    return 21

  def __getitem__(self, i):
    return {name: rows[i] for name, rows in self.rows.items()}


SOURCE = Source()
REAL = SOURCE.rows["mask"] > 0


def _data(size=8):
  return lambda: stream.evaluate(SOURCE, batch_size=size)


def _features(_, images):
  x = jnp.asarray(images, jnp.float32) / 255 - 0.5
  return x.reshape(len(x), 4, 2, 3, 2, 3).mean((2, 4))


CLASSIFIER = evaluators.Classifier(
  features=_features,
  head=lambda _, f: jnp.mean(f, axis=(-3, -2)) @ KERNEL,
  classes=CLASSES,
)


def _numbers(make):
  """What the evaluator says, the same for two batch sizes, and its figures."""
  numbers, outputs = runtime.evaluate(make(_data()), STATE, MESH)
  other, _ = runtime.evaluate(make(_data(24)), STATE, MESH)
  assert numbers.keys() == other.keys()
  for name, value in numbers.items():
    np.testing.assert_allclose(other[name], value, rtol=1e-6)
  figures = make(_data()).pictures(STATE, outputs)
  assert figures
  assert all(isinstance(figure, Figure) for figure in figures.values())
  return numbers


def _logits():
  return np.asarray(CLASSIFIER.logits(STATE, SOURCE.rows["image"]))[REAL]


def test_accuracy_means_over_the_classes():
  numbers = _numbers(lambda data: evaluators.accuracy(CLASSIFIER, data))
  labels, said = SOURCE.rows["label"][REAL], _logits().argmax(1)
  assert len(set(labels)) == 3
  np.testing.assert_allclose(numbers["top1"], np.mean(labels == said))
  want = metrics.balanced_accuracy_score(labels, said)
  np.testing.assert_allclose(numbers["mean_class_accuracy"], want)
  assert numbers["mean_class_accuracy"] != numbers["top1"]


def test_multi_label_is_the_average_precision_of_what_counts():
  numbers = _numbers(
    lambda data: transfer_evaluators.multi_label(CLASSIFIER, data)
  )
  labels, scores = SOURCE.rows["labels"][REAL], _logits()
  points, areas = [], []
  for k, name in enumerate(CLASSES):
    known = labels[:, k] >= 0
    found = labels[known, k][np.argsort(-scores[known, k])] == 1
    tp = np.cumsum(found)
    precision, recall = tp / np.arange(1, len(tp) + 1), tp / tp[-1]
    best = [precision[recall >= t - 1e-9].max() for t in np.linspace(0, 1, 11)]
    points.append(np.mean(best))
    np.testing.assert_allclose(numbers[f"AP/{name}"], points[-1], rtol=1e-5)
    areas.append(
      np.mean([precision[tp >= j].max() for j in range(1, tp[-1] + 1)])
    )
  np.testing.assert_allclose(numbers["mAP"], np.mean(points), rtol=1e-5)
  np.testing.assert_allclose(numbers["mAP_area"], np.mean(areas), rtol=1e-5)


def _iou(said):
  truth = SOURCE.rows["segmentation"][REAL]
  counted = truth != voc.VOID
  return [
    np.sum((truth == k) & (said == k))
    / np.sum(((truth == k) | (said == k)) & counted)
    for k in range(4)
  ], np.mean((said == truth)[counted])


def test_segmentation_maps_count_all_but_the_void():
  draw = np.random.default_rng(7).normal(size=(3, 4)).astype(np.float32)
  segment = lambda _, images: (jnp.asarray(images, jnp.float32) - 128) @ draw
  names = ("background", *CLASSES)
  numbers = _numbers(
    lambda data: transfer_evaluators.segmentation_maps(
      segment, data, classes=names
    )
  )
  said = ((SOURCE.rows["image"][REAL] - 128.0) @ draw).argmax(-1)
  want, accuracy = _iou(said)
  got = [numbers[f"IoU/{name}"] for name in names]
  np.testing.assert_allclose(got, want, rtol=1e-5)
  np.testing.assert_allclose(numbers["mIoU"], np.mean(want), rtol=1e-5)
  np.testing.assert_allclose(numbers["acc"], accuracy, rtol=1e-5)


def test_pseudo_labels_look_at_the_classes_that_are_there_alone():
  threshold = 0.35
  numbers = _numbers(
    lambda data: transfer_evaluators.pseudo_labels(
      CLASSIFIER, lambda _: jnp.asarray(KERNEL), data, threshold=threshold
    )
  )
  said = []
  for image, there in zip(
    SOURCE.rows["image"][REAL], SOURCE.rows["labels"][REAL], strict=True
  ):
    coarse = np.asarray(_features(None, image[None])[0]) @ KERNEL
    maps = np.asarray(jax.image.resize(coarse, (8, 6, 3), "linear"))
    maps = np.where(there > 0, np.maximum(maps, 0), 0)
    shares = maps / np.maximum(maps.max((0, 1)), 1e-9)
    said.append(np.where(shares.max(-1) >= threshold, shares.argmax(-1) + 1, 0))
  want, accuracy = _iou(np.stack(said))
  assert len(set(np.ravel(said))) == 4
  names = ("background", *CLASSES)
  got = [numbers[f"IoU/{name}"] for name in names]
  np.testing.assert_allclose(got, want, rtol=1e-5)
  np.testing.assert_allclose(numbers["acc"], accuracy, rtol=1e-5)


def test_classes_that_nobody_names_are_left_out():
  segment = lambda _, images: jnp.zeros((*images.shape[:3], 6))
  evaluator = transfer_evaluators.segmentation_maps(
    segment, _data(), classes=("background", *CLASSES, "d", "e")
  )
  numbers, _ = runtime.evaluate(evaluator, STATE, MESH)
  assert "IoU/c" in numbers
  assert "IoU/d" not in numbers
  truth = SOURCE.rows["segmentation"][REAL]
  share = np.mean(truth[truth != voc.VOID] == 0)
  np.testing.assert_allclose(numbers["mIoU"], share / 4, rtol=1e-5)


@pytest.mark.parametrize(
  ("evaluator", "key"),
  [
    (transfer_evaluators.multi_label(CLASSIFIER, _data()), "labels"),
    (
      transfer_evaluators.segmentation_maps(
        _features, _data(), classes=CLASSES
      ),
      "segmentation",
    ),
    (
      transfer_evaluators.pseudo_labels(
        CLASSIFIER, lambda _: jnp.asarray(KERNEL), _data()
      ),
      "labels",
    ),
  ],
)
def test_data_without_what_is_measured_are_refused(evaluator, key):
  batch = dict(SOURCE.rows)
  batch.pop(key)
  with pytest.raises(InputError, match=f'needs examples with "{key}", got im'):
    evaluator.step(STATE, batch)
