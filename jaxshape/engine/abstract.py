"""Shapes of a state, without what its making would read.

The values of a run's state come from its checkpoint; what it began with, such
as a file of weights, need not be there any more.
"""

from collections.abc import Callable
import contextvars
from typing import Any

import jax

_ALONE = contextvars.ContextVar("shapes_alone", default=False)


def shapes(init: Callable[[jax.Array], Any], key: jax.Array) -> Any:
  """The shapes and dtypes of what `init` makes of a key."""

  # A function of its own: what JAX keeps of its trace must never serve for a
  # state whose values count.
  def alone(key: jax.Array) -> Any:
    token = _ALONE.set(True)
    try:
      return init(key)
    finally:
      _ALONE.reset(token)

  return jax.eval_shape(alone, key)


def asked() -> bool:
  """Whether nothing but shapes is wanted now."""
  return _ALONE.get()
