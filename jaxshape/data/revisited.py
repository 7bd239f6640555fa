"""Revisited Oxford and Paris from public files, or others in their layout.

A folder holds `gnd_<split>.pkl`, a pickle of a dictionary: `imlist` and
`qimlist`, names of the images of the database and of the queries, and `gnd`,
for each query a dictionary with `easy`, `hard` and `junk`, numbers in `imlist`
from 0 (in older ground truths `ok`, which is taken for easy, and `junk`). It is
read without running anything of it. Beside it lie the descriptors:

  <split>.npy [N, D] and <split>_queries.npy [Q, D], in the order of the lists;
  or <split>.mat, the public features: X [D, N] and Q [D, Q];
  or descriptors.npy and descriptors.txt, as `python -m jaxshape.describe`
  writes them for all images: rows are found by the names of their files.

Any `.npy` may have such a `.txt` and then any order. State which release of the
images descriptors are of: in later ones faces are blurred.

Reference:
  Radenovic et al., "Revisiting Oxford and Paris: Large-Scale Image Retrieval
  Benchmarking", CVPR 2018, Sec. 2-3.
"""

from collections.abc import Mapping, Sequence
import os
import pathlib
from typing import Any

import numpy as np

from jaxshape.data import descriptor_files, plain_pickle, retrieval_examples
from jaxshape.errors import InputError

_WHOLE = "descriptors"
_NONE = np.zeros(0, np.int64)


def open_source(
  name: str = "",
  *,
  split: str,
  data_dir: str | None = None,
  neighbours: int = 64,
  distractors: str = "",
  features: str = "",
  query_features: str = "",
  normalize: bool = True,
  memory: int = 2**30,
) -> retrieval_examples.Queries:
  """Opens a test set with its queries, ground truth and descriptors.

  Args:
    name: The folder, or one that holds folders `<split>`, `datasets/<split>`
      and `features`; `~` is expanded.
    split: Such as "roxford5k" or "rparis6k": what `gnd_<split>.pkl` is called
      by.
    data_dir: What a relative `name` starts from.
    neighbours: How many neighbours a query comes with.
    distractors: A `.npy` [M, D] of images that no query is about, such as R1M,
      stacked below the database; relative to the folder. Empty for none.
    features: A `.npy` or `.mat` of the database, instead of those above.
    query_features: The same of the queries.
    normalize: Whether rows that are not of length 1 are made so; they are
      warned of either way.
    memory: Bytes; a larger database stays in its files.

  Returns:
    A source, whose examples are the queries; its names are those of `qimlist`.

  Raises:
    InputError: Something is missing or does not fit; the message names it.
  """
  root = descriptor_files.folder(name, data_dir, "revisited")
  folders = [root]
  for below in (split, f"datasets/{split}", "features"):
    if (root / below).is_dir():
      folders.append(root / below)
  path = descriptor_files.find(folders, [f"gnd_{split}.pkl"], "ground truth")
  images, queries, truth = _ground_truth(path)
  database = descriptor_files.features(
    folders,
    [split, f"{split}_resnet_rsfm120k_gem", _WHOLE],
    given=features,
    what="descriptors",
  )
  all_rows = descriptor_files.read(database)
  parts = [descriptor_files.ordered(all_rows, images, f"{path}: imlist")]
  asked = _queries(folders, all_rows, split, query_features)
  asked = descriptor_files.ordered(asked, queries, f"{path}: qimlist")
  if distractors:
    given = pathlib.Path(distractors).expanduser()
    parts.append(descriptor_files.read(root / given))
  if asked.rows.shape[1] != parts[0].rows.shape[1]:
    raise InputError(
      f"{asked.path} has descriptors of {asked.rows.shape[1]} numbers, but "
      f"{database} of {parts[0].rows.shape[1]}."
    )
  table = descriptor_files.table
  return retrieval_examples.Queries(
    database=table(parts, normalize=normalize, memory=memory),
    queries=table([asked], normalize=normalize, memory=max(memory, 2**30)),
    truth=truth,
    k=neighbours,
    names=queries,
  )


def images(path: str | os.PathLike[str]) -> list[str]:
  """Names of the database's images in a ground truth, as files.

  Args:
    path: Of `gnd_<name>.pkl`.

  Returns:
    "<name>.jpg", in order.

  Raises:
    InputError: It is no ground truth.
  """
  names, _, _ = _ground_truth(pathlib.Path(path))
  return [f"{name}.jpg" for name in names]


