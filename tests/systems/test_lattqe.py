import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import lattqe as configs
from jaxshape import system as system_lib
from jaxshape.data import retrieval_examples
from jaxshape.errors import InputError
from jaxshape.layers import aggregation, apply
from jaxshape.retrieval import expansion, search
from jaxshape.systems import lattqe


def _config(**changes):
  config = configs.get_config("tiny")
  config.update_from_flattened_dict(changes)
  return config.lock()


@pytest.fixture(scope="module")
def tiny():
  config = _config()
  system = system_lib.load(config)
  batches = system.train_data(0)
  batch = next(batches)
  batches.close()
  state = jax.jit(system.init)(jax.random.key(0))
  return config, system, system.refresh(state), batch


@pytest.fixture(scope="module")
def trained(tiny):
  """States and metrics of five steps, of which the last two move T alone."""
  _, system, state, batch = tiny
  step = jax.jit(system.train_step)
  out = [(state, {})]
  for i in range(5):
    out.append(step(out[-1][0], batch, jax.random.key(i)))
  return out


def test_an_expansion_is_the_weighted_sum_of_the_given_descriptors(tiny):
  config, system, state, batch = tiny
  net = aggregation.of(state.params["net"], heads=config.network.heads)
  (cosines, _), _ = apply.apply(
    net,
    state.params["net"],
    {},
    batch["query"],
    batch["neighbours"],
    mask=batch["valid"],
    train=False,
  )
  weights = np.where(batch["valid"], cosines, 0)[..., None]
  want = batch["query"] + (weights * batch["neighbours"]).sum(axis=1)
  want /= np.linalg.norm(want, axis=-1, keepdims=True)
  got = jax.jit(system.predict)(state, batch)["expanded"]
  np.testing.assert_allclose(got, want, atol=2e-6)


def test_expand_needs_parameters_alone(tiny):
  config, system, state, batch = tiny
  expand = functools.partial(
    lattqe.expand, state.params, heads=config.network.heads
  )
  query, near, mask = (batch[k] for k in ("query", "neighbours", "valid"))
  want = jax.jit(system.predict)(state, batch)["expanded"]
  np.testing.assert_allclose(expand(query, near, mask=mask), want, atol=2e-6)
  # One query; more axes; fewer neighbours.
  one = expand(query[0], near[0], mask=mask[0])
  np.testing.assert_allclose(one, want[0], atol=2e-6)
  two = expand(
    query.reshape(2, 4, -1),
    near.reshape(2, 4, 8, -1),
    mask=mask.reshape(2, 4, 8),
  )
  np.testing.assert_allclose(two.reshape(8, -1), want, atol=2e-6)
  few = expand(query, near[:, :3])
  masked = expand(query, near, mask=np.arange(8) < np.full((8, 1), 3))
  np.testing.assert_allclose(few, masked, atol=2e-6)


def test_without_neighbours_the_query_is_its_own_expansion(tiny):
  config, _, state, batch = tiny
  none = np.zeros_like(batch["valid"])
  for database in (False, True):
    got = lattqe.expand(
      state.params,
      batch["query"],
      batch["neighbours"],
      mask=none,
      heads=config.network.heads,
      database=database,
    )
    np.testing.assert_allclose(got, batch["query"], atol=1e-6)


def test_first_the_network_moves_and_then_the_temperature_alone(trained):
  def change(name, before, after):
    pairs = zip(
      jax.tree.leaves(before.params[name]),
      jax.tree.leaves(after.params[name]),
      strict=True,
    )
    return any(bool((x != y).any()) for x, y in pairs)

  moved = [
    (change("net", a, b), change("temperature", a, b))
    for (a, _), (b, _) in itertools.pairwise(trained)
  ]
  # The rate is 0 in the very first step.
  assert moved == [(False, False)] + [(True, False)] * 2 + [(False, True)] * 2
  rests = [bool(jnp.isnan(metrics["net/loss"])) for _, metrics in trained[1:]]
  assert rests == [False] * 3 + [True] * 2


