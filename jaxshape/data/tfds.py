"""Data sets that TensorFlow Datasets has prepared, read without TensorFlow.

Both file formats are read by record number, so that shuffling is exact:
array_record, whose records carry checksums, and TFRecord through an index of
the record lengths that is made when the source is opened. In TFRecord files the
checksums of the lengths are checked, those of the images are not.
"""

from collections.abc import Sequence
from concurrent import futures
import importlib.util
import json
import os
import pathlib
import re
import struct
import sys
from typing import Any, Protocol

from array_record.python import array_record_data_source
import numpy as np
import tensorflow_datasets

from jaxshape.data import decode
from jaxshape.errors import InputError

_VERSION = re.compile(r"\d+\.\d+\.\d+")
_FEATURES = "tensorflow_datasets.core.features."
_THREADS = 16
# A TFRecord is the length (8 bytes, little endian), its masked CRC-32C (4), the
# data, and their masked CRC-32C (4).
_HEAD, _TAIL = 12, 4
_CRC_MASK = 0xA282EAD8


class _Records(Protocol):
  def __len__(self) -> int: ...

  def __getitem__(self, i: int, /) -> bytes: ...


class Prepared(decode.Decoded):
  """One split of a prepared data set.

  Attributes:
    classes: Names of the labels, in order; empty if there are none.
    name: Data set, config, version and split, for messages.
  """

  def __init__(
    self,
    name: str,
    records: _Records,
    features: Any,
    *,
    shards: Sequence[Any],
    image_key: str,
    label_key: str | None,
    decoder: decode.Decoder,
    cache: int = 0,
  ):
    self.name = name
    names = getattr(features[label_key], "names", None) if label_key else None
    self.classes: tuple[str, ...] = tuple(names or ())
    self._records, self._features = records, features
    self._ends = np.cumsum([shard.take for shard in shards])
    self._files = [os.fspath(shard.filename) for shard in shards]
    self._image_key, self._label_key = image_key, label_key
    super().__init__(decoder, cache=cache)
    self._raw = {image_key: tensorflow_datasets.decode.SkipDecoding()}

  def __len__(self) -> int:
    return len(self._records)

  def _example(self, i: int, rng: np.random.Generator | None) -> decode.Example:
    if not 0 <= i < len(self):
      raise IndexError(f"example must be in 0..{len(self) - 1}, got {i}.")
    return self._cache.get(i, lambda: self._decode(i, rng))

  def _decode(self, i: int, rng: np.random.Generator | None) -> decode.Example:
    file = self._files[int(np.searchsorted(self._ends, i, side="right"))]
    name = f"{file}: example {i} of {self.name}"
    try:
      example = self._features.deserialize_example_np(
        self._records[i], decoders=self._raw
      )
    # The readers' errors have no type of their own.
    except Exception as error:
      raise decode.DamagedError(f"{name} is damaged: {_line(error)}") from error
    image = self._decoder(example[self._image_key], name=name, rng=rng)
    label = -1 if self._label_key is None else example[self._label_key]
    return {"image": image, "label": np.int32(label)}


class _TFRecords:
  """The records of TFRecord files by number.

  Args:
    shards: Files with the records to `skip`, to `take`, and `examples_in_shard`
      to compare with what is there.
  """

  def __init__(self, shards: Sequence[Any]):
    self._files = [os.fspath(shard.filename) for shard in shards]
    with futures.ThreadPoolExecutor(_THREADS) as pool:
      parts = list(pool.map(_index, shards))
    self._shard = np.repeat(
      np.arange(len(parts)), [len(part) for part in parts]
    )
    self._place = np.concatenate(parts)

  def __len__(self) -> int:
    return len(self._place)

  def __getitem__(self, i: int, /) -> bytes:
    start, length = map(int, self._place[i])
    file = os.open(self._files[self._shard[i]], os.O_RDONLY)
    try:
      return os.pread(file, length, start)
    finally:
      os.close(file)


