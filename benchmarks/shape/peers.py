"""The peers: PyTorch from the equations, plain JAX, and PIL.

Networks are functions of the public state dicts, so that all forms have the
same weights. Images of PyTorch are [batch, channels, height, width].
"""

from collections.abc import Callable, Mapping
import importlib
import io
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.filters import Peer

Tensors = Mapping[str, Any]
load: Callable[[str], Any] = importlib.import_module
# What images 0..255 are normalized by where a network is attacked.
MEAN, STD = 127.5, 64.0


# Style transfer.


def _convolved(torch: Any, tensors: Tensors, number: str, x: Any) -> Any:
  functional = torch.nn.functional
  weight = tensors[f"{number}.weight"]
  if weight.shape[-1] > 1:
    x = functional.pad(x, (1, 1, 1, 1), mode="reflect")
  return functional.conv2d(x, weight, tensors[f"{number}.bias"])


def _in_order(tensors: Tensors) -> list[str]:
  return sorted({name.split(".")[0] for name in tensors}, key=int)


def torch_encoder(torch: Any, tensors: Tensors, x: Any) -> Any:
  """VGG-19 up to relu4_1, pooled after relu1_2, relu2_2 and relu3_4."""
  first, *rest = _in_order(tensors)
  x = _convolved(torch, tensors, first, x)
  for i, number in enumerate(rest, 1):
    x = torch.relu(_convolved(torch, tensors, number, x))
    if i in (2, 4, 8):
      x = torch.nn.functional.max_pool2d(x, 2, 2, ceil_mode=True)
  return x


def torch_decoder(torch: Any, tensors: Tensors, x: Any) -> Any:
  """The mirror image: twice as large before what undoes relu3_4 and so on."""
  *first, last = _in_order(tensors)
  for i, number in enumerate(first, 1):
    x = torch.relu(_convolved(torch, tensors, number, x))
    if i in (1, 5, 7):
      x = torch.nn.functional.interpolate(x, scale_factor=2, mode="nearest")
  return _convolved(torch, tensors, last, x)


def torch_stylize(
  torch: Any, encoder: Tensors, decoder: Tensors, content: Any, style: Any
) -> Any:
  """AdaIN (Huang and Belongie 2017, Eq. 8), of images 0..255."""
  f, g = (torch_encoder(torch, encoder, x / 255) for x in (content, style))
  moments = lambda x: (
    x.mean((2, 3), keepdim=True),
    (x.var((2, 3), keepdim=True) + 1e-5).sqrt(),
  )
  (mean, deviation), (wanted, size) = moments(f), moments(g)
  target = size * (f - mean) / deviation + wanted
  return (255 * torch_decoder(torch, decoder, target)).clamp(0, 255)


# Attacks.


def torch_resnet(torch: Any, tensors: Tensors, x: Any) -> Any:
  """Logits of a network of basic blocks, by torchvision's names."""
  functional = torch.nn.functional

  def conv(name: str, x: Any, stride: int) -> Any:
    weight = tensors[f"{name}.weight"]
    pad = weight.shape[-1] // 2
    return functional.conv2d(x, weight, stride=stride, padding=pad)

  def norm(name: str, x: Any) -> Any:
    parts = ("running_mean", "running_var", "weight", "bias")
    return functional.batch_norm(x, *(tensors[f"{name}.{p}"] for p in parts))

  x = torch.relu(norm("bn1", conv("conv1", x, 2)))
  x = functional.max_pool2d(x, 3, 2, 1)
  stage, block = 1, 0
  while f"layer{stage}.0.conv1.weight" in tensors:
    name = f"layer{stage}.{block}"
    if f"{name}.conv1.weight" not in tensors:
      stage, block = stage + 1, 0
      continue
    stride = 2 if stage > 1 and block == 0 else 1
    y = torch.relu(norm(f"{name}.bn1", conv(f"{name}.conv1", x, stride)))
    y = norm(f"{name}.bn2", conv(f"{name}.conv2", y, 1))
    if f"{name}.downsample.0.weight" in tensors:
      x = conv(f"{name}.downsample.0", x, stride)
      x = norm(f"{name}.downsample.1", x)
    x, block = torch.relu(x + y), block + 1
  return functional.linear(
    x.mean((2, 3)), tensors["fc.weight"], tensors["fc.bias"]
  )


