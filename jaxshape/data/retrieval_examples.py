"""What all retrieval data have in common: queries, each with its neighbours.

An example holds "query", float32 [D]; "neighbours", float32 [k, D], the rows of
the database that are most similar to it, best first; "similarities", their
inner products; "valid", bool [k], False where the database has no more rows;
"relevant", bool [k], whether a neighbour shows what the query shows; and
"cluster", int32, what that is (-1 if not known). A query that is a row of the
database itself is not among its own neighbours. In training, "positive" is one
of its relevant rows, drawn.
"""

from collections.abc import Mapping, Sequence
import operator
import threading
from typing import Any, NamedTuple

import numpy as np
import xxhash

from jaxshape.data import sources
from jaxshape.errors import InputError
from jaxshape.retrieval import search

Example = dict[str, Any]  # Arrays and NumPy scalars.
_LOST = ("_lock", "_same")
_BLOCK = 2**14  # Queries that are searched at a time.


class Truth(NamedTuple):
  """Rows of the database that matter to a query, as revisited data name them.

  Attributes:
    easy: Rows that show it clearly.
    hard: Rows that show it from elsewhere, in part or in other light.
    junk: Rows that count neither for nor against.
  """

  easy: np.ndarray
  hard: np.ndarray
  junk: np.ndarray

  @property
  def relevant(self) -> np.ndarray:
    """Easy and hard rows."""
    return np.concatenate([self.easy, self.hard])


class Found(NamedTuple):
  """The nearest rows of every query, best first, on the host.

  Attributes:
    scores: Inner products, float32 [Q, k].
    indices: Rows of the database, int32 [Q, k], -1 where there is none.
  """

  scores: np.ndarray
  indices: np.ndarray


