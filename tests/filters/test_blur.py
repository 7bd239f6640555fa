import cv2
import jax
from jax import test_util
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from jaxshape.filters import blur

SCIPY = {
  "reflect": "mirror",
  "symmetric": "reflect",
  "edge": "nearest",
  "constant": "constant",
  "wrap": "wrap",
}


def random_image(*shape, seed=0):
  rng = np.random.default_rng(seed)
  return rng.uniform(0, 255, shape).astype(np.float32)


# Golden: SciPy and OpenCV, side by side. A sigma of 8 goes through matrices.


@pytest.mark.parametrize("sigma", [0.5, 2, 8.0])
@pytest.mark.parametrize("border", SCIPY)
def test_gaussian_equals_scipy(border, sigma):
  image = random_image(40, 47, 3)
  got = blur.gaussian(image, sigma=sigma, border=border)
  want = ndimage.gaussian_filter(image, (sigma, sigma, 0), mode=SCIPY[border])
  np.testing.assert_allclose(got, want, atol=1e-3)


@pytest.mark.parametrize(("sigma", "radius"), [(1.0, 2), (3.0, 12), (9.0, 30)])
def test_gaussian_equals_opencv_on_a_large_image_under_jit(sigma, radius):
  image = random_image(130, 150, 3)
  f = jax.jit(lambda x: blur.gaussian(x, sigma=sigma, radius=radius))
  size = 2 * radius + 1
  want = cv2.GaussianBlur(image, (size, size), sigma)
  np.testing.assert_allclose(f(image), want, atol=1e-3)


@pytest.mark.parametrize("shape", [(1, 9, 3), (9, 1, 1), (2, 3, 2)])
def test_gaussian_equals_scipy_where_the_window_is_larger(shape):
  image = random_image(*shape)
  got = blur.gaussian(image, sigma=3, border="symmetric")
  want = ndimage.gaussian_filter(image, (3, 3, 0), mode="reflect")
  np.testing.assert_allclose(got, want, atol=1e-3)


@pytest.mark.parametrize("size", [1, 9, 61])
@pytest.mark.parametrize("border", SCIPY)
def test_box_equals_scipy(border, size):
  image = random_image(40, 47, 3)
  got = blur.box(image, size=size, border=border)
  mode = SCIPY[border]
  want = ndimage.uniform_filter(
    image.astype(np.float64), (size, size, 1), mode=mode
  )
  np.testing.assert_allclose(got, want, atol=1e-3)


@pytest.mark.parametrize("size", [3, 9])
def test_box_equals_opencv_on_a_large_image_under_jit(size):
  image = random_image(130, 150, 3).astype(np.uint8)
  got = jax.jit(lambda x: blur.box(x, size=size))(image)
  want = cv2.blur(image.astype(np.float32), (size, size))
  np.testing.assert_allclose(got, want, atol=1e-3)
  np.testing.assert_array_equal(np.rint(got), cv2.blur(image, (size, size)))


# Laws.


def wrong_rows(result):
  return np.flatnonzero(~np.isfinite(result).all((1, 2)))


@pytest.mark.parametrize("sigma", [1.0, 9.0])
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_wrong_numbers_reach_as_far_as_the_window(wrong, sigma):
  image = random_image(90, 33, 2)
  clean = blur.gaussian(image.copy(), sigma=sigma)
  image[45, 16, 0] = wrong
  got = np.array(blur.gaussian(image, sigma=sigma))
  reach = round(4 * sigma)
  rows = np.arange(45 - reach, 46 + reach)
  np.testing.assert_array_equal(wrong_rows(got), rows)
  np.testing.assert_array_equal(got[45, 16, 0], wrong)
  got[rows], clean = 0, np.array(clean)
  clean[rows] = 0
  np.testing.assert_allclose(got, clean, atol=1e-4)


def test_wrong_numbers_keep_to_each_images_own_window():
  images = np.ones((2, 40, 9, 1), np.float32)
  images[:, 20, 4] = np.inf
  got = blur.gaussian(images, sigma=np.array([1.0, 3.0]))
  np.testing.assert_array_equal(wrong_rows(got[0]), np.arange(16, 25))
  np.testing.assert_array_equal(wrong_rows(got[1]), np.arange(8, 33))
  for function in (jax.vmap, lambda f: jax.jit(jax.vmap(f))):
    f = function(lambda x: blur.gaussian(x, sigma=8.0))
    rows = wrong_rows(f(images)[0])
    np.testing.assert_array_equal(rows, np.arange(40))


