import functools
import re

import jax
from jax import test_util
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from medpy.filter.smoothing import anisotropic_diffusion
import numpy as np
from PIL import Image
import pytest

from jaxshape.errors import InputError
from jaxshape.filters import batches, diffusion, kernels

OPTIONS = {"exponential": 1, "rational": 2, "tukey": 3}


def random_image(*shape, seed=0):
  rng = np.random.default_rng(seed)
  return rng.uniform(0, 255, shape).astype(np.float32)


def medpy(image, *, iterations=20, kappa=20, step_size=0.1, option=1):
  planes = [
    anisotropic_diffusion(
      image[..., c], iterations, kappa, step_size, option=option
    )
    for c in range(image.shape[-1])
  ]
  return np.stack(planes, -1)


def by_definition(u, kappa, step_size, iterations, bound):
  """Four neighbours of an image extended by its edge, under plain autodiff."""

  def step(u, t):
    wide = jnp.pad(u, [(1, 1), (1, 1), (0, 0)], mode="edge")
    inner = slice(1, -1)
    change = 0
    for i, j in [(0, inner), (2, inner), (inner, 0), (inner, 2)]:
      cut = [slice(k, k + n) if isinstance(k, int) else k
             for k, n in zip((i, j), u.shape, strict=False)]  # fmt: skip
      d = wide[cut[0], cut[1]] - u
      change += jnp.exp(-((d / kappa) ** 2)) * d
    return jnp.where(t < iterations, u + step_size * change, u), None

  return jax.lax.scan(step, u, jnp.arange(bound))[0]


# Golden: MedPy, side by side.


@pytest.mark.parametrize("iterations", [1, 20, 50])
@pytest.mark.parametrize("conduction", OPTIONS)
def test_perona_malik_equals_medpy(conduction, iterations):
  image = random_image(37, 52, 3)
  got = diffusion.perona_malik(
    image, conduction=conduction, iterations=iterations
  )
  want = medpy(image, iterations=iterations, option=OPTIONS[conduction])
  np.testing.assert_allclose(got, want, atol=1e-3)


@pytest.mark.parametrize("conduction", OPTIONS)
def test_perona_malik_equals_medpy_on_a_large_image_under_jit(conduction):
  image = random_image(130, 160, 3)
  filtered = jax.jit(
    functools.partial(diffusion.perona_malik, conduction=conduction)
  )
  want = medpy(image, option=OPTIONS[conduction])
  np.testing.assert_allclose(filtered(image), want, atol=1e-3)


@pytest.mark.parametrize("kappa", [5, 20.0, 50, 100])
def test_perona_malik_equals_medpy_for_every_kappa(kappa):
  image = random_image(37, 52, 3)
  got = diffusion.perona_malik(image, kappa=kappa)
  np.testing.assert_allclose(got, medpy(image, kappa=kappa), atol=1e-3)


@pytest.mark.parametrize("shape", [(1, 9, 3), (9, 1, 3), (1, 1, 1), (8, 5, 1)])
def test_perona_malik_equals_medpy_on_thin_images(shape):
  image = random_image(*shape)
  got = diffusion.perona_malik(image, step_size=0.25)
  np.testing.assert_allclose(got, medpy(image, step_size=0.25), atol=1e-3)


def test_perona_malik_in_groups_equals_medpy(monkeypatch):
  # One device is what most people have: groups of two and a rest of one.
  monkeypatch.setattr(jax, "device_count", lambda: 1)
  monkeypatch.setattr(batches, "GROUP", 2 * 12 * 14 * 3)
  jax.clear_caches()
  images, counts = random_image(5, 12, 14, 3), np.array([20, 0, 7, 3, 25])
  got = diffusion.perona_malik(images, iterations=counts)
  weight = random_image(*images.shape, seed=1)
  loss = lambda u: jnp.vdot(
    weight, diffusion.perona_malik(u, iterations=counts)
  )
  gradient = jax.grad(loss)(images)
  monkeypatch.undo()
  jax.clear_caches()
  for row, image, count in zip(got, images, counts, strict=True):
    np.testing.assert_allclose(row, medpy(image, iterations=count), atol=1e-3)
  np.testing.assert_allclose(gradient, jax.grad(loss)(images), rtol=1e-5)


