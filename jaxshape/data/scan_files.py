"""LiDAR scans and their labels in files: KITTI, nuScenes, NumPy, PCD and PLY.

A scan is its points, float32 [N, 3], in metres in the sensor's frame (x ahead,
y left, z up), and its remissions, float32 [N], in the file's own unit (0..1 in
KITTI, 0..255 in nuScenes). Nothing that a file holds is ever executed, and no
file can ask for more memory than its own size.

Source:
  KITTI's development kit (`.bin`), the nuScenes schema (`.pcd.bin`), NumPy's
  NEP 1 (`.npy`), the Point Cloud Library's "PCD file format" 0.7, Turk, "The
  PLY Polygon File Format", 1994, and the SemanticKITTI format (`.label`).
"""

from collections.abc import Callable, Mapping
import contextlib
import io
import logging
import math
import os
import pathlib
import tempfile
import types
from typing import Any, NamedTuple

import numpy as np

from jaxshape.errors import InputError

EXTENSIONS = (".bin", ".npy", ".pcd", ".ply")
# A scan of the largest sensors has some 10 MB.
_MOST_BYTES = 2**29
# Coordinates above are not metres around a sensor: wrong columns, or no scan.
_FARTHEST = 1e6
_REMISSION = (
  "remission", "intensity", "reflectivity", "reflectance", "i",
  "scalar_intensity", "scalar_remission", "scalar_reflectance",
)  # fmt: skip
_PLY_TYPES = {
  "char": "i1", "int8": "i1", "uchar": "u1", "uint8": "u1", "short": "i2",
  "int16": "i2", "ushort": "u2", "uint16": "u2", "int": "i4", "int32": "i4",
  "uint": "u4", "uint32": "u4", "float": "f4", "float32": "f4", "double": "f8",
  "float64": "f8",
}  # fmt: skip
_PLY_ORDERS = {
  "ascii": "=", "binary_little_endian": "<", "binary_big_endian": ">"
}  # fmt: skip


class Sensor(NamedTuple):
  """The range image that suits a sensor.

  Attributes:
    height: Rows: its beams.
    width: Columns: about its shots per turn, so that few pixels stay empty; a
      multiple of 256, as networks halve it several times.
    fov_up: Degrees above the horizon that the first row looks to.
    fov_down: Degrees, negative below the horizon, that the last row looks to.
  """

  height: int
  width: int
  fov_up: float
  fov_down: float


# Fields of view from the makers' data sheets and manuals (Velodyne HDL-32E
# 97-0038, VLP-16 63-9243, VLP-32C 63-9325, VLS-128 63-9483; Ouster OS0, OS1,
# OS2, Rev. 5 and later; Hesai Pandar40P, Pandar64, PandarXT-32); hdl64 is what
# networks for SemanticKITTI are trained with (Milioto et al., IROS 2019).
# Columns: 10 turns a second, of Ouster its usual mode, of nuScenes its 20.
SENSORS: Mapping[str, Sensor] = types.MappingProxyType(
  {
    "hdl64": Sensor(64, 2048, 3.0, -25.0),
    "hdl32": Sensor(32, 2048, 10.67, -30.67),
    "nuscenes": Sensor(32, 1024, 10.67, -30.67),
    "vlp16": Sensor(16, 1792, 15.0, -15.0),
    "vlp32c": Sensor(32, 1792, 15.0, -25.0),
    "vls128": Sensor(128, 1792, 15.0, -25.0),
    "os0-128": Sensor(128, 1024, 45.0, -45.0),
    "os1-32": Sensor(32, 1024, 22.5, -22.5),
    "os1-64": Sensor(64, 1024, 22.5, -22.5),
    "os1-128": Sensor(128, 1024, 22.5, -22.5),
    "os2-128": Sensor(128, 1024, 11.25, -11.25),
    "pandar40p": Sensor(40, 1792, 15.0, -25.0),
    "pandar64": Sensor(64, 1792, 15.0, -25.0),
    "pandarxt32": Sensor(32, 1792, 15.0, -16.0),
  }
)

