"""AdaIN: style transfer by matched statistics, and the training of its decoder.

| paper | here |
|---|---|
| Eq. 8, AdaIN | `filters.stylization.adain` |
| Sec. 6.1, encoder and decoder | `backbones.vgg` |
| Eq. 9 and 10, T(c, s) = g(AdaIN(f(c), f(s))) | `backbones.style_transfer` |
| Eq. 11, L = L_c + lambda L_s | `weights.content`, `weights.style` |
| Eq. 12, content loss | `content_loss` |
| Eq. 13, style loss | `style_loss` |
| Eq. 14, how much; Eq. 15, several styles | `alpha`, `weights` of `stylizer` |

The encoder is frozen. `encoder_weights` names its file, `vgg_normalised.pth` or
torchvision's VGG-19; without one it is drawn at random (He et al., 2015). That
is a stand-in where there are no weights: colours and coarse texture are
transferred by random features, too, but what a scene shows is not kept as well.

With the public files, or those that `python -m jaxshape.weights save` writes:

  params = adain.load("vgg_normalised.pth", "decoder.pth")
  stylize = adain.stylizer(params)
  image = stylize(content, style, alpha=0.5)

Note: the losses are mean squares, as in the public code, where the paper writes
norms; content and style are center crops, where the public code scales the
sides of its pictures to equal length before it cuts out a part at random.

Reference:
  Huang and Belongie, "Arbitrary Style Transfer in Real-time with Adaptive
  Instance Normalization", ICCV 2017.
"""

from collections.abc import Iterator, Mapping, Sequence
import functools
import math
import os
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

from jaxshape.backbones import style_transfer, vgg
from jaxshape.data import sources, stream, styles
from jaxshape.engine import evaluators, optimizers, pytorch, report, steps
from jaxshape.errors import InputError
from jaxshape.filters import stylization
from jaxshape.layers import apply
from jaxshape.system import Evaluator, System, TrainState, Weights
from jaxshape.typing import Array, Batch, Config, Metrics, PyTree

DTYPES = ("float32", "bfloat16")
# Beginnings of names, by the file's name, that the public code's files lack.
PARTS = {"vgg_normalised": "vgg.", "decoder": "decoder."}
SHOWN = 4

stylizer = style_transfer.stylizer


def load(
  encoder: str | os.PathLike[str], decoder: str | os.PathLike[str]
) -> dict[str, PyTree]:
  """Reads what `stylizer` needs from two files.

  Args:
    encoder: `vgg_normalised.pth`, or torchvision's VGG-19; PyTorch's or
      safetensors.
    decoder: `decoder.pth`, or a checkpoint of the public code's training.

  Returns:
    The parameters; the files say how wide the networks are.

  Raises:
    InputError: A file is not there, not readable, or holds something else.
  """
  read = [pytorch.load(path) for path in (encoder, decoder)]
  return style_transfer.style_params(*read)


def params_of(state: TrainState) -> dict[str, PyTree]:
  """What `stylizer` needs from a run's state, averaged if that has averages."""
  params = steps.evaluation_params(state)
  return {"encoder": state.extra["encoder"], "decoder": params["decoder"]}


def content_loss(features: Array, target: Array) -> Array:
  """Mean square of relu4_1 of the result against what it was made of.

  Args:
    features: [batch, height, width, channels].
    target: The same.

  Returns:
    One number per image.
  """
  return jnp.mean((features - target) ** 2, (1, 2, 3))


def style_loss(features: Sequence[Array], wanted: Sequence[Array]) -> Array:
  """Mean squares of means and deviations against the style's, over layers.

  Args:
    features: Of each layer, [batch, height, width, channels].
    wanted: The style's, of the same channels.

  Returns:
    One number per image.
  """
  total = jnp.zeros(())
  for own, theirs in zip(features, wanted, strict=True):
    pairs = zip(
      stylization.moments(own), stylization.moments(theirs), strict=True
    )
    total += sum(jnp.mean((a - b) ** 2, -1) for a, b in pairs)
  return jnp.asarray(total)


