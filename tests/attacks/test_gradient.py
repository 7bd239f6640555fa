import functools

import jax
import jax.numpy as jnp
from jaxtyping import TypeCheckError
import numpy as np
import pytest

from jaxshape.attacks import gradient
from jaxshape.errors import InputError
from jaxshape.losses import classification

MEAN, STD = np.array([120.0, 115.0, 105.0]), np.array([58.0, 57.0, 60.0])
DRAW = np.random.default_rng(0)
KERNEL = DRAW.normal(size=(3, 3, 3, 4)) * 0.4
LINEAR = DRAW.normal(size=(3 * 3 * 4, 5)) * 0.5
IMAGES = DRAW.uniform(0, 255, (6, 8, 8, 3)).astype(np.float32)
IMAGES[0, :4], IMAGES[1, :4] = 0, 255  # Where the range is what holds.
LABELS = np.array([0, 1, 2, 3, 4, 2])
START = DRAW.uniform(-1, 1, IMAGES.shape).astype(np.float32)
KEY = jax.random.key(0)
# As for users; tests compile with less.
FULLY = {
  "xla_backend_optimization_level": 3,
  "xla_llvm_disable_expensive_passes": False,
}


def _logits(x):
  """softplus(conv3x3((x / 255 - mean) / std)), pooled by 2, linear."""
  x = (x - MEAN.astype(np.float32)) / STD.astype(np.float32)
  kernel = KERNEL.astype(np.float32)
  layout = ("NHWC", "HWIO", "NHWC")
  x = jax.lax.conv_general_dilated(
    x, kernel, (1, 1), "VALID", dimension_numbers=layout
  )
  x = jax.nn.softplus(x).reshape(-1, 3, 2, 3, 2, 4).mean((2, 4))
  return x.reshape(len(x), -1) @ LINEAR.astype(np.float32)


def _slope(x, label):
  """The gradient of the cross-entropy by hand, in float64, of one image."""
  scaled = (x - MEAN) / STD
  rows = np.zeros((6, 6, 4))
  for i, j in np.ndindex(3, 3):
    rows += scaled[i : i + 6, j : j + 6] @ KERNEL[i, j]
  pooled = np.logaddexp(0, rows).reshape(3, 2, 3, 2, 4).mean((1, 3))
  logits = pooled.ravel() @ LINEAR
  p = np.exp(logits - logits.max())
  back = LINEAR @ (p / p.sum() - np.eye(5)[label])
  back = back.reshape(3, 3, 4).repeat(2, axis=0).repeat(2, axis=1) / 4
  back = back / (1 + np.exp(-rows))
  out = np.zeros((8, 8, 3))
  for i, j in np.ndindex(3, 3):
    out[i : i + 6, j : j + 6] += back @ KERNEL[i, j].T
  return out / STD


def _transcribed(epsilon, alpha, steps, *, decay=None, start=None, sign=1):
  out = []
  for n, image in enumerate(IMAGES.astype(np.float64)):
    x, g = image.copy(), 0.0
    if start is not None:
      x = np.clip(x + epsilon * start[n], 0, 255)
    for _ in range(steps):
      slope = sign * _slope(x, LABELS[n])
      if decay is not None:
        slope = g = decay * g + slope / np.abs(slope).sum()
      x = np.clip(x + alpha * np.sign(slope), image - epsilon, image + epsilon)
      x = np.clip(x, 0, 255)
    out.append(x)
  return np.stack(out)


def _fgsm(x, y, epsilon, **options):
  return gradient.fgsm(_logits, x, y, epsilon=epsilon, **options)


def _iterative(x, y, epsilon, **options):
  return gradient.iterative_fgsm(_logits, x, y, epsilon=epsilon, **options)


def _momentum(x, y, epsilon, **options):
  return gradient.momentum_fgsm(_logits, x, y, epsilon=epsilon, **options)


def _pgd(x, y, epsilon, **options):
  return gradient.pgd(KEY, _logits, x, y, epsilon=epsilon, **options)


ALL = (_fgsm, _iterative, _momentum, _pgd)


@functools.cache
def _compiled(attack, **options):
  attack = functools.partial(attack, **options)
  return jax.jit(attack, compiler_options=FULLY)


