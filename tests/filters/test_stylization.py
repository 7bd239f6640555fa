import functools

import jax
from jax import test_util
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from jaxshape.filters import stylization


def random_image(*shape, seed=0, top=255):
  rng = np.random.default_rng(seed)
  return rng.uniform(0, top, shape).astype(np.float32)


def two_regions(n, channels=3):
  """A dark and a light half, each in a texture of its own."""
  image = np.where(np.arange(n) < n // 2, 60.0, 190.0) * np.ones((n, 1))
  fine = 12 * np.sin(np.arange(n)[:, None] * 2.4)
  return np.repeat((image + fine)[..., None], channels, -1).astype(np.float32)


def stripes(n, channels=3, period=6):
  """A texture across that of `two_regions`: it varies along x only."""
  x = 128 + 50 * np.sin(np.arange(n) * 2 * np.pi / period)
  x = np.broadcast_to(x[None, :, None], (n, n, channels))
  return x.astype(np.float32)


def adain_in_numpy(content, style, alpha, epsilon=1e-5):
  out = np.empty(content.shape, np.float64)
  for b, i in np.ndindex(content.shape[0], content.shape[-1]):
    c = content[b, ..., i].astype(np.float64)
    s = style[b, ..., i].astype(np.float64)
    spread = [
      np.sqrt(((x - x.mean()) ** 2).sum() / (x.size - 1) + epsilon)
      for x in (c, s)
    ]
    styled = spread[1] * (c - c.mean()) / spread[0] + s.mean()
    out[b, ..., i] = alpha[b] * styled + (1 - alpha[b]) * c
  return out


# Golden: the formula in NumPy.


def test_adain_equals_the_formula():
  content = random_image(3, 6, 9, 5)
  style = random_image(3, 7, 4, 5, seed=1, top=9)
  alpha = np.array([1.0, 0.5, 0.0])
  got = stylization.adain(content, style, alpha=alpha)
  want = adain_in_numpy(content, style, alpha)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


def test_adain_equals_the_formula_on_a_large_image_under_jit():
  content = random_image(1, 130, 150, 4)
  style = random_image(1, 128, 40, 4, seed=1, top=30)
  got = jax.jit(stylization.adain)(content, style)
  want = adain_in_numpy(content, style, [1.0])
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)


