"""The test bench: what tells shape from texture, for any image classifier.

`config.bench` says what is measured; all of it is off by default. A split is
one of `config.data`, in which pictures have the labels of training. Where
`categories` is "imagenet", the head has the 1,000 classes of ImageNet, and
`cue_conflict`, `stimuli_splits` and every split that is called
"stimuli:<split>" are of `stimuli`, which are labelled by 16 categories; as long
as `stimuli` is empty, they are left out.

Reference:
  Geirhos et al., "ImageNet-trained CNNs are biased towards texture; increasing
  shape bias improves accuracy and robustness", ICLR 2019. The other tests name
  theirs where they are made.
"""

from collections.abc import Callable, Sequence
import functools
import logging
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder
import numpy as np

from jaxshape.data import cue_conflict, sources, stream, styles
from jaxshape.engine import (
  attack_evaluators,
  classifiers,
  shape_evaluators,
)
from jaxshape.engine import evaluators as image_evaluators
from jaxshape.errors import InputError, few
from jaxshape.metrics import categories, published
from jaxshape.system import Evaluator, TrainState
from jaxshape.typing import Array, Config

Classifier = image_evaluators.Classifier
RULES = ("", "imagenet")
STIMULI = "stimuli:"
# Pictures of these kinds are resized as their options say.
_FOLDERS = ("cue_conflict", "folder")


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
  # Published corrupted pictures, "corrupted:<root>" (data/corrupted.py), and
  # what that takes. Where there are ImageNet's 1,000 classes, folders are
  # called by WordNet ids unless this says otherwise.
  bench.corrupted = ""
  bench.corrupted_options = _options(wordnet=bool, classes=tuple)
  # Splits of `data.eval_splits` that hold some of the classes, such as
  # ImageNet-A and -R: the network chooses among those alone.
  bench.restricted = ()
  # Splits for which it is shown where the network looks.
  bench.saliency = ()
  # Splits whose images are reduced to their outlines.
  bench.outlined = ()
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
  # Data that are labelled by the categories, such as "cue_conflict:<root>", and
  # their splits whose accuracy is measured. They are shown whole: unless the
  # options say otherwise, they are resized to the network's size, not cut.
  bench.stimuli = ""
  bench.stimuli_options = _options(resize_to=int, interpolation=str)
  bench.stimuli_splits = ()
  return bench


