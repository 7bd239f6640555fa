"""Runs a filter over a batch of images the way that is fastest where it runs.

On a CPU, images share a loop until they fill a core's cache, so that what is
computed between input and output never leaves it; elsewhere, and where several
devices share a batch, the batch stays in one piece.

Source: measured, see `benchmarks/results/`.
"""

from collections.abc import Callable
import functools
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from jaxshape.typing import typed

# Images share a loop on CPUs until their values number this many: small ones
# because each alone would leave cores idle, not more because what is computed
# on the way should stay in a core's cache.
GROUP = 150_000


def _in_groups(run: Callable[..., Any], *batch: Any) -> Any:
  """Runs a batch in groups that fit a cache, each by itself."""
  size = len(batch[0])
  group = max(1, GROUP // math.prod(batch[0].shape[1:]))
  if size <= group:
    return run(*batch)
  whole = size - size % group
  out = lax.map(
    lambda args: run(*args),
    jax.tree.map(
      lambda a: a[:whole].reshape(-1, group, *a.shape[1:]), tuple(batch)
    ),
  )
  out = jax.tree.map(lambda a: a.reshape(whole, *a.shape[2:]), out)
  if whole == size:
    return out
  rest = run(*jax.tree.map(lambda a: a[whole:], tuple(batch)))
  return jax.tree.map(lambda *parts: jnp.concatenate(parts), out, rest)


def _here(run: Callable[..., Any], *batch: Any) -> Any:
  """On CPUs: in groups, unless devices would have to gather the batch."""
  return run(*batch) if jax.device_count() > 1 else _in_groups(run, *batch)


@typed
def in_groups(run: Callable[..., Any], *batch: Any) -> Any:
  """Runs a filter in groups on a CPU and over the whole batch elsewhere.

  Differentiable as far as the filter is.

  Args:
    run: Takes the batch's leaves and returns leaves with the same first axis,
      for any number of images.
    *batch: Trees of arrays with the images along the first axis; the first
      one's size decides on the groups.

  Returns:
    What it gives for the whole batch.
  """
  return lax.platform_dependent(
    *batch, cpu=functools.partial(_here, run), default=run
  )


@typed
def run(
  on_cpu: Callable[..., Any], elsewhere: Callable[..., Any], *batch: Any
) -> Any:
  """Runs one of two forms of a filter over a batch.

  A loop over groups would make devices that share a batch gather it, so with
  several devices the batch stays in one piece, as it does on accelerators.
  vmap of a batch is a longer batch. Has no derivative of its own: the caller
  gives one (`jax.custom_vjp`).

  Args:
    on_cpu: Takes the batch's leaves and returns leaves with the same first
      axis, for any number of images.
    elsewhere: The same for other devices.
    *batch: Trees of arrays with the images along the first axis; the first
      one's size decides on the groups.

  Returns:
    What the form gives for the whole batch.
  """

  @jax.custom_batching.custom_vmap
  def placed(*batch: Any) -> Any:
    here = functools.partial(_here, on_cpu)
    return lax.platform_dependent(*batch, cpu=here, default=elsewhere)

  @placed.def_vmap
  def _(size: int, batched: Any, *batch: Any) -> Any:
    def merge(a: jax.Array, has_axis: bool) -> jax.Array:
      a = a if has_axis else jnp.broadcast_to(a, (size, *a.shape))
      return a.reshape(size * a.shape[1], *a.shape[2:])

    out = placed(*jax.tree.map(merge, batch, tuple(batched)))
    out = jax.tree.map(
      lambda a: a.reshape(size, len(a) // size, *a.shape[1:]), out
    )
    return out, jax.tree.map(lambda _: True, out)

  return placed(*batch)


@typed
def fenced(core: Callable[[Any], jax.Array], x: Any) -> jax.Array:
  """Keeps the compiler from fusing what follows into a filter on CPUs.

  A transpose back to channels last that is fused into the arithmetic before it
  makes each access jump, and nothing is vectorised any more. Arithmetic inside
  a loop is not fused with what comes after; a trip count that the compiler
  cannot prove to be 1 keeps the loop. No derivative in reverse mode.

  Args:
    core: Computes the result, in the layout that is best for it.
    x: Its argument.

  Returns:
    `core(x)`.
  """
  shape = jax.eval_shape(core, x)
  once = lax.optimization_barrier(jnp.int32(1))
  start = jnp.zeros(shape.shape, shape.dtype)
  return lax.fori_loop(0, once, lambda _i, _y: core(x), start)
