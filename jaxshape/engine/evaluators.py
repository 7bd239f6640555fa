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
from jaxshape.engine import classifier_pictures, comparison, report
from jaxshape.errors import InputError
from jaxshape.explanations import class_activation
from jaxshape.filters import corruption
from jaxshape.metrics import classification, published, robustness, shape_bias
from jaxshape.system import Evaluator, TrainState
from jaxshape.typing import Array, Batch, PyTree

Images = Array | np.ndarray
Case = tuple[str, int]
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


def of_logits(
  fn: Callable[[Any], Any], *, classes: Sequence[str]
) -> Classifier:
  """A classifier from any function of images.

  It looks at no state: None will do. What is shown of a network's two halves
  (`saliency`, `dimensionality`) needs them, and is of no meaning here.

  Args:
    fn: From images 0..255, [batch, height, width, 3], uint8 or float, to logits
      [batch, classes]. Of JAX, or, where `measure` evaluates, of any library
      that NumPy can read.
    classes: Names of the classes, in the order of the logits.

  Returns:
    The classifier.
  """

  def features(state: TrainState, images: Images) -> Array:
    del state
    logits = jnp.asarray(fn(images), jnp.float32)
    if logits.shape != (len(images), len(classes)):
      raise InputError(
        "the function must give logits [images, classes], "
        f"[{len(images)}, {len(classes)}], got {list(logits.shape)}."
      )
    return logits[:, None, None]

  return Classifier(features, lambda _, x: x[..., 0, 0, :], classes)


def measure(
  evaluator: Evaluator, state: TrainState | None = None
) -> tuple[dict[str, float], list[PyTree]]:
  """Runs an evaluator here and now: `runtime.evaluate` without compiling.

  Args:
    evaluator: Its step may call what JAX cannot trace.
    state: What its step takes; None for a classifier of `of_logits`.

  Returns:
    The numbers, and the outputs for its `pictures`.

  Raises:
    InputError: It got no batch.
  """
  step: Callable[..., PyTree] = evaluator.step
  outputs = [jax.device_get(step(state, batch)) for batch in evaluator.data()]
  if not outputs:
    raise InputError("an evaluator got no batch; its data set is empty.")
  summary = evaluator.summarize(outputs)
  numbers = {name: float(value) for name, value in summary.items()}
  if evaluator.then is not None:
    numbers |= measure(evaluator.then(outputs), state)[0]
  return numbers, outputs


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
      "confusion": classifier_pictures.confusion(
        rows["label"], rows["prediction"], classifier.classes
      ),
      "calibration": classifier_pictures.calibration(
        rows["confidence"], rows["top1"]
      ),
    }

  return Evaluator(data, step, summarize, pictures)


