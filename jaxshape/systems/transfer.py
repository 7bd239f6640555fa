"""Transfer: what a trained network is worth for other data and other tasks.

| paper, Sec. 4.4 and Table 6 | here |
|---|---|
| initialized from a trained network | `pretrained`: a workdir, or a file |
| fine-tuned; "freeze", linear | `head="fine_tune"`; `head="linear"` |
| Caltech-101, CIFAR-100, DTD | `task="single"` |
| VOC07, mean average precision | `task="multilabel"`, `metrics.multilabel` |
| VOC12 segmentation, one convolution | `task="segmentation"` |
| pseudo-labels from CAMs, threshold 0.15 | evaluator `cam_<split>` |

The head is always the network's own linear layer: on the mean of the last
features, or, for segmentation, on each of them, which is a 1x1 convolution,
whose logits are enlarged bilinearly to the image.

A linear head leaves everything else as it was, batch statistics too. Where
nothing about the images is drawn, they go through the network once, before the
first step, and training sees their features.

Note: the paper leaves learning rates, image sizes and the dilation of its
segmentation networks to supplements; here the features stay as coarse as the
backbone has them, 1/32 of the image, and the numbers of the configs are ours.

Reference:
  Islam et al., "Maximizing Mutual Shape Information", BMVC 2022, Sec. 4.4.
"""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxshape.backbones import registry
from jaxshape.data import augment, sources, stream, voc
from jaxshape.engine import (
  classifiers,
  evaluators,
  optimizers,
  pretrained,
  steps,
  transfer_evaluators,
)
from jaxshape.errors import InputError
from jaxshape.layers import apply
from jaxshape.losses import segmentation
from jaxshape.system import Evaluator, System, TrainState
from jaxshape.typing import Array, Batch, Config, Metrics, PyTree

NET = classifiers.NET
HEADS = ("linear", "fine_tune")
# What the examples of each task are taught by.
TASKS = {
  "single": "label",
  "multilabel": "labels",
  "segmentation": "segmentation",
}


def make(config: Config) -> System:
  """The transfer that a config describes."""
  config = pretrained.adopt(config)
  _check(config)
  splits = classifiers.Splits(config)
  net = classifiers.network(config, num_classes=len(splits.classes))
  classifier = classifiers.classifier(
    net, classifiers.normalizer(config), splits.classes
  )
  given = functools.cache(functools.partial(pretrained.load, config, net))
  head = registry.find(config.backbone).HEAD
  optimizer = optimizers.make(config.optimizer)
  if config.head == "linear":
    # So that what does not move has no momentum to keep.
    optimizer = optax.multi_transform(
      {"head": optimizer, "rest": optax.set_to_zero()},
      lambda params: {n: "head" if n == head else "rest" for n in params},
    )

  def segment(state: TrainState, images: evaluators.Images) -> Array:
    features = classifier.features(state, images)[..., None, None, :]
    return _enlarged(classifier.head(state, features), images.shape[1:3])

  def predict(state: TrainState, batch: Batch) -> PyTree:
    if "image" not in batch:
      features = jnp.asarray(batch["features"])[:, None, None]
      return classifier.head(state, features)
    say = segment if config.task == "segmentation" else classifier.logits
    return say(state, jnp.asarray(batch["image"]))

  def train_data(step: int) -> Iterator[Batch]:
    source, workers = splits.open(config.data.train_split), config.data.workers
    if _is_seen_once(config, source):
      source, workers = _seen_once(config, source, net, given()), 0
    return stream.train(
      source,
      batch_size=config.batch_size,
      seed=config.seed,
      start_step=step,
      workers=workers,
    )

  system = classifiers.system(
    config,
    net,
    _loss(config, net),
    splits=splits,
    evaluators=_evaluators(config, splits, classifier, segment),
    start=pretrained.start(config, net),
    optimizer=optimizer,
  )
  return dataclasses.replace(system, predict=predict, train_data=train_data)


