"""Median of a window: specks go, edges stay.

Notation: k is the window's side (`size`), r = k // 2. A wire is a place that
holds a value; a comparator (i, j) leaves the smaller of two wires' values in
wire i, the larger in wire j.

Layout: rows of interleaved pixels [B, H, W * C]. The neighbour to the right is
then C places on, every access is contiguous, and nothing is transposed.
"""

from collections.abc import Callable, Sequence
import functools
import math
import operator
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from jaxshape import images
from jaxshape.filters import batches, windows
from jaxshape.typing import Array, Image, Num, Size, typed

Wires = list[int]
Comparators = list[tuple[int, int]]

# Up to this size a network is one loop for the compiler; the next one (73
# candidates, 1460 operations) it cuts into pieces that are not vectorised.
_LARGEST_NETWORK = 9

# Columns of a window that one loop adds up; a byte counts them.
_UNROLLED = 32


def _merge(a: Wires, b: Wires) -> tuple[Comparators, Wires]:
  """Batcher's odd-even merge of two sorted lists of any lengths.

  Returns:
    The comparators, and the wires by rank after them.
  """
  if not a or not b:
    return [], a + b
  if len(a) == len(b) == 1:
    return [(a[0], b[0])], a + b
  first, even = _merge(a[::2], b[::2])
  second, odd = _merge(a[1::2], b[1::2])
  pairs = list(zip(odd, even[1:], strict=False))
  done = len(pairs)
  order = [even[0], *(wire for pair in pairs for wire in pair)]
  order += odd[done:] + even[1 + done :]
  return first + second + pairs, order


def _sort(wires: Wires) -> tuple[Comparators, Wires]:
  """Batcher's merge sort."""
  if len(wires) < 2:
    return [], wires
  half = len(wires) // 2
  first, low = _sort(wires[:half])
  second, high = _sort(wires[half:])
  last, order = _merge(low, high)
  return first + second + last, order


def _choose(size: int) -> tuple[Comparators, int]:
  """A network for the median of a window whose columns are sorted.

  Wire `j * size + i` holds rank i of column j. With each rank sorted over the
  columns as well, (i + 1) (j + 1) values are no larger and (k - i) (k - j) no
  smaller than entry j of rank i, itself among them; who has too many of either
  cannot be the median.

  Returns:
    The comparators, and the wire that holds the median after them.
  """
  middle = size * size // 2
  network: Comparators = []
  candidates: list[Wires] = []
  below = 0
  for i in range(size):
    more, order = _sort([j * size + i for j in range(size)])
    network += more
    kept = []
    for j, wire in enumerate(order):
      if (size - i) * (size - j) - 1 > middle:
        below += 1
      elif (i + 1) * (j + 1) - 1 <= middle:
        kept.append(wire)
    candidates.append(kept)
  while len(candidates) > 1:
    a, b, *candidates = sorted(candidates, key=len)
    more, order = _merge(a, b)
    network += more
    candidates.append(order)
  return network, candidates[0][middle - below]


def _apply(
  network: Comparators, values: Sequence[jax.Array], wanted: Wires
) -> list[jax.Array]:
  """Runs the part of a network on which the wanted wires depend."""
  needed = set(wanted)
  steps = []
  for i, j in reversed(network):
    if i in needed or j in needed:
      steps.append((i, j, i in needed, j in needed))
      needed |= {i, j}
  wires = list(values)
  for i, j, smaller, larger in reversed(steps):
    a, b = wires[i], wires[j]
    if smaller:
      wires[i] = lax.min(a, b)
    if larger:
      wires[j] = lax.max(a, b)
  return [wires[i] for i in wanted]


def _by_network(
  wide: jax.Array, size: int, channels: int, *, apart: bool
) -> jax.Array:
  """The median over windows of extended rows [B, h, w].

  Columns are sorted once and shared by all windows in which they stand;
  `apart` keeps them from being sorted anew for each.
  """
  height = wide.shape[1] - size + 1
  length = wide.shape[2] - (size - 1) * channels
  network, order = _sort(list(range(size)))
  rows = [wide[:, i : i + height] for i in range(size)]
  ranks = _apply(network, rows, order)
  if apart:
    ranks = lax.optimization_barrier(ranks)
  network, median = _choose(size)
  window = [
    rank[..., j * channels : j * channels + length]
    for j in range(size)
    for rank in ranks
  ]
  return _apply(network, window, [median])[0]


