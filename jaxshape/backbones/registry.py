"""Backbones of image classifiers, by name.

A module of this package is one if it has what `Backbone` names; nothing has to
be registered.

Source: torchvision and the packages that the modules name, for the names.
"""

from collections.abc import Callable, Mapping
import difflib
import functools
import importlib
import inspect
import pkgutil
from typing import Any, Protocol, cast

import jax.numpy as jnp

from jaxshape.errors import InputError


class Backbone(Protocol):
  """A module of networks that name images.

  Attributes:
    VARIANTS: The names.
    HEAD: What the parameters of the last linear layer are called.
    make: `(name, *, num_classes, dtype, ...) -> net`. The network has
      `num_classes`, `stride`, and the methods `features` (spatial ones, from
      normalized images) and `head` (logits from them).
    from_state_dict: `(net, tensors, *, head) -> (parameters, collections)`,
      without `HEAD` if `head` is False.
    to_state_dict: `(net, parameters, collections) -> tensors`.
  """

  VARIANTS: Mapping[str, Any]
  HEAD: str
  make: Callable[..., Any]
  from_state_dict: Callable[..., tuple[Any, Any]]
  to_state_dict: Callable[..., dict[str, Any]]


_PACKAGE = "jaxshape.backbones"
_PARTS = ("VARIANTS", "HEAD", "make", "from_state_dict", "to_state_dict")


@functools.cache
def _modules() -> tuple[Backbone, ...]:
  package = importlib.import_module(_PACKAGE)
  found = (
    importlib.import_module(f"{_PACKAGE}.{module.name}")
    for module in pkgutil.iter_modules(package.__path__)
    if f"{_PACKAGE}.{module.name}" != __name__
  )
  return tuple(
    cast(Backbone, module)
    for module in found
    if all(hasattr(module, part) for part in _PARTS)
  )


def names() -> list[str]:
  """The networks that exist, in alphabetical order."""
  return sorted(name for module in _modules() for name in module.VARIANTS)


def variant(name: str, variants: Mapping[str, Any]) -> Any:
  """What a name stands for.

  Args:
    name: Of a network.
    variants: All there are, by name.

  Returns:
    Its value.

  Raises:
    InputError: There is no such name.
  """
  if name in variants:
    return variants[name]
  near = difflib.get_close_matches(name, variants, n=1)
  hint = f"did you mean {near[0]!r}? " if near else ""
  raise InputError(
    f"{name!r} is no backbone; {hint}There are: {', '.join(variants)}"
  )


def find(name: str) -> Backbone:
  """The module that makes a network.

  Args:
    name: Of the network.

  Returns:
    The module.

  Raises:
    InputError: There is no such name.
  """
  known = {own: module for module in _modules() for own in module.VARIANTS}
  return variant(name, dict(sorted(known.items())))


def make(
  name: str, *, num_classes: int, dtype: Any = jnp.float32, **options: Any
) -> Any:
  """The network of a name.

  Args:
    name: One of `names`.
    num_classes: Number of logits.
    dtype: What is computed in.
    **options: What else its module's `make` takes; None is not given.

  Returns:
    The module.

  Raises:
    InputError: There is no such name, or it takes no such option.
  """
  module = find(name)
  given = {key: value for key, value in options.items() if value is not None}
  known = inspect.signature(module.make).parameters
  if unknown := [key for key in given if key not in known]:
    raise InputError(
      f"the backbone {name!r} has no {unknown[0]}, got {given[unknown[0]]!r}."
    )
  return module.make(name, num_classes=num_classes, dtype=dtype, **given)
