import functools
import re

import cv2
import jax
from jax import test_util
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
from PIL import Image
import pytest

from jaxshape.filters import batches, bilateral, windows


def random_image(*shape, seed=0):
  rng = np.random.default_rng(seed)
  return rng.uniform(0, 255, shape).astype(np.float32)


def by_definition(
  image,
  guide=None,
  *,
  diameter=3,
  sigma_color=75.0,
  sigma_space=75.0,
  window="disc",
  distance="l1",
  border="reflect",
):
  """The sums as they stand, offset by offset, under plain autodiff."""
  guide = image if guide is None else guide
  height, width, _ = image.shape
  r = diameter // 2
  mode = border
  wide = lambda a: jnp.pad(a, [(r, r), (r, r), (0, 0)], mode=mode)
  x, g = wide(jnp.asarray(image)), wide(jnp.asarray(guide))
  here = g[r : r + height, r : r + width]
  top, bottom = 0, 0
  for dy in range(-r, r + 1):
    for dx in range(-r, r + 1):
      if window == "disc" and dy * dy + dx * dx > r * r:
        continue
      cut = slice(r + dy, r + dy + height), slice(r + dx, r + dx + width)
      d = g[cut] - here
      # Of the same value without the root, which has no derivative at 0.
      s2 = jnp.abs(d).sum(-1) ** 2 if distance == "l1" else (d**2).sum(-1)
      far = (dy * dy + dx * dx) / (2 * sigma_space**2)
      w = jnp.exp(-s2 / (2 * sigma_color**2) - far)[..., None]
      top, bottom = top + w * x[cut], bottom + w
  return top / bottom


# Golden: OpenCV side by side, and the formula.


def test_bilateral_equals_opencv_on_a_large_image_under_jit():
  image = random_image(130, 160, 3)
  got = jax.jit(bilateral.bilateral)(image)
  want = cv2.bilateralFilter(image, 9, 75, 75)
  np.testing.assert_allclose(got, want, atol=1e-3)


@pytest.mark.parametrize(
  ("diameter", "color", "space", "channels"),
  [(5, 20, 2, 1), (5, 300, 75, 3), (15, 40, 3, 3)],
)
def test_bilateral_equals_opencv(diameter, color, space, channels):
  image = random_image(33, 41, channels)
  got = bilateral.bilateral(
    image, diameter=diameter, sigma_color=color, sigma_space=space
  )
  want = cv2.bilateralFilter(image, diameter, color, space)
  want = want.reshape(image.shape)
  np.testing.assert_allclose(got, want, atol=1e-3)


def test_bilateral_of_uint8_is_opencv_before_rounding():
  image = random_image(33, 41, 3).astype(np.uint8)
  got = bilateral.bilateral(image, diameter=5)
  assert got.dtype == jnp.float32
  want = cv2.bilateralFilter(image, 5, 75, 75)
  np.testing.assert_allclose(got, want, atol=0.501)


@pytest.mark.parametrize("border", windows.BORDERS)
def test_bilateral_equals_its_formula_for_every_border(border):
  image = random_image(9, 11, 3)
  options = {"window": "square", "distance": "l2", "border": border}
  got = bilateral.bilateral(image, diameter=3, **options)
  want = by_definition(image, **options)
  np.testing.assert_allclose(got, want, atol=1e-3)


@pytest.mark.parametrize("shape", [(1, 9, 3), (9, 1, 2), (1, 1, 1), (2, 3, 1)])
def test_bilateral_of_images_smaller_than_the_window(shape):
  image = random_image(*shape)
  got = bilateral.bilateral(image, diameter=7, sigma_space=2.0)
  reflected = np.pad(image, [(3, 3), (3, 3), (0, 0)], mode="reflect")
  want = by_definition(reflected, diameter=7, sigma_space=2.0)
  np.testing.assert_allclose(got, want[3:-3, 3:-3], atol=1e-3)


@pytest.mark.parametrize(
  ("channels", "guides", "distance"), [(1, 3, "l1"), (6, 5, "l2"), (6, 5, "l1")]
)
def test_joint_equals_its_formula(channels, guides, distance):
  image, guide = random_image(9, 11, channels), random_image(9, 11, guides)
  options = {"diameter": 5, "sigma_space": 2.0, "distance": distance}
  got = bilateral.joint(image, guide, **options)
  want = by_definition(image, guide, **options)
  np.testing.assert_allclose(got, want, atol=1e-3)