def _loss(config: Config, net: Any) -> steps.Loss:
  """What the head, or the whole network, descends."""
  augmentation = _augmentation(config, net.num_classes)
  normalize = classifiers.normalizer(config)
  linear, key_of_truth = config.head == "linear", TASKS[config.task]
  value_of = _LOSSES[config.task]

  def spatial(
    params: PyTree, collections: PyTree, batch: Batch
  ) -> tuple[Array, PyTree]:
    """The features to put the head on, and the statistics afterwards."""
    if "features" in batch:
      return jnp.asarray(batch["features"])[:, None, None], collections
    features, collections = apply.apply(
      net,
      params,
      collections,
      normalize(batch["image"]),
      method="features",
      train=not linear,
      update=not linear,
    )
    return jax.lax.stop_gradient(features) if linear else features, collections

  def loss(
    params: PyTree, extra: PyTree, batch: Batch, key: Array
  ) -> tuple[Array, tuple[PyTree, Metrics]]:
    if key_of_truth not in batch:
      raise InputError(
        f"config.task={config.task!r} needs examples with "
        f'"{key_of_truth}", got {", ".join(sorted(batch))}.'
      )
    if "image" in batch:
      batch = augmentation(key, batch)
    features, collections = spatial(params[NET], extra[NET], batch)
    if config.task == "segmentation":
      features = features[..., None, None, :]
    logits, _ = apply.apply(net, params[NET], {}, features, method="head")
    value, metrics = value_of(config, logits, batch)
    return value, ({**extra, NET: collections}, metrics)

  return loss


def _enlarged(logits: Array, size: tuple[int, ...]) -> Array:
  shape = (len(logits), *size, logits.shape[-1])
  return jax.image.resize(logits, shape, "linear", antialias=False)


def _single(
  config: Config, logits: Array, batch: Batch
) -> tuple[Array, Metrics]:
  smoothing = config.label_smoothing
  losses = classifiers.loss(logits, batch, label_smoothing=smoothing)
  right = jnp.argmax(logits, axis=-1) == jnp.asarray(batch["label"])
  return losses.mean(), {"top1": right.mean(dtype=jnp.float32)}


def _multilabel(
  config: Config, logits: Array, batch: Batch
) -> tuple[Array, Metrics]:
  """Cross-entropy of each class by itself, but for what does not count."""
  del config
  labels = jnp.asarray(batch["labels"])
  known = labels >= 0
  losses = optax.sigmoid_binary_cross_entropy(logits, jnp.maximum(labels, 0))
  number = jnp.maximum(known.sum(), 1)
  right = jnp.where(known, (logits > 0) == (labels > 0), False).sum() / number
  return jnp.where(known, losses, 0).sum() / number, {"labels_right": right}


def _segmentation(
  config: Config, logits: Array, batch: Batch
) -> tuple[Array, Metrics]:
  del config
  labels = jnp.asarray(batch["segmentation"])
  logits, counted = _enlarged(logits, labels.shape[1:]), labels != voc.VOID
  value = segmentation.mean_cross_entropy(logits, labels, mask=counted)
  right = counted & (jnp.argmax(logits, axis=-1) == labels)
  share = right.sum() / jnp.maximum(counted.sum(), 1)
  return value, {"pixels_right": share}


_LOSSES: Mapping[str, Callable[..., tuple[Array, Metrics]]] = {
  "single": _single,
  "multilabel": _multilabel,
  "segmentation": _segmentation,
}


def _augmentation(
  config: Config, num_classes: int
) -> Callable[[Array, Batch], Batch]:
  """The config's; of maps and their images together, a mirror alone."""
  if config.task != "segmentation":
    mixed = num_classes if config.task == "single" else None
    return augment.make(config.augment, num_classes=mixed)
  if set(config.augment) - {"horizontal_flip"}:
    raise InputError(
      "config.augment of task='segmentation' may have horizontal_flip alone, "
      f"as the maps have to follow, got {', '.join(config.augment)}."
    )

  def flip(key: Array, batch: Batch) -> Batch:
    turned = jax.random.bernoulli(key, 0.5, (len(batch["image"]),))
    out = dict(batch)
    for name in ("image", "segmentation"):
      rows = jnp.asarray(batch[name])
      chosen = turned.reshape(-1, *[1] * (rows.ndim - 1))
      out[name] = jnp.where(chosen, rows[:, :, ::-1], rows)
    return out

  return flip if config.augment else lambda _, batch: batch