def open_source(
  name: str,
  *,
  split: str,
  image_size: int,
  data_dir: str | None = None,
  image_key: str = "image",
  label_key: str | None = "label",
  resize_to: int | None = None,
  interpolation: str = "bilinear",
  crop: str = "center",
  scale: tuple[float, float] = (0.08, 1.0),
  ratio: tuple[float, float] = (3 / 4, 4 / 3),
  max_pixels: int = 50_000_000,
  cache: int = 0,
) -> Prepared:
  """Opens a split of a prepared data set.

  Args:
    name: Such as "imagenet2012", "name/config", "name/config:1.0.0"; without a
      version the newest one that is there.
    split: Such as "train" or "train[:80%]".
    image_size: See `decode.Decoder`, like all options not named here.
    data_dir: The folder that holds `name`; by default $TFDS_DATA_DIR or
      ~/tensorflow_datasets.
    image_key: Name of the image among the features.
    label_key: Name of the label; None if there is none (all labels -1).
    resize_to: By default `image_size` where all images are squares of one size,
      as these were cut already; otherwise see `decode.Decoder`.
    interpolation: See `decode.Decoder`.
    crop: See `decode.Decoder`.
    scale: See `decode.Decoder`.
    ratio: See `decode.Decoder`.
    max_pixels: See `decode.Decoder`.
    cache: Bytes of memory for decoded images; 0 decodes anew each time.

  Returns:
    A source of "image" and "label".

  Raises:
    InputError: Not prepared, no such split or feature, or damaged files.
  """
  folder = _find(name, data_dir)
  _check_features(folder / "features.json")
  try:
    builder = tensorflow_datasets.builder_from_directory(folder)
    features, splits = builder.info.features, builder.info.splits
  # Whatever TFDS trips over in files that somebody else has written.
  except Exception as error:
    raise InputError(f"{folder} cannot be opened: {_line(error)}") from error
  try:
    shards = splits[split].file_instructions
  except (KeyError, ValueError) as error:
    raise InputError(
      f"{folder} has no split {split!r}; there are: {', '.join(splits)}, "
      "and parts like 'train[:80%]'."
    ) from error
  if not shards:
    raise InputError(f"Split {split!r} of {folder} has no examples.")
  used = _choose(features, image_key, label_key, folder)
  shape = used[image_key].shape
  if resize_to is None and shape[0] and shape[0] == shape[1]:
    resize_to = image_size
  decoder = decode.Decoder(
    image_size=image_size,
    resize_to=resize_to,
    interpolation=interpolation,
    crop=crop,
    scale=scale,
    ratio=ratio,
    max_pixels=max_pixels,
  )
  return Prepared(
    f"{builder.info.full_name} {split}",
    _open_records(shards, builder.info.file_format),
    used,
    shards=shards,
    image_key=image_key,
    label_key=label_key,
    decoder=decoder,
    cache=cache,
  )


def _find(name: str, data_dir: str | None) -> pathlib.Path:
  """The folder <data_dir>/<name>/[<config>/]<version>."""
  given = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
  root = pathlib.Path(given).expanduser()
  if not name:
    raise InputError(
      f"tfds needs a name, such as tfds:imagenet2012; in {root} {_there(root)}."
    )
  base = root / name.replace(":", "/")
  if _is_prepared(base):
    return base
  versions = [
    p
    for p in _subfolders(base)
    if _VERSION.fullmatch(p.name) and _is_prepared(p)
  ]
  if versions:
    return max(versions, key=lambda p: [int(n) for n in p.name.split(".")])
  configs = [
    p.name for p in _subfolders(base) if any(map(_is_prepared, _subfolders(p)))
  ]
  if configs:
    raise InputError(
      f"{name} has configs: tfds:{name}/X with X one of {', '.join(configs)}."
    )
  full, _, version = name.partition(":")
  # Data sets of our own are known to TFDS once their module is imported.
  own = f"jaxshape.data.{full.split('/')[0]}_builder"
  is_own = full.split("/")[0].isidentifier() and importlib.util.find_spec(own)
  code = (
    f"import {own + ', ' if is_own else ''}tensorflow_datasets as t; "
    f"t.builder({name!r}, data_dir={os.fspath(root)!r}, "
    "file_format='array_record').download_and_prepare()"
  )
  raise InputError(
    f"{full}{' ' + version if version else ''} is not prepared in {root} "
    f"({_there(root)}). Give data_dir, or prepare it once: "
    f"pip install 'jaxshape[prepare]' && python -c \"{code}\""
  )


def _is_prepared(folder: pathlib.Path) -> bool:
  return (folder / "features.json").is_file()


def _subfolders(folder: pathlib.Path) -> list[pathlib.Path]:
  if not folder.is_dir():
    return []
  return sorted(p for p in folder.iterdir() if p.is_dir())


def _there(root: pathlib.Path) -> str:
  if not root.is_dir():
    return "nothing is there"
  names = [p.name for p in _subfolders(root) if p.name != "downloads"]
  return "there are: " + ", ".join(names) if names else "nothing is there"