class Queries:
  """Queries by number: the base of the sources for retrieval.

  Attributes:
    database: float32 [N, D], may be memory-mapped; rows of length 1.
    queries: float32 [Q, D], or None where they are rows of the database.
    query_rows: int64 [Q], each query's own row of the database, -1 for none.
    clusters: int32 [N], what each row shows, -1 for nothing known; or None.
    query_clusters: int32 [Q], the same of the queries; or None.
    neighbours: k, how many neighbours an example has.
    names: What the queries are called, or empty.
  """

  classes: tuple[str, ...] = ()

  def __init__(
    self,
    *,
    database: np.ndarray,
    queries: np.ndarray | None = None,
    query_rows: np.ndarray | None = None,
    truth: Sequence[Truth] | None = None,
    clusters: np.ndarray | None = None,
    query_clusters: np.ndarray | None = None,
    positives: Sequence[np.ndarray] | None = None,
    k: int = 64,
    names: Sequence[str] = (),
  ):
    """Takes what is there; nothing is searched yet.

    Args:
      database: See the attributes.
      queries: See the attributes.
      query_rows: See the attributes; needed where there are no `queries`.
      truth: For each query; where it is None, rows of the query's cluster are
        easy, and its own row is junk.
      clusters: See the attributes.
      query_clusters: See the attributes; by default those of `query_rows`.
      positives: Rows to draw a "positive" from, for each query; by default the
        relevant ones.
      k: Number of neighbours, at least 1; more than the database has are
        padding.
      names: See the attributes.

    Raises:
      InputError: Parts do not fit each other.
    """
    if k < 1:
      raise InputError(f"neighbours must be at least 1, got {k}.")
    n, width = database.shape
    if queries is None:
      if query_rows is None:
        raise InputError("either queries or query_rows must be given.")
      count = len(query_rows)
    else:
      count = len(queries)
      if queries.ndim != 2 or queries.shape[1] != width:
        raise InputError(
          f"queries must be [Q, {width}] like the database [{n}, {width}], got "
          f"{list(queries.shape)}."
        )
      if query_rows is None:
        query_rows = np.full(count, -1)
    query_rows = np.asarray(query_rows, np.int64)
    lowest = -1 if queries is not None else 0
    if count and not lowest <= query_rows.min() <= query_rows.max() < n:
      raise InputError(
        f"query_rows must be in {lowest}..{n - 1}, got "
        f"{query_rows.min()}..{query_rows.max()}."
      )
    if clusters is not None and query_clusters is None:
      query_clusters = np.where(query_rows < 0, -1, clusters[query_rows])
    wanted = {
      "query_rows": (query_rows, count),
      "truth": (truth, count),
      "clusters": (clusters, n),
      "query_clusters": (query_clusters, count),
      "positives": (positives, count),
    }
    for name, (given, length) in wanted.items():
      if given is not None and len(given) != length:
        raise InputError(
          f"{name} must be of length {length}, got {len(given)}."
        )
    self.database, self.queries, self.query_rows = database, queries, query_rows
    self.clusters, self.query_clusters = clusters, query_clusters
    self.neighbours, self.names = k, tuple(names)
    self._truth, self._positives = truth, positives
    self._found: Found | None = None
    self.__setstate__({})

  def __len__(self) -> int:
    return len(self.query_rows)

  def __getstate__(self) -> dict[str, Any]:
    self.found()  # Not once in every process.
    return {k: v for k, v in self.__dict__.items() if k not in _LOST}

  def __setstate__(self, state: dict[str, Any]) -> None:
    vars(self).update(state)
    self._lock = threading.Lock()
    self._same: tuple[np.ndarray, np.ndarray] | None = None

  def query(self, i: Any) -> np.ndarray:
    """The descriptor of a query, or those of several, float32."""
    if self.queries is None:
      return np.asarray(self.database[self.query_rows[i]], np.float32)
    return np.asarray(self.queries[i], np.float32)

  def truths(self) -> list[Truth]:
    """What matters to each query."""
    return [self.truth(i) for i in range(len(self))]

  def found(self) -> Found:
    """Searches once, for all queries."""
    with self._lock:
      if self._found is None:
        parts = [
          self._search(np.arange(first, min(first + _BLOCK, len(self))))
          for first in range(0, len(self), _BLOCK)
        ]
        self._found = Found(*map(np.concatenate, zip(*parts, strict=True)))
      return self._found

  def _search(self, some: np.ndarray) -> Found:
    """A part of the queries, as together they may not fit into memory."""
    found = search.top_k(
      self.query(some),
      self.database,
      k=min(self.neighbours, len(self.database)),
      exclude=self.query_rows[some],
    )
    return Found(np.asarray(found.scores), np.asarray(found.indices))

  def truth(self, i: int) -> Truth:
    """What matters to a query."""
    if self._truth is not None:
      return self._truth[i]
    own = self.query_rows[i : i + 1]
    same = self._of_cluster(self._cluster(i))
    none = np.zeros(0, np.int64)
    return Truth(same[same != own], none, own[own >= 0])

  def __getitem__(self, i: int) -> Example:
    i = operator.index(i)
    if not 0 <= i < len(self):
      raise IndexError(f"query must be in 0..{len(self) - 1}, got {i}.")
    found = self.found()
    scores, rows = found.scores[i], found.indices[i]
    valid = rows >= 0
    cluster = self._cluster(i)
    if self._truth is not None:
      relevant = np.isin(rows, self._truth[i].relevant)
    elif self.clusters is not None:
      relevant = (self.clusters[rows] == cluster) & (cluster >= 0)
    else:
      relevant = np.zeros(len(rows), bool)
    near = np.asarray(self.database[np.where(valid, rows, 0)], np.float32)
    example = {
      "neighbours": np.where(valid[:, None], near, 0),
      "similarities": np.where(valid, scores, 0).astype(np.float32),
      "valid": valid,
      "relevant": relevant & valid,
    }
    pad = self.neighbours - len(rows)
    if pad:
      example = {
        name: np.pad(value, [(0, pad)] + [(0, 0)] * (value.ndim - 1))
        for name, value in example.items()
      }
    return {"query": self.query(i), **example, "cluster": np.int32(cluster)}

  def positives(self, i: int) -> np.ndarray:
    """Rows that a query learns from."""
    if self._positives is not None:
      return self._positives[i]
    return self.truth(i).relevant

  def sample(self, i: int, rng: np.random.Generator) -> Example:
    """An example with a relevant row, drawn.

    Args:
      i: Number of the query.
      rng: What draws.

    Returns:
      The example with "positive", float32 [D].

    Raises:
      InputError: The query has none.
    """
    rows = self.positives(i)
    if not len(rows):
      raise InputError(
        f"query {self.names[i] if self.names else i} has no relevant row to "
        "learn from; leave it out."
      )
    row = rows[rng.integers(len(rows))]
    positive = np.asarray(self.database[row], np.float32)
    return {**self[i], "positive": positive}

  def rows(self, k: int) -> "Queries":
    """Every row of the database as a query: what database augmentation needs.

    Args:
      k: How many neighbours of each.

    Returns:
      The same database.
    """
    own = np.arange(len(self.database))
    return Queries(
      database=self.database,
      query_rows=own,
      clusters=self.clusters,
      k=k,
    )

  def with_database(self, database: np.ndarray) -> "Queries":
    """The same queries and truth over rows in the place of the given ones.

    Args:
      database: [N, D], for example augmented.

    Returns:
      A source whose neighbours are of these rows.
    """
    return Queries(
      database=database,
      queries=self.query(slice(None)) if self.queries is None else self.queries,
      query_rows=self.query_rows,
      truth=self._truth,
      clusters=self.clusters,
      query_clusters=self.query_clusters,
      positives=self._positives,
      k=self.neighbours,
      names=self.names,
    )

  @property
  def fingerprint(self) -> Mapping[str, Any]:
    """Sizes, and a digest of rows from everywhere."""
    some = np.linspace(0, len(self.database) - 1, 64).astype(np.int64)
    parts = [self.database[some], self.query_rows]
    if self.queries is not None:
      parts.append(self.queries[:: max(1, len(self.queries) // 64)])
    if self.clusters is not None:
      parts.append(self.clusters)
    for rows in (*(self._truth or ()), self._positives or ()):
      parts += [np.asarray(each, np.int64) for each in rows]
    seen = xxhash.xxh3_64()
    for part in parts:
      seen.update(np.ascontiguousarray(part).tobytes())
    return {
      "database": str(tuple(self.database.shape)),
      "neighbours": self.neighbours,
      "rows": seen.hexdigest(),
    }

  def _cluster(self, i: int) -> int:
    return -1 if self.query_clusters is None else int(self.query_clusters[i])

  def _of_cluster(self, cluster: int) -> np.ndarray:
    """Rows that show it, without going through all of them again."""
    if self.clusters is None or cluster < 0:
      return np.zeros(0, np.int64)
    if self._same is None:
      order = np.argsort(self.clusters, kind="stable")
      self._same = order, np.asarray(self.clusters)[order]
    order, sorted_clusters = self._same
    first, last = np.searchsorted(sorted_clusters, [cluster, cluster + 1])
    return order[first:last]


def load(data: Mapping[str, Any], split: str, *, neighbours: int) -> Queries:
  """Opens what a config calls a split.

  Args:
    data: With "source", "data_dir" and, by the kind of data, its options; those
      that are None are the kind's own.
    split: Of that source, or "kind:name@split" of another one.
    neighbours: k.

  Returns:
    The queries.

  Raises:
    InputError: There are no such data, or they are not for retrieval.
  """
  spec, _, name = split.rpartition("@")
  spec = spec or data["source"]
  options = data.get(spec.partition(":")[0], {})
  source = sources.load(
    spec,
    split=name,
    data_dir=data["data_dir"] or None,
    neighbours=neighbours,
    **{k: v for k, v in options.items() if v is not None},
  )
  if not isinstance(source, Queries):
    raise InputError(
      f"data {spec!r} must hold queries and a database of descriptors, as "
      "landmarks, revisited, sfm120k and descriptors do."
    )
  return source


def trainable(source: Queries) -> Queries:
  """The source itself, if every query has something to learn from.

  Args:
    source: Any.

  Returns:
    The source.

  Raises:
    InputError: Nothing says what rows show, or a query has no relevant row.
  """
  if source.clusters is None or source.query_clusters is None:
    raise InputError(
      "the data to train on must say what each row and each query shows "
      "(clusters; labels, of one's own descriptors)."
    )
  if source._truth is None and source._positives is None:
    kinds, counts = np.unique(source.clusters, return_counts=True)
    of = np.searchsorted(kinds, source.query_clusters)
    of = np.minimum(of, len(kinds) - 1)
    known = (kinds[of] == source.query_clusters) & (source.query_clusters >= 0)
    count = np.where(known, counts[of] - (source.query_rows >= 0), 0)
  else:
    count = np.array([len(source.positives(i)) for i in range(len(source))])
  if not count.all():
    lacking = np.flatnonzero(count == 0)
    some = ", ".join(
      str(source.names[i] if source.names else i) for i in lacking[:5]
    )
    raise InputError(
      f"{len(lacking)} queries of {len(source)} have no relevant row to learn "
      f"from ({some}{', ...' if len(lacking) > 5 else ''}); leave them out."
    )
  return source
