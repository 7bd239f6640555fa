"""What filters that look through a window share: borders and wrong numbers.

How an image goes on beyond its border has NumPy's names here:

| here        | NumPy       | SciPy      | OpenCV      | kornia      |
|-------------|-------------|------------|-------------|-------------|
| `reflect`   | `reflect`   | `mirror`   | REFLECT_101 | `reflect`   |
| `symmetric` | `symmetric` | `reflect`  | REFLECT     | (none)      |
| `edge`      | `edge`      | `nearest`  | REPLICATE   | `replicate` |
| `constant`  | `constant`  | `constant` | CONSTANT    | `constant`  |
| `wrap`      | `wrap`      | `wrap`     | WRAP        | `circular`  |

`constant` means zeros. An image may be smaller than the window: it is then
mirrored or repeated as often as it takes.

Source: the names are those of `numpy.pad`.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from jaxshape.typing import Array, Float, Int, Num, Size, typed

BORDERS = ("reflect", "symmetric", "edge", "constant", "wrap")

# Other libraries' names, as far as they mean one thing only.
_HINTS = {
  "mirror": "reflect",
  "reflect101": "reflect",
  "reflect_101": "reflect",
  "nearest": "edge",
  "replicate": "edge",
  "zeros": "constant",
  "grid-wrap": "wrap",
  "circular": "wrap",
}


@typed
def check_border(border: str) -> None:
  """Refuses a name that is not NumPy's.

  Args:
    border: One of `BORDERS`.

  Raises:
    ValueError: It is not.
  """
  if border in BORDERS:
    return
  hint = _HINTS.get(border.lower())
  meant = f" ({hint!r} is meant?)" if hint else ""
  raise ValueError(
    f"border must be one of {', '.join(BORDERS)}, in NumPy's words, got "
    f"{border!r}{meant}."
  )


@typed
def odd(name: str, value: Size, *, least: int = 1) -> int:
  """Gives the side of a window that has a middle.

  Args:
    name: The option's.
    value: The window's side in pixels.
    least: What it must be at least.

  Returns:
    The side, as a number of Python.

  Raises:
    ValueError: It is even or too small.
  """
  if value < least or value % 2 == 0:
    raise ValueError(f"{name} must be odd and at least {least}, got {value}.")
  return int(value)


@typed
def places(
  size: int, before: int, after: int, border: str
) -> Int[np.ndarray, " wide"]:
  """Gives which pixel stands where once a line is extended.

  Args:
    size: Pixels of the line.
    before: Pixels to add before it.
    after: Pixels to add after it.
    border: One of `BORDERS`.

  Returns:
    Indices into the line; -1 where there is a zero.
  """
  line = np.arange(size)
  if border == "constant":
    return np.pad(line, (before, after), constant_values=-1)
  mode: Any = border
  return np.pad(line, (before, after), mode=mode)


@typed
def extend(
  x: Num[Array, "..."], *, axis: int, before: int, after: int, border: str
) -> Num[Array, "..."]:
  """Extends an array beyond its border along one axis.

  Args:
    x: Any array.
    axis: The axis.
    before: Pixels to add before it.
    after: Pixels to add after it.
    border: One of `BORDERS`.

  Returns:
    The longer array; only what is added is gathered.
  """
  if before == after == 0:
    return x
  size = x.shape[axis]
  source = places(size, before, after, border)

  def part(index: np.ndarray) -> jax.Array:
    if border == "constant":
      shape = list(x.shape)
      shape[axis] = len(index)
      return jnp.zeros(shape, x.dtype)
    return jnp.take(x, index, axis=axis)

  ends = part(source[:before]), part(source[before + size :])
  return jnp.concatenate([ends[0], x, ends[1]], axis=axis)


@jax.custom_batching.custom_vmap
def _all_finite(x: jax.Array) -> jax.Array:
  return jnp.isfinite(x).all()


@_all_finite.def_vmap
def _(size: int, batched: Any, x: jax.Array) -> tuple[jax.Array, bool]:
  # One answer for the whole batch: a case distinction that is batched would
  # compute both of its sides for every image.
  del size, batched
  return _all_finite(x), False


@typed
def through_wrong_numbers(
  average: Callable[..., jax.Array], x: Float[Array, "*batch channels"]
) -> Float[Array, "*batch channels"]:
  """Averages so that NaN and infinity get no further than the weights do.

  0 * NaN is NaN, so a sum over more places than have a weight (a product with
  a banded matrix, a window larger than this image's own) would carry one
  wrong number into all of them. What comes out is what the sum over the
  weights above 0 alone gives.

  Args:
    average: Linear, with weights of at least 0, for each channel by itself.
    x: What it is to act on, channels last.

  Returns:
    `average(x)`, and only where a number is not finite at four times the cost.
  """

  def rare(x: jax.Array) -> jax.Array:
    wrong = [x == jnp.inf, x == -jnp.inf, jnp.isnan(x)]
    parts = [jnp.where(jnp.isfinite(x), x, 0), *wrong]
    parts = [part.astype(x.dtype) for part in parts]
    parts = jnp.split(average(jnp.concatenate(parts, -1)), 4, -1)
    out, plus, minus, none = parts[0], *(part > 0 for part in parts[1:])
    out = jnp.where(plus, jnp.inf, jnp.where(minus, -jnp.inf, out))
    return jnp.where(none | (plus & minus), jnp.nan, out)

  return lax.cond(_all_finite(lax.stop_gradient(x)), average, rare, x)
