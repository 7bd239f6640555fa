"""Stimuli whose shape is of one class and whose texture is of another.

`<shape>/<shape>1-<texture>2.png`, as the public stimuli lie in
`stimuli/style-transfer-preprocessed-512/`, itself the root or a folder below
it; beside it edge drawings and silhouettes, `<shape>/<shape>1.png`, which have
no texture.

Reference:
  Geirhos et al., "ImageNet-trained CNNs are biased towards texture; increasing
  shape bias improves accuracy and robustness", ICLR 2019, Sec. 2.
"""

from collections.abc import Sequence
import logging
import re

import numpy as np

from jaxshape.data import decode, folder, sources
from jaxshape.errors import InputError, few

_STIMULUS = re.compile(r"([A-Za-z_ ]+?)\d*-([A-Za-z_ ]+?)\d*\.\w+")
_SHAPE = re.compile(r"([A-Za-z_ ]+?)\d*\.\w+")


class Stimuli:
  """Images whose files say what their texture is, with it as "texture".

  The public cue-conflict stimuli are called `cat1-bicycle2.png` and lie in the
  folder of their shape. A texture that is no class is -1.
  """

  def __init__(
    self, source: sources.Source, files: Sequence[str], classes: Sequence[str]
  ):
    """Reads the names.

    Args:
      source: The images.
      files: Their names, maybe with folders before them.
      classes: What textures are numbered by.

    Raises:
      InputError: A name says no texture, or no texture is a class.
    """
    self.source = source
    self._textures = read_textures(files, classes)

  @property
  def classes(self) -> tuple[str, ...]:
    """Those of the shapes, and of the textures."""
    return self.source.classes

  def __len__(self) -> int:
    return len(self.source)

  def __getitem__(self, i: int) -> sources.Example:
    return {**self.source[i], "texture": self._textures[i]}


def read_textures(files: Sequence[str], classes: Sequence[str]) -> np.ndarray:
  """Reads the textures from the names of stimuli.

  Args:
    files: Names such as `cat1-bicycle2.png`, maybe with folders before them.
    classes: What textures are numbered by.

  Returns:
    One number per file, int32, -1 for a texture that is no class.

  Raises:
    InputError: A name says no texture, or no texture is a class.
  """
  found = [_STIMULUS.fullmatch(_name(file)) for file in files]
  if wrong := [f for f, m in zip(files, found, strict=True) if not m]:
    raise InputError(
      "cue-conflict images must be called by their shape and texture, such "
      f"as cat1-bicycle2.png, got {few(wrong)}."
    )
  textures = [match[2] for match in found if match]
  numbers = {name: i for i, name in enumerate(classes)}
  out = np.array([numbers.get(name, -1) for name in textures], np.int32)
  if np.all(out < 0):
    raise InputError(
      f"no texture of the {len(files)} cue-conflict images is one of the "
      f"classes {few(classes)}."
    )
  if none := sorted(set(textures) - set(numbers)):
    logging.warning(
      "%d cue-conflict images have a texture that is no class (%s); no answer "
      "can name it, and they count as without conflict.",
      np.sum(out < 0),
      folder.some(none),
    )
  return out


def open_source(
  name: str,
  *,
  split: str,
  image_size: int,
  data_dir: str | None = None,
  classes: Sequence[str] | None = None,
  skip_damaged: bool = False,
  resize_to: int | None = None,
  interpolation: str = "bilinear",
  crop: str = "center",
  scale: tuple[float, float] = (0.08, 1.0),
  ratio: tuple[float, float] = (3 / 4, 4 / 3),
  max_pixels: int = 50_000_000,
  cache: int = 0,
) -> folder.Folder:
  """Opens stimuli.

  Args:
    name: The folder; `~` is expanded.
    split: A folder below it, such as "cue_conflict" or "edges"; not looked at
      where `name` itself holds the folders of the shapes.
    image_size: See `decode.Decoder`, like all options not named here.
    data_dir: What a relative `name` starts from.
    classes: Labels in a fixed order; folders of other names are refused. By
      default, or if empty, the folders' names, sorted.
    skip_damaged: See `folder.open_source`.
    resize_to: See `decode.Decoder`; `image_size` by default, since the stimuli
      are shown whole.
    interpolation: See `decode.Decoder`.
    crop: See `decode.Decoder`.
    scale: See `decode.Decoder`.
    ratio: See `decode.Decoder`.
    max_pixels: See `decode.Decoder`.
    cache: Bytes of memory for decoded images; 0 decodes anew each time.

  Returns:
    A source of "image", "label", the class of the shape, and "texture", int32,
    that of the texture, -1 if it is no class; without "texture" if no image has
    one. With `skip_damaged` also "mask", 0 where another image stands in.

  Raises:
    InputError: There is no such folder or split, or a file is not called by
      its folder, and by a texture if others are.
  """
  decoder = decode.Decoder(
    image_size=image_size,
    resize_to=image_size if resize_to is None else resize_to,
    interpolation=interpolation,
    crop=crop,
    scale=scale,
    ratio=ratio,
    max_pixels=max_pixels,
  )
  with folder.listing():
    root = folder.find_root(name, data_dir, kind="cue_conflict")
    if any(folder.subfolders(root / c) for c in folder.subfolders(root)):
      root = folder.find_split(root, split, classes=())
    shapes = folder.class_folders(root)
    order = tuple(classes or shapes)
    numbers = folder.number(root, shapes, folder.by_name(order))
    files, labels = folder.find_images(root, numbers)
  more = {}
  if any("-" in _name(file) for file in files):
    more = {"texture": read_textures(files, order)}
  _check_shapes(files, textured=bool(more))
  return folder.Folder(
    root,
    files,
    labels,
    order,
    decoder=decoder,
    skip_damaged=skip_damaged,
    cache=cache,
    more=more,
  )


def _check_shapes(files: Sequence[str], *, textured: bool) -> None:
  pattern = _STIMULUS if textured else _SHAPE
  found = [pattern.fullmatch(_name(file)) for file in files]
  wrong = [
    file
    for file, match in zip(files, found, strict=True)
    if not match or match[1] != file.partition("/")[0]
  ]
  if wrong:
    example = "cat/cat1-bicycle2.png" if textured else "cat/cat1.png"
    raise InputError(
      "stimuli must be called by the shape whose folder they are in, such as "
      f"{example}, got {few(wrong)}; for images called otherwise use "
      "folder:<path>."
    )


def _name(file: str) -> str:
  return file.rpartition("/")[2]
