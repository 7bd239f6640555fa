"""Cross-entropy losses of images in which every pixel has a label.

Logits of any float type are read as float32, classes last. `weights` holds one
weight per class, 0 for classes that do not count; `mask` is 0 where a pixel is
empty. Means are over all pixels of a batch, wherever its parts lie.
"""

from collections.abc import Sequence
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxshape import images
from jaxshape.errors import InputError
from jaxshape.typing import (
  Array,
  ArrayLike,
  Bool,
  Float,
  Integer,
  Num,
  Size,
  typed,
)

Weights = Float[ArrayLike, " classes"]
Mask = Bool[ArrayLike, "*pixels"] | Num[ArrayLike, "*pixels"]

# Probabilities below count as this one, and get no gradient.
_FLOOR = 1e-8


@typed
def class_weights(
  frequencies: Float[ArrayLike, " classes"],
  *,
  form: str = "inverse",
  epsilon: float | int = 0.001,
  ignore: Sequence[int] = (0,),
) -> Float[Array, " classes"]:
  """Weighs rare classes more.

  w_c = 1 / (f_c + epsilon) ("inverse") or 1 / log(f_c + epsilon) ("log"), and 0
  for classes that are ignored.

  Args:
    frequencies: f, the share of each class among the pixels or points, 0..1.
    form: "inverse", that of the public code, or "log", that of the paper.
    epsilon: Bounds the weight of a class that hardly occurs, 0 or more.
    ignore: Classes of weight 0.

  Returns:
    One weight per class.

  Raises:
    ValueError: An option is outside its range.
    InputError: A frequency is not a share, or a weight is not finite.

  Reference:
    Xu et al., "SqueezeSegV3: Spatially-Adaptive Convolution for Efficient
    Point-Cloud Segmentation", ECCV 2020, Eq. 5.

  Note:
    As printed, the paper's weights are negative for f + epsilon < 1, so that a
    loss with them has to be divided by their sum: see `mean_cross_entropy`. The
    public code has the other form.
  """
  if form not in ("inverse", "log"):
    raise ValueError(f"form must be 'inverse' or 'log', got {form!r}.")
  if not 0 <= epsilon < math.inf:
    raise ValueError(f"epsilon must be 0 or more and finite, got {epsilon}.")
  (classes,) = np.shape(frequencies)
  if any(isinstance(k, bool) or not 0 <= k < classes for k in ignore):
    raise ValueError(
      f"ignore must be classes in 0..{classes - 1}, got {tuple(ignore)}."
    )
  counted = np.ones(classes, bool)
  counted[list(ignore)] = False
  known = images.concrete(frequencies)
  if known is not None:
    if not np.all((known >= 0) & (known <= 1)):
      raise InputError(
        "frequencies must be shares of the pixels, 0..1, got "
        f"{known.tolist()}; divide counts by their sum."
      )
    total = known.astype(np.float64)[counted] + epsilon
    none = total == (0 if form == "inverse" else 1)
    if np.any(none):
      raise InputError(
        f"frequencies and epsilon = {epsilon} must give finite weights, got "
        f"{known.tolist()} for the form {form!r}."
      )
  total = jnp.asarray(frequencies, jnp.float32) + np.float32(epsilon)
  weights = 1 / (total if form == "inverse" else jnp.log(total))
  return jnp.where(counted, weights, 0)


@typed
def weighted_cross_entropy(
  logits: Float[ArrayLike, "*pixels classes"],
  labels: Integer[ArrayLike, "*pixels"],
  *,
  weights: Weights | None = None,
  mask: Mask | None = None,
) -> Float[Array, "*pixels"]:
  """Scores the logits of each pixel against its label.

  loss = -w_y log max(p_y, 1e-8), p = softmax(logits), y the label.

  Args:
    logits: Scores before the softmax.
    labels: From 0; a label that is not among the classes gives NaN, so that a
      wrong number of classes cannot pass unnoticed.
    weights: w, by default 1 for every class.
    mask: 0 where a pixel does not count, whatever its label.

  Returns:
    One loss per pixel, in nats, 0 where it does not count.

  Reference:
    Xu et al., "SqueezeSegV3: Spatially-Adaptive Convolution for Efficient
    Point-Cloud Segmentation", ECCV 2020, Eq. 5.

  Note:
    The bound of 1e-8 is that of the public code; a pixel beyond it has no
    gradient.
  """
  loss, weight = _pixels(logits, labels, weights, mask)
  return weight * loss


@typed
def mean_cross_entropy(
  logits: Float[ArrayLike, "*pixels classes"],
  labels: Integer[ArrayLike, "*pixels"],
  *,
  weights: Weights | None = None,
  mask: Mask | None = None,
  reduction: str = "weights",
) -> Float[Array, ""]:
  """The mean of `weighted_cross_entropy` over the pixels of a batch.

  sum_i w_i loss_i / sum_i w_i ("weights") or sum_i w_i loss_i / n ("pixels"),
  with n the number of all pixels, those that do not count among them.

  Args:
    logits: Scores before the softmax.
    labels: From 0.
    weights: One per class, by default 1.
    mask: 0 where a pixel does not count.
    reduction: "weights", as in the public code, or "pixels", as in the paper.

  Returns:
    The loss in nats; 0 if no pixel counts.

  Raises:
    ValueError: `reduction` is neither.

  Reference:
    Xu et al., "SqueezeSegV3: Spatially-Adaptive Convolution for Efficient
    Point-Cloud Segmentation", ECCV 2020, Eq. 5.

  Note:
    The paper divides by the number of pixels. The public code divides by the
    sum of the weights, in which the sign of the paper's weights cancels.
  """
  _check_reduction(reduction)
  return _mean(*_pixels(logits, labels, weights, mask), reduction)


