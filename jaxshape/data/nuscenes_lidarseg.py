"""nuScenes-lidarseg: key frames of a 32-beam LiDAR with a label per point.

The official layout, with the lidarseg package unpacked over the data set:

  <root>/v1.0-<name>/{scene,sample,sample_data,lidarseg,category}.json
  <root>/samples/LIDAR_TOP/*.pcd.bin
  <root>/lidarseg/v1.0-<name>/<token>_lidarseg.bin     one uint8 per point

The 32 categories are mapped by name to the 16 classes of the challenge, and 0
for what does not count. Remissions, 0..255 in the files, are divided by 255.

Reference:
  Caesar et al., "nuScenes: A Multimodal Dataset for Autonomous Driving", CVPR
  2020; Fong et al., "Panoptic nuScenes", RA-L 2022 (the lidarseg labels).
"""

from collections.abc import Iterator, Mapping, Sequence
import json
import pathlib
import re
from typing import Any

import numpy as np

from jaxshape.data import lidar_examples, scan_files, semantic_kitti
from jaxshape.errors import InputError

# Class of the challenge, colour of its first category, and its categories.
_TABLE = """
barrier 708090 movable_object.barrier
bicycle dc143c vehicle.bicycle
bus ff7f50 vehicle.bus.bendy vehicle.bus.rigid
car ff9e00 vehicle.car
construction_vehicle e99646 vehicle.construction
motorcycle ff3d63 vehicle.motorcycle
pedestrian 0000e6 human.pedestrian.adult human.pedestrian.child \
human.pedestrian.construction_worker human.pedestrian.police_officer
traffic_cone 2f4f4f movable_object.trafficcone
trailer ff8c00 vehicle.trailer
truck ff6347 vehicle.truck
driveable_surface 00cfbf flat.driveable_surface
other_flat af004b flat.other
sidewalk 4b004b flat.sidewalk
terrain 70b43c flat.terrain
manmade deb887 static.manmade
vegetation 00af00 static.vegetation
"""
# Categories that do not count.
_VOID = (
  "animal", "human.pedestrian.personal_mobility", "human.pedestrian.stroller",
  "human.pedestrian.wheelchair", "movable_object.debris",
  "movable_object.pushable_pullable", "static_object.bicycle_rack",
  "vehicle.emergency.ambulance", "vehicle.emergency.police", "noise",
  "static.other", "vehicle.ego",
)  # fmt: skip
# Scenes of the official validation split; first and last of each run.
_VAL = """
3 12-18 35-36 38-39 92-110 221 268-278 329-332 344-346 519-524 552-565 625-627
629-630 632-638 770-771 775 777-778 780-784 794-800 802 904-917 919-931 962-963
966-969 971-972 1059-1073
"""
_MINI_VAL = "103 916"
# Split: folder of tables, scenes, and whether these or all others.
_SPLITS = {
  "train": ("v1.0-trainval", _VAL, False),
  "val": ("v1.0-trainval", _VAL, True),
  "test": ("v1.0-test", "", False),
  "mini_train": ("v1.0-mini", _MINI_VAL, False),
  "mini_val": ("v1.0-mini", _MINI_VAL, True),
}
SPLITS = tuple(_SPLITS)
CLASSES = ("unlabeled", *(line.split()[0] for line in _TABLE.split("\n")[1:-1]))
# Tables are read piece by piece: the largest has more than a gigabyte.
_PIECE = 2**22