# The program is one for all epsilons, and so is the test.
@pytest.mark.parametrize(
  ("attack", "parts", "steps", "decay", "start", "targeted"),
  [
    (_fgsm, 1, 1, None, None, False),
    (_iterative, 10, 10, None, None, False),
    (_momentum, 5, 5, 1.0, None, False),
    (_momentum, 5, 5, 1.0, None, True),
    (_pgd, 4, 10, None, START, False),
    (_pgd, 4, 10, None, START, True),
  ],
)
def test_attacks_transcribed(attack, parts, steps, decay, start, targeted):
  run = _compiled(attack, targeted=targeted)
  if start is not None:
    run = jax.jit(
      lambda x, y, e: attack(x, y, e, start=e * start, targeted=targeted)
    )
  for epsilon in (0.2, 2.0, 16.0):
    want = _transcribed(
      epsilon,
      epsilon / parts,
      steps,
      decay=decay,
      start=start,
      sign=-1 if targeted else 1,
    )
    got = run(IMAGES, LABELS, epsilon)
    assert np.abs(want - IMAGES).max() > 0.99 * epsilon
    np.testing.assert_allclose(got, want, atol=5e-5)


def test_steps_transcribed():
  run = _compiled(_iterative, step_size=1, iterations=10)
  want, got = _transcribed(8, 1, 10), run(IMAGES, LABELS, 8)
  np.testing.assert_allclose(got, want, atol=5e-5)
  run = _compiled(_momentum, step_size=0.8, iterations=6, decay=0.5)
  want, got = _transcribed(8, 0.8, 6, decay=0.5), run(IMAGES, LABELS, 8)
  np.testing.assert_allclose(got, want, atol=5e-5)
  run = _compiled(_pgd, iterations=12, random_start=False)
  want, got = _transcribed(8, 2, 12), run(IMAGES, LABELS, 8)
  np.testing.assert_allclose(got, want, atol=5e-5)


def test_fgsm_by_hand():
  # L = log(1 + exp(s)), s = 2 x_1 - 3 x_2 + 0 x_3, rises with s.
  weights = np.float32([2, -3, 0])
  logits_fn = lambda x: jnp.stack([jnp.zeros(len(x)), x[:, 0, 0] @ weights], -1)
  image = np.float32([10, 20, 30]).reshape(1, 1, 1, 3)
  got = gradient.fgsm(logits_fn, image, np.array([0]), epsilon=4)
  np.testing.assert_array_equal(got.ravel(), [14, 16, 30])
  got = gradient.fgsm(logits_fn, image, np.array([0]), epsilon=4, targeted=True)
  np.testing.assert_array_equal(got.ravel(), [6, 24, 30])


@pytest.mark.parametrize("attack", ALL)
def test_attacks_stay_in_their_ball_and_range(attack):
  run = _compiled(attack)
  draw = np.random.default_rng(1)
  for trial in range(25):
    # Sums that are rounded up and down, and values far smaller than epsilon.
    x = draw.uniform(0, 255, IMAGES.shape) * draw.choice(
      [1, 1e-3, 1e-7, 0], IMAGES.shape
    )
    x = np.float32(255 - x if trial % 2 else x)
    x = np.clip(x, 0, 255)
    epsilon = np.float32(draw.choice([0, 0.1, 0.3, 1, 7.7, 16, 200, 255]))
    got = np.asarray(run(x, LABELS, float(epsilon)))
    assert got.dtype == np.float32
    assert got.min() >= 0
    assert got.max() <= 255
    change = np.abs(np.float64(got) - np.float64(x)).max()
    assert change <= np.float64(epsilon)
    assert change >= 0.9 * epsilon


def test_other_ranges_and_units():
  for low, high in ((0.0, 1.0), (-2.0, 3.0)):
    width = high - low
    logits_fn = lambda x, low=low, width=width: _logits((x - low) / width * 255)
    x = low + IMAGES / 255 * width
    got = gradient.fgsm(
      logits_fn, x, LABELS, epsilon=8 / 255 * width, low=low, high=high
    )
    got = (np.asarray(got) - low) / width * 255
    np.testing.assert_allclose(got, _fgsm(IMAGES, LABELS, 8.0), atol=1e-3)


@pytest.mark.parametrize("attack", [_fgsm, _momentum])
def test_the_loss_rises_and_targeted_it_falls(attack):
  loss = lambda x: classification.cross_entropy(_logits(x), LABELS)
  before = loss(IMAGES)
  away = _compiled(attack)(IMAGES, LABELS, 4.0)
  assert np.all(loss(away) > before)
  towards = _compiled(attack, targeted=True)(IMAGES, LABELS, 4.0)
  assert np.all(loss(towards) < before)


