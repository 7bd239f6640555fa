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
  [
    ("resnet18", 11689512),
    ("resnet34", 21797672),
    ("resnet50", 25557032),
    ("resnet152", 60192808),
  ],
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
  channels = 512 if name in ("resnet18", "resnet34") else 2048
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


def test_stages_are_the_features_on_their_way():
  module = _tiny()
  params, collections = _drawn(module)
  call = lambda method, **options: apply.apply(
    module, params, collections, IMAGES, method=method, **options
  )
  stages, _ = call("stages", train=False)
  assert [x.shape for x in stages] == [(4, 8, 8, 4), (4, 4, 4, 8)]
  np.testing.assert_array_equal(stages[-1], call("features", train=False)[0])
  stats = collections["batch_stats"]
  want = _block(
    stages[0], params["layer2_0"], stats["layer2_0"], stride=2, bottleneck=False
  )
  np.testing.assert_allclose(stages[1], want, rtol=1e-4, atol=1e-4)
  # In training both give the same new statistics.
  a, b = (call(m, train=True, update=True)[1] for m in ("stages", "features"))
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(x, y)
  with pytest.raises(ValueError, match="mask must be None in training"):
    call("stages", train=True, mask=np.ones((4, 8, 8), bool))


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


@pytest.mark.parametrize("form", ["torchvision", "retrieval"])
@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_state_dict_there_and_back(block, form):
  module = _tiny(block)
  params, collections = _drawn(module)
  tensors = resnet.to_state_dict(module, params, collections, form=form)
  first = "conv1" if form == "torchvision" else "features.0"
  kernel = params["conv1"]["kernel"]
  np.testing.assert_array_equal(  # [out, in, height, width].
    tensors[f"{first}.weight"][3, 2, 0, 1], kernel[0, 1, 2, 3]
  )
  # PyTorch has these, too; and parts of the public networks come after.
  more = {"bn1.num_batches_tracked": np.int64(3)}
  if form == "retrieval":
    more |= {"pool.p": np.ones(1), "whiten.weight": np.ones((2, 2))}
    params = {k: v for k, v in params.items() if k != "fc"}
  wrapped = {f"module.{k}": v for k, v in (tensors | more).items()}
  got = resnet.from_state_dict(module, wrapped)
  jax.tree.map(np.testing.assert_array_equal, got, (params, collections))


def test_names_are_those_of_pytorch():
  module = _tiny("bottleneck")
  params, collections = _drawn(module)
  names = resnet.to_state_dict(module, params, collections)
  norm = ("weight", "bias", "running_mean", "running_var")
  want = {"conv1.weight", "fc.weight", "fc.bias", *(f"bn1.{n}" for n in norm)}
  for layer in ("layer1.0", "layer2.0"):
    want |= {f"{layer}.conv{i}.weight" for i in (1, 2, 3)}
    want |= {f"{layer}.bn{i}.{n}" for i in (1, 2, 3) for n in norm}
    want |= {f"{layer}.downsample.0.weight"}
    want |= {f"{layer}.downsample.1.{n}" for n in norm}
  assert set(names) == want
  names = resnet.to_state_dict(module, params, collections, form="retrieval")
  assert len(names) == len(want) - 2
  assert "features.1.running_var" in names
  assert "features.5.0.downsample.0.weight" in names
  # The features alone, as some files hold them.
  bare = {k.removeprefix("features."): v for k, v in names.items()}
  got, _ = resnet.from_state_dict(module, bare)
  assert set(got) == set(params) - {"fc"}


@pytest.mark.parametrize("name", ["resnet34", "resnet101"])
def test_whole_networks_there_and_back(name):
  net = resnet.make(name, num_classes=2, width=1)
  image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  shapes = jax.eval_shape(lambda x: apply.init(net, KEY, x, train=False), image)
  draw = lambda x: RNG.normal(size=x.shape).astype(x.dtype)
  made = jax.tree.map(draw, shapes)
  got = resnet.from_state_dict(net, resnet.to_state_dict(net, *made))
  jax.tree.map(np.testing.assert_array_equal, got, made)


def test_state_dict_without_its_head():
  module = _tiny()
  params, collections = _drawn(module)
  tensors = resnet.to_state_dict(module, params, collections)
  other = resnet.ResNet((1, 1), "basic", 7, width=4, stem="small")
  with pytest.raises(InputError, match=r"fc.weight \(5, 8\) instead of \(7, 8"):
    resnet.from_state_dict(other, tensors)
  got, stats = resnet.from_state_dict(other, tensors, head=False)
  features = lambda net, p, c: apply.apply(
    net, p, c, IMAGES, train=False, method="features"
  )[0]
  np.testing.assert_array_equal(
    features(other, got, stats), features(module, params, collections)
  )


def test_state_dict_refuses_by_name():
  module = _tiny()
  tensors = resnet.to_state_dict(module, *_drawn(module))
  lacking = {k: v for k, v in tensors.items() if k != "layer1.0.bn2.bias"}
  for given, message in (
    (lacking, r"missing: layer1\.0\.bn2\.bias \(4,\)\."),
    (tensors | {"layer9.x": np.ones(2)}, "not known: layer9.x"),
    (tensors | {"bn1.bias": np.ones(9)}, r"bn1.bias \(9,\) instead of \(4,"),
    ({}, "missing: .* more"),
  ):
    with pytest.raises(InputError, match=message):
      resnet.from_state_dict(module, given)
  with pytest.raises(ValueError, match="form must be 'torchvision' or"):
    resnet.to_state_dict(module, {}, {}, form="caffe")


@pytest.mark.parametrize(
  ("block", "stem"), [("basic", "imagenet"), ("bottleneck", "small")]
)
def test_a_mask_keeps_features_as_they_are_alone(block, stem):
  module = resnet.ResNet((1, 1), block, 5, width=4, stem=stem)
  images = RNG.normal(size=(2, 16, 13, 3)).astype(np.float32)
  params, collections = _drawn(module, images)
  call = jax.jit(
    lambda x, mask: apply.apply(
      module, params, collections, x, train=False, method="features", mask=mask
    )[0]
  )
  sizes, mask = ((9, 13), (16, 6)), np.zeros(images.shape[:3], bool)
  for i, (height, width) in enumerate(sizes):
    mask[i, :height, :width] = True
  got = call(images, mask)
  there = mask[:, :: module.stride, :: module.stride]
  assert there.shape == got.shape[:3]
  assert not np.any(np.asarray(got)[~there])
  for i, (height, width) in enumerate(sizes):
    want = call(images[i : i + 1, :height, :width], None)[0]
    part = got[i, : want.shape[0], : want.shape[1]]
    assert there[i].sum() == want.shape[0] * want.shape[1]
    np.testing.assert_allclose(part, want, rtol=1e-4, atol=1e-5)


def test_resnet_refuses():
  with pytest.raises(ValueError, match="mask must be None in training"):
    apply.init(
      _tiny(),
      KEY,
      IMAGES,
      train=True,
      mask=np.ones((4, 8, 8), bool),
      method="features",
    )
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