class NuscenesLidarseg(lidar_examples.Scans):
  """Labelled key frames, read when asked for.

  Attributes:
    root: The folder that holds `samples` and `lidarseg`.
    files: Of each example the scan and the labels ("" if there are none),
      below `root`.
    labelled: Whether there are labels.
  """

  def __init__(
    self,
    root: pathlib.Path,
    files: Sequence[tuple[str, str, str]],
    to_train: np.ndarray,
    *,
    labelled: bool,
    points: int,
    cache: int,
  ):
    known = builtin_labels()
    super().__init__(
      classes=known.classes,
      colors=known.colors,
      frequencies=known.frequencies,
      scans=tuple(name for name, _, _ in files),
      points=points,
      cache=cache,
    )
    self.root, self.labelled = root, labelled
    self.files = tuple((scan, label) for _, scan, label in files)
    self._to_train = to_train

  def _read(self, i: int) -> lidar_examples.Labelled:
    scan, label = self.files[i]
    path = self.root / scan
    points, remission = lidar_examples.read_scan(path, columns=5)
    remission = remission / np.float32(255)
    if not label:
      return points, remission, None
    path = self.root / label
    raw = np.frombuffer(scan_files.read_bytes(path), np.uint8)
    if len(raw) != len(points):
      raise InputError(
        f"{path} has {len(raw)} labels, but its scan has {len(points)} points."
      )
    ids = self._to_train[raw]
    if ids.min() < 0:
      unknown, counts = np.unique(raw[ids < 0], return_counts=True)
      raise InputError(
        f"{path} has labels that category.json does not know: "
        + ", ".join(
          f"{u} ({n} points)" for u, n in zip(unknown[:8], counts, strict=False)
        )
      )
    return points, remission, ids


def builtin_labels() -> semantic_kitti.Labels:
  """The labels of the challenge: 16 classes, and 0 for what does not count.

  Returns:
    The table; raw ids are the challenge's own, the same as train ids. (The
    values of the label files are categories, which `category.json` numbers.)
  """
  count = len(CLASSES)
  to_train = np.full(2**16, -1, np.int32)
  to_train[:count] = np.arange(count)
  colors = ["000000", *(line.split()[1] for line in _lines())]
  return semantic_kitti.Labels(
    classes=CLASSES,
    colors=np.array([tuple(bytes.fromhex(c)) for c in colors], np.uint8),
    frequencies=None,
    to_train=to_train,
    to_raw=np.arange(count, dtype=np.int32),
    ignore=(0,),
    splits={},
  )


def open_source(
  name: str = "",
  *,
  split: str,
  data_dir: str | None = None,
  labelled: bool | None = None,
  points: int | None = None,
  cache: int = 0,
) -> NuscenesLidarseg:
  """Opens a split of nuScenes-lidarseg.

  Args:
    name: The root folder; `~` is expanded.
    split: One of `SPLITS`.
    data_dir: What a relative `name` starts from.
    labelled: Whether to read labels; by default in all splits but "test".
    points: P of the examples; of larger scans a random part is taken, always
      the same. By default all of the largest scan find room.
    cache: Bytes of memory for examples once read; 0 reads anew each time.

  Returns:
    A source, in the order of scenes and time; safe to share between threads
    and processes.

  Raises:
    InputError: Something is missing or does not fit; the message names it.
  """
  if split not in _SPLITS:
    raise InputError(
      f"nuscenes_lidarseg has no split {split!r}; it has {', '.join(SPLITS)}."
    )
  if not name and data_dir is None:
    raise InputError("nuscenes_lidarseg needs a path to its folder.")
  root = (
    pathlib.Path(data_dir or "").expanduser() / pathlib.Path(name).expanduser()
  )
  version, listed, inside = _SPLITS[split]
  tables = root / version
  if not tables.is_dir():
    raise InputError(
      f"There is no folder {tables}; wanted the tables of the split {split!r}."
    )
  labelled = split != "test" if labelled is None else labelled
  numbers = _numbers(listed)
  scenes = {
    row["token"]: row["name"]
    for row in _rows(tables / "scene.json", ("token", "name"))
    if (_number(row["name"]) in numbers) == inside
  }
  samples = {
    row["token"]: (scenes[row["scene_token"]], row["timestamp"])
    for row in _rows(
      tables / "sample.json", ("token", "scene_token", "timestamp")
    )
    if row["scene_token"] in scenes
  }
  frames = {
    row["token"]: (*samples[row["sample_token"]], row["filename"])
    for row in _rows(
      tables / "sample_data.json", ("token", "sample_token", "filename")
    )
    if row["filename"].startswith("samples/LIDAR_TOP/")
    and row["sample_token"] in samples
  }
  if not frames:
    raise InputError(
      f"{tables} has no LIDAR_TOP key frames of the split {split!r}."
    )
  labels: dict[str, str] = {}
  to_train = np.full(256, -1, np.int32)
  if labelled:
    to_train = _categories(tables / "category.json")
    labels = {
      row["sample_data_token"]: row["filename"]
      for row in _rows(
        tables / "lidarseg.json", ("sample_data_token", "filename")
      )
    }
  ordered = sorted(frames, key=lambda token: frames[token])
  files = [
    (token, frames[token][2], labels.get(token, "")) for token in ordered
  ]
  points_of = [_count(root, file, labelled) for file in files]
  return NuscenesLidarseg(
    root,
    files,
    to_train,
    labelled=labelled,
    points=lidar_examples.round_up(max(points_of))
    if points is None
    else points,
    cache=cache,
  )


