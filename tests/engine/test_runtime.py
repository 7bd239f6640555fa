import math

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
import numpy as np
import pytest

from jaxshape.engine import runtime
from jaxshape.errors import InputError
from jaxshape.system import Evaluator, TrainState

ALL = {"data": -1, "model": 1}


class Stream:
  """Three batches of eight rows; knows what was read and that it was closed."""

  def __init__(self, *, breaks_at=-1):
    self.read, self.closed, self.breaks_at = 0, False, breaks_at

  def __iter__(self):
    return self

  def __next__(self):
    if self.read == self.breaks_at:
      raise InputError("damaged")
    if self.read == 3:
      raise StopIteration
    self.read += 1
    return {"x": np.arange(8) + 10 * self.read}

  def close(self):
    self.closed = True


def _init(key):
  return TrainState(
    jnp.int32(0),
    {"net": {"w": jax.random.normal(key, (6, 16)), "b": jnp.zeros(3)}},
    {"net": {"w": jnp.zeros((6, 16))}},
    {"mean": jnp.zeros(16)},
  )


@pytest.mark.parametrize(
  ("axes", "shape"),
  [
    ({}, (8, 1)),
    (ALL, (8, 1)),
    ({"data": 2, "model": -1}, (2, 4)),
    ({"data": 2, "model": 4}, (2, 4)),
    ({"model": 8}, (1, 8)),
  ],
)
def test_meshes_of_eight_devices(axes, shape):
  mesh = runtime.make_mesh(axes)
  assert tuple(mesh.shape.items()) == (("data", shape[0]), ("model", shape[1]))
  assert mesh.axis_types == (AxisType.Auto,) * 2
  assert set(mesh.devices.flat) == set(jax.devices())


def test_states_are_cut_along_their_longest_axis():
  mesh = runtime.make_mesh({"data": 2, "model": 4})
  shapes = jax.eval_shape(_init, jax.random.key(0))
  got = runtime.state_shardings(mesh, shapes)
  specs = jax.tree.map(lambda sharding: sharding.spec, got)
  assert specs.params["net"]["w"] == PartitionSpec(None, "model")
  assert specs.params["net"]["b"] == PartitionSpec()  # 4 does not divide 3.
  assert specs.opt_state["net"]["w"] == PartitionSpec(None, "model")
  assert specs.extra["mean"] == PartitionSpec()
  assert specs.step == PartitionSpec()
  whole = runtime.state_shardings(runtime.make_mesh(ALL), shapes)
  assert all(s.spec == PartitionSpec() for s in jax.tree.leaves(whole))


def test_a_state_lies_where_its_abstract_one_says():
  mesh = runtime.make_mesh({"data": 2, "model": 4})
  like = runtime.abstract_state(_init, jax.random.key(0), mesh)
  state = runtime.initialize(_init, jax.random.key(0), mesh)
  for a, b in zip(jax.tree.leaves(like), jax.tree.leaves(state), strict=True):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
  want = jax.random.normal(jax.random.key(0), (6, 16))
  np.testing.assert_allclose(state.params["net"]["w"], want, rtol=1e-6)


def test_batches_are_shared_out_one_ahead():
  source = Stream()
  batches = runtime.placed(source, runtime.make_mesh({"data": 4, "model": 2}))
  assert source.read == 0  # Nothing runs before it is asked for.
  first = next(batches)["x"]
  assert source.read == 2
  assert first.sharding.spec == PartitionSpec("data")
  assert {shard.data.shape for shard in first.addressable_shards} == {(2,)}
  rest = [np.asarray(batch["x"]) for batch in batches]
  np.testing.assert_array_equal(first, np.arange(8) + 10)
  np.testing.assert_array_equal(rest, [np.arange(8) + 20, np.arange(8) + 30])


def test_the_source_is_closed_whatever_happens():
  mesh = runtime.make_mesh(ALL)
  source = Stream()
  assert len(list(runtime.placed(source, mesh))) == 3
  assert source.closed
  left = Stream()
  batches = runtime.placed(left, mesh)
  next(batches)
  assert not left.closed
  batches.close()
  assert left.closed
  broken = Stream(breaks_at=1)
  with pytest.raises(InputError, match="damaged"):
    next(runtime.placed(broken, mesh))
  assert broken.closed
  # One that cannot be closed does not have to be.
  assert len(list(runtime.placed(iter(Stream()), mesh))) == 3


