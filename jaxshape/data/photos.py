"""Photos of any size, their shape kept: found, read and put into batches.

Where `folder.py` cuts every picture to one size, these keep theirs, up to a
longest side.

Source: what is cut and how it is resized is the public code's of
Radenovic et al., "Fine-tuning CNN Image Retrieval with No Human Annotation",
TPAMI 2019.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
import itertools
import math
import os
import pathlib

import numpy as np
from PIL import Image, ImageOps

from jaxshape.data import decode, folder
from jaxshape.errors import InputError, few

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
_MOST_PIXELS = 100_000_000
Box = tuple[float, float, float, float]


def read_image(
  path: pathlib.Path, *, image_size: int, box: Box | None = None
) -> np.ndarray:
  """The pixels of a photo, its longer side at most `image_size`.

  What is cut out is scaled as if the whole photo were: its longer side is at
  most `image_size` times its share of the photo's.

  Args:
    path: Of the file.
    image_size: Smaller photos keep their size.
    box: Left, top, right and bottom of what is cut out of the upright photo
      first; None for all of it.

  Returns:
    RGB, uint8 [height, width, 3].

  Raises:
    DamagedError: It is no image, is damaged, too large, or beside the box.
    InputError: It cannot be read.
  """
  if not path.is_file():
    raise InputError(f"{path} is gone or is no regular file.")
  try:
    with Image.open(path, formats=_FORMATS) as image:
      if image.width * image.height > _MOST_PIXELS:
        raise ValueError(f"more than {_MOST_PIXELS} pixels")
      upright = _rgb(ImageOps.exif_transpose(image))
  # Pillow's parsers let out whatever goes wrong in them.
  except Exception as error:
    if isinstance(error, OSError) and error.errno:
      raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    words = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    raise decode.DamagedError(f"{path} is damaged: {words}.") from error
  if box is not None:
    left, top, right, bottom = map(round, box)
    inside = left < upright.width and top < upright.height
    if not (inside and right > max(left, 0) and bottom > max(top, 0)):
      raise decode.DamagedError(
        f"{path} is {upright.width} x {upright.height}, beside its box {box}."
      )
    whole = max(upright.size)
    upright = upright.crop((left, top, right, bottom))
    image_size = max(1, image_size * max(upright.size) // whole)
  upright.thumbnail(
    (image_size, image_size), Image.Resampling.LANCZOS, reducing_gap=None
  )
  return np.asarray(upright)


def read_boxes(path: str | os.PathLike[str]) -> dict[str, Box]:
  """What is to be cut out of images, from a text of one line per image.

  Args:
    path: Of the file; lines are "<name> <left> <top> <right> <bottom>", in
      pixels of the upright photo, and the name may hold spaces.

  Returns:
    Boxes by name.

  Raises:
    InputError: A line is not of that form, or a name is there twice.
  """
  out: dict[str, Box] = {}
  for number, line in lines(path):
    name, *numbers = line.rsplit(None, 4)
    try:
      box = tuple(float(x) for x in numbers)
    except ValueError:
      box = ()
    if len(box) != 4 or not np.isfinite(box).all():
      raise InputError(
        f"{path}, line {number}: give a name, left, top, right and bottom, "
        f"got {line[:80]!r}."
      )
    if box[0] >= box[2] or box[1] >= box[3] or name in out:
      what = "is there twice" if name in out else f"has the empty box {box}"
      raise InputError(f"{path}, line {number}: {name} {what}.")
    out[name] = (box[0], box[1], box[2], box[3])
  return out


def listed(root: pathlib.Path, names: Sequence[str] | None) -> list[str]:
  """Names of images below a folder: those that are asked for, or all."""
  if not root.is_dir():
    raise InputError(f"there is no folder {root}.")
  if names is not None:
    names = list(names)
    gone = [name for name in names if not (root / name).is_file()]
    if gone or not names:
      raise InputError(f"{root} lacks images: {few(gone) or 'none is named'}.")
    return names
  found = []
  for parent, below, files in os.walk(root):
    below[:] = sorted(name for name in below if name[0] != ".")
    place = pathlib.Path(parent).relative_to(root)
    found += [
      (place / name).as_posix()
      for name in files
      if name[0] != "." and name.lower().endswith(folder.EXTENSIONS)
    ]
  if not found:
    raise InputError(f"{root} holds no images ({' '.join(folder.EXTENSIONS)}).")
  if torn := [name for name in found if "\n" in name]:
    raise InputError(f"names of images hold line breaks: {torn[0]!r}.")
  return sorted(found)


def lines(path: str | os.PathLike[str]) -> list[tuple[int, str]]:
  """Lines of a text with their numbers, but for empty ones."""
  try:
    text = pathlib.Path(path).read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError) as error:
    raise InputError(f"{path} cannot be read: {error}.") from error
  numbered = enumerate(text.splitlines(), 1)
  return [(i, line.strip()) for i, line in numbered if line.strip()]


def _rgb(image: Image.Image) -> Image.Image:
  if image.mode.startswith(("I", "F")):
    raise ValueError(f"pixels of mode {image.mode}; save 8 bits per channel")
  if image.has_transparency_data:
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(white, image)
  return image.convert("RGB")


def batches(
  todo: Iterable[int],
  read: Callable[[int], np.ndarray],
  *,
  size: int,
  step: tuple[int, int],
  skip_broken: bool = False,
) -> Iterator[tuple[list[int], np.ndarray | None, np.ndarray]]:
  """Images in batches of one shape each, read ahead by threads.

  Args:
    todo: Numbers of images.
    read: From a number to an image, uint8 [height, width, 3].
    size: Of a batch; what is too few images is repeated.
    step: Sides are padded to multiples of the first number, but not beyond the
      second.
    skip_broken: Whether damaged images are told instead of raised.

  Yields:
    Numbers of images; the images in the upper left corners of uint8
    [size, height, width, 3]; their heights and widths, [size, 2]. For a damaged
    image, its number and None.
  """

  def try_read(i: int) -> np.ndarray | None:
    try:
      return read(i)
    except decode.DamagedError as error:
      if skip_broken:
        return None
      raise decode.DamagedError(
        f"{error} Replace it, or leave such images out with --skip_broken."
      ) from error

  waiting: dict[tuple[int, int], list[tuple[int, np.ndarray]]] = {}
  workers = os.cpu_count() or 1
  with futures.ThreadPoolExecutor(workers) as pool:
    places = iter(todo)
    ahead = [
      (i, pool.submit(try_read, i))
      for i in itertools.islice(places, 2 * workers)
    ]
    try:
      while ahead:
        place, coming = ahead.pop(0)
        image = coming.result()
        ahead += [
          (i, pool.submit(try_read, i)) for i in itertools.islice(places, 1)
        ]
        if image is None:
          yield [int(place)], None, np.zeros((0, 2), np.int32)
          continue
        sides = (_padded(image.shape[0], *step), _padded(image.shape[1], *step))
        group = waiting.setdefault(sides, [])
        group.append((int(place), image))
        if len(group) == size:
          yield _stacked(waiting.pop(sides), sides, size)
    finally:
      pool.shutdown(wait=False, cancel_futures=True)
  for sides, group in waiting.items():
    yield _stacked(group, sides, size)


def _padded(side: int, step: int, most: int) -> int:
  return max(side, min(math.ceil(side / step) * step, most))


def _stacked(
  group: Sequence[tuple[int, np.ndarray]], sides: tuple[int, int], size: int
) -> tuple[list[int], np.ndarray, np.ndarray]:
  """One array of the images; what is too few of them is repeated."""
  images = np.zeros((size, *sides, 3), np.uint8)
  sizes = np.ones((size, 2), np.int32)
  for i in range(size):
    image = group[min(i, len(group) - 1)][1]
    images[i, : image.shape[0], : image.shape[1]] = image
    sizes[i] = image.shape[:2]
  return [place for place, _ in group], images, sizes