Scan = tuple[np.ndarray, np.ndarray]


def read(
  path: str | os.PathLike[str],
  *,
  columns: int | None = None,
  warn: bool = True,
) -> Scan:
  """Reads a scan.

  Points that are not finite are kept, so that each point keeps its number;
  projections drop them.

  Args:
    path: A file; its extension, one of `EXTENSIONS`, says what it holds. `.npy`
      is [N, 3] or [N, 4 and more]; of PCD and PLY the fields x, y, z and
      `intensity` (or `remission`, `reflectivity`, ...) are read.
    columns: Of `.bin`: float32 values per point, at least 4, of which the first
      four are read. By default 5 if the name ends with `.pcd.bin`, as in
      nuScenes, and else 4.
    warn: Whether to log how many points are not finite, and whether the
      remission is missing (it is then 0).

  Returns:
    Points, float32 [N, 3], and remissions, float32 [N].

  Raises:
    InputError: No such file, no points, cut off, or no scan.
  """
  path = pathlib.Path(path)
  kind = path.suffix.lower()
  if kind not in EXTENSIONS:
    raise InputError(
      f"{path} is no scan that can be read; wanted one of "
      f"{' '.join(EXTENSIONS)}."
    )
  if columns is not None and (kind != ".bin" or columns < 4):
    raise InputError(
      f"columns must be an integer >= 4, for .bin files only, got {columns} "
      f"for {path}."
    )
  data = read_bytes(path)
  if not data:
    raise InputError(f"{path} is empty; wanted at least one point.")
  reader = {".npy": _npy, ".pcd": _pcd, ".ply": _ply}.get(kind)
  if reader is None:
    points, remission = _bin(data, path, columns or bin_columns(path)), None
  else:
    points, remission = reader(data, path)
  if remission is None and points.shape[1] > 3:
    remission = points[:, 3]
  return _checked(points[:, :3], remission, path, warn)


def bin_columns(path: str | os.PathLike[str]) -> int:
  """How many values per point a `.bin` file has by its name.

  Args:
    path: A file name.

  Returns:
    5 for nuScenes' `.pcd.bin`, else 4.
  """
  return 5 if str(path).lower().endswith(".pcd.bin") else 4


def write(
  path: str | os.PathLike[str], points: np.ndarray, remission: np.ndarray
) -> None:
  """Writes a scan as KITTI's `.bin`; what was there is replaced at once.

  Args:
    path: The file.
    points: [N, 3], metres.
    remission: [N].
  """
  points, remission = np.asarray(points), np.asarray(remission)
  n = len(points)
  if points.shape != (n, 3) or remission.shape != (n,):
    raise ValueError(
      f"points and remission must be [N, 3] and [N], got {points.shape} and "
      f"{remission.shape}."
    )
  rows = np.concatenate([points, remission[:, None]], axis=1)
  write_bytes(path, rows.astype("<f4").tobytes())


