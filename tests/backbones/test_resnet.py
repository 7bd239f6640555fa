import math

import jax
import jax.numpy as jnp
from jaxtyping import TypeCheckError
import numpy as np
import pytest

from jaxshape.backbones import resnet
from jaxshape.errors import InputError
from jaxshape.layers import apply

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(4, 8, 8, 3)).astype(np.float32)


def _tiny(block="basic", **options):
  return resnet.ResNet((1, 1), block, 5, width=4, stem="small", **options)


def _drawn(module, images=IMAGES):
  """Parameters and statistics of which none is a plain 0 or 1."""
  variables = apply.init(module, KEY, images, train=False)
  draw = lambda x: RNG.uniform(0.5, 1.5, x.shape).astype(x.dtype)
  return jax.tree.map(
    lambda x: np.asarray(x) if x.ndim > 1 else draw(x), variables
  )


@pytest.mark.parametrize(
  ("name", "want"),
  [("resnet18", 11689512), ("resnet34", 21797672), ("resnet50", 25557032)],
)
def test_parameters_as_many_as_torchvision_has(name, want):
  module = resnet.make(name, num_classes=1000)
  images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
  init = lambda images: apply.init(module, KEY, images, train=False)
  params, collections = jax.eval_shape(init, images)
  assert sum(math.prod(x.shape) for x in jax.tree.leaves(params)) == want
  assert set(collections) == {"batch_stats"}
  features, _ = jax.eval_shape(
    lambda p, c, x: apply.apply(
      module, p, c, x, train=False, method="features"
    ),
    params,
    collections,
    images,
  )
  channels = 2048 if name == "resnet50" else 512
  assert features.shape == (1, 7, 7, channels)


def _convolve(x, kernel, stride):
  size = kernel.shape[0]
  pad = size // 2
  padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
  rows = (x.shape[1] + 2 * pad - size) // stride + 1
  columns = (x.shape[2] + 2 * pad - size) // stride + 1
  out = np.zeros((len(x), rows, columns, kernel.shape[-1]))
  for i in range(rows):
    for j in range(columns):
      top, left = i * stride, j * stride
      window = padded[:, top : top + size, left : left + size]
      out[:, i, j] = np.einsum("bhwc,hwcd->bd", window, kernel)
  return out


def _norm(x, params, stats):
  scaled = (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5)
  return scaled * params["scale"] + params["bias"]


def _block(x, p, s, *, stride, bottleneck):
  relu = lambda x: np.maximum(x, 0)
  strides = (1, stride, 1) if bottleneck else (stride, 1)
  y = x
  for i, step in enumerate(strides, 1):
    y = relu(y) if i > 1 else y
    y = _convolve(y, p[f"conv{i}"]["kernel"], step)
    y = _norm(y, p[f"bn{i}"], s[f"bn{i}"])
  if "downsample_conv" in p:
    x = _convolve(x, p["downsample_conv"]["kernel"], stride)
    x = _norm(x, p["downsample_bn"], s["downsample_bn"])
  return relu(x + y)


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_network_transcribed(block):
  images = RNG.normal(size=(2, 7, 6, 3)).astype(np.float32)
  module = _tiny(block)
  params, collections = _drawn(module, images)
  stats = collections["batch_stats"]
  x = _convolve(images, params["conv1"]["kernel"], 1)
  x = np.maximum(_norm(x, params["bn1"], stats["bn1"]), 0)
  for name, stride in (("layer1_0", 1), ("layer2_0", 2)):
    bottleneck = block == "bottleneck"
    p, s = params[name], stats[name]
    x = _block(x, p, s, stride=stride, bottleneck=bottleneck)
  features, _ = apply.apply(
    module, params, collections, images, train=False, method="features"
  )
  np.testing.assert_allclose(features, x, rtol=1e-4, atol=1e-4)
  want = x.mean((1, 2)) @ params["fc"]["kernel"] + params["fc"]["bias"]
  logits, _ = apply.apply(module, params, collections, images, train=False)
  np.testing.assert_allclose(logits, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [8, 9])
def test_pooling_as_reduce_window(size):
  x = RNG.normal(size=(2, size, size + 1, 3)).astype(np.float32)
  pool = lambda x: jax.lax.reduce_window(
    x,
    -jnp.inf,
    jax.lax.max,
    (1, 3, 3, 1),
    (1, 2, 2, 1),
    [(0, 0), (1, 1), (1, 1), (0, 0)],
  )
  want, back = jax.vjp(pool, x)
  got, back_too = jax.vjp(resnet._halve, x)
  np.testing.assert_array_equal(got, want)
  ones = jnp.ones_like(want)
  np.testing.assert_array_equal(back_too(ones)[0], back(ones)[0])