def _over_columns(
  term: Callable[..., jax.Array],
  arrays: Sequence[jax.Array],
  total: jax.Array,
  size: int,
  shifts: Sequence[int],
) -> jax.Array:
  """Adds to the total terms of `size` rows and a few columns of a window."""
  height, width = total.shape[1:]
  arrays = [a[..., shifts[0] : shifts[-1] + width] for a in arrays]

  def cut(i: Any) -> list[jax.Array]:
    return [lax.dynamic_slice_in_dim(a, i, height, 1) for a in arrays]

  # The rows are cut one step ahead: a cut inside the arithmetic would keep it
  # from being vectorised.
  def add(i: Any, carry: Any) -> tuple[jax.Array, list[jax.Array]]:
    total, rows = carry
    places = [s - shifts[0] for s in shifts]
    terms = [term(*(a[..., s : s + width] for a in rows)) for s in places]
    part = functools.reduce(operator.add, terms)
    return total + part.astype(total.dtype), cut(i + 1)

  return lax.fori_loop(0, size, add, (total, cut(0)))[0]


def _over_window(
  term: Callable[..., jax.Array],
  arrays: Sequence[jax.Array],
  size: int,
  channels: int,
  dtype: Any,
) -> jax.Array:
  """Sums terms of shifted rows [B, h, w] over the places of a window."""
  batch, height, width = arrays[0].shape
  shape = batch, height - size + 1, width - (size - 1) * channels
  total = jnp.zeros(shape, dtype)
  shifts = [j * channels for j in range(size)]
  for start in range(0, size, _UNROLLED):
    some = shifts[start : start + _UNROLLED]
    total = _over_columns(term, arrays, total, size, some)
  return total


