"""Images in folders, one folder per class: anybody's own data.

Either `<root>/<split>/<class>/...` or `<root>/<class>/...`, with any nesting
below a class; without class folders the images have no labels (-1). Hidden
files and files that are no images are not looked at. Classes and files are
sorted by name, so that the numbers do not depend on the disk that lists them.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent import futures
import contextlib
import difflib
import logging
import os
import pathlib
import threading

import numpy as np

from jaxshape.data import decode
from jaxshape.errors import InputError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
# Folder names that are splits rather than classes if all their siblings are.
SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing")


class Folder(decode.Decoded):
  """The images of one split.

  Attributes:
    classes: Names of the labels, in order; empty if there are none.
    files: Paths below `root`, in the order of the examples.
    labels: One per file, -1 if unknown.
    root: The folder of this split.
  """

  def __init__(
    self,
    root: pathlib.Path,
    files: Sequence[str],
    labels: np.ndarray,
    classes: tuple[str, ...],
    *,
    decoder: decode.Decoder,
    skip_damaged: bool = False,
    cache: int = 0,
    more: Mapping[str, np.ndarray] | None = None,
  ):
    """Keeps what was found.

    Args:
      root: The folder of this split.
      files: Paths below it.
      labels: One per file, int32.
      classes: Names of the labels.
      decoder: Turns a file into pixels.
      skip_damaged: See `open_source`.
      cache: See `open_source`.
      more: What else examples have, by name, one row per file.
    """
    self.root, self.files, self.labels = root, files, labels
    self.classes = classes
    self._more = dict(more or {})
    super().__init__(decoder, cache=cache)
    self._skip_damaged = skip_damaged
    self._damaged: dict[int, str] = {}
    self._lock = threading.Lock()

  def __len__(self) -> int:
    return len(self.files)

  @property
  def damaged(self) -> tuple[str, ...]:
    """The damaged files met so far by this process, in their order."""
    with self._lock:
      return tuple(self.files[i] for i in sorted(self._damaged))

  @property
  def fingerprint(self) -> dict[str, dict[str, str]]:
    """How many files each class has, and a digest of their names."""
    groups: dict[str, list[str]] = {}
    for file in self.files:
      groups.setdefault(_class_folder(file), []).append(file)
    folders = {
      folder: f"{len(files)} files ({decode.digest(files)})"
      for folder, files in groups.items()
    }
    return {"folders": folders}

  def __getstate__(self) -> dict:
    return {k: v for k, v in self.__dict__.items() if k != "_lock"}

  def __setstate__(self, state: dict):
    vars(self).update(state)
    self._lock = threading.Lock()

  def _example(self, i: int, rng: np.random.Generator | None) -> decode.Example:
    n = len(self.files)
    if not 0 <= i < n:
      raise IndexError(f"example must be in 0..{n - 1}, got {i}.")
    if not self._skip_damaged:
      try:
        return self._read(i, rng)
      except decode.DamagedError as error:
        raise decode.DamagedError(
          f"{error} Replace it, or set data.options.skip_damaged=True (for "
          "stimuli and corrupted files that of their own options in bench)."
        ) from error
    drawn = {} if rng is None else rng.bit_generator.state
    for j in (*range(i, n), *range(i)):
      if j in self._damaged:
        continue
      if rng is not None:  # As if nothing damaged had been tried before.
        rng.bit_generator.state = drawn
      try:
        example = self._read(j, rng)
      except decode.DamagedError as error:
        self._note(j, str(error))
        continue
      # The neighbour that stands in counts in training, but evaluation sees
      # each example once.
      return {**example, "mask": np.float32(i == j)}
    raise InputError(f"{self.root}: all {n} images are damaged.")

  def _read(self, i: int, rng: np.random.Generator | None) -> decode.Example:
    return self._cache.get(i, lambda: self._decode(i, rng))

  def _decode(self, i: int, rng: np.random.Generator | None) -> decode.Example:
    path = self.root / self.files[i]
    if not path.is_file():  # A pipe named x.jpg would wait for ever.
      raise InputError(f"{path} is gone or is no regular file.")
    try:
      file = path.open("rb")
    except OSError as error:
      raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    with file:
      image = self._decoder(file, name=str(path), rng=rng)
    more = {name: rows[i] for name, rows in self._more.items()}
    return {"image": image, "label": self.labels[i], **more}

  def _note(self, i: int, message: str) -> None:
    with self._lock:
      if new := i not in self._damaged:
        self._damaged[i] = message
      count = len(self._damaged)
    if new:
      logging.warning("Skipped (%d so far): %s", count, message)


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
) -> Folder:
  """Opens a folder of images.

  Args:
    name: The folder; `~` is expanded.
    split: A folder below it, where there are splits.
    image_size: See `decode.Decoder`, like all options not named here.
    data_dir: What a relative `name` starts from.
    classes: Labels in a fixed order, for data of another domain; folders of
      other names are refused. By default, or if empty, the folders' names,
      sorted.
    skip_damaged: Whether the next intact image stands in for a damaged one,
      which is then listed in `damaged`, instead of an error.
    resize_to: See `decode.Decoder`.
    interpolation: See `decode.Decoder`.
    crop: See `decode.Decoder`.
    scale: See `decode.Decoder`.
    ratio: See `decode.Decoder`.
    max_pixels: See `decode.Decoder`.
    cache: Bytes of memory for decoded images; 0 decodes anew each time.

  Returns:
    A source of "image" and "label"; with `skip_damaged` also "mask", 0 where
    another image stands in.

  Raises:
    InputError: There is no such folder or split, or it holds no images.
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
  with listing():
    root = find_split(find_root(name, data_dir), split)
    files, labels, found = _scan(root, classes)
  return Folder(
    root,
    files,
    labels,
    found,
    decoder=decoder,
    skip_damaged=skip_damaged,
    cache=cache,
  )


