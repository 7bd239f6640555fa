import jax
from jaxtyping import TypeCheckError
import numpy as np
import pytest

from jaxshape.points import refinement

HEIGHT, WIDTH, COUNT, CLASSES = 6, 12, 40, 5
CRF_SHAPE = (4, 7, 3)


def _scan(seed=0):
  """A range image with steps and holes, labels in patches, and points."""
  rng = np.random.default_rng(seed)
  shape = HEIGHT, WIDTH
  image = 5 + 3 * (np.arange(WIDTH) // 4) + rng.uniform(0, 0.8, shape)
  image = np.where(rng.uniform(size=shape) < 0.2, -1, image)
  labels = rng.integers(0, CLASSES, shape)
  row, column = rng.integers(0, HEIGHT, COUNT), rng.integers(0, WIDTH, COUNT)
  ranges = 5 + 3 * (column // 4) + rng.uniform(-0.5, 2, COUNT)
  image, ranges = image.astype(np.float32), ranges.astype(np.float32)
  return labels.astype(np.int32), image, ranges, row, column


def _vote(
  scan, *, neighbours, window, sigma, cutoff, wrap=False, num_classes=CLASSES
):
  """RangeNet++'s Algorithm 1, point after point."""
  labels, image, ranges, row, column = scan
  reach = window // 2
  k = np.arange(window) - reach
  g = np.exp(-(k[:, None] ** 2 + k[None] ** 2) / (2 * sigma**2))
  g /= g.sum()
  out = []
  for r, y, x in zip(ranges, row, column, strict=True):
    near = []
    for dy in k:
      for dx in k:
        i, j = y + dy, (x + dx) % WIDTH if wrap else x + dx
        inside = 0 <= i < HEIGHT and 0 <= j < WIDTH
        value = image[i, j] if inside else 0.0
        label = labels[i, j] if inside else 0
        value = np.inf if value < 0 else value
        value = r if dy == dx == 0 else value
        d = abs(value - r) * (1 - g[dy + reach, dx + reach])
        near.append((d, label))
    near.sort(key=lambda pair: pair[0])
    votes = np.zeros(num_classes)
    for d, label in near[:neighbours]:
      close = d <= cutoff if cutoff > 0 else d < np.inf
      if close and 0 < label < num_classes:
        votes[label] += 1
    out.append(1 + np.argmax(votes[1:]))
  return np.array(out)


SETTINGS = [
  {"neighbours": 5, "window": 5, "sigma": 1.0, "cutoff": 1.0},
  {"neighbours": 3, "window": 3, "sigma": 2.0, "cutoff": 0.0},
  {"neighbours": 9, "window": 3, "sigma": 0.7, "cutoff": 9.0, "wrap": True},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_knn_labels_transcribed(settings):
  for seed in range(5):
    scan = _scan(seed)
    want = _vote(scan, **settings)
    got = refinement.knn_labels(*scan, num_classes=CLASSES, **settings)
    np.testing.assert_array_equal(got, want)
    # A lookup would not do.
    assert np.mean(scan[0][scan[3], scan[4]] == want) < 0.9


def _one(labels, image, r, **options):
  """The label of a point in the middle of 3 x 3 pixels."""
  options = {"neighbours": 3, "window": 3, "num_classes": 6} | options
  middle = np.ones(1, int)
  got = refinement.knn_labels(
    np.array(labels), np.array(image, np.float32), np.array([r], np.float32),
    middle, middle, **options,
  )  # fmt: skip
  return int(got[0])


def test_knn_labels_by_hand():
  image = [[90, 90, 90], [7, 1, 7], [90, 90, 90]]
  # Two neighbours at its range outvote its own pixel, which shows another one.
  assert _one([[2, 2, 2], [3, 4, 3], [2, 2, 2]], image, 7) == 3
  # They are beyond the cut-off, and its own pixel is alone.
  assert _one([[2, 2, 2], [3, 4, 3], [2, 2, 2]], image, 9) == 4
  # One vote each: the lowest label.
  assert _one([[2, 2, 2], [5, 4, 3], [2, 2, 2]], image, 7) == 3
  # Nobody votes but for label 0 or for no class at all.
  assert _one(np.zeros((3, 3), int), image, 7) == 1
  assert _one(np.full((3, 3), 6), image, 7) == 1
  # Empty pixels have no vote, however few there are and without a cut-off.
  empty = np.full((3, 3), -1)
  assert _one([[2, 2, 2], [2, 5, 2], [2, 2, 2]], empty, 7, cutoff=0) == 5
  alike, mask = np.full((3, 3), 7), np.zeros((3, 3), bool)
  assert _one([[2, 2, 2], [2, 5, 2], [2, 2, 2]], alike, 7) == 2
  assert _one([[2, 2, 2], [2, 5, 2], [2, 2, 2]], alike, 7, mask=mask) == 5
  # Of equally near ones the first in the window.
  assert _one([[4, 2, 2], [2, 5, 2], [2, 2, 2]], alike, 7, neighbours=1) == 4


def test_points_without_a_pixel_get_the_fill():
  labels, image, ranges, row, column = _scan()
  options = {**SETTINGS[0], "num_classes": CLASSES}
  want = np.array(
    refinement.knn_labels(labels, image, ranges, row, column, **options)
  )
  row[:3], column[3:5] = [-1, HEIGHT, -7], [-1, WIDTH]
  ranges[0] = np.nan
  valid = np.arange(COUNT) != 5
  got = refinement.knn_labels(
    labels, image, ranges, row, column, valid=valid, fill=-3, **options
  )
  want[:6] = -3
  np.testing.assert_array_equal(got, want)


def test_a_right_labelling_stays():
  # Surfaces one metre and more apart, each of one label.
  _, _, _, row, column = _scan()
  labels = 1 + (np.arange(WIDTH) // 4) * np.ones((HEIGHT, 1), np.int32)
  image = (20.0 + 3 * labels).astype(np.float32)
  got = refinement.knn_labels(
    labels.astype(np.int32), image, image[row, column], row, column,
    num_classes=CLASSES, **SETTINGS[0],
  )  # fmt: skip
  np.testing.assert_array_equal(got, labels[row, column])


def test_knn_labels_under_transforms():
  scans = [np.stack(a) for a in zip(_scan(1), _scan(2), strict=True)]
  f = lambda *scan: refinement.knn_labels(
    *scan, num_classes=CLASSES, **SETTINGS[0]
  )
  want = f(*scans)
  np.testing.assert_array_equal(want[1], f(*_scan(2)))
  np.testing.assert_array_equal(jax.jit(f)(*scans), want)
  np.testing.assert_array_equal(jax.vmap(f)(*scans), want)


def test_knn_labels_of_nothing():
  labels, image, *_ = _scan()
  none, nowhere = np.zeros(0, np.float32), np.zeros(0, int)
  got = refinement.knn_labels(labels, image, none, nowhere, nowhere)
  assert got.shape == (0,)
  got = refinement.knn_labels(labels[:0], image[:0], none[:0], nowhere, nowhere)
  assert got.shape == (0,)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"neighbours": 0}, "neighbours must be 1 or more, got 0"),
    ({"neighbours": 26}, "neighbours must be at most the 25 .* got 26"),
    ({"window": 4}, "window must be odd, got 4"),
    ({"window": -1}, "window must be 1 or more, got -1"),
    ({"sigma": 0.0}, "sigma must be above 0 and finite, got 0.0"),
    ({"cutoff": float("nan")}, "cutoff must be a number, got nan"),
    ({"num_classes": 1}, "num_classes must be 2 or more, got 1"),
  ],
)
def test_knn_labels_refuses_options(options, message):
  with pytest.raises(ValueError, match=message):
    refinement.knn_labels(*_scan(), **options)


