import jax
import jax.numpy as jnp
from jaxtyping import TypeCheckError
import numpy as np
import pytest

from jaxshape.geometry import spherical

# Small and unlike each other; every test uses the same to compile little.
HEIGHT, WIDTH, COUNT = 8, 32, 300
OPTIONS = {"height": HEIGHT, "width": WIDTH}


def _scan(seed=0, count=COUNT):
  """Points of all directions, some above and below the field of view."""
  rng = np.random.default_rng(seed)
  azimuth = rng.uniform(-np.pi, np.pi, count)
  pitch = np.radians(rng.uniform(-28, 6, count))
  r = rng.uniform(1, 80, count)
  flat = r * np.cos(pitch)
  points = [flat * np.cos(azimuth), flat * np.sin(azimuth), r * np.sin(pitch)]
  remission = rng.uniform(0, 1, count).astype(np.float32)
  return np.stack(points, -1).astype(np.float32), remission


def _project(*args, **options):
  options = {"drop_first_point": False, **options}
  return jax.tree.map(np.asarray, spherical.project(*args, **options))


def _coordinates(points, *, up=3.0, down=25.0, offset=25.0):
  """Eq. 1 in float64."""
  x, y, z = points.astype(np.float64).T
  r = np.sqrt(x**2 + y**2 + z**2)
  u = 0.5 * (1 - np.arctan2(y, x) / np.pi) * WIDTH
  pitch = np.degrees(np.arcsin(z / r))
  v = (1 - (pitch + offset) / (up + down)) * HEIGHT
  return u, v, r


def _draw(points, remission, u, v, r, order):
  """Draws the points in an order, over each other."""
  image = np.full((HEIGHT, WIDTH, 5), -1, np.float32)
  index = np.full((HEIGHT, WIDTH), -1)
  row = np.clip(np.floor(v), 0, HEIGHT - 1).astype(int)
  column = np.clip(np.floor(u), 0, WIDTH - 1).astype(int)
  for i in order:
    image[row[i], column[i]] = [r[i], *points[i], remission[i]]
    index[row[i], column[i]] = i
  return image, index, row, column


@pytest.mark.parametrize("keep", ["nearest", "farthest"])
def test_project_transcribed(keep):
  points, remission = _scan()
  u, v, r = _coordinates(points)
  # The formula decides only where it is not at the border of a pixel.
  clear = np.minimum(np.abs(u - np.round(u)), np.abs(v - np.round(v))) > 4e-3
  points, remission = points[clear], remission[clear]
  u, v, r = u[clear], v[clear], r[clear]
  assert len(np.unique(np.sort(r).astype(np.float32))) == len(r) > 250
  order = np.argsort(-r if keep == "nearest" else r)
  image, index, row, column = _draw(points, remission, u, v, r, order)
  got = _project(points, remission, keep=keep, **OPTIONS)
  np.testing.assert_array_equal(got.row, row)
  np.testing.assert_array_equal(got.column, column)
  np.testing.assert_array_equal(got.index, index)
  np.testing.assert_array_equal(got.mask, index >= 0)
  np.testing.assert_allclose(got.image, image, rtol=1e-6)
  # The test is worth something: pixels are shared, empty and clamped into.
  assert 0 < (index >= 0).sum() < len(r)
  assert (index < 0).any()
  assert (v < 0).any()
  assert (v > HEIGHT).any()


def test_cells_of_a_wide_image_equal_the_formula():
  points, remission = _scan(1, 20_000)
  u, v, _ = _coordinates(points)
  u, v = u * 2048 / WIDTH, v * 64 / HEIGHT
  got = _project(points, remission)
  assert got.image.shape == (64, 2048, 5)
  clear = np.minimum(np.abs(u - np.round(u)), np.abs(v - np.round(v))) > 4e-3
  assert clear.mean() > 0.95
  column = np.clip(np.floor(u), 0, 2047)
  row = np.clip(np.floor(v), 0, 63)
  np.testing.assert_array_equal(np.asarray(got.column)[clear], column[clear])
  np.testing.assert_array_equal(np.asarray(got.row)[clear], row[clear])
  # Each point is hidden by one that is as near, or is shown.
  r = np.linalg.norm(points.astype(np.float64), axis=-1)
  shown = np.asarray(got.index)[np.asarray(got.row), np.asarray(got.column)]
  assert (shown >= 0).all()
  assert (r[shown] <= r * (1 + 1e-6)).all()


def test_directions_by_hand():
  # Forward, left, right, up and down, and back just left and right of it.
  points = np.array(
    [[5, 0, 0], [0, 5, 0], [0, -5, 0], [0, 0, 5], [0, 0, -5],
     [-5, 0.0, 0], [-5, -0.0, 0], [-5, 1e-3, 0], [-5, -1e-3, 0],
     [-0.0, 0, 5]],
    np.float32,
  )  # fmt: skip
  got = _project(points, None, **OPTIONS)
  want = [16, 8, 24, 16, 16, 0, 31, 0, 31, 0]
  np.testing.assert_array_equal(got.column, want)
  # (1 - 25 / 28) * 8 = 0.86
  np.testing.assert_array_equal(got.row, [0, 0, 0, 0, 7, 0, 0, 0, 0, 0])
  np.testing.assert_array_equal(got.image[0, 8], [5, 0, 5, 0, 0])


