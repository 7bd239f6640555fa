"""Two players and a queue: the critic is shown the generator's past, too."""

import jax
import jax.numpy as jnp

from jaxshape.engine import optimizers, steps
from jaxshape.system import System
from tests.tiny import regression


def make(config):
  def made(params, key, x):
    return jax.random.normal(key, x.shape) @ params["generator"]

  def scores(params, x):
    return jnp.tanh(x @ params["critic"]["in"]) @ params["critic"]["out"]

  def critic(params, extra, batch, key):
    fake = jax.lax.stop_gradient(made(params, key, batch["x"]))
    past = scores(params, extra["queue"])
    queue = jnp.concatenate([extra["queue"], fake])[len(fake) :]
    loss = (
      jax.nn.softplus(-scores(params, batch["x"])).mean()
      + jax.nn.softplus(scores(params, fake)).mean()
      + jax.nn.softplus(past).mean()
    )
    return loss, ({**extra, "queue": queue}, {"past": past.mean()})

  def generator(params, extra, batch, key):
    fake = made(params, key, batch["x"])
    return jax.nn.softplus(-scores(params, fake)).mean(), (extra, {})

  players = {
    "critic": steps.Player(critic, optimizers.make(config.optimizer)),
    "generator": steps.Player(
      generator, optimizers.make(config.optimizer), every=2
    ),
  }

  def init(key):
    keys = jax.random.split(key, 3)
    params = {
      "critic": {
        "in": jax.random.normal(keys[0], (4, 8)),
        "out": jax.random.normal(keys[1], (8, 1)),
      },
      "generator": 0.5 * jnp.eye(4),
    }
    extra = {"queue": jnp.zeros((24, 4)), "key": keys[2]}
    return steps.initial_state(players, params, extra)

  return System(
    init=init,
    train_step=steps.take_turns(players),
    predict=lambda state, batch: scores(state.params, batch["x"]),
    train_data=regression.train_data(config),
    evaluators={"test": regression.error(config, scores)},
  )
