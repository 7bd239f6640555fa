import cv2
import jax
from jax import test_util
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from jaxshape import images
from jaxshape.errors import InputError
from jaxshape.filters import bilateral, cartoon

# diameter, sigma_color, sigma_space, repeats, levels, median, block, offset
PRESETS = {
  "classic": (9, 75, 75, 1, 0, 5, 9, 9),
  "pyramid": (9, 9, 7, 7, 2, 7, 9, 2),
  "strong": (9, 300, 300, 1, 0, 7, 9, 2),
}
# One that compiles fast.
SMALL = {"diameter": 3, "median_size": 3, "block_size": 3, "offset": 3.0}


def drawing(height, width, *, seed=0):
  """Coloured discs under noise, uint8."""
  rng = np.random.default_rng(seed)
  image = np.full((height, width, 3), 180, np.uint8)
  for _ in range(12):
    middle = tuple(int(n) for n in rng.uniform(0, (width, height)))
    radius = int(rng.uniform(0.05, 0.25) * height) + 1
    cv2.circle(image, middle, radius, rng.uniform(0, 255, 3).tolist(), -1)
  return np.clip(image + rng.normal(0, 12, image.shape), 0, 255).astype(
    np.uint8
  )


def opencv(image, diameter, color, space, repeats, levels, median, *threshold):
  colors, sizes = image, []
  for _ in range(levels):
    sizes.append(colors.shape[1::-1])
    colors = cv2.pyrDown(colors)
  for _ in range(repeats):
    colors = cv2.bilateralFilter(colors, diameter, color, space)
  for size in reversed(sizes):
    colors = cv2.pyrUp(colors, dstsize=size)
  gray = cv2.medianBlur(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), median)
  edges = cv2.adaptiveThreshold(
    gray, 255, cv2.ADAPTIVE_THRESH_MEAN_C, cv2.THRESH_BINARY, *threshold
  )
  return cv2.bitwise_and(colors, colors, mask=edges), edges


# Golden: OpenCV, side by side.


@pytest.mark.parametrize("preset", PRESETS)
def test_cartoon_of_uint8_is_that_of_opencv(preset):
  image = drawing(130, 151)
  got = cartoon.cartoon(image, preset=preset)
  assert got.dtype == jnp.float32
  want, edges = opencv(image, *PRESETS[preset])
  assert 0.01 < (edges == 0).mean() < 0.5
  np.testing.assert_array_equal(np.asarray(got)[edges == 0], 0)
  # OpenCV's table of exp may round a tie the other way.
  off = np.abs(np.asarray(got) - want)
  assert off.max() <= 1
  assert (off > 0).mean() < 2e-4


def test_options_replace_those_of_the_preset():
  image = drawing(40, 43)
  got = cartoon.cartoon(
    image, diameter=5, sigma_color=20, sigma_space=3, repeats=2, levels=1,
    median_size=3, block_size=5, offset=4,
  )  # fmt: skip
  want, edges = opencv(image, 5, 20, 3, 2, 1, 3, 5, 4)
  assert 0.01 < (edges == 0).mean() < 0.5
  np.testing.assert_allclose(got, want, atol=1)
  np.testing.assert_array_equal(np.asarray(got)[edges == 0], 0)


# Laws.


def test_without_lines_the_colors_stay_those_of_the_bilateral_filter():
  image = drawing(14, 15).astype(np.float32)
  got = cartoon.cartoon(image, **SMALL | {"offset": 500.0})
  want = bilateral.bilateral(image, diameter=3, sigma_color=75, sigma_space=75)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  same = cartoon.cartoon(image, **SMALL | {"offset": 500.0, "repeats": 0})
  np.testing.assert_array_equal(same, image)


def test_floats_are_not_rounded():
  image = drawing(14, 15)
  whole = np.asarray(cartoon.cartoon(image, **SMALL))
  got = np.asarray(cartoon.cartoon(image.astype(np.float32), **SMALL))
  np.testing.assert_array_equal(whole, np.round(whole))
  assert (got != np.round(got)).mean() > 0.5
  lines = (got == 0) | (whole == 0)  # They may differ where a mean is rounded.
  assert 0.05 < lines.mean() < 0.6
  np.testing.assert_allclose(got[~lines], whole[~lines], atol=0.501)


def test_units_of_image_and_options_go_together():
  image = drawing(14, 15).astype(np.float32)
  want = cartoon.cartoon(image, **SMALL)
  unit = SMALL | {"offset": 3 / 256, "sigma_color": 75 / 256}
  got = 256 * cartoon.cartoon(image / 256, **unit)
  np.testing.assert_allclose(got, want, atol=1e-3)


