"""What systems that classify images share: their data, network and loss.

The fields of a config that are read here have the same names in all of them:
`backbone`, `width`, `stem`, `dtype`, `mean`, `std` and `data`. The network may
be any of `backbones.registry`.
"""

from collections.abc import Callable, Iterator, Mapping
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from jaxshape.backbones import registry
from jaxshape.data import sources, stream
from jaxshape.engine import evaluators as image_evaluators
from jaxshape.engine import optimizers, steps
from jaxshape.errors import InputError
from jaxshape.layers import apply
from jaxshape.losses import classification
from jaxshape.system import Evaluator, System, TrainState, Weights
from jaxshape.typing import Array, Batch, Config, PyTree

DTYPES = ("float32", "bfloat16")
# Player and collection under which such a system keeps its network.
NET = "net"
# From fresh parameters and collections to those that training begins with.
Start = Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]


def check(config: Config) -> None:
  """Refuses what no network can be made of.

  Args:
    config: With `dtype`, `width`, `mean` and `std`.

  Raises:
    InputError: One of them is outside its range.
  """
  if config.dtype not in DTYPES:
    raise InputError(
      f"config.dtype must be one of {', '.join(DTYPES)}, got {config.dtype!r}."
    )
  if config.width < 0:
    raise InputError(f"config.width must be at least 0, got {config.width}.")
  if len(config.mean) != 3 or len(config.std) != 3 or min(config.std) <= 0:
    raise InputError(
      "config.mean and config.std must be three numbers each, std above 0, got "
      f"{config.mean} and {config.std}."
    )


def network(config: Config, *, num_classes: int) -> Any:
  """The network that a config names.

  Args:
    config: With `backbone`, `width` and `stem` (0 and "" for the backbone's
      own) and `dtype`.
    num_classes: Number of logits.

  Returns:
    The module.
  """
  return registry.make(
    config.backbone,
    num_classes=num_classes,
    width=config.width or None,
    stem=config.stem or None,
    dtype=jnp.dtype(config.dtype),
  )


def normalizer(config: Config) -> Callable[[image_evaluators.Images], Array]:
  """What a network takes, from images 0..255: by `mean` and `std`."""
  mean = jnp.asarray(config.mean, jnp.float32)
  std = jnp.asarray(config.std, jnp.float32)
  return lambda images: (jnp.asarray(images, jnp.float32) - mean) / std


def classifier(
  net: Any,
  normalize: Callable[[image_evaluators.Images], Array],
  classes: tuple[str, ...],
) -> image_evaluators.Classifier:
  """The two halves of a network, over a state that keeps it under `NET`.

  Args:
    net: The network.
    normalize: From `normalizer`.
    classes: Names of the classes, in the order of the logits.

  Returns:
    The classifier; averaged parameters are used where a state has them.
  """

  def half(
    method: str,
    state: TrainState,
    value: image_evaluators.Images,
    **options: Any,
  ) -> Array:
    params = steps.evaluation_params(state)[NET]
    return apply.apply(
      net, params, state.extra[NET], value, method=method, **options
    )[0]

  return image_evaluators.Classifier(
    features=lambda state, images: half(
      "features", state, normalize(images), train=False
    ),
    head=functools.partial(half, "head"),
    classes=classes,
  )


def loss(logits: Array, batch: Batch, *, label_smoothing: float) -> Array:
  """Cross-entropy of each example, also of mixed ones.

  Args:
    logits: [batch, classes].
    batch: With "label", or with "target" [batch, classes] where labels were
      mixed.
    label_smoothing: Share of the target that is spread over all classes.

  Returns:
    [batch].
  """
  if "target" not in batch:
    return classification.cross_entropy(
      logits, batch["label"], label_smoothing=label_smoothing
    )
  target = (1 - label_smoothing) * batch["target"]
  return classification.soft_cross_entropy(
    logits, target + label_smoothing / logits.shape[-1]
  )


