"""What is measured: searches of two sizes in several forms, and the encoder.

Goals for CPUs were set before the functions were written, from prototypes.
"""

import atexit
from collections.abc import Callable, Mapping
import functools
from functools import partial
import importlib
import pathlib
import shutil
import tempfile
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from benchmarks.filters import Peer
from benchmarks.lidar.peers import torch_peer
from benchmarks.retrieval import Case, Setup, Size
from jaxshape.layers import apply, attention
from jaxshape.retrieval import search

load: Callable[[str], Any] = importlib.import_module
# Rows that share a score up to rounding may come in another order, or not.
TOLERANCE = 2e-3


def _goals(cpu: Mapping[str, float]) -> Mapping[str, float]:
  return cpu if jax.default_backend() == "cpu" else {}


# One size at a time: the larger one takes gigabytes.
@functools.lru_cache(maxsize=1)
def descriptors(
  rows: int, size: Size, *, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
  """Clusters on the sphere, and queries near some of them.

  Args:
    rows: Of the database.
    size: Of the rest.
    seed: Of all.

  Returns:
    Queries and the database.
  """
  rng = np.random.default_rng(seed)
  draw = lambda n: rng.standard_normal((n, size.dim), np.float32)
  centres = draw(max(rows // 50, 1))

  def near(places: np.ndarray) -> np.ndarray:
    x = draw(len(places))
    x += centres[places]
    return np.divide(x, np.linalg.norm(x, axis=1, keepdims=True), out=x)

  database = np.empty((rows, size.dim), np.float32)
  for start in range(0, rows, 50_000):
    part = database[start : start + 50_000]
    part[:] = near(rng.integers(0, len(centres), len(part)))
  return near(rng.integers(0, len(centres), size.queries)), database


def numpy_search(
  queries: np.ndarray, database: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
  """A product, a partition, and a sort of the k best."""
  scores = queries @ database.T
  best = np.argpartition(scores, -k, axis=1)[:, -k:]
  near = np.take_along_axis(scores, best, axis=1)
  order = np.argsort(-near, axis=1)
  sort = lambda x: np.take_along_axis(x, order, axis=1)
  return sort(near), sort(best)


def _faiss(
  queries: np.ndarray, database: np.ndarray, k: int, *, tuned: bool
) -> Peer:
  def make() -> Callable[[], Any]:
    faiss = load("faiss")
    index = faiss.IndexFlatIP(database.shape[1])
    index.add(database)
    usual = faiss.cvar.distance_compute_blas_threshold

    def call() -> Any:
      # Above this number of queries faiss hands the product to BLAS, and its
      # threads and those of BLAS get in each other's way.
      faiss.cvar.distance_compute_blas_threshold = 1000 if tuned else usual
      try:
        return index.search(queries, k)
      finally:
        faiss.cvar.distance_compute_blas_threshold = usual

    return call

  return Peer(make, tolerance=TOLERANCE)


def _plain_jax(queries: np.ndarray, database: Any, k: int) -> Peer:
  def make() -> Callable[[], Any]:
    form = lambda q, d: lax.top_k(jnp.matmul(q, d.T, precision="highest"), k)
    run, given = jax.jit(form), jnp.asarray(queries)
    return lambda: run(given, database)

  return Peer(make, tolerance=TOLERANCE)


def _top_k(rows: str, size: Size, **options: Any) -> Setup:
  queries, database = descriptors(getattr(size, rows), size)
  given, stored = jnp.asarray(queries), jnp.asarray(database)
  numpy = partial(numpy_search, queries, database, size.k)
  find = partial(search.top_k, k=size.k, **options)
  return Setup(
    lambda: find(given, stored),
    {
      "faiss": _faiss(queries, database, size.k, tuned=False),
      "faiss tuned": _faiss(queries, database, size.k, tuned=True),
      "NumPy": Peer(lambda: numpy, tolerance=TOLERANCE),
      "matmul and lax.top_k": _plain_jax(queries, stored, size.k),
    },
    _goals({"faiss": 0.20, "faiss tuned": 0.85}),
    lambda: jax.jit(find).lower(given, stored).compile(),
    lambda: numpy()[1],
  )


def _on_disk(size: Size) -> Setup:
  """Pages are in the system's cache, as far as they fit."""
  queries, database = descriptors(size.small, size)
  folder = tempfile.mkdtemp()
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  path = pathlib.Path(folder) / "rows.npy"
  np.save(path, database)
  rows, given = search.read_rows(path), jnp.asarray(queries)
  numpy = partial(numpy_search, queries, rows, size.k)
  # A quarter of the rows at a time.
  memory = database.nbytes
  ours = lambda: search.top_k(given, rows, k=size.k, memory=memory)

  exact = lambda: numpy()[1]
  peers = {"NumPy": Peer(lambda: numpy, tolerance=TOLERANCE)}
  return Setup(ours, peers, exact=exact)


def _stored(storage: str, size: Size) -> Setup:
  queries, database = descriptors(size.small, size)
  index = search.build_index(database, storage=storage)
  given, stored = jnp.asarray(queries), jnp.asarray(database)
  find = partial(search.search, k=size.k)

  def float32() -> Callable[[], Any]:
    return lambda: search.top_k(given, stored, k=size.k)

  return Setup(
    lambda: find(index, given),
    {
      "float32": Peer(float32),
      "faiss tuned": _faiss(queries, database, size.k, tuned=True)._replace(
        tolerance=None
      ),
    },
    compiled=lambda: jax.jit(find).lower(index, given).compile(),
    exact=lambda: numpy_search(queries, database, size.k)[1],
  )


def _encoder(batch: int, size: Size) -> Setup:
  """The network of LAttQE: 64 heads, all widths the same, nothing dropped."""
  heads = min(64, size.width // 4)
  net = attention.Encoder(layers=size.layers, heads=heads)
  rng = np.random.default_rng(0)
  shape = (batch, size.tokens, size.width)
  tokens = rng.standard_normal(shape, np.float32) * np.float32(0.02)
  start = partial(apply.init, net, train=False)
  params, _ = jax.jit(start)(jax.random.key(0), jnp.asarray(tokens[:1]))

  @jax.jit
  def forward(params: Any, x: jax.Array) -> jax.Array:
    return apply.apply(net, params, {}, x, train=False)[0]

  def of_torch(torch: Any, to: Any) -> Any:
    layer = torch.nn.TransformerEncoderLayer(
      size.width, heads, size.width, 0.0, batch_first=True
    )
    layers = torch.nn.TransformerEncoder(
      layer, size.layers, enable_nested_tensor=False
    )
    own = attention.to_state_dict(params, "")
    names = dict.fromkeys(layers.state_dict())
    layers.load_state_dict({name: to(own[name]) for name in names})
    x = to(tokens)
    layers = layers.to(x.device).eval()
    return lambda: layers(x)

  given = jnp.asarray(tokens)
  return Setup(
    lambda: forward(params, given),
    {"torch": torch_peer(of_torch, tolerance=0.02)},
    _goals({"torch": 0.70}),
    lambda: forward.lower(params, given).compile(),
  )


def forget() -> None:
  """Frees the descriptors of the last case."""
  descriptors.cache_clear()


CASES = (
  Case("top_k 200,000 rows", partial(_top_k, "small")),
  Case("top_k 200,000 rows, sort", partial(_top_k, "small", form="sort")),
  Case("chunked 200,000 rows", partial(_top_k, "small", chunk=50_000)),
  Case("disk 200,000 rows", _on_disk),
  Case("stored bfloat16, 200,000 rows", partial(_stored, "bfloat16")),
  Case("stored int8, 200,000 rows", partial(_stored, "int8")),
  Case("large 1,000,000 rows", partial(_top_k, "large")),
  Case("encoder batch 8", partial(_encoder, 8)),
  Case("encoder batch 64", partial(_encoder, 64)),
)