def test_options_per_image_are_those_of_single_calls():
  batch = np.stack([drawing(14, 15), drawing(14, 15, seed=1)])
  options = {
    "sigma_color": np.array([10.0, 90.0]),
    "sigma_space": np.array([9.0, 2.0]),
    "offset": np.array([0.0, 6.0]),
  }
  sizes = {k: v for k, v in SMALL.items() if k != "offset"}
  got = cartoon.cartoon(batch, **options, **sizes)
  for i in range(2):
    one = {k: float(v[i]) for k, v in options.items()}
    want = cartoon.cartoon(batch[i], **one, **sizes)
    np.testing.assert_array_equal(got[i], want)


def test_types_and_pictures():
  image = drawing(14, 15)
  picture = cartoon.cartoon(Image.fromarray(image), **SMALL)
  np.testing.assert_array_equal(picture, cartoon.cartoon(image, **SMALL))
  for dtype in (jnp.bfloat16, jnp.float16):
    short = jnp.asarray(image, dtype)
    got = cartoon.cartoon(short, **SMALL)
    want = cartoon.cartoon(short.astype(jnp.float32), **SMALL).astype(dtype)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_wrong_numbers_stay_within_the_windows(wrong):
  image = drawing(14, 15).astype(np.float32)
  want = np.asarray(cartoon.cartoon(image, **SMALL))
  image[6, 7] = wrong
  got = np.asarray(cartoon.cartoon(image, **SMALL))
  assert not np.isfinite(got[6, 7]).any()
  near = np.zeros(image.shape, bool)
  near[4:9, 5:10] = True  # Median and mean reach one pixel each.
  np.testing.assert_array_equal(got[~near], want[~near])
  assert np.isfinite(got[~near]).all()


def test_empty_batch():
  got = cartoon.cartoon(np.zeros((0, 4, 5, 3), np.uint8), preset="pyramid")
  assert got.shape == (0, 4, 5, 3)


def test_one_pixel():
  image = np.full((1, 1, 3), 77, np.uint8)
  got = cartoon.cartoon(image, levels=2, repeats=2, **SMALL)
  np.testing.assert_array_equal(got, image)


# Transforms.


def test_vmap_and_jit_agree_with_the_batch():
  batch = np.stack([drawing(14, 15), drawing(14, 15, seed=1)])
  offset = np.array([0.0, 6.0], np.float32)
  sizes = {k: v for k, v in SMALL.items() if k != "offset"}
  f = lambda x, c: cartoon.cartoon(x, offset=c, **sizes)
  want = f(batch, offset)
  for g in (jax.jit(f), jax.vmap(f)):
    np.testing.assert_array_equal(g(batch, offset), want)


def test_values_of_options_do_not_compile_anew():
  image = drawing(14, 15)
  cartoon.cartoon(image, **SMALL)
  before = cartoon._cartoon._cache_size()
  cartoon.cartoon(image, **SMALL | {"offset": 4.5, "sigma_color": 3.0})
  assert cartoon._cartoon._cache_size() == before


def test_gradients_flow_through_the_colors_only():
  image = drawing(6, 7).astype(np.float32) / 256
  options = SMALL | {"sigma_color": 0.3, "sigma_space": 2.0, "levels": 1}
  f = lambda x, c: cartoon.cartoon(x, repeats=2, **options | {"offset": c})
  at = (image, np.float32(0.02))
  out, pull = jax.vjp(f, *at)
  drawn = np.asarray(out == 0)
  assert 0 < drawn.mean() < 0.7
  test_util.check_grads(f, at, 1, ["rev"], atol=2e-2, rtol=2e-2)
  by_image, by_offset = pull(drawn.astype(np.float32))
  np.testing.assert_array_equal(by_image, np.zeros_like(image))
  assert by_offset == 0
  assert np.abs(pull(np.ones_like(image))[0]).max() > 0.1


# Refusals.


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("preset", "tutorial"),
    ("diameter", 0),
    ("sigma_color", 0.0),
    ("sigma_space", np.array([3.0, np.nan])),
    ("repeats", -1),
    ("levels", -1),
    ("median_size", 4),
    ("block_size", 1),
    ("offset", np.inf),
  ],
)
def test_options_outside_their_range_are_refused(name, value):
  image = np.zeros((2, 6, 6, 3), np.uint8)
  with pytest.raises(ValueError, match=f"^{name} must be .*got"):
    cartoon.cartoon(image, **{name: value})


def test_wrong_shapes_are_refused_by_name():
  with pytest.raises(TypeError, match="image"):
    cartoon.cartoon(np.zeros((6, 6, 1), np.uint8))
  with pytest.raises(TypeError, match="offset"):
    cartoon.cartoon(np.zeros((3, 6, 6, 3), np.uint8), offset=np.zeros(2))
  with pytest.raises(InputError, match="np.asarray"):
    cartoon.cartoon(Image.fromarray(np.zeros((4, 4), np.uint16)))


def test_unfitting_units_are_warned_of(monkeypatch):
  monkeypatch.setattr(images, "_warned", set())
  image = drawing(14, 15).astype(np.float32) / 256
  with pytest.warns(UserWarning, match="within 0..1.*sigma_color"):
    cartoon.cartoon(image, **SMALL)
