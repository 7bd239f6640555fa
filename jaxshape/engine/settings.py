"""What every config holds for the loop, with its defaults."""

from collections.abc import Mapping
import math
import re
from typing import Any

from ml_collections import ConfigDict

from jaxshape.engine import optimizers
from jaxshape.errors import InputError
from jaxshape.typing import Config


def defaults() -> Config:
  """The fields that `train.py` and `eval.py` read; a config changes them.

  Returns:
    An unlocked config; the scripts lock it.
  """
  config: Config = ConfigDict()
  # A file of jaxshape/systems, or the full name of a module with a `make`.
  config.system = ""
  config.seed = 0
  config.steps = 0
  # Over all devices and processes.
  config.batch_size = 128
  # Parts into which a batch is cut to save memory.
  config.accumulate = 1
  # Decay of the average of the parameters that is evaluated; 0 for none.
  config.averaging = 0.0
  config.log_every = 50
  # In steps; 0 for never. What was reached at the end is always saved.
  config.eval_every = 0
  config.save_every = 1000
  # A stage on the host, for systems that have one.
  config.refresh_every = 0
  # Checkpoints kept: so many of the newest, and the best by this metric.
  config.keep = 2
  config.best_metric = ""
  config.best_mode = "max"
  # Devices along the axes: `data` shares the batch, `model` the parameters and
  # the optimizer's state; -1 takes what is left.
  config.mesh = ConfigDict({"data": -1, "model": 1})
  # Another run's workdir to start from, and which of its paths to take.
  config.init_from = ""
  config.init_include = (".*",)
  # Whether a run goes on only with the data that it began with.
  config.check_data = True
  # Where there are several processes, one that makes no step and evaluates no
  # batch for so long is ended, and all others with it.
  config.stuck_seconds = 1800
  config.optimizer = ConfigDict(optimizers.defaults())
  return config


def check(config: Mapping[str, Any]) -> None:
  """Refuses what no run could use, before anything is made or written.

  Args:
    config: Should have all fields of `defaults`, of the same types; what a
      system adds is its own to check.

  Raises:
    InputError: A field is missing, of another type or out of its range.
  """
  for name, default in defaults().items():
    if name not in config:
      raise InputError(
        f"the config has no field {name!r}; start it from settings.defaults()."
      )
    wanted, given = type(default), config[name]
    fits = isinstance(given, (int, float) if wanted is float else wanted)
    if not fits or isinstance(given, bool) != (wanted is bool):
      raise InputError(
        f"config.{name} must be of type {wanted.__name__}, got {given!r}."
      )
  for name, (low, high) in _RANGES.items():
    if not low <= config[name] <= high:
      raise InputError(
        f"config.{name} must be in {low}..{high}, got {config[name]}."
        if high < math.inf
        else f"config.{name} must be at least {low}, got {config[name]}."
      )
  for pattern in config["init_include"]:
    try:
      re.compile(pattern)
    except re.error as error:
      raise InputError(
        f"config.init_include: {pattern!r} is no regular expression: {error}."
      ) from error
  if config["best_metric"] and not config["eval_every"]:
    raise InputError(
      f"config.best_metric={config['best_metric']!r} needs config.eval_every, "
      "got 0."
    )


_RANGES = {
  "seed": (0, 2**32 - 1),
  "steps": (1, math.inf),
  "batch_size": (1, math.inf),
  "accumulate": (1, math.inf),
  "log_every": (0, math.inf),
  "eval_every": (0, math.inf),
  "save_every": (0, math.inf),
  "refresh_every": (0, math.inf),
  "keep": (1, math.inf),
  "stuck_seconds": (1, math.inf),
}
