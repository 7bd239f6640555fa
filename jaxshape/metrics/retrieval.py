"""How well rankings of a database find what a query shows.

NumPy on the host, exact in float64. A ranking holds rows of the database, best
first. A rank is a place in it, counted from 0; -1 stands for "never found". In
lists of rows, -1 is padding, in rankings at the end only. Rows are taken out of
a ranking where they are junk: what comes after moves up.

Numbers come from whole rankings, or from scores without sorting them, which for
a million rows is faster; both go through the same formulas of ranks.

Reference:
  Radenovic et al., "Revisiting Oxford and Paris: Large-Scale Image Retrieval
  Benchmarking", CVPR 2018, its evaluation protocol and public code.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import math
from typing import Any, NamedTuple

import numpy as np

from jaxshape.errors import InputError, few
from jaxshape.typing import ArrayLike, Integer, Num, Size, typed

Rows = ArrayLike | Sequence[Size]
# Easy, hard and junk rows of each query, in this order or under these names.
Truth = Sequence[Sequence[Any] | Mapping[str, Any]]
KINDS = ("easy", "hard", "junk")
# Which rows count for, and which not at all; the others count against.
PROTOCOLS = {
  "easy": (("easy",), ("junk", "hard")),
  "medium": (("easy", "hard"), ("junk",)),
  "hard": (("hard",), ("junk", "easy")),
}


class Revisited(NamedTuple):
  """What the revisited protocol reports.

  Attributes:
    map: Mean average precision over the queries that have positives.
    aps: Average precision of each query, NaN without positives.
    precisions: [queries, ks], precision at each k, NaN without positives.
    mean_precisions: [ks], the means over the queries that have positives.
  """

  map: float
  aps: np.ndarray
  precisions: np.ndarray
  mean_precisions: np.ndarray


class Gain(NamedTuple):
  """What a change of method brings to groups of queries, lowest group first.

  Attributes:
    gain: Relative improvement of the group's mAP, 0.1 for a tenth more; NaN
      for a group without queries, or one whose mAP was 0 and stayed so.
    before: mAP before.
    after: mAP after.
    mean: Mean over the group of what the queries were grouped by.
    queries: How many there are in the group.
    edges: What the groups were cut at; a group holds its upper edge.
  """

  gain: np.ndarray
  before: np.ndarray
  after: np.ndarray
  mean: np.ndarray
  queries: np.ndarray
  edges: np.ndarray


@typed
def ranks_of(scores: Num[ArrayLike, " n"], rows: Rows) -> np.ndarray:
  """At which ranks some rows are, without sorting the others.

  rank(r) = number of rows with a higher score, or the same and a smaller index.
  Takes O(n log m) for m rows.

  Args:
    scores: Of all rows of the database, higher is better.
    rows: Which ranks are asked for.

  Returns:
    One rank for each row that was asked for, int64.

  Raises:
    InputError: A score is NaN, or a row is not in the database.
  """
  return _ranks(_scores(scores), _whole(rows, "rows"))


@typed
def average_precision_of_ranks(
  positive_ranks: Rows, junk_ranks: Rows, *, trapezoidal: bool = True
) -> float:
  """Average precision from the ranks of what counts.

  With r_j the rank of the j-th of P positives, j = 0, 1, .., junk taken out:
  AP = 1 / P sum_j (j / r_j + (j + 1) / (r_j + 1)) / 2, where 0 / 0 counts as 1;
  if not trapezoidal, AP = 1 / P sum_j (j + 1) / (r_j + 1).

  Args:
    positive_ranks: Of all positives, in any order; -1 where one is never found.
    junk_ranks: Of the junk, likewise.
    trapezoidal: Whether the area under precision over recall is one of
      trapezoids, as in the public protocol.

  Returns:
    The average precision, 0..1; NaN without positives.

  Raises:
    InputError: Ranks repeat, or are below -1.

  Reference:
    Philbin et al., "Object Retrieval with Large Vocabularies and Fast Spatial
    Matching", CVPR 2007, Sec. 3 (area under precision over recall); the public
    code of Radenovic et al., "Revisiting Oxford and Paris", CVPR 2018.
  """
  found, count = _found(positive_ranks, junk_ranks)
  return _average(found, count, trapezoidal)


@typed
def precision_of_ranks(
  positive_ranks: Rows, junk_ranks: Rows, *, k: Size
) -> float:
  """Precision at k from the ranks of what counts.

  P@k = (positives among the first m) / m, m = min(k, places up to the last
  positive), junk taken out.

  Args:
    positive_ranks: Of all positives, in any order; -1 where one is never found,
      and m is k then.
    junk_ranks: Of the junk, likewise.
    k: At least 1.

  Returns:
    The precision, 0..1; NaN without positives.

  Raises:
    InputError: Ranks repeat, or are below -1.
    ValueError: k is below 1.

  Reference:
    Radenovic et al., "Revisiting Oxford and Paris", CVPR 2018, its public code.
  """
  _check_ks([k])
  found, count = _found(positive_ranks, junk_ranks)
  return _precision(found, count, int(k))


@typed
def revisited_average_precision(
  ranking: Rows, positives: Rows, junk: Rows, *, size: Size | None = None
) -> float:
  """Average precision of one query as the revisited protocol has it.

  The formula is in `average_precision_of_ranks`.

  Args:
    ranking: Rows of the database, best first. It may end early: positives that
      are not in it count as never found.
    positives: Rows to be found.
    junk: Rows that count neither for nor against.
    size: Number of rows of the database, if rows are to be checked against it.

  Returns:
    The average precision, 0..1; NaN without positives.

  Raises:
    InputError: Rows repeat in the ranking or among the positives, are not in
      the database, or are positive and junk at once.

  Note:
    Trapezoids give less than `average_precision`, or as much where nothing else
    comes before the last positive.

  Reference:
    Radenovic et al., "Revisiting Oxford and Paris", CVPR 2018, its evaluation
    protocol and public code.
  """
  found, count = _locate(ranking, positives, junk, size)
  return _average(found, count, trapezoidal=True)


@typed
def precision_at(
  ranking: Rows,
  positives: Rows,
  junk: Rows,
  *,
  k: Size,
  size: Size | None = None,
) -> float:
  """Precision at k of one query as the revisited protocol has it.

  The formula is in `precision_of_ranks`.

  Args:
    ranking: Rows of the database, best first; it may end early.
    positives: Rows to be found.
    junk: Rows that count neither for nor against.
    k: At least 1.
    size: Number of rows of the database, if rows are to be checked against it.

  Returns:
    The precision, 0..1; NaN without positives.

  Raises:
    InputError: As in `revisited_average_precision`.
    ValueError: k is below 1.

  Reference:
    Radenovic et al., "Revisiting Oxford and Paris", CVPR 2018, its public code.
  """
  _check_ks([k])
  found, count = _locate(ranking, positives, junk, size)
  return _precision(found, count, int(k))


@typed
def revisited_map(
  rankings: Integer[ArrayLike, "queries ranks"],
  truth: Truth,
  *,
  protocol: str = "medium",
  ks: Sequence[Size] = (1, 5, 10),
  size: Size | None = None,
) -> Revisited:
  """Mean average precision by the revisited protocol, from rankings.

  Positives are the easy rows ("easy"), the easy and hard ones ("medium") or the
  hard ones ("hard"); the junk and those of easy and hard that are not positive
  are taken out. Queries without positives are left out of the means.

  Args:
    rankings: One per query, best first; they may end early. The public code
      has them in columns.
    truth: For each query its easy, hard and junk rows: a triple, or a dict with
      these names.
    protocol: "easy", "medium" or "hard".
    ks: Where precisions are taken, each at least 1.
    size: Number of rows of the database, if rows are to be checked against it.

  Returns:
    The means and each query's numbers.

  Raises:
    InputError: No query has a positive, the truth is not one per query, or a
      query does not fit (see `revisited_average_precision`).
    ValueError: An option is outside its range.

  Reference:
    Radenovic et al., "Revisiting Oxford and Paris", CVPR 2018, its evaluation
    protocol and public code.
  """
  rows = np.asarray(rankings)
  locate = lambda i, positives, junk: _locate(rows[i], positives, junk, size)
  return _revisited(locate, rows.shape, truth, protocol, ks)


@typed
def revisited_map_of_scores(
  scores: Num[ArrayLike, "queries n"],
  truth: Truth,
  *,
  protocol: str = "medium",
  ks: Sequence[Size] = (1, 5, 10),
) -> Revisited:
  """Mean average precision by the revisited protocol, without sorting.

  The same numbers as `revisited_map` of the scores' stable descending order.

  Args:
    scores: Of each query and all rows of the database, higher is better.
    truth: As in `revisited_map`.
    protocol: "easy", "medium" or "hard".
    ks: Where precisions are taken, each at least 1.

  Returns:
    The means and each query's numbers.

  Raises:
    InputError: As in `revisited_map`, or a score is NaN.
    ValueError: An option is outside its range.
  """
  values = np.asarray(scores)

  def locate(i: int, positives: Any, junk: Any) -> tuple[np.ndarray, int]:
    positives, junk = _sides(positives, junk, values.shape[1])
    own = _scores(values[i])
    ranks = _ranks(own, np.concatenate([positives, junk]))
    return _found(ranks[: len(positives)], ranks[len(positives) :])

  return _revisited(locate, values.shape, truth, protocol, ks)


@typed
def relevant_counts(truth: Truth, *, protocol: str = "medium") -> np.ndarray:
  """How many positives each query has: what `grouped_gain` may group by.

  Args:
    truth: As in `revisited_map`.
    protocol: "easy", "medium" or "hard".

  Returns:
    One number per query, int64.
  """
  _check_protocol(protocol)
  return np.array(
    [len(_divide(entry, protocol, i)[0]) for i, entry in enumerate(truth)],
    np.int64,
  )


@typed
def average_precision(
  ranking: Rows,
  positives: Rows,
  *,
  junk: Rows = (),
  size: Size | None = None,
) -> float:
  """The usual average precision of one query, without trapezoids.

  AP = 1 / P sum_j (j + 1) / (r_j + 1), with r_j the rank of the j-th of P
  positives: the mean of the precisions at the positives.

  Args:
    ranking: Rows of the database, best first. It may end early: positives that
      are not in it count as never found.
    positives: Rows to be found.
    junk: Rows that count neither for nor against, as the query's own.
    size: Number of rows of the database, if rows are to be checked against it.

  Returns:
    The average precision, 0..1; NaN without positives.

  Raises:
    InputError: As in `revisited_average_precision`.

  Reference:
    Manning et al., "Introduction to Information Retrieval", 2008, Eq. 8.8.
  """
  found, count = _locate(ranking, positives, junk, size)
  return _average(found, count, trapezoidal=False)


@typed
def mean_average_precision(
  rankings: Integer[ArrayLike, "queries ranks"],
  positives: Sequence[Rows],
  *,
  junk: Sequence[Rows] | None = None,
  size: Size | None = None,
) -> float:
  """The mean of the usual average precision over queries that have positives.

  Args:
    rankings: One per query, best first; they may end early.
    positives: For each query the rows to be found.
    junk: For each query the rows that count neither for nor against; None where
      no query has any.
    size: Number of rows of the database, if rows are to be checked against it.

  Returns:
    The mean, 0..1.

  Raises:
    InputError: No query has a positive, the lists are not one per query, or a
      query does not fit (see `revisited_average_precision`).

  Reference:
    Manning et al., "Introduction to Information Retrieval", 2008, Eq. 8.8.
  """
  rows = np.asarray(rankings)
  junk = [()] * len(rows) if junk is None else junk
  for name, given in {"positives": positives, "junk": junk}.items():
    _check_length(name, given, rows.shape)
  aps = []
  for i in range(len(rows)):
    with _naming(i):
      found, count = _locate(rows[i], positives[i], junk[i], size)
    aps.append(_average(found, count, trapezoidal=False))
  counted = np.array([ap for ap in aps if not math.isnan(ap)])
  if not len(counted):
    raise InputError(
      f"none of the {len(rows)} queries has a positive, so there is no mean; "
      "give at least one a row to be found."
    )
  return float(np.mean(counted))


@typed
def grouped_gain(
  before_aps: Num[ArrayLike, " queries"],
  after_aps: Num[ArrayLike, " queries"],
  by: Num[ArrayLike, " queries"],
  *,
  percentiles: Sequence[float | int] = (33, 66),
) -> Gain:
  """What a change brings where there is little to find, or much.

  Queries are cut into groups at percentiles of `by`, their number of relevant
  rows or their average precision before; gain = mAP after / mAP before - 1.

  Args:
    before_aps: Average precision of each query; NaN leaves it out.
    after_aps: The same after the change; NaN for the same queries.
    by: What the queries are grouped by.
    percentiles: Where they are cut, rising, in 0..100; one group more than
      these. Queries that are equal in `by` stay together, so that groups may
      be of different sizes, or empty.

  Returns:
    The gain and what it rests on, by group.

  Raises:
    InputError: No query is left, the two lack different queries, or `by` is
      not finite.
    ValueError: The percentiles do not rise.

  Reference:
    Gordo et al., "Attention-Based Query Expansion Learning", ECCV 2020, Sec.
    4.4 and Fig. 4.
  """
  cuts = np.asarray(percentiles, np.float64)
  rising = np.all(np.diff(cuts) > 0) and np.all((cuts > 0) & (cuts < 100))
  if not (cuts.size and rising):
    raise ValueError(
      f"percentiles must rise and be between 0 and 100, got {percentiles}."
    )
  before, after, by = (
    np.asarray(a, np.float64) for a in (before_aps, after_aps, by)
  )
  counted = ~np.isnan(before)
  if not np.array_equal(counted, ~np.isnan(after)):
    raise InputError(
      "before_aps and after_aps must be NaN for the same queries, got "
      f"{np.sum(~counted)} and {np.sum(np.isnan(after))} that are."
    )
  if not counted.any():
    raise InputError("no query has an average precision, so there is no group.")
  before, after, by = before[counted], after[counted], by[counted]
  if not np.isfinite(by).all():
    raise InputError(
      f"by must be finite, got {np.sum(~np.isfinite(by))} values that are not."
    )
  edges = np.percentile(by, cuts)
  group = np.searchsorted(edges, by, side="left")
  members = group == np.arange(len(edges) + 1)[:, None]
  mean = lambda values: np.array(
    [values[own].mean() if own.any() else math.nan for own in members]
  )
  old, new = mean(before), mean(after)
  with np.errstate(divide="ignore", invalid="ignore"):
    gain = new / old - 1
  return Gain(gain, old, new, mean(by), members.sum(axis=1), edges)


Located = tuple[np.ndarray, int]


def _revisited(
  locate: Callable[[int, Any, Any], Located],
  shape: tuple[int, ...],
  truth: Truth,
  protocol: str,
  ks: Sequence[Size],
) -> Revisited:
  """All queries, from the ranks of their positives and their number."""
  _check_protocol(protocol)
  _check_ks(ks)
  _check_length("truth", truth, shape)
  aps = np.full(len(truth), math.nan)
  precisions = np.full((len(truth), len(ks)), math.nan)
  for i, entry in enumerate(truth):
    positives, junk = _divide(entry, protocol, i)
    with _naming(i):
      found, count = locate(i, positives, junk)
    aps[i] = _average(found, count, trapezoidal=True)
    precisions[i] = [_precision(found, count, int(k)) for k in ks]
  counted = ~np.isnan(aps)
  if not counted.any():
    raise InputError(
      f"none of the {len(truth)} queries has a positive under the protocol "
      f"{protocol!r}, so there is no mean; the truth lists no "
      f"{' and no '.join(PROTOCOLS[protocol][0])} rows."
    )
  return Revisited(
    float(aps[counted].mean()),
    aps,
    precisions,
    precisions[counted].mean(axis=0),
  )


@contextlib.contextmanager
def _naming(number: int) -> Iterator[None]:
  """Says which query it is that does not fit."""
  try:
    yield
  except InputError as error:
    raise InputError(f"query {number}: {error}") from error


def _divide(
  entry: Sequence[Any] | Mapping[str, Any], protocol: str, number: int
) -> tuple[np.ndarray, np.ndarray]:
  """A query's positives and junk."""
  with _naming(number):
    if not isinstance(entry, Mapping):
      if len(entry) != len(KINDS):
        raise InputError(
          f"the truth must be easy, hard and junk rows, got {len(entry)} lists."
        )
      entry = dict(zip(KINDS, entry, strict=True))
    missing = [kind for kind in KINDS if kind not in entry]
    if missing:
      raise InputError(
        f"the truth must name easy, hard and junk rows, got no "
        f"{' and no '.join(missing)}."
      )
    rows = {kind: _rows(entry[kind], kind) for kind in KINDS}
  positives, junk = (
    np.concatenate([rows[kind] for kind in kinds])
    for kinds in PROTOCOLS[protocol]
  )
  return positives, junk


