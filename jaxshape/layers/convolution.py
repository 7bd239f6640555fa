"""Convolutions whose weights change from pixel to pixel.

Notation, of the first paper below: X is the input with I channels, Y the output
with O, W the weight of side K, A the attention, X0 the raw LiDAR image. A has
the axes [height, width, taps, I, O], of which any may be 1; the taps are the
K^2 places of the window, row by row. The letters of a variant say which of its
axes are not 1: S space (height and width), K kernel (taps), I and O channels.

Reference:
  Xu et al., "SqueezeSegV3: Spatially-Adaptive Convolution for Efficient
  Point-Cloud Segmentation", ECCV 2020, Eq. 2-4 and Sec. 4.
"""

from collections.abc import Callable, Sequence
import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from jaxshape.layers import windows
from jaxshape.typing import Array, ArrayLike, Float, typed

Dtype = Any
Features = Float[ArrayLike, "batch height width inputs"]

# Which of (taps, inputs, outputs) the learned attention tells apart.
LEARNED = {
  "s": (False, False, False),
  "is": (False, True, False),
  "sk": (True, False, False),
  "isk": (True, True, False),
  "oisk": (True, True, True),
}
# What PyTorch starts from, so that learning rates carry over.
INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
# Pixels of a slab of rows. On CPUs its products stay in the cache, at four rows
# or more, as each slab also reads the rows around it; elsewhere the slabs only
# bound the memory, to some 250 MB.
SLAB = {"cpu": 4096}
LARGE_SLAB = 2**18


