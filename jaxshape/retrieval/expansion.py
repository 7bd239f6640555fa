"""Query expansion: a query and what it found become a better query.

Notation: q the query, d_i its i-th neighbour (d_0 = q), k how many neighbours,
s_i = <q, d_i>, w_i a weight. All rows are of length 1, neighbours best first.
Every method is a function of one query,

  method(query [D], neighbours [k, D], similarities [k], mask [k] | None) -> [D]

to be mapped over queries by `jax.vmap`, or by `expand_queries` with the search
before it; `augment_database` does that to each row of a database. The mask is
False at neighbours that do not count: they leave no trace, not even a NaN, as
if they had not been given. Without a neighbour the query stays as it is.
Everything is computed in float32.
"""

from collections.abc import Callable
import functools
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from jaxshape import images
from jaxshape.errors import InputError
from jaxshape.retrieval import search
from jaxshape.typing import Array, ArrayLike, Bool, Float, Num, Size, typed

Method = Callable[..., Any]
_State = tuple[jax.Array, jax.Array, jax.Array]
# Numbers that are gathered at once: 64 MiB in float32.
_GATHERED = 2**24
# Margins of support vectors are computed to about 1e-7.
_TOLERANCE = 1e-6
_STEPS = 10_000


@jax.jit
@typed
def aggregate(
  query: Float[ArrayLike, " dim"],
  neighbours: Float[ArrayLike, "k dim"],
  weights: Float[ArrayLike, " k+1"],
  mask: Bool[ArrayLike, " k"] | None,
) -> Float[Array, " dim"]:
  """Adds up a query and its neighbours, with weights.

  sum over i = 0..k of w_i d_i, divided by its length. If that sum is 0, it
  gives no direction, and the result is the query, divided by its length.

  Args:
    query: d_0.
    neighbours: d_1..d_k.
    weights: w_0..w_k, that of the query first.
    mask: False where a neighbour does not count; None: all do.

  Returns:
    The expanded query, of length 1 (0 only if the query is 0).

  Reference:
    Gordo et al., "Attention-Based Query Expansion Learning", ECCV 2020, Eq. 1.
  """
  q, d = _float32(query), _float32(neighbours)
  w = _float32(weights)
  used = _used(mask, len(d))
  # A product: on CPUs, the sum of weighted rows takes 20 times as long.
  d = d if mask is None else jnp.where(used[:, None], d, 0.0)
  rest = jnp.matmul(jnp.where(used, w[1:], 0.0), d, precision="highest")
  return _unit(w[0] * q + rest, q)


@jax.jit
@typed
def aqe_weights(
  similarities: Float[ArrayLike, " k"], mask: Bool[ArrayLike, " k"] | None
) -> Float[Array, " k+1"]:
  """Weights of average query expansion, w_i = 1.

  Args:
    similarities: Only their number matters.
    mask: False where a neighbour does not count; None: all do.

  Returns:
    w_0..w_k, that of the query first; 0 where the mask is False.

  Reference:
    Gordo et al., "Attention-Based Query Expansion Learning", ECCV 2020,
    Table 1.
  """
  used = _used(mask, np.shape(similarities)[0])
  return _with_query(jnp.where(used, 1.0, 0.0))


@jax.jit
@typed
def aqewd_weights(
  similarities: Float[ArrayLike, " k"], mask: Bool[ArrayLike, " k"] | None
) -> Float[Array, " k+1"]:
  """Weights of average query expansion with decay, w_i = (k - i) / k.

  i = 1..k counts the neighbours that the mask leaves, and k is their number.

  Args:
    similarities: Only their number matters.
    mask: False where a neighbour does not count; None: all do.

  Returns:
    w_0..w_k, that of the query (1) first; 0 where the mask is False.

  Reference:
    Gordo et al., "Attention-Based Query Expansion Learning", ECCV 2020,
    Table 1.

  Note:
    Read literally, as here, the k-th neighbour has weight 0: a single
    neighbour changes nothing.
  """
  used = _used(mask, np.shape(similarities)[0])
  i = jnp.cumsum(used)
  k = jnp.maximum(jnp.sum(used), 1)
  return _with_query(jnp.where(used, (k - i) / k, 0.0))


