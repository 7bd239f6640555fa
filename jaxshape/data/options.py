"""Functions and their options by name, as configs give them."""

from collections.abc import Callable, Mapping
import functools
import inspect
from typing import Any

from jaxshape.errors import InputError


def bind(
  where: str,
  known: Mapping[str, Callable[..., Any]],
  name: str,
  options: Mapping[str, Any] | None,
) -> Callable[..., Any]:
  """The function of that name with its options, all of them known.

  Args:
    where: What the functions belong to, for the errors.
    known: By name; their options are their keyword-only parameters.
    name: Of the function.
    options: By name; those that have a default may be left out.

  Returns:
    The function of what is left.

  Raises:
    InputError: The name or an option is not known, or an option is missing.
  """
  if name not in known:
    raise InputError(f"{where} has no {name!r}; there are: {', '.join(known)}.")
  accepted = {
    option.name: option
    for option in inspect.signature(known[name]).parameters.values()
    if option.kind is option.KEYWORD_ONLY
  }
  given = dict(options or {})
  for option in given:
    if option not in accepted:
      raise InputError(
        f"{where}.{name} has no option {option!r}; it has: "
        f"{', '.join(accepted)}."
      )
  for option, parameter in accepted.items():
    if parameter.default is parameter.empty and option not in given:
      raise InputError(f"{where}.{name} needs the option {option!r}.")
  return functools.partial(known[name], **given)
