"""Anisotropic diffusion: images become smooth inside regions, edges stay.

Notation: u is the image, d a difference of neighbouring pixels, kappa (K in
the paper) the difference that counts as an edge, c the conduction, gamma (here
`step_size`) the length of a step in time, t the number of the iteration.

Layout: rows of interleaved pixels [..., H, W * C]. The neighbour to the right
is then C places on, every access is contiguous, and nothing is transposed.
"""

from collections.abc import Callable
import functools
import math
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from jaxshape import images
from jaxshape.filters import batches, kernels
from jaxshape.typing import (
  Array,
  ArrayLike,
  Float,
  Image,
  Integer,
  Num,
  typed,
)

Conduction = Callable[[jax.Array], jax.Array]

# States that the gradient keeps. Up to this many iterations cost no
# recomputation, and it is p1's number.
_SLOTS = 20

# 2^f on (-1, 0] as a polynomial: a minimax fit, relative error 1e-7.
_EXP2 = (
  0.99999994,
  0.69314224,
  0.24017219,
  0.055279724,
  0.009188612,
  0.0009387883,
)


@jax.custom_jvp
def _exp_neg(t: jax.Array) -> jax.Array:
  """exp(-t) for t >= 0 in the few operations that it needs on CPUs."""
  t = jnp.minimum(t * np.float32(math.log2(math.e)), 126.0)
  whole = t.astype(jnp.int32)
  rest = whole.astype(jnp.float32) - t
  power = jnp.float32(_EXP2[-1])
  for k in _EXP2[-2::-1]:
    power = power * rest + np.float32(k)
  return power * lax.bitcast_convert_type((127 - whole) << 23, jnp.float32)


@_exp_neg.defjvp
def _exp_neg_jvp(primals: Any, tangents: Any) -> Any:
  out = _exp_neg(primals[0])
  return out, -out * tangents[0]


# Conduction as a function of the squared ratio s = (|d| / kappa)^2.


def _exponential(s: jax.Array) -> jax.Array:
  return jnp.exp(-s)


def _exponential_on_cpu(s: jax.Array) -> jax.Array:
  return _exp_neg(s)


def _rational(s: jax.Array) -> jax.Array:
  return 1 / (1 + s)


def _tukey(s: jax.Array) -> jax.Array:
  # sigma = K * sqrt(2). The minimum instead of a case keeps gradients finite.
  rest = 1 - jnp.minimum(0.5 * s, 1)
  return 0.5 * (rest * rest)


_CONDUCTIONS: dict[str, Conduction] = {
  "exponential": _exponential,
  "rational": _rational,
  "tukey": _tukey,
}


@functools.cache
def _of_square(conduction: Conduction) -> Conduction:
  """A user's c(r) as a function of r^2; one object for one function."""

  def squared(s: jax.Array) -> jax.Array:
    # The root has no slope at 0, where none is needed.
    root = jnp.sqrt(jnp.where(s > 0, s, 1))
    return conduction(jnp.where(s > 0, root, 0))

  return squared


class _Plan(NamedTuple):
  """What each image of a batch is to get, [B] and an axis for each of its."""

  steps: Any  # Iterations.
  slope: jax.Array  # 1 / kappa.
  gamma: jax.Array


# A step in time of a batch, given 1 / kappa and gamma.
Step = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def _ratio(d: jax.Array, slope: jax.Array) -> jax.Array:
  """Gives d / kappa; 1 / kappa may be written out along rows (`_in_rows`)."""
  return d * slope[..., max(0, slope.shape[-1] - d.shape[-1]) :]


