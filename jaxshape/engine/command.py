"""What train.py and eval.py share: flags, and errors in one line."""

from collections.abc import Callable, Mapping, Sequence
import errno
import functools
import json
import logging
import os
import pathlib
import re
import sys
import threading
import traceback
from typing import Any

from absl import app, flags
from absl import logging as absl_logging
from etils import epath
import jax
import ml_collections

from jaxshape.engine import checkpoints, processes, settings
from jaxshape.errors import InputError
from jaxshape.typing import Config

CONFIG_FILE = "config.json"
# What shells report for a program that Ctrl-C ended.
_INTERRUPTED = 130
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def run(main: Callable[..., None], *, arguments: bool = False) -> None:
  """Parses the command line and runs, with one line for what a person did.

  Args:
    main: Reads the flags that the script has defined.
    arguments: Whether it is called with a list of what is no flag.
  """
  absl_logging.set_verbosity(absl_logging.WARNING)
  # Its tracebacks; `SaveError` says the same in one line.
  absl_logging.get_absl_logger().addFilter(
    lambda record: "orbax" not in record.pathname
  )
  processes.define_flags(flags.FLAGS)
  threading.excepthook = _in_thread
  sys.unraisablehook = functools.partial(_unless_late, sys.unraisablehook)

  def guarded(argv: Sequence[str]) -> None:
    try:
      if len(argv) > 1 and not arguments:
        raise InputError(f"unknown argument {argv[1]!r}; see --help.")
      values = flags.FLAGS
      processes.initialize(
        values.coordinator, values.process_id, values.num_processes
      )
      main(*[argv[1:]] if arguments else [])
    except SystemExit:  # All stop at the same step.
      processes.finish()
      raise
    except BaseException as error:
      text = _one_line(error)
      code = _INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1
      if processes.count() > 1 and not isinstance(error, processes.StartError):
        _end_all(error, text, code)
      if text is None:
        raise
      processes.say(text)
      late = isinstance(error, checkpoints.SaveError | processes.StartError)
      if late or getattr(error, "errno", None) in _FULL:
        os._exit(code)  # Threads that failed would never end, or fail again.
      sys.exit(code)
    processes.finish()

  app.run(guarded, flags_parser=_parse)


def _in_thread(failed: threading.ExceptHookArgs) -> None:
  """Says in one line what a log's writer met; the loop meets it as well."""
  if isinstance(failed.exc_value, OSError):
    logging.warning("%s", failed.exc_value)
  else:
    threading.__excepthook__(failed)


def _unless_late(hook: Callable[[Any], object], failed: Any) -> None:
  """Leaves out what other writes of a failed save meet in threads of C."""
  if "Event loop is closed" not in str(failed.exc_value):
    hook(failed)


def _one_line(error: BaseException) -> str | None:
  """What a person or the machine did; None for a defect of the program."""
  text = " ".join(str(error).split())
  if isinstance(error, InputError):
    return text
  if isinstance(error, KeyboardInterrupt):
    return f"stopped by Ctrl-C; {text}".rstrip("; ")
  if isinstance(error, OSError) and error.strerror:
    # The machine's matter: a full disk, a right.
    if error.filename is not None:
      return f"{os.fspath(error.filename)}: {error.strerror}."
    if error.errno in _FULL:  # Of a file that was open already.
      return f"{error.strerror}; make room and start again."
  if isinstance(error, MemoryError) or (
    isinstance(error, jax.errors.JaxRuntimeError)
    and "RESOURCE_EXHAUSTED" in text
  ):
    return (
      "out of memory; lower --config.batch_size, or raise "
      f"--config.accumulate. {text[:200]}"
    )
  return None


def _end_all(error: BaseException, text: str | None, code: int) -> None:
  """Ends the other processes, too: they would wait for this one for ever."""
  if text is None and isinstance(error, jax.errors.JaxRuntimeError):
    processes.fail(error)  # Nearly always another process that is gone.
  if text is None:
    traceback.print_exception(error)
    text = f"{type(error).__name__}: {error}"
  processes.fail(error, text, code)