def read_labels(
  path: str | os.PathLike[str], *, count: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
  """Reads a SemanticKITTI `.label` file: one uint32 per point.

  Args:
    path: The file.
    count: How many points the scan has; another number of labels is refused.

  Returns:
    The semantic label of each point, its lower 16 bits, and the instance, its
    upper 16 bits; both int32 [N].

  Raises:
    InputError: No such file, no labels, or not one per point.
  """
  path = pathlib.Path(path)
  data = read_bytes(path)
  _refuse_text(data, path, "labels, one uint32 per point")
  if not data or len(data) % 4:
    raise InputError(
      f"{path} has {len(data)} bytes; wanted labels, 4 bytes per point. Is it "
      "cut off?"
    )
  labels = np.frombuffer(data, "<u4")
  if count is not None and len(labels) != count:
    raise InputError(
      f"{path} has {len(labels)} labels, but its scan has {count} points."
    )
  return (labels & 0xFFFF).astype(np.int32), (labels >> 16).astype(np.int32)


def write_labels(
  path: str | os.PathLike[str],
  labels: np.ndarray,
  *,
  instances: np.ndarray | None = None,
) -> None:
  """Writes a SemanticKITTI `.label` file; what was there is replaced at once.

  Args:
    path: The file.
    labels: Semantic labels as in the data set (not train ids), 0..65535, [N].
    instances: Instances, 0..65535, [N]; 0 if there are none.
  """
  values = [_sixteen_bits("labels", labels)]
  if instances is not None:
    values.append(_sixteen_bits("instances", instances))
    if values[0].shape != values[1].shape:
      raise ValueError(
        f"instances must be one per label, got {len(values[1])} for "
        f"{len(values[0])}."
      )
    values[0] = values[0] | (values[1] << 16)
  write_bytes(path, values[0].astype("<u4").tobytes())


def _sixteen_bits(name: str, values: np.ndarray) -> np.ndarray:
  values = np.asarray(values)
  whole = np.issubdtype(values.dtype, np.integer)
  if values.ndim != 1 or not whole:
    raise ValueError(
      f"{name} must be integers [N], got {values.dtype} {values.shape}."
    )
  if values.size and not 0 <= values.min() <= values.max() <= 0xFFFF:
    raise ValueError(
      f"{name} must be in 0..65535, got {values.min()}..{values.max()}."
    )
  return values.astype(np.uint32)


def read_bytes(path: str | os.PathLike[str]) -> bytes:
  """Reads a file of at most 512 MiB.

  Args:
    path: The file.

  Returns:
    What it holds.

  Raises:
    InputError: It is not there, is no regular file, is too large, or cannot be
      read.
  """
  path = pathlib.Path(path)
  try:
    if not path.exists():
      raise InputError(f"There is no file {path}.")
    if not path.is_file():  # A pipe would wait for ever.
      raise InputError(f"{path} is no regular file; wanted a file.")
    size = path.stat().st_size
    if size > _MOST_BYTES:
      raise InputError(
        f"{path} has {size} bytes; wanted one scan, at most {_MOST_BYTES}."
      )
    return path.read_bytes()
  except (OSError, ValueError) as error:
    if isinstance(error, InputError):
      raise
    reason = getattr(error, "strerror", None) or error
    raise InputError(f"{path} cannot be read: {reason}.") from error


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
  """Writes a file beside its place and moves it there, whole.

  Args:
    path: The file; its folder is made.
    data: What it shall hold.

  Raises:
    InputError: It cannot be written.
  """
  path = pathlib.Path(path)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
      try:
        file.write(data)
        file.close()
        # Temporary files are for their owner alone, this one is not.
        mask = os.umask(0)
        os.umask(mask)
        pathlib.Path(file.name).chmod(0o666 & ~mask)
        pathlib.Path(file.name).replace(path)
      except BaseException:
        with contextlib.suppress(OSError):
          pathlib.Path(file.name).unlink()
        raise
  except OSError as error:
    raise InputError(f"{path} cannot be written: {error.strerror}.") from error


def _refuse_text(data: bytes, path: pathlib.Path, wanted: str) -> None:
  """Refuses web pages and pointers to files, which were saved as data."""
  start = data[:64]
  text = all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in start)
  if len(start) >= 8 and text:
    raise InputError(
      f"{path} holds text that starts with {start[:24].decode()!r}; wanted "
      f"{wanted}. Was a web page saved in its place?"
    )


def _bin(data: bytes, path: pathlib.Path, columns: int) -> np.ndarray:
  _refuse_text(data, path, f"{columns} float32 values per point")
  if len(data) % (4 * columns):
    raise InputError(
      f"{path} has {len(data)} bytes, which is no multiple of {4 * columns}; "
      f"wanted {columns} float32 values per point. Is it cut off?"
    )
  return np.frombuffer(data, "<f4").reshape(-1, columns)