def test_epsilon_stands_inside_the_root():
  content = random_image(1, 5, 5, 2, top=1)
  style = random_image(1, 5, 5, 2, seed=1, top=1)
  got = stylization.adain(content, style, epsilon=0.1)
  want = adain_in_numpy(content, style, [1.0], epsilon=0.1)
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_patches_are_laid_back_whole():
  # Those of the image itself, unmoved, with margins that add up to 1.
  image = random_image(20, 27, 2)
  overlap, scale = 2, 8
  counts = [-(-(n + overlap) // scale) for n in image.shape[:2]]
  whole = [n * scale + overlap for n in counts]
  wide = np.pad(
    image,
    [
      (overlap, whole[0] - 20 - overlap),
      (overlap, whole[1] - 27 - overlap),
      (0, 0),
    ],
  )
  patches = stylization._patches(jnp.asarray(wide), scale + overlap, counts)
  rise = (np.arange(overlap) + 0.5) / overlap
  window = np.concatenate([rise, np.ones(scale - overlap), rise[::-1]])
  patches = patches * (window[:, None, None] * window[:, None])
  got = stylization._lay(patches, overlap, counts)[:20, :27]
  np.testing.assert_allclose(got, image, rtol=1e-5)


def test_moments_equal_the_formula():
  x = random_image(2, 5, 7, 3)
  mean, deviation = stylization.moments(x, epsilon=0.5)
  np.testing.assert_allclose(mean, x.mean((1, 2)), rtol=1e-5)
  want = np.sqrt(x.var((1, 2), ddof=1) + 0.5)
  np.testing.assert_allclose(deviation, want, rtol=1e-5)


def coral_in_numpy(source, target):
  def normalized(x):
    flat = x.reshape(-1, x.shape[-1]).astype(np.float64).T
    mean, spread = flat.mean(1), flat.std(1, ddof=1)
    return (flat - mean[:, None]) / spread[:, None], mean, spread

  def root(a):
    left, values, right = np.linalg.svd(a)
    return left @ np.diag(np.sqrt(values)) @ right

  (s, _, _), (t, mean, spread) = normalized(source), normalized(target)
  own, wanted = (z @ z.T + np.eye(len(z)) for z in (s, t))
  out = root(wanted) @ np.linalg.inv(root(own)) @ s
  out = out * spread[:, None] + mean[:, None]
  return out.T.reshape(source.shape)


def test_coral_equals_the_formula():
  source = random_image(2, 12, 10, 3)
  target = random_image(2, 8, 14, 3, seed=1) ** 1.1
  target[..., 1] += 2 * target[..., 0]  # Correlated.
  got = jax.jit(stylization.coral)(source, target)
  want = [coral_in_numpy(*pair) for pair in zip(source, target, strict=True)]
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=0.05)


# Laws.


def test_coral_takes_on_mean_spread_and_correlation():
  source, target = random_image(30, 40, 3), random_image(20, 30, 3, seed=1)
  target[..., 2] += target[..., 0]
  got = np.asarray(stylization.coral(source, target)).reshape(-1, 3)
  want = target.reshape(-1, 3)
  np.testing.assert_allclose(got.mean(0), want.mean(0), rtol=1e-4)
  scale = np.cov(want.T)
  # Sums, not means: the number of pixels counts, as in the public code.
  np.testing.assert_allclose(
    np.cov(got.T), scale * 599 / 1199, atol=0.01 * scale.max()
  )
  same = stylization.coral(target, target)
  np.testing.assert_allclose(same, target, atol=0.01)


def test_coral_of_constants_and_greys_is_finite_with_its_gradient():
  grey = np.repeat(random_image(6, 7, 1), 3, -1)
  flat = np.full((5, 5, 3), 77.7, np.float32)
  colourful = random_image(6, 7, 3, seed=1)

  @jax.jit
  @functools.partial(jax.value_and_grad, argnums=(0, 1))
  def loss(source, target):
    return jnp.mean(stylization.coral(source, target) ** 2)

  for pair in ((grey, colourful), (colourful, grey), (flat, flat)):
    value, grads = loss(*pair)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in grads)
  got = stylization.coral(flat, colourful)
  want = np.broadcast_to(colourful.mean((0, 1)), flat.shape)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  got = stylization.coral(colourful, flat)
  np.testing.assert_allclose(got, np.full_like(colourful, 77.7), rtol=1e-5)


def test_adain_moves_statistics_onto_those_of_the_style():
  content, style = random_image(9, 8, 3), random_image(5, 4, 3, seed=1, top=70)
  got = np.asarray(stylization.adain(content, style))
  for f in (np.mean, functools.partial(np.std, ddof=1)):
    np.testing.assert_allclose(f(got, (0, 1)), f(style, (0, 1)), rtol=1e-4)
  np.testing.assert_allclose(
    stylization.adain(style, style), style, rtol=1e-4, atol=1e-3
  )


def test_adain_of_constants_and_single_pixels_is_the_mean_of_the_style():
  style = random_image(5, 4, 2, seed=1)
  for content in (np.full((4, 4, 2), 7.0), np.full((1, 1, 2), 7.0)):
    got = stylization.adain(content.astype(np.float32), style)
    want = np.broadcast_to(style.mean((0, 1)), got.shape)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_strength_0_gives_the_image_back():
  image, style = random_image(2, 20, 20, 3), random_image(20, 20, 3, seed=1)
  got = stylization.match_statistics(
    image, style, strength=np.array([0.0, 1.0])
  )
  np.testing.assert_array_equal(got[0], image[0])
  assert np.abs(got[1] - image[1]).mean() > 20
  half = stylization.match_statistics(
    image, style, strength=np.array([0.5, 0.5])
  )
  np.testing.assert_allclose(half[1], (image[1] + got[1]) / 2, atol=0.05)


