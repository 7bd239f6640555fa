"""One vector per image: pooling of feature maps, whitening, several scales.

Feature maps are [..., height, width, channels] and not negative, descriptors
[..., channels]; everything is computed in float32. Descriptors of several
images are rows, where the public code has columns. Its network is
`l2_normalize(gem(x))`, a linear layer on that, and `l2_normalize` again.

Source: the public code of the papers below (cnnimageretrieval-pytorch), whose
numbers these functions give.
"""

from collections.abc import Callable, Sequence
import math
from typing import Any, NamedTuple

from jax import lax
import jax.numpy as jnp
import numpy as np

from jaxshape import images
from jaxshape.errors import InputError
from jaxshape.typing import (
  Array,
  ArrayLike,
  Bool,
  Float,
  Int,
  Num,
  Size,
  typed,
)

Maps = Float[ArrayLike, "*batch height width channels"]
Mask = Bool[ArrayLike, "*batch height width"]
# How many regions may lie along the longer side, and how much two overlap.
_STEPS = np.arange(2, 8, dtype=np.float32)
_OVERLAP = 0.4
# Rows that are read at once; the data may be larger than the memory.
_ROWS = 4096


class Whitening(NamedTuple):
  """A linear map of descriptors, P (x - m), its rows by falling variance.

  Attributes:
    mean: m, [channels].
    projection: P, [dimensions, channels].
  """

  mean: Any
  projection: Any


@typed
def gem(
  x: Maps,
  *,
  p: Num[ArrayLike, ""] | Num[ArrayLike, "#channels"] = 3.0,
  epsilon: float = 1e-6,
  mask: Mask | None = None,
) -> Float[Array, "*batch channels"]:
  """Pools by the generalized mean: between average (p = 1) and maximum.

  f_c = (1 / |X| sum over the pixels of max(x_c, epsilon)^p)^(1 / p).

  Finite for any p, with gradients for x and p: numbers are divided by the
  largest before they are raised.

  Args:
    x: Feature maps.
    p: Exponent, positive; one, or one per channel. It can be learned.
    epsilon: What smaller values are set to, positive.
    mask: True where a pixel counts; None for all.

  Returns:
    One number per channel, at least `epsilon`.

  Raises:
    ValueError: `p` or `epsilon` is not positive.

  Reference:
    Radenovic et al., "Fine-tuning CNN Image Retrieval with No Human
    Annotation", TPAMI 2019, Eq. 3.
  """
  _check_positive("epsilon", epsilon)
  _check_exponent("p", p)
  x = _nonempty(x)
  clamped = jnp.where(x < epsilon, epsilon, x)
  return _power_mean(clamped, jnp.asarray(p, jnp.float32), (-3, -2), mask)


@typed
def mac(
  x: Maps, *, mask: Mask | None = None
) -> Float[Array, "*batch channels"]:
  """Pools by the maximum over all pixels.

  Args:
    x: Feature maps.
    mask: True where a pixel counts; None for all.

  Returns:
    One number per channel.

  Reference:
    Radenovic et al., "Fine-tuning CNN Image Retrieval with No Human
    Annotation", TPAMI 2019, Eq. 1.
  """
  x = _nonempty(x)
  if mask is not None:
    x = jnp.where(jnp.asarray(mask)[..., None], x, -jnp.inf)
  return jnp.max(x, axis=(-3, -2))


@typed
def spoc(
  x: Maps, *, mask: Mask | None = None
) -> Float[Array, "*batch channels"]:
  """Pools by the mean over all pixels.

  Args:
    x: Feature maps.
    mask: True where a pixel counts; None for all.

  Returns:
    One number per channel.

  Reference:
    Radenovic et al., "Fine-tuning CNN Image Retrieval with No Human
    Annotation", TPAMI 2019, Eq. 2.
  """
  return _mean(_nonempty(x), (-3, -2), mask)


