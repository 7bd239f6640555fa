import colorsys

import cv2
import jax
import numpy as np
from PIL import Image
import pytest

from jaxshape.filters import corruption, jpeg

KEY = jax.random.key(0)


def random_image(*shape, seed=0):
  rng = np.random.default_rng(seed)
  return rng.uniform(0, 255, shape).astype(np.float32)


def smooth_image(size=20):
  y, x = np.mgrid[:size, :size] / size
  z = 0.5 + 0.3 * np.sin(7 * x * y)
  return (255 * np.stack([x, z, 0.2 + 0.6 * y], -1)).astype(np.float32)


def in_hsv(image, change):
  flat = image.reshape(-1, 3) / 255
  out = [colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*p))) for p in flat]
  return 255 * np.reshape(out, image.shape)


def distance(name, severity, image):
  changed = corruption.corrupt(KEY, image, name=name, severity=severity)
  return float(np.abs(changed - image).mean())


# Golden.


@pytest.mark.parametrize(
  ("severity", "c"), [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4), (5, 0.5)]
)
def test_brightness_equals_colorsys(severity, c):
  image = random_image(6, 7, 3)
  image[0, 0] = 0
  got = corruption.brightness(image, severity=severity)
  want = in_hsv(image, lambda h, s, v: (h, s, min(v + c, 1)))
  np.testing.assert_allclose(got, want, atol=1e-3)


@pytest.mark.parametrize(
  ("severity", "a", "b"),
  [(1, 0.3, 0), (2, 0.1, 0), (3, 2, 0), (4, 5, 0.1), (5, 20, 0.2)],
)
def test_saturate_equals_colorsys(severity, a, b):
  image = random_image(6, 7, 3)
  image[0, 0], image[0, 1] = 0, 77  # Black, grey.
  got = corruption.saturate(image, severity=severity)
  want = in_hsv(image, lambda h, s, v: (h, min(a * s + b, 1), v))
  np.testing.assert_allclose(got, want, atol=1e-3)


def test_contrast_by_hand():
  image = np.zeros((1, 2, 3), np.float32)
  image[0, 1] = 200  # Mean 100, c = 0.05.
  got = corruption.contrast(image, severity=5)
  np.testing.assert_allclose(got[0, :, 0], [95, 105], rtol=1e-5)


@pytest.mark.parametrize(("severity", "share"), [(1, 0.6), (3, 0.4), (5, 0.25)])
@pytest.mark.parametrize("size", [32, 130])
def test_pixelate_equals_pil(severity, share, size):
  image = random_image(size, size, 3).astype(np.uint8)
  small = int(size * share)
  picture = Image.fromarray(image).resize((small, small), Image.Resampling.BOX)
  want = picture.resize((size, size), Image.Resampling.BOX)
  got = jax.jit(lambda x: corruption.pixelate(x, severity=severity))(image)
  # PIL rounds after each axis.
  np.testing.assert_allclose(got, np.asarray(want), atol=1.01)


@pytest.mark.parametrize(
  ("severity", "radius", "softness", "rim"), [(1, 3, 0.1, 3), (5, 10, 0.5, 5)]
)
def test_defocus_blur_equals_opencv(severity, radius, softness, rim):
  image = random_image(130, 131, 3)
  reach = max(8, radius)
  y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
  disk = (x**2 + y**2 <= radius**2).astype(np.float32)
  disk = cv2.GaussianBlur(disk / disk.sum(), (rim, rim), sigmaX=softness)
  want = cv2.filter2D(image, -1, disk)
  got = jax.jit(lambda x: corruption.defocus_blur(x, severity=severity))(image)
  np.testing.assert_allclose(got, want, atol=2e-3)


@pytest.mark.parametrize(
  ("name", "severity", "want"),
  [
    ("gaussian_noise", 2, 255 * 0.12),
    ("speckle_noise", 1, 127.5 * 0.15),
    ("shot_noise", 1, 255 * np.sqrt(0.5 / 60)),
  ],
)
def test_noise_has_the_published_spread(name, severity, want):
  grey = np.full((64, 64, 3), 127.5, np.float32)
  got = corruption.corrupt(KEY, grey, name=name, severity=severity)
  np.testing.assert_allclose(got.mean(), 127.5, atol=1)
  np.testing.assert_allclose(got.std(), want, rtol=0.03)