def test_the_form_for_accelerators_equals_medpy():
  images, counts = random_image(3, 12, 14, 3), np.array([7, 0, 20])
  plan = diffusion._Plan(
    counts.reshape(3, 1, 1), np.full((3, 1, 1), 0.05), np.full((3, 1, 1), 0.1)
  )
  rows = jnp.asarray(images.reshape(3, 12, 14 * 3))
  step = diffusion._CONDUCTIONS["rational"]
  got = diffusion._form(diffusion._forward_by_twos, step, 3)(rows, plan)
  for row, image, count in zip(got, images, counts, strict=True):
    want = medpy(image, iterations=count, option=2)
    np.testing.assert_allclose(row.reshape(12, 14, 3), want, atol=1e-3)


@pytest.mark.parametrize("used", [False, True])
def test_the_kernel_is_reached_on_cuda_where_it_is_asked_for(monkeypatch, used):
  monkeypatch.setattr(jax, "device_count", lambda: 1)
  monkeypatch.setattr(kernels, "USED", used)
  jax.clear_caches()
  image = jax.ShapeDtypeStruct((2, 64, 96, 3), jnp.float32)
  traced = jax.jit(diffusion.perona_malik).trace(image)
  text = traced.lower(lowering_platforms=("cuda",)).as_text()
  assert ("mosaic_gpu" in text) == used
  jax.clear_caches()


def test_short_exponential_is_exact_enough():
  t = np.linspace(0, 30, 100_001).astype(np.float32)
  got, want = diffusion._exp_neg(t), np.exp(-t.astype(np.float64))
  np.testing.assert_allclose(got, want, rtol=3e-6)
  far = diffusion._exp_neg(np.array([100, 1e30, np.inf, np.nan], np.float32))
  assert (far[:3] < 1e-37).all()
  assert np.isnan(far[3])


COUPLED = {
  "exponential": lambda s: np.exp(-s),
  "rational": lambda s: 1 / (1 + s),
  "tukey": lambda s: 0.5 * (1 - np.minimum(s / 2, 1)) ** 2,
}


@pytest.mark.parametrize("conduction", COUPLED)
@pytest.mark.parametrize("shape", [(9, 11, 3), (130, 131, 2), (1, 7, 3)])
def test_coupled_channels_equal_the_definition(conduction, shape):
  image = random_image(*shape)
  got = jax.jit(
    lambda x: diffusion.perona_malik(
      x, kappa=60.0, iterations=10, conduction=conduction, coupled=True
    )
  )(image)
  u = image.astype(np.float64)
  for _ in range(10):
    change = np.zeros_like(u)
    for axis in (0, 1):
      d = np.diff(u, axis=axis)
      s = (d**2).sum(-1, keepdims=True) / 60**2
      flux = np.pad(d * COUPLED[conduction](s), [
        (1, 1) if k == axis else (0, 0) for k in range(3)
      ])  # fmt: skip
      change += np.diff(flux, axis=axis)
    u += 0.1 * change
  np.testing.assert_allclose(got, u, atol=1e-3)


@pytest.mark.parametrize("shape", [(7, 8, 3), (2, 9, 5, 1), (1, 2, 1)])
def test_gradient_scale_equals_numpy(shape):
  image = random_image(*shape)
  for one, got in zip(
    image.reshape(-1, *shape[-3:]),
    np.ravel(diffusion.gradient_scale(image)),
    strict=True,
  ):
    d = np.concatenate([np.diff(one, axis=k).ravel() for k in (0, 1)])
    d = np.concatenate([d, -d])
    want = 1.4826 * np.median(np.abs(d - np.median(d)))
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_robust_equals_medpy_at_the_same_scale():
  image = random_image(20, 21, 3)
  scale = float(diffusion.gradient_scale(image))
  want = medpy(image, kappa=scale * 2.5**0.5, option=3)
  np.testing.assert_allclose(diffusion.robust(image), want, atol=1e-3)
  got = diffusion.robust(image, scale=scale)
  np.testing.assert_allclose(got, want, atol=1e-3)


# Laws.


@pytest.mark.parametrize("conduction", OPTIONS)
def test_constant_image_stays_exactly(conduction):
  image = np.full((6, 7, 3), 123.4, np.float32)
  got = diffusion.perona_malik(image, conduction=conduction, step_size=0.25)
  np.testing.assert_array_equal(got, image)


@pytest.mark.parametrize("conduction", OPTIONS)
def test_mean_and_bounds_of_values_stay(conduction):
  image = random_image(20, 23, 3)
  got = diffusion.perona_malik(
    image, conduction=conduction, step_size=0.25, iterations=50, kappa=60.0
  )
  np.testing.assert_allclose(got.mean((0, 1)), image.mean((0, 1)), rtol=1e-5)
  assert got.min() >= image.min() - 1e-3
  assert got.max() <= image.max() + 1e-3
  assert got.std() < image.std()