def _npy(data: bytes, path: pathlib.Path) -> tuple[np.ndarray, None]:
  wanted = "an array of numbers [N, 3] or [N, 4 or more]: x y z remission"
  file = io.BytesIO(data)
  try:
    version = np.lib.format.read_magic(file)
    headers: dict[Any, Callable[..., Any]] = {
      (1, 0): np.lib.format.read_array_header_1_0,
      (2, 0): np.lib.format.read_array_header_2_0,
    }
    shape, fortran, dtype = headers[version](file)
  # Whatever the parser of the header meets (it evaluates a literal).
  except Exception as error:
    raise InputError(f"{path} is no .npy file; wanted {wanted}.") from error
  fits = len(shape) == 2 and shape[0] >= 0 and shape[1] >= 3
  if not fits or dtype.kind not in "fiu":
    raise InputError(f"{path} holds {dtype} {list(shape)}; wanted {wanted}.")
  need = math.prod(shape) * dtype.itemsize
  rest = data[file.tell() :]
  if len(rest) < need:
    raise InputError(
      f"{path} has {len(rest)} bytes of values; its header promises {need}. "
      "Is it cut off?"
    )
  values = np.frombuffer(rest[:need], dtype)
  return values.reshape(shape, order="F" if fortran else "C"), None


def _pcd(data: bytes, path: pathlib.Path) -> tuple[np.ndarray, Any]:
  header, at = {}, 0
  while "DATA" not in header:
    end = data.find(b"\n", at, at + 4096)
    if end < 0 or len(header) > 16:
      raise InputError(f"{path} has no PCD header; wanted a DATA line in it.")
    key, *words = data[at:end].decode("ascii", "replace").split() or ["#"]
    at = end + 1
    if not key.startswith("#"):
      header[key.upper()] = words
  try:
    names = header["FIELDS"]
    sizes = [int(word) for word in header["SIZE"]]
    counts = [int(word) for word in header.get("COUNT", ["1"] * len(names))]
    if min(counts) < 1:
      raise ValueError(f"COUNT {min(counts)}")
    kinds = [{"F": "f", "I": "i", "U": "u"}[word] for word in header["TYPE"]]
    fields = [
      # Names may repeat: padding is called "_" each time.
      (f"{name} {j}", f"<{kind}{size}", (count,))
      for j, (name, kind, size, count) in enumerate(
        zip(names, kinds, sizes, counts, strict=True)
      )
    ]
    points = header.get("POINTS") or [
      str(int(header["WIDTH"][0]) * int(header["HEIGHT"][0]))
    ]
    total, dtype = int(points[0]), np.dtype(fields)
    form = header["DATA"][0].lower()
  except (LookupError, ValueError, TypeError, OverflowError) as error:
    raise InputError(
      f"{path} has a PCD header that does not fit ({error}); wanted FIELDS, "
      "SIZE, TYPE, COUNT and POINTS."
    ) from error
  if form not in ("ascii", "binary"):
    raise InputError(
      f"{path} is PCD of the form {form!r}; wanted ascii or binary "
      "(pcl_convert_pcd_ascii_binary in.pcd out.pcd 1)."
    )
  table = _table(data[at:], dtype, total, form == "ascii", path)
  return _columns(
    {n.rsplit(" ", 1)[0]: table[n][:, 0] for n in _of(dtype)}, path
  )


def _ply(data: bytes, path: pathlib.Path) -> tuple[np.ndarray, Any]:
  end = data.find(b"end_header", 0, 2**16)
  at = data.find(b"\n", end) + 1
  if not data.startswith(b"ply") or end < 0 or not at:
    raise InputError(f"{path} has no PLY header; wanted ply ... end_header.")
  lines = data[:end].decode("ascii", "replace").splitlines()
  words = [line.split() for line in lines if line.split()]
  forms = [w[1] for w in words if w[0] == "format" and len(w) > 1]
  if len(forms) != 1 or forms[0] not in _PLY_ORDERS:
    raise InputError(
      f"{path} is PLY of the format {forms}; wanted one of "
      f"{', '.join(_PLY_ORDERS)}."
    )
  elements = [j for j, w in enumerate(words) if w[0] == "element"]
  try:
    first = elements[0]
    if words[first][1] != "vertex":
      raise ValueError("its first element is no vertex")
    total = int(words[first][2])
    fields = []
    for word in words[first + 1 : [*elements, len(words)][1]]:
      if word[0] == "property":
        kind = _PLY_ORDERS[forms[0]] + _PLY_TYPES[word[1]]
        fields.append((word[2], kind, (1,)))
    dtype = np.dtype(fields)
  except (LookupError, ValueError, TypeError, OverflowError) as error:
    raise InputError(
      f"{path} has a PLY header that does not fit ({error}); wanted first the "
      "element vertex, with properties that are numbers."
    ) from error
  table = _table(data[at:], dtype, total, forms[0] == "ascii", path)
  return _columns({name: table[name][:, 0] for name in _of(dtype)}, path)