@typed
def alpha_qe_weights(
  similarities: Float[ArrayLike, " k"],
  mask: Bool[ArrayLike, " k"] | None,
  *,
  alpha: Num[ArrayLike, ""] = 3.0,
  clip: bool = True,
) -> Float[Array, " k+1"]:
  """Weights of alpha query expansion, w_i = max(s_i, 0)^alpha.

  Args:
    similarities: s_1..s_k.
    mask: False where a neighbour does not count; None: all do.
    alpha: At least 0, where all weigh the same; may be traced, then it is not
      checked.
    clip: If False, w_i = s_i^alpha, also of similarities below 0. Where alpha
      is no whole number, there is no such power, and they weigh nothing.

  Returns:
    w_0..w_k, that of the query (1) first; 0 where the mask is False.

  Raises:
    ValueError: alpha is outside its range.

  Reference:
    Radenovic et al., "Fine-Tuning CNN Image Retrieval with No Human
    Annotation", TPAMI 2019.

  Note:
    Table 1 of Gordo et al. has s_i^alpha, unclipped.
  """
  known = images.concrete(alpha)
  if known is not None and not 0 <= known < math.inf:
    raise ValueError(f"alpha must be at least 0 and finite, got {alpha}.")
  s, a = _float32(similarities), _float32(alpha)
  s = jnp.where(_used(mask, len(s)), s, 0.0)  # -inf where there is no row.
  size = jnp.abs(s)
  power = jnp.where(size > 0, size, 1.0) ** a
  power = jnp.where(size > 0, power, jnp.where(a == 0, 1.0, 0.0))
  if clip:
    below = jnp.where(a == 0, 1.0, 0.0)
  else:
    sign = jnp.where(a % 2 == 1, -1.0, 1.0)
    below = jnp.where(a == jnp.round(a), sign * power, 0.0)
  weights = jnp.where(s < 0, below, power)
  return _with_query(jnp.where(_used(mask, len(s)), weights, 0.0))


@typed
def dqe_weights(
  query: Float[ArrayLike, " dim"],
  neighbours: Float[ArrayLike, "k dim"],
  mask: Bool[ArrayLike, " k"] | None,
  *,
  negatives: Float[ArrayLike, "m dim"],
  c: float | int = 0.1,
  bias: str = "free",
  loss: str = "hinge",
) -> Float[Array, " k+1+m"]:
  """Weights of discriminative query expansion: a linear SVM in the dual.

  w_i = y_i a_i, where y_i = 1 for the query and its neighbours and -1 for the
  negatives, and a minimizes

    |sum_i y_i a_i x_i|^2 / 2 - sum_i a_i,  0 <= a_i <= c,  sum_i y_i a_i = 0.

  Solved by steps in two coordinates at a time until no margin is wrong by more
  than 1e-6; mapped over queries, as many as the slowest needs.

  Args:
    query: q.
    neighbours: d_1..d_k.
    mask: False where a neighbour does not count; None: all do.
    negatives: Rows that are not like the query, at least one.
    c: How much an example on the wrong side costs, above 0; rounding shows in
      the fourth digit where it is below 0.01.
    bias: "free" is the problem above, of `sklearn.svm.SVC(kernel="linear")`.
      "regularized" takes the bias for one more coordinate of the normal, whose
      length is penalized as in `sklearn.svm.LinearSVC`; "none" lets the plane
      pass through the origin. Neither has the constraint on the sum.
    loss: "hinge" is the problem above. "squared_hinge", the default of
      `LinearSVC`, adds sum_i a_i^2 / (4 c) and has no upper limit on a.

  Returns:
    Weights of the query, the neighbours and the negatives, in this order; the
    negatives' are at most 0. Where no neighbour counts, the query alone has
    weight 1. No gradient passes: they are constants to JAX.

  Raises:
    ValueError: An option is outside its range.

  Reference:
    Arandjelovic and Zisserman, "Three Things Everyone Should Know to Improve
    Object Retrieval", CVPR 2012; solved as in Fan et al., "Working Set
    Selection Using Second Order Information", JMLR 2005, Alg. 2.

  Note:
    The query is among the positives here, as in Eq. 1 of Gordo et al.
  """
  if not 0 < c < math.inf:
    raise ValueError(f"c must be above 0 and finite, got {c}.")
  for name, value, choices in (
    ("bias", bias, ("free", "regularized", "none")),
    ("loss", loss, ("hinge", "squared_hinge")),
  ):
    if value not in choices:
      raise ValueError(f"{name} must be one of {choices}, got {value!r}.")
  if not np.shape(negatives)[0]:
    raise ValueError("negatives must be at least 1 row, got 0.")
  used = _used(mask, np.shape(neighbours)[0])
  rows = query, neighbours, negatives
  return _dual(*map(_float32, rows), used, c, bias=bias, loss=loss)


