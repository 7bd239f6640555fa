"""State in `extra`: a teacher that follows slowly and a queue of its keys."""

import jax
import jax.numpy as jnp
import optax

from jaxshape.engine import optimizers, steps
from jaxshape.system import System
from tests.tiny import regression


def make(config):
  def loss(params, extra, batch, key):
    noisy = batch["x"] + 0.1 * jax.random.normal(key, batch["x"].shape)
    queries = noisy @ params["student"]
    keys = batch["x"] @ extra["teacher"]
    positive = (queries * keys).sum(1, keepdims=True)
    logits = jnp.concatenate([positive, queries @ extra["queue"].T], axis=1)
    value = -jax.nn.log_softmax(logits)[:, 0].mean()
    queue = jnp.concatenate([extra["queue"], keys])[len(keys) :]
    teacher = optax.incremental_update(
      jax.lax.stop_gradient(params["student"]), extra["teacher"], 0.1
    )
    return value, ({"teacher": teacher, "queue": queue}, {})

  players = {"student": steps.Player(loss, optimizers.make(config.optimizer))}

  def init(key):
    w = jax.random.normal(key, (4, 3))
    queue = jax.random.normal(key, (32, 3))
    return steps.initial_state(
      players, {"student": w}, {"teacher": jnp.copy(w), "queue": queue}
    )

  return System(
    init=init,
    train_step=steps.take_turns(players),
    predict=lambda state, batch: batch["x"] @ state.params["student"],
    train_data=regression.train_data(config),
    evaluators={},
  )
