import jax
import jax.numpy as jnp
import numpy as np
import pytest


# jaxlib 0.10.2 gives wrong numbers here on CPUs, from 128 pixels on and only
# under jit: https://github.com/jax-ml/jax/issues/39103
@pytest.mark.parametrize("size", [96, 128, 224])
def test_weighted_sums_over_shifts_are_right_under_jit(size):
  rng = np.random.default_rng(0)
  w = rng.normal(size=(5, size, size)).astype(np.float32)
  q = rng.normal(size=(5, 3, size, size)).astype(np.float32)
  jax.config.update("jax_disable_most_optimizations", False)
  got = jax.jit(lambda w, q: (w[:, None] * q).sum(0))(w, jnp.asarray(q))
  np.testing.assert_allclose(got, (w[:, None] * q).sum(0), atol=1e-4)