@typed
def regions(
  height: Size, width: Size, *, levels: Size = 3
) -> list[tuple[int, int, int]]:
  """The squares of R-MAC: at several scales, evenly over the map.

  At level l = 1, 2, ... squares have the side floor(2 min(h, w) / (l + 1)); l
  of them lie along the shorter side, and l + m along the longer one, where m
  is such that at level 1 the overlap of two neighbours is nearest to 40 %.

  Args:
    height: Of the map, at least 1.
    width: Of the map, at least 1.
    levels: Number of scales, at least 1.

  Returns:
    Top, left and side of each, row by row in each level; not the map itself.
    Levels of which the squares have no pixel are left out.

  Raises:
    ValueError: A number is not positive.

  Reference:
    Tolias et al., "Particular Object Retrieval with Integral Max-Pooling of
    CNN Activations", ICLR 2016, Sec. 3.2.

  Note:
    Positions are rounded as the public code does it, in 32 bits.
  """
  for name, value in (("height", height), ("width", width), ("levels", levels)):
    if value < 1:
      raise ValueError(f"{name} must be 1 or more, got {value}.")
  height, width = int(height), int(width)
  short, long = sorted((height, width))
  # PyTorch divides a number by a tensor as the product with its inverse.
  step = np.float32(1) / (_STEPS - np.float32(1)) * np.float32(long - short)
  overlap = (short**2 - short * step) / short**2
  more = int(np.argmin(np.abs(overlap - np.float32(_OVERLAP)))) + 1
  out = []
  for level in range(1, levels + 1):
    side = 2 * short // (level + 1)
    if side:
      tops = _places(height, side, level + more * (height > width))
      lefts = _places(width, side, level + more * (width > height))
      out += [(top, left, side) for top in tops for left in lefts]
  return out


@typed
def rmac(
  x: Maps, *, levels: Size = 3, epsilon: float = 1e-6
) -> Float[Array, "*batch channels"]:
  """Pools by the sum of the normalized maxima of many squares (R-MAC).

  f = sum over the map and its `regions` R of mac(R) / (||mac(R)|| + epsilon).

  Args:
    x: Feature maps.
    levels: Number of scales, at least 1.
    epsilon: Added to norms.

  Returns:
    Not normalized, as in the public code, whose network does that.

  Raises:
    ValueError: `levels` is less than 1.

  Reference:
    Tolias et al., "Particular Object Retrieval with Integral Max-Pooling of
    CNN Activations", ICLR 2016, Sec. 3.2.
  """
  return jnp.sum(_pooled(x, mac, levels, epsilon), axis=-2)


@typed
def regional(
  x: Maps,
  *,
  pooling: Callable[..., Any] = gem,
  whiten: Callable[[Any], Any] | None = None,
  levels: Size = 3,
  epsilon: float = 1e-6,
) -> Float[Array, "*batch _"]:
  """Pools squares of the map by anything, whitens and sums them.

  f = norm(sum over the map and its `regions` R of v_R), where v_R is
  norm(pooling(R)), or norm(whiten(norm(pooling(R)))).

  Args:
    x: Feature maps.
    pooling: From maps [..., h, w, channels] to vectors, such as `gem`.
    whiten: From vectors to vectors, such as a linear layer.
    levels: Number of scales, at least 1.
    epsilon: Added to norms.

  Returns:
    Normalized descriptors.

  Raises:
    ValueError: `levels` is less than 1.

  Reference:
    Tolias et al., "Particular Object Retrieval with Integral Max-Pooling of
    CNN Activations", ICLR 2016, Sec. 3.2.
  """
  parts = _pooled(x, pooling, levels, epsilon)
  if whiten is not None:
    parts = l2_normalize(whiten(parts), epsilon=epsilon)
  return l2_normalize(jnp.sum(parts, axis=-2), epsilon=epsilon)


@typed
def l2_normalize(
  x: Float[ArrayLike, "*batch channels"], *, epsilon: float = 1e-6
) -> Float[Array, "*batch channels"]:
  """Divides by the norm: x / (||x|| + epsilon).

  Args:
    x: Vectors.
    epsilon: Keeps zeros from being divided by zero, at least 0.

  Returns:
    Vectors of a length just below 1; zeros stay zeros.

  Raises:
    ValueError: `epsilon` is negative.

  Reference:
    Radenovic et al., "Fine-tuning CNN Image Retrieval with No Human
    Annotation", TPAMI 2019, Sec. 3.2; its public code for epsilon.
  """
  if not epsilon >= 0:
    raise ValueError(f"epsilon must be 0 or more, got {epsilon}.")
  x = jnp.asarray(x, jnp.float32)
  squared = jnp.sum(x * x, axis=-1, keepdims=True)
  some = squared > 0
  norm = jnp.where(some, jnp.sqrt(jnp.where(some, squared, 1)), 0)
  # A divisor of 0 could only divide zeros.
  return x / (norm + epsilon if epsilon else jnp.where(some, norm, 1))


