"""Pickles of state dicts, read by a machine that can do nothing else.

A pickle may call anything, so none is run here: its opcodes are followed one
by one, building numbers, texts and containers. The few names of a state dict
are texts in tables of this file; nothing is imported, and nothing but the
functions in those tables is called. What a file claims (lengths, offsets,
strides) is compared with what is there before memory is taken, and nothing
that is built is larger than a few times its text.

Source: the opcodes are those of Python's `pickletools`; the names are those
that `torch.save` and NumPy write.
"""

from collections.abc import Callable, Mapping, Set
import dataclasses
import math
import struct
from typing import Any, NamedTuple
import zipfile

import jax.numpy as jnp
import numpy as np

from jaxshape.data import plain_pickle

_BFLOAT16 = np.dtype(jnp.bfloat16)
# By the names of `torch.*Storage`.
STORAGES = {
  "Double": np.dtype("<f8"),
  "Float": np.dtype("<f4"),
  "Half": np.dtype("<f2"),
  "BFloat16": _BFLOAT16,
  "Long": np.dtype("<i8"),
  "Int": np.dtype("<i4"),
  "Short": np.dtype("<i2"),
  "Char": np.dtype("i1"),
  "Byte": np.dtype("u1"),
  "Bool": np.dtype("?"),
  "ComplexFloat": np.dtype("<c8"),
  "ComplexDouble": np.dtype("<c16"),
}
# By the names of `torch.dtype`s; the other name is that of safetensors.
DTYPES = {
  "float64": ("F64", np.dtype("<f8")),
  "float32": ("F32", np.dtype("<f4")),
  "float16": ("F16", np.dtype("<f2")),
  "bfloat16": ("BF16", _BFLOAT16),
  "int64": ("I64", np.dtype("<i8")),
  "int32": ("I32", np.dtype("<i4")),
  "int16": ("I16", np.dtype("<i2")),
  "int8": ("I8", np.dtype("i1")),
  "uint64": ("U64", np.dtype("<u8")),
  "uint32": ("U32", np.dtype("<u4")),
  "uint16": ("U16", np.dtype("<u2")),
  "uint8": ("U8", np.dtype("u1")),
  "bool": ("BOOL", np.dtype("?")),
  "complex64": ("C64", np.dtype("<c8")),
  "complex128": ("", np.dtype("<c16")),
  "float8_e4m3fn": ("F8_E4M3", np.dtype(jnp.float8_e4m3fn)),
  "float8_e5m2": ("F8_E5M2", np.dtype(jnp.float8_e5m2)),
}


Array, Unfit = plain_pickle.Array, plain_pickle.Unfit


# Tensors, which are made when the whole pickle is read.

_AXES = 64  # Of NumPy.


def _whole(number: Any) -> bool:
  """Whether a size is one: what is larger cannot even be printed."""
  return type(number) is int and 0 <= number < 2**63


