"""A system that trains nothing: its parameters are known."""

import jax.numpy as jnp

from jaxshape.engine import steps
from jaxshape.system import System
from tests.tiny import regression


def make(config):
  return System(
    init=lambda key: steps.initial_state({}, {"net": jnp.ones((4, 1))}, {}),
    train_step=None,
    predict=lambda state, batch: batch["x"] @ state.params["net"],
    train_data=regression.train_data(config),
    evaluators={"test": regression.error(config)},
  )
