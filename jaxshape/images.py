"""What every filter takes: arrays of any number type, and pictures of PIL."""

import importlib.resources
from typing import Any, Protocol, runtime_checkable
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from jaxshape.errors import InputError
from jaxshape.typing import Array, Float, Num, UInt8

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


def read(
  image: Num[Any, "*batch height width channels"] | Picture,
  *,
  name: str = "image",
) -> Any:
  """Gives the array behind an image.

  Args:
    image: An array, returned as it is; or a picture of PIL, which becomes RGB
      (grey is repeated, a palette looked up, transparency dropped).
    name: The argument's, for errors.

  Returns:
    The array; uint8 [H, W, 3] for a picture.

  Raises:
    InputError: The picture holds more than eight bits per channel, or numbers
      are complex or too large for the type that JAX has for them.
  """
  if not isinstance(image, Picture):
    _check_numbers(image, name)
    return image
  if image.mode not in _MODES:
    raise InputError(
      f"{name} is a PIL image of mode {image.mode!r}, which RGB would clip; "
      "give np.asarray(image)[..., None] instead."
    )
  return np.asarray(image.convert("RGB"))


def _check_numbers(image: Any, name: str) -> None:
  if jnp.issubdtype(image.dtype, jnp.complexfloating):
    raise InputError(f"{name} must hold real numbers, got {image.dtype}.")
  # JAX takes integers of 64 bits for ones of 32, unless told otherwise.
  short = jax.dtypes.canonicalize_dtype(image.dtype)
  if (
    short == image.dtype
    or not np.issubdtype(short, np.integer)
    or not image.size
  ):
    return
  limits = np.iinfo(short)
  low, high = image.min(), image.max()
  if low < limits.min or high > limits.max:
    raise InputError(
      f"{name} must be within {limits.min}..{limits.max}, as {short.name} is, "
      f"got values in {low}..{high}; give floats."
    )


def example() -> UInt8[np.ndarray, "height width 3"]:
  """Gives a photograph to try a filter on: a cat, whose fur is texture.

  Returns:
    The picture, free of rights (CC0, from scikit-image's collection).

  Raises:
    ImportError: Pillow is not installed, which nothing else here needs.
  """
  from PIL import Image  # noqa: PLC0415 - the rest works without it.

  file = importlib.resources.files("jaxshape").joinpath("example.jpg")
  with file.open("rb") as stream, Image.open(stream) as picture:
    return np.asarray(picture.convert("RGB"))


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


# Options that were warned of.
_warned: set[str] = set()


def warn_of_units(image: Any, name: str, value: np.ndarray | None) -> None:
  """Warns, once, if edges cannot be told from texture for want of scale.

  Args:
    image: What the option is applied to.
    name: The option's: a difference of values that counts as an edge.
    value: The option's, or None where it is not known; 1 and more is made for
      0..255.
  """
  if value is None or value.size == 0 or value.min() < 1:
    return
  if name in _warned or not jnp.issubdtype(image.dtype, jnp.floating):
    return
  # One number mostly decides, and the others need not leave the device then.
  first = concrete(image[(slice(1),) * image.ndim])
  if first is None or first.size == 0 or not 0 <= first.flat[0] <= 1:
    return
  known = concrete(image)
  if known is None:
    return
  low, high = known.min(), known.max()
  if not (low >= 0 and high <= 1 and low < high):
    return
  _warned.add(name)
  option = float(value.min())
  warnings.warn(
    f"the image lies within 0..1 but {name}={option:g} is made for 0..255, so "
    f"every edge is blurred like texture; give {name} in the image's units "
    f"({name}={option / 255:.3g}) or an image in 0..255.",
    stacklevel=5,  # Beyond the function that calls this, which is @typed.
  )
