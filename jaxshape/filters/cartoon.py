"""Cartoons: flat colours within dark lines, as texture suppression has them.

The parts are `bilateral`, `color`, `median`, `pyramid` and `threshold`.
"""

import functools
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from jaxshape import images
from jaxshape.filters import (
  bilateral,
  color,
  median,
  pyramid,
  threshold,
  windows,
)
from jaxshape.typing import Array, ArrayLike, Float, Num, Size, typed


class _Sizes(NamedTuple):
  """The options of `cartoon` that decide on shapes and loops."""

  diameter: int
  repeats: int
  levels: int
  median_size: int
  block_size: int


class _Strengths(NamedTuple):
  """The other options, any of which may differ between images."""

  sigma_color: Any
  sigma_space: Any
  offset: Any


_PRESETS = {
  "classic": (_Sizes(9, 1, 0, 5, 9), _Strengths(75.0, 75.0, 9.0)),
  "pyramid": (_Sizes(9, 7, 2, 7, 9), _Strengths(9.0, 7.0, 2.0)),
  "strong": (_Sizes(9, 1, 0, 7, 9), _Strengths(300.0, 300.0, 2.0)),
}


def _smooth(x: jax.Array, sizes: _Sizes, strengths: _Strengths) -> jax.Array:
  """Takes small differences away; of uint8, every stage is rounded."""

  def stage(y: jax.Array) -> jax.Array:
    return jnp.round(y).astype(x.dtype) if x.dtype == jnp.uint8 else y

  def flatten(y: jax.Array) -> jax.Array:
    return stage(
      bilateral.bilateral(
        y,
        diameter=sizes.diameter,
        sigma_color=strengths.sigma_color,
        sigma_space=strengths.sigma_space,
      )
    )

  larger = []
  for _ in range(sizes.levels):
    larger.append(x.shape[-3:-1])
    x = stage(pyramid.down(x))
  if sizes.repeats == 1:
    x = flatten(x)
  else:
    x = lax.fori_loop(0, sizes.repeats, lambda _, y: flatten(y), x)
  for size in reversed(larger):
    x = stage(pyramid.up(x, size=size))
  return x


def _mask(x: jax.Array, sizes: _Sizes, offset: Any) -> jax.Array:
  """0 on lines and 1 elsewhere, as one channel."""
  gray = color.rgb_to_gray(x)
  return threshold.adaptive(
    median.median(gray, size=sizes.median_size),
    block_size=sizes.block_size,
    offset=offset,
    max_value=1.0,
  )


@functools.partial(jax.jit, static_argnames=("sizes",))
def _cartoon(
  image: jax.Array, strengths: _Strengths, *, sizes: _Sizes
) -> jax.Array:
  x = image if image.dtype == jnp.uint8 else images.as_float32(image)
  mask = _mask(lax.stop_gradient(x), sizes, strengths.offset)
  # A product, so that what is not finite in either stays so.
  out = _smooth(x, sizes, strengths) * mask
  return out.astype(images.result_type(image))


@typed
def cartoon(
  image: Num[ArrayLike, "*batch height width 3"] | images.Picture,
  *,
  preset: str = "classic",
  diameter: Size | None = None,
  sigma_color: Num[ArrayLike, "*#batch"] | None = None,
  sigma_space: Num[ArrayLike, "*#batch"] | None = None,
  repeats: Size | None = None,
  levels: Size | None = None,
  median_size: Size | None = None,
  block_size: Size | None = None,
  offset: Num[ArrayLike, "*#batch"] | None = None,
) -> Float[Array, "*batch height width 3"]:
  """Flattens colours by a bilateral filter and draws edges in black.

  y = c * e, where c is the image under a bilateral filter, and e is 0 where
  the grey image, after a median filter, is darker than the mean around it by
  at least the offset, and 1 elsewhere.

  The paper gives no parameters. The presets are recipes in common use, of
  which "pyramid" filters the colours at a smaller size:

  | option        | classic | pyramid | strong |
  |---------------|---------|---------|--------|
  | `diameter`    | 9       | 9       | 9      |
  | `sigma_color` | 75      | 9       | 300    |
  | `sigma_space` | 75      | 7       | 300    |
  | `repeats`     | 1       | 7       | 1      |
  | `levels`      | 0       | 2       | 0      |
  | `median_size` | 5       | 7       | 7      |
  | `block_size`  | 9       | 9       | 9      |
  | `offset`      | 9       | 2       | 2      |

  Each option that is given replaces the preset's. Of uint8 images every stage
  is rounded as OpenCV rounds it, and the result is that of `pyrDown`,
  `bilateralFilter`, `pyrUp`, `cvtColor`, `medianBlur`, `adaptiveThreshold` and
  `bitwise_and`. Float images are not rounded, and a gradient flows through
  the colours in reverse mode, the lines being constant.

  Args:
    image: RGB; uint8 arrays and pictures of PIL are taken as 0..255. For float
      images in 0..1, `sigma_color` and `offset` must be divided by 255.
    preset: A name from the table.
    diameter: Of the bilateral filter's window, in pixels.
    sigma_color: How different colours still mix, above 0, in the image's
      units.
    sigma_space: How far colours mix, above 0, in pixels.
    repeats: How often the bilateral filter is applied, at least 0.
    levels: How often the image is halved before it and doubled after it.
    median_size: The side of the median filter's window, odd.
    block_size: The side of the window of the mean, odd and at least 3.
    offset: The contrast of a line, in the image's units.

  Returns:
    The cartoon, in the image's type if that is a float type and float32
    otherwise.

  Raises:
    ValueError: An option is outside its range.
    InputError: A picture of PIL has more than eight bits per channel.

  Reference:
    Mishra et al., "Learning Visual Representations for Transfer Learning by
    Suppressing Texture", 2020, Appendix 10.2.
  """
  values = images.read(image)
  if preset not in _PRESETS:
    raise ValueError(
      f"preset must be one of {', '.join(_PRESETS)}, got {preset!r}."
    )
  sizes, strengths = _PRESETS[preset]
  given = {
    "diameter": diameter,
    "repeats": repeats,
    "levels": levels,
    "median_size": median_size,
    "block_size": block_size,
  }
  sizes = sizes._replace(
    **{k: int(v) for k, v in given.items() if v is not None}
  )
  given = {
    "sigma_color": sigma_color,
    "sigma_space": sigma_space,
    "offset": offset,
  }
  strengths = strengths._replace(
    **{k: v for k, v in given.items() if v is not None}
  )
  for name in ("repeats", "levels"):
    count = getattr(sizes, name)
    if count < 0:
      raise ValueError(f"{name} must be at least 0, got {count}.")
  windows.odd("median_size", sizes.median_size)
  for name, value in strengths._asdict().items():
    known = images.concrete(value)
    if known is None:
      continue
    if not np.isfinite(known).all():
      raise ValueError(f"{name} must be finite, got {value}.")
    if name != "offset" and not (known > 0).all():
      raise ValueError(f"{name} must be above 0, got {value}.")
  known = images.concrete(strengths.sigma_color)
  images.warn_of_units(values, "sigma_color", known)
  if values.size == 0:
    return jnp.asarray(values, images.result_type(values))
  return _cartoon(values, strengths, sizes=sizes)
