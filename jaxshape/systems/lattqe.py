"""LAttQE: query expansion by a network that sees all neighbours at once.

| paper | here |
|---|---|
| Eq. 1, Table 1, the classical expansions | `retrieval.expansion` |
| Eq. 2 and 3, weights of the neighbours | `layers.aggregation`, `expand` |
| Eq. 4, softmax for the database side | `expand(..., database=True)` |
| Sec. 3.3, relevance of each neighbour | `loss.auxiliary` |
| Sec. 3.4, first the network, then T alone | `dba.start` |
| Sec. 4.1, contrastive loss | `losses.contrastive.contrastive` |
| Sec. 4.1, pool of negatives | `refresh`, `retrieval.sampling.hardest` |
| Sec. 4.1, neighbours drawn and dropped | `retrieval.sampling.thin` |
| Table 2, what the parts bring | `network.attention`, `.positions`, `.visual` |

Descriptors are unit vectors; the first token is the query. An expansion stays a
weighted sum of the given descriptors, so that it can be searched with.

Note: the margin, 0.1, is of distances: few negatives are within. The weight of
the auxiliary loss and the scale of the positions are not in the paper.

Reference:
  Gordo et al., "Attention-Based Query Expansion Learning", ECCV 2020.
"""

from collections.abc import Iterator, Mapping
import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxshape.data import retrieval_examples, stream
from jaxshape.engine import optimizers, retrieval_evaluators, steps
from jaxshape.errors import InputError
from jaxshape.layers import aggregation, apply
from jaxshape.losses import contrastive
from jaxshape.retrieval import expansion, sampling
from jaxshape.system import Evaluator, System, TrainState
from jaxshape.typing import (
  Array,
  ArrayLike,
  Batch,
  Bool,
  Config,
  Float,
  Metrics,
  PyTree,
  typed,
)

DTYPES = ("float32", "bfloat16")
# Over any axes in front.
_aggregate = jnp.vectorize(
  expansion.aggregate, signature="(d),(k,d),(w),(k)->(d)"
)


@typed
def expand(
  params: PyTree,
  query: Float[ArrayLike, "*batch dim"],
  neighbours: Float[ArrayLike, "*batch k dim"],
  *,
  mask: Bool[ArrayLike, "*batch k"] | None = None,
  database: bool = False,
  heads: int,
  visual: bool = True,
) -> Float[Array, "*batch dim"]:
  """Expands queries with trained parameters.

  Args:
    params: Of a state: "net", and "temperature" for the database side.
    query: Of length 1.
    neighbours: Of length 1, best first.
    mask: False where there is none; by default all are there.
    database: Whether these are rows of the database (Eq. 4).
    heads: As the network was trained; they leave no trace in the parameters,
      off which all other sizes are read.
    visual: Whether the network was trained to see descriptors.

  Returns:
    Vectors of length 1, to be searched with.

  Raises:
    ValueError: There are more neighbours than positions.
    InputError: The network was made for descriptors of another size.
  """
  net = aggregation.of(params["net"], heads=heads, visual=visual)
  width = params["net"]["relevance"]["kernel"].shape[0]
  if np.shape(query)[-1] != width:
    raise InputError(
      f"the network expands descriptors of {width} numbers, got "
      f"{np.shape(query)[-1]}."
    )
  if mask is None:
    mask = np.ones(np.shape(neighbours)[:-1], bool)
  return _expanded(net, params, query, neighbours, mask, database=database)[0]


def expander(
  params: PyTree, *, heads: int, database: bool = False, visual: bool = True
) -> Any:
  """A trained network in the form of the functions of `retrieval.expansion`.

  Args:
    params: As in `expand`, like what follows.
    heads: As the network was trained.
    database: Whether rows of the database are to be expanded.
    visual: Whether the network was trained to see descriptors.

  Returns:
    For example for `expansion.augment_database(database, k=48, expand=...)`.
  """
  one = lambda params, query, near, _, mask: expand(
    params, query, near,
    mask=mask, heads=heads, database=database, visual=visual,
  )  # fmt: skip
  return jax.tree_util.Partial(one, params)


def _expanded(
  net: aggregation.Aggregator,
  params: PyTree,
  query: Any,
  neighbours: Any,
  mask: Any,
  *,
  database: bool = False,
  key: Array | None = None,
) -> tuple[Array, Array]:
  """The expansion, and the auxiliary logits."""
  query = jnp.asarray(query, jnp.float32)
  neighbours = jnp.asarray(neighbours, jnp.float32)
  mask = jnp.asarray(mask, bool)
  (cosines, logits), _ = apply.apply(
    net,
    params["net"],
    {},
    query,
    neighbours,
    mask=mask,
    key=key,
    train=key is not None,
  )
  temperature = jnp.exp(params["temperature"]["log"]) if database else None
  weights = aggregation.weigh(cosines, mask=mask, temperature=temperature)
  return _aggregate(query, neighbours, weights, mask), logits


