import numpy as np

from jaxshape.engine import scan_pictures

COLORS = np.array([[0, 0, 0], [10, 200, 30], [250, 0, 250]], np.uint8)


def test_labels_have_their_colors_and_emptiness_none():
  painted = scan_pictures.paint(
    np.array([[0, 1], [2, 1]]), COLORS, np.array([[1, 1], [1, 0]])
  )
  assert painted.dtype == np.uint8
  np.testing.assert_array_equal(painted[0, 1], COLORS[1])
  np.testing.assert_array_equal(painted[1, 0], COLORS[2])
  np.testing.assert_array_equal(painted[1, 1], scan_pictures.EMPTY)


def test_only_what_is_labelled_can_be_wrong():
  picture = scan_pictures.difference(
    np.array([1, 1, 1, 2]), np.array([1, 2, 0, 2]), np.array([1, 1, 1, 0])
  )
  right, wrong, empty = (
    scan_pictures.RIGHT, scan_pictures.WRONG, scan_pictures.EMPTY,
  )  # fmt: skip
  np.testing.assert_array_equal(picture, [right, wrong, empty, empty])


def test_near_things_are_bright():
  grey = scan_pictures.depth(
    np.array([[1.0, 10.0, 200.0, 5.0]]), np.array([[1, 1, 1, 0]], bool)
  )
  assert grey[0, 0, 0] == 255
  assert 255 > grey[0, 1, 0] > grey[0, 2, 0] > scan_pictures.EMPTY[0]
  np.testing.assert_array_equal(grey[0, 3], scan_pictures.EMPTY)


def test_an_overview_has_each_range_image_and_the_points():
  rng = np.random.default_rng(0)
  points = rng.normal(size=(50, 3)) * 20
  points[3] = np.nan  # Sensors do that.
  figure = scan_pictures.overview(
    {"a": np.zeros((4, 64, 3), np.uint8), "b": np.ones((4, 64, 3), np.uint8)},
    points,
    np.repeat(COLORS[1:2], 50, axis=0),
    classes=["thing"],
    colors=COLORS[1:2],
    radius=25.0,
  )
  *rows, above = figure.axes
  assert [axis.get_title(loc="left") for axis in rows] == ["a", "b"]
  inside = np.isfinite(points).all(-1) & (np.abs(points[:, :2]) < 25).all(-1)
  (dots,) = above.collections
  assert len(dots.get_offsets()) == inside.sum()
  # Ahead is up, left is left.
  first = points[inside][np.argsort(points[inside, 2])][0]
  np.testing.assert_allclose(dots.get_offsets()[0], [-first[1], first[0]])
  figure.canvas.draw()


def test_bars_are_sorted_and_skip_what_is_unknown():
  figure = scan_pictures.bars(
    {"a": 0.2, "b": 0.7, "c": float("nan")}, label="IoU"
  )
  (axes,) = figure.axes
  assert [t.get_text() for t in axes.get_yticklabels()] == ["a", "b"]
