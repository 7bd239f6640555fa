"""Real processes on this machine, started as a person would start them."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import eval as evaluation
from jaxshape.engine import checkpoints, command, processes
from jaxshape.errors import InputError
import train

TINY = "--config=tests/tiny/settings.py:replay"
PAPER = "--config=configs/texture_suppression.py:tiny"
SMALL = (
  "--config.steps=3",
  "--config.batch_size=8",
  "--config.log_every=3",
  "--config.data.options.num_examples=16",
  "--config.data.image_size=32",
  "--config.optimizer.warmup_steps=0",
  "--config.bench.corruptions=()",
  "--config.data.eval_splits=('test',)",
  "--config.bench.saliency=('test',)",
  "--config.bench.cue_conflict=",
)
LONG = (
  "--config.steps=100000",
  "--config.pause=0.01",
  "--config.save_every=20",
  "--config.log_every=1000",
)
LIMIT = 120
# How each sum over the batch is put together differs with the number of
# processes. Adam and AdamW divide by the root of the squared gradient, so what
# rounds off there moves a parameter by a share of its learning rate.
TOLERANCE = {"rtol": 1e-3, "atol": 1e-4}


def _port():
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return free.getsockname()[1]


class Run:
  """Processes of one run, each with its output in a file of `folder`."""

  def __init__(self, folder, script, arguments, *, count, devices):
    self.folder, port = folder, _port()
    folder.mkdir(parents=True, exist_ok=True)
    env = {
      **os.environ,
      "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
      "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    self.children = []
    for i in range(count):
      told = (
        f"--coordinator=127.0.0.1:{port}",
        f"--process_id={i}",
        f"--num_processes={count}",
      )
      with open(self._log(i), "wb") as log:
        self.children.append(
          subprocess.Popen(
            [sys.executable, script, *arguments, *told],
            env=env,
            stdout=log,
            stderr=subprocess.STDOUT,
          )
        )

  def _log(self, i):
    return self.folder / f"log{i}"

  def says(self, i):
    return self._log(i).read_text(errors="replace")

  def wait(self):
    """The exit codes; what was said, where there is none in time."""
    until = time.monotonic() + LIMIT
    try:
      return [c.wait(until - time.monotonic()) for c in self.children]
    except subprocess.TimeoutExpired:
      said = [self.says(i)[-2000:] for i in range(len(self.children))]
      pytest.fail(f"still running after {LIMIT} s: {said}")

  def ends_well(self):
    codes = self.wait()
    assert not any(codes), [self.says(i)[-2000:] for i in range(len(codes))]

  def __enter__(self):
    return self

  def __exit__(self, *_):
    for child in self.children:
      with contextlib.suppress(OSError):
        child.kill()
      child.wait()


def _launch(workdir, *arguments, count=2, devices=2, script="train.py"):
  logs = pathlib.Path(f"{workdir}.logs")
  arguments = (*arguments, f"--workdir={workdir}")
  return Run(logs, script, arguments, count=count, devices=devices)


def _config(workdir):
  """The config of a run, for the eight devices of this process."""
  config = command.read_config(workdir).unlock()
  config.mesh.data, config.mesh.model = -1, 1
  return config.lock()


def _alone(workdir, other):
  """Trains in this process what another run was told."""
  return train.train(_config(other), workdir)


def _state(workdir, step=None):
  """What a run has saved, by path."""
  run = checkpoints.Checkpoints(workdir)
  assert step in {None, run.steps()[-1]}
  config = _config(workdir)
  system = train.system_lib.load(config)
  mesh = train.runtime.make_mesh(config.mesh)
  like = train.runtime.abstract_state(system.init, jax.random.key(0), mesh)
  restored = run.restore(like, system=config.system, step=step)
  assert restored is not None
  return _arrays(restored[0])


def _arrays(state):
  return {
    checkpoints.path_name(path): checkpoints.whole(leaf)
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]
  }


def _close(a, b):
  assert a.keys() == b.keys()
  for path, value in a.items():
    np.testing.assert_allclose(value, b[path], err_msg=path, **TOLERANCE)


def _same(a, b):
  assert a.keys() == b.keys()
  for path, value in a.items():
    np.testing.assert_array_equal(value, b[path], err_msg=path)


@pytest.fixture(scope="module")
def replayed(tmp_path_factory):
  """Two processes, parameters cut in two; and one process told the same."""
  folder = tmp_path_factory.mktemp("replay")
  with _launch(
    folder / "two", TINY, "--config.mesh.model=2", "--config.eval_every=6"
  ) as run:
    run.ends_well()
  _alone(folder / "one", folder / "two")
  return folder, run


@pytest.fixture(scope="module")
def suppressed(tmp_path_factory):
  """The paper's system in two processes and in one."""
  folder = tmp_path_factory.mktemp("paper")
  with _launch(folder / "two", PAPER, *SMALL) as run:
    run.ends_well()
  _alone(folder / "one", folder / "two")
  return folder