def test_texture_goes_and_edges_stay():
  image = np.where(np.arange(40)[:, None] < 20, 60, 180).astype(np.float32)
  noise = np.random.default_rng(0).normal(scale=5, size=(40, 32))
  got = diffusion.perona_malik((image + noise)[..., None])[..., 0]
  assert got[:18].std() < 0.4 * noise[:18].std()
  assert got[20].mean() - got[19].mean() > 115


def test_no_iterations_leave_the_image():
  image = random_image(5, 6, 3)
  got = diffusion.perona_malik(image, iterations=0)
  np.testing.assert_array_equal(got, image)


def test_units_of_image_and_kappa_go_together():
  image = random_image(9, 9, 3)
  want = diffusion.perona_malik(image, kappa=20.0)
  got = 255 * diffusion.perona_malik(image / 255, kappa=20 / 255)
  np.testing.assert_allclose(got, want, atol=1e-3)


def test_options_per_image_are_those_of_single_calls():
  images = random_image(2, 2, 9, 11, 3)
  kappa = np.array([[5, 20], [40, 100]])
  step_size = np.array([0.1, 0.25], np.float32)  # Broadcasts.
  counts = np.array([[0, 3], [20, 41]])
  got = diffusion.perona_malik(
    images, kappa=kappa, step_size=step_size, iterations=counts
  )
  for i, j in np.ndindex(2, 2):
    want = diffusion.perona_malik(
      images[i, j],
      kappa=int(kappa[i, j]),
      step_size=float(step_size[j]),
      iterations=int(counts[i, j]),
    )
    np.testing.assert_allclose(got[i, j], want, atol=1e-4)


def test_one_channel_has_nothing_to_couple():
  image = random_image(9, 8, 1)
  got = diffusion.perona_malik(image, coupled=True)
  want = diffusion.perona_malik(image)
  np.testing.assert_allclose(got, want, atol=1e-4)


def test_an_edge_of_one_channel_holds_back_the_others_when_coupled():
  image = np.zeros((9, 20, 3), np.float32)
  image[:, 10:] = (15, 15, 200)
  alone = diffusion.perona_malik(image, iterations=40)
  coupled = diffusion.perona_malik(image, iterations=40, coupled=True)
  assert np.ptp(alone[0, 9:11, 0]) < 3
  np.testing.assert_allclose(coupled, image, atol=1e-3)


def test_robust_needs_no_unit_and_no_choice():
  image = np.where(np.arange(24)[:, None, None] < 12, 80.0, 120.0)
  noise = np.random.default_rng(0).normal(scale=3, size=(24, 30, 1))
  image = (image + noise).astype(np.float32)
  got = diffusion.robust(image, iterations=200)
  assert got[:10].std() < 0.7
  assert got[12].mean() - got[11].mean() > 38
  scaled = diffusion.robust(image / 255, iterations=200)
  np.testing.assert_allclose(255 * scaled, got, atol=0.05)


def test_robust_does_not_count_what_is_not_finite():
  image = random_image(12, 9, 3)
  want = diffusion.gradient_scale(image[8:])
  image[:8] = np.nan
  np.testing.assert_allclose(diffusion.gradient_scale(image), want, rtol=1e-6)
  got = diffusion.robust(image, iterations=1)
  assert np.isfinite(got[9:]).all()
  assert diffusion.gradient_scale(np.full_like(image, np.nan)) == 0


def test_smallest_kappa_keeps_everything():
  image = random_image(5, 6, 3)
  f = lambda x: diffusion.perona_malik(x, kappa=1e-39)
  np.testing.assert_array_equal(f(image), image)
  slope = jax.grad(lambda x: (f(x) ** 2).sum())(image)
  np.testing.assert_allclose(slope, 2 * image)


def test_robust_leaves_a_flat_image():
  flat = np.full((4, 5, 3), 7.0, np.float32)
  flat[0, 0] = 9
  np.testing.assert_array_equal(diffusion.robust(flat), flat)
  slope = jax.grad(lambda x: (diffusion.robust(x) ** 2).sum())(flat)
  np.testing.assert_allclose(slope, 2 * flat, rtol=1e-6)


def test_own_conduction():
  image = random_image(9, 9, 3)
  got = diffusion.perona_malik(image, conduction=lambda r: 1 / (1 + r * r))
  want = diffusion.perona_malik(image, conduction="rational")
  np.testing.assert_allclose(got, want, atol=1e-4)
  linear = diffusion.perona_malik(image, conduction=jnp.ones_like)
  flat = diffusion.perona_malik(image, kappa=1e9)
  np.testing.assert_allclose(linear, flat, atol=1e-4)


