import math

import jax
import jax.numpy as jnp
from jaxtyping import TypeCheckError
import numpy as np
import pytest

from jaxshape.backbones import vgg
from jaxshape.errors import InputError
from jaxshape.layers import apply

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
RELU = lambda x: np.maximum(x, 0)


def drawn(net):
  """Parameters and statistics of which none is a plain 0 or 1."""

  def draw(leaf):
    if len(leaf.shape) == 1:
      return RNG.uniform(0.1, 0.9, leaf.shape).astype(np.float32)
    spread = math.sqrt(2 / math.prod(leaf.shape[:-1]))
    return RNG.normal(0, spread, leaf.shape).astype(np.float32)

  return jax.tree.map(draw, vgg._shapes(net))


def convolve(x, part, mode):
  kernel = np.asarray(part["kernel"], np.float64)
  pad = kernel.shape[0] // 2
  wide = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode)
  out = np.zeros((*x.shape[:3], kernel.shape[-1])) + part["bias"]
  for i, j in np.ndindex(kernel.shape[:2]):
    window = wide[:, i : i + x.shape[1], j : j + x.shape[2]]
    out += np.einsum("bhwc,cd->bhwd", window, kernel[i, j])
  return out


def pool(x, *, ceil):
  size = [-(-n // 2) if ceil else n // 2 for n in x.shape[1:3]]
  out = np.empty((len(x), *size, x.shape[-1]))
  for i, j in np.ndindex(*size):
    window = x[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
    out[:, i, j] = window.max((1, 2))
  return out


# Golden: slow transcriptions, layer by layer.


def encode(params, x):
  out, x = [], convolve(x, params["conv0"], "reflect")
  for name in ("1_1", "1_2", "2_1", "2_2", "3_1", "3_2", "3_3", "3_4", "4_1"):
    if name in ("2_1", "3_1", "4_1"):
      x = pool(x, ceil=True)
    x = RELU(convolve(x, params[f"conv{name}"], "reflect"))
    if name.endswith("_1"):
      out.append(x)
  return out


def decode(params, x):
  for name in ("4_1", "3_4", "3_3", "3_2", "3_1", "2_2", "2_1", "1_2"):
    x = RELU(convolve(x, params[f"conv{name}"], "reflect"))
    if name in ("4_1", "3_1", "2_1"):
      x = x.repeat(2, 1).repeat(2, 2)
  return convolve(x, params["conv1_1"], "reflect")


def test_encoder_equals_its_layers_one_by_one():
  net = vgg.Encoder(3)
  params, _ = drawn(net)
  image = RNG.uniform(0, 1, (2, 13, 18, 3)).astype(np.float32)
  got, _ = jax.jit(lambda p, x: apply.apply(net, p, {}, x))(params, image)
  want = encode(params, image)
  assert [x.shape for x in got] == [
    (2, 13, 18, 3),
    (2, 7, 9, 6),
    (2, 4, 5, 12),
    (2, 2, 3, 24),
  ]
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_decoder_equals_its_layers_one_by_one():
  net = vgg.Decoder(2)
  params, _ = drawn(net)
  features = RNG.uniform(0, 1, (2, 2, 3, 16)).astype(np.float32)
  got, _ = jax.jit(lambda p, x: apply.apply(net, p, {}, x))(params, features)
  assert got.shape == (2, 16, 24, 3)
  want = decode(params, features)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_vgg_equals_its_layers_one_by_one(batch_norm):
  net = vgg.VGG((1, 2), 5, width=2, batch_norm=batch_norm)
  params, collections = drawn(net)
  # Neither a multiple of 4, nor of 7 after the poolings.
  x = images = RNG.normal(size=(2, 38, 15, 3)).astype(np.float32)
  got, _ = jax.jit(lambda p, c, x: apply.apply(net, p, c, x, train=False))(
    params, collections, images
  )
  for block, count in enumerate((1, 2), 1):
    for i in range(1, count + 1):
      x = convolve(x, params[f"conv{block}_{i}"], "constant")
      if batch_norm:
        name = f"bn{block}_{i}"
        stats, own = collections["batch_stats"][name], params[name]
        x = (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5)
        x = x * own["scale"] + own["bias"]
      x = RELU(x)
    x = pool(x, ceil=False)
  means = np.empty((2, 7, 7, 4))
  for i, j in np.ndindex(7, 7):
    rows = slice(i * 9 // 7, -(-(i + 1) * 9 // 7))
    columns = slice(j * 3 // 7, -(-(j + 1) * 3 // 7))
    means[:, i, j] = x[:, rows, columns].mean((1, 2))
  x = means.reshape(2, -1)
  for name in ("fc6", "fc7", "fc8"):
    x = x @ params[name]["kernel"] + params[name]["bias"]
    x = RELU(x) if name != "fc8" else x
  np.testing.assert_allclose(got, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
  ("name", "want"),
  [("vgg11", 132863336), ("vgg16", 138357544), ("vgg19_bn", 143678248)],
)
def test_parameters_as_many_as_torchvision_has(name, want):
  params, collections = vgg._shapes(vgg.make(name, num_classes=1000))
  assert sum(math.prod(x.shape) for x in jax.tree.leaves(params)) == want
  assert bool(collections) == name.endswith("_bn")


# Public names.


def test_names_are_the_places_in_the_public_sequences():
  ours = {v: k for k, v in vgg._names(vgg.Encoder()).items()}
  assert [*ours] == ["0", "2", "5", "9", "12", "16", "19", "22", "25", "29"]
  assert (ours["16"], ours["29"]) == ("conv3_1", "conv4_1")
  ours = {v: k for k, v in vgg._names(vgg.Decoder()).items()}
  assert [*ours] == ["1", "5", "8", "11", "14", "18", "21", "25", "28"]
  assert (ours["14"], ours["18"]) == ("conv3_1", "conv2_2")
  ours = vgg._names(vgg.make("vgg19", num_classes=2))
  assert ours["conv4_1"] == "features.19"
  assert ours["conv5_4"] == "features.34"
  ours = vgg._names(vgg.make("vgg16_bn", num_classes=2))
  assert (ours["conv5_3"], ours["bn5_3"]) == ("features.40", "features.41")


@pytest.mark.parametrize(
  "net",
  [
    vgg.Encoder(3),
    vgg.Decoder(2),
    vgg.VGG((1, 2), 5, width=1),
    vgg.VGG((2, 1), 3, width=2, batch_norm=True),
  ],
)
def test_state_dict_there_and_back(net):
  params, collections = drawn(net)
  tensors = vgg.to_state_dict(net, params, collections)
  wrapped = {f"module.{k}": v for k, v in tensors.items()}
  wrapped["module.features.1.num_batches_tracked"] = np.int64(3)
  got = vgg.from_state_dict(net, wrapped)
  jax.tree.map(np.testing.assert_array_equal, got, (params, collections))


def test_layouts_are_those_of_pytorch():
  net = vgg.VGG((1,), 5, width=2)
  params, _ = drawn(net)
  tensors = vgg.to_state_dict(net, params, {})
  kernel = params["conv1_1"]["kernel"]  # [out, in, height, width] there.
  assert tensors["features.0.weight"][1, 2, 0, 1] == kernel[0, 1, 2, 1]
  # PyTorch flattens channels, rows, columns.
  first = params["fc6"]["kernel"].reshape(7, 7, 2, 128)
  column = 1 * 49 + 3 * 7 + 5
  assert tensors["classifier.0.weight"][9, column] == first[3, 5, 1, 9]
  assert tensors["classifier.6.weight"].shape == (5, 128)


def test_encoder_takes_its_part_of_a_whole_vgg19():
  net = vgg.Encoder(2)
  params, _ = drawn(net)
  tensors = vgg.to_state_dict(net, params, {})
  more = {
    f"{i}.{leaf}": np.zeros(1)
    for i in (32, 35, 38, 42, 45, 48, 51)
    for leaf in ("weight", "bias")
  }
  got, _ = vgg.from_state_dict(net, tensors | more)
  jax.tree.map(np.testing.assert_array_equal, got, params)


def test_encoder_reads_torchvision_with_the_normalization_of_imagenet():
  whole = vgg.VGG(vgg.VARIANTS["vgg19"][0], 2, width=1)
  params, _ = drawn(whole)
  tensors = vgg.to_state_dict(whole, params, {})
  got, _ = vgg.from_state_dict(vgg.Encoder(1), tensors)
  for name, part in got.items():
    if name != "conv0":
      jax.tree.map(np.testing.assert_array_equal, part, params[name])
  pixel = np.array([[[[0.485, 0.456 + 0.224, 0.406]]]], np.float32)
  seen = convolve(pixel, got["conv0"], "reflect")
  np.testing.assert_allclose(seen[0, 0, 0], [0, 1, 0], atol=1e-6)


def test_state_dict_without_its_head():
  net, other = vgg.VGG((1,), 5, width=1), vgg.VGG((1,), 7, width=1)
  params, _ = drawn(net)
  tensors = vgg.to_state_dict(net, params, {})
  with pytest.raises(
    InputError, match=r"classifier.6.weight \(5, 64\) instead"
  ):
    vgg.from_state_dict(other, tensors)
  got, _ = vgg.from_state_dict(other, tensors, head=False)
  assert set(got) == {"conv1_1"}


def test_state_dict_refuses_by_name():
  net = vgg.Encoder(2)
  tensors = vgg.to_state_dict(net, *drawn(net))
  lacking = {k: v for k, v in tensors.items() if k != "29.bias"}
  for given, message in (
    (lacking, r"Encoder of width 2; missing: 29\.bias \(16,\)\."),
    (tensors | {"33.weight": np.ones(2)}, "not known: 33.weight"),
    (tensors | {"2.bias": np.ones(9)}, r"2.bias \(9,\) instead of \(2,"),
    ({}, "missing: .* more"),
  ):
    with pytest.raises(InputError, match=message):
      vgg.from_state_dict(net, given)


# Laws and transforms.


def test_a_drawn_encoder_starts_with_the_normalization_of_imagenet():
  init = lambda x: apply.init(vgg.Encoder(1), KEY, x)
  params, _ = jax.jit(init)(jnp.zeros((1, 9, 9, 3)))
  pixel = np.array([[[[0.485 + 0.229, 0.456, 0.406]]]], np.float32)
  seen = convolve(pixel, params["conv0"], "reflect")
  np.testing.assert_allclose(seen[0, 0, 0], [1, 0, 0], atol=1e-6)


def test_training_drops_and_normalizes_by_the_batch():
  net = vgg.VGG((1,), 3, width=1, batch_norm=True)
  params, collections = drawn(net)
  images = RNG.normal(5, 2, (8, 14, 14, 3)).astype(np.float32)
  call = jax.jit(
    lambda key: apply.apply(
      net, params, collections, images, key=key, update=True, train=True
    )
  )
  (a, moved), (b, _) = call(KEY), call(jax.random.key(1))
  assert not np.allclose(a, b)
  assert not np.array_equal(
    moved["batch_stats"]["bn1_1"]["mean"],
    collections["batch_stats"]["bn1_1"]["mean"],
  )


def test_16_bits_are_computed_in_and_32_come_out():
  net, half = vgg.Encoder(2), vgg.Encoder(2, dtype=jnp.bfloat16)
  params, _ = drawn(net)
  image = RNG.uniform(0, 1, (1, 9, 9, 3)).astype(np.float32)
  call = jax.jit(
    lambda x: [apply.apply(n, params, {}, x)[0][-1] for n in (net, half)]
  )
  a, b = call(image)
  assert b.dtype == jnp.float32
  assert np.any(np.asarray(a) != b)
  np.testing.assert_allclose(a, b, rtol=0.1, atol=0.1 * float(a.max()))


# Refusals.


def test_networks_refuse():
  encoder, decoder = vgg.Encoder(1), vgg.Decoder(1)

  def traced(net, *shape, **options):
    init = lambda x: apply.init(net, KEY, x, **options)
    return jax.eval_shape(init, jax.ShapeDtypeStruct(shape, jnp.float32))

  with pytest.raises(ValueError, match="at least 9 x 9 pixels, got 8 x 20"):
    traced(encoder, 1, 8, 20, 3)
  with pytest.raises(ValueError, match="at least 2 x 2 pixels, got 1 x 2"):
    traced(decoder, 1, 1, 2, 8)
  net, none = vgg.VGG((1, 1), 2, width=1), vgg.VGG((1,), 0, width=1)
  with pytest.raises(ValueError, match="at least 4 x 4 pixels, got 4 x 3"):
    traced(net, 1, 4, 3, 3, train=False)
  with pytest.raises(ValueError, match="num_classes must be 1 or more, got 0"):
    traced(none, 1, 4, 4, 3, train=False)
  with pytest.raises(TypeCheckError, match="images"):
    traced(encoder, 9, 9, 3)
  with pytest.raises(InputError, match=r"did you mean 'vgg19'\?"):
    vgg.make("vgg91", num_classes=2)
