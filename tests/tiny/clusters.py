"""A stage on the host: centres by NumPy, parameters by descent."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxshape.engine import optimizers, steps
from jaxshape.system import System
from tests.tiny import regression


def make(config):
  def loss(params, extra, batch, key):
    del key
    features = batch["x"] @ params["net"]
    distances = ((features[:, None] - extra["centres"]) ** 2).sum(-1)
    return distances.min(1).mean(), (extra, {})

  def refresh(state):
    w = np.asarray(state.params["net"])
    x = regression.rows(range(20))["x"] @ w
    centres = np.stack([x[:10].mean(0), x[10:].mean(0)]).astype(np.float32)
    count = state.extra["refreshed"] + 1
    return state.replace(extra={"centres": centres, "refreshed": count})

  players = {"net": steps.Player(loss, optimizers.make(config.optimizer))}

  def init(key):
    extra = {"centres": jnp.zeros((2, 3)), "refreshed": jnp.int32(0)}
    return steps.initial_state(
      players, {"net": jax.random.normal(key, (4, 3))}, extra
    )

  return System(
    init=init,
    train_step=steps.take_turns(players),
    predict=lambda state, batch: batch["x"] @ state.params["net"],
    train_data=regression.train_data(config),
    evaluators={},
    refresh=refresh,
  )
