import functools
import warnings

import jax
import jax.numpy as jnp
from jax.test_util import check_grads
from jaxtyping import TypeCheckError
import numpy as np
import pytest

from jaxshape.errors import InputError
from jaxshape.retrieval import search

ROWS, DIM, QUERIES, K = 1501, 32, 7, 10
# Of the cases that do not say otherwise; values are whole sixteenths, so that
# products are exact in any order and many of them are equal.
plain = functools.partial(search.top_k, normalized=False)


def _exact(seed=0, rows=ROWS, queries=QUERIES):
  rng = np.random.default_rng(seed)
  draw = lambda n: rng.integers(-2, 3, (n, DIM)).astype(np.float32) / 16
  return draw(queries), draw(rows)


def _unit(seed=0, rows=ROWS, queries=QUERIES, dim=DIM):
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(rows + queries, dim)).astype(np.float32)
  x /= np.linalg.norm(x, axis=1, keepdims=True)
  return x[:queries], x[queries:]


def _by_sorting(queries, database, k, keep=None):
  scores = queries.astype(np.float64) @ database.astype(np.float64).T
  if keep is not None:
    scores = np.where(keep, scores, -np.inf)
  order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
  best = np.take_along_axis(scores, order, 1)
  return best, np.where(np.isneginf(best), -1, order)


def _equal(got, want):
  assert got.scores.dtype == jnp.float32
  assert got.indices.dtype == jnp.int32
  np.testing.assert_array_equal(got.indices, want[1])
  np.testing.assert_array_equal(got.scores, want[0])


# Golden: a stable sort of all products.


@pytest.mark.parametrize("form", ["two_stage", "sort"])
@pytest.mark.parametrize("k", [1, K, 700, ROWS])
def test_top_k_is_a_stable_sort_of_all_products(form, k):
  queries, database = _exact()
  want = _by_sorting(queries, database, k)
  assert any(len(set(row)) < k for row in want[0]) or k == 1
  _equal(plain(queries, jnp.asarray(database), k=k, form=form), want)


@pytest.mark.parametrize(
  "options",
  [
    {"chunk": 400},
    {"chunk": 5},
    {"memory": 40_000},
    {"memory": 1, "chunk": 999},
  ],
)
@pytest.mark.parametrize("place", [np.asarray, jnp.asarray])
def test_chunks_change_nothing(options, place):
  queries, database = _exact()
  want = _by_sorting(queries, database, K)
  if options["memory" if "memory" in options else "chunk"] == 5:
    database = database[:41]
    want = _by_sorting(queries, database, K)
  _equal(plain(queries, place(database), k=K, **options), want)


def test_blocks_of_queries_change_nothing():
  queries, database = _exact(queries=50)
  options = {"k": K, "memory": ROWS * 8 * 17}
  exclude = np.arange(50)
  keep = np.arange(ROWS) != exclude[:, None]
  want = _by_sorting(queries, database, K, keep)
  got = plain(queries, jnp.asarray(database), exclude=exclude, **options)
  _equal(got, want)


def test_the_best_of_equal_rows_are_the_first():
  queries = np.eye(3, DIM, dtype=np.float32)
  database = np.tile(queries[:1], (1000, 1))
  for options in ({}, {"chunk": 300}, {"form": "sort"}):
    got = search.top_k(queries, database, k=K, **options)
    np.testing.assert_array_equal(got.indices, np.tile(np.arange(K), (3, 1)))
    np.testing.assert_array_equal(got.scores[:, 0], [1, 0, 0])