@functools.partial(jax.jit, static_argnames=("bias", "loss"))
def _dual(
  q: jax.Array,
  d: jax.Array,
  other: jax.Array,
  used: jax.Array,
  c: Any,
  *,
  bias: str,
  loss: str,
) -> jax.Array:
  keep = jnp.concatenate([jnp.ones(1, bool), used, jnp.ones(len(other), bool)])
  x = jnp.where(keep[:, None], jnp.concatenate([q[None], d, other]), 0.0)
  y = jnp.where(jnp.arange(len(x)) < 1 + len(d), 1.0, -1.0)
  gram = jnp.matmul(x, x.T, precision=lax.Precision.HIGHEST)
  limit = jnp.full(len(x), c)
  if loss == "squared_hinge":
    gram = gram + jnp.eye(len(x)) / (2 * c)
    limit = jnp.full(len(x), jnp.inf)
  limit = jnp.where(keep, limit, 0.0)
  low, high = jnp.where(y > 0, 0.0, -limit), jnp.where(y > 0, limit, 0.0)
  if bias == "regularized":
    gram = gram + 1.0
  if bias != "free":
    # A coordinate that costs nothing takes up whatever the sum lacks.
    gram, y = jnp.pad(gram, (0, 1)), jnp.pad(y, (0, 1))
    low = jnp.append(low, -jnp.inf)
    high = jnp.append(high, jnp.inf)
  w = _least_squares(*lax.stop_gradient((gram, y, low, high)))[: len(x)]
  alone = jnp.arange(len(x)) == 0
  return jnp.where(jnp.any(used), w, jnp.where(alone, 1.0, 0.0))


@typed
def aqe(
  query: Float[ArrayLike, " dim"],
  neighbours: Float[ArrayLike, "k dim"],
  similarities: Float[ArrayLike, " k"] | None,
  mask: Bool[ArrayLike, " k"] | None,
) -> Float[Array, " dim"]:
  """Average query expansion: q + d_1 + ... + d_k, divided by its length.

  Args:
    query: Of length 1.
    neighbours: Of length 1; 2 of them in the paper.
    similarities: Not used.
    mask: False where a neighbour does not count; None: all do.

  Returns:
    The expanded query, of length 1.

  Raises:
    InputError: A row that counts holds NaN or infinity, if that is known:
      outside `jit` and `vmap`.

  Reference:
    Chum et al., "Total Recall", ICCV 2007, Sec. 4.
  """
  del similarities
  _check_query(query, neighbours, None, mask)
  weights = aqe_weights(jnp.ones(np.shape(neighbours)[0]), mask)
  return aggregate(query, neighbours, weights, mask)


