import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import TypeCheckError
import numpy as np
import pytest

from jaxshape.layers import windows


def _by_hand(x, kernel, stride, padding):
  """One output pixel at a time."""
  rows, columns = kernel.shape[:2]
  x = np.pad(np.float64(x), [(0, 0), (padding,) * 2, (padding,) * 2, (0, 0)])
  places = lambda size, part: range(0, size - part + 1, stride)
  out = [
    [
      np.einsum("brci,rcio->bo", x[:, i : i + rows, j : j + columns], kernel)
      for j in places(x.shape[2], columns)
    ]
    for i in places(x.shape[1], rows)
  ]
  return np.transpose(out, (2, 0, 1, 3))


@pytest.mark.parametrize(
  ("size", "kernel", "stride", "padding", "product"),
  [
    ((2, 2), (3, 3), 1, 1, True),
    ((1, 1), (3, 3), 1, 1, True),
    ((2, 4), (3, 3), 1, 1, True),
    ((5, 4), (3, 3), 2, 1, True),
    ((4, 5), (5, 5), 1, 2, True),
    ((4, 4), (3, 2), 1, 0, True),
    ((4, 4), (3, 3), 1, 1, False),
    ((9, 8), (3, 3), 2, 1, False),
  ],
)
def test_it_is_the_convolution_and_so_are_its_gradients(
  size, kernel, stride, padding, product
):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, *size, 3)).astype(np.float32)
  weights = rng.normal(size=(*kernel, 3, 4)).astype(np.float32)

  def ours(x, weights):
    return windows.conv(x, weights, stride=stride, padding=padding)

  def theirs(x, weights):
    return lax.conv_general_dilated(
      x, weights, (stride, stride), [(padding, padding)] * 2,
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip

  assert ("dot_general" in str(jax.make_jaxpr(ours)(x, weights))) == product
  got, back = jax.vjp(jax.jit(ours), x, weights)
  want = _by_hand(x, weights, stride, padding)
  assert got.shape == want.shape
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
  cotangent = jnp.asarray(rng.normal(size=want.shape), jnp.float32)
  _, other = jax.vjp(theirs, x, weights)
  for a, b in zip(back(cotangent), other(cotangent), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_refused():
  with pytest.raises(TypeCheckError):
    windows.conv(np.zeros((1, 2, 2, 3)), np.zeros((3, 3, 4, 5)), padding=1)
