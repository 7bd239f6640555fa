"""Evaluators for any classifier: what a system asks for by naming it.

Every step gives rows with their mask, or sums, so that no number depends on the
batch size. Images are 0..255, uint8 or float.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure
import numpy as np

from jaxshape.data import stream
from jaxshape.engine import comparison, report
from jaxshape.errors import InputError
from jaxshape.explanations import class_activation
from jaxshape.filters import corruption
from jaxshape.metrics import classification, robustness, shape_bias
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
  """Top-1, top-5, confidence and entropy where it is right, calibration.

  "mean_class_accuracy" weighs classes alike, however many images they have; it
  is what Caltech-101 and data of several domains are compared by.
  """

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
    by_class = [
      _mean(right[rows["label"] == label]) for label in np.unique(rows["label"])
    ]
    return {
      "top1": _mean(rows["top1"]),
      "mean_class_accuracy": _mean(by_class),
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


def cue_conflict(
  classifier: Classifier,
  data: Data,
  *,
  decide: Callable[[Array], Array] | None = None,
  classes: Sequence[str] | None = None,
) -> Evaluator:
  """Whether shape or texture decides where the two disagree.

  Args:
    classifier: The network.
    data: With "label", the class of the shape, and "texture", that of the
      texture; -1 is no class. Where one is none, no answer could name it, and
      the image is left out as if there were no conflict.
    decide: From logits to a decision; the highest by default.
    classes: What is decided between, if not the classifier's classes.

  Returns:
    The evaluator. "decisions" is how many images were named by their shape or
    their texture, "decided_share" which part of those in conflict, which are
    also what "shape_top1" and "texture_top1" are taken over; "shape_match" and
    "texture_match" are divided by all images, in conflict or not, as in the
    public protocol.

  Reference:
    Geirhos et al., "ImageNet-trained CNNs are biased towards texture", ICLR
    2019, Sec. 2.
  """
  named = classifier.classes if classes is None else classes

  def step(state: TrainState, batch: Batch) -> PyTree:
    require(batch, "texture", "cue conflict")
    logits = classifier.logits(state, batch["image"])
    return {
      "mask": batch["mask"],
      "shape": jnp.asarray(batch["label"]),
      "texture": jnp.asarray(batch["texture"]),
      "prediction": decide(logits) if decide else jnp.argmax(logits, axis=-1),
    }

  def count(outputs: Sequence[PyTree]) -> np.ndarray:
    rows = real_rows(outputs)
    counts = shape_bias.count_decisions(
      rows["prediction"],
      rows["shape"],
      rows["texture"],
      num_classes=len(named),
      mask=rows["texture"] >= 0,
    )
    return np.asarray(counts)

  def summarize(outputs: Sequence[PyTree]) -> Mapping[str, float]:
    counts = count(outputs).sum(axis=0)
    bias, decisions = shape_bias.shape_bias(counts)
    conflicts = max(1, counts.sum())
    trials = max(1, len(real_rows(outputs)["shape"]))
    return {
      "shape_bias": float(bias),
      "decisions": float(decisions),
      "decided_share": float(decisions) / conflicts,
      "shape_top1": counts[0] / conflicts,
      "texture_top1": counts[1] / conflicts,
      "shape_match": counts[0] / trials,
      "texture_match": counts[1] / trials,
    }

  def plots(outputs: Sequence[PyTree]) -> Mapping[str, comparison.Plot]:
    counts = count(outputs)
    by_class, _ = shape_bias.shape_bias(counts)
    over_all, _ = shape_bias.shape_bias(counts.sum(axis=0))
    bias = comparison.Plot(
      "rows",
      tuple(named),
      np.asarray(by_class).tolist(),
      place="class",
      value="share of shape among the decisions",
      whole=float(over_all),
      other="share of texture",
    )
    return {"by class": bias}

  def pictures(
    state: TrainState, outputs: Sequence[PyTree]
  ) -> Mapping[str, Figure]:
    del state
    return {
      name: comparison.draw({"": plot}) for name, plot in plots(outputs).items()
    }

  return Evaluator(data, step, summarize, pictures, plots)


def corruptions(
  classifier: Classifier,
  data: Data,
  *,
  names: Sequence[str],
  severities: Sequence[int],
  seed: int = 0,
  baseline: robustness.Errors = robustness.ALEXNET_ERRORS,
  baseline_clean_error: float = robustness.ALEXNET_CLEAN_ERROR,
) -> Evaluator:
  """The error on degraded images, by kind and severity.

  They are degraded here, on the device, not read from the published files,
  which were stored as JPEG once more: compare only like with like.

  Args:
    classifier: The network.
    data: Plain images.
    names: Of `filters.corruption`.
    severities: Some of 1 to 5.
    seed: Of what the corruptions draw, for each image by its number.
    baseline: Errors of another network, by corruption, at severities 1 to 5;
      by default AlexNet's on ImageNet, for the 15 corruptions of ImageNet-C.
    baseline_clean_error: That of the other network on plain images.

  Returns:
    The evaluator. Where all corruptions of the baseline are measured, at all
    severities, "mce" and "relative_mce" are fractions of its errors.

  Reference:
    Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common
    Corruptions and Perturbations", ICLR 2019, Sec. 4.
  """
  _check_cases(names, severities)
  measured = _Corruptions(
    tuple(names), tuple(severities), baseline, baseline_clean_error
  )
  cases = measured.cases()

  def degraded() -> Iterator[Batch]:
    for number in range(len(cases)):
      for batch in data():
        rows = np.full(len(batch["label"]), number, np.int32)
        yield {**batch, "corruption": rows}

  def step(state: TrainState, batch: Batch) -> PyTree:
    keys = keys_of(seed, batch)
    images = jnp.asarray(batch["image"], jnp.float32)

    def branch(name, severity):
      one = lambda key, image: corruption.corrupt(
        key, image, name=name, severity=severity
      )
      return lambda: jax.vmap(one)(keys, images) if name else images

    number = jnp.asarray(batch["corruption"])
    images = jax.lax.switch(number[0], [branch(*case) for case in cases])
    logits = classifier.logits(state, images)
    labels = jnp.asarray(batch["label"])
    return {
      "mask": batch["mask"],
      "case": number,
      "wrong": 1 - classification.top_k_correct(logits, labels, k=1),
    }

  def pictures(
    state: TrainState, outputs: Sequence[PyTree]
  ) -> Mapping[str, Figure]:
    del state
    errors, _ = measured.errors(outputs)
    return {"severity": _curves(errors, names, severities)}

  return Evaluator(degraded, step, measured.summarize, pictures, measured.plots)


class _Corruptions(NamedTuple):
  """Which corruptions are measured, and what comes out."""

  names: tuple[str, ...]
  severities: tuple[int, ...]
  baseline: robustness.Errors
  baseline_clean_error: float

  @property
  def complete(self) -> bool:
    """Whether all is there that can be compared with the baseline."""
    known = set(self.baseline) <= set(self.names)
    return known and sorted(self.severities) == [1, 2, 3, 4, 5]

  def cases(self) -> list[tuple[str, int]]:
    """Names and severities; the last is no corruption if they are complete."""
    cases = [(n, s) for n in self.names for s in self.severities]
    return [*cases, ("", 0)] if self.complete else cases

  def errors(self, outputs: Sequence[PyTree]) -> tuple[np.ndarray, float]:
    """Errors [names, severities], and that on plain images, or NaN."""
    rows = real_rows(outputs)
    errors = [
      _mean(rows["wrong"][rows["case"] == n]) for n in range(len(self.cases()))
    ]
    clean = errors.pop() if self.complete else math.nan
    return np.reshape(errors, (len(self.names), len(self.severities))), clean

  def summarize(self, outputs: Sequence[PyTree]) -> Mapping[str, float]:
    errors, clean = self.errors(outputs)
    out = {"mean_error": float(errors.mean())}
    if math.isfinite(clean):
      table = dict(zip(self.names, errors, strict=True))
      out["clean_error"] = clean
      out["mce"] = 0.01 * robustness.mean_corruption_error(
        table, baseline=self.baseline, severities=self.severities
      )
      out["relative_mce"] = 0.01 * robustness.relative_mean_corruption_error(
        table,
        clean,
        baseline=self.baseline,
        baseline_clean_error=self.baseline_clean_error,
        severities=self.severities,
      )
    for name, row in zip(self.names, errors, strict=True):
      out[f"{name}_error"] = float(row.mean())
    for severity, column in zip(self.severities, errors.T, strict=True):
      out[f"severity_{severity}_top1"] = 1 - float(column.mean())
    return out

  def plots(self, outputs: Sequence[PyTree]) -> Mapping[str, comparison.Plot]:
    errors, _ = self.errors(outputs)
    by_severity = comparison.Plot(
      "lines",
      self.severities,
      errors.mean(axis=0).tolist(),
      place="severity",
      value="error, mean over corruptions",
    )
    by_name = comparison.Plot(
      "bars",
      self.names,
      errors.mean(axis=1).tolist(),
      place="corruption",
      value="error, mean over severities",
    )
    return {"severity": by_severity, "kind": by_name}


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
    batch = first_rows(data, most=shown)
    images = batch["image"]
    maps, named = jax.jit(explain)(state, images)
    maps = class_activation.resize(
      class_activation.normalize(maps),
      height=images.shape[1],
      width=images.shape[2],
    )
    titles = [
      _title(classifier.classes, truth, n)
      for truth, n in zip(batch["label"], np.asarray(named), strict=True)
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


def first_rows(data: Data, *, most: int) -> dict[str, np.ndarray]:
  """The first rows that are no padding, for pictures.

  Args:
    data: Of an evaluator.
    most: So many at most; fewer where the first batch has fewer.

  Returns:
    Rows by name.

  Raises:
    InputError: There are none.
  """
  with contextlib.closing(data()) as batches:
    for batch in batches:
      real = np.flatnonzero(batch["mask"])[:most]
      if real.size:
        return {name: np.asarray(rows)[real] for name, rows in batch.items()}
  raise InputError("all examples of an evaluator are damaged.")


def require(batch: Batch, name: str, what: str) -> None:
  """Refuses examples without what an evaluator reads.

  Args:
    batch: The examples.
    name: What they must have.
    what: Needs it.

  Raises:
    InputError: They do not have it.
  """
  if name not in batch:
    raise InputError(
      f'{what} needs examples with "{name}", got {", ".join(sorted(batch))}.'
    )


def keys_of(seed: int, batch: Batch) -> Array:
  """A key for each image, by its place in the data, not in the batch."""
  return jax.vmap(jax.random.fold_in, (None, 0))(
    jax.random.key(seed), jnp.asarray(batch["index"])
  )


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