def make(config: Config) -> System:
  """The system that a config describes."""
  _check(config)
  dtype = jnp.dtype(config.dtype)
  encoder = vgg.Encoder(config.width, dtype=dtype)
  decoder = vgg.Decoder(config.width, dtype=dtype)
  frozen = _frozen(config, encoder)
  crop = config.crop or config.data.image_size

  def losses(
    params: PyTree, fixed: PyTree, content: Array, style: Array
  ) -> tuple[Array, Array]:
    encode = lambda x: apply.apply(encoder, fixed, {}, x)[0]
    both = encode(jnp.concatenate([content, style]))
    looks = [x[len(content) :] for x in both]
    target = stylization.adain(both[-1][: len(content)], looks[-1])
    image, _ = apply.apply(decoder, params, {}, target)
    seen = encode(image)
    return content_loss(seen[-1], target), style_loss(seen, looks)

  def loss(
    params: PyTree, extra: PyTree, batch: Batch, key: Array
  ) -> tuple[Array, tuple[PyTree, Metrics]]:
    keys = jax.random.split(key)
    pair = [
      _random_crop(k, x, crop) for k, x in zip(keys, _pair(batch), strict=True)
    ]
    parts = losses(params["decoder"], extra["encoder"], *pair)
    content, style = (part.mean() for part in parts)
    total = config.weights.content * content + config.weights.style * style
    return total, (extra, {"content_loss": content, "style_loss": style})

  optimizer = optax.chain(
    optimizers.make(config.optimizer),
    optax.scale_by_schedule(lambda n: 1 / (1 + config.rate_decay * n)),
  )
  averaging = config.averaging or None
  players = {"decoder": steps.Player(loss, optimizer)}

  def init(key: Array) -> TrainState:
    encoder_key, decoder_key = jax.random.split(key)
    image = jnp.zeros((1, 16, 16, 3))
    fixed = frozen
    if fixed is None:
      fixed, _ = apply.init(encoder, encoder_key, image)
    features = jnp.zeros((1, 2, 2, 8 * config.width))
    params, _ = apply.init(decoder, decoder_key, features)
    fixed = jax.tree.map(jnp.asarray, fixed)
    return steps.initial_state(
      players, {"decoder": params}, {"encoder": fixed}, averaging=averaging
    )

  def predict(state: TrainState, batch: Batch) -> PyTree:
    content, style = (_center_crop(x, crop) for x in _pair(batch))
    stylize = stylizer(params_of(state), dtype=dtype)
    return stylize(255 * content, 255 * style, alpha=config.alpha)

  def train_data(step: int) -> Iterator[Batch]:
    return stream.train(
      _source(config, config.data.train_split),
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
      split: _evaluator(config, split, losses)
      for split in config.data.eval_splits
    },
    weights=_weights(encoder, decoder),
  )


def _evaluator(config: Config, split: str, losses: Any) -> Evaluator:
  """Both losses of a split, and a sheet of its contents in its styles."""
  crop = config.crop or config.data.image_size

  @functools.cache  # Opened when it is first needed, and once.
  def opened() -> styles.Styled:
    return _source(config, split)

  def data() -> stream.Batches:
    return stream.evaluate(opened(), batch_size=config.batch_size)

  def step(state: TrainState, batch: Batch) -> PyTree:
    params = params_of(state)
    pair = [_center_crop(x, crop) for x in _pair(batch)]
    content, style = losses(params["decoder"], params["encoder"], *pair)
    return {"mask": batch["mask"], "content": content, "style": style}

  def summarize(outputs: Sequence[PyTree]) -> Mapping[str, float]:
    rows = evaluators.real_rows(outputs)
    content, style = (float(rows[k].mean()) for k in ("content", "style"))
    total = config.weights.content * content + config.weights.style * style
    return {"loss": total, "content_loss": content, "style_loss": style}

  def pictures(state: TrainState, outputs: Sequence[PyTree]) -> Mapping:
    del outputs
    shown = evaluators.first_rows(data, most=SHOWN)
    content, style = (255 * _center_crop(x, crop) for x in _pair(shown))
    stylize = stylizer(params_of(state), dtype=jnp.dtype(config.dtype))
    rows = [
      [image, *stylize(jnp.broadcast_to(image, style.shape), style)]
      for image in content
    ]
    return {"content and style": report.image_sheet([[None, *style], *rows])}

  return Evaluator(data, step, summarize, pictures)