def test_images_do_not_see_each_other_in_evaluation():
  module = _tiny()
  params, collections = _drawn(module)
  predict = lambda x: apply.apply(module, params, collections, x, train=False)
  whole, unchanged = predict(IMAGES)
  assert unchanged is collections
  np.testing.assert_allclose(predict(IMAGES[1:2])[0], whole[1:2], rtol=1e-5)


def test_training_normalizes_by_the_batch_and_moves_the_statistics():
  module = _tiny()
  params, collections = apply.init(module, KEY, IMAGES, train=True)
  _, after = apply.apply(
    module, params, collections, IMAGES, train=True, update=True
  )
  x = _convolve(IMAGES, np.asarray(params["conv1"]["kernel"]), 1)
  stats = after["batch_stats"]["bn1"]
  np.testing.assert_allclose(stats["mean"], 0.1 * x.mean((0, 1, 2)), atol=1e-5)
  want = 0.9 + 0.1 * x.var((0, 1, 2))
  np.testing.assert_allclose(stats["var"], want, rtol=1e-4)


def test_blocks_start_as_the_identity():
  module = _tiny()
  params, _ = apply.init(module, KEY, IMAGES, train=False)
  assert not np.any(params["layer1_0"]["bn2"]["scale"])
  params, _ = apply.init(_tiny(zero_init=False), KEY, IMAGES, train=False)
  assert np.all(params["layer1_0"]["bn2"]["scale"] == 1)


def test_bfloat16_is_for_computing_only():
  module = _tiny(dtype=jnp.bfloat16)
  params, collections = _drawn(module)
  made = apply.init(module, KEY, IMAGES, train=False)
  assert {x.dtype for x in jax.tree.leaves(made)} == {jnp.dtype(jnp.float32)}
  features, _ = apply.apply(
    module, params, collections, IMAGES, train=False, method="features"
  )
  assert features.dtype == jnp.bfloat16
  logits, after = apply.apply(
    module, params, collections, IMAGES, train=True, update=True
  )
  assert logits.dtype == jnp.float32
  assert {x.dtype for x in jax.tree.leaves(after)} == {jnp.dtype(jnp.float32)}
  want, _ = apply.apply(
    _tiny(), params, collections, IMAGES, train=True, update=True
  )
  np.testing.assert_allclose(logits, want, atol=0.05 * np.abs(want).max())


def test_head_takes_one_example_and_the_gradient_is_finite():
  module = _tiny()
  params, collections = _drawn(module)
  call = lambda p, x, **o: apply.apply(module, p, collections, x, **o)[0]
  features = call(params, IMAGES, train=False, method="features")
  one = call(params, features[0], method="head")
  want = call(params, IMAGES, train=False)
  np.testing.assert_allclose(one, want[0], rtol=1e-5)
  loss = lambda p: jnp.sum(call(p, IMAGES, train=True, update=True) ** 2)
  gradient = jax.jit(jax.grad(loss))(params)
  for leaf in jax.tree.leaves(gradient):
    assert np.all(np.isfinite(leaf))
    assert np.any(leaf)


def test_make_overrides_what_the_name_says():
  module = resnet.make("resnet18", num_classes=3, width=8, stem="small")
  assert (module.width, module.stem, module.stage_sizes) == (
    8,
    "small",
    (2, 2, 2, 2),
  )


def test_resnet_refuses():
  with pytest.raises(InputError, match="did you mean 'resnet50'"):
    resnet.make("resnet5O", num_classes=3)
  for options, word in (
    ({"block": "wide"}, "block must be 'basic' or 'bottleneck', got 'wide'"),
    (
      {"stem": "large"},
      "stem must be one of imagenet, small, got 'large'",
    ),
    ({"num_classes": 0}, "num_classes must be 1 or more, got 0"),
  ):
    good = {"block": "basic", "num_classes": 2}
    module = resnet.ResNet((1,), **{**good, **options})
    with pytest.raises(ValueError, match=word):
      apply.init(module, KEY, IMAGES, train=False)
  with pytest.raises(TypeCheckError, match="images"):
    apply.init(_tiny(), KEY, IMAGES[0], train=False)
