"""How many neurons tell of shape and how many of texture.

Two images of a pair have one factor in common: shape (0), texture (1) or
whatever else is numbered. The more the latents of both vary together over the
pairs, the more neurons are taken to stand for that factor. What no factor
claims is the residual, which comes last.

Reference:
  Islam et al., "Shape or Texture: Understanding Discriminative Features in
  CNNs", ICLR 2021, its dimensionality estimation and public code; after Esser
  et al., "A Disentangling Invertible Interpretation Network for Explaining
  Latent Representations", CVPR 2020.
"""

import functools

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from jaxshape import images
from jaxshape.errors import InputError
from jaxshape.typing import Array, ArrayLike, Float, Int, Integer, typed

Latents = Float[ArrayLike, "pairs neurons"]
Factor = Integer[ArrayLike, " pairs"]


@typed
def factor_scores(
  latents_a: Latents,
  latents_b: Latents,
  factor: Factor,
  *,
  num_factors: int = 2,
) -> Float[Array, " scores"]:
  """Scores each factor by how much its pairs vary together.

  score_k = sum_d mean_n (a_nd - mu_kd) (b_nd - mu_kd) / sum_d var_d, over the
  pairs n of factor k. mu_k is the mean of both members of these pairs; var is
  that of all latents, whatever their factor.

  Args:
    latents_a: One row per pair: the latents of its first image.
    latents_b: Those of its second.
    factor: What the images of each pair share, 0..num_factors - 1. Pairs of
      other factors count in var alone.
    num_factors: Number of factors.

  Returns:
    One score per factor, about -1..1, and 1 for the residual. NaN where the
    latents do not vary, and for a factor without pairs if `factor` is traced.

  Raises:
    ValueError: There are no factors.
    InputError: No pair has one of the factors.

  Note:
    As in the public code, the sums over neurons are divided, so that neurons of
    large variance weigh more; `correlation_scores` weighs all alike. Its data
    set draws factors up to and including 3, of which 2 and 3 are not scored.

  Reference:
    Islam et al. 2021, public code.
  """
  _check(factor, num_factors)
  return _factor_scores(latents_a, latents_b, factor, num_factors=num_factors)


@typed
def correlation_scores(
  latents_a: Latents,
  latents_b: Latents,
  factor: Factor,
  *,
  num_factors: int = 2,
) -> Float[Array, " scores"]:
  """Scores each factor by the mean correlation of its neurons.

  score_k = mean_d rho_kd, with rho_kd the correlation of neuron d between both
  images, over the pairs of factor k: what the paper describes, every neuron
  weighing the same.

  Args:
    latents_a: As in `factor_scores`.
    latents_b: As there.
    factor: As there.
    num_factors: Number of factors.

  Returns:
    One score per factor, -1..1, and 1 for the residual. NaN for a factor
    without pairs if `factor` is traced.

  Raises:
    ValueError: There are no factors.
    InputError: No pair has one of the factors.

  Reference:
    Islam et al., "Maximizing Mutual Shape Information", BMVC 2022, Eq. 1, for
    the correlation; Islam et al. 2021 for the score.
  """
  _check(factor, num_factors)
  return _correlation_scores(
    latents_a, latents_b, factor, num_factors=num_factors
  )


@typed
def correlation_per_neuron(a: Latents, b: Latents) -> Float[Array, " neurons"]:
  """How each neuron's answers to both images of a pair correlate.

  rho_d = Cov(a_d, b_d) / sqrt(Var(a_d) Var(b_d)), over the pairs. A neuron that
  does not vary has 0.

  Args:
    a: One row per pair, all of one factor: the latents of its first image.
    b: Those of its second.

  Returns:
    One correlation per neuron, -1..1.

  Reference:
    Islam et al., "Maximizing Mutual Shape Information", BMVC 2022, Eq. 1.
  """
  return _correlation_of_all(a, b)


@typed
def shares(scores: Float[ArrayLike, " scores"]) -> Float[Array, " scores"]:
  """What part of the neurons each score stands for, exp(s_k) / sum_j exp(s_j).

  Args:
    scores: From `factor_scores` or `correlation_scores`, the residual's last.

  Returns:
    Shares that sum to 1.

  Note:
    The residual's score is 1 always. So of two factors that nothing tells of,
    each has 21 % of the neurons, and the residual never less than a third while
    scores are at most 1.

  Reference:
    Islam et al. 2021, public code.
  """
  return jax.nn.softmax(jnp.asarray(scores, jnp.float32))


@typed
def share_by_correlation(
  latents_a: Latents,
  latents_b: Latents,
  factor: Factor,
  *,
  num_factors: int = 2,
) -> Float[Array, " scores"]:
  """What part of the neurons tells of each factor, by their correlations.

  `shares` of `correlation_scores`. Finer than whole neurons, for networks that
  have few.

  Args:
    latents_a: As in `factor_scores`.
    latents_b: As there.
    factor: As there.
    num_factors: Number of factors.

  Returns:
    Shares of the factors and the residual, which sum to 1; NaN where a score
    is.

  Raises:
    ValueError: There are no factors.
    InputError: No pair has one of the factors.

  Reference:
    Islam et al. 2021.
  """
  return shares(
    correlation_scores(latents_a, latents_b, factor, num_factors=num_factors)
  )


