import jax
import jax.numpy as jnp
from jax.test_util import check_grads
from jaxtyping import TypeCheckError
import numpy as np
import pytest

from jaxshape.errors import InputError
from jaxshape.losses import mutual_information

RNG = np.random.default_rng(0)
A = RNG.normal(size=(6, 32)).astype(np.float32)
B = (0.6 * A + 0.8 * RNG.normal(size=A.shape)).astype(np.float32)
ALONG = {"channel": 1, "batch": 0}


def _float64(a, b, axis):
  """Both centred and of unit length, with their lengths before."""
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  x, y = (z - z.mean(axis, keepdims=True) for z in (a, b))
  norm = np.linalg.norm(x, axis=axis, keepdims=True)
  return x / norm, y / np.linalg.norm(y, axis=axis, keepdims=True), norm


def test_by_hand():
  a = np.array([[1, 2, 3, 4], [1, 2, 3, 4], [1, 1, 0, 0]], np.float32)
  b = np.array([[1, 3, 2, 4], [-2, -6, -4, -8], [1, 0, 1, 0]], np.float32)
  # rho is 0.8, -0.8 and 0, and 1 - 0.64 = 0.6^2.
  want = [np.log(0.6), np.log(0.6), 0]
  got = mutual_information.mmsi(a, b)
  np.testing.assert_allclose(got, want, atol=1e-6)
  got = mutual_information.mmsi(a.T, b.T, axis="batch")
  np.testing.assert_allclose(got, want, atol=1e-6)
  got = mutual_information.gaussian_mutual_information(a, b)
  np.testing.assert_allclose(got, np.negative(want), atol=1e-6)


@pytest.mark.parametrize("axis", ["channel", "batch"])
def test_transcribed(axis):
  want, gradient = [], []
  rows = (A, B) if axis == "channel" else (A.T, B.T)
  for a, b in zip(*rows, strict=True):
    rho = np.corrcoef(a.astype(float), b)[0, 1]
    want.append(0.5 * np.log(1 - rho**2))
    x, y = a - a.mean(dtype=float), b - b.mean(dtype=float)
    nx, ny = np.linalg.norm(x), np.linalg.norm(y)
    of_rho = y / (nx * ny) - rho * x / nx**2
    gradient.append(rho / (rho**2 - 1) * of_rho)
  f = lambda a: mutual_information.mmsi(a, B, axis=axis)
  np.testing.assert_allclose(f(A), want, atol=1e-6)
  got = jax.grad(lambda a: f(a).sum())(A)
  want = gradient if axis == "channel" else np.transpose(gradient)
  np.testing.assert_allclose(got, want, atol=2e-6)


def test_gaussian_draws_reach_the_closed_form():
  rho = np.array([0, 0.3, -0.6, 0.9, -0.99])
  a, noise = RNG.normal(size=(2, 20000, 5))
  b = rho * a + np.sqrt(1 - rho**2) * noise
  got = mutual_information.gaussian_mutual_information(
    a.astype(np.float32), b.astype(np.float32), axis="batch"
  )
  want = -0.5 * np.log(1 - rho**2)
  np.testing.assert_allclose(got, want, atol=0.02)
  assert np.all(np.asarray(got) >= 0)


@pytest.mark.parametrize("scale", [3, -3, 1e30, -1e-30])
def test_shifts_and_scales_change_nothing(scale):
  want = mutual_information.mmsi(A, B)
  scale = np.float32(scale)
  got = mutual_information.mmsi(A * scale, B)
  np.testing.assert_allclose(got, want, atol=1e-6)
  got = mutual_information.mmsi(A, (B + 5) * scale)
  np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("sign", [1, -1])
def test_close_to_one_value_and_gradient_keep_their_digits(sign):
  other = (sign * (A + 1e-3 * B)).astype(np.float32)
  u, v, norm = _float64(A, other, 1)
  rho = np.sum(u * v, axis=1, keepdims=True)
  near = v * np.sign(rho)
  rest = np.sum((u - near) ** 2, axis=1, keepdims=True)
  rest *= np.sum((u + near) ** 2, axis=1, keepdims=True) / 4
  assert rest.max() < 2e-6  # As 1 - rho^2, a float32 has it to a tenth.
  f = lambda a: mutual_information.mmsi(a, other, epsilon=0)
  np.testing.assert_allclose(f(A), 0.5 * np.log(rest[:, 0]), atol=1e-4)
  got = jax.grad(lambda a: f(a).sum())(A)
  # v - rho u, without cancelling.
  across = (near - u) - u * np.sum((near - u) * u, axis=1, keepdims=True)
  want = -rho / rest * across * np.sign(rho) / norm
  np.testing.assert_allclose(got, want, atol=2e-3 * np.abs(want).max())


