import cv2
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from jaxshape.filters import threshold, windows

METHODS = {
  "mean": cv2.ADAPTIVE_THRESH_MEAN_C,
  "gaussian": cv2.ADAPTIVE_THRESH_GAUSSIAN_C,
}


def random_image(*shape, seed=0):
  rng = np.random.default_rng(seed)
  return rng.uniform(0, 255, shape).astype(np.float32)


def smooth_image(*shape):
  return cv2.blur(random_image(*shape), (3, 3)).reshape(shape).astype(np.uint8)


def local_mean(image, size, border):
  """The mean of each window of one channel, in float64."""
  wide = np.append(image.astype(np.float64), 0)  # Place -1 holds a zero.
  r, (height, width) = size // 2, image.shape
  rows = windows.places(height, r, r, border)[:, None]
  columns = windows.places(width, r, r, border)
  outside = (rows < 0) | (columns < 0)
  wide = wide[np.where(outside, -1, rows * width + columns)]
  return np.lib.stride_tricks.sliding_window_view(wide, (size, size)).mean(
    (-2, -1)
  )


# Golden: OpenCV, side by side, and the definition.


@pytest.mark.parametrize("size", [3, 5, 7, 9, 11, 23])
@pytest.mark.parametrize("method", METHODS)
def test_adaptive_of_uint8_is_exactly_that_of_opencv(method, size):
  image = np.stack(
    [
      smooth_image(131, 140),
      random_image(131, 140).astype(np.uint8),
      np.uint8(255 * (random_image(131, 140) > 128)),
    ],
    axis=-1,
  )
  for offset, invert in ((9.0, False), (-1.5, False), (2.5, True)):
    got = threshold.adaptive(
      image, block_size=size, offset=offset, method=method, invert=invert
    )
    want = [
      cv2.adaptiveThreshold(
        np.ascontiguousarray(image[..., c]), 255, METHODS[method],
        int(invert), size, offset,
      )
      for c in range(3)
    ]  # fmt: skip
    np.testing.assert_array_equal(got, np.stack(want, -1))


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 12, 1), (5, 2, 1)])
def test_adaptive_is_that_of_opencv_on_thin_images(shape):
  image = random_image(*shape).astype(np.uint8)
  for method, code in METHODS.items():
    got = threshold.adaptive(image, block_size=7, offset=0, method=method)
    want = cv2.adaptiveThreshold(image, 255, code, 0, 7, 0)
    np.testing.assert_array_equal(got[..., 0], want.reshape(shape[:2]))


@pytest.mark.parametrize("border", windows.BORDERS)
def test_mean_of_floats_is_that_of_the_window(border):
  image = random_image(12, 15, 1)
  got = threshold.adaptive(image, block_size=7, offset=5, border=border)
  margin = image[..., 0] - local_mean(image[..., 0], 7, border) + 5
  assert np.abs(margin).min() > 1e-3  # No pixel hangs on rounding.
  np.testing.assert_array_equal(got[..., 0], np.where(margin > 0, 255, 0))


def test_gaussian_mean_of_floats_is_that_of_opencv():
  image = random_image(40, 41, 1)
  for size in (7, 13):
    got = threshold.adaptive(
      image, block_size=size, offset=5, method="gaussian", max_value=2
    )
    mean = cv2.GaussianBlur(
      image, (size, size), 0, borderType=cv2.BORDER_REPLICATE
    )
    margin = image[..., 0] - mean + 5
    sure = np.abs(margin) > 1e-3
    assert sure.mean() > 0.99
    want = np.where(margin > 0, 2, 0)
    np.testing.assert_array_equal(got[..., 0][sure], want[sure])


# Laws.


def test_lines_are_found_in_any_light():
  light = np.linspace(60, 200, 40, dtype=np.float32)[:, None]
  image = light * np.ones((40, 30), np.float32)
  image[:, 14:16] -= 30
  got = threshold.adaptive(image[..., None])[..., 0]
  np.testing.assert_array_equal(got[:, 14:16], 0)
  np.testing.assert_array_equal(np.delete(got, [14, 15], axis=1), 255)