def verify(source: Folder, *, threads: int = 8) -> list[str]:
  """Decodes every image of a folder once.

  Args:
    source: What `open_source` gave.
    threads: How many images at a time.

  Returns:
    The damaged files (paths below `source.root`) in their order; what is wrong
    with each is logged.
  """

  def is_damaged(i: int) -> bool:
    try:
      source._decode(i, None)
    except decode.DamagedError as error:
      logging.warning("%s", error)
      return True
    return False

  with futures.ThreadPoolExecutor(threads) as pool:
    flags = pool.map(is_damaged, range(len(source)))
    return [f for f, bad in zip(source.files, flags, strict=True) if bad]


@contextlib.contextmanager
def listing() -> Iterator[None]:
  """Says in one line which folder cannot be listed.

  Raises:
    InputError: The code inside could not list one.
  """
  try:
    yield
  except OSError as error:
    raise InputError(f"{error.filename}: {error.strerror}.") from error


def find_root(
  name: str, data_dir: str | None, *, kind: str = "folder"
) -> pathlib.Path:
  """Finds the folder that a spec names.

  Args:
    name: The folder; `~` is expanded.
    data_dir: What a relative `name` starts from.
    kind: Of the spec, for the error.

  Returns:
    The folder, which exists.

  Raises:
    InputError: There is none.
  """
  if not name:
    raise InputError(f"{kind} needs a path: {kind}:/path/to/images.")
  root = (
    pathlib.Path(data_dir or "").expanduser() / pathlib.Path(name).expanduser()
  )
  if root.is_dir():
    return root
  if root.exists():
    raise InputError(
      f"{root} is a file; give the folder that holds the images."
    )
  parent = root.parent
  while not parent.is_dir():
    parent = parent.parent
  missing = root.relative_to(parent).parts[0]
  there = subfolders(parent)
  near = difflib.get_close_matches(missing, there, cutoff=0.5) or there
  raise InputError(
    f"There is no folder {root}; {parent.absolute()} has "
    f"{some(near) or 'no folders'}."
  )


def find_split(
  root: pathlib.Path, split: str, *, classes: Collection[str] | None = None
) -> pathlib.Path:
  """Finds the folder of the classes, which `split` may or may not name.

  Args:
    root: What `find_root` gave.
    split: A folder below it, where there are splits.
    classes: What class folders are called, where that is known: then others
      that hold folders are splits. By default only `SPLITS` are.

  Returns:
    The folder of the split, or `root` where there are no splits.

  Raises:
    InputError: There are splits, and this is none of them.
  """
  children = subfolders(root)
  # A class may be called "train", too: then it has siblings that are no splits
  # and no folders of its own.
  only_splits = bool(children) and all(c.lower() in SPLITS for c in children)
  if split in children and (only_splits or subfolders(root / split)):
    return root / split

  def is_split(child: str) -> bool:
    named = child.lower() in SPLITS if classes is None else child not in classes
    return only_splits or (named and bool(subfolders(root / child)))

  if splits := [child for child in children if is_split(child)]:
    raise InputError(
      f"{root} has no split {split!r}{near(split, splits)}; there are: "
      f"{some(splits)}."
    )
  if not split.startswith("train"):
    logging.warning(
      "%s has no splits (%s); all its images serve as %r, in training too.",
      root,
      " ".join(SPLITS),
      split,
    )
  return root


def class_folders(root: pathlib.Path) -> list[str]:
  """Lists the class folders in a folder, and warns of images beside them.

  Args:
    root: The folder.

  Returns:
    Their names, sorted, at least one.

  Raises:
    InputError: There are none.
  """
  folders, loose = subfolders(root), _loose(root)
  if not folders:
    holds = f"{len(loose)} images and " if loose else ""
    raise InputError(
      f"{root} holds {holds}no class folders; for images without labels use "
      "folder:<path>."
    )
  if loose:
    logging.warning(
      "%s: %d images beside the class folders are not used (%s).",
      root,
      len(loose),
      some(loose),
    )
  return folders


