"""How often, how surely, and how rightly surely a classifier is right.

Per-example functions come first. The tables after them are sums, so that the
tables of batches, hosts and devices add up; `mask` is 0 where a row is padding
and None where no row is.
"""

import jax
import jax.numpy as jnp

from jaxshape.metrics import segmentation
from jaxshape.typing import Array, ArrayLike, Bool, Float, Int, Num, typed

Mask = Bool[ArrayLike, " batch"] | Num[ArrayLike, " batch"]


@typed
def top_k_correct(
  logits: Float[ArrayLike, "*batch classes"],
  labels: Int[ArrayLike, "*batch"],
  *,
  k: int = 1,
) -> Bool[Array, "*batch"]:
  """Whether the label is among the k highest logits.

  Of equal logits the first class comes first, so that k = 1 agrees with
  `argmax` and a constant classifier does not count as right. A row with a NaN
  is wrong, and so is a label that is not among the classes.

  Args:
    logits: Scores, or anything in the same order.
    labels: From 0.
    k: How many guesses are allowed, at least 1.

  Returns:
    True where the label is among them.
  """
  if k < 1:
    raise ValueError(f"k must be 1 or more, got {k}.")
  logits, labels = jnp.asarray(logits), jnp.asarray(labels)[..., None]
  classes = jnp.arange(logits.shape[-1])
  hit = classes == labels
  own = jnp.max(jnp.where(hit, logits, -jnp.inf), axis=-1, keepdims=True)
  ahead = (logits > own) | ((logits == own) & (classes < labels))
  readable = jnp.any(hit, axis=-1) & ~jnp.any(jnp.isnan(logits), axis=-1)
  return (jnp.sum(ahead, axis=-1) < k) & readable


@typed
def confidence(
  logits: Float[ArrayLike, "*batch classes"],
) -> Float[Array, "*batch"]:
  """The probability of the likeliest class, max softmax(logits)."""
  logits = jnp.asarray(logits, jnp.float32)
  return jnp.max(jax.nn.softmax(logits), axis=-1)


@typed
def entropy(
  logits: Float[ArrayLike, "*batch classes"],
) -> Float[Array, "*batch"]:
  """How undecided a prediction is, -sum_k p_k log p_k in nats.

  p = softmax(logits); 0 log 0 counts as 0. Between 0 and log(classes).

  Args:
    logits: Scores before the softmax.

  Returns:
    One entropy per example.
  """
  log_p = jax.nn.log_softmax(jnp.asarray(logits, jnp.float32))
  p = jnp.exp(log_p)
  return -jnp.sum(p * jnp.where(p == 0.0, 0.0, log_p), axis=-1)


@typed
def confusion_matrix(
  labels: Int[ArrayLike, " batch"],
  predictions: Int[ArrayLike, " batch"],
  *,
  num_classes: int,
  mask: Mask | None = None,
) -> Int[Array, "{num_classes} {num_classes}"]:
  """Counts how often each class was taken for each other one.

  Args:
    labels: Those outside 0..num_classes - 1 are not counted.
    predictions: Likewise.
    num_classes: Number of classes.
    mask: 0 where a row is padding.

  Returns:
    Counts; rows are labels, columns predictions. A sum over batches.
  """
  return segmentation.confusion_matrix(
    labels, predictions, num_classes=num_classes, mask=mask
  )


@typed
def reliability_table(
  confidence: Float[ArrayLike, " batch"],
  correct: Bool[ArrayLike, " batch"] | Num[ArrayLike, " batch"],
  *,
  bins: int = 15,
  mask: Mask | None = None,
) -> Float[Array, "{bins} 3"]:
  """Sorts predictions by their confidence into bins of equal width.

  Bin m of M holds the confidences in ((m - 1) / M, m / M]; 0 is in the first.

  Args:
    confidence: Probabilities, 0..1.
    correct: 1 where the prediction was right.
    bins: M, at least 1.
    mask: 0 where a row is padding.

  Returns:
    Per bin, the number of predictions, the sum of their confidences and the
    number of right ones. A sum over batches.

  Reference:
    Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, Sec. 2.
  """
  if bins < 1:
    raise ValueError(f"bins must be 1 or more, got {bins}.")
  confidence = jnp.asarray(confidence, jnp.float32)
  edges = jnp.linspace(0.0, 1.0, bins + 1)[1:-1]
  bin_ = jnp.searchsorted(edges, confidence, side="left")
  counted = _counted(mask, confidence)
  rows = jnp.stack(
    [jnp.ones_like(confidence), confidence, jnp.asarray(correct, jnp.float32)],
    axis=-1,
  )
  rows = jnp.where(counted[:, None], rows, 0.0)
  return jnp.zeros((bins, 3), jnp.float32).at[bin_].add(rows)


@typed
def calibration_error(
  table: Num[ArrayLike, "bins 3"],
) -> Float[Array, ""]:
  """How far confidence is from accuracy, on average over the predictions.

  ECE = sum_m n_m / n |acc_m - conf_m|, with n_m predictions of accuracy acc_m
  and mean confidence conf_m in bin m.

  Args:
    table: From `reliability_table`, summed over the batches.

  Returns:
    The expected calibration error, 0..1; NaN if nothing was counted.

  Reference:
    Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, Eq. 5.
  """
  table = jnp.asarray(table, jnp.float32)
  gap = jnp.sum(jnp.abs(table[:, 2] - table[:, 1]))
  n = jnp.sum(table[:, 0])
  return jnp.where(n > 0, gap / jnp.where(n > 0, n, 1.0), jnp.nan)


def _counted(mask: ArrayLike | None, rows: Array) -> Array:
  if mask is None:
    return jnp.ones(rows.shape, bool)
  return jnp.asarray(mask) != 0
