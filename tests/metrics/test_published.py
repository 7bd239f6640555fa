import numpy as np
import pytest

from jaxshape.metrics import published, robustness


@pytest.mark.parametrize("name", ["SHAPE_BIAS", "CORRUPTION_ERRORS"])
def test_values_are_fractions_with_a_source_each_once(name):
  rows = getattr(published, name)
  assert len({row.name for row in rows}) == len(rows)
  for row in rows:
    assert 0 < row.value < 1.5
    assert row.source.strip() == row.source != ""
  values = [row.value for row in rows]
  assert values == sorted(values, reverse=True)


def test_corruption_errors_are_relative_to_the_stored_baseline():
  rows = {row.name: row.value for row in published.CORRUPTION_ERRORS}
  own = robustness.mean_corruption_error(robustness.ALEXNET_ERRORS)
  assert rows["AlexNet"] == pytest.approx(own / 100)


def test_shape_biases_are_those_of_the_paper():
  # Sec. 3.1: people, and the shares of texture of four networks.
  rows = {row.name: row.value for row in published.SHAPE_BIAS}
  texture = {
    "AlexNet": 57.1,
    "GoogLeNet": 68.8,
    "VGG-16": 82.8,
    "ResNet-50": 77.9,
  }
  for name, share in texture.items():
    np.testing.assert_allclose(100 * rows[name], 100 - share)
  assert rows[published.PEOPLE] == max(rows.values()) == 0.959
