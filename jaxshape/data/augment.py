"""Augmentation on the device, drawn per image from its own key.

A function takes one image [H, W, 3] with values in 0..255 and a key, and all
that it draws comes from that key: `jax.vmap` over split keys draws for each
image by itself, the same key gives the same picture, and neither the other
images nor the size of the batch matter. `mixup` and `cutmix` act on batches.

Definitions follow torchvision (transforms v1) unless a note says otherwise.
`random_suppression` takes batches as well; `data.suppression` has its policies.
"""

from collections.abc import Callable, Mapping, Sequence
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

# Under this name here too, beside the other augmentations.
from jaxshape.data import options
from jaxshape.data.suppression import random_suppression
from jaxshape.errors import InputError
from jaxshape.filters import blur
from jaxshape.typing import Array, ArrayLike, Batch, Float, Num, typed
from jaxshape.typing import Key as KeyOf

Key = KeyOf[Array, ""]
Rgb = Num[ArrayLike, "height width 3"]
Same = Float[Array, "height width 3"]
Range = Sequence[float | int]

# Attempts at a crop that fits, before the whole height or width is taken.
_ATTEMPTS = 10

_GREY = (0.2989, 0.587, 0.114)  # ITU-R BT.601.


def _check_probability(probability: float) -> None:
  if not 0 <= probability <= 1:
    raise ValueError(f"probability must be in 0..1, got {probability}.")


def _check_range(name: str, values: Range, lowest: float) -> None:
  if len(values) != 2 or not lowest < values[0] <= values[1]:
    raise ValueError(
      f"{name} must be (low, high) with {lowest} < low <= high, "
      f"got {tuple(values)}."
    )


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
  height, width = (size, size) if isinstance(size, int) else size
  if height < 1 or width < 1:
    raise ValueError(f"size must be at least 1, got {size}.")
  return height, width


@typed
def random_resized_crop(
  key: Key,
  image: Rgb,
  *,
  size: int | Sequence[int],
  scale: Range = (0.08, 1.0),
  ratio: Range = (3 / 4, 4 / 3),
) -> Float[Array, "new_height new_width 3"]:
  """Cuts out a random part and resizes it, bilinear and antialiased.

  The part's share of the area is uniform in `scale`, the logarithm of its
  width / height uniform in that of `ratio`. Of ten attempts the first that
  fits into the image is taken; if none does, the largest part from the middle
  whose shape lies within `ratio`.

  Args:
    key: A PRNG key.
    image: Any values.
    size: The result's side, or its height and width.
    scale: Least and largest share of the area.
    ratio: Least and largest width / height.

  Returns:
    The part, resized.

  Reference:
    Szegedy et al., "Going Deeper with Convolutions", CVPR 2015, Section 6.

  Note:
    Where the part ends, antialiasing looks at the pixels beyond it, which
    torchvision has already cut off.
  """
  new_height, new_width = _pair(size)
  _check_range("scale", scale, 0)
  _check_range("ratio", ratio, 0)
  x = jnp.asarray(image, jnp.float32)
  height, width, _ = x.shape
  area_key, ratio_key, top_key, left_key = jax.random.split(key, 4)
  area = height * width
  area = area * jax.random.uniform(
    area_key, (_ATTEMPTS,), minval=scale[0], maxval=scale[1]
  )
  log_ratio = jax.random.uniform(
    ratio_key,
    (_ATTEMPTS,),
    minval=math.log(ratio[0]),
    maxval=math.log(ratio[1]),
  )
  widths = jnp.round(jnp.sqrt(area * jnp.exp(log_ratio)))
  heights = jnp.round(jnp.sqrt(area * jnp.exp(-log_ratio)))
  fits = (widths >= 1) & (widths <= width) & (heights >= 1)
  fits &= heights <= height
  first = jnp.argmax(fits)
  shape = min(max(width / height, ratio[0]), ratio[1])
  fallback_width = min(width, round(height * shape))
  fallback_height = min(height, round(width / shape))
  some = fits.any()
  w = jnp.where(some, widths[first], fallback_width)
  h = jnp.where(some, heights[first], fallback_height)

  def place(key: Any, room: Any) -> Any:
    # Of the room + 1 places each has the same chance.
    drawn = jnp.floor(jax.random.uniform(key) * (room + 1))
    return jnp.where(some, jnp.minimum(drawn, room), jnp.round(room / 2))

  top, left = place(top_key, height - h), place(left_key, width - w)
  zoom = jnp.stack([new_height / h, new_width / w])
  return jax.image.scale_and_translate(
    x,
    (new_height, new_width, 3),
    (0, 1),
    zoom,
    -jnp.stack([top, left]) * zoom,
    method="linear",
    antialias=True,
    precision=lax.Precision.HIGHEST,
  )


