"""Attacks along the sign of the gradient: the largest harm within a small box.

Notation: x is the image and x_t the attacked one after t steps; alpha is the
step size; the ball holds what differs from x by at most epsilon in every value.
L is the cross-entropy of one image with its label, so that the images of a
batch do not influence each other. clip cuts to the ball and then to low..high,
both of which hold in float32 exactly.

epsilon and step sizes are in the image's units: of images in 0..255, the
literature's 8/255 is 8. They may be traced, and then are not checked; a
function compiled over them, as in

  attack = jax.jit(lambda params, image, label, epsilon: gradient.fgsm(
    lambda x: net.apply(params, x), image, label, epsilon=epsilon))

compiles once for all of them. `logits_fn` gives logits [n, classes] of float32
images [n, height, width, channels], each row from its image alone.
"""

from collections.abc import Callable
import math
from typing import Any

import jax
from jax import core
import jax.numpy as jnp

from jaxshape import images
from jaxshape.errors import InputError, few
from jaxshape.losses import classification
from jaxshape.typing import (
  Array,
  ArrayLike,
  Float,
  Image,
  Integer,
  Key,
  Num,
  Size,
  typed,
)

LogitsFn = Callable[[Array], Array]


@typed
def fgsm(
  logits_fn: LogitsFn,
  image: Image | images.Picture,
  label: Integer[ArrayLike, "*batch"],
  *,
  epsilon: Num[ArrayLike, "*#batch"],
  targeted: bool = False,
  low: float | int = 0.0,
  high: float | int = 255.0,
) -> Float[Array, "*batch height width channels"]:
  """Takes one step of full length: the fast gradient sign method.

  x_1 = clip(x + epsilon sign(dL/dx)); towards the label, with a minus.

  Args:
    logits_fn: The network, see above.
    image: Within low..high.
    label: From 0; what is to be unlearned or, if targeted, to be named.
    epsilon: Radius of the ball, 0..high - low; may differ between images.
    targeted: Whether to descend to the label instead of away from it.
    low: The least value of an image.
    high: The greatest one.

  Returns:
    The attacked images, float32; constants where this is differentiated.

  Raises:
    ValueError: An option is outside its range.
    InputError: The image is not within low..high, or a label is no class.

  Reference:
    Goodfellow et al., "Explaining and Harnessing Adversarial Examples", ICLR
    2015, Sec. 4.
  """
  return sign_ascent(
    logits_fn,
    image,
    label,
    epsilon=epsilon,
    step_size=epsilon,
    iterations=1,
    targeted=targeted,
    low=low,
    high=high,
  )


@typed
def iterative_fgsm(
  logits_fn: LogitsFn,
  image: Image | images.Picture,
  label: Integer[ArrayLike, "*batch"],
  *,
  epsilon: Num[ArrayLike, "*#batch"],
  step_size: Num[ArrayLike, "*#batch"] | None = None,
  iterations: Size = 10,
  targeted: bool = False,
  low: float | int = 0.0,
  high: float | int = 255.0,
) -> Float[Array, "*batch height width channels"]:
  """Takes several short steps: I-FGSM, also called BIM.

  x_{t+1} = clip(x_t + alpha sign(dL/dx(x_t))), x_0 = x.

  Args:
    logits_fn: The network, see above.
    image: Within low..high.
    label: From 0; what is to be unlearned or, if targeted, to be named.
    epsilon: Radius of the ball, 0..high - low; may differ between images.
    step_size: alpha, at least 0; without it epsilon / iterations, which just
      reaches the border of the ball.
    iterations: At least 1.
    targeted: Whether to descend to the label instead of away from it.
    low: The least value of an image.
    high: The greatest one.

  Returns:
    The attacked images, float32; constants where this is differentiated.

  Raises:
    ValueError: An option is outside its range.
    InputError: The image is not within low..high, or a label is no class.

  Reference:
    Kurakin et al., "Adversarial Examples in the Physical World", ICLR Workshop
    2017, Sec. 2.2.

  Note:
    There, alpha is 1 of 0..255 and the iterations follow epsilon.
  """
  _at_least("iterations", iterations, 1)
  if step_size is None:
    step_size = _values(epsilon) / iterations
  return sign_ascent(
    logits_fn,
    image,
    label,
    epsilon=epsilon,
    step_size=step_size,
    iterations=iterations,
    targeted=targeted,
    low=low,
    high=high,
  )


