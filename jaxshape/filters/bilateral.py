"""Bilateral filters: pixels are averaged with neighbours of similar colour.

Notation: x is the image, g the guide (the image itself, unless another one is
given), p a pixel, o an offset within the window, s the distance of colours
between p and p + o, W the weight of that pair.

Layout: planes [C, B, H, W]. A weight serves all channels, so it is computed
for pixels and not for values.

The gradient follows from y = n / m, n = sum of W x(p + o), m = sum of W: for
the cotangent v, with a = v / m and b = <a, y>, the weight of a pair p, q has
the derivative <a(p), x(q)> - b(p), and that of the pair q, p besides, as both
are one number. Weights are computed anew, so none is stored.
"""

from collections.abc import Callable, Sequence
import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from jaxshape import images
from jaxshape.filters import batches, windows
from jaxshape.typing import Array, ArrayLike, Float, Image, Num, Size, typed

# Windows of up to this many pixels are written out; beyond, compiling would
# take longer than filtering.
_UNROLLED = 81

# Offsets that a loop over larger ones takes at a time.
_BLOCK = 8

# Up to this many channels are summed one by one, which is what can be fused.
_FEW = 4

# Pixels that share a loop on CPUs: their weights should stay in a cache.
_STRIP = 50_000


class _Form(NamedTuple):
  """What a filter is compiled for."""

  radius: int
  disc: bool
  l1: bool
  border: str
  guides: int  # The guide's channels, which come first,
  channels: int  # and the image's, which come last and may be the same.

  def window(self) -> np.ndarray:
    """Whether an offset is in the window; its middle is not."""
    r = self.radius
    y, x = np.mgrid[-r : r + 1, -r : r + 1]
    square = y * y + x * x
    return (square > 0) & (square <= r * r if self.disc else True)

  def offsets(self) -> list[tuple[int, int]]:
    """The window's offsets in the order of reading, but for its middle."""
    return [
      (int(y), int(x)) for y, x in np.argwhere(self.window()) - self.radius
    ]

  @property
  def unrolled(self) -> bool:
    """Whether the window is small enough to be written out."""
    return int(self.window().sum()) < _UNROLLED


class _Scales(NamedTuple):
  """The sigmas of each image, as [B, 1, 1]."""

  color: jax.Array
  space: jax.Array


def _scales(sigmas: tuple[jax.Array, jax.Array]) -> _Scales:
  return _Scales(*(a[:, None, None] for a in sigmas))


def _cut(
  a: jax.Array, top: int, left: int, height: int, width: int
) -> jax.Array:
  """A rectangle of planes; `lax.slice` because it is traced fast."""
  before = a.shape[:-2]
  start = (*(0,) * len(before), top, left)
  return lax.slice(a, start, (*before, top + height, left + width))


def _lumps(planes: jax.Array) -> list[jax.Array]:
  """Few planes one by one, many as one array."""
  return list(planes) if len(planes) <= _FEW else [planes]


def _joined(lumps: Sequence[jax.Array]) -> jax.Array:
  return jnp.stack(lumps) if lumps[0].ndim == 3 else lumps[0]


def _total(lumps: Sequence[jax.Array]) -> jax.Array:
  """The sum over all planes."""
  return functools.reduce(
    lax.add, [a if a.ndim == 3 else a.sum(0) for a in lumps]
  )


def _weight(
  form: _Form,
  here: Sequence[jax.Array],
  there: Sequence[jax.Array],
  square: Any,
  scales: _Scales,
) -> tuple[jax.Array, jax.Array]:
  """W of pairs of guides |o|^2 = square apart, and (s / sigma_color)^2 / 2."""
  scale = math.sqrt(0.5) / scales.color
  d = [b - a for a, b in zip(here, there, strict=True)]
  if form.l1:
    s = _total([lax.abs(a) for a in d]) * scale
    t = s * s
  else:
    d = [a * scale for a in d]
    t = _total([a * a for a in d])
  far = square * (0.5 / (scales.space * scales.space))
  return lax.exp(-(t + far)), t


