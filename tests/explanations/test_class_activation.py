import jax
import jax.numpy as jnp
from jaxtyping import TypeCheckError
import numpy as np
import pytest

from jaxshape.explanations import class_activation

RNG = np.random.default_rng(0)
FEATURES = RNG.uniform(size=(3, 4, 5, 6)).astype(np.float32)
KERNEL = RNG.normal(size=(6, 7)).astype(np.float32)
CLASSES = np.array([2, 0, 6])


def _linear(features):
  return jnp.mean(features, axis=(0, 1)) @ KERNEL


def _curved(features):
  return jnp.tanh(jnp.mean(features**2, axis=(0, 1)) @ KERNEL)


def test_grad_cam_transcribed():
  got = class_activation.grad_cam(_curved, FEATURES, CLASSES)
  for b, c in enumerate(CLASSES):
    a = FEATURES[b].astype(np.float64)
    score = np.tanh((a**2).mean((0, 1)) @ KERNEL[:, c])
    gradient = (1 - score**2) * KERNEL[:, c] * 2 * a / 20  # By hand.
    want = np.zeros((4, 5))
    for k in range(6):
      want += gradient[:, :, k].sum() / 20 * a[:, :, k]
    np.testing.assert_allclose(got[b], np.maximum(want, 0), atol=1e-6)
  assert np.max(got) > 0


def test_cam_transcribed():
  got = class_activation.cam(FEATURES, KERNEL, CLASSES)
  want = [f @ KERNEL[:, c] for f, c in zip(FEATURES, CLASSES, strict=True)]
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_resize_as_opencv():
  cv2 = pytest.importorskip("cv2")
  maps = RNG.normal(size=(2, 7, 5)).astype(np.float32)
  for height, width in ((32, 24), (7, 5), (4, 3)):
    got = class_activation.resize(maps, height=height, width=width)
    want = [cv2.resize(m, (width, height)) for m in maps]
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_spread_by_hand():
  maps = np.zeros((3, 2, 5), np.float32)
  maps[0, 0, :3] = [1.0, 0.6, 0.4]
  maps[1] = 2.0
  got = class_activation.spread(maps)
  np.testing.assert_allclose(got, [0.2, 1.0, 0.0])
  got = class_activation.spread(maps, threshold=0.3)
  np.testing.assert_allclose(got, [0.3, 1.0, 0.0])


def test_grad_cam_of_a_linear_head_is_cam():
  cam = class_activation.cam(FEATURES, KERNEL, CLASSES)
  got = class_activation.grad_cam(_linear, FEATURES, CLASSES)
  np.testing.assert_allclose(got, np.maximum(cam, 0) / 20, atol=1e-6)
  assert np.min(cam) < 0 < np.max(cam)


def test_normalize_spans_0_to_1_and_takes_a_constant():
  maps = np.stack([RNG.normal(size=(4, 4)), np.full((4, 4), 3.0)])
  got = class_activation.normalize(maps.astype(np.float32))
  np.testing.assert_allclose(np.min(got, (1, 2)), [0, 0])
  np.testing.assert_allclose(np.max(got, (1, 2)), [1, 0], atol=1e-6)


def test_spread_ignores_scale_and_keeps_nan():
  maps = RNG.uniform(size=(4, 6, 6)).astype(np.float32)
  want = class_activation.spread(maps)
  np.testing.assert_array_equal(class_activation.spread(8 * maps), want)
  maps[1, 2, 3] = np.nan
  got = class_activation.spread(maps)
  np.testing.assert_array_equal(np.isnan(got), [False, True, False, False])


def test_grad_cam_under_jit_and_of_bfloat16():
  f = lambda a, c: class_activation.grad_cam(_curved, a, c)
  want = f(FEATURES, CLASSES)
  np.testing.assert_allclose(jax.jit(f)(FEATURES, CLASSES), want, atol=1e-6)
  got = f(jnp.asarray(FEATURES, jnp.bfloat16), CLASSES)
  assert got.dtype == np.float32
  np.testing.assert_allclose(got, want, atol=0.02 * np.max(want))


def test_explanations_refuse():
  with pytest.raises(TypeCheckError, match="class_index"):
    class_activation.grad_cam(_linear, FEATURES, CLASSES[:2])
  with pytest.raises(TypeCheckError, match="kernel"):
    class_activation.cam(FEATURES, KERNEL[:5], CLASSES)
  maps = FEATURES[..., 0]
  with pytest.raises(ValueError, match=r"threshold must be .*, got 1.0"):
    class_activation.spread(maps, threshold=1.0)
  with pytest.raises(ValueError, match="height and width must be 1 or more"):
    class_activation.resize(maps, height=0, width=3)


def test_pseudo_labels_transcribed():
  maps = RNG.normal(size=(2, 5, 6, 4)).astype(np.float32)
  maps[1, ..., 2] = -1  # Never positive.
  present = np.array([[1, 0, 1, 1], [0, 1, 1, -1]], np.float32)
  got = np.asarray(class_activation.pseudo_labels(maps, present, threshold=0.4))
  assert set(got.ravel()) == {0, 1, 2, 3, 4}
  for b in range(2):
    for y in range(5):
      for x in range(6):
        shares = {
          k: maps[b, y, x, k] / maps[b, ..., k].max()
          for k in range(4)
          if present[b, k] > 0 and maps[b, ..., k].max() > 0
        }
        best = max(shares, key=shares.__getitem__)
        assert got[b, y, x] == (best + 1 if shares[best] >= 0.4 else 0)


def test_pseudo_labels_do_not_depend_on_scale_and_follow_jit_and_vmap():
  maps = RNG.normal(size=(3, 5, 6, 4)).astype(np.float32)
  present = np.array([[1, 0, 1, 1]] * 3)
  f = class_activation.pseudo_labels
  want = f(maps, present)
  np.testing.assert_array_equal(f(maps * [1, 2, 4, 8], present), want)
  np.testing.assert_array_equal(jax.jit(f)(maps, present), want)
  np.testing.assert_array_equal(jax.vmap(f)(maps, present), want)
  assert not np.any(f(maps, np.zeros((3, 4))))
  for threshold in (0.0, 1.1):
    with pytest.raises(ValueError, match="threshold must be above 0 and at"):
      f(maps, present, threshold=threshold)