def test_epsilon_bounds_the_same_twice():
  f = jax.value_and_grad(lambda a: mutual_information.mmsi(a, A).sum())
  value, gradient = f(A)
  np.testing.assert_allclose(value, 6 * 0.5 * np.log(1e-8), rtol=1e-5)
  # Rounding apart it is 0; where u - v = sqrt(epsilon), it would be 1e3.
  assert np.abs(gradient).max() < 100
  got = mutual_information.mmsi(A, -A, epsilon=0.01)
  np.testing.assert_allclose(got, np.full(6, 0.5 * np.log(0.01)), rtol=1e-5)
  got = mutual_information.mmsi(A, B, epsilon=0.01)
  assert np.all(got > mutual_information.mmsi(A, B))
  f = jax.grad(lambda a, b: mutual_information.mmsi(a, b).sum())
  for s in (1e-5, 1e-6, 1e-7):
    assert np.all(np.isfinite(f(A, A + np.float32(s) * B)))


def test_constants_share_nothing_and_get_no_gradient():
  a = A.copy()
  # Of 32 times 0.1 the mean is not 0.1 in every order of summation.
  a[0], a[2], a[4] = 0.1, 0, -1e6
  total = lambda x, y: mutual_information.mmsi(x, y).sum()
  for x, y in ((a, B), (B, a), (a, a)):
    loss = mutual_information.mmsi(x, y)
    np.testing.assert_array_equal(loss[::2], 0)
    assert np.all(loss[1::2] < 0)
    for gradient in jax.grad(total, (0, 1))(x, y):
      np.testing.assert_array_equal(gradient[::2], 0)
      assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("axis", ["channel", "batch"])
def test_padding_counts_nowhere(axis):
  mask = np.array([0, 1, 1, 1, 0, 1])
  few = mask == 1
  a = np.where(few[:, None], A, np.nan).astype(np.float32)
  f = lambda a: mutual_information.mmsi(a, B, axis=axis, mask=mask)
  got = np.asarray(f(a))
  u, v, _ = _float64(A[few], B[few], ALONG[axis])
  want = 0.5 * np.log(1 - np.sum(u * v, axis=ALONG[axis]) ** 2)
  if axis == "channel":
    np.testing.assert_array_equal(got[~few], 0)
    got = got[few]
  np.testing.assert_allclose(got, want, atol=1e-5)
  gradient = jax.grad(lambda a: f(a).sum())(a)
  np.testing.assert_array_equal(gradient[~few], 0)
  assert np.all(np.isfinite(gradient))
  assert np.any(gradient[few])


def test_what_is_not_a_number_comes_through():
  a = A.copy()
  a[1, 3], a[2, 0] = np.nan, np.inf
  got = np.isnan(mutual_information.mmsi(a, B))
  np.testing.assert_array_equal(got, [False, True, True, False, False, False])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_short_floats_are_computed_in_float32(dtype):
  a, b = jnp.asarray(A, dtype), jnp.asarray(B, dtype)
  got = mutual_information.mmsi(a, b)
  assert got.dtype == jnp.float32
  want = mutual_information.mmsi(a.astype(np.float32), b.astype(np.float32))
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("axis", ["channel", "batch"])
def test_under_jit_vmap_and_grad(axis):
  f = lambda a, b: mutual_information.mmsi(a, b, axis=axis)
  want = f(A, B)
  np.testing.assert_allclose(jax.jit(f)(A, B), want, atol=1e-6)
  got = jax.vmap(f)(np.stack([A, B]), np.stack([B, A]))
  np.testing.assert_allclose(got, [want, want], atol=1e-6)
  check_grads(f, (A, B), order=1, modes=["rev"], atol=1e-2, rtol=1e-2)


def test_refuses():
  f = mutual_information.mmsi
  with pytest.raises(ValueError, match=r"axis must be one of .*, got 'both'"):
    f(A, B, axis="both")
  for epsilon in (-1e-9, 1, float("nan")):
    with pytest.raises(ValueError, match=f"epsilon must .*, got {epsilon}"):
      f(A, B, epsilon=epsilon)
  with pytest.raises(InputError, match="axis='batch'.* got 1 x 32"):
    f(A[:1], B[:1], axis="batch")
  with pytest.raises(InputError, match="axis='channel'.* got 6 x 1"):
    mutual_information.gaussian_mutual_information(A[:, :1], B[:, :1])
  with pytest.raises(TypeCheckError, match="b"):
    f(A, B[:, :5])
  with pytest.raises(TypeCheckError, match="mask"):
    f(A, B, mask=np.ones(5))
