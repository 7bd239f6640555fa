"""What training draws: neighbours that are left out, negatives that are hard.

Reference:
  Gordo et al., "Attention-Based Query Expansion Learning", ECCV 2020, Sec. 4.1.
  Radenovic et al., "Fine-Tuning CNN Image Retrieval with No Human Annotation",
  TPAMI 2019, Sec. 3.2 (one negative per cluster).
"""

import jax
import jax.numpy as jnp

from jaxshape.typing import Array, ArrayLike, Bool, Float, Int, typed

# The cluster of a place of the pool that nothing fills, and of rows that show
# what no other row shows.
EMPTY, ALONE = -2, -1


@typed
def thin(
  key: Array,
  mask: Bool[ArrayLike, "batch k"],
  *,
  neighbours: tuple[int, int],
  drop: float,
) -> Bool[Array, "batch k"]:
  """Leaves a random number of neighbours, then drops some of them.

  Args:
    key: A PRNG key.
    mask: Where there are neighbours.
    neighbours: Fewest and most, drawn for each query.
    drop: Each query draws its own share from 0..drop.

  Returns:
    The neighbours that are left.
  """
  low, high = neighbours
  if not 1 <= low <= high or not 0 <= drop < 1:
    raise ValueError(
      "neighbours must be 1 <= fewest <= most and drop in [0, 1), got "
      f"{neighbours} and {drop}."
    )
  batch, k = jnp.shape(mask)
  count_key, share_key, drop_key = jax.random.split(key, 3)
  count = jax.random.randint(count_key, (batch, 1), low, high + 1)
  share = jax.random.uniform(share_key, (batch, 1), maxval=drop)
  kept = jax.random.uniform(drop_key, (batch, k)) >= share
  return jnp.asarray(mask) & (jnp.arange(k) < count) & kept


@typed
def hardest(
  queries: Float[ArrayLike, "batch dim"],
  clusters: Int[ArrayLike, " batch"],
  pool: Float[ArrayLike, "rows dim"],
  pool_clusters: Int[ArrayLike, " rows"],
  *,
  count: int,
) -> tuple[Float[Array, "batch count dim"], Bool[Array, "batch count"]]:
  """The rows of a pool most similar to each query, each of another cluster.

  Args:
    queries: Of length 1.
    clusters: What the queries show, int [batch]; such rows are left out.
    pool: Rows of length 1.
    pool_clusters: What they show: any number are `ALONE`, none is `EMPTY`.
    count: How many.

  Returns:
    The rows, and False where the pool has no more.
  """
  pool, kinds = jnp.asarray(pool), jnp.asarray(pool_clusters)
  scores = jnp.asarray(queries) @ pool.T
  of = jnp.asarray(clusters)[:, None]
  own = (kinds == of) & (of > ALONE)
  scores = jnp.where(own | (kinds == EMPTY), -jnp.inf, scores)
  rows, there = [], []
  for _ in range(count):
    best = jnp.argmax(scores, axis=-1)
    there.append(jnp.take_along_axis(scores, best[:, None], 1)[:, 0] > -jnp.inf)
    rows.append(pool[best])
    taken = kinds[best][:, None]
    again = (kinds == taken) & (taken > ALONE)
    again |= jnp.arange(scores.shape[1]) == best[:, None]
    scores = jnp.where(again, -jnp.inf, scores)
  return jnp.stack(rows, axis=1), jnp.stack(there, axis=1)