def _locate(
  ranking: Any, positives: Any, junk: Any, size: Size | None
) -> Located:
  """The ranks of the positives that a ranking holds, and how many there are."""
  ranking = _rows(ranking, "ranking", size)
  positives, junk = _sides(positives, junk, size)
  _check_distinct(ranking, "the ranking holds row")
  wanted = np.concatenate([positives, junk])
  if not len(wanted):
    return wanted, 0
  order = np.argsort(wanted)
  hit = np.flatnonzero(np.isin(ranking, wanted))
  ranks = np.full(len(wanted), -1)
  ranks[order[np.searchsorted(wanted[order], ranking[hit])]] = hit
  return _found(ranks[: len(positives)], ranks[len(positives) :])


def _sides(
  positives: Any, junk: Any, size: Size | None
) -> tuple[np.ndarray, np.ndarray]:
  """Rows that count for, each once, and rows that do not count."""
  positives = _rows(positives, "positives", size)
  junk = np.unique(_rows(junk, "junk", size))
  _check_distinct(positives, "the positives hold row")
  both = np.intersect1d(positives, junk)
  if len(both):
    raise InputError(
      f"no row may be positive and junk at once, got {few(both)}."
    )
  return positives, junk


def _found(positive_ranks: Any, junk_ranks: Any) -> Located:
  """Ranks of the positives that were found, rising, as if without junk."""
  positives = _whole(positive_ranks, "positive_ranks")
  junk = _whole(junk_ranks, "junk_ranks")
  both = np.concatenate([positives, junk])
  if np.any(both < -1):
    raise InputError(f"ranks must be -1 or more, got {both.min()}.")
  _check_distinct(both[both >= 0], "ranks hold")
  found = np.sort(positives[positives >= 0])
  junk = np.sort(junk[junk >= 0])
  return found - np.searchsorted(junk, found), len(positives)


