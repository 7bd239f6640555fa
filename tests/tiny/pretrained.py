"""A system with public weights: a linear layer as PyTorch keeps it."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from jaxshape.errors import InputError
from jaxshape.system import Weights
from tests.tiny import regression


def make(config):
  def load(state, tensors):
    if sorted(tensors) != ["body.weight", "head.seen"]:
      raise InputError(f"wanted body.weight and head.seen, got {[*tensors]}.")
    net = jnp.asarray(tensors["body.weight"].T, jnp.float32)
    seen = jnp.asarray(tensors["head.seen"], jnp.float32)
    if config.get("forgets", False):
      net = net.at[0].set(0)
    return state.replace(
      params={"net": net}, extra={**state.extra, "seen": seen}
    )

  def save(state):
    return {
      "body.weight": np.asarray(state.params["net"]).T,
      "head.seen": np.asarray(state.extra["seen"]),
    }

  parts = {"body": "body.", "head_last": "head."}
  return dataclasses.replace(
    regression.make(config), weights=Weights(load, save, parts)
  )
