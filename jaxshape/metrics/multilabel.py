"""How well the images of a class are found, where an image may show several.

Labels are 1 where a class is there, 0 where it is not and -1 where nobody wants
to say: "difficult" things count neither for nor against. With the images in the
order of falling scores, tp_i and fp_i count the right and the wrong ones among
the first i, and n is the number of all that show the class:

  recall_i = tp_i / n, precision_i = tp_i / (tp_i + fp_i).

Of equal scores the earlier image comes first, as in the public code, so that a
score that never changes is judged by the order of the data.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxshape import images
from jaxshape.errors import InputError
from jaxshape.typing import Array, ArrayLike, Bool, Float, Num, typed

Mask = Bool[ArrayLike, " examples"] | Num[ArrayLike, " examples"]

STYLES = ("voc07", "voc10")
_POINTS = 10


@typed
def average_precision(
  scores: Float[ArrayLike, "examples classes"],
  labels: Num[ArrayLike, "examples classes"],
  *,
  style: str = "voc07",
  mask: Bool[ArrayLike, " examples"]
  | Num[ArrayLike, " examples"]
  | None = None,
) -> Float[Array, " classes"]:
  """How high the images that show a class stand among all, class by class.

  1/11 sum_t max {precision_i: recall_i >= t}, t = 0, 0.1 ... 1 ("voc07"), or
  the area under the same upper envelope, taken at every recall ("voc10").

  Args:
    scores: Higher where a class is more likely; logits or probabilities.
    labels: 1, 0, or -1 for what does not count.
    style: "voc07" with eleven points, or "voc10", as the challenge has it since
      2010.
    mask: 0 where a row is padding.

  Returns:
    One number per class, 0..1; NaN where no image shows it, or where a score
    that counts is NaN.

  Raises:
    ValueError: There is no such style.
    InputError: A label is none of the three.

  Reference:
    Everingham et al., "The PASCAL Visual Object Classes (VOC) Challenge", IJCV
    2010, Sec. 4.2, Eq. 1 and 2.

  Note:
    Recalls are compared with the eleven points as whole numbers. Codes that
    step by 0.1 in floats miss some that are met exactly. The area under the
    curve without its envelope, scikit-learn's, is never larger.
  """
  if style not in STYLES:
    raise ValueError(
      f"style must be one of {', '.join(STYLES)}, got {style!r}."
    )
  _check_labels(labels, mask)
  labels = jnp.asarray(labels)
  if mask is not None:
    labels = jnp.where(jnp.asarray(mask)[:, None] != 0, labels, -1)
  scores = jnp.asarray(scores)
  one = _eleven_points if style == "voc07" else _area
  if not scores.shape[0]:
    return jnp.full(scores.shape[1], jnp.nan, jnp.float32)

  def of_class(score: Array, label: Array) -> Array:
    # Without what does not count, whose scores may be anything.
    known = jnp.where(label >= 0, score, -jnp.inf)
    found = label[jnp.argsort(-known, stable=True)]
    tp = jnp.cumsum(found == 1, dtype=jnp.int32)
    seen = tp + jnp.cumsum(found == 0, dtype=jnp.int32)
    precision = tp / jnp.maximum(seen, 1)
    # The largest precision at this recall or a higher one.
    envelope = jax.lax.cummax(precision, reverse=True)
    total = tp[-1]
    valid = (total > 0) & ~jnp.any(jnp.isnan(known))
    value = one(tp, envelope, jnp.maximum(total, 1))
    return jnp.where(valid, value, jnp.nan).astype(jnp.float32)

  return jax.vmap(of_class, in_axes=1)(scores, labels)


@typed
def mean_average_precision(
  scores: Float[ArrayLike, "examples classes"],
  labels: Num[ArrayLike, "examples classes"],
  *,
  style: str = "voc07",
  mask: Bool[ArrayLike, " examples"]
  | Num[ArrayLike, " examples"]
  | None = None,
) -> Float[Array, ""]:
  """The mean of `average_precision` over the classes that some image shows.

  Args:
    scores: As there.
    labels: As there.
    style: As there.
    mask: 0 where a row is padding.

  Returns:
    mAP, 0..1; NaN if no class is shown, or where a score that counts is NaN.

  Raises:
    ValueError: There is no such style.
    InputError: A label is none of the three.

  Reference:
    Everingham et al., "The PASCAL Visual Object Classes (VOC) Challenge", IJCV
    2010, Sec. 4.2.
  """
  each = average_precision(scores, labels, style=style, mask=mask)
  there = jnp.asarray(labels) == 1
  if mask is not None:
    there &= jnp.asarray(mask)[:, None] != 0
  shown = jnp.any(there, axis=0)
  number = jnp.sum(shown)
  total = jnp.sum(jnp.where(shown, each, 0))
  return jnp.where(number > 0, total / jnp.maximum(number, 1), jnp.nan)


def _eleven_points(tp: Array, envelope: Array, total: Array) -> Array:
  points = jnp.arange(_POINTS + 1)
  # The first place whose recall is as high; in whole numbers tp >= t total.
  needed = -(-points * total // _POINTS)
  return jnp.mean(envelope[jnp.searchsorted(tp, needed)])


def _area(tp: Array, envelope: Array, total: Array) -> Array:
  gained = jnp.diff(tp, prepend=0)
  return jnp.sum(gained * envelope) / total


def _check_labels(labels: Any, mask: Any) -> None:
  known = images.concrete(labels)
  if known is None:
    return
  rows = None if mask is None else images.concrete(mask)
  if rows is not None:
    known = known[rows != 0]
  wrong = known[~np.isin(known, (-1, 0, 1))]
  if wrong.size:
    raise InputError(
      "labels must be 1 (there), 0 (not there) or -1 (does not count), got "
      f"{wrong[0]}."
    )
