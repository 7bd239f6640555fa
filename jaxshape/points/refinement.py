"""Labels of points refined by those around them in a range image.

Notation: a range image holds a range per pixel, and `row` and `column` say
which pixel each point falls into (`jaxshape.geometry.spherical`). Several
points share a pixel, of which the network labels only the one that it shows.
"""

import functools
import math

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from jaxshape.typing import (
  Array,
  ArrayLike,
  Bool,
  Float,
  Int,
  Integer,
  Num,
  Size,
  typed,
)

Mask = (
  Bool[ArrayLike, "*batch height width"] | Num[ArrayLike, "*batch height width"]
)
Valid = Bool[ArrayLike, "*batch points"] | Num[ArrayLike, "*batch points"]


def _penalties(window: int, sigma: float) -> np.ndarray:
  """1 - g of a square window, g a Gaussian that sums to 1."""
  k = np.arange(window) - window // 2
  # The largest is 1 before it is divided, so that no sigma gives 0 / 0.
  g = np.exp(-(k[:, None] ** 2 + k[None] ** 2) / (2 * sigma**2))
  return (1 - g / g.sum()).astype(np.float32)


def _elect(votes: list[jax.Array]) -> jax.Array:
  """The label of most votes, the lowest of several; 0 is no vote.

  Without any vote it is 1.
  """
  best = jnp.zeros(votes[0].shape, jnp.int32)
  out = jnp.ones(votes[0].shape, jnp.int32)
  for label in votes:
    count = sum((other == label).astype(jnp.int32) for other in votes)
    better = (count > best) | ((count == best) & (label < out))
    better &= label > 0
    best, out = jnp.where(better, count, best), jnp.where(better, label, out)
  return out


def _insert(
  kept: list[tuple[jax.Array, jax.Array]], new: tuple[jax.Array, jax.Array]
) -> None:
  """Puts a distance and its place among those kept, the nearest first.

  Of equal ones the first that came stays in front; the last falls out.
  """
  distance, place = new
  for i, (d, p) in enumerate(kept):
    nearer = distance < d
    kept[i] = jnp.where(nearer, distance, d), jnp.where(nearer, place, p)
    distance = jnp.where(nearer, d, distance)
    place = jnp.where(nearer, p, place)


@functools.partial(
  jax.jit,
  static_argnames=(
    "neighbours", "window", "sigma", "cutoff", "num_classes", "wrap", "fill",
  ),
)  # fmt: skip
def _knn(
  labels: jax.Array,
  image: jax.Array,
  ranges: jax.Array,
  row: jax.Array,
  column: jax.Array,
  mask: jax.Array | None,
  valid: jax.Array | None,
  *,
  neighbours: int,
  window: int,
  sigma: float,
  cutoff: float,
  num_classes: int,
  wrap: bool,
  fill: int,
) -> jax.Array:
  *leading, height, width = image.shape
  batch, reach = math.prod(leading), window // 2
  shape = ranges.shape
  ranges = jnp.asarray(ranges, jnp.float32).reshape(batch, -1)
  row = jnp.asarray(row, jnp.int32).reshape(batch, -1)
  column = jnp.asarray(column, jnp.int32).reshape(batch, -1)
  inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
  if valid is not None:
    inside &= valid.reshape(batch, -1) != 0

  filled = image >= 0  # False for NaN, too.
  if mask is not None:
    filled &= mask != 0
  image = jnp.where(filled, jnp.asarray(image, jnp.float32), jnp.inf)
  labels = jnp.asarray(labels, jnp.int32)

  def extend(a: jax.Array) -> jax.Array:
    a = a.reshape(batch, height, width)
    sides = ((0, 0), (0, 0), (reach, reach))
    a = jnp.pad(a, sides, mode="wrap") if wrap else jnp.pad(a, sides)
    return jnp.pad(a, ((0, 0), (reach, reach), (0, 0))).reshape(-1)

  image, labels = extend(image), extend(labels)
  stride = width + 2 * reach
  start = stride * (height + 2 * reach) * jnp.arange(batch, dtype=jnp.int32)
  # The pixel at the upper left of each point's window. The images of a batch
  # lie behind each other: mapped over the batch, it takes five times as long.
  corner = jnp.where(inside, row * stride + column, 0) + start[:, None]

  farthest = jnp.full(ranges.shape, jnp.inf, jnp.float32)
  kept = [(farthest, jnp.zeros(ranges.shape, jnp.int32))] * neighbours
  penalties = _penalties(window, sigma)
  for dy, dx in np.ndindex(window, window):
    place = corner + (dy * stride + dx)
    if dy == dx == reach:
      # The pixel may show another point, but its label is this one's, too.
      distance = jnp.zeros_like(ranges)
    else:
      away = jnp.abs(image.at[place].get(mode="clip") - ranges)
      distance = away * penalties[dy, dx]
    _insert(kept, (distance, place))

  # Without a cut-off, empty pixels are too far all the same.
  most = np.finfo(np.float32).max
  limit = min(cutoff, most) if cutoff > 0 else most
  votes = []
  for distance, place in kept:
    label = labels.at[place].get(mode="clip")
    counts = (label > 0) & (label < num_classes) & (distance <= limit)
    votes.append(jnp.where(counts, label, 0))
  return jnp.where(inside, _elect(votes), fill).reshape(shape)