def test_opposite_infinities_average_to_nan():
  image = np.ones((9, 9, 1), np.float32)
  image[3, 4], image[5, 4] = np.inf, -np.inf
  got = blur.box(image, size=3)[..., 0]
  assert np.isnan(got[4, 4])
  assert (got[2, 3:6] == np.inf).all()
  assert (got[6, 3:6] == -np.inf).all()


@pytest.mark.parametrize("sigma", [1.0, 9.0])
def test_constant_image_keeps_its_corners(sigma):
  image = np.full((12, 14, 3), 200, np.uint8)
  got = blur.gaussian(image, sigma=sigma)
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, image, rtol=1e-6)


def test_blurs_add_up_as_squares():
  image = random_image(30, 30, 1)
  once = blur.gaussian(image, sigma=5, border="wrap")
  twice = blur.gaussian(image, sigma=3, border="wrap")
  twice = blur.gaussian(twice, sigma=4, border="wrap")
  np.testing.assert_allclose(twice, once, atol=0.05)


@pytest.mark.parametrize("scale", [1.0, 12.0])
def test_sigma_per_image_is_that_of_single_calls(scale):
  images = random_image(3, 20, 23, 3)
  sigma = scale * np.array([0.5, 0.0, 1.1], np.float32)
  got = blur.gaussian(images, sigma=sigma)
  for i in (0, 2):
    want = blur.gaussian(images[i], sigma=float(sigma[i]))
    np.testing.assert_allclose(got[i], want, atol=1e-3)
  np.testing.assert_allclose(got[1], images[1], atol=1e-4)


# Transforms.


def test_vmap_over_traced_sigmas_agrees_with_the_batch():
  images = random_image(3, 9, 10, 3)
  sigma = np.array([0.3, 1.0, 2.0], np.float32)
  f = lambda x, s: blur.gaussian(x, sigma=s, radius=6)
  want = f(images, sigma)
  for g in (jax.jit(f), jax.vmap(f), jax.jit(jax.vmap(f))):
    np.testing.assert_allclose(g(images, sigma), want, atol=1e-3)


@pytest.mark.parametrize("radius", [3, 25])
def test_gradients_by_image_and_sigma(radius):
  image = random_image(6, 5, 2) / 255
  f = lambda x, s: blur.gaussian(x, sigma=s, radius=radius)
  test_util.check_grads(f, (image, 1.5), 1, atol=2e-2, rtol=2e-2)


def test_other_sigmas_of_a_radius_do_not_compile_anew():
  image = random_image(6, 7, 3)
  blur.gaussian(image, sigma=1.0, radius=4)
  before = blur._gaussian._cache_size()
  blur.gaussian(image, sigma=1.7, radius=4)
  assert blur._gaussian._cache_size() == before


# Refusals.


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("sigma", 0),
    ("sigma", -1.0),
    ("sigma", np.array([1.0, -1.0])),
    ("sigma", np.inf),
    ("radius", -1),
    ("truncate", 0.0),
    ("border", "mean"),
  ],
)
def test_options_outside_their_range_are_refused(name, value):
  options = {"sigma": 1.0, name: value}
  with pytest.raises(ValueError, match=f"^{name} must be .*got"):
    blur.gaussian(random_image(2, 4, 4, 3), **options)


def test_traced_sigma_needs_a_radius():
  f = jax.jit(lambda x, s: blur.gaussian(x, sigma=s))
  with pytest.raises(ValueError, match="^radius must be given"):
    f(random_image(4, 4, 3), 1.0)


def test_other_libraries_words_are_translated():
  with pytest.raises(ValueError, match="'edge' is meant"):
    blur.gaussian(random_image(4, 4, 3), sigma=1, border="nearest")


@pytest.mark.parametrize("size", [0, -3, 4])
def test_box_without_a_middle_is_refused(size):
  with pytest.raises(ValueError, match="^size must be odd"):
    blur.box(random_image(4, 4, 3), size=size)
