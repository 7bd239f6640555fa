import numpy as np
import pytest

from jaxshape.data import textures

EVERY = range(len(textures.FAMILIES))


def _spectrum(values):
  power = np.abs(
    np.fft.rfft2(values * np.hanning(64)[:, None] * np.hanning(64))
  )
  return power**2


def test_stripes_have_two_tones_and_one_direction():
  family = textures.FAMILIES.index("stripes")
  values = textures.field(np.random.default_rng(1), family, size=128)
  low, high = values.min(), values.max()
  # Standardized: low * high = -1 for two tones of any shares, less the edges.
  assert -1.3 < low * high < -0.8
  near = np.minimum(values - low, high - values) < 0.02 * (high - low)
  assert near.mean() > 0.6


def test_there_are_sixteen_families_to_learn_and_ten_others():
  assert len(textures.TRAINING) == 16
  assert len(textures.NOVEL) == 10
  assert len(set(textures.FAMILIES)) == 26
  assert textures.FAMILIES == textures.TRAINING + textures.NOVEL


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("size", [32, 64, 224])
def test_fields_are_standardized(family, size):
  values = textures.field(np.random.default_rng(0), family, size=size)
  assert values.dtype == np.float32
  np.testing.assert_allclose(values.mean(), 0, atol=1e-4)
  np.testing.assert_allclose(values.std(), 1, rtol=1e-3)


@pytest.mark.parametrize("family", EVERY)
def test_fields_are_fine_and_follow_the_generator(family):
  draws = [np.random.default_rng(seed) for seed in (0, 0, 1, 2, 3)]
  fields = [textures.field(draw, family, size=64) for draw in draws]
  np.testing.assert_array_equal(fields[0], fields[1])
  assert not np.allclose(fields[0], fields[2])
  frequency = np.hypot(np.fft.fftfreq(64)[:, None], np.fft.rfftfreq(64))
  power = np.mean([_spectrum(values) for values in fields[1:]], axis=0)
  # More than half of the variance has periods below 22 px.
  assert power[frequency > 1 / 22].sum() > 0.5 * power.sum()


@pytest.mark.parametrize("family", EVERY)
def test_fields_are_alike_at_any_size(family):
  small, large = (
    textures.field(np.random.default_rng(4), family, size=size)
    for size in (64, 128)
  )
  halved = large.reshape(64, 2, 64, 2).mean(axis=(1, 3))
  assert np.corrcoef(halved.ravel(), small.ravel())[0, 1] > 0.9


def test_families_and_sizes_out_of_range_are_refused():
  draw = np.random.default_rng(0)
  for family in (-1, 26):
    with pytest.raises(ValueError, match=rf"family must be .*, got {family}"):
      textures.field(draw, family, size=64)
  with pytest.raises(ValueError, match="size must be at least 8, got 4"):
    textures.field(draw, 0, size=4)
