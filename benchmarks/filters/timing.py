"""How calls are timed and results compared, and what the machine can do."""

from collections.abc import Callable, Mapping, Sequence
import math
import time
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from benchmarks.filters import Work

# Short calls are repeated until a round takes this long, in seconds.
LEAST = 0.02
# A call that has taken this long in all, in seconds, stops after `FEWEST`
# rounds: it is then so slow that its ratio needs no more of them.
PATIENCE = 6.0
FEWEST = 3


class Rates(NamedTuple):
  """What the machine reaches, per second."""

  bytes: float
  ops: float
  exps: float
  flops: float


def wait(result: Any) -> Any:
  """Gives a result once it is there."""
  return jax.block_until_ready(result)


def once(call: Callable[[], Any]) -> float:
  """Seconds of one call."""
  began = time.perf_counter()
  wait(call())
  return time.perf_counter() - began


def interleaved(
  calls: Mapping[str, Callable[[], Any]], *, rounds: int, least: float = LEAST
) -> dict[str, list[float]]:
  """Seconds per call, one number per round, in the order A B C A B C.

  Args:
    calls: By name.
    rounds: How often each gets its turn.
    least: A turn repeats a call for about this long.

  Returns:
    By name; fewer numbers where a call ran out of patience.
  """
  repeats, times = {}, {name: [] for name in calls}
  for name, call in calls.items():
    once(call)
    repeats[name] = max(1, math.ceil(least / max(once(call), 1e-7)))
  spent = dict.fromkeys(calls, 0.0)
  for turn in range(rounds):
    for name, call in calls.items():
      if turn >= FEWEST and spent[name] > PATIENCE:
        continue
      # Threads of the library before this one spin until they fall asleep.
      time.sleep(min(0.005, least))
      count = repeats[name]
      began = time.perf_counter()
      for _ in range(count):
        wait(call())
      took = time.perf_counter() - began
      spent[name] += took
      times[name].append(took / count)
  return times


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
  """The median over rounds of our time by theirs."""
  return float(np.median([a / b for a, b in zip(ours, theirs, strict=False)]))


def values(raw: Any) -> np.ndarray:
  """A result as float64 [B, H, W, C], whichever library it is of.

  Lists hold the images of a batch, and tensors of torch are [B, C, H, W].
  """
  if isinstance(raw, list | tuple):
    return np.stack([values(one)[0] for one in raw])
  if hasattr(raw, "detach"):
    raw = np.moveaxis(raw.detach().cpu().numpy(), 1, -1)
  out = np.asarray(raw, np.float64)
  if out.ndim == 2:
    out = out[..., None]
  return out if out.ndim == 4 else out[None]


def difference(
  ours: np.ndarray, theirs: np.ndarray, *, margin: int = 0
) -> float:
  """The largest distance of two results, apart from a border.

  NaN where one of them has it, infinity where nothing can be compared.
  """
  if ours.shape != theirs.shape:
    return math.inf
  height, width = ours.shape[1:3]
  inner = np.s_[:, margin : height - margin, margin : width - margin]
  apart = np.abs(ours[inner] - theirs[inner])
  return float(apart.max()) if apart.size else math.inf


def limit(work: Work, rates: Rates) -> tuple[float, str]:
  """Seconds that no form can undercut, and what takes them.

  The largest of bytes, operations, exponentials and matrix products, each by
  its own rate: a machine that does everything at once still needs that.
  """
  terms = {
    name: amount / rate
    for name, amount, rate in zip(work._fields, work, rates, strict=True)
  }
  name = max(terms, key=lambda k: terms[k])
  return terms[name], name


def measure_rates(*, quick: bool = False) -> Rates:
  """Measures the machine through the compiler that our filters go through."""
  on_cpu = jax.default_backend() == "cpu"
  large, small, side = (
    (2**14, 2**14, 128)
    if quick
    else (2**22, 2**18, 1024)
    if on_cpu
    else (2**26, 2**22, 8192)
  )
  long = jnp.linspace(0.5, 1.5, large, dtype=jnp.float32)
  # Arithmetic is measured within a cache, and often enough for that.
  short = jnp.linspace(0.5, 1.5, small, dtype=jnp.float32).reshape(64, -1)
  square = jnp.linspace(-1, 1, side * side).reshape(side, side)
  loops, chain = 16, 16
  # A CPU would wait for one exponential before it begins the next.
  depth = 1 if on_cpu else chain

  def looped(body: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return jax.jit(lambda x: lax.fori_loop(0, loops, lambda _, x: body(x), x))

  def arithmetic(x: Any) -> Any:
    # Sums and products: minima of floats have to look for NaN besides.
    parts = [x, x + 1, x + 2, x + 3]
    for _ in range(chain):
      parts = [
        a * 0.5 + b for a, b in zip(parts, parts[1:] + parts[:1], strict=True)
      ]
    return sum(parts) * 1e-4

  def exponentials(x: Any) -> Any:
    for _ in range(depth):
      x = jnp.exp(-x)
    return x

  copy = looped(lambda x: x * 0.999)
  ops, exps = looped(arithmetic), looped(exponentials)
  # Products in a loop are off the fast path on CPUs.
  product = jax.jit(lambda a: jnp.matmul(a, a, precision="highest"))
  calls = {
    "bytes": lambda: copy(long),
    "ops": lambda: ops(short),
    "exps": lambda: exps(short),
    "flops": lambda: product(square),
  }
  times = interleaved(calls, rounds=2 if quick else 7)
  best = {name: min(each) for name, each in times.items()}
  return Rates(
    bytes=loops * 2 * 4 * large / best["bytes"],
    ops=loops * (8 * chain + 7) * small / best["ops"],
    exps=loops * depth * small / best["exps"],
    flops=2 * side**3 / best["flops"],
  )


def pictures(count: int, size: int, *, seed: int = 0) -> np.ndarray:
  """Smooth shading, discs with sharp edges and noise: float32 in 0..255."""
  rng = np.random.default_rng(seed)
  y, x = np.mgrid[:size, :size] / size
  out = np.zeros((count, size, size, 3))
  for i in range(count):
    for _ in range(4):
      a, b, phase = rng.uniform(-9, 9, 3)
      wave = np.sin(a * x + b * y + phase)
      out[i] += wave[..., None] * rng.uniform(5, 20, 3)
    for _ in range(8):
      a, b, radius = rng.uniform(0.05, 0.95, 3) * [1, 1, 0.3]
      disc = (x - a) ** 2 + (y - b) ** 2 < radius**2
      out[i] += disc[..., None] * rng.uniform(-80, 80, 3)
  out += 128 + rng.normal(0, 8, out.shape)
  return np.clip(out, 0, 255).astype(np.float32)
