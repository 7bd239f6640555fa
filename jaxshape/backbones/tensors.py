"""Public tensors, taken by name, and what did not fit said at the end.

Source: PyTorch's state dicts; "module." before a name is of `DataParallel`, and
`num_batches_tracked` counts for nothing here.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from jaxshape.errors import InputError, few
from jaxshape.layers import apply
from jaxshape.typing import PyTree

# PyTorch's names of parameters and statistics, where they differ from Flax's.
LEAVES = {
  "kernel": "weight",
  "scale": "weight",
  "mean": "running_mean",
  "var": "running_var",
}


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

  def fill(
    self, tree: PyTree, name: Callable[[tuple[str, ...]], str]
  ) -> PyTree:
    """Takes a tensor for every leaf of a tree.

    Args:
      tree: Nested dicts of shapes and dtypes.
      name: PyTorch's, from a leaf's path.

    Returns:
      Arrays in the layout of Flax, None for those that `finish` tells.
    """

    def read(path: tuple[str, ...], leaf: Any) -> Any:
      shape = transposed(np.broadcast_to(0, leaf.shape)).shape
      value = self.take(name(path), shape)
      if value is None:
        return None
      return np.ascontiguousarray(transposed(value, back=True), leaf.dtype)

    flat = traverse_util.flatten_dict(tree)
    return traverse_util.unflatten_dict(
      {path: read(path, leaf) for path, leaf in flat.items()}
    )

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


def shapes(net: Any) -> tuple[PyTree, PyTree]:
  """Shapes of the parameters and other collections of a network of images.

  Args:
    net: The module, with its `stride`.
  """
  image = jax.ShapeDtypeStruct((1, net.stride, net.stride, 3), jnp.float32)
  return jax.eval_shape(
    lambda x: apply.init(net, jax.random.key(0), x, train=False), image
  )


def transposed(array: np.ndarray, *, back: bool = False) -> np.ndarray:
  """In PyTorch's layout, or from it: kernels of convolutions and of layers."""
  if array.ndim == 4:
    return array.transpose((2, 3, 1, 0) if back else (3, 2, 0, 1))
  return array.T
