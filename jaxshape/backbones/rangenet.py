"""Networks for LiDAR range images: RangeNet, and SqueezeSegV3's form of it.

An encoder of five stages halves the width and never the height, a decoder of
five undoes it; skips add the encoder's features. Two arrangements: "rangenet"
halves at the start of a stage and has darknet's blocks; "adaptive" halves at
the end, and each block begins with a spatially-adaptive convolution, to which
the coordinates come along, halved with the features.

Parts are called as in the public code (`conv1`, `enc1` with `residual_0`,
`conv`, `bn`; `dec5` with `upconv`; `head1`), except that its `attention_x` and
`position_mlp_2` are `sac`, `bn1`, `conv2` and `bn2` here.

Reference:
  Xu et al., "SqueezeSegV3: Spatially-Adaptive Convolution for Efficient
  Point-Cloud Segmentation", ECCV 2020, Sec. 5.1.
  Milioto et al., "RangeNet++: Fast and Accurate LiDAR Semantic Segmentation",
  IROS 2019, Sec. III-B.
"""

from collections.abc import Mapping, Sequence
from functools import partial
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from jaxshape.backbones.tensors import Tensors
from jaxshape.errors import InputError
from jaxshape.layers import apply, convolution
from jaxshape.typing import Array, ArrayLike, Float, PyTree, typed

Dtype = Any
Features = Float[ArrayLike, "batch height width channels"]

# Blocks per stage.
DEPTHS = {21: (1, 1, 2, 2, 1), 53: (1, 2, 8, 8, 4)}
CHOICES = {
  "arrangement": ("adaptive", "rangenet"),
  "variant": convolution.VARIANTS,
  "heads": ("decoder", "encoder", "final"),
  "coordinates": ("xyz", "all"),
  "depth": tuple(DEPTHS),
  "downsampling": (3, 5),
}
# Options of the published networks.
NAMES = {
  "squeezesegv3_21": {"depth": 21},
  "squeezesegv3_53": {"depth": 53},
  "rangenet_21": {
    "arrangement": "rangenet",
    "depth": 21,
    "variant": "none",
    "downsampling": 5,
    "heads": "final",
  },
  "rangenet_53": {
    "arrangement": "rangenet",
    "depth": 53,
    "variant": "none",
    "downsampling": 5,
    "heads": "final",
  },
}


class Convolution(nn.Module):
  """A convolution padded by half its size, with a stride across.

  Attributes:
    features: Channels of the output.
    size: Side of the window, odd.
    stride: Of the width only.
    use_bias: Whether a bias is added.
    dtype: What is computed in.
  """

  features: int
  size: int
  stride: int = 1
  use_bias: bool = False
  dtype: Dtype = jnp.float32

  @nn.compact
  @typed
  def __call__(
    self, x: Features
  ) -> Float[Array, "batch height _ {self.features}"]:
    """Features in `dtype`."""
    x = jnp.asarray(x, self.dtype)
    shape = (self.size, self.size, x.shape[-1], self.features)
    kernel = self.param("kernel", convolution.INIT, shape).astype(self.dtype)
    pad = (self.size // 2, self.size // 2)
    if self.size == 1 and self.stride == 1:
      y = x @ kernel[0, 0]
    else:
      y = lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(1, self.stride),
        padding=[pad, pad],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
      )
    if not self.use_bias:
      return y
    bias = self.param("bias", nn.initializers.zeros, (self.features,))
    return y + bias.astype(self.dtype)


