"""What holds for every filter, on images and options that hypothesis draws.

Shapes come from few sizes, since each new one compiles.
"""

import functools
from typing import Any, NamedTuple

from hypothesis import given, settings, strategies
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxshape.errors import InputError
from jaxshape.filters import (
  bilateral,
  blur,
  cartoon,
  diffusion,
  median,
  threshold,
  windows,
)


class Filter(NamedTuple):
  """A filter with its options, and what is known of it."""

  function: Any
  reach: int  # Pixels from one that changes to the last that it changes.
  border: bool = True  # Whether it takes one.
  diamond: bool = (
    False  # Whether it reaches as far along rows and columns only.
  )
  within: bool = True  # Whether results stay between the image's extremes.
  channels: tuple[int, ...] = (1, 3)
  keeps_uint8: bool = False


def made(function, **options):
  return functools.partial(function, **options)


FILTERS = {
  "perona_malik": Filter(
    made(diffusion.perona_malik, iterations=2), 2, border=False, diamond=True
  ),
  "perona_malik rational coupled": Filter(
    made(diffusion.perona_malik, iterations=2, conduction="rational",
         coupled=True),
    2, border=False, diamond=True,
  ),
  "robust": Filter(
    made(diffusion.robust, iterations=2, scale=20.0), 2, border=False,
    diamond=True,
  ),
  "bilateral": Filter(made(bilateral.bilateral, diameter=3), 1),
  "bilateral wide": Filter(made(bilateral.bilateral, diameter=13), 6),
  "bilateral square": Filter(
    made(bilateral.bilateral, diameter=3, window="square", distance="l2"), 1
  ),
  "gaussian": Filter(made(blur.gaussian, sigma=0.7), 3),
  "gaussian wide": Filter(made(blur.gaussian, sigma=9.0, radius=25), 25),
  "box": Filter(made(blur.box, size=3), 1),
  "median": Filter(made(median.median, size=3), 1, keeps_uint8=True),
  "median wide": Filter(made(median.median, size=11), 5, keeps_uint8=True),
  "threshold": Filter(
    made(threshold.adaptive, block_size=3), 1, within=False
  ),
  "cartoon": Filter(
    made(cartoon.cartoon, diameter=3, median_size=3, block_size=3), 2,
    border=False, within=False, channels=(3,),
  ),
}  # fmt: skip

EVERY = pytest.mark.parametrize("name", FILTERS)
CHECK = settings(max_examples=8, deadline=None, derandomize=True, database=None)
SEEDS = strategies.integers(0, 2**32 - 1)
SIZES = strategies.sampled_from([(1, 6), (5, 1), (3, 2), (12, 9)])


@strategies.composite
def images(draw, name, dtype=np.float32, sizes=SIZES):
  channels = draw(strategies.sampled_from(FILTERS[name].channels))
  if "wide" in name:  # What compiles for long does so once.
    sizes = strategies.just((12, 9))
  shape = (*draw(sizes), channels)
  rng = np.random.default_rng(draw(SEEDS))
  return rng.integers(0, 256, shape).astype(dtype)


def border_of(draw, name):
  if not FILTERS[name].border:
    return {}
  return {"border": draw(strategies.sampled_from(windows.BORDERS))}


def drawn(name, **options):
  """A test of an image and a border, run on what hypothesis draws."""

  def decorate(check):
    @CHECK
    @given(strategies.data())
    def run(data):
      image = data.draw(images(name, **options))
      f = made(FILTERS[name].function, **border_of(data.draw, name))
      check(f, image, data)

    return run

  return decorate


