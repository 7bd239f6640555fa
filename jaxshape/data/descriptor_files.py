"""Files of descriptors: found, opened, checked, put in order and stacked.

Descriptors are the rows of a `.npy` [N, D] or the columns of a matrix [D, N] of
a `.mat`, floats of any width. Nothing that a file holds is executed. A text
beside a `.npy`, of the same name but ending in `.txt`, says which image each
row is of, one file name per line, as `python -m jaxshape.describe` writes it.

Source:
  NumPy's NEP 1 (`.npy`); the keys "X" and "Q" are those of the features of
  filipradenovic/revisitop.
"""

from collections.abc import Iterator, Sequence
import logging
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np

from jaxshape.data import mat_files
from jaxshape.errors import InputError

# As far from 1 as the length of a row may be without being called another.
_LENGTH = 1e-3
_CHUNK = 2**24  # Bytes.
_FLOAT = np.finfo(np.float32)
_SUFFIXES = (".npy", ".mat")


class Part(NamedTuple):
  """Some rows of a table.

  Attributes:
    rows: [N, D], floats, may be memory-mapped.
    path: Where they are from.
    order: int64 [M], which of them in which order; None for all as they are.
  """

  rows: np.ndarray
  path: pathlib.Path
  order: np.ndarray | None = None

  @property
  def size(self) -> int:
    """How many rows it gives."""
    return len(self.rows if self.order is None else self.order)


class Rows:
  """Rows of several files as one table, float32 [N, D], read when asked for.

  It takes the place of an array where that would not fit into memory: it has
  `shape`, `dtype` and `ndim`, and is indexed by a number, a slice, or an array
  of numbers or booleans. What comes back is in memory.
  """

  dtype = np.dtype(np.float32)
  ndim = 2

  def __init__(self, parts: Sequence[Part], scaled: Sequence[bool]):
    """Takes parts of one width; rows of the scaled ones are made unit long."""
    self._parts, self._scaled = tuple(parts), tuple(scaled)
    self._starts = np.cumsum([0, *(part.size for part in parts)])
    self.shape = int(self._starts[-1]), int(parts[0].rows.shape[1])

  def __len__(self) -> int:
    return self.shape[0]

  def __getstate__(self) -> dict[str, Any]:
    # Files are opened where they arrive, rather than sent.
    parts = [
      part._replace(rows=None) if isinstance(part.rows, np.memmap) else part
      for part in self._parts
    ]
    return {**self.__dict__, "_parts": parts}

  def __setstate__(self, state: dict[str, Any]) -> None:
    vars(self).update(state)
    self._parts = tuple(
      read(part.path)._replace(order=part.order) if part.rows is None else part
      for part in self._parts
    )

  @property
  def nbytes(self) -> int:
    """Of an array of all rows."""
    return self.shape[0] * self.shape[1] * self.dtype.itemsize

  def __array__(self, dtype: Any = None, copy: bool | None = None):
    if copy is False:
      raise ValueError("copy must not be False: the rows lie in files.")
    return self[:].astype(dtype or self.dtype, copy=False)

  def __getitem__(self, index: Any) -> np.ndarray:
    n = len(self)
    if isinstance(index, slice):
      start, stop, step = index.indices(n)
      if step == 1:
        return self._between(start, max(start, stop))
      return self._at(np.arange(start, stop, step))
    index = np.asarray(index)
    if index.dtype == bool:
      if index.shape != (n,):
        raise IndexError(f"{list(index.shape)} booleans index {n} rows.")
      return self._at(np.flatnonzero(index))
    if index.dtype.kind not in "iu" and index.size:
      raise IndexError(f"rows are indexed by integers, got {index.dtype}.")
    index = index.astype(np.int64)
    if index.size and not -n <= index.min() <= index.max() < n:
      raise IndexError(
        f"row must be in 0..{n - 1}, got {index.min()}..{index.max()}."
      )
    return self._at(np.where(index < 0, index + n, index))

  def _between(self, start: int, stop: int) -> np.ndarray:
    out = np.empty((stop - start, self.shape[1]), self.dtype)
    for i, part in enumerate(self._parts):
      low, high = int(self._starts[i]), int(self._starts[i + 1])
      first, last = max(start, low), min(stop, high)
      if first < last:
        inner = slice(first - low, last - low)
        rows = part.rows[inner if part.order is None else part.order[inner]]
        out[first - start : last - start] = rows
        self._scale(i, out[first - start : last - start])
    return out

  def _at(self, index: np.ndarray) -> np.ndarray:
    out = np.empty((*index.shape, self.shape[1]), self.dtype)
    owner = np.searchsorted(self._starts[1:], index, side="right")
    for i, part in enumerate(self._parts):
      mine = owner == i
      if np.any(mine):
        inner = index[mine] - self._starts[i]
        rows = part.rows[inner if part.order is None else part.order[inner]]
        rows = rows.astype(np.float32)
        self._scale(i, rows)
        out[mine] = rows
    return out

  def _scale(self, i: int, rows: np.ndarray) -> None:
    if self._scaled[i]:
      rows /= np.maximum(_lengths(rows), _FLOAT.tiny)[:, None]


