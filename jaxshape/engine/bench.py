"""The test bench: what tells shape from texture, for any image classifier.

`config.bench` says what is measured; all of it is off by default. A split is
one of `config.data`, in which pictures have the labels of training; or, where
`categories` is "imagenet", one of `stimuli`, in which they have those of the 16
categories, and the head has the 1,000 classes of ImageNet.

Reference:
  Geirhos et al., "ImageNet-trained CNNs are biased towards texture; increasing
  shape bias improves accuracy and robustness", ICLR 2019. The other tests name
  theirs where they are made.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from jaxshape.data import sources, stream, styles
from jaxshape.engine import (
  attack_evaluators,
  classifiers,
  shape_evaluators,
)
from jaxshape.engine import evaluators as image_evaluators
from jaxshape.errors import InputError, few
from jaxshape.metrics import categories
from jaxshape.system import Evaluator, TrainState
from jaxshape.typing import Array, Config

Classifier = image_evaluators.Classifier
RULES = ("", "imagenet")


def defaults() -> Config:
  """The fields of `config.bench`; a config changes them.

  Returns:
    An unlocked config, which measures nothing.
  """
  bench: Config = ConfigDict()
  # The split whose examples have a "texture" beside their "label", or are
  # files that are called by both, such as cat1-bicycle2.png.
  bench.cue_conflict = ""
  # So many examples, drawn; 0 for all.
  bench.corruption_split = ""
  bench.corruption_examples = 0
  bench.corruptions = ()
  bench.severities = (1, 2, 3, 4, 5)
  # Splits for which it is shown where the network looks.
  bench.saliency = ()
  # Splits whose images are restyled before they are classified.
  bench.stylized = ()
  # The split whose images make pairs of one shape, and of one texture.
  bench.dimensionality = ""
  bench.dimensionality_examples = 1024
  # Of both: where the styles come from (data/styles.py), what that takes, and
  # how much is restyled.
  bench.style_source = "generated"
  bench.style_options = ConfigDict()
  bench.style_strength = 1.0
  # Epsilons are grey levels, 0..255. An attack on `surrogate`, another run's
  # workdir, is tried on this network with `epsilons`, and one on the network
  # itself with `white_box`.
  bench.attacks = ConfigDict()
  bench.attacks.split = ""
  bench.attacks.examples = 0
  bench.attacks.names = ("fgsm", "pgd", "iterative_fgsm", "momentum_fgsm")
  bench.attacks.surrogate = ""
  bench.attacks.epsilons = (2.0, 4.0, 8.0, 16.0)
  bench.attacks.white_box = ()
  # "imagenet": the head has 1,000 classes, and decides between 16 categories.
  bench.categories = ""
  # How a category's probability is made of its classes': mean, sum or max.
  bench.aggregate = "mean"
  # Data that are labelled by the categories, such as a folder with
  # `cue_conflict/<category>/...`, and their splits whose accuracy is measured.
  bench.stimuli = ""
  bench.stimuli_options = ConfigDict()
  bench.stimuli_splits = ()
  return bench


def evaluators(
  config: Config,
  classifier: Classifier,
  splits: classifiers.Splits,
) -> dict[str, Evaluator]:
  """One accuracy per split of the data, and what `config.bench` asks for.

  Args:
    config: With `batch_size`, `data`, `mesh` and `bench`; fields of `defaults`
      that `bench` lacks have their defaults.
    classifier: The network, of the classes of `splits`.
    splits: The data.

  Returns:
    Evaluators by name: those of the splits, "cue_conflict", "corruption",
    "saliency_<split>", "stylized_<split>", "dimensionality", "transferred" and
    "white_box" (attacks), and "stimuli_<split>".

  Raises:
    InputError: A field of the bench is of another type or out of its range, or
      names what there is not. What data hold is seen when they are opened.
  """
  bench = _checked(config.bench)
  out = {
    split: image_evaluators.accuracy(classifier, splits.batches(split))
    for split in config.data.eval_splits
  }
  out |= _decisions(config, bench, classifier, splits)
  if bench.corruptions:
    out["corruption"] = image_evaluators.corruptions(
      classifier,
      splits.batches(bench.corruption_split, most=bench.corruption_examples),
      names=bench.corruptions,
      severities=bench.severities,
    )
  for split in bench.saliency:
    out[f"saliency_{split}"] = image_evaluators.saliency(
      classifier, splits.batches(split)
    )
  out |= _restyled(config, bench, classifier, splits)
  return out | _attacks(config, bench.attacks, classifier, splits)


def _checked(given: Config) -> Config:
  """The fields of a config's bench, with the defaults of those it lacks."""
  bench = defaults()
  try:
    bench.update(given)
  except TypeError as error:
    raise InputError(f"config.bench: {str(error).splitlines()[0]}") from error
  attacks, some = bench.attacks, ("corruption", "dimensionality")
  counts = {f"{name}_examples": bench[f"{name}_examples"] for name in some}
  counts["attacks.examples"] = attacks.examples
  refusals = [
    *(
      (count < 0, f"{name} must be 0 or more, got {count}.")
      for name, count in counts.items()
    ),
    *(
      (
        bench[name] not in known,
        f"{name} must be one of {', '.join(map(repr, known))}, got "
        f"{bench[name]!r}.",
      )
      for name, known in (
        ("categories", RULES),
        ("aggregate", categories.AGGREGATES),
      )
    ),
    (
      not 0 <= bench.style_strength <= 1,
      f"style_strength must be in 0..1, got {bench.style_strength}.",
    ),
    # Also of a kind that is off: it may be meant to be on.
    *(
      (
        not all(0 < epsilon <= 255 for epsilon in attacks[name]),
        f"attacks.{name} must be above 0 and at most 255, in grey levels, got "
        f"{tuple(attacks[name])}.",
      )
      for name in ("epsilons", "white_box")
    ),
    (
      bench.corruptions and not bench.corruption_split,
      "corruption_split must name the split of bench.corruptions, got ''.",
    ),
    (
      (attacks.surrogate or attacks.white_box) and not attacks.split,
      "attacks.split must name the split that is attacked, got ''.",
    ),
    (
      (bench.categories == "imagenet") != bool(bench.stimuli),
      "stimuli must name data that are labelled by bench.categories, and both "
      f"be given or none, got {bench.stimuli!r} and {bench.categories!r}.",
    ),
    (
      bench.stimuli_splits and not bench.stimuli,
      "stimuli must name the data of bench.stimuli_splits, got ''.",
    ),
  ]
  for refused, text in refusals:
    if refused:
      raise InputError(f"config.bench.{text}")
  return bench


