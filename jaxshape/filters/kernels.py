"""Perona-Malik diffusion as one kernel for GPUs of NVIDIA, Hopper or later.

A plane lies in a multiprocessor's fast memory for all of its iterations: it is
read once, written once, and takes as many iterations as its image wants.

Notation: u is the plane, d a difference of neighbouring pixels, kappa the
difference that counts as an edge, c the conduction of (d / kappa)^2, gamma the
length of a step in time.

Layout: a plane's rows one after another, each a multiple of `_LANES` long. They
are shared out in strips, one for each group of threads. A group goes down its
strip row by row, in place: the row below is not yet changed, and of the row
above only the flux that came from it is needed. What lies beyond the strip's
ends belongs to other groups and is read before any of them begins.

Source: compiled for an H100 and simulated on a CPU, but never yet run on a GPU,
so nothing uses it unless `USED` is set.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from jaxshape.typing import Array, Float, Int, typed

# To be set before the first image is filtered.
USED = False

Conduction = Callable[[jax.Array], jax.Array]
Row = list[jax.Array]

# Threads of a group, that is pixels of a row that are computed at once.
_LANES = 128

# Groups of a block; with more, a thread would have too few registers.
_GROUPS = 8

# Fast memory of a block, less what its barriers take.
_BYTES = 227 * 1024 - 512

# Numbers between strips, so that a row's neighbour to the left or right, which
# is read even where there is none, never belongs to another group. An even
# number keeps pairs aligned.
_GAP = 2

# Pixels of a row; a thread has too few registers for more.
_LONGEST = 512

# Pixels that a group has under way between slow and fast memory.
_COPIED = 2048


def _padded(height: int, width: int) -> tuple[int, int]:
  """The size of a plane in fast memory."""
  return -(-height // _GROUPS) * _GROUPS, -(-width // _LANES) * _LANES


def _memory(height: int, width: int) -> int:
  """How many numbers a block keeps in fast memory."""
  rows, row = _padded(height, width)
  return rows * row + (_GROUPS + 1) * _GAP


def _fits(height: int, width: int) -> bool:
  is_narrow = width <= _LONGEST
  return is_narrow and 4 * _memory(height, width) <= _BYTES


@typed
def applies(shape: tuple[int, ...]) -> bool:
  """Whether the kernel is worth its while for planes [..., H, W].

  Args:
    shape: The planes'.

  Returns:
    Whether they fit, and are at least half of what is computed.
  """
  height, width = shape[-2:]
  rows, row = _padded(height, width)
  return _fits(height, width) and rows * row <= 2 * height * width


class _Group(NamedTuple):
  """A group of threads, which renews a strip of its block's plane."""

  conduction: Conduction
  size: tuple[int, int]
  index: Any  # Which of its block's groups it is.
  u: Any  # The block's plane in fast memory.
  slope: Any  # 1 / kappa.
  gamma: Any
  not_first: Any  # Of the first piece's columns, and
  not_last: Any  # of the last one's.

  @property
  def strip(self) -> int:
    """The number of its rows."""
    return _padded(*self.size)[0] // _GROUPS

  @property
  def row(self) -> int:
    """The length of a row in fast memory."""
    return _padded(*self.size)[1]

  @property
  def top(self) -> Any:
    """Its first row."""
    return self.index * self.strip

  def place(self, y: Any, beyond: Any = 0) -> Any:
    """Where row y begins, in the strip that is so many after this one."""
    return y * self.row + (self.index + beyond + 1) * _GAP

  def below(self, y: Any) -> Any:
    """The row after y, or y itself: no flux comes from there."""
    return jnp.where(y >= self.size[0] - 1, y, y + 1)

  def pieces(self, start: Any) -> list[Any]:
    """A row's parts, as indices.

    So short ones are read and written number by number: no place is misaligned.
    """
    return [_from(start + j, _LANES) for j in range(0, self.row, _LANES)]

  def read(self, start: Any) -> list[jax.Array]:
    """A row from a place on."""
    return [self.u[i] for i in self.pieces(start)]

  def flux(self, d: jax.Array) -> jax.Array:
    """What flows along a difference."""
    r = d * self.slope
    return d * self.conduction(r * r)

  def fluxes(self, here: Row, there: Row) -> list[jax.Array]:
    """What flows from one row into another."""
    return [self.flux(b - a) for a, b in zip(here, there, strict=True)]

  def renew(self, y: Any, here: Row, below: Row, up: Row) -> list[jax.Array]:
    """Changes row y, given what it passes up; gives what it gets from below."""
    down = self.fluxes(here, below)
    d = [
      [b - a for a, b in zip(here, self.read(self.place(y) + by), strict=True)]
      for by in (-1, 1)
    ]
    d[0][0] = jnp.where(self.not_first, d[0][0], 0.0)
    d[1][-1] = jnp.where(self.not_last, d[1][-1], 0.0)
    new = [
      a + self.gamma * ((below - above) + (self.flux(left) + self.flux(right)))
      for a, below, above, left, right in zip(here, down, up, *d, strict=True)
    ]
    for i, a in zip(self.pieces(self.place(y)), new, strict=True):
      self.u[i] = a
    return down

  def step(self, together: Callable[[], None]) -> None:
    """An iteration, with all groups of the block."""
    bottom = self.top + self.strip - 1
    above, below = jnp.maximum(self.top - 1, 0), self.below(bottom)
    here = self.read(self.place(self.top))
    over = self.read(self.place(above, jnp.where(self.index > 0, -1, 0)))
    under = self.read(self.place(below, below - bottom))
    together()

    def body(i: Any, carry: Any) -> Any:
      here, up = carry
      y = self.top + i
      below = self.read(self.place(self.below(y)))
      return below, self.renew(y, here, below, up)

    start = here, self.fluxes(over, here)
    here, up = lax.fori_loop(0, self.strip - 1, body, start)
    self.renew(bottom, here, under, up)
    together()


