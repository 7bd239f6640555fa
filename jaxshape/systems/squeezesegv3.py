"""SqueezeSegV3: the points of a LiDAR scan named through its range image.

| paper | here |
|---|---|
| Eq. 1, spherical projection | `geometry.spherical.project` |
| Eq. 3 and 4, spatially-adaptive convolution | `layers.convolution` |
| Sec. 5.1, the network; RangeNet21 and 53 | `backbones.rangenet` |
| Eq. 5, multi-layer loss, class weights | `losses.segmentation` |
| Sec. 6.3, KNN of RangeNet++; CRF | `points.refinement` |
| Table 3, what adapts, and rivals | `network.variant` |
| Table 4, kernel of the attention | `network.attention_kernel` |
| Table 5, steps from RangeNet21 | `network.downsampling`, `.heads` |

Scans come as points and become range images on the device, after they were
augmented; labels go back to every point of the scan. Label 0 is "unlabeled".

Note: where the authors' public code departs from the paper (who wins a pixel,
class weights, normalization of the loss, place of the heads, detached skips,
learning rate of the -21 network), its choice is the default and the paper's an
option of the config.

Reference:
  Xu et al., "SqueezeSegV3: Spatially-Adaptive Convolution for Efficient
  Point-Cloud Segmentation", ECCV 2020.
"""

from collections.abc import Iterator, Mapping
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxshape.backbones import rangenet
from jaxshape.data import lidar_labels, scan_augment, sources, stream
from jaxshape.engine import optimizers, scan_evaluators, steps
from jaxshape.errors import InputError
from jaxshape.geometry import spherical
from jaxshape.layers import apply
from jaxshape.losses import segmentation
from jaxshape.points import refinement
from jaxshape.system import System, TrainState, Weights
from jaxshape.typing import Array, Batch, Config, Metrics, PyTree

DTYPES = ("float32", "bfloat16")
UNLABELED = scan_evaluators.UNLABELED


def make(config: Config) -> System:
  """The segmentation system that a config describes."""
  _check(config)
  labels = lidar_labels.load(config.labels)
  net = rangenet.RangeNet(
    num_classes=len(labels.classes),
    **{k: v for k, v in config.network.items() if k != "dtype"},
    dtype=jnp.dtype(config.network.dtype),
  )
  _check_shapes(config, net)
  augmentation = scan_augment.make(config.augment)
  weights = _class_weights(config, labels)

  def loss(
    params: PyTree, extra: PyTree, batch: Batch, key: Array
  ) -> tuple[Array, tuple[PyTree, Metrics]]:
    augment_key, dropout_key = jax.random.split(key)
    batch = augmentation(augment_key, batch)
    seen = project(config, batch)
    truth = _on_image(seen, batch["label"])
    known = ~jnp.isin(truth, jnp.asarray(labels.ignore))
    logits, collections = apply.apply(
      net,
      params["net"],
      extra["net"],
      _normalize(config, seen),
      key=dropout_key,
      update=True,
      train=True,
    )
    total = segmentation.multi_layer_cross_entropy(
      logits,
      truth,
      weights=weights,
      mask=known,
      reduction=config.loss.reduction,
    )
    right = (jnp.argmax(logits[0], axis=-1) == truth) & known
    share = right.sum() / jnp.maximum(known.sum(), 1)
    return total, ({**extra, "net": collections}, {"acc": share})

  averaging = config.averaging or None
  players = {"net": steps.Player(loss, optimizers.make(config.optimizer))}

  def init(key: Array) -> TrainState:
    image = jnp.zeros((1, config.sensor.height, config.sensor.width, 5))
    params, collections = apply.init(net, key, image, train=False)
    return steps.initial_state(
      players, {"net": params}, {"net": collections}, averaging=averaging
    )

  def named(
    state: TrainState, batch: Batch
  ) -> tuple[spherical.Projection, Array]:
    seen = project(config, batch)
    params = steps.evaluation_params(state)["net"]
    logits, _ = apply.apply(
      net, params, state.extra["net"], _normalize(config, seen), train=False
    )
    return seen, _name_pixels(config, seen, logits[0])

  def points(state: TrainState, batch: Batch) -> tuple[Array, ...]:
    seen, image = named(state, batch)
    return _name_points(config, seen, image, batch, len(labels.classes))

  def image(state: TrainState, batch: Batch) -> dict[str, Array]:
    seen, prediction = named(state, batch)
    return {
      "prediction": prediction,
      "truth": _on_image(seen, batch["label"]),
      "range": seen.image[..., 0],
    }

  segmenter = scan_evaluators.Segmenter(
    points,
    ("pixel", "knn") if config.knn.use else ("pixel",),
    image,
    labels.classes,
    labels.colors,
    labels.ignore,
  )

  def predict(state: TrainState, batch: Batch) -> PyTree:
    return {"label": points(state, batch)[-1]}

  def train_data(step: int) -> Iterator[Batch]:
    return stream.train(
      _source(config, config.data.train_split, labels.classes),
      batch_size=config.batch_size,
      seed=config.seed,
      start_step=step,
      workers=config.data.workers,
    )

  return System(
    init=init,
    train_step=steps.take_turns(
      players, accumulate=config.accumulate, averaging=averaging
    ),
    predict=predict,
    train_data=train_data,
    evaluators={
      split: scan_evaluators.scans(segmenter, _batches(config, split, labels))
      for split in config.data.eval_splits
    },
    weights=_weights(net),
  )


def project(config: Config, batch: Batch) -> spherical.Projection:
  """The range images of a batch of scans, as the config's sensor sees them."""
  return spherical.project(
    batch["points"],
    batch["remission"],
    valid=batch["valid"],
    **config.sensor,
    **config.projection,
  )


