"""Plain containers and arrays in pickles, read by a machine that runs none.

A pickle may call anything, so none is run here: its opcodes are followed one
by one, building numbers, texts, plain containers and NumPy arrays. The few
names that those need are texts in a table of this file; nothing is imported,
and nothing but the functions of that table is called. Lengths that a file
claims are compared with what is there before memory is taken.

Source: the opcodes are those of Python's `pickletools`; the names are those
that NumPy writes.
"""

from collections.abc import Callable, Mapping, Sequence, Set
import dataclasses
import io
import os
import pathlib
import pickletools
import re
from typing import Any
import warnings

import numpy as np

from jaxshape.errors import InputError

_MOST_BYTES = 2**30
DAMAGED = (
  ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError,
  EOFError, RuntimeError,
)  # fmt: skip


class Unfit(ValueError):
  """What is wrong with the file, as the end of a sentence about it."""


@dataclasses.dataclass(frozen=True)
class Encoded:
  """Bytes as protocol 2 spells them; a text that is used often stays one."""

  text: str
  code: str


@dataclasses.dataclass
class Dtype:
  """A dtype on its way; the byte order comes as its state."""

  code: Any
  kinds: str
  order: str = "="

  def dtype(self) -> np.dtype:
    """Itself; `ValueError` where it is not of plain numbers or texts."""
    # No other: "O" holds objects, and commas make records of anything.
    plain = rf"[{self.kinds}]\d{{1,9}}"
    if type(self.code) is not str or not re.fullmatch(plain, self.code):
      raise ValueError("no plain numbers")
    return np.dtype((">" if self.order == ">" else "<") + self.code)


@dataclasses.dataclass
class Array:
  """An array or scalar of NumPy, as the pickle has told about it."""

  state: Sequence[Any] = ()

  @property
  def nbytes(self) -> int:
    """At most so many it needs."""
    raw = self.state[-1] if self.state else b""
    raw = raw.text if isinstance(raw, Encoded) else raw
    return len(raw) if isinstance(raw, str | bytes | bytearray) else 0

  def array(self) -> np.ndarray:
    """Itself, copied; `ValueError` where it is none of plain numbers."""
    try:
      _, shape, dtype, fortran, raw = self.state
      if isinstance(raw, Encoded):
        # No other: looking up a code imports a module of its name.
        if raw.code not in ("latin1", "latin-1", "utf-8"):
          raise ValueError("no code")
        raw = raw.text.encode(raw.code)
      if not isinstance(shape, tuple) or min(shape, default=0) < 0:
        raise ValueError("no shape")
      flat = np.frombuffer(raw, dtype.dtype())
      flat = flat.reshape(shape, order="F" if fortran else "C")
      return np.array(flat, flat.dtype.newbyteorder("="), order="C")
    except (*DAMAGED, MemoryError) as error:
      raise ValueError("no plain NumPy array") from error


@dataclasses.dataclass(frozen=True)
class Name:
  """A name in a pickle; never looked up anywhere but in this file."""

  text: str


def _put_all(into: Any, keys: Sequence[Any], values: Sequence[Any]) -> None:
  if type(into) is not dict:
    raise TypeError("no dictionary to put into")
  for key, value in zip(keys, values, strict=True):
    # A tuple of tuples of tuples ... has no end of a hash.
    if not isinstance(key, str | int | float | bytes | type(None)):
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


def _scalar(dtype: Any, raw: Any) -> Array:
  return Array((1, (), dtype, False, raw))


def _of_buffer(raw: Any, dtype: Any, shape: Any, order: Any) -> Array:
  return Array((1, shape, dtype, order == "F", raw))


CALLS: dict[str, Callable[..., Any]] = {
  "collections.OrderedDict": _dictionary,
  "collections.Counter": lambda *_: {},
  "collections.defaultdict": lambda *_: {},
  "builtins.dict": lambda *_: {},
  "builtins.set": _itself,
  "builtins.frozenset": _itself,
  "builtins.list": _itself,
  "builtins.bytes": lambda: b"",  # How protocol 2 spells no bytes.
  "_codecs.encode": Encoded,
  "numpy._core.multiarray._reconstruct": lambda *_: Array(),
  "numpy._core.multiarray.scalar": _scalar,
  "numpy._core.numeric._frombuffer": _of_buffer,
  "numpy.dtype": lambda code, *_: Dtype(code, "biufcUS"),
}
# Names that are only handed to those.
INERT = {"numpy.ndarray", "builtins.int", "builtins.float"}
OLD_NAMES = {"__builtin__.": "builtins.", "numpy.core.": "numpy._core."}


def load(path: str | os.PathLike[str]) -> dict[Any, Any]:
  """Reads a dictionary of plain containers, numbers, texts and NumPy arrays.

  Args:
    path: The file.

  Returns:
    Dictionaries, lists (sets, too), tuples, numbers and texts; arrays are
    still `Array`: see `integers` and `texts`.

  Raises:
    InputError: It is not there, is no pickle of a dictionary, is damaged, or
      needs anything else (the name is told, and nothing is run).
  """
  path = pathlib.Path(path)
  try:
    content = _read(_bytes(path))
  except Unfit as error:
    text = " ".join(str(error)[:500].split())  # Names may be of any length.
    raise InputError(f"{path} {text}.") from error
  if type(content) is not dict:
    raise InputError(
      f"{path} holds a {type(content).__name__}; wanted a dictionary."
    )
  return content


