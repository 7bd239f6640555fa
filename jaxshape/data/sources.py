"""What a data set is here, how one is named, and views of it.

A spec is "kind:name": the kind is a module of this package that has a function
`open_source`, the name is whatever that function understands. A path alone
means a folder of images.
"""

import abc
from collections.abc import Callable, Sequence
import difflib
import importlib
import importlib.util
import inspect
import pathlib
import pkgutil
import re
from typing import Any, Protocol

import numpy as np

from jaxshape.errors import InputError

Example = dict[str, Any]  # Arrays and NumPy scalars.
Sample = Callable[[int, np.random.Generator], Example]


class Source(Protocol):
  """Examples by number, read from several threads, sent to other processes.

  A source may also have `sample(i, rng)`, an example with something drawn (a
  random box at full resolution), used in training; it is a pure function of its
  arguments. An attribute `sample` that is None says that nothing is drawn. A
  `fingerprint`, a mapping that JSON can say, tells its examples from others, so
  that a run does not go on with other data.
  """

  @property
  def classes(self) -> tuple[str, ...]:
    """Names of the labels, in order; empty if unlabelled."""
    ...

  def __len__(self) -> int:
    """How many examples there are."""
    ...

  def __getitem__(self, i: int) -> Example:
    """One example.

    Args:
      i: Its number, from 0.

    Returns:
      Of images "image", uint8 [H, W, 3], and "label", an int32, -1 if unknown;
      maybe more. Other kinds have other keys, such as the "points" of
      `lidar_examples`. Every key has the same shape in all examples.
    """
    ...


def load(
  spec: str,
  *,
  split: str,
  image_size: int | None = None,
  data_dir: str | None = None,
  **options: object,
) -> Source:
  """Opens the data set that a spec names.

  Args:
    spec: "kind:name", for example "tfds:imagenet2012" or "folder:~/photos";
      a path alone is a folder. The kind may be the full name of a module
      outside the package (one with a dot in it).
    split: Such as "train".
    image_size: Height and width of the images; kinds that hold no images do
      not look at it.
    data_dir: Where prepared data lie, if not in the kind's usual place.
    **options: What else the kind's `open_source` takes.

  Returns:
    The source.

  Raises:
    InputError: There is no such kind, option, data set or split, or the kind
      needs an `image_size`.
  """
  if not isinstance(spec, str) or not spec:
    raise InputError(
      f"data must be 'kind:name' or a path, got {spec!r}; the kinds are: "
      + ", ".join(kinds())
    )
  kind, _, name = spec.partition(":")
  if "/" in kind or kind[:1] in ("~", "."):
    kind, name = "folder", spec
  open_source = _opener(kind, spec)
  parameters = {
    p.name: p
    for p in inspect.signature(open_source).parameters.values()
    if p.kind is p.KEYWORD_ONLY
  }
  accepted = [
    name
    for name in parameters
    if name not in ("split", "image_size", "data_dir")
  ]
  for option in options:
    if option not in accepted:
      near = difflib.get_close_matches(option, accepted, n=1)
      hint = f" (did you mean {near[0]}?)" if near else ""
      raise InputError(
        f"data {kind!r} has no option {option!r}{hint}; there are: "
        + ", ".join(accepted)
      )
  size = parameters.get("image_size")
  if size is not None and image_size is not None:
    options["image_size"] = image_size
  elif size is not None and size.default is size.empty:
    raise InputError(f"data {kind!r} holds images and needs an image_size.")
  return open_source(name, split=split, data_dir=data_dir, **options)


def kinds() -> list[str]:
  """The kinds of data that exist, in alphabetical order."""
  package = importlib.import_module("jaxshape.data")
  return sorted(
    m.name for m in pkgutil.iter_modules(package.__path__) if _opens(m.name)
  )


def _opens(name: str) -> bool:
  # Read, not imported: a kind may need a library that is not installed.
  spec = importlib.util.find_spec(f"jaxshape.data.{name}")
  if spec is None or not spec.origin:
    return False
  text = pathlib.Path(spec.origin).read_text(encoding="utf-8")
  return re.search(r"^def open_source\(", text, re.MULTILINE) is not None


def _opener(kind: str, spec: str) -> Callable[..., Source]:
  module = kind if "." in kind else f"jaxshape.data.{kind}"
  unknown = InputError(
    f"data {spec!r} is of no known kind; write kind:name or a path such as "
    f"./photos; the kinds are: {', '.join(kinds())}"
  )
  try:
    if not kind or importlib.util.find_spec(module) is None:
      raise unknown
    found = importlib.import_module(module)
  except ModuleNotFoundError as error:
    if error.name and f"{module}.".startswith(f"{error.name}."):
      raise unknown from error
    raise InputError(
      f"data {kind!r} needs {error.name}: pip install 'jaxshape[train]'."
    ) from error
  if not hasattr(found, "open_source"):
    raise unknown
  return found.open_source


def read(
  source: Source, i: int, rng: np.random.Generator | None = None
) -> Example:
  """One example, drawn if there is a generator and the source can draw."""
  sample = getattr(source, "sample", None)
  return source[i] if rng is None or sample is None else sample(i, rng)


class _View(abc.ABC):
  """Examples of a source, in another order or number."""

  def __init__(self, source: Source):
    self.source = source

  @property
  def classes(self) -> tuple[str, ...]:
    return self.source.classes

  @property
  def damaged(self) -> tuple[str, ...]:
    """The damaged files that the source has met so far."""
    return getattr(self.source, "damaged", ())

  @property
  def sample(self) -> Sample | None:
    """Gives example i with something drawn, if the source draws."""
    draws = getattr(self.source, "sample", None) is not None
    return self._example if draws else None

  @abc.abstractmethod
  def __len__(self) -> int: ...

  def __getitem__(self, i: int) -> Example:
    return self._example(i, None)

  @abc.abstractmethod
  def _example(self, i: int, rng: np.random.Generator | None) -> Example: ...


class Doubled(_View):
  """Every example twice, the second time marked to be filtered.

  Example j is `source[j % N]` with "filtered", a float32 that is 1 for j >= N:
  the union of the originals and their filtered copies, shuffled as one epoch.
  The filter itself runs on the device.
  """

  def __len__(self) -> int:
    return 2 * len(self.source)

  def _example(self, i: int, rng: np.random.Generator | None) -> Example:
    n = len(self.source)
    _check_index(i, 2 * n)
    example = read(self.source, i % n, rng)
    return {**example, "filtered": np.float32(i >= n)}


class Subset(_View):
  """The examples with the given numbers, in the given order."""

  def __init__(self, source: Source, indices: Sequence[int] | np.ndarray):
    super().__init__(source)
    self.indices = np.asarray(indices, np.int64)
    n, wrong = len(source), self.indices
    wrong = wrong[(wrong < 0) | (wrong >= n)]
    if wrong.size:
      raise ValueError(f"indices must be in 0..{n - 1}, got {wrong[0]}.")

  def __len__(self) -> int:
    return len(self.indices)

  def _example(self, i: int, rng: np.random.Generator | None) -> Example:
    _check_index(i, len(self))
    return read(self.source, int(self.indices[i]), rng)


def _check_index(i: int, n: int) -> None:
  if not 0 <= i < n:
    raise IndexError(f"example must be in 0..{n - 1}, got {i}.")
