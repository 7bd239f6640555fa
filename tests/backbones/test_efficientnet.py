import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import TypeCheckError
import numpy as np
import pytest

from jaxshape.backbones import efficientnet
from jaxshape.errors import InputError
from jaxshape.filters import batches
from jaxshape.layers import apply

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
# Odd and even, so that TensorFlow's padding differs at its two ends.
IMAGES = RNG.normal(size=(3, 13, 10, 3)).astype(np.float32)
STAGES = (
  efficientnet.Stage(3, 1, 1, 32, 1),
  efficientnet.Stage(5, 2, 2, 64, 2),
)


def _tiny(lite=False, **options):
  options = {"num_classes": 5, "width": 8, "stages": STAGES, **options}
  return efficientnet.EfficientNet(lite=lite, **options)


@functools.cache
def _variables(lite):
  return apply.init(_tiny(lite), KEY, IMAGES, train=False)


def _drawn(lite=False):
  """Parameters and statistics of which none is a plain 0 or 1."""
  rng = np.random.default_rng(1)
  draw = lambda x: rng.uniform(0.5, 1.5, x.shape).astype(x.dtype)
  return jax.tree.map(
    lambda x: np.asarray(x) if x.ndim > 1 else draw(x), _variables(lite)
  )


@pytest.mark.parametrize(
  ("name", "parameters", "blocks"),
  [
    ("efficientnet_lite0", 4652008, 16),
    ("efficientnet_lite4", 13006568, 30),
    ("efficientnet_b0", 5288548, 16),
    ("efficientnet_b4", 19341616, 32),
  ],
)
def test_parameters_as_many_as_the_public_packages_have(
  name, parameters, blocks
):
  module = efficientnet.make(name, num_classes=1000)
  size = efficientnet.PREPROCESSING[name].image_size
  images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)

  def run(images):
    params, collections = apply.init(module, KEY, images, train=False)
    features, _ = apply.apply(
      module, params, collections, images, train=False, method="features"
    )
    return params, collections, features

  params, collections, features = jax.eval_shape(run, images)
  count = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
  assert count == parameters
  assert sum(part.startswith("blocks_") for part in params) == blocks
  assert set(collections) == {"batch_stats"}
  side = math.ceil(size / module.stride)
  channels = 1792 if name.endswith("b4") else 1280
  assert features.shape == (2, side, side, channels)


def test_lite_keeps_its_ends():
  def widths(name):
    net = efficientnet.make(name, num_classes=2)
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    params, _ = jax.eval_shape(
      lambda x: apply.init(net, KEY, x, train=False), image
    )
    out = [params["conv_stem"]["kernel"].shape[-1]]
    for i in range(sum(part.startswith("blocks_") for part in params)):
      conv = params[f"blocks_{i}"]["project_conv"]
      out.append(conv["kernel"].shape[-1])
    return out

  # Widths of Table 1 times 1.1 in multiples of 8, repeats times 1.2 rounded up.
  middle = [24] * 3 + [48] * 3 + [88] * 4 + [120] * 4 + [208] * 5
  assert widths("efficientnet_lite2") == [32, 16, *middle, 352]
  assert widths("efficientnet_b2") == [32, 16, 16, *middle, 352, 352]


@pytest.mark.parametrize(
  ("base", "wider", "width", "want"),
  [
    (16, 1.1, 32, 16),  # 17.6
    (112, 1.4, 32, 160),  # 156.8
    (24, 1.4, 32, 32),  # 33.6
    (32, 1.0, 11, 16),  # 11 would lose more than a tenth at 8.
    (16, 1.0, 4, 8),  # Never fewer.
  ],
)
def test_channels_by_hand(base, wider, width, want):
  assert efficientnet._channels(base, wider, width) == want


