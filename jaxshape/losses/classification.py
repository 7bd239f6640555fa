"""Cross-entropy losses, one number per example.

Logits of any float type are read as float32.
"""

import jax
import jax.numpy as jnp

from jaxshape.typing import Array, ArrayLike, Float, Int, typed


@typed
def cross_entropy(
  logits: Float[ArrayLike, "*batch classes"],
  labels: Int[ArrayLike, "*batch"],
  *,
  label_smoothing: float = 0.0,
) -> Float[Array, "*batch"]:
  """Scores logits against the label of each example.

  loss = -(1 - s) log p_label - s / K sum_k log p_k, p = softmax(logits), with K
  classes and s = label_smoothing.

  Args:
    logits: Scores before the softmax.
    labels: From 0; a label that is not among the classes gives NaN, so that a
      wrong number of classes cannot pass unnoticed.
    label_smoothing: Share of the target spread evenly over all classes, 0..1.

  Returns:
    One loss per example, in nats; the caller takes the mean.

  Reference:
    Szegedy et al., "Rethinking the Inception Architecture for Computer Vision",
    CVPR 2016, Sec. 7.
  """
  if not 0.0 <= label_smoothing <= 1.0:
    raise ValueError(
      f"label_smoothing must be between 0 and 1, got {label_smoothing}."
    )
  log_p = jax.nn.log_softmax(jnp.asarray(logits, jnp.float32))
  labels = jnp.asarray(labels)
  hit = jnp.arange(log_p.shape[-1]) == labels[..., None]
  loss = -jnp.sum(jnp.where(hit, log_p, 0.0), axis=-1)
  if label_smoothing > 0.0:
    even = -jnp.mean(log_p, axis=-1)
    loss = (1.0 - label_smoothing) * loss + label_smoothing * even
  return jnp.where(jnp.any(hit, axis=-1), loss, jnp.nan)


@typed
def soft_cross_entropy(
  logits: Float[ArrayLike, "*batch classes"],
  targets: Float[ArrayLike, "*batch classes"],
) -> Float[Array, "*batch"]:
  """Scores logits against a distribution over the classes.

  loss = -sum_k t_k log p_k, p = softmax(logits); 0 log 0 counts as 0.

  Args:
    logits: Scores before the softmax.
    targets: t; each row sums to 1.

  Returns:
    One loss per example, in nats; the caller takes the mean.

  Reference:
    Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, Sec. 2.
  """
  log_p = jax.nn.log_softmax(jnp.asarray(logits, jnp.float32))
  targets = jnp.asarray(targets, jnp.float32)
  log_p = jnp.where(targets == 0.0, 0.0, log_p)
  return -jnp.sum(targets * log_p, axis=-1)