def _decisions(
  config: Config,
  bench: Config,
  classifier: Classifier,
  splits: classifiers.Splits,
) -> dict[str, Evaluator]:
  """Shape against texture, and accuracy, by the rule that `bench` names."""
  out: dict[str, Evaluator] = {}
  if not bench.categories:
    if bench.cue_conflict:
      out["cue_conflict"] = image_evaluators.cue_conflict(
        classifier,
        _opened(
          lambda: _with_textures(
            splits.some(bench.cue_conflict), splits.classes
          ),
          config.batch_size,
        ),
      )
    return out
  if len(classifier.classes) != len(categories.IMAGENET_TO_16):
    raise InputError(
      f"config.bench.categories='imagenet' needs a head of 1,000 classes, got "
      f"{len(classifier.classes)}."
    )

  def stimuli(split: str) -> image_evaluators.Data:
    def source() -> Any:
      found = sources.load(
        bench.stimuli,
        split=split,
        image_size=config.data.image_size,
        **bench.stimuli_options.to_dict(),
      )
      if not len(found):
        raise InputError(f"the stimuli {bench.stimuli!r} hold no examples.")
      found = Categorized(found)
      if split == bench.cue_conflict:
        return _with_textures(found, categories.CATEGORIES)
      return found

    return _opened(source, config.batch_size)

  if bench.cue_conflict:
    data = stimuli(bench.cue_conflict)
    out["cue_conflict"] = image_evaluators.cue_conflict(
      classifier,
      data,
      decide=lambda logits: categories.decide(
        jax.nn.softmax(logits), aggregate=bench.aggregate
      ),
      classes=categories.CATEGORIES,
    )
  coarse = categorizer(classifier, aggregate=bench.aggregate)
  for split in bench.stimuli_splits:
    out[f"stimuli_{split}"] = image_evaluators.accuracy(coarse, stimuli(split))
  return out


