import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from jaxshape.data import sources, stream
from jaxshape.errors import InputError


class Numbers:
  classes = ("even", "odd")

  def __init__(self, n=10):
    self.n = n

  def __len__(self):
    return self.n

  def __getitem__(self, i):
    image = np.full((2, 2, 3), i, np.uint8)
    return {"image": image, "label": np.int32(i), "drawn": np.int32(-1)}


class Drawn(Numbers):
  def sample(self, i, rng):
    return {**self[i], "drawn": np.int32(rng.integers(10**6))}


class Broken(Numbers):
  """A source whose fourth example cannot be read."""

  def __init__(self, error):
    super().__init__()
    self.error = error

  def __getitem__(self, i):
    if i == 3:
      raise self.error
    return super().__getitem__(i)


def take(steps, source, *, key="label", **options):
  options = {"batch_size": 4, "seed": 0, **options}
  with contextlib.closing(stream.train(source, **options)) as batches:
    return np.stack([next(batches)[key] for _ in range(steps)])


def evaluate(source, **options):
  with contextlib.closing(stream.evaluate(source, **options)) as batches:
    return list(batches)


def test_batches_are_stacked_examples():
  with contextlib.closing(
    stream.train(Numbers(), batch_size=4, seed=0, shuffle=False)
  ) as batches:
    batch = [next(batches) for _ in range(3)][2]
  assert set(batch) == {"image", "label", "drawn"}
  assert batch["label"].tolist() == [8, 9, 0, 1]
  assert batch["label"].dtype == np.int32
  assert batch["image"].shape == (4, 2, 2, 3)
  assert batch["image"].dtype == np.uint8
  assert batch["image"][:, 0, 0, 0].tolist() == [8, 9, 0, 1]


def test_the_order_of_runs_that_exist():
  # Printed by the first version: with another order no run could be resumed.
  want = [[3, 2, 1, 6, 0, 7, 4, 5], [7, 6, 4, 5, 3, 1, 0, 2]]
  got = take(2, Numbers(8), batch_size=8)
  np.testing.assert_array_equal(got, want)


def test_evaluation_gives_each_example_once():
  batches = evaluate(Numbers(), batch_size=4)
  assert [b["mask"].tolist() for b in batches] == [
    *([1, 1, 1, 1], [1, 1, 1, 1]),
    [1, 1, 0, 0],
  ]
  labels = np.concatenate([b["label"] for b in batches])
  mask = np.concatenate([b["mask"] for b in batches])
  assert labels[mask > 0].tolist() == list(range(10))
  assert labels[mask == 0].tolist() == [9, 9]  # Padding is real data.
  assert mask.dtype == np.float32
  assert "mask" in evaluate(Numbers(3), batch_size=8)[0]


def test_epochs_are_different_permutations():
  order = take(10, Numbers(), batch_size=4).reshape(4, 10)
  for epoch in order:
    assert sorted(epoch) == list(range(10))
  assert len({tuple(epoch) for epoch in order}) == 4
  again = take(10, Numbers(), batch_size=4).reshape(4, 10)
  np.testing.assert_array_equal(order, again)
  assert np.any(take(10, Numbers(), seed=1).reshape(4, 10) != order)
  # Epoch 1 of a seed is not epoch 0 of the next one.
  assert np.any(take(10, Numbers(), seed=1).reshape(4, 10)[0] != order[1])


@pytest.mark.parametrize("key", ["label", "drawn"])
def test_any_step_can_be_resumed(key):
  whole = take(12, Drawn(), key=key)
  for start in (1, 5, 11):
    part = take(12 - start, Drawn(), key=key, start_step=start)
    np.testing.assert_array_equal(part, whole[start:])


def test_what_is_drawn_depends_on_seed_and_position_alone():
  drawn = take(10, Drawn(), key="drawn").ravel()
  assert len(set(drawn)) == 40  # The same image is drawn anew in each epoch.
  assert np.all(take(10, Drawn(), key="drawn", seed=1).ravel() != drawn)
  plain = take(10, Numbers(), key="drawn")
  assert np.all(plain == -1)


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_same_batches(count):
  for key in ("label", "drawn"):
    parts = [
      take(6, Drawn(), key=key, process_index=p, process_count=count)
      for p in range(count)
    ]
    whole = np.concatenate(parts, axis=1)
    np.testing.assert_array_equal(whole, take(6, Drawn(), key=key))


