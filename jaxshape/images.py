"""What every filter takes: arrays of any number type, and pictures of PIL."""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from jaxshape.errors import InputError
from jaxshape.typing import Array, Float, Num

# Modes whose values `convert("RGB")` keeps within 0..255 without clipping.
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV")


@runtime_checkable
class Picture(Protocol):
  """A `PIL.Image.Image`, known by its methods so that PIL is not needed."""

  @property
  def mode(self) -> str:
    """PIL's name of the channels."""
    ...

  def getbands(self) -> tuple[str, ...]:
    """The names of the channels."""
    ...

  def convert(self, mode: str) -> Any:
    """The picture in other channels."""
    ...


def read(image: Num[Any, "*batch height width channels"] | Picture) -> Any:
  """Gives the array behind an image.

  Args:
    image: An array, returned as it is; or a picture of PIL, which becomes RGB
      (grey is repeated, a palette looked up, transparency dropped).

  Returns:
    The array; uint8 [H, W, 3] for a picture.

  Raises:
    InputError: The picture holds more than eight bits per channel.
  """
  if not isinstance(image, Picture):
    return image
  if image.mode not in _MODES:
    raise InputError(
      f"image is a PIL image of mode {image.mode!r}, which RGB would clip; "
      "give np.asarray(image)[..., None] instead."
    )
  return np.asarray(image.convert("RGB"))


def as_float32(image: Num[Any, "..."]) -> Float[Array, "..."]:
  """The same values in the type in which filters compute."""
  return jnp.asarray(image, jnp.float32)


def result_type(image: Num[Any, "..."]) -> Any:
  """The type that a filter returns: the image's, if that is a float type."""
  dtype = jax.dtypes.canonicalize_dtype(image.dtype)
  return dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.float32


def concrete(value: Any) -> np.ndarray | None:
  """The value as an array, or None where it is traced and so unknown.

  Also None where parts of it lie with other processes: NumPy then raises a
  RuntimeError.
  """
  try:
    return np.asarray(value)
  except (jax.errors.TracerArrayConversionError, RuntimeError):
    return None
