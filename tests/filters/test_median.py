import functools
import itertools
import re

import cv2
import jax
from jax import test_util
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
from PIL import Image
import pytest
from scipy import ndimage

from jaxshape.filters import batches, median

SCIPY = {
  "reflect": "mirror",
  "symmetric": "reflect",
  "edge": "nearest",
  "constant": "constant",
  "wrap": "wrap",
}


def random_image(*shape, dtype=np.float32, seed=0):
  rng = np.random.default_rng(seed)
  if np.issubdtype(dtype, np.integer):
    info = np.iinfo(dtype)
    return rng.integers(info.min, info.max, shape, dtype, endpoint=True)
  return rng.uniform(-255, 255, shape).astype(dtype)


def distinct_image(*shape, seed=0):
  rng = np.random.default_rng(seed)
  return rng.permutation(np.prod(shape)).reshape(shape).astype(np.float32) - 20


def by_scipy(image, size, border):
  planes = [
    ndimage.median_filter(image[..., c], size, mode=SCIPY[border])
    for c in range(image.shape[-1])
  ]
  return np.stack(planes, -1)


def shifts(np, image, size, border):
  """The values of each pixel's window along the first axis."""
  height, width, _ = image.shape
  wide = [(size // 2, size // 2)] * 2 + [(0, 0)]
  wide = np.pad(image, wide, mode=border)
  places = itertools.product(range(size), repeat=2)
  return np.stack([wide[i : i + height, j : j + width] for i, j in places])


def by_definition(np, image, size, border):
  return np.median(shifts(np, image, size, border), axis=0)


# Golden: OpenCV and SciPy, side by side, and NumPy's median.


@pytest.mark.parametrize("size", [3, 5, 7, 9, 11, 35])
def test_median_equals_opencv_on_large_images_under_jit(size):
  image = random_image(130, 160, 3, dtype=np.uint8)
  got = jax.jit(functools.partial(median.median, size=size))(image)
  assert got.dtype == np.uint8
  np.testing.assert_array_equal(got, cv2.medianBlur(image, size))


@pytest.mark.parametrize("size", [3, 5])
def test_median_equals_opencv_on_floats_under_jit(size):
  image = random_image(130, 160, 3)
  got = jax.jit(functools.partial(median.median, size=size))(image)
  np.testing.assert_array_equal(got, cv2.medianBlur(image, size))


@pytest.mark.parametrize(
  ("size", "border"),
  [*((3, border) for border in SCIPY), (5, "reflect"), (11, "wrap")],
)
def test_median_equals_scipy_for_every_border(size, border):
  image = random_image(12, 14, 2)
  got = median.median(image, size=size, border=border)
  np.testing.assert_array_equal(got, by_scipy(image, size, border))


def test_median_equals_scipy_for_the_largest_network_on_floats():
  image = random_image(31, 20, 3)
  got = median.median(image, size=median._LARGEST_NETWORK)
  want = by_scipy(image, median._LARGEST_NETWORK, "edge")
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
  ("dtype", "size"),
  [("int8", 11), ("uint16", 11), ("int16", 3), ("uint32", 3), ("int32", 11)],
)
def test_integers_keep_their_type(dtype, size):
  image = random_image(12, 13, 1, dtype=np.dtype(dtype))
  got = median.median(image, size=size, border="constant")
  assert got.dtype == image.dtype
  np.testing.assert_array_equal(got, by_scipy(image, size, "constant"))


@pytest.mark.parametrize(
  ("dtype", "size"), [(jnp.bfloat16, 3), (jnp.float16, 11)]
)
def test_short_floats_keep_their_type(dtype, size):
  image = jnp.asarray(random_image(12, 13, 1), dtype)
  got = median.median(image, size=size)
  assert got.dtype == dtype
  want = by_scipy(np.asarray(image.astype(jnp.float32)), size, "edge")
  np.testing.assert_array_equal(got.astype(jnp.float32), want)


@pytest.mark.parametrize(
  ("size", "border"), [(5, "edge"), (5, "reflect"), (11, "reflect")]
)
@pytest.mark.parametrize("shape", [(1, 9, 3), (9, 1, 1), (1, 1, 2), (2, 3, 1)])
def test_median_of_images_smaller_than_the_window(shape, size, border):
  image = random_image(*shape)
  got = median.median(image, size=size, border=border)
  want = by_definition(np, image, size, border)
  np.testing.assert_array_equal(got, want)


def test_median_in_groups_equals_opencv(monkeypatch):
  # One device is what most people have: groups of two and a rest of one.
  monkeypatch.setattr(jax, "device_count", lambda: 1)
  monkeypatch.setattr(batches, "GROUP", 2 * 9 * 10 * 3)
  jax.clear_caches()
  images = random_image(5, 9, 10, 3)
  images[3, 4, 4, 1] = np.nan
  got = median.median(images, size=3)
  gradient = jax.grad(lambda u: (median.median(u, size=3) ** 2).sum())
  slopes = gradient(images[:3])
  monkeypatch.undo()
  jax.clear_caches()
  for i in (0, 1, 2, 4):
    np.testing.assert_array_equal(got[i], cv2.medianBlur(images[i], 3))
  want = by_definition(np, images[3], 3, "edge")
  np.testing.assert_array_equal(got[3], want)
  np.testing.assert_array_equal(slopes, gradient(images[:3]))


def test_the_form_for_accelerators_gives_the_same():
  images = random_image(2, 9, 10, 3)
  images[1, 4, 4, 1] = np.nan
  form = jax.jit(functools.partial(median._forward, 5, "wrap", on_cpu=False))
  want = median.median(images, size=5, border="wrap")
  np.testing.assert_array_equal(form(images), want)


# Networks: what sorts all zeros and ones sorts everything (Knuth).


def run(network, values, wanted):
  return np.stack(median._apply(network, list(values), wanted))


@pytest.mark.parametrize("size", [2, 3, 5, 8, 9])
def test_network_sorts_whatever_comes(size):
  bits = np.array(list(itertools.product([0, 1], repeat=size)), np.uint8).T
  network, order = median._sort(list(range(size)))
  np.testing.assert_array_equal(run(network, bits, order), np.sort(bits, 0))


@pytest.mark.parametrize("size", [3, 5])
def test_network_finds_the_median_of_all_sorted_columns(size):
  ones = itertools.product(range(size + 1), repeat=size)
  ones = np.array(list(ones)).T[:, None]
  rank = np.arange(size)[:, None]
  bits = (rank >= size - ones).astype(np.uint8).reshape(size * size, -1)
  network, wire = median._choose(size)
  got = run(network, bits, [wire])[0]
  np.testing.assert_array_equal(got, np.median(bits, 0))


# Laws.


def test_specks_go_and_edges_stay():
  image = np.zeros((12, 14, 1), np.uint8)
  image[:, 7:] = 200
  dirty = image.copy()
  dirty[3, 3] = dirty[8, 4] = 255
  dirty[6, 11] = 0
  np.testing.assert_array_equal(median.median(dirty, size=3), image)
  np.testing.assert_array_equal(median.median(dirty), image)


@pytest.mark.parametrize("size", [5, 11])
def test_rising_maps_of_values_and_the_median_commute(size):
  image = random_image(12, 14, 2)
  filtered = functools.partial(median.median, size=size)
  for rising in (np.cbrt, lambda x: 3 * x - 7):
    want = rising(np.asarray(filtered(image)))
    np.testing.assert_array_equal(filtered(rising(image)), want)
  np.testing.assert_array_equal(filtered(-image), -filtered(image))


@pytest.mark.parametrize(("size", "border"), [(3, "edge"), (11, "wrap")])
def test_nan_gets_no_further_than_the_window(size, border):
  image = random_image(30, 28, 2)
  image[0, 3, 0] = np.nan
  image[16, 15, 1] = np.copysign(np.nan, -1)
  bad = np.isnan(by_definition(np, image, size, border))
  assert bad.any()
  assert not bad.all()
  got = np.array(median.median(image, size=size, border=border))
  np.testing.assert_array_equal(np.isnan(got), bad)
  for there, value in [((0, 3, 0), 7), ((16, 15, 1), -7)]:
    image[there] = value
  want = np.array(median.median(image, size=size, border=border))
  np.testing.assert_array_equal(got[~bad], want[~bad])


@pytest.mark.parametrize("size", [3, 11])
def test_infinities_are_ordinary_values(size):
  # Both kinds in one image, whose sum is then no number.
  image = random_image(13, 14, 2)
  rng = np.random.default_rng(1)
  image[rng.uniform(size=image.shape) < 0.45] = np.inf
  image[rng.uniform(size=image.shape) < 0.35] = -np.inf
  got = np.array(median.median(image, size=size))
  assert np.isinf(got).any()
  np.testing.assert_array_equal(got, by_scipy(image, size, "edge"))


def test_a_window_of_one_pixel_leaves_the_image():
  image = random_image(5, 6, 3)
  image[2, 2] = np.nan
  np.testing.assert_array_equal(median.median(image, size=1), image)


def test_pictures_are_taken_as_they_are():
  image = random_image(7, 9, 3, dtype=np.uint8)
  got = median.median(Image.fromarray(image))
  np.testing.assert_array_equal(got, median.median(image))


def test_empty_batch():
  got = median.median(np.zeros((0, 4, 4, 3), np.uint8))
  assert got.shape == (0, 4, 4, 3)
  assert got.dtype == np.uint8


# Transforms.


def test_vmap_and_jit_agree_with_the_batch():
  images = random_image(2, 3, 9, 11, 3)
  images[1, 2, 4, 4] = np.nan
  f = functools.partial(median.median, size=3)
  want = np.stack([[f(image) for image in row] for row in images])
  for g in (f, jax.jit(f), jax.vmap(f), jax.jit(jax.vmap(jax.vmap(f)))):
    np.testing.assert_array_equal(g(images), want)


@pytest.mark.parametrize("border", SCIPY)
def test_gradient_equals_autodiff_of_the_definition(border):
  shape = 8, 9, 2
  image, weight = distinct_image(*shape), random_image(*shape, seed=1)
  f = lambda u: jnp.vdot(weight, median.median(u, size=3, border=border))
  slow = lambda u: jnp.vdot(weight, by_definition(jnp, u, 3, border))
  got, want = jax.jit(jax.grad(f))(image), jax.jit(jax.grad(slow))(image)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("size", [5, 35])
def test_gradient_goes_to_the_picked_pixel(size):
  # Also where a pixel stands in a window more than once.
  image, weight = distinct_image(7, 8, 2), random_image(7, 8, 2, seed=1)
  f = lambda u: jnp.vdot(weight, median.median(u, size=size))
  picked = by_definition(np, image, size, "edge")
  same = image[..., None, None, :] == picked  # [h, w, h', w', c]
  want = np.where(same, weight, 0).sum((2, 3))
  np.testing.assert_allclose(jax.grad(f)(image), want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("size", [3, 11])
def test_gradient_equals_differences(size):
  image = distinct_image(4, 5, 2)
  f = functools.partial(median.median, size=size)
  test_util.check_grads(f, (image,), 1, ["rev"], atol=1e-2, rtol=1e-2, eps=0.2)


def test_equal_pixels_share_the_gradient():
  image, weight = np.zeros((5, 6, 1), np.float32), random_image(5, 6, 1)
  image[0, 0] = 9
  f = lambda u: jnp.vdot(weight, median.median(u, size=3, border="symmetric"))
  windows = shifts(np, image, 3, "symmetric")
  share = weight / (windows == 0).sum(0)
  wide = np.zeros((7, 8, 1), np.float32)
  for (i, j), window in zip(np.ndindex(3, 3), windows, strict=True):
    wide[i : i + 5, j : j + 6] += np.where(window == 0, share, 0)
  want = wide[1:-1, 1:-1]
  want[0] += wide[0, 1:-1]
  want[-1] += wide[-1, 1:-1]
  want[:, 0] += wide[1:-1, 0]
  want[:, -1] += wide[1:-1, -1]
  for i, j in itertools.product([0, -1], repeat=2):
    want[i, j] += wide[i, j]
  got = jax.grad(f)(image)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)
  np.testing.assert_allclose(got.sum(), weight.sum(), rtol=1e-5)


def test_gradient_under_vmap_is_that_of_the_batch():
  images = random_image(3, 6, 7, 3)
  f = lambda u: (median.median(u, size=3) ** 2).sum()
  want = jax.grad(f)(images)
  np.testing.assert_array_equal(jax.vmap(jax.grad(f))(images), want)


def test_gradient_keeps_short_types_and_stops_at_nan():
  image = jnp.asarray(distinct_image(9, 9, 1), jnp.bfloat16)
  image = image.at[4, 4].set(jnp.nan)
  f = lambda u: median.median(u, size=3).astype(jnp.float32).sum()
  got = jax.grad(f)(image)
  assert got.dtype == jnp.bfloat16
  # Nine of the results are NaN, the others pass on one each.
  np.testing.assert_allclose(got.astype(jnp.float32).sum(), 81 - 9, rtol=1e-2)


def test_integers_have_no_gradient_and_do_not_disturb_others():
  f = lambda u: u.sum() + median.median(jnp.round(u).astype(jnp.uint8)).sum()
  image = np.full((6, 7, 1), 3.0, np.float32)
  np.testing.assert_array_equal(jax.grad(f)(image), np.ones_like(image))


def test_devices_share_a_batch_without_gathering_it():
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  images = random_image(8, 8, 8, 3)
  images[5, 2, 2] = np.nan
  filtered = functools.partial(median.median, size=3)
  slopes = jax.grad(lambda u: jnp.nansum(filtered(u) ** 2))
  f = jax.jit(lambda u: (filtered(u), slopes(u)))
  want = f(images)
  sharding = NamedSharding(mesh, PartitionSpec("data"))
  shared = jax.device_put(images, sharding)
  got = f(shared)
  for a, b in zip(got, want, strict=True):
    assert a.sharding.is_equivalent_to(sharding, 4)
    np.testing.assert_array_equal(a, b)
  text = f.lower(shared).compile().as_text()
  assert not re.search(r"all-gather|all-to-all|collective-permute", text)


def test_calls_do_not_compile_anew():
  image = random_image(6, 7, 3)
  median.median(image, size=3)
  before = median._median._cache_size()
  median.median(image + 1, size=3)
  assert median._median._cache_size() == before


# Refusals.


@pytest.mark.parametrize(
  ("name", "value"),
  [("size", 0), ("size", 4), ("size", -3), ("border", "nearest")],
)
def test_options_outside_their_range_are_refused(name, value):
  with pytest.raises(ValueError, match=f"^{name} must be .*got"):
    median.median(random_image(2, 4, 4, 3), **{name: value})


def test_wrong_shapes_are_refused_by_name():
  with pytest.raises(TypeError, match="image"):
    median.median(random_image(4, 4))