def system(
  config: Config,
  net: Any,
  loss: steps.Loss,
  *,
  splits: "Splits",
  evaluators: Mapping[str, Evaluator],
  start: Start | None = None,
  optimizer: optax.GradientTransformation | None = None,
  examples: Callable[[sources.Source], sources.Source] = lambda source: source,
) -> System:
  """A system of one player that trains a network to name images.

  Args:
    config: With `accumulate`, `averaging`, `batch_size`, `data`, `optimizer`
      and `seed`, besides those of this module.
    net: From `network`.
    loss: Of the player, whose parameters and collections are under `NET`.
    splits: The data.
    evaluators: By name.
    start: Makes of fresh parameters and collections those to begin with.
    optimizer: The config's by default.
    examples: What is trained with instead of the examples of the split.

  Returns:
    The system; its weights have the names of the backbone's public code.
  """
  averaging = config.averaging or None
  chosen = optimizers.make(config.optimizer) if optimizer is None else optimizer
  players = {NET: steps.Player(loss, chosen)}
  size = config.data.image_size
  images = classifier(net, normalizer(config), splits.classes)

  def init(key: Array) -> TrainState:
    blank = jnp.zeros((1, size, size, 3))
    params, collections = apply.init(net, key, blank, train=False)
    if start is not None:
      params, collections = start(params, collections)
    return steps.initial_state(
      players, {NET: params}, {NET: collections}, averaging=averaging
    )

  def predict(state: TrainState, batch: Batch) -> PyTree:
    return images.logits(state, jnp.asarray(batch["image"]))

  def train_data(step: int) -> Iterator[Batch]:
    return stream.train(
      examples(splits.open(config.data.train_split)),
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
    evaluators=evaluators,
    weights=_weights(config, net),
  )


def _weights(config: Config, net: Any) -> Weights:
  """Under the names of the backbone's public code."""
  backbone = registry.find(config.backbone)

  def load(state: TrainState, tensors: Mapping[str, np.ndarray]) -> TrainState:
    params, collections = backbone.from_state_dict(net, tensors)
    return state.replace(
      params={**state.params, NET: params},
      extra={**state.extra, NET: collections},
    )

  def save(state: TrainState) -> dict[str, Any]:
    return backbone.to_state_dict(net, state.params[NET], state.extra[NET])

  return Weights(load, save)


def given(options: Config) -> dict[str, Any]:
  """The options of data that are set: all but None."""
  return {k: v for k, v in options.to_dict().items() if v is not None}


class Splits:
  """The splits of a config's data set, all with the labels of training.

  Attributes:
    classes: Names of the classes, in order.
  """

  def __init__(self, config: Config):
    """Opens the training data, or those to evaluate if only they are at hand.

    Args:
      config: With `batch_size` and `data`.

    Raises:
      InputError: Neither can be opened, or there are not two classes.
    """
    self._data = config.data
    self._batch_size = config.batch_size
    # A source is opened when it is first needed, and once.
    self._opened = functools.cache(self.open)
    try:
      classes = self.open(config.data.train_split, checked=False).classes
    except InputError as error:
      try:
        first = config.data.eval_splits[0]
        classes = self.open(first, checked=False).classes
      except IndexError:
        raise error from None
      except InputError as other:
        # What is evaluated may be all there is, and hold what is wrong.
        texts = dict.fromkeys((str(error), str(other)))
        raise InputError(" ".join(texts)) from None
    if len(classes) < 2:
      raise InputError(
        f"config.data.source={config.data.source!r} must have two classes or "
        f"more to tell apart, got {len(classes)}; a folder of images needs a "
        "folder per class."
      )
    self.classes = tuple(classes)

  def open(
    self, split: str, *, checked: bool = True, **changed: Any
  ) -> sources.Source:
    """Opens a split anew.

    Args:
      split: Its name.
      checked: Whether labels that mean something else than in training are
        refused.
      **changed: Options of the data that differ from the config's.

    Returns:
      The source.

    Raises:
      InputError: There is no such split, or it has other classes.
    """
    data = self._data
    source = sources.load(
      data.source,
      split=split,
      image_size=data.image_size,
      data_dir=data.data_dir or None,
      **{**given(data.options), **changed},
    )
    if checked and tuple(source.classes) != self.classes:
      differ = sorted(set(source.classes) ^ set(self.classes))
      differ = differ or ["their order"]
      raise InputError(
        f"the split {split!r} of {data.source!r} has other classes than "
        f"are trained (they differ in {', '.join(differ[:8])}); for folders, "
        "name all with --config.data.options.classes=\"('a','b')\"."
      )
    return source

  def some(self, split: str, *, most: int = 0) -> sources.Source:
    """A split that is opened once, or a part of it.

    Args:
      split: Its name.
      most: So many examples, drawn, as neighbours are often of one class; 0
        for all.

    Returns:
      The source.
    """
    source = self._opened(split)
    if not 0 < most < len(source):
      return source
    drawn = np.random.default_rng(0).permutation(len(source))[:most]
    return sources.Subset(source, np.sort(drawn))

  def batches(self, split: str, *, most: int = 0) -> image_evaluators.Data:
    """What an evaluator takes: the batches of a split, from the start.

    Args:
      split: Its name; it is opened when the first batch is asked for.
      most: So many examples; 0 for all.

    Returns:
      Gives the batches anew whenever it is called.
    """
    return lambda: stream.evaluate(
      self.some(split, most=most), batch_size=self._batch_size
    )