def test_knn_labels_refuses_shapes():
  labels, image, ranges, row, column = _scan()
  with pytest.raises(TypeCheckError, match="range_image"):
    refinement.knn_labels(labels, image[:-1], ranges, row, column)
  with pytest.raises(TypeCheckError, match="column"):
    refinement.knn_labels(labels, image, ranges, row, column[:-1])


def _segmentation(seed=0):
  rng = np.random.default_rng(seed)
  height, width, classes = CRF_SHAPE
  p = rng.dirichlet(np.ones(classes), (height, width)).astype(np.float32)
  xyz = rng.normal(size=(height, width, 3)).astype(np.float32) * 0.2
  return p, xyz, rng.uniform(size=(height, width)) < 0.8


def _softmax(a):
  e = np.exp(a - a.max())
  return e / e.sum()


def _infer(p, xyz, mask, m, b, *, sigma, form, iterations=3):
  """The inference, pixel after pixel, in a window of 3 x 5."""
  height, width, _ = p.shape
  q = p.astype(np.float64)
  for _ in range(iterations):
    new = np.empty_like(q)
    for y in range(height):
      for x in range(width):
        message = np.zeros(p.shape[-1])
        for i in range(max(y - 1, 0), min(y + 2, height)):
          for j in range(max(x - 2, 0), min(x + 3, width)):
            if mask[i, j] and (form == "public" or (i, j) != (y, x)):
              square = np.sum((xyz[i, j] - xyz[y, x]) ** 2)
              message += np.exp(-square / (2 * sigma**2)) * q[i, j]
        if form == "public":
          new[y, x] = _softmax(q[y, x] + m @ message + b)
        else:
          new[y, x] = _softmax(np.log(p[y, x]) - m @ message - b)
    q = new
  return q