def test_the_database_side_is_sharper_with_a_lower_temperature(tiny):
  config, _, state, batch = tiny
  near = []
  for temperature in (0.01, 10.0):
    params = {
      **state.params,
      "temperature": {"log": jnp.log(jnp.float32(temperature))},
    }
    out = lattqe.expand(
      params,
      batch["query"],
      batch["neighbours"],
      heads=config.network.heads,
      database=True,
    )
    near.append(np.einsum("bd,bd->b", out, batch["query"]).mean())
  assert near[0] > near[1]


def test_the_pool_holds_rows_of_the_training_data_and_changes(tiny):
  config, system, state, _ = tiny
  source = retrieval_examples.load(
    config.data, "train", neighbours=config.neighbours
  )
  pool = state.extra["pool"]
  rows = np.asarray(pool["rows"])
  found = search.top_k(rows, source.database, k=1)
  np.testing.assert_allclose(found.scores, 1, atol=1e-5)
  same = source.clusters[np.asarray(found.indices)[:, 0]]
  np.testing.assert_array_equal(pool["cluster"], same)
  again = system.refresh(state).extra["pool"]["rows"]
  np.testing.assert_array_equal(again, rows)
  later = system.refresh(state.replace(step=state.step + 2))
  assert (np.asarray(later.extra["pool"]["rows"]) != rows).any()


def test_as_a_method_it_augments_a_database(tiny):
  config, _, state, _ = tiny
  source = retrieval_examples.load(config.data, "train", neighbours=8)
  rows = source.rows(4)
  batch = [rows[i] for i in range(len(rows))]
  stack = lambda name: np.stack([example[name] for example in batch])
  want = lattqe.expand(
    state.params,
    stack("query"),
    stack("neighbours"),
    heads=config.network.heads,
    database=True,
  )
  method = lattqe.expander(
    state.params, heads=config.network.heads, database=True
  )
  got = expansion.augment_database(source.database, k=4, expand=method)
  np.testing.assert_allclose(got, want, atol=3e-6)


def test_a_method_that_sees_no_descriptors_is_that_network(tiny):
  config, _, state, batch = tiny
  options = {"heads": config.network.heads, "visual": False}
  near = batch["neighbours"]
  want = lattqe.expand(state.params, batch["query"], near, **options)
  method = lattqe.expander(state.params, **options)
  mask = np.ones(near.shape[:2], bool)
  got = method(batch["query"], near, None, mask)
  np.testing.assert_allclose(got, want, atol=1e-6)
  seen = lattqe.expand(
    state.params, batch["query"], near, heads=config.network.heads
  )
  assert np.abs(got - seen).max() > 1e-3


def test_what_is_masked_leaves_no_trace_and_nan_stays_nan(tiny):
  config, _, state, batch = tiny
  expand = functools.partial(
    lattqe.expand, state.params, heads=config.network.heads
  )
  near = batch["neighbours"].copy()
  mask = np.arange(8) < np.full((8, 1), 5)
  want = expand(batch["query"], near, mask=mask)
  near[:, 6] = np.nan
  np.testing.assert_array_equal(expand(batch["query"], near, mask=mask), want)
  assert np.isnan(expand(batch["query"], near)).all()
  none = expand(batch["query"], near[:, :0])
  np.testing.assert_allclose(none, batch["query"], atol=1e-6)


def test_the_loss_is_that_of_the_paper(tiny):
  """Against a transcription of Sec. 4.1 with nothing drawn."""
  _, _, state, batch = tiny
  config = _config(**{
    "draw.neighbours": (8, 8), "draw.drop": 0.0, "network.dropout": 0.0,
    "loss.margin": 0.8, "loss.auxiliary": 0.5, "pool.negatives": 2,
  })  # fmt: skip
  system = system_lib.load(config)
  _, metrics = jax.jit(system.train_step)(state, batch, jax.random.key(0))
  net = aggregation.of(state.params["net"], heads=config.network.heads)
  (_, logits), _ = apply.apply(
    net,
    state.params["net"],
    {},
    batch["query"],
    batch["neighbours"],
    mask=batch["valid"],
    train=False,
  )
  expanded = np.asarray(jax.jit(system.predict)(state, batch)["expanded"])
  pool = {k: np.asarray(v) for k, v in state.extra["pool"].items()}
  total, contrast = [], []
  for i, q in enumerate(expanded):
    loss = np.sum((q - batch["positive"][i]) ** 2)
    taken = {int(batch["cluster"][i])}
    left = 2
    for j in np.argsort(-(pool["rows"] @ q)):
      cluster = int(pool["cluster"][j])
      if left and cluster not in taken:
        z = np.linalg.norm(q - pool["rows"][j])
        loss += max(0.0, 0.8 - z) ** 2
        left -= 1
        taken |= {cluster} - {-1}
    seen, y = batch["valid"][i], batch["relevant"][i]
    x = np.asarray(logits[i], np.float64)
    entropy = np.logaddexp(0, np.where(y, -x, x))[seen].mean()
    contrast.append(loss)
    total.append(loss + 0.5 * entropy)
  np.testing.assert_allclose(metrics["net/loss"], np.mean(total), rtol=1e-4)
  np.testing.assert_allclose(
    metrics["net/contrastive"], np.mean(contrast), rtol=1e-4
  )


