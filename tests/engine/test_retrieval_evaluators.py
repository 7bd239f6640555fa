import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxshape.data import retrieval_examples
from jaxshape.engine import retrieval_evaluators, runtime
from jaxshape.errors import InputError
from jaxshape.metrics import retrieval as metrics
from jaxshape.retrieval import expansion, search
from jaxshape.system import TrainState

STATE = TrainState(jnp.int32(0), {}, {}, {})
RIVALS = {
  "sizes": (1, 3, 6),
  "alpha": (1.0, 3.0),
  "c": 0.1,
  "negatives": 3,
  "database_sizes": (2,),
}


def _unit(draw, *shape):
  x = draw.standard_normal(shape).astype(np.float32)
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


@functools.cache
def _source(hard=True):
  draw = np.random.default_rng(0)
  centres = _unit(draw, 6, 8)
  near = lambda shape: 0.6 * draw.standard_normal((*shape, 8)) / 8**0.5
  rows = centres[:, None] + near((6, 9))
  rows = (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).reshape(-1, 8)
  queries = centres + near((6,))
  queries /= np.linalg.norm(queries, axis=-1, keepdims=True)
  truth = [
    retrieval_examples.Truth(
      *map(
        np.array, ([*first, *([] if hard else more)], more * hard, [c * 9 + 8])
      )
    )
    for c in range(6)
    for first, more in [([c * 9, c * 9 + 1], [c * 9 + 2, c * 9 + 3])]
  ]
  return retrieval_examples.Queries(
    database=rows.astype(np.float32),
    queries=queries.astype(np.float32),
    truth=truth,
    k=6,
  )


def _alpha_qe(state, batch, mask):
  return jax.vmap(expansion.alpha_qe)(
    batch["query"], batch["neighbours"], batch["similarities"], mask
  )


def _evaluate(batch_size=8, source=None, **options):
  source = source or _source()
  evaluator = retrieval_evaluators.retrieval(
    _alpha_qe, lambda: source, batch_size=batch_size, **options
  )
  mesh = runtime.make_mesh({"data": -1, "model": 1})
  numbers, outputs = runtime.evaluate(evaluator, STATE, mesh)
  return evaluator, outputs, numbers


def _map(queries, source, protocol):
  scores = queries @ source.database.T
  ranking = np.argsort(-scores, axis=1, kind="stable")
  truth = [source.truth(i) for i in range(len(source))]
  return metrics.revisited_map(ranking, truth, protocol=protocol)


def _expanded(source, k):
  found = search.top_k(source.queries, source.database, k=k)
  near = source.database[np.asarray(found.indices)]
  return np.asarray(
    jax.vmap(lambda *given: expansion.alpha_qe(*given, None))(
      source.queries, near, found.scores
    )
  )


def test_numbers_are_those_of_the_protocol():
  source = _source()
  numbers = _evaluate(sizes=(2,))[-1]
  for protocol in ("easy", "medium", "hard"):
    want = _map(_expanded(source, 6), source, protocol)
    assert numbers[f"mAP_{protocol}"] == pytest.approx(want.map, abs=1e-6)
    plain = _map(source.queries, source, protocol)
    assert numbers[f"mAP_none_{protocol}"] == pytest.approx(plain.map, abs=1e-6)
  both = [numbers["mAP_medium"], numbers["mAP_hard"]]
  assert numbers["mAP"] == pytest.approx(np.mean(both))
  want = _map(_expanded(source, 6), source, "medium").mean_precisions
  got = [numbers[f"mP_{k}_medium"] for k in (1, 5, 10)]
  np.testing.assert_allclose(got, want)
  fewer = [
    _map(_expanded(source, 2), source, p).map for p in ("medium", "hard")
  ]
  assert numbers["mAP_at_2"] == pytest.approx(np.mean(fewer), abs=1e-6)
  assert numbers["mAP_at_6"] == numbers["mAP"]
  assert numbers["drop"] == pytest.approx(
    max(numbers["mAP_at_2"], numbers["mAP"]) - numbers["mAP"]
  )