def test_uint8_and_pictures_are_taken_as_they_are():
  image = random_image(7, 9, 3).astype(np.uint8)
  want = diffusion.perona_malik(image.astype(np.float32))
  for given in (image, Image.fromarray(image)):
    got = diffusion.perona_malik(given)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, want)
  grey = Image.fromarray(image[..., 0])
  want = diffusion.perona_malik(np.repeat(image[..., :1], 3, -1))
  np.testing.assert_array_equal(diffusion.perona_malik(grey), want)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_short_floats_are_only_rounded_once(dtype):
  image = jnp.asarray(random_image(9, 9, 3), dtype)
  got = diffusion.perona_malik(image, iterations=50)
  want = diffusion.perona_malik(image.astype(jnp.float32), iterations=50)
  assert got.dtype == dtype
  np.testing.assert_array_equal(got, want.astype(dtype))


def test_nan_spreads_one_pixel_per_iteration():
  image = random_image(9, 9, 1)
  image[4, 4] = np.nan
  bad = np.isnan(diffusion.perona_malik(image, iterations=2))[..., 0]
  away = np.abs(np.arange(9) - 4)
  np.testing.assert_array_equal(bad, away[:, None] + away <= 2)


def test_empty_batch():
  got = diffusion.perona_malik(np.zeros((0, 4, 4, 3), np.uint8))
  assert got.shape == (0, 4, 4, 3)


# Transforms.


def test_vmap_and_jit_agree_with_the_batch():
  images, counts = random_image(4, 9, 11, 3), np.array([0, 2, 9, 4])
  kappa = np.linspace(5, 50, 4).astype(np.float32)
  f = lambda u, k, n: diffusion.perona_malik(u, kappa=k, iterations=n)
  want = f(images, kappa, counts)
  for g in (jax.jit(f), jax.vmap(f), jax.jit(jax.vmap(f))):
    np.testing.assert_allclose(g(images, kappa, counts), want, atol=1e-4)
  twice = jax.vmap(jax.vmap(f, (0, None, 0)), (0, 0, None))
  got = twice(images[:, None].repeat(4, 1), kappa, counts)
  np.testing.assert_allclose(got[[0, 1, 2, 3], [0, 1, 2, 3]], want, atol=1e-4)


def test_values_of_options_do_not_compile_anew():
  image = random_image(6, 7, 3)
  diffusion.perona_malik(image)
  before = diffusion._perona_malik._cache_size()
  diffusion.perona_malik(image, iterations=7, kappa=3.5, step_size=0.2)
  assert diffusion._perona_malik._cache_size() == before


@pytest.mark.parametrize("iterations", [0, 1, 20, 47])
def test_gradients_equal_autodiff_of_the_definition(iterations):
  # Of less contrast: on edges float32 itself is only good to 1e-4 here.
  image, weight = 0.4 * random_image(8, 9, 3), random_image(8, 9, 3, seed=1)

  def loss(u, kappa, step_size, n):
    options = {"kappa": kappa, "step_size": step_size, "iterations": n}
    return jnp.vdot(weight, diffusion.perona_malik(u, **options))

  def slow(u, kappa, step_size, n):
    return jnp.vdot(weight, by_definition(u, kappa, step_size, n, 47))

  at = (image, 30.0, 0.2, iterations)
  got = jax.jit(jax.grad(loss, (0, 1, 2)))(*at)
  want = jax.jit(jax.grad(slow, (0, 1, 2)))(*at)
  scale = np.abs(want[0]).max()
  np.testing.assert_allclose(got[0] / scale, want[0] / scale, atol=1e-5)
  np.testing.assert_allclose(got[1:], want[1:], rtol=2e-4)


@pytest.mark.parametrize("conduction", OPTIONS)
def test_gradients_equal_differences(conduction):
  image = random_image(2, 4, 5, 2) / 255
  counts = np.array([3, 22])
  f = lambda u, k: diffusion.perona_malik(
    u, kappa=k, iterations=counts, conduction=conduction
  )
  kappa = np.array([0.4, 0.9], np.float32)
  test_util.check_grads(f, (image, kappa), 1, ["rev"], atol=2e-2, rtol=2e-2)


