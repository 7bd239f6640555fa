import dataclasses
import random
import signal
import types

import numpy as np
import pytest

from benchmarks.faults import Row, cases, lab
from benchmarks.faults import __main__ as command

CONFIG = """
import sys
sys.path.append({root!r})
from tests.tiny import settings
def get_config():
  return settings.config("regression", noise=0.1)
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
  """A lab whose runs take little longer than Python's start."""
  folder = tmp_path_factory.mktemp("faults")
  path = folder / "config.py"
  path.write_text(CONFIG.format(root=str(lab.ROOT)))
  made = lab.Lab(
    folder,
    (f"--config={path}",),
    steps=60,
    save_every=5,
    rng=random.Random(0),
  )
  made.unbroken()
  return made


def _outcome(**changes):
  made = lab.Outcome(
    2,
    {"w": np.float32([1, 2]), "b": np.float32([0])},
    {(1, "loss"): 0.5, (2, "loss"): 0.25},
  )
  return dataclasses.replace(made, **changes)


# One run, really killed.


def test_killed_runs_end_like_the_unbroken_one(tiny):
  row = Row("kill")
  cases.kills(tiny, row, count=2)
  assert row.failures == []
  assert row.tries == 2
  assert "2 kills, " in row.found
  assert "; 0 wrong values" in row.found


def test_an_end_that_differs_by_one_bit_is_found(tiny, monkeypatch):
  wanted = tiny.unbroken()
  (path, value), *_ = [
    item for item in wanted.leaves.items() if "params" in item[0]
  ]
  changed = value.copy()
  changed.view(np.uint32).flat[0] ^= 1
  leaves = {**wanted.leaves, path: changed}
  other = dataclasses.replace(wanted, leaves=leaves)
  monkeypatch.setattr(tiny, "_unbroken", other)
  _, wrong = tiny.finish(tiny.fresh())
  assert wrong == f"1 wrong values: {path} differs"


@pytest.mark.parametrize(
  ("codes", "verdict", "wrong", "text"),
  [
    ([0], "3 wrong values: a; b; c", 3, "run 1: 3 wrong values: a; b; c"),
    ([0], "the end cannot be read: x", 1, "run 1: the end cannot be read: x"),
    ([1], "", 0, "restart ended with [1]: error: no"),
  ],
)
def test_a_wrong_end_fails_the_row(codes, verdict, wrong, text, tmp_path):
  attempt = types.SimpleNamespace(
    began=0.0,
    running=False,
    origin=0,
    wait=lambda: codes,
    wait_for=lambda ready: False,
    complained=lambda: "error: no\n",
  )
  setting = types.SimpleNamespace(
    rng=random.Random(0),
    seconds=1.0,
    fresh=lambda: tmp_path / "run",
    start=lambda workdir: attempt,
    judge=lambda workdir: verdict,
  )
  row = Row("kill")
  stops = cases.Interruptions(setting, signal.SIGKILL, row)
  stops.run(1)
  assert row.failures[0] == text
  assert stops.wrong >= wrong


def test_the_log_of_the_unbroken_run_is_compared_too(tiny):
  wanted = tiny.unbroken()
  assert wanted.step == tiny.steps
  steps = [step for step, name in wanted.logged if name == "train/net/loss"]
  assert steps == list(range(1, tiny.steps + 1))
  assert not {name for _, name in wanted.logged} & set(lab.CLOCKED)


# A comparison that sees everything.


def test_every_difference_is_seen():
  assert lab.differences(_outcome(), _outcome()) == []
  minus = np.float32([-0.0])
  for changes, text in (
    ({"step": 3}, "ended at step 3, not 2"),
    ({"leaves": {"w": np.float32([1, 2])}}, "b is only in one"),
    ({"leaves": {**_outcome().leaves, "b": minus}}, "b differs"),
    (
      {"leaves": {**_outcome().leaves, "b": np.float64([0])}},
      "b is float64(1,), not float32(1,)",
    ),
    ({"logged": {(1, "loss"): 0.5}}, "loss of step 2 is only in one"),
    (
      {"logged": {(1, "loss"): 0.5, (2, "loss"): 0.25 + 1e-15}},
      "loss of step 2 differs",
    ),
  ):
    assert lab.differences(_outcome(**changes), _outcome()) == [text]


