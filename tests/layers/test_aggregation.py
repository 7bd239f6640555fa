import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxshape.layers import aggregation, apply, attention


def _tokens(batch=2, k=5, dim=8, seed=0):
  draw = np.random.default_rng(seed)
  x = draw.standard_normal((batch, k + 1, dim)).astype(np.float32)
  x /= np.linalg.norm(x, axis=-1, keepdims=True)
  return x[:, 0], x[:, 1:], np.ones((batch, k), bool)


def _made(seed=0, **options):
  net = aggregation.Aggregator(
    **{"layers": 1, "heads": 2, "positions": 6, **options}
  )
  query, near, mask = _tokens()
  params, _ = apply.init(
    net, jax.random.key(seed), query, near, mask=mask, train=False
  )
  return net, params


def _call(net, params, *given, **options):
  query, near, mask = given or _tokens()
  out, _ = apply.apply(
    net, params, {}, query, near, mask=mask, train=False, **options
  )
  return out


def test_cosines_of_encoded_tokens_with_positions():
  net, params = _made()
  query, near, _ = _tokens()
  tokens = np.concatenate([query[:, None], near], axis=1)
  tokens = tokens * 8**0.5 + np.asarray(params["positions"])
  encoder = attention.Encoder(layers=1, heads=2)
  seen = np.ones((2, 6), bool)
  encoded = apply.apply(
    encoder, params["encoder"], {}, tokens, mask=seen, train=False
  )[0]
  e = np.asarray(encoded, np.float64)
  e = e / np.linalg.norm(e, axis=-1, keepdims=True)
  want = (e[:, :1] * e[:, 1:]).sum(axis=-1)
  cosines, logits = _call(net, params)
  np.testing.assert_allclose(cosines, want, atol=2e-6)
  kernel = np.asarray(params["relevance"]["kernel"])
  bias = np.asarray(params["relevance"]["bias"])
  want = (np.asarray(encoded)[:, 1:] @ kernel + bias)[..., 0]
  np.testing.assert_allclose(logits, want, atol=2e-6)


def test_masked_neighbours_change_nothing():
  net, params = _made()
  query, near, mask = _tokens()
  mask[:, 3:] = False
  other = near.copy()
  other[:, 3:] = np.roll(near, 1, axis=2)[:, 3:]
  a = _call(net, params, query, near, mask)
  b = _call(net, params, query, other, mask)
  for x, y in zip(a, b, strict=True):
    np.testing.assert_array_equal(x[:, :3], y[:, :3])
  fewer = _call(net, params, query, near[:, :3], mask[:, :3])
  np.testing.assert_allclose(fewer[0], a[0][:, :3], atol=2e-6)


def test_order_matters_by_positions_alone():
  query, near, mask = _tokens()
  turned = np.ascontiguousarray(near[:, ::-1])
  for positions in (0, 6):
    net, params = _made(positions=positions)
    there = np.asarray(_call(net, params)[0])
    back = np.asarray(_call(net, params, query, turned, mask)[0])[:, ::-1]
    same = np.allclose(there, back, atol=1e-5)
    assert same == (positions == 0)


def test_without_attention_no_neighbour_sees_another():
  net, params = _made(attention=False)
  query, near, mask = _tokens()
  other = near.copy()
  other[:, 0] = -near[:, 0]
  a, b = (_call(net, params, query, x, mask)[0] for x in (near, other))
  np.testing.assert_array_equal(a[:, 1:], b[:, 1:])
  assert (np.asarray(a[:, 0]) != np.asarray(b[:, 0])).all()


def test_without_visual_embedding_the_descriptors_are_not_seen():
  net, params = _made(visual=False)
  a = _call(net, params)[0]
  b = _call(net, params, *_tokens(seed=1))[0]
  np.testing.assert_array_equal(a, b)


def test_gradients_are_finite_where_all_neighbours_are_masked():
  net, params = _made()
  query, near, _ = _tokens()
  mask = np.zeros((2, 5), bool)
  gradient = jax.grad(lambda p: _call(net, p, query, near, mask)[0].sum())(
    params
  )
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))


def test_more_neighbours_than_positions_are_refused():
  net, params = _made()
  with pytest.raises(ValueError, match="positions for 5 neighbours, got 7"):
    _call(net, params, *_tokens(k=7))


def test_weights_are_cosines_or_their_softmax():
  cosines = np.float32([[0.5, -0.25, 0.9]])
  mask = np.array([[True, True, False]])
  got = aggregation.weigh(cosines, mask=mask)
  np.testing.assert_array_equal(got, [[1, 0.5, -0.25, 0]])
  got = jax.jit(aggregation.weigh)(
    cosines, mask=mask, temperature=jnp.float32(0.5)
  )
  want = np.exp([2, 1, -0.5])
  np.testing.assert_allclose(got, [[*(want / want.sum()), 0]], rtol=1e-6)
  none = aggregation.weigh(cosines, mask=mask & False, temperature=0.5)
  np.testing.assert_array_equal(none, [[1, 0, 0, 0]])
