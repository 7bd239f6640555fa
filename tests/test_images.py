import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from jaxshape import images
from jaxshape.errors import InputError


def test_the_example_is_a_photograph_that_comes_with_the_package():
  image = images.example()
  assert image.dtype == np.uint8
  assert image.shape == (300, 451, 3)
  assert image.std() > 30


def test_pictures_become_rgb():
  grey = Image.fromarray(np.array([[0, 200]], np.uint8))
  got = images.read(grey)
  np.testing.assert_array_equal(got, [[[0] * 3, [200] * 3]])
  array = np.zeros((2, 2, 1))
  assert images.read(array) is array


def test_pictures_that_rgb_would_clip_are_refused():
  with pytest.raises(InputError, match="np.asarray"):
    images.read(Image.fromarray(np.zeros((2, 2), np.float32)))


def test_types_of_results():
  for given, want in [
    (np.uint8, jnp.float32),
    (np.int32, jnp.float32),
    (jnp.bfloat16, jnp.bfloat16),
    (jnp.float16, jnp.float16),
  ]:
    assert images.result_type(jnp.zeros(1, given)) == want


def test_traced_values_are_not_known():
  np.testing.assert_array_equal(images.concrete([1, 2]), [1, 2])
  jax.jit(lambda x: [images.concrete(x)].index(None))(1.0)
