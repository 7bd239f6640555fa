import colorsys
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from jaxshape.data import augment
from jaxshape.errors import InputError

KEY = jax.random.key(0)
EVERYTHING = {
  "random_resized_crop": {"size": 12},
  "random_crop": {"padding": 2},
  "horizontal_flip": {},
  "color_jitter": {},
  "grayscale": {},
  "gaussian_blur": {"sigma": (0.1, 1.0)},
  "cutout": {"size": 4},
}


def random_images(*shape, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, shape, dtype=np.uint8)


def keys(n, seed=0):
  return jax.random.split(jax.random.key(seed), n)


def each(name, images, n_keys, **options):
  """One image under many keys."""
  f = functools.partial(getattr(augment, name), **options)
  return np.asarray(jax.vmap(f, (0, None))(keys(n_keys), images))


# Golden.


def test_crop_of_everything_is_the_image():
  image = random_images(9, 11, 3)
  got = augment.random_resized_crop(
    KEY, image, size=(9, 11), scale=(1.0, 1.0), ratio=(11 / 9, 11 / 9)
  )
  np.testing.assert_allclose(got, image, atol=1e-3)


def test_crops_of_a_ramp_have_the_drawn_area_shape_and_place():
  # A ramp tells from its resized part where that was cut.
  y, x = np.mgrid[:60, :80].astype(np.float32)
  ramp = np.stack([y, x, 0 * x], -1)
  got = each("random_resized_crop", ramp, 400, size=5)
  # Between the middles of the second and the fourth cell: 2 / 5 of the part.
  height = (got[:, 3, 2, 0] - got[:, 1, 2, 0]) * 5 / 2
  width = (got[:, 2, 3, 1] - got[:, 2, 1, 1]) * 5 / 2
  area, ratio = height * width / (60 * 80), width / height
  assert area.min() > 0.07
  assert area.max() <= 1.01
  np.testing.assert_allclose(np.quantile(area, 0.25), 0.3, atol=0.06)
  assert ratio.min() > 0.72
  assert ratio.max() < 1.39
  np.testing.assert_allclose(np.median(np.log(ratio)), 0, atol=0.05)
  middle = got[:, 2, 2, :2] + 0.5
  assert (middle[:, 0] - height / 2 > -0.2).all()
  assert (middle[:, 0] + height / 2 < 60.2).all()
  assert (middle[:, 1] + width / 2 < 80.2).all()
  left = np.round(middle[:, 1] - width / 2)
  room = 80 - np.round(width)
  wide = room > 20
  np.testing.assert_allclose((left / room)[wide].mean(), 0.5, atol=0.06)


def test_crop_that_never_fits_is_the_middle():
  x = np.broadcast_to(np.arange(80.0)[:, None], (8, 80, 3))
  image = np.array(x, np.float32)
  got = augment.random_resized_crop(
    KEY, image, size=8, scale=(0.9, 1.0), ratio=(1.0, 1.0)
  )
  np.testing.assert_allclose(got[0, :, 0], np.arange(36, 44), atol=1e-3)


def test_random_crop_shifts_by_all_amounts_alike():
  image = np.arange(1, 26, dtype=np.float32).reshape(5, 5, 1).repeat(3, -1)
  got = each("random_crop", image, 300, padding=1, fill=-1.0)
  middle, counts = np.unique(got[:, 2, 2, 0], return_counts=True)
  np.testing.assert_array_equal(middle, [7, 8, 9, 12, 13, 14, 17, 18, 19])
  assert counts.min() > 15
  first = got[got[:, 2, 2, 0] == 7][0]
  assert (first[0] == -1).all()
  np.testing.assert_array_equal(first[1:, 1:, 0], image[:-1, :-1, 0])


def test_horizontal_flip_mirrors_half():
  image = random_images(4, 5, 3)
  got = each("horizontal_flip", image, 400)
  mirrored = (got == image[:, ::-1]).all((1, 2, 3))
  plain = (got == image).all((1, 2, 3))
  assert (mirrored | plain).all()
  np.testing.assert_allclose(mirrored.mean(), 0.5, atol=0.08)


@pytest.mark.parametrize("turn", [-0.5, -0.2, 0.0, 0.05, 0.4])
def test_hue_equals_colorsys(turn):
  image = random_images(5, 6, 3).astype(np.float32)
  image[0, 0], image[0, 1] = 0, 99

  def by_colorsys(pixel):
    h, s, v = colorsys.rgb_to_hsv(*pixel / 255)
    return 255 * np.array(colorsys.hsv_to_rgb((h + turn) % 1, s, v))

  want = np.apply_along_axis(by_colorsys, -1, image)
  got = augment._shift_hue(jnp.asarray(image), jnp.float32(turn))
  np.testing.assert_allclose(got, want, atol=1e-3)