@typed
def random_crop(
  key: Key, image: Rgb, *, padding: int, fill: float = 0.0
) -> Same:
  """Shifts the image by up to `padding` pixels, in steps of one.

  Args:
    key: A PRNG key.
    image: Any values.
    padding: The largest shift, at least 0.
    fill: What comes in from outside.

  Returns:
    A crop of the padded image, as large as the image was.

  Reference:
    Lee et al., "Deeply-Supervised Nets", AISTATS 2015, Section 3.2.
  """
  if padding < 0:
    raise ValueError(f"padding must be at least 0, got {padding}.")
  x = jnp.asarray(image, jnp.float32)
  border = ((padding, padding), (padding, padding), (0, 0))
  wide = jnp.pad(x, border, constant_values=fill)
  top, left = jax.random.randint(key, (2,), 0, 2 * padding + 1)
  return lax.dynamic_slice(wide, (top, left, 0), x.shape)


@typed
def horizontal_flip(key: Key, image: Rgb, *, probability: float = 0.5) -> Same:
  """Mirrors left and right.

  Args:
    key: A PRNG key.
    image: Any values.
    probability: Of mirroring.

  Returns:
    The image or its mirror image.

  Reference:
    Krizhevsky et al., "ImageNet Classification with Deep Convolutional Neural
    Networks", NeurIPS 2012, Section 4.1.
  """
  _check_probability(probability)
  x = jnp.asarray(image, jnp.float32)
  return jnp.where(jax.random.bernoulli(key, probability), x[:, ::-1], x)


def _grey(x: jax.Array) -> jax.Array:
  r, g, b = (weight * x[..., i] for i, weight in enumerate(_GREY))
  return (r + g + b)[..., None]


def _shift_hue(x: jax.Array, shift: jax.Array) -> jax.Array:
  """Turns the hue of HSV by a share of the circle; value, chroma stay."""
  value = x.max(-1, keepdims=True)
  chroma = value - x.min(-1, keepdims=True)
  safe = jnp.where(chroma > 0, chroma, 1)
  r, g, b = (x[..., i : i + 1] for i in range(3))
  sixth = jnp.where(
    value == r,
    (g - b) / safe,
    jnp.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe),
  )
  turned = sixth + 6 * shift
  # A channel lacks up to the chroma, depending on how far its hue is away.
  k = (jnp.array([5.0, 3.0, 1.0]) + turned) % 6
  return value - chroma * jnp.clip(jnp.minimum(k, 4 - k), 0, 1)


@typed
def color_jitter(
  key: Key,
  image: Rgb,
  *,
  brightness: float = 0.4,
  contrast: float = 0.4,
  saturation: float = 0.4,
  hue: float = 0.1,
  probability: float = 1.0,
) -> Same:
  """Varies brightness, contrast, saturation and hue, in this order.

  x <- f x; x <- f x + (1 - f) mean(grey(x)); x <- f x + (1 - f) grey(x), each
  with an f uniform in max(0, 1 - strength)..1 + strength and clipped to
  0..255; the hue is turned by a share of the circle uniform in -hue..hue.

  Args:
    key: A PRNG key.
    image: Values in 0..255.
    brightness: Strength, at least 0.
    contrast: Strength, at least 0.
    saturation: Strength, at least 0.
    hue: In 0..0.5.
    probability: Of varying anything.

  Returns:
    The image in other colours.

  Reference:
    Howard, "Some Improvements on Deep Convolutional Neural Network Based Image
    Classification", ICLR 2014, Section 3.

  Note:
    torchvision draws the order too; in a batch all orders would have to be
    computed for every image.
  """
  strengths = {
    "brightness": brightness, "contrast": contrast, "saturation": saturation
  }  # fmt: skip
  for name, strength in strengths.items():
    if strength < 0:
      raise ValueError(f"{name} must be at least 0, got {strength}.")
  if not 0 <= hue <= 0.5:
    raise ValueError(f"hue must be in 0..0.5, got {hue}.")
  _check_probability(probability)
  draws = jax.random.uniform(key, (5,))
  factor = [
    max(0.0, 1 - s) + draw * (1 + s - max(0.0, 1 - s))
    for s, draw in zip(strengths.values(), draws, strict=False)
  ]
  start = x = jnp.asarray(image, jnp.float32)
  x = jnp.clip(factor[0] * x, 0, 255)
  x = jnp.clip(factor[1] * x + (1 - factor[1]) * _grey(x).mean(), 0, 255)
  x = jnp.clip(factor[2] * x + (1 - factor[2]) * _grey(x), 0, 255)
  if hue > 0:
    x = _shift_hue(x, hue * (2 * draws[3] - 1))
  return jnp.where(draws[4] < probability, x, start)