def folder(name: str, data_dir: str | None, kind: str) -> pathlib.Path:
  """The folder that a data set is named by.

  Args:
    name: Itself; `~` is expanded.
    data_dir: What a relative `name` starts from.
    kind: Of the data, for the error.

  Returns:
    Its path.

  Raises:
    InputError: There is none.
  """
  if not name and data_dir is None:
    raise InputError(f"{kind} needs a folder: {kind}:/path/to/it.")
  root = pathlib.Path(data_dir or "").expanduser()
  root = root / pathlib.Path(name).expanduser()
  try:
    if not root.is_dir():
      raise InputError(f"There is no folder {root}.")
  except OSError as error:
    raise InputError(f"{root} cannot be read: {error.strerror}.") from error
  return root


def find(
  folders: Sequence[pathlib.Path], names: Sequence[str], what: str
) -> pathlib.Path:
  """The first file of some names in some folders.

  Args:
    folders: Where to look, in this order.
    names: Of the files, the best first.
    what: It is, for the error.

  Returns:
    Its path.

  Raises:
    InputError: There is none; the message lists what was looked for and what
      is there.
  """
  for name in names:
    for place in folders:
      if (place / name).is_file():
        return place / name
  there = sorted(
    entry.name
    for place in folders[:1]
    for entry in os.scandir(place)
    if entry.name[:1] != "."
  )
  more = f", ... ({len(there)} in all)" if len(there) > 12 else ""
  raise InputError(
    f"{folders[0]} has no {what}: looked for {', '.join(names)}"
    + (f" there and in {_below(folders)}" if len(folders) > 1 else "")
    + f"; there are {', '.join(there[:12]) or 'no files'}{more}."
  )


def _below(folders: Sequence[pathlib.Path]) -> str:
  return ", ".join(str(place.relative_to(folders[0])) for place in folders[1:])


def features(
  folders: Sequence[pathlib.Path],
  names: Sequence[str],
  *,
  given: str,
  what: str,
) -> pathlib.Path:
  """The file of descriptors: the one that is given, or the first found.

  Args:
    folders: Where to look.
    names: Names without `.npy` or `.mat`, the best first.
    given: A path or a name in the folders, with its ending; empty for none.
    what: It is, for the error.

  Returns:
    Its path.

  Raises:
    InputError: There is none.
  """
  if not given:
    both = [name + suffix for name in names for suffix in _SUFFIXES]
    return find(folders, both, what)
  path = pathlib.Path(given).expanduser()
  if path.suffix not in _SUFFIXES:
    raise InputError(f"{given} is no {what}; wanted a .npy or .mat file.")
  return path if path.is_absolute() else find(folders, [given], what)


