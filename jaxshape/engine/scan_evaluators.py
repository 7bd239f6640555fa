"""Evaluators for any network that names the points of LiDAR scans.

Every step gives tables of counts, which add up, so that no number depends on
the batch size.
"""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import dataclasses

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure
import numpy as np

from jaxshape.data import stream
from jaxshape.engine import scan_pictures
from jaxshape.metrics import segmentation
from jaxshape.system import Evaluator, TrainState
from jaxshape.typing import Array, Batch, PyTree

Data = Callable[[], stream.Batches]
# Class 0 is "unlabeled" in every set of labels.
UNLABELED = 0


@dataclasses.dataclass(frozen=True)
class Segmenter:
  """A network that names the points of scans.

  Attributes:
    points: `(state, batch) -> (labels [batch, points], ...)`, one per way of
      refining the answer; the first is the plain one, the last what `predict`
      gives.
    ways: Names of these.
    image: `(state, batch) -> {"prediction", "truth", "range"}`, each
      `[batch, height, width]`, for networks that work on range images; empty
      pixels have truth 0 and range -1. None for others.
    classes: Names of the labels; 0 is "unlabeled".
    colors: `[classes, 3]`, RGB 0..255.
    ignore: Classes that do not count, 0 among them.
  """

  points: Callable[[TrainState, Batch], Sequence[Array]]
  ways: Sequence[str]
  image: Callable[[TrainState, Batch], Mapping[str, Array]] | None
  classes: Sequence[str]
  colors: np.ndarray
  ignore: Sequence[int] = (UNLABELED,)


def scans(segmenter: Segmenter, data: Data) -> Evaluator:
  """IoU by class, its mean and the accuracy, on points and on range images.

  `mIoU` is the benchmark's: naming a labelled point "unlabeled" is wrong. Names
  of refinements follow: `mIoU_knn`; `mIoU_image` is counted on pixels.
  `IoU/<class>` is that of what `predict` gives, and so is `mIoU_training_code`,
  which public training code reports: there, naming a labelled point "unlabeled"
  is free, as it is in `acc` by either code.

  Note:
    Both public codes count a class that no label has as an IoU of 0. Here it is
    left out of the means, so that parts of a data set can be measured; where
    every class is met, as in whole splits, the numbers are the same.

  Reference:
    Behley et al., "SemanticKITTI: A Dataset for Semantic Scene Understanding of
    LiDAR Sequences", ICCV 2019, Sec. 4.1.
  """
  count, ignore = len(segmenter.classes), tuple(segmenter.ignore)

  def table(truth: Array, prediction: Array, rows: Array) -> Array:
    mask = jnp.broadcast_to(
      rows.reshape(-1, *[1] * (truth.ndim - 1)) > 0, truth.shape
    )
    return segmentation.confusion_matrix(
      truth, prediction, num_classes=count, mask=mask
    )

  def step(state: TrainState, batch: Batch) -> PyTree:
    rows = jnp.asarray(batch["mask"])
    truth = jnp.where(batch["valid"], batch["label"], UNLABELED)
    said = segmenter.points(state, batch)
    out = {
      name: table(truth, labels, rows)
      for name, labels in zip(segmenter.ways, said, strict=True)
    }
    if segmenter.image is not None:
      image = segmenter.image(state, batch)
      out["image"] = table(image["truth"], image["prediction"], rows)
    return out

  def sums(outputs: Sequence[PyTree]) -> dict[str, np.ndarray]:
    # Sixty-four bits: a data set has more points than 2^31.
    return {
      name: np.sum([np.asarray(out[name], np.int64) for out in outputs], axis=0)
      for name in outputs[0]
    }

  def summarize(outputs: Sequence[PyTree]) -> Mapping[str, float]:
    tables = sums(outputs)
    numbers: dict[str, float] = {}
    for name in (*segmenter.ways, *(["image"] if "image" in tables else [])):
      end = "" if name == segmenter.ways[0] else f"_{name}"
      numbers |= {
        f"mIoU{end}": mean_iou(tables[name], ignore=ignore),
        f"acc{end}": float(segmentation.accuracy(tables[name], ignore=ignore)),
      }
    last = tables[segmenter.ways[-1]]
    numbers["mIoU_training_code"] = mean_iou(
      last, ignore=ignore, convention="public"
    )
    by_class, seen = _iou(last, ignore, "benchmark"), _seen(last, ignore)
    for number, name in enumerate(segmenter.classes):
      if seen[number]:
        numbers[f"IoU/{name}"] = float(by_class[number])
    return numbers

  def pictures(
    state: TrainState, outputs: Sequence[PyTree]
  ) -> Mapping[str, Figure]:
    last = sums(outputs)[segmenter.ways[-1]]
    by_class, seen = _iou(last, ignore, "benchmark"), _seen(last, ignore)
    figures = {
      "by class": scan_pictures.bars(
        {
          name: float(value)
          for name, value, there in zip(
            segmenter.classes, by_class, seen, strict=True
          )
          if there
        },
        label="IoU on points",
      )
    }
    batches = data()
    with contextlib.closing(batches):
      batch = {k: np.asarray(v)[:1] for k, v in next(batches).items()}
    return figures | show(segmenter, state, batch)

  return Evaluator(data, step, summarize, pictures)