@pytest.mark.parametrize("unrolled", [0, 81])
def test_form_for_accelerators_equals_opencv(unrolled, monkeypatch):
  monkeypatch.setattr(bilateral, "_UNROLLED", unrolled)
  image = random_image(2, 21, 17, 3)
  form = bilateral._Form(2, True, True, "reflect", 3, 3)
  sigmas = (jnp.full(2, 75.0), jnp.full(2, 75.0))
  run = functools.partial(bilateral._elsewhere, form, False)
  want = [cv2.bilateralFilter(a, 5, 75, 75) for a in image]
  np.testing.assert_allclose(jax.jit(run)(image, sigmas), want, atol=1e-3)


def test_bilateral_in_groups_and_strips_equals_opencv(monkeypatch):
  # One device is what most people have: groups of two and a rest of one, each
  # in strips of seven rows.
  monkeypatch.setattr(jax, "device_count", lambda: 1)
  monkeypatch.setattr(batches, "GROUP", 2 * 20 * 14 * 3)
  monkeypatch.setattr(bilateral, "_STRIP", 20 * 14 // 3)
  jax.clear_caches()
  images = random_image(3, 20, 14, 3)
  got = bilateral.bilateral(images, diameter=5)
  monkeypatch.undo()
  jax.clear_caches()
  want = [cv2.bilateralFilter(image, 5, 75, 75) for image in images]
  np.testing.assert_allclose(got, want, atol=1e-3)


# Laws.


def test_constant_image_stays():
  image = np.full((6, 7, 3), 123.0, np.float32)
  got = bilateral.bilateral(image, diameter=3)
  np.testing.assert_allclose(got, image, rtol=1e-6)


def test_noise_goes_and_edges_stay():
  image = np.where(np.arange(30)[:, None] < 15, 30, 220).astype(np.float32)
  noise = np.random.default_rng(0).normal(scale=5, size=(30, 32))
  got = bilateral.bilateral((image + noise)[..., None], sigma_color=40.0)
  got = np.asarray(got[..., 0])
  assert got[:15].std() < 0.3 * noise[:15].std()
  assert got[15].mean() - got[14].mean() > 185


def test_values_stay_within_those_of_the_window():
  image = random_image(9, 9, 1)
  got = bilateral.bilateral(image, diameter=3, window="square")[..., 0]
  wide = np.pad(image[..., 0], 1, mode="reflect")
  around = np.lib.stride_tricks.sliding_window_view(wide, (3, 3))
  assert (got <= around.max((2, 3)) + 1e-3).all()
  assert (got >= around.min((2, 3)) - 1e-3).all()


def test_window_of_one_pixel_leaves_the_image():
  image = random_image(5, 6, 3)
  got = bilateral.bilateral(image, diameter=1)
  np.testing.assert_array_equal(got, image)


def test_bilateral_is_joint_with_itself():
  image = random_image(9, 11, 3)
  got = bilateral.joint(image, image, diameter=3)
  want = bilateral.bilateral(image, diameter=3)
  np.testing.assert_allclose(got, want, rtol=1e-6)


def test_small_sigmas_leave_the_image():
  image = random_image(7, 8, 3)
  for sigma in (1e-3, 1e-19):
    got = bilateral.bilateral(image, diameter=3, sigma_color=sigma)
    np.testing.assert_array_equal(got, image)


def test_sigmas_per_image_are_those_of_single_calls():
  images = random_image(2, 2, 9, 11, 3)
  color = np.array([[5, 50], [100, 300]])
  space = np.array([1.0, 20], np.float32)  # Broadcasts.
  got = bilateral.bilateral(
    images, diameter=3, sigma_color=color, sigma_space=space
  )
  for i, j in np.ndindex(2, 2):
    want = cv2.bilateralFilter(
      images[i, j], 3, float(color[i, j]), float(space[j])
    )
    np.testing.assert_allclose(got[i, j], want, atol=1e-3)


def test_pictures_are_taken_as_they_are():
  image = random_image(9, 11, 3).astype(np.uint8)
  want = bilateral.bilateral(image.astype(np.float32), diameter=3)
  picture = Image.fromarray(image)
  got = bilateral.bilateral(picture, diameter=3)
  np.testing.assert_array_equal(got, want)
  got = bilateral.joint(picture, picture, diameter=3)
  np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_short_floats_are_only_rounded_once(dtype):
  image = jnp.asarray(random_image(9, 11, 3), dtype)
  got = bilateral.bilateral(image, diameter=3)
  want = bilateral.bilateral(image.astype(jnp.float32), diameter=3)
  assert got.dtype == dtype
  np.testing.assert_array_equal(got, want.astype(dtype))


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("diameter", [5, 13])
def test_wrong_numbers_get_no_further_than_the_window(diameter, wrong):
  image = random_image(33, 41, 3)
  spoilt = image.copy()
  spoilt[20, 18, 1] = wrong
  got = np.asarray(bilateral.bilateral(spoilt, diameter=diameter))
  want = bilateral.bilateral(image, diameter=diameter)
  y, x = np.mgrid[:33, :41]
  away = (y - 20) ** 2 + (x - 18) ** 2 > (diameter // 2) ** 2
  np.testing.assert_allclose(got[away], np.asarray(want)[away], rtol=1e-6)
  assert not np.isfinite(got[20, 18]).all()


def test_empty_batch():
  got = bilateral.bilateral(np.zeros((0, 4, 4, 3), np.uint8))
  assert got.shape == (0, 4, 4, 3)


# Transforms.


def test_vmap_and_jit_agree_with_the_batch():
  images = random_image(3, 9, 11, 3)
  sigma = np.linspace(5, 200, 3).astype(np.float32)
  f = lambda x, s: bilateral.bilateral(x, diameter=3, sigma_color=s)
  want = f(images, sigma)
  for g in (jax.jit(f), jax.vmap(f), jax.jit(jax.vmap(f))):
    np.testing.assert_allclose(g(images, sigma), want, rtol=1e-6)


def test_values_of_options_do_not_compile_anew():
  image = random_image(9, 11, 3)
  bilateral.bilateral(image, diameter=3)
  before = bilateral._average._cache_size()
  bilateral.bilateral(image, diameter=3, sigma_color=3.5, sigma_space=2.0)
  assert bilateral._average._cache_size() == before


@pytest.mark.parametrize(
  ("distance", "border", "own"),
  [("l1", "reflect", False), ("l2", "constant", False), ("l1", "edge", True)],
)
def test_gradients_equal_autodiff_of_the_definition(distance, border, own):
  image, guide = random_image(6, 7, 2), random_image(6, 7, 3, seed=1)
  weight = random_image(6, 7, 2, seed=2)
  options = {"diameter": 3, "distance": distance, "border": border}

  def loss(f, x, g, color, space):
    sigmas = {"sigma_color": color, "sigma_space": space}
    return jnp.vdot(weight, f(x, *([] if own else [g]), **sigmas, **options))

  at = (image, guide, 90.0, 2.0)
  of = lambda f: jax.jit(jax.grad(functools.partial(loss, f), (0, 1, 2, 3)))
  got = of(bilateral.bilateral if own else bilateral.joint)(*at)
  want = of(by_definition)(*at)
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())


def test_gradients_equal_differences():
  image = random_image(2, 4, 5, 2) / 255
  f = lambda x, c, s: bilateral.bilateral(
    x, diameter=3, sigma_color=c, sigma_space=s, distance="l2"
  )
  sigmas = np.array([0.4, 0.9], np.float32), np.array([1, 2], np.float32)
  test_util.check_grads(f, (image, *sigmas), 1, ["rev"], atol=2e-2, rtol=2e-2)


def test_gradient_of_many_channels_and_of_one_pixel():
  # Channels as one array, and no offset at all.
  image = random_image(4, 5, 6)
  loss = lambda f, x, **kwargs: (f(x, **kwargs) ** 2).sum()
  got = jax.grad(functools.partial(loss, bilateral.bilateral, diameter=3))(
    image
  )
  want = jax.grad(functools.partial(loss, by_definition))(image)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-2)
  got = jax.grad(functools.partial(loss, bilateral.bilateral, diameter=1))(
    image
  )
  np.testing.assert_allclose(got, 2 * image, rtol=1e-6)


