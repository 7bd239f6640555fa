"""What is measured: one entry of `CASES` for each step, and the whole way.

Goals for CPUs were set before the functions were written, from prototypes.
"""

from collections.abc import Mapping
import functools
from functools import partial
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.filters import Peer
from benchmarks.lidar import Case, Setup, Size, peers
from jaxshape.backbones import rangenet
from jaxshape.geometry import spherical
from jaxshape.layers import apply
from jaxshape.points import refinement

CLASSES = 20
BLOCK = "backbone.enc1.residual_0."


def _goals(cpu: Mapping[str, float]) -> Mapping[str, float]:
  return cpu if jax.default_backend() == "cpu" else {}


def _close() -> float:
  """The tolerance for products, which GPUs do with 10 bits as a default."""
  return 0.05 if jax.default_backend() == "gpu" else 1e-3


def scan(count: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
  """A street as 64 beams see it: ground, walls, and pillars in front of them.

  Args:
    count: Number of points.
    seed: Of the pillars and the noise.

  Returns:
    Points [count, 3] in metres, and remissions.
  """
  rng = np.random.default_rng(seed)
  turns = -(-count // 64)
  azimuth = np.linspace(-np.pi, np.pi, turns, endpoint=False)
  pitch = np.radians(np.linspace(2.9, -24.8, 64))[:, None]
  ground = 1.73 / np.maximum(np.sin(-pitch), 1e-3)
  wall = 8 / np.maximum(np.abs(np.sin(azimuth)), 0.1)
  for at in rng.uniform(-np.pi, np.pi, 60):
    turn = np.abs(np.angle(np.exp(1j * (azimuth - at))))
    wall = np.where(turn < rng.uniform(0.01, 0.06), rng.uniform(4, 40), wall)
  along = np.minimum(ground, wall / np.cos(pitch))
  along = along * (1 + rng.normal(0, 2e-3, along.shape))
  # Beams do not point at the middle of pixels.
  azimuth = azimuth + rng.normal(0, 2e-3, along.shape)
  pitch = pitch + rng.normal(0, 5e-4, along.shape)
  x = along * np.cos(pitch) * np.cos(azimuth)
  y = along * np.cos(pitch) * np.sin(azimuth)
  points = np.stack([x, y, along * np.sin(pitch)], -1).reshape(-1, 3)
  points = rng.permutation(points)[:count].astype(np.float32)
  return points, rng.uniform(0, 1, len(points)).astype(np.float32)


def _projection(size: Size) -> Setup:
  points, remission = scan(size.points)

  def numpy() -> Any:
    shape = size.height, size.width
    return lambda: peers.numpy_projection(points, remission, *shape)[1]

  return Setup(
    lambda p, r: spherical.project(p, r, height=size.height, width=size.width),
    (points, remission),
    # Some points lie on the border of two pixels.
    {"NumPy": Peer(numpy, tolerance=1e-3)},
    _goals({"NumPy": 0.45}),
    read=lambda raw: getattr(raw, "index", raw),
  )


def _neighbours(window: int, size: Size) -> Setup:
  points, remission = scan(size.points)
  image, _, row, column, ranges = peers.numpy_projection(
    points, remission, size.height, size.width
  )
  rng = np.random.default_rng(1)
  labels = rng.integers(0, CLASSES, (size.height // 4, size.width // 8))
  labels = np.kron(labels, np.ones((4, 8), int)).astype(np.int32)

  def of_torch(torch: Any, to: Any) -> Any:
    given = to(labels), to(image[..., 0]), to(ranges)
    cells = to(row.astype(np.int64) * size.width + column)
    return lambda: peers.torch_neighbours(
      torch, *given, cells, neighbours=window, window=window
    )

  return Setup(
    partial(
      refinement.knn_labels,
      neighbours=window,
      window=window,
      num_classes=CLASSES,
    ),
    (labels, image[..., 0], ranges, row, column),
    # Of equally near neighbours another one may be taken.
    {"torch": peers.torch_peer(of_torch, tolerance=1e-3)},
    _goals({"torch": 0.06}),
  )


@functools.lru_cache(maxsize=2)
def weights(depth: int) -> tuple[rangenet.RangeNet, Any, dict[str, np.ndarray]]:
  """A network, its parameters with statistics, and the same by public names."""
  net = rangenet.RangeNet(CLASSES, **rangenet.NAMES[f"squeezesegv3_{depth}"])
  init = partial(apply.init, net, jax.random.key(0), train=False)
  shapes = jax.eval_shape(init, jnp.zeros((1, 1, 8, 5)))
  zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
  rng, tensors = np.random.default_rng(0), {}
  for name, value in rangenet.to_state_dict(net, *zeros).items():
    if value.ndim == 1:
      scale = name.endswith(("running_var", ".weight"))
      drawn = scale + rng.uniform(-0.1, 0.1, value.shape)
    else:
      spread = math.sqrt(2 / math.prod(value.shape[1:]))
      drawn = rng.normal(0, spread, value.shape)
    tensors[name] = drawn.astype(np.float32)
  return net, rangenet.from_state_dict(net, tensors), tensors


def _features(size: Size) -> tuple[np.ndarray, np.ndarray]:
  """Coordinates and features of a block at full resolution."""
  rng = np.random.default_rng(2)
  shape = 1, size.height, size.block
  xyz, x = rng.normal(size=(*shape, 3)), rng.normal(size=(*shape, 32))
  return xyz.astype(np.float32), x.astype(np.float32)


def _planar(images: np.ndarray) -> np.ndarray:
  return np.moveaxis(images, -1, 1)


def _own_block(*, train: bool) -> Any:
  """Our block as a function of variables, coordinates and features."""
  settings = rangenet.Settings(train, jnp.float32, 0.0, {})
  block = rangenet.AdaptiveBlock(settings)

  def run(variables: Any, xyz: Any, x: Any) -> Any:
    params, stats = variables
    out, _ = apply.apply(
      block, params, {"batch_stats": stats}, x, xyz, update=train
    )
    return out

  return run


def _variables() -> Any:
  """Parameters and statistics of the first block."""
  _, (params, collections), _ = weights(21)
  stats = collections["batch_stats"]
  return tuple(tree["enc1"]["residual_0"] for tree in (params, stats))


def _block(size: Size) -> Setup:
  xyz, x = _features(size)
  tensors = peers.below(weights(21)[2], BLOCK)

  def of_torch(torch: Any, to: Any) -> Any:
    given = {name: to(value) for name, value in tensors.items()}
    images = to(_planar(xyz)), to(_planar(x))
    run = peers.torch_block
    return lambda: run(torch, given, *images).permute(0, 2, 3, 1)

  def im2col() -> Any:
    arrays = jax.device_put((tensors, xyz, x))
    run = jax.jit(peers.jax_block)
    return lambda: run(*arrays)

  return Setup(
    _own_block(train=False),
    (_variables(), xyz, x),
    {
      "torch": peers.torch_peer(of_torch, tolerance=_close()),
      "im2col in JAX": Peer(im2col, tolerance=_close()),
    },
    _goals({"torch": 0.28, "MB": 20}),
  )


def _block_gradient(size: Size) -> Setup:
  """By weights and features, of a product, with the batch's statistics."""
  xyz, x = _features(size)
  against = np.random.default_rng(3).normal(size=x.shape).astype(np.float32)
  tensors = peers.below(weights(21)[2], BLOCK)
  run = _own_block(train=True)

  def ours(variables: Any, xyz: Any, x: Any) -> Any:
    params, stats = variables
    product = lambda params, x: jnp.vdot(against, run((params, stats), xyz, x))
    return jax.grad(product, argnums=(0, 1))(params, x)

  def of_torch(torch: Any, to: Any) -> Any:
    given = {name: to(value) for name, value in tensors.items()}
    trained = [t for n, t in given.items() if n.endswith(peers.TRAINED)]
    places, features, v = (to(_planar(a)) for a in (xyz, x, against))
    wanted = [features, *(t.requires_grad_() for t in trained)]
    features.requires_grad_()

    def step() -> Any:
      y = peers.torch_block(torch, given, places, features, train=True)
      grads = torch.autograd.grad((y * v).sum(), wanted)
      return grads[0].permute(0, 2, 3, 1)

    return step

  def im2col() -> Any:
    def product(tensors: Any, x: Any) -> Any:
      y = peers.jax_block(tensors, jnp.asarray(xyz), x, train=True)
      return jnp.vdot(against, y)

    arrays = jax.device_put((tensors, x))
    grad = jax.jit(jax.grad(product, argnums=(0, 1)))
    return lambda: grad(*arrays)

  return Setup(
    ours,
    (_variables(), xyz, x),
    {
      "torch": peers.torch_peer(of_torch, inference=False, tolerance=_close()),
      "im2col in JAX": Peer(im2col, tolerance=_close()),
    },
    _goals({"torch": 0.65, "MB": 80}),
    read=lambda raw: raw[1] if isinstance(raw, tuple) else raw,
  )


def _network(depth: int, size: Size) -> Setup:
  points, remission = scan(size.points)
  image = peers.numpy_projection(points, remission, size.height, size.width)[0]
  image = np.where(image[..., :1] > 0, image / peers.SCALE, 0)[None]
  net, (params, collections), tensors = weights(depth)

  def ours(params: Any, collections: Any, image: Any) -> Any:
    return apply.apply(net, params, collections, image, train=False)[0]

  def of_torch(torch: Any, to: Any) -> Any:
    given, x = {n: to(v) for n, v in tensors.items()}, to(_planar(image))
    run = partial(peers.torch_network, depth=depth)
    return lambda: [y.permute(0, 2, 3, 1) for y in run(torch, given, x)]

  return Setup(
    ours,
    (params, collections, image),
    {"torch": peers.torch_peer(of_torch, tolerance=_close())},
    _goals({"torch": 0.38}),
    read=lambda raw: raw[0],
  )


def _whole(depth: int, size: Size) -> Setup:
  """Points in, a label for each point out."""
  points, remission = scan(size.points)
  net, (params, collections), tensors = weights(depth)
  shape = size.height, size.width

  def ours(variables: Any, points: Any, remission: Any) -> Any:
    seen = spherical.project(
      points, remission, height=size.height, width=size.width
    )
    image = jnp.where(seen.mask[..., None], seen.image / peers.SCALE, 0)
    logits, _ = apply.apply(net, *variables, image[None], train=False)
    labels = jnp.argmax(logits[0][0], axis=-1).astype(jnp.int32)
    return refinement.knn_labels(
      labels,
      seen.image[..., 0],
      jnp.linalg.norm(points, axis=-1),
      seen.row,
      seen.column,
      num_classes=CLASSES,
    )

  def of_torch(torch: Any, to: Any) -> Any:
    given = {name: to(value) for name, value in tensors.items()}

    def run() -> Any:
      image, _, row, column, ranges = peers.numpy_projection(
        points, remission, *shape
      )
      inputs = np.where(image[..., :1] > 0, image / peers.SCALE, 0)[None]
      logits = peers.torch_network(
        torch, given, to(_planar(inputs)), depth=depth
      )
      labels, cells = logits[0][0].argmax(0), to(row * shape[1] + column)
      return peers.torch_neighbours(
        torch,
        labels,
        to(image[..., 0]),
        to(ranges),
        cells.long(),
        neighbours=5,
        window=5,
      )

    return run

  return Setup(
    ours,
    ((params, collections), points, remission),
    # Where two logits are almost the same, either label may win.
    {"NumPy and torch": peers.torch_peer(of_torch, tolerance=0.01)},
  )


CASES = (
  Case("projection", _projection),
  Case("knn 5 x 5, 5 neighbours", partial(_neighbours, 5)),
  Case("knn 7 x 7, 7 neighbours", partial(_neighbours, 7)),
  Case("block forward", _block),
  Case("block gradient", _block_gradient),
  Case("network 21", partial(_network, 21)),
  Case("network 53", partial(_network, 53), quick=False),
  Case("whole 21, points to labels", partial(_whole, 21)),
  Case("whole 53, points to labels", partial(_whole, 53), quick=False),
)