@typed
def shrink_labels(
  labels: Num[ArrayLike, "*batch height width"]
  | Bool[ArrayLike, "*batch height width"],
  *,
  factor: Size,
) -> (
  Num[Array, "*batch height width//{factor}"]
  | Bool[Array, "*batch height width//{factor}"]
):
  """Takes every `factor`-th column, beginning with the first.

  Args:
    labels: Labels, or a mask, at the full width.
    factor: Divides the width.

  Returns:
    The labels of an image that is narrower and as high.

  Raises:
    ValueError: `factor` does not divide the width.

  Reference:
    Xu et al., "SqueezeSegV3: Spatially-Adaptive Convolution for Efficient
    Point-Cloud Segmentation", ECCV 2020, Sec. 5.2.
  """
  width = np.shape(labels)[-1]
  if isinstance(factor, bool) or factor < 1 or width % factor:
    raise ValueError(
      f"factor must be 1 or more and divide the width {width}, got {factor}."
    )
  return jnp.asarray(labels)[..., ::factor]


@typed
def multi_layer_cross_entropy(
  logits: Sequence[Float[ArrayLike, "..."]],
  labels: Integer[ArrayLike, "*batch height width"],
  *,
  weights: Weights | None = None,
  mask: Bool[ArrayLike, "*batch height width"]
  | Num[ArrayLike, "*batch height width"]
  | None = None,
  reduction: str = "weights",
) -> Float[Array, ""]:
  """Adds up `mean_cross_entropy` of outputs at several widths.

  The labels of an output that is narrower are every second, fourth ... column.

  Args:
    logits: Outputs of a network, [*batch, height, narrow, classes], where each
      `narrow` divides the width of the labels; in any order.
    labels: At the full width, from 0.
    weights: One per class, by default 1.
    mask: 0 where a pixel does not count, at the full width.
    reduction: As in `mean_cross_entropy`.

  Returns:
    The sum of the losses in nats.

  Raises:
    ValueError: There is no output, or one of another size.

  Reference:
    Xu et al., "SqueezeSegV3: Spatially-Adaptive Convolution for Efficient
    Point-Cloud Segmentation", ECCV 2020, Eq. 5.
  """
  _check_reduction(reduction)
  if not logits:
    raise ValueError("logits must be one output or more, got none.")
  *rest, width = np.shape(labels)
  classes = np.shape(logits[0] if weights is None else weights)[-1:]
  total = jnp.zeros((), jnp.float32)
  for output in logits:
    # Here, as an annotation is checked on one of the outputs only.
    shape = np.shape(output)
    narrow = shape[-2] if len(shape) > 1 else 0
    fits = shape == (*rest, narrow, *classes)
    if not fits or narrow < 1 or width % narrow:
      raise ValueError(
        f"logits must be of the shape {(*rest, width, *classes)} or of a width "
        f"that divides {width}, got {shape}."
      )
    factor = width // narrow
    small = shrink_labels(labels, factor=factor)
    shown = None if mask is None else shrink_labels(mask, factor=factor)
    pixels = _pixels(output, small, weights, shown)
    total += _mean(*pixels, reduction)
  return total


def _check_reduction(reduction: str) -> None:
  if reduction not in ("weights", "pixels"):
    raise ValueError(
      f"reduction must be 'weights' or 'pixels', got {reduction!r}."
    )


def _pixels(
  logits: Any, labels: Any, weights: Any, mask: Any
) -> tuple[Array, Array]:
  """The loss of each pixel, without its weight, and the weight."""
  logits = jnp.asarray(logits, jnp.float32)
  labels = jnp.asarray(labels)
  hit = jnp.arange(logits.shape[-1]) == labels[..., None]
  own = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
  log_p = own - jax.nn.logsumexp(logits, axis=-1)
  loss = -jnp.maximum(log_p, math.log(_FLOOR))
  if weights is None:
    weight = jnp.ones_like(loss)
  else:
    weight = jnp.asarray(weights, jnp.float32)
    weight = jnp.sum(jnp.where(hit, weight, 0.0), axis=-1)
  loss = jnp.where(jnp.any(hit, axis=-1), loss, jnp.nan)
  if mask is not None:
    shown = jnp.asarray(mask) != 0
    loss, weight = jnp.where(shown, loss, 0.0), jnp.where(shown, weight, 0.0)
  return loss, weight


def _mean(loss: Array, weight: Array, reduction: str) -> Array:
  total = jnp.sum(weight * loss)
  if reduction == "pixels":
    return total / max(loss.size, 1)
  whole = jnp.sum(weight)
  return total / jnp.where(whole == 0, 1, whole)