def test_impulse_noise_has_the_published_share():
  grey = np.full((64, 64, 3), 127.5, np.float32)
  got = corruption.impulse_noise(KEY, grey, severity=5)
  np.testing.assert_allclose((got == 0).mean(), 0.135, atol=0.01)
  np.testing.assert_allclose((got == 255).mean(), 0.135, atol=0.01)


# Laws.


# These change in kind on the way, as published.
UNEVEN = {
  "saturate", "elastic_transform", "fog", "spatter", "frost", "glass_blur",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(set(corruption.NAMES) - UNEVEN))
def test_more_severe_is_further_away(name):
  image = smooth_image()
  far = [distance(name, severity, image) for severity in (1, 3, 5)]
  assert np.all(np.diff(far) > 0), far


@pytest.mark.parametrize("name", ["fog", "frost", "spatter"])
def test_less_of_the_image_is_left(name):
  image = 0.6 * smooth_image() + 0.4 * random_image(20, 20, 3)

  def left(severity):
    changed = corruption.corrupt(KEY, image, name=name, severity=severity)
    return np.corrcoef(np.ravel(changed), np.ravel(image))[0, 1]

  assert left(5) < left(1) - 0.01


@pytest.mark.parametrize("name", corruption.NAMES)
def test_values_stay_in_range_and_keys_decide(name):
  image = random_image(20, 20, 3).round()
  f = lambda key, image: corruption.corrupt(key, image, name=name, severity=5)
  got = f(KEY, image)
  assert got.dtype == np.float32
  assert got.shape == image.shape
  assert got.min() >= 0
  assert got.max() <= 255
  assert np.abs(got - image).max() > 1
  np.testing.assert_array_equal(got, f(KEY, image))
  np.testing.assert_allclose(got, f(KEY, image.astype(np.uint8)), atol=1e-3)
  other = np.array_equal(got, f(jax.random.key(1), image))
  assert other == (name in corruption._FIXED)


def test_names_are_those_of_the_benchmark():
  assert len(corruption.IMAGENET_C) == 15
  assert len(corruption.EXTRA) == 4
  assert set(corruption.NAMES) == {*corruption._DRAWN, *corruption._FIXED}
  assert len(set(corruption.NAMES)) == 19


@pytest.mark.parametrize("name", corruption.NAMES)
def test_batches_of_nothing_stay_so(name):
  empty = np.zeros((0, 8, 8, 3), np.uint8)
  got = corruption.corrupt(KEY, empty, name=name, severity=1)
  assert got.shape == empty.shape


@pytest.mark.parametrize(("severity", "quality"), [(1, 25), (5, 7)])
def test_jpeg_compression_has_the_published_quality(severity, quality):
  image = smooth_image(40).astype(np.uint8)
  got = corruption.jpeg_compression(image, severity=severity)
  want = jpeg.compress(image, quality=quality)
  np.testing.assert_array_equal(got, want)


def test_images_of_a_batch_draw_their_own_noise():
  same = np.full((2, 8, 8, 3), 127.5, np.float32)
  got = corruption.gaussian_noise(KEY, same, severity=1)
  assert np.abs(got[0] - got[1]).min() < np.abs(got[0] - got[1]).max()


# Transforms.


@pytest.mark.parametrize("name", corruption.NAMES)
def test_vmap_and_jit_agree_with_single_calls(name):
  images = random_image(2, 16, 16, 3)
  keys = jax.random.split(KEY, 2)
  f = lambda k, x: corruption.corrupt(k, x, name=name, severity=5)
  want = np.stack([f(k, x) for k, x in zip(keys, images, strict=True)])
  got = jax.jit(jax.vmap(f))(keys, images)
  # A rounded number may fall to the other side.
  tolerance = 1.01 if name == "jpeg_compression" else 1e-2
  np.testing.assert_allclose(got, want, atol=tolerance)


# Refusals.


@pytest.mark.parametrize("severity", [0, 6])
def test_unknown_severities_are_refused(severity):
  with pytest.raises(ValueError, match="^severity must be 1, .*got"):
    corruption.contrast(random_image(4, 4, 3), severity=severity)


def test_unknown_names_are_refused():
  with pytest.raises(ValueError, match="^name must be one of .*got 'fogg'"):
    corruption.corrupt(KEY, random_image(4, 4, 3), name="fogg", severity=1)


def test_grey_images_are_refused():
  with pytest.raises(TypeError, match="image"):
    corruption.contrast(random_image(4, 4, 1), severity=1)