def _both_ways(form: _Form, planes: jax.Array, scales: _Scales) -> jax.Array:
  """Gives n and m of extended planes, each pair's weight computed once.

  The fastest on CPUs, where XLA stores each W.
  """
  r = form.radius
  height, width = (n - 2 * r for n in planes.shape[-2:])
  at = lambda a, y, x: _cut(a, y, x, height, width)
  guide, x = _lumps(planes[: form.guides]), planes[-form.channels :]
  n = at(x, r, r)
  m = jnp.ones(n.shape[1:], n.dtype)
  for dy, dx in form.offsets():
    if (dy, dx) < (0, 0):
      continue
    # Of all pairs that have an end in the image.
    tall, wide = height + dy, width + abs(dx)
    top, left = r - dy, r - max(dx, 0)
    here = [_cut(a, top, left, tall, wide) for a in guide]
    there = [_cut(a, top + dy, left + dx, tall, wide) for a in guide]
    w, _ = _weight(form, here, there, float(dy * dy + dx * dx), scales)
    ahead = at(w, dy, max(dx, 0))
    behind = at(w, 0, max(-dx, 0))
    n += ahead * at(x, r + dy, r + dx) + behind * at(x, r - dy, r - dx)
    m += ahead + behind
  return jnp.concatenate([n, m[None]])


# Given what stands at p + o, and |o|^2: what it adds to each of some sums.
Tap = Callable[[list[jax.Array], Any], list[jax.Array]]


def _written_out(
  form: _Form, tap: Tap, fields: list[jax.Array], sums: list[jax.Array]
) -> list[jax.Array]:
  """Adds what each offset of the window gives for fields extended by it."""
  r = form.radius
  height, width = sums[0].shape[-2:]
  for dy, dx in form.offsets():
    there = [_cut(a, r + dy, r + dx, height, width) for a in fields]
    new = tap(there, float(dy * dy + dx * dx))
    sums = [a + b for a, b in zip(sums, new, strict=True)]
  return sums


def _blocks(form: _Form) -> tuple[np.ndarray, np.ndarray]:
  """Rows of offsets that cover the window: corners [n, 2], which count [n, k].

  All are of one length, so that a loop can run over them.
  """
  rest = form.window()
  length = min(_BLOCK, len(rest))
  corners, counts = [], []
  for y, row in enumerate(rest):
    while row.any():
      x = min(int(row.argmax()), len(row) - length)
      corners.append((y, x))
      counts.append(row[x : x + length].copy())
      row[x : x + length] = False
  return np.array(corners, np.int32), np.array(counts)


def _in_blocks(
  form: _Form, tap: Tap, fields: list[jax.Array], sums: list[jax.Array]
) -> list[jax.Array]:
  """The same as a loop over blocks of offsets, which compiles fast.

  What a block needs is fetched a step ahead: arithmetic that reads at a place
  not known when it is compiled is not vectorised on CPUs.
  """
  corners, counts = _blocks(form)
  if not len(corners):
    return sums
  length = counts.shape[1]
  y, x = (corners - form.radius).T
  squares = y[:, None] ** 2 + (x[:, None] + np.arange(length)) ** 2
  starts, counts = jnp.asarray(corners), jnp.asarray(counts)
  squares = jnp.asarray(squares, jnp.float32)
  height, width = sums[0].shape[-2:]

  def fetch(i: ArrayLike) -> list[jax.Array]:
    size = height, width + length - 1
    return [
      lax.dynamic_slice(
        a,
        # Of one type, also where JAX counts in 64 bits.
        (*(np.int32(0),) * (a.ndim - 2), *starts[i]),
        (*a.shape[:-2], *size),
      )
      for a in fields
    ]

  def step(i: jax.Array, carry: Any) -> Any:
    block, sums = carry
    for j in range(length):
      new = tap([_cut(a, 0, j, height, width) for a in block], squares[i, j])
      # Not a weight of 0, for 0 * NaN is NaN.
      new = [jnp.where(counts[i, j], a, 0) for a in new]
      sums = [a + b for a, b in zip(sums, new, strict=True)]
    return fetch(i + 1), sums  # The last is not used.

  return lax.fori_loop(0, len(corners), step, (fetch(0), sums))[1]


