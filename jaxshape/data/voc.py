"""PASCAL VOC: what is in a picture, and where, for twenty things.

`voc:<root>` reads the folders as they are published,

  <root>/VOCdevkit/VOC2007/JPEGImages/<id>.jpg
                           Annotations/<id>.xml
                           ImageSets/Main/<split>.txt           (classification)
                           ImageSets/Segmentation/<split>.txt   (segmentation)
                           SegmentationClass/<id>.png

and <root> may also be the devkit itself or the folder of the year. A label is 1
where a class has a thing in the picture, -1 where all its things are
"difficult", and 0 elsewhere. In a map of the classes 0 is the background and
255, `VOID`, where nobody decided.

`voc:generated` draws pictures of one or two things, so that everything runs
without the download; `write` writes them as folders of the same layout. It
knows the outlines of sixteen things, and for most of them that is a stand-in
(`STAND_INS`); the other four classes never occur.

The annotations may come from anywhere. They are read as UTF-8 text by the
standard library, and a file with a document type, without which XML can define
no entities, or of more than a megabyte is refused before it is parsed.

Reference:
  Everingham et al., "The PASCAL Visual Object Classes (VOC) Challenge", IJCV
  2010, Sec. 3 (classes, "difficult", the layout).
"""

import abc
from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import functools
import os
import pathlib
import re
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from jaxshape.data import decode, outlines, textures
from jaxshape.errors import InputError, few