def _from(start: Any, size: int) -> Any:
  from jax.experimental import pallas as pl  # noqa: PLC0415

  return pl.ds(start, size)


def _repeat(count: Any, bound: int | None, step: Callable[[], None]) -> None:
  """Takes a step `count` times; the simulation needs a bound for it."""
  if bound is None:
    lax.fori_loop(0, count, lambda _i, _: step(), None)
    return

  def body(i: Any, _: None) -> None:
    lax.cond(i < count, step, lambda: None)

  lax.fori_loop(0, bound, body, None)


def _kernel(
  conduction: Conduction,
  size: tuple[int, int],
  bound: int | None,
  *refs: Any,
) -> None:
  """What each group of threads does; a plane is a block's, a strip a group's.

  The references are, of all planes in slow memory, the numbers of iterations,
  1 / kappa, gamma, of which columns there is one to the left and to the right,
  the planes before and after; and of this block in fast memory, its plane and
  a barrier.
  """
  from jax.experimental.pallas import mosaic_gpu as plgpu  # noqa: PLC0415

  counts, slopes, gammas, inner, before, after, u, barrier = refs
  plane = lax.axis_index("plane")
  group = _Group(
    conduction,
    size,
    lax.axis_index("group"),
    u,
    slopes[plane],
    gammas[plane],
    inner[_from(0, _LANES)] > 0,
    inner[_from(_LANES, _LANES)] > 0,
  )
  lines = max(
    n
    for n in range(1, group.strip + 1)
    if group.strip % n == 0 and n * group.row <= _COPIED
  )
  length = lines * group.row

  def together() -> None:
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)

  def fetch(i: Any, _: None) -> None:
    y = group.top + i * lines
    u[_from(group.place(y), length)] = before[
      plane, _from(y * group.row, length)
    ]

  def give(i: Any, _: None) -> None:
    y = group.top + i * lines
    after[plane, _from(y * group.row, length)] = u[
      _from(group.place(y), length)
    ]

  lax.fori_loop(0, group.strip // lines, fetch, None)
  together()
  _repeat(counts[plane], bound, lambda: group.step(together))
  lax.fori_loop(0, group.strip // lines, give, None)


@typed
def diffuse_planes(
  planes: Float[Array, "n height width"],
  steps: Int[Array, " n"],
  slope: Float[Array, " n"],
  gamma: Float[Array, " n"],
  *,
  conduction: Conduction,
  interpret: Any = None,
  bound: int = 0,
) -> Float[Array, "n height width"]:
  """Perona-Malik diffusion of planes, each by itself.

  u <- u + gamma * sum of c((d * slope)^2) * d over the differences d to the
  four neighbours, where no flux crosses the border; in float32.

  Has no derivative of its own, and is not divided among devices.

  Args:
    planes: Any that fit, in float32.
    steps: Iterations of each plane.
    slope: 1 / kappa, for each plane.
    gamma: The length of a step in time, for each plane.
    conduction: c as a function of the square, elementwise.
    interpret: Parameters of Pallas with which it simulates a GPU, for tests.
    bound: The most iterations that a simulation takes; not used otherwise.

  Returns:
    The planes after their iterations.

  Raises:
    ValueError: The planes do not fit into fast memory.

  Reference:
    Perona and Malik, "Scale-Space and Edge Detection Using Anisotropic
    Diffusion", PAMI 1990, Eq. 7-10.
  """
  # Not every installation has Mosaic, and it takes a while to import.
  from jax.experimental.pallas import mosaic_gpu as plgpu  # noqa: PLC0415

  number, height, width = planes.shape
  rows, row = _padded(height, width)
  if not _fits(height, width):
    raise ValueError(
      f"planes must be at most {_LONGEST} wide and fit into {_BYTES} bytes, "
      f"got {height} x {width}."
    )
  if planes.size == 0:
    return planes
  first, last = jnp.arange(_LANES), jnp.arange(row - _LANES, row)
  inner = jnp.concatenate([first > 0, last < width - 1])
  wide = jnp.pad(planes, [(0, 0), (0, rows - height), (0, row - width)])
  out = plgpu.kernel(
    functools.partial(
      _kernel, conduction, (height, width), bound if interpret else None
    ),
    jax.ShapeDtypeStruct((number, rows * row), jnp.float32),
    scratch_shapes=(
      plgpu.SMEM((_memory(height, width),), jnp.float32),
      plgpu.Barrier(num_arrivals=_GROUPS),
    ),
    compiler_params=plgpu.CompilerParams(
      approx_math=True, reduction_scratch_bytes=0
    ),
    grid=(number,),
    grid_names=("plane",),
    num_threads=_GROUPS,
    thread_name="group",
    kernel_name="diffuse_planes",
    interpret=interpret,
  )(
    steps.astype(jnp.int32),
    slope.astype(jnp.float32),
    gamma.astype(jnp.float32),
    inner.astype(jnp.float32),
    wide.astype(jnp.float32).reshape(number, rows * row),
  )
  return out.reshape(number, rows, row)[:, :height, :width]
