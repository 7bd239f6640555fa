"""What holds for every system and every config, found by themselves."""

import importlib
import pathlib
import pkgutil

import jax
import ml_collections
import numpy as np
import pytest

from jaxshape import system as system_lib
from jaxshape.engine import runtime, steps
import jaxshape.systems
import train

CONFIGS = sorted(p.stem for p in pathlib.Path("configs").glob("[!_]*.py"))
MODES = [
  (name, mode)
  for name in CONFIGS
  for mode in importlib.import_module(f"configs.{name}").MODES
]


def _config(name, mode="tiny", **changes):
  config = importlib.import_module(f"configs.{name}").get_config(mode)
  config.update(changes)
  return config.lock()


@pytest.fixture(scope="module", params=CONFIGS)
def tiny(request):
  """A config, its system and four batches; compiled parts are shared."""
  config = _config(request.param)
  system = system_lib.load(config)
  if system.train_step is None:
    return config, system, []
  batches = system.train_data(0)
  got = [next(batches) for _ in range(4)]
  batches.close()
  return config, system, got


@pytest.fixture(scope="module")
def straight(tiny):
  """Four steps on one device, and how often the step was traced."""
  config, system, batches = tiny
  if system.train_step is None:
    pytest.skip("trains nothing")
  traces = []

  @jax.jit
  def step(state, batch, key):
    traces.append(1)
    return system.train_step(state, batch, jax.random.fold_in(key, state.step))

  init_key, key = jax.random.split(jax.random.key(config.seed))
  states, metrics = [jax.jit(system.init)(init_key)], []
  for i, batch in enumerate(batches):
    state = states[-1]
    if (
      system.refresh and config.refresh_every and i % config.refresh_every == 0
    ):
      state = system.refresh(state)
    state, measured = step(state, batch, key)
    states.append(state)
    metrics.append(measured)
  return states, metrics, len(traces)


def test_every_system_has_a_config_of_its_name():
  files = {m.name for m in pkgutil.iter_modules(jaxshape.systems.__path__)}
  assert files <= set(CONFIGS)


@pytest.mark.parametrize(("name", "mode"), MODES)
def test_configs_load_are_flat_and_name_a_system(name, mode):
  config = _config(name, mode)
  assert config.system in system_lib.names()
  assert config.steps > 0
  for key, value in config.items():
    assert isinstance(
      value, (ml_collections.ConfigDict, str, int, float, bool, tuple)
    ), key
  with pytest.raises(AttributeError):
    config.no_such_field = 1


def test_unknown_modes_are_refused_with_the_known_ones():
  for name in CONFIGS:
    with pytest.raises(ValueError, match="mode must be one of .*tiny"):
      _config(name, "gigantic")


def test_init_is_a_function_of_its_key(tiny):
  _, system, _ = tiny
  init = jax.jit(system.init)
  a, b, c = (init(jax.random.key(seed)) for seed in (1, 1, 2))
  _equal(a, b)
  moved = [
    bool((x != y).any())
    for x, y in zip(
      jax.tree.leaves(a.params), jax.tree.leaves(c.params), strict=True
    )
  ]
  assert any(moved) or system.train_step is None


def test_steps_are_finite_move_every_player_and_trace_once(straight):
  states, metrics, traces = straight
  assert traces == 1
  assert int(states[-1].step) == 4
  assert runtime.finite(states[-1])
  for row in metrics:
    for name, value in row.items():
      if name.endswith(steps.FINITE):
        assert value == 1
  for player in states[0].params:
    before, after = states[0].params[player], states[-1].params[player]
    assert any(
      bool((x != y).any())
      for x, y in zip(
        jax.tree.leaves(before), jax.tree.leaves(after), strict=True
      )
    ), player


def test_eight_devices_resumed_equal_one_that_never_stopped(
  tiny, straight, tmp_path
):
  config, _, _ = tiny
  with config.unlocked():
    eight = config.copy_and_resolve_references()
  eight.steps, eight.save_every = 2, 2
  train.train(eight.lock(), tmp_path / "a")
  eight = eight.copy_and_resolve_references()
  eight.steps = 4
  resumed = train.train(eight.lock(), tmp_path / "a")
  through = train.train(eight, tmp_path / "b")
  _equal(resumed, through)
  want = straight[0][-1]
  for x, y in zip(
    jax.tree.leaves(through.params), jax.tree.leaves(want.params), strict=True
  ):
    # Sums over the batch come in another order.
    np.testing.assert_allclose(x, y, rtol=2e-2, atol=2e-3)


def test_evaluators_do_not_depend_on_the_batch_size(tiny, straight):
  config, system, _ = tiny
  mesh = runtime.make_mesh({"data": -1, "model": 1})
  state = straight[0][-1]
  with config.unlocked():
    other = config.copy_and_resolve_references()
  other.batch_size = config.batch_size + 8
  same = system_lib.load(other.lock())
  for name, evaluator in system.evaluators.items():
    a, outputs = runtime.evaluate(evaluator, state, mesh)
    b, _ = runtime.evaluate(same.evaluators[name], state, mesh)
    assert a.keys() == b.keys()
    for metric in a:
      np.testing.assert_allclose(
        a[metric], b[metric], rtol=1e-4, atol=1e-6, err_msg=f"{name}/{metric}"
      )
    if evaluator.pictures is not None:
      figures = evaluator.pictures(state, outputs)
      assert figures
      assert all(hasattr(figure, "savefig") for figure in figures.values())


def test_predict_gives_a_row_per_example(tiny, straight):
  _, system, batches = tiny
  out = system.predict(straight[0][0], batches[0])
  rows = len(next(iter(batches[0].values())))
  assert all(leaf.shape[0] == rows for leaf in jax.tree.leaves(out))


def _equal(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
