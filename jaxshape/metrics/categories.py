"""Which of 16 everyday categories a classifier of ImageNet's classes means.

People and networks are compared by categories that both know: those of
16-class-ImageNet, each of which has a number of the 1,000 classes. A category
is scored by the mean of its classes' probabilities, so that dog, which has 109,
is not ahead of knife, which has one.

Reference:
  Geirhos et al., "Generalisation in humans and deep neural networks", NeurIPS
  2018, its appendix on the aggregation of probabilities; the table of classes
  is that of bethgelab/model-vs-human and rgeirhos/texture-vs-shape.
"""

import functools

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from jaxshape import images
from jaxshape.errors import InputError
from jaxshape.typing import Array, ArrayLike, Float, Int, typed

# Numbers of ImageNet's classes, sorted by their WordNet identifiers.
_CLASSES = {
  "airplane": "404",
  "bear": "294-297",
  "bicycle": "444 671",
  "bird": "8 10-16 18-20 22-24 80-83 87-96 98-100 127-133 135-145",
  "boat": "472 554 625 814 914",
  "bottle": "440 720 737 898-899 901 907",
  "car": "436 511 817",
  "cat": "281-286",
  "chair": "423 559 765 857",
  "clock": "409 530 892",
  "dog": (
    "152-191 193-203 205-226 228-241 243-250 252-257 259 261-263 265-268"
  ),
  "elephant": "385-386",
  "keyboard": "508 878",
  "knife": "499",
  "oven": "766",
  "truck": "555 569 656 675 717 734 864 867",
}


def _table() -> np.ndarray:
  table = np.full(1000, -1, np.int32)
  for category, ranges in enumerate(_CLASSES.values()):
    for text in ranges.split():
      first, _, last = text.partition("-")
      table[int(first) : int(last or first) + 1] = category
  table.setflags(write=False)
  return table


# In alphabetical order, which also decides ties.
CATEGORIES = tuple(_CLASSES)
# The category of each class, -1 where it has none.
IMAGENET_TO_16 = _table()
AGGREGATES = ("mean", "sum", "max")
TIES = ("last", "first")

Probabilities = Float[ArrayLike, "*batch 1000"]


@typed
def scores(
  probabilities: Probabilities, *, aggregate: str = "mean"
) -> Float[Array, "*batch 16"]:
  """Gathers the probabilities of ImageNet's classes by category.

  score_c = mean, sum or maximum of p_k over the classes k of category c. 793
  classes belong to none.

  Args:
    probabilities: p, after the softmax, over all 1,000 classes in their usual
      order.
    aggregate: "mean", that of the public protocol, "sum" or "max".

  Returns:
    One score per category, in the order of `CATEGORIES`, float32.

  Raises:
    ValueError: There is no such aggregate.
    InputError: These are no probabilities. Not checked where they are traced.

  Reference:
    Geirhos et al. 2018, appendix; `ImageNetProbabilitiesTo16ClassesMapping` of
    the public code.
  """
  if aggregate not in AGGREGATES:
    raise ValueError(
      f"aggregate must be one of {', '.join(AGGREGATES)}, got {aggregate!r}."
    )
  _check(probabilities)
  return _scores(probabilities, aggregate)


@typed
def ranking(
  probabilities: Probabilities,
  *,
  aggregate: str = "mean",
  ties: str = "last",
) -> Int[Array, "*batch 16"]:
  """Sorts the categories, the one that is meant first.

  Args:
    probabilities: As in `scores`.
    aggregate: As there.
    ties: Of equal scores, the category that is "last" in the alphabet comes
      first, as in bethgelab/model-vs-human, or the "first", as in
      rgeirhos/texture-vs-shape.

  Returns:
    Numbers of categories, 0..15; -1 throughout where a probability is NaN.

  Raises:
    ValueError: There is no such aggregate or rule.
    InputError: These are no probabilities. Not checked where they are traced.

  Reference:
    Geirhos et al. 2018, public code.
  """
  if ties not in TIES:
    raise ValueError(f"ties must be one of {', '.join(TIES)}, got {ties!r}.")
  score = scores(probabilities, aggregate=aggregate)
  return _ranking(probabilities, score, ties)


@typed
def decide(
  probabilities: Probabilities,
  *,
  aggregate: str = "mean",
  ties: str = "last",
) -> Int[Array, "*batch"]:
  """The category that is meant: the one of highest score.

  Args:
    probabilities: As in `scores`.
    aggregate: As there.
    ties: As in `ranking`.

  Returns:
    The number of a category, 0..15, for `shape_bias.count_decisions`; -1 where
    a probability is NaN, which decides for none.

  Raises:
    ValueError: There is no such aggregate or rule.
    InputError: These are no probabilities. Not checked where they are traced.

  Note:
    The public codes agree but for ties: probabilities that are all 0 decide for
    truck in the newer one and for airplane in the older.

  Reference:
    Geirhos et al. 2018, public code.
  """
  return ranking(probabilities, aggregate=aggregate, ties=ties)[..., 0]


@functools.partial(jax.jit, static_argnums=1)
def _scores(probabilities: ArrayLike, aggregate: str) -> jax.Array:
  p = jnp.asarray(probabilities, jnp.float32)
  member = IMAGENET_TO_16[:, None] == np.arange(len(CATEGORIES))
  if aggregate == "max":
    classes = [np.flatnonzero(column) for column in member.T]
    return jnp.stack([jnp.max(p[..., k], axis=-1) for k in classes], axis=-1)
  sums = jnp.matmul(
    p, member.astype(np.float32), precision=lax.Precision.HIGHEST
  )
  if aggregate == "sum":
    return sums
  # By a constant it would become a product with the rounded inverse, and means
  # that are equal would no longer tie.
  return sums / lax.optimization_barrier(jnp.asarray(member.sum(axis=0)))


@functools.partial(jax.jit, static_argnums=2)
def _ranking(
  probabilities: ArrayLike, score: jax.Array, ties: str
) -> jax.Array:
  if ties == "first":
    order = jnp.argsort(-score, axis=-1, stable=True)
  else:
    order = jnp.flip(jnp.argsort(score, axis=-1, stable=True), axis=-1)
  unknown = jnp.any(jnp.isnan(probabilities), axis=-1, keepdims=True)
  return jnp.where(unknown, -1, order).astype(jnp.int32)


def _check(probabilities: ArrayLike) -> None:
  known = images.concrete(probabilities)
  if known is None or known.size == 0:
    return
  # NaN passes, as the network's own fault; rounding may leave a little over 1.
  low, high = (
    float(np.fmin.reduce(known, None)),
    float(np.fmax.reduce(known, None)),
  )
  if low < 0 or high > 1 + 1e-3:
    raise InputError(
      f"probabilities must be within 0..1, got {low:g}..{high:g}; take the "
      "softmax of logits first."
    )
