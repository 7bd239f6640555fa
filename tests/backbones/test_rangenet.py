import functools
from functools import partial
import math
import zlib

import jax
import jax.numpy as jnp
from jaxtyping import TypeCheckError
import numpy as np
import pytest

from jaxshape.backbones import rangenet
from jaxshape.errors import InputError
from jaxshape.layers import apply

KEY = jax.random.key(0)
IMAGE = np.random.default_rng(0).normal(size=(1, 3, 16, 5)).astype(np.float32)
WIDE = np.concatenate([IMAGE, IMAGE[:, :, ::-1]], axis=2)


def _net(**options):
  return rangenet.RangeNet(**{"num_classes": 3, "width": 2, **options})


@functools.cache
def _shapes(net, shape=(1, 3, 32, 5)):
  """Shapes of the parameters, the other collections and the logits."""
  image = jax.ShapeDtypeStruct(shape, jnp.float32)
  made = lambda image: net.init_with_output(KEY, image, train=False)
  logits, variables = jax.eval_shape(made, image)
  return variables["params"], {"batch_stats": variables["batch_stats"]}, logits


def _rule_weights(net):
  """Numbers that depend on the public name and the place alone."""
  params, collections, _ = _shapes(net)
  zeros = lambda tree: jax.tree.map(lambda x: np.zeros(x.shape), tree)
  names = rangenet.to_state_dict(net, zeros(params), zeros(collections))
  tensors = {}
  for name, like in names.items():
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    x = rng.uniform(-1, 1, like.shape)
    if name.endswith("running_var"):
      x = 1.25 + x / 4
    elif x.ndim == 1:
      x = float(name.endswith(".weight")) + x / 5
    else:
      x = x * np.sqrt(3 / math.prod(x.shape[1:]))
    tensors[name] = x.astype(np.float32)
  return tensors


# The public network, from its own names and layouts: [batch, channels, h, w].


def _conv(x, t, name, stride=1):
  weight = t[f"{name}.weight"]
  high, wide = weight.shape[2] // 2, weight.shape[3] // 2
  padded = np.pad(x, ((0, 0), (0, 0), (high, high), (wide, wide)))
  windows = np.lib.stride_tricks.sliding_window_view(
    padded, weight.shape[2:], (2, 3)
  )
  y = np.einsum("bchwij,ocij->bohw", windows[:, :, :, ::stride], weight)
  bias = t.get(f"{name}.bias")
  return y if bias is None else y + bias[:, None, None]


def _norm(x, t, name):
  row = lambda leaf: t[f"{name}.{leaf}"][:, None, None]
  y = (x - row("running_mean")) / np.sqrt(row("running_var") + 1e-5)
  return y * row("weight") + row("bias")


def _leaky(x):
  return np.where(x > 0, x, 0.1 * x)


def _block(x, t, name):
  y = _leaky(_norm(_conv(x, t, f"{name}.conv1"), t, f"{name}.bn1"))
  return x + _leaky(_norm(_conv(y, t, f"{name}.conv2"), t, f"{name}.bn2"))


def _adaptive_block(x, xyz, t, name):
  z = _norm(_conv(xyz, t, f"{name}.attention_x.0"), t, f"{name}.attention_x.1")
  padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
  windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))
  unfolded = np.moveaxis(windows, (4, 5), (2, 3)).reshape(z.shape)
  y = unfolded / (1 + np.exp(-z))
  for conv, norm in ((0, 1), (3, 4)):
    y = _conv(y, t, f"{name}.position_mlp_2.{conv}")
    y = np.maximum(_norm(y, t, f"{name}.position_mlp_2.{norm}"), 0)
  return x + y


def _upconv(x, t, name):
  weight = t[f"{name}.weight"]  # [in, out, 1, 4]
  batch, _, height, width = x.shape
  y = np.zeros((batch, weight.shape[1], height, 2 * width + 2))
  for q, j in np.ndindex(width, 4):
    y[..., 2 * q + j] += np.einsum("bih,io->boh", x[..., q], weight[:, :, 0, j])
  return y[..., 1:-1] + t[f"{name}.bias"][:, None, None]


def _decode(x, skips, t):
  levels = []
  for i in range(5, 0, -1):
    name = f"decoder.dec{i}"
    up = f"{name}.upconv.weight" in t
    y = _upconv(x, t, f"{name}.upconv") if up else _conv(x, t, f"{name}.conv")
    x = _block(_leaky(_norm(y, t, f"{name}.bn")), t, f"{name}.residual")
    x = x + skips.pop() if up else x
    levels.append(x)
  return levels