def test_rows_that_are_not_valid_or_excluded_are_not_found():
  queries, database = _exact()
  rng = np.random.default_rng(1)
  valid = rng.random(ROWS) < 0.5
  exclude = _by_sorting(queries, database, 1, valid)[1][:, 0]
  exclude[0] = -1
  keep = valid & (np.arange(ROWS) != exclude[:, None])
  want = _by_sorting(queries, database, K, keep)
  # What is not valid may hold anything.
  database = np.where(valid[:, None], database, np.nan).astype(np.float32)
  for place in (np.asarray, jnp.asarray):
    for chunk in (None, 600):
      got = plain(
        queries, place(database), k=K, valid=valid, exclude=exclude, chunk=chunk
      )
      _equal(got, want)


def test_where_there_is_no_row_the_index_is_minus_one():
  queries, database = _unit(rows=20)
  valid = np.arange(20) < 3
  for chunk in (None, 6):
    for place in (np.asarray, jnp.asarray):
      got = search.top_k(
        queries, place(database), k=5, valid=valid, chunk=chunk
      )
      np.testing.assert_array_equal(got.indices[:, 3:], -1)
      np.testing.assert_array_equal(got.scores[:, 3:], -np.inf)
      assert np.isfinite(got.scores[:, :3]).all()
  got = search.top_k(queries[:0], database, k=5)
  assert got.scores.shape == got.indices.shape == (0, 5)


def test_top_k_of_arbitrary_numbers_is_within_rounding():
  queries, database = _unit()
  want = _by_sorting(queries, database, K)
  got = search.top_k(queries, jnp.asarray(database), k=K)
  np.testing.assert_allclose(got.scores, want[0], atol=1e-6)
  np.testing.assert_array_equal(got.indices, want[1])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.float64, ">f4"])
@pytest.mark.parametrize("chunk", [None, 500])
def test_other_types_are_searched_as_they_are_stored(dtype, chunk):
  queries, database = _exact()
  want = _by_sorting(queries, database, K)
  _equal(plain(queries, database.astype(dtype), k=K, chunk=chunk), want)


def test_approximate_finds_most():
  queries, database = _unit()
  want = search.top_k(queries, database, k=K).indices
  got = search.top_k(
    queries, jnp.asarray(database), k=K, form="approximate", recall=0.9
  )
  pairs = zip(want, got.indices, strict=True)
  assert np.mean([np.isin(a, b).mean() for a, b in pairs]) > 0.8


# Transforms.


def test_top_k_under_jit_agrees_and_hides_nan():
  queries, database = _exact(queries=40)
  options = {"k": K, "chunk": 600}
  run = jax.jit(lambda q, d, e: plain(q, d, exclude=e, **options))
  exclude = np.full(40, 3)
  want = plain(queries, database, exclude=exclude, **options)
  _equal(run(queries, database, exclude), (want.scores, want.indices))
  database[[3, 5]] = np.nan
  keep = ~np.isnan(database[:, 0])
  want = _by_sorting(queries, np.nan_to_num(database), K, keep)
  _equal(run(queries, database, exclude), want)


def test_known_arrays_within_jit_are_searched_unchecked():
  queries, database = (jnp.asarray(x) for x in _unit(rows=9))
  ids = jnp.arange(QUERIES)
  want = search.top_k(queries, database, k=3, exclude=ids).indices
  run = jax.jit(
    lambda e: search.top_k(queries, database, k=3, exclude=e).indices
  )
  np.testing.assert_array_equal(run(ids), want)
  index = search.build_index(database, capacity=20)
  found = jax.jit(lambda i: search.search(i, queries, k=3).indices)(index)
  np.testing.assert_array_equal(found, search.search(index, queries, k=3)[1])
  more = jax.jit(lambda i: search.add(i, queries)[0].valid)(index)
  assert more.sum() == 9 + QUERIES
  scores = jax.jit(lambda x: x @ search.normalize(database).T)(queries)
  np.testing.assert_allclose(scores, queries @ database.T, atol=1e-6)


def test_an_index_takes_rows_of_the_other_byte_order():
  _, database = _unit(rows=9)
  swapped = database.astype(database.dtype.newbyteorder())
  index = search.build_index(swapped, capacity=18)
  index, _ = search.add(index, swapped)
  np.testing.assert_array_equal(index.rows, np.tile(database, (2, 1)))


