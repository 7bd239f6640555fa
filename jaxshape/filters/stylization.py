"""Restyling: the shapes of one image in the colours and textures of another.

Notation: c is the content, s the style, mu and sigma the mean and the standard
deviation of a channel over the pixels of one image.
"""

import functools
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from jaxshape import images
from jaxshape.filters import batches, blur, diffusion, windows
from jaxshape.typing import Array, ArrayLike, Float, Image, Num, Size, typed

# Light, blue-yellow, red-green: all but uncorrelated in photographs, so that
# matching each by itself matches colours, not channels.
_OPPONENTS = np.array(
  [[1, 1, 1], [1, 1, -2], [1, -1, 0]], np.float32
) / np.sqrt(np.array([[3], [6], [2]], np.float32))

# Differences of so many times the mean one count as edges, and after so many
# steps texture is mostly gone: of 2 to 4, where boundaries that people drew in
# photographs stand out most.
_EDGE = 2.5
_ITERATIONS = 40
_STEP_SIZE = 0.2

# The standard deviation of the content against that of the style's detail.
# Of 1.0, 1.4 and 1.8 the least with which people's boundaries in photographs
# stay clearer than in an average of both images.
_CONTRAST = 1.4

# A channel with less than this share of an image's variance is noise, which
# is not to be blown up to the style's contrast.
_NOISE = 0.01
# Rounding, relative to the mean square.
_ROUNDING = 1e-6


def _moments(x: jax.Array, epsilon: Any) -> tuple[jax.Array, jax.Array]:
  n = x.shape[-3] * x.shape[-2]
  mean = x.mean((-3, -2), keepdims=True)
  total = jnp.sum((x - mean) ** 2, (-3, -2), keepdims=True)
  return mean, jnp.sqrt(total / max(n - 1, 1) + epsilon)


@functools.partial(jax.jit, static_argnames=("dtype",))
def _adain(
  content: Any, style: Any, alpha: Any, epsilon: Any, *, dtype: Any
) -> jax.Array:
  content, style = images.as_float32(content), images.as_float32(style)
  mean, deviation = _moments(content, epsilon)
  new_mean, new_deviation = _moments(style, epsilon)
  styled = new_deviation * (content - mean) / deviation + new_mean
  alpha = jnp.asarray(alpha, jnp.float32)[..., None, None, None]
  return (alpha * styled + (1 - alpha) * content).astype(dtype)


def _check_share(name: str, value: Any) -> None:
  known = images.concrete(value)
  if known is not None and not ((known >= 0) & (known <= 1)).all():
    raise ValueError(f"{name} must be within 0..1, got {value}.")


def _check_not_empty(values: Any, name: str = "style") -> None:
  if 0 in values.shape[-3:]:
    raise ValueError(
      f"{name} must be of at least one pixel, got {values.shape}."
    )


def _check_epsilon(epsilon: Any) -> None:
  if not epsilon > 0:
    raise ValueError(f"epsilon must be above 0, got {epsilon}.")


@typed
def moments(
  features: Image, *, epsilon: float | int = 1e-5
) -> tuple[Float[Array, "*batch channels"], Float[Array, "*batch channels"]]:
  """Gives the mean and the standard deviation of each channel of each image.

  mu = sum of x / n, sigma = sqrt(sum of (x - mu)^2 / (n - 1) + epsilon).

  Args:
    features: Features, such as those of a network, or an image.
    epsilon: Above 0; it keeps the deviation's gradient finite.

  Returns:
    Both in float32, in which everything is computed.

  Raises:
    ValueError: An option is outside its range, or there is no pixel.

  Reference:
    Huang and Belongie, ICCV 2017, Eq. 5 and 6 (n - 1 and epsilon: see `adain`).
  """
  _check_epsilon(epsilon)
  features = images.read(features, name="features")
  _check_not_empty(features, "features")
  mean, deviation = _moments(images.as_float32(features), epsilon)
  return mean[..., 0, 0, :], deviation[..., 0, 0, :]


