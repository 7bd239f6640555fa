"""The one call into Flax: its types and its habits stay in one place."""

from typing import Any

import flax.linen as nn
import jax

from jaxshape.typing import PyTree


def init(
  module: nn.Module, key: jax.Array, *inputs: Any, **options: Any
) -> tuple[PyTree, PyTree]:
  """Makes a module's parameters and its other collections.

  Args:
    module: Any Linen module.
    key: A PRNG key.
    *inputs: What the module is called with; the values do not matter.
    **options: Keyword arguments of the module's call.

  Returns:
    The parameters, and a dict of the other collections (batch statistics),
    empty if there are none.
  """
  variables = dict(module.init(key, *inputs, **options))
  return variables.pop("params", {}), variables


def apply(
  module: nn.Module,
  params: PyTree,
  collections: PyTree,
  *inputs: Any,
  key: jax.Array | None = None,
  update: bool = False,
  **options: Any,
) -> tuple[Any, Any]:
  """Calls a module as a pure function.

  Args:
    module: Any Linen module.
    params: Its parameters.
    collections: Its other collections, as `init` gave them.
    *inputs: What the module is called with.
    key: For dropout and the like; needed only by modules that draw.
    update: Whether the collections may change (training).
    **options: Keyword arguments of the module's call.

  Returns:
    The module's output, and the collections as they are afterwards.
  """
  variables = {"params": params, **collections}
  rngs = None if key is None else {"dropout": key}
  if not update:
    return module.apply(variables, *inputs, rngs=rngs, **options), collections
  out, changed = module.apply(
    variables, *inputs, rngs=rngs, mutable=list(collections), **options
  )
  return out, dict(changed)
