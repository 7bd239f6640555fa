from functools import partial

import jax
import jax.numpy as jnp
from jax.test_util import check_grads
from jaxtyping import TypeCheckError
import numpy as np
import pytest

from jaxshape.layers import apply, convolution

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)


def _normal(*shape):
  return RNG.normal(size=shape).astype(np.float32)


X = _normal(2, 5, 6, 4)
XYZ = _normal(2, 5, 6, 3)


def _module(variant="isk", **options):
  options = {"attention_kernel": 3, "rows": 0, **options}
  return convolution.SpatiallyAdaptiveConv(3, variant=variant, **options)


def _drawn(module, x=X, xyz=XYZ):
  """Parameters and statistics of which none is a plain 0 or 1."""
  init = lambda: apply.init(module, KEY, x, xyz, train=False)
  draw = lambda s: RNG.uniform(0.5, 1.5, s.shape).astype(s.dtype)
  normal = lambda s: draw(s) if len(s.shape) < 2 else _normal(*s.shape) / 3
  params, collections = jax.eval_shape(init)
  return jax.tree.map(normal, params), jax.tree.map(draw, collections)


def _call(module, params, collections, x=X, xyz=XYZ, *, train=False):
  call = lambda p, c, x, xyz: apply.apply(
    module, p, c, x, xyz, train=train, update=train
  )
  return jax.jit(call)(params, collections, x, xyz)


def _equation(x, attention, weight):
  """Eq. 3-4, number by number."""
  height, width, inputs = x.shape
  size, _, _, outputs = weight.shape
  shape = (height, width, size**2, inputs, outputs)
  attention = np.broadcast_to(attention, shape)
  y = np.zeros((height, width, outputs))
  for p, q, i, j, n, m in np.ndindex(*y.shape[:2], *weight.shape):
    row, column = p + i - size // 2, q + j - size // 2
    if 0 <= row < height and 0 <= column < width:
      a = attention[p, q, i * size + j, n, m]
      y[p, q, m] += weight[i, j, n, m] * a * x[row, column, n]
  return y


def _unfold(x, size):
  """All windows, [..., h, w, taps, channels]."""
  half = size // 2
  padded = np.pad(x, ((0, 0), (half, half), (half, half), (0, 0)))
  view = np.lib.stride_tricks.sliding_window_view(padded, (size, size), (1, 2))
  view = np.moveaxis(view, 3, -1)
  return view.reshape(*x.shape[:3], size**2, -1)


@pytest.mark.parametrize(
  "axes", [(1, 1, 1), (1, 2, 1), (9, 1, 1), (9, 2, 1), (9, 2, 3), (1, 1, 3)]
)
@pytest.mark.parametrize("space", [(3, 4), (1, 1)])
def test_adaptive_convolution_transcribed(axes, space):
  x, weight = _normal(3, 4, 2), _normal(3, 3, 2, 3)
  attention = RNG.uniform(size=(*space, *axes)).astype(np.float32)
  want = _equation(x, attention, weight)
  got = convolution.spatially_adaptive_conv(x, attention, weight)
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_adaptive_convolution_by_hand():
  x = np.arange(6, dtype=np.float32).reshape(2, 3, 1)
  attention = np.zeros((2, 3, 9, 1, 1), np.float32)
  attention[:, :, 3] = 2  # The pixel to the left ...
  attention[1, 2, 1] = 1  # ... and for one pixel the one above.
  weight = np.ones((3, 3, 1, 1), np.float32)
  got = convolution.spatially_adaptive_conv(x, attention, weight)
  np.testing.assert_array_equal(got[..., 0], [[0, 0, 2], [0, 6, 8 + 2]])


def test_attention_of_ones_is_a_plain_convolution():
  weight = _normal(3, 3, 4, 3)
  want = np.einsum("bhwtn,tnm->bhwm", _unfold(X, 3), weight.reshape(9, 4, 3))
  ones = np.ones((1, 1, 1, 9, 4, 1), np.float32)
  got = convolution.spatially_adaptive_conv(X, ones, weight)
  np.testing.assert_allclose(got, want, atol=1e-5)
  params, _ = _drawn(_module("none"))
  params = {"kernel": weight, "bias": np.zeros(3, np.float32)}
  plain, _ = _call(_module("none"), params, {})
  np.testing.assert_allclose(plain, want, atol=1e-5)


