import jax
import jax.numpy as jnp
from jaxtyping import TypeCheckError
import numpy as np
from PIL import Image
import pytest

from jaxshape.backbones import style_transfer, vgg
from jaxshape.errors import InputError
from jaxshape.filters import stylization
from tests.backbones import test_vgg

RNG = np.random.default_rng(0)
PARAMS = {
  "encoder": test_vgg.drawn(vgg.Encoder(2))[0],
  "decoder": test_vgg.drawn(vgg.Decoder(2))[0],
}
# So that results lie within 0..1 for the most part.
_LAST = PARAMS["decoder"]["conv1_1"]
_LAST["kernel"], _LAST["bias"] = 0.05 * _LAST["kernel"], 0.5 + 0 * _LAST["bias"]
CONTENT = RNG.uniform(0, 1, (2, 11, 18, 3)).astype(np.float32)
STYLES = RNG.uniform(0, 1, (2, 9, 16, 3)).astype(np.float32)
WEIGHTS = np.array([1.0, 3.0], np.float32)


def statistics(x):
  mean = x.mean((1, 2), keepdims=True)
  total = ((x - mean) ** 2).sum((1, 2), keepdims=True)
  return mean, np.sqrt(total / (x.shape[1] * x.shape[2] - 1) + 1e-5)


def restyled(content, style):
  """AdaIN of relu4_1."""
  (mean, spread), (new_mean, new_spread) = (
    statistics(content),
    statistics(style),
  )
  return (content - mean) / spread * new_spread + new_mean


def encoded(x):
  return test_vgg.encode(PARAMS["encoder"], x)[-1]


def decoded(x):
  return test_vgg.decode(PARAMS["decoder"], x)


@pytest.fixture(scope="module")
def stylize():
  return style_transfer.stylizer(PARAMS)


# Golden: the whole path in NumPy.


def test_transfer_equals_the_whole_path():
  c, s = encoded(CONTENT), encoded(STYLES)
  call = jax.jit(style_transfer.transfer)
  for alpha in (1.0, 0.5):
    got = call(PARAMS, CONTENT, STYLES, alpha=alpha)
    assert got.shape == (2, 16, 24, 3)
    want = decoded(alpha * restyled(c, s) + (1 - alpha) * c)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)


def test_several_styles_are_mixed_in_the_features(stylize):
  c, s = encoded(CONTENT), encoded(STYLES)
  each = [restyled(c, s[i : i + 1]) for i in range(2)]
  want = decoded(0.7 * (0.25 * each[0] + 0.75 * each[1]) + 0.3 * c)
  got = stylize(255 * CONTENT, 255 * STYLES, alpha=0.7, weights=WEIGHTS)
  want = np.clip(255 * want[:, :11, :18], 0, 255)
  np.testing.assert_allclose(got, want, atol=0.05)


def test_colours_are_kept_by_coral_before_the_network(stylize):
  got = stylize(255 * CONTENT, 255 * STYLES[0], preserve_color=True)
  colours = [stylization.coral(STYLES[0], image) for image in CONTENT]
  want = stylize(255 * CONTENT, 255 * np.stack(colours))
  np.testing.assert_allclose(got, want, atol=0.02)
  mixed = stylize(
    255 * CONTENT, 255 * STYLES, weights=[1, 0], preserve_color=True
  )
  np.testing.assert_allclose(mixed, got, atol=0.02)


# Laws.


def test_results_have_the_size_of_the_content_and_its_range(stylize):
  whole = (255 * CONTENT).astype(np.uint8)
  got = stylize(whole, (255 * STYLES).astype(np.uint8))
  assert got.shape == CONTENT.shape
  assert got.dtype == jnp.float32
  assert float(got.min()) >= 0
  assert float(got.max()) <= 255
  assert float(got.std()) > 1
  pictures = [Image.fromarray(np.asarray(x)) for x in (whole[0], whole[1])]
  np.testing.assert_allclose(
    stylize(*pictures), stylize(whole[0], whole[1]), atol=1e-3
  )


