"""What diffusion costs beside the training step that it feeds."""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.filters import timing
from jaxshape.filters import diffusion


class Share(NamedTuple):
  """Seconds for one batch, and the median over rounds of their ratio."""

  network: str
  images: int
  dtype: str
  step: float
  diffusion: float
  share: float
  goal: float


def _trained(network: str, images: np.ndarray, dtype: Any) -> Callable[[], Any]:
  """A call that makes one step of SGD with momentum."""
  import optax  # noqa: PLC0415 (filters alone do without)

  from jaxshape.backbones import resnet  # noqa: PLC0415 (as optax)

  net = resnet.make(network, num_classes=1000, dtype=dtype)
  x = jnp.asarray(images / 128 - 1)
  labels = jnp.arange(len(images)) % 1000
  init = functools.partial(net.init, train=False)
  state: Any = jax.jit(init)(jax.random.key(0), x[:1])
  optimizer = optax.sgd(0.01, momentum=0.9)

  def loss(params: Any, stats: Any) -> Any:
    logits, changed = net.apply(
      {"params": params, "batch_stats": stats},
      x,
      train=True,
      mutable=["batch_stats"],
    )
    each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return each.mean(), changed

  @functools.partial(jax.jit, donate_argnums=0)
  def step(carry: Any) -> Any:
    params, stats, momentum = carry
    grads, changed = jax.grad(loss, has_aux=True)(params, stats)
    updates, momentum = optimizer.update(grads, momentum, params)
    params = optax.apply_updates(params, updates)
    return params, changed["batch_stats"], momentum

  params = state["params"]
  carry = params, state["batch_stats"], optimizer.init(params)

  def call() -> Any:
    nonlocal carry
    carry = step(carry)
    return carry

  return call


def measure(
  *, rounds: int, size: int = 224, network: str = "resnet50"
) -> Share:
  """Times both, in turns.

  Args:
    rounds: How often each gets its turn.
    size: Pixels of an image's side.
    network: A name of `jaxshape.backbones.resnet`.

  Returns:
    The share, of eight float32 images on a CPU and of 64 in bfloat16 (the
    network alone) elsewhere.
  """
  on_cpu = jax.default_backend() == "cpu"
  count, dtype = (8, jnp.float32) if on_cpu else (64, jnp.bfloat16)
  images = timing.pictures(count, size)
  x = jnp.asarray(images)
  filtered = jax.jit(lambda x: diffusion.perona_malik(x, iterations=20))
  times = timing.interleaved(
    {"step": _trained(network, images, dtype), "filter": lambda: filtered(x)},
    rounds=rounds,
  )
  return Share(
    network=network,
    images=count,
    dtype=jnp.dtype(dtype).name,
    step=min(times["step"]),
    diffusion=min(times["filter"]),
    share=timing.ratio(times["filter"], times["step"]),
    goal=0.02 if on_cpu else 0.03,
  )