def _one_way(
  form: _Form, planes: jax.Array, scales: _Scales, over: Any
) -> jax.Array:
  """Gives n and m of extended planes by sums alone."""
  r = form.radius
  height, width = (n - 2 * r for n in planes.shape[-2:])
  joint = form.guides != len(planes)
  guide, x = _lumps(planes[: form.guides]), _lumps(planes[-form.channels :])
  at = len(guide)
  here = [_cut(a, r, r, height, width) for a in guide]
  start = [_cut(a, r, r, height, width) for a in x]

  def tap(there: list[jax.Array], square: Any) -> list[jax.Array]:
    w, _ = _weight(form, here, there[:at], square, scales)
    return [*(w * a for a in (there[at:] or there)), w]

  fields = [*guide, *x] if joint else guide
  one = jnp.ones(start[0].shape[-3:], planes.dtype)
  *n, m = over(form, tap, fields, [*start, one])
  return jnp.concatenate([_joined(n), m[None]])


def _extend(form: _Form, a: jax.Array, axes: Sequence[int]) -> jax.Array:
  r = form.radius
  for axis in axes:
    a = windows.extend(a, axis=axis, before=r, after=r, border=form.border)
  return a


def _averages(sums: jax.Array, *, keep: bool) -> jax.Array:
  """Gives y = n / m, and m too if the gradient wants it."""
  y = sums[:-1] / sums[-1]
  return jnp.concatenate([y, sums[-1:]]) if keep else y


