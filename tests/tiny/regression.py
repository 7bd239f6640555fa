"""One player, statistics in `extra`: supervised learning at its smallest."""

import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxshape.engine import optimizers, steps
from jaxshape.errors import InputError
from jaxshape.system import Evaluator, System

ROWS = 22


def rows(index):
  """Examples by number: y is linear in x."""
  x = np.stack(
    [np.random.default_rng(i).normal(size=4) for i in np.asarray(index)]
  ).astype(np.float32)
  return {"x": x, "y": x.sum(1, keepdims=True)}


def share(config, start):
  """Numbers of the rows of a batch that are this process's."""
  size = config.batch_size // jax.process_count()
  return start + jax.process_index() * size + np.arange(size)


def train_data(config):
  def batches(step):
    while True:
      time.sleep(config.get("pause", 0.0))
      start = (config.seed * 1000 + step) * config.batch_size
      if step == config.get("breaks_for_the_last_at", -1) and (
        jax.process_index() == jax.process_count() - 1
      ):
        raise InputError("a file of this process is not there any more")
      if step == config.get("sticks_for_the_last_at", -1) and (
        jax.process_index() == jax.process_count() - 1
      ):
        time.sleep(1000)
      yield rows(share(config, start))
      step += 1

  return batches


def eval_data(config):
  def batches():
    for start in range(0, ROWS, config.batch_size):
      time.sleep(config.get("eval_pause", 0.0))
      index = share(config, start)
      yield {**rows(index), "mask": (index < ROWS).astype(np.float32)}

  return batches


def squared_error(w, batch):
  return ((batch["x"] @ w - batch["y"]) ** 2).sum(1)


def error(config, predict=None):
  def step(state, batch):
    if predict is None:
      errors = squared_error(state.params["net"], batch)
    else:
      errors = ((predict(state.params, batch["x"]) - batch["y"]) ** 2).sum(1)
    return {
      "sum": (errors * batch["mask"]).sum(),
      "count": batch["mask"].sum(),
    }

  def summarize(outputs):
    return {
      "error": sum(o["sum"] for o in outputs) / sum(o["count"] for o in outputs)
    }

  return Evaluator(eval_data(config), step, summarize)


def make(config):
  def loss(params, extra, batch, key):
    noise = config.get("noise", 0.0) * jax.random.normal(key, batch["y"].shape)
    value = squared_error(
      params["net"], {**batch, "y": batch["y"] + noise}
    ).mean()
    value = jnp.where(
      extra["seen"] == config.get("breaks_at", -1), jnp.nan, value
    )
    extra = {**extra, "seen": extra["seen"] + 1}
    return value, (extra, {"seen": extra["seen"]})

  players = {"net": steps.Player(loss, optimizers.make(config.optimizer))}
  averaging = config.averaging or None

  def init(key):
    return steps.initial_state(
      players,
      {"net": jax.random.normal(key, (4, 1))},
      {"seen": jnp.zeros(())},
      averaging=averaging,
    )

  return System(
    init=init,
    train_step=steps.take_turns(
      players, accumulate=config.accumulate, averaging=averaging
    ),
    predict=lambda state, batch: batch["x"] @ state.params["net"],
    train_data=train_data(config),
    evaluators={"test": error(config)},
  )