def cue_conflict(
  classifier: Classifier,
  data: Data,
  *,
  decide: Callable[[Array], Array] | None = None,
  classes: Sequence[str] | None = None,
  beside: Sequence[published.Value] = (),
  shown: int = 16,
) -> Evaluator:
  """Whether shape or texture decides where the two disagree.

  Args:
    classifier: The network.
    data: With "label", the class of the shape, and "texture", that of the
      texture; -1 is no class. Where one is none, no answer could name it, and
      the image is left out as if there were no conflict.
    decide: From logits to a decision; the highest by default.
    classes: What is decided between, if not the classifier's classes.
    beside: Shape biases of others, to be drawn with this one.
    shown: So many images in conflict are shown with what they were named.

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
      "index": batch["index"],
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
    plot = plots(outputs)["by class"]
    figure = comparison.draw({"": plot})
    axes = figure.axes[0]
    decided = count(outputs)[:, :2].sum(axis=1)
    axes.set_yticks(
      range(len(named)),
      [f"{name} ({n})" for name, n in zip(named, decided, strict=True)],
    )
    axes.set_ylabel("class (decisions)")
    for row in beside:
      if row.name == published.PEOPLE:
        axes.axvline(row.value, linestyle=":", color="black")
        place = row.value - 0.01, len(named) - 0.6
        axes.text(*place, row.name, ha="right", fontsize=8)
    drawn = {"by class": figure}
    if beside and plot.whole is not None:
      drawn["published"] = classifier_pictures.beside(
        plot.whole, beside, value="shape bias"
      )
    sheet = classifier_pictures.decisions(
      data, real_rows(outputs), named, most=shown
    )
    return drawn if sheet is None else {**drawn, "decisions": sheet}

  return Evaluator(data, step, summarize, pictures, plots)


def corruptions(
  classifier: Classifier,
  data: Data,
  *,
  names: Sequence[str],
  severities: Sequence[int],
  seed: int = 0,
  baseline: robustness.Errors | None = None,
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
      by default AlexNet's, for the 15 corruptions of ImageNet-C, if there are
      ImageNet's 1,000 classes, and else none.
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
    tuple((n, s) for n in names for s in severities),
    _baseline(classifier, baseline),
    baseline_clean_error,
  )
  # The last is no corruption, if that can be compared.
  cases = [*measured.cases, *([("", 0)] if measured.complete else [])]

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
    return {"severity": measured.curves(outputs)}

  return Evaluator(degraded, step, measured.summarize, pictures, measured.plots)


def corrupted(
  classifier: Classifier,
  data: Data,
  *,
  cases: Callable[[], Sequence[Case]],
  baseline: robustness.Errors | None = None,
) -> Evaluator:
  """The error on published corrupted images, by kind and severity.

  Args:
    classifier: The network.
    data: With "corruption", the number of each image's case, as
      `data/corrupted.py` gives all of them.
    cases: Gives names and severities, in the order of their numbers; called
      when the data have been read.
    baseline: As in `corruptions`.

  Returns:
    The evaluator. "mce" is a fraction of the baseline's errors, where all that
    it has is there; "mean_15_error" is the mean over the 15 corruptions of
    ImageNet-C, where there are more.

  Reference:
    Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common
    Corruptions and Perturbations", ICLR 2019, Sec. 4.
  """

  def measured() -> _Corruptions:
    return _Corruptions(tuple(cases()), _baseline(classifier, baseline))

  def step(state: TrainState, batch: Batch) -> PyTree:
    require(batch, "corruption", "errors on corrupted images")
    logits = classifier.logits(state, batch["image"])
    labels = jnp.asarray(batch["label"])
    return {
      "mask": batch["mask"],
      "case": jnp.asarray(batch["corruption"]),
      "wrong": 1 - classification.top_k_correct(logits, labels, k=1),
    }

  def pictures(
    state: TrainState, outputs: Sequence[PyTree]
  ) -> Mapping[str, Figure]:
    del state
    numbers = measured().summarize(outputs)
    drawn = {"severity": measured().curves(outputs)}
    if "mce" in numbers and baseline is None:
      drawn["published"] = classifier_pictures.beside(
        numbers["mce"], published.CORRUPTION_ERRORS, value="mCE"
      )
    return drawn

  return Evaluator(
    data,
    step,
    lambda outputs: measured().summarize(outputs),
    pictures,
    lambda outputs: measured().plots(outputs),
  )


def _baseline(
  classifier: Classifier, given: robustness.Errors | None
) -> robustness.Errors | None:
  if given is None and len(classifier.classes) == 1000:
    return robustness.ALEXNET_ERRORS
  return given


class _Corruptions(NamedTuple):
  """Which corruptions are measured, and what comes out."""

  cases: tuple[Case, ...]
  baseline: robustness.Errors | None
  baseline_clean_error: float = math.nan

  @property
  def names(self) -> list[str]:
    return list(dict.fromkeys(name for name, _ in self.cases))

  @property
  def severities(self) -> list[int]:
    return list(dict.fromkeys(severity for _, severity in self.cases))

  @property
  def complete(self) -> bool:
    """Whether all is there that can be compared with the baseline."""
    if self.baseline is None or sorted(self.severities) != [1, 2, 3, 4, 5]:
      return False
    needed = {(name, s) for name in self.baseline for s in self.severities}
    return needed <= set(self.cases)

  def errors(self, outputs: Sequence[PyTree]) -> tuple[np.ndarray, float]:
    """Errors [names, severities], and that on plain images; NaN for none."""
    rows = real_rows(outputs)
    of = lambda number: _mean(rows["wrong"][rows["case"] == number])
    table = np.full((len(self.names), len(self.severities)), np.nan)
    for number, (name, severity) in enumerate(self.cases):
      place = self.names.index(name), self.severities.index(severity)
      table[place] = of(number)
    return table, of(len(self.cases))

  def summarize(self, outputs: Sequence[PyTree]) -> Mapping[str, float]:
    errors, clean = self.errors(outputs)
    table = dict(zip(self.names, errors, strict=True))
    out = {"mean_error": _there(errors)}
    if set(robustness.ALEXNET_ERRORS) < set(table):
      those = [table[name] for name in robustness.ALEXNET_ERRORS]
      out["mean_15_error"] = _there(np.stack(those))
    compared = [table.get(name, math.nan) for name in self.baseline or ()]
    if self.complete and all(np.isfinite(row).all() for row in compared):
      options: Any = {"baseline": self.baseline, "severities": self.severities}
      if measured := math.isfinite(clean):
        out["clean_error"] = clean
      out["mce"] = 0.01 * robustness.mean_corruption_error(table, **options)
      if measured:
        options["baseline_clean_error"] = self.baseline_clean_error
        out["relative_mce"] = 0.01 * robustness.relative_mean_corruption_error(
          table, clean, **options
        )
    for name, row in table.items():
      out[f"{name}_error"] = _there(row)
    for severity, column in zip(self.severities, errors.T, strict=True):
      out[f"severity_{severity}_top1"] = 1 - _there(column)
    return out

  def plots(self, outputs: Sequence[PyTree]) -> Mapping[str, comparison.Plot]:
    errors, _ = self.errors(outputs)
    by_severity = comparison.Plot(
      "lines",
      self.severities,
      [_there(column) for column in errors.T],
      place="severity",
      value="error, mean over corruptions",
    )
    by_name = comparison.Plot(
      "bars",
      self.names,
      [_there(row) for row in errors],
      place="corruption",
      value="error, mean over severities",
    )
    return {"severity": by_severity, "kind": by_name}

  def curves(self, outputs: Sequence[PyTree]) -> Figure:
    errors, _ = self.errors(outputs)
    rows = dict(zip(self.names, errors.tolist(), strict=True))
    mean = [_there(column) for column in errors.T]
    return classifier_pictures.curves({**rows, "mean": mean}, self.severities)


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


def _there(values: np.ndarray) -> float:
  """The mean of what is no NaN."""
  return _mean(values[np.isfinite(values)])
