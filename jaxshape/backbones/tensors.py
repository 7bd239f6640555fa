"""Public tensors, taken by name, and what did not fit said at the end.

Source: PyTorch's state dicts; "module." before a name is of `DataParallel`, and
`num_batches_tracked` counts for nothing here.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxshape.errors import InputError, few


class Tensors:
  """A state dict on its way into a network.

  Attributes:
    given: What nobody has taken yet.
  """

  def __init__(self, tensors: Mapping[str, Any]):
    self.given = {
      name.removeprefix("module."): value
      for name, value in tensors.items()
      if not name.endswith("num_batches_tracked")
    }
    self._missing: list[str] = []
    self._shapes: list[str] = []

  def drop(self, prefix: str | tuple[str, ...]) -> None:
    """Leaves out names that begin so; an empty tuple is none of them."""
    self.given = {
      name: value
      for name, value in self.given.items()
      if not name.startswith(prefix)
    }

  def take(self, name: str, shape: Sequence[int]) -> np.ndarray | None:
    """A tensor, or None, which `finish` tells, if there is none that fits.

    Args:
      name: PyTorch's.
      shape: In PyTorch's layout.

    Returns:
      The array; it is not given again.
    """
    if name not in self.given:
      self._missing.append(f"{name} {tuple(shape)}")
      return None
    value = np.asarray(self.given.pop(name))
    if value.shape != tuple(shape):
      self._shapes.append(f"{name} {value.shape} instead of {tuple(shape)}")
      return None
    return value

  def finish(self, what: str) -> None:
    """Refuses tensors that were not all taken and all there.

    Args:
      what: The network, for the error.

    Raises:
      InputError: Names are missing, or not known, or an array has another
        shape.
    """
    faults = {
      "missing": self._missing,
      "not known": [f"{k} {np.shape(v)}" for k, v in self.given.items()],
      "of another shape": self._shapes,
    }
    said = [f"{kind}: {few(names)}" for kind, names in faults.items() if names]
    if said:
      raise InputError(f"the tensors do not fit {what}; {'; '.join(said)}.")