def read(path: pathlib.Path, *, key: str = "X") -> Part:
  """Opens descriptors; of a `.npy` nothing is read before it is asked for.

  Args:
    path: Ends with `.npy`, [N, D], or `.mat`, of which [D, N] is read.
    key: Name of the matrix in a `.mat`.

  Returns:
    All its rows, in the file's order.

  Raises:
    InputError: It is not there, is cut off, or holds anything else.
  """
  if path.suffix == ".mat":
    return Part(_table(mat_files.read(path, key).T, path), path)
  try:
    if not path.is_file():
      raise InputError(
        f"{path} is {'no file' if path.exists() else 'not there'}; wanted "
        "descriptors [N, D] as .npy."
      )
    if not path.stat().st_size:
      raise InputError(f"{path} is empty; wanted descriptors [N, D] as .npy.")
    with path.open("rb") as file:
      if file.read(6) != b"\x93NUMPY":
        raise InputError(
          f"{path} is no .npy file; wanted descriptors [N, D], written by "
          "numpy.save without pickles."
        )
    rows = np.load(path, mmap_mode="r", allow_pickle=False)
  except InputError:
    raise
  except Exception as error:  # Damaged headers raise all kinds.
    raise InputError(
      f"{path} cannot be read as .npy [N, D] of floats: {_line(error)}. Is it "
      "cut off?"
    ) from error
  return Part(_table(rows, path), path)


def _line(error: BaseException) -> str:
  return (str(error).splitlines() or [type(error).__name__])[0][:120]


def _table(rows: Any, path: pathlib.Path) -> np.ndarray:
  if not isinstance(rows, np.ndarray) or rows.dtype.kind != "f":
    raise InputError(
      f"{path} holds {getattr(rows, 'dtype', 'no array')}; wanted descriptors "
      "[N, D] as float16, float32 or float64."
    )
  if rows.ndim != 2 or not rows.size:
    raise InputError(
      f"{path} has the shape {list(rows.shape)}; wanted descriptors [N, D]."
    )
  return rows


def read_lines(path: pathlib.Path) -> list[str]:
  """Lines of a text.

  Args:
    path: The file, UTF-8.

  Returns:
    Them, without spaces around.

  Raises:
    InputError: It is no such file.
  """
  try:
    if not path.is_file():
      raise InputError(f"{path} is no file; wanted a text.")
    text = path.read_text(encoding="utf-8-sig")
  except (OSError, UnicodeError) as error:
    reason = getattr(error, "strerror", None) or "it is no text in UTF-8"
    raise InputError(f"{path} cannot be read: {reason}.") from error
  # Others than these may be within a name.
  lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
  return [line.strip() for line in lines]


def names_of(part: Part) -> list[str] | None:
  """What the rows of a file are of, by the text beside it.

  Args:
    part: As `read` gives it.

  Returns:
    One name per row, or None where there is no text.

  Raises:
    InputError: It has another number of lines than there are rows.
  """
  path = part.path.with_suffix(".txt")
  if part.path.suffix != ".npy" or not path.is_file():
    return None
  lines = read_lines(path)
  if len(lines) != len(part.rows):
    raise InputError(
      f"{path} has {len(lines)} names, but {part.path} has {len(part.rows)} "
      "rows; wanted one file name per row."
    )
  return lines


def ordered(part: Part, wanted: Sequence[str], where: str) -> Part:
  """The rows of some images, in their order.

  Without a text of names the rows must be those of the images already.

  Args:
    part: As `read` gives it.
    wanted: Names of images, with or without folders and extension.
    where: They are listed, for the error.

  Returns:
    As many rows as there are names.

  Raises:
    InputError: There are more or fewer rows, or a name is missing or twofold.
  """
  names = names_of(part)
  if names is None:
    n = len(part.rows)
    if n != len(wanted):
      turned = part.rows.shape[1] == len(wanted)
      raise InputError(
        f"{part.path} has {n} descriptors, but {where} lists {len(wanted)}"
        + (
          "; it looks transposed: wanted one row per image." if turned else "."
        )
        + " For more or other images give their names, one per line, in "
        f"{part.path.with_suffix('.txt').name}."
      )
    return part
  rows: dict[str, list[int]] = {}
  for i, name in enumerate(names):
    rows.setdefault(_stem(name), []).append(i)
  found = [rows.get(_stem(name), []) for name in wanted]
  for name, at in zip(wanted, found, strict=True):
    if len(at) != 1:
      text = part.path.with_suffix(".txt")
      raise InputError(
        f"{text} has {'more than one' if at else 'no'} file called {name}, "
        f"which {where} lists ({sum(len(a) != 1 for a in found)} such names of "
        f"{len(wanted)})."
      )
  order = np.array([at[0] for at in found], np.int64)
  same = len(order) == len(names) and bool(np.all(order == range(len(order))))
  return part if same else part._replace(order=order)


