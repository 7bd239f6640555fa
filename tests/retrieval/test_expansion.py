import functools

import jax
import jax.numpy as jnp
import jax.test_util
from jaxtyping import TypeCheckError
import numpy as np
import pytest
from sklearn import svm

from jaxshape.errors import InputError
from jaxshape.retrieval import expansion

K, DIM = 6, 8
ALPHA = functools.partial(expansion.alpha_qe, alpha=3)
# Functions that need no negatives.
METHODS = {"aqe": expansion.aqe, "aqewd": expansion.aqewd, "alpha": ALPHA}
MASK = np.array([1, 0, 1, 1, 0, 1], bool)


def _unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _example(k=K, dim=DIM, m=3, seed=0):
  """A query, its neighbours, similarities (some below 0), and negatives."""
  rng = np.random.default_rng(seed)
  q = _unit(rng.normal(size=dim))
  d = _unit(0.4 * q + rng.normal(size=(k, dim)) / np.sqrt(dim))
  d = d[np.argsort(-d @ q)]
  if k:
    d[-1] = _unit(d[-1] - 2 * max(d[-1] @ q, 0.1) * q)
  negatives = _unit(rng.normal(size=(m, dim)) - 0.2 * q)
  cast = lambda x: x.astype(np.float32)
  return cast(q), cast(d), cast(d @ q), cast(negatives)


def _weight(name, i, k, s):
  if name == "aqe":
    return 1.0
  return (k - i) / k if name == "aqewd" else max(s, 0.0) ** 3


def _slow(name, q, d, s, mask):
  """Eq. 1 and Table 1 of the paper, one neighbour after the other."""
  used = [i for i in range(len(d)) if mask[i]]
  total = q.astype(np.float64)
  for rank, i in enumerate(used, start=1):
    total = total + _weight(name, rank, len(used), float(s[i])) * d[i]
  return total / np.sqrt(np.sum(total**2))


def _svm(x, y, *, c=0.1, bias="free", loss="hinge"):
  if bias == "free":
    fit = svm.SVC(kernel="linear", C=c, tol=1e-9)
  else:
    fit = svm.LinearSVC(
      C=c,
      loss=loss,
      dual=True,
      tol=1e-9,
      max_iter=10**5,
      fit_intercept=bias == "regularized",
    )
  return fit.fit(x.astype(np.float64), y).coef_[0]


# Golden.


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "some"])
@pytest.mark.parametrize("name", METHODS)
def test_methods_transcribed(name, mask):
  q, d, s, _ = _example()
  assert s.min() < 0
  want = _slow(name, q, d, s, np.ones(K, bool) if mask is None else mask)
  got = METHODS[name](q, d, s, mask)
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_weights_by_hand():
  s = np.array([0.5, 0.25, -0.5, 0.0], np.float32)
  mask = np.array([True, False, True, True])
  got = expansion.aqe_weights(s, mask)
  np.testing.assert_array_equal(got, [1, 1, 0, 1, 1])
  got = expansion.aqewd_weights(s, None)
  np.testing.assert_array_equal(got, [1, 0.75, 0.5, 0.25, 0])
  got = expansion.aqewd_weights(s, mask)
  np.testing.assert_allclose(got, [1, 2 / 3, 0, 1 / 3, 0], rtol=1e-6)
  for alpha, clip, want in (
    (2, True, [0.25, 0.0625, 0, 0]),
    (3, False, [0.125, 0.015625, -0.125, 0]),
    (2, False, [0.25, 0.0625, 0.25, 0]),
    (0.5, False, [0.5**0.5, 0.5, 0, 0]),
    (0, True, [1, 1, 1, 1]),
  ):
    got = expansion.alpha_qe_weights(s, None, alpha=alpha, clip=clip)
    np.testing.assert_allclose(got, [1, *want], rtol=1e-6)


def test_aggregate_by_hand_and_of_nothing():
  q, d = np.array([1.0, 0.0]), np.array([[0.0, 1.0], [-1.0, 0.0]])
  got = expansion.aggregate(q, d, np.array([1.0, 2.0, -1.0]), None)
  np.testing.assert_allclose(got, np.array([1, 1]) / np.sqrt(2), rtol=1e-6)
  got = expansion.aggregate(2 * q, d, np.array([0.5, 0.0, 1.0]), None)
  np.testing.assert_array_equal(got, q)
  got = expansion.aggregate(0 * q, 0 * d, np.ones(3), None)
  np.testing.assert_array_equal(got, 0 * q)


