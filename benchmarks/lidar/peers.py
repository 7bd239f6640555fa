"""The peers: NumPy and PyTorch from the equations, and im2col in JAX.

Networks are functions of the public state dict, so that all forms have the same
weights. Images of PyTorch are [batch, channels, height, width].
"""

from collections.abc import Callable, Mapping
import importlib
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from benchmarks.filters import Peer
from jaxshape.backbones import rangenet

Tensors = Mapping[str, Any]
load: Callable[[str], Any] = importlib.import_module
# What is divided by before the network sees it: range, x, y, z, remission.
SCALE = np.array([12, 12, 10, 1, 0.2], np.float32)
TRAINED = (".weight", ".bias")


def torch_device(torch: Any) -> str:
  """Where torch computes: where JAX does."""
  on_gpu = jax.default_backend() == "gpu" and torch.cuda.is_available()
  return "cuda" if on_gpu else "cpu"


def torch_peer(
  form: Callable[[Any, Callable[[Any], Any]], Callable[[], Any]],
  *,
  inference: bool = True,
  **compared: Any,
) -> Peer:
  """Something of torch.

  Args:
    form: Given torch and a function that makes tensors of arrays, the call.
    inference: Whether nothing is differentiated.
    **compared: As for `Peer`.
  """

  def make() -> Callable[[], Any]:
    torch = load("torch")
    device = torch_device(torch)
    to = lambda x: torch.from_numpy(np.array(x, order="C")).to(device)
    run = form(torch, to)

    def call() -> Any:
      with torch.inference_mode(inference):
        out = run()
      if device == "cuda":
        torch.cuda.synchronize()
      return out

    return call

  return Peer(make, **compared)


# Projection.


def numpy_projection(
  points: np.ndarray, remission: np.ndarray, height: int, width: int
) -> tuple[np.ndarray, ...]:
  """Eq. 1 with f_down, the points sorted so that the nearest comes last.

  Returns:
    The image [height, width, 5], the index of the point in each pixel, the row
    and the column of each point, and its range.
  """
  up, down = math.radians(3), math.radians(25)
  ranges = np.linalg.norm(points, axis=1)
  x, y, z = points.T
  u = 0.5 * (1 - np.arctan2(y, x) / np.pi) * width
  v = (1 - (np.arcsin(z / ranges) + down) / (up + down)) * height
  column = np.clip(np.floor(u), 0, width - 1).astype(np.int32)
  row = np.clip(np.floor(v), 0, height - 1).astype(np.int32)
  order = np.argsort(ranges)[::-1]
  image = np.full((height, width, 5), -1, np.float32)
  index = np.full((height, width), -1, np.int32)
  at = row[order], column[order]
  image[*at, 0] = ranges[order]
  image[*at, 1:4] = points[order]
  image[*at, 4] = remission[order]
  index[at] = order
  return image, index, row, column, ranges


# Refinement.


def torch_neighbours(
  torch: Any,
  labels: Any,
  image: Any,
  ranges: Any,
  cells: Any,
  *,
  neighbours: int,
  window: int,
  classes: int = 20,
) -> Any:
  """The vote of RangeNet++ by unfold, topk and scatter, sigma and cut-off 1."""
  unfold = torch.nn.functional.unfold
  halo, middle = window // 2, window**2 // 2
  k = torch.arange(window, device=image.device) - halo
  gauss = torch.exp(-(k[:, None] ** 2 + k[None] ** 2) / 2)
  away = (1 - gauss / gauss.sum()).reshape(-1, 1)
  near = unfold(image[None, None], window, padding=halo)[0][:, cells]
  near[near < 0] = math.inf
  near[middle] = ranges
  distance = (near - ranges).abs() * away
  nearest = distance.topk(neighbours, dim=0, largest=False)
  all_labels = unfold(labels[None, None].float(), window, padding=halo)[0]
  voted = all_labels[:, cells].gather(0, nearest.indices).long()
  voted[nearest.values > 1] = classes
  votes = torch.zeros(classes + 1, len(ranges), device=image.device)
  votes.scatter_add_(0, voted, torch.ones_like(voted, dtype=votes.dtype))
  return (votes[1:-1].argmax(0) + 1).to(torch.int32)


# One block.


def torch_norm(
  torch: Any, tensors: Tensors, name: str, x: Any, train: bool
) -> Any:
  """Batch normalization with the weights of that name."""
  return torch.nn.functional.batch_norm(
    x,
    tensors[f"{name}.running_mean"],
    tensors[f"{name}.running_var"],
    tensors[f"{name}.weight"],
    tensors[f"{name}.bias"],
    training=train,
  )