def _on_cpu(
  form: _Form,
  keep: bool,
  x: jax.Array,
  sigmas: tuple[jax.Array, jax.Array],
) -> jax.Array:
  """Filters images [B, H, W, K] in strips of rows."""
  scales, r = _scales(sigmas), form.radius
  batch, height, width, _ = x.shape
  count = max(1, min(batch * height * width // _STRIP, height // (2 * r + 1)))
  rows = -(-height // count)
  core = (
    _both_ways
    if form.unrolled
    else functools.partial(_one_way, over=_in_blocks)
  )

  def strip(x: jax.Array) -> jax.Array:
    planes = _extend(form, jnp.moveaxis(x, -1, 0), [-1])
    run = lambda p: _averages(core(form, p, scales), keep=keep)
    return jnp.moveaxis(batches.fenced(run, planes), 0, -1)

  tall = _extend(form, x, [1])
  if count == 1:
    return strip(tall)
  tall = jnp.pad(tall, [(0, 0), (0, count * rows - height), (0, 0), (0, 0)])
  cut = lambda i: lax.dynamic_slice_in_dim(tall, i * rows, rows + 2 * r, 1)
  # Back to channels last in the loop: else it would itself be laid out so.
  out = lax.map(lambda i: strip(cut(i)), jnp.arange(count))
  out = jnp.moveaxis(out, 0, 1).reshape(batch, count * rows, width, -1)
  return out[:, :height]


def _elsewhere(
  form: _Form,
  keep: bool,
  x: jax.Array,
  sigmas: tuple[jax.Array, jax.Array],
) -> jax.Array:
  """Filters images [B, H, W, K] at once.

  Without the barrier on the sums, a compiler for the H100 wrote the weights of
  all offsets to memory; with it, one kernel gives all sums.
  """
  add = _written_out if form.unrolled else _in_blocks

  def over(*args: Any) -> list[jax.Array]:
    return list(lax.optimization_barrier(tuple(add(*args))))

  # The border is looked up once, and not for each offset.
  planes = lax.optimization_barrier(
    _extend(form, jnp.moveaxis(x, -1, 0), [-2, -1])
  )
  sums = _one_way(form, planes, _scales(sigmas), over)
  return jnp.moveaxis(_averages(sums, keep=keep), 0, -1)


def _gradient(
  form: _Form,
  x: jax.Array,
  out: jax.Array,
  v: jax.Array,
  sigmas: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  """The gradients of <v, y> by the images [B, H, W, K] and the sigmas.

  On the extended image, where every pair is met from both of its ends; a and
  b are 0 outside the image.
  """
  scales, r = _scales(sigmas), form.radius
  planes, fold = jax.vjp(
    lambda p: _extend(form, p, [-2, -1]), jnp.moveaxis(x, -1, 0)
  )
  height, width = planes.shape[-2:]
  y, m = out[..., :-1], out[..., -1:]
  b = jnp.sum(v / m * y, -1, keepdims=True)
  by_sums = jnp.moveaxis(jnp.concatenate([v / m, b], -1), -1, 0)
  around = lambda p, k: jnp.pad(p, [(0, 0), (0, 0), (k, k), (k, k)])
  planes, by_sums = around(planes, r), around(by_sums, 2 * r)
  parts = [
    _lumps(planes[: form.guides]),
    _lumps(planes[-form.channels :]),
    _lumps(by_sums[:-1]),
    [by_sums[-1]],
  ]
  ends = np.cumsum([len(part) for part in parts])[:-1]
  fields = [a for part in parts for a in part]
  split = lambda a: [a[i:j] for i, j in itertools.pairwise([0, *ends, len(a)])]
  here = split([_cut(a, r, r, height, width) for a in fields])

  def tap(there: list[jax.Array], square: Any) -> list[jax.Array]:
    (g0, x0, a0, (b0,)), (g1, x1, a1, (b1,)) = here, split(there)
    w, t = _weight(form, g0, g1, square, scales)
    products = zip(x0, a0, x1, a1, strict=True)
    by_w = _total([p * d + q * c for p, c, q, d in products]) - b0 - b1
    by_w = w * by_w
    if form.l1:
      slope = by_w * lax.sqrt(2 * t) / scales.color
      by_guide = [slope * jnp.sign(q - p) for p, q in zip(g0, g1, strict=True)]
    else:
      slope = by_w / (scales.color * scales.color)
      by_guide = [slope * (q - p) for p, q in zip(g0, g1, strict=True)]
    return [*by_guide, *(w * a for a in a1), by_w * t, by_w * square]

  zero = [jnp.zeros_like(a) for a in here[0]]
  none = jnp.zeros_like(here[3][0])
  *sums, color, space = _in_blocks(
    form, tap, fields, [*zero, *here[2], none, none]
  )
  by_guide, by_image = sums[: len(zero)], sums[len(zero) :]
  if form.guides == x.shape[-1]:
    total = _joined([p + q for p, q in zip(by_guide, by_image, strict=True)])
  else:
    total = jnp.concatenate([_joined(by_guide), _joined(by_image)])
  # Each pair was met twice.
  by_color = color.sum((1, 2)) / sigmas[0]
  by_space = 0.5 * space.sum((1, 2)) / sigmas[1] ** 3
  return jnp.moveaxis(fold(total)[0], 0, -1), (by_color, by_space)


def _run(form: _Form, keep: bool, x: jax.Array, sigmas: Any) -> jax.Array:
  return batches.run(
    functools.partial(_on_cpu, form, keep),
    functools.partial(_elsewhere, form, keep),
    x,
    sigmas,
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _filter(form: _Form, x: jax.Array, sigmas: Any) -> jax.Array:
  return _run(form, False, x, sigmas)


def _filter_fwd(form: _Form, x: jax.Array, sigmas: Any) -> Any:
  out = _run(form, True, x, sigmas)
  return out[..., :-1], (x, out, sigmas)


def _filter_bwd(form: _Form, saved: Any, v: jax.Array) -> Any:
  x, out, sigmas = saved
  gradient = functools.partial(_gradient, form)
  return batches.run(gradient, gradient, x, out, v, sigmas)


_filter.defvjp(_filter_fwd, _filter_bwd)


@functools.partial(jax.jit, static_argnames=("form",))
def _average(
  image: Any, guide: Any, sigma_color: Any, sigma_space: Any, *, form: _Form
) -> jax.Array:
  *leading, height, width, _ = image.shape
  size = math.prod(leading)
  parts = [image] if guide is None else [guide, image]
  parts = [
    images.as_float32(a).reshape(size, height, width, a.shape[-1])
    for a in parts
  ]
  # Smaller ones do the same, but their powers have no inverse.
  sigmas = tuple(
    jnp.broadcast_to(
      jnp.maximum(jnp.asarray(a, jnp.float32), 1e-12), leading
    ).reshape(size)
    for a in (sigma_color, sigma_space)
  )
  x = parts[0] if guide is None else jnp.concatenate(parts, -1)
  out: Any = _filter(form, x, sigmas)
  return out.reshape(image.shape).astype(images.result_type(image))


def _checked(
  image: Any,
  guide: Any,
  *,
  diameter: Any,
  sigma_color: Any,
  sigma_space: Any,
  window: str,
  distance: str,
  border: str,
) -> jax.Array:
  """What both filters do once pictures are read."""
  if diameter <= 0:
    raise ValueError(
      f"diameter must be odd and at least 1, got {diameter}; what OpenCV takes "
      "for 0 is 2 * round(1.5 * sigma_space) + 1."
    )
  diameter = windows.odd("diameter", diameter)
  known = images.concrete(sigma_color)
  if known is not None and not (known > 0).all():
    raise ValueError(f"sigma_color must be above 0, got {sigma_color}.")
  known = images.concrete(sigma_space)
  if known is not None and not (known > 0).all():
    raise ValueError(f"sigma_space must be above 0, got {sigma_space}.")
  if window not in ("disc", "square"):
    raise ValueError(f'window must be "disc" or "square", got {window!r}.')
  if distance not in ("l1", "l2"):
    raise ValueError(f'distance must be "l1" or "l2", got {distance!r}.')
  windows.check_border(border)
  if image.size == 0:
    return jnp.asarray(image, images.result_type(image))
  channels = image.shape[-1]
  form = _Form(
    radius=diameter // 2,
    disc=window == "disc",
    l1=distance == "l1",
    border=border,
    guides=channels if guide is None else guide.shape[-1],
    channels=channels,
  )
  return _average(image, guide, sigma_color, sigma_space, form=form)


@typed
def bilateral(
  image: Image | images.Picture,
  *,
  diameter: Size = 9,
  sigma_color: Num[ArrayLike, "*#batch"] = 75.0,
  sigma_space: Num[ArrayLike, "*#batch"] = 75.0,
  window: str = "disc",
  distance: str = "l1",
  border: str = "reflect",
) -> Float[Array, "*batch height width channels"]:
  """Averages each pixel with those around it that have a similar colour.

  y(p) = sum of W x(p + o) / sum of W over the offsets o of a window, with
  W = exp(-s^2 / 2 sigma_color^2) exp(-|o|^2 / 2 sigma_space^2), where s is the
  distance of the colours x(p) and x(p + o): all channels have one weight.

  Equal to `cv2.bilateralFilter` with the same numbers, from diameter 3 on (its
  float32 result; uint8 there is the same, rounded) and, with window "square",
  to `kornia.filters.bilateral_blur`. scikit-image's filter is another one: it
  divides the distance by the number of channels.

  Computed in float32, whatever the type. What is NaN or infinite spoils the
  windows that it is in and nothing else. Sigmas may differ between images
  (arrays that broadcast to the leading axes) and may be traced: no value
  compiles anew. Traced values are not checked. Gradients flow to the image and
  both sigmas in reverse mode; weights are computed anew for them, not stored.

  | jaxshape      | OpenCV       | kornia                | scikit-image    |
  |---------------|--------------|-----------------------|-----------------|
  | `diameter`    | `d`          | `kernel_size`         | `win_size`      |
  | `sigma_color` | `sigmaColor` | `sigma_color`         | `sigma_color`   |
  | `sigma_space` | `sigmaSpace` | `sigma_space`         | `sigma_spatial` |
  | `window`      | disc         | square                | square          |
  | `distance`    | l1           | `color_distance_type` | l2              |

  Args:
    image: In any unit; uint8 arrays and pictures of PIL are taken as 0..255.
    diameter: The window's side in pixels, odd; the cost grows with its square.
    sigma_color: Colours further apart than this hardly mix; above 0, in the
      image's units; 75 suits 0..255.
    sigma_space: In pixels, above 0; large ones leave the window alone to decide
      which pixels are near.
    window: "disc" (|o| up to half the diameter) or "square".
    distance: "l1", the sum of the channels' differences, or "l2", the root of
      the sum of their squares; with one channel they are the same.
    border: How the image goes on beyond its border: "reflect", "symmetric",
      "edge", "constant" (zeros) or "wrap", as `numpy.pad` has it.

  Returns:
    The smoothed image, in the image's type if that is a float type and
    float32 otherwise.

  Raises:
    ValueError: An option is outside its range.
    InputError: A picture of PIL has more than eight bits per channel.

  Reference:
    Tomasi and Manduchi, "Bilateral Filtering for Gray and Color Images", ICCV
    1998, Section 2.
  """
  values = images.read(image)
  images.warn_of_units(values, "sigma_color", images.concrete(sigma_color))
  return _checked(
    values,
    None,
    diameter=diameter,
    sigma_color=sigma_color,
    sigma_space=sigma_space,
    window=window,
    distance=distance,
    border=border,
  )


@typed
def joint(
  image: Image | images.Picture,
  guide: Num[ArrayLike, "*#batch height width guides"] | images.Picture,
  *,
  diameter: Size = 9,
  sigma_color: Num[ArrayLike, "*#batch"] = 75.0,
  sigma_space: Num[ArrayLike, "*#batch"] = 75.0,
  window: str = "disc",
  distance: str = "l1",
  border: str = "reflect",
) -> Float[Array, "*batch height width channels"]:
  """Averages each pixel with those around it that look alike in a guide.

  The sum is that of `bilateral`, with s the distance of the guide's colours
  g(p) and g(p + o): edges of the guide are kept, those that only the image has
  go. Also called the cross bilateral filter; equal to
  `cv2.ximgproc.jointBilateralFilter` and, with window "square", to
  `kornia.filters.joint_bilateral_blur`. All that is said of `bilateral` holds
  here; gradients flow to the guide as well. A pixel where the guide is
  infinite is like no other and stays as it is.

  Args:
    image: In any unit; it may have other channels than the guide.
    guide: Of the same height and width, one for each image or for several
      (leading axes broadcast).
    diameter: As in `bilateral`.
    sigma_color: In the guide's units, else as in `bilateral`.
    sigma_space: As in `bilateral`.
    window: As in `bilateral`.
    distance: As in `bilateral`.
    border: As in `bilateral`, for both.

  Returns:
    The smoothed image, in the image's type if that is a float type and
    float32 otherwise.

  Raises:
    ValueError: An option is outside its range, or the guide's size is not the
      image's.
    InputError: A picture of PIL has more than eight bits per channel.

  Reference:
    Petschnigg et al., "Digital Photography with Flash and No-Flash Image
    Pairs", ACM Trans. Graphics 2004, Eq. 3.
  """
  values, others = images.read(image), images.read(guide, name="guide")
  if values.shape[-3:-1] != others.shape[-3:-1]:
    raise ValueError(
      f"guide must be of the image's size {values.shape[-3:-1]}, got "
      f"{others.shape[-3:-1]}."
    )
  if others.shape[-1] == 0:
    raise ValueError(f"guide must have channels, got {others.shape}.")
  if others.shape[:-1] != values.shape[:-1]:
    shape = (*values.shape[:-1], others.shape[-1])
    others = jnp.broadcast_to(others, shape)
  images.warn_of_units(others, "sigma_color", images.concrete(sigma_color))
  return _checked(
    values,
    others,
    diameter=diameter,
    sigma_color=sigma_color,
    sigma_space=sigma_space,
    window=window,
    distance=distance,
    border=border,
  )
