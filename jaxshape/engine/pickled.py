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

from collections.abc import Callable, Sequence
import dataclasses
import math
import pickletools
import struct
from typing import Any, NamedTuple
import zipfile

import jax.numpy as jnp
import numpy as np

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


class Unfit(ValueError):
  """What is wrong with the file, as the end of a sentence about it."""


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


@dataclasses.dataclass
class Array:
  """A NumPy array or scalar on its way."""

  state: Sequence[Any] = ()

  @property
  def nbytes(self) -> int:
    """At most so many it needs."""
    raw = self.state[-1] if self.state else b""
    raw = raw.text if isinstance(raw, _Encoded) else raw
    return len(raw) if isinstance(raw, str | bytes) else 0

  def array(self, name: str) -> np.ndarray:
    """What the pickle has told about it, copied."""
    try:
      _, shape, dtype, fortran, raw = self.state
      if not isinstance(shape, tuple) or not all(map(_whole, shape)):
        raise ValueError("no shape")
      if isinstance(raw, _Encoded):
        # No other: looking up a code imports a module of its name.
        if raw.code not in ("latin1", "latin-1", "utf-8"):
          raise ValueError("no code")
        raw = raw.text.encode(raw.code)
      flat = np.frombuffer(raw, dtype.dtype())
      flat = flat.reshape(shape, order="F" if fortran else "C")
      return np.array(flat, flat.dtype.newbyteorder("="), order="C")
    except (AttributeError, LookupError, TypeError, ValueError) as error:
      raise Unfit(f"holds {name}, which is no plain NumPy array") from error


@dataclasses.dataclass(frozen=True)
class _Encoded:
  """Bytes as protocol 2 spells them; a text that is used often stays one."""

  text: str
  code: str


@dataclasses.dataclass
class _Dtype:
  """A dtype of NumPy on its way; the byte order comes as its state."""

  code: str
  order: str = "="

  def dtype(self) -> np.dtype:
    """Itself; `ValueError` where it is not of plain numbers."""
    if type(self.code) is not str or self.code[:1] not in tuple("biufc"):
      raise ValueError("no plain numbers")
    return np.dtype((">" if self.order == ">" else "<") + self.code)


# Names.


@dataclasses.dataclass(frozen=True)
class _Name:
  """A name in a pickle; never looked up anywhere but in this file."""

  text: str


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


def _of_class(function: Any, _: Any, arguments: Any, state: Any) -> Any:
  del state
  return _call(function, arguments)


def _scalar(dtype: Any, raw: Any) -> Array:
  return Array((1, (), dtype, False, raw))


def _put_all(into: Any, keys: Sequence[Any], values: Sequence[Any]) -> None:
  """Fills a dictionary."""
  if not isinstance(into, dict):
    raise TypeError("no dictionary to put into")
  for key, value in zip(keys, values, strict=True):
    # A tuple of tuples of tuples ... has no end of a hash.
    if not isinstance(key, _PLAIN_KEYS):
      raise Unfit(f"has a dictionary with a key of type {type(key).__name__}")
    into[key] = value


def _dictionary(*arguments: Any) -> dict[Any, Any]:
  """An ordered dictionary; pairs are given by Python 2."""
  out: dict[Any, Any] = {}
  if arguments and isinstance(arguments[0], list):
    keys, values = [[pair[i] for pair in arguments[0]] for i in (0, 1)]
    _put_all(out, keys, values)
    arguments[0].clear()  # Else a short pickle could copy it without end.
  return out


def _itself(items: Any = (), *_: Any) -> Any:
  return items


# What the few names of a state dict do when they are called.
_CALLS: dict[str, Callable[..., Any]] = {
  "collections.OrderedDict": _dictionary,
  "collections.Counter": lambda *_: {},
  "collections.defaultdict": lambda *_: {},
  "builtins.dict": lambda *_: {},
  "builtins.set": _itself,
  "builtins.frozenset": _itself,
  "builtins.list": _itself,
  "builtins.complex": complex,
  "_codecs.encode": _Encoded,
  "torch.Size": _itself,
  "torch.device": lambda *_: None,
  "torch._utils._rebuild_tensor": _tensor,
  "torch._utils._rebuild_tensor_v2": _tensor,
  "torch._utils._rebuild_tensor_v3": _typed_tensor,
  "torch._utils._rebuild_parameter": _itself,
  "torch._utils._rebuild_parameter_with_state": _itself,
  "torch._tensor._rebuild_from_type_v2": _of_class,
  "numpy._core.multiarray._reconstruct": lambda *_: Array(),
  "numpy._core.multiarray.scalar": _scalar,
  "numpy.dtype": lambda code, *_: _Dtype(code),
}
# Names that are only handed to those.
_INERT = {
  "numpy.ndarray",
  "torch.Tensor",
  "torch.nn.parameter.Parameter",
  "torch.storage.UntypedStorage",
  "torch.UntypedStorage",
  *(f"torch.{name}Storage" for name in STORAGES),
  *(f"torch.{name}" for name in DTYPES),
  # The defaults of a `defaultdict`.
  "builtins.int",
  "builtins.float",
}
_OLD_NAMES = {
  "__builtin__.": "builtins.",
  "numpy.core.": "numpy._core.",
  "torch.cuda.": "torch.",
}
_PLAIN_KEYS = (str, int, float, bytes, type(None))
DAMAGED = (
  ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError,
  EOFError, RuntimeError, struct.error, zipfile.BadZipFile,
)  # fmt: skip