def _check(config: Config) -> None:
  if config.dtype not in DTYPES:
    raise InputError(
      f"config.dtype must be one of {', '.join(DTYPES)}, got {config.dtype!r}."
    )
  if config.width < 1:
    raise InputError(f"config.width must be at least 1, got {config.width}.")
  size = config.data.image_size
  if config.crop and not vgg.SMALLEST <= config.crop <= size:
    raise InputError(
      f"config.crop must be 0 (no crop) or in {vgg.SMALLEST}.."
      f"config.data.image_size={size}, got {config.crop}."
    )
  if size < vgg.SMALLEST:
    raise InputError(
      f"config.data.image_size must be at least {vgg.SMALLEST}, got {size}."
    )
  if not 0 <= config.alpha <= 1:
    raise InputError(f"config.alpha must be within 0..1, got {config.alpha}.")
  for name, value in {
    "weights.content": config.weights.content,
    "weights.style": config.weights.style,
    "rate_decay": config.rate_decay,
  }.items():
    if not 0 <= value < math.inf:
      raise InputError(f"config.{name} must be 0 or more, got {value}.")


def _frozen(config: Config, encoder: vgg.Encoder) -> PyTree | None:
  """The encoder's parameters from their file; None if there is none."""
  path = config.encoder_weights
  if not path:
    return None
  try:
    return vgg.from_state_dict(encoder, pytorch.load(path))[0]
  except InputError as error:
    raise InputError(f"config.encoder_weights={path!r}: {error}") from error


def _source(config: Config, split: str) -> styles.Styled:
  data, style = config.data, config.style
  size = data.image_size
  content = sources.load(
    data.source,
    split=split,
    image_size=size,
    data_dir=data.data_dir or None,
    **data.options.to_dict(),
  )
  pool = styles.open_styles(
    style.source,
    image_size=size,
    data_dir=style.data_dir or None,
    split=style.split,
    **style.options.to_dict(),
  )
  return styles.Styled(content, pool, count=1)


def _pair(batch: Batch) -> tuple[Array, Array]:
  """Contents and their styles, 0..1."""
  content = jnp.asarray(batch["image"], jnp.float32) / 255
  return content, jnp.asarray(batch["style"], jnp.float32)[:, 0] / 255


def _center_crop(x: Array, size: int) -> Array:
  top, left = ((n - size) // 2 for n in x.shape[1:3])
  return x[:, top : top + size, left : left + size]


def _random_crop(key: Array, x: Array, size: int) -> Array:
  """A square of each image, anywhere in it."""
  if x.shape[1:3] == (size, size):
    return x
  limit = jnp.asarray(x.shape[1:3]) - size + 1
  corners = jax.random.randint(key, (len(x), 2), 0, limit)

  def cut(image: Array, corner: Array) -> Array:
    start = (corner[0], corner[1], 0)
    return lax.dynamic_slice(image, start, (size, size, 3))

  return jax.vmap(cut)(x, corners)


def _weights(encoder: vgg.Encoder, decoder: vgg.Decoder) -> Weights:
  """The public code's two files; of its whole VGG-19 what is used."""

  def load(state: TrainState, tensors: Mapping[str, np.ndarray]) -> TrainState:
    found: dict[str, dict[str, Any]] = {prefix: {} for prefix in PARTS.values()}
    for name, value in tensors.items():
      start, dot, rest = name.partition(".")
      if start + dot not in found:
        raise InputError(
          f"the tensor {name} is neither of {' nor of '.join(PARTS)}; files "
          "are told apart by the beginning of their names."
        )
      found[start + dot][rest] = value
    fixed, _ = vgg.from_state_dict(encoder, found["vgg."])
    params, _ = vgg.from_state_dict(decoder, found["decoder."])
    return state.replace(
      params={**state.params, "decoder": params},
      extra={**state.extra, "encoder": fixed},
    )

  def save(state: TrainState) -> Mapping[str, np.ndarray]:
    params = params_of(state)
    return {
      f"{prefix}{name}": value
      for prefix, net, part in (
        ("vgg.", encoder, params["encoder"]),
        ("decoder.", decoder, params["decoder"]),
      )
      for name, value in vgg.to_state_dict(net, part, {}).items()
    }

  return Weights(load, save, PARTS)