def torch_conv(
  torch: Any, tensors: Tensors, name: str, x: Any, stride: int = 1
) -> Any:
  """A convolution that keeps the size, but for a stride across."""
  weight = tensors[f"{name}.weight"]
  return torch.nn.functional.conv2d(
    x,
    weight,
    tensors.get(f"{name}.bias"),
    stride=(1, stride),
    padding=weight.shape[-1] // 2,
  )


def torch_block(
  torch: Any, tensors: Tensors, xyz: Any, x: Any, *, train: bool = False
) -> Any:
  """SAC-ISK by unfold, a plain convolution, and the shortcut."""
  norm = lambda name, y: torch_norm(torch, tensors, name, y, train)
  conv = lambda name, y: torch_conv(torch, tensors, name, y)
  z = norm("attention_x.1", conv("attention_x.0", xyz))
  taps = torch.nn.functional.unfold(x, 3, padding=1).view(z.shape)
  y = conv("position_mlp_2.0", taps * torch.sigmoid(z))
  y = torch.relu(norm("position_mlp_2.1", y))
  y = norm("position_mlp_2.4", conv("position_mlp_2.3", y))
  return x + torch.relu(y)


def jax_block(
  tensors: Tensors, xyz: jax.Array, x: jax.Array, *, train: bool = False
) -> jax.Array:
  """The same in JAX, channels last, with all taps as channels."""

  def conv(name: str, y: jax.Array) -> jax.Array:
    kernel = jnp.transpose(tensors[f"{name}.weight"], (2, 3, 1, 0))
    y = lax.conv_general_dilated(
      y, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return y + tensors[f"{name}.bias"]

  def norm(name: str, y: jax.Array) -> jax.Array:
    mean = tensors[f"{name}.running_mean"]
    var = tensors[f"{name}.running_var"]
    if train:
      mean, var = y.mean((0, 1, 2)), y.var((0, 1, 2))
    y = (y - mean) / jnp.sqrt(var + 1e-5)
    return y * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

  taps = lax.conv_general_dilated_patches(
    x, (3, 3), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
  z = norm("attention_x.1", conv("attention_x.0", xyz))
  y = conv("position_mlp_2.0", taps * jax.nn.sigmoid(z))
  y = jax.nn.relu(norm("position_mlp_2.1", y))
  return x + jax.nn.relu(norm("position_mlp_2.4", conv("position_mlp_2.3", y)))


# The network.


def below(tensors: Tensors, prefix: str) -> dict[str, Any]:
  """Those whose names begin so, without that."""
  return {
    name.removeprefix(prefix): value
    for name, value in tensors.items()
    if name.startswith(prefix)
  }


def torch_network(
  torch: Any, tensors: Tensors, image: Any, *, depth: int
) -> list[Any]:
  """SqueezeSegV3 without dropout: five logits, finest first."""
  functional = torch.nn.functional

  def activated(name: str, x: Any) -> Any:
    x = torch_norm(torch, tensors, name, x, False)
    return functional.leaky_relu(x, 0.1)

  def conv(name: str, x: Any, stride: int = 1) -> Any:
    return torch_conv(torch, tensors, name, x, stride)

  xyz, skips, levels = image[:, 1:4], [], []
  x = activated("backbone.bn1", conv("backbone.conv1", image))
  for i, blocks in enumerate(rangenet.DEPTHS[depth], 1):
    stage, skip = f"backbone.enc{i}", x
    for j in range(blocks):
      x = torch_block(torch, below(tensors, f"{stage}.residual_{j}."), xyz, x)
    if f"{stage}.conv.weight" in tensors:
      skips.append(skip)
      x = activated(f"{stage}.bn", conv(f"{stage}.conv", x, 2))
      height, width = xyz.shape[2:]
      xyz = functional.interpolate(
        xyz, (height, width // 2), mode="bilinear", align_corners=True
      )
  for i in range(5, 0, -1):
    stage = f"decoder.dec{i}"
    up = tensors.get(f"{stage}.upconv.weight")
    if up is None:
      y = conv(f"{stage}.conv", x)
    else:
      bias = tensors[f"{stage}.upconv.bias"]
      y = functional.conv_transpose2d(x, up, bias, (1, 2), (0, 1))
    y = activated(f"{stage}.bn", y)
    inner = f"{stage}.residual"
    x = activated(f"{inner}.bn1", conv(f"{inner}.conv1", y))
    x = y + activated(f"{inner}.bn2", conv(f"{inner}.conv2", x))
    x = x if up is None else x + skips.pop()
    levels.append(x)
  heads = [conv(f"head{i}.1", x) for i, x in enumerate(levels, 1)]
  return heads[::-1]
