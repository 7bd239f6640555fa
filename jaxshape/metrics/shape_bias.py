"""Whether a classifier goes by shape or by texture where the two disagree.

A cue-conflict image has the shape of one class and the texture of another. An
answer that names either is a decision for it; other answers do not count.

Reference:
  Geirhos et al., "ImageNet-trained CNNs are biased towards texture; increasing
  shape bias improves accuracy and robustness", ICLR 2019, Sec. 2 and Fig. 4.
"""

import jax.numpy as jnp

from jaxshape.typing import Array, ArrayLike, Bool, Float, Int, Num, typed


@typed
def count_decisions(
  predictions: Int[ArrayLike, " batch"],
  shape_labels: Int[ArrayLike, " batch"],
  texture_labels: Int[ArrayLike, " batch"],
  *,
  num_classes: int,
  mask: Bool[ArrayLike, " batch"] | Num[ArrayLike, " batch"] | None = None,
) -> Int[Array, "{num_classes} 3"]:
  """Counts the decisions for shape, for texture and for neither.

  Images whose shape and texture are of one class are left out, as in the public
  protocol.

  Args:
    predictions: The classes that were answered.
    shape_labels: The classes of the shapes, 0..num_classes - 1; an image whose
      label is none of these is left out.
    texture_labels: The classes of the textures.
    num_classes: Number of classes.
    mask: 0 where a row is padding; None if no row is.

  Returns:
    Counts per class of the shape; columns are shape, texture, neither. A sum
    over batches, and over classes where one number for all is wanted.
  """
  predictions = jnp.asarray(predictions)
  shape_labels = jnp.asarray(shape_labels)
  texture_labels = jnp.asarray(texture_labels)
  counted = shape_labels != texture_labels
  if mask is not None:
    counted &= jnp.asarray(mask) != 0
  decision = jnp.where(
    predictions == shape_labels,
    0,
    jnp.where(predictions == texture_labels, 1, 2),
  )
  row = shape_labels[:, None] == jnp.arange(num_classes)
  column = decision[:, None] == jnp.arange(3)
  hits = (row & counted[:, None])[:, :, None] & column[:, None, :]
  return jnp.sum(hits, axis=0, dtype=jnp.int32)


@typed
def shape_bias(
  counts: Num[ArrayLike, "*any 3"],
) -> tuple[Float[Array, "*any"], Num[Array, "*any"]]:
  """The share of decisions that were for the shape.

  shape / (shape + texture). Sum the counts over classes first for the number
  that is usually quoted; as they are, they give one number per class.

  Args:
    counts: From `count_decisions`: shape, texture, neither.

  Returns:
    The shape bias, 0..1, NaN where no decision was for either; and the number
    of decisions that it rests on, shape + texture.
  """
  counts = jnp.asarray(counts)
  decisions = counts[..., 0] + counts[..., 1]
  bias = counts[..., 0] / jnp.maximum(decisions, 1)
  return jnp.where(decisions > 0, bias, jnp.nan), decisions