def test_two_processes_train_what_one_does(replayed, suppressed):
  for folder in (replayed[0], suppressed):
    _close(_state(folder / "two"), _state(folder / "one"))


def test_four_processes_train_what_one_does(replayed, suppressed, tmp_path):
  tiny, paper = tmp_path / "tiny", tmp_path / "paper"
  with _launch(tiny, TINY, "--config.mesh.model=2", count=4) as run:
    run.ends_well()
  _close(_state(tiny), _state(replayed[0] / "one"))
  with _launch(paper, PAPER, *SMALL, count=4, devices=1) as run:
    run.ends_well()
  _close(_state(paper), _state(suppressed / "one"))


def test_only_the_first_process_speaks_and_writes(replayed):
  folder, run = replayed
  assert "56 parameters, new, steps 0 to 6 on 4 cpu device(s)" in run.says(0)
  said = [line for line in run.says(1).splitlines() if "Gloo" not in line]
  assert not any(line.strip() for line in said), said
  text = (folder / "two/metrics.jsonl").read_text()
  rows = [json.loads(line) for line in text.splitlines()]
  steps = [r["step"] for r in rows if "train/critic/loss" in r]
  assert steps == [2, 3, 4, 6]


def test_two_processes_evaluate_what_one_does(suppressed, tmp_path):
  with _launch(
    suppressed / "two",
    f"--output={tmp_path}",
    script="eval.py",
  ) as run:
    run.ends_well()
  assert "Gloo" in run.says(1)
  assert "report" not in run.says(1)
  assert "report: " in run.says(0)
  got = json.loads((tmp_path / "metrics.json").read_text())["two"]
  config = _config(suppressed / "two")
  want = evaluation.evaluate(config, suppressed / "two", pictures=False)
  assert len(want.metrics) > 8
  for name, value in want.metrics.items():
    number = np.nan if got[name] is None else got[name]
    np.testing.assert_allclose(
      number, value, rtol=1e-4, atol=1e-5, err_msg=name
    )
  assert len(list(tmp_path.rglob("*.png"))) > 3


def test_two_go_on_as_one_and_one_as_two_from_what_is_intact(
  replayed, tmp_path
):
  folder, _ = replayed
  for name in ("two", "one"):
    shutil.copytree(folder / name, tmp_path / name)
  longer = _config(folder / "two").unlock()
  longer.steps = 9
  train.train(longer.lock(), tmp_path / "two")
  # The newest step is damaged, so both have to take the one before.
  for path in (tmp_path / "one/checkpoints/6/state").rglob("*"):
    if path.is_file():
      path.write_bytes(b"")
  with _launch(tmp_path / "one", TINY, "--config.steps=9") as run:
    run.ends_well()
  assert "skipped damaged checkpoints 6" in run.says(0)
  assert "resumed from step 3" in run.says(0)
  _close(_state(tmp_path / "one", 9), _state(tmp_path / "two", 9))


def _wait_for_step(run, workdir, step):
  saved, until = checkpoints.Checkpoints(workdir), time.monotonic() + LIMIT
  while not any(s >= step for s in saved.steps()):
    assert time.monotonic() < until, run.says(0)
    codes = [child.poll() for child in run.children]
    assert codes == [None] * len(codes), [run.says(i) for i in (0, 1)]
    time.sleep(0.05)


