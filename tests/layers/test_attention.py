from functools import partial

import jax
import jax.numpy as jnp
from jax.test_util import check_grads
from jaxtyping import TypeCheckError
import numpy as np
import pytest

from jaxshape.errors import InputError
from jaxshape.layers import apply, attention

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)
HEADS, WIDTH, INNER = 2, 6, 5
TOKENS = RNG.normal(size=(3, 4, WIDTH)).astype(np.float32)
MASK = np.array([[1, 1, 1, 1], [1, 0, 1, 0], [0, 1, 0, 0]], bool)
NET = attention.Encoder(2, HEADS, INNER)


def _drawn(net, tokens=TOKENS):
  """Parameters of which none is a plain 0 or 1."""
  init = partial(apply.init, net, KEY, train=False)
  params, _ = jax.eval_shape(init, tokens)
  draw = lambda s: RNG.normal(0.3, 0.5, s.shape).astype(s.dtype)
  return jax.tree.map(draw, params)


@partial(jax.jit, static_argnums=0, static_argnames="train")
def _call(net, params, tokens, mask=None, key=None, *, train=False):
  call = partial(apply.apply, net, params, {}, train=train)
  return call(tokens, mask=mask, key=key)[0]


PARAMS = _drawn(NET)


def _normalize(x, p):
  x = (x - x.mean()) / np.sqrt(x.var() + 1e-5)
  return x * p["scale"] + p["bias"]


def _linear(x, p):
  return x @ p["kernel"] + p["bias"]


def _heard(x, mask, p):
  """Eq. 1 of every head and token by itself."""
  q, k, v = np.split(_linear(x, p["in_proj"]), 3, axis=-1)
  size = WIDTH // HEADS
  out = np.zeros_like(x)
  for i in range(len(x)):
    for h in range(HEADS):
      cut = slice(h * size, (h + 1) * size)
      e = [np.exp(q[i, cut] @ k[j, cut] / size**0.5) for j in range(len(x))]
      for j in np.flatnonzero(mask):
        out[i, cut] += e[j] / np.sum(np.array(e)[mask]) * v[j, cut]
  return _linear(out, p["out_proj"])


def _encode(x, mask, params):
  """A post-norm encoder on tokens [length, width], in float64."""
  params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  x = np.asarray(x, np.float64)
  for i in range(len(params)):
    p = params[f"layers_{i}"]
    if "self_attn" in p:
      heard = _heard(x, mask, p["self_attn"])
    else:
      heard = _linear(x, p["connected"])
    x = np.stack([_normalize(r, p["norm1"]) for r in x + heard])
    inner = np.maximum(_linear(x, p["linear1"]), 0)
    x = x + _linear(inner, p["linear2"])
    x = np.stack([_normalize(r, p["norm2"]) for r in x])
  return x


@pytest.mark.parametrize("mask", [None, MASK])
def test_encoder_transcribed(mask):
  masks = np.ones_like(MASK) if mask is None else mask
  both = zip(TOKENS, masks, strict=True)
  want = np.stack([_encode(x, m, PARAMS) for x, m in both])
  got = _call(NET, PARAMS, TOKENS, mask)
  np.testing.assert_allclose(got, want, atol=2e-5)


def test_encoder_without_attention_transcribed():
  net = attention.Encoder(2, HEADS, attention=False)
  params = _drawn(net)
  assert params["layers_0"]["linear1"]["kernel"].shape == (WIDTH, WIDTH)
  want = np.stack([_encode(x, None, params) for x in TOKENS])
  got = _call(net, params, TOKENS, MASK)
  np.testing.assert_allclose(got, want, atol=2e-5)
  # Each token by itself.
  got = _call(net, params, TOKENS[:, ::-1])
  np.testing.assert_allclose(got, want[:, ::-1], atol=2e-5)


def test_masked_tokens_weigh_exactly_nothing():
  changed = np.where(MASK[..., None], TOKENS, 1e4).astype(np.float32)
  want = np.asarray(_call(NET, PARAMS, TOKENS, MASK))
  got = np.asarray(_call(NET, PARAMS, changed, MASK))
  np.testing.assert_array_equal(got[MASK], want[MASK])
  # They do weigh something without the mask.
  got = np.asarray(_call(NET, PARAMS, changed))
  assert np.abs(got - want)[MASK].max() > 0.01


def test_a_mask_does_what_leaving_out_does():
  want = _call(NET, PARAMS, TOKENS[1:2, [0, 2]])
  got = np.asarray(_call(NET, PARAMS, TOKENS, MASK))[1:2, [0, 2]]
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_rows_without_any_token_are_finite_and_so_are_their_gradients():
  mask = np.array(MASK)
  mask[1] = False
  # As if nothing had been heard: the last linear layer's bias is what is left.
  p = jax.tree.map(np.array, PARAMS)
  for layer in p.values():
    layer["self_attn"]["out_proj"]["kernel"][:] = 0
  want = np.asarray(_call(NET, p, TOKENS))[1]
  loss = lambda p, x: jnp.sum(jnp.sin(_call(NET, p, x, mask)))
  got = np.asarray(_call(NET, PARAMS, TOKENS, mask))[1]
  np.testing.assert_allclose(got, want, atol=1e-5)
  grads = jax.tree.leaves(jax.grad(loss, (0, 1))(PARAMS, TOKENS))
  assert all(np.isfinite(g).all() for g in grads)
  assert any(np.abs(g).max() > 0.1 for g in grads)


