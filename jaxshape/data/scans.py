"""Anybody's own LiDAR scans, without labels: one file or a folder of them.

Files as `scan_files` reads them, at any depth below the folder, so that drives
of raw KITTI (`.../velodyne_points/data/0000000000.bin`) are one folder too.
"""

import collections
from collections.abc import Sequence
import logging
import os
import pathlib

import numpy as np

from jaxshape.data import lidar_examples, scan_files, semantic_kitti
from jaxshape.errors import InputError


class Folder(lidar_examples.Scans):
  """Scans of files, read when asked for.

  Attributes:
    files: Their paths, in the order of the examples.
    root: The folder that they lie in.
  """

  def __init__(
    self,
    root: pathlib.Path,
    files: Sequence[pathlib.Path],
    *,
    points: int,
    columns: int | None,
    full_remission: float | None,
    cache: int,
  ):
    known = semantic_kitti.builtin_labels()
    super().__init__(
      classes=known.classes,
      colors=known.colors,
      frequencies=None,
      scans=_names(root, files),
      points=points,
      cache=cache,
    )
    self.root, self.files = root, tuple(files)
    self._columns, self._full = columns, full_remission

  def _read(self, i: int) -> lidar_examples.Labelled:
    file = self.files[i]
    columns = self._columns if file.suffix.lower() == ".bin" else None
    points, remission = lidar_examples.read_scan(file, columns=columns)
    full = self._full
    if full is None:
      full = _full_remission(remission)
      if full != 1:
        self._warn_once(
          "remission",
          f"{file}: remissions go up to {np.nanmax(remission):g}; taken as "
          f"0..{full:g} and divided by {full:g}. If that is wrong, give "
          "full_remission.",
        )
      elif not remission.any():
        self._warn_once("none", f"{file} has no remissions; they are 0.")
    return points, remission / np.float32(full), None


def open_source(
  name: str,
  *,
  split: str = "",
  data_dir: str | None = None,
  columns: int | None = None,
  full_remission: float | None = None,
  points: int | None = None,
  cache: int = 0,
) -> Folder:
  """Opens a scan, or a folder of scans, sorted by their paths.

  Args:
    name: The file or the folder; `~` is expanded.
    split: Not used: all scans are taken.
    data_dir: What a relative `name` starts from.
    columns: Values per point of `.bin` files; see `scan_files.read`.
    full_remission: What the files' remissions are divided by, so that they are
      in 0..1 as in KITTI. By default 1, or for scans with larger values 255,
      or 65535.
    points: P of the examples; of larger scans a random part is taken, always
      the same. By default all of the largest scan find room.
    cache: Bytes of memory for examples once read; 0 reads anew each time.

  Returns:
    A source whose labels are all 0; classes and colours are SemanticKITTI's.

  Raises:
    InputError: There is no such file or folder, or it holds no scans.
  """
  del split
  if full_remission is not None and not 0 < full_remission < np.inf:
    raise InputError(f"full_remission must be above 0, got {full_remission}.")
  if not name:
    raise InputError("scans needs a path: scans:/path/to/scan.bin.")
  place = pathlib.Path(data_dir or "").expanduser()
  place = place / pathlib.Path(name).expanduser()
  if not place.exists():
    raise InputError(f"There is no file or folder {place}.")
  if place.is_dir():
    root, files = place, _files(place)
  else:
    root, files = place.parent, [place]
  if points is None:
    counts = [_count(file, columns) for file in files]
    points = lidar_examples.round_up(max(counts))
  return Folder(
    root,
    files,
    points=points,
    columns=columns,
    full_remission=full_remission,
    cache=cache,
  )


def _names(
  root: pathlib.Path, files: Sequence[pathlib.Path]
) -> tuple[str, ...]:
  """Paths below the root without endings, where that tells them apart."""
  whole = [file.relative_to(root) for file in files]
  short = [path.with_suffix("").as_posix() for path in whole]
  often = collections.Counter(short)
  return tuple(
    name if often[name] == 1 else path.as_posix()
    for name, path in zip(short, whole, strict=True)
  )


def _count(file: pathlib.Path, columns: int | None) -> int:
  """Points of a scan; of `.bin` files by their size, as folders are large."""
  if file.suffix.lower() == ".bin" and file.is_file():
    width = columns or scan_files.bin_columns(file)
    size = file.stat().st_size
    if size and width >= 4 and size % (4 * width) == 0:
      return size // (4 * width)
  elif file.suffix.lower() != ".bin":
    columns = None
  return len(lidar_examples.read_scan(file, columns=columns)[0])


def _files(root: pathlib.Path) -> list[pathlib.Path]:
  found, others = [], 0

  def refuse(error: OSError) -> None:
    raise InputError(f"{error.filename}: {error.strerror}.") from error

  for parent, below, names in os.walk(root, onerror=refuse):
    below[:] = [folder for folder in below if folder[0] != "."]
    for file in names:
      if file[0] == ".":
        continue
      if file.lower().endswith(scan_files.EXTENSIONS):
        found.append(pathlib.Path(parent, file))
      else:
        others += 1
  if not found:
    raise InputError(
      f"{root} holds no scans ({' '.join(scan_files.EXTENSIONS)})."
    )
  if others:
    logging.info("%s: %d files are no scans.", root, others)
  return sorted(found)


def _full_remission(remission: np.ndarray) -> float:
  largest = np.max(remission, where=np.isfinite(remission), initial=0)
  return 1.0 if largest <= 1 else 255.0 if largest <= 255 else 65535.0
