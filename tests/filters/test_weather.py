import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from jaxshape.filters import weather

KEY = jax.random.key(0)


def random_image(*shape, seed=0):
  rng = np.random.default_rng(seed)
  return rng.uniform(0, 255, shape).astype(np.float32)


def drops(height, width):
  noise = np.random.default_rng(0).normal(0.65, 0.3, (height, width))
  layer = scipy.ndimage.gaussian_filter(noise, 3, mode="nearest")
  return np.where(layer < 0.68, 0, layer).astype(np.float32)


# Golden.


def diamond_square(noise, size, decay):
  """Point by point; `noise` gives each level's three planes."""
  land, step = {(0, 0): 0.0}, size
  at = lambda i, j: land[i % size, j % size]
  for level in range(size.bit_length() - 1):
    half, n = step // 2, size // step
    planes = noise[level] * decay ** (-2.0 * level)
    cells = [(i, j) for i in range(n) for j in range(n)]
    for i, j in cells:
      around = [
        at((i + a) * step, (j + b) * step) for a in (0, 1) for b in (0, 1)
      ]
      place = i * step + half, j * step + half
      land[place] = np.mean(around) + planes[0][i, j]
    for plane, (down, right) in enumerate([(0, half), (half, 0)], 1):
      for i, j in cells:
        y, x = i * step + down, j * step + right
        around = [at(y - half, x), at(y + half, x)]
        around += [at(y, x - half), at(y, x + half)]
        land[y, x] = np.mean(around) + planes[plane][i, j]
    step = half
  out = np.array([[land[i, j] for j in range(size)] for i in range(size)])
  return (out - out.min()) / (out.max() - out.min())


@pytest.mark.parametrize("decay", [1.4, 3.0])
def test_plasma_equals_diamond_square(decay):
  size = 16
  draw = np.asarray(jax.random.uniform(KEY, (256,), minval=-1, maxval=1))
  noise = [
    draw[4**level : 4 ** (level + 1)].reshape(3, 2**level, 2**level)
    for level in range(4)
  ]
  want = diamond_square(noise, size, decay)
  got = weather.plasma(KEY, size=size, decay=decay)
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_fog_by_hand():
  image = random_image(12, 16, 3)
  (key,) = jax.random.split(KEY, 1)
  land = np.asarray(weather.plasma(key, size=16, decay=1.7))[:12, :, None]
  top = image.max() / 255
  want = np.clip((image / 255 + 2.5 * land) * top / (top + 2.5), 0, 1)
  got = weather.fog(KEY, image, severity=3)
  np.testing.assert_allclose(got, 255 * want, atol=1e-3)


def test_edges_equal_canny():
  layer = (255 * drops(130, 101)).astype(np.uint8)
  want = cv2.Canny(layer, 50, 150) > 0
  got = jax.jit(lambda x: weather._edges(x, 50, 150))(layer.astype("f4"))
  assert want.sum() > 100
  np.testing.assert_array_equal(got, want)


def test_water_equals_opencv():
  layer = drops(130, 101)
  liquid = (255 * layer).astype(np.uint8)
  distance = cv2.distanceTransform(
    255 - cv2.Canny(liquid, 50, 150), cv2.DIST_L2, 5
  )
  distance = cv2.blur(np.minimum(distance, 20), (3, 3)).astype(np.uint8)
  slope = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])
  lit = cv2.filter2D(cv2.equalizeHist(distance), cv2.CV_8U, slope)
  want = liquid * cv2.blur(lit, (3, 3)).astype(np.float32)
  got = jax.jit(weather._drops)(layer, 0.6)
  np.testing.assert_allclose(got, 0.6 * want / want.max(), rtol=1e-4)


def test_mud_covers():
  image = np.full((64, 64, 3), 200, np.float32)
  got = np.asarray(weather.spatter(KEY, image, severity=5))
  mud = (200 - got) / (200 - np.array([63, 42, 20]))
  np.testing.assert_allclose(mud, mud[..., :1] * [1, 1, 1], atol=1e-4)
  assert abs(mud.min()) < 1e-5
  assert mud.max() > 0.99
  assert not ((mud > 0.001) & (mud < 0.799)).any()


def test_snow_is_the_same_upside_down():
  grey = np.full((32, 40, 3), 60, np.float32)
  got = np.asarray(weather.snow(KEY, grey, severity=1))
  np.testing.assert_allclose(got, got[::-1, ::-1], atol=1e-3)
  # By hand, without flakes: .8 x + .2 (1.5 x + .5).
  np.testing.assert_allclose(got.min(), 0.8 * 60 + 0.2 * 217.5, rtol=1e-5)
  assert got.max() > 130


def test_frost_adds_the_published_shares_of_what_photographs_show():
  dark = np.zeros((4, 64, 64, 3), np.float32)
  frosted = np.asarray(weather.frost(KEY, dark, severity=2))
  light = np.asarray(weather.frost(KEY, dark + 50, severity=2))
  np.testing.assert_allclose(light - frosted, 0.8 * 50, atol=1e-3)
  frost = frosted / 0.6
  means = frost.mean((1, 2))
  assert np.all(means[:, 0] < means[:, 2])
  assert 100 < means.mean() < 210
  assert np.all((frost.std((1, 2)) > 8) & (frost.std((1, 2)) < 50))
  assert np.abs(frost[0] - frost[1]).mean() > 2


# Laws.


def test_smoother_plasma_has_smaller_steps():
  rough, smooth = (
    np.abs(np.diff(weather.plasma(KEY, size=64, decay=decay))).mean()
    for decay in (1.2, 3.0)
  )
  assert smooth < rough / 3


def test_without_a_drop_nothing_is_changed():
  dry = np.zeros((12, 12), np.float32)
  np.testing.assert_array_equal(weather._drops(jnp.asarray(dry), 0.6), 0)


# Refusals.


@pytest.mark.parametrize("size", [0, 12])
def test_sides_of_plasma_are_powers_of_two(size):
  with pytest.raises(ValueError, match=f"^size must be a power .*got {size}"):
    weather.plasma(KEY, size=size, decay=2)