def test_inverted_is_the_complement():
  image = random_image(2, 9, 11, 3)
  bright = threshold.adaptive(image, offset=3.5)
  dark = threshold.adaptive(image, offset=3.5, invert=True)
  np.testing.assert_array_equal(bright + dark, 255)
  assert 0 < bright.mean() < 255


def test_options_per_image_are_those_of_single_calls():
  images = random_image(2, 2, 9, 11, 3)
  offset, high = np.array([[0, 30], [-20, 60]]), np.array([1.0, 255.0])
  got = threshold.adaptive(images, offset=offset, max_value=high)
  for i, j in np.ndindex(2, 2):
    want = threshold.adaptive(
      images[i, j], offset=int(offset[i, j]), max_value=float(high[j])
    )
    np.testing.assert_array_equal(got[i, j], want)


def test_types_and_pictures():
  image = smooth_image(12, 13, 3)
  want = threshold.adaptive(image)
  assert want.dtype == jnp.float32
  np.testing.assert_array_equal(
    threshold.adaptive(Image.fromarray(image)), want
  )
  for dtype in (jnp.bfloat16, jnp.float16):
    short = jnp.asarray(random_image(12, 13, 3), dtype)
    got = threshold.adaptive(short)
    assert got.dtype == dtype
    want = threshold.adaptive(short.astype(jnp.float32))
    np.testing.assert_array_equal(got.astype(jnp.float32), want)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_wrong_numbers_stay_within_the_window(wrong, method):
  image = random_image(12, 13, 1)
  want = np.array(threshold.adaptive(image, block_size=5, method=method))
  image[5, 6] = wrong
  want[3:8, 4:9] = np.nan
  got = threshold.adaptive(image, block_size=5, method=method)
  np.testing.assert_array_equal(got, want)


def test_empty_batch():
  got = threshold.adaptive(np.zeros((0, 4, 5, 3), np.uint8))
  assert got.shape == (0, 4, 5, 3)


# Transforms.


def test_vmap_and_jit_agree_with_the_batch():
  images, offset = random_image(3, 9, 11, 2), np.array([-9.0, 0, 25])
  f = lambda x, c: threshold.adaptive(x, offset=c)
  want = f(images, offset)
  for g in (jax.jit(f), jax.vmap(f), jax.jit(jax.vmap(f))):
    np.testing.assert_array_equal(g(images, offset), want)


def test_values_of_options_do_not_compile_anew():
  image = random_image(6, 7, 3)
  threshold.adaptive(image)
  before = threshold._adaptive._cache_size()
  threshold.adaptive(image, offset=3, max_value=1)
  threshold.adaptive(image, offset=2.5)
  assert threshold._adaptive._cache_size() <= before + 1  # Of an int.


def test_gradients_of_image_and_offset_are_zero():
  image = random_image(6, 7, 3)
  f = lambda x, c, v: threshold.adaptive(x, offset=c, max_value=v).sum()
  by_image, by_offset, by_value = jax.grad(f, (0, 1, 2))(image, 2.0, 1.0)
  np.testing.assert_array_equal(by_image, np.zeros_like(image))
  assert by_offset == 0
  assert by_value == f(image, 2.0, 1.0)


# Refusals.


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("block_size", 1),
    ("block_size", 8),
    ("offset", np.nan),
    ("max_value", np.inf),
    ("method", "median"),
    ("border", "replicate"),
  ],
)
def test_options_outside_their_range_are_refused(name, value):
  with pytest.raises(ValueError, match=f"^{name} must be .*got"):
    threshold.adaptive(random_image(4, 4, 3), **{name: value})


def test_wrong_shapes_are_refused_by_name():
  with pytest.raises(TypeError, match="image"):
    threshold.adaptive(random_image(4, 4))
  with pytest.raises(TypeError, match="offset"):
    threshold.adaptive(random_image(3, 4, 4, 3), offset=np.arange(2))