class _Rows:
  """Examples that are at hand as arrays, instead of those of a source."""

  def __init__(self, source: sources.Source, rows: Mapping[str, np.ndarray]):
    self.source, self.rows = source, rows
    self.classes = tuple(source.classes)

  def __len__(self) -> int:
    return len(self.source)

  def __getitem__(self, i: int) -> sources.Example:
    return {name: values[i] for name, values in self.rows.items()}


def _is_seen_once(config: Config, source: sources.Source) -> bool:
  """Whether a frozen network would say the same of an image each time."""
  return bool(
    config.head == "linear"
    and config.task != "segmentation"  # Their features are many.
    and config.pretrained
    and not config.init_from
    and not config.augment
    and getattr(source, "sample", None) is None
  )


def _seen_once(
  config: Config,
  source: sources.Source,
  net: Any,
  given: tuple[PyTree, PyTree],
) -> sources.Source:
  """The mean features of every image, in its place."""
  normalize = classifiers.normalizer(config)

  @jax.jit
  def mean(params: PyTree, collections: PyTree, images: Array) -> Array:
    features, _ = apply.apply(
      net,
      params,
      collections,
      normalize(images),
      method="features",
      train=False,
    )
    return features.mean(axis=(1, 2), dtype=jnp.float32)

  params, collections = jax.device_put(given)
  parts = []
  # Each process sees all, as its rows change from epoch to epoch.
  for batch in stream.evaluate(
    source, batch_size=config.batch_size, process_index=0, process_count=1
  ):
    real = batch["index"] >= 0
    features = np.asarray(mean(params, collections, batch["image"]))
    part = {k: v for k, v in batch.items() if k in TASKS.values()}
    part["features"] = features
    parts.append({name: rows[real] for name, rows in part.items()})
  return _Rows(
    source, {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
  )


def _evaluators(
  config: Config,
  splits: classifiers.Splits,
  classifier: evaluators.Classifier,
  segment: transfer_evaluators.Segment,
) -> Mapping[str, Evaluator]:
  measure = {
    "single": functools.partial(evaluators.accuracy, classifier),
    "multilabel": functools.partial(
      transfer_evaluators.multi_label, classifier
    ),
    "segmentation": functools.partial(
      transfer_evaluators.segmentation_maps, segment, classes=splits.classes
    ),
  }[config.task]
  out = {
    split: measure(splits.batches(split)) for split in config.data.eval_splits
  }
  if config.bench.cam_split:
    head = registry.find(config.backbone).HEAD
    out[f"cam_{config.bench.cam_split}"] = transfer_evaluators.pseudo_labels(
      classifier,
      lambda state: steps.evaluation_params(state)[NET][head]["kernel"],
      lambda: _with_maps(config, splits),
      threshold=config.bench.cam_threshold,
    )
  return out


def _with_maps(config: Config, splits: classifiers.Splits) -> stream.Batches:
  """The split whose maps the pseudo-labels are compared with."""
  # Maps also have a background.
  source = splits.open(
    config.bench.cam_split, checked=False, task="segmentation"
  )
  return stream.evaluate(source, batch_size=config.batch_size)


def _check(config: Config) -> None:
  classifiers.check(config)
  for name, known in (("task", tuple(TASKS)), ("head", HEADS)):
    if config[name] not in known:
      raise InputError(
        f"config.{name} must be one of {', '.join(known)}, got "
        f"{config[name]!r}."
      )
  if config.bench.cam_split and config.task != "multilabel":
    raise InputError(
      "config.bench.cam_split needs config.task='multilabel', got "
      f"{config.task!r}."
    )
  if not 0 < config.bench.cam_threshold <= 1:
    raise InputError(
      "config.bench.cam_threshold must be above 0 and at most 1, got "
      f"{config.bench.cam_threshold}."
    )