def test_an_evaluator_runs_over_all_batches_and_compiles_once():
  traces = []

  def step(state, batch):
    traces.append(1)
    return {"rows": batch["x"] + state.step, "sum": batch["x"].sum()}

  def summarize(outputs):
    assert all(isinstance(out["rows"], np.ndarray) for out in outputs)
    return {"sum": sum(out["sum"] for out in outputs)}

  mesh = runtime.make_mesh(ALL)
  evaluator = Evaluator(Stream, step, summarize)
  state = TrainState(jnp.int32(5), {}, {}, {})
  for _ in range(2):
    numbers, outputs = runtime.evaluate(evaluator, state, mesh)
  assert numbers == {"sum": 3 * 28 + 8 * 60}
  assert type(numbers["sum"]) is float
  rows = np.concatenate([out["rows"] for out in outputs])
  want = np.add.outer([15, 25, 35], np.arange(8)).ravel()
  np.testing.assert_array_equal(rows, want)
  assert len(traces) == 1


def test_an_evaluator_is_made_from_what_another_gave():
  def after(outputs):
    rows = np.concatenate([out["rows"] for out in outputs])
    again = lambda state, batch: {"more": (batch["x"] + rows[0]).sum()}
    return Evaluator(
      Stream, again, lambda out: {"more": sum(o["more"] for o in out)}
    )

  first = Evaluator(
    Stream,
    lambda state, batch: {"rows": batch["x"] + state.step},
    lambda outputs: {"batches": len(outputs)},
    then=after,
  )
  state = TrainState(jnp.int32(5), {}, {}, {})
  mesh = runtime.make_mesh(ALL)
  numbers, outputs = runtime.evaluate(first, state, mesh)
  # The first row is 15, and is added to each of the 24.
  assert numbers == {
    "batches": 3,
    "more": 3 * 28 + 8 * 60 + 24 * 15,
  }
  assert set(outputs[0]) == {"rows"}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("part", ["params", "opt_state", "extra"])
def test_one_number_makes_a_state_not_finite(part, value):
  good = {
    "a": jnp.ones(3, jnp.bfloat16),
    "b": jnp.arange(3),
    "key": jax.random.key(0),
  }
  state = TrainState(jnp.int32(0), good, good, good)
  assert runtime.finite(state)
  bad = {**good, "a": good["a"].at[1].set(value)}
  assert not runtime.finite(state.replace(**{part: bad}))


def test_a_state_without_numbers_is_finite():
  assert runtime.finite(TrainState(jnp.int32(0), {}, {}, {}))


@pytest.mark.parametrize(
  "axes",
  [
    {"data": 3},
    {"data": 0},
    {"data": -1, "model": -1},
    {"data": 2, "model": 2},
    {"data": 16},
    {"data": -2},
    {"date": 8},
  ],
)
def test_meshes_that_do_not_fit_are_refused(axes):
  with pytest.raises(InputError, match=r"config.mesh must .* all 8 devices"):
    runtime.make_mesh(axes)


@pytest.mark.parametrize("size", [0, -8, 4, 9])
def test_batches_that_cannot_be_shared_are_refused(size):
  mesh = runtime.make_mesh(ALL)
  with pytest.raises(
    InputError, match=f"multiple of the 8 devices.*got {size};"
  ):
    runtime.check_batch_size(size, mesh)
  runtime.check_batch_size(16, mesh)
  runtime.check_batch_size(9, runtime.make_mesh({"data": 1, "model": 8}))


def test_an_evaluator_without_batches_is_refused():
  evaluator = Evaluator(lambda: iter(()), lambda *_: {}, lambda _: {})
  state = TrainState(jnp.int32(0), {}, {}, {})
  with pytest.raises(InputError, match="got no batch; its data set is empty"):
    runtime.evaluate(evaluator, state, runtime.make_mesh(ALL))
