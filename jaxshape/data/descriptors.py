"""Descriptors of one's own: a `.npy` per split, and labels if there are any.

A folder holds, for a split such as "train":

  train.npy           descriptors of the database, [N, D], one row per image
  train_queries.npy   those of the queries, [Q, D]; without it rows of the
                      database are the queries
  train.txt, train_queries.txt
                      names of the images, one per line (may be left out), as
                      `python -m jaxshape.describe` writes them
and what the rows show, in one of these forms, or in none of them for data that
are only searched:

  train_labels.txt    one label per line; also train_queries_labels.txt
  train.csv           a table with a column "label" and one line per row; also
                      train_queries.csv
  train.json          {"labels": [one per row], "query_labels": [one per query],
                      "query_rows": [the rows that are queries], "relevant":
                      [[rows], one list per query], "hard": [...], "junk":
                      [...]}, of which all may be left out; a list alone is
                      "labels", or "relevant" if it holds lists

A label is any text or number. Rows without one (nothing, "-", -1 or null) are
distractors. Nothing that a file holds is executed.

Source: the formats are ours; "hard" and "junk" are those of `revisited`.
"""

from collections.abc import Mapping, Sequence
import csv
import json
import logging
import pathlib
from typing import Any

import numpy as np

from jaxshape.data import descriptor_files, retrieval_examples
from jaxshape.errors import InputError

_KEYS = ("labels", "query_labels", "query_rows", "relevant", "hard", "junk")
_NO_LABEL = ("", "-", "-1")


def open_source(
  name: str = "",
  *,
  split: str,
  data_dir: str | None = None,
  neighbours: int = 64,
  normalize: bool = True,
  memory: int = 2**30,
) -> retrieval_examples.Queries:
  """Opens a split.

  Where rows are the queries, these are `query_rows`, or all whose label another
  row has, too, or without any labels all.

  Args:
    name: The folder; `~` is expanded.
    split: What the files are called.
    data_dir: What a relative `name` starts from.
    neighbours: How many neighbours a query comes with.
    normalize: Whether rows that are not of length 1 are made so; they are
      warned of either way.
    memory: Bytes; a larger database stays in its file.

  Returns:
    A source, whose examples are the queries.

  Raises:
    InputError: Something is missing or does not fit; the message names it.
  """
  root = descriptor_files.folder(name, data_dir, "descriptors")
  path = descriptor_files.features([root], [split], given="", what="database")
  part = descriptor_files.read(path)
  asked = None
  for suffix in (".npy", ".mat"):
    if (root / f"{split}_queries{suffix}").is_file():
      asked = descriptor_files.read(root / f"{split}_queries{suffix}", key="Q")
      break
  if asked is not None and asked.rows.shape[1] != part.rows.shape[1]:
    raise InputError(
      f"{asked.path} has descriptors of {asked.rows.shape[1]} numbers, but "
      f"{path} of {part.rows.shape[1]}."
    )
  truth = _Labels(root, split, len(part.rows), asked and len(asked.rows))
  rows = truth.query_rows
  named = descriptor_files.names_of(asked or part) or []
  table = descriptor_files.table
  return retrieval_examples.Queries(
    database=table([part], normalize=normalize, memory=memory),
    queries=None
    if asked is None
    else table([asked], normalize=normalize, memory=max(memory, 2**30)),
    query_rows=rows,
    truth=truth.truth,
    clusters=truth.clusters,
    query_clusters=truth.query_clusters,
    k=neighbours,
    names=named if asked is not None else _at(named, rows),
  )


def _at(names: Sequence[str], rows: np.ndarray | None) -> list[str]:
  some: list[int] = rows.tolist() if names and rows is not None else []
  return [names[row] for row in some]