def test_adaptive_convolution_transforms():
  attention = RNG.uniform(size=(2, 5, 6, 9, 4, 1)).astype(np.float32)
  weight = _normal(3, 3, 4, 2)
  f = convolution.spatially_adaptive_conv
  want = f(X, attention, weight)
  np.testing.assert_allclose(jax.jit(f)(X, attention, weight), want, atol=1e-5)
  each = jax.vmap(f, (0, 0, None))(X, attention, weight)
  np.testing.assert_allclose(each, want, atol=1e-5)
  small = (X[:1, :2, :2], attention[:1, :2, :2], weight)
  check_grads(jax.jit(f), small, order=1, modes=["rev"], atol=2e-2, rtol=2e-2)


def test_gaussian_attention_by_hand():
  features = np.array([[[0.0], [1.0], [3.0]]], np.float32)
  got = convolution.gaussian_attention(features, kernel=3)[0, 1, :, 0, 0]
  want = np.exp(-np.array([1, 1, 1, 1, 0, 4, 1, 1, 1]) / 2)
  np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("rows", [0, 2])
def test_moments_of_patches_far_away(rows):
  x = 50 + XYZ
  moments = jax.jit(partial(convolution.patch_moments, kernel=3, rows=rows))
  got = moments(x)
  patches = _unfold(x.astype(np.float64), 3).reshape(-1, 27)
  np.testing.assert_allclose(got.mean, patches.mean(0), rtol=1e-5)
  want = np.cov(patches.T, bias=True)
  np.testing.assert_allclose(got.covariance, want, rtol=1e-4, atol=1e-3)
  assert got.number == 60


def test_batch_norm_as_pytorch_has_it():
  module = convolution.BatchNorm(0.2)
  scale, bias = _normal(4), _normal(4)
  stats = {"mean": _normal(4), "var": RNG.uniform(1, 2, 4).astype(np.float32)}
  params, collections = {"scale": scale, "bias": bias}, {"batch_stats": stats}
  got, _ = apply.apply(module, params, collections, X, train=False)
  want = (X - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * scale + bias
  np.testing.assert_allclose(got, want, atol=1e-5)
  got, after = apply.apply(
    module, params, collections, X, train=True, update=True
  )
  mean, var = X.mean((0, 1, 2)), X.var((0, 1, 2))
  want = (X - mean) / np.sqrt(var + 1e-5) * scale + bias
  np.testing.assert_allclose(got, want, atol=1e-5)
  after = after["batch_stats"]
  want = 0.8 * stats["mean"] + 0.2 * mean
  np.testing.assert_allclose(after["mean"], want, atol=1e-6)
  want = 0.8 * stats["var"] + 0.2 * X.var((0, 1, 2), ddof=1)
  np.testing.assert_allclose(after["var"], want, rtol=1e-5)


def _attention(params, mean, var):
  """The learned attention of XYZ, and the outputs of its linear layer."""
  kernel = params["attention_kernel"]
  axes = kernel.shape[3:]
  z = _unfold(XYZ, 3).reshape(*XYZ.shape[:3], -1) @ kernel.reshape(27, -1)
  z = z + params["attention_bias"].reshape(-1)
  if mean is None:
    mean, var = z.mean((0, 1, 2)), z.var((0, 1, 2))
  norm = params["attention_norm"]
  y = (z - mean) / np.sqrt(var + 1e-5) * norm["scale"] + norm["bias"]
  return 1 / (1 + np.exp(-y.reshape(*y.shape[:3], *axes))), z


@pytest.mark.parametrize("variant", ["s", "is", "sk", "isk", "oisk"])
@pytest.mark.parametrize("train", [False, True])
def test_layer_transcribed(variant, train):
  module = _module(variant, scaled="weight", rows=2)
  params, collections = _drawn(module)
  stats = collections["batch_stats"]["attention_norm"]
  given = (None, None) if train else (stats["mean"], stats["var"])
  attention, z = _attention(params, *given)
  want = np.stack(
    [
      _equation(x, a, params["kernel"])
      for x, a in zip(X, attention, strict=True)
    ]
  )
  got, after = _call(module, params, collections, train=train)
  np.testing.assert_allclose(got, want + params["bias"], atol=2e-5)
  if train:
    after = after["batch_stats"]["attention_norm"]
    want = 0.9 * stats["mean"] + 0.1 * z.mean((0, 1, 2))
    np.testing.assert_allclose(after["mean"], want, atol=1e-5)
    want = 0.9 * stats["var"] + 0.1 * z.var((0, 1, 2), ddof=1)
    np.testing.assert_allclose(after["var"], want, rtol=1e-4)


@pytest.mark.parametrize("variant", ["s", "is"])
def test_attention_on_the_input(variant):
  module = _module(variant)
  params, collections = _drawn(module)
  stats = collections["batch_stats"]["attention_norm"]
  attention, _ = _attention(params, stats["mean"], stats["var"])
  scaled = X * attention[:, :, :, 0, :, 0]
  weight = params["kernel"].reshape(9, 4, 3)
  want = np.einsum("bhwtn,tnm->bhwm", _unfold(scaled, 3), weight)
  got, _ = _call(module, params, collections)
  np.testing.assert_allclose(got, want + params["bias"], atol=1e-5)


@pytest.mark.parametrize(("few", "more"), [("s", "is"), ("sk", "isk")])
def test_fewer_letters_are_more_of_them_shared(few, more):
  params, _ = _drawn(_module(few, normalize=False))
  wide = dict(params)
  for name in ("attention_kernel", "attention_bias"):
    wide[name] = np.repeat(params[name], 4, axis=-2)
  got, _ = _call(_module(more, normalize=False), wide, {})
  want, _ = _call(_module(few, normalize=False), params, {})
  np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("variant", ["isk", "pac"])
def test_slabs_change_nothing(variant):
  module = _module(variant)
  params, collections = _drawn(module)

  def run(rows):
    def loss(params, x):
      y, after = apply.apply(
        module.clone(rows=rows),
        params,
        collections,
        x,
        XYZ,
        train=True,
        update=True,
      )
      return jnp.sum(y**2), (y, after)

    return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, X)

  want = run(0)
  # Of 5 rows: the last slab is not full.
  close = partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-4)
  jax.tree.map(close, run(2), want)