@typed
def adain(
  content: Image | images.Picture,
  style: Num[ArrayLike, "*#batch style_height style_width channels"]
  | images.Picture,
  *,
  alpha: Num[ArrayLike, "*#batch"] = 1.0,
  epsilon: float | int = 1e-5,
) -> Float[Array, "*batch height width channels"]:
  """Gives features the mean and standard deviation of other features.

  y = alpha * (sigma(s) * (c - mu(c)) / sigma(c) + mu(s)) + (1 - alpha) * c,
  sigma = sqrt(sum of (x - mu)^2 / (n - 1) + epsilon), for each channel and
  image by itself.

  A value that is NaN or infinite makes its channel of its image NaN, as it is
  part of the statistics; other channels and images do not see it.

  Args:
    content: Features, such as those of a network, or an image.
    style: Features of as many channels; other sizes are fine, and one style
      may serve several images (leading axes broadcast).
    alpha: How much is restyled, within 0..1; may differ between images and may
      be traced, then it is not checked.
    epsilon: Above 0; keeps constant channels from being divided by zero.

  Returns:
    The content restyled, in its type if that is a float type and float32
    otherwise. Everything is computed in float32.

  Raises:
    ValueError: An option is outside its range.

  Reference:
    Huang and Belongie, "Arbitrary Style Transfer in Real-time with Adaptive
    Instance Normalization", ICCV 2017, Eq. 8 (alpha: Eq. 14).

  Note:
    The paper leaves open where epsilon and n - 1 come in; public
    implementations have them here. A single pixel has no deviation, where
    dividing by n - 1 would give NaN; it gets the style's mean.
  """
  _check_share("alpha", alpha)
  _check_epsilon(epsilon)
  content = images.read(content, name="content")
  style = images.read(style, name="style")
  _check_not_empty(style)
  dtype = images.result_type(content)
  return _adain(content, style, alpha, epsilon, dtype=dtype)


@jax.custom_jvp
def _root(a: jax.Array) -> jax.Array:
  """The symmetric square root of symmetric positive matrices."""
  values, vectors = jnp.linalg.eigh(a)
  return _rotated(jnp.sqrt(values)[..., None, :], vectors)


def _rotated(values: jax.Array, vectors: jax.Array) -> jax.Array:
  product = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
  return product(vectors * values, vectors.mT)


