import jax
from jax.test_util import check_grads
from jaxtyping import TypeCheckError
import numpy as np
import pytest

from jaxshape.errors import InputError
from jaxshape.losses import segmentation

BATCH, HEIGHT, WIDTH, CLASSES = 8, 2, 8, 5
FREQUENCIES = np.array([0.1, 0.4, 0.3, 0.199, 0.001], np.float32)


def _example(seed=0, width=WIDTH):
  rng = np.random.default_rng(seed)
  shape = BATCH, HEIGHT, width
  logits = rng.normal(size=(*shape, CLASSES)).astype(np.float32)
  return 2 * logits, rng.integers(0, CLASSES, shape).astype(np.int32)


def _nll(logits, labels, weights, mask=None):
  """Pixel after pixel: the sums of w * nll and of w."""
  total = whole = 0.0
  for i in np.ndindex(labels.shape):
    if mask is None or mask[i]:
      p = np.exp(logits[i].astype(np.float64))
      p = np.clip(p / p.sum(), 1e-8, None)
      total -= weights[labels[i]] * np.log(p[labels[i]])
      whole += weights[labels[i]]
  return total, whole


def test_class_weights_by_hand():
  f = np.array([0.2, 0.499, 0.001, 0.0], np.float32)
  got = segmentation.class_weights(f)
  np.testing.assert_allclose(got, [0, 2, 500, 1000], rtol=1e-5)
  got = segmentation.class_weights(f, ignore=())
  np.testing.assert_allclose(got[0], 1 / 0.201, rtol=1e-5)
  got = segmentation.class_weights(f, form="log", ignore=(1, 3), epsilon=0.1)
  want = [1 / np.log(0.3), 0, 1 / np.log(0.101), 0]
  np.testing.assert_allclose(got, want, rtol=1e-5)
  # A class without pixels has a weight of 0 if it is ignored.
  got = segmentation.class_weights(f, epsilon=0, ignore=(3,))
  np.testing.assert_allclose(got, [5, 1 / 0.499, 1000, 0], rtol=1e-5)


def test_weighted_cross_entropy_by_hand():
  p = np.array([[0.5, 0.25, 0.25], [1, 0, 0], [0.2, 0.8, 0]])
  with np.errstate(divide="ignore"):
    logits = np.log(p).astype(np.float32) + 3
  labels, weights = np.array([0, 2, 1]), np.array([1, 2, 4], np.float32)
  want = [np.log(2), 4 * np.log(1e8), -2 * np.log(0.8)]
  got = segmentation.weighted_cross_entropy(logits, labels, weights=weights)
  np.testing.assert_allclose(got, want, rtol=1e-6)
  got = segmentation.weighted_cross_entropy(
    logits, labels, mask=np.array([1, 0, 1])
  )
  np.testing.assert_allclose(got, [want[0], 0, want[2] / 2], rtol=1e-6)
  got = segmentation.mean_cross_entropy(logits, labels, weights=weights)
  np.testing.assert_allclose(got, sum(want) / 7, rtol=1e-6)
  got = segmentation.mean_cross_entropy(
    logits, labels, weights=weights, reduction="pixels"
  )
  np.testing.assert_allclose(got, sum(want) / 3, rtol=1e-6)


