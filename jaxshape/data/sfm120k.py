"""Retrieval-SfM-120k or -30k from its public pickle, and descriptors of it.

A folder holds `retrieval-SfM-120k.pkl` (or another `.pkl` of that layout): a
dictionary with "train" and "val", each a dictionary of `cids`, names of the
images; `cluster`, the 3D model that each belongs to; `qidxs` and `pidxs`, pairs
of a query and an image that shows the same, as numbers in `cids`. It is read
without running anything of it. Beside it lie the descriptors of its images:

  train.npy and val.npy (or valid.npy), [N, D], in the order of `cids`;
  or one file, retrieval-SfM-120k.npy, of "train" and below it of "val";
  or descriptors.npy and descriptors.txt, as `python -m jaxshape.describe`
  writes them: rows are found by the names of their files.

The queries of a split are the different `qidxs`. What counts as relevant to one
is its 3D model, as other models are what negatives are taken from; what is
drawn as a positive are its pairs, which are known to overlap.

Reference:
  Radenovic et al., "Fine-tuning CNN Image Retrieval with No Human Annotation",
  TPAMI 2019, Sec. 4 (the pairs).
"""

from collections.abc import Mapping
import pathlib
from typing import Any, NamedTuple

import numpy as np

from jaxshape.data import descriptor_files, plain_pickle, retrieval_examples
from jaxshape.errors import InputError

_ALIASES = {"valid": "val", "validation": "val"}
_PICKLES = ("retrieval-SfM-120k.pkl", "retrieval-SfM-30k.pkl")
POSITIVES = ("pairs", "cluster")


class _Pairs(NamedTuple):
  """A split: names and models of images, and rows of the pairs' two ends."""

  images: list[str]
  clusters: np.ndarray | None
  queries: np.ndarray
  positives: np.ndarray


def open_source(
  name: str = "",
  *,
  split: str,
  data_dir: str | None = None,
  neighbours: int = 64,
  positives: str = "pairs",
  pairs: str = "",
  features: str = "",
  normalize: bool = True,
  memory: int = 2**30,
) -> retrieval_examples.Queries:
  """Opens a split with its pairs and descriptors.

  Args:
    name: The folder; `~` is expanded.
    split: "train", or "valid" or "val", or another key of the pickle. Of a
      pickle that holds one table alone, such as that for whitening, any name.
    data_dir: What a relative `name` starts from.
    neighbours: How many neighbours a query comes with.
    positives: What a "positive" is drawn from: "pairs", or "cluster", all
      images of the query's model.
    pairs: The pickle; needed where the folder has several.
    features: A `.npy` or `.mat` of the descriptors, instead of those above.
    normalize: Whether rows that are not of length 1 are made so; they are
      warned of either way.
    memory: Bytes; more descriptors stay in their file.

  Returns:
    A source, whose examples are the queries, which are rows of its database.

  Raises:
    InputError: Something is missing or does not fit; the message names it.
  """
  if positives not in POSITIVES:
    raise InputError(
      f"positives must be one of {', '.join(POSITIVES)}, got {positives!r}."
    )
  root = descriptor_files.folder(name, data_dir, "sfm120k")
  path = _pickle(root, pairs)
  content = plain_pickle.load(path)
  split = _ALIASES.get(split, split)
  found = _split(content, split, path)
  names = [split, *(k for k, v in _ALIASES.items() if v == split)]
  file = descriptor_files.features(
    [root, root / "features"],
    [*names, path.stem, "descriptors"],
    given=features,
    what="descriptors",
  )
  part = _ordered(
    descriptor_files.read(file), content, found.images, split, path
  )
  return _queries(
    descriptor_files.table([part], normalize=normalize, memory=memory),
    found,
    k=neighbours,
    by_cluster=positives == "cluster",
  )


def _pickle(root: pathlib.Path, given: str) -> pathlib.Path:
  if given:
    return root / pathlib.Path(given).expanduser()
  for name in _PICKLES:
    if (root / name).is_file():
      return root / name
  there = sorted(
    p.name for p in root.glob("*.pkl") if not p.stem.startswith("gnd_")
  )
  if len(there) > 1:
    raise InputError(
      f"{root} has several pickles, {', '.join(there[:8])}; name one by the "
      "option pairs."
    )
  return descriptor_files.find([root], there or _PICKLES, "pickle of pairs")