def _parse(argv: list[str]) -> list[str]:
  """Absl's parser with one line instead of a traceback."""
  try:
    return flags.FLAGS(argv)
  except (AttributeError, KeyError) as error:
    text = str(error.args[0] if error.args else error).split("\n")[0]
    if text.endswith("'get_config'"):  # Of the module that the file is.
      named = [a for a in argv if re.match("--?[^=]*config=", a)]
      processes.say(f"{' '.join(named)} has no function get_config.")
      sys.exit(1)
    field = re.escape(text.strip("\"'").split("'")[0])
    named = [a.split("=")[0] for a in argv if re.search(rf"\b{field}\b", a)]
    processes.say(f"the config has no field {' '.join(named) or text}")
  except (flags.Error, ValueError) as error:
    # Where a config file refuses its mode, the whole traceback is in the text.
    lines = str(error).strip().splitlines() or [""]
    text = lines[-1] if "Traceback" in str(error) else " ".join(lines)
    processes.say("command line: " + " ".join(text.split()))
  except (ImportError, OSError, SyntaxError) as error:
    processes.say(f"--config: {error}; there are: {_listed()}")
  sys.exit(1)


def _listed() -> str:
  """The configs of the working folder, as the command line names them."""
  files = sorted(str(p) for p in pathlib.Path("configs").glob("[!_]*.py"))
  return ", ".join(files) or "none in this folder"


def require_config(name: str = "config") -> Config:
  """The config that was named, or what there is to name.

  Args:
    name: Of the flag.
  """
  config = flags.FLAGS[name].value
  if config is None:
    raise InputError(
      "name a config, such as --config=configs/texture_suppression.py:tiny; "
      f"there are: {_listed()}"
    )
  try:
    config.to_dict()  # The file is opened late; this is where it fails.
  except OSError as error:
    raise InputError(
      f"--config: {str(error).splitlines()[-1].strip()}; there are: {_listed()}"
    ) from error
  return config


def differences(before: Any, config: Config) -> list[str]:
  """What a run's config says otherwise than before.

  Args:
    before: As stored in a checkpoint; None if there is none.
    config: The one that was given now.

  Returns:
    A text for every field that could change what is learned.
  """
  if before is None:
    return []
  old = _flat(json.loads(json.dumps(before)))
  new = _flat(json.loads(config.to_json_best_effort()))
  return [
    f"{name}: {old.get(name)!r} then, {new.get(name)!r} now"
    for name in sorted(set(old) | set(new))
    if old.get(name) != new.get(name) and name.split(".")[0] not in _FREE
  ]


# Fields that a run may change on its way.
_FREE = (
  "steps",
  "log_every",
  "eval_every",
  "save_every",
  "keep",
  "best_metric",
  "best_mode",
  "mesh",
  "stuck_seconds",
  "check_data",
  "bench",
)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  out = {}
  for name, value in values.items():
    if isinstance(value, dict):
      out |= _flat(value, f"{prefix}{name}.")
    else:
      out[prefix + name] = value
  return out


def write_config(config: Mapping[str, Any], workdir: Any) -> None:
  """Keeps the config beside the run, for `read_config`."""
  if processes.index():
    return
  text = ml_collections.ConfigDict(config).to_json_best_effort(indent=2)
  epath.Path(workdir).joinpath(CONFIG_FILE).write_text(text + "\n")


def read_config(workdir: str | os.PathLike[str]) -> Config:
  """The config that a run was trained with.

  Raises:
    InputError: The folder is not there, or it holds no readable config.
  """
  folder = epath.Path(workdir)
  path = folder / CONFIG_FILE
  if not folder.is_dir():
    raise InputError(f"workdir {folder} is not there.")
  if not path.exists():
    raise InputError(
      f"{folder} holds no {CONFIG_FILE}, so nothing was trained there; train "
      "first with train.py --workdir=..., or name a config with --config=..."
    )
  try:
    values = json.loads(path.read_text())
    if not isinstance(values, dict):
      raise TypeError("no object")
  except (json.JSONDecodeError, TypeError, UnicodeDecodeError) as error:
    raise InputError(f"{path} is no readable config: {error}.") from error
  # A field that is younger than the run has its default.
  values = settings.defaults().to_dict() | _tuples(values)
  return ml_collections.ConfigDict(values).lock()


def _tuples(value: Any) -> Any:
  """JSON has no tuples; a config has no lists."""
  if isinstance(value, dict):
    return {k: _tuples(v) for k, v in value.items()}
  return tuple(map(_tuples, value)) if isinstance(value, list) else value