@pytest.mark.parametrize(
  "changes",
  [
    {"network.attention": False},
    {"network.positions": False},
    {"network.visual": False, "loss.auxiliary": 0.0, "pool.negatives": 0},
  ],
)
def test_ablations_train(changes, tiny):
  _, _, _, batch = tiny
  system = system_lib.load(_config(**changes, **{"dba.start": 0}))
  state = system.refresh(jax.jit(system.init)(jax.random.key(0)))
  after, metrics = jax.jit(system.train_step)(state, batch, jax.random.key(1))
  assert metrics["net/finite"] == 1
  assert np.isfinite(metrics["net/loss"])
  assert int(after.step) == 1


def test_other_data_are_evaluated_by_their_own_name(tmp_path):
  draw = np.random.default_rng(0)
  rows = draw.standard_normal((20, 16)).astype(np.float32)
  rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
  np.save(tmp_path / "mine.npy", rows)
  (tmp_path / "mine_labels.txt").write_text("a\nb\n" * 10)
  system = system_lib.load(
    _config(**{"data.eval_splits": ("test", f"descriptors:{tmp_path}@mine")})
  )
  assert set(system.evaluators) == {"test", "test_dba", "mine", "mine_dba"}
  batch = next(system.evaluators["mine"].data())
  assert batch["neighbours"].shape == (8, 8, 16)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"network.dtype": "float64"}, "network.dtype must be one of float32"),
    ({"neighbours": 0}, "config.neighbours must be at least 1, got 0"),
    ({"neighbours": 20}, r"must end with config.neighbours=20.*\(4, 8\)"),
    (
      {"data.eval_splits": ("test", "landmarks@test")},
      "two splits of the name",
    ),
    ({"dba.neighbours": 9}, "dba.neighbours must be at most .*=8, got 9"),
    ({"dba.temperature": 0.0}, "dba.temperature must be above 0"),
    ({"refresh_every": 0}, "refresh_every must be above 0, as the pool"),
    ({"pool.negatives": -1}, "pool.negatives must be at least 0, got -1"),
    ({"draw.neighbours": (9, 8)}, "fewest <= most"),
    ({"data.source": "lidar_scenes"}, "no option 'neighbours'"),
    ({"data.source": "revisited:nowhere"}, "nowhere"),
  ],
)
def test_bad_configs_are_refused(changes, message):
  with pytest.raises((InputError, ValueError), match=message):
    system_lib.load(_config(**changes)).init(jax.random.key(0))


def test_data_without_clusters_cannot_be_trained_on(tmp_path):
  rows = np.eye(16, dtype=np.float32)
  np.save(tmp_path / "train.npy", rows)
  np.save(tmp_path / "train_queries.npy", rows[:4])
  config = _config(**{"data.source": f"descriptors:{tmp_path}"})
  system = system_lib.load(config)
  with pytest.raises(InputError, match="what each row and each query"):
    system.refresh(system.init(jax.random.key(0)))


def test_expand_refuses_other_descriptors(tiny):
  config, _, state, _ = tiny
  heads = config.network.heads
  with pytest.raises(InputError, match="descriptors of 16 numbers, got 8"):
    lattqe.expand(
      state.params, np.ones((2, 8)), np.ones((2, 4, 8)), heads=heads
    )
  with pytest.raises(ValueError, match="positions for 8 neighbours, got 9"):
    lattqe.expand(
      state.params, np.ones((2, 16)), np.ones((2, 9, 16)), heads=heads
    )