class _Labels:
  """What rows and queries show, as the files of a split tell.

  Attributes:
    clusters: int32 [N], or None.
    query_clusters: int32 [Q], or None.
    query_rows: int64 [Q] where rows are the queries, else None.
    truth: One for each query, or None.
  """

  def __init__(
    self, root: pathlib.Path, split: str, count: int, queries: int | None
  ):
    told = _json(root / f"{split}.json")
    self._where = f"{root / split}.json"
    self.clusters = self.query_clusters = self.truth = None
    labels = _labels(root, split, told.get("labels"), count, "rows")
    asked = None
    if queries is not None:
      stem, own = f"{split}_queries", told.get("query_labels")
      asked = _labels(root, stem, own, queries, "queries")
    if labels is not None:
      self._cluster(labels, asked)
    self.query_rows = self._query_rows(told, count, queries)
    size = queries if self.query_rows is None else len(self.query_rows)
    self._tell(told, count, size or 0)
    unknown = labels is not None and queries is not None and asked is None
    if unknown and self.truth is None:
      logging.warning(
        "%s: rows have labels, but queries have none; nothing is relevant to "
        "them.",
        root / split,
      )

  def _cluster(self, labels: list[str], asked: list[str] | None) -> None:
    known = sorted({label for label in labels if label not in _NO_LABEL})
    numbers = {label: i for i, label in enumerate(known)}
    of = lambda texts: np.array([numbers.get(t, -1) for t in texts], np.int32)
    self.clusters = of(labels)
    if asked is not None:
      self.query_clusters = of(asked)
      if not np.any(self.query_clusters >= 0):
        raise InputError(
          f"{self._where.removesuffix('.json')}: no label of the queries, such "
          f"as {asked[0]!r}, is one of the rows, such as {labels[0]!r}."
        )

  def _query_rows(
    self, told: Mapping[str, Any], count: int, queries: int | None
  ) -> np.ndarray | None:
    given = told.get("query_rows")
    if queries is not None:
      if given is not None:
        raise InputError(
          f"{self._where} has query_rows, but there is a file of queries, too; "
          "wanted one of them."
        )
      return None
    if given is not None:
      rows = _rows(given, count, f"{self._where}: query_rows")
      if not len(rows):
        raise InputError(f"{self._where}: query_rows is empty.")
      return rows
    if self.clusters is None or "relevant" in told:
      return np.arange(count)
    known = self.clusters >= 0
    sizes = np.bincount(self.clusters[known], minlength=1)
    rows = np.flatnonzero(known & (sizes[self.clusters] > 1))
    if not len(rows):
      raise InputError(
        f"{self._where.removesuffix('.json')}: no two rows have the same "
        "label; wanted labels of what rows show, not names of rows."
      )
    return rows

  def _tell(self, told: Mapping[str, Any], count: int, size: int) -> None:
    lists = {}
    for key in ("relevant", "hard", "junk"):
      if key not in told:
        continue
      if not isinstance(told[key], list) or len(told[key]) != size:
        length = len(told[key]) if isinstance(told[key], list) else "no list"
        raise InputError(
          f"{self._where}: {key} has {length} entries; wanted a list of rows "
          f"for each of the {size} queries."
        )
      lists[key] = [
        _rows(rows, count, f"{self._where}: {key}[{i}]")
        for i, rows in enumerate(told[key])
      ]
    if not lists:
      return
    if "relevant" not in lists:
      raise InputError(
        f"{self._where} has {', '.join(lists)}, but not relevant; wanted it "
        "too."
      )
    none = [np.zeros(0, np.int64)] * size
    own = none if self.query_rows is None else self.query_rows[:, None]
    easy, hard = lists["relevant"], lists.get("hard", none)
    junk = zip(lists.get("junk", none), own, strict=True)
    if not any(map(len, easy)) and not any(map(len, hard)):
      raise InputError(f"{self._where}: no query has a relevant row.")
    self.truth = [
      # No row is an answer to itself.
      retrieval_examples.Truth(
        np.setdiff1d(e, o), np.setdiff1d(h, o), np.union1d(j, o)
      )
      for e, h, (j, o) in zip(easy, hard, junk, strict=True)
    ]


def _json(path: pathlib.Path) -> dict[str, Any]:
  if not path.is_file():
    return {}
  try:
    content = json.loads(path.read_bytes())
  except (OSError, ValueError, RecursionError) as error:
    raise InputError(f"{path} cannot be read as JSON: {error}.") from error
  if isinstance(content, list):
    nested = any(isinstance(item, list) for item in content)
    content = {"relevant" if nested else "labels": content}
  if not isinstance(content, dict):
    raise InputError(
      f"{path} holds a {type(content).__name__}; wanted a list or an object."
    )
  for key in content:
    if key not in _KEYS:
      raise InputError(
        f"{path} has the key {key[:40]!r}; there are: {', '.join(_KEYS)}."
      )
  return content


def _rows(value: Any, count: int, where: str) -> np.ndarray:
  whole = isinstance(value, list) and all(type(item) is int for item in value)
  if not whole or any(not 0 <= item < count for item in value):
    raise InputError(
      f"{where} must be a list of rows of the database, 0..{count - 1}."
    )
  return np.array(value, np.int64)


def _labels(
  root: pathlib.Path, stem: str, told: Any, count: int, what: str
) -> list[str] | None:
  """One text per row, from whichever file has them."""
  found: dict[str, list[str]] = {}
  if told is not None:
    found["the .json"] = _plain(told, root / stem)
  text, table = root / f"{stem}_labels.txt", root / f"{stem}.csv"
  if text.is_file():
    found[text.name] = descriptor_files.read_lines(text)
  if table.is_file():
    found[table.name] = _column(table)
  if len(found) > 1:
    raise InputError(
      f"{root / stem} has labels in {' and '.join(found)}; wanted one of them."
    )
  for name, labels in found.items():
    if len(labels) != count:
      raise InputError(
        f"{root / stem}: {name} has {len(labels)} labels, but there are "
        f"{count} {what}."
      )
    return labels
  return None


def _plain(labels: Any, where: pathlib.Path) -> list[str]:
  fits = isinstance(labels, list) and all(
    item is None or isinstance(item, str | int) for item in labels
  )
  if not fits:
    raise InputError(
      f"{where}.json: labels must be a list of texts, integers or null."
    )
  return ["" if item is None else str(item).strip() for item in labels]


def _column(path: pathlib.Path) -> list[str]:
  lines = descriptor_files.read_lines(path)
  try:
    table = list(csv.reader(lines, strict=True))
  except csv.Error as error:
    raise InputError(f"{path} cannot be read as CSV: {error}.") from error
  header = [cell.strip().lower() for cell in table[0]] if table else []
  if "label" not in header:
    raise InputError(
      f"{path} has the columns {', '.join(header[:12]) or 'none'}; wanted "
      "one called label, named in the first line."
    )
  column = header.index("label")
  # A line of one empty cell is empty.
  table = [cells or [""] for cells in table]
  for number, cells in enumerate(table[1:], 2):
    if len(cells) != len(header):
      raise InputError(
        f"{path}: line {number} has {len(cells)} cells, but the first has "
        f"{len(header)}."
      )
  return [cells[column].strip() for cells in table[1:]]