@typed
def knn_labels(
  labels_image: Integer[ArrayLike, "*batch height width"],
  range_image: Float[ArrayLike, "*batch height width"],
  ranges: Float[ArrayLike, "*batch points"],
  row: Integer[ArrayLike, "*batch points"],
  column: Integer[ArrayLike, "*batch points"],
  *,
  mask: Mask | None = None,
  valid: Valid | None = None,
  neighbours: Size = 5,
  window: Size = 5,
  sigma: float | int = 1.0,
  cutoff: float | int = 1.0,
  num_classes: Size = 20,
  wrap: bool = False,
  fill: int = 0,
) -> Int[Array, "*batch points"]:
  """Labels each point by a vote of its nearest pixels.

  d(p, q) = |r_p - R(q)| (1 - g(q - p)), over the pixels q of a window around
  the point's own; g is a Gaussian that sums to 1 over the window. The
  `neighbours` nearest (of equally near ones the first, row after row) vote with
  their labels, except those beyond `cutoff`, those of label 0 and empty ones.
  Of equally many votes the lowest label wins; a point without any vote gets
  class 1, as from the public code.

  Args:
    labels_image: A label for each pixel, such as the network's.
    range_image: Range in metres; below 0 where a pixel is empty. The point's
      own pixel counts as being at its range.
    ranges: The range of each point in metres.
    row: From `jaxshape.geometry.spherical.project`.
    column: Likewise.
    mask: 0 where a pixel is empty, if its range does not say so.
    valid: 0 where a point is padding.
    neighbours: How many vote at most.
    window: The side of the window in pixels, odd.
    sigma: Of the Gaussian, in pixels.
    cutoff: The largest d in metres that votes; 0 or less for no bound.
    num_classes: Labels from this on do not vote.
    wrap: Whether the left and the right border are neighbours. Otherwise
      pixels outside the image have range 0 and label 0, as do those above and
      below it.
    fill: What padding and points outside the image get.

  Returns:
    A label for each point.

  Raises:
    ValueError: An option is outside its range.

  Reference:
    Milioto et al., "RangeNet++: Fast and Accurate LiDAR Semantic Segmentation",
    IROS 2019, Alg. 1.

  Note:
    Where fewer pixels than `neighbours` are filled and there is no cut-off, the
    public code lets empty ones vote, in no certain order; here they never do.
  """
  for name, size in (("neighbours", neighbours), ("window", window)):
    if isinstance(size, bool) or size < 1:
      raise ValueError(f"{name} must be 1 or more, got {size}.")
  if window % 2 == 0:
    raise ValueError(f"window must be odd, got {window}.")
  if neighbours > window**2:
    raise ValueError(
      f"neighbours must be at most the {window**2} pixels of the window, got "
      f"{neighbours}."
    )
  if not 0 < sigma < math.inf:
    raise ValueError(f"sigma must be above 0 and finite, got {sigma}.")
  if math.isnan(cutoff):
    raise ValueError(f"cutoff must be a number, got {cutoff}.")
  if num_classes < 2:
    raise ValueError(f"num_classes must be 2 or more, got {num_classes}.")
  if 0 in np.shape(range_image):
    return jnp.full(np.shape(ranges), fill, jnp.int32)
  return _knn(
    labels_image,
    range_image,
    ranges,
    row,
    column,
    mask,
    valid,
    neighbours=int(neighbours),
    window=int(window),
    sigma=float(sigma),
    cutoff=float(cutoff),
    num_classes=int(num_classes),
    wrap=wrap,
    fill=fill,
  )


