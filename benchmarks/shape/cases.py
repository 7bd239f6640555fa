"""What is measured: training, restyling, attacks, the loss and corruptions.

No goals were set beforehand.
"""

from collections.abc import Callable
import functools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.filters import Peer, timing
from benchmarks.lidar.peers import torch_peer
from benchmarks.shape import Case, Setup, Size, peers, values
from configs import mmsi as config
from jaxshape.attacks import gradient
from jaxshape.backbones import resnet, style_transfer, vgg
from jaxshape.filters import corruption, stylization
from jaxshape.layers import apply
from jaxshape.losses import mutual_information
from jaxshape.systems import mmsi

CLASSES = 100
SEVERITY = 3
# Of attacks, in 0..255; of the running sum of gradients.
EPSILON, DECAY = 8.0, 1.0


def _close() -> float:
  """The tolerance for products, which GPUs do with 10 bits as a default."""
  return 0.05 if jax.default_backend() == "gpu" else 1e-3


def _planar(x: np.ndarray) -> np.ndarray:
  return np.ascontiguousarray(np.moveaxis(x, -1, 1))


def _pictures(count: int, side: int, *, seed: int = 0) -> np.ndarray:
  """Whole numbers, so that those who round lose nothing."""
  return np.round(timing.pictures(count, side, seed=seed))


# Training steps.


def _config(small: bool, size: Size, kind: str) -> Any:
  given = config.get_config("small")
  given.width, given.batch_size = size.small, size.batch
  if not small:
    given.backbone = size.network
    given.width, given.batch_size = size.width, size.deep
  given.data.image_size = size.side
  given.separate_views = kind == "apart"
  if kind in ("plain", "three"):
    given.weights.mutual = given.weights.stylized = 0.0
  if kind == "three":
    given.batch_size *= 3
  given.data.options.num_examples = max(64, given.batch_size)
  return given