def _transcribed(image, t, *, adaptive):
  x = np.moveaxis(image.astype(np.float64), -1, 1)
  xyz = x[:, 1:4]
  x = _leaky(_norm(_conv(x, t, "backbone.conv1"), t, "backbone.bn1"))
  skips = []
  for i, blocks in enumerate((1, 1, 2, 2, 1), 1):
    name = f"backbone.enc{i}"
    narrower = f"{name}.conv.weight" in t
    before = x
    down = lambda x, name=name: _leaky(
      _norm(_conv(x, t, f"{name}.conv", 2), t, f"{name}.bn")
    )
    x = x if adaptive else down(x)
    for j in range(blocks):
      block = f"{name}.residual_{j}"
      x = _adaptive_block(x, xyz, t, block) if adaptive else _block(x, t, block)
    if narrower:
      skips.append(before)
    if adaptive and narrower:
      x = down(x)
      at = np.linspace(0, xyz.shape[-1] - 1, xyz.shape[-1] // 2)
      line = lambda row, at=at: np.interp(at, np.arange(len(row)), row)
      xyz = np.apply_along_axis(line, -1, xyz)
  levels = _decode(x, skips, t)
  if not adaptive:
    return [_conv(levels[-1], t, "head.1")]
  return [_conv(y, t, f"head{i}.1") for i, y in enumerate(levels, 1)][::-1]


@pytest.mark.parametrize("name", ["squeezesegv3_21", "rangenet_21"])
def test_network_transcribed(name):
  net = _net(**rangenet.NAMES[name], rows=0)
  tensors = _rule_weights(net)
  params, collections = rangenet.from_state_dict(net, tensors)
  got, _ = jax.jit(partial(apply.apply, net, train=False))(
    params, collections, WIDE
  )
  adaptive = name == "squeezesegv3_21"
  want = _transcribed(WIDE, tensors, adaptive=adaptive)
  assert len(got) == len(want)
  for z, w in zip(got, want, strict=True):
    np.testing.assert_allclose(z, np.moveaxis(w, 1, -1), atol=1e-4)
    assert np.std(w) > 0.05


@pytest.mark.parametrize(
  ("name", "want"),
  [
    ("squeezesegv3_21", 9247140),
    ("squeezesegv3_53", 25959588),
    ("rangenet_53", 50377364),
  ],
)
def test_parameters_as_many_as_published(name, want):
  net = rangenet.RangeNet(num_classes=20, **rangenet.NAMES[name])
  params, collections, logits = _shapes(net)
  assert sum(math.prod(x.shape) for x in jax.tree.leaves(params)) == want
  assert set(collections) == {"batch_stats"}
  assert logits[0].shape == (1, 3, 32, 20)


def test_halving_keeps_the_corners():
  x = np.arange(8, dtype=np.float32)[None, :, None]
  got = rangenet.halve(x)[0, :, 0]  # By hand: i * 7 / 3.
  np.testing.assert_allclose(got, [0, 7 / 3, 14 / 3, 7], rtol=1e-6)
  np.testing.assert_array_equal(rangenet.halve(x[:, :2]), [[[0.0]]])
  with pytest.raises(ValueError, match="width must be even, got 7"):
    rangenet.halve(x[:, :7])


def test_logits_of_every_kind():
  heads = {
    "decoder": [32, 16, 8, 4, 4],
    "encoder": [32, 32, 16, 8, 4, 4],
    "final": [32],
  }
  for kind, widths in heads.items():
    *_, logits = _shapes(_net(heads=kind))
    assert [z.shape for z in logits] == [(1, 3, w, 3) for w in widths]
  *_, logits = _shapes(_net(variant="se", heads="final"), (2, 16, 32, 5))
  assert logits[0].shape == (2, 16, 32, 3)
  *_, logits = _shapes(_net(downsampling=5), (1, 1, 64, 5))
  assert [z.shape[2] for z in logits] == [64, 32, 16, 8, 4]
  net = _net(coordinates="all", attention_kernel=1, dtype=jnp.bfloat16)
  params, _, logits = _shapes(net)
  kernel = params["enc1"]["residual_0"]["sac"]["attention_kernel"]
  assert kernel.shape == (1, 1, 5, 9, 2, 1)
  assert {z.dtype for z in logits} == {jnp.dtype(jnp.float32)}
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}


def test_training_drops_channels_and_skips_carry_no_gradient():
  image = np.concatenate([IMAGE, IMAGE[:, ::-1]])[:, :1]
  made = _net(variant="none", heads="final", dropout=0.2, width=4)
  tensors = _rule_weights(made)
  params, collections = rangenet.from_state_dict(made, tensors)

  @partial(jax.jit, static_argnames="net")
  def run(key, net):
    """Logits, how they move with the first layer's kernel, and statistics."""

    def first(kernel):
      changed = {**params, "conv1": {"kernel": kernel}}
      (z,), after = apply.apply(
        net, changed, collections, image, train=True, update=True, key=key
      )
      return z, after

    kernel = params["conv1"]["kernel"]
    return jax.jvp(first, (kernel,), (np.cos(kernel),), has_aux=True)

  z, moved, after = run(KEY, made)
  again, _, _ = run(KEY, made)
  np.testing.assert_array_equal(z, again)
  other, _, _ = run(jax.random.key(1), made)
  assert np.abs(z - other).max() > 1e-3
  assert np.all(np.isfinite(moved))
  before = collections["batch_stats"]["bn1"]["var"]
  assert np.all(after["batch_stats"]["bn1"]["var"] != before)
  same, attached, _ = run(KEY, made.clone(detach_skips=False))
  np.testing.assert_allclose(same, z, atol=1e-6)
  assert np.abs(attached - moved).max() > 1e-2