def _step(
  conduction: Conduction,
  channels: int,
  u: jax.Array,
  slope: jax.Array,
  gamma: jax.Array,
) -> jax.Array:
  """An explicit step: each flux is computed once, none crosses the border."""

  def flux(d: jax.Array) -> jax.Array:
    r = _ratio(d, slope)
    return d * conduction(r * r)

  down = flux(u[:, 1:] - u[:, :-1])
  down = jnp.pad(down, [(0, 0), (1, 1), (0, 0)])
  right = flux(u[..., channels:] - u[..., :-channels])
  right = jnp.pad(right, [(0, 0), (0, 0), (channels, channels)])
  return u + gamma * (
    (down[:, 1:] - down[:, :-1])
    + (right[..., channels:] - right[..., :-channels])
  )


def _coupled_step(
  conduction: Conduction, u: jax.Array, slope: jax.Array, gamma: jax.Array
) -> jax.Array:
  """The same with planes [B, C, H, W] that share one conduction."""

  def flux(d: jax.Array) -> jax.Array:
    r = _ratio(d, slope)
    return d * conduction(jnp.sum(r * r, axis=1, keepdims=True))

  sides = [(0, 0), (0, 0)]
  down = flux(u[:, :, 1:] - u[:, :, :-1])
  down = jnp.pad(down, [*sides, (1, 1), (0, 0)])
  right = flux(u[..., 1:] - u[..., :-1])
  right = jnp.pad(right, [*sides, (0, 0), (1, 1)])
  return u + gamma * (
    (down[:, :, 1:] - down[:, :, :-1]) + (right[..., 1:] - right[..., :-1])
  )


def _derivative(
  step: Callable[..., jax.Array],
  at: tuple[jax.Array, ...],
  i: int,
  along: jax.Array,
) -> jax.Array:
  """The change of a step when its argument i changes along a direction."""
  of_one = lambda a: step(*at[:i], a, *at[i + 1 :])
  return jax.jvp(of_one, (at[i],), (along,))[1]


def _once(step: Step, u: jax.Array, plan: _Plan, t: ArrayLike) -> jax.Array:
  """Iteration t of the images that have some left."""
  return jnp.where(t < plan.steps, step(u, plan.slope, plan.gamma), u)


def _advance(
  step: Step, u: jax.Array, plan: _Plan, start: ArrayLike, stop: ArrayLike
) -> jax.Array:
  """Iterations start..stop - 1."""
  body = lambda t, u: _once(step, u, plan, t)
  return lax.fori_loop(start, stop, body, u)


def _in_rows(u: jax.Array, plan: _Plan) -> _Plan:
  """Writes 1 / kappa out along the rows.

  With a number that the compiler does not know in its place, the loops over
  pixels take more than twice the time on CPUs.
  """
  shape = (*plan.slope.shape[:-1], u.shape[-1])
  slope = lax.optimization_barrier(jnp.broadcast_to(plan.slope, shape))
  return plan._replace(slope=slope)


def _forward(step: Step, u: jax.Array, plan: _Plan) -> jax.Array:
  """All iterations of a batch in one loop."""
  plan = _in_rows(u, plan)
  return _advance(step, u, plan, 0, jnp.max(plan.steps))


