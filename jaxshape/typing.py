"""Shapes as annotations, and the decorator that checks them on every call.

Notation: `Float[Array, "batch height width channels"]` names the axes; the same
name means the same size within one call; `*batch` stands for any number of
leading axes; a leading space marks a single axis (`" n"`).
"""

from collections.abc import Mapping
from typing import Any

from beartype import beartype
import jax
from jaxtyping import (
  Array,
  ArrayLike,
  Bool,
  Float,
  Int,
  Integer,
  Key,
  Num,
  UInt8,
  jaxtyped,
)
import numpy as np

__all__ = [
  "Array",
  "ArrayLike",
  "Batch",
  "Bool",
  "Config",
  "Float",
  "Image",
  "Int",
  "Integer",
  "Key",
  "Metrics",
  "Num",
  "PyTree",
  "Size",
  "UInt8",
  "typed",
]

PyTree = Any
# A number of pixels, or of anything else that is counted.
Size = int | np.integer
# An `ml_collections.ConfigDict`, whose fields hold anything.
Config = Any
Image = Num[ArrayLike, "*batch height width channels"]
# Every leaf holds examples along its first axis; "mask" marks padding with 0.
Batch = Mapping[str, jax.Array | np.ndarray]
Metrics = Mapping[str, jax.Array]  # Scalars.

# The error names the function, the argument, the shape that came and the axes
# bound so far. Costs nothing under jit and some 80 us per eager call.
typed = jaxtyped(typechecker=beartype)