def make(config: Config) -> System:
  """The expansion that a config describes."""
  _check(config)
  opened = functools.cache(
    functools.partial(
      retrieval_examples.load, config.data, neighbours=config.neighbours
    )
  )
  net = _network(config)

  @functools.cache
  def trained_on() -> retrieval_examples.Queries:
    return retrieval_examples.trainable(opened(config.data.train_split))

  def network_loss(
    params: PyTree, extra: PyTree, batch: Batch, key: Array
  ) -> tuple[Array, tuple[PyTree, Metrics]]:
    thin_key, dropout_key = jax.random.split(key)
    mask = _thinned(config, thin_key, batch)
    expanded, logits = _expanded(
      net,
      params,
      batch["query"],
      batch["neighbours"],
      mask,
      key=dropout_key,
    )
    ranking = _ranking_loss(config, expanded, batch, extra["pool"])
    relevant = jnp.asarray(batch["relevant"], jnp.float32)
    entropy = optax.sigmoid_binary_cross_entropy(logits, relevant)
    seen = jnp.maximum(mask.sum(axis=-1), 1)
    entropy = jnp.where(mask, entropy, 0).sum(axis=-1) / seen
    right = jnp.where(mask, (logits > 0) == (relevant > 0), False).sum(axis=-1)
    total = ranking + config.loss.auxiliary * entropy
    metrics = {
      "contrastive": ranking.mean(),
      "relevance_accuracy": (right / seen).mean(),
    }
    return total.mean(), (extra, metrics)

  def temperature_loss(
    params: PyTree, extra: PyTree, batch: Batch, key: Array
  ) -> tuple[Array, tuple[PyTree, Metrics]]:
    mask = _thinned(config, key, batch)
    query, near = batch["query"], batch["neighbours"]
    expanded, _ = _expanded(net, params, query, near, mask, database=True)
    ranking = _ranking_loss(config, expanded, batch, extra["pool"])
    temperature = jnp.exp(params["temperature"]["log"])
    return ranking.mean(), (extra, {"temperature": temperature})

  # First the network, then T.
  start = config.dba.start or None
  optimizer = optimizers.make(config.optimizer)
  players = {"net": steps.Player(network_loss, optimizer, last=start)}
  if start:
    players["temperature"] = steps.Player(
      temperature_loss, optax.adam(config.dba.learning_rate), first=start
    )
  averaging = config.averaging or None

  def init(key: Array) -> TrainState:
    width = config.dimensions or _width(config, opened)
    size, k = config.pool.size, config.neighbours
    params, _ = apply.init(
      net,
      key,
      jnp.zeros((1, width)),
      jnp.zeros((1, k, width)),
      mask=jnp.ones((1, k), bool),
      train=False,
    )
    pool = {
      "rows": jnp.zeros((size, width)),
      "cluster": jnp.full(size, sampling.EMPTY, jnp.int32),
    }
    temperature = {"log": jnp.log(jnp.float32(config.dba.temperature))}
    return steps.initial_state(
      players,
      {"net": params, "temperature": temperature},
      {"pool": pool},
      averaging=averaging,
    )

  def refresh(state: TrainState) -> TrainState:
    """Another pool of rows to find negatives in."""
    source, size = trained_on(), config.pool.size
    known = np.asarray(source.clusters)
    draw = np.random.default_rng([config.seed, int(state.step)])
    rows = np.sort(draw.permutation(len(source.database))[:size])
    some, clusters = source.database[rows], known[rows]
    pad = (0, size - len(rows))
    pool = {
      "rows": np.pad(some, [pad, (0, 0)]).astype(np.float32),
      "cluster": np.pad(clusters, pad, constant_values=sampling.EMPTY).astype(
        np.int32
      ),
    }
    return state.replace(extra={**state.extra, "pool": pool})

  def expanded(
    state: TrainState, batch: Batch, mask: Any, *, database: bool = False
  ) -> Array:
    params = steps.evaluation_params(state)
    query, near = batch["query"], batch["neighbours"]
    return _expanded(net, params, query, near, mask, database=database)[0]

  def predict(state: TrainState, batch: Batch) -> PyTree:
    return {"expanded": expanded(state, batch, batch["valid"])}

  def train_data(step: int) -> Iterator[Batch]:
    return stream.train(
      trained_on(),
      batch_size=config.batch_size,
      seed=config.seed,
      start_step=step,
      workers=config.data.workers,
    )

  return System(
    init=init,
    train_step=steps.take_turns(
      players, accumulate=config.accumulate, averaging=averaging
    ),
    predict=predict,
    train_data=train_data,
    evaluators=_evaluators(config, opened, expanded),
    refresh=refresh,
  )