def test_slabs_never_hold_the_whole_image():
  x = jax.ShapeDtypeStruct((1, 64, 64, 16), jnp.float32)
  xyz = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
  size = {}
  for rows in (0, 8):
    module = convolution.SpatiallyAdaptiveConv(16, rows=rows)
    variables = jax.eval_shape(
      lambda x, xyz, m=module: apply.init(m, KEY, x, xyz, train=False), x, xyz
    )
    call = lambda p, c, x, xyz, m=module: apply.apply(
      m, p, c, x, xyz, train=False
    )[0]
    made = jax.jit(call).lower(*variables, x, xyz).compile()
    size[rows] = made.memory_analysis().temp_size_in_bytes
  assert size[8] < size[0] / 2
  assert size[8] < 4 * 64 * 64 * 16 * 9


def test_height_of_slabs():
  assert convolution.slab_rows(1, 64, 512) == 8
  assert convolution.slab_rows(1, 64, 2048) == 4
  assert convolution.slab_rows(16, 64, 2048) == 4
  assert convolution.slab_rows(1, 40, 200) == 20
  assert convolution.slab_rows(1, 16, 64) == 0


def test_devices_share_the_batch():
  x, xyz = _normal(8, 5, 6, 4), _normal(8, 5, 6, 3)
  module = _module(rows=2)
  params, collections = _drawn(module)
  want, after = _call(module, params, collections, x, xyz, train=True)
  mesh = jax.make_mesh(
    (8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
  )
  spec = jax.sharding.PartitionSpec("data")
  x, xyz = jax.device_put((x, xyz), jax.sharding.NamedSharding(mesh, spec))
  got, shared = _call(module, params, collections, x, xyz, train=True)
  assert got.sharding.spec[0] == "data"
  np.testing.assert_allclose(got, want, atol=1e-5)
  jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), shared, after)


def test_inside_the_image_a_shift_is_a_shift():
  module = _module()
  x, xyz = _normal(1, 3, 12, 4), _normal(1, 3, 12, 3)
  params, collections = _drawn(module)
  y, _ = _call(module, params, collections, x, xyz)
  moved = [np.roll(a, 2, axis=2) for a in (x, xyz)]
  z, _ = _call(module, params, collections, *moved)
  np.testing.assert_allclose(z[:, :, 3:-1], y[:, :, 1:-3], atol=1e-5)
  assert np.abs(z[:, :, 0] - y[:, :, -2]).max() > 1e-2


def _dense(x, p):
  return x @ p["kernel"] + p["bias"]