def _restyled(
  config: Config,
  bench: Config,
  classifier: Classifier,
  splits: classifiers.Splits,
) -> dict[str, Evaluator]:
  @functools.cache
  def pool() -> sources.Source:
    given = bench.style_options.to_dict()
    if bench.style_source == "generated":  # Training draws those of seed 0.
      given = {"seed": 1, **given}
    return styles.open_styles(
      bench.style_source, image_size=config.data.image_size, **given
    )

  def restyled(split: str) -> image_evaluators.Data:
    return _opened(
      lambda: styles.Styled(splits.some(split), pool(), count=1),
      config.batch_size,
    )

  out = {
    f"stylized_{split}": shape_evaluators.stylized(
      classifier, restyled(split), strength=bench.style_strength
    )
    for split in bench.stylized
  }
  if bench.dimensionality:

    def pairs() -> Any:
      some = splits.some(
        bench.dimensionality, most=bench.dimensionality_examples
      )
      return styles.Styled(shape_evaluators.Pairs(some), pool(), count=2)

    out["dimensionality"] = shape_evaluators.dimensionality(
      classifier,
      _opened(pairs, config.batch_size),
      strength=bench.style_strength,
    )
  return out


def _attacks(
  config: Config,
  attacks: Config,
  classifier: Classifier,
  splits: classifiers.Splits,
) -> dict[str, Evaluator]:
  if not attacks.split:
    return {}
  load = functools.partial(
    attack_evaluators.load_surrogate, attacks.surrogate, mesh=config.mesh
  )
  kinds: dict[str, tuple[Sequence[float], Any]] = {}
  if attacks.surrogate:
    kinds["transferred"] = attacks.epsilons, load
  if attacks.white_box:
    kinds["white_box"] = attacks.white_box, None
  return {
    name: attack_evaluators.attacked(
      classifier,
      splits.batches(attacks.split, most=attacks.examples),
      attacks=attacks.names,
      epsilons=epsilons,
      surrogate=surrogate,
    )
    for name, (epsilons, surrogate) in kinds.items()
  }


def categorizer(
  classifier: Classifier, *, aggregate: str = "mean"
) -> Classifier:
  """A classifier of ImageNet's classes as one of the 16 categories.

  Args:
    classifier: With the 1,000 classes.
    aggregate: How a category's probability is made of its classes'.

  Returns:
    The classifier; its logits are the logarithms of the categories' scores.
  """

  def head(state: TrainState, features: Array) -> Array:
    logits = classifier.head(state, features).astype(jnp.float32)
    scores = categories.scores(jax.nn.softmax(logits), aggregate=aggregate)
    return jnp.log(jnp.maximum(scores, jnp.finfo(jnp.float32).tiny))

  return Classifier(classifier.features, head, categories.CATEGORIES)


class Categorized:
  """Examples whose labels are numbers of the 16 categories, by their names."""

  classes = categories.CATEGORIES

  def __init__(self, source: Any):
    """Finds the categories of a source's classes.

    Args:
      source: Its classes are called as the categories are.

    Raises:
      InputError: One is called otherwise, or there are none.
    """
    unknown = [c for c in source.classes if c not in categories.CATEGORIES]
    if unknown or not source.classes:
      raise InputError(
        "the classes of config.bench.stimuli must be among the categories "
        f"{', '.join(categories.CATEGORIES)}; got "
        f"{few(unknown) or 'images without classes'}."
      )
    self.source = source
    self.files = getattr(source, "files", None)
    numbers = map(categories.CATEGORIES.index, source.classes)
    # The last is for examples without a label, -1.
    self._numbers = np.array([*numbers, -1], np.int32)

  def __len__(self) -> int:
    return len(self.source)

  def __getitem__(self, i: int) -> sources.Example:
    example = self.source[i]
    found = {
      name: self._numbers[np.clip(example[name], -1, len(self._numbers) - 2)]
      for name in ("label", "texture")
      if name in example
    }
    return {**example, **found}


def _with_textures(source: Any, classes: Sequence[str]) -> Any:
  """A source with "texture", from the names of its files if it has none."""
  files = getattr(source, "files", None)
  if files is None or "texture" in source[0]:
    return source  # The evaluator says what is missing.
  return shape_evaluators.Stimuli(source, files, classes)


def _opened(
  source: Callable[[], Any], batch_size: int
) -> image_evaluators.Data:
  """Batches of a source that is opened once, when they are first asked for."""
  once = functools.cache(source)
  return lambda: stream.evaluate(once(), batch_size=batch_size)
