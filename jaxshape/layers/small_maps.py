"""Convolutions that stay fast on maps of a few pixels.

Source: what XLA's CPU compiler makes of `lax.conv_general_dilated`, measured.
"""

from jax import lax
import jax.numpy as jnp

from jaxshape.typing import Array, ArrayLike, Float, typed


@typed
def conv(
  x: Float[ArrayLike, "batch height width channels"],
  kernel: Float[ArrayLike, "rows columns channels features"],
  *,
  stride: int = 1,
  padding: int = 0,
) -> Float[Array, "batch _ _ features"]:
  """Convolves maps, as a product where the output is no larger than the kernel.

  XLA exchanges map and kernel where the map is the smaller one, in the forward
  pass or in the gradient, and on CPUs that takes tens of times as long: 133
  against 2.4 ms for 16 maps of 2 x 2 x 512 and a kernel of 3 x 3.

  Args:
    x: Maps.
    kernel: As in Flax.
    stride: In both directions.
    padding: Zeros on every side.

  Returns:
    The cross-correlation of both, as `lax.conv_general_dilated` gives it.
  """
  x, kernel = jnp.asarray(x), jnp.asarray(kernel)
  rows, columns, channels, features = kernel.shape
  height = (x.shape[1] + 2 * padding - rows) // stride + 1
  width = (x.shape[2] + 2 * padding - columns) // stride + 1
  if not 0 < height * width <= rows * columns:
    return lax.conv_general_dilated(
      x,
      kernel,
      window_strides=(stride, stride),
      padding=[(padding, padding)] * 2,
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
  x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
  # What lies under one weight of the kernel, for all of them.
  patches = [
    x[
      :,
      i : i + stride * (height - 1) + 1 : stride,
      j : j + stride * (width - 1) + 1 : stride,
    ]
    for i in range(rows)
    for j in range(columns)
  ]
  weights = kernel.reshape(rows * columns * channels, features)
  return jnp.einsum("bhwc,cd->bhwd", jnp.concatenate(patches, -1), weights)
