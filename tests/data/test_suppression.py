import functools

import jax
import numpy as np
import pytest

from jaxshape.data import augment, suppression
from jaxshape.filters import (
  bilateral,
  blur,
  cartoon,
  diffusion,
  median,
  stylization,
)

KEY = jax.random.key(0)


def random_images(*shape, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, shape, dtype=np.uint8)


def keys(n):
  return jax.random.split(KEY, n)


def parts(images, **options):
  """Which filter each image got, by comparison with each filter's result."""
  got = suppression.random_suppression(KEY, images, **options)
  x = np.float32(images)
  done = {
    "nothing": x,
    "perona_malik": diffusion.perona_malik(x, iterations=4),
    "robust": diffusion.robust(x, iterations=4),
    "gaussian": blur.gaussian(x, sigma=0.8, radius=3),
    "bilateral": bilateral.bilateral(x, sigma_color=60.0),
    "median": median.median(x, size=3),
    "cartoon": cartoon.cartoon(x),
    "stylized": stylization.match_statistics(x, np.roll(x, 1, 0)),
  }
  far = np.stack([np.abs(got - d).max((1, 2, 3)) for d in done.values()])
  assert (far.min(0) < 1e-3).all()
  return np.array(list(done))[far.argmin(0)]


FIXED = {
  "iterations": (4, 4),
  "sigma": (0.8, 0.8),
  "sigma_color": (60.0, 60.0),
  "size": 3,
}


def test_each_image_gets_one_filter_as_often_as_asked():
  images = random_images(400, 6, 7, 3)
  shares = {
    "perona_malik": 0.1,
    "stylized": 0.1,
    "robust": 0.1,
    "gaussian": 0.15,
    "bilateral": 0.1,
    "median": 0.2,
    "cartoon": 0.1,
  }
  names = parts(images, probabilities=shares, **FIXED)
  for name, share in {**shares, "nothing": 0.15}.items():
    noise = np.sqrt(share * (1 - share) / 400)
    assert abs((names == name).mean() - share) < 4 * noise, name


def test_probabilities_may_differ_between_images():
  images = random_images(6, 5, 6, 3)
  on = np.array([1, 0, 0, 1, 0, 0])
  shares = {"gaussian": on, "median": np.roll(on, 1)}
  names = parts(images, probabilities=shares, **FIXED)
  want = ["gaussian", "median", "nothing"] * 2
  np.testing.assert_array_equal(names, want)


def test_strength_is_drawn_per_image_within_its_range():
  image = random_images(6, 7, 3)
  f = functools.partial(
    suppression.random_suppression, probabilities={"perona_malik": 1.0}
  )
  got = f(KEY, np.stack([image] * 60), iterations=(2, 4))
  want = [
    diffusion.perona_malik(np.float32(image), iterations=n) for n in (2, 3, 4)
  ]
  far = np.stack([np.abs(got - w).max((1, 2, 3)) for w in want])
  assert (far.min(0) < 1e-3).all()
  assert set(far.argmin(0)) == {0, 1, 2}


@pytest.mark.parametrize("name", suppression.POLICIES)
def test_settings_of_the_paper_filter_their_share(name):
  images = random_images(64, 5, 6, 3)
  options = {**suppression.POLICIES[name], "sigma": (0.5, 1.0)}
  got = suppression.random_suppression(KEY, images, **options)
  share = (np.abs(got - images).max((1, 2, 3)) > 0.1).mean()
  want = sum(options["probabilities"].values())
  assert abs(share - want) < 0.22
  again = jax.jit(
    functools.partial(suppression.random_suppression, **options)
  )(KEY, images)  # fmt: skip
  np.testing.assert_allclose(again, got, atol=1e-3)


def test_suppression_under_vmap_draws_from_each_images_key():
  images = random_images(40, 5, 6, 3)
  f = functools.partial(suppression.random_suppression, sigma=(0.5, 1.0))
  got = jax.vmap(f)(keys(40), images)
  for i in (0, 7, 21):
    want = f(keys(40)[i], images[i])
    np.testing.assert_allclose(got[i], want, atol=1e-3)
  changed = np.abs(got - images).max((1, 2, 3)) > 0.1
  assert 0.5 < changed.mean() < 0.95


def test_gradients_flow_through_what_was_drawn():
  images = random_images(3, 4, 5, 3)
  shares = {"perona_malik": [1, 0, 0], "gaussian": [0, 1, 0]}
  shares = {name: np.array(share) for name, share in shares.items()}
  f = lambda x: (
    suppression.random_suppression(KEY, x, probabilities=shares, **FIXED) ** 2
  ).sum()
  got = jax.grad(f)(np.float32(images))
  np.testing.assert_allclose(got[2], 2 * np.float32(images[2]), rtol=1e-6)
  x = np.float32(images[1])
  want = jax.grad(lambda x: (blur.gaussian(x, sigma=0.8, radius=3) ** 2).sum())(
    x
  )
  np.testing.assert_allclose(got[1], want, rtol=1e-4)


@pytest.mark.parametrize(
  ("shares", "message"),
  [
    ({"blur": 0.5}, "probabilities must name filters of .*'blur'"),
    ({"median": 1.5}, "probabilities must be in 0..1, got 1.5"),
    ({"median": 0.7, "robust": 0.7}, "must add up to at most 1"),
    ({"median": np.array([0.7, 0.2]), "robust": 0.4}, "add up to at most 1"),
  ],
)
def test_wrong_probabilities_are_refused(shares, message):
  with pytest.raises(ValueError, match=message):
    suppression.random_suppression(
      KEY, random_images(2, 4, 4, 3), probabilities=shares
    )


def test_styles_are_given_or_those_of_other_images():
  images = random_images(3, 8, 9, 3)
  f = functools.partial(
    suppression.random_suppression, probabilities={"stylized": 1.0}
  )
  style = random_images(5, 6, 3, seed=1)
  got = f(KEY, images, style=style)
  want = stylization.match_statistics(np.float32(images), style)
  np.testing.assert_allclose(got, want, atol=1e-3)
  with pytest.raises(ValueError, match="style must be given"):
    f(KEY, images[0])


def test_one_number_is_a_range():
  images = random_images(2, 6, 7, 3)
  f = functools.partial(
    suppression.random_suppression, probabilities={"perona_malik": 1.0}
  )
  got = f(KEY, images, iterations=np.int64(5))
  want = f(KEY, images, iterations=(5, 5))
  np.testing.assert_array_equal(got, want)


def test_it_is_one_of_the_augmentations():
  images = random_images(4, 6, 7, 3)
  options = {"probabilities": {"median": 1.0}, "size": 3}
  got = augment.make({"random_suppression": options})(KEY, {"image": images})
  want = median.median(np.float32(images), size=3)
  np.testing.assert_array_equal(got["image"], want)


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("iterations", (3, 2)),
    ("iterations", (1, 2, 3)),
    ("sigma", (-1.0, 2.0)),
    ("sigma", (0.1, np.inf)),
    ("sigma_color", (0, 1)),
    ("sigma_color", 0),
  ],
)
def test_wrong_ranges_are_refused(name, value):
  with pytest.raises(ValueError, match=rf"^{name} must be \(low, high\)"):
    suppression.random_suppression(KEY, random_images(4, 4, 3), **{name: value})