def test_gradient_holds_no_stack_of_weights():
  image = random_image(64, 64, 3)
  loss = lambda x: (bilateral.bilateral(x) ** 2).sum()
  memory = jax.jit(jax.grad(loss)).lower(image).compile().memory_analysis()
  # The forward pass alone has 24 planes of weights, of the 48.
  assert memory.temp_size_in_bytes < 48 * 4 * 72 * 72 + 20 * 4 * 80 * 80


def test_devices_share_a_batch_without_gathering_it():
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  images = random_image(8, 8, 8, 3)
  f = lambda x: (bilateral.bilateral(x, diameter=3) ** 2).sum()
  f = jax.jit(jax.value_and_grad(f))
  want = f(images)
  sharding = NamedSharding(mesh, PartitionSpec("data"))
  shared = jax.device_put(images, sharding)
  got = f(shared)
  assert got[1].sharding.is_equivalent_to(sharding, 4)
  np.testing.assert_allclose(got[1], want[1], rtol=1e-4, atol=1e-3)
  text = f.lower(shared).compile().as_text()
  assert not re.search(r"all-gather|all-to-all|collective-permute", text)


# Refusals and warnings.


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("diameter", 4),
    ("diameter", -1),
    ("sigma_color", 0),
    ("sigma_color", np.array([3.0, np.nan])),
    ("sigma_space", -2.0),
    ("window", "circle"),
    ("distance", "L2"),
    ("border", "mirror"),
  ],
)
def test_options_outside_their_range_are_refused(name, value):
  image = random_image(2, 4, 4, 3)
  with pytest.raises(ValueError, match=f"^{name} must be .*got"):
    bilateral.bilateral(image, **{name: value})
  with pytest.raises(ValueError, match=f"^{name} must be .*got"):
    bilateral.joint(image, image, **{name: value})