@functools.partial(jax.jit, static_argnames=("iterations", "window", "form"))
def _crf(
  probabilities: jax.Array,
  xyz: jax.Array,
  mask: jax.Array,
  sigma: jax.Array,
  compatibility: jax.Array,
  bias: jax.Array,
  *,
  iterations: int,
  window: tuple[int, int],
  form: str,
) -> jax.Array:
  """The inference on one image, with the channels first inside."""
  height, width, _ = probabilities.shape
  p = jnp.moveaxis(probabilities, -1, 0)
  places = jnp.moveaxis(xyz, -1, 0)
  (up, left), shown = (n // 2 for n in window), mask != 0

  def shifts(a: jax.Array) -> list[jax.Array]:
    wide = jnp.pad(a, ((0, 0), (up, up), (left, left)))
    return [
      wide[:, i : i + height, j : j + width]
      for i in range(window[0])
      for j in range(window[1])
    ]

  # An empty pixel sends nothing, but 0 times NaN would be NaN.
  places = jnp.where(jnp.isfinite(places), places, 0)
  near = [
    jnp.exp(-jnp.sum((q - places) ** 2, axis=0) / (2 * sigma**2))
    for q in shifts(places)
  ]
  if form == "mean_field":
    near[len(near) // 2] = jnp.zeros_like(near[0])

  tiny = np.finfo(np.float32).tiny
  unary = jnp.log(jnp.maximum(p, tiny))

  def step(_: int, q: jax.Array) -> jax.Array:
    taken = shifts(jnp.where(shown, q, 0))
    message = sum(w * s for w, s in zip(near, taken, strict=True))
    pairwise = jnp.einsum(
      "ij,jhw->ihw", compatibility, message, precision=lax.Precision.HIGHEST
    )
    pairwise = pairwise + bias[:, None, None]
    scores = unary - pairwise if form == "mean_field" else q + pairwise
    return jax.nn.softmax(scores, axis=0)

  return jnp.moveaxis(lax.fori_loop(0, iterations, step, p), 0, -1)


@typed
def crf(
  probabilities: Float[ArrayLike, "*batch height width classes"],
  xyz: Float[ArrayLike, "*batch height width 3"],
  mask: Mask,
  *,
  iterations: Size = 3,
  window: tuple[int, int] = (3, 5),
  sigma: float | int = 0.1,
  coefficient: float | int = 0.1,
  compatibility: Float[ArrayLike, "classes classes"] | None = None,
  bias: Float[ArrayLike, " classes"] | None = None,
  form: str = "public",
) -> Float[Array, "*batch height width classes"]:
  """Lets pixels that are near each other in space agree on their labels.

  m(p) = sum over q in the window of exp(-|x_p - x_q|^2 / 2 sigma^2) Q(q), then
  Q <- softmax(Q + M m + b) ("public") or, of the unary term P that was given,
  Q <- softmax(log P - M m - b) ("mean_field", and q = p sends no message).
  Repeated from Q = P. Empty pixels and those outside the image send nothing.

  Args:
    probabilities: P, summing to 1 over the classes.
    xyz: Where each pixel's point lies. The public code gives the normalized
      channels of the network's input, not metres.
    mask: 0 where a pixel is empty.
    iterations: How often, 0 for not at all.
    window: Rows and columns of the window, odd.
    sigma: Of the Gaussian, in the unit of `xyz`.
    coefficient: Scales the default of `compatibility`.
    compatibility: M, how strongly the class of the column acts on that of the
      row. By default `coefficient` (1 - I), a penalty on different labels in
      the form "mean_field". Trained ones of the public code are its
      `compat_conv.weight[:, :, 0, 0]`.
    bias: b, added to every pixel's scores, by default 0; the public code's
      `compat_conv.bias`.
    form: "public" or "mean_field".

  Returns:
    Q, the refined probabilities.

  Raises:
    ValueError: An option is outside its range.

  Reference:
    Wu et al., "SqueezeSeg: Convolutional Neural Nets with Recurrent CRF for
    Real-Time Road-Object Segmentation from 3D LiDAR Point Cloud", ICRA 2018,
    Sec. III.C.

  Note:
    The paper infers by mean field. The public code of RangeNet++ adds where the
    paper subtracts, drops the unary term after the first iteration, and passes
    its coefficient 0.1 in the place of the sigma 0.7 of its settings. It
    trains M, so that with the default M its form spreads the labels of *other*
    classes: refine without training by "mean_field" and a sigma of 0.7 or so.
  """
  if isinstance(iterations, bool) or iterations < 0:
    raise ValueError(f"iterations must be 0 or more, got {iterations}.")
  if any(n < 1 or n % 2 == 0 for n in window):
    raise ValueError(f"window must be two odd numbers, got {window}.")
  if not 0 < sigma < math.inf:
    raise ValueError(f"sigma must be above 0 and finite, got {sigma}.")
  if not math.isfinite(coefficient):
    raise ValueError(f"coefficient must be finite, got {coefficient}.")
  if form not in ("public", "mean_field"):
    raise ValueError(f"form must be 'public' or 'mean_field', got {form!r}.")
  *leading, height, width, classes = np.shape(probabilities)
  if compatibility is None:
    compatibility = coefficient * (1 - np.eye(classes, dtype=np.float32))
  if bias is None:
    bias = np.zeros(classes, np.float32)
  cast = lambda a: jnp.asarray(a, jnp.float32)
  probabilities, xyz = cast(probabilities), cast(xyz)
  if 0 in probabilities.shape:
    return probabilities
  one = functools.partial(
    _crf, iterations=int(iterations), window=window, form=form
  )
  batch = math.prod(leading)
  out = jax.vmap(one, (0, 0, 0, None, None, None))(
    probabilities.reshape(batch, height, width, classes),
    xyz.reshape(batch, height, width, 3),
    jnp.reshape(jnp.asarray(mask), (batch, height, width)),
    cast(sigma),
    cast(compatibility),
    cast(bias),
  )
  return out.reshape(*leading, height, width, classes)