def _average(found: np.ndarray, count: int, trapezoidal: bool) -> float:
  if count == 0:
    return math.nan
  before = np.arange(len(found))
  precision = (before + 1) / (found + 1)
  if trapezoidal:
    # Nothing comes before the first place, and that counts as all right.
    left = np.where(found == 0, 1.0, before / np.maximum(found, 1))
    precision = (left + precision) / 2
  return float(np.sum(precision) / count)


def _precision(found: np.ndarray, count: int, k: int) -> float:
  if count == 0:
    return math.nan
  if len(found) == count:
    k = min(k, int(found[-1]) + 1)
  return float(np.sum(found < k) / k)


def _ranks(scores: np.ndarray, rows: np.ndarray) -> np.ndarray:
  _check_range(rows, "rows", len(scores))
  if not len(rows):
    return rows
  levels, level = np.unique(scores[rows], return_inverse=True)
  near = np.flatnonzero(scores >= levels[0])  # The others come after all.
  below = np.searchsorted(levels, scores[near])  # How many levels are lower.
  counts = np.bincount(below, minlength=len(levels) + 1)
  higher = len(near) - np.cumsum(counts)[:-1]
  # Among those of one level, the ones with a smaller index come first.
  tied = levels[np.minimum(below, len(levels) - 1)] == scores[near]
  n = len(scores)
  place = np.sort(below[tied] * n + near[tied])
  before = np.searchsorted(place, level * n + rows)
  return higher[level] + before - np.searchsorted(place, level * n)


