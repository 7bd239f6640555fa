"""Texture suppression: classifiers trained on images whose texture is smoothed.

| paper | here |
|---|---|
| Eq. 1 and 2, Perona-Malik diffusion | `filters.diffusion.perona_malik` |
| drawing a strength per image | `data.suppression.random_suppression` |
| Table 4, the other filters | `filter="robust"`, `"gaussian"`, … |
| Sec. 3, "Anisotropic ImageNet" (originals and filtered) | `policy="union"` |
| Sec. 4, only filtered / only original | `policy="filtered"`, `"original"` |
| Sec. 4.1, filtered with a probability | `policy="probability"` |
| Sec. 4.1, iterations drawn from 10..20 | `iterations=(10, 20)` |
| Sec. 4, fine-tuning on originals | `init_from` another run, `"original"` |
| Sec. 4.3, Grad-CAM | evaluator `saliency` |

Images are 0..255 until they enter the network; the filter runs on the device,
before every other augmentation there, as if the data set itself were filtered.

Note: the paper filters whole photographs once; where the host crops them at
random (`data.options.crop="random"`), the filter sees the crop, at its size.

Reference:
  Mishra et al., "Learning Visual Representations for Transfer Learning by
  Suppressing Texture", 2020.
"""

from collections.abc import Mapping
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxshape.data import augment, sources, suppression
from jaxshape.engine import (
  bench,
  classifiers,
  evaluators,
  pretrained,
  shape_evaluators,
)
from jaxshape.errors import InputError
from jaxshape.layers import apply
from jaxshape.system import Evaluator, System
from jaxshape.typing import Array, Batch, Config, Metrics, PyTree

POLICIES = ("original", "union", "filtered", "probability")


def _filter(
  config: Config,
  key: Array,
  images: Array,
  *,
  share: Array | float,
  strongest: bool = False,
) -> Array:
  """Filters a share of the images, or each as its own share says."""
  drawn = slice(-1, None) if strongest else slice(None)
  return suppression.random_suppression(
    key,
    images,
    probabilities={config.filter: share},
    iterations=config.iterations[drawn],
    kappa=config.kappa,
    step_size=config.step_size,
    conduction=config.conduction,
    sigma=config.sigma[drawn],
    diameter=config.diameter,
    sigma_color=config.sigma_color[drawn],
    sigma_space=config.sigma_space,
    size=config.size,
    preset=config.preset,
  )


def suppress(config: Config, key: Array, batch: Batch) -> dict[str, Any]:
  """Filters the images that the policy chose; each draws its own strength.

  Args:
    config: `config.suppression`.
    key: Split over the images.
    batch: With `"image"` 0..255, and `"filtered"` (1 or 0) of the union.

  Returns:
    The batch with float images.
  """
  images = jnp.asarray(batch["image"], jnp.float32)
  if config.policy != "original":
    share = {
      "union": batch.get("filtered"),
      "filtered": 1.0,
      "probability": config.probability,
    }[config.policy]
    images = _filter(config, key, images, share=share)
  return {**batch, "image": images}


def make(config: Config) -> System:
  """The supervised system that a config describes."""
  config = pretrained.adopt(config)
  _check(config)
  splits = classifiers.Splits(config)
  net = classifiers.network(config, num_classes=len(splits.classes))
  normalize = classifiers.normalizer(config)
  augmentation = augment.make(config.augment, num_classes=len(splits.classes))

  def loss(
    params: PyTree, extra: PyTree, batch: Batch, key: Array
  ) -> tuple[Array, tuple[PyTree, Metrics]]:
    filter_key, augment_key = jax.random.split(key)
    batch = suppress(config.suppression, filter_key, batch)
    batch = augmentation(augment_key, batch)
    logits, collections = apply.apply(
      net,
      params[classifiers.NET],
      extra[classifiers.NET],
      normalize(batch["image"]),
      key=jax.random.fold_in(key, 2),  # Where something is dropped.
      update=True,
      train=True,
    )
    losses = classifiers.loss(
      logits, batch, label_smoothing=config.label_smoothing
    )
    right = jnp.argmax(logits, axis=-1) == jnp.asarray(batch["label"])
    metrics = {"top1": right.mean(dtype=jnp.float32)}
    extra = {**extra, classifiers.NET: collections}
    return losses.mean(), (extra, metrics)

  def examples(source: sources.Source) -> sources.Source:
    union = config.suppression.policy == "union"
    return sources.Doubled(source) if union else source

  classifier = classifiers.classifier(net, normalize, splits.classes)
  return classifiers.system(
    config,
    net,
    loss,
    splits=splits,
    evaluators=_evaluators(config, classifier, splits),
    start=pretrained.start(config, net),
    examples=examples,
  )


def _check(config: Config) -> None:
  classifiers.check(config)
  chosen = config.suppression
  if not 0 <= chosen.probability <= 1:
    raise InputError(
      "config.suppression.probability must be in 0..1, got "
      f"{chosen.probability}."
    )
  if chosen.policy not in POLICIES:
    raise InputError(
      f"config.suppression.policy must be one of {', '.join(POLICIES)}, got "
      f"{chosen.policy!r}."
    )
  if chosen.filter not in suppression.FILTERS:
    raise InputError(
      "config.suppression.filter must be one of "
      f"{', '.join(suppression.FILTERS)}, got {chosen.filter!r}."
    )
  for name in ("iterations", "sigma", "sigma_color"):
    values = chosen[name]
    if len(values) != 2 or not 0 <= values[0] <= values[1]:
      raise InputError(
        f"config.suppression.{name} must be a range (low, high) from 0 up, got "
        f"{tuple(values)}."
      )
  if not all(isinstance(n, int) for n in chosen.iterations):
    raise InputError(
      "config.suppression.iterations must be whole numbers, got "
      f"{tuple(chosen.iterations)}."
    )
  # The filter itself refuses what else does not fit.
  one = functools.partial(_filter, chosen, share=1.0)
  jax.eval_shape(one, jax.random.key(0), jnp.zeros((2, 2, 2, 3)))


def _evaluators(
  config: Config,
  classifier: evaluators.Classifier,
  splits: classifiers.Splits,
) -> Mapping[str, Evaluator]:
  """What `config.bench` asks for, and accuracy on filtered images."""
  out = bench.evaluators(config, classifier, splits)
  filtered = config.bench.filtered
  # The styles of "stylized" are a batch's own: no measure of a network.
  if filtered and config.suppression.filter != "stylized":
    strongest = lambda images: _filter(
      config.suppression,
      jax.random.key(0),  # Nothing is left to draw.
      images,
      share=1.0,
      strongest=True,
    )
    out[f"filtered_{filtered}"] = shape_evaluators.changed(
      classifier,
      splits.batches(filtered),
      strongest,
      name=config.suppression.filter,
    )
  return out