def _of(dtype: np.dtype) -> tuple[str, ...]:
  return dtype.names or ()


def _table(
  data: bytes, dtype: np.dtype, total: int, ascii_: bool, path: pathlib.Path
) -> np.ndarray:
  """The rows of a PCD or PLY file, of which a header promises a number."""
  if total < 1:
    raise InputError(f"{path} has {total} points; wanted at least one.")
  if not ascii_:
    if dtype.itemsize < 1 or len(data) < total * dtype.itemsize:
      raise InputError(
        f"{path} has {len(data)} bytes of points; its header promises "
        f"{total} of {dtype.itemsize}. Is it cut off?"
      )
    return np.frombuffer(data[: total * dtype.itemsize], dtype)
  width = sum(dtype[name].shape[0] for name in _of(dtype))
  words = data.split(maxsplit=min(total * width, len(data)))[: total * width]
  if len(words) < total * width:
    raise InputError(
      f"{path} has {len(words)} numbers; its header promises {total} points of "
      f"{width}. Is it cut off?"
    )
  try:
    values = np.array(words, np.float64).reshape(total, width)
  except ValueError as error:
    raise InputError(f"{path}: {error}; wanted numbers.") from error
  table, at = np.empty(total, dtype), 0
  for name in _of(dtype):
    after = at + dtype[name].shape[0]
    # What a field of integers cannot hold is of no use there anyway.
    with np.errstate(over="ignore", invalid="ignore"):
      table[name] = values[:, at:after]
    at = after
  return table


def _columns(
  fields: Mapping[str, np.ndarray], path: pathlib.Path
) -> tuple[np.ndarray, np.ndarray | None]:
  lower = {name.lower(): values for name, values in fields.items()}
  missing = [name for name in "xyz" if name not in lower]
  if missing:
    raise InputError(
      f"{path} has the fields {', '.join(fields)}; wanted x, y, z."
    )
  points = np.stack([lower[name] for name in "xyz"], axis=1)
  return points, next((lower[n] for n in _REMISSION if n in lower), None)


def _checked(
  points: np.ndarray,
  remission: np.ndarray | None,
  path: pathlib.Path,
  warn: bool,
) -> Scan:
  if not len(points):
    raise InputError(f"{path} is empty; wanted at least one point.")
  with np.errstate(over="ignore", invalid="ignore"):
    places = np.array(points, np.float32)  # A copy, in the machine's order.
    if remission is None:
      strength = np.zeros(len(places), np.float32)
    else:
      strength = np.array(remission, np.float32)
    total = places.sum() + strength.sum()
  # A sum is finite only if its terms are: quicker than looking at each.
  if not np.isfinite(total) or _far(places):
    finite = np.isfinite(places).all(axis=1) & np.isfinite(strength)
    if finite.any() and _far(places[finite]):
      raise InputError(
        f"{path} has coordinates of up to {np.abs(places[finite]).max():.3g}; "
        "wanted metres around the sensor. Are its columns x y z remission?"
      )
    if warn and not finite.all():
      logging.warning(
        "%s: %d of %d points are not finite; they are kept, but no range image "
        "shows them.", path, np.sum(~finite), len(finite),
      )  # fmt: skip
  if warn and remission is None:
    logging.warning("%s has no remission; it is taken as 0.", path)
  return places, strength


def _far(places: np.ndarray) -> bool:
  return bool(max(places.max(), -places.min()) > _FARTHEST)