def test_color_jitter_by_hand():
  image = np.array([[[140, 110, 90], [100, 120, 130]]], np.float32)
  grey = image @ np.array([0.2989, 0.587, 0.114], np.float32)
  none = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}

  def factors(name, plain, other):
    """The f of x <- f x + (1 - f) other, which is the same in all numbers."""
    got = each("color_jitter", image, 200, **{**none, name: 0.3})
    f = (got - other) / (plain - other)
    np.testing.assert_allclose(f, np.broadcast_to(f[..., :1, :1, :1], f.shape),
                               atol=1e-3)  # fmt: skip
    f = f[:, 0, 0, 0]
    assert f.min() > 0.699
    assert f.max() < 1.301
    np.testing.assert_allclose(f.std(), 0.6 / np.sqrt(12), rtol=0.15)

  factors("brightness", image, 0)
  factors("contrast", image, grey.mean())
  factors("saturation", image, grey[..., None])


def test_no_jitter_is_the_image():
  image = random_images(4, 5, 3)
  got = each("color_jitter", image, 5, probability=0.0)
  np.testing.assert_array_equal(got, np.broadcast_to(image, got.shape))


def test_grayscale_takes_the_colour_of_a_fifth():
  image = random_images(4, 5, 3)
  got = each("grayscale", image, 500)
  grey = image @ np.array([0.2989, 0.587, 0.114])
  is_grey = np.abs(got - grey[..., None]).max((1, 2, 3)) < 1e-3
  assert (is_grey | (got == image).all((1, 2, 3))).all()
  np.testing.assert_allclose(is_grey.mean(), 0.2, atol=0.06)


def test_gaussian_blur_equals_scipy():
  image = random_images(9, 10, 3).astype(np.float32)
  got = augment.gaussian_blur(KEY, image, probability=1.0, sigma=(1.5, 1.5))
  want = ndimage.gaussian_filter(image, (1.5, 1.5, 0), mode="mirror")
  np.testing.assert_allclose(got, want, atol=1e-3)


def test_gaussian_blur_spares_half_and_draws_sigma():
  image = random_images(6, 7, 3)
  got = each("gaussian_blur", image, 300, sigma=(0.5, 2.0))
  spared = (got == image).all((1, 2, 3))
  np.testing.assert_allclose(spared.mean(), 0.5, atol=0.09)
  assert np.ptp(got[~spared].std((1, 2, 3))) > 10


def test_cutout_hides_a_box():
  image = np.ones((8, 10, 3), np.float32)
  got = each("cutout", image, 300, size=4, fill=0.0)
  hidden = (got == 0).all(-1)
  np.testing.assert_array_equal(hidden, (got == 0).any(-1))
  assert hidden.sum((1, 2)).max() == 16
  assert hidden.sum((1, 2)).min() == 4  # A corner.
  assert hidden.any(0).all()
  rows, columns = hidden.any(2), hidden.any(1)
  np.testing.assert_array_equal(hidden, rows[:, :, None] & columns[:, None, :])


def constant_images(n):
  return np.broadcast_to(
    np.arange(n, dtype=np.float32)[:, None, None, None], (n, 8, 8, 3)
  )


# Of a uniform share, the border cuts off enough to leave 0.68 on average.
@pytest.mark.parametrize(("name", "kept"), [("mixup", 0.5), ("cutmix", 0.68)])
def test_targets_say_what_the_images_hold(name, kept):
  n = 64
  images, targets = constant_images(n), np.eye(n, dtype=np.float32)
  got, soft = getattr(augment, name)(KEY, images, targets, alpha=1.0)
  # Image i is all i: the mean of a mixed one is the mean under its target.
  np.testing.assert_allclose(
    got.mean((1, 2, 3)), soft @ np.arange(n, dtype=np.float32), atol=1e-3
  )
  np.testing.assert_allclose(soft.sum(-1), 1, rtol=1e-5)
  own = np.diagonal(soft)
  assert np.unique(own.round(3)).size > 12  # Lambda per image.
  np.testing.assert_allclose(own.mean(), kept, atol=0.12)
  np.testing.assert_allclose(soft.sum(0), soft.sum(0).clip(0, 2))


def test_cutmix_pastes_whole_boxes():
  got, _ = augment.cutmix(KEY, constant_images(9), np.eye(9), alpha=1.0)
  for i, image in enumerate(got):
    pasted = np.asarray(image[..., 0]) != i
    box = pasted.any(1)[:, None] & pasted.any(0)
    np.testing.assert_array_equal(pasted, box)


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_nothing_is_mixed_at_probability_zero(name):
  images, targets = constant_images(4), np.eye(4, dtype=np.float32)
  mix = functools.partial(getattr(augment, name), probability=0.0)
  got = mix(KEY, images, targets)
  np.testing.assert_array_equal(got[0], images)
  np.testing.assert_array_equal(got[1], targets)


# Laws.


def test_same_key_same_picture_and_another_key_another():
  batch = {"image": random_images(3, 16, 16, 3)}
  f = augment.make(EVERYTHING)
  a, b, c = f(KEY, batch), f(KEY, batch), f(jax.random.key(1), batch)
  np.testing.assert_array_equal(a["image"], b["image"])
  assert (np.abs(a["image"] - c["image"]).max((1, 2, 3)) > 1).all()