def test_many_blocks_under_jit_are_a_loop():
  queries, database = _exact(queries=300, rows=50)
  want = _by_sorting(queries, database, 3)
  run = jax.jit(lambda q, d: plain(q, d, k=3, memory=1))
  _equal(run(queries, database), want)


def test_top_k_under_vmap_searches_each_database():
  queries, database = _exact(rows=600)
  both = np.stack([database, database[::-1]])
  got = jax.vmap(lambda d: plain(queries, d, k=K))(both)
  for i in range(2):
    _equal(
      search.Neighbours(got.scores[i], got.indices[i]),
      _by_sorting(queries, both[i], K),
    )


# Devices.


@pytest.mark.parametrize("rows", [1504, 1501])
@pytest.mark.parametrize("chunk", [None, 60])
def test_rows_over_eight_devices_are_found_as_on_one(rows, chunk):
  queries, database = _exact(rows=rows, queries=20)
  mesh = jax.make_mesh(
    (4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2
  )
  find = functools.partial(
    search.sharded_top_k, mesh=mesh, normalized=False, chunk=chunk
  )
  want = _by_sorting(queries, database, 400)
  _equal(find(queries, database, k=400), want)
  valid, exclude = np.arange(rows) % 3 > 0, want[1][:, 0]
  keep = valid & (np.arange(rows) != exclude[:, None])
  got = find(
    queries, jnp.asarray(database), k=K, valid=valid, exclude=exclude,
    memory=8 * 16 * 376,
  )  # fmt: skip
  _equal(got, _by_sorting(queries, database, K, keep))
  database[1234] = np.inf
  with pytest.raises(InputError, match="rows 1234"):
    find(queries, database, k=K)
  with pytest.raises(ValueError, match="axis must be one of .* got 'rows'"):
    find(queries, database, k=K, axis="rows")


# On disk.


def test_a_database_on_disk_is_read_in_chunks(tmp_path, monkeypatch):
  queries, database = _exact()
  path = tmp_path / "rows.npy"
  np.save(path, np.asfortranarray(database))
  rows = search.read_rows(path)
  assert isinstance(rows, np.memmap)
  seen = []
  right = jax.device_put
  monkeypatch.setattr(
    search.jax, "device_put", lambda x: seen.append(len(x)) or right(x)
  )
  got = plain(queries, rows, k=K, memory=400_000)
  _equal(got, _by_sorting(queries, database, K))
  assert sum(seen) == ROWS
  assert len(seen) > 1
  assert max(seen) * DIM * 4 * 3 < 400_000


def test_files_that_hold_something_else_are_refused(tmp_path):
  def refused(match, name="x.npy"):
    with pytest.raises(InputError, match=match) as caught:
      search.read_rows(tmp_path / name)
    assert name in str(caught.value)
    assert "[rows, dim]" in str(caught.value)

  refused("No such file")
  for array, text in (
    (np.zeros(4, np.float32), r"float32 of shape \(4,\)"),
    (np.zeros((4, 2), np.int32), "int32"),
    (np.zeros((2, 2), np.complex64), "complex64"),
    (np.array([{"a": 1}]), "x.npy"),
  ):
    np.save(tmp_path / "x.npy", array)
    refused(text)
  np.save(tmp_path / "x.npy", np.zeros((40, 2), np.float32))
  data = (tmp_path / "x.npy").read_bytes()
  for length in (0, 3, 20, 200):
    (tmp_path / "x.npy").write_bytes(data[:length])
    refused("cannot be read")
  np.savez(tmp_path / "x.npz", a=np.zeros((2, 2)))
  refused("archive", "x.npz")


# Descriptors.


def test_normalize_by_hand_and_at_the_limits_of_float32():
  rows = np.array([[3, 4], [3e30, -4e30], [3e-30, 4e-30]], np.float32)
  want = [[0.6, 0.8], [0.6, -0.8], [0.6, 0.8]]
  np.testing.assert_allclose(search.normalize(rows), want, rtol=1e-6)
  zero = jax.jit(search.normalize)(jnp.zeros((1, 2)))
  np.testing.assert_array_equal(zero, [[0, 0]])
  slope = jax.grad(lambda x: search.normalize(x).sum())(jnp.zeros(2))
  assert np.isfinite(slope).all()
  check_grads(search.normalize, (jnp.array([0.3, -0.8, 0.5]),), 1, rtol=1e-2)


def test_normalize_refuses_what_has_no_direction():
  rows = np.ones((9, 2), np.float32)
  rows[[2, 4]] = 0
  with pytest.raises(InputError, match="zeros in rows 2, 4;"):
    search.normalize(rows)
  rows[1:8] = np.nan
  with pytest.raises(InputError, match="in rows 1, 2, 3, 4, 5 and 2 more;"):
    search.normalize(rows)


@pytest.mark.parametrize("place", [np.asarray, jnp.asarray])
def test_norms_other_than_one_are_warned_of(place):
  queries, database = _unit()
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    search.top_k(queries, place(database * 3), k=2, chunk=700)
    search.top_k(queries / 2, place(database), k=2)
    search.top_k(queries * 2, place(database), k=2, normalized=False)
    search.build_index(database * 3)
  texts = [str(w.message) for w in caught]
  assert len(texts) == 3
  assert "database has rows of norms 3..3" in texts[0]
  assert "queries has rows of norms 0.5..0.5" in texts[1]
  assert "rows has rows of norms 3..3" in texts[2]
  assert all(w.filename == __file__ for w in caught)


# Refusal.


@pytest.mark.parametrize("place", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("chunk", [None, 400])
def test_rows_that_are_not_finite_are_named(place, bad, chunk):
  queries, database = _unit()
  queries[:, 0] = 0  # No score but that of the probe would tell.
  database[[17, 900], 0] = bad
  options = {"k": 3, "normalized": False, "chunk": chunk}
  name = "17, 900" if chunk is None or place is jnp.asarray else "17"
  with pytest.raises(InputError, match=f"database must .* in rows {name};"):
    search.top_k(queries, place(database), **options)
  search.top_k(queries, place(database), check=False, **options)
  queries[3, 1] = bad
  with pytest.raises(InputError, match="queries must .* in rows 3;"):
    search.top_k(queries, place(database), **options)


@pytest.mark.parametrize(
  ("options", "text"),
  [
    ({"k": 0}, "k must be at least 1, got 0"),
    ({"k": 21}, "k must be at most 20, the rows of the database, got 21"),
    ({"form": "heap"}, "form must be one of .*two_stage.* got 'heap'"),
    ({"precision": "tf32"}, "precision must be one of .* got 'tf32'"),
    ({"recall": 0.0}, "recall must be above 0 and at most 1, got 0"),
    ({"memory": 0}, "memory must be at least 1 byte, got 0"),
    ({"chunk": 0}, "chunk must be at least 1, got 0"),
    ({"exclude": np.full(7, 20)}, "exclude must be -1 or one of 20 rows"),
  ],
)
def test_options_are_refused(options, text):
  queries, database = _unit(rows=20)
  with pytest.raises(ValueError, match=text):
    search.top_k(queries, database, **({"k": 2} | options))


def test_shapes_are_refused():
  queries, database = _unit(rows=20)
  with pytest.raises(InputError, match="31 numbers a row .* has 32"):
    search.top_k(queries[:, 1:], database, k=2)
  with pytest.raises(TypeCheckError, match="queries"):
    search.top_k(queries[0], database, k=2)
  with pytest.raises(TypeCheckError, match="valid"):
    search.top_k(queries, database, k=2, valid=np.ones(19, bool))


# Rows that come and go.


def test_an_index_finds_what_is_in_it():
  queries, database = _exact(rows=60)
  index = search.build_index(database[:50], capacity=55, normalized=False)
  keep = np.arange(60) < 50
  find = functools.partial(search.search, normalized=False, k=55)

  def check(index, keep, database):
    want = _by_sorting(queries, database[:55], 55, keep[:55])
    _equal(find(index, queries), want)
    _equal(find(index, queries, chunk=20), want)

  check(index, keep, database)
  gone = search.remove(index, np.array([7, 3, 49]))
  keep[[7, 3, 49]] = False
  check(gone, keep, database)
  full, ids = search.add(gone, database[52:60], normalized=False)
  # The places that were freed, and then those that never held a row.
  np.testing.assert_array_equal(ids, [3, 7, 49, 50, 51, 52, 53, 54])
  moved = database.copy()
  moved[np.asarray(ids)] = database[52:60]
  check(full, np.ones(60, bool), moved)
  # The first one is as it was.
  check(index, np.arange(60) < 50, database)


def test_an_index_within_jit_leaves_out_what_does_not_fit():
  _, database = _unit(rows=8)
  index = search.build_index(database[:4], capacity=6)
  more, ids = jax.jit(search.add)(index, database[4:])
  np.testing.assert_array_equal(ids, [4, 5, -1, -1])
  np.testing.assert_array_equal(more.rows, database[:6])
  less = jax.jit(search.remove)(more, jnp.array([-1, 2, 6]))
  np.testing.assert_array_equal(less.valid, np.arange(6) != 2)
  found = jax.jit(lambda i, q: search.search(i, q, k=6))(less, database)
  np.testing.assert_array_equal(found.indices[:, 5], -1)


@pytest.mark.parametrize("storage", ["bfloat16", "int8"])
def test_narrow_storage_finds_nearly_the_same(storage):
  queries, database = _unit(rows=4000, queries=30, dim=128)
  exact = search.top_k(queries, database, k=20)
  index = search.build_index(database, storage=storage)
  assert index.rows.dtype == storage
  got = search.search(index, queries, k=20)
  # Over four seeds 0.990 to 0.998 (bfloat16) and 0.993 to 0.998 (int8).
  pairs = zip(exact.indices, got.indices, strict=True)
  assert np.mean([np.isin(a, b).mean() for a, b in pairs]) > 0.97
  np.testing.assert_allclose(got.scores, exact.scores, atol=4e-3)
  # One value of a row always is at the end of the range.
  if storage == "int8":
    assert (np.abs(np.asarray(index.rows)).max(1) == 127).all()


def test_what_an_index_does_not_take_is_refused():
  queries, database = _unit(rows=8)
  index = search.build_index(database, capacity=9)
  with pytest.raises(InputError, match="room for 1 more rows of 9, got 2"):
    search.add(index, database[:2])
  with pytest.raises(InputError, match="got 8, -1, 9, which"):
    search.remove(index, np.array([2, 8, -1, 9]))
  gone = search.remove(index, np.array([2]))
  with pytest.raises(InputError, match="got 2, which"):
    search.remove(gone, np.array([2]))
  for call in (search.add, functools.partial(search.search, k=2)):
    with pytest.raises(InputError, match="31 .* 32"):
      call(index, queries[:, 1:])
  with pytest.raises(ValueError, match="storage must be one of .* got 'int4'"):
    search.build_index(database, storage="int4")
  with pytest.raises(ValueError, match="capacity must be at least 8.* got 7"):
    search.build_index(database, capacity=7)
  with pytest.raises(ValueError, match="k must be at most 9.* got 10"):
    search.search(index, queries, k=10)
  database[5] = np.nan
  for call in (search.build_index, functools.partial(search.add, index)):
    with pytest.raises(InputError, match="rows 5;"):
      call(database)
