import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxshape.filters import windows

# Golden: NumPy.


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("border", windows.BORDERS)
def test_extend_equals_numpy_also_where_it_adds_more_than_there_is(
  border, size
):
  x = np.arange(1.0, 1 + 2 * size).reshape(2, size)
  got = windows.extend(jnp.asarray(x), axis=1, before=4, after=7, border=border)
  want = np.pad(x, [(0, 0), (4, 7)], mode=border)
  np.testing.assert_array_equal(got, want)


def test_extend_by_nothing_is_the_array():
  x = jnp.ones((2, 3))
  assert windows.extend(x, axis=0, before=0, after=0, border="wrap") is x


# Law: what stands in the window decides, nothing else.


def test_wrong_numbers_get_no_further_than_the_weights():
  matrix = jnp.asarray([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0]])
  average = lambda x: matrix @ x
  x = jnp.asarray([[1.0, jnp.nan], [3.0, 1.0], [jnp.inf, 5.0]])
  want = [[2, np.nan], [np.inf, 3], [np.inf, 5]]
  got = windows.through_wrong_numbers(average, x)
  np.testing.assert_array_equal(got, want)
  both = jnp.stack([x, jnp.ones_like(x)])
  f = jax.vmap(lambda x: windows.through_wrong_numbers(average, x))
  np.testing.assert_array_equal(f(both), [want, np.ones((3, 2))])


def test_the_usual_case_stays_one_side_of_a_case_under_vmap():
  f = lambda x: windows.through_wrong_numbers(lambda x: 2 * x, x)
  text = str(jax.make_jaxpr(jax.vmap(f))(jnp.ones((4, 3, 2))))
  assert "cond[" in text
  slope = jax.vmap(jax.grad(lambda x: f(x).sum()))(jnp.ones((4, 3, 2)))
  np.testing.assert_array_equal(slope, np.full((4, 3, 2), 2))


# Refusals.


@pytest.mark.parametrize(
  ("given", "meant"),
  [("nearest", "edge"), ("mirror", "reflect"), ("REFLECT_101", "reflect")],
)
def test_other_libraries_names_get_a_hint(given, meant):
  with pytest.raises(ValueError, match=f"got '{given}'.*'{meant}' is meant"):
    windows.check_border(given)


def test_windows_have_a_middle():
  assert windows.odd("size", np.int64(3)) == 3
  for bad in (0, 2, -1):
    with pytest.raises(ValueError, match=f"size must be odd.*got {bad}"):
      windows.odd("size", bad)
