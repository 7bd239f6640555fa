"""How much two representations tell of each other, if they are Gaussian.

a and b are two representations of the same thing, row by row; rho is their
correlation. Computed in float32, whatever the type.
"""

import functools

import jax
from jax import lax
import jax.numpy as jnp

from jaxshape.errors import InputError
from jaxshape.typing import Array, ArrayLike, Bool, Float, Num, typed

AXES = ("channel", "batch")

Representations = Float[ArrayLike, "batch channels"]
Mask = Bool[ArrayLike, " batch"] | Num[ArrayLike, " batch"]


@typed
def gaussian_mutual_information(
  a: Representations,
  b: Representations,
  *,
  axis: str = "channel",
  epsilon: float | int = 1e-8,
  mask: Mask | None = None,
) -> Float[Array, " any"]:
  """The information that two representations share, at least, in nats.

  MI = -1/2 log(1 - rho^2), rho = Cov(a, b) / sqrt(Var(a) Var(b)).

  Never below 0 and never above -1/2 log(epsilon). Shifts and scales of either,
  negative ones too, leave it as it is. Where one of the two does not vary, rho
  counts as 0, and there is no gradient.

  Args:
    a: One representation per row.
    b: Those of the same things, seen in another way.
    axis: What rho correlates: "channel", the channels of one example, or
      "batch", the examples of one channel.
    epsilon: Keeps value and gradient finite where rho is 1 or -1: rho^2 is
      taken (1 - epsilon) times. At least 0, which is the formula as it stands,
      and below 1.
    mask: 0 where a row is padding. Such a row shares nothing, counts in no
      channel and gets no gradient, whatever it holds.

  Returns:
    One number per example for "channel", one per channel for "batch".

  Raises:
    ValueError: An option is outside its range.
    InputError: There is but one number to correlate.

  Note:
    The index i of the paper's Eq. 1 reads as the example, so that rho is over
    its channels; the estimator of neurons it refers to has one rho per channel,
    over examples.

  Reference:
    Islam et al., "Maximizing Mutual Shape Information", BMVC 2022, Eq. 1; as a
    lower bound, Foster and Grassberger, "Lower Bounds on Mutual Information",
    Phys. Rev. E 2011.
  """
  return -mmsi(a, b, axis=axis, epsilon=epsilon, mask=mask)


@typed
def mmsi(
  a: Representations,
  b: Representations,
  *,
  axis: str = "channel",
  epsilon: float | int = 1e-8,
  mask: Mask | None = None,
) -> Float[Array, " any"]:
  """Scores two representations by how little they tell of each other.

  loss = 1/2 log(1 - rho^2), the mutual information with the other sign, so that
  to minimize it is to maximize what both share. Its gradient is
  rho / (rho^2 - 1) times that of rho. Never above 0, never below
  1/2 log(epsilon).

  Args:
    a: One representation per row.
    b: Those of the same things, seen in another way.
    axis: "channel" or "batch", as in `gaussian_mutual_information`.
    epsilon: As there.
    mask: As there; padding has loss 0.

  Returns:
    One loss per example for "channel", one per channel for "batch"; the caller
    takes the mean.

  Raises:
    ValueError: An option is outside its range.
    InputError: There is but one number to correlate.

  Note:
    The paper's Eq. 3 calls the gradient that of MI; it is that of this loss.

  Reference:
    Islam et al., "Maximizing Mutual Shape Information", BMVC 2022, Eq. 2-3.
  """
  if axis not in AXES:
    raise ValueError(f"axis must be one of {', '.join(AXES)}, got {axis!r}.")
  if not 0 <= epsilon < 1:
    raise ValueError(f"epsilon must be at least 0, below 1, got {epsilon}.")
  a, b = jnp.asarray(a), jnp.asarray(b)
  along = 1 if axis == "channel" else 0
  if a.shape[along] < 2:
    raise InputError(
      f"a and b must hold two numbers or more along axis={axis!r} to be "
      f"correlated, got {' x '.join(map(str, a.shape))} (batch x channels)."
    )
  return _mmsi(a, b, mask, epsilon, axis=along)


@functools.partial(jax.jit, static_argnames="axis")
def _mmsi(
  a: jax.Array,
  b: jax.Array,
  mask: ArrayLike | None,
  epsilon: ArrayLike,
  *,
  axis: int,
) -> jax.Array:
  counted = None if mask is None else jnp.asarray(mask)[:, None] != 0
  u, varies_u = _unit(a.astype(jnp.float32), counted, axis)
  v, varies_v = _unit(b.astype(jnp.float32), counted, axis)
  both = varies_u & varies_v
  total = lambda z: jnp.sum(z, axis=axis)
  # A row that does not vary has no direction; it gets no gradient either.
  square = jnp.where(both, total(u * v), 0.0) ** 2
  # (1 - rho) (1 + rho) without cancelling, where rho is close to 1 or -1.
  product = total((u - v) ** 2) * total((u + v) ** 2) / 4
  rest = jnp.where(both & (square > 0.5), product, 1 - square)
  return 0.5 * jnp.log(rest + jnp.asarray(epsilon, jnp.float32) * square)


def _unit(
  x: jax.Array, counted: jax.Array | None, axis: int
) -> tuple[jax.Array, jax.Array]:
  """Centred rows of length 1, zeros where one does not vary; whether it does.

  The direction depends on neither shift nor scale, so that both may be taken
  out beforehand, without a gradient: constants become exact zeros, and no
  square leaves float32.
  """
  if counted is None:
    first = lax.slice_in_dim(x, 0, 1, axis=axis)
    number, keep = x.shape[axis], lambda z: z
  else:
    counts = jnp.broadcast_to(counted, x.shape)
    place = jnp.argmax(counts, axis=axis, keepdims=True)
    first = jnp.take_along_axis(x, place, axis=axis)
    number = jnp.maximum(jnp.sum(counts, axis=axis, keepdims=True), 1)
    keep = lambda z: jnp.where(counts, z, 0.0)
  x = keep(x - lax.stop_gradient(first))
  x = keep(x - jnp.sum(x / number, axis=axis, keepdims=True))
  size = lax.stop_gradient(jnp.max(jnp.abs(x), axis=axis, keepdims=True))
  x = x / jnp.where(size == 0, 1.0, size)
  square = jnp.sum(x**2, axis=axis, keepdims=True)
  # Not "square > 0": what is not a number has to come through.
  constant = square < 0.5
  x = x / jnp.sqrt(jnp.where(constant, 1.0, square))
  return x, ~jnp.squeeze(constant, axis)