def test_told_to_stop_at_one_all_stop_and_go_on_to_the_same_end(tmp_path):
  stopped = tmp_path / "stopped"
  with _launch(stopped, TINY, *LONG) as run:
    _wait_for_step(run, stopped, 20)
    run.children[1].send_signal(signal.SIGTERM)
    assert run.wait() == [processes.AGAIN] * 2
  at = checkpoints.Checkpoints(stopped).steps()[-1]
  assert f"told to stop: step {at} is saved; start me again." in run.says(0)
  assert "step" not in run.says(1)
  end = (*LONG, f"--config.steps={at + 5}", "--config.pause=0")
  with _launch(stopped, TINY, *end) as run:
    run.ends_well()
  with _launch(tmp_path / "straight", TINY, *end) as run:
    run.ends_well()
  _same(_state(stopped, at + 5), _state(tmp_path / "straight", at + 5))


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_is_killed_ends_the_other_by_name(victim, tmp_path):
  with _launch(tmp_path / "run", TINY, *LONG) as run:
    _wait_for_step(run, tmp_path / "run", 20)
    run.children[victim].kill()
    began = time.monotonic()
    codes = run.wait()
    took = time.monotonic() - began
  assert took < 60  # About one, where nothing else runs.
  assert codes[victim] == -signal.SIGKILL
  assert codes[1 - victim] == processes.AGAIN
  assert (
    f"error: process {1 - victim} of 2: ended because process {victim} of 2 "
    "failed: it is gone without a word; start all of them again"
  ) in run.says(1 - victim)


def test_what_one_cannot_read_ends_all_with_its_words(tmp_path):
  with _launch(
    tmp_path / "run", TINY, *LONG, "--config.breaks_for_the_last_at=30"
  ) as run:
    assert run.wait() == [1, 1]
  words = "a file of this process is not there any more"
  assert f"error: process 1 of 2: {words}" in run.says(1)
  assert (
    f"error: process 0 of 2: ended because process 1 of 2 failed: {words}"
  ) in run.says(0)
  assert checkpoints.Checkpoints(tmp_path / "run").steps()[-1] == 20


IMPATIENT = """
import os, sys
sys.path.insert(0, os.getcwd())
from jaxshape.engine import processes
processes.SILENCE, processes.HEARTBEAT = 6, 15
import train
train.config_flags.DEFINE_config_file("config", None, "")
train.flags.DEFINE_string("workdir", None, "")
train.flags.DEFINE_bool("profile", False, "")
train.command.run(train.main)
"""


def test_a_process_that_is_stopped_ends_the_other_by_name(tmp_path):
  script = tmp_path / "impatient.py"
  script.write_text(IMPATIENT)
  with _launch(tmp_path / "run", TINY, *LONG, script=script) as run:
    _wait_for_step(run, tmp_path / "run", 20)
    run.children[1].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    code = run.children[0].wait(40)
    took = time.monotonic() - began
  assert code == processes.AGAIN
  assert 5 < took < 60
  assert (
    "error: process 0 of 2: ended because process 1 of 2 failed: it is gone"
  ) in run.says(0)


def test_a_process_that_is_stuck_is_ended_and_named_by_the_other(tmp_path):
  stuck = ("--config.sticks_for_the_last_at=30", "--config.stuck_seconds=8")
  with _launch(tmp_path / "run", TINY, *LONG, *stuck) as run:
    began = time.monotonic()
    assert run.wait() == [processes.AGAIN] * 2
    assert time.monotonic() - began < 60
  words = "no step and no batch for 8 s; its stacks are above"
  assert f"error: process 1 of 2: {words}" in run.says(1)
  assert "regression.py" in run.says(1)  # Where it sleeps.
  assert (
    f"error: process 0 of 2: ended because process 1 of 2 failed: {words}"
  ) in run.says(0)


