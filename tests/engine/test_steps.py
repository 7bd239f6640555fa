import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxshape import system as system_lib
from jaxshape.engine import steps
from tests.tiny import regression, settings


def _batch(n=8, seed=0):
  return regression.rows(range(seed * n, seed * n + n))


def test_one_player_is_plain_descent():
  config = settings.config(noise=0.0)
  system = system_lib.load(config)
  state = system.init(jax.random.key(0))
  got, metrics = system.train_step(state, _batch(), jax.random.key(1))
  w = state.params["net"]
  optimizer = optax.adam(0.05)
  gradient = jax.grad(lambda w: regression.squared_error(w, _batch()).mean())(w)
  updates, _ = optimizer.update(gradient, optimizer.init(w))
  np.testing.assert_allclose(got.params["net"], w + updates, rtol=1e-6)
  np.testing.assert_allclose(
    metrics["net/gradient_norm"], jnp.linalg.norm(gradient), rtol=1e-6
  )
  assert int(got.step) == 1
  assert metrics["net/finite"] == 1


def test_each_player_sees_the_last_ones_update_and_moves_itself_alone():
  def first(params, extra, batch, key):
    del batch, key
    return params["a"] * 1.0, (extra, {})

  def second(params, extra, batch, key):
    del batch, key
    return params["a"] * params["b"], (extra, {"a": params["a"]})

  players = {
    "a": steps.Player(first, optax.sgd(1.0)),
    "b": steps.Player(second, optax.sgd(1.0)),
  }
  state = steps.initial_state(
    players, {"a": jnp.float32(3.0), "b": jnp.float32(5.0)}, {}
  )
  state, metrics = steps.take_turns(players)(state, {}, jax.random.key(0))
  assert metrics["b/a"] == 2.0  # 3 - 1: a has moved already.
  assert state.params == {"a": 2.0, "b": 3.0}  # b moved by a's new value.


def test_a_player_rests_between_its_turns():
  system = system_lib.load(settings.config("adversaries"))
  state = system.init(jax.random.key(0))
  step = jax.jit(system.train_step)
  moved = []
  for i in range(4):
    before = state.params["generator"]
    state, metrics = step(state, _batch(seed=i), jax.random.key(i))
    moved.append(bool((state.params["generator"] != before).any()))
    assert bool(jnp.isnan(metrics["generator/loss"])) != moved[-1]
    assert metrics["generator/finite"] == 1
  assert moved == [True, False, True, False]


def test_a_curriculum_of_players_that_begin_and_end():
  def loss(name):
    return lambda params, extra, batch, key: (params[name] * 1.0, (extra, {}))

  sgd = optax.sgd(1.0)
  players = {
    "early": steps.Player(loss("early"), sgd, last=2),
    "late": steps.Player(loss("late"), sgd, first=2, every=2),
  }
  params = dict.fromkeys(players, jnp.float32(0))
  state = steps.initial_state(players, params, {})
  step = jax.jit(steps.take_turns(players))
  got = []
  for _ in range(6):
    state, _ = step(state, {}, jax.random.key(0))
    got.append((float(state.params["early"]), float(state.params["late"])))
  want = [(-1, 0), (-2, 0), (-2, -1), (-2, -1), (-2, -2), (-2, -2)]
  assert got == want


def test_accumulation_gives_the_gradient_of_the_whole_batch():
  whole = system_lib.load(settings.config(noise=0.0))
  parts = system_lib.load(settings.config(noise=0.0, accumulate=4))
  state = whole.init(jax.random.key(0))
  a, ma = jax.jit(whole.train_step)(state, _batch(), jax.random.key(1))
  b, mb = jax.jit(parts.train_step)(state, _batch(), jax.random.key(1))
  np.testing.assert_allclose(a.params["net"], b.params["net"], rtol=1e-5)
  np.testing.assert_allclose(ma["net/loss"], mb["net/loss"], rtol=1e-5)
  assert b.extra["seen"] == 4  # Statistics go through the parts in order.


def test_averaged_parameters_follow_slowly_and_are_evaluated():
  system = system_lib.load(settings.config(averaging=0.9))
  state = system.init(jax.random.key(0))
  got, _ = system.train_step(state, _batch(), jax.random.key(1))
  # (1 + 0) / (10 + 0) of the start is kept in the first step.
  want = 0.1 * state.params["net"] + 0.9 * got.params["net"]
  np.testing.assert_allclose(got.extra["ema"]["net"], want, rtol=1e-6)
  assert steps.evaluation_params(got) is got.extra["ema"]


def test_a_loss_that_is_not_finite_is_marked():
  system = system_lib.load(settings.config(breaks_at=0))
  state = system.init(jax.random.key(0))
  _, metrics = system.train_step(state, _batch(), jax.random.key(1))
  assert metrics["net/finite"] == 0


def test_bad_options_are_refused():
  with pytest.raises(ValueError, match="every must be at least 1, got 0"):
    steps.Player(lambda *_: None, optax.sgd(1.0), every=0)
  with pytest.raises(ValueError, match="accumulate must be at least 1"):
    steps.take_turns({}, accumulate=0)
  with pytest.raises(ValueError, match=r"averaging must be in \[0, 1\), got 1"):
    steps.take_turns({}, averaging=1.0)
  with pytest.raises(ValueError, match=r"\['a'\] are missing"):
    steps.initial_state({"a": steps.Player(None, optax.sgd(1.0))}, {}, {})
  system = system_lib.load(settings.config(accumulate=3))
  with pytest.raises(ValueError, match="must divide the batch, got 3 for 8"):
    system.train_step(
      system.init(jax.random.key(0)), _batch(), jax.random.key(1)
    )