@typed
def grayscale(key: Key, image: Rgb, *, probability: float = 0.2) -> Same:
  """Takes the colour away: .2989 r + .587 g + .114 b in all channels.

  Args:
    key: A PRNG key.
    image: Any values.
    probability: Of losing colour.

  Returns:
    The image, or its grey version.

  Reference:
    Chen et al., "A Simple Framework for Contrastive Learning of Visual
    Representations", ICML 2020, Appendix A.
  """
  _check_probability(probability)
  x = jnp.asarray(image, jnp.float32)
  grey = jnp.broadcast_to(_grey(x), x.shape)
  return jnp.where(jax.random.bernoulli(key, probability), grey, x)


@typed
def gaussian_blur(
  key: Key,
  image: Rgb,
  *,
  probability: float = 0.5,
  sigma: Range = (0.1, 2.0),
) -> Same:
  """Blurs with a sigma that is drawn uniformly.

  Args:
    key: A PRNG key.
    image: Any values.
    probability: Of blurring.
    sigma: Least and largest sigma in pixels.

  Returns:
    The image or its blurred version.

  Reference:
    Chen et al., "A Simple Framework for Contrastive Learning of Visual
    Representations", ICML 2020, Appendix A.
  """
  _check_probability(probability)
  _check_range("sigma", sigma, 0)
  draw_key, sigma_key = jax.random.split(key)
  x = jnp.asarray(image, jnp.float32)
  drawn = jax.random.uniform(sigma_key, minval=sigma[0], maxval=sigma[1])
  blurred = blur.gaussian(x, sigma=drawn, radius=math.ceil(4 * sigma[1]))
  return jnp.where(jax.random.bernoulli(draw_key, probability), blurred, x)


def _box(center: Any, sides: Sequence[Any], shape: Sequence[int]) -> jax.Array:
  """True inside a box, which the border may cut: [H, W]."""
  inside = []
  for middle, side, length in zip(center, sides, shape, strict=True):
    start = middle - side // 2
    at = jnp.arange(length)
    inside.append((at >= start) & (at < start + side))
  return inside[0][:, None] & inside[1]


@typed
def cutout(
  key: Key, image: Rgb, *, size: int | Sequence[int], fill: float = 127.5
) -> Same:
  """Hides a box around a pixel that is drawn uniformly.

  Args:
    key: A PRNG key.
    image: Any values.
    size: The box's side, or its height and width; the border may cut it.
    fill: What the box shows.

  Returns:
    The image with the box in it.

  Reference:
    DeVries and Taylor, "Improved Regularization of Convolutional Neural
    Networks with Cutout", 2017, Section 3.2.
  """
  sides = _pair(size)
  x = jnp.asarray(image, jnp.float32)
  shape = x.shape[:2]
  center = jax.random.randint(key, (2,), 0, jnp.array(shape))
  hidden = _box(center, sides, shape)
  return jnp.where(hidden[..., None], fill, x)


