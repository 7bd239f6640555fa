"""Residual networks: torchvision's shapes and names, channels last.

Parts are called as there (`conv1`, `layer1_0` for its `layer1.0`, `bn2`, `fc`;
`downsample_conv` and `downsample_bn` for `downsample.0` and `.1`), and trained
weights are carried over by `from_state_dict`: a kernel is [height, width, in,
out], the bottleneck has its stride on the 3x3 convolution ("v1.5"), and images
of several sizes go in one batch with a mask. Parameters, batch
statistics and logits are float32; `dtype` is what is computed in between. The
batch statistics are those of the whole batch, however many devices share it.

Reference:
  He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, Sec. 3
  and Table 1.
"""

from collections.abc import Mapping, Sequence
from functools import partial
import re
from typing import Any, NamedTuple

from flax import traverse_util
import flax.linen as nn
from jax import lax
import jax.numpy as jnp
import numpy as np

from jaxshape.backbones import registry
from jaxshape.backbones.tensors import LEAVES, Tensors, shapes, transposed
from jaxshape.layers import windows
from jaxshape.typing import Array, ArrayLike, Bool, Float, PyTree, typed

Dtype = Any
Features = Float[ArrayLike, "batch height width channels"]
Mask = Bool[ArrayLike, "batch height width"]


class Variant(NamedTuple):
  """What the name of a network stands for."""

  stage_sizes: tuple[int, ...]
  block: str
  width: int
  stem: str


# The first three are for small images (Sec. 4.2), with projections as shortcuts
# where the paper pads with zeros.
VARIANTS = {
  "resnet8": Variant((1, 1, 1), "basic", 16, "small"),
  "resnet14": Variant((2, 2, 2), "basic", 16, "small"),
  "resnet20": Variant((3, 3, 3), "basic", 16, "small"),
  "resnet18": Variant((2, 2, 2, 2), "basic", 64, "imagenet"),
  "resnet34": Variant((3, 4, 6, 3), "basic", 64, "imagenet"),
  "resnet50": Variant((3, 4, 6, 3), "bottleneck", 64, "imagenet"),
  "resnet101": Variant((3, 4, 23, 3), "bottleneck", 64, "imagenet"),
  "resnet152": Variant((3, 8, 36, 3), "bottleneck", 64, "imagenet"),
}
HEAD = "fc"