def _options(**types: type) -> Config:
  """Options that commands can set; what is not set is not given."""
  types = {"skip_damaged": bool, **types}
  return ConfigDict({name: placeholder(kind) for name, kind in types.items()})


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
    Evaluators by name: those of the splits, "cue_conflict", "stimuli_<split>",
    "corruption", "corrupted", "saliency_<split>", "outlined_<split>",
    "stylized_<split>", "dimensionality", "transferred" and "white_box", which
    are attacks.

  Raises:
    InputError: A field of the bench is of another type or out of its range, or
      names what there is not. What data hold is seen when they are opened.
  """
  bench = _checked(config)
  out = {
    split: image_evaluators.accuracy(
      restricted(classifier, functools.partial(_present, splits, split))
      if split in bench.restricted
      else classifier,
      splits.batches(split),
    )
    for split in config.data.eval_splits
  }
  of = functools.partial(_of, config, bench, classifier, splits)
  out |= _decisions(config, bench, classifier, splits)
  if bench.corruptions:
    judge, data, split = of(bench.corruption_split)
    out["corruption"] = image_evaluators.corruptions(
      judge,
      data.batches(split, most=bench.corruption_examples),
      names=bench.corruptions,
      severities=bench.severities,
    )
  if bench.corrupted:
    out["corrupted"] = _corrupted(config, bench, classifier)
  for name in bench.saliency:
    judge, data, split = of(name)
    out[f"saliency_{_title(name)}"] = image_evaluators.saliency(
      judge, data.batches(split)
    )
  for name in bench.outlined:
    judge, data, split = of(name)
    out[f"outlined_{_title(name)}"] = shape_evaluators.changed(
      judge, data.batches(split), shape_evaluators.outlines, name="outlines"
    )
  out |= _restyled(config, bench, of)
  out |= _attacks(config, bench, of)
  if not out:
    logging.warning(
      "nothing will be measured: config.data.eval_splits and config.bench name "
      "nothing that is there%s.",
      ", as config.bench.stimuli is empty" * bool(bench.categories),
    )
  return out


Of = Callable[[str], tuple[Classifier, classifiers.Splits, str]]


def _of(
  config: Config,
  bench: Config,
  classifier: Classifier,
  splits: classifiers.Splits,
  name: str,
) -> tuple[Classifier, classifiers.Splits, str]:
  """What judges a split, what holds it, and what it is called there."""
  if not name.startswith(STIMULI):
    return classifier, splits, name
  judge = categorizer(classifier, aggregate=bench.aggregate)
  # Their first are shown: not all of one category.
  stimuli = _Stimuli(config, bench, mixed=True)
  return judge, stimuli, name.removeprefix(STIMULI)


def _title(name: str) -> str:
  return name.replace(":", "_")


def _checked(config: Config) -> Config:
  """The fields of a config's bench, with the defaults of those it lacks."""
  bench = defaults()
  try:
    bench.update(config.bench.copy_and_resolve_references())
  except TypeError as error:
    raise InputError(f"config.bench: {str(error).splitlines()[0]}") from error
  attacks, some = bench.attacks, ("corruption", "dimensionality")
  counts = {f"{name}_examples": bench[f"{name}_examples"] for name in some}
  counts["attacks.examples"] = attacks.examples
  of_stimuli = [n for n in _named(bench) if n.startswith(STIMULI)]
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
      bench.corrupted and not bench.corrupted.startswith("corrupted:"),
      f"corrupted must be corrupted:<folder>, got {bench.corrupted!r}.",
    ),
    (
      bench.stimuli and not bench.categories,
      f"categories must say what labels the stimuli {bench.stimuli!r}, such as "
      "'imagenet', got ''.",
    ),
    (
      bench.stimuli
      and not any((bench.cue_conflict, bench.stimuli_splits, *of_stimuli)),
      "cue_conflict must name what to measure the shape bias on of "
      f"{bench.stimuli!r}, such as 'cue_conflict', got ''.",
    ),
    (
      bench.stimuli_splits and not bench.categories,
      "stimuli must name the data of bench.stimuli_splits, labelled by "
      "bench.categories, got ''.",
    ),
    *(
      (
        not bench.categories,
        f"categories and bench.stimuli must be given for {name!r}, got ''.",
      )
      for name in of_stimuli
    ),
    *(
      (
        split not in config.data.eval_splits,
        f"restricted must be among config.data.eval_splits, got {split!r}.",
      )
      for split in bench.restricted
    ),
  ]
  for refused, text in refusals:
    if refused:
      raise InputError(f"config.bench.{text}")
  return bench if bench.stimuli else _without_stimuli(bench)


def _named(bench: Config) -> list[str]:
  """All splits that may be of the stimuli."""
  one = (bench.corruption_split, bench.dimensionality, bench.attacks.split)
  return [*one, *bench.saliency, *bench.outlined, *bench.stylized]


def _without_stimuli(bench: Config) -> Config:
  """A bench of which only what there is data for is left."""
  left = lambda name: "" if name.startswith(STIMULI) else name
  for name in ("saliency", "outlined", "stylized"):
    bench[name] = tuple(filter(left, bench[name]))
  bench.dimensionality = left(bench.dimensionality)
  bench.attacks.split = left(bench.attacks.split)
  if not left(bench.corruption_split):
    bench.corruptions = ()
  bench.stimuli_splits = ()
  if bench.categories:
    bench.cue_conflict = ""
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
      f"{len(classifier.classes)}; set it to '' to measure without stimuli."
    )
  if not bench.stimuli:
    return out
  stimuli = _Stimuli(config, bench)
  if bench.cue_conflict:
    out["cue_conflict"] = image_evaluators.cue_conflict(
      classifier,
      stimuli.batches(bench.cue_conflict),
      decide=lambda logits: categories.decide(
        jax.nn.softmax(logits), aggregate=bench.aggregate
      ),
      classes=categories.CATEGORIES,
      beside=published.SHAPE_BIAS,
    )
  coarse = categorizer(classifier, aggregate=bench.aggregate)
  chosen = [
    split
    for split in bench.stimuli_splits
    if split == bench.cue_conflict or not stimuli.alone
  ]
  if left := [split for split in bench.stimuli_splits if split not in chosen]:
    logging.warning(
      "%s holds one kind of stimuli; %s are left out.",
      bench.stimuli,
      ", ".join(left),
    )
  for split in chosen:
    data = stimuli.batches(split)
    out[f"stimuli_{split}"] = image_evaluators.accuracy(coarse, data)
  return out