@pytest.mark.parametrize("n", [1, 8, 9, 13])
def test_processes_share_the_evaluation(n):
  parts = [
    evaluate(Numbers(n), batch_size=8, process_index=p, process_count=4)
    for p in range(4)
  ]
  assert len({len(part) for part in parts}) == 1
  assert all(b["label"].shape == (2,) for part in parts for b in part)
  seen = [
    int(label)
    for part in parts
    for b in part
    for label, mask in zip(b["label"], b["mask"], strict=True)
    if mask
  ]
  assert sorted(seen) == list(range(n))


def test_threads_and_worker_processes_change_nothing():
  want = take(6, Drawn(), key="drawn", start_step=3)
  for options in ({"threads": 3, "prefetch": 5}, {"workers": 2, "threads": 1}):
    got = take(6, Drawn(), key="drawn", start_step=3, **options)
    np.testing.assert_array_equal(got, want)


def test_fewer_examples_than_rows():
  got = take(2, Numbers(3), batch_size=8).ravel()
  assert sorted(got[:3]) == sorted(got[3:6]) == [0, 1, 2]
  assert set(take(2, Numbers(1), batch_size=2).ravel()) == {0}


def test_masks_of_sources_count_in_evaluation_only():
  class Masked(Numbers):
    def __getitem__(self, i):
      return {**super().__getitem__(i), "mask": np.float32(i != 2)}

  (batch,) = evaluate(Masked(3), batch_size=4)
  assert batch["mask"].tolist() == [1, 1, 0, 0]
  with contextlib.closing(
    stream.train(Masked(3), batch_size=4, seed=0)
  ) as batches:
    assert "mask" not in next(batches)


def test_doubled_epochs_hold_both_copies():
  doubled = sources.Doubled(Numbers())
  labels = take(5, doubled).ravel()
  filtered = take(5, doubled, key="filtered").ravel()
  pairs = set(zip(labels.tolist(), filtered.tolist(), strict=True))
  assert pairs == {(i, f) for i in range(10) for f in (0.0, 1.0)}


def test_closing_ends_the_threads():
  before = set(threading.enumerate())
  batches = stream.train(Numbers(), batch_size=4, seed=0, threads=3)
  next(batches)
  mine = set(threading.enumerate()) - before
  assert mine
  batches.close()
  batches.close()
  with pytest.raises(StopIteration):
    next(batches)
  for thread in mine:
    thread.join(timeout=5)
    assert not thread.is_alive()


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_reach_the_caller_with_their_words(workers):
  batches = stream.train(
    Broken(InputError("photos/c.png is damaged.")),
    batch_size=2,
    seed=0,
    shuffle=False,
    threads=2,
    workers=workers,
  )
  with contextlib.closing(batches):
    assert next(batches)["label"].tolist() == [0, 1]
    with pytest.raises(InputError, match=r"photos/c\.png is damaged"):
      next(batches)
    # Going on behind the damaged batch would be silent.
    with pytest.raises(StopIteration):
      next(batches)


def test_defects_keep_their_type():
  with pytest.raises(KeyError, match="defect"):
    evaluate(Broken(KeyError("defect")), batch_size=4)


@pytest.mark.parametrize(
  ("options", "says"),
  [
    (
      {"batch_size": 6, "process_count": 4},
      "multiple of the 4 processes, got 6",
    ),
    ({"batch_size": 0}, "batch_size must be"),
    ({"seed": -1}, "seed must be"),
    ({"start_step": -1}, "start_step must be >= 0, got -1"),
    ({"threads": 0}, "threads must be >= 1, got 0"),
    ({"prefetch": 0}, "prefetch must be >= 1"),
    ({"workers": -1}, "workers must be >= 0"),
  ],
)
def test_bad_options(options, says):
  with pytest.raises(InputError, match=says):
    stream.train(Numbers(), **{"batch_size": 4, "seed": 0, **options})


def test_no_examples():
  with pytest.raises(InputError, match="no examples"):
    stream.evaluate(Numbers(0), batch_size=4)
  with pytest.raises(InputError, match="no examples"):
    stream.train(Numbers(0), batch_size=4, seed=0)


def test_fingerprints_tell_other_examples_and_see_through_views():
  seen = stream.fingerprint(Numbers(4))
  assert seen == {**seen, "examples": 4, "name": ""}
  view = sources.Doubled(sources.Subset(Numbers(4), [1]))
  assert stream.fingerprint(view) == seen
  stream.check_same(seen, dict(seen))
  with pytest.raises(InputError, match="examples: 5 then, 4 now; bring them"):
    stream.check_same(seen, stream.fingerprint(Numbers(5)))
  with contextlib.closing(stream.train(view, batch_size=4, seed=0)) as batches:
    assert batches.fingerprint == seen