@pytest.mark.parametrize(
  ("k", "m", "c", "bias", "loss"),
  [
    (4, 5, 0.1, "free", "hinge"),
    (64, 5, 0.1, "free", "hinge"),
    (24, 10, 10.0, "free", "hinge"),
    (24, 5, 0.1, "regularized", "hinge"),
    (24, 5, 0.1, "regularized", "squared_hinge"),
    (24, 5, 1.0, "none", "hinge"),
  ],
)
def test_dqe_is_the_machine_of_scikit_learn(k, m, c, bias, loss):
  q, d, _, negatives = _example(k, 16, m)
  x = np.concatenate([q[None], d, negatives])
  y = np.where(np.arange(len(x)) <= k, 1, -1)
  want = _svm(x, y, c=c, bias=bias, loss=loss)
  options = {"negatives": negatives, "c": c, "bias": bias, "loss": loss}
  w = np.asarray(expansion.dqe_weights(q, d, None, **options))
  assert np.all(w * y >= 0)
  if loss == "hinge":
    assert np.all(np.abs(w) <= np.float32(c))
  if bias == "free":
    assert abs(w.sum()) < 1e-5 * c * len(w)
  np.testing.assert_allclose(w @ x, want, atol=1e-4 * np.linalg.norm(want))
  got = expansion.dqe(q, d, None, None, **options)
  np.testing.assert_allclose(got, _unit(want), atol=1e-4)


def test_dqe_without_limits_parts_two_points_half_way():
  # By hand: the normal joins q and the negative, and both weigh 2 / |q - x|^2.
  q, x = np.array([1.0, 0.0]), np.array([[0.0, 1.0]])
  w = expansion.dqe_weights(q, q[None], None, negatives=x, c=1e3)
  np.testing.assert_allclose([w[0] + w[1], w[2]], [1, -1], rtol=1e-5)
  got = expansion.dqe(q, q[None], None, None, negatives=x, c=1e3)
  np.testing.assert_allclose(got, np.array([1, -1]) / np.sqrt(2), rtol=1e-5)


def _rows(n=23, dim=DIM, seed=1):
  rng = np.random.default_rng(seed)
  centres = rng.normal(size=(4, dim))
  rows = centres[rng.integers(0, 4, n)] + 0.7 * rng.normal(size=(n, dim))
  return _unit(rows).astype(np.float32)


@pytest.mark.parametrize("name", METHODS)
def test_augment_database_transcribed(name):
  rows, k = _rows(), 4
  want = []
  for i in range(len(rows)):
    s = rows @ rows[i]
    near = [j for j in np.argsort(-s, kind="stable") if j != i][:k]
    want.append(_slow(name, rows[i], rows[near], s[near], np.ones(k, bool)))
  options = {"k": k, "expand": METHODS[name]}
  got = expansion.augment_database(rows, chunk=10, **options)
  assert isinstance(got, np.ndarray)
  np.testing.assert_allclose(got, want, atol=1e-6)
  got = expansion.augment_database(jnp.asarray(rows), **options)
  assert isinstance(got, jax.Array)
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_discriminative_augmentation_transcribed():
  rows, k, m = _rows(), 2, 3
  want = []
  for i in range(len(rows)):
    order = np.argsort(-(rows @ rows[i]), kind="stable")
    near = [j for j in order if j != i][:k]
    x = rows[[i, *near, *order[-m:]]]
    want.append(_unit(_svm(x, np.array([1] * (k + 1) + [-1] * m))))
  options = {"k": k, "expand": expansion.dqe, "negatives": m}
  got = expansion.augment_database(rows, **options)
  np.testing.assert_allclose(got, want, atol=1e-4)
  every = expansion.augment_database(rows, pool=len(rows), **options)
  np.testing.assert_array_equal(every, got)
  few = expansion.augment_database(rows, pool=5, **options)
  again = expansion.augment_database(rows, pool=5, **options)
  np.testing.assert_array_equal(few, again)
  assert np.max(np.abs(few - got)) > 1e-2


def test_expand_queries_of_a_file(tmp_path):
  rows, k = _rows(), 3
  np.save(tmp_path / "rows.npy", rows)
  stored = np.load(tmp_path / "rows.npy", mmap_mode="r")
  queries = _rows(5, seed=2)
  want = []
  for q in queries:
    near = np.argsort(-(rows @ q), kind="stable")[:k]
    want.append(_slow("aqewd", q, rows[near], near, np.ones(k, bool)))
  got = expansion.expand_queries(
    jnp.asarray(queries), stored, k=k, expand=expansion.aqewd, chunk=2
  )
  assert isinstance(got, jax.Array)
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_expand_queries_passes_parameters_and_leaves_rows_out():
  rows = _rows()
  exclude = np.array([0, -1], np.int32)
  method = lambda weight, q, d, s, mask: weight * (q + s[0] * d[0])
  expand = jax.tree_util.Partial(method, np.float32(2))
  got = expansion.expand_queries(
    rows[:2], rows, k=1, expand=expand, exclude=exclude
  )
  s = rows @ rows[0]
  near = np.argsort(-s)[1]
  want = [2 * (rows[0] + s[near] * rows[near]), 4 * rows[1]]
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


