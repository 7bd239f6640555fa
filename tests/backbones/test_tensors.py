import numpy as np
import pytest

from jaxshape.backbones import tensors
from jaxshape.errors import InputError


def _given():
  return tensors.Tensors(
    {
      "module.a.weight": np.ones((2, 3)),
      "b.weight": np.zeros(4),
      "bn.num_batches_tracked": np.array(7),
    }
  )


def test_each_is_taken_once_by_its_plain_name():
  given = _given()
  np.testing.assert_array_equal(given.take("a.weight", (2, 3)), np.ones((2, 3)))
  np.testing.assert_array_equal(given.take("b.weight", [4]), np.zeros(4))
  given.finish("it")
  assert given.take("b.weight", (4,)) is None


def test_names_of_other_parts_are_left_out():
  given = _given()
  given.take("a.weight", (2, 3))
  given.drop(())
  assert set(given.given) == {"b.weight"}
  given.drop(("b.", "c."))
  given.finish("it")


def test_all_faults_are_told_at_once():
  given = _given()
  assert given.take("a.weight", (3, 2)) is None
  assert given.take("c.weight", (1,)) is None
  with pytest.raises(
    InputError,
    match=r"do not fit it; missing: c.weight \(1,\); "
    r"not known: b.weight \(4,\); of another shape: "
    r"a.weight \(2, 3\) instead of \(3, 2\)\.",
  ):
    given.finish("it")
