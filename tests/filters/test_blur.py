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
  "wrap": "wrap",
}


def random_image(*shape, seed=0):
  rng = np.random.default_rng(seed)
  return rng.uniform(0, 255, shape).astype(np.float32)


# Golden: SciPy and OpenCV, side by side. A sigma of 8 goes through matrices.


@pytest.mark.parametrize("sigma", [0.5, 2, 8.0])
@pytest.mark.parametrize("mode", SCIPY)
def test_gaussian_equals_scipy(mode, sigma):
  image = random_image(40, 47, 3)
  got = blur.gaussian(image, sigma=sigma, mode=mode)
  want = ndimage.gaussian_filter(image, (sigma, sigma, 0), mode=SCIPY[mode])
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
  got = blur.gaussian(image, sigma=3, mode="symmetric")
  want = ndimage.gaussian_filter(image, (3, 3, 0), mode="reflect")
  np.testing.assert_allclose(got, want, atol=1e-3)


# Laws.


@pytest.mark.parametrize("sigma", [1.0, 9.0])
def test_constant_image_keeps_its_corners(sigma):
  image = np.full((12, 14, 3), 200, np.uint8)
  got = blur.gaussian(image, sigma=sigma)
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, image, rtol=1e-6)


def test_blurs_add_up_as_squares():
  image = random_image(30, 30, 1)
  twice = blur.gaussian(blur.gaussian(image, sigma=3, mode="wrap"), sigma=4,
                        mode="wrap")  # fmt: skip
  once = blur.gaussian(image, sigma=5, mode="wrap")
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
    ("mode", "constant"),
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
  with pytest.raises(ValueError, match="'replicate' are 'edge'"):
    blur.gaussian(random_image(4, 4, 3), sigma=1, mode="nearest")
