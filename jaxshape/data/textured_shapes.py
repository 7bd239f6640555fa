"""Generated pictures in which texture gives the class away, until it misleads.

A silhouette of one of sixteen things lies on ground of another colour and
contrast; one family of texture fills the picture, as things in photographs have
their surroundings and public cue-conflict images one texture throughout. Light,
colours, contrast, pose and build vary. In training, the family gives the class
away most of the time. The other splits take that away, each in its way:

  train          texture family = class with probability `texture_correlation`
  test           the same rule, other pictures
  texture_shift  families that training never shows, drawn without regard to
                 the class
  cue_conflict   the shape of one class in the texture of another, each of the
                 240 pairs equally often
  outline        a dark line on light paper
  silhouette     the figure black on white

Contrasts follow photographs. Absolute differences of neighbouring pixels, per
axis and channel, at the 25/50/75/90/95th percentile:
  BSDS500 test set at 96 px   boundaries 6 17 38 68 89   elsewhere 1 4 10 21 32
  `test` at 64 px             boundaries 23 42 66 92 108 elsewhere 1 4 10 20 28
(boundaries: at least half of the annotators drew one here, and people's lines
are a pixel or two off, while the outlines here are exact; elsewhere: none
within a pixel). How much the pictures of a family differ was set so that a
plainly trained network goes by texture about as much as ImageNet networks do.

Reference:
  Geirhos et al., "ImageNet-trained CNNs are biased towards texture; increasing
  shape bias improves accuracy and robustness", ICLR 2019 (the cue conflict,
  the silhouettes, the edges). Martin et al., "A Database of Human Segmented
  Natural Images", ICCV 2001, and its extension BSDS500 (the boundaries).
"""

from collections.abc import Iterator, Sequence
import operator
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from jaxshape.data import outlines, textures
from jaxshape.errors import InputError
from jaxshape.typing import UInt8, typed

CLASSES = outlines.CLASSES
# In this order: a split's place here is part of its pictures' seeds.
SIZES = {
  "train": 8192,
  "test": 2048,
  "texture_shift": 2048,
  "cue_conflict": 960,
  "outline": 1024,
  "silhouette": 1024,
}
SPLITS = tuple(SIZES)
NO_TEXTURE = -1
_SMALLEST, _LARGEST = 32, 224
# Standard deviation of a texture, in grey levels, from least to most.
_CONTRAST = (6.0, 24.0)


def _log_uniform(draw: np.random.Generator, low: float, high: float) -> float:
  return low * (high / low) ** draw.random()


def _surface(
  draw: np.random.Generator,
  family: int,
  *,
  size: int,
  mean: np.ndarray,
  contrast: float,
) -> np.ndarray:
  """A texture in two or three tones, [channels, height, width]."""
  tones = contrast * (1 + draw.uniform(-0.35, 0.35, 3))
  third = contrast * draw.uniform(-0.3, 0.3, 3)
  values = textures.field(draw, family, size=size)
  rough = np.minimum(values * values, 4) - 1
  return (
    mean.astype(np.float32)[:, None, None]
    + tones.astype(np.float32)[:, None, None] * values
    + third.astype(np.float32)[:, None, None] * rough
  )