def show(
  segmenter: Segmenter, state: TrainState, batch: Batch
) -> dict[str, Figure]:
  """What the network says of the first scan of a batch.

  Args:
    segmenter: The network.
    state: Its state.
    batch: Scans; where no label is known, no errors are drawn.

  Returns:
    The scan as range images and from above.
  """
  said = jax.jit(segmenter.points)(state, batch)[-1]
  valid = np.asarray(batch["valid"][0], bool)
  points = np.asarray(batch["points"][0])[valid]
  said = np.asarray(said[0])[valid]
  truth = np.asarray(batch["label"][0])[valid] if "label" in batch else None
  known = truth is not None and bool((truth != UNLABELED).any())
  colors = segmenter.colors
  painted = {"prediction": scan_pictures.paint(said, colors)}
  there = set(np.unique(said))
  if known:
    assert truth is not None
    painted = {"labels": scan_pictures.paint(truth, colors), **painted}
    painted["wrong"] = scan_pictures.difference(said, truth)
    there |= set(np.unique(truth))
  order = sorted(there)
  figures = {
    "from above": scan_pictures.from_above(
      points,
      painted,
      classes=[str(segmenter.classes[int(i)]) for i in order],
      colors=colors[order],
    )
  }
  if segmenter.image is not None:
    image = {
      k: np.asarray(v[0])
      for k, v in jax.jit(segmenter.image)(state, batch).items()
    }
    there = image["range"] >= 0
    rows = {"range": scan_pictures.depth(image["range"], there)}
    if known:
      rows["labels"] = scan_pictures.paint(image["truth"], colors, there)
    rows["prediction"] = scan_pictures.paint(image["prediction"], colors, there)
    if known:
      rows["wrong"] = scan_pictures.difference(
        image["prediction"], image["truth"], there
      )
    figures["range image"] = scan_pictures.sheet(rows)
  return figures


def _iou(
  table: np.ndarray, ignore: Sequence[int], convention: str
) -> np.ndarray:
  return np.asarray(
    segmentation.iou(table, ignore=ignore, convention=convention)
  )


def _seen(table: np.ndarray, ignore: Sequence[int]) -> np.ndarray:
  """Which of the classes that count have labels."""
  seen = table.sum(axis=1) > 0
  seen[list(ignore)] = False
  return seen


def mean_iou(
  table: np.ndarray,
  *,
  ignore: Sequence[int] = (UNLABELED,),
  convention: str = "benchmark",
) -> float:
  """The mean IoU over the classes that the data hold.

  The benchmark counts a class that nobody has as 0; on a part of the data that
  says nothing of a network.

  Args:
    table: Counts; rows are labels, columns predictions.
    ignore: Classes that do not count.
    convention: As in `metrics.segmentation`.

  Returns:
    A fraction; NaN if no class that counts has labels.
  """
  seen = _seen(table, ignore)
  values = _iou(table, ignore, convention)
  return float(values[seen].mean()) if seen.any() else float("nan")
