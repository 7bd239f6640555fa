"""How much corruptions of images cost a classifier, against AlexNet.

Errors are shares of wrong answers, 0..1, one per severity of each corruption;
what comes out is in per cent, as in the papers' tables. Numbers normalized by
different baselines, or of pictures computed anew and of the stored JPEGs, do
not compare: say "AlexNet-normalised" and which pictures.

Reference:
  Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common
  Corruptions and Perturbations", ICLR 2019, Sec. 4.2.
"""

from collections.abc import Mapping, Sequence
import types
from typing import Any

import numpy as np

from jaxshape.errors import InputError, few
from jaxshape.typing import typed

# Errors per corruption, one per severity from 1 on.
Errors = Mapping[str, Any]

# Top-1 errors of torchvision's AlexNet on the 15 corruptions of ImageNet-C,
# severities 1 to 5, from the authors' table. Their means are those published.
ALEXNET_ERRORS: Errors = types.MappingProxyType(
  {
    "gaussian_noise": (0.69528, 0.82542, 0.93554, 0.98138, 0.99452),
    "shot_noise": (0.71224, 0.85108, 0.93574, 0.98182, 0.99146),
    "impulse_noise": (0.78374, 0.89808, 0.94870, 0.98720, 0.99548),
    "defocus_blur": (0.65624, 0.73202, 0.85036, 0.91364, 0.94714),
    "glass_blur": (0.64308, 0.75054, 0.88806, 0.91622, 0.93344),
    "motion_blur": (0.58430, 0.70048, 0.82108, 0.89750, 0.92638),
    "zoom_blur": (0.70008, 0.76992, 0.80784, 0.84198, 0.87198),
    "snow": (0.71726, 0.88392, 0.86468, 0.91870, 0.94952),
    "frost": (0.61390, 0.79734, 0.88790, 0.89942, 0.93430),
    "fog": (0.67474, 0.76050, 0.84378, 0.87260, 0.94500),
    "brightness": (0.45140, 0.48502, 0.54048, 0.62166, 0.72440),
    "contrast": (0.64548, 0.76150, 0.88874, 0.97760, 0.99270),
    "elastic_transform": (0.52596, 0.70116, 0.55686, 0.64076, 0.80554),
    "pixelate": (0.52218, 0.54620, 0.73728, 0.87092, 0.91262),
    "jpeg_compression": (0.51002, 0.54718, 0.57294, 0.65458, 0.74778),
  }
)
# The same network on the validation images as they are: 56.52 % are right.
ALEXNET_CLEAN_ERROR = 0.4348


@typed
def corruption_errors(
  errors: Errors,
  *,
  baseline: Errors = ALEXNET_ERRORS,
  severities: Sequence[int] = (1, 2, 3, 4, 5),
) -> dict[str, float]:
  """The errors under each corruption, in per cent of the baseline's.

  CE_c = 100 sum_s E_sc / sum_s B_sc, with E the errors and B the baseline's.

  Args:
    errors: E: the name of each corruption of the baseline and its errors, one
      per severity. Further corruptions do not count.
    baseline: B, all severities from 1 on.
    severities: Which severities the errors are of. Published numbers are of
      all five.

  Returns:
    One number per corruption of the baseline, 100 where both do equally well.

  Raises:
    ValueError: The baseline has no such severities.
    InputError: Corruptions are missing or not given as errors, or one does the
      baseline no harm.

  Reference:
    Hendrycks and Dietterich 2019, Sec. 4.2, corruption error.
  """
  ours, theirs = _tables(errors, baseline, severities)
  return _percent(baseline, ours.sum(axis=1), theirs.sum(axis=1))


@typed
def relative_corruption_errors(
  errors: Errors,
  clean_error: float | int | np.number,
  *,
  baseline: Errors = ALEXNET_ERRORS,
  baseline_clean_error: float | int | np.number = ALEXNET_CLEAN_ERROR,
  severities: Sequence[int] = (1, 2, 3, 4, 5),
) -> dict[str, float]:
  """What each corruption adds to the error, in per cent of the baseline's.

  rCE_c = 100 sum_s (E_sc - E_clean) / sum_s (B_sc - B_clean).

  Args:
    errors: As in `corruption_errors`.
    clean_error: E_clean, on images that are not corrupted.
    baseline: As there.
    baseline_clean_error: B_clean.
    severities: As there.

  Returns:
    One number per corruption of the baseline; below 0 where the corruption
    helps.

  Raises:
    ValueError: The baseline has no such severities.
    InputError: Corruptions are missing or not given as errors, or one does the
      baseline no harm.

  Reference:
    Hendrycks and Dietterich 2019, Sec. 4.2, relative corruption error.
  """
  ours, theirs = _tables(errors, baseline, severities)
  clean = _error("clean_error", clean_error)
  least = _error("baseline_clean_error", baseline_clean_error)
  return _percent(
    baseline, np.sum(ours - clean, axis=1), np.sum(theirs - least, axis=1)
  )