def torch_attack(
  torch: Any,
  logits: Callable[[Any], Any],
  image: Any,
  label: Any,
  *,
  epsilon: float,
  step_size: float,
  iterations: int,
  decay: float | None = None,
  start: Any = None,
) -> Any:
  """Steps along signs, the gradient as it is or in a running sum of them."""
  below = (image - epsilon).clamp(min=0)
  above = (image + epsilon).clamp(max=255)
  within = lambda x: torch.minimum(torch.maximum(x, below), above)
  x = image if start is None else within(image + start)
  total = torch.zeros_like(x)
  for _ in range(iterations):
    x = x.detach().requires_grad_()
    loss = torch.nn.functional.cross_entropy(logits(x), label, reduction="sum")
    (slope,) = torch.autograd.grad(loss, x)
    if decay is None:
      total = slope
    else:
      size = slope.abs().sum((1, 2, 3), keepdim=True)
      total = decay * total + slope / size
    x = within(x.detach() + step_size * total.sign())
  return x


# Information.


def jax_mmsi(a: Any, b: Any, *, axis: str, epsilon: float) -> Any:
  """1/2 log(1 - rho^2) as it is written, without care for rho near 1."""
  along = 1 if axis == "channel" else 0
  a = a - a.mean(along, keepdims=True)
  b = b - b.mean(along, keepdims=True)
  covariance = (a * b).mean(along)
  rho = covariance / jnp.sqrt((a**2).mean(along) * (b**2).mean(along))
  return 0.5 * jnp.log(1 - (1 - epsilon) * rho**2)


def jax_peer(form: Callable[..., Any], *arrays: Any, **compared: Any) -> Peer:
  """A function of arrays, compiled."""

  def make() -> Callable[[], Any]:
    given = jax.device_put(arrays)
    program = jax.jit(form).lower(*given).compile()
    return lambda: program(*given)

  return Peer(make, **compared)


# Corruptions.


def jpeg(pictures: np.ndarray, *, quality: int) -> Peer:
  """Through a file in memory, image by image."""

  def make() -> Callable[[], Any]:
    pil = load("PIL.Image")
    given = [pil.fromarray(picture) for picture in pictures]

    def one(picture: Any) -> np.ndarray:
      file = io.BytesIO()
      picture.save(file, "JPEG", quality=quality)
      return np.asarray(pil.open(file))

    return lambda: np.stack([one(x) for x in given]).astype(np.float32)

  return Peer(make, tolerance=0.01)


def pixelate(pictures: np.ndarray, *, share: float) -> Peer:
  """Two resizings by boxes, image by image, each rounded."""

  def make() -> Callable[[], Any]:
    pil = load("PIL.Image")
    given = [pil.fromarray(picture) for picture in pictures]
    size = given[0].size
    smaller = tuple(math.floor(n * share) for n in size)

    def one(picture: Any) -> np.ndarray:
      small = picture.resize(smaller, pil.Resampling.BOX)
      return np.asarray(small.resize(size, pil.Resampling.BOX))

    return lambda: np.stack([one(x) for x in given]).astype(np.float32)

  return Peer(make, tolerance=0.01)


def contrast(pictures: np.ndarray, *, share: float) -> Peer:
  """Towards the mean of each channel, in NumPy."""
  x = pictures.astype(np.float32)

  def call() -> np.ndarray:
    mean = x.mean((1, 2), keepdims=True)
    return np.clip(share * (x - mean) + mean, 0, 255)

  return Peer(lambda: call, tolerance=1e-4)
