import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxshape.filters import severities

KEY = jax.random.key(0)


def _noisy(key, image):
  return image + jax.random.uniform(key, image.shape)


def test_pick_counts_from_one():
  values = (1, 2, 4, 8, 16)
  assert [severities.pick(s, values) for s in range(1, 6)] == list(values)


@pytest.mark.parametrize("severity", [0, 6, -1])
def test_other_severities_are_refused(severity):
  with pytest.raises(
    ValueError, match=f"^severity must be 1, .*got {severity}"
  ):
    severities.pick(severity, (1, 2, 3, 4, 5))


def test_per_image_gives_each_a_key_of_its_own():
  image = jnp.zeros((2, 3, 4, 5, 1))
  got = severities.per_image(KEY, _noisy, image)
  keys = jax.random.split(KEY, 6)
  want = [jax.random.uniform(key, (4, 5, 1)) for key in keys]
  np.testing.assert_array_equal(got, np.reshape(want, image.shape))


@pytest.mark.parametrize("shape", [(0, 4, 4, 3), (2, 0, 4, 3)])
def test_per_image_of_nothing(shape):
  got = severities.per_image(KEY, _noisy, jnp.zeros(shape))
  assert got.shape == shape