def test_one_style_serves_all_and_alpha_differs(stylize):
  content = 255 * CONTENT
  got = stylize(content, 255 * STYLES[0], alpha=np.array([1.0, 0.0]))
  both = stylize(content, 255 * STYLES[[0, 0]])
  np.testing.assert_allclose(got[0], both[0], atol=0.01)
  # Nothing of the style is left.
  other = stylize(content, 255 * STYLES[1], np.array([1.0, 0.0]))
  np.testing.assert_allclose(got[1], other[1], atol=0.01)
  assert float(jnp.abs(got[0] - other[0]).max()) > 0.1


def test_parameters_from_two_files_tell_their_width():
  encoder = vgg.to_state_dict(vgg.Encoder(2), PARAMS["encoder"], {})
  decoder = vgg.to_state_dict(vgg.Decoder(2), PARAMS["decoder"], {})
  got = style_transfer.style_params(encoder, decoder)
  jax.tree.map(np.testing.assert_array_equal, got, PARAMS)
  with pytest.raises(InputError, match="missing: .*Decoder|Decoder.*missing"):
    style_transfer.style_params(encoder, encoder)


# Transforms.


def test_vmap_agrees_with_a_batch(stylize):
  got = jax.jit(jax.vmap(stylize))(255 * CONTENT, 255 * STYLES)
  want = stylize(255 * CONTENT, 255 * STYLES)
  np.testing.assert_allclose(got, want, atol=0.01)


def test_gradients_flow_to_content_and_style():
  @jax.jit
  @jax.value_and_grad
  def loss(pair):
    out = style_transfer.transfer(PARAMS, *pair, alpha=0.5)
    return jnp.mean(out**2)

  pair = (CONTENT[:1, :9, :9], STYLES[:1, :, :9])
  _, grads = loss(pair)
  assert all(float(jnp.abs(g).max()) > 0 for g in grads)
  norm = sum(float(jnp.sum(g * g)) for g in grads)
  # Rectifiers and poolings bend in places: a small step along the gradient.
  step = 1e-3 / norm**0.5
  ahead, behind = (
    float(
      loss(
        tuple(x + sign * step * g for x, g in zip(pair, grads, strict=True))
      )[0]
    )
    for sign in (1, -1)
  )
  np.testing.assert_allclose((ahead - behind) / (2 * step), norm, rtol=0.05)


# Refusals.


def test_refusals(stylize):
  for alpha in (-0.1, 1.1, np.nan, np.array([0.5, 2.0])):
    with pytest.raises(ValueError, match="alpha must be within 0..1, got"):
      stylize(CONTENT, STYLES, alpha=alpha)
  with pytest.raises(ValueError, match="alpha must be within 0..1, got 1.5"):
    style_transfer.transfer(PARAMS, CONTENT, STYLES, alpha=1.5)
  with pytest.raises(ValueError, match="content must be of at least 9 x 9"):
    stylize(CONTENT[:, :8], STYLES)
  with pytest.raises(ValueError, match="style must be of at least 9 x 9 .* 8"):
    stylize(CONTENT, STYLES[:, :, :8])
  for weights in ([1.0], [1.0, -1.0], [0.0, 0.0], [np.nan, 1.0]):
    with pytest.raises(ValueError, match="weights must be"):
      stylize(CONTENT, STYLES, weights=weights)
  with pytest.raises(TypeCheckError, match="content"):
    stylize(CONTENT[..., :1], STYLES)
  with pytest.raises(ValueError, match="params must hold those of an 'enco"):
    style_transfer.stylizer({"encoder": {}})
  other = {**PARAMS, "decoder": test_vgg.drawn(vgg.Decoder(1))[0]}
  with pytest.raises(ValueError, match="an encoder of 16 channels and a deco"):
    style_transfer.stylizer(other)