def _gate(variant, x, p):
  sigmoid = lambda z: 1 / (1 + np.exp(-z))
  layers = lambda x: _dense(np.maximum(_dense(x, p["down"]), 0), p["up"])
  if variant == "se":
    return sigmoid(layers(x.mean((1, 2), keepdims=True)))
  if variant == "cam":
    pooled = np.empty_like(x)
    for i, j in np.ndindex(*x.shape[1:3]):
      around = x[:, max(i - 3, 0) : i + 4, max(j - 3, 0) : j + 4]
      pooled[:, i, j] = around.max((1, 2))
    return sigmoid(layers(pooled))
  mean, highest = x.mean((1, 2), keepdims=True), x.max((1, 2), keepdims=True)
  channels = sigmoid(layers(mean) + layers(highest))
  x = x * channels
  both = np.stack([x.mean(-1), x.max(-1)], axis=-1)
  windows = _unfold(both, 7).reshape(*x.shape[:3], -1)
  return channels * sigmoid(windows @ p["spatial"].reshape(-1, 1))


@pytest.mark.parametrize("variant", ["se", "cbam", "cam"])
def test_gates_transcribed(variant):
  x = _normal(2, 9, 8, 4)
  xyz = _normal(2, 9, 8, 3)
  module = _module(variant)
  params, _ = _drawn(module, x, xyz)
  attention = _gate(variant, x, params["gate"]).astype(np.float32)
  weight = params["kernel"].reshape(9, 4, 3)
  want = np.einsum("bhwtn,tnm->bhwm", _unfold(x * attention, 3), weight)
  got, _ = _call(module, params, {}, x, xyz)
  np.testing.assert_allclose(got, want + params["bias"], atol=1e-5)
  if variant == "se":  # It is SAC-I.
    attention = attention[:, :, :, None, :, None]
    sac = convolution.spatially_adaptive_conv(x, attention, params["kernel"])
    np.testing.assert_allclose(sac, want, atol=1e-5)


def test_pixel_adaptive_convolution_is_adaptive_by_the_gaussian():
  module = _module("pac", rows=2)
  params, collections = _drawn(module)
  assert not collections
  attention = convolution.gaussian_attention(XYZ, kernel=3)
  want = convolution.spatially_adaptive_conv(X, attention, params["kernel"])
  got, _ = _call(module, params, {})
  np.testing.assert_allclose(got, want + params["bias"], atol=1e-5)


def test_bfloat16_is_for_computing_only():
  module = _module(dtype=jnp.bfloat16, rows=2)
  params, collections = _drawn(module)
  assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(np.float32)}
  got, after = _call(module, params, collections, train=True)
  assert got.dtype == jnp.bfloat16
  assert {x.dtype for x in jax.tree.leaves(after)} == {jnp.dtype(jnp.float32)}
  want, _ = _call(_module(), params, collections, train=True)
  np.testing.assert_allclose(
    got.astype(np.float32), want, atol=0.05 * np.abs(want).max()
  )


def test_convolutions_refuse():
  attention = np.ones((5, 6, 9, 4, 1), np.float32)
  f = convolution.spatially_adaptive_conv
  with pytest.raises(ValueError, match="kernel must be odd.*got 2"):
    f(X[0], attention, _normal(2, 2, 4, 1))
  with pytest.raises(ValueError, match="must have 1 or 9 taps, got 3"):
    f(X[0], attention[:, :, :3], _normal(3, 3, 4, 1))
  with pytest.raises(TypeCheckError, match="weight"):
    f(X[0], attention, _normal(3, 3, 5, 1))
  with pytest.raises(ValueError, match="kernel must be odd.*got 4"):
    convolution.gaussian_attention(XYZ, kernel=4)
  with pytest.raises(ValueError, match="rows must be 0 or more, got -1"):
    convolution.patch_moments(XYZ, rows=-1)
  for options, words in (
    ({"variant": "ski"}, "variant must be one of none, s, .*, got 'ski'"),
    ({"scaled": "output"}, "scaled must be 'input' or 'weight', got 'output'"),
    ({"attention_kernel": 6}, "attention_kernel must be odd.*got 6"),
    ({"kernel": 0}, "kernel must be odd.*got 0"),
    ({"rows": -2}, "rows must be 0 or more, got -2"),
  ):
    with pytest.raises(ValueError, match=words):
      apply.init(_module(**options), KEY, X, XYZ, train=False)
  with pytest.raises(TypeCheckError, match="coordinates"):
    apply.init(_module(), KEY, X, XYZ[:, 1:], train=False)
