"""Optimizers and schedules by configuration, all of them optax's."""

from collections.abc import Mapping, Sequence
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxshape.errors import InputError
from jaxshape.typing import PyTree

OPTIONS: Mapping[str, Any] = {
  "name": "sgd",
  "learning_rate": 0.1,
  # constant | cosine | steps | exponential | linear
  "schedule": "constant",
  # Length of the schedule with its warm-up, in steps.
  "total_steps": 0,
  "warmup_steps": 0,
  # The rate at the end of cosine and linear, as a share of `learning_rate`.
  "final": 0.0,
  # The rate is multiplied by `factor` at each of the `boundaries` (steps), or
  # smoothly over each `decay_every` steps (exponential).
  "factor": 0.1,
  "boundaries": (),
  "decay_every": 1,
  "momentum": 0.9,
  "nesterov": False,
  "b1": 0.9,
  "b2": 0.999,
  "epsilon": 1e-8,
  # Of RMSprop's mean of squares.
  "rms_decay": 0.9,
  "weight_decay": 0.0,
  # all | kernels: kernels leaves out biases and the scales of normalizations.
  "decayed": "all",
  # Largest global norm of a gradient; 0 for no limit.
  "clip_norm": 0.0,
  # Patterns of paths ("net/conv_init") that do not move.
  "frozen": (),
  # Pairs of a pattern and a factor on the rate of the paths that it matches.
  "rates": (),
}


def defaults() -> dict[str, Any]:
  """Every option with its default, for a config to change."""
  return dict(OPTIONS)


def schedule(options: Mapping[str, Any]) -> optax.Schedule:
  """The learning rate as a function of the step.

  Args:
    options: As in `OPTIONS`.

  Returns:
    Linear warm-up from 0 over `warmup_steps`, then the schedule by name.

  Raises:
    InputError: The name is unknown or the lengths do not fit.
  """
  rate, name = float(options["learning_rate"]), options["schedule"]
  _check_schedule(options)
  warmup, total = int(options["warmup_steps"]), int(options["total_steps"])
  if name in ("cosine", "linear") and total <= warmup:
    raise InputError(
      f"optimizer.total_steps must be more than warmup_steps={warmup} for the "
      f"{name} schedule, got {total}."
    )
  length, final = total - warmup, float(options["final"])
  if name == "constant":
    main = optax.constant_schedule(rate)
  elif name == "cosine":
    main = optax.cosine_decay_schedule(rate, length, final)
  elif name == "linear":
    main = optax.linear_schedule(rate, rate * final, length)
  elif name == "steps":
    main = optax.piecewise_constant_schedule(
      rate, {int(b) - warmup: options["factor"] for b in options["boundaries"]}
    )
  elif name == "exponential":
    main = optax.exponential_decay(
      rate, int(options["decay_every"]), float(options["factor"])
    )
  else:
    raise InputError(
      "optimizer.schedule must be constant, cosine, linear, steps or "
      f"exponential, got {name!r}."
    )
  if not warmup:
    return main
  ramp = optax.linear_schedule(0.0, rate, warmup)
  return optax.join_schedules([ramp, main], [warmup])


def _check_schedule(options: Mapping[str, Any]) -> None:
  rate = float(options["learning_rate"])
  if not 0 <= rate < math.inf:
    raise InputError(
      f"optimizer.learning_rate must be a number from 0 up, got {rate}."
    )
  if not all(isinstance(step, int) for step in options["boundaries"]):
    raise InputError(
      f"optimizer.boundaries must be steps, got {tuple(options['boundaries'])}."
    )
  if int(options["decay_every"]) < 1 or not float(options["factor"]) > 0:
    raise InputError(
      "optimizer.decay_every must be at least 1 and factor above 0, got "
      f"{options['decay_every']} and {options['factor']}."
    )


