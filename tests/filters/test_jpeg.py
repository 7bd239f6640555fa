import io

import jax
import numpy as np
from PIL import Image
import pytest

from jaxshape import images
from jaxshape.filters import jpeg


def photograph(height, width):
  return images.example()[40 : 40 + height, 60 : 60 + width]


def pillow(image, quality):
  file = io.BytesIO()
  Image.fromarray(image).save(file, "JPEG", quality=quality)
  return np.asarray(Image.open(file)).astype(np.float32)


@pytest.mark.parametrize("quality", [1, 7, 10, 25, 49, 50, 75, 95, 100])
def test_compress_equals_pillow(quality):
  image = photograph(101, 77)
  difference = np.abs(
    pillow(image, quality) - jpeg.compress(image, quality=quality)
  )
  assert difference.mean() < 0.4
  assert (difference > 4).mean() < 0.01


@pytest.mark.parametrize(
  ("height", "width"), [(1, 1), (3, 4), (17, 5), (9, 16)]
)
def test_compress_of_small_images_equals_pillow(height, width):
  image = photograph(height, width)
  got = jpeg.compress(image, quality=10)
  np.testing.assert_allclose(got, pillow(image, 10), atol=1.01)


def test_uniform_grey_of_a_step_stays():
  # At 50, the lightness 0 has steps of 16 / 8: even greys are kept.
  grey = np.full((16, 16, 3), 130, np.uint8)
  np.testing.assert_array_equal(jpeg.compress(grey, quality=50), grey)


def test_batches_and_floats_give_the_same():
  image = np.stack([photograph(24, 16), photograph(24, 16)[::-1]])
  want = np.stack([jpeg.compress(x, quality=20) for x in image])
  got = jax.jit(jax.vmap(lambda x: jpeg.compress(x, quality=20)))(image)
  np.testing.assert_allclose(got, want, atol=1.01)
  floats = image[None].astype(np.float32) + 0.2
  got = jpeg.compress(floats, quality=20)[0]
  np.testing.assert_allclose(got, want, atol=1.01)


def test_nothing_stays_nothing():
  empty = np.zeros((0, 8, 8, 3), np.uint8)
  assert jpeg.compress(empty, quality=5).shape == empty.shape


@pytest.mark.parametrize("quality", [0, 101])
def test_other_qualities_are_refused(quality):
  with pytest.raises(ValueError, match=f"^quality must be .*got {quality}"):
    jpeg.compress(photograph(8, 8), quality=quality)
