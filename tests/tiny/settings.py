"""A config for the tiny systems."""

from jaxshape.engine import settings


def config(kind="regression", **changes):
  out = settings.defaults()
  out.system = f"tests.tiny.{kind}"
  out.steps = 6
  out.batch_size = 8
  out.log_every = 2
  out.save_every = 3
  out.noise = 0.1
  out.breaks_at = -1
  out.breaks_for_the_last_at = -1
  out.sticks_for_the_last_at = -1
  out.pause = out.eval_pause = 0.0
  out.optimizer.name = "adam"
  out.optimizer.learning_rate = 0.05
  with out.unlocked():
    for name, value in changes.items():
      out[name] = value
  return out.lock()


def get_config(mode="regression"):
  """As a file of configs/, for the command line."""
  return config(mode).unlock()