@typed
def aggregate_scales(
  descriptors: Float[ArrayLike, "scales *batch channels"],
  *,
  power: Num[ArrayLike, ""] = 1.0,
) -> Float[Array, "*batch channels"]:
  """One descriptor from those of an image at several sizes.

  v = (1 / S sum over the scales of v_s^power)^(1 / power), f = v / ||v||.

  Args:
    descriptors: Along the first axis, those of one image at each scale.
    power: Positive. The public code takes GeM's p where nothing was whitened,
      else 1.

  Returns:
    Normalized descriptors.

  Raises:
    ValueError: `power` is not positive.
    InputError: Numbers are negative, and `power` is not 1.

  Reference:
    Radenovic et al., "Fine-tuning CNN Image Retrieval with No Human
    Annotation", TPAMI 2019, Sec. 3.4; its public code for `power`.
  """
  _check_exponent("power", power)
  v = jnp.asarray(descriptors, jnp.float32)
  if v.shape[0] < 1:
    raise InputError("descriptors must be of one scale or more, got none.")
  fixed = images.concrete(power)
  if fixed is not None and fixed == 1:
    return l2_normalize(jnp.mean(v, axis=0), epsilon=0.0)
  known = images.concrete(v)
  if known is not None and known.size and known.min() < 0:
    raise InputError(
      f"descriptors must not be negative where power is {power}, got "
      f"{known.min():g}; whitened ones go with power=1."
    )
  v = _power_mean(v, jnp.asarray(power, jnp.float32), (0,), None)
  return l2_normalize(v, epsilon=0.0)


@typed
def learn_whitening(
  x: Float[np.ndarray, "rows channels"] | Float[Array, "rows channels"],
  query_rows: Int[ArrayLike, " pairs"] | Sequence[int],
  positive_rows: Int[ArrayLike, " pairs"] | Sequence[int],
  *,
  ridge: float = 0.0,
) -> Whitening:
  """Learns a whitening from pairs of images that show the same thing.

  With d = x_q - x_p over the pairs and S = mean(d d^T) = L L^T, the whitening
  makes differences of matching images white, and then turns to the principal
  axes of all rows: P = E^T L^-1, where E are the eigenvectors of
  L^-1 (sum over rows of (x - m) (x - m)^T) L^-T, m the mean of the queries.

  Args:
    x: Descriptors, normalized; a memory-mapped array is read in parts.
    query_rows: Rows of `x`, one per pair; a row may be in several pairs.
    positive_rows: The rows that show the same.
    ridge: Added to the diagonal of S, at least 0: for fewer pairs than there
      are channels.

  Returns:
    The whitening, of as many dimensions as there are channels; rows of the
    projection are defined up to their sign.

  Raises:
    ValueError: `ridge` is negative.
    InputError: Rows are not those of `x`, or hold no numbers; or the pairs
      differ in fewer directions than there are channels.

  Reference:
    Radenovic et al., "Fine-tuning CNN Image Retrieval with No Human
    Annotation", TPAMI 2019, Sec. 3.3, after Mikolajczyk and Matas, "Improving
    Descriptors for Fast Tree Matching by Optimal Linear Projection", ICCV 2007.

  Note:
    Where S has no full rank, the public code adds 1e-10 to its diagonal, and
    ten times more as long as that does not do; here that is `ridge`. It also
    computes in the type of x, this in 64 bits.
  """
  if not (ridge >= 0 and math.isfinite(ridge)):
    raise ValueError(f"ridge must be 0 or more, got {ridge}.")
  _check_rows(x)
  count, channels = x.shape
  queries = _as_rows("query_rows", query_rows, count)
  positives = _as_rows("positive_rows", positive_rows, count)
  if len(queries) != len(positives):
    raise InputError(
      "query_rows and positive_rows must be equally many, got "
      f"{len(queries)} and {len(positives)}."
    )
  total, within = np.zeros(channels), np.zeros((channels, channels))
  for i in range(0, len(queries), _ROWS):
    q = _float64(x, queries[i : i + _ROWS])
    difference = q - _float64(x, positives[i : i + _ROWS])
    total += q.sum(axis=0)
    within += difference.T @ difference
  mean = total / len(queries)
  within /= len(queries)
  if ridge:
    within[np.diag_indices(channels)] += ridge
  rank = int(np.sum(_significant(np.linalg.eigvalsh(within))))
  if rank < channels:
    raise InputError(
      f"the {len(queries)} pairs differ in {rank} directions and the "
      f"descriptors have {channels} channels; give more pairs, at least "
      f"{channels} that are independent, or ridge=1e-6."
    )
  inverse = np.linalg.inv(np.linalg.cholesky(within))
  _, vectors = np.linalg.eigh(inverse @ _scatter(x, mean) @ inverse.T)
  return _whitening(mean, vectors[:, ::-1].T @ inverse)


