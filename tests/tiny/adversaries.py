"""Two players: the critic moves each step, the generator each second."""

import jax
import jax.numpy as jnp

from jaxshape.engine import optimizers, steps
from jaxshape.system import System
from tests.tiny import regression


def make(config):
  def critic(params, extra, batch, key):
    noise = jax.random.normal(key, batch["x"].shape)
    real = batch["x"] @ params["critic"]
    fake = (noise * params["generator"]) @ params["critic"]
    loss = jax.nn.softplus(-real).mean() + jax.nn.softplus(fake).mean()
    return loss, (extra, {"real": real.mean()})

  def generator(params, extra, batch, key):
    noise = jax.random.normal(key, batch["x"].shape)
    fake = (noise * params["generator"]) @ params["critic"]
    return jax.nn.softplus(-fake).mean(), (extra, {})

  players = {
    "critic": steps.Player(critic, optimizers.make(config.optimizer)),
    "generator": steps.Player(
      generator, optimizers.make(config.optimizer), every=2
    ),
  }

  def init(key):
    params = {
      "critic": jax.random.normal(key, (4, 1)),
      "generator": jnp.full((4,), 0.5),
    }
    return steps.initial_state(players, params, {})

  return System(
    init=init,
    train_step=steps.take_turns(players),
    predict=lambda state, batch: batch["x"] @ state.params["critic"],
    train_data=regression.train_data(config),
    evaluators={},
  )
