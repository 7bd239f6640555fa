"""What a person did, said in one line."""

from collections.abc import Iterator
import contextlib
import types
from typing import Any


class InputError(ValueError):
  """Something that a person gave does not fit; the message says what to do.

  Scripts print the message alone. Anything else that is raised is a defect of
  the program and keeps its traceback.
  """


def few(items: Any) -> str:
  """The first five of a sequence or an array, and how many more there are."""
  more = f" and {len(items) - 5} more" if len(items) > 5 else ""
  return ", ".join(map(str, items[:5])) + more


@contextlib.contextmanager
def reading_config() -> Iterator[None]:
  """Says in one line what the code inside refuses about the config it reads.

  Pure functions refuse an option by a `ValueError`, "x must be ..., got ...",
  and know nothing of configs. Where a config gave the option, that is what a
  person did. Errors of any other form or origin are defects and stay as they
  are.

  Raises:
    InputError: A function of this package refused an option, or the config
      lacks a field.
  """
  try:
    yield
  except InputError:
    raise
  except ValueError as error:
    text = " ".join(str(error).split())
    refused = " must " in text and _origin(error).startswith("jaxshape.")
    if not refused:
      raise
    raise InputError(f"the config does not fit: {text}") from error
  except (AttributeError, KeyError) as error:
    if not _origin(error).startswith("ml_collections."):
      raise
    text = str(error.args[0] if error.args else error).split("\n")[0]
    raise InputError(
      f"the config lacks a field ({text}); take it from the file in configs/ "
      "again."
    ) from error


def _origin(error: BaseException) -> str:
  """The module that raised an error."""
  trace: types.TracebackType | None = error.__traceback__
  name = ""
  while trace is not None:
    name = trace.tb_frame.f_globals.get("__name__", "")
    trace = trace.tb_next
  return name