@typed
def momentum_fgsm(
  logits_fn: LogitsFn,
  image: Image | images.Picture,
  label: Integer[ArrayLike, "*batch"],
  *,
  epsilon: Num[ArrayLike, "*#batch"],
  step_size: Num[ArrayLike, "*#batch"] | None = None,
  iterations: Size = 5,
  decay: Num[ArrayLike, ""] = 1.0,
  targeted: bool = False,
  low: float | int = 0.0,
  high: float | int = 255.0,
) -> Float[Array, "*batch height width channels"]:
  """Steps along a running sum of gradients: MI-FGSM, also called MIM.

  g_{t+1} = mu g_t + dL/dx(x_t) / ||dL/dx(x_t)||_1,
  x_{t+1} = clip(x_t + alpha sign(g_{t+1})), with mu = decay, g_0 = 0, x_0 = x.
  The norm is of each image; a gradient of 0 adds nothing.

  Args:
    logits_fn: The network, see above.
    image: Within low..high.
    label: From 0; what is to be unlearned or, if targeted, to be named.
    epsilon: Radius of the ball, 0..high - low; may differ between images.
    step_size: alpha, at least 0; without it epsilon / iterations.
    iterations: At least 1.
    decay: mu, at least 0; 0 gives `iterative_fgsm`.
    targeted: Whether to descend to the label instead of away from it.
    low: The least value of an image.
    high: The greatest one.

  Returns:
    The attacked images, float32; constants where this is differentiated.

  Raises:
    ValueError: An option is outside its range.
    InputError: The image is not within low..high, or a label is no class.

  Reference:
    Dong et al., "Boosting Adversarial Attacks with Momentum", CVPR 2018, Eq. 6
    and 7.
  """
  _at_least("iterations", iterations, 1)
  if step_size is None:
    step_size = _values(epsilon) / iterations
  return sign_ascent(
    logits_fn,
    image,
    label,
    epsilon=epsilon,
    step_size=step_size,
    iterations=iterations,
    decay=decay,
    targeted=targeted,
    low=low,
    high=high,
  )


@typed
def pgd(
  key: Key[Array, ""],
  logits_fn: LogitsFn,
  image: Image | images.Picture,
  label: Integer[ArrayLike, "*batch"],
  *,
  epsilon: Num[ArrayLike, "*#batch"],
  step_size: Num[ArrayLike, "*#batch"] | None = None,
  iterations: Size = 10,
  random_start: bool = True,
  start: Num[ArrayLike, "*#batch height width channels"] | None = None,
  targeted: bool = False,
  low: float | int = 0.0,
  high: float | int = 255.0,
) -> Float[Array, "*batch height width channels"]:
  """Steps from a random point of the ball: projected gradient descent.

  x_{t+1} = clip(x_t + alpha sign(dL/dx(x_t))), x_0 = clip(x + u), with every
  value of u uniform in -epsilon..epsilon.

  Args:
    key: Draws u, and nothing if u is given or 0.
    logits_fn: The network, see above.
    image: Within low..high.
    label: From 0; what is to be unlearned or, if targeted, to be named.
    epsilon: Radius of the ball, 0..high - low; may differ between images.
    step_size: alpha, at least 0; without it epsilon / 4.
    iterations: At least 1.
    random_start: Whether u is drawn; else it is 0.
    start: u itself, in the image's units, instead of a drawn one.
    targeted: Whether to descend to the label instead of away from it.
    low: The least value of an image.
    high: The greatest one.

  Returns:
    The attacked images, float32; constants where this is differentiated.

  Raises:
    ValueError: An option is outside its range.
    InputError: The image is not within low..high, or a label is no class.

  Reference:
    Madry et al., "Towards Deep Learning Models Resistant to Adversarial
    Attacks", ICLR 2018, Sec. 2.1.
  """
  _at_least("iterations", iterations, 1)
  if step_size is None:
    step_size = _values(epsilon) / 4
  if start is None and random_start:
    # Drawn in units of the ball, so that each epsilon sees the same direction.
    shape = images.read(image).shape
    unit = jax.random.uniform(key, shape, minval=-1.0, maxval=1.0)
    start = unit * _values(epsilon)[..., None, None, None]
  return sign_ascent(
    logits_fn,
    image,
    label,
    epsilon=epsilon,
    step_size=step_size,
    iterations=iterations,
    start=start,
    targeted=targeted,
    low=low,
    high=high,
  )