@pytest.mark.parametrize("form", ["public", "mean_field"])
def test_crf_transcribed(form):
  p, xyz, mask = _segmentation()
  rng = np.random.default_rng(1)
  m, b = rng.normal(size=(3, 3)), rng.normal(size=3)
  want = _infer(p, xyz, mask, m, b, sigma=0.3, form=form)
  got = refinement.crf(
    p, xyz, mask, sigma=0.3, form=form,
    compatibility=m.astype(np.float32), bias=b.astype(np.float32),
  )  # fmt: skip
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


def test_crf_by_default_penalizes_what_neighbours_are_not():
  p, xyz, mask = _segmentation(2)
  potts = 0.1 * (1 - np.eye(3))
  for form in ("public", "mean_field"):
    got = refinement.crf(p, xyz, mask, form=form)
    want = _infer(p, xyz, mask, potts, 0, sigma=0.1, form=form)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
  # By mean field a lone pixel takes on the label around it.
  p = np.tile(np.float32([0.9, 0.05, 0.05]), (4, 7, 1))
  p[1, 3] = [0.4, 0.6, 0]
  got = refinement.crf(
    p, 0 * xyz, np.ones((4, 7)), form="mean_field", coefficient=1.0
  )
  assert np.all(np.argmax(got, -1) == 0)


def test_crf_does_not_look_into_empty_pixels():
  p, xyz, mask = _segmentation(3)
  want = np.asarray(refinement.crf(p, xyz, mask))
  xyz[~mask] = np.nan
  got = np.asarray(refinement.crf(p, xyz, mask))
  np.testing.assert_array_equal(got[mask], want[mask])
  assert np.all(np.isfinite(got))
  np.testing.assert_allclose(got.sum(-1), 1, rtol=1e-5)


def test_crf_without_iterations_gives_the_input():
  p, xyz, mask = _segmentation()
  np.testing.assert_array_equal(refinement.crf(p, xyz, mask, iterations=0), p)


def test_crf_under_transforms():
  batch = [
    np.stack(a) for a in zip(_segmentation(4), _segmentation(5), strict=True)
  ]
  want = refinement.crf(*batch)
  one = refinement.crf(*_segmentation(5))
  np.testing.assert_allclose(want[1], one, rtol=1e-5)
  jitted = jax.jit(refinement.crf)(*batch)
  np.testing.assert_allclose(jitted, want, rtol=1e-5)
  mapped = jax.vmap(refinement.crf)(*batch)
  np.testing.assert_allclose(mapped, want, rtol=1e-5)


def test_crf_can_be_trained():
  p, xyz, mask = _segmentation(6)
  eye = np.eye(3, dtype=np.float32)

  def f(m):
    return refinement.crf(p, xyz, mask, compatibility=m, sigma=0.3)[1, 3, 0]

  step = 1e-2
  up, down = eye.copy(), eye.copy()
  up[0, 1] += step
  down[0, 1] -= step
  want = (f(up) - f(down)) / (2 * step)
  got = jax.grad(f)(eye)
  assert abs(want) > 1e-3
  np.testing.assert_allclose(got[0, 1], want, rtol=1e-2)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"iterations": -1}, "iterations must be 0 or more, got -1"),
    ({"window": (3, 4)}, r"window must be two odd numbers, got \(3, 4\)"),
    ({"sigma": 0}, "sigma must be above 0 and finite, got 0"),
    ({"coefficient": np.inf}, "coefficient must be finite, got inf"),
    ({"form": "paper"}, "form must be 'public' or 'mean_field', got 'paper'"),
  ],
)
def test_crf_refuses_options(options, message):
  with pytest.raises(ValueError, match=message):
    refinement.crf(*_segmentation(), **options)


def test_crf_refuses_shapes():
  p, xyz, mask = _segmentation()
  with pytest.raises(TypeCheckError, match="compatibility"):
    refinement.crf(p, xyz, mask, compatibility=np.eye(4, dtype=np.float32))
  with pytest.raises(TypeCheckError, match="mask"):
    refinement.crf(p, xyz, mask[:2])
