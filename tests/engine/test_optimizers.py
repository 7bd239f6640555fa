import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxshape.engine import optimizers
from jaxshape.errors import InputError

PARAMS = {
  "stem": {"kernel": jnp.full((3, 2), 0.5), "bias": jnp.full((2,), 0.3)},
  "head": {"kernel": jnp.full((2, 2), -0.4)},
}
GRADS = jax.tree.map(lambda p: p * 2 + 0.1, PARAMS)


def _move(optimizer, steps=3):
  params, state = PARAMS, optimizer.init(PARAMS)
  for _ in range(steps):
    updates, state = optimizer.update(GRADS, state, params)
    params = optax.apply_updates(params, updates)
  return params


@pytest.mark.parametrize(
  ("config", "peer"),
  [
    ({"name": "sgd", "nesterov": True}, optax.sgd(0.1, 0.9, nesterov=True)),
    ({"name": "adam"}, optax.adam(0.1)),
    (
      {"name": "adamw", "weight_decay": 0.2},
      optax.adamw(0.1, weight_decay=0.2),
    ),
    (
      {"name": "rmsprop", "momentum": 0.5},
      optax.rmsprop(0.1, 0.9, 1e-8, momentum=0.5),
    ),
    (
      {"name": "lars", "weight_decay": 0.1},
      optax.lars(
        0.1,
        0.1,
        trust_ratio_mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p),
      ),
    ),
  ],
  ids=lambda v: v["name"] if isinstance(v, dict) else "",
)
def test_rules_equal_optax(config, peer):
  got, want = _move(optimizers.make(config)), _move(peer)
  jax.tree.map(
    lambda g, w: np.testing.assert_allclose(g, w, rtol=2e-5), got, want
  )


def test_coupled_and_decoupled_decay_by_hand():
  g, w = np.asarray(GRADS["stem"]["bias"]), np.asarray(PARAMS["stem"]["bias"])
  coupled = _move(optimizers.make({"weight_decay": 0.5, "momentum": 0.0}), 1)
  np.testing.assert_allclose(
    coupled["stem"]["bias"], w - 0.1 * (g + 0.5 * w), rtol=1e-6
  )
  # After two steps momentum has carried the decay along, or has not.
  first = w - 0.1 * (g + 0.5 * w)
  want = first - 0.1 * (1.9 * g + 0.5 * first)
  got = _move(optimizers.make({"name": "sgdw", "weight_decay": 0.5}), 2)
  np.testing.assert_allclose(got["stem"]["bias"], want, rtol=1e-6)


def test_decay_of_kernels_leaves_biases_alone():
  plain = _move(optimizers.make({}))
  got = _move(optimizers.make({"weight_decay": 0.5, "decayed": "kernels"}))
  np.testing.assert_array_equal(got["stem"]["bias"], plain["stem"]["bias"])
  assert (got["stem"]["kernel"] != plain["stem"]["kernel"]).all()


def test_frozen_paths_stay_and_rates_scale():
  got = _move(
    optimizers.make(
      {"frozen": ("^stem",), "rates": (("head", 0.5),), "weight_decay": 0.1}
    ),
    1,
  )
  jax.tree.map(np.testing.assert_array_equal, got["stem"], PARAMS["stem"])
  whole = _move(optimizers.make({"weight_decay": 0.1}), 1)["head"]["kernel"]
  start = np.asarray(PARAMS["head"]["kernel"])
  np.testing.assert_allclose(
    got["head"]["kernel"] - start, 0.5 * (whole - start), rtol=1e-5
  )


def test_clipping_bounds_the_global_norm_of_what_moves():
  config = {"clip_norm": 0.01, "momentum": 0.0, "frozen": ("stem/kernel",)}
  got = _move(optimizers.make(config), 1)
  moved = jax.tree.map(lambda a, b: a - b, got, PARAMS)
  np.testing.assert_allclose(optax.tree.norm(moved), 0.1 * 0.01, rtol=1e-4)


@pytest.mark.parametrize(
  ("options", "steps", "want"),
  [
    ({"schedule": "constant"}, [0, 9], [1.0, 1.0]),
    (
      {
        "schedule": "cosine",
        "total_steps": 12,
        "warmup_steps": 2,
        "final": 0.1,
      },
      [0, 1, 2, 7, 12, 99],
      [0.0, 0.5, 1.0, 0.55, 0.1, 0.1],
    ),
    ({"schedule": "linear", "total_steps": 4}, [0, 1, 4], [1.0, 0.75, 0.0]),
    (
      {"schedule": "steps", "boundaries": (3, 6), "warmup_steps": 1},
      [0, 1, 2, 3, 4, 6, 7],
      [0.0, 1.0, 1.0, 0.1, 0.1, 0.01, 0.01],
    ),
    (
      {"schedule": "exponential", "decay_every": 2, "factor": 0.25},
      [0, 1, 2, 4],
      [1.0, 0.5, 0.25, 0.0625],
    ),
  ],
)
def test_schedules_by_hand(options, steps, want):
  options = {**optimizers.defaults(), "learning_rate": 1.0, **options}
  schedule = optimizers.schedule(options)
  got = [float(schedule(step)) for step in steps]
  np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"lr": 0.1}, "no option lr; it has: name, learning_rate"),
    ({"name": "sdg"}, "must be one of sgd, sgdw, adam.*got 'sdg'"),
    ({"schedule": "cos"}, "constant, cosine.*got 'cos'"),
    ({"schedule": "cosine"}, "total_steps must be more than warmup_steps=0"),
    ({"decayed": "some"}, "must be all or kernels, got 'some'"),
  ],
)
def test_unknown_options_are_refused(options, message):
  with pytest.raises(InputError, match=message):
    optimizers.make(options)


def test_a_pattern_that_matches_nothing_is_refused():
  with pytest.raises(
    InputError, match=r"'trunk' matches no parameter.*head/ker"
  ):
    optimizers.make({"frozen": ("trunk",)}).init(PARAMS)