@typed
def mean_corruption_error(
  errors: Errors,
  *,
  baseline: Errors = ALEXNET_ERRORS,
  severities: Sequence[int] = (1, 2, 3, 4, 5),
) -> float:
  """The mean of the `corruption_errors`, mCE: 100 is as good as AlexNet.

  Args:
    errors: As in `corruption_errors`.
    baseline: As there.
    severities: As there.

  Returns:
    mCE in per cent; less is better.

  Raises:
    ValueError: The baseline has no such severities.
    InputError: Corruptions are missing or not given as errors, or one does the
      baseline no harm.

  Reference:
    Hendrycks and Dietterich 2019, Sec. 4.2, mCE.
  """
  each = corruption_errors(errors, baseline=baseline, severities=severities)
  return float(np.mean(list(each.values())))


@typed
def relative_mean_corruption_error(
  errors: Errors,
  clean_error: float | int | np.number,
  *,
  baseline: Errors = ALEXNET_ERRORS,
  baseline_clean_error: float | int | np.number = ALEXNET_CLEAN_ERROR,
  severities: Sequence[int] = (1, 2, 3, 4, 5),
) -> float:
  """The mean of the `relative_corruption_errors`, relative mCE.

  Args:
    errors: As in `corruption_errors`.
    clean_error: On images that are not corrupted.
    baseline: As there.
    baseline_clean_error: The baseline's on these.
    severities: As there.

  Returns:
    Relative mCE in per cent; less is better.

  Raises:
    ValueError: The baseline has no such severities.
    InputError: As in `relative_corruption_errors`.

  Reference:
    Hendrycks and Dietterich 2019, Sec. 4.2, relative mCE.
  """
  each = relative_corruption_errors(
    errors,
    clean_error,
    baseline=baseline,
    baseline_clean_error=baseline_clean_error,
    severities=severities,
  )
  return float(np.mean(list(each.values())))


def _tables(
  errors: Errors, baseline: Errors, severities: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
  """Both as [corruptions, severities], in the baseline's order."""
  if not baseline:
    raise InputError("baseline must hold a corruption or more, got none.")
  missing = [name for name in baseline if name not in errors]
  if missing:
    raise InputError(
      f"errors must hold every corruption of the baseline, got none of "
      f"{few(missing)}; it holds {few(list(errors)) or 'nothing'}."
    )
  levels = np.size(next(iter(baseline.values())))
  theirs = np.stack(
    [_row(f"baseline[{k!r}]", baseline[k], levels) for k in baseline]
  )
  chosen = [int(s) for s in severities]
  if not chosen or len({*chosen} & {*range(1, levels + 1)}) < len(chosen):
    raise ValueError(
      f"severities must be different ones of 1..{levels}, got "
      f"{tuple(severities)}."
    )
  ours = np.stack(
    [_row(f"errors[{k!r}]", errors[k], len(chosen)) for k in baseline]
  )
  return ours, theirs[:, np.array(chosen) - 1]


def _row(name: str, values: Any, count: int) -> np.ndarray:
  try:
    row = np.asarray(values, np.float64)
  except (TypeError, ValueError):
    row = np.empty(())
  if row.shape != (count,):
    raise InputError(
      f"{name} must hold one error for each of {count} severities, got "
      f"{values!r}."
    )
  return np.array([_error(name, x) for x in row])


def _error(name: str, value: Any) -> float:
  if not 0 <= value <= 1:
    raise InputError(
      f"{name} must be a share of wrong answers, 0..1, got {value:g}; divide "
      "per cent by 100."
    )
  return float(value)


def _percent(
  baseline: Errors, ours: np.ndarray, theirs: np.ndarray
) -> dict[str, float]:
  """100 ours / theirs, for each corruption."""
  harmless = [k for k, x in zip(baseline, theirs, strict=True) if x <= 0]
  if harmless:
    raise InputError(
      "baseline must suffer from every corruption that others are compared "
      f"under, got no harm from {few(harmless)}."
    )
  ratios = 100 * ours / theirs
  return dict(zip(baseline, map(float, ratios), strict=True))