CLASSES = (
  "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat",
  "chair", "cow", "diningtable", "dog", "horse", "motorbike", "person",
  "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
# What is drawn for a class; the first six are what they are called.
STAND_INS = {
  "aeroplane": "airplane",
  "bird": "bird",
  "boat": "boat",
  "bottle": "bottle",
  "car": "car",
  "chair": "chair",
  "bicycle": "umbrella",
  "cat": "rabbit",
  "dog": "fish",
  "motorbike": "hammer",
  "person": "hand",
  "pottedplant": "tree",
  "sheep": "mushroom",
  "sofa": "guitar",
  "train": "key",
  "tvmonitor": "cup",
}
TASKS = ("classification", "segmentation")
FITS = ("crop", "pad")
VOID = 255
# Of the generated pictures.
SIZES = {"train": 512, "val": 256, "trainval": 768, "test": 256}

_SETS = {"classification": "Main", "segmentation": "Segmentation"}
_ID = re.compile(r"[\w-][\w.-]*")
_LARGEST_XML = 2**20
# What is outside of a padded picture: the mean colour of ImageNet.
_OUTSIDE = (124, 116, 104)
_SMALLEST, _LARGEST = 32, 512


class Thing(NamedTuple):
  """One thing that is in a picture.

  Attributes:
    name: One of `CLASSES`.
    difficult: Whether it counts neither way.
    box: Left, top, right, bottom in pixels from 1, both ends included; not
      read from files.
  """

  name: str
  difficult: bool
  box: tuple[int, int, int, int] = (0, 0, 0, 0)


class _Voc(decode.Decoded):
  """Examples of one split, whichever way its pictures come about."""

  def __init__(
    self, decoder: decode.Decoder, *, task: str, fit: str, cache: int
  ):
    if fit == "pad":  # Of a square, so that all of it stays.
      decoder = dataclasses.replace(decoder, resize_to=decoder.image_size)
    super().__init__(decoder, cache=cache)
    self._maps = dataclasses.replace(decoder, interpolation="nearest")
    self._task, self._fit = task, fit
    named = task == "segmentation"
    self.classes: tuple[str, ...] = ("background",) * named + CLASSES

  @abc.abstractmethod
  def __len__(self) -> int: ...

  @abc.abstractmethod
  def _picture(self, i: int) -> tuple[Image.Image, str]:
    """The picture, perhaps not decoded yet, and its name."""

  @abc.abstractmethod
  def _map(self, i: int) -> tuple[np.ndarray, str]:
    """The class of each pixel, uint8 [height, width], and its name."""

  @abc.abstractmethod
  def _things(self, i: int) -> Sequence[Thing]: ...

  def _example(self, i: int, rng: np.random.Generator | None) -> decode.Example:
    if not 0 <= i < len(self):
      raise IndexError(f"example must be in 0..{len(self) - 1}, got {i}.")
    return self._cache.get(i, lambda: self._decode(i, rng))

  def _decode(self, i: int, rng: np.random.Generator | None) -> decode.Example:
    picture, name = self._picture(i)
    size = picture.size
    drawn = {} if rng is None else rng.bit_generator.state
    with picture:
      image = self._placed(self._decoder, picture, name, _OUTSIDE, rng)
    if self._task == "classification":
      return {"image": image, "labels": labels(self._things(i))}
    indices, where = self._map(i)
    if indices.shape[::-1] != size:
      raise decode.DamagedError(
        f"{where} is {indices.shape[1]} x {indices.shape[0]} pixels large, its "
        f"picture {name} is {size[0]} x {size[1]}."
      )
    if rng is not None:  # The same box again.
      rng.bit_generator.state = drawn
    grey = Image.fromarray(indices)
    found = self._placed(self._maps, grey, where, (VOID, VOID, VOID), rng)[
      ..., 0
    ]
    unknown = found[(found >= len(self.classes)) & (found != VOID)]
    if unknown.size:
      raise decode.DamagedError(
        f"{where} holds the class {unknown[0]}; known are "
        f"0..{len(self.classes) - 1} and {VOID}."
      )
    there = np.isin(np.arange(1, len(self.classes)), found)
    return {
      "image": image,
      "segmentation": found.astype(np.int32),
      "labels": there.astype(np.float32),
    }

  def _placed(
    self,
    decoder: decode.Decoder,
    picture: Image.Image,
    name: str,
    outside: tuple[int, int, int],
    rng: np.random.Generator | None,
  ) -> np.ndarray:
    side = max(picture.size)
    if self._fit == "crop" or side**2 > decoder.max_pixels:  # Too large.
      return decoder(picture, name=name, rng=rng)
    with _reading(name):
      square = Image.new("RGB", (side, side), outside)
      square.paste(picture.convert("RGB"), (0, 0))
    return decoder(square, name=name)


class Files(_Voc):
  """A split of the published folders.

  Attributes:
    classes: Names of the labels, or of the numbers in the maps.
    ids: Of the pictures, in the order of the split's file.
    root: The folder of the year.
  """

  def __init__(
    self,
    root: pathlib.Path,
    ids: Sequence[str],
    decoder: decode.Decoder,
    *,
    task: str,
    fit: str,
    cache: int,
  ):
    super().__init__(decoder, task=task, fit=fit, cache=cache)
    self.root, self.ids = root, tuple(ids)

  @property
  def fingerprint(self) -> dict[str, str]:
    """The task, and a digest of the names of the pictures."""
    return {"task": self._task, "ids": decode.digest(self.ids)}

  def __len__(self) -> int:
    return len(self.ids)

  def _picture(self, i: int) -> tuple[Image.Image, str]:
    path = self.root / "JPEGImages" / f"{self.ids[i]}.jpg"
    with _reading(str(path)):
      return Image.open(path, formats=("JPEG", "PNG")), str(path)

  def _map(self, i: int) -> tuple[np.ndarray, str]:
    path = self.root / "SegmentationClass" / f"{self.ids[i]}.png"
    with _reading(str(path)), Image.open(path, formats=("PNG",)) as picture:
      if picture.width * picture.height > self._decoder.max_pixels:
        raise decode.DamagedError(
          f"{path} has more than max_pixels={self._decoder.max_pixels} pixels."
        )
      if picture.mode not in ("P", "L"):
        raise decode.DamagedError(
          f"{path} is of mode {picture.mode}; a map of the classes has a "
          "palette (P) or is grey (L), or the numbers of the classes are lost."
        )
      return np.array(picture), str(path)

  def _things(self, i: int) -> Sequence[Thing]:
    return read_annotation(self.root / "Annotations" / f"{self.ids[i]}.xml")


class Generated(_Voc):
  """Pictures of one or two things, drawn when asked for.

  Attributes:
    classes: Names of the labels, or of the numbers in the maps.
  """

  def __init__(
    self,
    decoder: decode.Decoder,
    *,
    split: str,
    num_examples: int,
    seed: int,
    task: str,
    fit: str,
    cache: int,
  ):
    size = decoder.resize_to or decoder.image_size
    decoder = dataclasses.replace(decoder, resize_to=size)
    super().__init__(decoder, task=task, fit=fit, cache=cache)
    self._split, self._length, self._seed = split, num_examples, seed
    self._size = size

  @property
  def fingerprint(self) -> dict[str, Any]:
    """What the pictures are drawn from."""
    drawn = {"split": self._split, "size": self._size, "seed": self._seed}
    return {"task": self._task, "drawn": drawn}

  def __len__(self) -> int:
    return self._length

  def _picture(self, i: int) -> tuple[Image.Image, str]:
    picture, _, _ = self.draw(i)
    return Image.fromarray(picture), f"generated picture {i}"

  def _map(self, i: int) -> tuple[np.ndarray, str]:
    _, indices, _ = self.draw(i)
    return indices, f"generated map {i}"

  def _things(self, i: int) -> Sequence[Thing]:
    _, _, things = self.draw(i)
    return things

  def draw(self, i: int) -> tuple[np.ndarray, np.ndarray, list[Thing]]:
    """Draws one picture.

    Args:
      i: Its number.

    Returns:
      The picture, uint8 [size, size, 3]; its map, uint8 [size, size], in which
      the seam of each thing is void; and the things, the second of which may
      be difficult.
    """
    return _drawn(self._split, self._size, self._seed, i)


def open_source(
  name: str,
  *,
  split: str,
  image_size: int,
  data_dir: str | None = None,
  year: int = 2012,
  task: str = "classification",
  fit: str = "crop",
  num_examples: int | None = None,
  seed: int = 0,
  resize_to: int | None = None,
  interpolation: str = "bilinear",
  crop: str = "center",
  scale: tuple[float, float] = (0.08, 1.0),
  ratio: tuple[float, float] = (3 / 4, 4 / 3),
  max_pixels: int = 50_000_000,
  cache: int = 0,
) -> Files | Generated:
  """Opens a split.

  Args:
    name: The folder that holds VOCdevkit; or "generated".
    split: The name of a file in ImageSets: "train", "val", "trainval", "test".
    image_size: See `decode.Decoder`, like all options not named here.
    data_dir: What a relative `name` starts from.
    year: Of the challenge, whose folder is looked for.
    task: One of `TASKS`.
    fit: "crop" cuts the shape that all examples have out of each picture, as
      `crop` says; "pad" keeps the whole picture, in the upper left corner, and
      what is beside it is grey, and void in the map.
    num_examples: Of generated pictures; by default `SIZES`.
    seed: Of generated pictures, 0 or more.
    resize_to: See `decode.Decoder`; not used by "pad", and for generated
      pictures `image_size` by default.
    interpolation: See `decode.Decoder`; maps are never interpolated.
    crop: See `decode.Decoder`; a random box is the same for picture and map.
    scale: See `decode.Decoder`.
    ratio: See `decode.Decoder`.
    max_pixels: See `decode.Decoder`.
    cache: Bytes of memory for decoded examples; 0 decodes anew each time.

  Returns:
    A source of "image" and "labels", float32 [20], 1, 0 or -1; or of "image",
    "segmentation", int32 [image_size, image_size], and "labels" of the classes
    that are in the map.

  Raises:
    InputError: An option does not fit, there is no such folder or split, or
      files are missing.
  """
  for option, value, known in (("task", task, TASKS), ("fit", fit, FITS)):
    if value not in known:
      raise InputError(
        f"{option} of voc must be one of {', '.join(known)}, got {value!r}."
      )
  if fit == "pad" and crop != "center":
    raise InputError(f"fit='pad' of voc cuts nothing, got crop={crop!r}.")
  decoder = decode.Decoder(
    image_size=image_size,
    resize_to=resize_to,
    interpolation=interpolation,
    crop=crop,
    scale=scale,
    ratio=ratio,
    max_pixels=max_pixels,
  )
  if name == "generated":
    _check_generated(split, num_examples, seed, resize_to or image_size)
    return Generated(
      decoder,
      split=split,
      num_examples=SIZES[split] if num_examples is None else num_examples,
      seed=seed,
      task=task,
      fit=fit,
      cache=cache,
    )
  root = _root(name, data_dir, year)
  ids = _ids(root, split, task)
  return Files(root, ids, decoder, task=task, fit=fit, cache=cache)


def read_annotation(path: str | os.PathLike[str]) -> list[Thing]:
  """Reads which things a picture shows.

  Args:
    path: Of the XML file.

  Returns:
    The things in the order of the file, without their parts and boxes.

  Raises:
    InputError: The file is not there, too large, has a document type, is no
      XML, or names something else than one of `CLASSES`.
  """
  path = pathlib.Path(path)
  try:
    with path.open("rb") as file:
      data = file.read(_LARGEST_XML + 1)
  except OSError as error:
    raise InputError(f"{path} cannot be read: {error.strerror}.") from error
  if len(data) > _LARGEST_XML:
    raise InputError(
      f"{path} has more than {_LARGEST_XML} bytes; an annotation has some "
      "thousand."
    )
  try:
    text = data.decode("utf-8-sig")
    if "<!DOCTYPE" in text:
      raise InputError(
        f"{path} has a document type, which annotations have none of and which "
        "may hold anything; it is not read."
      )
    tree = ElementTree.fromstring(text)
  except (UnicodeDecodeError, ElementTree.ParseError, ValueError) as error:
    if isinstance(error, InputError):
      raise
    raise InputError(f"{path} is no XML in UTF-8: {error}.") from error
  if tree.tag != "annotation":
    raise InputError(f"{path} must begin with <annotation>, got <{tree.tag}>.")
  things = []
  for thing in tree.findall("object"):
    name = (thing.findtext("name") or "").strip()
    difficult = (thing.findtext("difficult") or "0").strip()
    if name not in CLASSES:
      raise InputError(
        f"{path} names {name!r}, which is none of the classes: "
        f"{', '.join(CLASSES)}."
      )
    if difficult not in ("0", "1"):
      raise InputError(
        f"{path}: <difficult> must be 0 or 1, got {difficult!r}."
      )
    things.append(Thing(name, difficult == "1"))
  return things


def labels(things: Sequence[Thing]) -> np.ndarray:
  """What the things of a picture say of it, class by class.

  Args:
    things: From `read_annotation`.

  Returns:
    float32 [20]: 1 where there is a thing of the class, -1 where there are
    only difficult ones, 0 elsewhere.
  """
  out = np.zeros(len(CLASSES), np.float32)
  for thing in things:
    place = CLASSES.index(thing.name)
    if not thing.difficult:
      out[place] = 1
    elif not out[place]:
      out[place] = -1
  return out


def palette() -> np.ndarray:
  """The colours in which the challenge paints its maps.

  The bits of a number, lowest first, are dealt to red, green and blue in turn,
  from the highest bit of each down.

  Returns:
    uint8 [256, 3].
  """
  numbers = np.arange(256)
  colors = np.zeros((256, 3), np.uint8)
  for bit in range(8):
    value = (numbers >> bit & 1) << (7 - bit // 3)
    colors[:, bit % 3] |= value.astype(np.uint8)
  return colors


def write(
  folder: str | os.PathLike[str],
  *,
  year: int = 2012,
  splits: Sequence[str] = ("train", "val"),
  num_examples: int = 32,
  image_size: int = 64,
  seed: int = 0,
) -> pathlib.Path:
  """Writes generated pictures as the folders of a published data set.

  Args:
    folder: Gets VOCdevkit; made if it is missing.
    year: Of the folder in it.
    splits: Of `SIZES`; each is one of classification and of segmentation.
    num_examples: Of each split.
    image_size: Pixels along each side.
    seed: As for `open_source`.

  Returns:
    The folder of the year. Pictures lose a little as JPEG, maps nothing.

  Raises:
    InputError: An option does not fit.
  """
  root = pathlib.Path(folder) / "VOCdevkit" / f"VOC{year}"
  below = ("JPEGImages", "Annotations", "SegmentationClass")
  sets = [f"ImageSets/{name}" for name in _SETS.values()]
  for name in (*below, *sets):
    (root / name).mkdir(parents=True, exist_ok=True)
  colors = palette().ravel().tolist()
  for split in splits:
    source = open_source(
      "generated",
      split=split,
      image_size=image_size,
      num_examples=num_examples,
      seed=seed,
    )
    assert isinstance(source, Generated)
    ids = [f"{year}_{split}_{i:06d}" for i in range(num_examples)]
    for i, name in enumerate(ids):
      picture, indices, things = source.draw(i)
      image = Image.fromarray(picture)
      image.save(root / below[0] / f"{name}.jpg", quality=95)
      found = Image.fromarray(indices)
      found.putpalette(colors)
      found.save(root / below[2] / f"{name}.png")
      text = _annotation(name, picture.shape, things)
      (root / below[1] / f"{name}.xml").write_text(text, encoding="utf-8")
    for name in sets:
      lines = "".join(f"{name}\n" for name in ids)
      (root / name / f"{split}.txt").write_text(lines, encoding="utf-8")
  return root


def _annotation(
  name: str, shape: Sequence[int], things: Sequence[Thing]
) -> str:
  root = ElementTree.Element("annotation")
  ElementTree.SubElement(root, "filename").text = f"{name}.jpg"
  size = ElementTree.SubElement(root, "size")
  for tag, value in zip(("height", "width", "depth"), shape, strict=True):
    ElementTree.SubElement(size, tag).text = str(value)
  for thing in things:
    node = ElementTree.SubElement(root, "object")
    ElementTree.SubElement(node, "name").text = thing.name
    ElementTree.SubElement(node, "difficult").text = str(int(thing.difficult))
    box = ElementTree.SubElement(node, "bndbox")
    for tag, value in zip(
      ("xmin", "ymin", "xmax", "ymax"), thing.box, strict=True
    ):
      ElementTree.SubElement(box, tag).text = str(value)
  ElementTree.indent(root)
  return ElementTree.tostring(root, encoding="unicode")


@functools.lru_cache(maxsize=64)  # Picture, map and things are asked for apart.
def _drawn(
  split: str, size: int, seed: int, i: int
) -> tuple[np.ndarray, np.ndarray, list[Thing]]:
  draw = np.random.default_rng([seed, list(SIZES).index(split), i])
  names = list(STAND_INS)
  first = i % len(names)
  chosen = [first]
  if draw.random() < 0.4:
    chosen.append((first + int(draw.integers(1, len(names)))) % len(names))
  picture = _surface(draw, size)
  indices = np.zeros((size, size), np.uint8)
  things = []
  for place, number in enumerate(chosen):
    name = names[number]
    parts = outlines.outline(draw, outlines.CLASSES.index(STAND_INS[name]))
    difficult = False
    if len(chosen) > 1:
      shift = (place - 0.5, draw.uniform(-0.4, 0.4))
      parts = [(points * 0.5 + shift, adds) for points, adds in parts]
      difficult = place == 1 and draw.random() < 0.2
    cover = outlines.mask(parts, size=size)
    picture += cover[..., None] * (_surface(draw, size) - picture)
    indices[cover > 0.5] = 1 + CLASSES.index(name)
    indices[(cover > 0.02) & (cover < 0.98)] = VOID
    rows, columns = np.nonzero(cover > 0.02)
    box = (columns.min(), rows.min(), columns.max(), rows.max())
    left, top, right, bottom = (int(edge) + 1 for edge in box)
    things.append(Thing(name, bool(difficult), (left, top, right, bottom)))
  return np.clip(picture + 0.5, 0, 255).astype(np.uint8), indices, things


def _surface(draw: np.random.Generator, size: int) -> np.ndarray:
  """A texture of any family in any colour, float32 [size, size, 3]."""
  field = textures.field(
    draw, int(draw.integers(len(textures.FAMILIES))), size=size
  )
  color = draw.uniform(30, 225, 3).astype(np.float32)
  return color + np.float32(draw.uniform(6, 24)) * field[..., None]


def _check_generated(
  split: str, num_examples: int | None, seed: int, size: int
) -> None:
  if split not in SIZES:
    raise InputError(
      f"voc:generated has no split {split!r}; it has {', '.join(SIZES)}."
    )
  if num_examples is not None and num_examples < 1:
    raise InputError(f"num_examples must be at least 1, got {num_examples}.")
  if seed < 0:
    raise InputError(f"seed must be 0 or more, got {seed}.")
  if not _SMALLEST <= size <= _LARGEST:
    raise InputError(
      f"image_size and resize_to of voc:generated must be in {_SMALLEST}.."
      f"{_LARGEST}, got {size}."
    )


def _root(name: str, data_dir: str | None, year: int) -> pathlib.Path:
  """The folder of the year."""
  if not name:
    raise InputError(
      "voc needs the folder that holds VOCdevkit: voc:/path, or voc:generated."
    )
  base = pathlib.Path(data_dir or "").expanduser()
  base /= pathlib.Path(name).expanduser()
  folder = f"VOC{year}"
  tried = [base / "VOCdevkit" / folder, base / folder]
  if base.name == folder:
    tried.append(base)
  for path in tried:
    if (path / "ImageSets").is_dir():
      return path
  near = [base, base / "VOCdevkit"]
  there = sorted(
    p.name for at in near if at.is_dir() for p in at.glob("VOC2*") if p.is_dir()
  )
  raise InputError(
    f"There is no {tried[0]} with its ImageSets"
    + (
      f"; of other years there are: {few(there)}, see options.year."
      if there
      else f", nor {tried[1]}; unpack VOCtrainval there."
    )
  )


def _ids(root: pathlib.Path, split: str, task: str) -> list[str]:
  """The pictures of a split, all of whose files are there."""
  sets = root / "ImageSets" / _SETS[task]
  path = sets / f"{split}.txt"
  if not _ID.fullmatch(split) or not path.is_file():
    there = sorted(p.stem for p in sets.glob("*.txt") if "_" not in p.stem)
    raise InputError(
      f"{sets} has no split {split!r}; there are: {few(there) or 'none'}."
    )
  try:
    lines = path.read_text(encoding="utf-8").splitlines()
  except (OSError, UnicodeDecodeError) as error:
    raise InputError(f"{path} cannot be read: {error}.") from error
  ids = [line.split()[0] for line in lines if line.strip()]
  if not ids:
    raise InputError(f"{path} names no picture.")
  if wrong := [name for name in ids if not _ID.fullmatch(name)]:
    raise InputError(f"{path} must name pictures, got {wrong[0]!r}.")
  folder, ending = {
    "classification": ("Annotations", "xml"),
    "segmentation": ("SegmentationClass", "png"),
  }[task]
  for below, end in (("JPEGImages", "jpg"), (folder, ending)):
    # Listed once, as asking for each takes long on disks of a network.
    try:
      with os.scandir(root / below) as entries:
        there = {entry.name for entry in entries if entry.is_file()}
    except OSError as error:
      raise InputError(f"{root / below}: {error.strerror}.") from error
    if missing := [n for n in ids if f"{n}.{end}" not in there]:
      files = [f"{n}.{end}" for n in missing]
      raise InputError(
        f"{root / below} lacks {len(files)} of the {len(ids)} files of "
        f"{split!r}: {few(files)}."
      )
  return ids


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
  """Says of which file it is that something is wrong.

  Pillow lets out whatever goes wrong in its parsers.
  """
  try:
    yield
  except InputError:
    raise
  except Exception as error:
    if isinstance(error, OSError) and error.errno:
      raise InputError(f"{name} cannot be read: {error.strerror}.") from error
    words = " ".join(str(error).split()) or type(error).__name__
    raise decode.DamagedError(f"{name} is damaged: {words}.") from error