@typed
def aqewd(
  query: Float[ArrayLike, " dim"],
  neighbours: Float[ArrayLike, "k dim"],
  similarities: Float[ArrayLike, " k"] | None,
  mask: Bool[ArrayLike, " k"] | None,
) -> Float[Array, " dim"]:
  """Average query expansion with decay: q + sum_i (k - i) / k d_i.

  Divided by its length; i = 1..k, see `aqewd_weights`.

  Args:
    query: Of length 1.
    neighbours: Of length 1, best first; 4 of them in the paper.
    similarities: Not used.
    mask: False where a neighbour does not count; None: all do.

  Returns:
    The expanded query, of length 1.

  Raises:
    InputError: As in `aqe`.

  Reference:
    Gordo et al., "End-to-End Learning of Deep Visual Representations for Image
    Retrieval", IJCV 2017.
  """
  del similarities
  _check_query(query, neighbours, None, mask)
  weights = aqewd_weights(jnp.ones(np.shape(neighbours)[0]), mask)
  return aggregate(query, neighbours, weights, mask)


@typed
def alpha_qe(
  query: Float[ArrayLike, " dim"],
  neighbours: Float[ArrayLike, "k dim"],
  similarities: Float[ArrayLike, " k"] | None,
  mask: Bool[ArrayLike, " k"] | None,
  *,
  alpha: Num[ArrayLike, ""] = 3.0,
  clip: bool = True,
) -> Float[Array, " dim"]:
  """Alpha query expansion: q + sum_i max(s_i, 0)^alpha d_i.

  Divided by its length; see `alpha_qe_weights`.

  Args:
    query: Of length 1.
    neighbours: Of length 1; 72 of them in the paper.
    similarities: s_1..s_k; None: the inner products are computed.
    mask: False where a neighbour does not count; None: all do.
    alpha: At least 0; 0 is `aqe`.
    clip: If False, s_i^alpha, see `alpha_qe_weights`.

  Returns:
    The expanded query, of length 1.

  Raises:
    ValueError: alpha is outside its range.
    InputError: As in `aqe`, and for similarities.

  Reference:
    Radenovic et al., "Fine-Tuning CNN Image Retrieval with No Human
    Annotation", TPAMI 2019.
  """
  _check_query(query, neighbours, similarities, mask)
  if similarities is None:
    similarities = jnp.matmul(
      _float32(neighbours), _float32(query), precision=lax.Precision.HIGHEST
    )
  weights = alpha_qe_weights(similarities, mask, alpha=alpha, clip=clip)
  return aggregate(query, neighbours, weights, mask)


@typed
def dqe(
  query: Float[ArrayLike, " dim"],
  neighbours: Float[ArrayLike, "k dim"],
  similarities: Float[ArrayLike, " k"] | None,
  mask: Bool[ArrayLike, " k"] | None,
  *,
  negatives: Float[ArrayLike, "m dim"],
  c: float | int = 0.1,
  bias: str = "free",
  loss: str = "hinge",
) -> Float[Array, " dim"]:
  """Discriminative query expansion: the normal of a linear SVM.

  Query and neighbours are the positives. The normal of the plane that parts
  them from the negatives, divided by its length; see `dqe_weights`. To within
  1e-4 it is `sklearn.svm.SVC(kernel="linear", C=c).coef_`, fitted to the end
  (`tol=1e-7`).

  Args:
    query: Of length 1.
    neighbours: Of length 1; 4 of them in the paper.
    similarities: Not used.
    mask: False where a neighbour does not count; None: all do.
    negatives: Rows that are not like the query, such as the lowest ranked; 5
      of them in the paper.
    c: How much an example on the wrong side costs, above 0.
    bias: "free", "regularized" or "none", see `dqe_weights`.
    loss: "hinge" or "squared_hinge", see `dqe_weights`.

  Returns:
    The expanded query, of length 1. Its gradient takes the weights for
    constants.

  Raises:
    ValueError: An option is outside its range.
    InputError: As in `aqe`, and for negatives.

  Reference:
    Arandjelovic and Zisserman, "Three Things Everyone Should Know to Improve
    Object Retrieval", CVPR 2012.
  """
  del similarities
  _check_query(query, neighbours, None, mask)
  _check_finite("negatives", negatives, None)
  weights = dqe_weights(
    query, neighbours, mask, negatives=negatives, c=c, bias=bias, loss=loss
  )
  d, other = _float32(neighbours), _float32(negatives)
  used = jnp.append(_used(mask, len(d)), jnp.ones(len(other), bool))
  return aggregate(query, jnp.concatenate([d, other]), weights, used)