# Laws.


def _all(negatives):
  dqe = functools.partial(expansion.dqe, negatives=negatives)
  return {**METHODS, "dqe": dqe}


@pytest.mark.parametrize("name", [*METHODS, "dqe"])
def test_methods_do_not_see_what_is_masked(name):
  q, d, s, negatives = _example()
  method = _all(negatives)[name]
  hidden = np.where(MASK[:, None], d, np.nan), np.where(MASK, s, np.nan)
  want = method(q, d[MASK], s[MASK], None)
  got = method(q, *hidden, MASK)
  np.testing.assert_allclose(got, want, atol=2e-6)
  assert np.max(np.abs(want - method(q, d, s, None))) > 1e-3


@pytest.mark.parametrize("name", [*METHODS, "dqe"])
def test_a_query_without_neighbours_stays(name):
  q, d, s, negatives = _example()
  method = _all(negatives)[name]
  none = np.zeros(K, bool)
  np.testing.assert_allclose(method(q, d, s, none), q, atol=1e-6)
  got = method(q, d[:0], s[:0], None)
  np.testing.assert_allclose(got, q, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_methods_keep_to_the_scale_and_are_of_length_one(name):
  q, d, s, _ = _example()
  got = METHODS[name](3 * q, 3 * d, s, None)
  np.testing.assert_allclose(got, METHODS[name](q, d, s, None), atol=1e-6)
  np.testing.assert_allclose(np.linalg.norm(got), 1, rtol=1e-6)


def test_the_order_matters_with_decay_only():
  q, d, s, negatives = _example()
  p = np.random.default_rng(0).permutation(K)
  for name, method in _all(negatives).items():
    gap = np.abs(method(q, d[p], s[p], None) - method(q, d, s, None)).max()
    assert gap > 1e-3 if name == "aqewd" else gap < 2e-6, name


def test_alpha_qe_between_the_query_and_the_average():
  q, d, s, _ = _example()
  d, s = d[:-1], s[:-1]
  assert s.min() > 0
  got = expansion.alpha_qe(q, d, s, None, alpha=0)
  np.testing.assert_allclose(got, expansion.aqe(q, d, s, None), atol=1e-6)
  got = expansion.alpha_qe(q, d, None, None, alpha=200)
  np.testing.assert_allclose(got, q, atol=1e-6)
  got = expansion.alpha_qe(q, d, None, None)
  np.testing.assert_allclose(got, ALPHA(q, d, s, None), atol=1e-6)


# Transforms.


@pytest.mark.parametrize("name", [*METHODS, "dqe"])
def test_methods_under_jit_and_vmap(name):
  parts = [_example(seed=seed) for seed in range(3)]
  q, d, s, negatives = (np.stack(x) for x in zip(*parts, strict=True))
  mask = np.stack([np.ones(K, bool), MASK, np.zeros(K, bool)])
  method = lambda q, d, s, m, x: _all(x)[name](q, d, s, m)
  got = jax.jit(jax.vmap(method))(q, d, s, mask, negatives)
  for i in range(3):
    want = method(q[i], d[i], s[i], mask[i], negatives[i])
    np.testing.assert_allclose(got[i], want, atol=2e-6)


def test_gradients():
  q, d, s, negatives = _example()
  f = jax.jit(lambda q, d, s, a: expansion.alpha_qe(q, d, s, MASK, alpha=a))
  jax.test_util.check_grads(
    f, (q, d, s, np.float32(3)), 1, ("rev",), atol=1e-2, rtol=1e-2
  )
  # Garbage that is masked, and similarities of 0, bring no NaN.
  bad, zero = np.where(MASK[:, None], d, np.nan), np.where(MASK, 0, np.nan)
  loss = lambda q, s, a: expansion.alpha_qe(q, bad, s, MASK, alpha=a)[0]
  grad = jax.jit(jax.grad(loss, (0, 1, 2)))
  for part in grad(q, zero.astype(np.float32), 0.5):
    assert np.all(np.isfinite(part))
  # That of dqe holds the weights fixed.
  w = expansion.dqe_weights(q, d, None, negatives=negatives)
  rows = lambda d: jnp.concatenate([d, negatives])
  want = jax.grad(lambda d: expansion.aggregate(q, rows(d), w, None)[0])(d)
  dqe = functools.partial(expansion.dqe, negatives=negatives)
  got = jax.jit(jax.grad(lambda d: dqe(q, d, None, None)[0]))(d)
  np.testing.assert_allclose(got, want, atol=1e-5)
  assert np.max(np.abs(want)) > 1e-3


def test_sixteen_bits():
  q, d, s, _ = _example()
  half = [jnp.asarray(x, jnp.bfloat16) for x in (q, d, s)]
  got = ALPHA(*half, None)
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, ALPHA(q, d, s, None), atol=0.02)
  rows = jnp.asarray(_rows(), jnp.bfloat16)
  assert expansion.augment_database(rows, k=2).dtype == jnp.bfloat16


