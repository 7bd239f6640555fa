"""Pictures in whose style others are redrawn: generated, a folder's, any data.

A source of styles is a source like any other (`jaxshape.data.sources`), of
which nothing but "image" is used. `Styled` gives each example of a data set
some of them; the restyling itself runs on the device.

Reference:
  Islam et al., "Maximizing Mutual Shape Information", BMVC 2022, Sec. 3.2: two
  styles per image. Geirhos et al., "ImageNet-trained CNNs are biased towards
  texture", ICLR 2019, Sec. 2.2: paintings as styles.
"""

from collections.abc import Callable, Sequence
import difflib
import os
import pathlib
from typing import Any

import numpy as np
from PIL import Image

from jaxshape.data import (
  decode,
  folder,
  options,
  photos,
  sources,
  stream,
  textures,
)
from jaxshape.errors import InputError
from jaxshape.typing import typed

Example = sources.Example

# What other sources draw from their seeds is told apart by this, the last of
# four numbers: theirs are shorter, and seeds are filled up with zeros.
_STYLE = 1
# Standard deviation of the light of a generated style, in grey levels: as
# strong as that of paintings, where detail is all that is to be taken over.
_CONTRAST = (24.0, 56.0)
_LARGEST = 1024


class Generated:
  """Textures in colours: styles where there are no paintings.

  Style i is a function of (seed, i, size) and of the families alone. An example
  holds "image", uint8 [size, size, 3] and read-only, and "label", the number of
  its family in `classes`.

  Attributes:
    classes: The families that are drawn from.
  """

  def __init__(
    self,
    *,
    image_size: int,
    count: int,
    families: Sequence[str],
    seed: int,
    cache: int,
  ):
    self.classes = tuple(families)
    self._size, self._count, self._seed = image_size, count, seed
    self._cache = decode.Cache(cache)

  @property
  def fingerprint(self) -> dict[str, Any]:
    """What the styles are drawn from."""
    return {"drawn": {"size": self._size, "seed": self._seed}}

  def __len__(self) -> int:
    return self._count

  def __getitem__(self, i: int) -> Example:
    if not 0 <= i < self._count:
      raise IndexError(f"style must be in 0..{self._count - 1}, got {i}.")
    return self._cache.get(i, lambda: self._example(i))

  def _example(self, i: int) -> Example:
    draw = np.random.default_rng([self._seed, 0, i, _STYLE])
    label = int(draw.integers(len(self.classes)))
    family = textures.FAMILIES.index(self.classes[label])
    mean = draw.uniform(70, 185) + draw.uniform(-40, 40, 3)
    light = draw.uniform(*_CONTRAST) * draw.choice([-1, 1])
    # Three tones that lie on no line: colours change with the texture, too.
    first = light * (1 + draw.uniform(-0.6, 0.6, 3))
    second = light * draw.uniform(-0.5, 0.5, 3)
    # Lattices a few pixels wide need more than 64 of them to be drawn well.
    size = self._size * (1 if self._size >= 64 else -(-64 // self._size))
    values = textures.field(draw, family, size=size)[..., None]
    rough = np.minimum(values * values, 4) - 1
    picture = mean + first * values + second * rough
    image = np.clip(picture + 0.5, 0, 255).astype(np.uint8)
    if size != self._size:
      image = np.asarray(Image.fromarray(image).reduce(size // self._size))
    return {"image": np.ascontiguousarray(image), "label": np.int32(label)}


def _generated(
  *,
  image_size: int,
  count: int = 256,
  families: Sequence[str] = textures.TRAINING,
  seed: int = 0,
  cache: int = 2**28,
) -> Generated:
  if not 8 <= image_size <= _LARGEST:
    raise InputError(
      f"image_size of generated styles must be in 8..{_LARGEST}, got "
      f"{image_size}."
    )
  if count < 1:
    raise InputError(
      f"count of generated styles must be 1 or more, got {count}."
    )
  if seed < 0:
    raise InputError(f"seed of generated styles must be 0 or more, got {seed}.")
  if isinstance(families, str) or not families:
    raise InputError(
      "families of generated styles must be some of "
      f"{', '.join(textures.FAMILIES)}, got {families!r}."
    )
  for name in families:
    if name not in textures.FAMILIES:
      near = difflib.get_close_matches(name, textures.FAMILIES, n=1)
      hint = f" (did you mean {near[0]}?)" if near else ""
      raise InputError(
        f"families of generated styles has no {name!r}{hint}; there are: "
        + ", ".join(textures.FAMILIES)
      )
  return Generated(
    image_size=image_size,
    count=count,
    families=families,
    seed=seed,
    cache=cache,
  )


def _folder(
  path: str,
  *,
  image_size: int,
  crop: str = "center",
  scale: tuple[float, float] = (0.08, 1.0),
  ratio: tuple[float, float] = (3 / 4, 4 / 3),
  resize_to: int | None = None,
  interpolation: str = "bilinear",
  skip_damaged: bool = True,
  max_pixels: int = 150_000_000,
  cache: int | None = None,
) -> folder.Folder:
  """Every image below a folder, however it is arranged; none has a label."""
  root = pathlib.Path(path).expanduser()
  if root.exists() and not root.is_dir():
    raise InputError(
      f"{root} is a file; give the folder that holds the styles."
    )
  try:
    if root.exists():
      os.scandir(root).close()
    files = photos.listed(root, None)
  except OSError as error:
    raise InputError(f"{root} cannot be read: {error.strerror}.") from error
  except InputError as error:
    raise InputError(f"styles: {error}") from error
  if cache is None:  # What is drawn anew is not worth keeping.
    cache = 2**28 if crop == "center" else 0
  return folder.Folder(
    root,
    files,
    np.full(len(files), -1, np.int32),
    (),
    decoder=decode.Decoder(
      image_size=image_size,
      resize_to=resize_to,
      interpolation=interpolation,
      crop=crop,
      scale=scale,
      ratio=ratio,
      max_pixels=max_pixels,
    ),
    skip_damaged=skip_damaged,
    cache=cache,
  )


_KINDS: dict[str, Callable[..., sources.Source]] = {
  "generated": _generated,
  "folder": _folder,
}


@typed
def open_styles(
  spec: str,
  *,
  image_size: int,
  data_dir: str | None = None,
  split: str = "train",
  **given: Any,
) -> Any:
  """Opens a source of styles.

  Args:
    spec: "generated"; a folder of images, "folder:<path>" or a path that has a
      "/" or begins with "~" or ".", where every image below counts; or any
      other "kind:name" of `jaxshape.data.sources`, such as "tfds:<name>".
    image_size: Pixels along each side of a style.
    data_dir: What a relative folder starts from, or where prepared data lie.
    split: Of kinds that have splits.
    **given: Of "generated": `count`, how many (256); `families`, some of
      `textures.FAMILIES` (those of training, as the others are held out);
      `seed`; `cache`, bytes of memory. Of a folder: those of `decode.Decoder`;
      `skip_damaged`, whether the next intact image stands in for a damaged one
      (yes); `cache`. Of other kinds: their own. None is as good as nothing.

  Returns:
    A source (`jaxshape.data.sources.Source`).

  Raises:
    InputError: There is no such kind or option; the folder is missing, cannot
      be read or holds no images; or the data hold no images.
  """
  given = {name: value for name, value in given.items() if value is not None}
  kind, _, name = spec.partition(":")
  if "/" in kind or kind[:1] in ("~", "."):
    kind, name = "folder", spec
  if kind == "generated" and name:
    raise InputError(f"generated styles have no variants, got {spec!r}.")
  if kind not in _KINDS:
    if not kind:
      raise InputError(
        "styles must be generated, a folder (folder:<path>, ./<path>) or "
        f"kind:name of other data, got {spec!r}."
      )
    found = sources.load(
      spec, split=split, image_size=image_size, data_dir=data_dir, **given
    )
  elif kind == "generated":
    make = options.bind(
      "styles", _KINDS, kind, {"image_size": image_size, **given}
    )
    found = make()
  else:
    if not name:
      raise InputError("styles from a folder need its path: folder:<path>.")
    place = pathlib.Path(data_dir or "").expanduser()
    make = options.bind(
      "styles", _KINDS, kind, {"image_size": image_size, **given}
    )
    found = make(str(place / pathlib.Path(name).expanduser()))
  if not len(found):
    raise InputError(f"styles {spec!r} hold no examples.")
  first = found[0]
  got = str(np.shape(first["image"])) if "image" in first else "no images"
  if got != str((image_size, image_size, 3)):
    raise InputError(
      f"styles {spec!r} must hold images [{image_size}, {image_size}, 3], got "
      f"{got}."
    )
  return found


class Styled:
  """Every example with styles beside it, as "style", uint8 [count, S, S, 3].

  With a generator (`sample`, so in training) the styles are drawn, all of an
  example different; what the example itself draws comes first, and so is what
  it is without them. Without a generator they follow from the example's number.
  """

  def __init__(
    self, content: sources.Source, styles: sources.Source, *, count: int = 2
  ):
    """Puts two sources together.

    Args:
      content: The examples.
      styles: Where their styles come from.
      count: How many styles an example has, at least 1.

    Raises:
      InputError: There are fewer styles than an example needs.
    """
    if count < 1:
      raise ValueError(f"count must be at least 1, got {count}.")
    if len(styles) < count:
      raise InputError(
        f"styles must be {count} or more, so that an example's differ, got "
        f"{len(styles)}."
      )
    self._content, self._styles, self._count = content, styles, count

  @property
  def classes(self) -> tuple[str, ...]:
    """Those of the examples."""
    return self._content.classes

  @property
  def damaged(self) -> tuple[str, ...]:
    """The damaged files of both that were met so far."""
    both = (self._content, self._styles)
    return sum((getattr(source, "damaged", ()) for source in both), ())

  @property
  def fingerprint(self) -> dict[str, Any]:
    """That of the examples, and that of the styles."""
    return {
      **stream.fingerprint(self._content),
      "styles": {
        **stream.fingerprint(self._styles), "each": self._count
      },
    }  # fmt: skip

  def __len__(self) -> int:
    return len(self._content)

  def __getitem__(self, i: int) -> Example:
    return self._with_styles(self._content[i], np.random.default_rng(i), None)

  def sample(self, i: int, rng: np.random.Generator) -> Example:
    """Example i with styles that are drawn.

    Args:
      i: Its number.
      rng: Draws them.

    Returns:
      What `self[i]` gives, with other styles.
    """
    example = sources.read(self._content, i, rng)
    return self._with_styles(example, rng, rng)

  def _with_styles(
    self,
    example: Example,
    draw: np.random.Generator,
    rng: np.random.Generator | None,
  ) -> Example:
    chosen = draw.choice(len(self._styles), self._count, replace=False)
    images = [sources.read(self._styles, int(j), rng)["image"] for j in chosen]
    return {**example, "style": np.stack(images)}
