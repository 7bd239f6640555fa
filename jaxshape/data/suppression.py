"""Suppression of texture as augmentation: a filter and a strength per image.

| paper | here |
|---|---|
| Sec. 4.1, MoCo v2: half diffused by 10..20 steps, a quarter blurred | "moco" |
| Sec. 3 and Table 4: originals and their filtered copies | "union", ... |
| Sec. 10.2 | "cartoon" |

Reference:
  Mishra et al., "Learning Visual Representations for Transfer Learning by
  Suppressing Texture", 2020.
"""

from collections.abc import Callable, Mapping, Sequence
import math
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxshape import images
from jaxshape.filters import (
  bilateral,
  blur,
  cartoon,
  diffusion,
  median,
  stylization,
)
from jaxshape.typing import Array, ArrayLike, Float, Num, Size, typed
from jaxshape.typing import Key as KeyOf

Key = KeyOf[Array, ""]
Range = float | int | Sequence[Any] | np.ndarray | np.generic

# What the paper filters how often and how strongly, as options of
# `random_suppression`. One half of each is a union in expectation.
POLICIES: Mapping[str, Mapping[str, Any]] = types.MappingProxyType(
  {
    "moco": {"probabilities": {"perona_malik": 0.5, "gaussian": 0.25}},
    "union": {"probabilities": {"perona_malik": 0.5}, "iterations": (20, 20)},
    "robust": {"probabilities": {"robust": 0.5}, "iterations": (20, 20)},
    "gaussian": {"probabilities": {"gaussian": 0.5}, "sigma": (10.0, 20.0)},
    "bilateral": {"probabilities": {"bilateral": 0.5}},
    "cartoon": {"probabilities": {"cartoon": 0.5}},
    "stylized": {"probabilities": {"stylized": 0.5}},
  }
)

# The filters among which `random_suppression` draws.
FILTERS = (
  "perona_malik",
  "robust",
  "gaussian",
  "bilateral",
  "median",
  "cartoon",
  "stylized",
)


def _shares(
  key: Key, probabilities: Mapping[str, ArrayLike], leading: tuple[int, ...]
) -> dict[str, jax.Array]:
  """Which images each filter gets: at most one filter an image."""
  unknown = [name for name in probabilities if name not in FILTERS]
  if unknown:
    raise ValueError(
      f"probabilities must name filters of {', '.join(FILTERS)}, got "
      f"{unknown[0]!r}."
    )
  total = np.zeros(())
  for share in probabilities.values():
    known = images.concrete(share)
    if known is not None:
      if not ((known >= 0) & (known <= 1)).all():
        raise ValueError(f"probabilities must be in 0..1, got {share}.")
      total = total + known
  # Decimal fractions that add up to 1 may exceed it by a rounding.
  if np.max(total) > 1 + 1e-6:
    raise ValueError(
      f"probabilities must add up to at most 1, got {dict(probabilities)}."
    )
  drawn = jax.random.uniform(key, leading)
  low: Any = 0.0
  chosen = {}
  for name, share in probabilities.items():
    high = low + jnp.asarray(share, jnp.float32)
    chosen[name] = jnp.broadcast_to((drawn >= low) & (drawn < high), leading)
    low = high
  return chosen


def _range(name: str, given: Range, *, zero: bool) -> tuple[Any, Any]:
  """Least and largest; one number is both."""
  values = np.ravel(given).tolist()
  low, high = values * 2 if len(values) == 1 else (*values, math.nan)[:2]
  fits = len(values) <= 2 and 0 <= low <= high < math.inf
  if not fits or (low == 0 and not zero):
    sign = "<=" if zero else "<"
    raise ValueError(
      f"{name} must be (low, high) with 0 {sign} low <= high, got {given}."
    )
  return low, high


def _neighbours(x: jax.Array) -> jax.Array:
  """Another image of the batch for each."""
  flat = x.reshape(-1, *x.shape[-3:])
  if len(flat) == 1:
    raise ValueError(
      "style must be given for an image that is alone (under vmap each is), "
      "got None."
    )
  return jnp.roll(flat, 1, axis=0).reshape(x.shape)


