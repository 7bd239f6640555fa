import json
import math

from etils import epath
import numpy as np
import pytest

from jaxshape.engine import logs


def _open(folder, *, start=0, total=9):
  return logs.Logs(folder, start=start, total=total)


def _lines(folder):
  return (folder / logs.FILE).read_text(encoding="utf-8").splitlines()


def test_rows_are_lines_of_json_in_order(tmp_path):
  log = _open(tmp_path)
  log.write(1, {"train/loss": 0.5})
  log.write(1, {"test/top1": 0.25})
  log.write(2, {"train/loss": 0.125})
  log.close()
  rows = [json.loads(line) for line in _lines(tmp_path)]
  times = [row.pop("time") for row in rows]
  assert rows == [
    {"step": 1, "train/loss": 0.5},
    {"step": 1, "test/top1": 0.25},
    {"step": 2, "train/loss": 0.125},
  ]
  assert times == sorted(times)
  assert any(p.name.startswith("events") for p in tmp_path.iterdir())


def test_what_is_not_finite_is_null(tmp_path):
  log = _open(tmp_path)
  log.write(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.5})
  log.close()
  (line,) = _lines(tmp_path)
  for word in ("NaN", "Infinity"):
    assert word not in line
  (row,) = logs.read(tmp_path)
  assert [row[k] for k in "abcd"] == [None, None, None, 1.5]


def test_going_on_drops_what_came_after_and_what_was_cut(tmp_path):
  log = _open(tmp_path)
  for step in range(1, 6):
    log.write(step, {"loss": 1 / step})
  log.close()
  with open(tmp_path / logs.FILE, "a", encoding="utf-8") as file:
    file.write('{"step": 6, "lo')  # Killed while it wrote.
  assert [row["step"] for row in logs.read(tmp_path)] == [1, 2, 3, 4, 5]
  log = _open(tmp_path, start=3)
  log.write(4, {"loss": 7.0})
  log.close()
  rows = [json.loads(line) for line in _lines(tmp_path)]
  assert [row["step"] for row in rows] == [1, 2, 3, 4]
  assert [row["loss"] for row in rows] == [1, 1 / 2, 1 / 3, 7.0]


def test_a_run_that_logged_nothing_has_no_rows(tmp_path):
  assert logs.read(tmp_path) == []
  assert logs.read(tmp_path / "nowhere") == []


def test_means_leave_out_players_that_rested():
  nan = math.nan
  rows = [
    {"a": 1.0, "b": nan, "c": nan},
    {"a": np.float32(2.0), "b": np.float32(5.0), "c": nan},
    {"a": 6.0, "b": nan, "c": nan},
  ]
  got = logs.mean(rows)
  assert list(got) == ["a", "b", "c"]
  assert (got["a"], got["b"]) == (3.0, 5.0)
  assert math.isnan(got["c"])
  assert all(type(value) is float for value in got.values())


def test_an_infinite_value_is_no_rest():
  assert logs.mean([{"a": 1.0}, {"a": math.inf}])["a"] == math.inf


def test_without_a_terminal_there_is_a_line_and_no_bar(tmp_path, capsys):
  log = _open(tmp_path)
  log.say("starts")
  log.advance()
  log.status(1, "loss 0.5")
  log.close()
  out, err = capsys.readouterr()
  assert out.splitlines() == ["starts", "step 1: loss 0.5"]
  assert err == ""


@pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnhandledThreadExceptionWarning"
)
def test_a_full_disk_does_not_block_what_tensorboard_is_told(
  tmp_path, monkeypatch
):
  log = _open(tmp_path, total=3000)
  board = log._board.file_writer.event_writer

  def full(_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(board._ev_writer, "write_event", full)
  log.write(0, {"loss": 1.0})
  board._worker.join(30)
  assert not board._worker.is_alive()
  for step in range(3000):  # More than any queue takes.
    log.write(step, {"loss": 1.0})
  log.close()


def test_a_log_that_cannot_be_written_is_named(tmp_path, monkeypatch):
  log = _open(tmp_path)
  monkeypatch.setattr(log, "_path", epath.Path("/dev/full"))
  with pytest.raises(OSError, match="No space left") as caught:
    log.write(1, {"loss": 1.0})
  assert caught.value.filename == "/dev/full"
  log.close()