def test_attacks_are_special_cases_of_each_other():
  want = _fgsm(IMAGES, LABELS, 8)
  got = _iterative(IMAGES, LABELS, 8, iterations=1)
  np.testing.assert_array_equal(got, want)
  want = _iterative(IMAGES, LABELS, 8, iterations=3)
  got = _momentum(IMAGES, LABELS, 8, iterations=3, decay=0)
  np.testing.assert_array_equal(got, want)
  got = _pgd(
    IMAGES, LABELS, 8, step_size=8 / 3, iterations=3, random_start=False
  )
  np.testing.assert_allclose(got, want, atol=1e-4)
  still = gradient.sign_ascent(
    _logits, IMAGES, LABELS, epsilon=8, step_size=1, iterations=0
  )
  np.testing.assert_array_equal(still, IMAGES)


def test_random_starts_follow_the_key_and_fill_the_ball():
  stay = {"epsilon": 8, "step_size": 0, "iterations": 1}
  make = lambda n: np.asarray(
    gradient.pgd(
      jax.random.key(n), _logits, np.full_like(IMAGES, 99), LABELS, **stay
    )
  )
  first = make(1)
  np.testing.assert_array_equal(first, make(1))
  assert (first != make(2)).mean() > 0.99
  change = first - 99
  assert 7.9 < np.abs(change).max() <= 8
  np.testing.assert_allclose(change.mean(), 0, atol=0.5)
  np.testing.assert_allclose(change.std(), 8 / np.sqrt(3), rtol=0.05)


@pytest.mark.parametrize("attack", [_momentum, _pgd])
def test_compiled_eager_batched_and_alone_agree(attack):
  start = {"start": 3 * START} if attack is _pgd else {}
  epsilons = np.float32([1, 2, 3, 5, 8, 13])
  want = np.asarray(attack(IMAGES, LABELS, epsilons, **start))
  change = np.abs(want - IMAGES).max((1, 2, 3))
  np.testing.assert_allclose(change, epsilons, rtol=1e-5)
  # Unless the images influence each other.
  one = lambda x, y, e, u: attack(x, y, e, **({"start": u} if start else {}))
  got = one(IMAGES[3], int(LABELS[3]), float(epsilons[3]), 3 * START[3])
  np.testing.assert_allclose(got, want[3], atol=1e-4)
  got = jax.jit(jax.vmap(one))(IMAGES, LABELS, epsilons, 3 * START)
  np.testing.assert_allclose(got, want, atol=1e-4)
  split = lambda a: np.reshape(a, (2, 3, *a.shape[1:]))
  got = one(split(IMAGES), split(LABELS), split(epsilons), split(3 * START))
  np.testing.assert_allclose(got, split(want), atol=1e-4)


def test_bytes_and_half_floats_are_computed_in_float32():
  x = IMAGES.astype(np.uint8)
  want = np.asarray(_iterative(np.float32(x), LABELS, 0.2))
  got = _iterative(x, LABELS, 0.2)
  assert got.dtype == np.float32
  np.testing.assert_array_equal(got, want)
  np.testing.assert_array_equal(_iterative(x, np.uint8(LABELS), 0.2), want)
  x = jnp.asarray(IMAGES, jnp.bfloat16)
  got = _fgsm(x, LABELS, 0.2)
  assert got.dtype == np.float32
  assert np.abs(got - np.float32(x)).max() <= np.float32(0.2)


def test_without_a_gradient_nothing_moves():
  flat = lambda x: jnp.zeros((len(x), 5)) + 0 * x.sum()
  for attack in (gradient.fgsm, gradient.momentum_fgsm):
    got = attack(flat, IMAGES, LABELS, epsilon=8)
    np.testing.assert_array_equal(got, IMAGES)
  # Of two images the first has one; of its values, one has none.
  root = lambda x: jnp.sqrt(x[:, 0, 0, :2]) * jnp.array([[1.0], [0.0]])
  image = np.float32([0, 16, 50]) * np.ones((2, 1, 1, 1), np.float32)
  got = gradient.momentum_fgsm(root, image, np.array([0, 0]), epsilon=4)
  np.testing.assert_array_equal(got[1], image[1])
  assert np.isfinite(got).all()
  np.testing.assert_allclose(got[0, 0, 0, 1], 20, rtol=1e-6)


