from jaxtyping import TypeCheckError
import numpy as np
import pytest

from jaxshape.errors import InputError
from jaxshape.metrics import robustness

BASELINE = {"fog": (0.5, 0.7, 0.8), "snow": [0.6, 0.6, 0.8]}
ERRORS = {
  "snow": np.array([0.3, 0.3, 0.4], np.float32),
  "fog": (0.1, 0.2, 0.7),
  "spatter": (0.9, 0.9, 0.9),
}
THREE = {"baseline": BASELINE, "severities": (1, 2, 3)}


def test_by_hand():
  got = robustness.corruption_errors(ERRORS, **THREE)
  assert list(got) == ["fog", "snow"]
  np.testing.assert_allclose(list(got.values()), [50, 50], rtol=1e-6)
  # (1.0 - 0.3) / (2.0 - 1.2) and (1.0 - 0.3) / (2.0 - 1.2).
  clean = {"baseline_clean_error": 0.4, **THREE}
  got = robustness.relative_corruption_errors(ERRORS, 0.1, **clean)
  np.testing.assert_allclose(list(got.values()), [87.5, 87.5], rtol=1e-6)
  errors = {**ERRORS, "snow": (0.6, 0.6, 0.8)}
  got = robustness.mean_corruption_error(errors, **THREE)
  np.testing.assert_allclose(got, (50 + 100) / 2, rtol=1e-6)
  got = robustness.relative_mean_corruption_error(errors, 0.1, **clean)
  np.testing.assert_allclose(got, (87.5 + 100 * 1.7 / 0.8) / 2, rtol=1e-6)


def test_severities_pick_the_baselines_errors():
  errors = {"fog": (0.8, 0.5), "snow": (0.4, 0.3)}
  options = {"baseline": BASELINE, "severities": (3, 1)}
  got = robustness.corruption_errors(errors, **options)
  np.testing.assert_allclose(got["fog"], 100)
  np.testing.assert_allclose(got["snow"], 50)


def test_alexnet_has_its_published_errors():
  # In per cent, in the order of the paper's table.
  published = [88.6, 89.4, 92.3, 82.0, 82.6, 78.6, 79.8, 86.7, 82.7, 81.9,
               56.5, 85.3, 64.6, 71.8, 60.7]  # fmt: skip
  table = robustness.ALEXNET_ERRORS
  means = [100 * np.mean(row) for row in table.values()]
  np.testing.assert_allclose(means, published, atol=0.0501)
  assert robustness.mean_corruption_error(table) == pytest.approx(100)
  clean = robustness.ALEXNET_CLEAN_ERROR
  got = robustness.relative_mean_corruption_error(table, clean)
  assert got == pytest.approx(100)
  # One that is right by half more often, and one that corruptions do not touch.
  half = {name: np.array(row) / 2 for name, row in table.items()}
  assert robustness.mean_corruption_error(half) == pytest.approx(50)
  same = dict.fromkeys(table, [0.2] * 5)
  got = robustness.relative_mean_corruption_error(same, 0.2)
  assert got == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
  ("row", "message"),
  [
    ((0.1, 0.2), r"errors\['fog'\] must hold one error for each of 3"),
    (0.5, r"errors\['fog'\] must hold one error for each of 3"),
    ("abc", r"errors\['fog'\] must hold one error for each of 3"),
    ((10, 20, 70), r"errors\['fog'\] must be a share.* got 10; divide"),
    ((0.1, 0.2, np.nan), r"errors\['fog'\] must be a share.* got nan"),
    ((-0.1, 0.2, 0.3), r"errors\['fog'\] must be a share.* got -0.1"),
  ],
)
def test_refuses_errors(row, message):
  with pytest.raises(InputError, match=message):
    robustness.mean_corruption_error({**ERRORS, "fog": row}, **THREE)


def test_refuses():
  f = robustness.mean_corruption_error
  with pytest.raises(InputError, match="none of snow; it holds fog"):
    f({"fog": (0.1, 0.2, 0.7)}, **THREE)
  with pytest.raises(InputError, match="got none of gaussian_noise.* 10 more"):
    f({})
  with pytest.raises(InputError, match="baseline must hold"):
    f(ERRORS, baseline={})
  with pytest.raises(InputError, match=r"baseline\['snow'\] must hold one"):
    f(ERRORS, baseline={"fog": (0.5, 0.7), "snow": (0.5,)})
  with pytest.raises(InputError, match="no harm from fog"):
    f(ERRORS, baseline={"fog": (0, 0, 0)}, severities=(1, 2, 3))
  for severities in ((0, 1, 2), (1, 2, 4), (1, 1, 2), ()):
    with pytest.raises(ValueError, match=r"severities must be .* 1\.\.3, got"):
      f(ERRORS, baseline=BASELINE, severities=severities)
  g = robustness.relative_mean_corruption_error
  with pytest.raises(InputError, match="clean_error must be a share"):
    g(ERRORS, 24.0, **THREE)
  with pytest.raises(InputError, match="no harm from fog, snow"):
    g(ERRORS, 0.1, baseline_clean_error=0.7, **THREE)
  with pytest.raises(TypeCheckError, match="errors"):
    f([0.1, 0.2])