def _thinned(config: Config, key: Array, batch: Batch) -> Array:
  return sampling.thin(
    key,
    batch["valid"],
    neighbours=config.draw.neighbours,
    drop=config.draw.drop,
  )


def _ranking_loss(
  config: Config, expanded: Array, batch: Batch, pool: Mapping[str, Array]
) -> Array:
  """Contrastive loss of the positive and of the hardest negatives, summed."""
  pair = functools.partial(contrastive.contrastive, margin=config.loss.margin)
  total = pair(expanded, batch["positive"], 1.0)
  if config.pool.negatives:
    negatives, there = sampling.hardest(
      jax.lax.stop_gradient(expanded),
      batch["cluster"],
      pool["rows"],
      pool["cluster"],
      count=config.pool.negatives,
    )
    apart = pair(expanded[:, None], negatives, 0.0)
    total += jnp.where(there, apart, 0).sum(axis=-1)
  return total


def _network(config: Config) -> aggregation.Aggregator:
  network = config.network.to_dict()
  positions = config.neighbours + 1 if network.pop("positions") else 0
  dtype = jnp.dtype(network.pop("dtype"))
  return aggregation.Aggregator(positions=positions, dtype=dtype, **network)


def _width(config: Config, opened: Any) -> int:
  """Of the descriptors, also where only the data to evaluate are at hand."""
  try:
    return opened(config.data.train_split).database.shape[1]
  except InputError as error:
    with contextlib.suppress(IndexError, InputError):
      return opened(config.data.eval_splits[0]).database.shape[1]
    raise error from None


def _evaluators(
  config: Config, opened: Any, expanded: Any
) -> Mapping[str, Evaluator]:
  """Of each split: expanded queries, and both sides expanded."""
  out, bench = {}, config.bench
  rivals = bench.rivals.to_dict() if bench.compare else None
  for split in config.data.eval_splits:
    search = functools.partial(
      retrieval_evaluators.retrieval,
      expanded,
      batch_size=config.batch_size,
      sizes=tuple(n for n in bench.sizes if n < config.neighbours),
    )
    name = split.rpartition("@")[2]
    if name in out:
      raise InputError(
        f"config.data.eval_splits has two splits of the name {name!r}, which "
        "is what their numbers are called; evaluate one after the other."
      )
    out[name] = search(functools.partial(opened, split), rivals=rivals)
    if config.dba.start:
      out[f"{name}_dba"] = retrieval_evaluators.augmented(
        functools.partial(expanded, database=True),
        functools.partial(opened, split),
        neighbours=config.dba.neighbours,
        batch_size=config.batch_size,
        then=search,
        rivals=rivals,
      )
  return out


def _check(config: Config) -> None:
  """Refuses what would fail later or mean nothing."""
  if config.network.dtype not in DTYPES:
    raise InputError(
      f"config.network.dtype must be one of {', '.join(DTYPES)}, got "
      f"{config.network.dtype!r}."
    )
  for name, value, low in (
    ("neighbours", config.neighbours, 1),
    ("dba.neighbours", config.dba.neighbours, 1),
    ("pool.size", config.pool.size, 1),
    ("pool.negatives", config.pool.negatives, 0),
    ("dimensions", config.dimensions, 0),
    ("dba.start", config.dba.start, 0),
  ):
    if value < low:
      raise InputError(f"config.{name} must be at least {low}, got {value}.")
  if config.dba.neighbours > config.neighbours:
    raise InputError(
      "config.dba.neighbours must be at most config.neighbours="
      f"{config.neighbours}, got {config.dba.neighbours}."
    )
  if config.draw.neighbours[1] != config.neighbours:
    raise InputError(
      "config.draw.neighbours must end with config.neighbours="
      f"{config.neighbours}, or positions are never trained or never used; got "
      f"{tuple(config.draw.neighbours)}."
    )
  if not config.dba.temperature > 0:
    raise InputError(
      f"config.dba.temperature must be above 0, got {config.dba.temperature}."
    )
  if config.pool.negatives and not config.refresh_every:
    raise InputError(
      "config.refresh_every must be above 0, as the pool of negatives is empty "
      "until its first refresh; or set config.pool.negatives=0."
    )
  mask = {"valid": np.ones((1, 1), bool)}  # The rest is refused by its users.
  jax.eval_shape(lambda key: _thinned(config, key, mask), jax.random.key(0))