@_root.defjvp
def _(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
  # From R dR + dR R = dA: finite where eigenvalues are equal, as those of grey
  # images are, unlike the gradient of the eigenvectors.
  (a,), (da,) = primals, tangents
  product = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
  values, vectors = jnp.linalg.eigh(a)
  roots = jnp.sqrt(values)
  inner = product(product(vectors.mT, da), vectors)
  inner = inner / (roots[..., :, None] + roots[..., None, :])
  out = product(product(vectors, inner), vectors.mT)
  return _rotated(roots[..., None, :], vectors), out


def _whitening(x: jax.Array) -> tuple[jax.Array, ...]:
  """Means, deviations, normalized pixels [..., c, n] and their moments."""
  *leading, height, width, channels = x.shape
  flat = jnp.moveaxis(x.reshape(*leading, height * width, channels), -1, -2)
  mean = flat.mean(-1, keepdims=True)
  variance = jnp.sum((flat - mean) ** 2, -1, keepdims=True)
  variance = variance / max(height * width - 1, 1)
  # What a constant channel has left is rounding.
  even = variance <= (_ROUNDING * mean) ** 2
  deviation = jnp.where(even, 0, jnp.sqrt(jnp.where(even, 1, variance)))
  normal = (flat - mean) / jnp.where(even, jnp.inf, deviation)
  gram = jnp.einsum(
    "...in,...jn->...ij", normal, normal, precision=lax.Precision.HIGHEST
  )
  return mean, deviation, normal, gram + jnp.eye(channels)


@functools.partial(jax.jit, static_argnames=("dtype",))
def _coral(source: Any, target: Any, *, dtype: Any) -> jax.Array:
  x = images.as_float32(source)
  _, _, normal, own = _whitening(x)
  mean, deviation, _, wanted = _whitening(images.as_float32(target))
  product = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
  turn = product(_root(wanted), jnp.linalg.inv(_root(own)))
  out = product(turn, normal) * deviation + mean
  return jnp.moveaxis(out, -2, -1).reshape(x.shape).astype(dtype)


@typed
def coral(
  source: Image | images.Picture,
  target: Num[ArrayLike, "*#batch target_height target_width channels"]
  | images.Picture,
) -> Float[Array, "*batch height width channels"]:
  """Gives an image the colours of another: mean, spread and correlation.

  y = sigma(t) * A(t)^(1/2) A(s)^(-1/2) (s - mu(s)) / sigma(s) + mu(t),
  A = the sum over pixels of z z^T + I, z a pixel's normalized colour.

  In style transfer it goes before the network, from the style to the content's
  colours, so that the content keeps them. A constant channel stays constant.

  Args:
    source: In any unit; pictures of PIL are taken as 0..255.
    target: With as many channels, of any size; one may serve several images
      (leading axes broadcast).

  Returns:
    The source in the target's colours, in its type if that is a float type and
    float32 otherwise; not clipped. Everything is computed in float32.

  Raises:
    ValueError: There is no pixel.

  Reference:
    Sun et al., "Return of Frustratingly Easy Domain Adaptation", AAAI 2016,
    Algorithm 1; for colours: Gatys et al., "Preserving Color in Neural Artistic
    Style Transfer", 2016, Sec. 4.1.

  Note:
    In the paper A is the covariance plus I, of values as they are; the public
    code of style transfer normalizes each channel first and sums instead of
    averaging, so that I counts for next to nothing. With it, as here, the
    result has (n_t - 1) / (n_s - 1) times the target's variance, n the number
    of pixels: give images of one size where contrast matters.
  """
  source = images.read(source, name="source")
  target = images.read(target, name="target")
  _check_not_empty(source, "source")
  _check_not_empty(target, "target")
  return _coral(source, target, dtype=images.result_type(source))


def _turn(x: jax.Array, basis: np.ndarray) -> jax.Array:
  """Colours in another basis; grey images have only light."""
  if x.shape[-1] == 1:
    return x
  return jnp.einsum("...c,oc->...o", x, basis, precision=lax.Precision.HIGHEST)


def _match(x: jax.Array, style: jax.Array, contrast: float) -> jax.Array:
  """Gives [B, H, W, C] the style's mean and its deviation times a contrast."""
  axes = (1, 2)
  rounding = lambda x: _ROUNDING * jnp.mean(
    x * x, axes, keepdims=True
  ).sum(-1, keepdims=True) + 1e-12  # fmt: skip
  variance = x.var(axes, keepdims=True)
  noise = _NOISE * variance.sum(-1, keepdims=True)
  gain = (style.var(axes, keepdims=True) + rounding(style)) / (
    variance + noise + rounding(x)
  )
  centred = x - x.mean(axes, keepdims=True)
  mean = style.mean(axes, keepdims=True)
  return contrast * jnp.sqrt(gain) * centred + mean


def _differences(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """To the pixel below and to the right; 0 at the border."""
  down = jnp.diff(x, axis=1, append=x[:, -1:])
  return down, jnp.diff(x, axis=2, append=x[:, :, -1:])


def _flat(x: jax.Array) -> jax.Array:
  """Takes texture away and keeps edges, whatever the image's unit."""
  down, right = _differences(x)
  size = 0.5 * (jnp.abs(down) + jnp.abs(right)).mean((1, 2, 3))
  return diffusion.perona_malik(
    x,
    kappa=jnp.maximum(_EDGE * size, 1e-6),
    step_size=_STEP_SIZE,
    iterations=_ITERATIONS,
  )


def _outlines(x: jax.Array, sigma: float) -> jax.Array:
  """Near 1 on outlines, near 0 elsewhere.

  Coarse gradients tell what people draw from texture: texture averages out.
  """
  down, right = _differences(blur.gaussian(x, sigma=sigma))
  energy = (down * down + right * right).sum(-1, keepdims=True)
  mean = energy.mean((1, 2, 3), keepdims=True) + 1e-9
  ratio = energy / mean
  return ratio * ratio / (ratio * ratio + 1)


def _patches(style: jax.Array, side: int, counts: Any) -> jax.Array:
  """Cuts one style [h, w, c] into patches [n, side, side, c], evenly spread.

  They overlap, or leave gaps, as the style's size has it.
  """
  for axis, count in enumerate(counts):
    lack = max(0, side - style.shape[2 * axis])
    style = windows.extend(
      style,
      axis=2 * axis,
      before=lack // 2,
      after=lack - lack // 2,
      border="reflect",
    )
    last = style.shape[2 * axis] - side
    start = np.round(np.linspace(0, last, count)).astype(np.int32)
    style = jnp.take(style, start[:, None] + np.arange(side), axis=2 * axis)
  style = style.swapaxes(1, 2)
  return style.reshape(-1, *style.shape[2:])


def _lay(patches: jax.Array, overlap: int, counts: Any) -> jax.Array:
  """Lays patches [n, side, side, c] so that their margins add up."""
  rows, columns = counts
  side, channels = patches.shape[-2:]
  stride = side - overlap
  x = patches.reshape(rows, columns, side, side, channels).swapaxes(1, 2)
  body, rest = x[:, :stride], x[:, stride:]
  body = body.at[1:, :overlap].add(rest[:-1])
  x = body.reshape(rows * stride, columns, side, channels)[overlap:]
  body, rest = x[:, :, :stride], x[:, :, stride:]
  body = body.at[:, 1:, :overlap].add(rest[:, :-1])
  return body.reshape(len(x), columns * stride, channels)[:, overlap:]


def _retexture(base: jax.Array, style: jax.Array, scale: int) -> jax.Array:
  """The style's detail, its patches placed by the light of the base."""
  size, height, width, _ = base.shape
  overlap = scale // 4
  side = scale + overlap
  counts = [-(-(n + overlap) // scale) for n in (height, width)]
  coarse = blur.gaussian(style, sigma=scale / 4)
  cut = jax.vmap(lambda x: _patches(x, side, counts))
  light = base[..., :1]
  for axis, count in enumerate(counts, 1):
    after = count * scale - overlap - light.shape[axis]
    light = windows.extend(
      light, axis=axis, before=overlap, after=after, border="reflect"
    )
  light = light.reshape(size, counts[0], scale, counts[1], scale)
  light = light.mean((2, 4)).reshape(size, -1)
  # The darkest patch goes to the darkest place, and each is used once.
  rank = jnp.argsort(jnp.argsort(lax.stop_gradient(light), 1), 1)
  order = jnp.argsort(lax.stop_gradient(cut(coarse[..., :1]).mean((2, 3, 4))))
  which = jnp.take_along_axis(order, rank, 1)[..., None, None, None]
  patches = jnp.take_along_axis(cut(style - coarse), which, 1)
  # The squares of what meets in a margin add up to 1: independent details keep
  # their variance.
  rise = np.sin(np.pi / 2 * (np.arange(overlap) + 0.5) / overlap)
  window = np.concatenate([rise, np.ones(scale - overlap), rise[::-1]])
  window = np.float32(window[:, None, None] * window[:, None])
  laid = jax.vmap(lambda x: _lay(x, overlap, counts))(patches * window)
  return laid[:, :height, :width]


def _restyle(x: jax.Array, s: jax.Array, *, scale: int) -> jax.Array:
  """Restyles images [B, H, W, C] by styles [B, h, w, C] in full."""
  whole = (1, 2, 3)
  low = jnp.minimum(x.min(whole, keepdims=True), s.min(whole, keepdims=True))
  high = jnp.maximum(x.max(whole, keepdims=True), s.max(whole, keepdims=True))
  opponents = _turn(s, _OPPONENTS)
  base = _match(_flat(_turn(x, _OPPONENTS)), opponents, _CONTRAST)
  detail = _retexture(base, opponents, scale)
  soft = blur.gaussian(base, sigma=scale / 8)
  outlines = _outlines(base, scale / 12)
  out = soft + outlines * (base - soft) + (1 - outlines) * detail
  out = _turn(_match(out, opponents, 1.0), _OPPONENTS.T)
  return jnp.clip(out, low, high)


@functools.partial(jax.jit, static_argnames=("scale",))
def _match_statistics(
  image: Any, style: Any, strength: Any, *, scale: int
) -> jax.Array:
  *leading, height, width, channels = image.shape
  size = math.prod(leading)
  x = images.as_float32(image).reshape(size, height, width, channels)
  s = jnp.broadcast_to(
    images.as_float32(style), (*leading, *style.shape[-3:])
  ).reshape(size, *style.shape[-3:])
  out = batches.in_groups(functools.partial(_restyle, scale=scale), x, s)
  each = jnp.broadcast_to(jnp.asarray(strength, jnp.float32), leading)
  out = x + each.reshape(size, 1, 1, 1) * (out - x)
  return out.reshape(image.shape).astype(images.result_type(image))


@typed
def match_statistics(
  image: Image | images.Picture,
  style: Num[ArrayLike, "*#batch style_height style_width channels"]
  | images.Picture,
  *,
  strength: Num[ArrayLike, "*#batch"] = 1.0,
  scale: Size | None = None,
) -> Float[Array, "*batch height width channels"]:
  """Restyles an image with no learned weights: other texture, same outlines.

  A stand-in for style transfer by a network where training pictures are to
  lose their own texture, as in Stylized-ImageNet:

  b = diffusion(c), matched to mu(s) and contrast * sigma(s); the texture goes.
  d = s - blur(s), cut into patches that are laid by rank of light: the patch
    that is k-th in darkness in s goes to the k-th darkest place of b. So each
    patch is used once, its phases stay, and the style's layout is lost.
  w = e^2 / (1 + e^2), e the energy of b's coarse gradient over its mean.
  y = blur(b) + w * (b - blur(b)) + (1 - w) * d, matched to mu(s), sigma(s)
    and kept within the values of image and style.

  Matched are light, blue-yellow and red-green, each by itself, so that greys
  stay grey in a grey style. Constant styles leave next to nothing. No random
  numbers: equal inputs give equal results. Gradients flow, in reverse mode, to
  image, style and strength; which patch goes where is taken as fixed, and
  changes in jumps.

  A value that is NaN or infinite, in image or style, makes the whole result
  NaN or infinite, as statistics are of the whole; other images of a batch do
  not see it.

  Args:
    image: In any unit, grey or RGB; uint8 arrays and pictures of PIL are taken
      as 0..255.
    style: In the same unit, with as many channels. It is not resized: its
      texture keeps its size in pixels. Patches are spread evenly over it, and
      one that is smaller than a patch is mirrored. One style may serve several
      images (leading axes broadcast).
    strength: How much is restyled, within 0..1; 0 gives the image back. May
      differ between images and may be traced, then it is not checked.
    scale: The stride of the patches in pixels, at least 4. Larger keeps more
      of the style's structure, and at last its shapes; smaller only its
      finest texture. Without it a seventh of the image's shorter side, within
      4..64. Each value compiles anew.

  Returns:
    The restyled image, in the image's type if that is a float type and
    float32 otherwise.

  Raises:
    ValueError: An option is outside its range, or the images are not of one
      or three channels.
    InputError: A picture of PIL has more than eight bits per channel.

  Reference:
    Matching: Huang and Belongie, ICCV 2017, Eq. 8; light and colours: Reinhard
    et al., "Color Transfer between Images", IEEE CG&A 2001. Patches
    with margins that keep the variance: Heitz and Neyret, "High-Performance
    By-Example Noise using a Histogram-Preserving Blending Operator", HPG 2018.
    What it is for: Geirhos et al., ICLR 2019.

  Note:
    Matching energies in oriented bands as well (Heeger and Bergen, SIGGRAPH
    1995) was tried with an earlier form and made next to no difference, to
    texture or outlines: patches bring these statistics along.
  """
  values, texture = images.read(image), images.read(style, name="style")
  _check_share("strength", strength)
  height, width, channels = values.shape[-3:]
  if channels not in (1, 3) or texture.shape[-1] != channels:
    raise ValueError(
      "image and style must be both of 1 or both of 3 channels, got "
      f"{channels} and {texture.shape[-1]}."
    )
  if scale is None:
    scale = min(64, max(4, round(min(height, width) / 7)))
  if scale < 4:
    raise ValueError(f"scale must be at least 4, got {scale}.")
  _check_not_empty(texture)
  if values.size == 0:
    return jnp.asarray(values, images.result_type(values))
  return _match_statistics(values, texture, strength, scale=int(scale))
