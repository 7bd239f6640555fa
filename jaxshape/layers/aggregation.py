"""Weights of a query's neighbours, learned from all of them at once.

Notation: the first token is the query, the others are its k neighbours, best
first; tokens have length 1.

Reference:
  Gordo et al., "Attention-Based Query Expansion Learning", ECCV 2020, Sec. 3.3
  and 3.4.
  Vaswani et al., "Attention Is All You Need", NeurIPS 2017, Sec. 3.4 (tokens
  times sqrt(dim)).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jaxshape.layers import attention
from jaxshape.typing import Array, ArrayLike, Bool, Float, PyTree, typed


class Aggregator(nn.Module):
  """How much each neighbour should count: Fig. 2.

  Attributes:
    layers: Encoders on top of each other.
    heads: Of the attention.
    feedforward: Width of the fully connected part; 0 for the descriptors' own.
    attention: Whether tokens see each other (Table 2, iii).
    positions: Most tokens, with the query; 0 for none (Table 2, iv).
    visual: Whether descriptors are seen, or positions alone (Table 2, v).
    position_scale: Standard deviation of the positions at the start.
    alike: Whether queries and keys of the attention start equal.
    dropout: Share of what is dropped in training.
    dtype: Of the computation.
  """

  layers: int = 3
  heads: int = 64
  feedforward: int = 0
  attention: bool = True
  positions: int = 65
  visual: bool = True
  position_scale: float = 0.3
  alike: bool = True
  dropout: float = 0.1
  dtype: Any = jnp.float32

  @nn.compact
  @typed
  def __call__(
    self,
    query: Float[ArrayLike, "*batch dim"],
    neighbours: Float[ArrayLike, "*batch k dim"],
    *,
    mask: Bool[ArrayLike, "*batch k"],
    train: bool,
  ) -> tuple[Float[Array, "*batch k"], Float[Array, "*batch k"]]:
    """Similarities of the neighbours to the query, seen in their context.

    Args:
      query: Of length 1.
      neighbours: Of length 1, best first.
      mask: False where there is none.
      train: Whether to drop.

    Returns:
      Cosines of the encoded query and neighbours (Eq. 3), and the logits of
      the auxiliary classifier, whether a neighbour is relevant.

    Raises:
      ValueError: There are more neighbours than positions.
    """
    query, mask = jnp.asarray(query), jnp.asarray(mask)
    # What is masked leaves no trace, whatever it is.
    near = jnp.where(mask[..., None], jnp.asarray(neighbours), 0)
    tokens = jnp.concatenate([query[..., None, :], near], axis=-2)
    length, width = tokens.shape[-2:]
    # Numbers of about 1, so that the first layer, too, tells what is alike.
    tokens = tokens * width**0.5
    if not self.visual:
      tokens = jnp.zeros_like(tokens)
    if self.positions:
      if length > self.positions:
        raise ValueError(
          f"there are positions for {self.positions - 1} neighbours, got "
          f"{length - 1}."
        )
      scale = nn.initializers.normal(self.position_scale)
      places = self.param("positions", scale, (self.positions, width))
      tokens = tokens + places[:length]
    one = jnp.ones((*mask.shape[:-1], 1), bool)
    seen = jnp.concatenate([one, mask], axis=-1)
    encoded = attention.Encoder(
      layers=self.layers,
      heads=self.heads,
      feedforward=self.feedforward or None,
      attention=self.attention,
      dropout=self.dropout,
      dtype=self.dtype,
      alike=self.alike,
      name="encoder",
    )(tokens.astype(self.dtype), mask=seen, train=train)
    encoded = encoded.astype(jnp.float32)
    logits = nn.Dense(1, name="relevance")(encoded[..., 1:, :])[..., 0]
    unit = encoded / optax.safe_norm(encoded, 1e-6, axis=-1, keepdims=True)
    cosines = jnp.einsum("...d,...kd->...k", unit[..., 0, :], unit[..., 1:, :])
    return cosines, logits


def of(params: PyTree, *, heads: int, visual: bool = True) -> Aggregator:
  """The network that parameters belong to, for prediction.

  Args:
    params: Of an `Aggregator`; its sizes are read off them.
    heads: Of the attention, which leave no trace.
    visual: Whether it was trained to see descriptors.

  Returns:
    The module.
  """
  first = params["encoder"]["layers_0"]
  return Aggregator(
    layers=len(params["encoder"]),
    heads=heads,
    feedforward=first["linear1"]["kernel"].shape[1],
    attention="self_attn" in first,
    positions=len(params.get("positions", ())),
    visual=visual,
  )


@typed
def weigh(
  cosines: Float[ArrayLike, "*batch k"],
  *,
  mask: Bool[ArrayLike, "*batch k"],
  temperature: Float[ArrayLike, ""] | float | None = None,
) -> Float[Array, "*batch k+1"]:
  """Weights of the query and of its neighbours.

  w_0 = 1, w_i = cosine_i (Eq. 3), or w = softmax([1, cosines] / T) (Eq. 4).

  Args:
    cosines: Of the encoded query and neighbours.
    mask: False where there is no neighbour; its weight is 0.
    temperature: T, for the database side; None for Eq. 3.

  Returns:
    The query's weight first.
  """
  cosines, mask = jnp.asarray(cosines), jnp.asarray(mask)
  one = jnp.ones((*mask.shape[:-1], 1))
  whole = jnp.concatenate([one, cosines], axis=-1)
  seen = jnp.concatenate([one > 0, mask], axis=-1)
  if temperature is None:
    return jnp.where(seen, whole, 0)
  return jax.nn.softmax(whole / temperature, axis=-1, where=seen)