def _normalize(config: Config, seen: spherical.Projection) -> Array:
  mean = jnp.asarray(config.mean, jnp.float32)
  std = jnp.asarray(config.std, jnp.float32)
  return jnp.where(seen.mask[..., None], (seen.image - mean) / std, 0.0)


def _name_pixels(
  config: Config, seen: spherical.Projection, logits: Array
) -> Array:
  if config.crf.iterations:
    logits = refinement.crf(
      jax.nn.softmax(logits.astype(jnp.float32)),
      seen.image[..., 1:4],
      seen.mask,
      **config.crf,
    )
  return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def _name_points(
  config: Config,
  seen: spherical.Projection,
  image: Array,
  batch: Batch,
  num_classes: int,
) -> tuple[Array, ...]:
  """Labels of the points: of their pixels, and of their neighbours."""
  plain = spherical.unproject_labels(image, seen.row, seen.column)
  knn = config.knn.to_dict()
  if not knn.pop("use"):
    return (plain,)
  voted = refinement.knn_labels(
    image,
    seen.image[..., 0],
    jnp.linalg.norm(jnp.asarray(batch["points"]), axis=-1),
    seen.row,
    seen.column,
    valid=batch["valid"],
    num_classes=num_classes,
    **knn,
  )
  return plain, voted


def _on_image(seen: spherical.Projection, labels: Any) -> Array:
  """The label of the point that each pixel shows; unlabeled where empty."""
  flat = jnp.where(seen.mask, seen.index, 0).reshape(len(seen.mask), -1)
  taken = jnp.take_along_axis(jnp.asarray(labels), flat, axis=1)
  return jnp.where(seen.mask, taken.reshape(seen.mask.shape), UNLABELED)


def _class_weights(config: Config, labels: Any) -> Array | None:
  """Weights of the loss, from how often each class is met in the data set."""
  if config.loss.weights == "none":
    return None
  if labels.frequencies is None:
    raise InputError(
      f"config.labels={config.labels!r} says nothing of how frequent the "
      "classes are ('content'); use --config.loss.weights=none."
    )
  return segmentation.class_weights(
    labels.frequencies,
    form=config.loss.weights,
    epsilon=config.loss.epsilon,
    ignore=labels.ignore,
  )


def _source(config: Config, split: str, classes: Any) -> Any:
  data = config.data
  options = data.get(data.source.partition(":")[0], {})
  source = sources.load(
    data.source,
    split=split,
    data_dir=data.data_dir or None,
    **{k: v for k, v in options.items() if v is not None},
  )
  if tuple(source.classes) != tuple(classes):
    differ = sorted(set(source.classes) ^ set(classes)) or ["their order"]
    raise InputError(
      f"config.data.source={data.source!r} has other classes than "
      f"config.labels={config.labels!r} (they differ in "
      f"{', '.join(differ[:8])}); name the table of labels of these data with "
      "--config.labels."
    )
  return source


def _batches(config: Config, split: str, labels: Any) -> Any:
  @functools.cache  # Opened when it is first needed, and once.
  def opened() -> Any:
    return _source(config, split, labels.classes)

  return lambda: stream.evaluate(opened(), batch_size=config.batch_size)


def _weights(net: rangenet.RangeNet) -> Weights:
  """The authors' own names and layouts of the parameters."""

  def load(state: TrainState, tensors: Mapping[str, np.ndarray]) -> TrainState:
    params, collections = rangenet.from_state_dict(net, tensors)
    return state.replace(
      params={**state.params, "net": params},
      extra={**state.extra, "net": collections},
    )

  def save(state: TrainState) -> Mapping[str, np.ndarray]:
    params = steps.evaluation_params(state)["net"]
    return rangenet.to_state_dict(net, params, state.extra["net"])

  heads = {f"segmentation_head{n}": f"head{n}." for n in range(1, 6)}
  if net.heads == "final":
    heads = {"segmentation_head": "head."}
  parts = {"backbone": "backbone.", "segmentation_decoder": "decoder."}
  return Weights(load, save, parts | heads)


def _check(config: Config) -> None:
  """Refuses what would fail later or mean nothing."""
  for name, known in {
    "network.dtype": DTYPES,
    "loss.weights": ("inverse", "log", "none"),
    "loss.reduction": ("weights", "pixels"),
  }.items():
    group, field = name.split(".")
    if config[group][field] not in known:
      raise InputError(
        f"config.{name} must be one of {', '.join(known)}, got "
        f"{config[group][field]!r}."
      )
  numbers = (*config.mean, *config.std)
  fits = len(config.mean) == len(config.std) == 5 and all(
    isinstance(x, int | float) and math.isfinite(x) for x in numbers
  )
  if not fits or min(config.std) <= 0:
    raise InputError(
      "config.mean and config.std must be five numbers each (range, x, y, z, "
      f"remission), std above 0, got {config.mean} and {config.std}."
    )


def _check_shapes(config: Config, net: rangenet.RangeNet) -> None:
  """Lets each stage refuse what does not fit, before anything is read."""
  for name in ("height", "width"):
    if config.sensor[name] < 1:
      raise InputError(
        f"config.sensor.{name} must be at least 1, got {config.sensor[name]}."
      )
  net.check((1, config.sensor.height, config.sensor.width, 5))

  def stages(batch: Batch) -> tuple[Array, ...]:
    seen = project(config, batch)
    logits = jnp.zeros((*seen.mask.shape, net.num_classes))
    image = _name_pixels(config, seen, logits)
    return _name_points(config, seen, image, batch, net.num_classes)

  scan = {
    "points": jnp.zeros((1, 2, 3)),
    "remission": jnp.zeros((1, 2)),
    "valid": jnp.ones((1, 2), bool),
  }
  jax.eval_shape(stages, scan)