def test_texture_becomes_that_of_the_style_and_outlines_stay():
  image, style = two_regions(128), stripes(128)
  got = np.asarray(jax.jit(stylization.match_statistics)(image, style))[..., 0]
  away = got[:, 12:44], got[:, 84:116]
  for region in away:
    along, across = np.diff(region, axis=1), np.diff(region, axis=0)
    # Before, all of the texture varied along y.
    assert np.abs(along).mean() > 4 * np.abs(across).mean()
    power = np.abs(np.fft.rfft(region - region.mean(), axis=1)) ** 2
    period = 32 / np.argmax(power.sum(0))
    assert 5 < period < 7
  # Over whole periods of the style.
  step = got[:, 64:70].mean() - got[:, 58:64].mean()
  assert step > 1.2 * style.std()
  # The outline's edge is the steepest place of nearly all rows.
  steepest = np.argmax(np.abs(np.diff(got, axis=1)), axis=1)
  assert (np.abs(steepest - 63) <= 1).mean() > 0.9


def test_statistics_become_those_of_the_style():
  image = two_regions(20) + random_image(20, 20, 3, top=30)
  style = 90 + random_image(20, 20, 3, seed=1, top=60)
  got = np.asarray(stylization.match_statistics(image, style))
  np.testing.assert_allclose(got.mean((0, 1)), style.mean((0, 1)), atol=2)
  np.testing.assert_allclose(got.std((0, 1)), style.std((0, 1)), rtol=0.1)


def test_an_image_as_its_own_style_keeps_its_statistics():
  image = two_regions(128) + random_image(128, 128, 3, top=60)
  got = np.asarray(stylization.match_statistics(image, image))
  np.testing.assert_allclose(got.mean((0, 1)), image.mean((0, 1)), atol=4)
  np.testing.assert_allclose(got.std((0, 1)), image.std((0, 1)), rtol=0.1)
  fine = [np.abs(np.diff(x[:, :56], axis=0)).mean() for x in (image, got)]
  # It gives up contrast for the outlines.
  assert 0.6 < fine[1] / fine[0] < 1.1


def test_constant_styles_take_all_texture_away():
  image, style = two_regions(20), np.full((20, 20, 3), 100.0, np.float32)
  got = np.asarray(stylization.match_statistics(image, style))
  np.testing.assert_allclose(got, 100, atol=2)


def test_grey_styles_make_grey_images():
  image, style = random_image(20, 20, 3), random_image(20, 20, 1).repeat(3, -1)
  got = stylization.match_statistics(image, style)
  np.testing.assert_allclose(got[..., 0], got[..., 1], atol=1)
  np.testing.assert_allclose(got[..., 0], got[..., 2], atol=1)


def test_constant_images_get_the_texture_alone():
  style = random_image(20, 20, 3)
  f = stylization.match_statistics
  pull = jax.jit(jax.grad(lambda x, s: f(x, s).sum(), (0, 1)))
  for value in (0.0, 123.4):
    image = np.full((20, 20, 3), value, np.float32)
    got = f(image, style)
    np.testing.assert_allclose(got.std(), style.std(), rtol=0.15)
    assert np.isfinite(f(image, image)).all()
    for gradient in (*pull(image, style), *pull(image, image)):
      assert np.isfinite(gradient).all()


def test_units_do_not_matter():
  image, style = random_image(20, 20, 3), random_image(20, 20, 3, seed=1)
  want = stylization.match_statistics(image, style)
  got = 255 * stylization.match_statistics(image / 255, style / 255)
  np.testing.assert_allclose(got, want, atol=0.1)


