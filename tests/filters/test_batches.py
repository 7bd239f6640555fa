import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxshape.filters import batches


def normalize(x, shift):
  return x / x.max((1, 2), keepdims=True) + shift


@pytest.mark.parametrize("size", [1, 4, 5])
@pytest.mark.parametrize("devices", [1, 8])
def test_groups_give_what_the_batch_gives(monkeypatch, size, devices):
  monkeypatch.setattr(jax, "device_count", lambda: devices)
  monkeypatch.setattr(batches, "GROUP", 2 * 3 * 4)
  rng = np.random.default_rng(0)
  x, shift = rng.uniform(1, 2, (size, 3, 4)), rng.normal(size=(size, 1, 1))
  f = lambda x, shift: batches.run(normalize, normalize, x, shift)
  want = normalize(x, shift)
  np.testing.assert_allclose(f(x, shift), want, rtol=1e-6)
  loops = "scan[" in str(jax.make_jaxpr(f)(x, shift))
  assert loops == (devices == 1 and size > 2)
  both = np.stack([x, 2 * x])
  got = jax.jit(jax.vmap(f, (0, None)))(both, shift)
  np.testing.assert_allclose(got, np.stack([want, want]), rtol=1e-6)


def test_here_runs_the_form_for_cpus():
  x = jnp.ones((2, 3))
  got = batches.run(lambda x: 2 * x, lambda x: 3 * x, x)
  np.testing.assert_array_equal(got, 2 * x)


def test_a_fence_stays_and_changes_nothing():
  x = jnp.arange(12.0).reshape(3, 4)
  f = jax.jit(lambda x: batches.fenced(lambda x: x * x, x).T)
  np.testing.assert_array_equal(f(x), (x * x).T)
  text = f.lower(x).compile().as_text()
  assert "while" in text
  plain = jax.jit(lambda x: lax.mul(x, x).T).lower(x).compile().as_text()
  assert "while" not in plain