@pytest.mark.parametrize("form", ["inverse", "log"])
@pytest.mark.parametrize("reduction", ["weights", "pixels"])
def test_multi_layer_cross_entropy_transcribed(form, reduction):
  _, labels = _example()
  mask = np.random.default_rng(9).uniform(size=labels.shape) < 0.7
  logits = [_example(i, WIDTH // n)[0] for i, n in enumerate([1, 2, 4, 4])]
  weights = np.asarray(segmentation.class_weights(FREQUENCIES, form=form))
  want = 0.0
  for output, n in zip(logits, [1, 2, 4, 4], strict=True):
    small = labels[..., ::n]
    total, whole = _nll(output, small, weights, mask[..., ::n])
    want += total / (whole if reduction == "weights" else small.size)
  got = segmentation.multi_layer_cross_entropy(
    logits, labels, weights=weights, mask=mask, reduction=reduction
  )
  np.testing.assert_allclose(got, want, rtol=1e-5)
  # The paper's weights are negative, and so is what they weigh.
  assert (want < 0) == (form == "log" and reduction == "pixels")


def test_shrink_labels_takes_every_nth_column():
  labels = np.arange(16, dtype=np.int32).reshape(2, 8)
  got = segmentation.shrink_labels(labels, factor=4)
  np.testing.assert_array_equal(got, [[0, 4], [8, 12]])
  got = segmentation.shrink_labels(labels > 8, factor=8)
  np.testing.assert_array_equal(got, [[False], [False]])
  np.testing.assert_array_equal(
    segmentation.shrink_labels(labels, factor=1), labels
  )


def test_losses_stay_finite_for_sure_networks():
  logits = np.array([[1e4, -1e4, 0], [-1e4, 1e4, 0]], np.float32)
  labels = np.array([0, 0])
  f = lambda l: segmentation.mean_cross_entropy(l, labels)
  value, gradient = jax.value_and_grad(f)(logits)
  np.testing.assert_allclose(value, np.log(1e8) / 2, rtol=1e-6)
  assert np.all(np.isfinite(gradient))


def test_a_batch_without_labels_has_no_loss_and_no_gradient():
  logits, labels = _example()
  weights = segmentation.class_weights(FREQUENCIES)
  for y, mask in ((0 * labels, None), (labels, np.zeros(labels.shape))):
    for reduction in ("weights", "pixels"):
      value, gradient = jax.value_and_grad(segmentation.mean_cross_entropy)(
        logits, y, weights=weights, mask=mask, reduction=reduction
      )
      assert value == 0
      np.testing.assert_array_equal(gradient, 0)


def test_wrong_labels_do_not_pass_unnoticed():
  logits, labels = _example()
  labels[0, 0, 0] = CLASSES
  got = segmentation.mean_cross_entropy(logits, labels)
  assert np.isnan(got)
  mask = labels < CLASSES
  got = segmentation.mean_cross_entropy(logits, labels, mask=mask)
  total, whole = _nll(logits, labels, np.ones(CLASSES), mask)
  np.testing.assert_allclose(got, total / whole, rtol=1e-5)


def test_logits_of_16_bits_are_summed_in_32():
  logits, labels = _example()
  short = logits.astype(np.float16)
  got = segmentation.mean_cross_entropy(short, labels)
  assert got.dtype == np.float32
  want = segmentation.mean_cross_entropy(short.astype(np.float32), labels)
  np.testing.assert_array_equal(got, want)


def test_losses_under_transforms():
  logits, labels = _example()
  weights = segmentation.class_weights(FREQUENCIES)
  f = lambda l, y: segmentation.weighted_cross_entropy(l, y, weights=weights)
  want = f(logits, labels)
  np.testing.assert_allclose(jax.jit(f)(logits, labels), want, rtol=1e-5)
  np.testing.assert_allclose(jax.vmap(f)(logits, labels), want, rtol=1e-5)
  g = lambda l: segmentation.multi_layer_cross_entropy(
    [l, l[:, :, ::2]], labels[:1], weights=weights
  )
  check_grads(
    jax.jit(g), (logits[:1],), order=1, modes=["rev"], rtol=1e-2, atol=1e-2
  )


def test_the_mean_is_that_of_the_whole_batch_on_several_devices():
  logits, labels = _example()
  weights = np.asarray(segmentation.class_weights(FREQUENCIES))
  devices = np.array(jax.devices())
  assert len(devices) == BATCH
  # The parts differ in their sums of weights.
  labels[0] = 4
  mesh = jax.sharding.Mesh(devices, ("batch",))
  split = jax.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
  f = jax.jit(
    lambda l, y: segmentation.mean_cross_entropy(l, y, weights=weights)
  )
  got = f(jax.device_put(logits, split), jax.device_put(labels, split))
  total, whole = _nll(logits, labels, weights)
  np.testing.assert_allclose(got, total / whole, rtol=1e-5)


def test_class_weights_refuse():
  f = segmentation.class_weights
  with pytest.raises(ValueError, match="form must be .* got 'sqrt'"):
    f(FREQUENCIES, form="sqrt")
  for epsilon in (-0.1, float("inf"), float("nan")):
    with pytest.raises(ValueError, match=f"epsilon must be .* got {epsilon}"):
      f(FREQUENCIES, epsilon=epsilon)
  with pytest.raises(ValueError, match=r"ignore must be .* 0..4, got \(5,\)"):
    f(FREQUENCIES, ignore=(5,))
  for bad in (-0.1, 20.0, np.nan):
    with pytest.raises(InputError, match="frequencies must be shares"):
      f(np.array([0.5, bad], np.float32))
  with pytest.raises(InputError, match="must give finite weights"):
    f(np.array([0.5, 0.0], np.float32), epsilon=0)
  with pytest.raises(InputError, match="must give finite weights"):
    f(np.array([0.0, 1.0], np.float32), epsilon=0, form="log")
  with pytest.raises(TypeCheckError, match="frequencies"):
    f(np.ones((2, 2), np.float32))


def test_losses_refuse():
  logits, labels = _example()
  with pytest.raises(ValueError, match="reduction must be .* got 'sum'"):
    segmentation.mean_cross_entropy(logits, labels, reduction="sum")
  with pytest.raises(ValueError, match="reduction must be .* got 'sum'"):
    segmentation.multi_layer_cross_entropy([logits], labels, reduction="sum")
  with pytest.raises(ValueError, match="factor must .* width 8, got 3"):
    segmentation.shrink_labels(labels, factor=3)
  with pytest.raises(ValueError, match="factor must .* got 0"):
    segmentation.shrink_labels(labels, factor=0)
  with pytest.raises(ValueError, match="logits must be one output or more"):
    segmentation.multi_layer_cross_entropy([], labels)
  for wrong in (
    logits[:, :, :3], logits[:, :1], logits[:3], logits[..., 1:], logits[0],
    np.zeros(3, np.float32), logits[:, :, :0],
  ):  # fmt: skip
    with pytest.raises(ValueError, match=r"logits must .* \(8, 2, 8, 5\) or"):
      segmentation.multi_layer_cross_entropy([logits, wrong, logits], labels)
  with pytest.raises(TypeCheckError, match="labels"):
    segmentation.mean_cross_entropy(logits, labels[:, 1:])
  with pytest.raises(TypeCheckError, match="weights"):
    segmentation.mean_cross_entropy(
      logits, labels, weights=np.ones(4, np.float32)
    )
  with pytest.raises(TypeCheckError, match="mask"):
    segmentation.mean_cross_entropy(logits, labels, mask=np.ones(8))
