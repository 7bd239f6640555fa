"""Maximizing mutual shape information: one shape in two styles, seen as one.

| paper | here |
|---|---|
| Eq. 1 and 2, the bound and the loss | `losses.mutual_information.mmsi` |
| Sec. 3.2, two styles per image | `data.styles.Styled`, `stylize` |
| Sec. 3.3, z, the mean over the last stage's pixels | `backbones.resnet` |
| Eq. 4, l_c, l_MMSI, l_c^s and l_c^s' | `make`, `config.weights` |
| Sec. 4, IN: originals alone | weights 1, 0, 0 |
| Sec. 4, SIN: stylised alone | weights 0, 0.8, 0.5 |
| Sec. 4, SIN+IN: both | weights 1, 0.8, 0.1 |
| Sec. 4, fine-tuning on IN | `init_from` another run, weights 1, 0, 0 |
| ShapeNet, the baseline of each | the same with `config.weights.mutual=0` |
| Table 7, S5, S5 + S4, S5 ... S2 | `config.mutual.stages` |
| not in the paper, l_MMSI from a step on | `config.mutual.start` |

x is an image, s and s' are its stylised versions. Images are 0..255 until they
enter the network. An image is augmented first and stylised then, on the device,
so that x, s and s' show one shape at one place.

Note: the paper stylises whole photographs before training and feeds x, s and s'
through the network one after the other. Here they go through together, and
batch normalization sees all of them as one batch;
`config.separate_views` normalizes each by itself. Eq. 4 weighs one stage: of
several, the mean of their losses is taken. The paper leaves the weights of
SIN open: the stylised versions share the weight of the original.

Reference:
  Islam et al., "Maximizing Mutual Shape Information", BMVC 2022.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxshape.backbones import resnet, style_transfer
from jaxshape.data import augment, sources, styles
from jaxshape.engine import bench, classifiers, pretrained, pytorch
from jaxshape.errors import InputError
from jaxshape.filters import stylization
from jaxshape.layers import apply
from jaxshape.losses import mutual_information
from jaxshape.system import System, TrainState
from jaxshape.typing import Array, Batch, Config, Metrics, PyTree

METHODS = ("statistics", "adain")
WEIGHTS = ("original", "mutual", "stylized")
# The views of an image, by the paper's names.
ORIGINAL, STYLIZED = "x", ("s", "s'")
# Of a batch: 1 for every example once l_MMSI counts, before that 0.
COUNTS = "mutual_counts"

Restyle = Callable[[Array, Array], Array]


class Seen(NamedTuple):
  """What the network makes of one view of a batch.

  Attributes:
    logits: [batch, classes].
    latents: z of every stage that counts, [batch, channels].
  """

  logits: Array
  latents: tuple[Array, ...]


def objective(
  config: Config,
  seen: Mapping[str, Seen],
  batch: Batch,
  *,
  mutual: Array | float = 1.0,
) -> tuple[Array, Metrics]:
  """Weighs what the network makes of the views (Eq. 4).

  L = original * l_c + mutual * l_MMSI + stylized * (l_c^s + l_c^s'), each the
  mean over the batch, l_MMSI also over the stages.

  Args:
    config: With `weights`, `mutual` and `label_smoothing`.
    seen: "x", or "s" and "s'", or all three.
    batch: With "label", or also "target".
    mutual: What l_MMSI is multiplied by besides its weight.

  Returns:
    The loss, and what is worth watching.
  """
  total, right = jnp.float32(0), {}
  for name, view in seen.items():
    kind = "original" if name == ORIGINAL else "stylized"
    entropy = classifiers.loss(
      view.logits, batch, label_smoothing=config.label_smoothing
    )
    total += config.weights[kind] * entropy.mean()
    found = jnp.argmax(view.logits, axis=-1) == jnp.asarray(batch["label"])
    right[name] = found.mean(dtype=jnp.float32)
  metrics = {"top1": right[ORIGINAL]} if ORIGINAL in right else {}
  if STYLIZED[0] not in seen:
    return total, metrics
  losses = [
    mutual_information.mmsi(
      z, other, axis=config.mutual.axis, epsilon=config.mutual.epsilon
    ).mean()
    for z, other in zip(*(seen[name].latents for name in STYLIZED), strict=True)
  ]
  shared = jnp.stack(losses).mean()
  total += config.weights.mutual * mutual * shared
  metrics["top1_stylized"] = sum(right[name] for name in STYLIZED) / 2
  metrics["mutual_information"] = -shared
  return total, metrics


def stylizer(style: Config) -> Restyle:
  """Gives the function that redraws images [B, H, W, 3] in styles [B, h, w, 3].

  Args:
    style: `config.style`.

  Returns:
    From images and styles 0..255 to images 0..255.

  Raises:
    InputError: AdaIN's weights are missing or do not fit.
  """
  if style.method == "statistics":
    return functools.partial(
      stylization.match_statistics,
      strength=style.alpha,
      scale=style.scale or None,
    )
  for part in ("encoder_weights", "decoder_weights"):
    if not style[part]:
      raise InputError(
        f"config.style.{part} must be a file (vgg_normalised.pth, decoder.pth) "
        "where config.style.method='adain', got none."
      )
  params = style_transfer.style_params(
    pytorch.load(style.encoder_weights), pytorch.load(style.decoder_weights)
  )
  return functools.partial(style_transfer.stylizer(params), alpha=style.alpha)


def make(config: Config) -> System:
  """The supervised system that a config describes."""
  config = pretrained.adopt(config)
  _check(config)
  splits = classifiers.Splits(config)
  net = classifiers.network(config, num_classes=len(splits.classes))
  if not isinstance(net, resnet.ResNet):
    raise InputError(
      "config.backbone must be a residual network, whose stages are compared, "
      f"got {config.backbone!r}; there are: {', '.join(resnet.VARIANTS)}"
    )
  stages, first = _stages(config, len(net.stage_sizes)), _start(config)
  normalize = classifiers.normalizer(config)
  augmentation = augment.make(config.augment, num_classes=len(splits.classes))
  weights = config.weights
  restyles = weights.mutual > 0 or weights.stylized > 0

  @functools.cache
  def restyle() -> Restyle:
    # Evaluation needs no weights of AdaIN. Training may ask while it is traced.
    with jax.ensure_compile_time_eval():
      return stylizer(config.style)

  def views(batch: Batch) -> dict[str, Array]:
    images = jnp.asarray(batch["image"])
    out = {ORIGINAL: images} if weights.original > 0 else {}
    if restyles:
      # One call for both styles: half of it to compile.
      twice = jnp.repeat(images, len(STYLIZED), axis=0)
      given = jnp.asarray(batch["style"])
      drawn = restyle()(twice, given.reshape(-1, *given.shape[2:]))
      for i, name in enumerate(STYLIZED):
        out[name] = drawn[i :: len(STYLIZED)]
    return out

  def loss(
    params: PyTree, extra: PyTree, batch: Batch, key: Array
  ) -> tuple[Array, tuple[PyTree, Metrics]]:
    batch = augmentation(key, batch)
    seen, collections = _see(
      net,
      params[classifiers.NET],
      extra[classifiers.NET],
      {name: normalize(view) for name, view in views(batch).items()},
      stages=stages,
      separate=config.separate_views,
    )
    total, metrics = objective(config, seen, batch, mutual=batch[COUNTS].mean())
    return total, ({**extra, classifiers.NET: collections}, metrics)

  def examples(source: sources.Source) -> sources.Source:
    if not restyles:
      return source
    restyle()
    return styles.Styled(source, _styles(config), count=len(STYLIZED))

  classifier = classifiers.classifier(net, normalize, splits.classes)
  system = classifiers.system(
    config,
    net,
    loss,
    splits=splits,
    evaluators=bench.evaluators(config, classifier, splits),
    start=pretrained.start(config, net),
    examples=examples,
  )
  step = system.train_step
  assert step is not None

  def train_step(
    state: TrainState, batch: Batch, key: Array
  ) -> tuple[TrainState, Metrics]:
    counts = (state.step >= first).astype(jnp.float32)
    # By example, so that parts of a batch have theirs.
    by_example = jnp.broadcast_to(counts, jnp.shape(batch["label"]))
    return step(state, {**batch, COUNTS: by_example}, key)

  return dataclasses.replace(system, train_step=train_step)


def _see(
  net: resnet.ResNet,
  params: PyTree,
  collections: PyTree,
  images: Mapping[str, Array],
  *,
  stages: tuple[int, ...],
  separate: bool,
) -> tuple[dict[str, Seen], PyTree]:
  """Logits and latents of normalized views, and the statistics afterwards."""

  def forward(images: Array, collections: PyTree) -> tuple[Seen, PyTree]:
    features, collections = apply.apply(
      net, params, collections, images, method="stages", update=True, train=True
    )
    logits, _ = apply.apply(
      net, params, collections, features[-1], method="head"
    )
    latents = tuple(
      jnp.mean(features[i], axis=(1, 2), dtype=jnp.float32) for i in stages
    )
    return Seen(logits, latents), collections

  if separate:
    out = {}
    for name, view in images.items():
      out[name], collections = forward(view, collections)
    return out, collections
  # The views of an image lie side by side: where devices share a batch, none
  # has to hand rows to another.
  together = jnp.stack(list(images.values()), axis=1)
  seen, collections = forward(
    together.reshape(-1, *together.shape[2:]), collections
  )
  return {
    name: jax.tree.map(lambda y, i=i: y[i :: len(images)], seen)
    for i, name in enumerate(images)
  }, collections


def _styles(config: Config) -> sources.Source:
  style = config.style
  return styles.open_styles(
    style.source,
    image_size=style.image_size or config.data.image_size,
    data_dir=style.data_dir or None,
    split=style.split,
    **style.options.to_dict(),
  )


def _stages(config: Config, count: int) -> tuple[int, ...]:
  """Which stages' features share information, from 0."""
  names = tuple(config.mutual.stages)
  known = [isinstance(n, int) and 0 < abs(n) <= count for n in names]
  if not names or not all(known):
    raise InputError(
      f"config.mutual.stages must be some of the {count} stages of "
      f"{config.backbone}, 1..{count}, or from the end, -1..-{count}, got "
      f"{names}."
    )
  return tuple(sorted({n - 1 if n > 0 else count + n for n in names}))


def _start(config: Config) -> int:
  """The step from which on l_MMSI counts; old runs have no such field."""
  start = config.mutual.get("start", 0)
  if not 0 <= start < config.steps and config.weights.mutual:
    raise InputError(
      "config.mutual.start must be a step before the last, from 0 to below "
      f"config.steps={config.steps}, got {start}."
    )
  return start


def _check(config: Config) -> None:
  classifiers.check(config)
  weights, mutual, style = config.weights, config.mutual, config.style
  for name in WEIGHTS:
    if not 0 <= weights[name] < math.inf:
      raise InputError(
        f"config.weights.{name} must be a number from 0 up, got "
        f"{weights[name]}."
      )
  if not weights.original and not weights.stylized:
    raise InputError(
      "config.weights.original or config.weights.stylized must be above 0, as "
      "nothing else knows the labels, got 0 and 0."
    )
  for where, name, known in (
    ("mutual.axis", mutual.axis, mutual_information.AXES),
    ("style.method", style.method, METHODS),
  ):
    if name not in known:
      raise InputError(
        f"config.{where} must be one of {', '.join(known)}, got {name!r}."
      )
  if not 0 <= mutual.epsilon < 1:
    raise InputError(
      f"config.mutual.epsilon must be at least 0, below 1, got "
      f"{mutual.epsilon}."
    )
  if not 0 <= style.alpha <= 1:
    raise InputError(f"config.style.alpha must be in 0..1, got {style.alpha}.")
  if style.scale and style.scale < 4:
    raise InputError(
      f"config.style.scale must be 0 (the method's own) or at least 4, got "
      f"{style.scale}."
    )
  if style.image_size < 0:
    raise InputError(
      "config.style.image_size must be 0 (that of the data) or more, got "
      f"{style.image_size}."
    )
