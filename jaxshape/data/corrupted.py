"""Published corrupted pictures, by corruption and severity.

Pictures in folders, `<root>/<corruption>/<severity>/<class>/...` (ImageNet-C,
Tiny-ImageNet-C), maybe with the published groups between, `<root>/<group>/
<corruption>/...`; or arrays, `<root>/<corruption>.npy`, uint8 [5 N, height,
width, 3], beside `labels.npy`, [5 N] (CIFAR-10-C, CIFAR-100-C): severity s is
the rows from (s - 1) N up to s N.

Reference:
  Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common
  Corruptions and Perturbations", ICLR 2019.
"""

from collections.abc import Sequence
import pathlib
import re

import numpy as np
from PIL import Image

from jaxshape.data import decode, folder, imagenet
from jaxshape.errors import InputError, few

SEVERITIES = 5  # In an array.
CIFAR10 = (
  "airplane", "automobile", "bird", "cat", "deer",
  "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
_LABELS = "labels.npy"
_SEVERITY = re.compile(r"[1-9][0-9]?")
Case = tuple[str, int]


class Folders(folder.Folder):
  """Pictures in folders.

  Attributes:
    cases: Corruptions and severities, in order; of all, also "corruption" in
      the examples numbers them.
  """

  cases: tuple[Case, ...] = ()


class Arrays(decode.Decoded):
  """Pictures in arrays, which are mapped into memory, not read.

  Attributes:
    cases: As those of `Folders`.
    classes: Names of the labels, in order.
    root: The folder of the arrays.
  """

  def __init__(
    self,
    root: pathlib.Path,
    cases: Sequence[Case],
    labels: np.ndarray,
    classes: tuple[str, ...],
    *,
    decoder: decode.Decoder,
    numbered: bool,
    cache: int = 0,
  ):
    """Maps the arrays.

    Args:
      root: The folder of the arrays.
      cases: Corruptions and severities.
      labels: Of all rows of an array, int32.
      classes: Names of the labels.
      decoder: Resizes and cuts.
      numbered: Whether the examples have "corruption".
      cache: Bytes of memory for finished images.

    Raises:
      InputError: An array is of another shape or type.
    """
    super().__init__(decoder, cache=cache)
    self.root, self.cases, self.classes = root, tuple(cases), classes
    self._labels, self._numbered = labels, numbered
    self._open()

  def __len__(self) -> int:
    return len(self.cases) * self._per_case

  @property
  def fingerprint(self) -> dict[str, dict[str, str]]:
    """The shape of each array, and a digest of the labels."""
    labels = decode.digest(map(str, self._labels.tolist()))
    shapes = {name: str(a.shape) for name, a in self._arrays.items()}
    return {"arrays": {**shapes, _LABELS: labels}}

  # A map sent to another process would be sent with all it holds.
  def __getstate__(self) -> dict:
    return {k: v for k, v in self.__dict__.items() if k != "_arrays"}

  def __setstate__(self, state: dict):
    vars(self).update(state)
    self._open()

  @property
  def _per_case(self) -> int:
    return len(self._labels) // SEVERITIES

  def _open(self) -> None:
    names = dict.fromkeys(name for name, _ in self.cases)
    self._arrays = {
      name: _images(self.root / f"{name}.npy", len(self._labels))
      for name in names
    }

  def _example(self, i: int, rng: np.random.Generator | None) -> decode.Example:
    if not 0 <= i < len(self):
      raise IndexError(f"example must be in 0..{len(self) - 1}, got {i}.")
    return self._cache.get(i, lambda: self._decode(i, rng))

  def _decode(self, i: int, rng: np.random.Generator | None) -> decode.Example:
    case, row = divmod(i, self._per_case)
    name, severity = self.cases[case]
    row += (severity - 1) * self._per_case
    picture = Image.fromarray(np.array(self._arrays[name][row]))
    where = f"{self.root / name}.npy, row {row},"
    example = {
      "image": self._decoder(picture, name=where, rng=rng),
      "label": self._labels[row],
    }
    return example | ({"corruption": np.int32(case)} if self._numbered else {})


def list_cases(name: str, *, data_dir: str | None = None) -> tuple[Case, ...]:
  """Lists what there is to evaluate on, without a look at the pictures.

  Args:
    name: The folder; `~` is expanded.
    data_dir: What a relative `name` starts from.

  Returns:
    Corruptions and severities, sorted; "<corruption>/<severity>" is a split.

  Raises:
    InputError: There is no such folder, or it has another layout.
  """
  with folder.listing():
    root = folder.find_root(name, data_dir, kind="corrupted")
    return tuple(_in_arrays(root) or _in_folders(root))


def open_source(
  name: str,
  *,
  split: str,
  image_size: int,
  data_dir: str | None = None,
  classes: Sequence[str] | None = None,
  wordnet: bool = False,
  skip_damaged: bool = False,
  resize_to: int | None = None,
  interpolation: str = "bilinear",
  crop: str = "center",
  scale: tuple[float, float] = (0.08, 1.0),
  ratio: tuple[float, float] = (3 / 4, 4 / 3),
  max_pixels: int = 50_000_000,
  cache: int = 0,
) -> Folders | Arrays:
  """Opens one case, or all.

  Args:
    name: The folder; `~` is expanded.
    split: "<corruption>/<severity>", such as "fog/3"; or "all".
    image_size: See `decode.Decoder`, like all options not named here.
    data_dir: What a relative `name` starts from.
    classes: Labels in a fixed order; folders of other names are refused. By
      default, or if empty, the folders' names, sorted, the same in all cases;
      for arrays the classes of CIFAR-10, or the numbers if there are more.
    wordnet: Whether folders are called by WordNet ids and labels are those of
      ImageNet's 1,000 classes.
    skip_damaged: See `folder.open_source`; arrays have no damaged images.
    resize_to: See `decode.Decoder`; `image_size` by default, since the
      published pictures are already cut.
    interpolation: See `decode.Decoder`.
    crop: See `decode.Decoder`.
    scale: See `decode.Decoder`.
    ratio: See `decode.Decoder`.
    max_pixels: See `decode.Decoder`.
    cache: Bytes of memory for decoded images; 0 decodes anew each time.

  Returns:
    A source of "image" and "label", and of all cases also "corruption", int32,
    the number of the case; with `skip_damaged`, of folders, also "mask", 0
    where another image stands in.

  Raises:
    InputError: There is no such folder or case, a class folder is not known, or
      an array is of another shape or type.
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
  if wordnet and classes:
    raise InputError("classes and wordnet=True both name the labels; give one.")
  with folder.listing():
    root = folder.find_root(name, data_dir, kind="corrupted")
    arrays = _in_arrays(root)
    below = {} if arrays else _in_folders(root)
    cases = _chosen(root, split, arrays or list(below))
    if arrays:
      if wordnet:
        raise InputError(f"{root} holds arrays; wordnet=True is for folders.")
      labels, order = _labels(root / _LABELS, classes)
      return Arrays(
        root,
        cases,
        labels,
        order,
        decoder=decoder,
        numbered=split == "all",
        cache=cache,
      )
    known = folder.by_name(classes) if classes else None
    what = "in classes"
    if wordnet:
      known, what = imagenet.labels(), imagenet.WHAT
    paths = [below[case] for case in cases]
    # Where nothing else fixes the labels, all cases must have the same classes.
    compared = paths if known else list(below.values())
    numbers = folder.number_parts(root, compared, known, what=what)
    listed = [
      folder.find_images(root, {f"{p}/{c}": i for c, i in numbers[p].items()})
      for p in paths
    ]
  counts = [len(files) for files, _ in listed]
  number = np.repeat(np.arange(len(cases), dtype=np.int32), counts)
  order = tuple(classes or next(iter(numbers.values())))
  source = Folders(
    root,
    [file for files, _ in listed for file in files],
    np.concatenate([labels for _, labels in listed]),
    imagenet.classes() if wordnet else order,
    decoder=decoder,
    skip_damaged=skip_damaged,
    cache=cache,
    more={"corruption": number} if split == "all" else None,
  )
  source.cases = tuple(cases)
  return source


def _chosen(
  root: pathlib.Path, split: str, cases: Sequence[Case]
) -> Sequence[Case]:
  if split == "all":
    return cases
  splits = {f"{name}/{severity}": (name, severity) for name, severity in cases}
  if split not in splits:
    raise InputError(
      f"{root} has no split {split!r}{folder.near(split, splits)}; there are: "
      f"all, {folder.some(list(splits))}."
    )
  return [splits[split]]


def _in_folders(root: pathlib.Path) -> dict[Case, str]:
  """Where each case lies below the root, the cases sorted."""
  found: dict[str, tuple[str, list[str]]] = {}
  for child in folder.subfolders(root):
    below = folder.subfolders(root / child)
    group = not any(map(_SEVERITY.fullmatch, below))
    for name, path in (
      [(b, f"{child}/{b}") for b in below] if group else [(child, child)]
    ):
      levels = _levels(root / path)
      if name in found:
        raise InputError(
          f"{root} has the corruption {name} twice: {found[name][0]} and "
          f"{path}."
        )
      found[name] = path, levels
  if not found:
    raise InputError(
      f"{root} holds neither <corruption>/<severity>/<class>/... nor "
      f"<corruption>.npy and {_LABELS}."
    )
  return {
    (name, int(level)): f"{path}/{level}"
    for name, (path, levels) in sorted(found.items())
    for level in levels
  }


def _levels(path: pathlib.Path) -> list[str]:
  """The folders of the severities, in order."""
  levels = folder.subfolders(path)
  wrong = [name for name in levels if not _SEVERITY.fullmatch(name)]
  if wrong or not levels:
    raise InputError(
      f"{path} must hold one folder per severity (1, 2, ...), got "
      f"{few(wrong) or 'none'}; a corrupted picture is "
      "<corruption>/<severity>/<class>/..."
    )
  return sorted(levels, key=int)


def _in_arrays(root: pathlib.Path) -> list[Case]:
  names = sorted(path.stem for path in root.glob("*.npy"))
  if not names:
    return []
  if not (root / _LABELS).is_file():
    raise InputError(f"{root} holds {few(names)} as .npy, but no {_LABELS}.")
  names.remove(pathlib.Path(_LABELS).stem)
  if not names:
    raise InputError(f"{root} holds {_LABELS}, but no <corruption>.npy.")
  return [(name, s + 1) for name in names for s in range(SEVERITIES)]


def _labels(
  path: pathlib.Path, classes: Sequence[str] | None
) -> tuple[np.ndarray, tuple[str, ...]]:
  labels = _mapped(path)
  if labels.ndim != 1 or labels.dtype.kind not in "iu" or not labels.size:
    raise InputError(
      f"{path} must hold one whole number per image, got {_form(labels)}."
    )
  if len(labels) % SEVERITIES:
    raise InputError(
      f"{path} must hold as many labels for each of {SEVERITIES} severities, "
      f"got {len(labels)}."
    )
  low, high = int(labels.min()), int(labels.max())
  order = tuple(classes or ())
  if order:
    folder.by_name(order)
  else:
    many = high >= len(CIFAR10)
    order = tuple(map(str, range(min(high, 9999) + 1))) if many else CIFAR10
  if low < 0 or high >= len(order):
    raise InputError(
      f"{path} must hold labels within 0..{len(order) - 1}, got {low}..{high}."
    )
  return np.asarray(labels, np.int32), order


def _images(path: pathlib.Path, count: int) -> np.ndarray:
  images = _mapped(path)
  form = (count, *images.shape[1:3], 3)
  if images.dtype != np.uint8 or images.shape != form or not images.size:
    raise InputError(
      f"{path} must hold uint8 [{count}, height, width, 3], as many images as "
      f"{_LABELS} has labels, got {_form(images)}."
    )
  return images


def _form(array: np.ndarray) -> str:
  return f"{array.dtype} [{', '.join(map(str, array.shape))}]"


def _mapped(path: pathlib.Path) -> np.ndarray:
  if not path.is_file():  # A pipe would wait for ever.
    raise InputError(f"{path} is gone or is no regular file.")
  try:
    # Unlike np.load, it opens nothing but arrays.
    return np.lib.format.open_memmap(path, mode="r")
  except OSError as error:
    raise InputError(f"{path} cannot be read: {error.strerror}.") from error
  # What NumPy lets out for files that are damaged, empty or full of objects.
  except Exception as error:
    words = " ".join(str(error).split()) or type(error).__name__
    raise InputError(
      f"{path} is no intact array of numbers: {words.rstrip('.')}."
    ) from error