def test_rows_of_the_paper_and_other_fields_of_view():
  points, remission = _scan(2)
  clear = lambda v: np.abs(v - np.round(v)) > 4e-3
  for options, formula in (
    (
      {"rows": "paper", "fov_up": 10, "fov_down": 20.0},
      {"up": 10, "down": 20, "offset": 10},
    ),
    ({"fov_up": -5.0}, {"up": -5, "down": 25, "offset": 25}),
  ):
    got = _project(points, remission, **OPTIONS, **options)
    _, v, _ = _coordinates(points, **formula)
    want = np.clip(np.floor(v), 0, HEIGHT - 1)
    np.testing.assert_array_equal(np.asarray(got.row)[clear(v)], want[clear(v)])


def test_equally_near_points_show_the_last_one():
  point = np.array([3, 4, -1], np.float32)
  points = np.tile(point, (COUNT, 1))
  remission = np.arange(COUNT, dtype=np.float32)
  for keep in ("nearest", "farthest"):
    got = _project(points, remission, keep=keep, **OPTIONS)
    assert np.max(got.index) == COUNT - 1
    assert np.sum(got.mask) == 1
    assert np.max(got.image[..., 4]) == COUNT - 1


def test_points_that_cannot_be_seen_take_no_pixel():
  points, remission = _scan(3)
  bad = np.arange(COUNT) < 60
  points[:10] = 0
  points[10:20, 1] = np.nan
  points[20:30, 0] = np.inf
  points[30:40, 2] = -np.inf
  remission[40:50] = np.nan
  valid = ~((np.arange(COUNT) >= 50) & bad)
  got = _project(points, remission, valid=valid, **OPTIONS)
  np.testing.assert_array_equal(got.row[:60], -1)
  np.testing.assert_array_equal(got.column[:60], -1)
  assert np.min(got.row[60:]) >= 0
  clean = _scan(3)
  want = _project(*clean, valid=~bad, **OPTIONS)
  for a, b in zip(got, want, strict=True):
    np.testing.assert_array_equal(a, b)
  assert got.mask.sum() > 50
  nothing = _project(*clean, valid=np.zeros(COUNT, bool), **OPTIONS)
  np.testing.assert_array_equal(nothing.image, -1)


def test_clamp_decides_about_points_outside_the_field_of_view():
  points, remission = _scan(4)
  _, v, _ = _coordinates(points)
  inside = (v > 0) & (v < HEIGHT)
  got = _project(points, remission, clamp=False, **OPTIONS)
  np.testing.assert_array_equal(np.asarray(got.row) >= 0, inside)
  np.testing.assert_array_equal(np.asarray(got.column) >= 0, inside)
  want = _project(points, remission, valid=inside, **OPTIONS)
  np.testing.assert_array_equal(got.index, want.index)


def test_the_public_mask_drops_the_first_point():
  points, remission = _scan(5)
  points[0] = [0.1, 0.1, 0]
  full = _project(points, remission, **OPTIONS)
  got = spherical.project(points, remission, **OPTIONS)  # By default.
  np.testing.assert_array_equal(got.index, full.index)
  np.testing.assert_array_equal(got.image, full.image)
  np.testing.assert_array_equal(got.mask, np.asarray(full.index) > 0)
  assert np.sum(full.mask) == np.sum(got.mask) + 1


def test_extreme_coordinates_keep_their_direction():
  points, remission = _scan(6)
  want = _project(points, remission, **OPTIONS)
  for scale in (2.0**115, 2.0**-110):
    got = _project(points * np.float32(scale), remission, **OPTIONS)
    np.testing.assert_array_equal(got.column, want.column)
    np.testing.assert_array_equal(got.row, want.row)
    np.testing.assert_array_equal(got.index, want.index)
    filled = np.asarray(want.mask)
    np.testing.assert_allclose(
      np.asarray(got.image[..., 0])[filled],
      np.asarray(want.image[..., 0])[filled] * np.float32(scale),
      rtol=1e-6,
    )
  most = np.full((COUNT, 3), np.finfo(np.float32).max)
  got = _project(most, remission, **OPTIONS)
  assert np.all(np.isfinite(got.image))
  assert np.sum(got.mask) == 1