@EVERY
def test_shape_type_and_range_are_those_of_the_image(name):
  @drawn(name)
  def check(f, image, data):
    leading = data.draw(strategies.sampled_from([(), (2,)]))
    dtype = data.draw(strategies.sampled_from([jnp.float32, jnp.bfloat16]))
    batch = jnp.broadcast_to(
      jnp.asarray(image, dtype), (*leading, *image.shape)
    )
    got = f(batch)
    assert (got.shape, got.dtype) == (batch.shape, dtype)
    assert jnp.isfinite(got).all()
    whole = f(image.astype(np.uint8))
    assert whole.shape == image.shape
    keeps = FILTERS[name].keeps_uint8
    assert whole.dtype == (jnp.uint8 if keeps else jnp.float32)
    if not FILTERS[name].within or f.keywords.get("border") == "constant":
      return  # Black lines, masks and zeros have values of their own.
    whole = np.asarray(whole)
    assert image.min() - 1e-3 <= whole.min()
    assert whole.max() <= image.max() + 1e-3
    flat = np.full_like(image, image.flat[0]).astype(np.uint8)
    np.testing.assert_allclose(f(flat), flat, rtol=1e-5)

  check()


@EVERY
def test_counting_in_64_bits_changes_nothing(name):
  f = FILTERS[name].function
  shape = (2, 6, 7, max(FILTERS[name].channels))
  image = np.random.default_rng(0).integers(0, 256, shape).astype(np.float32)
  total = lambda x: (f(x) ** 2).sum()
  want = f(image), jax.grad(total)(image)
  with jax.enable_x64(True):
    got = f(image), jax.grad(total)(image)
    assert f(image.astype(np.float64)).dtype == jnp.float64
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-2)


@EVERY
@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 0, 5), (4, 0)])
def test_nothing_gives_nothing(name, shape):
  image = np.zeros((*shape, 3), np.float32)
  assert FILTERS[name].function(image).shape == image.shape


@EVERY
def test_integers_that_do_not_fit_are_refused(name):
  image = np.full((4, 5, 3), 2**33)
  with pytest.raises(InputError, match=f"image must be within.*{2**33}"):
    FILTERS[name].function(image)
  with pytest.raises(InputError, match="image must hold real numbers"):
    FILTERS[name].function(1j * image)


@EVERY
def test_a_mirrored_or_turned_image_gives_the_same_result_so(name):
  @drawn(name)
  def check(f, image, data):
    del data
    want = np.asarray(f(image))
    for turn in (lambda x: np.flip(x, (0, 1)), lambda x: x.swapaxes(0, 1)):
      np.testing.assert_allclose(f(turn(image)), turn(want), atol=2e-3)

  check()


@EVERY
def test_images_of_a_batch_do_not_meet(name):
  @drawn(name)
  def check(f, image, data):
    other = np.random.default_rng(data.draw(SEEDS)).permutation(
      image.ravel()
    ).reshape(image.shape)  # fmt: skip
    both = np.stack([image, other])
    got = f(both)
    np.testing.assert_allclose(got[0], f(image), atol=2e-3)
    np.testing.assert_allclose(jax.vmap(f)(both), got, atol=2e-3)

  check()


@EVERY
def test_wrong_numbers_stay_and_go_no_further_than_the_filter_reaches(name):
  known = FILTERS[name]
  sizes = strategies.sampled_from([(12, 9), (3, 2), (1, 6)])

  @drawn(name, sizes=sizes)
  def check(f, image, data):
    at = [data.draw(strategies.integers(0, n - 1)) for n in image.shape[:2]]
    wrong = data.draw(strategies.sampled_from([np.nan, np.inf, -np.inf]))
    bad = image.copy()
    bad[at[0], at[1]] = wrong
    got = np.asarray(f(bad))
    if np.isnan(wrong) or "median" not in name:
      assert not np.isfinite(got[at[0], at[1]]).any()
    # What a border mirrors or repeats is near the border on the other side.
    if f.keywords.get("border") == "wrap":
      return
    y, x = np.indices(image.shape[:2])
    dy, dx = np.abs(y - at[0]), np.abs(x - at[1])
    away = dy + dx if known.diamond else np.maximum(dy, dx)
    far = away > known.reach
    np.testing.assert_allclose(got[far], np.asarray(f(image))[far], atol=2e-3)

  check()
