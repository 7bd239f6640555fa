"""Search among descriptors by inner product: exact, approximate, on disk.

Descriptors are rows, normalized in L2 unless said otherwise, so that an inner
product is a cosine. Results come best first as scores and rows; of equal scores
the smaller row comes first. Where there is no further row, the index is -1 and
the score -inf. Faiss calls the same a flat index with METRIC_INNER_PRODUCT.

Source: `faiss.IndexFlatIP.search` gives the same rows.
"""

import concurrent.futures
import os
from typing import Any, NamedTuple
import warnings

import jax
from jax import core, lax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from jaxshape.errors import InputError, few
from jaxshape.retrieval.selection import Rows, Way
from jaxshape.typing import Array, ArrayLike, Bool, Float, Int, Size, typed

STORAGES = ("float32", "bfloat16", "int8")
# Bytes of scores and of copied rows that a search holds at once.
MEMORY = 2**30
# Rows whose norms are looked at, and how far those may be from 1.
_SAMPLE, _TOLERANCE = 1024, 1e-2


class Neighbours(NamedTuple):
  """The rows that were found, best first.

  Attributes:
    scores: Inner products, float32 [queries, k]; -inf where there is no row.
    indices: Rows of the database, int32 [queries, k]; -1 where there is none.
  """

  scores: Array
  indices: Array


class Index(NamedTuple):
  """A database of fixed capacity whose rows come and go; a pytree.

  Attributes:
    rows: As stored [capacity, dim].
    scales: What the stored numbers are multiplied by, float32 [capacity].
    valid: Which places hold a row, bool [capacity].
  """

  rows: Array
  scales: Array
  valid: Array


# What a person gave.


def _nothing(way: Way) -> Neighbours:
  """Of no queries."""
  empty = jnp.zeros((0, way.k))
  return Neighbours(empty, empty.astype(jnp.int32))


def _result(found: tuple[jax.Array, jax.Array]) -> Neighbours:
  scores, indices = found
  return Neighbours(scores, jnp.where(scores == -jnp.inf, -1, indices))


def _traced(*values: Any) -> bool:
  """Whether a value is not known yet, or nothing that is computed now will be.

  Within jit that holds for what is computed of known arrays too.
  """
  return any(isinstance(x, core.Tracer) for x in (*values, jnp.zeros(())))