def _stem(name: str) -> str:
  name = name.replace("\\", "/").rpartition("/")[2]
  stem, dot, ending = name.rpartition(".")
  # No other endings: names of images may have dots of their own.
  known = ending.lower() in ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff")
  return stem if dot and known else name


def table(parts: Sequence[Part], *, normalize: bool, memory: int) -> np.ndarray:
  """Checks all rows of some files and stacks them.

  Args:
    parts: At least one.
    normalize: Whether rows that are not of length 1 are made so; they are
      warned of either way, and a file whose rows all are is left as it is.
    memory: Bytes; larger tables stay in their files.

  Returns:
    float32 [N, D], read-only; what does not fit into memory is a memory-mapped
    array or `Rows`, which is used like one.

  Raises:
    InputError: Widths differ, or a row is not finite or zero.
  """
  if memory < 0:
    raise InputError(f"memory must be 0 or more bytes, got {memory}.")
  first = parts[0]
  for part in parts[1:]:
    if part.rows.shape[1] != first.rows.shape[1]:
      raise InputError(
        f"{part.path} has descriptors of {part.rows.shape[1]} numbers, but "
        f"{first.path} of {first.rows.shape[1]}."
      )
  scaled = [_check(part, normalize) for part in parts]
  rows = Rows(parts, scaled)
  if rows.nbytes <= memory:
    out = np.empty(rows.shape, np.float32)
    for chunk in _chunks(*rows.shape):
      out[chunk] = rows[chunk]
    out.setflags(write=False)
    return out
  plain = len(parts) == 1 and first.order is None and not scaled[0]
  if plain and first.rows.dtype == np.float32:
    return first.rows
  # Indexed, measured and cut like an array, which is all that is done to it.
  stacked: Any = rows
  return stacked


def _check(part: Part, normalize: bool) -> bool:
  """Refuses what is no descriptor; whether rows are to be made unit long."""
  least, most = np.inf, 0.0
  for chunk in _chunks(*part.rows.shape):
    lengths = _lengths(part.rows[chunk])
    # What float64 holds beyond these, float32 does not.
    usable = (lengths >= _FLOAT.tiny) & (lengths <= _FLOAT.max)
    wrong = np.flatnonzero(~usable)
    if wrong.size:
      zero = lengths[wrong[0]] < _FLOAT.tiny
      raise InputError(
        f"{part.path}: row {chunk.start + wrong[0]} is "
        f"{'zero' if zero else 'not finite'}; wanted descriptors of length 1."
      )
    least, most = min(least, lengths.min()), max(most, lengths.max())
  if max(1 - least, most - 1) <= _LENGTH:
    return False
  logging.warning(
    "%s: descriptors have lengths %.4g..%.4g rather than 1; they are %s.",
    part.path,
    least,
    most,
    "normalized" if normalize else "used as they are (normalize=False)",
  )
  return normalize


def _lengths(rows: np.ndarray) -> np.ndarray:
  # Finite numbers of float32 have squares that are not; of float64 it is rare.
  rows = np.asarray(rows, np.float64)
  return np.sqrt(np.einsum("nd,nd->n", rows, rows))


def _chunks(count: int, width: int) -> Iterator[slice]:
  step = max(1, _CHUNK // (8 * width))
  for start in range(0, count, step):
    yield slice(start, min(start + step, count))