def boxes(
  path: str | os.PathLike[str],
) -> dict[str, tuple[float, float, float, float]]:
  """What is to be cut out of the query images of a ground truth.

  Args:
    path: Of `gnd_<name>.pkl`.

  Returns:
    Left, top, right and bottom by "<name>.jpg", in order.

  Raises:
    InputError: It is no ground truth, or lacks a box.
  """
  path = pathlib.Path(path)
  _, queries, _ = _ground_truth(path)
  entries = plain_pickle.load(path)["gnd"]
  out = {}
  for i, (name, entry) in enumerate(zip(queries, entries, strict=True)):
    box = entry.get("bbx")
    box = box.array() if isinstance(box, plain_pickle.Array) else box
    try:
      left, top, right, bottom = (float(x) for x in box)
    except (TypeError, ValueError) as error:
      raise InputError(
        f"{path}: gnd[{i}] has no bbx of four numbers."
      ) from error
    out[f"{name}.jpg"] = (left, top, right, bottom)
  return out


def _queries(
  folders: Sequence[pathlib.Path],
  database: descriptor_files.Part,
  split: str,
  given: str,
) -> descriptor_files.Part:
  path = database.path
  if not given and path.suffix == ".mat":
    return descriptor_files.read(path, key="Q")
  names = [f"{path.stem}_queries", f"{split}_queries"]
  files = [folder / f"{name}.npy" for folder in folders for name in names]
  # One file of all images, queries among them.
  alone = not given and not any(file.is_file() for file in files)
  if alone and path.with_suffix(".txt").is_file():
    return database
  found = descriptor_files.features(
    folders, names, given=given, what="descriptors of the queries"
  )
  return descriptor_files.read(found, key="Q")


def _ground_truth(
  path: pathlib.Path,
) -> tuple[list[str], list[str], list[retrieval_examples.Truth]]:
  content = plain_pickle.load(path)
  for key in ("imlist", "qimlist", "gnd"):
    if key not in content:
      raise InputError(
        f"{path} has no {key!r}; wanted imlist, qimlist and gnd, it has "
        f"{', '.join(map(repr, list(content)[:12])) or 'nothing'}."
      )
  images = _names(content, "imlist", path)
  queries = _names(content, "qimlist", path)
  entries = content["gnd"]
  if not isinstance(entries, list | tuple):
    raise InputError(
      f"{path}: gnd is a {type(entries).__name__}; wanted a list."
    )
  if len(entries) != len(queries):
    raise InputError(
      f"{path}: gnd has {len(entries)} entries, but qimlist {len(queries)}."
    )
  known: dict[int, np.ndarray] = {}
  truth = [
    _truth(entry, len(images), f"{path}: gnd[{i}]", known)
    for i, entry in enumerate(entries)
  ]
  if not any(len(t.easy) + len(t.hard) for t in truth):
    raise InputError(
      f"{path}: no query has an easy or hard (or ok) image; wanted a ground "
      "truth."
    )
  return images, queries, truth


def _names(
  content: Mapping[Any, Any], key: str, path: pathlib.Path
) -> list[str]:
  try:
    names = plain_pickle.texts(content[key])
  except ValueError as error:
    raise InputError(
      f"{path}: {key} is {error}; wanted a list of names."
    ) from error
  if not names:
    raise InputError(f"{path}: {key} is empty; wanted names of images.")
  return names


def _truth(
  entry: Any, count: int, where: str, known: dict[int, np.ndarray]
) -> retrieval_examples.Truth:
  if type(entry) is not dict:
    raise InputError(
      f"{where} is a {type(entry).__name__}; wanted a dictionary."
    )
  revised = "easy" in entry and "hard" in entry
  if "junk" not in entry or not (revised or "ok" in entry):
    raise InputError(
      f"{where} has {', '.join(map(repr, list(entry)[:12])) or 'nothing'}; "
      "wanted easy, hard and junk, or ok and junk."
    )
  easy, hard, junk = (
    _rows(entry[key], count, f"{where}: {key}", known) if key else _NONE
    for key in (("easy", "hard", "junk") if revised else ("ok", "", "junk"))
  )
  return retrieval_examples.Truth(easy, hard, junk)


def _rows(
  value: Any, count: int, where: str, known: dict[int, np.ndarray]
) -> np.ndarray:
  # A short file may hold one list many times.
  if id(value) in known:
    return known[id(value)]
  try:
    found = plain_pickle.integers(value)
  except ValueError as error:
    raise InputError(
      f"{where} is {error}; wanted numbers of images."
    ) from error
  if found.size and not 0 <= found.min() <= found.max() < count:
    raise InputError(
      f"{where} has the numbers {found.min()}..{found.max()}; wanted numbers "
      f"in imlist, 0..{count - 1}."
    )
  return known.setdefault(id(value), found)