def test_no_diameter_names_the_one_of_opencv():
  image = random_image(9, 9, 1)
  with pytest.raises(
    ValueError, match=r"2 \* round\(1.5 \* sigma_space\) \+ 1"
  ):
    bilateral.bilateral(image, diameter=0)
  got = bilateral.bilateral(
    image, diameter=2 * round(1.5 * 2) + 1, sigma_space=2
  )
  want = cv2.bilateralFilter(image, 0, 75, 2)[..., None]
  np.testing.assert_allclose(got, want, atol=1e-3)


def test_wrong_shapes_are_refused_by_name():
  image = random_image(3, 4, 4, 3)
  with pytest.raises(TypeError, match="image"):
    bilateral.bilateral(image[0, 0])
  with pytest.raises(TypeError, match="sigma_color"):
    bilateral.bilateral(image, sigma_color=np.ones(2))
  with pytest.raises(TypeError, match="guide"):
    bilateral.joint(image, image[:, :3])
  picture = Image.fromarray(np.zeros((4, 5), np.uint8))
  with pytest.raises(ValueError, match="guide must be"):
    bilateral.joint(image[0], picture)


def test_unfitting_units_are_warned_of_once(monkeypatch):
  monkeypatch.setattr("jaxshape.images._warned", set())
  image = random_image(4, 4, 3)
  f = functools.partial(bilateral.bilateral, diameter=3)
  jax.jit(f)(image / 255)  # Traced: nothing is known.
  f(image / 255, sigma_color=0.1)
  with pytest.warns(
    UserWarning, match=r"within 0\.\.1.*sigma_color=0.294"
  ) as w:
    bilateral.joint(image, image / 255, diameter=3)
  assert w[0].filename == __file__
  f(image / 255)


def test_one_guide_serves_several_images():
  rng = np.random.default_rng(0)
  images = rng.uniform(0, 255, (2, 6, 7, 3)).astype(np.float32)
  guide = rng.uniform(0, 255, (6, 7, 1)).astype(np.float32)
  got = bilateral.joint(images, guide, diameter=np.int64(5))
  for row, image in zip(got, images, strict=True):
    want = bilateral.joint(image, guide, diameter=5)
    np.testing.assert_allclose(row, want, atol=1e-3)
  with pytest.raises(ValueError, match="guide must have channels"):
    bilateral.joint(images, guide[..., :0])


def test_smallest_sigmas_have_gradients():
  image = np.arange(36, dtype=np.float32).reshape(4, 3, 3)
  for name in ("sigma_color", "sigma_space"):
    f = lambda x, s, name=name: bilateral.bilateral(x, diameter=3, **{name: s})
    slopes = jax.grad(lambda x, s, f=f: f(x, s).var(), (0, 1))(image, 1e-20)
    assert all(np.isfinite(slope).all() for slope in slopes)