class Upsampling(nn.Module):
  """A transposed convolution of 1 x 4 that doubles the width.

  y[2q - 1 + j] = sum over q, j of x[q] W[j], and a bias.

  Attributes:
    features: Channels of the output.
    dtype: What is computed in.
  """

  features: int
  dtype: Dtype = jnp.float32

  @nn.compact
  @typed
  def __call__(
    self, x: Features
  ) -> Float[Array, "batch height 2*width {self.features}"]:
    """Features in `dtype`."""
    x = jnp.asarray(x, self.dtype)
    shape = (1, 4, x.shape[-1], self.features)
    kernel = self.param("kernel", convolution.INIT, shape).astype(self.dtype)
    bias = self.param("bias", nn.initializers.zeros, (self.features,))
    y = lax.conv_general_dilated(
      x,
      kernel[:, ::-1],
      window_strides=(1, 1),
      padding=[(0, 0), (2, 2)],
      lhs_dilation=(1, 2),
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return y + bias.astype(self.dtype)


class Settings(NamedTuple):
  """What all parts of one network share."""

  train: bool
  dtype: Dtype
  dropout: float
  sac: Mapping[str, Any]

  def norm(self, name: str, momentum: float = 0.01) -> Any:
    """Batch normalization, to be called with features."""
    module = convolution.BatchNorm(momentum, dtype=self.dtype, name=name)
    return partial(module, train=self.train)

  def drop(self, x: Array) -> Array:
    """Drops whole channels of whole images in training."""
    layer = nn.Dropout(self.dropout, broadcast_dims=(1, 2))
    return layer(x, deterministic=not self.train)


class DarknetBlock(nn.Module):
  """1x1 and 3x3 convolutions and a shortcut.

  Attributes:
    narrow: Channels in between.
    settings: What the network's parts share.
  """

  narrow: int
  settings: Settings

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Features in the network's `dtype`."""
    conv = partial(Convolution, dtype=self.settings.dtype)
    y = conv(self.narrow, 1, name="conv1")(x)
    y = _leaky(self.settings.norm("bn1")(y))
    y = conv(x.shape[-1], 3, name="conv2")(y)
    return x + _leaky(self.settings.norm("bn2")(y))


class AdaptiveBlock(nn.Module):
  """A spatially-adaptive and a plain 3x3 convolution, and a shortcut.

  Attributes:
    settings: What the network's parts share.
  """

  settings: Settings

  @nn.compact
  def __call__(self, x: Array, coordinates: Array) -> Array:
    """Features in the network's `dtype`."""
    settings, channels = self.settings, x.shape[-1]
    sac = convolution.SpatiallyAdaptiveConv(
      channels, dtype=settings.dtype, name="sac", **settings.sac
    )
    y = sac(x, coordinates, train=settings.train)
    y = nn.relu(settings.norm("bn1", 0.1)(y))
    conv = Convolution(
      channels, 3, use_bias=True, dtype=settings.dtype, name="conv2"
    )
    return x + nn.relu(settings.norm("bn2", 0.1)(conv(y)))


class Encoder(nn.Module):
  """One stage of the encoder.

  Attributes:
    blocks: How many.
    features: Channels at the end of the stage.
    stride: 2 where it halves the width.
    adaptive: Which arrangement.
    settings: What the network's parts share.
  """

  blocks: int
  features: int
  stride: int
  adaptive: bool
  settings: Settings

  @nn.compact
  def __call__(self, x: Array, coordinates: Array) -> tuple[Array, Array]:
    """The last block's output, and the stage's, which may be narrower."""
    conv = Convolution(
      self.features, 3, self.stride, dtype=self.settings.dtype, name="conv"
    )
    norm = self.settings.norm("bn")
    if not self.adaptive:
      narrow = x.shape[-1]
      x = _leaky(norm(conv(x)))
      for i in range(self.blocks):
        x = DarknetBlock(narrow, self.settings, name=f"residual_{i}")(x)
      return x, x
    for i in range(self.blocks):
      x = AdaptiveBlock(self.settings, name=f"residual_{i}")(x, coordinates)
    # Without halving the public code has no convolution here, as the channels
    # stay as they are.
    return x, x if self.stride == 1 else _leaky(norm(conv(x)))


class Decoder(nn.Module):
  """One stage of the decoder.

  Attributes:
    features: Channels at the end of the stage.
    stride: 2 where it doubles the width.
    settings: What the network's parts share.
  """

  features: int
  stride: int
  settings: Settings

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Features in the network's `dtype`."""
    narrow, dtype = x.shape[-1], self.settings.dtype
    if self.stride == 2:
      x = Upsampling(self.features, dtype, name="upconv")(x)
    else:
      conv = Convolution(
        self.features, 3, use_bias=True, dtype=dtype, name="conv"
      )
      x = conv(x)
    x = _leaky(self.settings.norm("bn")(x))
    return DarknetBlock(narrow, self.settings, name="residual")(x)


class RangeNet(nn.Module):
  """A segmentation network for range images.

  Attributes:
    num_classes: Number of logits, 0 being "unlabeled".
    depth: 21 or 53.
    arrangement: `"adaptive"` as SqueezeSegV3, `"rangenet"` as RangeNet.
    variant: The first convolution of each adaptive block: one of
      `convolution.VARIANTS`. RangeNet's blocks have `"none"` only.
    downsampling: How many stages halve the width. With 3 the last stages have
      8 times `width` channels, with 5 the channels double to the end.
    heads: Where there are predictions: `"decoder"` on its five stages, as the
      public code; `"encoder"` on those of the encoder and on the network's
      end, as the paper; `"final"` on the network's end only.
    width: Channels at full width, 32 in the public code.
    attention_kernel: Side of the attention's convolution, odd.
    normalize: Whether the attention is normalized before its sigmoid.
    scaled: As in `convolution.SpatiallyAdaptiveConv`.
    coordinates: What the attention sees: `"xyz"` as the public code, or
      `"all"` of the image as the paper.
    detach_skips: Whether no gradient flows through the skips, as in the public
      code.
    dropout: Share of channels dropped after each stage and before the heads.
    rows: Height of the slabs, as in `convolution.SpatiallyAdaptiveConv`.
    dtype: What is computed in; parameters, statistics and logits are float32.

  Reference:
    Xu et al., "SqueezeSegV3: Spatially-Adaptive Convolution for Efficient
    Point-Cloud Segmentation", ECCV 2020, Sec. 5.1 and Eq. 5.

  Note:
    The paper halves at the start of a stage, predicts from the encoder, and
    computes the attention from the whole image by a convolution alone. The
    defaults are the public code's, whose trained weights they fit.
  """

  num_classes: int
  depth: int = 21
  arrangement: str = "adaptive"
  variant: str = "isk"
  downsampling: int = 3
  heads: str = "decoder"
  width: int = 32
  attention_kernel: int = 7
  normalize: bool = True
  scaled: str = "input"
  coordinates: str = "xyz"
  detach_skips: bool = True
  dropout: float = 0.01
  rows: int | None = None
  dtype: Dtype = jnp.float32

  @nn.compact
  @typed
  def __call__(
    self, image: Float[ArrayLike, "batch height width 5"], *, train: bool
  ) -> tuple[Float[Array, "batch height _ {self.num_classes}"], ...]:
    """Logits, finest first.

    Args:
      image: Range, x, y, z and remission, normalized; empty pixels are 0. Any
        height; a width that `2**downsampling` divides.
      train: Whether to normalize by the batch, to update its statistics, and
        to drop channels, which takes a key.

    Returns:
      With heads on the decoder five logits, of the image's width divided by
      1, 2, 4, 8, 8 if three stages halve it, else 1, 2, 4, 8, 16; with heads
      on the encoder six, those of the network's end and then of the blocks of
      its five stages, of the same five widths (halved where the arrangement is
      "rangenet"); else those of the network's end alone.

    Raises:
      InputError: The width does not divide.
      ValueError: An option is outside its range.
    """
    self.check(jnp.shape(image))
    image = jnp.asarray(image, jnp.float32)
    settings = Settings(
      train,
      self.dtype,
      self.dropout,
      {
        "variant": self.variant,
        "attention_kernel": self.attention_kernel,
        "normalize": self.normalize,
        "scaled": self.scaled,
        "rows": self.rows,
      },
    )
    raw = image[..., 1:4] if self.coordinates == "xyz" else image
    x = Convolution(self.width, 3, dtype=self.dtype, name="conv1")(image)
    x = _leaky(settings.norm("bn1")(x))
    skips, stages = [], []
    plan = _plan(self.width, self.downsampling)
    for i, (_, features, stride) in enumerate(plan):
      if stride == 2:
        skips.append(lax.stop_gradient(x) if self.detach_skips else x)
      encoder = Encoder(
        DEPTHS[self.depth][i],
        features,
        stride,
        self.arrangement != "rangenet",
        settings,
        name=f"enc{i + 1}",
      )
      inner, x = encoder(x, raw)
      stages.append(inner)
      x = settings.drop(x)
      if stride == 2:
        raw = halve(raw)
    levels = []
    for i, (features, _, stride) in reversed(list(enumerate(plan))):
      x = Decoder(features, stride, settings, name=f"dec{i + 1}")(x)
      if stride == 2:
        x = x + skips.pop()
      levels.append(x)
    levels[-1] = settings.drop(x)
    return self._predict(levels, stages, settings)

  def _predict(
    self, levels: Sequence[Array], stages: Sequence[Array], settings: Settings
  ) -> tuple[Array, ...]:
    """Logits of the decoder's stages, coarsest first, and the encoder's."""
    sources = {"head": levels[-1]}
    if self.heads == "decoder":
      names = [f"head{i}" for i in range(5, 0, -1)]
      sources = dict(zip(names, reversed(levels), strict=True))
    elif self.heads == "encoder":
      sources |= {f"head{i}": x for i, x in enumerate(stages, 1)}
    logits = []
    for name, x in sources.items():
      head = Convolution(
        self.num_classes,
        3 if x is levels[-1] else 1,
        use_bias=True,
        dtype=self.dtype,
        name=name,
      )
      logits.append(head(settings.drop(x)).astype(jnp.float32))
    return tuple(logits)

  @nn.nowrap
  def check(self, shape: Sequence[int]) -> None:
    """Refuses options and images that do not fit.

    Args:
      shape: Of the images: `[batch, height, width, 5]`.

    Raises:
      ValueError: An option is none of the choices, or outside its range.
      InputError: The width cannot be halved often enough.
    """
    for name, choices in CHOICES.items():
      value = getattr(self, name)
      if value not in choices:
        raise ValueError(
          f"{name} must be one of {', '.join(map(str, choices))}, got "
          f"{value!r}."
        )
    if self.arrangement == "rangenet" and self.variant != "none":
      raise ValueError(
        "variant must be 'none' where arrangement is 'rangenet', got "
        f"{self.variant!r}."
      )
    for name in ("num_classes", "width"):
      if getattr(self, name) < 1:
        raise ValueError(
          f"{name} must be 1 or more, got {getattr(self, name)}."
        )
    if not 0 <= self.dropout < 1:
      raise ValueError(
        f"dropout must be at least 0 and below 1, got {self.dropout}."
      )
    width, step = shape[2], 2**self.downsampling
    if width % step or width == 0:
      below, above = width // step * step, (width // step + 1) * step
      near = f"{below} or {above}" if below else f"{above}"
      raise InputError(
        f"the range image's width must be divisible by {step} "
        f"(downsampling={self.downsampling}), got {width}; use {near}."
      )
    if shape[1] == 0 or shape[0] == 0:
      raise InputError(
        f"the range images must hold pixels, got the shape {tuple(shape)}."
      )


@typed
def halve(
  x: Float[ArrayLike, "*batch height width channels"],
) -> Float[Array, "*batch height width//2 channels"]:
  """Halves an even width by linear interpolation, the corners staying.

  y[i] = (1 - f) x[2i] + f x[2i + 1], f = i / (width / 2 - 1): from the left
  corner to the right one, as `torch.nn.functional.interpolate` has it with
  `align_corners=True`.

  Args:
    x: Images of an even width.

  Returns:
    The images at half the width.

  Reference:
    Xu et al., "SqueezeSegV3: Spatially-Adaptive Convolution for Efficient
    Point-Cloud Segmentation", ECCV 2020, its public code.
  """
  x = jnp.asarray(x)
  n = x.shape[-2] // 2
  if x.shape[-2] % 2:
    raise ValueError(f"width must be even, got {x.shape[-2]}.")
  f = jnp.asarray(np.arange(n) / max(n - 1, 1), x.dtype)[:, None]
  pairs = x.reshape(*x.shape[:-2], n, 2, x.shape[-1])
  return (1 - f) * pairs[..., 0, :] + f * pairs[..., 1, :]


# How the public code calls the parts of an adaptive block, where it has them.
PUBLIC = {
  "sac.attention_kernel": "attention_x.0.kernel",
  "sac.attention_bias": "attention_x.0.bias",
  "sac.attention_norm": "attention_x.1",
  "sac.gate": "attention_x",
  "sac": "position_mlp_2.0",
  "bn1": "position_mlp_2.1",
  "conv2": "position_mlp_2.3",
  "bn2": "position_mlp_2.4",
}
LEAVES = {
  "kernel": "weight",
  "scale": "weight",
  "mean": "running_mean",
  "var": "running_var",
}


@typed
def to_state_dict(
  net: RangeNet, params: PyTree, collections: PyTree
) -> dict[str, np.ndarray]:
  """Parameters and statistics, as the public PyTorch code calls them.

  Its keys begin with "backbone.", "decoder." and "head"; the layouts are
  PyTorch's. Parts that it does not have (other variants of the convolution)
  get names after the same rule.

  Args:
    net: The network.
    params: Its parameters.
    collections: Its other collections.

  Returns:
    Arrays by key.
  """
  stats = collections.get("batch_stats", {})
  tensors = {}
  for tree in (params, stats):
    for path, leaf in _leaves(tree):
      layout = _layout(net, path, np.shape(leaf))
      array = np.asarray(leaf).reshape(layout.split).transpose(layout.order)
      tensors[_key(net, path)] = array.reshape(layout.shape).copy()
  return tensors


@typed
def from_state_dict(
  net: RangeNet, tensors: Mapping[str, Any]
) -> tuple[PyTree, PyTree]:
  """Parameters and statistics from those of the public PyTorch code.

  Args:
    net: The network that they are for.
    tensors: Arrays by key, as in `to_state_dict`. A "module." before every key
      and counters of batches are passed over.

  Returns:
    The parameters and the other collections.

  Raises:
    InputError: Keys are missing, or not known, or an array has another shape.
  """
  init = partial(apply.init, net, train=False)
  image = jax.ShapeDtypeStruct((1, 1, 2**net.downsampling, 5), jnp.float32)
  key = jax.random.key(0)
  params, collections = jax.eval_shape(lambda x: init(key, x), image)
  given = Tensors(tensors)

  def read(path: tuple[str, ...], leaf: jax.ShapeDtypeStruct) -> Any:
    layout = _layout(net, path, leaf.shape)
    value = given.take(_key(net, path), layout.shape)
    if value is None:
      return None
    split = [layout.split[i] for i in layout.order]
    array = value.reshape(split).transpose(np.argsort(layout.order))
    return array.reshape(leaf.shape).astype(leaf.dtype)

  trees = [
    _unflatten([(p, read(p, leaf)) for p, leaf in _leaves(tree)])
    for tree in (params, collections.get("batch_stats", {}))
  ]
  given.finish(
    f"RangeNet-{net.depth} with {net.num_classes} classes "
    f"(arrangement={net.arrangement!r}, variant={net.variant!r}, "
    f"heads={net.heads!r})"
  )
  return trees[0], {"batch_stats": trees[1]}


def _leaky(x: Array) -> Array:
  return nn.leaky_relu(x, 0.1)


def _plan(width: int, downsampling: int) -> list[tuple[int, int, int]]:
  """Channels before and after each stage of the encoder, and its stride."""
  most = width * 2**downsampling
  steps = [min(width * 2**i, most) for i in range(6)]
  strides = [2] * downsampling + [1] * (5 - downsampling)
  return list(zip(steps[:-1], steps[1:], strides, strict=True))


def _leaves(tree: PyTree) -> list[tuple[tuple[str, ...], Any]]:
  """Paths and leaves of nested dicts."""
  flat = jax.tree_util.tree_flatten_with_path(tree)[0]
  return [(tuple(str(k.key) for k in path), leaf) for path, leaf in flat]


def _unflatten(leaves: Sequence[tuple[tuple[str, ...], Any]]) -> PyTree:
  tree: dict[str, Any] = {}
  for path, leaf in leaves:
    node = tree
    for name in path[:-1]:
      node = node.setdefault(name, {})
    node[path[-1]] = leaf
  return tree


def _key(net: RangeNet, path: Sequence[str]) -> str:
  """The public name of one of our parameters."""
  *parts, leaf = path
  if parts[0].startswith("head"):
    return f"{parts[0]}.1.{LEAVES.get(leaf, leaf)}"
  top = "decoder" if parts[0].startswith("dec") else "backbone"
  name = ".".join([*parts[2:], leaf])
  if net.arrangement != "rangenet" and parts[1:2] and "residual_" in parts[1]:
    ours = next(x for x in PUBLIC if name == x or name.startswith(f"{x}."))
    name = PUBLIC[ours] + name.removeprefix(ours)
  *inner, leaf = name.split(".")
  return ".".join([top, *parts[:2], *inner, LEAVES.get(leaf, leaf)])


class Layout(NamedTuple):
  """How PyTorch holds an array: reshaped, transposed, reshaped again."""

  split: tuple[int, ...]
  order: tuple[int, ...]
  shape: tuple[int, ...]


def _layout(
  net: RangeNet, path: Sequence[str], shape: tuple[int, ...]
) -> Layout:
  leaf = path[-1]
  # PyTorch unfolds an image channel by channel, and in each tap by tap.
  by_tap = convolution.LEARNED.get(net.variant, (net.variant == "pac",))[0]
  taps = 9 if by_tap else 1
  if leaf == "attention_kernel":
    size, _, inputs = shape[:3]
    rest = math.prod(shape[3:]) // taps
    return Layout(
      (size, size, inputs, taps, rest),
      (4, 3, 2, 0, 1),
      (rest * taps, inputs, size, size),
    )
  if leaf == "attention_bias" or "attention_norm" in path:
    number = math.prod(shape)
    return Layout((taps, number // taps), (1, 0), (number,))
  if len(shape) < 3:
    order = tuple(reversed(range(len(shape))))
    return Layout(shape, order, shape[::-1])
  height, width, inputs, outputs = shape
  if "upconv" in path:
    return Layout(shape, (2, 3, 0, 1), (inputs, outputs, height, width))
  order = (3, 2, 0, 1)
  if by_tap and path[-2] == "sac":
    return Layout(shape, order, (outputs, inputs * taps, 1, 1))
  return Layout(shape, order, (outputs, inputs, height, width))
