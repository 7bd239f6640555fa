"""What all LiDAR sources have in common: scans padded to examples of one shape.

An example holds "points", float32 [P, 3] in metres; "remission", float32 [P];
"valid", bool [P], False where there is padding; and "label", int32 [P], train
ids with 0 for unlabeled. Points come first, in the scan's order; padding is 0.
Points that are not finite are valid: there is one prediction for each of them.
"""

import abc
import itertools
import logging
import operator
import threading
from typing import Any

import numpy as np

from jaxshape.data import decode, scan_files
from jaxshape.errors import InputError

Example = dict[str, Any]  # Arrays and NumPy scalars.
Labelled = tuple[np.ndarray, np.ndarray, np.ndarray | None]


class Scans(abc.ABC):
  """Labelled scans by number: the base of the LiDAR sources.

  Attributes:
    classes: Names of the train ids; the first is "unlabeled".
    colors: uint8 [K, 3], RGB, one for each.
    frequencies: float [K], the share of points of each train id, or None.
    ignore: Train ids that do not count.
    scans: Name of each scan, in the order of the examples.
    points: P, how many points an example has, with padding.
  """

  def __init__(
    self,
    *,
    classes: tuple[str, ...],
    colors: np.ndarray,
    frequencies: np.ndarray | None,
    scans: tuple[str, ...],
    points: int,
    ignore: tuple[int, ...] = (0,),
    cache: int = 0,
  ):
    if points < 1:
      raise InputError(f"points must be at least 1, got {points}.")
    if cache < 0:
      raise InputError(f"cache must be 0 or more bytes, got {cache}.")
    self.classes, self.colors, self.frequencies = classes, colors, frequencies
    self.scans, self.points, self.ignore = scans, points, ignore
    self._kept_below = cache // (21 * points + 1024)
    self.__setstate__({})

  def __len__(self) -> int:
    return len(self.scans)

  def __getstate__(self) -> dict[str, Any]:
    lost = ("_kept", "_lock", "_warned")
    return {k: v for k, v in self.__dict__.items() if k not in lost}

  def __setstate__(self, state: dict[str, Any]) -> None:
    vars(self).update(state)
    self._kept: dict[int, Example] = {}
    self._lock, self._warned = threading.Lock(), set[str]()

  def __getitem__(self, i: int) -> Example:
    i = operator.index(i)
    if not 0 <= i < len(self):
      raise IndexError(f"example must be in 0..{len(self) - 1}, got {i}.")
    example = self._kept.get(i)
    if example is None:
      example = self._padded(i, *self._read(i))
      if i < self._kept_below:
        # Threads that read the same example at once store equal values.
        self._kept[i] = example
    return dict(example)

  @property
  def fingerprint(self) -> dict[str, dict[str, str]]:
    """How many scans each sequence has, and a digest of their names."""
    sequences = {}
    folder = lambda scan: scan.rpartition("/")[0]
    for name, group in itertools.groupby(self.scans, folder):
      scans = list(group)
      sequences[name] = f"{len(scans)} scans ({decode.digest(scans)})"
    return {"sequences": sequences}

  @abc.abstractmethod
  def _read(self, i: int) -> Labelled:
    """Points, remissions and train ids (None: all unlabeled) of a scan."""

  def _padded(
    self,
    i: int,
    points: np.ndarray,
    remission: np.ndarray,
    label: np.ndarray | None,
  ) -> Example:
    n = len(points)
    if n > self.points:
      self._warn_once(
        "cut",
        f"{self.scans[i]} has {n} points, more than points={self.points}; of "
        "such scans a random part is taken, always the same.",
      )
      draw = np.random.default_rng([n, i])
      some = np.sort(draw.permutation(n)[: self.points])
      points, remission, n = points[some], remission[some], self.points
      label = None if label is None else label[some]
    wrong = np.sum(~np.isfinite(points).all(axis=1) | ~np.isfinite(remission))
    if wrong:
      self._warn_once(
        "finite",
        f"{self.scans[i]}: {wrong} of {n} points are not finite; such points "
        "are kept, but no range image shows them.",
      )
    example = {
      "points": np.zeros((self.points, 3), np.float32),
      "remission": np.zeros(self.points, np.float32),
      "valid": np.arange(self.points) < n,
      "label": np.zeros(self.points, np.int32),
    }
    example["points"][:n] = points
    example["remission"][:n] = remission
    if label is not None:
      example["label"][:n] = label
    for array in example.values():
      array.setflags(write=False)  # All who ask may get these very arrays.
    return example

  def _warn_once(self, about: str, message: str) -> None:
    with self._lock:
      new = about not in self._warned
      self._warned.add(about)
    if new:
      logging.warning("%s", message)


def round_up(count: int) -> int:
  """A number of points for examples, so that few different ones are met.

  Args:
    count: Points of the largest scan, at least 1.

  Returns:
    The next multiple of a sixteenth of the next power of two.
  """
  step = max(1, 2 ** (count - 1).bit_length() // 16)
  return -(-count // step) * step


def read_scan(path: Any, *, columns: int | None = None) -> scan_files.Scan:
  """Reads a scan of a source, which itself says what is odd, once.

  Args:
    path: The file.
    columns: See `scan_files.read`.

  Returns:
    Points and remissions.
  """
  return scan_files.read(path, columns=columns, warn=False)