class Storage(NamedTuple):
  """Numbers in the file: `size` items of a dtype, from `start` on."""

  key: str
  dtype: np.dtype
  size: int
  start: int = 0


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A window onto a storage; offset and strides in items of the dtype."""

  storage: Storage
  dtype: np.dtype
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]

  @property
  def size(self) -> int:
    """Number of its items."""
    return math.prod(self.shape)

  @property
  def nbytes(self) -> int:
    """Of an array of its own."""
    return self.size * self.dtype.itemsize

  def check(self, name: str) -> None:
    """Refuses a window that is not within its storage."""
    axes, numbers = len(self.shape), (*self.shape, *self.strides, self.offset)
    if (
      len(self.strides) != axes or axes > _AXES or not all(map(_whole, numbers))
    ):
      raise Unfit(f"is damaged: {name} has no usable shape or strides")
    held = self.storage.size * self.storage.dtype.itemsize
    steps = zip(self.shape, self.strides, strict=True)
    last = self.offset + sum((n - 1) * step for n, step in steps)
    if self.size and (last + 1) * self.dtype.itemsize > held:
      raise Unfit(
        f"is damaged: {name}, of shape {self.shape}, strides {self.strides} "
        f"and offset {self.offset}, reaches beyond its storage of "
        f"{self.storage.size}"
      )


# Names.


def _tensor(
  storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any
) -> Tensor:
  if len(rest) > 2 and rest[2]:
    raise Unfit("holds a tensor that is marked as conjugate or negative")
  return _window(storage, storage.dtype, offset, shape, strides)


def _typed_tensor(
  storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any
) -> Tensor:
  _, dtype = DTYPES[rest[2].text.removeprefix("torch.")]
  return _window(storage, dtype, offset, shape, strides)


def _window(
  storage: Any, dtype: Any, offset: Any, shape: Any, strides: Any
) -> Tensor:
  sizes = isinstance(shape, tuple) and isinstance(strides, tuple)
  if not isinstance(storage, Storage) or not sizes:
    raise TypeError("no tensor")
  return Tensor(storage, dtype, offset, shape, strides)


DAMAGED = (*plain_pickle.DAMAGED, struct.error, zipfile.BadZipFile)


def _persistent(identity: Any) -> Storage:
  kind, name, key, _, size, *view = identity
  text = name.text.rpartition(".")[2].removesuffix("Storage")
  if kind != "storage" or type(key) is not str or not _whole(size):
    raise ValueError("no storage")
  dtype = np.dtype("u1") if text == "Untyped" else STORAGES[text]
  if not view or view[0] is None:
    return Storage(key, dtype, size)
  _, start, length = view[0]
  if not _whole(start) or not _whole(length) or start + length > size:
    raise ValueError("a view beyond its storage")
  return Storage(key, dtype, length, start)


def array(value: plain_pickle.Array, name: str) -> np.ndarray:
  """What the pickle has told about an array, copied."""
  try:
    return value.array()
  except ValueError as error:
    raise Unfit(f"holds {name}, which is no plain NumPy array") from error


# The machine.


def read(file: Any) -> Any:
  """What the pickle at a file's position holds; the file is left behind it.

  Args:
    file: Has `read`, `readline` and `tell`, of bytes that are there.

  Returns:
    Dictionaries, lists (sets, too), tuples, numbers and texts; tensors as
    `Tensor`, arrays of NumPy as `Array`.

  Raises:
    Unfit: It is damaged, or needs what is not of a state dict.
  """
  try:
    return _Machine().run(file)
  except Unfit:
    raise
  except DAMAGED as error:
    text = str(error).splitlines()
    raise Unfit(
      "is truncated or damaged in its pickle"
      f" ({type(error).__name__}: {text[0][:80] if text else ''})"
    ) from error


class _Machine(plain_pickle.Machine):
  """Knows the names of a state dict, too."""

  calls: Mapping[str, Callable[..., Any]] = {
    **plain_pickle.CALLS,
    "builtins.complex": complex,
    "numpy.dtype": lambda code, *_: plain_pickle.Dtype(code, "biufc"),
    "torch.Size": lambda items=(), *_: items,
    "torch.device": lambda *_: None,
    "torch._tensor._rebuild_from_type_v2": lambda *_: None,  # See `_call`.
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
  }
  inert: Set[str] = {
    *plain_pickle.INERT,
    "torch.Tensor",
    "torch.nn.parameter.Parameter",
    "torch.storage.UntypedStorage",
    "torch.UntypedStorage",
    *(f"torch.{name}Storage" for name in STORAGES),
    *(f"torch.{name}" for name in DTYPES),
  }
  old_names: Mapping[str, str] = {
    **plain_pickle.OLD_NAMES,
    "torch.cuda.": "torch.",
  }
  kind = "state dict"
  advice = "save model.state_dict() alone with torch.save"

  def _call(self, function, arguments):
    of_class = "torch._tensor._rebuild_from_type_v2"
    if isinstance(function, plain_pickle.Name) and function.text == of_class:
      function, _, arguments, _ = arguments
    return super()._call(function, arguments)

  def _build(self, _):
    if isinstance(self.stack[-2], dict):  # A state dict's `_metadata`.
      self.stack.pop()
    else:
      super()._build(_)

  def _binpersid(self, _):
    self.stack.append(_persistent(self.stack.pop()))
