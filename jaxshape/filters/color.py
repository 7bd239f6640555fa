"""Between RGB and grey, with the weights that OpenCV has."""

import jax
import jax.numpy as jnp

from jaxshape import images
from jaxshape.typing import Array, ArrayLike, Num, typed

# Luma weighs red, green and blue like this, also in units of 2^-15 for uint8.
_LUMA = (0.299, 0.587, 0.114)
_LUMA_15_BITS = (9798, 19235, 3735)


@jax.jit
def _rgb_to_gray(image: jax.Array) -> jax.Array:
  if image.dtype == jnp.uint8:
    r, g, b = (
      weight * image[..., i : i + 1].astype(jnp.int32)
      for i, weight in enumerate(_LUMA_15_BITS)
    )
    return ((r + g + b + (1 << 14)) >> 15).astype(jnp.uint8)
  r, g, b = (
    weight * images.as_float32(image[..., i : i + 1])
    for i, weight in enumerate(_LUMA)
  )
  return (r + g + b).astype(images.result_type(image))


@typed
def rgb_to_gray(
  image: Num[ArrayLike, "*batch height width 3"] | images.Picture,
) -> Num[Array, "*batch height width 1"]:
  """Gives the luma of colours: .299 red + .587 green + .114 blue.

  For uint8 the sum is rounded, in integers and with weights of 15 bits, just
  as OpenCV's `COLOR_RGB2GRAY` rounds it since version 4, and uint8 comes out:
  what follows, such as a threshold, can be exact as well. Other types are
  computed in float32 and not rounded.

  Args:
    image: RGB in any unit; pictures of PIL are taken as 0..255.

  Returns:
    One channel, in the image's type if that is a float type or uint8, and
    float32 otherwise.

  Raises:
    InputError: A picture of PIL has more than eight bits per channel.

  Reference:
    ITU-R Recommendation BT.601-7, "Studio encoding parameters of digital
    television", 2011, Section 2.5.1.
  """
  return _rgb_to_gray(images.read(image))


@typed
def gray_to_rgb(
  image: Num[ArrayLike, "*batch height width 1"],
) -> Num[Array, "*batch height width 3"]:
  """Repeats the only channel, as OpenCV's `COLOR_GRAY2RGB` does.

  Args:
    image: In any unit.

  Returns:
    Three equal channels, in the image's type.

  Reference:
    The right inverse of `rgb_to_gray`, whose weights sum to 1.
  """
  return jnp.repeat(jnp.asarray(images.read(image)), 3, axis=-1)