def _named(module: Any, name: Any) -> _Name:
  if type(module) is not str or type(name) is not str:
    raise TypeError("a name that is no text")
  text = f"{module}.{name}"
  for old, new in _OLD_NAMES.items():
    if text.startswith(old):
      text = new + text.removeprefix(old)
  if text not in _CALLS and text not in _INERT:
    raise Unfit(
      f"needs {module}.{name}, which is not of a state dict and is not run; "
      "save model.state_dict() alone with torch.save"
    )
  return _Name(text)


def _call(function: Any, arguments: Any) -> Any:
  if not isinstance(function, _Name) or not isinstance(arguments, tuple):
    raise Unfit("is damaged: its pickle calls what is no name")
  if function.text not in _CALLS:
    raise Unfit(f"is damaged: its pickle calls {function.text}")
  return _CALLS[function.text](*arguments)


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


class _Machine:
  """Follows a pickle's opcodes; methods are named after them."""

  def __init__(self):
    self.stack: list[Any] = []
    self.marks: list[list[Any]] = []
    self.memo: dict[int, Any] = {}

  def run(self, file: Any) -> Any:
    for opcode, argument, _ in pickletools.genops(file):
      name = opcode.name
      if name == "STOP":
        break
      if name in _CONSTANTS:
        self.stack.append(_CONSTANTS[name])
      elif name in _LITERALS:
        self.stack.append(argument)
      elif name not in _IGNORED:
        step = getattr(self, f"_{name.lower()}", None)
        if step is None:
          raise Unfit(f"has the opcode {name}, which no state dict has")
        step(argument)
    return self.stack.pop()

  def _items(self) -> list[Any]:
    """What lies above the last mark."""
    items, self.stack = self.stack, self.marks.pop()
    return items

  def _mark(self, _):
    self.marks.append(self.stack)
    self.stack = []

  def _empty_dict(self, _):
    self.stack.append({})

  def _empty_list(self, _):
    self.stack.append([])

  _empty_set = _empty_list

  def _empty_tuple(self, _):
    self.stack.append(())

  def _tuple(self, _):
    items = self._items()
    self.stack.append(tuple(items))

  def _tuple1(self, _):
    self.stack[-1:] = [(self.stack[-1],)]

  def _tuple2(self, _):
    self.stack[-2:] = [(self.stack[-2], self.stack[-1])]

  def _tuple3(self, _):
    self.stack[-3:] = [(self.stack[-3], self.stack[-2], self.stack[-1])]

  def _list(self, _):
    items = self._items()
    self.stack.append(items)

  _frozenset = _list

  def _dict(self, _):
    items = self._items()
    self.stack.append({})
    _put_all(self.stack[-1], items[::2], items[1::2])

  def _append(self, _):
    item = self.stack.pop()
    list.append(self.stack[-1], item)

  def _appends(self, _):
    items = self._items()
    list.extend(self.stack[-1], items)

  _additems = _appends

  def _setitem(self, _):
    value, key = self.stack.pop(), self.stack.pop()
    _put_all(self.stack[-1], [key], [value])

  def _setitems(self, _):
    items = self._items()
    _put_all(self.stack[-1], items[::2], items[1::2])

  def _pop(self, _):
    if self.stack:
      self.stack.pop()
    else:
      self._items()

  def _pop_mark(self, _):
    self._items()

  def _dup(self, _):
    self.stack.append(self.stack[-1])

  def _put(self, number):
    self.memo[number] = self.stack[-1]

  _binput = _long_binput = _put

  def _memoize(self, _):
    self.memo[len(self.memo)] = self.stack[-1]

  def _get(self, number):
    self.stack.append(self.memo[number])

  _binget = _long_binget = _get

  def _global(self, text):
    module, _, name = text.partition(" ")
    self.stack.append(_named(module, name))

  def _stack_global(self, _):
    name, module = self.stack.pop(), self.stack.pop()
    self.stack.append(_named(module, name))

  def _reduce(self, _):
    arguments, function = self.stack.pop(), self.stack.pop()
    self.stack.append(_call(function, arguments))

  _newobj = _reduce

  def _build(self, _):
    state, made = self.stack.pop(), self.stack[-1]
    if isinstance(made, Array):
      if not isinstance(state, tuple):
        raise TypeError("no state of an array")
      made.state = state
    elif isinstance(made, _Dtype):
      made.order = state[1]
    elif not isinstance(made, dict):  # A state dict's `_metadata`.
      raise Unfit("is damaged: its pickle changes what has no state")

  def _binpersid(self, _):
    self.stack.append(_persistent(self.stack.pop()))


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = {
  "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT",
  "BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE",
  "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES",
  "SHORT_BINBYTES", "BINBYTES8",
}  # fmt: skip
_IGNORED = {"PROTO", "FRAME"}