def test_told_to_stop_while_they_evaluate_they_give_it_up(tmp_path):
  slow = (
    "--config.eval_every=10",
    "--config.eval_pause=0.5",
    "--config.seed=1",
  )
  slow = (
    *slow,
    "--config.steps=12",
    "--config.save_every=20",
    "--config.log_every=1",
  )
  with _launch(tmp_path / "run", TINY, *slow) as run:
    log, until = tmp_path / "run/metrics.jsonl", time.monotonic() + LIMIT
    while not log.exists() or '"step": 10,' not in log.read_text():
      assert time.monotonic() < until, run.says(0)
      time.sleep(0.02)
    run.children[1].send_signal(signal.SIGTERM)
    assert run.wait() == [processes.AGAIN] * 2
  assert checkpoints.Checkpoints(tmp_path / "run").steps() == [10]
  assert "test/error" not in log.read_text()
  with _launch(tmp_path / "run", TINY, *slow) as run:
    run.ends_well()
  rows = [json.loads(line) for line in log.read_text().splitlines()]
  assert [r["step"] for r in rows if "test/error" in r] == [10]


ALONE = """
import sys
from jaxshape.engine import processes
processes.START = 2
import train
train.config_flags.DEFINE_config_file("config", None, "")
train.flags.DEFINE_string("workdir", None, "")
train.command.run(train.main)
"""


def test_processes_that_do_not_come_are_waited_for_so_long_and_no_longer():
  where = f"127.0.0.1:{_port()}"
  arguments = (f"--coordinator={where}", "--process_id=1", "--num_processes=2")
  done = subprocess.run(
    [sys.executable, "-c", ALONE, TINY, "--workdir=w", *arguments],
    capture_output=True,
    text=True,
    timeout=LIMIT,
    check=False,
  )
  assert done.returncode == 1
  assert f"not find each other within 2 s at --coordinator={where}" in (
    done.stderr
  )


@pytest.mark.parametrize(
  ("given", "message"),
  [
    (("a:1", None, None), "--process_id and --num_processes must be given"),
    ((None, 0, None), "--coordinator and --num_processes must be given"),
    ((None, None, 2), "--coordinator and --process_id must be given"),
    ((None, 1, 1), "--coordinator must be given"),
    (("a", 0, 2), "must be the host:port of process 0, got 'a'"),
    (("a:b", 0, 2), "must be the host:port of process 0, got 'a:b'"),
    (("a:1", 2, 2), "got --process_id=2 --num_processes=2"),
    (("a:1", -1, 2), "got --process_id=-1 --num_processes=2"),
    (("a:1", 0, 0), "got --process_id=0 --num_processes=0"),
  ],
)
def test_flags_that_do_not_fit_are_refused(given, message):
  with pytest.raises(InputError, match=message):
    processes.initialize(*given)


VARIABLES = (
  "SLURM_STEP_NODELIST", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE",
  "MEGASCALE_COORDINATOR_ADDRESS", "TPU_WORKER_HOSTNAMES",
)  # fmt: skip


@pytest.mark.parametrize(
  ("variables", "found"),
  [
    ({}, ""),
    ({"SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "n[1-4]"}, "SLURM"),
    ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "n1"}, ""),
    ({"SLURM_NTASKS": "4"}, ""),  # Of the job's script, which runs once.
    ({"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI"),
    ({"OMPI_COMM_WORLD_SIZE": "1"}, ""),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU_WORKER_HOSTNAMES"),
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, ""),
    ({"MEGASCALE_COORDINATOR_ADDRESS": "a"}, "MEGASCALE_COORDINATOR_ADDRESS"),
  ],
)
def test_machines_say_that_there_are_several(monkeypatch, variables, found):
  for name in VARIABLES:
    monkeypatch.delenv(name, raising=False)
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  assert processes.detected() == found
  started = []
  monkeypatch.setattr(
    jax.distributed, "initialize", lambda **options: started.append(options)
  )
  monkeypatch.setattr(jax.config, "update", lambda *_: None)
  processes.initialize()
  assert bool(started) == bool(found)
  processes.initialize(num_processes=1)  # Alone, whatever the machine says.
  assert len(started) == bool(found)
  assert not any("coordinator_address" in options for options in started)


def test_alone_everything_is_agreed_at_once():
  assert processes.count() == 1
  assert processes.gather({"a": 1}) == [{"a": 1}]
  agree = processes.Agreement(train.runtime.make_mesh({"data": 8}))
  assert [agree(n) for n in (0, 1, 0)] == [0, 1, 0]
  processes.finish()