def test_values_stay_within_those_of_image_and_style():
  image, style = two_regions(20), random_image(20, 20, 3)
  got = stylization.match_statistics(image, style)
  assert got.min() >= style.min() - 1e-3
  assert got.max() <= style.max() + 1e-3


def test_thin_images_and_styles():
  for shape, other in [((1, 1, 1), (17, 5, 1)), ((17, 1, 3), (1, 9, 3))]:
    got = stylization.match_statistics(
      random_image(*shape), random_image(*other, seed=1)
    )
    assert got.shape == shape
    assert np.isfinite(got).all()


def test_types_and_pictures():
  image = random_image(20, 20, 3).astype(np.uint8)
  style = random_image(20, 20, 3, seed=1).astype(np.uint8)
  want = stylization.match_statistics(*(np.float32(x) for x in (image, style)))
  pictures = Image.fromarray(image), Image.fromarray(style)
  got = stylization.match_statistics(*pictures)
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, want, atol=1e-3)
  short = jnp.asarray(image, jnp.bfloat16)
  got = stylization.match_statistics(short, style)
  assert got.dtype == jnp.bfloat16
  want = stylization.match_statistics(np.float32(short), np.float32(style))
  np.testing.assert_allclose(np.float32(got), want, rtol=5e-3)
  assert stylization.adain(short, style).dtype == jnp.bfloat16


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_wrong_numbers_stay_in_their_image(wrong):
  image, style = random_image(2, 20, 20, 3), random_image(20, 20, 3, seed=1)
  broken = image.copy()
  broken[0, 3, 4, 1] = wrong
  whole = np.ones(2)  # As elsewhere: one compilation for several tests.
  for f in (
    lambda x: stylization.match_statistics(x, style, strength=whole),
    lambda x: stylization.adain(x, style),
  ):
    got = f(broken)
    assert not np.isfinite(got[0, ..., 1]).any()
    np.testing.assert_allclose(got[1], f(image)[1], atol=1e-3)


def test_empty_batches():
  image = np.zeros((0, 8, 8, 3), np.uint8)
  style = random_image(8, 8, 3)
  for f in (stylization.match_statistics, stylization.adain):
    assert f(image, style).shape == image.shape


# Transforms.


@pytest.mark.parametrize("name", ["adain", "match_statistics"])
def test_jit_and_vmap_agree_with_the_batch(name):
  f = getattr(stylization, name)
  option = {"adain": "alpha", "match_statistics": "strength"}[name]
  image = random_image(2, 2, 9, 8, 3)
  style = random_image(2, 2, 7, 11, 3, seed=1)
  share = np.array([[0.2, 1.0], [0.5, 0.9]], np.float32)
  g = lambda c, s, a: f(c, s, **{option: a})
  want = g(image, style, share)
  for h in (jax.jit(g), jax.vmap(jax.vmap(g))):
    np.testing.assert_allclose(h(image, style, share), want, atol=0.02)
  one = g(image[1, 0], style[1, 0], np.float32(0.5))
  np.testing.assert_allclose(one, want[1, 0], atol=0.02)


def test_equal_inputs_give_equal_results_and_compile_once():
  image, style = random_image(20, 20, 3), random_image(20, 20, 3, seed=1)
  first = stylization.match_statistics(image, style)
  before = stylization._match_statistics._cache_size()
  np.testing.assert_array_equal(
    stylization.match_statistics(image, style), first
  )
  stylization.match_statistics(image, style, strength=0.25)
  assert stylization._match_statistics._cache_size() <= before + 1
  stylization.match_statistics(image, style, strength=0.75)
  assert stylization._match_statistics._cache_size() <= before + 1


def test_gradients_of_adain_equal_differences():
  content, style = random_image(2, 3, 4, 2, top=1), random_image(2, 2, 3, 2)
  f = lambda c, s, a: stylization.adain(c, s, alpha=a)
  at = content, style / 255, np.array([0.3, 0.8], np.float32)
  test_util.check_grads(f, at, 1, ["rev"], atol=2e-2, rtol=2e-2)