@pytest.mark.parametrize("name", EVERYTHING)
def test_rows_are_the_single_calls_with_their_keys(name):
  images = random_images(4, 16, 16, 3)
  options = EVERYTHING[name]
  got = augment.make({name: options})(KEY, {"image": images})["image"]
  images_key, _ = jax.random.split(KEY)
  for i, key in enumerate(jax.random.split(images_key, 4)):
    step_key = jax.random.split(key, 1)[0]
    want = getattr(augment, name)(step_key, images[i], **options)
    np.testing.assert_allclose(got[i], want, atol=1e-3)


def test_neither_other_images_nor_batch_size_matter():
  images = random_images(6, 16, 16, 3)
  f = augment.make(EVERYTHING)
  want = f(KEY, {"image": images})["image"]
  other = images.copy()
  other[3:] = 255 - other[3:]
  np.testing.assert_array_equal(f(KEY, {"image": other})["image"][:3], want[:3])
  few = f(KEY, {"image": images[:2]})["image"]
  np.testing.assert_allclose(few, want[:2], atol=1e-3)


def test_images_of_a_batch_draw_their_own_parameters():
  images = np.broadcast_to(random_images(16, 16, 3), (5, 16, 16, 3))
  got = augment.make(EVERYTHING)(KEY, {"image": images})["image"]
  for i in range(1, 5):
    assert np.abs(got[i] - got[0]).max() > 1


# make.


def test_empty_config_converts_and_leaves_the_rest():
  batch = {"image": random_images(2, 4, 4, 3), "label": np.array([1, 0])}
  got = augment.make({})(KEY, batch)
  assert got["image"].dtype == jnp.float32
  np.testing.assert_array_equal(got["image"], batch["image"])
  np.testing.assert_array_equal(got["label"], batch["label"])
  assert "target" not in got


def test_steps_act_in_the_order_of_the_config():
  images = random_images(3, 8, 8, 3)
  grey_last = augment.make(
    {"cutout": {"size": 30, "fill": 9.0}, "grayscale": {"probability": 1.0}}
  )
  got = grey_last(KEY, {"image": images})["image"]
  np.testing.assert_allclose(got, 9 * sum(augment._GREY), rtol=1e-5)
  cut_last = augment.make(
    {"grayscale": {"probability": 1.0}, "cutout": {"size": 30, "fill": 9.0}}
  )
  np.testing.assert_array_equal(cut_last(KEY, {"image": images})["image"], 9)


def test_mixing_writes_soft_targets():
  batch = {"image": random_images(4, 8, 8, 3), "label": np.arange(4)}
  mix = augment.make({"mixup": {}, "cutmix": {}}, num_classes=5)
  got = mix(KEY, batch)
  assert got["target"].shape == (4, 5)
  np.testing.assert_allclose(got["target"].sum(-1), 1, rtol=1e-5)
  assert (got["target"][:, 4] == 0).all()
  assert got["target"].max(-1).min() < 0.999
  plain = augment.make({"mixup": {"probability": 0.0}}, num_classes=5)
  np.testing.assert_array_equal(plain(KEY, batch)["target"], np.eye(5)[:4])


# Refusals.


@pytest.mark.parametrize(
  ("config", "message"),
  [
    ({"rotate": {}}, "no 'rotate'; there are: random_resized_crop, .*cutmix"),
    ({"grayscale": {"p": 0.2}}, "no option 'p'; it has: probability"),
    ({"cutout": {}}, "needs the option 'size'"),
    ({"mixup": {}}, "needs num_classes"),
  ],
)
def test_configs_that_do_not_fit_are_refused(config, message):
  with pytest.raises(InputError, match=message):
    augment.make(config)


@pytest.mark.parametrize(
  ("name", "option", "value"),
  [
    ("random_resized_crop", "size", 0),
    ("random_resized_crop", "scale", (0.0, 1.0)),
    ("random_resized_crop", "ratio", (2.0, 1.0)),
    ("random_crop", "padding", -1),
    ("horizontal_flip", "probability", 1.1),
    ("grayscale", "probability", -0.1),
    ("gaussian_blur", "sigma", (0.0, 1.0)),
    ("color_jitter", "contrast", -0.1),
    ("color_jitter", "hue", 0.6),
    ("cutout", "size", (3, 0)),
  ],
)
def test_options_outside_their_range_are_refused(name, option, value):
  options = {**EVERYTHING.get(name, {}), option: value}
  with pytest.raises(ValueError, match=f"^{option} must be .*got"):
    getattr(augment, name)(KEY, random_images(8, 8, 3), **options)


def test_alpha_has_to_be_positive():
  with pytest.raises(ValueError, match="^alpha must be above 0, got 0"):
    augment.mixup(KEY, random_images(2, 4, 4, 3), np.eye(2), alpha=0.0)