# Refusals.


def test_methods_refuse():
  q, d, s, negatives = _example()
  with pytest.raises(TypeCheckError, match="neighbours"):
    expansion.aqe(q, d[:, :-1], s, None)
  with pytest.raises(TypeCheckError, match="similarities"):
    expansion.alpha_qe(q, d, s[:-1], None)
  with pytest.raises(TypeCheckError, match="mask"):
    expansion.aqewd(q, d, s, np.ones(K - 1, bool))
  with pytest.raises(TypeCheckError, match="weights"):
    expansion.aggregate(q, d, s, None)
  with pytest.raises(TypeCheckError, match="negatives"):
    expansion.dqe(q, d, s, None, negatives=negatives[:, :-1])
  for alpha in (-1, np.nan, np.inf):
    with pytest.raises(ValueError, match="alpha must be at least 0"):
      expansion.alpha_qe(q, d, s, None, alpha=alpha)
  dqe = functools.partial(expansion.dqe, q, d, s, None, negatives=negatives)
  for c in (0, -1.0, np.inf):
    with pytest.raises(ValueError, match="c must be above 0"):
      dqe(c=c)
  with pytest.raises(ValueError, match=r"bias must be one of .*, got 'no'"):
    dqe(bias="no")
  with pytest.raises(ValueError, match=r"loss must be one of .*, got 'no'"):
    dqe(loss="no")
  with pytest.raises(ValueError, match="negatives must be at least 1 row"):
    dqe(negatives=negatives[:0])


def test_methods_refuse_what_is_not_finite():
  q, d, s, negatives = _example()
  bad = d.copy()
  bad[2, 1] = np.nan
  with pytest.raises(InputError, match="query must be finite"):
    expansion.aqe(q * np.nan, d, s, None)
  for method in _all(negatives).values():
    with pytest.raises(InputError, match=r"neighbours must .* is row 2"):
      method(q, bad, s, None)
  with pytest.raises(InputError, match="similarities must be finite"):
    expansion.alpha_qe(q, d, np.where(MASK, s, -np.inf), None)
  with pytest.raises(InputError, match="negatives must be finite"):
    expansion.dqe(q, d, s, None, negatives=negatives * np.inf)


def test_databases_refuse():
  rows = _rows()
  augment = functools.partial(expansion.augment_database, rows)
  with pytest.raises(ValueError, match="k must be at most 22, the other rows"):
    augment(k=23)
  for k in (0, -1):
    with pytest.raises(ValueError, match="k must be at least 1"):
      augment(k=k)
  with pytest.raises(ValueError, match="negatives must be at most 2"):
    augment(k=20, negatives=3, expand=expansion.dqe)
  with pytest.raises(ValueError, match="pool must be at least 3, got 2"):
    augment(k=2, negatives=3, pool=2, expand=expansion.dqe)
  with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
    augment(k=2, chunk=0)
  bad = rows.copy()
  bad[7, 0] = np.nan
  with pytest.raises(InputError, match="finite.*row 7"):
    expansion.augment_database(bad, k=2)
  with pytest.raises(InputError, match="queries must be finite.* is row 7"):
    expansion.expand_queries(bad, rows, k=2, chunk=3)
  with pytest.raises(InputError, match="database must be finite"):
    expansion.expand_queries(rows, bad, k=2)
  with pytest.raises(TypeCheckError, match="database"):
    expansion.expand_queries(rows, rows[:, :-1], k=2)


def test_databases_of_other_lengths_bring_a_warning():
  rows = 3 * _rows()
  with pytest.warns(UserWarning, match="norms"):
    expansion.augment_database(rows, k=2, chunk=10)
  want = expansion.augment_database(rows / 3, k=2)
  got = expansion.augment_database(rows, k=2, normalized=False)
  np.testing.assert_allclose(got, want, atol=1e-6)
