"""Evaluators that tell shape from texture by restyled images.

Every number is a mean over rows, or made from all of them, so that none depends
on the batch size. Images and styles are 0..255 and restyled on the device.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from matplotlib.figure import Figure
import numpy as np

from jaxshape.data import sources
from jaxshape.engine import comparison, evaluators, report
from jaxshape.errors import InputError
from jaxshape.filters import color, stylization, threshold
from jaxshape.metrics import dimensionality as metrics
from jaxshape.system import Evaluator, TrainState
from jaxshape.typing import Array, Batch, PyTree

CONCEPTS = ("shape", "texture")
SHOWN = 8
# Examples that are looked at for one of another class.
_TRIES = 8


def stylized(
  classifier: evaluators.Classifier,
  data: evaluators.Data,
  *,
  strength: float = 1.0,
) -> Evaluator:
  """Accuracy on images whose texture is another's.

  Args:
    classifier: The network.
    data: With "style" [batch, count, height, width, 3]; the first is taken.
    strength: How much is restyled, within 0..1.

  Returns:
    The evaluator; its numbers are those of `evaluators.accuracy`.

  Reference:
    Geirhos et al., "ImageNet-trained CNNs are biased towards texture;
    increasing shape bias improves accuracy and robustness", ICLR 2019, Sec. 2.
  """
  restyle = _restyler(strength)
  plain = evaluators.accuracy(classifier, data)

  def step(state: TrainState, batch: Batch) -> PyTree:
    evaluators.require(batch, "style", "stylized accuracy")
    images = restyle(batch["image"], batch["style"][:, 0])
    return plain.step(state, {**batch, "image": images})

  def pictures(
    state: TrainState, outputs: Sequence[PyTree]
  ) -> Mapping[str, Figure]:
    drawn = plain.pictures(state, outputs) if plain.pictures else {}
    batch = evaluators.first_rows(data, most=SHOWN)
    styles = batch["style"][:, 0]
    restyled = np.asarray(restyle(batch["image"], styles))
    names = ["original", "style", "restyled"]
    sheet = report.image_sheet(
      [batch["image"], styles, restyled], row_names=names
    )
    return {**drawn, "what is classified": sheet}

  return dataclasses.replace(plain, step=step, pictures=pictures)


def changed(
  classifier: evaluators.Classifier,
  data: evaluators.Data,
  change: Callable[[Array], Array],
  *,
  name: str,
) -> Evaluator:
  """Accuracy on images that are changed before they are classified.

  Args:
    classifier: The network.
    data: The images as they are.
    change: Float images 0..255 to what is classified, each by itself.
    name: What the change is called, below the pictures.

  Returns:
    The evaluator; its numbers are those of `evaluators.accuracy`.
  """

  def images_of(images: evaluators.Images) -> Array:
    return change(jnp.asarray(images, jnp.float32))

  plain = evaluators.accuracy(
    dataclasses.replace(
      classifier,
      features=lambda state, images: classifier.features(
        state, images_of(images)
      ),
    ),
    data,
  )

  def pictures(
    state: TrainState, outputs: Sequence[PyTree]
  ) -> Mapping[str, Figure]:
    drawn = plain.pictures(state, outputs) if plain.pictures else {}
    images = evaluators.first_rows(data, most=SHOWN)["image"]
    shown = [images, np.asarray(images_of(images))]
    sheet = report.image_sheet(shown, row_names=["original", name])
    return {**drawn, "what is classified": sheet}

  return dataclasses.replace(plain, pictures=pictures)


def outlines(images: Array) -> Array:
  """Dark lines on white, where images are darker than what surrounds them.

  Args:
    images: [batch, height, width, 3], 0..255.

  Returns:
    Images of the same shape, 0 or 255, grey.
  """
  grey = color.rgb_to_gray(images)
  lines = threshold.adaptive(grey, block_size=9, offset=9.0)
  return jnp.broadcast_to(lines, images.shape)


class Pairs:
  """Every example with "other", the image of one of another class.

  Of which example is drawn by the example's number; where none of another class
  is found among a few, one of any class is taken.
  """

  def __init__(self, source: sources.Source):
    """Looks at a source, which has two examples or more.

    Args:
      source: The examples.

    Raises:
      InputError: It has one example.
    """
    if len(source) < 2:
      raise InputError(
        f"pairs need two examples or more, got {len(source)}; choose a larger "
        "split, or more of it."
      )
    self.source = source

  @property
  def classes(self) -> tuple[str, ...]:
    """Those of the examples."""
    return self.source.classes

  def __len__(self) -> int:
    return len(self.source)

  def __getitem__(self, i: int) -> sources.Example:
    example, n = self.source[i], len(self)
    draw = np.random.default_rng((i, 1))
    other = None
    for step in draw.integers(1, n, _TRIES):
      other = self.source[int((i + step) % n)]
      if other["label"] != example["label"] and other.get("mask", 1):
        break
    assert other is not None
    # What stands in for a damaged image is in no pair.
    mask = example.get("mask", 1) * other.get("mask", 1)
    return {**example, "other": other["image"], "mask": np.float32(mask)}


def dimensionality(
  classifier: evaluators.Classifier,
  data: evaluators.Data,
  *,
  strength: float = 1.0,
) -> Evaluator:
  """How many neurons of the last layer but one stand for shape and texture.

  A pair that shares its shape is one image in two styles; a pair that shares
  its texture is two images in one style. A neuron is the mean of a channel over
  the image.

  Args:
    classifier: The network.
    data: With "other", the image of another example, and "style" [batch, 2,
      height, width, 3].
    strength: How much is restyled, within 0..1.

  Returns:
    The evaluator. "shape_share", "texture_share" and "residual_share" are by
    the public estimator, in whole neurons, and "shape_score" and
    "texture_score" what it makes them of; those that begin with "correlation/"
    weigh every neuron alike, by its correlation over the pairs.

  Reference:
    Islam et al., "Shape or Texture: Understanding Discriminative Features in
    CNNs", ICLR 2021, Sec. 3.1.
  """
  restyle = _restyler(strength)

  def views(batch: Batch) -> tuple[Array, Array, Array]:
    image, other = (jnp.asarray(batch[name]) for name in ("image", "other"))
    first, second = (jnp.asarray(batch["style"])[:, i] for i in (0, 1))
    # One call for all: a third of it to compile.
    together = restyle(
      jnp.concatenate([image, image, other]),
      jnp.concatenate([first, second, first]),
    )
    anchor, shape, texture = jnp.split(together, 3)
    return anchor, shape, texture

  def step(state: TrainState, batch: Batch) -> PyTree:
    for name in ("style", "other"):
      evaluators.require(batch, name, "dimensionality")
    latents = [
      jnp.mean(classifier.features(state, view), axis=(1, 2), dtype=jnp.float32)
      for view in views(batch)
    ]
    names = ("anchor", *CONCEPTS)
    return {"mask": batch["mask"], **dict(zip(names, latents, strict=True))}

  def pairs(
    outputs: Sequence[PyTree],
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows = evaluators.real_rows(outputs)
    return (
      np.concatenate([rows["anchor"]] * 2),
      np.concatenate([rows[concept] for concept in CONCEPTS]),
      np.repeat(np.arange(2, dtype=np.int32), len(rows["anchor"])),
    )

  def shares(outputs: Sequence[PyTree]) -> dict[str, np.ndarray]:
    latents = pairs(outputs)
    counts = np.array(metrics.count_neurons(*latents), np.float64)
    counts[counts < 0] = np.nan  # Nothing varies.
    return {
      "": counts / counts.sum(),
      "correlation/": np.asarray(metrics.share_by_correlation(*latents)),
    }

  names = [f"{concept}_share" for concept in (*CONCEPTS, "residual")]

  def summarize(outputs: Sequence[PyTree]) -> Mapping[str, float]:
    numbers = {
      form + name: float(share)
      for form, found in shares(outputs).items()
      for name, share in zip(names, found, strict=True)
    }
    latents = pairs(outputs)
    scores = np.asarray(metrics.factor_scores(*latents))
    count, neurons = latents[0].shape
    return {
      **numbers,
      "shape_score": float(scores[0]),
      "texture_score": float(scores[1]),
      "neurons": neurons,
      "pairs": count,
    }

  def plots(outputs: Sequence[PyTree]) -> Mapping[str, comparison.Plot]:
    found = shares(outputs)
    bars = functools.partial(
      comparison.Plot,
      "bars",
      (*CONCEPTS, "residual"),
      place="factor",
      value="share of the neurons",
    )
    return {
      "neurons": bars(found[""].tolist()),
      "neurons by correlation": bars(found["correlation/"].tolist()),
    }

  def pictures(
    state: TrainState, outputs: Sequence[PyTree]
  ) -> Mapping[str, Figure]:
    del state
    drawn = plots(outputs)
    bars = comparison.draw(
      {
        "public estimator": drawn["neurons"],
        "by correlation": drawn["neurons by correlation"],
      }
    )
    shown = [
      np.asarray(view)
      for view in views(evaluators.first_rows(data, most=SHOWN))
    ]
    sheet = report.image_sheet(
      shown, row_names=["image", "same shape", "same texture"]
    )
    return {"neurons": bars, "pairs": sheet}

  return Evaluator(data, step, summarize, pictures, plots)


def _restyler(strength: float) -> Any:
  if not 0 <= strength <= 1:
    raise ValueError(f"style_strength must be in 0..1, got {strength}.")

  def restyle(images: evaluators.Images, styles: evaluators.Images) -> Array:
    return stylization.match_statistics(
      jnp.asarray(images, jnp.float32),
      jnp.asarray(styles, jnp.float32),
      strength=strength,
    )

  return restyle