def test_no_derivative_passes_through_an_attack():
  def loss(scale, x, attacked):
    logits_fn = lambda x: scale * _logits(x)
    seen = gradient.iterative_fgsm(
      logits_fn, x, LABELS, epsilon=8, iterations=2
    )
    if attacked is not None:
      seen = attacked
    return classification.cross_entropy(logits_fn(seen), LABELS).sum(), seen

  slopes = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
  (got, of_image), seen = slopes(1.0, IMAGES, None)
  (want, _), _ = slopes(1.0, IMAGES, seen)
  np.testing.assert_allclose(got, want, rtol=1e-6)
  assert want != 0
  np.testing.assert_array_equal(of_image, 0)


def test_a_network_is_traced_once_for_all_epsilons():
  count = 0

  def logits_fn(x):
    nonlocal count
    count += 1
    return _logits(x)

  run = jax.jit(
    lambda key, epsilon: gradient.pgd(
      key, logits_fn, IMAGES, LABELS, epsilon=epsilon, iterations=3
    )
  )
  outs = [np.asarray(run(KEY, epsilon)) for epsilon in (1.0, 2.0, 4.0)]
  assert count == 1
  count, compiled = 0, jax.jit(logits_fn)
  for epsilon, out in zip((1, 2, 4), outs, strict=True):
    got = gradient.pgd(
      KEY, compiled, IMAGES, LABELS, epsilon=epsilon, iterations=3
    )
    np.testing.assert_allclose(got, out, atol=1e-4)
  assert count == 1


def test_no_images_give_no_images():
  got = _pgd(IMAGES[:0], LABELS[:0], 8)
  assert got.shape == (0, 8, 8, 3)


@pytest.mark.parametrize(
  ("epsilon", "said"), [(-1, "-1"), (256, "256"), (np.nan, "nan")]
)
@pytest.mark.parametrize("attack", ALL)
def test_epsilons_outside_the_range_are_refused(attack, epsilon, said):
  match = rf"epsilon must be in 0\.\.255.*, got {said}\."
  with pytest.raises(ValueError, match=match):
    attack(IMAGES, LABELS, epsilon)
  with pytest.raises(ValueError, match=match):
    attack(IMAGES, LABELS, np.float32([1, 2, 3, 4, 5, epsilon]))


def test_attacks_refuse():
  with pytest.raises(ValueError, match=r"epsilon must be in 0\.\.1, .*got 8"):
    _fgsm(IMAGES / 255, LABELS, 8, high=1)
  with pytest.raises(ValueError, match="low must be below high, got 1 and 1"):
    _fgsm(IMAGES, LABELS, 0, low=1, high=1)
  with pytest.raises(ValueError, match="step_size must be at least 0.*-0.5"):
    _iterative(IMAGES, LABELS, 8, step_size=-0.5)
  for attack in (_iterative, _momentum, _pgd):
    with pytest.raises(ValueError, match="iterations must be at least 1.*0"):
      attack(IMAGES, LABELS, 8, iterations=0)
  with pytest.raises(ValueError, match="decay must be at least 0.*-1"):
    _momentum(IMAGES, LABELS, 8, decay=-1)
  with pytest.raises(InputError, match=r"low\.\.high, 0\.\.255, got .*300"):
    _fgsm(np.full((1, 8, 8, 3), 300.0), np.array([0]), 8)
  with pytest.raises(InputError, match=r"low\.\.high.*nan"):
    _fgsm(np.full((1, 8, 8, 3), np.nan), np.array([0]), 8)
  with pytest.raises(InputError, match=r"label must be in 0\.\.4.*got 5, -1"):
    _fgsm(IMAGES, np.array([0, 1, 5, 2, -1, 3]), 8)
  with pytest.raises(InputError, match=r"logits_fn must give .*got \(6,\)"):
    gradient.fgsm(lambda x: x.sum((1, 2, 3)), IMAGES, LABELS, epsilon=8)
  with pytest.raises(TypeCheckError, match="label"):
    _fgsm(IMAGES, LABELS[:3], 8)
  with pytest.raises(TypeCheckError, match="epsilon"):
    _fgsm(IMAGES, LABELS, np.ones(4))
  with pytest.raises(TypeCheckError, match="start"):
    _pgd(IMAGES, LABELS, 8, start=np.ones((2, 2, 3)))