def _partners(
  key: Key, size: int, alpha: float, probability: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Each row's lambda and partner, and a key for what else there is to draw."""
  if not alpha > 0:
    raise ValueError(f"alpha must be above 0, got {alpha}.")
  _check_probability(probability)
  order_key, beta_key, draw_key, rest_key = jax.random.split(key, 4)
  lam = jax.random.beta(beta_key, alpha, alpha, (size,))
  mixed = jax.random.bernoulli(draw_key, probability, (size,))
  lam = jnp.where(mixed, lam, 1)
  return lam, jax.random.permutation(order_key, size), rest_key


@typed
def mixup(
  key: Key,
  images: Num[ArrayLike, "batch height width 3"],
  targets: Float[ArrayLike, "batch classes"],
  *,
  alpha: float = 0.2,
  probability: float = 1.0,
) -> tuple[Float[Array, "batch height width 3"], Float[Array, "batch classes"]]:
  """Blends each image with another of the batch, and their targets alike.

  x <- lambda x + (1 - lambda) x', lambda ~ Beta(alpha, alpha) for each image
  by itself.

  Args:
    key: A PRNG key.
    images: Any values.
    targets: One row of weights of the classes per image.
    alpha: Above 0; larger blends more evenly.
    probability: Of blending, for each image.

  Returns:
    Images and targets.

  Reference:
    Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018,
    Section 2.
  """
  x, y = jnp.asarray(images, jnp.float32), jnp.asarray(targets)
  lam, order, _ = _partners(key, len(x), alpha, probability)
  blend = lambda a, w: w * a + (1 - w) * a[order]
  return blend(x, lam[:, None, None, None]), blend(y, lam[:, None])


@typed
def cutmix(
  key: Key,
  images: Num[ArrayLike, "batch height width 3"],
  targets: Float[ArrayLike, "batch classes"],
  *,
  alpha: float = 1.0,
  probability: float = 1.0,
) -> tuple[Float[Array, "batch height width 3"], Float[Array, "batch classes"]]:
  """Pastes a box of another image, and mixes the targets by its area.

  The box has the image's shape, a share 1 - lambda of its area, lambda ~
  Beta(alpha, alpha), and its centre anywhere; what the border cuts off does
  not count in the targets.

  Args:
    key: A PRNG key.
    images: Any values.
    targets: One row of weights of the classes per image.
    alpha: Above 0; at 1 the area is uniform.
    probability: Of pasting, for each image.

  Returns:
    Images and targets.

  Reference:
    Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers
    with Localizable Features", ICCV 2019, Eq. 1-2.
  """
  x, y = jnp.asarray(images, jnp.float32), jnp.asarray(targets)
  size, height, width, _ = x.shape
  lam, order, key = _partners(key, size, alpha, probability)
  share = jnp.sqrt(1 - lam)
  sides = [(n * share).astype(jnp.int32) for n in (height, width)]
  center = jax.random.randint(key, (size, 2), 0, jnp.array([height, width]))
  box = jax.vmap(lambda c, h, w: _box(c, (h, w), (height, width)))(
    center, *sides
  )
  keep = 1 - box.mean((1, 2), dtype=y.dtype)[:, None]
  x = jnp.where(box[..., None], x[order], x)
  return x, keep * y + (1 - keep) * y[order]


_IMAGE: dict[str, Callable[..., jax.Array]] = {
  "random_resized_crop": random_resized_crop,
  "random_crop": random_crop,
  "horizontal_flip": horizontal_flip,
  "color_jitter": color_jitter,
  "grayscale": grayscale,
  "gaussian_blur": gaussian_blur,
  "random_suppression": random_suppression,
  "cutout": cutout,
}
_BATCH: dict[str, Callable[..., tuple[jax.Array, jax.Array]]] = {
  "mixup": mixup,
  "cutmix": cutmix,
}


def make(
  config: Mapping[str, Any], *, num_classes: int | None = None
) -> Callable[[jax.Array, Batch], Batch]:
  """Makes the augmentation of batches that a config describes.

  Args:
    config: From the functions' names to their options, in the order in which
      they act: `{"random_crop": {"padding": 4}, "horizontal_flip": {}}`. Those
      on batches act after those on images. Empty, it only converts to float32.
    num_classes: Needed by `mixup` and `cutmix`, which read `"label"` (or
      `"target"`, if the batch has it) and write `"target"`, [B, num_classes].

  Returns:
    A compiled function of a key and a batch with `"image"` [B, H, W, 3] in
    0..255. Of `images_key, batch_key = split(key)`, image i gets the key i of
    `split(images_key, B)`, and step j the key j of `split(image's key, steps)`.

  Raises:
    InputError: A name or an option is not known, or one is missing.
  """
  known = {**_IMAGE, **_BATCH}
  steps = {
    name: options.bind("augment", known, name, given)
    for name, given in config.items()
  }
  on_image = [f for name, f in steps.items() if name in _IMAGE]
  on_batch = [f for name, f in steps.items() if name in _BATCH]
  if on_batch and num_classes is None:
    raise InputError("augment.make needs num_classes for mixup and cutmix.")
  classes = num_classes or 0

  def one(key: jax.Array, image: jax.Array) -> jax.Array:
    keys = jax.random.split(key, max(1, len(on_image)))
    for function, step_key in zip(on_image, keys, strict=False):
      image = function(step_key, image)
    return image

  @jax.jit
  def augment(key: jax.Array, batch: Batch) -> Batch:
    images_key, batch_key = jax.random.split(key)
    images = jnp.asarray(batch["image"], jnp.float32)
    images = jax.vmap(one)(jax.random.split(images_key, len(images)), images)
    if not on_batch:
      return {**batch, "image": images}
    target = batch.get("target")
    if target is None:
      target = jax.nn.one_hot(batch["label"], classes)
    keys = jax.random.split(batch_key, len(on_batch))
    for function, step_key in zip(on_batch, keys, strict=True):
      images, target = function(step_key, images, target)
    return {**batch, "image": images, "target": target}

  return augment