@typed
def spatially_adaptive_conv(
  x: Float[ArrayLike, "*batch height width inputs"],
  attention: Float[ArrayLike, "*#batch #height #width #taps #inputs #outputs"],
  weight: Float[ArrayLike, "kernel kernel inputs outputs"],
) -> Float[Array, "*batch height width outputs"]:
  """Convolves by a weight that an attention scales at every output pixel.

  Y[p, m] = sum over t, n of W[t, n, m] A[p, t, n, m] X[p + t, n], with zeros
  beyond the border. Nothing as large as K^2 I channels is made of X.

  Args:
    x: X.
    attention: A. An axis of size 1 is shared: [.., taps, inputs, 1] is ISK,
      [.., taps, 1, 1] SK, [.., 1, inputs, 1] IS, [.., 1, 1, 1] S.
    weight: W, of an odd side; tap t is at row t // kernel, column t % kernel.

  Returns:
    Y, before any bias and non-linearity.

  Raises:
    ValueError: The kernel's side is even, or the taps are not kernel^2 or 1.

  Reference:
    Xu et al., "SqueezeSegV3: Spatially-Adaptive Convolution for Efficient
    Point-Cloud Segmentation", ECCV 2020, Eq. 3-4.
  """
  x, attention, weight = map(jnp.asarray, (x, attention, weight))
  size = weight.shape[0]
  _check_odd("kernel", size)
  taps = attention.shape[-3]
  if taps not in (1, size**2):
    raise ValueError(f"attention must have 1 or {size**2} taps, got {taps}.")
  return _adapt(
    _pad(x, size // 2), lambda t: attention[..., t % taps, :, :], weight
  )


@typed
def gaussian_attention(
  features: Float[ArrayLike, "*batch height width channels"],
  *,
  kernel: int = 3,
) -> Float[Array, "*batch height width {kernel**2} 1 1"]:
  """The attention of pixel-adaptive convolution: how alike two pixels are.

  A[p, t] = exp(-|f(p + t) - f(p)|^2 / 2), with f = 0 beyond the border.

  Args:
    features: f, in units of which 1 is a clear difference.
    kernel: Side of the window, odd.

  Returns:
    A, an attention of the kind SK.

  Raises:
    ValueError: `kernel` is even.

  Reference:
    Su et al., "Pixel-Adaptive Convolutional Neural Networks", CVPR 2019, Eq. 3
    and Sec. 3.
  """
  _check_odd("kernel", kernel)
  padded = _pad(jnp.asarray(features), kernel // 2)
  taps = [_alike(padded, kernel, t) for t in range(kernel**2)]
  return jnp.stack(taps, axis=-3)


class Moments(NamedTuple):
  """The mean and covariance of an image's patches, and how many there are."""

  mean: Array
  covariance: Array
  number: int


@typed
def patch_moments(
  x: Float[ArrayLike, "batch height width channels"],
  *,
  kernel: int = 7,
  rows: int = 0,
) -> Moments:
  """The moments of all kernel x kernel patches, zeros beyond the border.

  With patches P of mean u and covariance C, the outputs of any convolution
  w . P + b have the mean w . u + b and the variance w' C w. So a normalization
  by the batch after a linear layer needs no output of that layer.

  Args:
    x: An image of few channels.
    kernel: Side of the patches, odd.
    rows: How many rows are taken at a time; 0 for all.

  Returns:
    The mean [d] and the covariance [d, d] of d = kernel^2 channels, taps first
    and then channels, over all pixels of the batch; not corrected for bias.

  Raises:
    ValueError: An option is outside its range.

  Reference:
    Ioffe and Szegedy, "Batch Normalization", ICML 2015, Algorithm 1, of a
    linear function.
  """
  _check_odd("kernel", kernel)
  _check_rows(rows)
  x = jnp.asarray(x, jnp.float32)
  batch, height, width, _ = x.shape
  count = batch * height * width
  padded = _pad(x, kernel // 2)
  # The sums of shifted images differ by their borders only: down, then across.
  down = [padded[:, i : i + height].sum((0, 1)) for i in range(kernel)]
  down = jnp.stack(down)
  both = [down[:, j : j + width].sum(1) for j in range(kernel)]
  mean = jnp.stack(both, axis=1).reshape(-1) / count

  def square(inside: Array, slab: Array) -> Array:
    # Centred first, or far-away coordinates would cancel; summed per example,
    # so that devices which share a batch meet only once, after the loop.
    patches = (windows.window(slab, (kernel, kernel)) - mean) * inside
    return jnp.einsum(
      "bhwk,bhwl->bkl", patches, patches, precision=lax.Precision.HIGHEST
    )[:, None, None]

  inside = jnp.ones((batch, height, 1, 1), jnp.float32)
  sums = _over_rows(square, (inside, x), (0, kernel // 2), rows, join=False)
  return Moments(mean, jnp.sum(sums, axis=(0, 1, 2, 3)) / count, count)


class BatchNorm(nn.Module):
  """Batch normalization with PyTorch's running statistics.

  y = (x - mean) / sqrt(variance + epsilon) * scale + bias. In training, mean
  and variance are those of the whole batch, however many devices share it, and
  the running ones move towards them: r = (1 - momentum) r + momentum v, where
  the variance v is divided by n - 1.

  Attributes:
    momentum: Weight of the new statistics, in 0..1; Flax's is 1 minus it.
    epsilon: Keeps constant channels finite.
    dtype: Of the result; what is computed in between is float32.

  Reference:
    Ioffe and Szegedy, "Batch Normalization", ICML 2015, Algorithms 1 and 2.
  """

  momentum: float = 0.01
  epsilon: float = 1e-5
  dtype: Dtype = jnp.float32

  @typed
  def __call__(
    self, x: Float[ArrayLike, "*batch channels"], *, train: bool
  ) -> Float[Array, "*batch channels"]:
    """Normalized features."""
    x = jnp.asarray(x, jnp.float32)

    def moments() -> tuple[Array, Array, int]:
      axes = tuple(range(x.ndim - 1))
      mean = jnp.mean(x, axes)
      return mean, jnp.mean((x - mean) ** 2, axes), math.prod(x.shape[:-1])

    mean, scale, bias = self.factors(moments, x.shape[-1], train)
    return ((x - mean) * scale + bias).astype(self.dtype)

  @nn.compact
  def factors(
    self,
    moments: Callable[[], tuple[Array, Array, int]],
    channels: int,
    train: bool,
  ) -> tuple[Array, Array, Array]:
    """m, s and b of y = (x - m) s + b, from moments that training asks for."""
    scale = self.param("scale", nn.initializers.ones, (channels,))
    bias = self.param("bias", nn.initializers.zeros, (channels,))
    shape = ((channels,), jnp.float32)
    mean = self.variable("batch_stats", "mean", lambda: jnp.zeros(*shape))
    var = self.variable("batch_stats", "var", lambda: jnp.ones(*shape))
    if train:
      new_mean, new_var, count = moments()
      if not self.is_initializing():
        unbiased = new_var * (count / max(count - 1, 1))
        m = self.momentum
        mean.value = (1 - m) * mean.value + m * new_mean
        var.value = (1 - m) * var.value + m * unbiased
    else:
      new_mean, new_var = mean.value, var.value
    return new_mean, scale / jnp.sqrt(new_var + self.epsilon), bias


class SqueezeExcitation(nn.Module):
  """Attention per channel, from the channels' means: SAC-I.

  A = sigmoid(W2 relu(W1 mean(X))).

  Attributes:
    reduction: How many times fewer channels there are in between.
    dtype: What is computed in.

  Reference:
    Hu et al., "Squeeze-and-Excitation Networks", CVPR 2018, Eq. 2-3.
  """

  reduction: int = 16
  dtype: Dtype = jnp.float32

  @nn.compact
  @typed
  def __call__(self, x: Features) -> Float[Array, "batch 1 1 inputs"]:
    """The attention."""
    mean = jnp.mean(jnp.asarray(x), axis=(1, 2), keepdims=True)
    return nn.sigmoid(_bottleneck(self, jnp.shape(x)[-1])(mean))


class BlockAttention(nn.Module):
  """Attention per channel, and then per pixel: SAC-I and SAC-S (CBAM).

  A = A_I A_S with A_I = sigmoid(f(mean X) + f(max X)) over all pixels, f two
  layers; A_S = sigmoid(conv7([mean; max])) over the channels of A_I X.

  Attributes:
    reduction: How many times fewer channels there are in between.
    dtype: What is computed in.

  Reference:
    Woo et al., "CBAM: Convolutional Block Attention Module", ECCV 2018,
    Eq. 2-3.
  """

  reduction: int = 16
  dtype: Dtype = jnp.float32

  @nn.compact
  @typed
  def __call__(self, x: Features) -> Float[Array, "batch height width inputs"]:
    """The attention."""
    x = jnp.asarray(x)
    shared = _bottleneck(self, x.shape[-1])
    mean = jnp.mean(x, axis=(1, 2), keepdims=True)
    highest = jnp.max(x, axis=(1, 2), keepdims=True)
    channels = nn.sigmoid(shared(mean) + shared(highest))
    x = x * channels
    both = jnp.stack([jnp.mean(x, axis=-1), jnp.max(x, axis=-1)], axis=-1)
    kernel = self.param("spatial", INIT, (7, 7, 2, 1))
    return channels * nn.sigmoid(_convolve(both, kernel.astype(self.dtype)))


class ContextAggregation(nn.Module):
  """Attention per pixel and channel, from the highest around: SAC-IS (CAM).

  A = sigmoid(W2 relu(W1 maxpool7(X))).

  Attributes:
    reduction: How many times fewer channels there are in between.
    dtype: What is computed in.

  Reference:
    Wu et al., "SqueezeSegV2: Improved Model Structure and Unsupervised Domain
    Adaptation for Road-Object Segmentation from a LiDAR Point Cloud", ICRA
    2019, Sec. III-A.
  """

  reduction: int = 16
  dtype: Dtype = jnp.float32

  @nn.compact
  @typed
  def __call__(self, x: Features) -> Float[Array, "batch height width inputs"]:
    """The attention."""
    x = jnp.asarray(x)
    channels = x.shape[-1]
    for axis in (1, 2):  # The gradient of `reduce_window` is slow on CPUs.
      x = _highest(x, 7, axis)
    return nn.sigmoid(_bottleneck(self, channels)(x))


GATES = {
  "se": SqueezeExcitation,
  "cbam": BlockAttention,
  "cam": ContextAggregation,
}
# "none" is a plain convolution.
VARIANTS = ("none", *LEARNED, "pac", *GATES)


class SpatiallyAdaptiveConv(nn.Module):
  """A convolution under attention, or one of those it is compared with.

  For `"isk"`, `"sk"` and `"oisk"`, A = sigmoid(normalize(conv(X0))) scales the
  weight at every output pixel (Eq. 3-4). For `"is"` and `"s"`, A scales the
  input before a plain convolution, as Sec. 4.3 has it, or the weight. Of the
  rivals, `"se"`, `"cbam"` and `"cam"` scale the input by what they see in it;
  `"pac"` scales the weight by `gaussian_attention` of X0, nothing learned.
  `"none"` is a plain convolution. All have the same weight and bias.

  Of `"isk"`, K^2 I channels never exist for the whole image: slabs of rows are
  taken one after the other, and in the backward pass computed again. The
  normalization is folded into the attention's convolution, in training with
  the batch's statistics, which come from the second moments of X0's patches.

  Attributes:
    features: O.
    kernel: K, odd.
    variant: One of `VARIANTS`.
    attention_kernel: Side of the attention's convolution, odd.
    normalize: Whether batch normalization comes before the sigmoid.
    momentum: Of its running statistics, as in `BatchNorm`.
    scaled: Where `"is"` and `"s"` act: `"input"` or `"weight"`.
    rows: Height of a slab; 0 for the whole image at once, None for a height
      that suits the device.
    dtype: What is computed in; parameters and statistics are float32.

  Reference:
    Xu et al., "SqueezeSegV3: Spatially-Adaptive Convolution for Efficient
    Point-Cloud Segmentation", ECCV 2020, Eq. 3-4, Sec. 4.2-4.4.

  Note:
    The paper's attention is a convolution and a sigmoid; the public code, with
    which trained weights are shared, normalizes in between. Without that,
    `normalize=False`.
  """

  features: int
  kernel: int = 3
  variant: str = "isk"
  attention_kernel: int = 7
  normalize: bool = True
  momentum: float = 0.1
  scaled: str = "input"
  rows: int | None = None
  dtype: Dtype = jnp.float32

  @nn.compact
  @typed
  def __call__(
    self,
    x: Features,
    coordinates: Float[ArrayLike, "batch height width coordinates"],
    *,
    train: bool,
  ) -> Float[Array, "batch height width {self.features}"]:
    """Features in `dtype`, from features and X0 at the same resolution."""
    self._check()
    x = jnp.asarray(x, self.dtype)
    raw = jnp.asarray(coordinates, jnp.float32)
    size, inputs = self.kernel, x.shape[-1]
    weight = self.param("kernel", INIT, (size, size, inputs, self.features))
    bias = self.param("bias", nn.initializers.zeros, (self.features,))
    weight = weight.astype(self.dtype)
    rows = self.rows
    if rows is None:
      rows = slab_rows(*x.shape[:3])
    if self.variant in LEARNED:
      y = self._learned(x, raw, weight, rows, train)
    elif self.variant == "pac":
      raw = raw.astype(self.dtype)
      similar = lambda x, c, w: _adapt(x, lambda t: _alike(c, size, t), w)
      y = _slabs(similar, x, raw, size, size, rows, (weight,))
    else:
      if self.variant in GATES:
        gate = GATES[self.variant](dtype=self.dtype, name="gate")
        x = jnp.multiply(x, gate(x))
      y = _convolve(x, weight)
    return y + bias.astype(self.dtype)

  def _learned(
    self, x: Array, raw: Array, weight: Array, rows: int, train: bool
  ) -> Array:
    """The convolution under an attention that X0 gives."""
    kernel, bias = self._attention(raw, x.shape[-1], rows, train)
    kernel, bias = kernel.astype(self.dtype), bias.astype(self.dtype)
    raw = raw.astype(self.dtype)
    size = self.attention_kernel
    taps, inputs, outputs = axes = kernel.shape[3:]
    if taps == 1 and self.scaled == "input":
      flat = kernel.reshape(*kernel.shape[:3], inputs)
      attention = nn.sigmoid(_convolve(raw, flat) + bias.reshape(inputs))
      return _convolve(x * attention, weight)

    def adapt(
      x: Array, raw: Array, kernel: Array, bias: Array, weight: Array
    ) -> Array:
      patches = windows.window(raw, (size, size))
      flat = kernel.reshape(-1, *axes)

      def attention(t: int) -> Array:
        one = flat[:, t % taps].reshape(-1, inputs * outputs)
        z = patches @ one + bias[t % taps].reshape(-1)
        return nn.sigmoid(z).reshape(*z.shape[:-1], inputs, outputs)

      return _adapt(x, attention, weight)

    parameters = (kernel, bias, weight)
    return _slabs(adapt, x, raw, self.kernel, size, rows, parameters)

  def _attention(
    self, raw: Array, inputs: int, rows: int, train: bool
  ) -> tuple[Array, Array]:
    """The attention's linear layer, its normalization folded in.

    The kernel has the axes [k, k, coordinates, taps, inputs, outputs], the bias
    the last three.
    """
    sizes = (self.kernel**2, inputs, self.features)
    axes = tuple(
      n if kept else 1
      for n, kept in zip(sizes, LEARNED[self.variant], strict=True)
    )
    window = (self.attention_kernel, self.attention_kernel, raw.shape[-1])
    channels = math.prod(axes)
    draw = lambda key, shape: INIT(key, (*window, channels)).reshape(shape)
    kernel = self.param("attention_kernel", draw, (*window, *axes))
    bias = self.param("attention_bias", nn.initializers.zeros, axes)
    if not self.normalize:
      return kernel, bias
    flat = kernel.reshape(-1, channels)

    def moments() -> tuple[Array, Array, int]:
      mean, covariance, count = patch_moments(
        raw, kernel=self.attention_kernel, rows=rows
      )
      dot = lambda a, b: jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
      variance = jnp.sum(flat * dot(covariance, flat), axis=0)
      # Rounding may take the variance of a constant channel below 0.
      variance = jnp.maximum(variance, 0)
      return dot(mean, flat) + bias.reshape(-1), variance, count

    norm = BatchNorm(self.momentum, name="attention_norm")
    mean, scale, shift = norm.factors(moments, channels, train)
    bias = (bias.reshape(-1) - mean) * scale + shift
    return (flat * scale).reshape(kernel.shape), bias.reshape(axes)

  def _check(self) -> None:
    """Refuses options outside their range."""
    if self.variant not in VARIANTS:
      raise ValueError(
        f"variant must be one of {', '.join(VARIANTS)}, got {self.variant!r}."
      )
    if self.scaled not in ("input", "weight"):
      raise ValueError(
        f"scaled must be 'input' or 'weight', got {self.scaled!r}."
      )
    if self.features < 1:
      raise ValueError(f"features must be 1 or more, got {self.features}.")
    _check_odd("kernel", self.kernel)
    _check_odd("attention_kernel", self.attention_kernel)
    _check_rows(self.rows)


def slab_rows(batch: int, height: int, width: int) -> int:
  """How many rows of a batch to take at a time on this device."""
  pixels = SLAB.get(jax.default_backend(), LARGE_SLAB)
  most = max(4, pixels // max(batch * width, 1))
  if most >= height:
    return 0
  return -(-height // -(-height // most))  # As even as can be.


def _check_odd(name: str, size: int) -> None:
  if size < 1 or size % 2 == 0:
    raise ValueError(f"{name} must be odd and at least 1, got {size}.")


def _check_rows(rows: int | None) -> None:
  if rows is not None and rows < 0:
    raise ValueError(f"rows must be 0 or more, got {rows}.")


def _pad(x: Array, halo: int, below: int = 0) -> Array:
  """Zeros around the image, and some more rows below it."""
  wide = [(0, 0)] * (x.ndim - 3)
  sides = [(halo, halo + below), (halo, halo), (0, 0)]
  return jnp.pad(x, wide + sides)


def _adapt(
  padded: Array, attention: Callable[[int], Array], weight: Array
) -> Array:
  """Eq. 3-4 of a padded image: one tap after the other, [.., n, m] of each."""
  size, _, inputs, outputs = weight.shape
  y: Any = 0
  weight = weight.reshape(-1, inputs, outputs)
  for t in range(size**2):
    x, a, w = windows.shift(padded, (size, size), t), attention(t), weight[t]
    if a.shape[-1] == 1:
      y = y + (x * a[..., 0]) @ w
    else:
      y = y + jnp.einsum("...n,...nm->...m", x, a * w)
  return y


def _alike(padded: Array, size: int, tap: int) -> Array:
  """The Gaussian of one tap's difference from the window's middle."""
  seen = functools.partial(windows.shift, padded, (size, size))
  difference = seen(tap) - seen(size**2 // 2)
  square = jnp.sum(difference**2, axis=-1)
  return jnp.exp(-square / 2)[..., None, None]


def _slabs(
  function: Callable[..., Array],
  x: Array,
  raw: Array,
  size: int,
  raw_size: int,
  rows: int,
  parameters: Sequence[Array],
) -> Array:
  """`function` of padded images and parameters, by rows, nothing kept of it."""
  slab = lambda x, raw: function(x, raw, *parameters)
  return _over_rows(slab, (x, raw), (size // 2, raw_size // 2), rows)


def _over_rows(
  function: Callable[..., Array],
  images: Sequence[Array],
  halos: Sequence[int],
  rows: int,
  *,
  join: bool = True,
) -> Array:
  """A function of images padded by their halos, for some rows at a time.

  The loop is over rows and never over the batch, which devices may share. Not
  joined, the slabs' results come along a first axis.
  """
  batch, height = images[0].shape[:2]
  if not 0 < rows < height:
    padded = [_pad(x, halo) for x, halo in zip(images, halos, strict=True)]
    y = jax.checkpoint(function)(*padded)
    return y if join else y[None]
  count = -(-height // rows)

  def cut(x: Array, halo: int) -> Array:
    # Copied once, as slices taken inside the loop would each have a gradient
    # as large as the image.
    padded = _pad(x, halo, count * rows - height)
    tops = np.arange(count) * rows
    return jnp.stack([padded[:, i : i + rows + 2 * halo] for i in tops])

  slabs = [cut(x, halo) for x, halo in zip(images, halos, strict=True)]
  body = jax.checkpoint(lambda s: function(*s), prevent_cse=False)
  y = lax.map(body, slabs)
  if not join:
    return y
  y = jnp.moveaxis(y, 0, 1)
  return y.reshape(batch, count * rows, *y.shape[3:])[:, :height]


def _convolve(x: Array, kernel: Array) -> Array:
  """A plain convolution that keeps the image's size."""
  return windows.conv(x, kernel, padding=kernel.shape[0] // 2)


def _highest(x: Array, size: int, axis: int) -> Array:
  """The highest of `size` neighbours along an axis."""
  half = size // 2
  pad = [(half, half) if a == axis else (0, 0) for a in range(x.ndim)]
  padded = jnp.pad(x, pad, constant_values=-jnp.inf)
  y = lax.slice_in_dim(padded, 0, x.shape[axis], axis=axis)
  for i in range(1, size):
    shifted = lax.slice_in_dim(padded, i, i + x.shape[axis], axis=axis)
    y = jnp.maximum(y, shifted)
  return y


def _bottleneck(
  gate: SqueezeExcitation | BlockAttention | ContextAggregation, channels: int
) -> Callable[[Array], Array]:
  """Two layers of a gate, with fewer channels in between."""
  few = max(1, channels // gate.reduction)
  down = nn.Dense(few, dtype=gate.dtype, kernel_init=INIT, name="down")
  up = nn.Dense(channels, dtype=gate.dtype, kernel_init=INIT, name="up")
  return lambda x: up(nn.relu(down(x)))