def _by_bisection(wide: jax.Array, size: int, channels: int) -> jax.Array:
  """The same, bit by bit: the largest t that at most half the values are below.

  The cost grows with the window's area, the memory does not.
  """
  bits = jnp.iinfo(wide.dtype).bits
  unsigned = jnp.dtype(f"uint{bits}")
  # Negative numbers come before positive ones among unsigned ones, too.
  flip = jnp.asarray(jnp.iinfo(wide.dtype).min, wide.dtype)
  wide = lax.bitcast_convert_type(wide ^ flip, unsigned)

  def refine(n: jax.Array, low: jax.Array) -> jax.Array:
    place = (bits - 1 - n).astype(unsigned)
    t = low | jnp.left_shift(jnp.ones((), unsigned), place)
    is_below = lambda x: (x < t).astype(jnp.uint8)
    below = _over_window(is_below, [wide], size, channels, jnp.int32)
    return jnp.where(below <= size * size // 2, t, low)

  height = wide.shape[1] - size + 1
  length = wide.shape[2] - (size - 1) * channels
  low = jnp.zeros((len(wide), height, length), unsigned)
  low = lax.fori_loop(0, bits, refine, low)
  return lax.bitcast_convert_type(low, flip.dtype) ^ flip


def _in_order(x: jax.Array) -> jax.Array:
  """Floats as integers of the same order, and the way back.

  The minimum of floats has to look for NaN, that of integers is one
  instruction. NaN lies beyond infinity here.
  """
  largest = jnp.iinfo(x.dtype).max
  return x ^ ((x >> (jnp.iinfo(x.dtype).bits - 1)) & largest)


def _extend(x: jax.Array, size: int, border: str) -> jax.Array:
  """Extends [B, H, W, C] by what windows see beyond the border."""
  for axis in (1, 2):
    x = windows.extend(
      x, axis=axis, before=size // 2, after=size // 2, border=border
    )
  return x


def _rows(x: jax.Array) -> jax.Array:
  return x.reshape(*x.shape[:2], -1)


def _spread_nan(
  x: jax.Array, y: jax.Array, size: int, border: str
) -> jax.Array:
  """The result y with NaN wherever a window of x holds one."""

  def rare() -> jax.Array:
    bad = _extend(jnp.isnan(x).astype(jnp.int32), size, border)
    for window in [(1, size, 1, 1), (1, 1, size, 1)]:
      bad = lax.reduce_window(
        bad, np.int32(0), lax.max, window, (1, 1, 1, 1), "VALID"
      )
    return jnp.where(bad > 0, jnp.nan, y)

  # The sum is NaN if a value is: three times as fast as to look at each. That
  # infinities may cancel as well only costs time.
  return lax.cond(jnp.isnan(jnp.sum(x)), rare, lambda: y)


def _forward(
  size: int, border: str, x: jax.Array, *, on_cpu: bool
) -> jax.Array:
  """The median of images [B, H, W, C]."""
  floating = jnp.issubdtype(x.dtype, jnp.floating)
  values = x
  if floating:
    bits = jnp.dtype(f"int{8 * x.dtype.itemsize}")
    values = _in_order(lax.bitcast_convert_type(x, bits))
  wide = _rows(_extend(values, size, border))
  channels = x.shape[-1]
  if size > _LARGEST_NETWORK:
    y = _by_bisection(wide, size, channels)
  elif on_cpu:
    core = lambda wide: _by_network(wide, size, channels, apart=False)
    y = batches.fenced(core, wide)
  else:
    y = _by_network(wide, size, channels, apart=True)
  y = y.reshape(x.shape)
  if not floating:
    return y
  y = lax.bitcast_convert_type(_in_order(y), x.dtype)
  return _spread_nan(x, y, size, border)


def _backward(
  size: int, border: str, x: jax.Array, y: jax.Array, v: jax.Array
) -> jax.Array:
  """The gradient of <v, y> by the image x whose median is y."""
  channels = x.shape[-1]
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  x, y, v = (a.astype(dtype) for a in (x, y, v))
  extend = lambda x: _rows(_extend(x, size, border))
  wide, fold = jax.vjp(extend, x)
  y, v = _rows(y), _rows(v)
  is_median = lambda x: (x == y).astype(jnp.uint8)
  number = _over_window(is_median, [wide], size, channels, jnp.int32)
  share = jnp.where(number > 0, v / jnp.maximum(number, 1), 0)
  # What a pixel gets from all the windows in which it stands.
  beyond = (size - 1) * channels
  around = [(0, 0), (size - 1, size - 1), (beyond, beyond)]
  arrays = [jnp.pad(y, around), jnp.pad(share, around)]
  given = lambda y, share: jnp.where(wide == y, share, 0)
  return fold(_over_window(given, arrays, size, channels, dtype))[0]


def _run(size: int, border: str, x: jax.Array) -> jax.Array:
  form = lambda on_cpu: functools.partial(_forward, size, border, on_cpu=on_cpu)
  return batches.run(form(True), form(False), x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _of_floats(size: int, border: str, x: jax.Array) -> jax.Array:
  return _run(size, border, x)


def _of_floats_fwd(size: int, border: str, x: jax.Array) -> Any:
  y = _of_floats(size, border, x)
  return y, (x, y)


def _of_floats_bwd(size: int, border: str, both: Any, v: jax.Array) -> Any:
  form = functools.partial(_backward, size, border)
  return (batches.run(form, form, *both, v).astype(both[0].dtype),)


_of_floats.defvjp(_of_floats_fwd, _of_floats_bwd)


@functools.partial(jax.jit, static_argnames=("size", "border"))
def _median(image: jax.Array, *, size: int, border: str) -> jax.Array:
  leading = math.prod(image.shape[:-3])
  x = image.reshape(leading, *image.shape[-3:])
  floating = jnp.issubdtype(x.dtype, jnp.floating)
  run: Any = _of_floats if floating else _run
  return run(size, border, x).reshape(image.shape)


@typed
def median(
  image: Image | images.Picture, *, size: Size = 5, border: str = "edge"
) -> Num[Array, "*batch height width channels"]:
  """Takes the median of a window around each pixel, each channel by itself.

  y(p) = the middle one of the size x size values x(p + o), sorted, with
  |o_1|, |o_2| <= size // 2. It is one of them, so unlike other filters this
  one gives the image's own type, integers too.

  Equal to `cv2.medianBlur(image, size)` as it stands, and with the other
  borders to `scipy.ndimage.median_filter(image, size)`. kornia's
  `median_blur` has zeros beyond the border ("constant").

  Sizes up to 9 cost little. Beyond, the time per pixel grows with the window's
  area and the type's number of bits; the memory never does.

  As with `numpy.median`, a window that holds a NaN has the median NaN;
  infinities are ordinary values. The gradient goes, in reverse mode, to the
  pixel that was picked; pixels of one window that all equal its median share
  it equally. A result that is NaN has none.

  Args:
    image: In any unit and of any real type; pictures of PIL are taken as uint8.
    size: The window's side in pixels, odd; 1 leaves the image as it is.
    border: How the image goes on beyond its border: "reflect", "symmetric",
      "edge", "constant" (zeros) or "wrap", as `numpy.pad` has it.

  Returns:
    The filtered image, in the image's type.

  Raises:
    ValueError: An option is outside its range.
    InputError: A picture of PIL has more than eight bits per channel.

  Reference:
    Huang, Yang and Tang, "A Fast Two-Dimensional Median Filtering Algorithm",
    IEEE Trans. ASSP 1979, Section I. Networks: Batcher, "Sorting Networks and
    Their Applications", AFIPS 1968.
  """
  values = images.read(image)
  windows.check_border(border)
  side = windows.odd("size", size)
  if values.size == 0 or side == 1:
    return jnp.asarray(values)
  return _median(values, size=side, border=border)
