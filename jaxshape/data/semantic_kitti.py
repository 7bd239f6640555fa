"""SemanticKITTI: driving scans with a label for every point, and its format.

The official layout, with what the archives unpack to, or anybody's own data in
the same form:

  <root>/sequences/NN/velodyne/NNNNNN.bin       (or <root>/dataset/sequences)
  <root>/sequences/NN/labels/NNNNNN.label       not in the test sequences
  <root>/semantic-kitti.yaml                    if there is one
  <root>/sequences/NN/predictions/NNNNNN.label  what `write_predictions` writes

Raw labels are the data set's own ids (10 car, 252 moving car, ...). Networks
know train ids, 0..K-1 with 0 for unlabeled, to which a table maps them: the
yaml's, or the one below if there is none.

Reference:
  Behley et al., "SemanticKITTI: A Dataset for Semantic Scene Understanding of
  LiDAR Sequences", ICCV 2019.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import difflib
import os
import pathlib
import re
import reprlib
from typing import Any

import numpy as np
import yaml

from jaxshape.data import lidar_examples, scan_files
from jaxshape.errors import InputError

SPLITS = ("train", "valid", "test")
YAML = "semantic-kitti.yaml"
_ALIASES = {"val": "valid", "validation": "valid"}
# Of the data set: raw id, name, train id, percentage of all points, RGB.
_TABLE = """
0 unlabeled 0 1.88898546 000000
1 outlier 0 0.0293719734 ff0000
10 car 1 4.08185193 6496f5
11 bicycle 2 0.0166095387 64e6f5
13 bus 5 0.00278796937 6450fa
15 motorcycle 3 0.0398386160 1e3c96
16 on-rails 5 0 0000ff
18 truck 4 0.206336121 501eb4
20 other-vehicle 5 0.162181973 0000ff
30 person 6 0.0176985513 ff1e1e
31 bicyclist 7 1.10659039e-06 ff28c8
32 motorcyclist 8 5.53295195e-07 961e5a
40 road 9 19.8749387 ff00ff
44 parking 10 1.47171695 ff96ff
48 sidewalk 11 14.3922984 4b004b
49 other-ground 12 0.390485530 af004b
50 building 13 13.2686194 ffc800
51 fence 14 7.23592229 ff7832
52 other-structure 0 0.239513148 ff9600
60 lane-marking 9 0.00470841443 96ffaa
70 vegetation 15 26.6815021 00af00
71 trunk 16 0.603501201 873c00
72 terrain 17 7.81422201 96f050
80 pole 18 0.285549819 fff096
81 traffic-sign 19 0.0615595809 ff0000
99 other-object 0 0.992312758 32ffff
252 moving-car 1 0.178930942 6496f5
253 moving-bicyclist 7 0.0127099993 ff28c8
254 moving-person 6 0.0160597761 ff1e1e
255 moving-motorcyclist 8 0.00374555310 961e5a
256 moving-on-rails 5 0 0000ff
257 moving-bus 5 0.0113515745 6450fa
258 moving-truck 4 0.0101578614 501eb4
259 moving-other-vehicle 5 0.00438401320 0000ff
"""
# Train id -> the raw id that stands for it.
_INVERSE = (
  0, 10, 11, 15, 18, 20, 30, 31, 32, 40, 44, 48, 49, 50, 51, 70, 71, 72, 80, 81
)  # fmt: skip
_SEQUENCES = {
  "train": (*range(8), 9, 10), "valid": (8,), "test": tuple(range(11, 22))
}  # fmt: skip
_RAW = 2**16


@dataclasses.dataclass(frozen=True)
class Labels:
  """What the raw labels of a data set mean.

  Attributes:
    classes: Names of the train ids; the first is "unlabeled".
    colors: uint8 [K, 3], RGB, one for each train id.
    frequencies: float64 [K], the share of all points, or None if not known.
    to_train: int32 [65536], raw id -> train id, -1 if there is no such raw id.
    to_raw: int32 [K], train id -> raw id.
    ignore: Train ids that do not count.
    splits: Numbers of the sequences of each split; may be empty.
  """

  classes: tuple[str, ...]
  colors: np.ndarray
  frequencies: np.ndarray | None
  to_train: np.ndarray
  to_raw: np.ndarray
  ignore: tuple[int, ...]
  splits: Mapping[str, tuple[int, ...]]

  def train_ids(self, raw: np.ndarray, *, name: str) -> np.ndarray:
    """Maps raw labels to train ids.

    Args:
      raw: Raw labels, 0..65535, [N].
      name: The file, for the error.

    Returns:
      Train ids, int32 [N].

    Raises:
      InputError: The data set has no such label.
    """
    ids = self.to_train[raw]
    if ids.size and ids.min() < 0:
      unknown, counts = np.unique(raw[ids < 0], return_counts=True)
      some = ", ".join(
        f"{u} ({n} points)" for u, n in zip(unknown[:8], counts, strict=False)
      )
      raise InputError(
        f"{name} has labels that the table of labels does not know: {some}; "
        f"it knows {', '.join(map(str, np.flatnonzero(self.to_train >= 0)))}."
      )
    return ids

  def raw_labels(self, train_ids: np.ndarray) -> np.ndarray:
    """Maps train ids to the raw labels that the benchmark wants.

    Args:
      train_ids: Integers, 0..K-1.

    Returns:
      Raw labels, int32, of the same shape.
    """
    ids = np.asarray(train_ids)
    if ids.size and not 0 <= ids.min() <= ids.max() < len(self.to_raw):
      raise ValueError(
        f"train_ids must be in 0..{len(self.to_raw) - 1}, "
        f"got {ids.min()}..{ids.max()}."
      )
    return self.to_raw[ids]


def builtin_yaml() -> dict[str, Any]:
  """The facts of SemanticKITTI's own yaml, under the same keys.

  Returns:
    What `yaml.safe_dump` can write for other programs of the data set.
  """
  rows = [line.split() for line in _TABLE.split("\n") if line]
  raw = [int(row[0]) for row in rows]
  colors = [list(bytes.fromhex(row[4]))[::-1] for row in rows]
  return {
    "labels": dict(zip(raw, (row[1] for row in rows), strict=True)),
    "color_map": dict(zip(raw, colors, strict=True)),
    "content": {int(row[0]): float(row[3]) / 100 for row in rows},
    "learning_map": {int(row[0]): int(row[2]) for row in rows},
    "learning_map_inv": dict(enumerate(_INVERSE)),
    "learning_ignore": {train: train == 0 for train in range(len(_INVERSE))},
    "split": {name: list(numbers) for name, numbers in _SEQUENCES.items()},
  }


def builtin_labels() -> Labels:
  """The labels of SemanticKITTI itself, with 20 train ids.

  Returns:
    The table, as the data set's yaml has it.
  """
  return _from_yaml(builtin_yaml(), pathlib.Path(YAML))


def read_yaml(path: str | os.PathLike[str]) -> Labels:
  """Reads a data set's `semantic-kitti.yaml`, or one of the same form.

  Args:
    path: The file; `labels`, `learning_map` and `learning_map_inv` must be
      there, `color_map` (blue, green, red), `content`, `learning_ignore` and
      `split` may.

  Returns:
    What it says.

  Raises:
    InputError: It is no yaml, asks for more than plain values, or lacks
      something.
  """
  path = pathlib.Path(path)
  data = scan_files.read_bytes(path)
  if len(data) > 2**17:
    raise InputError(f"{path} has {len(data)} bytes; wanted a table of labels.")
  try:
    # Safe: nothing but numbers, texts, lists and mappings is ever made.
    content = yaml.safe_load(data)
  except (yaml.YAMLError, ValueError, RecursionError) as error:
    raise InputError(
      f"{path} is no yaml of plain values: {' '.join(str(error).split())}"
    ) from error
  if not isinstance(content, dict):
    raise InputError(
      f"{path} holds {type(content).__name__}; wanted labels, learning_map and "
      "learning_map_inv."
    )
  return _from_yaml(content, path)


def _from_yaml(content: Mapping[str, Any], path: pathlib.Path) -> Labels:
  names = _entries(content, path, "labels", str)
  to_train_of = _entries(content, path, "learning_map", int)
  to_raw_of = _entries(content, path, "learning_map_inv", int)
  colors = _entries(content, path, "color_map", list, needed=False)
  shares = _entries(content, path, "content", float, needed=False)
  ignored = _entries(content, path, "learning_ignore", bool, needed=False)
  k = len(to_raw_of)
  if sorted(to_raw_of) != list(range(k)) or k < 2:
    raise InputError(
      f"{path}: learning_map_inv has the train ids {sorted(to_raw_of)}; wanted "
      "0, 1, 2, ..., of which 0 is unlabeled."
    )
  wrong = {r: t for r, t in to_train_of.items() if not 0 <= t < k}
  if wrong or not all(0 <= r < _RAW for r in to_train_of):
    raise InputError(
      f"{path}: learning_map must map ids of 0..65535 to 0..{k - 1}, got "
      f"{wrong or sorted(to_train_of)}."
    )
  for train, raw in sorted(to_raw_of.items()):
    if to_train_of.get(raw) != train or raw not in names:
      raise InputError(
        f"{path}: learning_map_inv maps {train} to {raw}, which learning_map "
        f"maps to {to_train_of.get(raw)} and labels calls {names.get(raw)!r}."
      )
  to_train = np.full(_RAW, -1, np.int32)
  to_train[list(to_train_of)] = list(to_train_of.values())
  raw_ids = [to_raw_of[t] for t in range(k)]
  return Labels(
    classes=("unlabeled", *(names[r] for r in raw_ids[1:])),
    colors=_colors(colors, raw_ids, path),
    frequencies=_frequencies(shares, to_train_of, k, path),
    to_train=to_train,
    to_raw=np.array(raw_ids, np.int32),
    ignore=tuple(sorted({0} | {t for t, i in ignored.items() if i and t < k})),
    splits=_splits(content.get("split", {}), path),
  )


def _entries(
  content: Mapping[str, Any],
  path: pathlib.Path,
  key: str,
  kind: type,
  *,
  needed: bool = True,
) -> dict[int, Any]:
  """A mapping of the yaml from ids to values of one kind."""
  if key not in content and not needed:
    return {}
  if key not in content:
    near = difflib.get_close_matches(key, map(str, content), n=1)
    raise InputError(
      f"{path} has no {key!r}"
      + (f" (is {near[0]} meant?)" if near else "")
      + "; wanted labels, learning_map and learning_map_inv."
    )
  table = content[key]
  accepted = (int, float) if kind is float else kind
  fits = isinstance(table, dict) and all(
    type(i) is int
    and isinstance(value, accepted)
    and (kind is bool or not isinstance(value, bool))
    for i, value in table.items()
  )
  if not fits:
    raise InputError(f"{path}: {key} must map ids to {kind.__name__} values.")
  return table


def _colors(
  colors: Mapping[int, Any], raw_ids: Sequence[int], path: pathlib.Path
) -> np.ndarray:
  # Colours of the golden angle apart, for tables that have none.
  table = np.empty((len(raw_ids), 3), np.uint8)
  for train, raw in enumerate(raw_ids):
    hue = 2 * np.pi * (0.618 * train + np.arange(3) / 3)
    table[train] = 0 if train == 0 else np.rint(140 + 110 * np.cos(hue))
    if raw not in colors:
      continue
    bgr = colors[raw]
    if len(bgr) != 3 or not all(type(v) is int and 0 <= v <= 255 for v in bgr):
      raise InputError(
        f"{path}: color_map of {raw} must be three integers in 0..255 (blue, "
        f"green, red), got {reprlib.repr(bgr)}."
      )
    table[train] = bgr[::-1]
  return table


def _frequencies(
  shares: Mapping[int, float],
  to_train: Mapping[int, int],
  count: int,
  path: pathlib.Path,
) -> np.ndarray | None:
  if not shares:
    return None
  table = np.zeros(count)
  for raw, share in shares.items():
    if raw not in to_train or not 0 <= share <= 1:
      raise InputError(
        f"{path}: content must hold shares in 0..1 of ids of learning_map, got "
        f"{raw}: {share}."
      )
    table[to_train[raw]] += share
  return table


def _splits(splits: Any, path: pathlib.Path) -> dict[str, tuple[int, ...]]:
  fits = isinstance(splits, dict) and all(
    isinstance(numbers, list)
    and all(type(n) is int and n >= 0 for n in numbers)
    for numbers in splits.values()
  )
  if not fits:
    raise InputError(f"{path}: split must map names to lists of sequences.")
  return {
    _ALIASES.get(str(name), str(name)): tuple(numbers)
    for name, numbers in splits.items()
  }


class SemanticKitti(lidar_examples.Scans):
  """Labelled scans in SemanticKITTI's layout, read when asked for.

  Attributes:
    labels: What the raw labels mean.
    root: The folder that holds `sequences`.
    labelled: Whether there are labels.
  """

  def __init__(
    self,
    root: pathlib.Path,
    scans: Sequence[str],
    labels: Labels,
    *,
    labelled: bool,
    points: int,
    cache: int,
  ):
    super().__init__(
      classes=labels.classes,
      colors=labels.colors,
      frequencies=labels.frequencies,
      ignore=labels.ignore,
      scans=tuple(scans),
      points=points,
      cache=cache,
    )
    self.root, self.labels, self.labelled = root, labels, labelled

  def _read(self, i: int) -> lidar_examples.Labelled:
    sequence, frame = self.scans[i].split("/")
    folder = self.root / "sequences" / sequence
    scan = folder / "velodyne" / f"{frame}.bin"
    points, remission = lidar_examples.read_scan(scan, columns=4)
    if not self.labelled:
      return points, remission, None
    path = folder / "labels" / f"{frame}.label"
    raw, _ = scan_files.read_labels(path, count=len(points))
    return points, remission, self.labels.train_ids(raw, name=str(path))


def open_source(
  name: str = "",
  *,
  split: str,
  data_dir: str | None = None,
  sequences: int | str | Sequence[int | str] | None = None,
  labels_yaml: str | None = None,
  labelled: bool | None = None,
  points: int | None = None,
  cache: int = 0,
) -> SemanticKitti:
  """Opens a split of SemanticKITTI, or of other data in its layout.

  Sizes of all files are looked at here, so that what is cut off or has no
  partner is said before anything runs; labels are checked as they are read.

  Args:
    name: The root folder; `~` is expanded.
    split: "train" (sequences 00-07, 09, 10), "valid" or "val" (08) or "test"
      (11-21, without labels), or what the yaml names.
    data_dir: What a relative `name` starts from.
    sequences: Numbers of sequences, instead of the split's: (0, 3) or ("00",).
    labels_yaml: A file in the form of `semantic-kitti.yaml`. By default that
      of the root folder, and if there is none the table of SemanticKITTI.
    labelled: Whether to read labels. By default where there are `labels`
      folders; "train" and "valid" must have them.
    points: P of the examples; of larger scans a random part is taken, always
      the same. By default all of the largest scan find room.
    cache: Bytes of memory for examples once read; 0 reads anew each time.

  Returns:
    A source; safe to share between threads and processes.

  Raises:
    InputError: Something is missing or does not fit; the message names it.
  """
  root = _root(name, data_dir)
  found = root / YAML
  if labels_yaml is not None:
    labels = read_yaml(pathlib.Path(labels_yaml).expanduser())
  else:
    labels = read_yaml(found) if found.is_file() else builtin_labels()
  split = _ALIASES.get(split, split)
  if sequences is None:
    if split not in labels.splits:
      raise InputError(
        f"{name} has no split {split!r}; there are "
        f"{', '.join(labels.splits) or 'none'} (--split, or the splits of the "
        "config), or give sequences."
      )
    wanted = [f"{number:02d}" for number in labels.splits[split]]
  else:
    if isinstance(sequences, int | str):
      sequences = [sequences]
    wanted = [_sequence(number) for number in sequences]
  folders = _sequences(root, wanted, split)
  try:
    if labelled is None:
      there = [(folder / "labels").is_dir() for folder in folders]
      labelled = split != "test" or all(there)
    scans, most = _scan(folders, labelled)
  except OSError as error:
    raise InputError(f"{error.filename}: {error.strerror}.") from error
  return SemanticKitti(
    root,
    scans,
    labels,
    labelled=labelled,
    points=lidar_examples.round_up(most) if points is None else points,
    cache=cache,
  )


def write_predictions(
  root: str | os.PathLike[str], scan: str, raw_labels: np.ndarray
) -> pathlib.Path:
  """Writes the labels of a scan where the benchmark expects them.

  Args:
    root: The folder that is handed in; it is made.
    scan: As in `source.scans`, such as "11/000000".
    raw_labels: One per point of the scan, in its order: raw ids, as
      `source.labels.raw_labels` gives them, not train ids.

  Returns:
    The file, `<root>/sequences/11/predictions/000000.label`.
  """
  match = re.fullmatch(r"(\w+)/(\w+)", scan)
  if match is None:
    raise ValueError(f"scan must be like '11/000000', got {scan!r}.")
  folder = pathlib.Path(root) / "sequences" / match[1] / "predictions"
  path = folder / f"{match[2]}.label"
  scan_files.write_labels(path, raw_labels)
  return path


def _root(name: str, data_dir: str | None) -> pathlib.Path:
  """The folder that holds `sequences`."""
  if not name and data_dir is None:
    raise InputError("semantic_kitti needs a path: semantic_kitti:/path/to/it.")
  root = (
    pathlib.Path(data_dir or "").expanduser() / pathlib.Path(name).expanduser()
  )
  try:
    if root.name == "sequences" and root.is_dir():
      return root.parent
    for place in (root, root / "dataset"):
      if (place / "sequences").is_dir():
        return place
    if not root.is_dir():
      raise InputError(f"There is no folder {root}.")
    there = sorted(entry.name for entry in os.scandir(root))
  except OSError as error:
    raise InputError(f"{root} cannot be read: {error.strerror}.") from error
  raise InputError(
    f"{root} has no folder 'sequences' (nor dataset/sequences); it has "
    f"{_some(there) or 'nothing'}. For scans alone write scans:{root}."
  )


def _sequence(number: int | str) -> str:
  text = str(number).rjust(2, "0")
  if re.fullmatch(r"\w+", text) is None:
    raise InputError(
      f"sequences must be numbers such as 8 or '08', got {number!r}."
    )
  return text


def _sequences(
  root: pathlib.Path, wanted: Sequence[str], split: str
) -> list[pathlib.Path]:
  folders = [root / "sequences" / sequence for sequence in wanted]
  missing = [f.name for f in folders if not (f / "velodyne").is_dir()]
  if missing or not folders:
    there = sorted(
      entry.name
      for entry in os.scandir(root / "sequences")
      if (pathlib.Path(entry.path) / "velodyne").is_dir()
    )
    raise InputError(
      f"{root / 'sequences'} lacks {_some([f'{m}/velodyne' for m in missing])} "
      f"of the split {split!r}; it has {_some(there) or 'no sequence'}. Name "
      "those to be read by the option sequences, such as "
      "--config.data.semantic_kitti.sequences=0,3, or by `split` in the yaml."
    )
  return folders


def _scan(
  folders: Sequence[pathlib.Path], labelled: bool
) -> tuple[list[str], int]:
  """Names of the scans, and how many points the largest has."""
  scans, most = [], 0
  for folder in folders:
    sizes = _sizes(folder / "velodyne", ".bin")
    if not sizes:
      raise InputError(f"{folder / 'velodyne'} has no .bin files.")
    for frame, size in sizes.items():
      if size % 16 or not size:
        # Also says whether it is no scan at all.
        scan_files.read(folder / "velodyne" / f"{frame}.bin", columns=4)
    if labelled:
      _check_partners(folder, sizes)
    scans += [f"{folder.name}/{frame}" for frame in sizes]
    most = max(most, *(size // 16 for size in sizes.values()))
  return scans, most


def _check_partners(folder: pathlib.Path, sizes: Mapping[str, int]) -> None:
  if not (folder / "labels").is_dir():
    raise InputError(
      f"{folder} has no folder 'labels'; for scans without labels set "
      "labelled=False."
    )
  labels = _sizes(folder / "labels", ".label")
  lacking = [f"{frame}.label" for frame in sizes if frame not in labels]
  if lacking:
    raise InputError(
      f"{folder / 'labels'} lacks the partners of scans: {_some(lacking)}."
    )
  lacking = [f"{frame}.bin" for frame in labels if frame not in sizes]
  if lacking:
    raise InputError(
      f"{folder / 'velodyne'} lacks the partners of labels: {_some(lacking)}."
    )
  for frame, size in sizes.items():
    if labels[frame] * 4 != size:
      # Either may be no such file at all.
      scan = folder / "velodyne" / f"{frame}.bin"
      path = folder / "labels" / f"{frame}.label"
      points, _ = lidar_examples.read_scan(scan, columns=4)
      scan_files.read_labels(path, count=len(points))


def _sizes(folder: pathlib.Path, suffix: str) -> dict[str, int]:
  """Bytes of each file with that suffix, by name without it, sorted."""
  with os.scandir(folder) as entries:
    sizes = {
      entry.name.removesuffix(suffix): entry.stat().st_size
      for entry in entries
      if entry.name.endswith(suffix) and entry.name[0] != "."
    }
  return dict(sorted(sizes.items()))


def _some(names: Sequence[str], count: int = 8) -> str:
  more = f", ... ({len(names)} in all)" if len(names) > count else ""
  return ", ".join(names[:count]) + more