def _forward_by_twos(step: Step, u: jax.Array, plan: _Plan) -> jax.Array:
  """The same, two iterations a round.

  On a GPU a loop's state is copied before a round unless it is overwritten by
  what another buffer held; seen in programs compiled for an H100.
  """
  last = jnp.max(plan.steps)

  def body(i: jax.Array, u: jax.Array) -> jax.Array:
    u = lax.optimization_barrier(_once(step, u, plan, 2 * i))
    return _once(step, u, plan, 2 * i + 1)

  return lax.fori_loop(0, (last + 1) // 2, body, u)


def _backward(
  step: Step, u: jax.Array, plan: _Plan, v: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The gradients of <v, result> by image, 1 / kappa and gamma.

  Every `stride`-th state is stored, at most `_SLOTS` of them whatever the
  count, and those between are computed anew from the last one stored.
  """
  plan = _in_rows(u, plan)
  axes = tuple(range(1, u.ndim))
  longest = jnp.max(plan.steps)
  stride = jnp.maximum(1, (longest + _SLOTS - 1) // _SLOTS)

  def store(slot: jax.Array, carry: Any) -> Any:
    u, states = carry
    states = lax.dynamic_update_index_in_dim(states, u, slot, 0)
    start = slot * stride
    return _advance(step, u, plan, start, start + stride), states

  states = jnp.zeros((_SLOTS, *u.shape), u.dtype)
  slots = (longest + stride - 1) // stride
  _, states = lax.fori_loop(0, slots, store, (u, states))

  def adjoint(k: jax.Array, carry: Any) -> Any:
    v, *sums = carry
    t = longest - 1 - k
    slot = t // stride
    u = lax.dynamic_index_in_dim(states, slot, 0, keepdims=False)
    # Even without iterations this loop keeps the copy above out of the
    # arithmetic below, which could not be vectorised with it.
    u = _advance(step, u, plan, slot * stride, t)
    at = u, plan.slope, plan.gamma
    # A step's Jacobian by u, 1 - gamma D^T g D, is its own transpose: forward
    # mode gives the adjoint, and as a stencil like that of the step.
    dv = _derivative(step, at, 0, v)
    by_option = [_derivative(step, at, i, jnp.ones_like(at[i])) for i in (1, 2)]
    on = t < plan.steps
    sums = [
      total + jnp.where(on, jnp.sum(v * d, axes, keepdims=True), 0)
      for total, d in zip(sums, by_option, strict=True)
    ]
    return jnp.where(on, dv, v), *sums

  start = v, jnp.zeros_like(plan.gamma), jnp.zeros_like(plan.gamma)
  return lax.fori_loop(0, longest, adjoint, start)


def _form(
  loop: Callable[..., Any], conduction: Conduction, channels: int | None
) -> Callable[..., Any]:
  """A loop over a batch of rows, or of planes if `channels` is None."""
  if channels is None:
    return functools.partial(loop, functools.partial(_coupled_step, conduction))
  return functools.partial(loop, functools.partial(_step, conduction, channels))


def _on_cpu(conduction: Conduction) -> Conduction:
  return _exponential_on_cpu if conduction is _exponential else conduction


def _by_kernel(
  conduction: Conduction, channels: int, u: jax.Array, plan: _Plan
) -> jax.Array:
  """One kernel for all iterations of a plane, where it applies."""
  size, height, width = u.shape[0], u.shape[1], u.shape[2] // channels
  planes = u.reshape(size, height, width, channels).transpose(0, 3, 1, 2)
  each = [jnp.repeat(jnp.reshape(a, size), channels) for a in plan]
  out = kernels.diffuse_planes(
    planes.reshape(-1, height, width), *each, conduction=conduction
  )
  out = out.reshape(size, channels, height, width).transpose(0, 2, 3, 1)
  return out.reshape(u.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _diffuse(
  conduction: Conduction, channels: int | None, u: jax.Array, plan: _Plan
) -> jax.Array:
  # Where several devices share the batch they exchange nothing but the
  # longest count.
  here = _form(_forward, _on_cpu(conduction), channels)
  elsewhere = _form(_forward_by_twos, conduction, channels)
  if (
    kernels.USED
    and channels is not None
    and conduction in _CONDUCTIONS.values()
    and jax.device_count() == 1
    and kernels.applies((u.shape[1], u.shape[2] // channels))
  ):
    whole = elsewhere
    kernel = functools.partial(_by_kernel, conduction, channels)
    elsewhere = lambda *batch: lax.platform_dependent(
      *batch, cuda=kernel, default=whole
    )
  return batches.run(here, elsewhere, u, plan)


def _diffuse_fwd(
  conduction: Conduction, channels: int | None, u: jax.Array, plan: _Plan
) -> Any:
  return _diffuse(conduction, channels, u, plan), (u, plan)


def _diffuse_bwd(
  conduction: Conduction, channels: int | None, batch: Any, v: jax.Array
) -> Any:
  u, plan = batch
  here = _form(_backward, _on_cpu(conduction), channels)
  elsewhere = _form(_backward, conduction, channels)
  du, ds, dg = batches.run(here, elsewhere, u, plan, v)
  none = np.zeros(plan.steps.shape, jax.dtypes.float0)
  return du, _Plan(none, ds, dg)


_diffuse.defvjp(_diffuse_fwd, _diffuse_bwd)


@functools.partial(jax.jit, static_argnames=("conduction", "coupled"))
def _perona_malik(
  image: Any,
  kappa: Any,
  step_size: Any,
  iterations: Any,
  *,
  conduction: Conduction,
  coupled: bool,
) -> jax.Array:
  *leading, height, width, channels = image.shape
  size = math.prod(leading)
  axes = (1, 1, 1) if coupled else (1, 1)

  def per_image(a: Any, dtype: Any) -> jax.Array:
    each = jnp.broadcast_to(jnp.asarray(a, dtype), leading)
    return jnp.reshape(each, (size, *axes))

  plan = _Plan(
    per_image(iterations, jnp.int32),
    1 / jnp.maximum(per_image(kappa, jnp.float32), 1e-15),
    per_image(step_size, jnp.float32),
  )
  u = images.as_float32(image).reshape(size, height, width * channels)
  if coupled:
    planes = u.reshape(size, height, width, channels).transpose(0, 3, 1, 2)
    out = _diffuse(conduction, None, planes, plan)
    out = jnp.moveaxis(jnp.asarray(out), 1, -1)
  else:
    out = jnp.asarray(_diffuse(conduction, channels, u, plan))
  return out.reshape(image.shape).astype(images.result_type(image))


@typed
def perona_malik(
  image: Image | images.Picture,
  *,
  kappa: Num[ArrayLike, "*#batch"] = 20.0,
  step_size: Num[ArrayLike, "*#batch"] = 0.1,
  iterations: Integer[ArrayLike, "*#batch"] = 20,
  conduction: str | Conduction = "exponential",
  coupled: bool = False,
) -> Float[Array, "*batch height width channels"]:
  """Smooths texture away and keeps the edges.

  u <- u + gamma * sum of c(d / kappa) * d over the differences d to the four
  neighbours, where no flux crosses the border, and c(r) is
  "exponential": exp(-r^2), which favours edges of high contrast;
  "rational": 1 / (1 + r^2), which favours wide regions;
  "tukey": (1 - r^2 / 2)^2 / 2 up to |r| = sqrt(2), then 0, which stops at
  edges for good (and moves half as fast in flat regions).

  Each channel diffuses by itself, or with `coupled` all by one conduction:
  |d| in it is then the length of the difference of the two pixels' colours,
  so that an edge in one channel is one in all, and no false colours appear.

  The mean stays, and so do the bounds of the values. Everything is computed in
  float32, whatever the type. A pixel that is NaN or infinite makes its
  neighbours NaN, one pixel further with each iteration.

  Options may differ between images (arrays that broadcast to the leading axes)
  and may be traced: no value compiles anew. Traced values are not checked.
  Gradients flow to image, kappa and step_size in reverse mode; at most 20
  states are stored for them, whatever the number of iterations.

  Other libraries' names for the same options:

  | jaxshape     | MedPy      | OpenCV ximgproc | SimpleITK            |
  |--------------|------------|-----------------|----------------------|
  | `kappa`      | `kappa`    | `K` (of 0..1)   | `conductance` (~)    |
  | `step_size`  | `gamma`    | `alpha`         | `timeStep`           |
  | `iterations` | `niter`    | `niters`        | `numberOfIterations` |
  | `conduction` | `option`   | exponential     | exponential          |

  MedPy's options 1, 2, 3 are "exponential", "rational", "tukey", and its
  result is ours, channel by channel (over an array with channels it diffuses
  from channel to channel as well). The other two differ in more than names:
  OpenCV has eight neighbours, one conduction for all channels, and rounds each
  iteration; SimpleITK scales its conductance by the image's mean gradient.

  Args:
    image: In any unit; uint8 arrays and pictures of PIL are taken as 0..255.
    kappa: The difference between neighbours that counts as an edge, above 0,
      in the image's units; 20 suits 0..255.
    step_size: Above 0 and up to 0.25, where the scheme is still stable.
    iterations: At least 0, which leaves the image as it is.
    conduction: One of the names above, or c itself, elementwise, given r >= 0;
      keep one function object, as each new one compiles anew.
    coupled: Whether the channels share one conduction. On equal channels,
      kappa * sqrt(channels) then does what kappa did.

  Returns:
    The smoothed image, in the image's type if that is a float type and
    float32 otherwise.

  Raises:
    ValueError: An option is outside its range.
    InputError: A picture of PIL has more than eight bits per channel.

  Reference:
    Perona and Malik, "Scale-Space and Edge Detection Using Anisotropic
    Diffusion", PAMI 1990, Eq. 7-10. Tukey's biweight: Black et al., "Robust
    Anisotropic Diffusion", IEEE Trans. Image Processing 1998. Coupled channels:
    Gerig et al., "Nonlinear Anisotropic Filtering of MRI Data", IEEE Trans.
    Medical Imaging 1992, Section III.

  Note:
    Black et al. scale Tukey's function by sigma = kappa * sqrt(5); MedPy and
    this function take kappa * sqrt(2), as texture suppression was done so.
  """
  values = images.read(image)
  if isinstance(conduction, str):
    if conduction not in _CONDUCTIONS:
      raise ValueError(
        f"conduction must be one of {', '.join(_CONDUCTIONS)} or a function, "
        f"got {conduction!r}."
      )
    conduction = _CONDUCTIONS[conduction]
  else:
    conduction = _of_square(conduction)
  known = images.concrete(kappa)
  if known is not None and not (known > 0).all():
    raise ValueError(f"kappa must be above 0, got {kappa}.")
  images.warn_of_units(values, "kappa", known)
  known = images.concrete(step_size)
  if known is not None and not ((known > 0) & (known <= 0.25)).all():
    raise ValueError(
      f"step_size must be above 0 and at most 0.25, got {step_size}."
    )
  known = images.concrete(iterations)
  if known is not None and not ((known >= 0) & (known < 2**31)).all():
    raise ValueError(f"iterations must be in 0..2^31 - 1, got {iterations}.")
  if values.size == 0:
    return jnp.asarray(values, images.result_type(values))
  return _perona_malik(
    values,
    kappa,
    step_size,
    iterations,
    conduction=conduction,
    coupled=coupled,
  )


def _median(values: jax.Array) -> jax.Array:
  """The median of what is finite in each row of [B, n], of values from 0 up.

  Such floats are ordered as their bits are. Each pass over them finds one bit
  of the answer; a sort takes ten times longer.
  """
  finite = jnp.isfinite(values)
  last = np.int32(2**31 - 1)
  bits = jnp.where(finite, lax.bitcast_convert_type(values, jnp.int32), last)
  count = lambda hit: jnp.sum(hit, axis=1, keepdims=True, dtype=jnp.int32)

  number = count(finite)
  rank, far = (number - 1) // 2, number // 2

  def refine(i: jax.Array, low: jax.Array) -> jax.Array:
    guess = low | (1 << (30 - i))
    return jnp.where(count(bits < guess) <= rank, guess, low)

  low = lax.fori_loop(0, 31, refine, jnp.zeros((len(bits), 1), jnp.int32))
  above = jnp.where(bits > low, bits, last).min(1, keepdims=True)
  # Of an even number, the mean of the two in the middle.
  high = jnp.where(count(bits <= low) > far, low, above)
  as_float = lambda a: lax.bitcast_convert_type(a, jnp.float32)
  middle = 0.5 * (as_float(low) + as_float(high))
  return jnp.where(number > 0, middle, 0)[:, 0]


@jax.jit
def _gradient_scale(image: jax.Array) -> jax.Array:
  *leading, height, width, channels = image.shape
  size = math.prod(leading)

  def scale(u: jax.Array) -> jax.Array:
    steps = [u[:, 1:] - u[:, :-1], u[..., channels:] - u[..., :-channels]]
    d = jnp.concatenate([jnp.abs(a).reshape(len(u), -1) for a in steps], 1)
    return 1.4826 * _median(d) if d.shape[1] else jnp.zeros(len(u))

  u = lax.stop_gradient(images.as_float32(image))
  u = u.reshape(size, height, width * channels)
  return batches.in_groups(scale, u).reshape(leading)


@typed
def gradient_scale(
  image: Image | images.Picture,
) -> Float[Array, "*batch"]:
  """Estimates which differences of neighbours are texture, not edges.

  sigma_e = 1.4826 * median |d| over all differences d of neighbours of an
  image, in all channels: the median absolute deviation (each pair seen from
  both sides has d and -d, so the median of d is 0), scaled to be the standard
  deviation of a normal distribution. Edges, being few, do not move it. 0 for
  an image that is flat for more than half. What is NaN or infinite does not
  count. It takes no part in gradients, and takes several times as long as an
  iteration of diffusion.

  Args:
    image: In any unit.

  Returns:
    One scale per image, in its unit.

  Reference:
    Black et al., "Robust Anisotropic Diffusion", IEEE Trans. Image Processing
    1998, Section III.
  """
  values = images.read(image)
  if values.size == 0:
    return jnp.zeros(values.shape[:-3])
  return _gradient_scale(values)


@typed
def robust(
  image: Image | images.Picture,
  *,
  scale: Num[ArrayLike, "*#batch"] | None = None,
  step_size: Num[ArrayLike, "*#batch"] = 0.1,
  iterations: Integer[ArrayLike, "*#batch"] = 20,
  coupled: bool = False,
) -> Float[Array, "*batch height width channels"]:
  """Smooths what the image itself shows to be texture, and nothing beyond.

  `perona_malik` with Tukey's conduction, c = (1 - (d / sigma)^2)^2 / 2 up to
  |d| = sigma = sqrt(5) * sigma_e and 0 above: differences that are outliers of
  the image's own distribution are edges, which no number of iterations wears
  down. There is no kappa to choose and no unit to get wrong.

  Args:
    image: In any unit; uint8 arrays and pictures of PIL are taken as 0..255.
    scale: sigma_e, above 0, in the image's units; by default each image's own
      `gradient_scale`.
    step_size: As in `perona_malik`. Flat regions move half as fast as with
      the exponential conduction.
    iterations: As in `perona_malik`.
    coupled: As in `perona_malik`.

  Returns:
    The smoothed image, in the image's type if that is a float type and
    float32 otherwise.

  Raises:
    ValueError: An option is outside its range.
    InputError: A picture of PIL has more than eight bits per channel.

  Reference:
    Black et al., "Robust Anisotropic Diffusion", IEEE Trans. Image Processing
    1998, Section III.
  """
  values = images.read(image)
  if scale is None:
    scale = gradient_scale(values)
  else:
    known = images.concrete(scale)
    if known is not None and not (known > 0).all():
      raise ValueError(f"scale must be above 0, got {scale}.")
  # Tukey's function is cut at kappa * sqrt(2) there. An image without scale
  # stays as it is.
  kappa = jnp.maximum(jnp.asarray(scale, jnp.float32), 1e-12) * math.sqrt(2.5)
  return perona_malik(
    values,
    kappa=kappa,
    step_size=step_size,
    iterations=iterations,
    conduction="tukey",
    coupled=coupled,
  )
