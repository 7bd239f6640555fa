import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from jaxshape.filters import distortion

KEY = jax.random.key(0)


def random_image(*shape, seed=0):
  rng = np.random.default_rng(seed)
  return rng.uniform(0, 255, shape).astype(np.float32)


# Golden.


@pytest.mark.parametrize("angle", [0, 30, -45, -100, 170])
def test_smear_adds_shifted_copies(angle):
  image, radius, sigma = random_image(9, 11, 2), 3, 2.0
  weights = np.exp(-(np.arange(7) ** 2) / (2 * sigma**2))
  want = np.zeros_like(image)
  for i, weight in enumerate(weights / weights.sum()):
    turn = np.deg2rad(angle)
    row = np.arange(9) + int(np.ceil(i * np.sin(turn) - 0.5))
    column = np.arange(11) + int(np.ceil(i * np.cos(turn) - 0.5))
    part = image[np.clip(row, 0, 8)][:, np.clip(column, 0, 10)]
    want += weight * part
  got = distortion.smear(image, angle=angle, sigma=sigma, radius=radius)
  np.testing.assert_allclose(got, want, rtol=1e-5)


def scipy_zoom(image, factor):
  """The published way, each axis by itself."""
  starts, crops = [], []
  for size in image.shape[:2]:
    crops.append(int(np.ceil(size / factor)))
    starts.append((size - crops[-1]) // 2)
  part = image[starts[0] :][: crops[0], starts[1] :][:, : crops[1]]
  part = scipy.ndimage.zoom(part, (factor, factor, 1), order=1)
  trim = [
    (n - size) // 2 for n, size in zip(part.shape, image.shape, strict=True)
  ][:2]
  part = part[trim[0] : trim[0] + image.shape[0]]
  return part[:, trim[1] : trim[1] + image.shape[1]]


@pytest.mark.parametrize("factor", [1, 1.07, 2, 4.5])
def test_zoom_equals_scipy(factor):
  image = random_image(33, 40, 3)
  got = distortion.zoom(image, factor=factor)
  np.testing.assert_allclose(got, scipy_zoom(image, factor), atol=1e-3)


@pytest.mark.parametrize(
  ("severity", "end", "step"), [(1, 1.11, 0.01), (4, 1.26, 0.02)]
)
def test_zoom_blur_averages_what_scipy_zooms(severity, end, step):
  image = random_image(60, 45, 3)
  factors = np.arange(1, end, step)
  total = image + sum(scipy_zoom(image, factor) for factor in factors)
  got = distortion.zoom_blur(image, severity=severity)
  np.testing.assert_allclose(got, total / (len(factors) + 1), atol=1e-3)


@pytest.mark.parametrize(
  ("border", "name"),
  [("reflect", "mirror"), ("symmetric", "reflect"), ("edge", "nearest")],
)
def test_warp_equals_scipy(border, name):
  image = random_image(7, 9, 2)
  rng = np.random.default_rng(1)
  rows, columns = rng.uniform(-20, 25, (2, 5, 6)).astype(np.float32)
  want = np.stack(
    [
      scipy.ndimage.map_coordinates(x, [rows, columns], order=1, mode=name)
      for x in np.moveaxis(image, -1, 0)
    ],
    -1,
  )
  got = distortion.warp(image, rows, columns, border=border)
  np.testing.assert_allclose(got, want, atol=1e-2)


@pytest.mark.parametrize("reach", [1, 2, 4])
def test_shuffling_at_once_equals_one_pixel_after_the_other(reach):
  height, width = 24, 31
  offset = np.random.default_rng(reach).integers(
    -reach, reach, (2, height, width)
  )
  want = np.stack(np.mgrid[:height, :width], -1)
  for i in range(height - reach, reach, -1):
    for j in range(width - reach, reach, -1):
      k, l = i + offset[0, i, j], j + offset[1, i, j]
      # As published: the second view has changed by the time it is read.
      want[i, j], want[k, l] = want[k, l], want[i, j]
  got = jax.jit(distortion._sources, static_argnums=2)(*offset, reach)
  np.testing.assert_array_equal(got, (want @ [width, 1]).reshape(-1))


def test_affine_equals_opencv():
  image = random_image(40, 50, 3)
  corners = np.array([[38, 33], [38, 7], [12, 7]], np.float32)
  moved = corners + np.random.default_rng(0).uniform(-4, 4, (3, 2)).astype("f4")
  matrix = cv2.getAffineTransform(corners, moved)
  want = cv2.warpAffine(
    image, matrix, (50, 40), borderMode=cv2.BORDER_REFLECT_101
  )
  places = distortion._affine(corners, jnp.asarray(moved), 40, 50)
  got = distortion.warp(image, *places)
  # OpenCV's places are multiples of 1/32 pixel.
  assert np.abs(got - want).mean() < 2.5
  assert np.corrcoef(np.ravel(got), np.ravel(want))[0, 1] > 0.998


def test_elastic_transform_shifts_as_far_as_published():
  # A ramp reads as its own place: at severity 5 the affine map adds little.
  size = 224
  ramp = np.broadcast_to(np.arange(size, dtype=np.float32), (size, size))
  image = np.repeat(ramp[..., None], 3, -1)
  got = distortion.elastic_transform(KEY, image, severity=5)[30:-30, 30:-30, 0]
  rough = got - scipy.ndimage.gaussian_filter(np.asarray(got), 12)
  rng = np.random.default_rng(0)
  noise = rng.uniform(-1, 1, (size, size))
  want = 29.28 * scipy.ndimage.gaussian_filter(noise, 2.44, truncate=3)
  want -= scipy.ndimage.gaussian_filter(want, 12)
  # At the border the smoothed ramp is flat.
  rough = rough[20:-20, 20:-20]
  np.testing.assert_allclose(rough.std(), want.std(), rtol=0.15)


# Laws.


def test_motion_blur_draws_its_angle():
  point = np.zeros((2, 65, 65, 3), np.float32)
  point[:, 32, 32] = 255
  got = np.asarray(distortion.motion_blur(KEY, point, severity=3))
  # What is blurred to the right and down is read from there.
  np.testing.assert_allclose(got.sum((1, 2)), 255, rtol=1e-3)
  assert got[:, :, 33:].max() == 0
  assert np.abs(got[0] - got[1]).max() > 1


def test_glass_blur_keeps_flat_images():
  flat = np.full((20, 20, 3), 90, np.float32)
  got = distortion.glass_blur(KEY, flat, severity=5)
  np.testing.assert_allclose(got, 90, rtol=1e-5)


def test_glass_blur_takes_edges_further():
  image = np.zeros((40, 40, 3), np.float32)
  image[:, 20:] = 255
  mild, middle, severe = (
    np.abs(distortion.glass_blur(KEY, image, severity=severity) - image).mean()
    for severity in (1, 2, 5)
  )
  assert severe > 1.5 * mild
  assert severe > 1.5 * middle


# Transforms.


def test_warp_and_smear_of_batches():
  image = random_image(2, 8, 9, 3)
  rows, columns = np.random.default_rng(0).uniform(0, 7, (2, 2, 4, 4))
  rows, columns = rows.astype(np.float32), columns.astype(np.float32)
  want = [
    distortion.warp(*args) for args in zip(image, rows, columns, strict=True)
  ]
  got = distortion.warp(image, rows, columns)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  angles = np.array([10.0, 80.0], np.float32)
  f = lambda x, a: distortion.smear(x, angle=a, sigma=2, radius=2)
  want = [f(x, a) for x, a in zip(image, angles, strict=True)]
  np.testing.assert_allclose(f(image, angles), want, rtol=1e-5)


def test_warp_has_the_gradient_of_its_places():
  image = random_image(6, 6, 1)
  places = jnp.full((1, 1), 2.25), jnp.full((1, 1), 3.5)
  f = lambda i, j: distortion.warp(image, i, j).sum()
  down, right = jax.grad(f, (0, 1))(*places)
  part = image[2:4, 3:5, 0]
  want = (
    (part[1] - part[0]).mean(),
    0.75 * (part[0, 1] - part[0, 0]) + 0.25 * (part[1, 1] - part[1, 0]),
  )
  np.testing.assert_allclose([down[0, 0], right[0, 0]], want, rtol=1e-4)


# Refusals.


def test_options_out_of_range_are_refused():
  image = random_image(4, 4, 3)
  with pytest.raises(ValueError, match="^sigma must be above 0.*got 0"):
    distortion.smear(image, angle=0, sigma=0, radius=2)
  with pytest.raises(ValueError, match="^radius must be at least 0.*got -1"):
    distortion.smear(image, angle=0, sigma=1, radius=-1)
  with pytest.raises(ValueError, match=r"^factor must be at least 1.*got 0\.5"):
    distortion.zoom(image, factor=0.5)
  places = np.zeros((2, 2), np.float32)
  with pytest.raises(ValueError, match="^border must be .*got 'wrap'"):
    distortion.warp(image, places, places, border="wrap")