def number(
  where: pathlib.Path,
  folders: Sequence[str],
  known: Mapping[str, int],
  *,
  what: str = "in classes",
) -> dict[str, int]:
  """Looks up the labels of class folders.

  Args:
    where: What holds them, for the error.
    folders: Their names.
    known: Labels by name.
    what: What the names must be, for the error.

  Returns:
    Labels by path below `where`.

  Raises:
    InputError: A folder has no label.
  """
  if unknown := [folder for folder in folders if folder not in known]:
    raise InputError(
      f"{where} has folders that are not {what}: {some(unknown)}"
      f"{near(unknown[0], known)}."
    )
  return {folder: known[folder] for folder in folders}


def number_parts(
  root: pathlib.Path,
  parts: Sequence[str],
  known: Mapping[str, int] | None,
  *,
  what: str = "in classes",
) -> dict[str, dict[str, int]]:
  """Looks up the labels of folders that each hold the same class folders.

  Args:
    root: What holds the parts.
    parts: Paths below it, at least one.
    known: Labels by name; a part may lack some of them. By default the names
      that are in every part, sorted.
    what: What the names must be, for the error.

  Returns:
    For each part, labels by name.

  Raises:
    InputError: A folder has no label, or is not in every part.
  """
  found = {part: class_folders(root / part) for part in parts}
  first = parts[0]
  for part, folders in found.items():
    differ = sorted(set(folders) ^ set(found[first]))
    if differ and known is None:
      raise InputError(
        f"{root / part} has other class folders than {root / first}, in one "
        f"only: {some(differ)}{near(differ[0], found[first])}; make them the "
        "same, or name all with data.options.classes."
      )
  labels = known or by_name(found[first])
  return {
    part: number(root / part, folders, labels, what=what)
    for part, folders in found.items()
  }


def by_name(classes: Sequence[str]) -> dict[str, int]:
  """The labels of classes, refused if two are called alike."""
  labels = {name: i for i, name in enumerate(classes)}
  if len(labels) < len(classes):
    twice = next(name for i, name in enumerate(classes) if labels[name] != i)
    raise InputError(f"classes must be unique, got {twice!r} twice.")
  return labels


def find_images(
  root: pathlib.Path, folders: Mapping[str, int]
) -> tuple[list[str], np.ndarray]:
  """Lists the images of class folders.

  Args:
    root: What paths start from.
    folders: Labels by path below `root`.

  Returns:
    Paths below `root`, folder by folder, each sorted; and their labels, int32.

  Raises:
    InputError: A folder has no images.
  """
  files, labels = [], []
  for folder, label in folders.items():
    images = _images(root, folder)
    if not images:
      raise InputError(
        f"The class folder {root / folder} has no images "
        f"({' '.join(EXTENSIONS)}); fill or remove it."
      )
    files += images
    labels += [label] * len(images)
  return files, np.asarray(labels, np.int32)


def subfolders(root: pathlib.Path) -> list[str]:
  """The names of the folders in a folder that are not hidden, sorted."""
  return sorted(
    e.name for e in os.scandir(root) if e.is_dir() and e.name[0] != "."
  )


def some(names: Sequence[str], count: int = 8) -> str:
  """The first of some names, and how many there are."""
  more = f", ... ({len(names)} in all)" if len(names) > count else ""
  return ", ".join(names[:count]) + more


def near(name: str, known: Collection[str]) -> str:
  """A question whether another name was meant, if one is alike."""
  alike = difflib.get_close_matches(name, known, n=1)
  return f" (did you mean {alike[0]}?)" if alike and alike[0] != name else ""


def _scan(
  root: pathlib.Path, classes: Sequence[str] | None
) -> tuple[list[str], np.ndarray, tuple[str, ...]]:
  if not subfolders(root):
    loose = _loose(root)
    if not loose:
      raise InputError(
        f"{root} holds neither class folders nor images "
        f"({' '.join(EXTENSIONS)})."
      )
    return loose, np.full(len(loose), -1, np.int32), tuple(classes or ())
  folders = class_folders(root)
  order = tuple(classes or folders)
  return *find_images(root, number(root, folders, by_name(order))), order


def _loose(root: pathlib.Path) -> list[str]:
  return sorted(
    e.name for e in os.scandir(root) if _is_image(e.name) and not e.is_dir()
  )


def _class_folder(file: str) -> str:
  folder, slash, _ = file.partition("/")
  return folder if slash else "."


def _images(root: pathlib.Path, folder: str) -> list[str]:
  found, seen = [], set()

  def refuse(error: OSError) -> None:
    raise error

  walk = os.walk(root / folder, onerror=refuse, followlinks=True)
  for parent, below, names in walk:
    status = os.stat(parent)
    if (status.st_dev, status.st_ino) in seen:  # A link back to itself.
      below.clear()
      continue
    seen.add((status.st_dev, status.st_ino))
    below[:] = sorted(name for name in below if not name.startswith("."))
    place = pathlib.Path(parent).relative_to(root).as_posix()
    found += [f"{place}/{name}" for name in names if _is_image(name)]
  return sorted(found)


def _is_image(name: str) -> bool:
  return name[0] != "." and os.path.splitext(name)[1].lower() in EXTENSIONS