def _lines() -> list[str]:
  return [line for line in _TABLE.split("\n") if line]


def _number(scene: str) -> int:
  match = re.fullmatch(r"scene-(\d+)", scene)
  return int(match[1]) if match else -1


def _numbers(text: str) -> set[int]:
  found = set()
  for run in text.split():
    first, _, last = run.partition("-")
    found |= set(range(int(first), int(last or first) + 1))
  return found


def _categories(path: pathlib.Path) -> np.ndarray:
  """Train id of each value of a label file, -1 where there is no category."""
  known = dict.fromkeys(_VOID, 0)
  for train, line in enumerate(_lines(), 1):
    known |= dict.fromkeys(line.split()[2:], train)
  table = np.full(256, -1, np.int32)
  for row in _rows(path, ("name", "index")):
    name, index = row["name"], row["index"]
    if name not in known or type(index) is not int or not 0 <= index < 256:
      raise InputError(
        f"{path} has the category {name!r} of index {index!r}, which is none "
        "of nuScenes-lidarseg."
      )
    table[index] = known[name]
  return table


def _count(
  root: pathlib.Path, file: tuple[str, str, str], labelled: bool
) -> int:
  """Points of a scan by its size; its labels must be there and as many."""
  token, scan, label = file
  path = root / scan
  if labelled and not label:
    raise InputError(f"{path} (token {token}) is not in lidarseg.json.")
  for part in (scan, label):
    if pathlib.PurePosixPath(part).is_absolute() or ".." in part.split("/"):
      raise InputError(f"{part!r} of the tables is no path below {root}.")
  if not path.is_file():
    raise InputError(f"There is no file {path}, which the tables name.")
  size = path.stat().st_size
  if size % 20 or not size:
    return len(lidar_examples.read_scan(path, columns=5)[0])
  if label:
    place = root / label
    if not place.is_file():
      raise InputError(f"There is no file {place}, the labels of {scan}.")
    if place.stat().st_size != size // 20:
      raise InputError(
        f"{place} has {place.stat().st_size} labels, but its scan has "
        f"{size // 20} points."
      )
  return size // 20


def _rows(
  path: pathlib.Path, keys: Sequence[str]
) -> Iterator[Mapping[str, Any]]:
  """The records of a table, of which only one piece is held at a time."""
  rest, count = "", 0
  try:
    with path.open(encoding="utf-8") as file:
      while piece := file.read(_PIECE):
        rest += piece
        # Records hold no others, and no text of theirs a brace.
        *records, rest = rest.split("}")
        for record in records:
          row = json.loads(record[record.index("{") :] + "}")
          if missing := [key for key in keys if key not in row]:
            raise InputError(f"{path}: a record lacks {', '.join(missing)}.")
          count += 1
          yield row
  except OSError as error:
    raise InputError(f"{path} cannot be read: {error.strerror}.") from error
  except InputError:
    raise
  except ValueError as error:
    raise InputError(
      f"{path} is no table of records: {error} (record {count})."
    ) from error
  if rest.split() not in (["]"], ["[]"]):
    raise InputError(
      f"{path} ends within record {count}; wanted ']'. Is it cut off?"
    )
