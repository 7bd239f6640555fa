"""Style transfer by AdaIN: encoder, matched statistics, decoder.

`stylizer` takes images 0..255 and gives images of the same size; `transfer` is
what the networks themselves compute, of images 0..1. Notation: c is the
content, s a style, f the encoder, g the decoder.

Reference:
  Huang and Belongie, "Arbitrary Style Transfer in Real-time with Adaptive
  Instance Normalization", ICCV 2017.
"""

from collections.abc import Callable, Mapping
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxshape import images
from jaxshape.backbones import vgg
from jaxshape.filters import stylization
from jaxshape.layers import apply
from jaxshape.typing import Array, ArrayLike, Float, Num, PyTree, typed

Dtype = Any


@typed
def transfer(
  params: PyTree,
  content: Float[ArrayLike, "*batch height width 3"],
  style: Float[ArrayLike, "*#batch style_height style_width 3"]
  | Float[ArrayLike, "*#batch styles style_height style_width 3"],
  *,
  alpha: Num[ArrayLike, "*#batch"] = 1.0,
  weights: Num[ArrayLike, " styles"] | None = None,
  dtype: Dtype = jnp.float32,
) -> Float[Array, "*batch _ _ 3"]:
  """What the networks themselves make of images 0..1.

  y = g(alpha * sum over k of w_k AdaIN(f(c), f(s_k)) + (1 - alpha) * f(c)), f
  the encoder and g the decoder.

  Args:
    params: Of the networks, "encoder" and "decoder", of any width.
    content: 0..1, of at least 9 x 9 pixels.
    style: 0..1, of at least 9 x 9 pixels; one style may serve several images
      (leading axes broadcast).
    alpha: How much is restyled, within 0..1; may differ between images and may
      be traced, then it is not checked.
    weights: Of several styles, which are then an axis of `style` before its
      height; they sum to 1.
    dtype: What the networks compute in.

  Returns:
    The image, not clipped, of a multiple of 8 pixels along each side: up to 7
    more than the content, below and to the right.

  Raises:
    ValueError: alpha is outside 0..1, or an image is too small.

  Reference:
    Huang and Belongie, ICCV 2017, Eq. 9, 10, 14 and 15.
  """
  encoder, decoder = _networks(params, dtype)

  def encode(x: Any) -> Array:
    x = jnp.asarray(x, jnp.float32)
    *leading, height, width, _ = x.shape
    flat = x.reshape(-1, height, width, 3)
    features = apply.apply(encoder, params["encoder"], {}, flat)[0][-1]
    return features.reshape(*leading, *features.shape[1:])

  target, looks = encode(content), encode(style)
  if weights is None:
    target = stylization.adain(target, looks, alpha=alpha)
  else:
    w = jnp.asarray(weights, jnp.float32)
    each = (*target.shape[:-3], len(w), *target.shape[-3:])
    styled = stylization.adain(
      jnp.broadcast_to(target[..., None, :, :, :], each), looks
    )
    styled = jnp.einsum("...khwc,k->...hwc", styled, w)
    share = jnp.asarray(alpha, jnp.float32)[..., None, None, None]
    target = share * styled + (1 - share) * target
  flat = target.reshape(-1, *target.shape[-3:])
  out, _ = apply.apply(decoder, params["decoder"], {}, flat)
  return out.reshape(*target.shape[:-3], *out.shape[1:])


@functools.partial(jax.jit, static_argnames=("preserve_color", "dtype"))
def _stylize(
  params: PyTree,
  content: Any,
  style: Any,
  alpha: Any,
  weights: Any,
  *,
  preserve_color: bool,
  dtype: Any,
) -> Array:
  c, s = images.as_float32(content) / 255, images.as_float32(style) / 255
  if preserve_color:
    # A shared style takes on other colours for each image.
    several = s.shape[-4:-3] if weights is not None else ()
    s = jnp.broadcast_to(s, (*c.shape[:-3], *several, *s.shape[-3:]))
    like = c if weights is None else c[..., None, :, :, :]
    s = stylization.coral(s, like)
  out = transfer(params, c, s, alpha=alpha, weights=weights, dtype=dtype)
  height, width = content.shape[-3:-1]
  out = jnp.clip(255 * out[..., :height, :width, :], 0, 255)
  return out.astype(images.result_type(content))


