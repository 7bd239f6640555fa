"""The most memory that a peer's call takes beside what it began with.

Torch does not tell what it allocates on CPUs, so the high-water mark of the
resident memory is read, in a process of its own whose allocator gives back at
once what is freed.
"""

import gc
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

from benchmarks.filters import Peer

STATUS = pathlib.Path("/proc/self/status")
# Writing 5 sets the high-water mark to what is resident now.
RESET = pathlib.Path("/proc/self/clear_refs")
# Of glibc, in bytes.
ALLOCATOR = {
  "MALLOC_MMAP_THRESHOLD_": "65536",
  "MALLOC_TRIM_THRESHOLD_": "65536",
}


def of_call(peer: Peer) -> float:
  """Megabytes of the second call; the first one loads and prepares."""
  call = peer.make()
  call()
  torch = sys.modules.get("torch")
  if torch is not None and torch.cuda.is_available():
    return _on_gpu(torch, call)
  gc.collect()
  RESET.write_text("5")
  before = _status("VmRSS")
  call()
  return max(0.0, _status("VmHWM") - before)


def measure(case: str, peer: str, *, quick: bool) -> float | None:
  """`of_call` in a process of its own; None where the system cannot tell.

  Args:
    case: Its name.
    peer: The name of its column.
    quick: At the small size.
  """
  if not RESET.exists():
    return None
  words = [f"--memory={case}", f"--peer={peer}"] + ["--quick"] * quick
  done = subprocess.run(
    [sys.executable, "-m", "benchmarks.lidar", *words],
    env=os.environ | ALLOCATOR,
    capture_output=True,
    text=True,
    check=False,
  )
  try:
    return float(done.stdout.split()[-1])
  except (IndexError, ValueError):
    return None


def _on_gpu(torch: Any, call: Any) -> float:
  torch.cuda.reset_peak_memory_stats()
  before = torch.cuda.memory_allocated()
  call()
  return (torch.cuda.max_memory_allocated() - before) / 1e6


def _status(name: str) -> float:
  """A field of the process's status, in megabytes."""
  found = re.search(rf"{name}:\s+(\d+) kB", STATUS.read_text())
  assert found is not None
  return int(found[1]) * 1024 / 1e6
