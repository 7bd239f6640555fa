"""Evaluators for any classifier: what a system asks for by naming it.

Every step gives rows with their mask, or sums, so that no number depends on the
batch size. Images are 0..255, uint8 or float.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure
import numpy as np

from jaxshape.data import stream
from jaxshape.engine import report
from jaxshape.errors import InputError
from jaxshape.explanations import class_activation
from jaxshape.filters import corruption
from jaxshape.metrics import classification, shape_bias
from jaxshape.system import Evaluator, TrainState
from jaxshape.typing import Array, Batch, PyTree

Images = Array | np.ndarray
# Streams: iterators that can be closed.
Data = Callable[[], stream.Batches]


@dataclasses.dataclass(frozen=True)
class Classifier:
  """A network that names images, in two halves.

  Attributes:
    features: `(state, images 0..255) -> [batch, height, width, channels]`.
    head: `(state, [*batch, height, width, channels]) -> [*batch, classes]`.
    classes: Names of the classes, in the order of the logits.
  """

  features: Callable[[TrainState, Images], Array]
  head: Callable[[TrainState, Array], Array]
  classes: Sequence[str]

  def logits(self, state: TrainState, images: Images) -> Array:
    """Both halves: `[batch, classes]`."""
    return self.head(state, self.features(state, images))


def accuracy(classifier: Classifier, data: Data) -> Evaluator:
  """Top-1, top-5, confidence and entropy where it is right, calibration."""

  def step(state: TrainState, batch: Batch) -> PyTree:
    logits = classifier.logits(state, batch["image"])
    labels = jnp.asarray(batch["label"])
    return {
      "mask": batch["mask"],
      "label": labels,
      "prediction": jnp.argmax(logits, axis=-1),
      "top1": classification.top_k_correct(logits, labels, k=1),
      "top5": classification.top_k_correct(
        logits, labels, k=min(5, logits.shape[-1])
      ),
      "confidence": classification.confidence(logits),
      "entropy": classification.entropy(logits),
    }

  def summarize(outputs: Sequence[PyTree]) -> Mapping[str, float]:
    rows = real_rows(outputs)
    right = rows["top1"] > 0
    return {
      "top1": _mean(rows["top1"]),
      "top5": _mean(rows["top5"]),
      "confidence_correct": _mean(rows["confidence"][right]),
      "entropy_correct": _mean(rows["entropy"][right]),
      "ece": float(
        classification.calibration_error(
          classification.reliability_table(rows["confidence"], rows["top1"])
        )
      ),
    }

  def pictures(
    state: TrainState, outputs: Sequence[PyTree]
  ) -> Mapping[str, Figure]:
    del state
    rows = real_rows(outputs)
    return {
      "confusion": _confusion(
        rows["label"], rows["prediction"], classifier.classes
      ),
      "calibration": _calibration(rows["confidence"], rows["top1"]),
    }

  return Evaluator(data, step, summarize, pictures)


def cue_conflict(classifier: Classifier, data: Data) -> Evaluator:
  """Whether shape or texture decides where the two disagree.

  Reference:
    Geirhos et al., "ImageNet-trained CNNs are biased towards texture", ICLR
    2019, Sec. 2.
  """

  def step(state: TrainState, batch: Batch) -> PyTree:
    if "texture" not in batch:
      raise InputError(
        'cue conflict needs examples with a "texture" label beside "label", '
        f"got {', '.join(sorted(batch))}."
      )
    logits = classifier.logits(state, batch["image"])
    return {
      "mask": batch["mask"],
      "shape": jnp.asarray(batch["label"]),
      "texture": jnp.asarray(batch["texture"]),
      "prediction": jnp.argmax(logits, axis=-1),
    }

  def count(outputs: Sequence[PyTree]) -> np.ndarray:
    rows = real_rows(outputs)
    counts = shape_bias.count_decisions(
      rows["prediction"],
      rows["shape"],
      rows["texture"],
      num_classes=len(classifier.classes),
    )
    return np.asarray(counts)

  def summarize(outputs: Sequence[PyTree]) -> Mapping[str, float]:
    counts = count(outputs).sum(axis=0)
    bias, decisions = shape_bias.shape_bias(counts)
    conflicts = max(1, counts.sum())
    return {
      "shape_bias": float(bias),
      "decisions": float(decisions),
      "shape_top1": counts[0] / conflicts,
      "texture_top1": counts[1] / conflicts,
    }

  def pictures(
    state: TrainState, outputs: Sequence[PyTree]
  ) -> Mapping[str, Figure]:
    del state
    return {"by class": _bias_by_class(count(outputs), classifier.classes)}

  return Evaluator(data, step, summarize, pictures)


def corruptions(
  classifier: Classifier,
  data: Data,
  *,
  names: Sequence[str],
  severities: Sequence[int],
  seed: int = 0,
) -> Evaluator:
  """The error on degraded images, by kind and severity.

  Reference:
    Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common
    Corruptions and Perturbations", ICLR 2019, Sec. 4.
  """
  _check_cases(names, severities)
  cases = [(name, severity) for name in names for severity in severities]

  def degraded() -> Iterator[Batch]:
    for number in range(len(cases)):
      for batch in data():
        rows = np.full(len(batch["label"]), number, np.int32)
        yield {**batch, "corruption": rows}

  def step(state: TrainState, batch: Batch) -> PyTree:
    # One draw per image, by its place in the data, not in the batch.
    keys = jax.vmap(jax.random.fold_in, (None, 0))(
      jax.random.key(seed), jnp.asarray(batch["index"])
    )
    images = jnp.asarray(batch["image"], jnp.float32)

    def branch(name, severity):
      one = lambda key, image: corruption.corrupt(
        key, image, name=name, severity=severity
      )
      return lambda: jax.vmap(one)(keys, images)

    number = jnp.asarray(batch["corruption"])
    images = jax.lax.switch(number[0], [branch(*case) for case in cases])
    logits = classifier.logits(state, images)
    labels = jnp.asarray(batch["label"])
    return {
      "mask": batch["mask"],
      "case": number,
      "wrong": 1 - classification.top_k_correct(logits, labels, k=1),
    }

  def table(outputs: Sequence[PyTree]) -> np.ndarray:
    rows = real_rows(outputs)
    errors = [
      _mean(rows["wrong"][rows["case"] == n]) for n in range(len(cases))
    ]
    return np.reshape(errors, (len(names), len(severities)))

  def summarize(outputs: Sequence[PyTree]) -> Mapping[str, float]:
    errors = table(outputs)
    out = {
      f"{name}_error": float(row.mean())
      for name, row in zip(names, errors, strict=True)
    }
    return {"mean_error": float(errors.mean()), **out}

  def pictures(
    state: TrainState, outputs: Sequence[PyTree]
  ) -> Mapping[str, Figure]:
    del state
    return {"severity": _curves(table(outputs), names, severities)}

  return Evaluator(degraded, step, summarize, pictures)


def _check_cases(names: Sequence[str], severities: Sequence[int]) -> None:
  if unknown := [name for name in names if name not in corruption.NAMES]:
    raise InputError(
      f"corruptions: there is no {unknown[0]!r}; there are: "
      + ", ".join(corruption.NAMES)
    )
  if not severities or not set(severities) <= {1, 2, 3, 4, 5}:
    raise InputError(
      f"severities must be some of 1 to 5, got {tuple(severities)}."
    )


def saliency(
  classifier: Classifier, data: Data, *, threshold: float = 0.5, shown: int = 8
) -> Evaluator:
  """How much of the image Grad-CAM marks for the class that is named.

  Reference:
    Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks", ICCV
    2017, Eq. 1 and 2.
  """

  def explain(state: TrainState, images: Array) -> tuple[Array, Array]:
    features = classifier.features(state, images)
    logits = classifier.head(state, features)
    named = jnp.argmax(logits, axis=-1)
    maps = class_activation.grad_cam(
      lambda f: classifier.head(state, f), features, named
    )
    return maps, named

  def step(state: TrainState, batch: Batch) -> PyTree:
    maps, named = explain(state, jnp.asarray(batch["image"]))
    return {
      "mask": batch["mask"],
      "right": named == jnp.asarray(batch["label"]),
      "spread": class_activation.spread(maps, threshold=threshold),
    }

  def summarize(outputs: Sequence[PyTree]) -> Mapping[str, float]:
    rows = real_rows(outputs)
    return {
      "spread_correct": _mean(rows["spread"][rows["right"] > 0]),
      "spread": _mean(rows["spread"]),
    }

  def pictures(
    state: TrainState, outputs: Sequence[PyTree]
  ) -> Mapping[str, Figure]:
    del outputs
    batches = data()
    with contextlib.closing(batches):
      batch = next(batches)
    real = np.flatnonzero(batch["mask"])[:shown]
    images = np.asarray(batch["image"])[real]
    maps, named = jax.jit(explain)(state, images)
    maps = class_activation.resize(
      class_activation.normalize(maps),
      height=images.shape[1],
      width=images.shape[2],
    )
    truth = np.asarray(batch["label"])[real]
    titles = [
      _title(classifier.classes, t, n)
      for t, n in zip(truth, np.asarray(named), strict=True)
    ]
    blank = [None] * len(images)
    sheet = report.image_sheet(
      [images, images],
      titles=[titles, [""] * len(images)],
      maps=[blank, list(np.asarray(maps))],
    )
    return {"grad-cam": sheet}

  return Evaluator(data, step, summarize, pictures)


def _title(classes: Sequence[str], truth: int, named: int) -> str:
  if truth == named or not 0 <= truth < len(classes):
    return classes[named]
  return f"{classes[truth]} as {classes[named]}"


def real_rows(outputs: Sequence[PyTree]) -> dict[str, np.ndarray]:
  """All rows that are no padding.

  Args:
    outputs: Of all batches; each has a "mask", and rows of that length.

  Returns:
    Rows by name, without the mask.
  """
  joined = {
    name: np.concatenate([np.asarray(out[name]) for out in outputs])
    for name in outputs[0]
  }
  real = joined.pop("mask") > 0
  return {name: rows[real] for name, rows in joined.items()}


def _mean(values: Any) -> float:
  values = np.asarray(values, np.float64)
  return float(values.mean()) if values.size else float("nan")


def _confusion(
  labels: np.ndarray, predictions: np.ndarray, classes: Sequence[str]
) -> Figure:
  table = np.asarray(
    classification.confusion_matrix(
      labels, predictions, num_classes=len(classes)
    ),
    np.float64,
  )
  table /= np.maximum(table.sum(axis=1, keepdims=True), 1)
  figure = Figure(figsize=(5, 4.5), layout="constrained")
  axes = figure.subplots()
  shown = axes.imshow(table, cmap="Blues", vmin=0, vmax=1)
  if len(classes) <= 32:
    axes.set_xticks(range(len(classes)), classes, rotation=90, fontsize=7)
    axes.set_yticks(range(len(classes)), classes, fontsize=7)
  axes.set_xlabel("named")
  axes.set_ylabel("true")
  figure.colorbar(shown, label="share of the true class")
  return figure


def _calibration(confidence: np.ndarray, right: np.ndarray) -> Figure:
  table = np.asarray(classification.reliability_table(confidence, right))
  bins = len(table)
  heights = table[:, 2] / np.maximum(table[:, 0], 1)
  figure = Figure(figsize=(4, 3.6), layout="constrained")
  axes = figure.subplots()
  edges = np.arange(bins) / bins
  axes.bar(edges, heights, width=1 / bins, align="edge", edgecolor="white")
  axes.plot([0, 1], [0, 1], "--", color="gray")
  axes.set_xlim(0, 1)
  axes.set_ylim(0, 1)
  axes.set_xlabel("confidence")
  axes.set_ylabel("accuracy")
  return figure


def _bias_by_class(counts: np.ndarray, classes: Sequence[str]) -> Figure:
  by_class, _ = shape_bias.shape_bias(counts)
  over_all, _ = shape_bias.shape_bias(counts.sum(axis=0))
  figure = Figure(figsize=(5, 0.25 * len(classes) + 1), layout="constrained")
  axes = figure.subplots()
  order = np.arange(len(classes))
  axes.scatter(np.asarray(by_class), order)
  axes.axvline(float(over_all), linestyle="--")
  axes.set_yticks(order, classes, fontsize=8)
  axes.set_xlim(-0.02, 1.02)
  axes.invert_yaxis()
  axes.set_xlabel("share of shape among the decisions (dashed: all classes)")
  axes.grid(axis="y", alpha=0.3)
  return figure


def _curves(
  errors: np.ndarray, names: Sequence[str], severities: Sequence[int]
) -> Figure:
  figure = Figure(figsize=(5.5, 3.6), layout="constrained")
  axes = figure.subplots()
  for name, row in zip(names, errors, strict=True):
    axes.plot(severities, row, marker="o", label=name)
  axes.plot(severities, errors.mean(axis=0), "k--", label="mean")
  axes.set_xticks(list(severities))
  axes.set_ylim(0, 1)
  axes.set_xlabel("severity")
  axes.set_ylabel("error")
  axes.legend(fontsize=7, ncols=2)
  return figure
