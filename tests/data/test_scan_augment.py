import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxshape.data import scan_augment
from jaxshape.errors import InputError

KEY = jax.random.key(0)


def scan(n=64, padding=8):
  rng = np.random.default_rng(1)
  valid = np.arange(n) < n - padding
  points = rng.normal(size=(n, 3)).astype(np.float32) * 10
  return {
    "points": np.where(valid[:, None], points, 0).astype(np.float32),
    "remission": np.where(valid, rng.random(n), 0).astype(np.float32),
    "valid": valid,
    "label": rng.integers(0, 20, n).astype(np.int32),
  }


FUNCTIONS = {
  "random_flip": {"probability": 1.0},
  "random_rotation": {"degrees": 90.0},
  "random_scale": {"scale": (1.5, 2.0)},
  "random_jitter": {"sigma": 0.1, "limit": 0.15, "remission": 0.05},
  "random_drop": {"share": (0.3, 0.3)},
}


def test_flip_is_by_hand():
  x = scan()
  got = scan_augment.random_flip(KEY, x, probability=1.0)
  np.testing.assert_array_equal(got["points"], x["points"] * [1, -1, 1])
  got = scan_augment.random_flip(KEY, x, probability=0.0)
  np.testing.assert_array_equal(got["points"], x["points"])


def test_flips_come_as_often_as_asked():
  x = scan(n=2, padding=0)
  keys = jax.random.split(KEY, 400)
  flip = lambda k: scan_augment.random_flip(k, x, probability=0.3)["points"]
  flipped = np.asarray(jax.vmap(flip)(keys))[:, 0, 1] != x["points"][0, 1]
  assert 0.22 < flipped.mean() < 0.38


def test_rotation_keeps_heights_and_all_distances():
  x = scan()
  got = np.asarray(scan_augment.random_rotation(KEY, x)["points"])
  np.testing.assert_array_equal(got[:, 2], x["points"][:, 2])
  gram = lambda p: p[:, :2] @ p[:, :2].T
  np.testing.assert_allclose(gram(got), gram(x["points"]), atol=2e-3)
  # One angle for all, counter-clockwise if positive, and within the bounds.
  turn = lambda p: np.unwrap(np.arctan2(p[:56, 1], p[:56, 0]))
  for degrees in (5.0, 180.0):
    got = scan_augment.random_rotation(KEY, x, degrees=degrees)["points"]
    angle = turn(np.asarray(got)) - turn(x["points"])
    angle = (angle + np.pi) % (2 * np.pi) - np.pi
    np.testing.assert_allclose(angle, angle[0], atol=1e-4)
    assert 0 < abs(angle[0]) <= np.deg2rad(degrees)


def test_scale_is_one_factor_in_the_range():
  x = scan()
  got = np.asarray(
    scan_augment.random_scale(KEY, x, scale=(1.5, 2.0))["points"]
  )
  factor = got[:56] / x["points"][:56]
  np.testing.assert_allclose(factor, factor[0, 0], rtol=1e-6)
  assert 1.5 <= factor[0, 0] <= 2


def test_jitter_is_normal_and_limited():
  x = scan(n=4000, padding=0)
  got = scan_augment.random_jitter(
    KEY, x, sigma=0.1, limit=0.25, remission=0.02
  )
  moved = np.asarray(got["points"]) - x["points"]
  assert np.abs(moved).max() <= 0.25 + 1e-4
  np.testing.assert_allclose(moved.std(), 0.1, rtol=0.06)
  np.testing.assert_allclose(moved.mean(), 0, atol=0.005)
  changed = np.asarray(got["remission"]) - x["remission"]
  np.testing.assert_allclose(changed.std(), 0.02, rtol=0.1)
  assert np.asarray(got["remission"]).min() >= 0
  still = scan_augment.random_jitter(KEY, x)
  assert still["remission"] is x["remission"]


def test_drop_loses_its_share_and_no_more():
  x = scan(n=4000, padding=1000)
  got = scan_augment.random_drop(KEY, x, share=(0.3, 0.3))
  valid = np.asarray(got["valid"])
  assert not valid[3000:].any()
  np.testing.assert_allclose(valid[:3000].mean(), 0.7, atol=0.03)
  np.testing.assert_array_equal(got["points"], x["points"])
  none = scan_augment.random_drop(KEY, x, share=(0, 0))["valid"]
  np.testing.assert_array_equal(none, x["valid"])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_padding_and_labels_stay(name):
  x = scan()
  x["points"][-3] = np.nan  # Padding of anybody's own.
  got = getattr(scan_augment, name)(KEY, x, **FUNCTIONS[name])
  assert got["label"] is x["label"]
  np.testing.assert_array_equal(got["points"][56:], x["points"][56:])
  np.testing.assert_array_equal(got["remission"][56:], x["remission"][56:])
  for field in ("points", "remission", "valid"):
    assert got[field].dtype == x[field].dtype


def test_make_composes_in_order_under_jit_with_a_key_for_each_scan():
  scans = [scan(), scan(n=64, padding=0)]
  batch = {name: np.stack([s[name] for s in scans]) for name in scans[0]}
  augment = scan_augment.make(FUNCTIONS)
  got = augment(KEY, batch)
  for i, key in enumerate(jax.random.split(KEY, 2)):
    want = scans[i]
    keys = jax.random.split(key, len(FUNCTIONS))
    for (name, options), step in zip(FUNCTIONS.items(), keys, strict=True):
      want = getattr(scan_augment, name)(step, want, **options)
    for field, array in want.items():
      np.testing.assert_allclose(got[field][i], array, rtol=1e-5, atol=1e-5)
  again = augment(KEY, batch)
  np.testing.assert_array_equal(got["points"], again["points"])
  other = augment(jax.random.key(1), batch)
  assert not np.array_equal(got["points"], other["points"])
  plain = scan_augment.make({})(KEY, batch)
  np.testing.assert_array_equal(plain["points"], batch["points"])
  assert isinstance(plain["points"], jnp.ndarray)


@pytest.mark.parametrize(
  ("config", "message"),
  [
    ({"flip": {}}, "has no 'flip'; there are: random_flip"),
    ({"random_flip": {"p": 1}}, "has no option 'p'; it has: probability"),
    ({"random_flip": {"probability": 2}}, "probability must be in 0..1"),
    ({"random_rotation": {"degrees": -1}}, "degrees must be in 0..180"),
    ({"random_scale": {"scale": (0, 1)}}, "scale must be"),
    ({"random_jitter": {"sigma": -1}}, "sigma must be at least 0"),
    ({"random_drop": {"share": (0.5, 1.5)}}, "share must be"),
  ],
)
def test_what_does_not_fit_is_refused_at_once(config, message):
  with pytest.raises(ValueError, match=message) as error:
    scan_augment.make(config)
  known = "must be" in message
  assert isinstance(error.value, InputError) != known
