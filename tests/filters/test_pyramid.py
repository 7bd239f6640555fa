import cv2
import jax
from jax import test_util
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from jaxshape.filters import pyramid, windows

WEIGHTS = np.array([1, 4, 6, 4, 1]) / 16
SHAPES = [(1, 1, 1), (1, 6, 3), (7, 1, 3), (2, 2, 1), (5, 6, 3), (130, 137, 3)]


def random_image(*shape, seed=0):
  rng = np.random.default_rng(seed)
  return rng.uniform(0, 255, shape).astype(np.float32)


def down_by_definition(x, border):
  """The sum over the window at every pixel, of which each other one is kept."""
  for axis in (0, 1):
    x = np.moveaxis(x, axis, 0).astype(np.float64)
    wide = np.concatenate([x, np.zeros_like(x[:1])])  # Place -1 holds a zero.
    wide = wide[windows.places(len(x), 2, 2, border)]
    x = np.stack(
      [np.tensordot(WEIGHTS, wide[i : i + 5], 1) for i in range(0, len(x), 2)]
    )
    x = np.moveaxis(x, 0, axis)
  return x


def up_by_definition(x, border):
  """Zeros between the pixels, then a blur of twice the weights."""
  for axis in (0, 1):
    x = np.moveaxis(x, axis, 0).astype(np.float64)
    wide = np.concatenate([x, np.zeros_like(x[:1])])
    wide = wide[windows.places(len(x), 1, 1, border)]
    z = np.zeros((2 * len(wide), *x.shape[1:]))
    z[::2] = wide
    z = np.concatenate([z, np.zeros_like(x[:1])])
    x = np.stack(
      [2 * np.tensordot(WEIGHTS, z[j : j + 5], 1) for j in range(2 * len(x))]
    )
    x = np.moveaxis(x, 0, axis)
  return x


# Golden: OpenCV, side by side, and the definition.


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_pyramid_equals_opencv(shape, dtype):
  image = random_image(*shape).astype(dtype)
  tolerance = 0 if dtype == np.uint8 else 1e-3
  for ours, theirs in ((pyramid.down, cv2.pyrDown), (pyramid.up, cv2.pyrUp)):
    got = jax.jit(ours)(image)
    assert got.dtype == jnp.float32
    want = theirs(image).reshape(got.shape)
    np.testing.assert_allclose(got, want, atol=tolerance, rtol=0)


@pytest.mark.parametrize("size", [(9, 11), (10, 11), (9, 12), (10, 12)])
def test_up_to_a_size_equals_opencv(size):
  image = random_image(5, 6, 3).astype(np.uint8)
  want = cv2.pyrUp(image, dstsize=size[::-1])
  np.testing.assert_array_equal(pyramid.up(image, size=size), want)


@pytest.mark.parametrize("border", windows.BORDERS)
@pytest.mark.parametrize("shape", [(1, 2, 1), (5, 6, 2)])
def test_pyramid_equals_the_definition_at_borders(shape, border):
  image = random_image(*shape)
  got = pyramid.down(image, border=border)
  np.testing.assert_allclose(got, down_by_definition(image, border), rtol=1e-5)
  if border != "reflect":  # As OpenCV has it.
    got = pyramid.up(image, border=border)
    np.testing.assert_allclose(got, up_by_definition(image, border), rtol=1e-5)


# Laws.


@pytest.mark.parametrize("border", ["reflect", "symmetric", "edge", "wrap"])
def test_constant_image_stays_constant(border):
  image = np.full((5, 6, 3), 123.5, np.float32)
  got = pyramid.down(image, border=border)
  np.testing.assert_array_equal(got, image[::2, ::2])
  got = pyramid.up(got, size=(5, 6), border=border)
  np.testing.assert_array_equal(got, image)


def test_a_smooth_image_comes_back():
  y, x = np.mgrid[:40, :41].astype(np.float32)
  image = (100 * np.sin(y / 20) * np.cos(x / 15))[..., None]
  got = pyramid.up(pyramid.down(image), size=(40, 41))
  np.testing.assert_allclose(got[3:-3, 3:-3], image[3:-3, 3:-3], atol=2)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_short_floats_are_only_rounded_once(dtype):
  image = jnp.asarray(random_image(5, 6, 3), dtype)
  for f in (pyramid.down, pyramid.up):
    want = f(image.astype(jnp.float32)).astype(dtype)
    got = f(image)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, want)


def test_pictures_are_taken_as_uint8():
  image = random_image(5, 6, 3).astype(np.uint8)
  for f in (pyramid.down, pyramid.up):
    np.testing.assert_array_equal(f(Image.fromarray(image)), f(image))


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_wrong_numbers_stay_within_the_window(wrong):
  image = random_image(9, 11, 1)
  image[4, 6] = wrong
  finite = np.where(np.isfinite(image), image, 7).astype(np.float32)
  for f, rows, columns in (
    (pyramid.down, slice(1, 4), slice(2, 5)),
    (pyramid.up, slice(6, 11), slice(10, 15)),
  ):
    got, want = np.asarray(f(image)), np.array(f(finite))
    want[rows, columns] = wrong
    np.testing.assert_array_equal(got, want)


def test_empty_batch():
  image = np.zeros((0, 5, 6, 3), np.uint8)
  assert pyramid.down(image).shape == (0, 3, 3, 3)
  assert pyramid.up(image, size=(9, 12)).shape == (0, 9, 12, 3)


# Transforms.


@pytest.mark.parametrize("f", [pyramid.down, pyramid.up])
def test_vmap_agrees_with_the_batch_and_gradients_with_differences(f):
  images = random_image(2, 2, 5, 4, 2)
  want = f(images)
  np.testing.assert_allclose(want[1, 0], f(images[1, 0]), rtol=1e-5)
  got = jax.jit(jax.vmap(jax.vmap(f)))(images)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  test_util.check_grads(f, (images[0] / 255,), 1, ["rev"], atol=1e-2, rtol=1e-2)


# Refusals.


def test_options_outside_their_range_are_refused():
  image = random_image(5, 6, 3)
  for f in (pyramid.down, pyramid.up):
    with pytest.raises(ValueError, match="border must be .*got 'mirror'"):
      f(image, border="mirror")
    with pytest.raises(TypeError, match="image"):
      f(image[0])
  for size in ((10, 13), (8, 12)):
    with pytest.raises(ValueError, match="size must be .*got"):
      pyramid.up(image, size=size)