def test_only_the_first_difference_is_spelt_out():
  then = {"folders": {f"{i:02}": "1 files" for i in range(9)}}
  with pytest.raises(InputError) as said:
    stream.check_same({"folders": {}}, then)
  assert "folders 00: 1 files then, nothing now; " in str(said.value)
  assert "folders 05" not in str(said.value)
  assert "; ... (9 in all); " in str(said.value)


WORKERS = """
import contextlib, os, signal, sys, time
import numpy as np
from jaxshape.data import stream

class Images:
  classes = ()
  def __len__(self):
    return 64
  def __getitem__(self, i):
    return {"image": np.zeros((64, 64, 3), np.uint8), "label": np.int32(i)}

if __name__ == "__main__":
  before = set(os.listdir("/dev/shm"))
  batches = stream.train(Images(), batch_size=8, seed=0, workers=1)
  next(batches)
  time.sleep(1)  # Some are ready.
  new = set(os.listdir("/dev/shm")) - before
  print(len([n for n in new if n.startswith("psm_")]), flush=True)
  if sys.argv[1] == "group":  # All of them hear it, as on clusters.
    signal.signal(signal.SIGTERM, lambda *_: None)
    os.killpg(0, signal.SIGTERM)
    for _ in range(30):
      next(batches)
    batches.close()
  else:
    os.kill(os.getpid(), signal.SIGKILL)
"""


def _start(folder, how):
  script = folder / "script.py"
  script.write_text(WORKERS)
  return subprocess.Popen(
    [sys.executable, str(script), how],
    env={**os.environ, "PYTHONPATH": os.getcwd()},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    start_new_session=True,
    text=True,
  )


def _parcels():
  return list(pathlib.Path("/dev/shm").glob("jaxshape-batches-*"))


@pytest.mark.parametrize("full", [False, True])
def test_large_arrays_come_whole_from_workers(full, monkeypatch, tmp_path):
  if full:  # Then they go through the pipe.
    monkeypatch.setattr(stream.tempfile, "mkdtemp", lambda **_: str(tmp_path))
    (tmp_path / "0-0").mkdir()
  images = sources.Subset(Large(), range(3))
  with contextlib.closing(
    stream.train(images, batch_size=3, seed=0, shuffle=False, workers=1)
  ) as batches:
    got = next(batches)["image"]
  want = np.stack([Large()[i]["image"] for i in range(3)])
  np.testing.assert_array_equal(got, want)
  assert type(got) is np.ndarray
  got += 1  # Nobody else has it.


class Large(Numbers):
  def __getitem__(self, i):
    image = np.random.default_rng(i).integers(0, 256, (64, 64, 3), np.uint8)
    return {"image": image, "label": np.int32(i)}


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="no such folder")
def test_workers_leave_the_end_to_the_first_process_and_no_memory(tmp_path):
  began = time.monotonic()
  with _start(tmp_path, "group") as child:
    out, err = child.communicate(timeout=60)
  assert child.returncode == 0, err
  assert err == ""
  assert out.split() == ["0"]  # Of Grain's shared memory.
  assert time.monotonic() - began < 20  # No worker waits for a full pipe.


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="no such folder")
def test_workers_end_with_a_first_process_that_is_killed(tmp_path):
  before = _parcels()
  with _start(tmp_path, "kill") as child:
    child.wait(60)
    until = time.monotonic() + 20
    left = [p for p in _parcels() if p not in before]
    assert left
    with contextlib.closing(
      stream.train(Numbers(), batch_size=4, seed=0, workers=1)
    ) as batches:
      next(batches)
    assert not [p for p in left if p in _parcels()]
    while time.monotonic() < until:
      try:
        os.killpg(child.pid, 0)
      except ProcessLookupError:
        return
      time.sleep(0.1)
    os.killpg(child.pid, signal.SIGKILL)
  pytest.fail("workers are still there")


def test_a_worker_that_is_ended_from_outside_is_said():
  with (
    contextlib.closing(
      stream.train(Killed(), batch_size=4, seed=0, workers=1)
    ) as batches,
    pytest.raises(InputError, match="exit code -9"),
  ):
    list(batches)


class Killed(Numbers):
  """A source that the machine cannot bear."""

  def __getitem__(self, i):
    os.kill(os.getpid(), signal.SIGKILL)
