"""Evaluators for query expansion: search, expand, search again.

The first search is a property of the data, so that batches bring each query's
neighbours; the second is made on the host, over all rows of the database.
Numbers are fractions. `mAP` is the mean of the protocols Medium and Hard where
the data tell easy rows from hard ones, else that of all relevant rows.

Reference:
  Radenovic et al., "Revisiting Oxford and Paris: Large-Scale Image Retrieval
  Benchmarking", CVPR 2018, Sec. 2.3.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure
import numpy as np

from jaxshape.data import stream
from jaxshape.data.retrieval_examples import Queries
from jaxshape.engine import evaluators, retrieval_pictures
from jaxshape.errors import InputError
from jaxshape.metrics import retrieval as metrics
from jaxshape.retrieval import expansion, search
from jaxshape.system import Evaluator, TrainState
from jaxshape.typing import Array, Batch, PyTree

# `(state, batch, mask [batch, k]) -> [batch, dim]`, of length 1.
Expand = Callable[[TrainState, Batch, Any], Array]
Opened = Callable[[], Queries]
KS = (1, 5, 10)
SHOWN = 8
METHODS = ("aqe", "aqewd", "alpha_qe", "dqe")
ALPHA = 3.0  # Of the database side, as in the paper.
GROUPS = ("low", "middle", "high")
_CELLS = 2**26  # Of a table of scores, at a time.


class Judged(NamedTuple):
  """What a search found.

  Attributes:
    aps: Average precision of each query by protocol, NaN without positives.
    precisions: [Q, 3] by protocol: among the first 1, 5 and 10.
  """

  aps: Mapping[str, np.ndarray]
  precisions: Mapping[str, np.ndarray]

  @property
  def mean(self) -> float:
    """Of Medium and Hard, or of the only protocol: mAP."""
    return float(np.mean([np.nanmean(self.aps[n]) for n in _main(self.aps)]))


def judge(source: Queries, queries: np.ndarray) -> Judged:
  """Searches the whole database and compares with the truth; [Q, N] at once.

  Args:
    source: The database and what is relevant in it.
    queries: One for each of the source's, expanded or not, [Q, D].

  Returns:
    Average precisions and precisions.

  Raises:
    InputError: Nothing is relevant to any query.
  """
  truths = source.truths()
  if not any(len(t.relevant) for t in truths):
    raise InputError(
      "the data say of no query what is relevant to it, so there is nothing to "
      "measure; give labels (of one's own: jaxshape/data/descriptors.py)."
    )
  names = ["easy"]
  if any(len(t.hard) for t in truths):
    easy = any(len(t.easy) for t in truths)
    names = [*metrics.PROTOCOLS] if easy else ["medium", "hard"]
  scores = _scores(queries, source.database)
  found = {
    name: metrics.revisited_map_of_scores(scores, truths, protocol=name, ks=KS)
    for name in names
  }
  return Judged(
    {name: one.aps for name, one in found.items()},
    {name: one.precisions for name, one in found.items()},
  )


def retrieval(
  expand: Expand,
  opened: Opened,
  *,
  batch_size: int,
  sizes: Sequence[int] = (),
  rivals: Mapping[str, Any] | None = None,
) -> Evaluator:
  """How well expanded queries find what is relevant.

  Args:
    expand: The expansion by the network.
    opened: Gives the source.
    batch_size: Queries at a time.
    sizes: Other numbers of neighbours to be tried besides all (Fig. 3).
    rivals: Options of the classical expansions to be tuned on these data:
      "sizes", "alpha", "c" and "negatives"; None for none.

  Returns:
    The evaluator; "mAP_none" is the search without expansion.
  """

  def step(state: TrainState, batch: Batch) -> PyTree:
    valid = jnp.asarray(batch["valid"])
    k = valid.shape[1]
    counts = jnp.array((*sizes, k))
    expanded = jax.lax.map(
      lambda n: expand(state, batch, valid & (jnp.arange(k) < n)), counts
    )
    return {
      "mask": batch["mask"],
      "expanded": jnp.moveaxis(expanded, 0, 1),
    }

  @functools.cache
  def plain() -> Judged:
    source = opened()
    return judge(source, source.query(slice(None)))

  @functools.cache
  def tuned() -> Mapping[str, Mapping[tuple[float, ...], Judged]]:
    return _classical(opened(), rivals) if rivals else {}

  def curve(outputs: Sequence[PyTree]) -> dict[int, Judged]:
    source = opened()
    expanded = evaluators.real_rows(outputs)["expanded"]
    counts = (*sizes, source.neighbours)
    return {n: judge(source, expanded[:, i]) for i, n in enumerate(counts)}

  def summarize(outputs: Sequence[PyTree]) -> Mapping[str, float]:
    numbers = _numbers(opened(), plain(), curve(outputs))
    for name, tried in tuned().items():
      best, along = _best(tried)
      numbers[f"mAP_{name}"] = tried[best].mean
      numbers[f"{name}_neighbours"] = best[0]
      numbers[f"drop_{name}"] = _drop(along)
    return numbers

  def pictures(state: TrainState, outputs: Sequence[PyTree]) -> Mapping:
    del state
    expanded = evaluators.real_rows(outputs)["expanded"][:, -1]
    return _pictures(opened(), plain(), curve(outputs), tuned(), expanded)

  def data() -> stream.Batches:
    return stream.evaluate(opened(), batch_size=batch_size)

  return Evaluator(data, step, summarize, pictures)


def augmented(
  expand: Expand,
  opened: Opened,
  *,
  neighbours: int,
  batch_size: int,
  then: Callable[[Opened], Evaluator],
  rivals: Mapping[str, Any] | None = None,
) -> Evaluator:
  """Database augmentation by the network, and then a search in what it gave.

  Args:
    expand: The expansion of rows of the database.
    opened: Gives the source.
    neighbours: How many of each row.
    batch_size: Rows at a time.
    then: Makes the evaluator of queries, from data with another database.
    rivals: As in `retrieval`, with "database_sizes"; the classical expansions
      of both sides, tuned on these data.

  Returns:
    The evaluator.
  """

  @functools.cache
  def rows() -> Queries:
    return opened().rows(neighbours)

  def step(state: TrainState, batch: Batch) -> PyTree:
    mask = jnp.asarray(batch["valid"])
    return {"mask": batch["mask"], "expanded": expand(state, batch, mask)}

  def after(outputs: Sequence[PyTree]) -> Evaluator:
    database = evaluators.real_rows(outputs)["expanded"]
    return then(functools.cache(lambda: opened().with_database(database)))

  def data() -> stream.Batches:
    return stream.evaluate(rows(), batch_size=batch_size)

  @functools.cache
  def tuned() -> Mapping[str, float]:
    return _both_sides(opened(), rivals) if rivals else {}

  def summarize(outputs: Sequence[PyTree]) -> Mapping[str, float]:
    del outputs
    return tuned()

  return Evaluator(data, step, summarize, then=after)


def _numbers(
  source: Queries, plain: Judged, found: Mapping[int, Judged]
) -> dict[str, float]:
  """Of the network, by the number of neighbours; `plain` is without it."""
  last = found[source.neighbours]
  numbers = {"mAP": last.mean, "mAP_none": plain.mean}
  if len(last.aps) > 1:
    for name in last.aps:
      numbers[f"mAP_{name}"] = float(np.nanmean(last.aps[name]))
      numbers[f"mAP_none_{name}"] = float(np.nanmean(plain.aps[name]))
  for name in _main(last.aps):
    means = np.nanmean(last.precisions[name], axis=0)
    for k, mean in zip(KS, means, strict=True):
      numbers[f"mP_{k}_{name}"] = float(mean)
  for (by, name), values in _groupings(source, plain).items():
    gain = metrics.grouped_gain(plain.aps[name], last.aps[name], values).gain
    for group, value in zip(GROUPS, gain, strict=True):
      numbers[f"gain_{by}_{group}_{name}"] = float(value)
  if len(found) > 1:
    numbers |= {f"mAP_at_{n}": judged.mean for n, judged in found.items()}
    numbers["drop"] = _drop({n: judged.mean for n, judged in found.items()})
  return numbers


def _pictures(
  source: Queries,
  plain: Judged,
  found: Mapping[int, Judged],
  tuned: Mapping[str, Mapping[tuple[float, ...], Judged]],
  expanded: np.ndarray,
) -> Mapping[str, Figure]:
  curves = {"network": {n: judged.mean for n, judged in found.items()}}
  after = {"network": found[source.neighbours].aps}
  for name, tried in tuned.items():
    best, curves[name] = _best(tried)
    after[name] = tried[best].aps
  some = min(SHOWN, len(source))
  out = {
    "rankings before and after": retrieval_pictures.rankings(
      source.truths()[:some],
      _scores(source.query(slice(some)), source.database),
      _scores(expanded[:some], source.database),
    ),
    "gain by group": retrieval_pictures.groups(
      plain.aps, after, _groupings(source, plain)
    ),
  }
  if len(found) > 1:
    out["number of neighbours"] = retrieval_pictures.curves(curves, plain.mean)
  return out


def _best(
  tried: Mapping[tuple[float, ...], Judged],
) -> tuple[tuple[float, ...], dict[int, float]]:
  """The best options, and mAP by the number of neighbours with the others."""
  best = max(tried, key=lambda options: tried[options].mean)
  along = {k[0]: j.mean for k, j in tried.items() if k[1:] == best[1:]}
  return best, {int(n): mean for n, mean in along.items()}


def _classical(
  source: Queries, options: Mapping[str, Any], names: Sequence[str] = METHODS
) -> dict[str, dict[tuple[float, ...], Judged]]:
  """The classical expansions by name, for each (k,) or (k, alpha)."""
  queries, found = source.query(slice(None)), source.found()
  near = source.database[np.maximum(found.indices, 0)]
  valid = found.indices >= 0
  sizes = sorted({min(n, valid.shape[1]) for n in options["sizes"]})
  out: dict[str, dict[tuple[float, ...], Judged]] = {}
  for name in names:
    # What varies is an argument, so that each is compiled once.
    keys: Sequence[tuple[float, ...]] = [()]
    shared: tuple[Any, ...] = ()
    if name == "alpha_qe":
      keys = [(alpha,) for alpha in options["alpha"]]
    if name == "dqe":
      shared = (_farthest(source, options),)
    expand = _compiled(name, options["c"])
    out[name] = {}
    for n, key in itertools.product(sizes, keys):
      mask = valid & (np.arange(valid.shape[1]) < n)
      rows = expand(queries, near, found.scores, mask, *key, *shared)
      out[name][n, *key] = judge(source, np.asarray(rows))
  return out


@functools.cache
def _compiled(name: str, c: float) -> Any:
  """A classical expansion of many queries."""
  if name == "alpha_qe":
    one = lambda *given: expansion.alpha_qe(*given[:4], alpha=given[4])
    return jax.jit(jax.vmap(one, in_axes=(0, 0, 0, 0, None)))
  if name == "dqe":
    one = lambda *given: expansion.dqe(*given[:4], negatives=given[4], c=c)
    return jax.jit(jax.vmap(one))
  return jax.jit(jax.vmap(getattr(expansion, name)))


def _farthest(source: Queries, options: Mapping[str, Any]) -> np.ndarray:
  """The rows least similar to each query, [Q, M, D]."""
  m = min(options["negatives"], len(source.database))
  found = search.top_k(-source.query(slice(None)), source.database, k=m)
  return np.asarray(source.database[np.asarray(found.indices)])


def _both_sides(
  source: Queries, options: Mapping[str, Any]
) -> Mapping[str, float]:
  """The best that a classical expansion of database and queries reaches."""
  numbers: dict[str, float] = {}
  for name in METHODS:
    found: dict[tuple[float, ...], Judged] = {}
    expand: Any = getattr(expansion, name)
    given: dict[str, Any] = {}
    if name == "alpha_qe":
      expand = jax.tree_util.Partial(expand, alpha=jnp.float32(ALPHA))
    if name == "dqe":
      expand = functools.partial(expand, c=options["c"])
      given = {"negatives": options["negatives"]}
    for n in options["database_sizes"]:
      database = expansion.augment_database(
        np.asarray(source.database), k=n, expand=expand, **given
      )
      other = source.with_database(np.asarray(database))
      tried = _classical(other, options, (name,))[name]
      found |= {(n, *key): judged for key, judged in tried.items()}
    best = max(found, key=lambda key: found[key].mean)
    numbers[f"mAP_{name}"] = found[best].mean
    numbers[f"{name}_rows"], numbers[f"{name}_neighbours"] = best[:2]
  return numbers


def _scores(queries: np.ndarray, database: np.ndarray) -> np.ndarray:
  """Inner products, [Q, N], with a part of the database in memory at a time."""
  parts = max(1, _CELLS // database.shape[1])
  return np.concatenate(
    [
      queries @ np.asarray(database[first : first + parts], np.float32).T
      for first in range(0, len(database), parts)
    ],
    axis=1,
  )


def _main(aps: Mapping[str, Any]) -> Sequence[str]:
  return ("medium", "hard") if len(aps) > 1 else tuple(aps)


def _drop(curve: Mapping[int, float]) -> float:
  """What the most neighbours lose to the best number of them."""
  return max(curve.values()) - curve[max(curve)]


def _groupings(
  source: Queries, plain: Judged
) -> Mapping[tuple[str, str], np.ndarray]:
  """What queries are grouped by, and under which protocol (Fig. 4)."""
  truths = source.truths()
  out: dict[tuple[str, str], np.ndarray] = {}
  for name in _main(plain.aps):
    out["relevant", name] = metrics.relevant_counts(truths, protocol=name)
    # Queries without relevant rows are in no group.
    out["ap", name] = np.nan_to_num(plain.aps[name])
  return out
