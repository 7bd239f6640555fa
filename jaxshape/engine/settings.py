"""What every config holds for the loop, with its defaults."""

from ml_collections import ConfigDict

from jaxshape.engine import optimizers
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
  # In steps; 0 for at the end alone.
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
  config.optimizer = ConfigDict(optimizers.defaults())
  return config