def test_a_rotation_by_whole_columns_rolls_the_image():
  points, remission = _scan(7)
  u, v, _ = _coordinates(points)
  clear = np.minimum(np.abs(u - np.round(u)), np.abs(v - np.round(v))) > 1e-2
  got = _project(points, remission, valid=clear, **OPTIONS)
  angle = -2 * np.pi * 5 / WIDTH  # Clockwise is to the right.
  turn = np.array(
    [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
  )
  turned = points.copy()
  turned[:, :2] = points[:, :2] @ turn.T
  rolled = _project(turned, remission, valid=clear, **OPTIONS)
  np.testing.assert_array_equal(rolled.index, np.roll(got.index, 5, axis=-1))


def test_project_under_transforms():
  points, remission = _scan(8, 2 * 3 * COUNT)
  points = points.reshape(2, 3, COUNT, 3)
  remission = remission.reshape(2, 3, COUNT)
  valid = np.random.default_rng(0).uniform(size=(2, 3, COUNT)) < 0.8
  f = lambda p, m, v: spherical.project(p, m, valid=v, **OPTIONS)
  batch = f(points, remission, valid)
  jitted = jax.jit(f)(points, remission, valid)
  mapped = jax.vmap(jax.vmap(f))(points, remission, valid)
  one = f(points[1, 2], remission[1, 2], valid[1, 2])
  for a, b, c, d in zip(batch, jitted, mapped, one, strict=True):
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(a, c)
    np.testing.assert_array_equal(a[1, 2], d)


def test_the_image_has_a_gradient_that_padding_does_not_spoil():
  points, remission = _scan(9, 4)
  points[2], points[3] = 0, np.nan
  small = {"height": 2, "width": 4}
  f = lambda p: jnp.sum(spherical.project(p, remission, **small).image)
  # Both points are shown, with their coordinates and their ranges.
  seen = points[:2]
  want = seen / np.linalg.norm(seen, axis=-1, keepdims=True) + 1
  got = np.asarray(jax.jit(jax.grad(f))(points))
  np.testing.assert_allclose(got[:2], want, rtol=1e-5)
  np.testing.assert_array_equal(got[2:], 0)


def test_an_empty_scan_gives_an_empty_image():
  for leading in ((), (2,)):
    got = _project(
      np.zeros((*leading, 0, 3), np.float32),
      np.zeros((*leading, 0), np.float32),
      **OPTIONS,
    )
    np.testing.assert_array_equal(got.image, -1)
    assert got.image.shape == (*leading, HEIGHT, WIDTH, 5)
    assert got.row.shape == (*leading, 0)
    assert not np.any(got.mask)


def test_unproject_labels_by_hand():
  labels = np.arange(6, dtype=np.int32).reshape(2, 3) + 1
  row = np.array([0, 1, -1, 1, 2, 0])
  column = np.array([2, 0, -1, 2, 0, 3])
  got = spherical.unproject_labels(labels, row, column)
  np.testing.assert_array_equal(got, [3, 4, 0, 6, 0, 0])
  got = spherical.unproject_labels(labels / 2, row, column, fill=-1)
  np.testing.assert_array_equal(got, [1.5, 2, -1, 3, -1, -1])
  got = spherical.unproject_labels(labels > 3, row, column, fill=False)
  np.testing.assert_array_equal(got, [0, 1, 0, 1, 0, 0])
  pair = np.stack([labels, 10 * labels])
  rows, columns = np.stack([row, row[::-1]]), np.stack([column, column[::-1]])
  got = jax.jit(spherical.unproject_labels)(pair, rows, columns)
  np.testing.assert_array_equal(
    got, [[3, 4, 0, 6, 0, 0], [0, 0, 60, 0, 40, 30]]
  )


def test_labels_go_to_the_image_and_back():
  points, remission = _scan(10)
  got = _project(points, remission, **OPTIONS)
  back = spherical.unproject_labels(got.index, got.row, got.column)
  shown = np.asarray(got.index)[np.asarray(got.mask)]
  np.testing.assert_array_equal(np.asarray(back)[shown], shown)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"height": 0}, "height must be 1 or more, got 0"),
    ({"width": -3}, "width must be 1 or more, got -3"),
    ({"fov_up": -25.0}, "fov_up must be above the lower end, -25.0"),
    ({"fov_up": -30, "fov_down": 25}, "fov_up must be above .* got -30"),
    ({"fov_up": 91.0}, "fov_up must be .* got 91.0"),
    ({"fov_up": float("nan")}, "fov_up must be .* got nan"),
    ({"fov_down": -100}, "fov_down must be within -90..90, got -100"),
    ({"keep": "first"}, "keep must be 'nearest' or 'farthest', got 'first'"),
    ({"rows": "other"}, "rows must be 'public' or 'paper', got 'other'"),
  ],
)
def test_project_refuses_options(options, message):
  points, remission = _scan()
  with pytest.raises(ValueError, match=message):
    spherical.project(points, remission, **options)


def test_project_refuses_shapes():
  points, remission = _scan()
  with pytest.raises(TypeCheckError, match="points"):
    spherical.project(points[:, :2], remission)
  with pytest.raises(TypeCheckError, match="remission"):
    spherical.project(points, remission[:5])
  with pytest.raises(TypeCheckError, match="valid"):
    spherical.project(points, remission, valid=np.ones(3, bool))
  with pytest.raises(TypeCheckError, match="column"):
    spherical.unproject_labels(
      np.zeros((2, 3), np.int32), np.zeros(4, int), np.zeros(5, int)
    )