def test_gradients_of_coupled_channels_equal_differences():
  image = random_image(2, 4, 5, 3) / 255
  counts = np.array([3, 22])
  f = lambda u, k: diffusion.perona_malik(
    u, kappa=k, iterations=counts, coupled=True
  )
  kappa = np.array([0.6, 1.1], np.float32)
  test_util.check_grads(f, (image, kappa), 1, ["rev"], atol=2e-2, rtol=2e-2)
  own = lambda u: diffusion.perona_malik(
    u, kappa=0.7, conduction=_gaussian, coupled=True
  )
  named = lambda u: diffusion.perona_malik(u, kappa=0.7, coupled=True)
  of = lambda f: jax.grad(lambda u: f(u).var())
  np.testing.assert_allclose(own(image), named(image), atol=1e-5)
  np.testing.assert_allclose(of(own)(image), of(named)(image), atol=1e-5)


def _gaussian(r):
  return jnp.exp(-(r**2))


def test_robust_under_vmap_and_jit_is_that_of_single_images():
  images = random_image(3, 7, 8, 3) * np.array([0.1, 1, 3])[:, None, None, None]
  want = np.stack([diffusion.robust(image) for image in images])
  for f in (diffusion.robust, jax.jit(jax.vmap(diffusion.robust))):
    np.testing.assert_allclose(f(images), want, atol=1e-3)


def test_gradient_under_vmap_is_that_of_the_batch():
  images, counts = random_image(3, 6, 7, 3), np.array([0, 25, 4])
  f = lambda u, n: (diffusion.perona_malik(u, iterations=n) ** 2).sum()
  want = jax.grad(lambda u: f(u, counts))(images)
  got = jax.vmap(jax.grad(f))(images, counts)
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_devices_share_a_batch_without_gathering_it():
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  images, counts = random_image(8, 8, 8, 3), np.arange(8)
  f = lambda u, n: (diffusion.perona_malik(u, iterations=n) ** 2).sum()
  f = jax.jit(jax.value_and_grad(f))
  want = f(images, counts)
  sharding = NamedSharding(mesh, PartitionSpec("data"))
  shared = jax.device_put((images, counts), sharding)
  got = f(*shared)
  assert got[1].sharding.is_equivalent_to(sharding, 4)
  np.testing.assert_allclose(got[1], want[1], rtol=1e-5)
  np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
  text = f.lower(*shared).compile().as_text()
  assert not re.search(r"all-gather|all-to-all|collective-permute", text)


# Refusals and warnings.


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("kappa", 0),
    ("kappa", -2.0),
    ("kappa", np.array([3.0, np.nan])),
    ("step_size", 0.0),
    ("step_size", 0.2501),
    ("iterations", -1),
    ("iterations", np.int64(2**32)),
    ("iterations", np.array([2, -1])),
    ("conduction", "linear"),
  ],
)
def test_options_outside_their_range_are_refused(name, value):
  with pytest.raises(ValueError, match=f"^{name} must be .*got"):
    diffusion.perona_malik(random_image(2, 4, 4, 3), **{name: value})


@pytest.mark.parametrize("scale", [0, -1.0, np.array([2.0, np.nan])])
def test_scales_outside_their_range_are_refused(scale):
  with pytest.raises(ValueError, match=r"^scale must be above 0, got"):
    diffusion.robust(random_image(2, 4, 4, 3), scale=scale)


def test_wrong_shapes_are_refused_by_name():
  with pytest.raises(TypeError, match="image"):
    diffusion.perona_malik(random_image(4, 4))
  with pytest.raises(TypeError, match="iterations"):
    diffusion.perona_malik(random_image(3, 4, 4, 3), iterations=np.arange(2))
  with pytest.raises(TypeError, match="iterations"):
    diffusion.perona_malik(random_image(4, 4, 3), iterations=2.5)


def test_pictures_of_sixteen_bits_are_refused():
  picture = Image.fromarray(np.zeros((4, 4), np.uint16))
  with pytest.raises(InputError, match="np.asarray"):
    diffusion.perona_malik(picture)


def test_unfitting_units_are_warned_of_once(monkeypatch):
  monkeypatch.setattr("jaxshape.images._warned", set())
  image = random_image(4, 4, 3) / 255
  jax.jit(diffusion.perona_malik)(image)  # Traced: nothing is known.
  diffusion.perona_malik(image, kappa=0.1)
  diffusion.perona_malik(np.zeros_like(image))
  diffusion.perona_malik((255 * image).astype(np.uint8) // 255)
  with pytest.warns(UserWarning, match="within 0..1.*kappa=0.0784"):
    diffusion.perona_malik(image)
  diffusion.perona_malik(image)