def test_gradients_of_match_statistics_equal_differences():
  # Slopes keep the patches' order of light when a little is added.
  y, x, _ = np.mgrid[:8, :8, :1].astype(np.float32)
  image = 0.05 * x + 0.011 * y + random_image(8, 8, 1, top=0.05)
  style = 0.02 * x + 0.07 * y + random_image(8, 8, 1, seed=1, top=0.1)
  f = jax.jit(lambda c, s, a: stylization.match_statistics(c, s, strength=a))
  at = image, style, np.float32(0.6)
  test_util.check_grads(f, at, 1, ["rev"], atol=2e-2, rtol=2e-2, eps=1e-3)


# Refusals.


@pytest.mark.parametrize("value", [-0.1, 1.5, np.array([0.5, np.nan])])
def test_shares_outside_0_to_1_are_refused(value):
  x = random_image(2, 6, 6, 3)
  with pytest.raises(ValueError, match=r"^alpha must be within 0\.\.1, got"):
    stylization.adain(x, x, alpha=value)
  with pytest.raises(ValueError, match=r"^strength must be within 0\.\.1, got"):
    stylization.match_statistics(x, x, strength=value)


def test_other_options_outside_their_range_are_refused():
  x = random_image(6, 6, 3)
  with pytest.raises(ValueError, match="^epsilon must be above 0, got"):
    stylization.adain(x, x, epsilon=0.0)
  with pytest.raises(ValueError, match="^scale must be at least 4, got 3"):
    stylization.match_statistics(x, x, scale=3)
  with pytest.raises(ValueError, match="channels, got 2 and 2"):
    stylization.match_statistics(x[..., :2], x[..., :2])
  with pytest.raises(ValueError, match="^style must be of at least one pixel"):
    stylization.match_statistics(x, x[:0])


def test_wrong_shapes_are_refused_by_name():
  x = random_image(2, 6, 6, 3)
  with pytest.raises(TypeError, match="style"):
    stylization.adain(x, x[..., :2])
  with pytest.raises(TypeError, match="style"):
    stylization.match_statistics(x, random_image(3, 6, 6, 3))
  with pytest.raises(TypeError, match="strength"):
    stylization.match_statistics(x, x, strength=np.ones(3))


def test_gradient_of_coral_is_that_of_differences():
  def loss(source, target):
    return jnp.mean(stylization.coral(source, target) ** 2)

  pair = random_image(4, 5, 3, top=1), random_image(5, 3, 3, seed=1, top=1)
  test_util.check_grads(
    jax.jit(loss), pair, order=1, modes=["rev"], atol=0.02, rtol=0.05, eps=1e-2
  )


def test_coral_of_a_batch_is_that_of_each():
  source, target = random_image(2, 6, 5, 3), random_image(2, 4, 5, 3, seed=1)
  whole = stylization.coral(source, target)
  mapped = jax.vmap(stylization.coral)(source, target)
  np.testing.assert_allclose(mapped, whole, rtol=1e-4, atol=1e-3)
  shared = stylization.coral(source, target[1])
  np.testing.assert_allclose(shared[1], whole[1], rtol=1e-4, atol=1e-3)
  # In any unit.
  small = stylization.coral(source / 255, target / 255)
  np.testing.assert_allclose(255 * small, whole, rtol=1e-3, atol=0.01)


def test_moments_and_coral_refuse():
  image = random_image(4, 4, 3)
  with pytest.raises(ValueError, match="epsilon must be above 0, got 0"):
    stylization.moments(image, epsilon=0)
  with pytest.raises(ValueError, match="features must be of at least one pix"):
    stylization.moments(image[:0])
  with pytest.raises(ValueError, match="target must be of at least one pixel"):
    stylization.coral(image, image[:, :0])
  with pytest.raises(Exception, match="target"):
    stylization.coral(image, image[..., :1])
