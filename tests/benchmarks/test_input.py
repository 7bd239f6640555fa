import dataclasses

import pytest

from benchmarks import input as benchmark


def _result(**changes):
  result = benchmark.Result(0.02, 0, 2, 0.04, 0.05, 0.06, 0.25)
  return dataclasses.replace(result, **changes)


def test_reading_hides_behind_the_step():
  step = benchmark.Step(0.03)
  assert step.seconds == pytest.approx(0.03, abs=0.02)
  for _ in range(3):  # Another program may have had the processor.
    got = benchmark.overlap(step, 0.008, workers=0, threads=1, steps=6)
    if got.measured < 0.85 * (got.read + got.step):
      break
  assert got.read == pytest.approx(0.032)
  assert got.measured < 0.85 * (got.read + got.step)
  assert got.hidden > 0.3
  # What is compared with: without prefetch nothing is hidden.
  plain = benchmark.alternating(step, 0.008, steps=3)
  assert plain.measured > 0.95 * (plain.read + plain.step)
  assert plain.waiting > 0.3


def test_a_source_that_is_too_slow_shows_as_waiting():
  step = benchmark.Step(0.002)
  got = benchmark.overlap(step, 0.01, workers=0, threads=1, steps=4)
  assert got.waiting > 0.6
  assert got.measured > 0.9 * got.read


def test_the_share_that_is_hidden():
  assert _result(measured=0.05).hidden == pytest.approx(1)
  assert _result(measured=0.09).hidden == pytest.approx(0)
  assert _result().hidden == pytest.approx(0.75)
  assert _result().tells
  assert not _result(read=0.001).tells


def test_the_page_is_written(tmp_path):
  output = tmp_path / "input.md"
  words = ["--sleep", "1", "--threads", "1", "--workers", "0", "--step", "1"]
  assert benchmark.main([*words, "--steps=2", f"--output={output}"]) == 0
  text = output.read_text()
  assert "device cpu" in text
  rows = [x for x in text.splitlines() if x.startswith("| 1 |")]
  assert len(rows) == 2
  page = benchmark.markdown([_result()], command="c")
  want = "| 20 | 0 | 2 | 40 | 50 | 90 | 50 | **60** | 75 % | 25 % |"
  assert want in page