def test_encoder_commutes_with_the_order_of_the_tokens():
  order = [2, 0, 3, 1]
  want = np.asarray(_call(NET, PARAMS, TOKENS, MASK))[:, order]
  got = _call(NET, PARAMS, TOKENS[:, order], MASK[:, order])
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_encoder_under_vmap_and_any_leading_axes():
  want = np.asarray(_call(NET, PARAMS, TOKENS, MASK))
  one = lambda x, m: _call(NET, PARAMS, x, m)
  got = jax.vmap(one)(TOKENS, MASK)
  np.testing.assert_allclose(got, want, atol=1e-5)
  got = one(TOKENS[0], MASK[0])  # No batch at all, and two axes of it.
  np.testing.assert_allclose(got, want[0], atol=1e-5)
  got = one(TOKENS[:, None], MASK[:, None])
  np.testing.assert_allclose(got, want[:, None], atol=1e-5)


def test_encoder_gradients():
  net = attention.EncoderLayer(HEADS, INNER)
  params = PARAMS["layers_0"]
  f = lambda p, x: _call(net, p, x, MASK[1:2])
  check_grads(f, (params, TOKENS[1:2]), order=1, modes=["rev"], rtol=0.03)


def test_dropout_is_drawn_anew_and_keeps_the_mean():
  net = attention.EncoderLayer(HEADS, INNER, dropout=0.2)
  params = PARAMS["layers_0"]
  keys = jax.random.split(KEY, 3)
  a, b, c = (
    np.asarray(_call(net, params, TOKENS, MASK, key, train=True))
    for key in (keys[0], keys[0], keys[1])
  )
  np.testing.assert_array_equal(a, b)
  assert np.abs(a - c).max() > 0.1
  # Not drawn once for a whole batch.
  same = np.broadcast_to(TOKENS[:1], (3, 4, WIDTH))
  got = np.asarray(_call(net, params, same, None, keys[2], train=True))
  assert np.abs(got[0] - got[1]).max() > 0.1
  # Off outside of training, whatever the key, and where it is 0.
  want = np.asarray(_call(net, params, TOKENS, MASK))
  got = _call(net, params, TOKENS, MASK, keys[0])
  np.testing.assert_array_equal(got, want)
  net = attention.EncoderLayer(HEADS, INNER, dropout=0.0)
  got = _call(net, params, TOKENS, MASK, train=True)
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_attention_weights_are_scaled_where_they_are_dropped():
  net = attention.SelfAttention(1, dropout=0.5)
  eye = np.eye(WIDTH, dtype=np.float32)
  zero = np.zeros((WIDTH, 3 * WIDTH), np.float32)
  zero[:, -WIDTH:] = eye  # Queries and keys are 0, so weights are even.
  params = {
    "in_proj": {"kernel": zero, "bias": np.zeros(3 * WIDTH, np.float32)},
    "out_proj": {"kernel": eye, "bias": np.zeros(WIDTH, np.float32)},
  }
  ones = np.ones((2000, 4, WIDTH), np.float32)
  got = np.asarray(_call(net, params, ones, key=KEY, train=True))
  # A sum of four fair coins, each worth 1/4 / 0.5.
  values, counts = np.unique(got[..., 0], return_counts=True)
  np.testing.assert_allclose(values, [0, 0.5, 1, 1.5, 2], atol=1e-6)
  want = np.array([1, 4, 6, 4, 1]) / 16
  np.testing.assert_allclose(counts / 8000, want, atol=0.03)


def test_encoder_starts_as_pytorch_does():
  net = attention.EncoderLayer(4, 32)
  params, _ = apply.init(
    net, KEY, np.zeros((1, 2, 64), np.float32), train=False
  )
  limits = {
    ("self_attn", "in_proj", "kernel"): np.sqrt(6 / (4 * 64)),  # Xavier's.
    ("self_attn", "out_proj", "kernel"): 1 / 8,
    ("linear1", "kernel"): 1 / 8,
    ("linear1", "bias"): 1 / 8,
    ("linear2", "kernel"): 32**-0.5,
    ("linear2", "bias"): 32**-0.5,
  }
  for path, limit in limits.items():
    value = params
    for name in path:
      value = value[name]
    highest = np.abs(value).max()
    assert 0.85 * limit < highest <= limit, path
  for name in ("in_proj", "out_proj"):
    assert not np.any(params["self_attn"][name]["bias"])


