"""Tensors of PyTorch files, read and written without PyTorch.

A file of `torch.save` is a pickle (see `pickled.py`, which runs nothing of it)
and raw numbers beside it. What it claims is compared with what it holds before
memory is taken.

Source: `torch.save` and `torch.load` of PyTorch, and the description of the
safetensors format, for names and layout.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import io
import json
import math
import os
import struct
from typing import Any
import zipfile

from etils import epath
import numpy as np

from jaxshape.engine import pickled
from jaxshape.errors import InputError

SAFETENSORS = ".safetensors"
# Where checkpoints keep a state dict beside other things.
NESTED = (
  "state_dict", "model_state_dict", "model", "net", "network", "weights",
  "params",
)  # fmt: skip
_UNWANTED = ("optim", "sched", "scaler", "amp")
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
# Tensors may share numbers (tied weights, expanded axes), but not without end.
_SPARE_BYTES, _SHARED = 2**26, 16
_DEEPEST = 20
_LONGEST_HEADER = 10**8
_ALIGNMENT = 64  # What `torch.load(mmap=True)` likes.


def load(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
  """Reads the tensors of a file.

  The three formats that are downloaded are told apart by their content: the
  zip file that `torch.save` writes since 1.6, what it wrote before, and
  safetensors. Where a checkpoint holds more than a state dict, the part named
  as in `NESTED` is taken; if there is none, nested dictionaries are joined by
  dots and those of optimizers are left out. A prefix such as "module." stays.

  Args:
    path: Of the file, local or on a bucket.

  Returns:
    Arrays of their own memory, by name, in the order of the file; bfloat16 and
    8-bit floats have JAX's dtypes.

  Raises:
    InputError: The file is not there, is of another format, is damaged, or
      needs more than tensors and plain containers (the name is told).
  """
  where = file(path)
  with _about(where):
    return _read(_bytes(where))


def save(
  path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray]
) -> None:
  """Writes tensors so that `torch.load(path, weights_only=True)` gives them.

  The same tensors make the same bytes. A file of that name is replaced when
  the new one is complete.

  Args:
    path: Ends with ".safetensors" for that format.
    tensors: By name, kept in order.

  Raises:
    InputError: A dtype has no name there, or the folder is not there.
  """
  where = file(path)
  arrays = {
    str(name): np.array(x, np.asarray(x).dtype.newbyteorder("<"), order="C")
    for name, x in tensors.items()
  }
  with _about(where):
    if not where.parent.is_dir():
      raise pickled.Unfit(
        f"cannot be written: there is no folder {where.parent}"
      )
    whole = (
      _safetensors(arrays)
      if where.suffix == SAFETENSORS
      else _zip(arrays, where.stem or "archive")
    )
  part = where.with_name(f"{where.name}.part")
  part.write_bytes(whole)
  part.replace(where)


def file(path: str | os.PathLike[str]) -> Any:
  """The path of a file, local or on a bucket; refuses other addresses."""
  try:
    return epath.Path(path)
  except KeyError as error:  # Of its table of what may be before "://".
    raise InputError(
      f"{path} is an address; download it and give the file."
    ) from error


@contextlib.contextmanager
def _about(path: Any) -> Iterator[None]:
  """Names the file in front of what is wrong with it."""
  try:
    yield
  except pickled.Unfit as error:
    text = " ".join(str(error)[:500].split())  # Names may be of any length.
    raise InputError(f"{path} {text}.") from error


def _bytes(path: Any) -> bytes:
  if path.is_dir():
    raise pickled.Unfit("is a folder; name a file in it")
  if not path.exists():
    raise pickled.Unfit("is not there")
  return path.read_bytes()


def _read(data: bytes) -> dict[str, np.ndarray]:
  if data.startswith(b"PK\x03\x04"):
    return _read_zip(data)
  if _is_safetensors(data):
    return _read_safetensors(data)
  if data[:1] == b"\x80":
    return _read_legacy(data)
  raise pickled.Unfit(_what(data))


def _what(data: bytes) -> str:
  """What a file is that is none of ours, if that can be told."""
  start = data[:512].lstrip().lower()
  if not data:
    return "is empty; download it again"
  if start.startswith((b"<", b"\xef\xbb\xbf<")):
    return "is a web page, no PyTorch file; download it again"
  if start.startswith(b"version https://git-lfs"):
    return "is a pointer of Git LFS, no PyTorch file; run git lfs pull"
  packed = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!")
  if data.startswith(packed) or data[257:262] == b"ustar":
    return "is an archive; unpack it and give the files in it"
  return "is no PyTorch file: neither a zip file, nor a pickle, nor safetensors"


# Zip files.


def _read_zip(data: bytes) -> dict[str, np.ndarray]:
  try:
    archive = zipfile.ZipFile(io.BytesIO(data))
  except pickled.DAMAGED as error:
    raise pickled.Unfit(f"is truncated or damaged ({error})") from error
  with archive:
    entries = _Entries(archive, len(data))
    order = entries.read("byteorder") if "byteorder" in entries else b"little"
    if order not in (b"little", b"big"):
      raise pickled.Unfit(f"has the unknown byte order {order[:20]!r}")
    content = pickled.read(io.BytesIO(entries.read("data.pkl")))
    cache: dict[str, memoryview] = {}

    def numbers(storage: pickled.Storage) -> memoryview:
      if storage.key not in cache:
        cache[storage.key] = memoryview(entries.read(f"data/{storage.key}"))
      return cache[storage.key]

    return _arrays(content, numbers, len(data), big=order == b"big")


class _Entries:
  """What a zip file holds, read without taking more memory than it has."""

  def __init__(self, archive: zipfile.ZipFile, size: int):
    """Finds the folder that all entries of `torch.save` lie in."""
    self.archive, self.left = archive, size
    self.infos = {info.filename: info for info in archive.infolist()}
    pickles = [n for n in self.infos if f"/{n}".endswith("/data.pkl")]
    if not pickles:
      raise pickled.Unfit(
        "is a zip file without a data.pkl, so torch.save has not written it; "
        "if it holds such files, unpack it"
      )
    self.root = min(pickles, key=len).removesuffix("data.pkl")
    if "constants.pkl" in self:
      raise pickled.Unfit(
        "is a TorchScript program; save its state_dict() with torch.save"
      )

  def __contains__(self, name: str) -> bool:
    return self.root + name in self.infos

  def read(self, name: str) -> bytes:
    """The bytes of an entry."""
    if name not in self:
      raise pickled.Unfit(f"lacks its entry {self.root}{name}")
    info = self.infos[self.root + name]
    if info.compress_type != zipfile.ZIP_STORED:
      raise pickled.Unfit(
        f"has a compressed entry {info.filename}, which torch.save never writes"
      )
    self.left -= info.file_size
    if self.left < 0:
      raise pickled.Unfit(f"claims more than it holds, in {info.filename}")
    try:
      return self.archive.read(info)
    except pickled.DAMAGED as error:
      raise pickled.Unfit(f"is damaged in {info.filename} ({error})") from error


# Files from before 1.6: five pickles, then the storages one after another.


def _read_legacy(data: bytes) -> dict[str, np.ndarray]:
  file = io.BytesIO(data)
  if pickled.read(file) != _MAGIC:
    raise pickled.Unfit(
      "is a pickle, but torch.save has not written it; save a state_dict() "
      "with torch.save"
    )
  if pickled.read(file) != _PROTOCOL:
    raise pickled.Unfit("is of an unknown version of torch.save")
  pickled.read(file)  # Sizes of types where it was written.
  content, keys = pickled.read(file), pickled.read(file)
  cache = _behind(memoryview(data)[file.tell() :], keys, _storages(content))

  def numbers(storage: pickled.Storage) -> memoryview:
    if storage.key not in cache:
      raise pickled.Unfit(f"lacks its storage {storage.key}")
    start = storage.start * storage.dtype.itemsize
    return cache[storage.key][start:]

  return _arrays(content, numbers, len(data))


def _behind(
  data: memoryview, keys: Any, storages: Mapping[str, pickled.Storage]
) -> dict[str, memoryview]:
  """Storages by key: each an item count of 8 bytes, and the items."""
  out = {}
  if not isinstance(keys, list):
    raise pickled.Unfit("is damaged in the list of its storages")
  for key in keys:
    # How wide its items are, only the tensors tell.
    if type(key) is not str or key not in storages:
      raise pickled.Unfit("is damaged: it lists a storage that no tensor has")
    if len(data) < 8:
      raise pickled.Unfit("is truncated")
    (count,) = struct.unpack("<q", data[:8])
    end = 8 + count * storages[key].dtype.itemsize
    if not 8 <= end <= len(data):
      raise pickled.Unfit("is truncated")
    out[key], data = data[8:end], data[end:]
  return out


# What both have in common.


def _arrays(
  content: Any,
  numbers: Callable[[pickled.Storage], memoryview],
  file_size: int,
  *,
  big: bool = False,
) -> dict[str, np.ndarray]:
  """The tensors of a checkpoint as arrays."""
  found = _flatten(content)
  if not found:
    raise pickled.Unfit("holds no tensors by name, so it is no state dict")
  budget = _SPARE_BYTES + _SHARED * file_size
  out = {}
  for name, value in found.items():
    if isinstance(value, pickled.Tensor):
      value.check(name)
    budget -= value.nbytes
    if budget < 0:
      raise pickled.Unfit(
        f"claims tensors ({name}) that are many times larger than the file"
      )
    try:
      out[name] = (
        _tensor(value, name, numbers, big)
        if isinstance(value, pickled.Tensor)
        else pickled.array(value, name)
      )
    except pickled.Unfit:
      raise
    except pickled.DAMAGED as error:
      raise pickled.Unfit(f"is damaged at {name} ({error})") from error
  return out


def _tensor(
  tensor: pickled.Tensor,
  name: str,
  numbers: Callable[[pickled.Storage], memoryview],
  big: bool,
) -> np.ndarray:
  raw, storage = numbers(tensor.storage), tensor.storage
  size = storage.size * storage.dtype.itemsize
  if len(raw) < size:
    raise pickled.Unfit(
      f"is truncated: the storage of {name} has {len(raw)} of {size} bytes"
    )
  if not tensor.size:
    return np.zeros(tensor.shape, tensor.dtype)
  flat, step = _plain(raw[:size], tensor.dtype), tensor.dtype.itemsize
  view = np.ndarray(
    tensor.shape,
    tensor.dtype,
    buffer=flat,
    offset=step * tensor.offset,
    strides=[step * n for n in tensor.strides],
  )
  out = np.array(view, order="C")
  return out.byteswap(inplace=True) if big else out


def _plain(raw: memoryview, dtype: np.dtype) -> np.ndarray:
  """Bytes as numbers, those at the end that make no whole one left out."""
  raw = raw[: len(raw) // dtype.itemsize * dtype.itemsize]
  # What is neither 0 nor 1 is no boolean to NumPy.
  if dtype == np.bool_:
    return np.frombuffer(raw, np.uint8) != 0
  return np.frombuffer(raw, dtype)


def _flatten(content: Any) -> dict[str, Any]:
  """The state dict in a checkpoint, its dictionaries joined by dots."""
  seen: set[int] = set()

  def visit(node: dict[Any, Any], prefix: str, depth: int) -> dict[str, Any]:
    if id(node) in seen:  # Pickles may hold themselves.
      return {}
    seen.add(id(node))
    if depth > _DEEPEST:
      raise pickled.Unfit(f"is nested deeper than {_DEEPEST} dictionaries")
    for name in NESTED:
      inner = node.get(name)
      if isinstance(inner, dict) and (out := visit(inner, prefix, depth + 1)):
        return out
    out = {}
    for key, value in node.items():
      if isinstance(value, pickled.Tensor | pickled.Array):
        out[f"{prefix}{key}"] = value
      elif isinstance(value, dict) and not str(key).startswith(_UNWANTED):
        out |= visit(value, f"{prefix}{key}.", depth + 1)
    return out

  return visit(content, "", 0) if isinstance(content, dict) else {}


def _storages(content: Any) -> dict[str, pickled.Storage]:
  """All storages that anything refers to, optimizers included."""
  out, seen, left = {}, set(), [content]
  while left:
    node = left.pop()
    if isinstance(node, pickled.Tensor):
      out[node.storage.key] = node.storage
    elif isinstance(node, pickled.Storage):
      out[node.key] = node
    elif isinstance(node, dict | list | tuple) and id(node) not in seen:
      seen.add(id(node))
      left += node.values() if isinstance(node, dict) else node
  return out


# Safetensors.


def _is_safetensors(data: bytes) -> bool:
  return len(data) > 9 and data[8:9] == b"{" and data[5:8] == b"\0\0\0"


def _read_safetensors(data: bytes) -> dict[str, np.ndarray]:
  (length,) = struct.unpack("<Q", data[:8])
  if length > min(len(data) - 8, _LONGEST_HEADER):
    raise pickled.Unfit("is truncated or damaged: its header is too long")
  dtypes, out = dict(pickled.DTYPES.values()), {}
  body, left = memoryview(data)[8 + length :], len(data)
  try:
    header = json.loads(data[8 : 8 + length])
    for name, entry in header.items():
      if name == "__metadata__":
        continue
      if entry["dtype"] not in dtypes:
        raise pickled.Unfit(f"holds {name} of an unknown dtype")
      dtype, (start, end) = dtypes[entry["dtype"]], entry["data_offsets"]
      shape = entry["shape"]
      left -= end - start  # They do not overlap.
      if (
        not 0 <= start <= end <= len(body)
        or min(shape, default=0) < 0
        or end - start != math.prod(shape) * dtype.itemsize
        or left < 0
      ):
        raise pickled.Unfit(f"is truncated or damaged at {name}")
      out[name] = np.array(_plain(body[start:end], dtype).reshape(shape))
  except pickled.Unfit:
    raise
  except pickled.DAMAGED as error:
    text = f"{type(error).__name__}: {error}"
    raise pickled.Unfit(f"is damaged in its header ({text[:80]})") from error
  if not out:
    raise pickled.Unfit("holds no tensors")
  return out


def _safetensors(arrays: Mapping[str, np.ndarray]) -> bytes:
  codes = {dtype: code for code, dtype in pickled.DTYPES.values()}
  header, start = {}, 0
  for name, value in arrays.items():
    end = start + value.nbytes
    header[name] = {
      "dtype": _lookup(codes, value, name),
      "shape": list(value.shape),
      "data_offsets": [start, end],
    }
    start = end
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  parts = (value.tobytes() for value in arrays.values())
  return struct.pack("<Q", len(text)) + text + b"".join(parts)


# Writing zip files.


def _lookup(names: Mapping[np.dtype, str], value: np.ndarray, name: str) -> str:
  if not names.get(value.dtype):
    raise pickled.Unfit(f"cannot hold {name}: {value.dtype} has no name there")
  return names[value.dtype]


def _zip(arrays: Mapping[str, np.ndarray], root: str) -> bytes:
  file = io.BytesIO()
  with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:

    def add(name: str, content: bytes) -> None:
      info = zipfile.ZipInfo(f"{root}/{name}")  # Of 1980, whenever it is.
      before = archive.start_dir + 30 + len(info.filename.encode()) + 4
      padding = -before % _ALIGNMENT
      info.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
      archive.writestr(info, content)

    add("data.pkl", _pickle(arrays))
    add("byteorder", b"little")
    for number, value in enumerate(arrays.values()):
      add(f"data/{number}", value.tobytes())
    add("version", b"3\n")
  return file.getvalue()


def _pickle(arrays: Mapping[str, np.ndarray]) -> bytes:
  """An OrderedDict of tensors in protocol 2, each of a storage of its own."""
  storages = {dtype: name for name, dtype in pickled.STORAGES.items()}
  empty = b"ccollections\nOrderedDict\n)R"
  out = [b"\x80\x02", empty, b"("]
  for number, (name, value) in enumerate(arrays.items()):
    storage = _lookup(storages, value, name)
    strides = [step // value.itemsize for step in value.strides]
    out += [
      _text(name),
      b"ctorch._utils\n_rebuild_tensor_v2\n((",
      _text("storage"),
      f"ctorch\n{storage}Storage\n".encode(),
      _text(str(number)),
      _text("cpu"),
      _number(value.size),
      b"tQ",  # Ends the tuple that names a storage, and fetches it.
      _number(0),
      *(b"(", *map(_number, value.shape), b"t"),
      *(b"(", *map(_number, strides), b"t"),
      b"\x89",  # It requires no gradient, and has no hooks:
      empty,
      b"tR",
    ]
  return b"".join([*out, b"u."])


def _text(text: str) -> bytes:
  raw = text.encode()
  return b"X" + struct.pack("<I", len(raw)) + raw


def _number(value: int) -> bytes:
  if value < 2**31:
    return b"J" + struct.pack("<i", value)
  raw = value.to_bytes(9, "little", signed=True)
  return b"\x8a\x09" + raw