class _Stimuli(classifiers.Splits):
  """The splits of the stimuli, labelled by the categories.

  Attributes:
    alone: Whether there are no splits: the root holds the categories' folders.
  """

  classes: tuple[str, ...] = categories.CATEGORIES

  def __init__(self, config: Config, bench: Config, *, mixed: bool = False):
    # Nothing is opened yet, unlike the data whose classes must be known.
    self._data, self._bench = config.data, bench
    self._batch_size, self._mixed = config.batch_size, mixed
    self._opened = functools.cache(self.open)
    kind, _, name = bench.stimuli.partition(":")
    # A path alone is a folder.
    self._folder = kind in _FOLDERS or "/" in kind
    root = pathlib.Path(name or kind).expanduser()
    self.alone = self._folder and any(
      (root / category).is_dir() for category in categories.CATEGORIES
    )

  def open(
    self, split: str, *, checked: bool = True, **changed: Any
  ) -> sources.Source:
    """Opens a split anew, for an evaluator."""
    bench = self._bench
    options = classifiers.given(bench.stimuli_options)
    if checked and self.alone and split != bench.cue_conflict:
      raise InputError(
        f"config.bench.stimuli={bench.stimuli!r} holds one kind of stimuli, "
        f"{bench.cue_conflict!r}, and no {split!r}."
      )
    if self._folder:
      whole: dict[str, Any] = {"resize_to": self._data.image_size}
      if "interpolation" in self._data.options:
        whole["interpolation"] = self._data.options.interpolation
      options = {**whole, **options}
    # Textures may be of categories that no shape is of.
    if bench.stimuli.startswith("cue_conflict:"):
      options.setdefault("classes", categories.CATEGORIES)
    found = sources.load(
      bench.stimuli,
      split=split,
      image_size=self._data.image_size,
      data_dir=self._data.data_dir or None,
      **{**options, **changed},
    )
    if not len(found):
      raise InputError(f"the stimuli {bench.stimuli!r} hold no examples.")
    found = Renumbered(found, self.classes, what="config.bench.stimuli")
    if split == bench.cue_conflict:
      found = _with_textures(found, self.classes)
    if self._mixed:
      order = np.random.default_rng(0).permutation(len(found))
      found = sources.Subset(found, order)
    return found


def _corrupted(
  config: Config, bench: Config, classifier: Classifier
) -> Evaluator:
  options = classifiers.given(bench.corrupted_options)
  if not {"classes", "wordnet"} & set(options):
    options["wordnet"] = len(classifier.classes) == 1000
  if "interpolation" in config.data.options:
    options.setdefault("interpolation", config.data.options.interpolation)

  @functools.cache
  def source() -> Any:
    return sources.load(
      bench.corrupted,
      split="all",
      image_size=config.data.image_size,
      data_dir=config.data.data_dir or None,
      **options,
    )

  def examples() -> Any:
    if options.get("wordnet"):
      return source()
    return Renumbered(
      source(), tuple(classifier.classes), what="config.bench.corrupted"
    )

  return image_evaluators.corrupted(
    classifier,
    _opened(examples, config.batch_size),
    cases=lambda: source().cases,
  )


def _present(splits: classifiers.Splits, split: str) -> Sequence[int]:
  found = getattr(splits.some(split), "present", None)
  if found is None:
    raise InputError(
      f"config.bench.restricted: the split {split!r} does not say which "
      "classes it holds; those of imagenet:<root> do."
    )
  return found