def make(config: Mapping[str, Any]) -> optax.GradientTransformation:
  """The optimizer that a config describes.

  Args:
    config: Any of `OPTIONS`; what is left out has its default.

  Returns:
    Clipping, the rule by name with weight decay, factors by path, frozen paths.

  Raises:
    InputError: An option or a name is unknown, or a pattern matches no path
      (when the optimizer first sees the parameters).
  """
  if unknown := sorted(set(config) - set(OPTIONS)):
    raise InputError(
      f"optimizer has no option {', '.join(unknown)}; it has: "
      + ", ".join(OPTIONS)
    )
  options = {**OPTIONS, **dict(config)}
  rate, decay = schedule(options), float(options["weight_decay"])
  if options["decayed"] not in ("all", "kernels"):
    raise InputError(
      f"optimizer.decayed must be all or kernels, got {options['decayed']!r}."
    )
  kernels = _kernels if options["decayed"] == "kernels" else None
  add_decay = optax.add_decayed_weights(decay, mask=kernels)
  momentum = optax.trace(options["momentum"], nesterov=options["nesterov"])
  adam = optax.scale_by_adam(
    options["b1"], options["b2"], options["epsilon"],
    nesterov=options["nesterov"],
  )  # fmt: skip
  # Decay before the rule joins the gradient (L2); after it, it is decoupled.
  rules: dict[str, list[optax.GradientTransformation]] = {
    "sgd": [add_decay, momentum],
    "sgdw": [momentum, add_decay],
    "adam": [add_decay, adam],
    "adamw": [adam, add_decay],
    "rmsprop": [
      add_decay,
      optax.scale_by_rms(options["rms_decay"], options["epsilon"]),
      momentum,
    ],
    "lars": [
      add_decay,
      optax.masked(optax.scale_by_trust_ratio(0.0, 0.001), _kernels),
    ],
  }
  if options["name"] not in rules:
    raise InputError(
      f"optimizer.name must be one of {', '.join(rules)}, got "
      f"{options['name']!r}."
    )
  parts = []
  frozen = [(pattern, 0.0) for pattern in options["frozen"]]
  if frozen:  # Before clipping: what does not move does not count.
    parts.append(_scale_by_path(frozen))
  if options["clip_norm"]:
    parts.append(optax.clip_by_global_norm(options["clip_norm"]))
  parts += rules[options["name"]]
  parts.append(optax.scale_by_learning_rate(rate))
  if options["name"] == "lars":  # Its momentum follows the rate.
    parts.append(momentum)
  factors = [(str(pattern), float(f)) for pattern, f in options["rates"]]
  if factors or frozen:
    parts.append(_scale_by_path(factors + frozen))
  return optax.chain(*parts)


def path_name(path: Sequence[Any]) -> str:
  """A tree path as text, such as "net/conv_init/kernel"."""
  return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def _kernels(params: PyTree) -> PyTree:
  """Marks what has two axes or more: no biases, no scales."""
  return jax.tree.map(lambda leaf: jnp.ndim(leaf) > 1, params)


def _scale_by_path(
  factors: Sequence[tuple[str, float]],
) -> optax.GradientTransformation:
  """Multiplies updates by the factors of all patterns found in their paths."""

  def factor(path: Sequence[Any]) -> float:
    name, product = path_name(path), 1.0
    for pattern, value in factors:
      if re.search(pattern, name):
        product *= value
    return product

  for pattern, _ in factors:
    try:
      re.compile(pattern)
    except re.error as error:
      raise InputError(
        f"optimizer: {pattern!r} is no regular expression: {error}."
      ) from error

  def init(params: PyTree) -> optax.OptState:
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    paths = [path_name(path) for path, _ in leaves]
    for pattern, _ in factors:
      if not any(re.search(pattern, path) for path in paths):
        raise InputError(
          f"optimizer: the pattern {pattern!r} matches no parameter; paths "
          f"look like {', '.join(paths[:3])}."
        )
    return optax.EmptyState()

  def update(
    updates: PyTree, state: optax.OptState, params: PyTree = None
  ) -> tuple[PyTree, optax.OptState]:
    del params
    scaled = jax.tree_util.tree_map_with_path(
      lambda path, leaf: leaf * factor(path), updates
    )
    return scaled, state

  return optax.GradientTransformation(init, update)