def integers(value: Any) -> np.ndarray:
  """Whole numbers of a pickle.

  Args:
    value: A list or tuple of them or a NumPy array, of which axes of length 1
      are dropped.

  Returns:
    int64 [n].

  Raises:
    ValueError: It is none of those; the text says what it is.
  """
  found = np.zeros(0)
  if isinstance(value, Array):
    found = value.array()
    if max(found.shape, default=0) != found.size and found.size != 1:
      raise ValueError(f"an array of shape {list(found.shape)}")
    found = found.ravel()
  elif isinstance(value, list | tuple):
    plain = [
      item.array().item() if isinstance(item, Array) else item for item in value
    ]
    for item in plain:
      if type(item) is not int and type(item) is not float:
        raise ValueError(f"a list with a {type(item).__name__} in it")
    if plain:
      found = np.asarray(plain)
  else:
    raise ValueError(f"a {type(value).__name__}")
  # Empty arrays are of floats where they were made of an empty list.
  whole = found.dtype.kind == "i" or (
    found.dtype.kind in "uf" and bool(np.all(abs(found) < 2**53))
  )
  if not whole or not np.array_equal(found, found.astype(np.int64)):
    raise ValueError(f"{found.dtype} values that are not whole numbers")
  return found.astype(np.int64)


def texts(value: Any) -> list[str]:
  """Texts of a pickle.

  Args:
    value: A list or tuple of them or a NumPy array.

  Returns:
    Them.

  Raises:
    ValueError: It is none of those; the text says what it is.
  """
  if isinstance(value, Array):
    value = value.array().ravel().tolist()
  if not isinstance(value, list | tuple):
    raise ValueError(f"a {type(value).__name__}")
  out = []
  for item in value:
    text = item.array().item() if isinstance(item, Array) else item
    text = text.decode("utf-8", "replace") if type(text) is bytes else text
    if type(text) is not str:
      raise ValueError(f"a list with a {type(text).__name__} in it")
    out.append(text)
  return out


def _bytes(path: pathlib.Path) -> bytes:
  try:
    if not path.is_file():  # A pipe would wait for ever.
      raise Unfit("is no file" if path.exists() else "is not there")
    if path.stat().st_size > _MOST_BYTES:
      raise Unfit(f"has more than {_MOST_BYTES} bytes; wanted a ground truth")
    return path.read_bytes()
  except OSError as error:
    raise Unfit(f"cannot be read: {error.strerror}") from error


def _read(data: bytes) -> Any:
  try:
    with warnings.catch_warnings():
      # About odd escapes in texts of Python 2.
      warnings.simplefilter("ignore", DeprecationWarning)
      return Machine().run(io.BytesIO(data))
  except Unfit:
    raise
  except DAMAGED as error:
    text = str(error).splitlines()
    raise Unfit(
      "is no pickle, or is truncated or damaged"
      f" ({type(error).__name__}: {text[0][:80] if text else ''})"
    ) from error


class Machine:
  """Follows a pickle's opcodes; methods are named after them.

  Attributes:
    calls: What the names do when they are called.
    inert: Names that are only handed to those.
    old_names: Starts of names, and what is read in their place.
    kind: Of what is read, for the errors.
    advice: What to do about others.
  """

  calls: Mapping[str, Callable[..., Any]] = CALLS
  inert: Set[str] = INERT
  old_names: Mapping[str, str] = OLD_NAMES
  kind = "plain container or array"
  advice = "wanted lists, dictionaries, numbers, texts and NumPy arrays alone"

  def __init__(self):
    self.stack: list[Any] = []
    self.marks: list[list[Any]] = []
    self.memo: dict[int, Any] = {}

  def run(self, file: Any) -> Any:
    """What the pickle at a file's position holds; the file is left behind."""
    for opcode, argument, _ in pickletools.genops(file):
      name = opcode.name
      if name in _LITERALS:
        self.stack.append(argument)
      elif name in _CONSTANTS:
        self.stack.append(_CONSTANTS[name])
      elif name == "STOP":
        break
      elif name not in _IGNORED:
        step = getattr(self, f"_{name.lower()}", None)
        if step is None:
          raise Unfit(f"has the opcode {name}, which no {self.kind} has")
        step(argument)
    return self.stack.pop()

  def _named(self, module: Any, name: Any) -> Name:
    if type(module) is not str or type(name) is not str:
      raise TypeError("a name that is no text")
    text = f"{module}.{name}"
    for old, new in self.old_names.items():
      if text.startswith(old):
        text = new + text.removeprefix(old)
    if text not in self.calls and text not in self.inert:
      raise Unfit(
        f"needs {module}.{name}, which is not of a {self.kind} and is not run; "
        f"{self.advice}"
      )
    return Name(text)

  def _call(self, function: Any, arguments: Any) -> Any:
    if not isinstance(function, Name) or not isinstance(arguments, tuple):
      raise Unfit("is damaged: its pickle calls what is no name")
    if function.text not in self.calls:
      raise Unfit(f"is damaged: its pickle calls {function.text}")
    return self.calls[function.text](*arguments)

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
    self.stack.append(self._named(module, name))

  def _stack_global(self, _):
    name, module = self.stack.pop(), self.stack.pop()
    self.stack.append(self._named(module, name))

  def _reduce(self, _):
    arguments, function = self.stack.pop(), self.stack.pop()
    self.stack.append(self._call(function, arguments))

  _newobj = _reduce

  def _build(self, _):
    state, made = self.stack.pop(), self.stack[-1]
    if isinstance(made, Array):
      if not isinstance(state, tuple):
        raise TypeError("no state of an array")
      made.state = state
    elif isinstance(made, Dtype):
      made.order = state[1]
    else:
      raise Unfit("is damaged: its pickle changes what has no state")


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = {
  "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT",
  "BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE",
  "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES",
  "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
_IGNORED = {"PROTO", "FRAME", "READONLY_BUFFER"}