@typed
def pca_whitening(
  x: Float[np.ndarray, "rows channels"] | Float[Array, "rows channels"],
  *,
  dimensions: Size | None = None,
) -> Whitening:
  """Learns a whitening without labels: principal axes, scaled to variance 1.

  P = diag(lambda)^(-1/2) E^T, from the eigenvalues and eigenvectors of
  C = mean((x - m) (x - m)^T), m = mean(x).

  Args:
    x: Descriptors, normalized; a memory-mapped array is read in parts.
    dimensions: How many axes are kept, 1..channels; None for all.

  Returns:
    The whitening; rows of the projection are defined up to their sign.

  Raises:
    ValueError: `dimensions` is not within 1..channels.
    InputError: `x` varies in fewer directions than that, or holds no numbers.

  Reference:
    Jegou and Chum, "Negative Evidences and Co-occurences in Image Retrieval:
    The Benefit of PCA and Whitening", ECCV 2012, Sec. 2.
  """
  _check_rows(x)
  count, channels = x.shape
  keep = _check_dimensions(dimensions, channels)
  parts = [_float64(x, part).sum(axis=0) for part in _parts(count)]
  mean = np.sum(parts, axis=0) / count
  values, vectors = np.linalg.eigh(_scatter(x, mean) / count)
  values, vectors = values[::-1], vectors[:, ::-1]
  rank = int(np.sum(_significant(values)))
  if rank < keep:
    raise InputError(
      f"the {count} rows vary in {rank} directions, and {keep} dimensions are "
      f"wanted; give more rows than that, or dimensions={max(rank, 1)}."
    )
  scaled = vectors[:, :keep].T / np.sqrt(values[:keep, None])
  return _whitening(mean, scaled)


@typed
def whiten(
  x: Float[ArrayLike, "*batch channels"],
  whitening: Whitening,
  *,
  dimensions: Size | None = None,
  epsilon: float = 1e-6,
) -> Float[Array, "*batch _"]:
  """Whitens descriptors and normalizes them again: norm(P (x - m)).

  Args:
    x: Descriptors.
    whitening: Of as many channels.
    dimensions: How many dimensions are kept, the first ones; None for all.
    epsilon: Added to norms.

  Returns:
    Normalized descriptors.

  Raises:
    ValueError: `dimensions` is more than there are, or less than 1.
    InputError: The whitening is for another number of channels.

  Reference:
    Radenovic et al., "Fine-tuning CNN Image Retrieval with No Human
    Annotation", TPAMI 2019, Sec. 3.3.
  """
  x = jnp.asarray(x, jnp.float32)
  mean = jnp.asarray(whitening.mean, jnp.float32)
  projection = jnp.asarray(whitening.projection, jnp.float32)
  channels = x.shape[-1]
  if mean.shape != (channels,) or projection.shape[1:] != (channels,):
    raise InputError(
      f"the whitening has a mean {mean.shape} and a projection "
      f"{projection.shape}, and the descriptors have {channels} channels."
    )
  keep = _check_dimensions(dimensions, len(projection))
  out = jnp.matmul(
    x - mean, projection[:keep].T, precision=lax.Precision.HIGHEST
  )
  return l2_normalize(out, epsilon=epsilon)


def _check_positive(name: str, value: float) -> None:
  if not (value > 0 and math.isfinite(value)):
    raise ValueError(f"{name} must be positive, got {value}.")


def _check_exponent(name: str, value: Any) -> None:
  known = images.concrete(value)
  if known is not None and not (np.all(known > 0) and np.isfinite(known).all()):
    raise ValueError(f"{name} must be positive, got {value}.")