def _check_features(path: pathlib.Path) -> None:
  """Refuses a file that would make TFDS import a module of its choice."""
  try:
    stack = [json.loads(path.read_text(encoding="utf-8"))]
  except (OSError, ValueError, RecursionError) as error:
    raise InputError(f"{path} is no JSON: {_line(error)}") from error
  while stack:
    node = stack.pop()
    if isinstance(node, list):
      stack += node
    elif isinstance(node, dict):
      stack += node.values()
      for key in ("json", "content"):  # JSON within JSON, which TFDS reads.
        if isinstance(inner := node.get(key), str):
          try:
            stack.append(json.loads(inner))
          except (ValueError, RecursionError) as error:
            raise InputError(
              f"{path} holds a {key!r} that is no JSON: {_line(error)}"
            ) from error
      for key in ("pythonClassName", "python_class_name", "type"):
        kind = node.get(key, "")
        # Loaded already, so that nothing at all gets imported.
        if (
          isinstance(kind, str)
          and kind
          and not (
            kind.startswith(_FEATURES)
            and kind.rpartition(".")[0] in sys.modules
          )
        ):
          raise InputError(
            f"{path} names {kind!r}, which is no feature of TFDS itself; "
            "reading it could run foreign code, so it is refused."
          )


def _choose(
  features: Any, image_key: str, label_key: str | None, folder: pathlib.Path
) -> Any:
  """The features that are needed; the others are not even parsed."""
  kinds = tensorflow_datasets.features
  if not isinstance(features, kinds.FeaturesDict):
    raise InputError(f"{folder} is no set of named features.")
  known: dict[str, Any] = dict(features.items())
  image = known.get(image_key)
  if not isinstance(image, kinds.Image) or image.np_dtype not in (
    np.uint8,
    np.uint16,
  ):
    raise InputError(
      f"image_key={image_key!r} is no 8- or 16-bit image of {folder}; "
      f"its features are: {', '.join(sorted(known))}."
    )
  if label_key is None:
    return kinds.FeaturesDict({image_key: image})
  label = known.get(label_key)
  if (
    label is None
    or label.shape
    or not np.issubdtype(label.np_dtype, np.integer)
  ):
    raise InputError(
      f"label_key={label_key!r} is no whole number of {folder}; "
      f"its features are: {', '.join(sorted(known))}; None means no labels."
    )
  return kinds.FeaturesDict({image_key: image, label_key: label})


def _open_records(shards: Sequence[Any], file_format: Any) -> _Records:
  for shard in shards:
    if not os.path.isfile(shard.filename):
      raise InputError(f"The data file {shard.filename} is missing.")
  if file_format.value == "array_record":
    return array_record_data_source.ArrayRecordDataSource(shards)
  if file_format.value == "tfrecord":
    return _TFRecords(shards)
  raise InputError(
    f"{shards[0].filename} is of format {file_format.value}; prepare the data "
    "set with file_format='array_record'."
  )


def _index(shard: Any) -> np.ndarray:
  """Start and length of the records of one file that are wanted."""
  path = os.fspath(shard.filename)
  places, heads, start = [], [], 0
  file = os.open(path, os.O_RDONLY)
  try:
    size = os.fstat(file).st_size
    while start < size:
      head = os.pread(file, _HEAD, start)
      length = size  # Too long, as the head itself is cut off.
      if len(head) == _HEAD:
        (length,) = struct.unpack_from("<Q", head)
      end = start + _HEAD + length + _TAIL
      if end > size:
        raise InputError(
          f"{path} is cut off or damaged at byte {start} of {size}, in record "
          f"{len(places)} of {shard.examples_in_shard}."
        )
      places.append((start + _HEAD, length))
      heads.append(head)
      start = end
  finally:
    os.close(file)
  if len(places) != shard.examples_in_shard:
    raise InputError(
      f"{path} has {len(places)} records, dataset_info.json says "
      f"{shard.examples_in_shard}."
    )
  heads = np.frombuffer(b"".join(heads), np.uint8).reshape(-1, _HEAD)
  stored = np.ascontiguousarray(heads[:, 8:]).view("<u4")[:, 0]
  wrong = np.flatnonzero(_masked_crc(heads[:, :8]) != stored)
  if wrong.size:
    raise InputError(
      f"{path} is damaged: wrong checksum of the length of record {wrong[0]}."
    )
  return np.asarray(places)[shard.skip : shard.skip + shard.take]


def _masked_crc(rows: np.ndarray) -> np.ndarray:
  """TFRecord's checksum of each row of bytes (CRC-32C, rotated, shifted)."""
  table = np.arange(256, dtype=np.uint32)
  for _ in range(8):
    table = (table >> 1) ^ np.where(table & 1, np.uint32(0x82F63B78), 0)
  crc = np.full(len(rows), 0xFFFFFFFF, np.uint32)
  for column in rows.T:
    crc = table[(crc ^ column) & 0xFF] ^ (crc >> 8)
  crc = ~crc
  return ((crc >> 15) | (crc << 17)) + np.uint32(_CRC_MASK)


def _line(error: Exception) -> str:
  return " ".join(str(error).split()) or type(error).__name__
