"""What a measurement was made on, in words that name no machine."""

import pathlib
import platform


def processor() -> str:
  """The processor's name; empty where the system does not tell."""
  path = pathlib.Path("/proc/cpuinfo")
  if path.exists():
    for line in path.read_text().splitlines():
      if line.startswith("model name"):
        return line.partition(":")[2].strip()
  return platform.processor()
