"""Evaluators of what a trained network is good for beside its own task.

Rows are given with their mask, or tables of counts, which add up, so that no
number depends on the batch size. Images are 0..255, uint8 or float. In a map of
the classes 0 is the background and 255 counts for nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure
import numpy as np

from jaxshape.data import voc
from jaxshape.engine import evaluators, report
from jaxshape.explanations import class_activation
from jaxshape.metrics import multilabel, segmentation
from jaxshape.system import Evaluator, TrainState
from jaxshape.typing import Array, Batch, PyTree

# (state, images 0..255 [batch, height, width, 3]) -> [batch, height, width,
# classes].
Segment = Callable[[TrainState, evaluators.Images], Array]


def multi_label(
  classifier: evaluators.Classifier, data: evaluators.Data, *, shown: int = 8
) -> Evaluator:
  """Average precision by class, and its means.

  `mAP` is that of VOC 2007 with its eleven points, `mAP_area` that of the
  challenge since 2010, and `AP/<class>` is of the first kind. Classes that no
  image shows are left out.

  Reference:
    Everingham et al., "The PASCAL Visual Object Classes (VOC) Challenge", IJCV
    2010, Sec. 4.2.
  """

  def step(state: TrainState, batch: Batch) -> PyTree:
    evaluators.require(batch, "labels", "multi-label classification")
    return {
      "mask": batch["mask"],
      "scores": classifier.logits(state, batch["image"]),
      "labels": jnp.asarray(batch["labels"]),
    }

  def summarize(outputs: Sequence[PyTree]) -> Mapping[str, float]:
    rows = evaluators.real_rows(outputs)
    by_style = [
      _means(rows["scores"], rows["labels"], style)
      for style in multilabel.STYLES
    ]
    each = zip(classifier.classes, by_style[0], strict=True)
    return {
      "mAP": _mean(by_style[0]),
      "mAP_area": _mean(by_style[1]),
      **{f"AP/{name}": float(ap) for name, ap in each if not np.isnan(ap)},
    }

  def pictures(
    state: TrainState, outputs: Sequence[PyTree]
  ) -> Mapping[str, Figure]:
    rows = evaluators.real_rows(outputs)
    each = _means(rows["scores"], rows["labels"], "voc07")
    batch = evaluators.first_rows(data, most=shown)
    scores = np.asarray(jax.jit(classifier.logits)(state, batch["image"]))
    titles = [
      _naming(classifier.classes, score, label)
      for score, label in zip(scores, batch["labels"], strict=True)
    ]
    sheet = report.image_sheet([batch["image"]], titles=[titles])
    return {
      "by class": _bars(classifier.classes, each, "average precision"),
      "examples": sheet,
    }

  return Evaluator(data, step, summarize, pictures)


def segmentation_maps(
  segment: Segment,
  data: evaluators.Data,
  *,
  classes: Sequence[str],
  shown: int = 6,
) -> Evaluator:
  """The intersection over union of each class, its mean, and the accuracy.

  All pixels of a data set are counted in one table; a class that is neither
  there nor named is left out of the mean.

  Args:
    segment: `(state, images) -> logits [batch, height, width, classes]`.
    data: Batches with "segmentation".
    classes: Their names, the background first.
    shown: How many images are drawn.

  Returns:
    The evaluator.

  Reference:
    Everingham et al., "The PASCAL Visual Object Classes Challenge: A
    Retrospective", IJCV 2015, Sec. 2.3.
  """

  def predict(state: TrainState, batch: Batch) -> Array:
    return jnp.argmax(segment(state, batch["image"]), axis=-1)

  return _maps(predict, data, classes=classes, shown=shown)


def pseudo_labels(
  classifier: evaluators.Classifier,
  kernel: Callable[[TrainState], Array],
  data: evaluators.Data,
  *,
  threshold: float = 0.15,
  shown: int = 6,
) -> Evaluator:
  """How well the class activation maps of known classes fill their things.

  The maps of the classes that an image shows, enlarged to its size, each as a
  share of its own maximum, name every pixel; below the threshold it is
  background. No map of the true classes is looked at but to count.

  Args:
    classifier: Of the things; the background is none of its classes.
    kernel: The weights [channels, classes] of its linear head, by the state.
    data: Batches with "segmentation", and "labels" of the things.
    threshold: Share of a map's maximum.
    shown: How many images are drawn.

  Returns:
    The evaluator; the numbers of `segmentation_maps`.

  Reference:
    Islam et al., "Maximizing Mutual Shape Information", BMVC 2022, Sec. 4.4.
  """

  def predict(state: TrainState, batch: Batch) -> Array:
    evaluators.require(batch, "labels", "labels from class activation maps")
    images = jnp.asarray(batch["image"])
    height, width = images.shape[1:3]
    features = jnp.asarray(classifier.features(state, images), jnp.float32)
    weights = jnp.asarray(kernel(state), jnp.float32)

    def of_class(number: Array) -> Array:
      numbers = jnp.full(len(images), number)
      coarse = class_activation.cam(features, weights, numbers)
      return class_activation.resize(coarse, height=height, width=width)

    maps = jax.lax.map(of_class, jnp.arange(weights.shape[1]))
    return class_activation.pseudo_labels(
      jnp.moveaxis(maps, 0, -1),
      jnp.asarray(batch["labels"]),
      threshold=threshold,
    )

  classes = ("background", *classifier.classes)
  return _maps(predict, data, classes=classes, shown=shown)


def _maps(
  predict: Callable[[TrainState, Batch], Array],
  data: evaluators.Data,
  *,
  classes: Sequence[str],
  shown: int,
) -> Evaluator:
  def step(state: TrainState, batch: Batch) -> PyTree:
    evaluators.require(batch, "segmentation", "segmentation")
    truth = jnp.asarray(batch["segmentation"])
    rows = jnp.asarray(batch["mask"])[:, None, None] > 0
    return segmentation.confusion_matrix(
      truth,
      predict(state, batch),
      num_classes=len(classes),
      mask=jnp.broadcast_to(rows & (truth != voc.VOID), truth.shape),
    )

  def table(outputs: Sequence[PyTree]) -> np.ndarray:
    # Sixty-four bits: a data set has more pixels than 2^31.
    return np.sum([np.asarray(out, np.int64) for out in outputs], axis=0)

  def by_class(outputs: Sequence[PyTree]) -> np.ndarray:
    return np.asarray(
      segmentation.iou(table(outputs), ignore=(), absent="skip")
    )

  def summarize(outputs: Sequence[PyTree]) -> Mapping[str, float]:
    each = by_class(outputs)
    accuracy = segmentation.accuracy(table(outputs), ignore=())
    named = zip(classes, each, strict=True)
    return {
      "mIoU": _mean(each),
      "acc": float(accuracy),
      **{f"IoU/{name}": float(x) for name, x in named if not np.isnan(x)},
    }

  def pictures(
    state: TrainState, outputs: Sequence[PyTree]
  ) -> Mapping[str, Figure]:
    batch = evaluators.first_rows(data, most=shown)
    said = np.asarray(jax.jit(predict)(state, batch))
    colors = voc.palette()
    sheet = report.image_sheet(
      [batch["image"], colors[batch["segmentation"]], colors[said]],
      row_names=["image", "truth", "prediction"],
    )
    return {
      "by class": _bars(classes, by_class(outputs), "IoU"),
      "examples": sheet,
    }

  return Evaluator(data, step, summarize, pictures)


def _means(scores: Any, labels: Any, style: str) -> np.ndarray:
  return np.asarray(multilabel.average_precision(scores, labels, style=style))


def _mean(values: np.ndarray) -> float:
  """Over what is known, NaN where nothing is."""
  known = values[~np.isnan(values)]
  return float(known.mean()) if known.size else float("nan")


def _naming(
  classes: Sequence[str], scores: np.ndarray, labels: np.ndarray
) -> str:
  """The likeliest class, and those that are there where it is not."""
  best = int(np.argmax(scores))
  if labels[best] == 1:
    return classes[best]
  there = [name for name, x in zip(classes, labels, strict=True) if x == 1]
  return f"{' '.join(there)} as {classes[best]}"


def _bars(classes: Sequence[str], values: np.ndarray, label: str) -> Figure:
  known = [
    (name, value)
    for name, value in zip(classes, values, strict=True)
    if not np.isnan(value)
  ]
  figure = Figure(figsize=(5, 0.22 * len(known) + 1), layout="constrained")
  axes = figure.subplots()
  axes.barh(range(len(known)), [value for _, value in known])
  axes.set_yticks(range(len(known)), [name for name, _ in known], fontsize=8)
  axes.set_xlim(0, 1)
  axes.invert_yaxis()
  axes.set_xlabel(label)
  return figure