@typed
def sign_ascent(
  logits_fn: LogitsFn,
  image: Image | images.Picture,
  label: Integer[ArrayLike, "*batch"],
  *,
  epsilon: Num[ArrayLike, "*#batch"],
  step_size: Num[ArrayLike, "*#batch"],
  iterations: Size | Integer[ArrayLike, ""],
  decay: Num[ArrayLike, ""] = 0.0,
  start: Num[ArrayLike, "*#batch height width channels"] | None = None,
  targeted: bool = False,
  low: float | int = 0.0,
  high: float | int = 255.0,
) -> Float[Array, "*batch height width channels"]:
  """Takes the steps that all attacks of this file are made of.

  g_{t+1} = mu g_t + dL/dx(x_t) / ||dL/dx(x_t)||_1,
  x_{t+1} = clip(x_t + alpha sign(g_{t+1})), x_0 = clip(x + u). Every number may
  be traced, so that one program holds all the attacks.

  Args:
    logits_fn: The network, see above.
    image: Within low..high.
    label: From 0; what is to be unlearned or, if targeted, to be named.
    epsilon: Radius of the ball, 0..high - low; may differ between images.
    step_size: alpha, at least 0; may differ between images.
    iterations: At least 0, where the image only moves to its start.
    decay: mu, at least 0.
    start: u, in the image's units; without it 0.
    targeted: Whether to descend to the label instead of away from it.
    low: The least value of an image.
    high: The greatest one.

  Returns:
    The attacked images, float32; constants where this is differentiated.

  Raises:
    ValueError: An option is outside its range.
    InputError: The image is not within low..high, or a label is no class.

  Reference:
    Dong et al., "Boosting Adversarial Attacks with Momentum", CVPR 2018, Eq. 6
    and 7.
  """
  values = images.read(image)
  if not -math.inf < low < high < math.inf:
    raise ValueError(f"low must be below high, got {low} and {high}.")
  _check_epsilon(epsilon, low, high)
  for name, option in (("step_size", step_size), ("decay", decay)):
    _at_least(name, option, 0)
  _at_least("iterations", iterations, 0)
  *leading, height, width, channels = values.shape
  size = math.prod(leading)
  if values.size == 0:
    return jnp.asarray(values, jnp.float32)
  x = jax.lax.stop_gradient(images.as_float32(values))
  _check_range(x, low, high)
  x = x.reshape(size, height, width, channels)
  per_image = lambda a: jnp.broadcast_to(_values(a), leading).reshape(
    -1, 1, 1, 1
  )
  below, above = _ball(x, per_image(epsilon), low, high)
  labels = jnp.broadcast_to(jnp.asarray(label, jnp.int32), leading)
  gradient = _gradient(logits_fn, labels.reshape(-1))
  alpha = per_image(step_size) * (-1 if targeted else 1)
  mu = _values(decay)

  def step(x: Array, g: Array) -> tuple[Array, Array]:
    slope = gradient(x)
    norm = jnp.sum(jnp.abs(slope), axis=(1, 2, 3), keepdims=True)
    g = mu * g + slope / jnp.where(norm > 0, norm, 1)
    return jnp.clip(x + alpha * jnp.sign(g), below, above), g

  g = jnp.zeros_like(x)
  if start is not None:
    offset = jnp.broadcast_to(_values(start), values.shape).reshape(x.shape)
    x = jnp.clip(x + offset, below, above)
  x, _ = _repeat(step, (x, g), iterations)
  return x.reshape(values.shape)


