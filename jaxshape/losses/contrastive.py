"""Losses that pull related descriptors together and push others apart.

One loss per pair or triple, computed in float32; the caller sums or averages.
The axes before the last broadcast, so that a query [batch, 1, dim] meets all of
its samples [batch, samples, dim] at once.
"""

import math

import jax.numpy as jnp

from jaxshape.typing import Array, ArrayLike, Bool, Float, Num, typed

FORMS = ("paper", "public")
# What the public code adds to every component of a difference.
SHIFT = 1e-6

Label = Bool[ArrayLike, "*#batch"] | Num[ArrayLike, "*#batch"]


@typed
def contrastive(
  query: Float[ArrayLike, "*#batch dim"],
  other: Float[ArrayLike, "*#batch dim"],
  label: Label,
  *,
  margin: float | int = 0.1,
  form: str = "paper",
) -> Float[Array, "*batch"]:
  """Scores a pair by its distance: how far if related, how near if not.

  loss = y z^2 + (1 - y) max(0, m - z)^2, z = |q - d|, with y the label and m
  the margin. Where z = 0 the gradient is 0.

  Args:
    query: q, usually L2-normalized.
    other: d.
    label: y, 1 or True where the two are related, 0 or False where not.
    margin: m, from which distance on unrelated pairs are left alone; above 0.
      Of unit vectors none are farther apart than 2.
    form: "paper", or "public": half of it, with z = |q - d + 1e-6|.

  Returns:
    One loss per pair.

  Raises:
    ValueError: An option is outside its range.

  Note:
    Gordo et al. leave out the factor 1/2 that the public code and the first
    paper have, and all papers the 1e-6; the public code's margin is 0.7 unless
    given, and it sums over the pairs.

  Reference:
    Hadsell et al., "Dimensionality Reduction by Learning an Invariant Mapping",
    CVPR 2006, Eq. 4; without 1/2, Gordo et al., "Attention-Based Query
    Expansion Learning", ECCV 2020, Sec. 4.1.
  """
  if form not in FORMS:
    raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}.")
  _check_margin(margin)
  difference = _float32(query) - _float32(other)
  if form == "public":
    difference += SHIFT
  square = jnp.sum(difference**2, axis=-1)
  # The root's slope at 0 is infinite.
  apart = square > 0
  z = jnp.where(apart, jnp.sqrt(jnp.where(apart, square, 1.0)), 0.0)
  y = jnp.asarray(label).astype(jnp.float32)
  loss = y * square + (1 - y) * jnp.maximum(0.0, margin - z) ** 2
  return loss / 2 if form == "public" else loss


@typed
def triplet(
  query: Float[ArrayLike, "*#batch dim"],
  positive: Float[ArrayLike, "*#batch dim"],
  negative: Float[ArrayLike, "*#batch dim"],
  *,
  margin: float | int = 0.1,
) -> Float[Array, "*batch"]:
  """Asks that the related one of two be nearer, by a margin.

  loss = max(0, |q - p|^2 - |q - n|^2 + m).

  Args:
    query: q, usually L2-normalized.
    positive: p, related to the query.
    negative: n, not related to it.
    margin: m, in units of a squared distance; above 0.

  Returns:
    One loss per triple.

  Raises:
    ValueError: The margin is outside its range.

  Reference:
    Schroff et al., "FaceNet: A Unified Embedding for Face Recognition and
    Clustering", CVPR 2015, Eq. 2.
  """
  _check_margin(margin)
  query = _float32(query)
  near = jnp.sum((query - _float32(positive)) ** 2, axis=-1)
  far = jnp.sum((query - _float32(negative)) ** 2, axis=-1)
  return jnp.maximum(0.0, near - far + margin)


def _float32(x: ArrayLike) -> Array:
  return jnp.asarray(x, jnp.float32)


def _check_margin(margin: float) -> None:
  if not 0 < margin < math.inf:
    raise ValueError(f"margin must be above 0 and finite, got {margin}.")