def _check_dimensions(dimensions: Any, most: int) -> int:
  if dimensions is None:
    return most
  if not 1 <= dimensions <= most:
    raise ValueError(f"dimensions must be in 1..{most}, got {dimensions}.")
  return int(dimensions)


def _nonempty(x: Any) -> Array:
  x = jnp.asarray(x, jnp.float32)
  if not (x.shape[-3] and x.shape[-2]):
    raise InputError(
      f"x must hold a pixel or more, got maps of {x.shape[-3]} x {x.shape[-2]};"
      " the image is too small for the network."
    )
  return x


def _mean(x: Array, axes: tuple[int, ...], mask: Any) -> Array:
  if mask is None:
    return jnp.mean(x, axis=axes)
  mask = jnp.asarray(mask)[..., None]
  return jnp.sum(jnp.where(mask, x, 0), axis=axes) / jnp.sum(mask, axis=axes)


def _power_mean(x: Array, p: Array, axes: tuple[int, ...], mask: Any) -> Array:
  """mean(x^p)^(1 / p) of what is not negative.

  The largest value is taken out, so that nothing overflows or vanishes; as the
  mean does not depend on what is taken out, neither does its gradient.
  """
  if mask is not None:
    x = jnp.where(jnp.asarray(mask)[..., None], x, 0)
  top = lax.stop_gradient(jnp.max(x, axis=axes, keepdims=True))
  top = jnp.where(top == 0, 1, top)
  mean = _mean((x / top) ** p, axes, mask)
  none = mean == 0  # Its root has no gradient.
  root = jnp.where(none, 1, mean) ** (1 / p)
  return jnp.where(none, 0, root) * jnp.squeeze(top, axes)


def _places(size: int, side: int, count: int) -> list[int]:
  """Where squares begin along an axis."""
  gap = 0.0 if count == 1 else (size - side) / (count - 1)
  middle = math.floor(side / 2 - 1)
  centers = middle + np.arange(count, dtype=np.float32) * np.float32(gap)
  return (np.floor(centers).astype(int) - middle).tolist()


def _pooled(
  x: Any, pooling: Callable[..., Any], levels: Any, epsilon: float
) -> Array:
  """Normalized vectors of the map and of its regions, [..., R, channels]."""
  x = _nonempty(x)
  height, width = x.shape[-3:-1]
  parts = [pooling(x)] + [
    pooling(x[..., top : top + side, left : left + side, :])
    for top, left, side in regions(height, width, levels=levels)
  ]
  return l2_normalize(jnp.stack(parts, axis=-2), epsilon=epsilon)


def _parts(count: int) -> list[slice]:
  return [slice(i, i + _ROWS) for i in range(0, count, _ROWS)]


def _float64(x: Any, rows: Any) -> np.ndarray:
  return np.asarray(x[rows]).astype(np.float64)


def _check_rows(x: Any) -> None:
  if not (x.shape[0] and x.shape[1]):
    raise InputError(f"x must hold descriptors, got the shape {x.shape}.")
  for part in _parts(len(x)):
    good = np.isfinite(_float64(x, part)).all(axis=1)
    if not good.all():
      row = part.start + int(np.argmin(good))
      raise InputError(f"row {row} of x holds what is no finite number.")


def _as_rows(name: str, rows: Any, count: int) -> np.ndarray:
  rows = np.asarray(rows)
  if not rows.size:
    raise InputError(f"{name} is empty; give one pair or more.")
  if rows.min() < 0 or rows.max() >= count:
    raise InputError(
      f"{name} must be in 0..{count - 1}, the rows of x, got values in "
      f"{rows.min()}..{rows.max()}."
    )
  return rows


def _scatter(x: Any, mean: np.ndarray) -> np.ndarray:
  """The sum over rows of (x - m) (x - m)^T."""
  out = np.zeros((len(mean), len(mean)))
  for part in _parts(len(x)):
    centered = _float64(x, part) - mean
    out += centered.T @ centered
  return out


def _significant(values: np.ndarray) -> np.ndarray:
  """Which eigenvalues are more than rounding of 64 bits."""
  least = max(values.max(), 0) * len(values) * np.finfo(np.float64).eps
  return values > least


def _whitening(mean: np.ndarray, projection: np.ndarray) -> Whitening:
  return Whitening(mean.astype(np.float32), projection.astype(np.float32))