def _repeat(
  step: Callable[..., Any], carry: tuple[Array, Array], iterations: Any
) -> tuple[Array, Array]:
  """Steps in one loop where it is compiled, and else one by one.

  A loop would be compiled anew in each call, with the network in it; step by
  step, a `logits_fn` that is compiled stays so.
  """
  traced = (*carry, iterations)
  if any(isinstance(leaf, core.Tracer) for leaf in traced):
    return jax.lax.fori_loop(0, iterations, lambda _, c: step(*c), carry)
  for _ in range(int(iterations)):
    carry = step(*carry)
  return carry


def _gradient(logits_fn: LogitsFn, label: Array) -> Callable[[Array], Array]:
  """dL/dx, 0 where it is not finite: one value must not spoil an image."""
  known = images.concrete(label)

  def loss(x: Array) -> Array:
    logits = logits_fn(x)
    shape = jnp.shape(logits)
    if len(shape) != 2 or shape[0] != len(label):
      raise InputError(
        "logits_fn must give logits [n, classes] of images [n, height, width, "
        f"channels], got {shape} of {x.shape}."
      )
    if known is not None and (known.min() < 0 or known.max() >= shape[1]):
      wrong = known[(known < 0) | (known >= shape[1])]
      raise InputError(
        f"label must be in 0..{shape[1] - 1}, the classes of logits_fn, got "
        f"{few(wrong)}."
      )
    return classification.cross_entropy(logits, label).sum()

  def gradient(x: Array) -> Array:
    slope = jax.lax.stop_gradient(jax.grad(loss)(x))
    return jnp.where(jnp.isfinite(slope), slope, 0)

  return gradient


def _ball(
  x: Array, epsilon: Array, low: float, high: float
) -> tuple[Array, Array]:
  """The least and the greatest values that are allowed."""
  below, above = x - epsilon, x + epsilon
  # A sum that was rounded outwards would leave the ball by half an ulp.
  inwards = lambda end: jnp.nextafter(end, x)
  below = jnp.where(_rest(x, -epsilon, below) > 0, inwards(below), below)
  above = jnp.where(_rest(x, epsilon, above) < 0, inwards(above), above)
  return jnp.maximum(below, low), jnp.minimum(above, high)


def _rest(a: Array, b: Array, total: Array) -> Array:
  """What rounding took from a + b, exactly: a + b - total.

  Source: Knuth, "The Art of Computer Programming", vol. 2, Sec. 4.2.2.
  """
  part = total - a
  return (a - (total - part)) + (b - part)


def _values(option: Any) -> Array:
  return jnp.asarray(option, jnp.float32)


def _at_least(name: str, option: Any, least: int) -> None:
  known = images.concrete(option)
  if known is None:
    return
  wrong = known[~((known >= least) & (known < math.inf))]
  if wrong.size:
    raise ValueError(
      f"{name} must be at least {least} and finite, got {few(wrong)}."
    )


def _check_epsilon(epsilon: Any, low: float, high: float) -> None:
  known = images.concrete(epsilon)
  if known is None:
    return
  wrong = known[~((known >= 0) & (known <= high - low))]
  if wrong.size:
    raise ValueError(
      f"epsilon must be in 0..{high - low:g}, the range of the image's values, "
      f"got {few(wrong)}."
    )


def _check_range(x: Array, low: float, high: float) -> None:
  least, greatest = images.concrete(x.min()), images.concrete(x.max())
  if least is None or greatest is None:
    return
  if not (least >= low and greatest <= high):
    raise InputError(
      f"image must be within low..high, {low:g}..{high:g}, got values in "
      f"{least:g}..{greatest:g}; give low and high in the image's units."
    )
