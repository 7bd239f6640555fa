"""The k best of scores, and of products too large to be held at once.

Of equal scores the smaller index comes first, in every form but "approximate".

Source: `numpy.argsort(-scores, kind="stable")[:, :k]` gives the same.
"""

from collections.abc import Callable
import functools
import math
from typing import Any, NamedTuple

import jax
from jax import core, lax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jaxshape.typing import Array, ArrayLike, Float, Int, Size, typed

FORMS = ("two_stage", "sort", "approximate")
PRECISIONS = ("highest", "high", "default")
# Fewer queries at once make a product that only waits for the database.
FEW = 16
# Sizes of groups among which one that divides the rows is looked for.
_GROUPS = range(64, 129)


def _group(rows: int, k: int) -> int:
  """The size of the groups; one that divides the rows spares a copy."""
  ideal = math.sqrt(rows / k)
  even = [g for g in _GROUPS if rows % g == 0]
  return min(even, key=lambda g: abs(g - ideal), default=96)


def _signless(scores: jax.Array) -> jax.Array:
  """Makes -0 equal to 0, which sorting would put behind it."""
  return jnp.where(scores == 0, 0.0, scores)


def _two_stage(scores: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
  """Exact, from the members of the k best groups.

  A member of another group has k groups before it, each with a maximum that is
  larger, or as large and at a smaller index.
  """
  count, rows = scores.shape
  group = _group(rows, k)
  groups = -(-rows // group)
  wide = scores
  if lacking := groups * group - rows:
    wide = jnp.pad(scores, ((0, 0), (0, lacking)), constant_values=-jnp.inf)
  maxima = _signless(wide.reshape(count, groups, group).max(-1))
  # In the order of the rows, so that the first of equal scores comes first.
  chosen = jnp.sort(lax.top_k(maxima, k)[1], axis=-1)
  members = (chosen[..., None] * group + jnp.arange(group)).reshape(count, -1)
  found = jnp.take_along_axis(scores, jnp.minimum(members, rows - 1), axis=1)
  found = jnp.where(members < rows, _signless(found), -jnp.inf)
  best, places = lax.top_k(found, k)
  return best, jnp.take_along_axis(members, places, axis=1)


@typed
def best(
  scores: Float[ArrayLike, "queries rows"],
  *,
  k: Size,
  form: str = "two_stage",
  recall: float = 0.95,
) -> tuple[Float[Array, "queries {k}"], Int[Array, "queries {k}"]]:
  """Finds the k largest numbers of each row and where they are.

  Two stages: the row is cut into groups of some 100, the k groups of the
  largest maxima are kept, and the k best of their members are exact.

  Args:
    scores: Without NaN.
    k: At least 1 and at most the length of a row.
    form: "two_stage"; "sort", a selection from all at once; "approximate",
      which may miss some where the hardware has an instruction for it.
    recall: The share that "approximate" finds, on average.

  Returns:
    The numbers, largest first, and their places.

  Reference:
    Chern et al., "TPU-KNN: K Nearest Neighbor Search at Peak FLOP/s", NeurIPS
    2022, Sec. 5 (of which the approximate form keeps one number a group).
  """
  scores, k = jnp.asarray(scores), int(k)
  rows = scores.shape[1]
  if not 1 <= k <= rows:
    raise ValueError(f"k must be between 1 and {rows}, got {k}.")
  if form not in FORMS:
    raise ValueError(f"form must be one of {FORMS}, got {form!r}.")
  if form == "approximate":
    found = lax.approx_max_k(scores, k, recall_target=recall)
    return found[0], found[1]
  # Sorting many groups costs more than sorting all members.
  if form == "sort" or 2 * k * _group(rows, k) >= rows:
    found = lax.top_k(_signless(scores), k)
    return found[0], found[1]
  return _two_stage(scores, k)


class Rows(NamedTuple):
  """What is searched; parts that are not needed are None.

  Attributes:
    values: Descriptors as stored [rows, dim].
    scales: What those are multiplied by [rows].
    valid: False for rows that must not be found [rows].
  """

  values: Any
  scales: Any = None
  valid: Any = None


class Way(NamedTuple):
  """How queries and rows become neighbours; known when compiling.

  Attributes:
    k: As for `best`.
    form: As for `best`.
    recall: As for `best`.
    precision: Of products.
    probe: Whether to look for rows that are not finite.
    guard: Whether to hide rows with NaN.
    chunk: Rows at once.
    block: Queries at once.
  """

  k: int
  form: str
  recall: float
  precision: str
  probe: bool
  guard: bool
  chunk: int = 1
  block: int = 1

  def check(self, rows: int, *, memory: Any, chunk: Any) -> None:
    """Refuses options that are outside their range."""
    if self.k < 1:
      raise ValueError(f"k must be at least 1, got {self.k}.")
    if self.k > rows:
      raise ValueError(
        f"k must be at most {rows}, the rows of the database, got {self.k}."
      )
    if self.form not in FORMS:
      raise ValueError(f"form must be one of {FORMS}, got {self.form!r}.")
    if self.precision not in PRECISIONS:
      raise ValueError(
        f"precision must be one of {PRECISIONS}, got {self.precision!r}."
      )
    if not 0 < self.recall <= 1:
      raise ValueError(
        f"recall must be above 0 and at most 1, got {self.recall}."
      )
    if memory < 1:
      raise ValueError(f"memory must be at least 1 byte, got {memory}.")
    if chunk is not None and chunk < 1:
      raise ValueError(f"chunk must be at least 1, got {chunk}.")

  def within(
    self,
    queries: int,
    rows: int,
    *,
    chunk: Size | None,
    memory: Size,
    copied: int,
    whole: int,
  ) -> "Way":
    """The same with chunks and blocks that keep to a memory.

    Args:
      queries: How many there are.
      rows: Likewise.
      chunk: Rows at once, where the user says so.
      memory: In bytes.
      copied: Bytes of a row's copies if the rows are cut.
      whole: The same if they are not.

    Returns:
      Some 16 queries go at once even if that takes more.
    """
    # Scores are there twice, once without those that must not be found.
    queries = max(queries, 1)
    few = min(queries, FEW)
    if chunk is None:
      uncut = (whole + 8 * few) * rows <= memory
      most = int(memory) // (copied + 8 * few)
      chunk = rows if uncut else _even(rows, most)
    chunk = min(int(chunk), rows)
    left = int(memory) - (whole if chunk == rows else copied) * chunk
    block = _even(queries, max(left // (8 * chunk), few))
    return self._replace(chunk=chunk, block=block)

  def over_rows(
    self, queries: Any, rows: Rows, exclude: Any
  ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """The best of all rows, chunk by chunk, and which are not finite."""
    count, found, bad = rows.values.shape[0], None, []
    for start in range(0, count, self.chunk):
      size = min(self.chunk, count - start)
      part, wrong = _select(
        queries, rows, exclude, start, size=size, way=self._replace(block=1)
      )
      found = part if found is None else self.join(found, part)
      bad.append(wrong)
    assert found is not None
    return found, bad[0] if len(bad) == 1 else jnp.concatenate(bad)

  def over_devices(
    self, mesh: Mesh, axis: str, queries: Any, rows: Rows, exclude: Any
  ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """The same of rows that are spread along an axis of a mesh."""
    masked, excluded = rows.valid is not None, exclude is not None
    run = _sharded_step(mesh, axis, self, masked=masked, excluded=excluded)
    # What is not needed is stood in for by anything that fits.
    mask = rows.valid if masked else jnp.zeros(mesh.shape[axis], bool)
    return run(queries, rows.values, mask, exclude if excluded else 0)

  def over_queries(
    self, step: Callable[..., Any], queries: Any, exclude: Any
  ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """Gathers `step(way, queries, exclude)` over blocks; one looks at rows.

    Blocks are steps of the host: CPUs are slow at products in compiled loops.
    """
    count = queries.shape[0]
    if count <= self.block:
      return step(self, queries, exclude)
    blocks = -(-count // self.block)
    lacking = blocks * self.block - count
    queries = jnp.pad(queries, ((0, lacking), (0, 0)))
    if exclude is not None:
      exclude = jnp.pad(exclude, (0, lacking), constant_values=-1)
    again = self._replace(probe=False)
    if blocks > FEW and isinstance(queries, core.Tracer):
      fold = lambda x: x.reshape(blocks, self.block, *x.shape[1:])
      pair = jax.tree.map(fold, (queries, exclude))
      both, bad = lax.map(lambda one: step(again, *one), pair)
      flat = [x.reshape(-1, x.shape[-1])[:count] for x in both]
      return (flat[0], flat[1]), bad[0]
    found, wrong = [], []
    for i in range(0, count, self.block):
      cut = lambda x, i=i: x[i : i + self.block]
      pair = jax.tree.map(cut, (queries, exclude))
      both, bad = step(again if i else self, *pair)
      found.append(both)
      wrong.append(None if i else bad)
    scores, indices = (
      jnp.concatenate(x)[:count] for x in zip(*found, strict=True)
    )
    return (scores, indices), wrong[0]

  def join(self, *lists: Any) -> tuple[jax.Array, jax.Array]:
    """The k best of several lists, whose rows come after each other."""
    pairs = (jnp.concatenate(x, axis=1) for x in zip(*lists, strict=True))
    return self.merge(*pairs)

  def merge(
    self, scores: jax.Array, indices: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """The k best of lists that are put together already."""
    return _merge(scores, indices, k=self.k)


def _even(count: int, most: int) -> int:
  """The size of equal parts that are at most so large."""
  most = max(1, min(count, most))
  return -(-count // -(-count // most))


def _product(queries: jax.Array, rows: jax.Array, precision: str) -> jax.Array:
  """Inner products, summed in float32."""
  if rows.dtype == jnp.int8:
    rows = rows.astype(jnp.bfloat16)  # Which holds every int8.
  return lax.dot_general(
    queries.astype(rows.dtype),
    rows,
    (((1,), (1,)), ((), ())),
    precision=precision,
    preferred_element_type=jnp.float32,
  )


@functools.partial(jax.jit, static_argnames=("size", "way"))
def _select(
  queries: jax.Array,
  rows: Rows,
  exclude: jax.Array | None,
  start: Any,
  *,
  size: int,
  way: Way,
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
  """The best of the rows start..start + size, and which are not finite."""
  if size < rows.values.shape[0]:
    rows = jax.tree.map(
      lambda x: lax.dynamic_slice_in_dim(x, start, size), rows
    )
  bad = jnp.zeros(size, bool)
  if way.probe:
    # 0 times anything finite is 0, so this finds the rest within the product.
    queries = jnp.pad(queries, ((0, 1), (0, 0)))
  scores = _product(queries, rows.values, way.precision)
  if rows.scales is not None:
    scores = scores * rows.scales
  if way.probe:
    # Cut off before the selection: XLA knows that by its slice of a sort, and
    # with another slice behind it would sort everything, 25 times slower.
    bad, scores = jnp.isnan(scores[-1]), scores[:-1]
  keep = None
  if rows.valid is not None:
    keep, bad = rows.valid, bad & rows.valid
  if exclude is not None:
    other = jnp.arange(size) != (exclude - start)[:, None]
    keep = other if keep is None else keep & other
  if way.guard:
    number = ~jnp.isnan(scores)
    keep = number if keep is None else keep & number
  if keep is not None:
    scores = jnp.where(keep, scores, -jnp.inf)
  found = best(scores, k=min(way.k, size), form=way.form, recall=way.recall)
  return (found[0], (found[1] + start).astype(jnp.int32)), bad


@functools.partial(jax.jit, static_argnames="k")
def _merge(
  scores: jax.Array, indices: jax.Array, *, k: int
) -> tuple[jax.Array, jax.Array]:
  top, places = lax.top_k(scores, min(k, scores.shape[1]))
  return top, jnp.take_along_axis(indices, places, axis=1)


@functools.cache
def _sharded_step(
  mesh: Mesh, axis: str, way: Way, *, masked: bool, excluded: bool
) -> Callable[..., Any]:
  """The search of every device's own rows, and the merge, compiled once."""

  def local(queries: Any, values: Any, valid: Any, exclude: Any) -> Any:
    start = lax.axis_index(axis) * values.shape[0]
    rows = Rows(values, None, valid if masked else None)
    moved = exclude - start if excluded else None
    (scores, indices), bad = way.over_rows(queries, rows, moved)
    # In the order of the devices, which is that of the rows.
    gather = lambda x, at: lax.all_gather(x, axis, axis=at, tiled=True)
    both = way.merge(gather(scores, 1), gather(indices + start, 1))
    return both, gather(bad, 0)

  part, whole = PartitionSpec(axis), PartitionSpec()
  return jax.jit(
    jax.shard_map(
      local,
      mesh=mesh,
      in_specs=(whole, part, part, whole),
      out_specs=whole,
      check_vma=False,  # It does not know that gathered values agree.
    )
  )
