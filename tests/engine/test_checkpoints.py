import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest

from jaxshape.engine import checkpoints, runtime
from jaxshape.errors import InputError
from jaxshape.system import TrainState

# Orbax's reader leaves coroutines behind when a file is damaged.
pytestmark = pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnraisableExceptionWarning"
)

CONFIG = {"system": "some"}


def _state(step, value=None):
  value = float(step) if value is None else value
  return TrainState(
    jnp.int32(step),
    {"net": {"w": jnp.full((16, 8), value)}},
    {"net": (jnp.full((3,), value, jnp.bfloat16),)},
    {"key": jax.random.key(7), "seen": jnp.float32(value)},
  )


def _like(state):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )


def _same(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    pair = [x, y]
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      pair = [jax.random.key_data(leaf) for leaf in pair]
    np.testing.assert_array_equal(*map(np.asarray, pair))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A run with steps 1 and 2; tests copy it before they break it."""
  folder = tmp_path_factory.mktemp("run")
  run = checkpoints.Checkpoints(folder)
  for step in (1, 2):
    run.save(_state(step), config=CONFIG, metrics={"test/top1": step / 10})
  run.wait()
  return folder


@pytest.fixture
def copy(saved, tmp_path):
  shutil.copytree(saved, tmp_path / "run")
  return tmp_path / "run"


def _restore(folder, state=None, **options):
  like = _like(_state(0) if state is None else state)
  run = checkpoints.Checkpoints(folder)
  return run.restore(like, **{"system": "some", **options})


def test_what_was_saved_comes_back_exactly_with_what_lay_beside_it(saved):
  state, metadata = _restore(saved)
  _same(state, _state(2))
  assert metadata["metrics"] == {"test/top1": 0.2}
  assert metadata["config"] == CONFIG
  assert metadata["versions"]["jax"] == jax.__version__
  state, _ = _restore(saved, step=1)
  _same(state, _state(1))


def test_no_checkpoint_is_none(tmp_path):
  assert _restore(tmp_path) is None


def test_the_newest_and_the_best_are_kept(tmp_path):
  run = checkpoints.Checkpoints(tmp_path, keep=2, best_metric="top1")
  for step, value in ((1, 0.3), (2, 0.9), (3, 0.1), (4, 0.2), (5, 0.4)):
    run.save(_state(step), config=CONFIG, metrics={"top1": value})
  run.wait()
  assert run.steps() == [2, 4, 5]
  assert run.best() == 2
  low = checkpoints.Checkpoints(tmp_path, best_metric="top1", best_mode="min")
  assert low.best() == 4


def test_another_number_of_devices(tmp_path):
  eight = runtime.make_mesh({"data": 4, "model": 2})
  shardings = runtime.state_shardings(eight, _state(3))
  state = jax.device_put(_state(3), shardings)
  assert state.params["net"]["w"].sharding.spec == PartitionSpec("model")
  run = checkpoints.Checkpoints(tmp_path)
  run.save(state, config=CONFIG, metrics={})
  run.wait()
  one = NamedSharding(
    jax.sharding.Mesh(np.asarray(jax.devices()[:1]), "data"), PartitionSpec()
  )
  like = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), state
  )
  restored, _ = run.restore(like, system="some")
  assert restored.params["net"]["w"].sharding == one
  _same(restored, _state(3))


def _files(step):
  return sorted(p for p in step.rglob("*") if p.is_file())


def test_no_flipped_bit_gives_wrong_numbers(saved, tmp_path):
  # Every file of the newest step, at several places each.
  outcomes = {1: 0, 2: 0}
  want = {1: _state(1), 2: _state(2)}
  newest = pathlib.Path("checkpoints/2")
  for number, path in enumerate(_files(saved / newest)):
    data = path.read_bytes()
    for place in {0, len(data) // 3, len(data) // 2, len(data) - 1}:
      if not data:
        continue
      folder = tmp_path / f"{number}_{place}"
      shutil.copytree(saved, folder)
      broken = bytearray(data)
      broken[place] ^= 1
      (folder / path.relative_to(saved)).write_bytes(bytes(broken))
      state, _ = _restore(folder)
      _same(state, want[int(state.step)])
      outcomes[int(state.step)] += 1
      shutil.rmtree(folder)
  assert outcomes[1] > 5  # Damage was seen and the step before it was used.


def test_what_is_missing_or_cut_is_skipped_and_said(copy, caplog):
  (copy / "checkpoints" / "7").mkdir()
  state, _ = _restore(copy)
  assert int(state.step) == 2
  assert "skipped damaged checkpoints 7" in caplog.text
  largest = max(_files(copy / "checkpoints/2"), key=os.path.getsize)
  largest.write_bytes(largest.read_bytes()[:-5])
  shutil.rmtree(copy / "checkpoints/2/state/d", ignore_errors=True)
  state, _ = _restore(copy)
  _same(state, _state(1))


def test_a_damaged_later_step_does_not_outlive_the_next_save(copy):
  (copy / "checkpoints" / "7").mkdir()
  (copy / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir()
  run = checkpoints.Checkpoints(copy, keep=1)
  run.save(_state(3), config=CONFIG, metrics={})
  run.wait()
  assert run.steps() == [3]
  assert [p.name for p in run.folder.iterdir()] == ["3"]


def test_nothing_intact_is_refused(copy):
  for step in (1, 2):
    (copy / f"checkpoints/{step}/_CHECKPOINT_METADATA").write_text("[" * 5000)
  with pytest.raises(InputError, match=r"no intact checkpoint: 2 \(.*1 \("):
    _restore(copy)


def test_other_systems_steps_and_shapes_are_refused(saved):
  with pytest.raises(
    InputError, match="of the system 'some', the config names"
  ):
    _restore(saved, system="other")
  with pytest.raises(InputError, match="holds no step 9; it holds: 1, 2"):
    _restore(saved, step=9)
  wide = _state(0).replace(params={"net": {"v": jnp.zeros((16, 9))}})
  with pytest.raises(
    InputError, match=r"2 places: params/net/v: stored nothing"
  ):
    _restore(saved, wide)
  half = _state(0).replace(params={"net": {"w": jnp.zeros((16, 8), jnp.int32)}})
  with pytest.raises(
    InputError, match=r"stored float32\(16, 8\), wanted int32"
  ):
    _restore(saved, half)


def test_bad_options_are_refused(tmp_path):
  with pytest.raises(InputError, match="keep must be at least 1, got 0"):
    checkpoints.Checkpoints(tmp_path, keep=0)
  with pytest.raises(InputError, match="max or min, got 'most'"):
    checkpoints.Checkpoints(tmp_path, best_mode="most")


def test_parameters_of_another_run_by_path_and_shape(saved):
  fresh = _state(0, value=0.0)
  fresh = fresh.replace(
    params={"net": {"w": jnp.zeros((16, 8)), "new": jnp.zeros(2)}},
    extra={"seen": jnp.zeros((2,))},
  )
  state, report = checkpoints.initialize_from(fresh, saved)
  assert (state.params["net"]["w"] == 2.0).all()
  assert int(state.step) == 0
  assert (state.opt_state["net"][0] == 0).all()
  assert "1 leaves taken, 2 left as they were" in report
  assert "params/net/new (not there)" in report
  assert "extra/seen (theirs (), ours (2,))" in report
  state, report = checkpoints.initialize_from(
    _state(0), saved, include=("^extra/",)
  )
  assert (state.params["net"]["w"] == 0.0).all()
  assert state.extra["seen"] == 2.0
  assert "params/net/w (not included)" in report


def test_averages_start_from_what_was_taken(tmp_path):
  def averaged(value, average):
    return _state(1, value=value).replace(
      extra={"ema": {"net": {"w": jnp.full((16, 8), average)}}}
    )

  plain, own = tmp_path / "plain", tmp_path / "own"
  for folder, state in ((plain, _state(1)), (own, averaged(1.0, 5.0))):
    run = checkpoints.Checkpoints(folder)
    run.save(state, config=CONFIG, metrics={})
    run.wait()
  # Theirs has no average: ours starts at their parameters, not at random.
  got, _ = checkpoints.initialize_from(averaged(0.0, 0.0), plain)
  assert (got.extra["ema"]["net"]["w"] == 1.0).all()
  # Theirs has one: that is what was evaluated there, so that is taken.
  got, _ = checkpoints.initialize_from(_state(0, value=0.0), own)
  assert (got.params["net"]["w"] == 5.0).all()


def test_lists_in_extra_do_not_hide_the_parameters(tmp_path):
  state = _state(1).replace(extra={"queue": [jnp.ones(2), jnp.ones(3)]})
  run = checkpoints.Checkpoints(tmp_path)
  run.save(state, config=CONFIG, metrics={})
  run.wait()
  got, report = checkpoints.initialize_from(_state(0, value=0.0), tmp_path)
  assert (got.params["net"]["w"] == 1.0).all()
  assert "1 leaves taken" in report


def test_a_metric_that_is_no_number_is_not_the_best(tmp_path):
  run = checkpoints.Checkpoints(tmp_path, keep=1, best_metric="top1")
  for step, value in ((1, float("nan")), (2, 0.5), (3, 0.9), (4, 0.1)):
    run.save(_state(step), config=CONFIG, metrics={"top1": value})
  run.wait()
  assert run.steps() == [3, 4]


def test_nothing_to_start_from_is_refused(saved, tmp_path):
  with pytest.raises(InputError, match="init_from: .* holds no checkpoint"):
    checkpoints.initialize_from(_state(0), tmp_path)
  with pytest.raises(InputError, match=r"nothing in .* fits; .*not included"):
    checkpoints.initialize_from(_state(0), saved, include=("nothing",))


def test_a_second_run_is_kept_away_while_the_first_lives(tmp_path):
  code = (
    "import sys\n"
    "from jaxshape.engine import checkpoints\n"
    "with checkpoints.lock(sys.argv[1]):\n"
    "  print('held', flush=True); sys.stdin.read()\n"
  )
  holder = subprocess.Popen(
    [sys.executable, "-c", code, str(tmp_path)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  with holder:
    assert holder.stdout.readline() == "held\n"
    with (
      pytest.raises(InputError, match=f"in use by process {holder.pid} on"),
      checkpoints.lock(tmp_path),
    ):
      pass
    holder.kill()
  with checkpoints.lock(tmp_path):
    pass


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
  (tmp_path / "file").write_text("")
  with (
    pytest.raises(InputError, match="cannot be written"),
    checkpoints.lock(tmp_path / "file" / "run"),
  ):
    pass


def test_a_failed_save_is_one_line(tmp_path):
  run = checkpoints.Checkpoints(tmp_path)
  (tmp_path / "checkpoints").write_text("in the way")
  with pytest.raises(checkpoints.SaveError, match="could not save .*/1: "):
    run.save(_state(1), config=CONFIG, metrics={})