@typed
def stylizer(
  params: PyTree, *, dtype: Dtype = jnp.float32
) -> Callable[..., Array]:
  """Gives the function that restyles images 0..255 by trained networks.

  stylize(content, style, alpha=1.0, *, weights=None, preserve_color=False):

  content: [*batch, height, width, 3], 0..255, or a picture of PIL, of at least
    9 x 9 pixels.
  style: The same, of any size; leading axes broadcast. It is not resized: the
    size of its texture in pixels is what is seen.
  alpha: How much is restyled, within 0..1, one number or one per image.
  weights: Of several styles to be mixed, none negative, scaled to sum to 1; the
    styles are then an axis of `style` before its height.
  preserve_color: Whether the style first takes on the content's colours, by
    `filters.stylization.coral`; best if both are of one size.

  The result has the content's size and is kept within 0..255, in the content's
  type if that is a float type and float32 otherwise.

  Args:
    params: Of the networks: "encoder" and "decoder", as `style_params` gives
      them; of any width.
    dtype: What the networks compute in.

  Returns:
    The function; it is pure, compiled once for each shape, and raises
    ValueError by the name of what is outside its range.

  Reference:
    Huang and Belongie, ICCV 2017, Eq. 14 and 15; colours: Gatys et al.,
    "Preserving Color in Neural Artistic Style Transfer", 2016.
  """
  _networks(params, dtype)
  params = jax.tree.map(jnp.asarray, params)

  @typed
  def stylize(
    content: Num[ArrayLike, "*batch height width 3"] | images.Picture,
    style: Num[ArrayLike, "*styles style_height style_width 3"]
    | images.Picture,
    alpha: Num[ArrayLike, "*#batch"] = 1.0,
    *,
    weights: Any = None,
    preserve_color: bool = False,
  ) -> Float[Array, "*batch height width 3"]:
    c = images.read(content, name="content")
    s = images.read(style, name="style")
    _check_share("alpha", alpha)
    for name, shape in (("content", c.shape), ("style", s.shape)):
      if min(shape[-3:-1]) < vgg.SMALLEST:
        raise ValueError(
          f"{name} must be of at least {vgg.SMALLEST} x {vgg.SMALLEST} pixels, "
          f"got {shape[-3]} x {shape[-2]}."
        )
    mixed = None if weights is None else _shares(weights, s.shape)
    return _stylize(
      params, c, s, alpha, mixed, preserve_color=preserve_color, dtype=dtype
    )

  return stylize


def _check_share(name: str, value: Any) -> None:
  known = images.concrete(value)
  if known is not None and not ((known >= 0) & (known <= 1)).all():
    raise ValueError(f"{name} must be within 0..1, got {value}.")


def _shares(weights: Any, shape: tuple[int, ...]) -> Array:
  """Weights that sum to 1."""
  w = jnp.asarray(weights, jnp.float32)
  if len(shape) < 4 or w.shape != (shape[-4],):
    raise ValueError(
      "weights must be one number for each style, which are the axis before "
      f"the height, got {w.shape} for {shape}."
    )
  known = images.concrete(w)
  if known is not None and not (known.min() >= 0 and 0 < known.sum() < np.inf):
    raise ValueError(
      f"weights must be 0 or more and not all 0, got {known.tolist()}."
    )
  return w / w.sum()


def _networks(params: PyTree, dtype: Any) -> tuple[vgg.Encoder, vgg.Decoder]:
  """The networks of parameters, which tell their width."""
  try:
    encoder = np.shape(params["encoder"]["conv1_1"]["kernel"])[-1]
    features = np.shape(params["encoder"]["conv4_1"]["kernel"])[-1]
    decoder = np.shape(params["decoder"]["conv1_1"]["kernel"])[-2]
    wanted = np.shape(params["decoder"]["conv4_1"]["kernel"])[-2]
  except (KeyError, TypeError, IndexError) as error:
    raise ValueError(
      "params must hold those of an 'encoder' and of a 'decoder'."
    ) from error
  if features != wanted:
    raise ValueError(
      f"params must be of networks that fit, got an encoder of {features} "
      f"channels and a decoder for {wanted}."
    )
  return vgg.Encoder(encoder, dtype=dtype), vgg.Decoder(decoder, dtype=dtype)


@typed
def style_params(
  encoder: Mapping[str, Any], decoder: Mapping[str, Any]
) -> dict[str, PyTree]:
  """Parameters for `stylizer`, from the tensors of two public files.

  Args:
    encoder: Of `vgg_normalised.pth`, or of torchvision's VGG-19.
    decoder: Of `decoder.pth`.

  Returns:
    "encoder" and "decoder"; how wide the networks are, the tensors say.

  Raises:
    InputError: Tensors are missing, or not known, or of another shape.
  """
  return {
    "encoder": vgg.from_state_dict(encoder_of(encoder), encoder)[0],
    "decoder": vgg.from_state_dict(decoder_of(decoder), decoder)[0],
  }


@typed
def encoder_of(tensors: Mapping[str, Any]) -> vgg.Encoder:
  """The encoder that public tensors are for."""
  names = ("2.weight", "features.0.weight")
  return vgg.Encoder(_width(tensors, names, 0) or 64)


@typed
def decoder_of(tensors: Mapping[str, Any]) -> vgg.Decoder:
  """The decoder that public tensors are for."""
  return vgg.Decoder(_width(tensors, ("28.weight",), 1) or 64)


def _width(tensors: Mapping[str, Any], names: Any, axis: int) -> int:
  for name in names:
    for key in (name, f"module.{name}"):
      if key in tensors and np.ndim(tensors[key]) == 4:
        return np.shape(tensors[key])[axis]
  return 0