def test_rivals_are_the_best_of_what_was_tried():
  numbers = _evaluate(rivals=RIVALS)[-1]
  source = _source()
  each = {}
  for k in RIVALS["sizes"]:
    for alpha in RIVALS["alpha"]:
      found = search.top_k(source.queries, source.database, k=k)
      expand = functools.partial(expansion.alpha_qe, alpha=alpha)
      rows = jax.vmap(lambda *given, expand=expand: expand(*given, None))(
        source.queries,
        source.database[np.asarray(found.indices)],
        found.scores,
      )
      maps = [_map(np.asarray(rows), source, p).map for p in ("medium", "hard")]
      each[k, alpha] = np.mean(maps)
  best = max(each, key=each.get)
  assert numbers["mAP_alpha_qe"] == pytest.approx(each[best], abs=1e-6)
  assert each[numbers["alpha_qe_neighbours"], best[1]] == each[best]
  for name in ("aqe", "aqewd", "dqe"):
    assert 0 < numbers[f"mAP_{name}"] <= 1
    assert numbers[f"{name}_neighbours"] in RIVALS["sizes"]
    assert numbers[f"drop_{name}"] >= 0


def test_data_without_hard_rows_have_one_number():
  numbers = _evaluate(source=_source(hard=False))[-1]
  assert "mAP_medium" not in numbers
  want = _map(_expanded(_source(hard=False), 6), _source(hard=False), "easy")
  assert numbers["mAP"] == pytest.approx(want.map, abs=1e-6)
  assert "mP_10_easy" in numbers


@pytest.mark.parametrize("batch_size", [16, 24])
def test_numbers_do_not_depend_on_the_batch_size(batch_size):
  assert _evaluate(batch_size)[-1] == pytest.approx(
    _evaluate()[-1], abs=1e-6, nan_ok=True
  )


def test_an_augmented_database_is_searched_with_queries_of_its_own():
  source = _source()
  evaluator = retrieval_evaluators.augmented(
    _alpha_qe,
    lambda: source,
    neighbours=3,
    batch_size=16,
    then=functools.partial(
      retrieval_evaluators.retrieval, _alpha_qe, batch_size=8
    ),
    rivals=RIVALS,
  )
  mesh = runtime.make_mesh({"data": -1, "model": 1})
  numbers, _ = runtime.evaluate(evaluator, STATE, mesh)
  rows = expansion.augment_database(
    source.database, k=3, expand=expansion.alpha_qe
  )
  other = source.with_database(np.asarray(rows))
  maps = [_map(_expanded(other, 6), other, p).map for p in ("medium", "hard")]
  assert numbers["mAP"] == pytest.approx(np.mean(maps), abs=1e-6)
  plain = [_map(source.queries, other, p).map for p in ("medium", "hard")]
  assert numbers["mAP_none"] == pytest.approx(np.mean(plain), abs=1e-6)
  assert numbers["alpha_qe_rows"] == 2
  assert 0 < numbers["mAP_alpha_qe"] <= 1


def test_pictures_show_rankings_groups_and_the_curve():
  evaluator, outputs, _ = _evaluate(sizes=(2,), rivals=RIVALS)
  figures = evaluator.pictures(STATE, outputs)
  assert set(figures) == {
    "rankings before and after",
    "gain by group",
    "number of neighbours",
  }
  before, after = figures["rankings before and after"].axes
  strips = after.images[0].get_array()
  assert strips.shape == (6, 50, 3)
  # What comes first is relevant, in green, more often after the expansion.
  green = lambda axes: (
    np.asarray(axes.images[0].get_array())[:, :4, 0] < 160
  ).sum()
  assert green(after) >= green(before) > 6
  lines = figures["number of neighbours"].axes[0].get_lines()
  assert {line.get_label() for line in lines} == {
    "network",
    "aqe",
    "aqewd",
    "alpha_qe",
    "dqe",
    "no expansion",
  }


def test_protocols_without_rows_are_left_out():
  source = _source()
  only = [
    retrieval_examples.Truth(t.junk[:0], t.hard, t.junk)
    for t in map(source.truth, range(len(source)))
  ]
  hard = retrieval_examples.Queries(
    database=source.database, queries=source.queries, truth=only, k=6
  )
  judged = retrieval_evaluators.judge(hard, source.queries)
  assert set(judged.aps) == {"medium", "hard"}
  none = [retrieval_examples.Truth(*[t.junk[:0]] * 3) for t in only]
  empty = retrieval_examples.Queries(
    database=source.database, queries=source.queries, truth=none, k=6
  )
  with pytest.raises(InputError, match="of no query what is relevant"):
    retrieval_evaluators.judge(empty, source.queries)