def _restyled(config: Config, bench: Config, of: Of) -> dict[str, Evaluator]:
  @functools.cache
  def pool() -> sources.Source:
    given = bench.style_options.to_dict()
    if bench.style_source == "generated":  # Training draws those of seed 0.
      given = {"seed": 1, **given}
    return styles.open_styles(
      bench.style_source, image_size=config.data.image_size, **given
    )

  def restyled(name: str) -> Evaluator:
    judge, data, split = of(name)
    return shape_evaluators.stylized(
      judge,
      _opened(
        lambda: styles.Styled(data.some(split), pool(), count=1),
        config.batch_size,
      ),
      strength=bench.style_strength,
    )

  out = {f"stylized_{_title(name)}": restyled(name) for name in bench.stylized}
  if bench.dimensionality:
    judge, data, split = of(bench.dimensionality)

    def pairs() -> Any:
      some = data.some(split, most=bench.dimensionality_examples)
      return styles.Styled(shape_evaluators.Pairs(some), pool(), count=2)

    out["dimensionality"] = shape_evaluators.dimensionality(
      judge,
      _opened(pairs, config.batch_size),
      strength=bench.style_strength,
    )
  return out


def _attacks(config: Config, bench: Config, of: Of) -> dict[str, Evaluator]:
  attacks = bench.attacks
  if not attacks.split:
    return {}
  judge, data, split = of(attacks.split)

  def load() -> attack_evaluators.Surrogate:
    found = attack_evaluators.load_surrogate(
      attacks.surrogate, mesh=config.mesh
    )
    by_category = judge.classes == categories.CATEGORIES
    if not by_category or len(found.classes) != len(categories.IMAGENET_TO_16):
      return found
    return found._replace(
      logits=lambda state, images: _log_scores(
        found.logits(state, images), bench.aggregate
      ),
      classes=categories.CATEGORIES,
    )

  kinds: dict[str, tuple[Sequence[float], Any]] = {}
  if attacks.surrogate:
    kinds["transferred"] = attacks.epsilons, load
  if attacks.white_box:
    kinds["white_box"] = attacks.white_box, None
  return {
    name: attack_evaluators.attacked(
      judge,
      data.batches(split, most=attacks.examples),
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
    return _log_scores(classifier.head(state, features), aggregate)

  return Classifier(classifier.features, head, categories.CATEGORIES)


def _log_scores(logits: Array, aggregate: str) -> Array:
  probabilities = jax.nn.softmax(logits.astype(jnp.float32))
  scores = categories.scores(probabilities, aggregate=aggregate)
  return jnp.log(jnp.maximum(scores, jnp.finfo(jnp.float32).tiny))


def restricted(
  classifier: Classifier, present: Callable[[], Sequence[int]]
) -> Classifier:
  """A classifier that chooses among some of its classes.

  Args:
    classifier: With all classes.
    present: Gives the numbers of those; called when logits are computed.

  Returns:
    The classifier, whose other logits are those of probability 0.
  """

  def head(state: TrainState, features: Array) -> Array:
    there = np.zeros(len(classifier.classes), bool)
    there[list(present())] = True
    logits = classifier.head(state, features).astype(jnp.float32)
    return jnp.where(there, logits, jnp.finfo(jnp.float32).min / 2)

  return Classifier(classifier.features, head, classifier.classes)


class Renumbered:
  """Examples whose labels, and textures, are numbers of other classes."""

  def __init__(self, source: Any, classes: tuple[str, ...], *, what: str):
    """Finds the classes of a source, by their names.

    Args:
      source: Its classes are among the others, in any order.
      classes: What is numbered by.
      what: Where the source comes from, for the error.

    Raises:
      InputError: A class is not among them, or there are none.
    """
    unknown = [c for c in source.classes if c not in classes]
    if unknown or not source.classes:
      raise InputError(
        f"the classes of {what} must be among {_all(classes)}; got "
        f"{few(unknown) or 'images without classes'}."
      )
    self.source, self.classes = source, classes
    self.files = getattr(source, "files", None)
    numbers = {name: i for i, name in enumerate(classes)}
    # The last is for examples without a label, -1.
    self._numbers = np.array([*map(numbers.get, source.classes), -1], np.int32)

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


def _all(names: Sequence[str]) -> str:
  return ", ".join(names) if len(names) <= 20 else few(names)


def _with_textures(source: Any, classes: Sequence[str]) -> Any:
  """A source with "texture", from the names of its files if it has none."""
  files = getattr(source, "files", None)
  if files is None or "texture" in source[0]:
    return source  # The evaluator says what is missing.
  return cue_conflict.Stimuli(source, files, classes)


def _opened(
  source: Callable[[], Any], batch_size: int
) -> image_evaluators.Data:
  """Batches of a source that is opened once, when they are first asked for."""
  once = functools.cache(source)
  return lambda: stream.evaluate(once(), batch_size=batch_size)