def _colours(draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
  """Mean colours of figure and ground, apart in lightness."""
  figure = draw.uniform(45, 205)
  apart = _log_uniform(draw, 22, 160)
  up = draw.random() < 0.5
  if not 30 <= figure + (apart if up else -apart) <= 220:
    up = not up
  ground = np.clip(figure + (apart if up else -apart), 20, 230)
  tints = draw.uniform(-1, 1, (2, 3)) * draw.uniform(4, 45, (2, 1))
  tints -= tints.mean(axis=1, keepdims=True)
  return figure + tints[0], ground + tints[1]


def _light(
  draw: np.random.Generator, mask: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Factors for figure and ground: uneven light, a round body, its shadow."""
  size = len(mask)
  angle = draw.uniform(0, 2 * np.pi)
  towards = np.array([np.cos(angle), np.sin(angle)])
  uneven, body, shade = draw.uniform(0, (0.2, 0.5, 0.45))
  radius, reach = draw.uniform((0.02, 0.03), (0.05, 0.06)) * size
  picture = Image.fromarray((mask * 255).astype(np.uint8))
  soft = picture.filter(ImageFilter.GaussianBlur(float(radius)))
  # The shadow lies on the side away from the light.
  back = (1, 0, towards[0] * reach, 0, 1, towards[1] * reach)
  cast = soft.transform(
    soft.size, Image.Transform.AFFINE, back, Image.Resampling.BILINEAR
  )
  near, far = (np.asarray(x, dtype=np.float32) / 255 for x in (soft, cast))
  line = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1
  slope = line * np.float32(towards[0]) + line[:, None] * np.float32(towards[1])
  light = 1 + np.float32(uneven) * slope
  # Where the figure reaches further towards the light than its shadow does.
  relief = np.float32(body) * (near - far)
  return light * (1 + relief), light * (1 - np.float32(shade) * far)


def _photograph(
  draw: np.random.Generator,
  parts: list[outlines.Part],
  *,
  family: int,
  size: int,
) -> np.ndarray:
  """A figure on ground of the same family, each drawn and coloured anew."""
  mask = outlines.mask(parts, size=size)
  means = _colours(draw)
  contrasts = [_log_uniform(draw, *_CONTRAST) for _ in range(2)]
  front = _surface(
    draw, family, size=size, mean=means[0], contrast=contrasts[0]
  )
  back = _surface(draw, family, size=size, mean=means[1], contrast=contrasts[1])
  on_front, on_back = _light(draw, mask)
  noise = np.float32(draw.uniform(0.4, 2.0))
  back *= on_back
  front *= on_front
  front -= back
  front *= mask
  front += back
  # Last, as only these draws depend on the size.
  front += noise * draw.standard_normal(front.shape, dtype=np.float32)
  return np.clip(front + 0.5, 0, 255).astype(np.uint8).transpose(1, 2, 0)


def _print(coverage: np.ndarray, *, ink: float, paper: float) -> np.ndarray:
  grey = np.round(paper + (ink - paper) * coverage).astype(np.uint8)
  return np.repeat(grey[:, :, None], 3, axis=2)


class Source:
  """Examples by index, drawn when asked for and then kept.

  An example is a function of (seed, split, index, size) alone, and only its
  sensor noise is another at another size. An example holds "image", uint8
  [size, size, 3] and read-only; "label", the class of the shape; "texture", the
  texture's family as an index into `textures.FAMILIES` (of which the first
  sixteen are tied to the classes in their order) or -1 where there is none; and
  "index".
  """

  classes: tuple[str, ...] = CLASSES

  def __init__(
    self,
    *,
    split: str,
    image_size: int,
    num_examples: int,
    texture_correlation: float,
    seed: int,
    cache: int,
  ):
    self._split = split
    self._size = image_size
    self._length = num_examples
    self._correlation = texture_correlation
    self._seed = seed
    self._kept_below = cache // (3 * image_size**2 + 1024)
    self._kept: dict[int, dict[str, np.ndarray]] = {}

  @property
  def fingerprint(self) -> dict[str, dict[str, Any]]:
    """What the pictures are drawn from."""
    drawn = {
      "split": self._split,
      "size": self._size,
      "texture_correlation": self._correlation,
      "seed": self._seed,
    }
    return {"drawn": drawn}

  def __len__(self) -> int:
    return self._length

  def __iter__(self) -> Iterator[dict[str, Any]]:
    return (self[i] for i in range(len(self)))

  def __getstate__(self) -> dict[str, Any]:
    return {**self.__dict__, "_kept": {}}

  def __repr__(self) -> str:
    return (
      f"Source(split={self._split!r}, image_size={self._size}, "
      f"num_examples={self._length}, seed={self._seed}, "
      f"texture_correlation={self._correlation})"
    )

  def __getitem__(self, index: int) -> dict[str, Any]:
    i = operator.index(index)
    if not 0 <= i < self._length:
      raise IndexError(f"index must be in 0..{self._length - 1}, got {i}.")
    example = self._kept.get(i)
    if example is None:
      example = self._example(i)
      if i < self._kept_below:
        # Threads that draw the same example at once store equal values.
        self._kept[i] = example
    return dict(example)

  def _texture(self, draw: np.random.Generator, i: int) -> int:
    """The family of the picture's texture, as an index."""
    label, known = i % len(CLASSES), len(textures.TRAINING)
    if self._split in ("outline", "silhouette"):
      return NO_TEXTURE
    if self._split == "texture_shift":
      return int(draw.integers(known, len(textures.FAMILIES)))
    if self._split == "cue_conflict":
      pair = i // len(CLASSES) % (len(CLASSES) - 1)
      return (label + 1 + pair) % len(CLASSES)
    other = int(draw.integers(1, known))
    if draw.random() >= self._correlation:
      return (label + other) % known
    return label

  def _example(self, i: int) -> dict[str, Any]:
    draw = np.random.default_rng([self._seed, SPLITS.index(self._split), i])
    label = i % len(CLASSES)
    family = self._texture(draw, i)
    parts = outlines.outline(draw, label)
    # Lattices a few pixels wide need more than 64 of them to be drawn well.
    size = self._size if self._size >= 64 else 2 * self._size
    if self._split == "silhouette":
      image = _print(outlines.mask(parts, size=size), ink=0, paper=255)
    elif self._split == "outline":
      width, ink, paper = draw.uniform((1.3, 0, 235), (2.4, 60, 255))
      line = outlines.contour(parts, size=size, width=width / 64)
      image = _print(line, ink=ink, paper=paper)
    else:
      image = _photograph(draw, parts, family=family, size=size)
    if size != self._size:
      image = np.asarray(Image.fromarray(image).reduce(2))
    image = np.ascontiguousarray(image)
    image.setflags(write=False)
    return {
      "image": image,
      "label": np.int32(label),
      "texture": np.int32(family),
      "index": np.int32(i),
    }


@typed
def open_source(
  name: str = "",
  *,
  split: str,
  image_size: int = 64,
  data_dir: str | None = None,
  num_examples: int | None = None,
  texture_correlation: float = 0.97,
  seed: int = 0,
  cache: int = 2**30,
) -> Source:
  """Opens a split of the generated pictures.

  Args:
    name: Empty: there is one variant.
    split: One of `SPLITS`.
    image_size: Pixels along each side, 32..224.
    data_dir: Not needed, as nothing is read.
    num_examples: How many; the classes take turns. By default `SIZES`.
    texture_correlation: How often the texture gives the class away in `train`
      and `test`; otherwise another family of training is drawn. 0..1.
    seed: Another seed gives other pictures in every split. 0 or more.
    cache: Bytes of memory for pictures once drawn; 0 draws them anew each time.

  Returns:
    A source; safe to share between threads and processes.
  """
  del data_dir
  if name:
    raise InputError(
      f"textured_shapes has no variants, got {name!r}; write textured_shapes."
    )
  if split not in SIZES:
    raise InputError(
      f"textured_shapes has no split {split!r}; it has {', '.join(SPLITS)}."
    )
  if not _SMALLEST <= image_size <= _LARGEST:
    raise InputError(
      f"image_size of textured_shapes must be in {_SMALLEST}..{_LARGEST}, "
      f"got {image_size}."
    )
  count = SIZES[split] if num_examples is None else num_examples
  if count < 1:
    raise InputError(f"num_examples must be at least 1, got {count}.")
  if not 0 <= texture_correlation <= 1:
    raise InputError(
      f"texture_correlation must be in 0..1, got {texture_correlation}."
    )
  if seed < 0:
    raise InputError(f"seed must be 0 or more, got {seed}.")
  if cache < 0:
    raise InputError(f"cache must be 0 or more bytes, got {cache}.")
  return Source(
    split=split,
    image_size=image_size,
    num_examples=count,
    texture_correlation=texture_correlation,
    seed=seed,
    cache=cache,
  )


@typed
def sheet(
  *, image_size: int = 64, splits: Sequence[str] = SPLITS, seed: int = 0
) -> UInt8[np.ndarray, "height width 3"]:
  """Shows one example of each class (columns) in each split (rows).

  Args:
    image_size: Pixels along each example's side, 32..224.
    splits: The rows, of `SPLITS`.
    seed: As for `open_source`.

  Returns:
    A picture with the classes above and the splits on the left.
  """
  gap, text = max(image_size // 32, 1), max(image_size // 6, 10)
  font = ImageFont.load_default(size=text)
  left = int(max(font.getlength(split) for split in splits)) + text
  top, pitch = 2 * text, image_size + gap
  picture = Image.new(
    "RGB",
    (left + pitch * len(CLASSES), top + pitch * len(splits)),
    (255, 255, 255),
  )
  pen = ImageDraw.Draw(picture)
  for column, name in enumerate(CLASSES):
    place = left + column * pitch + image_size / 2, top / 2
    pen.text(place, name, fill=(0, 0, 0), font=font, anchor="mm")
  for row, split in enumerate(splits):
    y = top + row * pitch
    place = left - text / 2, y + image_size / 2
    pen.text(place, split, fill=(0, 0, 0), font=font, anchor="rm")
    # Each row starts elsewhere, so that no two show the same choice of pairs.
    source = open_source(split=split, image_size=image_size, seed=seed)
    for column in range(len(CLASSES)):
      example = source[column * (len(CLASSES) + 1) % len(source)]
      place = left + int(example["label"]) * pitch, y
      picture.paste(Image.fromarray(example["image"]), place)
  return np.asarray(picture)
