"""Matrices of floats in MATLAB's `.mat` files of version 5 to 7.

Only numbers are read: cells, structures, objects and functions are passed over.
SciPy reads all of them, but some damaged files end its process, which no caller
can catch; here every length is compared with what is there.

Source: MathWorks, "MAT-File Format" (level 5).
"""

import math
import pathlib
import struct
from typing import NamedTuple
import zlib

import numpy as np

from jaxshape.errors import InputError

_MATRIX, _COMPRESSED = 14, 15
# By the numbers of the format's types, and of its classes of arrays.
_TYPES = {
  1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8",
  12: "i8", 13: "u8",
}  # fmt: skip
_FLOATS = {6: "f8", 7: "f4"}
_CLASSES = {
  1: "cell", 2: "struct", 3: "object", 4: "char", 5: "sparse", 6: "double",
  7: "single", 8: "int8", 9: "uint8", 10: "int16", 11: "uint16", 12: "int32",
  13: "uint32", 14: "int64", 15: "uint64",
}  # fmt: skip
_COMPLEX = 0x800
_HEAD = 4096  # Holds the name of any array, and all that lies before it.


class _Head(NamedTuple):
  """What an array says before its numbers, which start at `at`."""

  name: str
  kind: int
  complex: bool
  shape: tuple[int, ...]
  at: int


def read(path: pathlib.Path, key: str) -> np.ndarray:
  """Reads one matrix.

  Args:
    path: The file.
    key: The matrix's name.

  Returns:
    float32 or float64 of the shape it has there.

  Raises:
    InputError: There is no such file or matrix of floats, or it is damaged.
  """
  try:
    if not path.is_file():
      state = "no file" if path.exists() else "not there"
      raise InputError(f"{path} is {state}; wanted a .mat file.")
    return _find(path, memoryview(path.read_bytes()), key)
  except InputError:
    raise
  except (OSError, ValueError, struct.error, zlib.error, KeyError) as error:
    raise InputError(
      f"{path} cannot be read as MATLAB's .mat of version 5 to 7 ({error}); is "
      "it cut off, or of version 7.3? Then save it with -v7."
    ) from error


def _find(path: pathlib.Path, data: memoryview, key: str) -> np.ndarray:
  mark = bytes(data[126:128])
  if mark not in (b"IM", b"MI") or bytes(data[:10]) == b"MATLAB 7.3":
    raise ValueError("it has no such header")
  order, at, held = "<" if mark == b"IM" else ">", 128, []
  while at < len(data):
    kind, size = struct.unpack_from(f"{order}II", data, at)
    body, at = data[at + 8 : at + 8 + size], at + 8 + size
    if len(body) < size:
      raise ValueError("its last array lacks bytes")
    start = body[:_HEAD]
    if kind == _COMPRESSED:
      start = memoryview(zlib.decompressobj().decompress(body, _HEAD))
      kind, size = struct.unpack_from(f"{order}II", start)
      start = start[8:]
    if kind != _MATRIX:
      raise ValueError(f"it holds the type {kind}")
    head = _head(start, order)
    held.append(f"{head.name} ({_CLASSES.get(head.kind, 'unknown')})")
    if head.name == key and head.kind in _FLOATS and not head.complex:
      if len(body) != size or start.obj is not data.obj:
        # No more than it claims, however small it came.
        whole = zlib.decompressobj().decompress(body, size + 8)
        body = memoryview(whole)[8:]
      return _numbers(body, head, order)
  raise InputError(
    f"{path} has no matrix {key} of floats; it has "
    f"{', '.join(held[:12]) or 'nothing'}."
  )


def _head(body: memoryview, order: str) -> _Head:
  _, flags, at = _element(body, 0, order)
  _, shape, at = _element(body, at, order)
  _, name, at = _element(body, at, order)
  bits = struct.unpack_from(f"{order}I", flags)[0]
  sizes = np.frombuffer(shape, f"{order}i4").tolist()
  if min(sizes, default=-1) < 0:
    raise ValueError("an array has no shape")
  text = bytes(name).decode("ascii", "replace")
  return _Head(text, bits & 0xFF, bool(bits & _COMPLEX), tuple(sizes), at)


def _numbers(body: memoryview, head: _Head, order: str) -> np.ndarray:
  kind, raw, _ = _element(body, head.at, order)
  if kind not in _TYPES:
    raise ValueError(f"{head.name} holds the type {kind}")
  # Whole numbers may lie there in fewer bytes than their class has.
  flat = np.frombuffer(raw, order + _TYPES[kind])
  if len(flat) != math.prod(head.shape):
    raise ValueError(f"{head.name} has {len(flat)} numbers for {head.shape}")
  flat = flat.astype(_FLOATS[head.kind])
  return flat.reshape(head.shape, order="F")


def _element(
  body: memoryview, at: int, order: str
) -> tuple[int, memoryview, int]:
  """Type and bytes of what starts there, and where the next starts."""
  first = struct.unpack_from(f"{order}I", body, at)[0]
  if first >> 16:  # Up to four bytes, without a length of their own.
    kind, size, start, end = first & 0xFFFF, first >> 16, at + 4, at + 8
  else:
    kind, start = first, at + 8
    size = struct.unpack_from(f"{order}I", body, at + 4)[0]
    end = start + -(-size // 8) * 8
  if start + size > len(body):
    raise ValueError("an array lacks bytes")
  return kind, body[start : start + size], end