def _scores(scores: ArrayLike) -> np.ndarray:
  values = np.asarray(scores)
  if values.dtype.kind not in "fiu":  # 16 bits of JAX's own.
    values = values.astype(np.float32)
  nan = np.isnan(values)
  if nan.any():
    raise InputError(
      f"scores must not be NaN, got {nan.sum()}, the first for row "
      f"{nan.argmax()}."
    )
  return values


def _whole(values: Any, name: str) -> np.ndarray:
  """A list of whole numbers."""
  array = np.asarray(values)
  if array.ndim != 1:
    raise InputError(
      f"{name} must be a list of whole numbers, got the shape {array.shape}."
    )
  if not array.size:
    return np.zeros(0, np.int64)
  if array.dtype.kind not in "iu":
    raise InputError(f"{name} must be whole numbers, got {array.dtype}.")
  return array.astype(np.int64)


def _rows(values: Any, name: str, size: Size | None = None) -> np.ndarray:
  """A list of rows without padding, which of a ranking is at its end."""
  rows = _whole(values, name)
  real = np.flatnonzero(rows != -1)
  if name == "ranking":
    real = slice(0, real[-1] + 1 if len(real) else 0)
  rows = rows[real]
  _check_range(rows, name, size)
  return rows


def _check_range(rows: np.ndarray, name: str, size: Size | None) -> None:
  high = np.inf if size is None else size
  wrong = rows[(rows < 0) | (rows >= high)]
  if len(wrong):
    wanted = "at least 0" if size is None else f"in 0..{size - 1}"
    raise InputError(f"{name} must be {wanted}, got {few(wrong)}.")


def _check_distinct(rows: np.ndarray, what: str) -> None:
  if len(rows) and rows.max() < 8 * len(rows):  # Faster than sorting.
    again = np.flatnonzero(np.bincount(rows) > 1)
  else:
    rows = np.sort(rows)
    again = np.unique(rows[1:][rows[1:] == rows[:-1]])
  if len(again):
    raise InputError(f"{what} {few(again)} more than once.")


def _check_length(name: str, given: Any, shape: tuple[int, ...]) -> None:
  if len(given) != shape[0]:
    swap = " (one ranking is a row)" if len(given) == shape[1] else ""
    raise InputError(
      f"{name} must be of one entry for each of {shape[0]} queries{swap}, got "
      f"{len(given)}."
    )


def _check_protocol(protocol: str) -> None:
  if protocol not in PROTOCOLS:
    raise ValueError(
      f"protocol must be one of {', '.join(PROTOCOLS)}, got {protocol!r}."
    )


def _check_ks(ks: Sequence[Size]) -> None:
  for k in ks:
    if k < 1:
      raise ValueError(f"k must be 1 or more, got {k}.")
