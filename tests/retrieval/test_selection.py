import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxshape.retrieval import selection


def _by_sorting(scores, k):
  order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
  return np.take_along_axis(scores, order, 1), order


@pytest.mark.parametrize("rows", [3000, 2999, 131])
@pytest.mark.parametrize("form", selection.FORMS)
def test_best_is_a_stable_sort(rows, form):
  # Few values, so that nearly all scores have equals in and out of their group.
  rng = np.random.default_rng(0)
  scores = rng.integers(-3, 3, (4, rows)).astype(np.float32)
  scores[1] = -np.inf
  scores[2] = np.where(scores[2] == 0, -0.0, scores[2])
  scores[3, 7:] = 0
  got = jax.jit(lambda x: selection.best(x, k=5, form=form))(scores)
  want = _by_sorting(scores, 5)
  np.testing.assert_array_equal(got[0], want[0])
  if form != "approximate":
    np.testing.assert_array_equal(got[1], want[1])


def test_two_stages_never_sort_the_whole_row():
  seen = []
  right = lax.top_k
  with pytest.MonkeyPatch.context() as patch:
    note = lambda x, k: seen.append(x.shape[1]) or right(x, k)
    patch.setattr(selection.lax, "top_k", note)
    selection.best(jnp.ones((2, 9600)), k=5)
    assert max(seen) < 1000
    selection.best(jnp.ones((2, 9600)), k=90)
    assert seen[-1] == 9600


def test_equal_scores_of_either_zero_are_in_order():
  scores = np.where(np.arange(2000) % 3, 0.0, -0.0)[None].astype(np.float32)
  for form in ("two_stage", "sort"):
    got = selection.best(scores, k=9, form=form)
    np.testing.assert_array_equal(got[1][0], np.arange(9))


def test_chunks_and_blocks_keep_to_the_memory():
  way = selection.Way(10, "sort", 0.9, "high", False, False)
  for memory in (10**5, 10**7, 10**9, 10**11):
    for copied, whole in ((2048, 0), (6144, 4096)):
      got = way.within(
        70, 10**6, chunk=None, memory=memory, copied=copied, whole=whole
      )
      cut = copied if got.chunk < 10**6 else whole
      assert got.chunk * (cut + 8 * got.block) <= memory * 1.01
      # No more steps than the memory asks for.
      if memory == 10**11:
        assert (got.chunk, got.block) == (10**6, 70)
  fixed = way.within(70, 99, chunk=30, memory=1, copied=9, whole=0)
  assert (fixed.chunk, fixed.block) == (30, 14)


@pytest.mark.parametrize(
  ("options", "text"),
  [
    ({"k": 0}, "k must be between 1 and 6, got 0"),
    ({"k": 7}, "k must be between 1 and 6, got 7"),
    ({"k": 2, "form": "heap"}, "form must be one of .* got 'heap'"),
  ],
)
def test_options_are_refused(options, text):
  with pytest.raises(ValueError, match=text):
    selection.best(np.zeros((2, 6), np.float32), **options)