@pytest.mark.parametrize(
  ("text", "wrong"),
  [
    ("error: no room in checkpoints.\n", ""),
    ("WARNING: something\nerror: no room in checkpoints.\n", ""),
    ("", "said in 0 lines: nothing said"),
    ("error: a\nerror: b\n", "said in 2 lines: error: b"),
    ("no room in checkpoints\n", "said in 1 lines: no room in checkpoints"),
    ("error: no room\n", "does not name ['checkpoints']: error: no room"),
    (
      "Traceback (most recent call last):\nOSError: 28\n",
      "said with a traceback: OSError: 28",
    ),
  ],
)
def test_one_line(text, wrong):
  assert lab.one_line(text, "checkpoints") == wrong


@pytest.mark.parametrize(
  ("number", "origin", "seen", "wrong"),
  [
    # (step reached, newest finished step, saving)
    (signal.SIGKILL, 10, (17, 10, False), None),
    (signal.SIGKILL, 10, (21, 10, True), None),
    (signal.SIGKILL, 5, (17, 10, False), "step 10 had been saved"),
    (signal.SIGKILL, 10, (22, 10, False), "12 steps lost, at most 8"),
    (signal.SIGTERM, 17, (17, 17, False), None),
    (signal.SIGTERM, 16, (17, 16, False), "1 steps lost, at most 0"),
  ],
)
def test_lost_steps_are_counted(number, origin, seen, wrong):
  row = Row("stop")
  setting = types.SimpleNamespace(save_every=8)
  stops = cases.Interruptions(setting, number, row)
  stops._open = [seen]
  stops._settle(types.SimpleNamespace(origin=None))
  assert stops.lost == []  # That start was ended before it said anything.
  stops._settle(types.SimpleNamespace(origin=origin))
  assert stops.lost == [seen[0] - origin]
  assert not row.failures if wrong is None else wrong in row.failures[0]


def test_the_missing_process_has_to_be_named():
  said = "x\nerror: process 0 of 2: {}; go on from step 1."
  assert cases.names(said.format("process 1 of 2 is gone"), 0, 1)
  assert cases.names(said.format("processes 0 and 1 are gone"), 0, 1)
  assert not cases.names(said.format("aborted by a library"), 0, 1)
  assert not cases.names(said.format("aborted by a library"), 0, 0)
  assert not cases.names("process 1 is gone", 0, 1)  # Deep in a trace.


def test_damage_is_done(tmp_path):
  setting = types.SimpleNamespace(rng=random.Random(1))
  for name, damage in cases.DAMAGES.items():
    step = tmp_path / name
    (step / "state").mkdir(parents=True)
    (step / "state" / "arrays").write_bytes(bytes(range(100)))
    (step / "empty").write_bytes(b"")
    before = cases._contents(step)
    damage(step, setting, 0)
    assert cases._contents(step) != before
    assert step.is_dir()


# Pages and exit statuses.


def _fails(row):
  row.tries, row.found = 1, "went on | elsewhere"
  row.failures.append("1 steps lost")


def _breaks(row):
  raise OSError("no such program")


def _passes(row):
  row.tries, row.found = 3, "all well"


def _skips(row):
  row.skipped = "no such flag"


@pytest.mark.parametrize(
  ("chosen", "status"),
  [("passes,skips", 0), ("fails", 1), ("breaks", 1), ("", 1)],
)
def test_the_page_and_the_status_tell(chosen, status, tmp_path, monkeypatch):
  table = {
    f.__name__.strip("_"): (f.__name__, f)
    for f in (_passes, _skips, _fails, _breaks)
  }
  setting = types.SimpleNamespace(
    unbroken=_outcome, steps=80, save_every=8, seconds=5.0
  )
  monkeypatch.setattr(command, "faults", lambda *_, **__: (table, setting))
  output = tmp_path / "page.md"
  words = [f"--only={chosen}", f"--output={output}", "--kills=2"]
  assert command.main(words) == status
  text = output.read_text()
  assert "2 arrays and 2 logged numbers" in text
  for name, cells in (
    ("passes", "| _passes | 3 | all well | 0 |"),
    ("skips", "| _skips | 0 | not tried: no such flag | 0 |"),
    ("fails", "| _fails | 1 | **failed**: went on / elsewhere | 0 |"),
    ("fails", "- _fails: 1 steps lost"),
    ("breaks", "- _breaks: not measured: OSError: no such program"),
  ):
    assert (cells in text) == (name in (chosen or name).split(","))


@pytest.mark.parametrize("given", ["--only=earthquake", "--kills=0"])
def test_a_wrong_option_is_refused(given, tmp_path, monkeypatch, capsys):
  made = ({"kill": ("kill", _passes)}, None)
  monkeypatch.setattr(command, "faults", lambda *_, **__: made)
  with pytest.raises(SystemExit):
    command.main([given])
  assert given.split("=")[0].strip("-") in capsys.readouterr().err.lower() or (
    "earthquake" in given
  )
