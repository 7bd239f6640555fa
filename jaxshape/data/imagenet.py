"""ImageNet in folders called by WordNet ids, and sets with its classes.

`<root>/<split>/<id>/...` or `<root>/<id>/...`: training and validation pictures
(those sorted into folders), ImageNet-Sketch, -A and -R. Folders may also be
called by the number of the class, 0..999, as those of ImageNet-V2 are. The
labels are those of a head of 1,000 classes, whichever of them occur.

Reference:
  Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge", IJCV
  2015 (the classes, sorted by WordNet id); their short names are torchvision's.
"""

from collections.abc import Mapping, Sequence
import functools
import importlib.resources
import pathlib

import numpy as np

from jaxshape.data import decode, folder

COUNT = 1000
# What the folders are called, as errors say it.
WHAT = f"WordNet ids (n01440764) or numbers (0..{COUNT - 1}) of ImageNet"


class ImageNet(folder.Folder):
  """Pictures with the labels of ImageNet's 1,000 classes."""

  @property
  def present(self) -> tuple[int, ...]:
    """The classes that occur, to which -A and -R restrict the head."""
    return tuple(np.unique(self.labels).tolist())


@functools.cache
def wordnet_ids() -> tuple[str, ...]:
  """The WordNet ids of the classes, in order."""
  return tuple(line.partition(" ")[0] for line in _lines())


@functools.cache
def classes() -> tuple[str, ...]:
  """The names of the classes, in order, all different."""
  return tuple(line.partition(" ")[2] for line in _lines())


@functools.cache
def labels() -> Mapping[str, int]:
  """The class of each folder name: a WordNet id or a number."""
  found = {name: i for i, name in enumerate(wordnet_ids())}
  for digits in (1, 2, 3):
    found |= {f"{i:0{digits}}": i for i in range(COUNT)}
  return found


def open_source(
  name: str,
  *,
  split: str,
  image_size: int,
  data_dir: str | None = None,
  skip_damaged: bool = False,
  resize_to: int | None = None,
  interpolation: str = "bilinear",
  crop: str = "center",
  scale: tuple[float, float] = (0.08, 1.0),
  ratio: tuple[float, float] = (3 / 4, 4 / 3),
  max_pixels: int = 50_000_000,
  cache: int = 0,
) -> ImageNet:
  """Opens a folder of class folders.

  Args:
    name: The folder; `~` is expanded. If empty, there are no examples, only the
      classes.
    split: A folder below it, where there are splits.
    image_size: See `decode.Decoder`, like all options not named here.
    data_dir: What a relative `name` starts from.
    skip_damaged: See `folder.open_source`.
    resize_to: See `decode.Decoder`.
    interpolation: See `decode.Decoder`.
    crop: See `decode.Decoder`.
    scale: See `decode.Decoder`.
    ratio: See `decode.Decoder`.
    max_pixels: See `decode.Decoder`.
    cache: Bytes of memory for decoded images; 0 decodes anew each time.

  Returns:
    A source of "image" and "label", within 0..999; with `skip_damaged` also
    "mask", 0 where another image stands in.

  Raises:
    InputError: There is no such folder or split, it has no class folders, or
      one is called by no id and no number.
  """
  decoder = decode.Decoder(
    image_size=image_size,
    resize_to=resize_to,
    interpolation=interpolation,
    crop=crop,
    scale=scale,
    ratio=ratio,
    max_pixels=max_pixels,
  )
  root, files, found = pathlib.Path(), [], np.zeros(0, np.int32)
  if name:
    with folder.listing():
      root = folder.find_root(name, data_dir, kind="imagenet")
      root = folder.find_split(root, split, classes=labels())
      folders = folder.class_folders(root)
      numbers = folder.number(root, folders, labels(), what=WHAT)
      files, found = folder.find_images(root, numbers)
  return ImageNet(
    root,
    files,
    found,
    classes(),
    decoder=decoder,
    skip_damaged=skip_damaged,
    cache=cache,
  )


@functools.cache
def _lines() -> Sequence[str]:
  file = importlib.resources.files("jaxshape.data") / "imagenet_classes.txt"
  return file.read_text(encoding="utf-8").splitlines()