def _split(
  content: Mapping[Any, Any], split: str, path: pathlib.Path
) -> _Pairs:
  """One split of the pickle, checked."""
  tables = {k: v for k, v in content.items() if type(v) is dict}
  if "cids" in content:
    table, where = content, f"{path}"
  elif split in tables:
    table, where = tables[split], f"{path}: {split}"
  else:
    raise InputError(
      f"{path} has no split {split!r}; it has "
      f"{', '.join(map(str, tables)) or 'none'}."
    )
  lacking = [key for key in ("cids", "qidxs", "pidxs") if key not in table]
  if lacking:
    raise InputError(
      f"{where} lacks {', '.join(lacking)}; wanted cids, cluster, qidxs and "
      f"pidxs, it has {', '.join(map(repr, list(table)[:12])) or 'nothing'}."
    )
  images = _images(table, where)
  clusters = None
  if table.get("cluster") is not None:
    clusters = _integers(table, "cluster", where)
    if len(clusters) != len(images):
      raise InputError(
        f"{where}: cluster has {len(clusters)} entries, but cids {len(images)}."
      )
    clusters = np.unique(clusters, return_inverse=True)[1].astype(np.int32)
  ends = [_integers(table, key, where) for key in ("qidxs", "pidxs")]
  if len(ends[0]) != len(ends[1]) or not len(ends[0]):
    raise InputError(
      f"{where}: qidxs has {len(ends[0])} entries and pidxs {len(ends[1])}; "
      "wanted pairs, at least one."
    )
  for key, rows in zip(("qidxs", "pidxs"), ends, strict=True):
    if not 0 <= rows.min() <= rows.max() < len(images):
      raise InputError(
        f"{where}: {key} has the numbers {rows.min()}..{rows.max()}; wanted "
        f"numbers in cids, 0..{len(images) - 1}."
      )
  if np.array_equal(ends[0], ends[1]):
    raise InputError(f"{where}: qidxs and pidxs have no pair of two images.")
  return _Pairs(images, clusters, *ends)


def _images(table: Mapping[Any, Any], where: str) -> list[str]:
  try:
    images = plain_pickle.texts(table["cids"])
  except ValueError as error:
    raise InputError(
      f"{where}: cids is {error}; wanted a list of names."
    ) from error
  if not images:
    raise InputError(f"{where}: cids is empty; wanted names of images.")
  return images


def _integers(table: Mapping[Any, Any], key: str, where: str) -> np.ndarray:
  try:
    return plain_pickle.integers(table[key])
  except ValueError as error:
    raise InputError(
      f"{where}: {key} is {error}; wanted whole numbers."
    ) from error


def _ordered(
  part: descriptor_files.Part,
  content: Mapping[Any, Any],
  images: list[str],
  split: str,
  path: pathlib.Path,
) -> descriptor_files.Part:
  """Rows of the split's images, of a file of them or of all splits."""
  where = f"{path}: cids of {split}"
  if len(part.rows) == len(images) or descriptor_files.names_of(part):
    return descriptor_files.ordered(part, images, where)
  counts = {
    key: len(_images(content[key], f"{path}: {key}"))
    for key in ("train", "val")
    if type(content.get(key)) is dict and "cids" in content[key]
  }
  if split in counts and len(part.rows) == sum(counts.values()):
    start = counts["train"] if split == "val" and "train" in counts else 0
    return part._replace(order=np.arange(start, start + len(images)))
  return descriptor_files.ordered(part, images, where)


def _queries(
  database: np.ndarray, pairs: _Pairs, *, k: int, by_cluster: bool
) -> retrieval_examples.Queries:
  n = len(pairs.images)
  once = np.unique(pairs.queries * n + pairs.positives)
  once = once[once // n != once % n]  # No image is an answer to itself.
  rows, starts = np.unique(once // n, return_index=True)
  positives = np.split(once % n, starts[1:])
  truth = None
  if pairs.clusters is None:
    none = np.zeros(0, np.int64)
    truth = [
      retrieval_examples.Truth(found, none, rows[i : i + 1])
      for i, found in enumerate(positives)
    ]
  return retrieval_examples.Queries(
    database=database,
    query_rows=rows,
    truth=truth,
    clusters=pairs.clusters,
    positives=None if by_cluster else positives,
    k=k,
    names=[pairs.images[row] for row in rows],
  )
