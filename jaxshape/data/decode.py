"""Encoded images to uint8 RGB of one size: the only place that decodes.

Sizes are in pixels. `box` is (left, top, right, bottom) in the upright picture,
in fractions of a pixel: Pillow's resampling takes the box and the size at once,
which gives the numbers of "resize everything, then crop" without the pixels
that the crop throws away.
"""

import abc
from collections.abc import Callable, Iterable
import dataclasses
import io
import math
import threading
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image
import xxhash

from jaxshape.errors import InputError

INTERPOLATIONS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
CROPS = ("center", "random")

# Only these parsers ever see the bytes: some of Pillow's others start programs
# (EPS) or unpack archives (FITS).
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
# Above this many pixels Pillow itself refuses.
_PILLOW_LIMIT = 178_956_970
_ATTEMPTS = 10
_UPRIGHT = {
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}
_Box = tuple[float, float, float, float]

Example = dict[str, Any]  # Arrays and NumPy scalars.


class DamagedError(InputError):
  """An image that cannot be decoded, today or tomorrow; the message names it.

  A disk that fails to answer is not this: then the image may be intact.
  """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoder:
  """Turns one encoded image into uint8 RGB [image_size, image_size, 3].

  Pictures are turned upright (EXIF), transparent pixels are laid on white,
  16-bit values keep their upper byte.

  Attributes:
    image_size: Height and width of the result.
    resize_to: What the shorter side is scaled to before the center is cut out,
      at least `image_size`; None means `image_size` / 0.875 (256 for 224).
    interpolation: One of `INTERPOLATIONS`; all but "nearest" are antialiased.
    crop: "center", or "random" for training on photos: a box of random area and
      shape, where a generator is given.
    scale: Smallest and largest area of a random box, as a part of the picture.
    ratio: Smallest and largest width / height of a random box.
    max_pixels: Pictures with more are refused before they are unpacked.

  Reference:
    Szegedy et al., "Going Deeper with Convolutions", CVPR 2015, Sec. 6 (the
    random box).
  """

  image_size: int
  resize_to: int | None = None
  interpolation: str = "bilinear"
  crop: str = "center"
  scale: tuple[float, float] = (0.08, 1.0)
  ratio: tuple[float, float] = (3 / 4, 4 / 3)
  max_pixels: int = 50_000_000

  def __post_init__(self):
    size = self.image_size
    if not _is_count(size):
      raise InputError(f"image_size must be an integer >= 1, got {size!r}.")
    if self.resize_to is not None and not (
      _is_count(self.resize_to) and self.resize_to >= size
    ):
      raise InputError(
        f"resize_to must be an integer >= image_size={size}, "
        f"got {self.resize_to!r}."
      )
    for name, known in (("interpolation", INTERPOLATIONS), ("crop", CROPS)):
      if (value := getattr(self, name)) not in known:
        raise InputError(
          f"{name} must be one of {', '.join(known)}, got {value!r}."
        )
    if not _is_range(self.scale) or self.scale[1] > 1:
      raise InputError(
        f"scale must be two numbers, 0 < low <= high <= 1, got {self.scale!r}."
      )
    if not _is_range(self.ratio):
      raise InputError(
        f"ratio must be two numbers, 0 < low <= high, got {self.ratio!r}."
      )
    if not (_is_count(self.max_pixels) and self.max_pixels <= _PILLOW_LIMIT):
      raise InputError(
        f"max_pixels must be an integer in 1..{_PILLOW_LIMIT}, "
        f"got {self.max_pixels!r}."
      )

  def __call__(
    self,
    data: bytes | BinaryIO | Image.Image,
    *,
    name: str,
    rng: np.random.Generator | None = None,
  ) -> np.ndarray:
    """Decodes one image.

    Args:
      data: The encoded image, an open file, or Pillow's image.
      name: The file or the record, for the error.
      rng: Draws the box if `crop` is "random"; without it the center is taken.

    Returns:
      The pixels, uint8 [image_size, image_size, 3].

    Raises:
      DamagedError: No image, cut off, or too large.
      InputError: The file could not be read.
    """
    try:
      return self._decode(data, rng if self.crop == "random" else None)
    # Pillow's parsers let out whatever goes wrong in them (struct.error,
    # SyntaxError, ZeroDivisionError, ...): for the person it is one thing.
    except Exception as error:
      if isinstance(error, OSError) and error.errno:
        raise InputError(f"{name} cannot be read: {error.strerror}.") from error
      raise DamagedError(f"{name} {self._say(error)}.") from error

  def _decode(
    self, data: bytes | BinaryIO | Image.Image, rng: np.random.Generator | None
  ) -> np.ndarray:
    if isinstance(data, bytes):
      data = io.BytesIO(data)
    if isinstance(data, Image.Image):
      image = data
    else:
      image = Image.open(data, formats=_FORMATS)
    if image.width * image.height > self.max_pixels:
      raise Image.DecompressionBombError(f"{image.width} x {image.height}")
    orientation = _orientation(image)
    width, height = image.size if orientation < 5 else image.size[::-1]
    if rng is None:
      box = self._center(width, height)
    else:
      box = self._random(width, height, rng)
      # A JPEG far larger than needed is decoded at 1/2, 1/4 or 1/8, still at
      # least as fine as the result. Not in evaluation: public numbers come from
      # the full picture.
      fine = (
        math.ceil(width * self.image_size / (box[2] - box[0])),
        math.ceil(height * self.image_size / (box[3] - box[1])),
      )
      image.draft("RGB", fine if orientation < 5 else (fine[1], fine[0]))
    image = _rgb(image)
    if orientation in _UPRIGHT:
      image = image.transpose(_UPRIGHT[orientation])
    x, y = image.width / width, image.height / height  # 1 without the draft.
    image = image.resize(
      (self.image_size, self.image_size),
      Image.Resampling[self.interpolation.upper()],
      box=(box[0] * x, box[1] * y, box[2] * x, box[3] * y),
    )
    return np.asarray(image)

  def _center(self, width: int, height: int) -> _Box:
    size = self.image_size
    short = self.resize_to or int(size / 0.875)
    scaled_width = short * width // min(width, height)
    scaled_height = short * height // min(width, height)
    x, y = width / scaled_width, height / scaled_height
    left = round((scaled_width - size) / 2)
    top = round((scaled_height - size) / 2)
    return left * x, top * y, (left + size) * x, (top + size) * y

  def _random(self, width: int, height: int, rng: np.random.Generator) -> _Box:
    for _ in range(_ATTEMPTS):
      area = width * height * rng.uniform(self.scale[0], self.scale[1])
      shape = math.exp(rng.uniform(*np.log(self.ratio)))
      w = max(round(math.sqrt(area * shape)), 1)
      h = max(round(math.sqrt(area / shape)), 1)
      if w <= width and h <= height:
        left = int(rng.integers(width - w + 1))
        top = int(rng.integers(height - h + 1))
        return left, top, left + w, top + h
    # Long and thin: the largest box of an allowed shape, from the middle.
    w = min(width, max(round(height * self.ratio[1]), 1))
    h = min(height, max(round(width / self.ratio[0]), 1))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h

  def _say(self, error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
      return f"is no image of a known format ({', '.join(_FORMATS)})"
    if isinstance(
      error, Image.DecompressionBombError | Image.DecompressionBombWarning
    ):
      return f"has more than max_pixels={self.max_pixels} pixels"
    words = " ".join(str(error).split()) or type(error).__name__
    return f"is damaged: {words.rstrip('.')}"


class Cache:
  """Keeps decoded examples, as far as the memory given goes.

  What came first stays: with a new order in every epoch nothing is gained by
  making room. Each worker process starts with an empty one.

  Args:
    limit: Bytes; 0 keeps nothing.
  """

  def __init__(self, limit: int):
    if limit < 0:
      raise InputError(f"cache must be a number of bytes >= 0, got {limit}.")
    self._limit = limit
    self.__setstate__({})

  def __getstate__(self) -> dict:
    return {"_limit": self._limit}

  def __setstate__(self, state: dict):
    self.__dict__.update(state)
    self._lock = threading.Lock()
    self._kept: dict[int, Example] = {}
    self._size = 0

  def get(self, i: int, make: Callable[[], Example]) -> Example:
    """Gives example i, made if it is not there; arrays may be read-only."""
    if (kept := self._kept.get(i)) is not None:
      return dict(kept)
    made = make()
    size = sum(np.asarray(value).nbytes for value in made.values())
    with self._lock:
      if i not in self._kept and self._size + size <= self._limit:
        self._size += size
        made["image"].setflags(write=False)  # All who ask get this very array.
        self._kept[i] = dict(made)
    return made


def make_cache(limit: int, decoder: Decoder) -> Cache:
  """Makes the memory of a source, if what it decodes is the same each time."""
  if limit and decoder.crop == "random":
    raise InputError(
      "cache keeps finished images, so it goes with crop='center' only."
    )
  return Cache(limit)


class Decoded(abc.ABC):
  """A source of encoded images, from which a generator may draw boxes."""

  def __init__(self, decoder: Decoder, *, cache: int):
    self._decoder = decoder
    self._cache = make_cache(cache, decoder)

  def __getitem__(self, i: int) -> Example:
    return self._example(i, None)

  @property
  def sample(self) -> Callable[[int, np.random.Generator], Example] | None:
    """Gives example i with a box drawn by a generator, if boxes are drawn."""
    return self._example if self._decoder.crop == "random" else None

  @abc.abstractmethod
  def _example(self, i: int, rng: np.random.Generator | None) -> Example: ...


def digest(names: Iterable[str]) -> str:
  """A short digest of names in their order."""
  return xxhash.xxh3_64_hexdigest("\0".join(names).encode())


def _is_count(value: object) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_range(pair: tuple[float, float]) -> bool:
  return len(pair) == 2 and 0 < pair[0] <= pair[1] < math.inf


def _orientation(image: Image.Image) -> int:
  try:
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
  except Exception:  # Broken notes do not make the picture unusable.
    return 1
  return orientation if orientation in _UPRIGHT else 1


def _rgb(image: Image.Image) -> Image.Image:
  image.load()
  if image.mode.startswith("I;16"):
    upper = np.asarray(image) >> 8
    image = Image.fromarray(upper.astype(np.uint8))
  elif image.mode in ("I", "F"):
    raise ValueError("pixels of 32 bits have no known range; save 8 or 16 bits")
  if image.has_transparency_data:
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(white, image)
  return image if image.mode == "RGB" else image.convert("RGB")