def _same(x, kernel, stride, *, depthwise=False):
  """TensorFlow's SAME: an odd pixel of padding goes to the end."""
  size = kernel.shape[0]
  counts = [math.ceil(n / stride) for n in x.shape[1:3]]
  pads = [
    max((m - 1) * stride + size - n, 0)
    for m, n in zip(counts, x.shape[1:3], strict=True)
  ]
  ends = [(pad // 2, pad - pad // 2) for pad in pads]
  padded = np.pad(x, ((0, 0), *ends, (0, 0)))
  out = np.zeros((len(x), *counts, kernel.shape[-1]))
  for i, j in np.ndindex(*counts):
    top, left = i * stride, j * stride
    window = padded[:, top : top + size, left : left + size]
    if depthwise:
      out[:, i, j] = (window * kernel[:, :, 0]).sum((1, 2))
    else:
      out[:, i, j] = np.einsum("bhwc,hwcd->bd", window, kernel)
  return out


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
  ("size", "image"), [(3, (7, 6)), (5, (8, 5)), (3, (1, 2)), (5, (2, 1))]
)
def test_depthwise_convolution_as_a_loop_and_its_gradients(size, image, stride):
  x = RNG.normal(size=(2, *image, 4)).astype(np.float32)
  kernel = RNG.normal(size=(size, size, 1, 4)).astype(np.float32)
  want = _same(x, kernel, stride, depthwise=True)
  got, back = jax.vjp(
    lambda x, k: efficientnet._depthwise(stride, x, k), x, kernel
  )
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
  other = efficientnet._grouped(stride, x, kernel)  # Of accelerators.
  np.testing.assert_allclose(other, want, rtol=1e-5, atol=1e-5)
  # Both arguments enter linearly, so the gradients are those of the loop.
  g = RNG.normal(size=want.shape).astype(np.float32)
  dx, dk = back(g)
  one = lambda a, at: np.eye(1, a.size, at).reshape(a.shape)
  for at in (0, x.size // 3, x.size - 1):
    slope = (g * _same(one(x, at), kernel, stride, depthwise=True)).sum()
    np.testing.assert_allclose(np.ravel(dx)[at], slope, rtol=1e-4, atol=1e-5)
  for at in range(kernel.size):
    slope = (g * _same(x, one(kernel, at), stride, depthwise=True)).sum()
    np.testing.assert_allclose(np.ravel(dk)[at], slope, rtol=1e-4, atol=1e-5)
  theirs = efficientnet._grouped_backward(stride, x, kernel, g)
  for a, b in zip((dx, dk), theirs, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_gradient_in_groups_is_the_gradient(monkeypatch):
  x = RNG.normal(size=(5, 6, 7, 3)).astype(np.float32)
  kernel = RNG.normal(size=(3, 3, 1, 3)).astype(np.float32)
  g = RNG.normal(size=(5, 3, 4, 3)).astype(np.float32)
  whole = efficientnet._shifted_backward(2, x, kernel, g)
  # As on one device, with two images in each group.
  monkeypatch.setattr(batches, "_here", batches._in_groups)
  monkeypatch.setattr(batches, "GROUP", 2 * 6 * 7 * 3)
  parts = efficientnet._shifted_backward(2, x, kernel, g)
  for a, b in zip(parts, whole, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def _norm(x, part, name, trees):
  params, stats = ({**tree, **tree.get(part, {})}[name] for tree in trees)
  scaled = (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-3)
  return scaled * params["scale"] + params["bias"]


def _transcribed(images, lite, params, stats):
  sigmoid = lambda x: 1 / (1 + np.exp(-x))
  act = (lambda x: np.clip(x, 0, 6)) if lite else (lambda x: x * sigmoid(x))
  x = _same(images, params["conv_stem"]["kernel"], 2)
  x = act(_norm(x, "", "bn0", (params, stats)))
  for i, (stride, expansion) in enumerate(((1, 1), (2, 2), (1, 2))):
    part = f"blocks_{i}"
    p, y = params[part], x
    norm = lambda y, name, part=part: _norm(y, part, name, (params, stats))
    if expansion > 1:
      y = act(norm(y @ p["expand_conv"]["kernel"][0, 0], "bn0"))
    y = _same(y, p["depthwise_conv"]["kernel"], stride, depthwise=True)
    y = act(norm(y, "bn1"))
    if not lite:
      z = y.mean((1, 2), keepdims=True)
      for name, after in (("se_reduce", act), ("se_expand", sigmoid)):
        z = after(z @ p[name]["kernel"][0, 0] + p[name]["bias"])
      y = y * z
    y = norm(y @ p["project_conv"]["kernel"][0, 0], "bn2")
    x = x + y if stride == 1 and x.shape == y.shape else y
  x = x @ params["conv_head"]["kernel"][0, 0]
  return act(_norm(x, "", "bn1", (params, stats)))


@pytest.mark.parametrize("lite", [True, False])
def test_network_transcribed(lite):
  module, (params, collections) = _tiny(lite), _drawn(lite)
  # Channels 8, 8, 16, 16; the squeezed ones are a quarter of the block's input.
  names = {"bn0", "bn1", "bn2", "expand_conv", "depthwise_conv", "project_conv"}
  squeezing = set() if lite else {"se_reduce", "se_expand"}
  assert set(params["blocks_2"]) == names | squeezing
  if not lite:
    assert params["blocks_2"]["se_reduce"]["kernel"].shape == (1, 1, 32, 4)
  want = _transcribed(IMAGES, lite, params, collections["batch_stats"])
  call = lambda x, **options: apply.apply(
    module, params, collections, x, train=False, **options
  )
  (logits, unchanged), (features, _) = jax.jit(
    lambda x: (call(x), call(x, method="features"))
  )(IMAGES)
  jax.tree.map(np.testing.assert_array_equal, unchanged, collections)
  assert features.shape == (3, 4, 3, 320)
  np.testing.assert_allclose(features, want, rtol=1e-4, atol=1e-4)
  want = want.mean((1, 2)) @ params["fc"]["kernel"] + params["fc"]["bias"]
  np.testing.assert_allclose(logits, want, rtol=1e-4, atol=1e-4)
  one, _ = apply.apply(module, params, collections, features[0], method="head")
  np.testing.assert_allclose(one, want[0], rtol=1e-4, atol=1e-4)


def test_training_moves_the_statistics_by_a_hundredth():
  module, (params, collections) = _tiny(True), _variables(True)
  _, after = apply.apply(
    module, params, collections, IMAGES, train=True, update=True
  )
  x = _same(IMAGES, np.asarray(params["conv_stem"]["kernel"]), 2)
  stats = after["batch_stats"]["bn0"]
  np.testing.assert_allclose(stats["mean"], 0.01 * x.mean((0, 1, 2)), atol=1e-6)
  want = 0.99 + 0.01 * x.var((0, 1, 2))
  np.testing.assert_allclose(stats["var"], want, rtol=1e-5)


def test_training_skips_blocks_only_with_a_key():
  block = efficientnet.Block(
    features=4, size=3, stride=1, expansion=1, lite=True, drop=0.25,
    dtype=jnp.float32,
  )  # fmt: skip
  x = RNG.normal(size=(64, 3, 2, 4)).astype(np.float32)
  params, collections = apply.init(block, KEY, x, train=False)

  def change(key):
    out, _ = apply.apply(
      block, params, collections, x, train=True, update=True, key=key
    )
    return np.asarray(out - x)

  whole, drawn = change(None), change(KEY)
  np.testing.assert_array_equal(whole, change(None))
  kept = np.any(drawn, axis=(1, 2, 3))
  assert 0.5 < kept.mean() < 0.95
  np.testing.assert_allclose(drawn[kept], whole[kept] / 0.75, atol=1e-5)
  assert not np.any(drawn[~kept])


def test_later_blocks_are_skipped_more_often():
  drops = []

  def seen(next_fun, args, kwargs, context):
    if isinstance(context.module, efficientnet.Block):
      drops.append(context.module.drop)
    return next_fun(*args, **kwargs)

  with efficientnet.nn.intercept_methods(seen):
    jax.eval_shape(
      lambda x: apply.init(_tiny(drop_path=0.3), KEY, x, train=False), IMAGES
    )
  np.testing.assert_allclose([*dict.fromkeys(drops)], [0, 0.1, 0.2])


def test_head_drops_features_only_in_training_with_a_key():
  module = _tiny(num_classes=320, dropout=0.5)
  fc = {"kernel": np.eye(320, dtype=np.float32), "bias": np.zeros(320)}
  features = RNG.uniform(1, 2, (2, 3, 2, 320)).astype(np.float32)
  head = lambda **options: np.asarray(
    apply.apply(module, {"fc": fc}, {}, features, method="head", **options)[0]
  )
  mean = features.mean((1, 2))
  for options in ({}, {"train": True}, {"key": KEY}):
    np.testing.assert_allclose(head(**options), mean, rtol=1e-6)
  drawn = head(train=True, key=KEY)
  assert 0.4 < (drawn == 0).mean() < 0.6
  np.testing.assert_allclose(drawn[drawn != 0], 2 * mean[drawn != 0], rtol=1e-6)


def test_bfloat16_is_for_computing_only():
  make = functools.partial(_tiny, True)
  module, (params, collections) = make(dtype=jnp.bfloat16), _drawn(True)
  call = lambda net, **options: jax.jit(
    lambda x: apply.apply(net, params, collections, x, **options)
  )(IMAGES)
  features, _ = call(module, train=False, method="features")
  assert features.dtype == jnp.bfloat16
  logits, after = call(module, train=True, update=True)
  assert logits.dtype == jnp.float32
  assert {x.dtype for x in jax.tree.leaves(after)} == {jnp.dtype(jnp.float32)}
  want, _ = call(make(), train=True, update=True)
  np.testing.assert_allclose(logits, want, atol=0.1 * np.abs(want).max())


def test_gradient_is_that_of_the_compilers_convolutions(monkeypatch):
  module = _tiny(True, stages=STAGES[:1])
  params, collections = apply.init(module, KEY, IMAGES, train=False)

  def gradient():
    def loss(params, x):
      logits, _ = apply.apply(
        module, params, collections, x, train=True, update=True
      )
      return jnp.sum(jax.nn.softmax(logits)[:, 0])

    return jax.jit(jax.grad(loss, argnums=(0, 1)))(params, IMAGES)

  got = gradient()
  for leaf in jax.tree.leaves(got):
    assert np.any(leaf)
  monkeypatch.setattr(efficientnet, "_depthwise", efficientnet._grouped)
  check = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5)
  jax.tree.map(check, got, gradient())


def test_depthwise_under_vmap():
  x = RNG.normal(size=(2, 3, 5, 4, 2)).astype(np.float32)
  kernels = RNG.normal(size=(2, 3, 3, 1, 2)).astype(np.float32)
  loss = lambda x, k: jnp.sum(efficientnet._depthwise(2, x, k) ** 2)
  grad = jax.value_and_grad(loss, argnums=(0, 1))
  got = jax.vmap(grad)(x, kernels)
  for i in range(2):
    one = jax.tree.map(lambda a, i=i: a[i], got)
    check = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(check, one, grad(x[i], kernels[i]))


def test_preprocessing_travels_with_the_names():
  assert set(efficientnet.PREPROCESSING) == set(efficientnet.VARIANTS)
  lite = efficientnet.PREPROCESSING["efficientnet_lite0"]
  assert lite[:3] == (224, 256, "bicubic")
  x = np.array([0.0, 100.0, 255.0])[:, None]
  got = (x - lite.mean) / lite.std
  want = np.repeat((x / 255 - 0.498) / 0.502, 3, axis=1)
  np.testing.assert_allclose(got, want, rtol=1e-12)
  b3 = efficientnet.PREPROCESSING["efficientnet_b3"]
  assert b3[:3] == (300, 332, "bicubic")
  np.testing.assert_allclose(b3.mean, (123.675, 116.28, 103.53))
  np.testing.assert_allclose(b3.std, (58.395, 57.12, 57.375))


def test_make_knows_the_names_and_what_overrides_them():
  net = efficientnet.make("efficientnet_lite1", num_classes=3)
  assert (net.lite, net.wider, net.deeper, net.dropout) == (True, 1, 1.1, 0.2)
  assert (net.width, net.stem, net.stride) == (32, "imagenet", 32)
  net = efficientnet.make(
    "efficientnet_b5", num_classes=3, width=8, stem="small"
  )
  assert (net.lite, net.width, net.stem, net.stride) == (False, 8, "small", 16)
  features = lambda p, c: apply.apply(
    _tiny(stem="small"), p, c, IMAGES, train=False, method="features"
  )[0]
  assert jax.eval_shape(features, *_variables(False)).shape == (3, 7, 5, 320)


@pytest.mark.parametrize("lite", [True, False])
def test_state_dict_there_and_back(lite):
  module, (params, collections) = _tiny(lite), _drawn(lite)
  tensors = efficientnet.to_state_dict(module, params, collections)
  norm = ("weight", "bias", "running_mean", "running_var")
  want = {"_conv_stem.weight", "_conv_head.weight", "_fc.weight", "_fc.bias"}
  want |= {f"_bn{i}.{n}" for i in (0, 1) for n in norm}
  for i in range(3):
    first = 0 if i else 1
    parts = ("expand", "depthwise", "project")[first:]
    want |= {f"_blocks.{i}._{part}_conv.weight" for part in parts}
    want |= {f"_blocks.{i}._bn{j}.{n}" for j in range(first, 3) for n in norm}
    if not lite:
      want |= {
        f"_blocks.{i}._se_{part}.{leaf}"
        for part in ("reduce", "expand")
        for leaf in ("weight", "bias")
      }
  assert set(tensors) == want
  kernel = params["blocks_1"]["depthwise_conv"]["kernel"]
  there = tensors["_blocks.1._depthwise_conv.weight"]
  assert there.shape == (16, 1, 5, 5)
  assert there[7, 0, 2, 4] == kernel[2, 4, 0, 7]
  more = {"_bn0.num_batches_tracked": np.int64(3)}
  wrapped = {f"module.{k}": v for k, v in (tensors | more).items()}
  got = efficientnet.from_state_dict(module, wrapped)
  jax.tree.map(np.testing.assert_array_equal, got, (params, collections))


def test_state_dict_without_its_head():
  module, (params, collections) = _tiny(), _drawn()
  tensors = efficientnet.to_state_dict(module, params, collections)
  other = _tiny(num_classes=7)
  with pytest.raises(
    InputError, match=r"_fc.weight \(5, 320\) instead of \(7, 320\)"
  ):
    efficientnet.from_state_dict(other, tensors)
  got, stats = efficientnet.from_state_dict(other, tensors, head=False)
  assert efficientnet.HEAD not in got
  got["fc"] = params["fc"]
  jax.tree.map(
    np.testing.assert_array_equal, (got, stats), (params, collections)
  )


def test_state_dict_refuses_by_name():
  module = _tiny()
  tensors = efficientnet.to_state_dict(module, *_drawn())
  name = "_blocks.1._bn2.bias"
  lacking = {k: v for k, v in tensors.items() if k != name}
  for given, message in (
    (lacking, r"missing: _blocks\.1\._bn2\.bias \(16,\)\."),
    (tensors | {"_blocks.9.x": np.ones(2)}, "not known: _blocks.9.x"),
    (tensors | {name: np.ones(9)}, r"_bn2.bias \(9,\) instead of \(16,\)"),
    ({}, "EfficientNet of 3 blocks.* 5 classes; missing: .* more"),
  ):
    with pytest.raises(InputError, match=message):
      efficientnet.from_state_dict(module, given)
  # A Lite network has no squeezing, so the names of another are not known.
  with pytest.raises(InputError, match=r"EfficientNet-Lite.*_se_.* more"):
    efficientnet.from_state_dict(_tiny(True), tensors)


def test_efficientnet_refuses():
  with pytest.raises(InputError, match="did you mean 'efficientnet_lite0'"):
    efficientnet.make("efficientnet-lite0", num_classes=3)
  for options, word in (
    ({"stem": "large"}, "stem must be one of imagenet, small, got 'large'"),
    ({"num_classes": 0}, "num_classes must be 1 or more, got 0"),
    ({"width": 0}, "width must be 1 or more, got 0"),
  ):
    with pytest.raises(ValueError, match=word):
      apply.init(_tiny(**options), KEY, IMAGES, train=False)
  with pytest.raises(TypeCheckError, match="images"):
    apply.init(_tiny(), KEY, IMAGES[0], train=False)