@typed
def count_neurons(
  latents_a: Latents,
  latents_b: Latents,
  factor: Factor,
  *,
  num_factors: int = 2,
) -> Int[Array, " scores"]:
  """How many neurons tell of each factor.

  n_k = floor(D share_k) of D neurons, with the `shares` of `factor_scores`; the
  residual takes the rest.

  Args:
    latents_a: As in `factor_scores`.
    latents_b: As there.
    factor: As there.
    num_factors: Number of factors.

  Returns:
    Neurons per factor (shape, texture) and residual, which sum to D; -1 for all
    where a score is NaN.

  Raises:
    ValueError: There are no factors.
    InputError: No pair has one of the factors.

  Note:
    The public code also prints 100 n_k / D, rounded to one decimal.

  Reference:
    Islam et al. 2021, public code.
  """
  neurons = np.shape(latents_a)[1]
  share = shares(
    factor_scores(latents_a, latents_b, factor, num_factors=num_factors)
  )
  known = ~jnp.any(jnp.isnan(share))
  counts = jnp.where(known, share[:-1] * neurons, 0.0).astype(jnp.int32)
  counts = jnp.append(counts, neurons - jnp.sum(counts))
  return jnp.where(known, counts, -1)


def _check(factor: Factor, num_factors: int) -> None:
  if num_factors < 1:
    raise ValueError(f"num_factors must be 1 or more, got {num_factors}.")
  known = images.concrete(factor)
  if known is not None:
    missing = [k for k in range(num_factors) if not np.any(known == k)]
    if missing:
      raise InputError(
        f"factor must hold pairs of every factor 0..{num_factors - 1}, got "
        f"{known.size} pairs and none of {', '.join(map(str, missing))}."
      )


@functools.partial(jax.jit, static_argnames="num_factors")
def _factor_scores(
  a: ArrayLike, b: ArrayLike, factor: ArrayLike, *, num_factors: int
) -> jax.Array:
  a, b = _centred(a, b)
  member, counts = _members(factor, num_factors)
  sums = jnp.matmul(
    member.T.astype(jnp.float32), a + b, precision=lax.Precision.HIGHEST
  )
  mean = sums / (2 * jnp.maximum(counts, 1)[:, None])
  own = mean[jnp.clip(jnp.asarray(factor), 0, num_factors - 1)]
  together = jnp.sum((a - own) * (b - own), axis=1)
  together = jnp.sum(jnp.where(member, together[:, None], 0.0), axis=0)
  total = jnp.sum(jnp.sum(a**2 + b**2, axis=1)) / (2 * a.shape[0])
  return jnp.append(together / counts / total, 1.0)


@functools.partial(jax.jit, static_argnames="num_factors")
def _correlation_scores(
  a: ArrayLike, b: ArrayLike, factor: ArrayLike, *, num_factors: int
) -> jax.Array:
  a, b = _centred(a, b)
  member, counts = _members(factor, num_factors)
  rho = jax.vmap(_correlation, (None, None, 1))(a, b, member)
  scores = jnp.where(counts > 0, jnp.mean(rho, axis=1), jnp.nan)
  return jnp.append(scores, 1.0)


@jax.jit
def _correlation_of_all(a: ArrayLike, b: ArrayLike) -> jax.Array:
  a, b = _centred(a, b)
  return _correlation(a, b, jnp.ones(len(a), bool))


def _centred(a: ArrayLike, b: ArrayLike) -> tuple[jax.Array, jax.Array]:
  """Both less the mean of all: nothing here depends on it."""
  a, b = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
  # A mean is rounded; so a constant becomes 0 and a large offset small before.
  a, b = a - a[:1], b - a[:1]
  mean = (jnp.mean(a, axis=0) + jnp.mean(b, axis=0)) / 2
  return a - mean, b - mean


def _members(
  factor: ArrayLike, num_factors: int
) -> tuple[jax.Array, jax.Array]:
  """Whether each pair is of each factor, and how many are."""
  member = jnp.asarray(factor)[:, None] == jnp.arange(num_factors)
  return member, jnp.sum(member, axis=0).astype(jnp.float32)


def _correlation(a: jax.Array, b: jax.Array, member: jax.Array) -> jax.Array:
  """The correlation of each column, over the rows that are members."""
  member, count = member[:, None], jnp.maximum(jnp.sum(member), 1)

  def centred(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    x = jnp.where(member, x, 0.0)
    size = jnp.sqrt(jnp.sum(x**2, axis=0))
    x = jnp.where(member, x - jnp.sum(x, axis=0) / count, 0.0)
    norm = jnp.sqrt(jnp.sum(x**2, axis=0))
    # What rounding leaves of a constant is not variance.
    return x, jnp.where(norm <= 1e-6 * size, 0.0, norm)

  (a, norm_a), (b, norm_b) = centred(a), centred(b)
  product = norm_a * norm_b
  rho = jnp.sum(a * b, axis=0) / jnp.where(product == 0, 1.0, product)
  return jnp.clip(jnp.where(product == 0, 0.0, rho), -1, 1)
