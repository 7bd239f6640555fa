"""How well the pixels or points of a scan are labelled, class by class.

Everything follows from one table C of counts, whose rows are labels and whose
columns are predictions. Tables of batches, hosts and devices add up; add those
of a whole data set in NumPy, whose integers hold 64 bits.

Two conventions are in use for classes that are ignored, such as "unlabeled":
"public", that of the training code of RangeNet++ and SqueezeSegV3, empties
their rows and their columns, so that predicting an ignored class costs nothing;
"benchmark", that of SemanticKITTI's own evaluation, empties their rows only, so
that it counts as a miss. Of the table with these emptied, for each class k:

  tp_k = C_kk, fn_k = sum_j C_kj - tp_k, fp_k = sum_j C_jk - tp_k.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxshape import images
from jaxshape.errors import InputError
from jaxshape.typing import (
  Array,
  ArrayLike,
  Bool,
  Float,
  Int,
  Integer,
  Num,
  Size,
  typed,
)

Mask = Bool[ArrayLike, "*shape"] | Num[ArrayLike, "*shape"]
Table = Num[ArrayLike, "classes classes"]


@typed
def confusion_matrix(
  labels: Integer[ArrayLike, "*shape"],
  predictions: Integer[ArrayLike, "*shape"],
  *,
  num_classes: Size,
  mask: Mask | None = None,
) -> Int[Array, "{num_classes} {num_classes}"]:
  """Counts how often each class was taken for each other one.

  Args:
    labels: One per pixel or point, in any shape; those outside
      0..num_classes - 1 are not counted.
    predictions: Likewise.
    num_classes: Number of classes, with those that are ignored later.
    mask: 0 where a pixel is empty or a point is padding.

  Returns:
    Counts; rows are labels, columns predictions. A sum over batches.

  Raises:
    ValueError: `num_classes` is below 1.

  Reference:
    Behley et al., "SemanticKITTI: A Dataset for Semantic Scene Understanding of
    LiDAR Sequences", ICCV 2019, Sec. 4.
  """
  if isinstance(num_classes, bool) or num_classes < 1:
    raise ValueError(f"num_classes must be 1 or more, got {num_classes}.")
  labels, predictions = jnp.asarray(labels), jnp.asarray(predictions)
  counted = (labels >= 0) & (labels < num_classes)
  counted &= (predictions >= 0) & (predictions < num_classes)
  if mask is not None:
    counted &= jnp.asarray(mask) != 0
  size = num_classes**2
  # Small unsigned types would not hold the number of a cell.
  labels, predictions = labels.astype(jnp.int32), predictions.astype(jnp.int32)
  cell = jnp.where(counted, labels * num_classes + predictions, size)
  table = jnp.zeros(size, jnp.int32).at[cell.reshape(-1)].add(1, mode="drop")
  return table.reshape(num_classes, num_classes)


@typed
def iou(
  confusion: Table,
  *,
  ignore: Sequence[int] = (0,),
  convention: str = "public",
  absent: str = "zero",
) -> Float[Array, " classes"]:
  """The intersection over union of each class, tp / (tp + fp + fn).

  Args:
    confusion: From `confusion_matrix`, summed over the batches.
    ignore: Classes that do not count; their own entries are 0.
    convention: "public" or "benchmark", as above.
    absent: What a class gets that is neither among the labels nor among the
      predictions: "zero", as from both public codes, or "skip", NaN.

  Returns:
    One number per class, 0..1.

  Raises:
    ValueError: An option is outside its range.
    InputError: A count is negative or not finite.

  Reference:
    Behley et al., "SemanticKITTI: A Dataset for Semantic Scene Understanding of
    LiDAR Sequences", ICCV 2019, Eq. 1.
  """
  tp, labelled, predicted, _ = _sums(confusion, ignore, convention)
  _check_absent(absent)
  other = 0.0 if absent == "zero" else jnp.nan
  return _ratio(tp, labelled + predicted - tp, other)


@typed
def mean_iou(
  confusion: Table,
  *,
  ignore: Sequence[int] = (0,),
  convention: str = "public",
  absent: str = "zero",
) -> Float[Array, ""]:
  """The mean of `iou` over the classes that are not ignored.

  Args:
    confusion: From `confusion_matrix`, summed over the batches.
    ignore: Classes that do not count.
    convention: "public" or "benchmark", as above.
    absent: Whether a class that does not occur counts as 0, "zero", as in both
      public codes, or not at all, "skip".

  Returns:
    mIoU, 0..1; NaN if `absent` leaves no class.

  Raises:
    ValueError: An option is outside its range.
    InputError: A count is negative or not finite.

  Reference:
    Behley et al., "SemanticKITTI: A Dataset for Semantic Scene Understanding of
    LiDAR Sequences", ICCV 2019, Eq. 1.
  """
  each = iou(confusion, ignore=ignore, convention=convention, absent=absent)
  included = _included(ignore, len(each))
  counted = included & ~jnp.isnan(each)
  number = jnp.sum(counted)
  return _ratio(jnp.sum(jnp.where(counted, each, 0)), number, jnp.nan)


@typed
def accuracy(
  confusion: Table, *, ignore: Sequence[int] = (0,)
) -> Float[Array, ""]:
  """The share of right predictions among those that are not ignored.

  sum_k tp_k / sum_k (tp_k + fp_k) over the classes k that are not ignored. Both
  public codes compute it so: a pixel counts if neither its label nor its
  prediction is ignored, and the two conventions agree.

  Args:
    confusion: From `confusion_matrix`, summed over the batches.
    ignore: Classes that do not count.

  Returns:
    The accuracy, 0..1; 0 if nothing was counted.

  Raises:
    ValueError: `ignore` names something else than classes.
    InputError: A count is negative or not finite.

  Reference:
    Behley et al., "SemanticKITTI: A Dataset for Semantic Scene Understanding of
    LiDAR Sequences", ICCV 2019, Sec. 4.
  """
  tp, _, predicted, included = _sums(confusion, ignore, "public")
  total = jnp.sum(jnp.where(included, predicted, 0))
  return _ratio(jnp.sum(tp), total, 0.0)


@typed
def precision(
  confusion: Table,
  *,
  ignore: Sequence[int] = (0,),
  absent: str = "zero",
) -> Float[Array, " classes"]:
  """How much of what is called a class belongs to it, tp / (tp + fp).

  Args:
    confusion: From `confusion_matrix`, summed over the batches.
    ignore: Classes that do not count; their own entries are 0.
    absent: What a class gets that is never predicted: "zero", or "skip", NaN.

  Returns:
    One number per class, 0..1. The same in both conventions.

  Raises:
    ValueError: An option is outside its range.
    InputError: A count is negative or not finite.
  """
  tp, _, predicted, _ = _sums(confusion, ignore, "public")
  _check_absent(absent)
  return _ratio(tp, predicted, 0.0 if absent == "zero" else jnp.nan)


@typed
def recall(
  confusion: Table,
  *,
  ignore: Sequence[int] = (0,),
  convention: str = "public",
  absent: str = "zero",
) -> Float[Array, " classes"]:
  """How much of a class is called so, tp / (tp + fn).

  Args:
    confusion: From `confusion_matrix`, summed over the batches.
    ignore: Classes that do not count; their own entries are 0.
    convention: "public" or "benchmark", as above.
    absent: What a class gets that no pixel has: "zero", or "skip", NaN.

  Returns:
    One number per class, 0..1.

  Raises:
    ValueError: An option is outside its range.
    InputError: A count is negative or not finite.
  """
  tp, labelled, _, _ = _sums(confusion, ignore, convention)
  _check_absent(absent)
  return _ratio(tp, labelled, 0.0 if absent == "zero" else jnp.nan)


def _ratio(part: Array, whole: Array, other: float) -> Array:
  return jnp.where(whole > 0, part / jnp.where(whole > 0, whole, 1), other)


def _check_absent(absent: str) -> None:
  if absent not in ("zero", "skip"):
    raise ValueError(f"absent must be 'zero' or 'skip', got {absent!r}.")


def _included(ignore: Sequence[int], classes: int) -> Array:
  """Which classes count, after a look at the names of those that do not."""
  if any(isinstance(k, bool) or not 0 <= k < classes for k in ignore):
    raise ValueError(
      f"ignore must be classes in 0..{classes - 1}, got {tuple(ignore)}."
    )
  if len(set(ignore)) == classes:
    raise ValueError(
      f"ignore must leave one of the {classes} classes, got {tuple(ignore)}."
    )
  included = np.ones(classes, bool)
  included[list(ignore)] = False
  return jnp.asarray(included)


def _sums(
  confusion: Any, ignore: Sequence[int], convention: str
) -> tuple[Array, Array, Array, Array]:
  """Hits, labels and predictions per class, and which classes count."""
  if convention not in ("public", "benchmark"):
    raise ValueError(
      f"convention must be 'public' or 'benchmark', got {convention!r}."
    )
  known = images.concrete(confusion)
  if known is not None:
    if not np.all(np.isfinite(known)) or np.any(known < 0):
      raise InputError(
        "confusion must hold counts of 0 or more, got values in "
        f"{known.min()}..{known.max()}."
      )
    # Before JAX cuts integers of 64 bits to 32.
    confusion = known.astype(np.float32)
  table = jnp.asarray(confusion, jnp.float32)
  included = _included(ignore, len(table))
  table = jnp.where(included[:, None], table, 0)
  if convention == "public":
    table = jnp.where(included, table, 0)
  tp = jnp.diagonal(table)
  return tp, jnp.sum(table, axis=1), jnp.sum(table, axis=0), included
