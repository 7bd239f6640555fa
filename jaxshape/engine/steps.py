"""Training steps: players that take turns at descending their own losses.

Supervised learning is one player, a GAN two, a critic that moves more often
than its generator two with another `every`. Everything that moves without a
loss (teachers, queues, statistics) goes through `extra`.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import optax

from jaxshape.system import TrainState, TrainStep
from jaxshape.typing import Batch, Metrics, PyTree

Loss = Callable[
  [PyTree, PyTree, Batch, jax.Array],
  tuple[jax.Array, tuple[PyTree, Metrics]],
]

# Metrics of this ending say 1 where the player's loss and gradient were finite.
FINITE = "/finite"


@dataclasses.dataclass(frozen=True)
class Player:
  """A network, or a group of them, that descends a loss of its own.

  Attributes:
    loss: `(params, extra, batch, key) -> loss, (extra, metrics)`, with the
      parameters of all players and a loss that is a mean over the batch; it is
      differentiated by the parameters under this player's name.
    optimizer: How the gradient moves them.
    every: The player moves in every so many steps, the first one included.
    first: The step from which on it moves, counted from 0.
    last: The step before which it stops; None for the end.
  """

  loss: Loss
  optimizer: optax.GradientTransformation
  every: int = 1
  first: int = 0
  last: int | None = None

  def __post_init__(self):
    if self.every < 1:
      raise ValueError(f"every must be at least 1, got {self.every}.")

  def moves(self, step: jax.Array) -> jax.Array | bool:
    """Whether it moves in a step; True itself where it always does."""
    out: Any = True
    if self.every > 1:
      out = step % self.every == 0
    if self.first > 0:
      out &= step >= self.first
    if self.last is not None:
      out &= step < self.last
    return out


def initial_state(
  players: Mapping[str, Player],
  params: Mapping[str, PyTree],
  extra: PyTree,
  *,
  averaging: float | None = None,
) -> TrainState:
  """The state before the first step.

  Args:
    players: By name; each needs parameters under its name.
    params: By player; names that no player has are kept and never moved.
    extra: What else changes.
    averaging: As given to `take_turns`; adds the averaged parameters to
      `extra` as `"ema"`.

  Returns:
    A state at step 0.
  """
  if missing := sorted(set(players) - set(params)):
    raise ValueError(f"params must hold every player, {missing} are missing.")
  if averaging is not None:
    # A copy: the state is donated, and no buffer may be donated twice.
    extra = {**extra, "ema": jax.tree.map(jnp.copy, dict(params))}
  opt_state = {n: p.optimizer.init(params[n]) for n, p in players.items()}
  return TrainState(jnp.zeros((), jnp.int32), dict(params), opt_state, extra)


def evaluation_params(state: TrainState) -> PyTree:
  """The averaged parameters where the state has them, else the parameters."""
  if isinstance(state.extra, Mapping) and "ema" in state.extra:
    return state.extra["ema"]
  return state.params


def take_turns(
  players: Mapping[str, Player],
  *,
  accumulate: int = 1,
  averaging: float | None = None,
) -> TrainStep:
  """Makes one step of all players, in order, each seeing the last one's update.

  Args:
    players: By name.
    accumulate: Number of parts into which a batch is cut; the gradients of the
      parts are averaged, so that memory holds one part at a time.
    averaging: Decay of an exponential moving average of all parameters, kept in
      `extra["ema"]`; None for none. At step t it is at most (1 + t) / (10 + t).
      Batch statistics are not averaged: they follow the current parameters.

  Returns:
    `(state, batch, key) -> state, metrics`. Every metric is prefixed with its
    player's name; those of a player that did not move are NaN.
  """
  if accumulate < 1:
    raise ValueError(f"accumulate must be at least 1, got {accumulate}.")
  if averaging is not None and not 0 <= averaging < 1:
    raise ValueError(f"averaging must be in [0, 1), got {averaging}.")

  def train_step(
    state: TrainState, batch: Batch, key: jax.Array
  ) -> tuple[TrainState, Metrics]:
    metrics = {}
    before = state.extra["ema"] if averaging is not None else state.params
    for index, (name, player) in enumerate(players.items()):
      player_key = jax.random.fold_in(key, index)

      def turn(state, name=name, player=player, player_key=player_key):
        return _turn(name, player, state, batch, player_key, accumulate)

      moves = player.moves(state.step)
      if moves is True:
        state, measured = turn(state)
      else:
        absent = jax.tree.map(
          lambda m: jnp.full(m.shape, jnp.nan, m.dtype),
          jax.eval_shape(turn, state)[1],
        )
        absent[name + FINITE] = jnp.ones(())
        state, measured = lax.cond(
          moves,
          turn,
          lambda state, absent=absent: (state, absent),
          state,
        )
      metrics |= measured
    extra = state.extra
    if averaging is not None:
      # Shorter at first, or the average would remember the random start.
      decay = jnp.minimum(averaging, (1 + state.step) / (10 + state.step))
      ema = optax.incremental_update(state.params, before, 1 - decay)
      extra = {**extra, "ema": ema}
    return state.replace(step=state.step + 1, extra=extra), metrics

  return train_step


def _turn(
  name: str,
  player: Player,
  state: TrainState,
  batch: Batch,
  key: jax.Array,
  accumulate: int,
) -> tuple[TrainState, Metrics]:
  """Moves one player by its gradient."""

  def loss(own, extra, batch, key):
    params = {**state.params, name: own}
    value, (extra, metrics) = player.loss(params, extra, batch, key)
    metrics = {k: jnp.asarray(v, jnp.float32) for k, v in metrics.items()}
    return value, (extra, metrics)

  gradient = jax.value_and_grad(loss, has_aux=True)
  own = state.params[name]
  if accumulate == 1:
    (value, (extra, metrics)), grads = gradient(own, state.extra, batch, key)
  else:
    (value, (extra, metrics)), grads = _accumulated(
      gradient, own, state.extra, batch, key, accumulate
    )
  norm = optax.tree.norm(grads)
  updates, opt_state = player.optimizer.update(
    grads, state.opt_state[name], own
  )
  measured = {f"{name}/{k}": v for k, v in metrics.items()}
  measured[f"{name}/loss"] = value
  measured[f"{name}/gradient_norm"] = norm
  finite = jnp.isfinite(value) & jnp.isfinite(norm)
  measured[name + FINITE] = finite.astype(jnp.float32)
  state = state.replace(
    params={**state.params, name: optax.apply_updates(own, updates)},
    opt_state={**state.opt_state, name: opt_state},
    extra=extra,
  )
  return state, measured


def _accumulated(
  gradient: Callable[..., Any],
  own: PyTree,
  extra: PyTree,
  batch: Batch,
  key: jax.Array,
  parts: int,
) -> Any:
  """The mean of loss, metrics and gradient over the parts of a batch."""

  def cut(leaf):
    if leaf.shape[0] % parts:
      raise ValueError(
        f"accumulate must divide the batch, got {parts} for {leaf.shape[0]}."
      )
    # Every parts-th row, so that rows stay on the device that holds them.
    rows = leaf.reshape(leaf.shape[0] // parts, parts, *leaf.shape[1:])
    return jnp.swapaxes(rows, 0, 1)

  def add(carry, part):
    extra, total = carry
    index, rows = part
    (value, (extra, metrics)), grads = gradient(
      own, extra, rows, jax.random.fold_in(key, index)
    )
    total = jax.tree.map(
      lambda t, x: t + x / parts, total, (value, metrics, grads)
    )
    return (extra, total), None

  cuts = jax.tree.map(cut, dict(batch))
  first = jax.tree.map(lambda leaf: leaf[0], cuts)
  (value, (_, metrics)), grads = jax.eval_shape(
    gradient, own, extra, first, key
  )
  zeros = jax.tree.map(
    lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (value, metrics, grads)
  )
  (extra, total), _ = lax.scan(add, (extra, zeros), (jnp.arange(parts), cuts))
  value, metrics, grads = total
  return (value, (extra, metrics)), grads