@jax.jit
def _sizes(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The norm of each row, and whether all of it is finite."""
  rows = rows.astype(jnp.float32)
  return jnp.linalg.norm(rows, axis=-1), jnp.isfinite(rows).all(-1)


def _refuse_bad(name: str, bad: Any, *, start: int = 0) -> None:
  places = start + np.flatnonzero(np.asarray(bad))
  if places.size:
    raise InputError(
      f"{name} must be finite, got NaN or infinity in rows {few(places)}; "
      "leave these rows out or compute them again."
    )


def _warn_of_norms(name: str, rows: Any, valid: Any, *, inner: int = 0) -> bool:
  """Warns, and says so, if some of the rows do not have the norm 1."""
  count = rows.shape[0]
  if not count:
    return False
  places = np.unique(np.linspace(0, count - 1, _SAMPLE).astype(np.int64))
  if valid is not None:
    places = places[np.asarray(valid)[places]]
  if not places.size:
    return False
  norms = np.asarray(_sizes(jnp.asarray(rows[places]))[0])
  norms = norms[np.isfinite(norms)]
  off = bool(norms.size) and np.abs(norms - 1).max() > _TOLERANCE
  if off:
    warnings.warn(
      f"{name} has rows of norms {norms.min():.3g}..{norms.max():.3g} where 1 "
      "is expected, so that scores are no cosines; give "
      "search.normalize(rows), or normalized=False if that is meant.",
      stacklevel=5 + inner,  # Beyond this file and what @typed adds.
    )
  return off


def _prepare(
  queries: Any,
  database: Any,
  exclude: Any,
  way: Way,
  chunk: Any,
  memory: Any,
  normalized: bool,
) -> tuple[jax.Array, jax.Array | None, Way]:
  """What is searched for and how, once it is known to be in order."""
  count, width = database.shape
  way.check(count, memory=memory, chunk=chunk)
  if queries.shape[1] != width:
    raise InputError(
      f"queries have {queries.shape[1]} numbers a row and the database has "
      f"{width}; both must come from the same network and whitening."
    )
  queries = jnp.asarray(queries, jnp.float32)
  if exclude is not None:
    known = None if _traced(exclude) else np.asarray(exclude)
    if known is not None and known.size:
      low, high = known.min(), known.max()
      if low < -1 or high >= count:
        raise ValueError(
          f"exclude must be -1 or one of {count} rows, got {low}..{high}."
        )
    exclude = jnp.asarray(exclude, jnp.int32)
  if way.probe:
    _refuse_bad("queries", ~np.asarray(_sizes(queries)[1]))
    if normalized:
      _warn_of_norms("queries", queries, None, inner=1)
  # The probe refuses what would have to be hidden.
  return queries, exclude, way._replace(guard=not way.probe)


def _on_host(
  queries: jax.Array,
  database: np.ndarray,
  valid: np.ndarray | None,
  exclude: jax.Array | None,
  way: Way,
  normalized: bool,
) -> tuple[jax.Array, jax.Array]:
  """Rows that lie with the host, the next chunk read while one is searched."""
  count, found = database.shape[0], None
  narrow = database.dtype in (jnp.bfloat16, np.float16)
  dtype = database.dtype.newbyteorder("=") if narrow else np.float32

  def read(start: int) -> tuple[np.ndarray, jax.Array]:
    part = np.asarray(database[start : start + way.chunk], dtype)
    return part, jax.device_put(part)

  with concurrent.futures.ThreadPoolExecutor(1) as reader:
    ahead = reader.submit(read, 0)
    for start in range(0, count, way.chunk):
      stop = start + way.chunk
      host, part = ahead.result()
      if stop < count:
        ahead = reader.submit(read, stop)
      keep = None if valid is None else valid[start:stop]
      if way.probe and normalized:
        normalized = not _warn_of_norms(
          "database", host, keep, inner=1
        )  # Said once.
      rows = Rows(part, None, None if keep is None else jnp.asarray(keep))
      moved = None if exclude is None else exclude - start
      one, bad = way.over_queries(
        lambda w, q, e, rows=rows: w.over_rows(q, rows, e), queries, moved
      )
      if way.probe:
        _refuse_bad("database", bad, start=start)
      one = one[0], jnp.where(one[1] >= 0, one[1] + start, -1)
      found = one if found is None else way.join(found, one)
  assert found is not None
  return found


@typed
def top_k(
  queries: Float[ArrayLike, "queries dim"],
  database: Float[Any, "rows width"],
  *,
  k: Size,
  chunk: Size | None = None,
  memory: Size = MEMORY,
  form: str = "two_stage",
  recall: float = 0.95,
  precision: str = "highest",
  valid: Bool[ArrayLike, " rows"] | None = None,
  exclude: Int[ArrayLike, " queries"] | None = None,
  normalized: bool = True,
  check: bool = True,
) -> Neighbours:
  """Finds the k rows with the largest inner products for each query.

  s_ij = <q_i, d_j>; exact but for form "approximate": a product, the maxima of
  groups of some 100 scores, the k best groups, and the k best of their members.
  Of equal scores, the smaller row comes first.

  A database of JAX stays where it is, and the function may be called within
  jit. One of NumPy or on disk (`numpy.memmap`, see `read_rows`) may be larger
  than the memory: it comes in chunks, the next one read meanwhile. Products are
  summed in float32; queries are rounded to float16 or bfloat16 where the
  database is stored so.

  Args:
    queries: One descriptor a row.
    database: Likewise, of the same width; float32, float16 or bfloat16.
    k: Number of rows to find, at most those of the database.
    chunk: Rows at once; without it, as many as the memory allows.
    memory: Bytes for scores and copies of rows beside the database itself. A
      bound for some 16 queries at once; chunks that you set are kept.
    form: "two_stage"; "sort", which selects among all scores at once, slower
      but the same; "approximate", which may miss rows where the hardware has
      an instruction for it.
    recall: The share of rows that "approximate" finds, on average, above 0.
    precision: Of float32 products: "highest"; "high" and "default" are faster
      on GPUs and TPUs, with as few as 8 bits, and then scores are not exact.
    valid: False for rows that must not be found; these may hold anything.
    exclude: For each query, a row that it must not find, such as itself; -1 if
      there is none.
    normalized: Whether all norms should be 1. Some rows are looked at, and if
      they differ there is a warning with their norms.
    check: Whether to look for NaN, infinity and norms. It costs about one query
      more, and waits for the result. Nothing is checked within jit, where rows
      with NaN are never found.

  Returns:
    Scores and rows, best first; -inf and -1 where too few rows may be found.

  Raises:
    InputError: Rows are not finite, or the widths differ.
    ValueError: An option is outside its range.

  Reference:
    Johnson et al., "Billion-scale similarity search with GPUs", IEEE
    Transactions on Big Data 2019, Eq. 1 (the exact search).
  """
  on_host = not isinstance(database, jax.Array) and not _traced(
    queries, valid, exclude
  )
  data: Any = database if on_host else jnp.asarray(database)
  way = Way(
    int(k), form, float(recall), precision,
    check and not _traced(queries, data, valid), True,
  )  # fmt: skip
  queries, exclude, way = _prepare(
    queries, data, exclude, way, chunk, memory, normalized
  )
  row = data.shape[1] * min(data.dtype.itemsize, 4)
  # Chunks of the host are there twice, besides the one that is searched.
  copied, whole = (3 * row, 2 * row) if on_host else (row, 0)
  way = way.within(
    *(len(queries), len(data)), chunk=chunk, memory=memory,
    copied=copied, whole=whole,
  )  # fmt: skip
  if not len(queries):
    return _nothing(way)
  if on_host:
    keep = None if valid is None else np.asarray(valid)
    return _result(_on_host(queries, data, keep, exclude, way, normalized))
  if way.probe and normalized:
    _warn_of_norms("database", data, valid)
  rows = Rows(data, None, None if valid is None else jnp.asarray(valid))
  step = lambda w, q, e: w.over_rows(q, rows, e)
  found, bad = way.over_queries(step, queries, exclude)
  if way.probe:
    _refuse_bad("database", bad)
  return _result(found)


@typed
def sharded_top_k(
  queries: Float[ArrayLike, "queries dim"],
  database: Float[ArrayLike, "rows width"],
  *,
  mesh: Mesh,
  k: Size,
  axis: str = "data",
  chunk: Size | None = None,
  memory: Size = MEMORY,
  form: str = "two_stage",
  recall: float = 0.95,
  precision: str = "highest",
  valid: Bool[ArrayLike, " rows"] | None = None,
  exclude: Int[ArrayLike, " queries"] | None = None,
  normalized: bool = True,
  check: bool = True,
) -> Neighbours:
  """Finds the same as `top_k` where the rows are spread over devices.

  Every device searches its own rows; of their k best each, the k best are the
  result. Only these travel.

  Args:
    queries: One descriptor a row; every device gets all of them.
    database: Likewise. Stays where it is if it is sharded along `axis`, else
      it is spread. If the devices do not divide its rows, a copy is padded.
    mesh: The devices.
    k: Number of rows to find, at most those of the database.
    axis: The axis of the mesh that the rows are spread along.
    chunk: Rows of each device at once, as in `top_k`.
    memory: Bytes on each device, as in `top_k`.
    form: As in `top_k`.
    recall: As in `top_k`, on each device.
    precision: As in `top_k`.
    valid: False for rows that must not be found.
    exclude: For each query, a row that it must not find; -1 if there is none.
    normalized: As in `top_k`.
    check: As in `top_k`.

  Returns:
    Scores and rows of the whole database, the same on every device.

  Raises:
    InputError: Rows are not finite, or the widths differ.
    ValueError: An option is outside its range.

  Reference:
    Johnson et al., "Billion-scale similarity search with GPUs", IEEE
    Transactions on Big Data 2019, Sec. 5.4 (shards).
  """
  if axis not in mesh.axis_names:
    raise ValueError(
      f"axis must be one of the mesh's {mesh.axis_names}, got {axis!r}."
    )
  data: Any = database
  way = Way(
    int(k), form, float(recall), precision,
    check and not _traced(queries, data, valid), True,
  )  # fmt: skip
  queries, exclude, way = _prepare(
    queries, data, exclude, way, chunk, memory, normalized
  )
  here = getattr(data, "is_fully_addressable", True)
  if way.probe and normalized and here:
    _warn_of_norms("database", data, valid)
  shards = mesh.shape[axis]
  if lacking := -len(data) % shards:
    pad = jnp if isinstance(data, jax.Array) else np
    mask = np.ones(len(data), bool) if valid is None else valid
    valid = jnp.pad(jnp.asarray(mask), (0, lacking))
    data = pad.pad(data, ((0, lacking), (0, 0)))
  if not isinstance(data, jax.Array) and data.dtype.itemsize > 4:
    data = np.asarray(data, np.float32)
  row = data.shape[1] * data.dtype.itemsize
  way = way.within(
    *(len(queries), len(data) // shards), chunk=chunk, memory=memory,
    copied=row, whole=0,
  )  # fmt: skip
  if not len(queries):
    return _nothing(way)
  if not _traced(data):
    # Straight to their devices, without a whole copy on one of them.
    spread = NamedSharding(mesh, PartitionSpec(axis))
    data = jax.device_put(data, spread)
  rows = Rows(data, None, None if valid is None else jnp.asarray(valid))
  step = lambda w, q, e: w.over_devices(mesh, axis, q, rows, e)
  found, bad = way.over_queries(step, queries, exclude)
  if way.probe:
    _refuse_bad("database", bad)
  return _result(found)


# Descriptors.


@typed
def normalize(
  rows: Float[ArrayLike, "*batch dim"], *, check: bool = True
) -> Float[Array, "*batch dim"]:
  """Divides each descriptor by its length, d / |d|.

  Args:
    rows: Of any length.
    check: Whether to refuse rows that are not finite or are 0; within jit
      nothing is checked, and 0 stays 0.

  Returns:
    Descriptors of length 1, float32.

  Raises:
    InputError: A row is not finite, or 0, which has no direction.

  Reference:
    Arandjelovic and Zisserman, "Three things everyone should know to improve
    object retrieval", CVPR 2012, Sec. 3 (unit vectors compared by products).
  """
  x = jnp.asarray(rows, jnp.float32)
  # Squares of the largest number neither overflow nor vanish then.
  largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True, initial=0)
  scaled = x / jnp.where(largest > 0, largest, 1)
  squares = jnp.sum(scaled * scaled, axis=-1, keepdims=True)
  if check and not _traced(x):
    flat = np.asarray(squares).reshape(-1)
    _refuse_bad("rows", ~np.isfinite(flat))
    if (none := np.flatnonzero(flat == 0)).size:
      raise InputError(
        f"rows must not be 0 to be normalized, got zeros in rows "
        f"{few(none)}; leave these out."
      )
  return scaled * lax.rsqrt(jnp.where(squares > 0, squares, 1))


@typed
def read_rows(path: str | os.PathLike) -> Float[np.ndarray, "rows dim"]:
  """Opens descriptors on disk without reading them: a memory-mapped `.npy`.

  Args:
    path: A file that `numpy.save` wrote: [rows, dim], float32, float16 or
      float64. Anything pickled is refused, so that nothing is executed.

  Returns:
    A read-only `numpy.memmap`, which `top_k` takes.

  Raises:
    InputError: The file is not there, is cut off, or holds something else.

  Reference:
    NumPy Enhancement Proposal 1, "A Simple File Format for NumPy Arrays", 2007.
  """
  wanted = "wanted is a .npy file of floats [rows, dim], as numpy.save writes"
  try:
    rows = np.load(path, mmap_mode="r", allow_pickle=False)
  except (ValueError, EOFError, OSError, OverflowError, SyntaxError) as error:
    text = " ".join(str(error).split()) or type(error).__name__
    raise InputError(f"{path} cannot be read ({text}); {wanted}.") from error
  if not isinstance(rows, np.ndarray):
    rows.close()
    raise InputError(f"{path} is an archive of several arrays; {wanted}.")
  if rows.ndim != 2 or rows.dtype.kind != "f" or 0 in rows.shape:
    raise InputError(
      f"{path} holds {rows.dtype} of shape {rows.shape}; {wanted}."
    )
  return rows


# Rows that come and go.


def _encode(rows: jax.Array, storage: str) -> tuple[jax.Array, jax.Array]:
  """The rows as stored, and what they are multiplied by again."""
  if storage != "int8":
    return rows.astype(storage), jnp.ones(rows.shape[0])
  largest = jnp.abs(rows).max(-1, initial=0)
  scales = jnp.where(largest > 0, largest, 1) / 127
  return jnp.round(rows / scales[:, None]).astype(jnp.int8), scales


def _put(index: Index, rows: jax.Array, places: jax.Array) -> Index:
  values, scales = _encode(rows.astype(jnp.float32), str(index.rows.dtype))
  # Places beyond the end are dropped.
  at = lambda x, y: x.at[places].set(y, mode="drop")
  return Index(
    at(index.rows, values), at(index.scales, scales), at(index.valid, True)
  )


_put_copied = jax.jit(_put)
_put_in_place = jax.jit(_put, donate_argnums=0)
_drop = jax.jit(
  lambda valid, ids: valid.at[jnp.where(ids < 0, valid.size, ids)].set(
    False, mode="drop"
  )
)


@typed
def build_index(
  rows: Float[ArrayLike, "rows dim"],
  *,
  storage: str = "float32",
  capacity: Size | None = None,
  normalized: bool = True,
  check: bool = True,
) -> Index:
  """Stores descriptors so that some may come and go later.

  int8 holds round(127 d / max |d|) and one scale a row: a quarter of the
  memory of float32. Of 512 numbers, scores are off by some 0.0002 (0.00006 in
  bfloat16) and 99 of 100 neighbours are the same.

  Args:
    rows: One descriptor a row; the ids are 0..rows - 1. They are encoded piece
      by piece, so that a memory-mapped file is never there twice.
    storage: "float32", "bfloat16" or "int8". Scores are float32 always.
    capacity: Places for rows; without it, as many as there are rows. It never
      grows: build a larger index for that.
    normalized: Whether all norms should be 1, as in `top_k`.
    check: Whether to look for NaN, infinity and norms.

  Returns:
    The index.

  Raises:
    InputError: Rows are not finite.
    ValueError: An option is outside its range.

  Reference:
    Jégou et al., "Product quantization for nearest neighbor search", TPAMI
    2011, Sec. II-A (of which a scalar quantizer is the simplest).
  """
  data: Any = rows
  count, width = data.shape
  size = count if capacity is None else int(capacity)
  if storage not in STORAGES:
    raise ValueError(f"storage must be one of {STORAGES}, got {storage!r}.")
  if size < max(count, 1):
    raise ValueError(
      f"capacity must be at least {max(count, 1)}, the rows, got {size}."
    )
  index = Index(
    jnp.zeros((size, width), storage), jnp.ones(size), jnp.zeros(size, bool)
  )
  piece = max(1, MEMORY // (16 * max(width, 1)))
  for start in range(0, count, piece):
    part = _native(data[start : start + piece])
    if check and not _traced(part):
      _refuse_bad("rows", ~np.asarray(_sizes(part)[1]), start=start)
      normalized = normalized and not _warn_of_norms("rows", part, None)
    places = jnp.arange(start, start + part.shape[0])
    index = _put_in_place(index, part, places)
  return index


@typed
def add(
  index: Index,
  rows: Float[ArrayLike, "rows dim"],
  *,
  normalized: bool = True,
  check: bool = True,
) -> tuple[Index, Int[Array, " rows"]]:
  """Puts rows into the first free places, those of removed rows included.

  The arrays of the given index are copied, unless the call is within a jit that
  has them donated: `jax.jit(search.add, donate_argnums=0)`.

  Args:
    index: Stays as it is.
    rows: One descriptor a row.
    normalized: Whether all norms should be 1, as in `top_k`.
    check: Whether to look for NaN, infinity and norms.

  Returns:
    The new index, and the ids of the rows: their places, which they keep until
    they are removed. Within jit, -1 and no row where there is no room.

  Raises:
    InputError: Rows are not finite, of another width, or there is no room.

  Source: `faiss.IndexIDMap.add_with_ids`, with ids that are given back.
  """
  data = _native(rows)
  _check_width(data, index)
  if check and not _traced(data):
    _refuse_bad("rows", ~np.asarray(_sizes(data)[1]))
    if normalized and data.shape[0]:
      _warn_of_norms("rows", data, None)
  count, size = data.shape[0], index.valid.shape[0]
  places = jnp.nonzero(~index.valid, size=count, fill_value=size)[0]
  if not _traced(places) and count and int(places[-1]) == size:
    free = int((~index.valid).sum())
    raise InputError(
      f"the index has room for {free} more rows of {size}, got {count}; build "
      "one of a larger capacity."
    )
  ids = jnp.where(places < size, places, -1).astype(jnp.int32)
  return _put_copied(index, data, places), ids


@typed
def remove(
  index: Index, ids: Int[ArrayLike, " removed"], *, check: bool = True
) -> Index:
  """Takes rows out; all others keep their ids.

  Marks places as free and moves no row, so that it costs what the removed ones
  cost, and a copy of one byte for each place.

  Args:
    index: Stays as it is.
    ids: As `add` or `search` gave them.
    check: Whether to refuse ids that are not there. Within jit they are left
      out.

  Returns:
    The new index.

  Raises:
    InputError: An id is not there.

  Source: `faiss.Index.remove_ids`, which moves the rows behind.
  """
  given = jnp.asarray(ids)
  if check and not _traced(given, index.valid):
    known, size = np.asarray(given), index.valid.shape[0]
    inside = (known >= 0) & (known < size)
    there = np.asarray(index.valid)[np.where(inside, known, 0)] & inside
    if not there.all():
      raise InputError(
        f"ids must be in the index, got {few(known[~there])}, which are not."
      )
  return index._replace(valid=_drop(index.valid, given))


@typed
def search(
  index: Index,
  queries: Float[ArrayLike, "queries dim"],
  *,
  k: Size,
  chunk: Size | None = None,
  memory: Size = MEMORY,
  form: str = "two_stage",
  recall: float = 0.95,
  precision: str = "highest",
  exclude: Int[ArrayLike, " queries"] | None = None,
  normalized: bool = True,
  check: bool = True,
) -> Neighbours:
  """Finds the k best rows of an index for each query, as `top_k` does.

  Args:
    index: Any.
    queries: One descriptor a row; rounded to bfloat16 if the rows are stored in
      fewer than 32 bits.
    k: At most the capacity.
    chunk: As in `top_k`.
    memory: As in `top_k`.
    form: As in `top_k`.
    recall: As in `top_k`.
    precision: As in `top_k`.
    exclude: For each query, an id that it must not find; -1 if there is none.
    normalized: Whether the norms of the queries should be 1.
    check: Whether to look for NaN, infinity and norms in the queries.

  Returns:
    Scores and ids, best first; -inf and -1 where the index holds too few rows.

  Raises:
    InputError: Queries are not finite, or of another width.
    ValueError: An option is outside its range.

  Source: `faiss.Index.search`, of which labels are -1 likewise.
  """
  way = Way(
    int(k), form, float(recall), precision, check and not _traced(queries), True
  )
  queries, exclude, way = _prepare(
    queries, index.rows, exclude, way, chunk, memory, normalized
  )
  # Rows were looked at when they came.
  way = way._replace(probe=False, guard=True)
  row = index.rows.shape[1] * 2
  way = way.within(
    *(len(queries), len(index.valid)), chunk=chunk, memory=memory,
    copied=2 * row, whole=row if index.rows.dtype == jnp.int8 else 0,
  )  # fmt: skip
  if not len(queries):
    return _nothing(way)
  scales = index.scales if index.rows.dtype == jnp.int8 else None
  rows = Rows(index.rows, scales, index.valid)
  step = lambda w, q, e: w.over_rows(q, rows, e)
  return _result(way.over_queries(step, queries, exclude)[0])


def _native(rows: Any) -> jax.Array:
  """Rows on the device, also those of a file in the other byte order."""
  if isinstance(rows, np.ndarray) and not rows.dtype.isnative:
    rows = rows.astype(rows.dtype.newbyteorder("="))
  return jnp.asarray(rows)


def _check_width(rows: Any, index: Index) -> None:
  if rows.shape[1] != index.rows.shape[1]:
    raise InputError(
      f"rows have {rows.shape[1]} numbers and those of the index "
      f"{index.rows.shape[1]}."
    )