def test_encoder_in_16_bits():
  want = np.asarray(_call(NET, PARAMS, TOKENS, MASK))
  net = attention.Encoder(2, HEADS, INNER, dtype=jnp.bfloat16)
  got = _call(net, PARAMS, TOKENS, MASK)
  assert got.dtype == jnp.bfloat16
  np.testing.assert_allclose(got.astype(np.float32), want, atol=0.15)


def test_state_dict_by_hand_and_back():
  tensors = attention.to_state_dict(PARAMS, "encoder.")
  assert len(tensors) == 2 * 12
  weight = tensors["encoder.layers.1.self_attn.in_proj_weight"]
  assert weight.shape == (3 * WIDTH, WIDTH)
  kernel = PARAMS["layers_1"]["self_attn"]["in_proj"]["kernel"]
  np.testing.assert_array_equal(weight, kernel.T)
  weight = tensors["encoder.layers.0.linear2.weight"]
  assert weight.shape == (WIDTH, INNER)
  others = {"positions": np.zeros(3), "layers.0.norm1.weight": np.zeros(9)}
  for start in ("", "module."):
    given = {start + name: value for name, value in tensors.items()}
    got = attention.from_state_dict(given | others, "encoder.")
    jax.tree.map(np.testing.assert_array_equal, got, PARAMS)


def test_state_dict_without_attention_and_back():
  net = attention.Encoder(1, HEADS, INNER, attention=False)
  params = _drawn(net)
  tensors = attention.to_state_dict(params, "")
  assert tensors["layers.0.connected.weight"].shape == (WIDTH, WIDTH)
  got = attention.from_state_dict(tensors, "")
  jax.tree.map(np.testing.assert_array_equal, got, params)


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"layers.1.norm1.bias": None}, "missing: layers.1.norm1.bias"),
    ({"layers.1.norm3.bias": np.zeros(6)}, "not known: layers.1.norm3.bias"),
    ({"layers.x.norm1.bias": np.zeros(6)}, "not known: layers.x.norm1.bias"),
    (
      {"layers.9999.norm1.bias": np.zeros(6)},
      r"missing: layers.2.self_attn.in_proj_weight, .* more",
    ),
    (
      {"layers.0.linear1.weight": np.zeros((6, 5))},
      r"shape: layers.0.linear1.weight \(6, 5\) instead of \(5, 6\)",
    ),
    (
      {"layers.0.norm1.weight": np.zeros(7)},
      r"shape: layers.0.norm1.weight \(7,\) instead of \(6,\)",
    ),
    (
      {"layers.1.linear1.bias": np.full(5, np.nan)},
      "not finite: layers.1.linear1.bias",
    ),
  ],
)
def test_from_state_dict_refuses(change, words):
  tensors = attention.to_state_dict(PARAMS, "") | change
  tensors = {k: v for k, v in tensors.items() if v is not None}
  with pytest.raises(InputError, match=words):
    attention.from_state_dict(tensors, "")


def test_from_state_dict_refuses_what_holds_no_encoder():
  with pytest.raises(InputError, match="'net.layers.'; they hold conv1.weight"):
    attention.from_state_dict({"conv1.weight": np.zeros(3)}, "net.")
  with pytest.raises(InputError, match="they hold nothing"):
    attention.from_state_dict({}, "net.")


@pytest.mark.parametrize(
  ("options", "words"),
  [
    ({"heads": 4}, "heads must be 1 or more and divide the width 6, got 4"),
    ({"heads": 0}, "heads must be 1 or more and divide the width 6, got 0"),
    ({"layers": 0}, "layers must be 1 or more, got 0"),
    ({"feedforward": 0}, "feedforward must be 1 or more, got 0"),
    ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
    ({"epsilon": 0.0}, "epsilon must be above 0 and finite, got 0.0"),
  ],
)
def test_encoder_refuses(options, words):
  net = attention.Encoder(**{"layers": 1, "heads": 2, **options})
  with pytest.raises(ValueError, match=words):
    apply.init(net, KEY, TOKENS, train=False)


def test_encoder_refuses_shapes():
  call = partial(apply.apply, NET, PARAMS, {}, train=False)
  with pytest.raises(TypeCheckError, match="mask"):
    call(TOKENS, mask=MASK[:, :3])
  with pytest.raises(TypeCheckError, match="tokens"):
    call(TOKENS[0, 0])


def test_queries_and_keys_may_start_alike():
  tokens = np.random.default_rng(0).standard_normal((2, 5, 8), np.float32)
  layer = attention.SelfAttention(heads=2, alike=True)
  kernel = layer.init(jax.random.key(0), tokens, train=False)["params"][
    "in_proj"
  ]["kernel"]
  query, key, value = np.split(np.asarray(kernel), 3, axis=1)
  np.testing.assert_array_equal(query, key)
  assert (query != value).any()
