import cv2
import jax
from jax import test_util
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from jaxshape.filters import color


def random_image(*shape, seed=0):
  rng = np.random.default_rng(seed)
  return rng.uniform(0, 255, shape).astype(np.float32)


# Golden: OpenCV, side by side.


def test_rgb_to_gray_of_uint8_is_exactly_that_of_opencv():
  levels = np.array([*range(0, 256, 4), 253, 255], np.uint8)
  image = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(66, -1, 3)
  got = jax.jit(color.rgb_to_gray)(image)
  assert got.dtype == jnp.uint8
  want = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
  np.testing.assert_array_equal(got[..., 0], want)


def test_rgb_to_gray_of_floats_equals_opencv():
  image = random_image(130, 140, 3)
  got = jax.jit(color.rgb_to_gray)(image)
  want = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
  np.testing.assert_allclose(got[..., 0], want, atol=1e-4)


def test_gray_to_rgb_equals_opencv():
  image = random_image(7, 9, 1)
  want = cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)
  np.testing.assert_array_equal(color.gray_to_rgb(image), want)
  whole = image.astype(np.uint8)
  got = color.gray_to_rgb(whole)
  assert got.dtype == jnp.uint8
  np.testing.assert_array_equal(got, cv2.cvtColor(whole, cv2.COLOR_GRAY2RGB))


# Laws.


def test_gray_of_gray_is_itself():
  whole = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
  rgb = np.repeat(whole, 3, -1)
  np.testing.assert_array_equal(color.rgb_to_gray(rgb), whole)
  image = random_image(2, 7, 9, 1)
  got = color.rgb_to_gray(color.gray_to_rgb(image))
  np.testing.assert_allclose(got, image, rtol=1e-6)


def test_types_and_pictures():
  image = random_image(7, 9, 3)
  for dtype in (jnp.bfloat16, jnp.float16):
    short = jnp.asarray(image, dtype)
    got = color.rgb_to_gray(short)
    assert got.dtype == dtype
    want = color.rgb_to_gray(short.astype(jnp.float32)).astype(dtype)
    np.testing.assert_array_equal(got, want)
    assert color.gray_to_rgb(got).dtype == dtype
  whole = image.astype(np.uint8)
  np.testing.assert_array_equal(
    color.rgb_to_gray(Image.fromarray(whole)), color.rgb_to_gray(whole)
  )
  long = color.rgb_to_gray(100 * whole.astype(np.uint16))
  want = 100 * whole.astype(np.float32) @ [0.299, 0.587, 0.114]
  np.testing.assert_allclose(long[..., 0], want, rtol=1e-6)


def test_a_wrong_number_stays_where_it_stands():
  image = random_image(5, 6, 3)
  image[2, 3, 1] = np.nan
  want = np.zeros((5, 6), bool)
  want[2, 3] = True
  got = np.isnan(color.rgb_to_gray(image))[..., 0]
  np.testing.assert_array_equal(got, want)


def test_empty_batch():
  image = np.zeros((0, 4, 5, 3), np.uint8)
  assert color.rgb_to_gray(image).shape == (0, 4, 5, 1)
  assert color.gray_to_rgb(image[..., :1]).shape == (0, 4, 5, 3)


# Transforms.


def test_vmap_and_gradients():
  image = random_image(2, 3, 4, 3)
  want = color.rgb_to_gray(image)
  np.testing.assert_allclose(
    jax.vmap(color.rgb_to_gray)(image), want, rtol=1e-6
  )
  test_util.check_grads(color.rgb_to_gray, (image / 255,), 1, ["rev"])
  test_util.check_grads(color.gray_to_rgb, (want / 255,), 1, ["rev"])


# Refusals.


def test_other_numbers_of_channels_are_refused():
  with pytest.raises(TypeError, match="image"):
    color.rgb_to_gray(random_image(4, 4, 1))
  with pytest.raises(TypeError, match="image"):
    color.gray_to_rgb(random_image(4, 4, 3))
