"""What corruptions share: five severities, and a draw for every image.

Source: the five severities are those of ImageNet-C (Hendrycks and Dietterich,
ICLR 2019, Section 4.1).
"""

from collections.abc import Callable
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxshape.typing import Array, Float, Key, typed


@typed
def pick(severity: int, values: tuple[Any, ...]) -> Any:
  """Gives the parameters of a severity.

  Args:
    severity: 1 to 5.
    values: Those of all five.

  Returns:
    Its own.

  Raises:
    ValueError: There is no such severity.
  """
  if severity not in (1, 2, 3, 4, 5):
    raise ValueError(f"severity must be 1, 2, 3, 4 or 5, got {severity}.")
  return values[severity - 1]


@typed
def per_image(
  key: Key[Array, ""],
  run: Callable[[Any, Any], Any],
  image: Float[Array, "*batch height width channels"],
) -> Float[Array, "*batch height width channels"]:
  """Runs a filter over images, each with a key of its own.

  Args:
    key: A PRNG key, split into as many as there are images.
    run: Takes a key and an image [H, W, C] and gives an image of that size.
    image: One image or any batch; nothing runs if it is empty.

  Returns:
    The filtered images.
  """
  if image.size == 0:
    return jnp.zeros_like(image)
  *leading, height, width, channels = image.shape
  size = math.prod(leading)
  keys = jax.random.split(key, size)
  out = jax.vmap(run)(keys, image.reshape(size, height, width, channels))
  return out.reshape(image.shape)