@typed
def random_suppression(
  key: Key,
  image: Num[ArrayLike, "*batch height width 3"] | images.Picture,
  *,
  probabilities: Mapping[str, Any] = POLICIES["moco"]["probabilities"],
  iterations: Range = (10, 20),
  kappa: Num[ArrayLike, "*#batch"] = 20.0,
  step_size: Num[ArrayLike, "*#batch"] = 0.1,
  conduction: str = "exponential",
  sigma: Range = (0.1, 2.0),
  diameter: Size = 9,
  sigma_color: Range = 75.0,
  sigma_space: Num[ArrayLike, "*#batch"] = 75.0,
  size: Size = 5,
  preset: str = "classic",
  style: Num[ArrayLike, "*#batch style_height style_width 3"] | None = None,
) -> Float[Array, "*batch height width 3"]:
  """Takes texture away by a filter and a strength that are drawn per image.

  Each image gets one filter or stays as it is. The default is what the paper
  does to the pictures of MoCo v2; `POLICIES` holds its settings by name:
  `random_suppression(key, images, **POLICIES["cartoon"])`.

  Args:
    key: A PRNG key. A batch draws from one key; under `jax.vmap` each image
      draws from its own.
    image: Values in 0..255, taken as floats: nothing is rounded on the way.
    probabilities: From names in `FILTERS` to probabilities, which may differ
      between images (arrays that broadcast to the leading axes); what is left
      of 1 stays as it is.
    iterations: Least and largest number, of "perona_malik" and "robust"; here
      and below one number stands for both.
    kappa: Of "perona_malik".
    step_size: Of "perona_malik" and "robust".
    conduction: Of "perona_malik".
    sigma: Least and largest, of "gaussian".
    diameter: Of "bilateral".
    sigma_color: Least and largest, of "bilateral".
    sigma_space: Of "bilateral".
    size: Of "median".
    preset: Of "cartoon".
    style: Whose texture "stylized" images get; by default that of another
      image of the batch.

  Returns:
    The images, filtered or not, as float32.

  Raises:
    ValueError: An option is outside its range.

  Reference:
    Mishra et al., "Learning Visual Representations for Transfer Learning by
    Suppressing Texture", 2020, Sections 3, 4.1 and 10.2.
  """
  fewest, most = _range("iterations", iterations, zero=True)
  sigmas = _range("sigma", sigma, zero=True)
  colors = _range("sigma_color", sigma_color, zero=False)
  x = images.as_float32(images.read(image))
  leading = x.shape[:-3]
  chosen_key, strength_key = jax.random.split(key)

  def uniform(low: float, high: float) -> jax.Array:
    return jax.random.uniform(strength_key, leading, minval=low, maxval=high)

  def count(chosen: jax.Array) -> jax.Array:
    drawn = jax.random.randint(strength_key, leading, fewest, most + 1)
    return jnp.where(chosen, drawn, 0)  # None cost nothing on CPUs.

  def styled() -> jax.Array:
    texture = _neighbours(x) if style is None else jnp.asarray(style)
    return stylization.match_statistics(x, texture)

  filters: dict[str, Callable[[jax.Array], jax.Array]] = {
    "perona_malik": lambda chosen: diffusion.perona_malik(
      x,
      kappa=kappa,
      step_size=step_size,
      iterations=count(chosen),
      conduction=conduction,
    ),
    "robust": lambda chosen: diffusion.robust(
      x, step_size=step_size, iterations=count(chosen)
    ),
    "gaussian": lambda _: blur.gaussian(
      x,
      sigma=jnp.maximum(uniform(*sigmas), 1e-6),
      radius=round(4 * sigmas[1]),
    ),
    "bilateral": lambda _: bilateral.bilateral(
      x,
      diameter=diameter,
      sigma_color=uniform(*colors),
      sigma_space=sigma_space,
    ),
    "median": lambda _: median.median(x, size=size),
    "cartoon": lambda _: cartoon.cartoon(x, preset=preset),
    "stylized": lambda _: styled(),
  }
  out = x
  for name, chosen in _shares(chosen_key, probabilities, leading).items():
    done = filters[name](chosen)
    out = jnp.where(chosen[..., None, None, None], done, out)
  return out
