import numpy as np
import pytest

from jaxshape.data import outlines


def _square(half):
  return np.array([(-half, -half), (half, -half), (half, half), (-half, half)])


def _drawings(label, count):
  return [
    outlines.outline(np.random.default_rng([label, i]), label)
    for i in range(count)
  ]


@pytest.mark.parametrize("size", [64, 128, 224])
def test_mask_of_a_square_with_a_hole(size):
  parts = [(_square(0.5), True), (_square(0.25), False)]
  # By hand: a quarter of the picture less a sixteenth. Polygons are painted on
  # a grid at least twice as fine, with their rim.
  rim = 2 * (2.0 + 1.0) / (2 * size)
  got = outlines.mask(parts, size=size)
  np.testing.assert_allclose(got.mean(), 0.25 - 0.0625, atol=rim)
  assert got[0, 0] == 0
  assert got[size // 2, size // 2] == 0
  assert got[size // 2, int(size * 0.32)] == 1


def test_later_parts_cover_earlier_holes():
  parts = [(_square(0.5), True), (_square(0.25), False), (_square(0.1), True)]
  got = outlines.mask(parts, size=64)
  assert got[32, 32] == 1
  assert got[32, 26] == 0


@pytest.mark.parametrize("width", [0.02, 0.05])
def test_contour_of_a_square_is_its_length_times_its_width(width):
  got = outlines.contour([(_square(0.5), True)], size=128, width=width)
  # By hand: the sides are half of the picture's; 4 / 2 * width.
  np.testing.assert_allclose(got.mean(), 2 * width, rtol=0.15)
  assert got[64, 64] == 0
  assert got[64, 32] == 1


@pytest.mark.parametrize("label", range(len(outlines.CLASSES)))
def test_figures_lie_within_the_picture_and_span_most_of_it(label):
  for parts in _drawings(label, 20):
    points = np.concatenate([points for points, _ in parts])
    assert np.abs(points).max() <= 0.97 + 1e-9
    longest = np.ptp(points, axis=0).max() / 2
    assert 0.7 - 1e-9 <= longest <= 0.94 + 1e-9
    area = outlines.mask(parts, size=32).mean()
    assert 0.04 < area < 0.7


def test_drawings_follow_the_generator_and_nothing_else():
  one, same, other = (
    outlines.outline(np.random.default_rng(seed), 3) for seed in (0, 0, 1)
  )
  for (a, adds), (b, adds_too) in zip(one, same, strict=True):
    np.testing.assert_array_equal(a, b)
    assert adds == adds_too
  means = [parts[0][0].mean(axis=0) for parts in (one, other)]
  assert np.abs(means[0] - means[1]).max() > 0.01


def test_classes_are_told_apart_by_their_mean_figures():
  # Nearest mean of 32 px figures cut to their bounding boxes: a weak learner,
  # which chance would put at 1/16.
  def look(parts):
    points = np.concatenate([points for points, _ in parts])
    low, high = points.min(axis=0), points.max(axis=0)
    placed = [
      ((points - low) / (high - low) * 1.8 - 0.9, adds)
      for points, adds in parts
    ]
    return outlines.mask(placed, size=32)

  looks = [
    np.stack([look(parts) for parts in _drawings(label, 60)])
    for label in range(len(outlines.CLASSES))
  ]
  means = np.stack([some[:40].mean(axis=0) for some in looks])
  hits = [
    np.square(means - picture).sum(axis=(1, 2)).argmin() == label
    for label, some in enumerate(looks)
    for picture in some[40:]
  ]
  assert np.mean(hits) > 0.6


@pytest.mark.parametrize("label", [0, 5, 11])
def test_figures_are_alike_at_any_size(label):
  (parts,) = _drawings(label, 1)
  small = outlines.mask(parts, size=64)
  large = outlines.mask(parts, size=128)
  halved = large.reshape(64, 2, 64, 2).mean(axis=(1, 3))
  np.testing.assert_allclose(halved.mean(), small.mean(), rtol=0.03)
  assert np.abs(halved - small).mean() < 0.01


@pytest.mark.parametrize("label", [-1, 16])
def test_unknown_labels_are_refused(label):
  with pytest.raises(
    ValueError, match=rf"label must be in 0\.\.15, got {label}"
  ):
    outlines.outline(np.random.default_rng(0), label)


def test_sizes_and_widths_out_of_range_are_refused():
  parts = [(_square(0.5), True)]
  with pytest.raises(ValueError, match="size must be at least 8, got 7"):
    outlines.mask(parts, size=7)
  with pytest.raises(ValueError, match="size must be at least 8, got 0"):
    outlines.contour(parts, size=0, width=0.02)
  for width in (0.0, 0.2):
    with pytest.raises(ValueError, match=rf"width must be .*, got {width}"):
      outlines.contour(parts, size=32, width=width)