@functools.lru_cache(maxsize=1)
def step(
  small: bool, size: Size, kind: str
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
  """A training step, and its state, batch and key.

  Args:
    small: Whether it is the network of the config's mode of that name.
    size: Of the images and the network.
    kind: "joint" and "apart" are the paper's objective, the three views
      normalized together or each by itself; "plain" is cross-entropy of the
      originals alone, "three" the same of three times as many.
  """
  given = _config(small, size, kind)
  system = mmsi.make(given)
  assert system.train_step is not None
  batches: Any = system.train_data(0)
  batch = dict(next(batches))
  batches.close()
  key = jax.random.key(0)
  return system.train_step, (jax.jit(system.init)(key), batch, key)


@functools.lru_cache(maxsize=2)
def _compiled(small: bool, size: Size, kind: str) -> Callable[[], Any]:
  form, arrays = step(small, size, kind)
  return peers.jax_peer(form, *arrays).make()


def _nothing(raw: Any) -> int:
  """Steps of other objectives agree in nothing."""
  del raw
  return 0


def _plain(small: bool, size: Size) -> Peer:
  return Peer(lambda: _compiled(small, size, "plain"))


def _step(small: bool, kind: str, size: Size) -> Setup:
  ours, arrays = step(small, size, kind)
  beside = {"plain step": _plain(small, size)}
  if kind == "apart":
    joint = Peer(lambda: _compiled(small, size, "joint"))
    beside["views together"] = joint
  return Setup(
    ours,
    arrays,
    beside,
    read=_nothing,
    images=_config(small, size, "plain").batch_size,
  )


def _styles(small: bool, size: Size) -> Setup:
  """The two styles of every image, and nothing else."""
  given = _config(small, size, "joint")
  restyle = mmsi.stylizer(given.style)
  images, first, second = (
    _pictures(given.batch_size, size.side, seed=i) for i in range(3)
  )
  return Setup(
    lambda x, s, t: (restyle(x, s), restyle(x, t)),
    (images, first, second),
    {"plain step": _plain(small, size)},
    read=_nothing,
    images=given.batch_size,
  )


def _training(name: str, *, small: bool) -> tuple[Case, ...]:
  """They take half a minute each to compile, too long for tests."""
  forms = {
    "": partial(_step, small, "joint"),
    ", views apart": partial(_step, small, "apart"),
    ", its styles alone": partial(_styles, small),
    ", plain on three times the images": partial(_step, small, "three"),
  }
  return tuple(Case(name + end, form, False) for end, form in forms.items())


# Restyling.


@functools.lru_cache(maxsize=1)
def transfer_params(width: int) -> Any:
  """Random ones of AdaIN's networks."""
  image = jnp.zeros((1, 16, 16, 3))
  features = jnp.zeros((1, 2, 2, 8 * width))
  starts = {
    "encoder": (vgg.Encoder(width), image),
    "decoder": (vgg.Decoder(width), features),
  }
  return {
    name: jax.jit(partial(apply.init, net))(jax.random.key(0), x)[0]
    for name, (net, x) in starts.items()
  }


def _side(large: bool, size: Size) -> int:
  return size.large if large else size.side


def _adain(large: bool, size: Size) -> Setup:
  side = _side(large, size)
  params = transfer_params(size.width)
  content, style = (_pictures(size.restyled, side, seed=i) for i in (0, 1))

  def of_torch(torch: Any, to: Any) -> Any:
    nets = vgg.Encoder(size.width), vgg.Decoder(size.width)
    tensors = [
      {k: to(v) for k, v in vgg.to_state_dict(net, params[name], {}).items()}
      for net, name in zip(nets, ("encoder", "decoder"), strict=True)
    ]
    given = to(_planar(content)), to(_planar(style))
    run = partial(peers.torch_stylize, torch, *tensors, *given)
    return lambda: run().permute(0, 2, 3, 1)

  return Setup(
    lambda p, c, s: style_transfer.stylizer(p)(c, s),
    (params, content, style),
    {"torch": torch_peer(of_torch, tolerance=_close())},
    images=size.restyled,
  )


def _statistics(large: bool, size: Size) -> Setup:
  side = _side(large, size)
  content, style = (_pictures(size.restyled, side, seed=i) for i in (0, 1))
  network = lambda p, c, s: style_transfer.stylizer(p)(c, s)
  params = transfer_params(size.width)
  beside = {"our AdaIN": peers.jax_peer(network, params, content, style)}
  ours = stylization.match_statistics
  return Setup(ours, (content, style), beside, images=size.restyled)


# Attacks.


@functools.lru_cache(maxsize=1)
def _attacked(
  network: str, width: int
) -> tuple[resnet.ResNet, Any, dict[str, np.ndarray]]:
  """Random weights: a module, its variables, and the same by public names."""
  net = resnet.make(network, num_classes=CLASSES, width=width, stem="imagenet")
  start = jax.jit(partial(apply.init, net, train=False))
  variables = start(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  rng = np.random.default_rng(0)
  # Scales that are 0 at first would leave but the shortcuts.
  params, collections = jax.tree.map(
    lambda x: x + 0.1 * rng.uniform(size=x.shape) if x.ndim == 1 else x,
    jax.tree.map(np.asarray, variables),
  )
  params, collections = jax.tree.map(np.float32, (params, collections))
  tensors = resnet.to_state_dict(net, params, collections)
  return net, (params, collections), tensors


def _attack(
  form: Callable[..., Any],
  steps: dict[str, Any],
  size: Size,
  *,
  random_start: bool = False,
) -> Setup:
  net, variables, tensors = _attacked(size.network, size.width)
  images = _pictures(size.deep, size.side)
  rng = np.random.default_rng(0)
  labels = rng.integers(0, CLASSES, size.deep)
  start = rng.uniform(-EPSILON, EPSILON, images.shape).astype(np.float32)

  def ours(variables: Any, images: Any, labels: Any, start: Any) -> Any:
    def logits(x: Any) -> Any:
      x = (x - peers.MEAN) / peers.STD
      return apply.apply(net, *variables, x, train=False)[0]

    given = {"epsilon": EPSILON, **steps}
    if not random_start:
      return form(logits, images, labels, **given)
    return form(jax.random.key(0), logits, images, labels, start=start, **given)

  def of_torch(torch: Any, to: Any) -> Any:
    given = {name: to(value) for name, value in tensors.items()}
    x, y = to(_planar(images)), to(labels)
    logits = lambda x: peers.torch_resnet(
      torch, given, (x - peers.MEAN) / peers.STD
    )
    options: dict[str, Any] = {"step_size": EPSILON, "iterations": 1, **steps}
    if random_start:
      options["start"] = to(_planar(start))
    run = partial(
      peers.torch_attack, torch, logits, x, y, epsilon=EPSILON, **options
    )
    return lambda: run().permute(0, 2, 3, 1)

  # Of gradients near 0 the sign may be another, and all later ones follow.
  most = 0.03 if steps else 0.01
  if jax.default_backend() == "gpu":
    most = 0.5
  beside = torch_peer(of_torch, inference=False, tolerance=most)
  return Setup(
    ours,
    (variables, images, labels.astype(np.int32), start),
    {"torch": beside},
    read=lambda raw: values(raw) - images,
    images=size.deep,
  )


# Information.


def _information(axis: str, size: Size) -> Setup:
  rng = np.random.default_rng(0)
  draw = lambda: rng.standard_normal((size.rows, size.channels), np.float32)
  a = draw()
  b = a + draw()
  mean = lambda form: jax.value_and_grad(
    lambda a, b: form(a, b, axis=axis, epsilon=1e-6).mean(), argnums=(0, 1)
  )
  plain = peers.jax_peer(mean(peers.jax_mmsi), a, b, tolerance=1e-3)
  return Setup(
    mean(mutual_information.mmsi),
    (a, b),
    {"textbook in JAX": plain},
    # The value beside the gradient, in its order of magnitude.
    read=lambda raw: jnp.append(raw[1][0], raw[0] / raw[1][0].size),
    images=size.rows,
  )


# Corruptions.

_PEERS: dict[str, tuple[str, Callable[[np.ndarray], Peer]]] = {
  "jpeg_compression": ("PIL", partial(peers.jpeg, quality=15)),
  "pixelate": ("PIL", partial(peers.pixelate, share=0.4)),
  "contrast": ("NumPy", partial(peers.contrast, share=0.2)),
}


def _corruption(name: str, size: Size) -> Setup:
  pictures = _pictures(size.corrupted, size.pixels)
  beside = {}
  if name in _PEERS:
    column, make = _PEERS[name]
    beside[column] = make(pictures.astype(np.uint8))
  return Setup(
    partial(corruption.corrupt, name=name, severity=SEVERITY),
    (jax.random.key(0), pictures),
    beside,
    images=size.corrupted,
  )


_STEPS = {"step_size": 1.0, "iterations": 10}

CASES = (
  *_training("step small", small=True),
  *_training("step deep", small=False),
  Case("adain large", partial(_adain, True)),
  Case("adain small", partial(_adain, False), False),
  Case("statistics large", partial(_statistics, True), False),
  Case("statistics small", partial(_statistics, False), False),
  Case("attack fgsm", partial(_attack, gradient.fgsm, {})),
  Case(
    "attack iterative_fgsm, 10 steps",
    partial(_attack, gradient.iterative_fgsm, _STEPS),
    False,
  ),
  Case(
    "attack pgd, 10 steps",
    partial(_attack, gradient.pgd, _STEPS, random_start=True),
  ),
  Case(
    "attack momentum_fgsm, 5 steps",
    partial(
      _attack,
      gradient.momentum_fgsm,
      {"step_size": 2.0, "iterations": 5, "decay": DECAY},
    ),
  ),
  Case("mmsi of channels", partial(_information, "channel")),
  Case("mmsi of the batch", partial(_information, "batch")),
  *(
    Case(f"corruption {name}", partial(_corruption, name), name in _PEERS)
    for name in corruption.IMAGENET_C
  ),
)