@typed
def expand_queries(
  queries: Float[ArrayLike, "q dim"],
  database: Float[Any, "n dim"],
  *,
  k: Size,
  expand: Method = aqe,
  negatives: Size = 0,
  pool: Size | None = None,
  exclude: Num[ArrayLike, " q"] | None = None,
  chunk: Size = 4096,
  find: Callable[..., Any] = search.top_k,
  normalized: bool = True,
) -> Float[Array, "q dim"] | Float[np.ndarray, "q dim"]:
  """Searches for each query's neighbours and expands it by them.

  Args:
    queries: Rows of length 1.
    database: Rows of length 1, on a device, in NumPy or memory-mapped.
    k: How many neighbours, at least 1; at most as many as there are rows.
    expand: Any function of the form above: `aqe`, or another with options in a
      `functools.partial`. A network's parameters belong in a
      `jax.tree_util.Partial`, or they are compiled in.
    negatives: If above 0, how many of a query's lowest ranked rows `expand`
      gets as `negatives=`; 5 in the paper, for `dqe`. Costs a second search.
    pool: If given, these are not the lowest of all rows but of so many, drawn
      once, always the same for a database of this size.
    exclude: For each query a row that is not its neighbour, -1 for none.
    chunk: How many queries are searched at a time; a database on the host is
      read once for each chunk.
    find: What searches, in the form of `search.top_k`: that with options in a
      `functools.partial`, or one over several devices.
    normalized: False if rows of other lengths are meant; else `search.top_k`
      warns of them.

  Returns:
    The expanded queries, on the host if `queries` are, else on the device; in
    the type of `queries`.

  Raises:
    ValueError: An option is outside its range.
    InputError: A row holds NaN or infinity.

  Reference:
    Gordo et al., "Attention-Based Query Expansion Learning", ECCV 2020, Eq. 1.
  """
  n = np.shape(database)[0]
  _check_count("k", k, 1, n, "the rows of the database")
  _check_count("chunk", chunk, 1, None, "")
  _check_count("negatives", negatives, 0, n - k, "the rows that are left")
  if pool is not None:
    _check_count("pool", pool, max(negatives, 1), n, "the rows of the database")
  q, d, left_out = _values(queries), _values(database), _values(exclude)
  low = d
  if pool is not None and negatives and pool < n:
    rows = np.random.default_rng(0).choice(n, pool, replace=False)
    low = d[np.sort(rows)]
  size, dim = q.shape
  step = max(1, min(chunk, size, _GATHERED // ((k + negatives) * max(dim, 1))))
  partial = isinstance(expand, jax.tree_util.Partial)
  method = expand if partial else jax.tree_util.Partial(expand)
  out = np.empty(q.shape, q.dtype) if isinstance(q, np.ndarray) else None
  parts = [q[:0]]
  for first in range(0, size, chunk):
    # The last chunk repeats its last query, so that nothing compiles anew.
    rows = np.minimum(np.arange(first, first + min(chunk, size)), size - 1)
    own: Any = {} if left_out is None else {"exclude": left_out[rows]}
    _check_finite("queries", q[rows], None, first=first)
    if find is search.top_k:
      own["normalized"] = normalized and not first  # One warning is enough.
    scores, indices = _found(find(q[rows], d, k=k, **own), d)
    worst: Any = None
    if negatives:
      own = {"normalized": False} if find is search.top_k else {}
      worst = _found(find(-q[rows], low, k=negatives, **own), low)[1]
    new = min(len(rows), size - first)
    for start in range(0, new, step):
      part = np.minimum(np.arange(start, start + step), len(rows) - 1)
      y = _expand(
        method,
        q[rows[part]],
        d[indices[part]],
        scores[part],
        indices[part] >= 0,
        None if worst is None else low[worst[part]],
      )[: new - start]
      if out is None:
        parts.append(y.astype(q.dtype))
      else:
        out[first + start : first + start + len(y)] = y
  return jnp.concatenate(parts) if out is None else out


@typed
def augment_database(
  database: Float[Any, "n dim"],
  *,
  k: Size,
  expand: Method = aqe,
  negatives: Size = 0,
  pool: Size | None = None,
  chunk: Size = 4096,
  find: Callable[..., Any] = search.top_k,
  normalized: bool = True,
) -> Float[Array, "n dim"] | Float[np.ndarray, "n dim"]:
  """Expands each row of a database by the k rows next to it.

  A row is not its own neighbour. All neighbours are taken from the database as
  it is given, never from rows that are already expanded. With `aqe` this is
  ADBA, with `aqewd` ADBAwD, with `alpha_qe` alpha-DBA, and with `dqe` and
  `negatives=5` DDBA. Besides the result, memory is bounded.

  Args:
    database: Rows of length 1, on a device, in NumPy or memory-mapped.
    k: How many neighbours, at least 1 and less than there are rows; 4 in the
      paper, 36 for alpha-DBA.
    expand: As in `expand_queries`.
    negatives: As in `expand_queries`.
    pool: As in `expand_queries`; the exact lowest rows of a large database
      take as long as its neighbours.
    chunk: How many rows are searched for at a time, as in `expand_queries`.
    find: As in `expand_queries`.
    normalized: As in `expand_queries`.

  Returns:
    The new rows, on the host if `database` is, else on the device; in its
    type.

  Raises:
    ValueError: An option is outside its range.
    InputError: A row holds NaN or infinity.

  Reference:
    Gordo et al., "Attention-Based Query Expansion Learning", ECCV 2020, Eq. 1.
  """
  n = np.shape(database)[0]
  _check_count("k", k, 1, n - 1, "the other rows of the database")
  # A row has one fewer to be told from.
  _check_count("negatives", negatives, 0, n - 1 - k, "the rows that are left")
  return expand_queries(
    database,
    database,
    k=k,
    expand=expand,
    negatives=negatives,
    pool=pool,
    exclude=np.arange(n, dtype=np.int32),
    chunk=chunk,
    find=find,
    normalized=normalized,
  )


@jax.jit
def _expand(
  method: Method,
  queries: jax.Array,
  neighbours: jax.Array,
  similarities: jax.Array,
  mask: jax.Array,
  negatives: jax.Array | None,
) -> jax.Array:
  # What is not there may be -inf, which a method need not know of.
  similarities = jnp.where(mask, similarities, 0.0)
  each = (_float32(queries), _float32(neighbours), similarities, mask)
  if negatives is None:
    return jax.vmap(method)(*each)
  against = lambda q, d, s, m, x: method(q, d, s, m, negatives=x)
  return jax.vmap(against)(*each, _float32(negatives))


def _least_squares(
  gram: jax.Array, y: jax.Array, low: jax.Array, high: jax.Array
) -> jax.Array:
  """Minimizes b' gram b / 2 - y' b where low <= b <= high and sum(b) = 0.

  Moves as much from one coordinate to another as pays: the one whose gradient
  is lowest grows, and the partner is that which promises most.
  """
  curve = jnp.diagonal(gram)
  flat = jnp.finfo(gram.dtype).eps * jnp.max(curve)

  def unfinished(state: _State) -> jax.Array:
    b, slope, steps = state
    up = jnp.min(jnp.where(b < high, slope, jnp.inf))
    down = jnp.max(jnp.where(b > low, slope, -jnp.inf))
    return (down - up > _TOLERANCE) & (steps < _STEPS)

  def move(state: _State) -> _State:
    b, slope, steps = state
    i = jnp.argmin(jnp.where(b < high, slope, jnp.inf))
    gain = slope - slope[i]
    bend = jnp.maximum(curve + curve[i] - 2 * gram[i], flat)
    able = (b > low) & (gain > 0)
    j = jnp.argmax(jnp.where(able, gain * gain / bend, -1.0))
    room_i, room_j = high[i] - b[i], b[j] - low[j]
    t = jnp.minimum(gain[j] / bend[j], jnp.minimum(room_i, room_j))
    # Exactly on a limit, or rounding would leave a little room for ever.
    b = b.at[i].set(jnp.where(t == room_i, high[i], b[i] + t))
    b = b.at[j].set(jnp.where(t == room_j, low[j], b[j] - t))
    return b, slope + t * (gram[i] - gram[j]), steps + 1

  def again(_: Any, state: Any) -> Any:
    # The rounding of many small changes is not carried on.
    b, steps = state
    slope = jnp.matmul(gram, b, precision=lax.Precision.HIGHEST) - y
    return lax.while_loop(unfinished, move, (b, slope, steps))[::2]

  return lax.fori_loop(0, 3, again, (jnp.zeros_like(y), jnp.int32(0)))[0]


def _float32(x: Any) -> jax.Array:
  return jnp.asarray(x, jnp.float32)


def _values(x: Any) -> Any:
  return x  # Of which the type checker does not know the kind.


def _found(found: Any, database: Any) -> tuple[Any, Any]:
  put = np.asarray if isinstance(database, np.ndarray) else jnp.asarray
  return put(found.scores), put(found.indices)


def _used(mask: Any, k: int) -> jax.Array:
  return jnp.ones(k, bool) if mask is None else jnp.asarray(mask)


def _with_query(weights: jax.Array) -> jax.Array:
  return jnp.concatenate([jnp.ones(1, jnp.float32), weights])


def _unit(x: jax.Array, otherwise: jax.Array) -> jax.Array:
  """The direction of x, or of `otherwise` where x is 0; NaN stays NaN."""
  x = jnp.where(jnp.sum(x * x) == 0, otherwise, x)
  square = jnp.sum(x * x)
  return x / jnp.sqrt(jnp.where(square == 0, 1.0, square))


def _check_count(name: str, n: Any, low: Any, high: Any, what: str) -> None:
  if n < low:
    raise ValueError(f"{name} must be at least {low}, got {n}.")
  if high is not None and n > high:
    raise ValueError(f"{name} must be at most {high}, {what}, got {n}.")


def _check_query(
  query: Any, neighbours: Any, similarities: Any, mask: Any
) -> None:
  """Refuses what is not finite and counts, as far as it is known."""
  _check_finite("query", query[None], None)
  used = None if mask is None else images.concrete(mask)
  if mask is None or used is not None:
    _check_finite("neighbours", neighbours, used)
    _check_finite("similarities", similarities, used)


def _check_finite(name: str, rows: Any, used: Any, *, first: int = 0) -> None:
  known = None if rows is None else images.concrete(rows)
  if known is None:
    return
  bad: Any = ~np.isfinite(known)
  bad = bad.any(-1) if bad.ndim > 1 else bad
  bad = bad if used is None else bad & used
  if bad.any():
    raise InputError(
      f"{name} must be finite, got NaN or infinity in {bad.sum()} of "
      f"{len(bad)} rows; the first is row {first + np.argmax(bad)}."
    )