class Convolution(nn.Module):
  """A convolution without bias, padded by half its size on every side."""

  features: int
  size: int
  stride: int = 1
  dtype: Dtype = jnp.float32

  @nn.compact
  @typed
  def __call__(self, x: Features) -> Float[Array, "batch _ _ {self.features}"]:
    """Features in `dtype`."""
    x = jnp.asarray(x, self.dtype)
    kernel = self.param(
      "kernel",
      nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
      (self.size, self.size, x.shape[-1], self.features),
    ).astype(self.dtype)
    if self.size == 1:  # As a product: 1.2 to 1.4 times faster on CPUs.
      x = x[:, :: self.stride, :: self.stride]
      return jnp.einsum("bhwc,cd->bhwd", x, kernel[0, 0])
    return windows.conv(x, kernel, stride=self.stride, padding=self.size // 2)


class Basic(nn.Module):
  """Two 3x3 convolutions and a shortcut (Fig. 5, left)."""

  width: int
  stride: int
  zero_init: bool
  dtype: Dtype

  expansion = 1

  @nn.compact
  @typed
  def __call__(
    self, x: Features, *, train: bool, mask: Mask | None = None
  ) -> Float[Array, "batch _ _ {self.width}"]:
    """Features in `dtype`, not negative."""
    conv = partial(Convolution, self.width, 3, dtype=self.dtype)
    norm = partial(_norm, train, self.dtype)
    after = _strided(mask, self.stride)
    y = conv(stride=self.stride, name="conv1")(x)
    y = _within(nn.relu(norm(name="bn1")(y)), after)
    y = conv(name="conv2")(y)
    y = norm(name="bn2", zero=self.zero_init)(y)
    y = nn.relu(_shortcut(x, y, self.stride, train, self.dtype) + y)
    return _within(y, after)


class Bottleneck(nn.Module):
  """1x1, 3x3 and 1x1 convolutions and a shortcut (Fig. 5, right)."""

  width: int
  stride: int
  zero_init: bool
  dtype: Dtype

  expansion = 4

  @nn.compact
  @typed
  def __call__(
    self, x: Features, *, train: bool, mask: Mask | None = None
  ) -> Float[Array, "batch _ _ {4*self.width}"]:
    """Features in `dtype`, not negative."""
    conv = partial(Convolution, dtype=self.dtype)
    norm = partial(_norm, train, self.dtype)
    after = _strided(mask, self.stride)
    y = conv(self.width, 1, name="conv1")(x)
    y = _within(nn.relu(norm(name="bn1")(y)), mask)
    y = conv(self.width, 3, stride=self.stride, name="conv2")(y)
    y = nn.relu(norm(name="bn2")(y))
    y = conv(self.expansion * self.width, 1, name="conv3")(y)
    y = norm(name="bn3", zero=self.zero_init)(y)
    y = nn.relu(_shortcut(x, y, self.stride, train, self.dtype) + y)
    return _within(y, after)


class ResNet(nn.Module):
  """A residual network, in two halves: spatial features, and the head on them.

  Attributes:
    stage_sizes: Blocks per stage; every stage but the first halves the image.
    block: `"basic"` or `"bottleneck"`.
    num_classes: Number of logits, at least 1.
    width: Channels of the stem and of the first stage's 3x3 convolutions; each
      further stage has twice those of the one before.
    stem: `"imagenet"` divides the image's sides by 4, `"small"` keeps them.
    zero_init: Whether each block starts as the identity (Goyal et al.,
      "Accurate, Large Minibatch SGD", 2017, Sec. 5.1).
    dtype: What is computed in.
  """

  stage_sizes: Sequence[int]
  block: str
  num_classes: int
  width: int = 64
  stem: str = "imagenet"
  zero_init: bool = True
  dtype: Dtype = jnp.float32

  def setup(self) -> None:
    """Names the parts as torchvision does."""
    blocks = {"basic": Basic, "bottleneck": Bottleneck}
    if self.block not in blocks:
      raise ValueError(
        f"block must be 'basic' or 'bottleneck', got {self.block!r}."
      )
    stems = {"imagenet": (7, 2), "small": (3, 1)}
    if self.stem not in stems:
      raise ValueError(
        f"stem must be one of {', '.join(stems)}, got {self.stem!r}."
      )
    if self.num_classes < 1:
      raise ValueError(
        f"num_classes must be 1 or more, got {self.num_classes}."
      )
    size, stride = stems[self.stem]
    self.conv1 = Convolution(self.width, size, stride, self.dtype)
    self.bn1 = nn.BatchNorm(momentum=0.9, epsilon=1e-5, dtype=self.dtype)
    for stage, count in enumerate(self.stage_sizes):
      layers = [
        blocks[self.block](
          width=self.width * 2**stage,
          stride=2 if stage > 0 and i == 0 else 1,
          zero_init=self.zero_init,
          dtype=self.dtype,
        )
        for i in range(count)
      ]
      setattr(self, f"layer{stage + 1}", layers)
    self.fc = nn.Dense(
      self.num_classes,
      kernel_init=nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
    )

  @typed
  def __call__(
    self, images: Features, *, train: bool
  ) -> Float[Array, "batch {self.num_classes}"]:
    """Logits of normalized images."""
    return self.head(self.features(images, train=train))

  @typed
  def features(
    self, images: Features, *, train: bool, mask: Mask | None = None
  ) -> Float[Array, "batch _ _ _"]:
    """The last spatial features, from normalized images.

    Args:
      images: Normalized, not 0..255.
      train: Whether to normalize by the batch and to update its statistics.
      mask: True in the upper left corner that is each image's own, for images
        of several sizes in one batch. Their features are those that they have
        alone, at `mask[:, ::stride, ::stride]`, and 0 elsewhere.

    Returns:
      Features in `dtype`, not negative.

    Raises:
      ValueError: There is a mask in training, where padding would count.
    """
    return self.stages(images, train=train, mask=mask)[-1]

  @typed
  def stages(
    self, images: Features, *, train: bool, mask: Mask | None = None
  ) -> tuple[Float[Array, "batch _ _ _"], ...]:
    """The spatial features after every stage, from normalized images.

    Args:
      images: See `features`.
      train: See `features`.
      mask: See `features`.

    Returns:
      Features in `dtype`, not negative, of the first stage to the last, which
      are those of `features`.

    Raises:
      ValueError: See `features`.
    """
    if mask is not None and train:
      raise ValueError("mask must be None in training, got an array.")
    # A convolution pads with 0, and that is what a mask leaves around an image.
    # Half of n pixels are the whole part of (n + 1) / 2 in every layer, as many
    # as every other one from the first on.
    x = self.conv1(images if mask is None else _within(images, mask))
    x = nn.relu(self.bn1(x, use_running_average=not train))
    if self.stem == "imagenet":
      mask = _strided(mask, 2)
      x = _halve(_within(x, mask))
      mask = _strided(mask, 2)
    x = _within(x, mask)
    out = []
    for stage in range(len(self.stage_sizes)):
      for i, layer in enumerate(getattr(self, f"layer{stage + 1}")):
        x = layer(x, train=train, mask=mask)
        mask = _strided(mask, 2 if stage > 0 and i == 0 else 1)
      out.append(x)
    return tuple(out)

  @property
  def stride(self) -> int:
    """How many pixels lie between two of the features."""
    return (4 if self.stem == "imagenet" else 1) * 2 ** (
      len(self.stage_sizes) - 1
    )

  @typed
  def head(
    self, features: Float[ArrayLike, "*batch height width channels"]
  ) -> Float[Array, "*batch {self.num_classes}"]:
    """Logits from spatial features: their mean, and one linear layer."""
    return self.fc(jnp.mean(features, axis=(-3, -2), dtype=jnp.float32))


@typed
def make(
  name: str,
  *,
  num_classes: int,
  width: int | None = None,
  stem: str | None = None,
  zero_init: bool = True,
  dtype: Dtype = jnp.float32,
) -> ResNet:
  """The network of a name.

  Args:
    name: One of `VARIANTS`.
    num_classes: Number of logits.
    width: Channels of the first stage; None for the name's own.
    stem: `"imagenet"` or `"small"`; None for the name's own.
    zero_init: Whether each block starts as the identity.
    dtype: What is computed in.

  Returns:
    The module.

  Raises:
    InputError: There is no such name.
  """
  variant = registry.variant(name, VARIANTS)
  return ResNet(
    stage_sizes=variant.stage_sizes,
    block=variant.block,
    num_classes=num_classes,
    width=variant.width if width is None else width,
    stem=variant.stem if stem is None else stem,
    zero_init=zero_init,
    dtype=dtype,
  )


# Parts of a network by their place in it, where PyTorch has them in a sequence:
# the rectifier, the pooling and their like are places, too.
_PLACES = {
  "conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6",
  "layer4": "7",
}  # fmt: skip
# What the retrieval networks of the public code have besides their features.
_RETRIEVAL = ("pool.", "whiten.", "lwhiten.")


@typed
def to_state_dict(
  net: ResNet, params: PyTree, collections: PyTree, *, form: str = "torchvision"
) -> dict[str, np.ndarray]:
  """Parameters and statistics, as PyTorch's networks call them.

  Args:
    net: The network.
    params: Its parameters, with or without those of the head.
    collections: Its other collections.
    form: "torchvision" (`layer1.0.conv1.weight`, `fc.bias`), or "retrieval"
      for the features of a retrieval network (`features.4.0.conv1.weight`,
      without the head).

  Returns:
    Arrays by key, in PyTorch's layouts.

  Raises:
    ValueError: There is no such form.
  """
  if form not in ("torchvision", "retrieval"):
    raise ValueError(
      f"form must be 'torchvision' or 'retrieval', got {form!r}."
    )
  del net  # Parts are called alike in all of them.
  prefix = None if form == "torchvision" else "features."
  tensors = {}
  for tree in (params, collections.get("batch_stats", {})):
    for path, leaf in traverse_util.flatten_dict(tree).items():
      if path[0] != "fc" or prefix is None:
        tensors[_key(path, prefix)] = transposed(np.asarray(leaf)).copy()
  return tensors


@typed
def from_state_dict(
  net: ResNet, tensors: Mapping[str, Any], *, head: bool = True
) -> tuple[PyTree, PyTree]:
  """Parameters and statistics from those of PyTorch's networks.

  The names say by themselves whose they are: torchvision's (`conv1.weight`,
  `layer1.0.bn1.bias`), or those of the public retrieval networks, where parts
  are counted (`features.4.0.bn1.bias`, or `4.0.bn1.bias` of the features
  alone). Those have no head, and their `pool.*`, `whiten.*` and `lwhiten.*` are
  passed over, as are a "module." before every key and counters of batches.

  Args:
    net: The network that they are for.
    tensors: Arrays by key.
    head: Whether torchvision's head is wanted; without it (another number of
      classes) only `net.features` can be called.

  Returns:
    The parameters and the other collections; the parameters lack "fc" where
    there is no head.

  Raises:
    InputError: Keys are missing, or not known, or an array has another shape.

  Reference:
    Radenovic et al., "Fine-tuning CNN Image Retrieval with No Human
    Annotation", TPAMI 2019, its public code, for the names.
  """
  given = Tensors(tensors)
  prefix, ignored = None, ()
  if any(name.startswith("features.") for name in given.given):
    prefix, ignored = "features.", _RETRIEVAL
  elif any(re.match(r"\d+\.", name) for name in given.given):
    prefix = ""
  elif not head:
    ignored = "fc."
  given.drop(ignored)
  params, collections = shapes(net)
  if prefix is not None or not head:
    params = {name: part for name, part in params.items() if name != "fc"}

  name = lambda path: _key(path, prefix)
  filled = given.fill(params, name)
  statistics = given.fill(collections["batch_stats"], name)
  given.finish(
    f"a residual network of {net.block} blocks {tuple(net.stage_sizes)}, width "
    f"{net.width} and {net.num_classes} classes"
  )
  return filled, {"batch_stats": statistics}


def _key(path: Sequence[str], prefix: str | None) -> str:
  """PyTorch's name of one of our parameters; by places with a prefix."""
  first, *inner, leaf = path
  part, *number = first.split("_")
  if prefix is not None:
    part = prefix + _PLACES[part]
  inner = [
    {"downsample_conv": "downsample.0", "downsample_bn": "downsample.1"}.get(
      name, name
    )
    for name in inner
  ]
  return ".".join([part, *number, *inner, LEAVES.get(leaf, leaf)])


def _strided(mask: Any, stride: int) -> Any:
  """The mask of what a layer of this stride makes of an image."""
  return mask if mask is None else jnp.asarray(mask)[:, ::stride, ::stride]


def _within(x: ArrayLike, mask: Any) -> Array:
  """Zeros outside of the images."""
  x = jnp.asarray(x)
  return x if mask is None else jnp.where(jnp.asarray(mask)[..., None], x, 0)


def _norm(
  train: bool, dtype: Dtype, *, name: str, zero: bool = False
) -> nn.BatchNorm:
  return nn.BatchNorm(
    use_running_average=not train,
    momentum=0.9,
    epsilon=1e-5,
    dtype=dtype,
    scale_init=nn.initializers.zeros if zero else nn.initializers.ones,
    name=name,
  )


def _shortcut(
  x: ArrayLike, y: Array, stride: int, train: bool, dtype: Dtype
) -> Array:
  """The block's input, projected where the shape changes (Eq. 2)."""
  channels = y.shape[-1]
  if stride == 1 and jnp.shape(x)[-1] == channels:
    return jnp.asarray(x, dtype)
  conv = Convolution(channels, 1, stride, dtype, name="downsample_conv")
  return _norm(train, dtype, name="downsample_bn")(conv(x))


def _halve(x: Array) -> Array:
  """3x3 max pooling of stride 2, padded by 1: down, then across.

  As slices, because the gradient of `reduce_window` takes four times as long on
  CPUs.
  """
  for axis in (1, 2):
    n = x.shape[axis]
    pad = [(1, 1) if a == axis else (0, 0) for a in range(4)]
    padded = jnp.pad(x, pad, constant_values=-jnp.inf)
    a, b, c = (
      lax.slice_in_dim(padded, i, i + 2 * ((n + 1) // 2) - 1, 2, axis)
      for i in range(3)
    )
    x = jnp.maximum(jnp.maximum(a, b), c)
  return x