@pytest.mark.parametrize(
  "options",
  [
    {},
    rangenet.NAMES["rangenet_21"],
    *({"variant": v} for v in ("oisk", "sk", "cbam")),
  ],
)
def test_state_dict_there_and_back(options):
  net = _net(**options)
  tensors = _rule_weights(net)
  named = {f"module.{name}": x for name, x in tensors.items()}
  named["module.backbone.bn1.num_batches_tracked"] = np.array(7)
  params, collections = rangenet.from_state_dict(net, named)
  shapes = jax.tree.map(lambda x: x.shape, (params, collections))
  assert shapes == jax.tree.map(lambda x: x.shape, _shapes(net)[:2])
  back = rangenet.to_state_dict(net, params, collections)
  assert set(back) == set(tensors)
  for name, x in tensors.items():
    np.testing.assert_array_equal(back[name], x)


def test_names_and_shapes_of_the_public_code():
  tensors = _rule_weights(_net())
  want = {
    "backbone.conv1.weight": (2, 5, 3, 3),
    "backbone.bn1.running_var": (2,),
    "backbone.enc2.residual_0.attention_x.0.weight": (36, 3, 7, 7),
    "backbone.enc2.residual_0.attention_x.0.bias": (36,),
    "backbone.enc2.residual_0.attention_x.1.running_mean": (36,),
    "backbone.enc2.residual_0.position_mlp_2.0.weight": (4, 36, 1, 1),
    "backbone.enc2.residual_0.position_mlp_2.0.bias": (4,),
    "backbone.enc2.residual_0.position_mlp_2.1.weight": (4,),
    "backbone.enc2.residual_0.position_mlp_2.3.weight": (4, 4, 3, 3),
    "backbone.enc2.residual_0.position_mlp_2.3.bias": (4,),
    "backbone.enc2.residual_0.position_mlp_2.4.bias": (4,),
    "backbone.enc1.conv.weight": (4, 2, 3, 3),
    "decoder.dec1.upconv.weight": (4, 2, 1, 4),
    "decoder.dec1.upconv.bias": (2,),
    "decoder.dec5.conv.bias": (16,),
    "decoder.dec3.residual.conv1.weight": (16, 8, 1, 1),
    "head1.1.weight": (3, 16, 1, 1),
    "head5.1.weight": (3, 2, 3, 3),
  }
  assert {name: tensors[name].shape for name in want} == want
  assert "backbone.enc4.conv.weight" not in tensors


def test_state_dict_refuses():
  net = _net()
  tensors = _rule_weights(net)
  tensors["head1.1.bias"] = np.zeros(7, np.float32)
  tensors["decoder.dec9.bn.weight"] = np.zeros(2, np.float32)
  lost = [name for name in tensors if name.startswith("backbone.enc4")]
  for name in lost:
    del tensors[name]
  with pytest.raises(InputError) as caught:
    rangenet.from_state_dict(net, tensors)
  text = str(caught.value)
  assert "with 3 classes" in text
  assert f"missing: {lost[0]}" in text or "missing: backbone.enc4" in text
  assert f"and {len(lost) - 5} more" in text
  assert "not known: decoder.dec9.bn.weight" in text
  assert "of another shape: head1.1.bias (7,) instead of (3,)" in text


@pytest.mark.parametrize(
  ("options", "words"),
  [
    ({"depth": 50}, "depth must be one of 21, 53, got 50"),
    ({"variant": "ski"}, "variant must be one of none, .*, got 'ski'"),
    ({"heads": "all"}, "heads must be one of decoder, encoder, final"),
    ({"downsampling": 4}, "downsampling must be one of 3, 5, got 4"),
    ({"coordinates": "yz"}, "coordinates must be one of xyz, all, got 'yz'"),
    ({"arrangement": "rangenet"}, "variant must be 'none' where arrangement"),
    ({"num_classes": 0}, "num_classes must be 1 or more, got 0"),
    ({"width": 0}, "width must be 1 or more, got 0"),
    ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
    ({"attention_kernel": 2}, "attention_kernel must be odd.*got 2"),
    ({"rows": -1}, "rows must be 0 or more, got -1"),
  ],
)
def test_network_refuses(options, words):
  with pytest.raises(ValueError, match=words):
    _shapes(_net(**options))


def test_network_refuses_images():
  for width, step, near in ((100, 8, "96 or 104"), (4, 8, "use 8")):
    with pytest.raises(InputError, match=f"by {step} .*got {width}; .*{near}"):
      _shapes(_net(), (1, 3, width, 5))
  with pytest.raises(InputError, match="by 32 .*got 48; use 32 or 64"):
    _shapes(_net(downsampling=5), (1, 3, 48, 5))
  with pytest.raises(InputError, match="must hold pixels"):
    _shapes(_net(), (1, 0, 32, 5))
  with pytest.raises(TypeCheckError, match="image"):
    _shapes(_net(), (1, 3, 32, 4))
