"""One run of a study, in a process of its own."""

import importlib
import json
import os
import pathlib
import sys
import time
from typing import Any

from benchmarks import claims


def run(name: str, variant: str, seed: int, folder: str) -> dict[str, float]:
  """Trains and evaluates one variant; in a process of its own."""
  study: claims.Study = importlib.import_module(
    f"benchmarks.claims.{name}"
  ).STUDY
  workdir = pathlib.Path(folder) / f"{variant}-{seed}"
  workdir.mkdir(parents=True, exist_ok=True)
  log = (workdir / "log.txt").open("a", encoding="utf-8")
  sys.stdout = sys.stderr = log
  import eval as evaluation  # noqa: PLC0415 (takes the log as its output)
  import train  # noqa: PLC0415

  path, mode = study.config.split(":")
  module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
  config = module.get_config(mode)
  changes = {**study.variants[variant], **dict.fromkeys(study.seeded, seed)}
  config.update_from_flattened_dict(changes)
  config.lock()
  done = workdir / "numbers.json"
  key = config.to_json_best_effort()
  if done.exists():
    kept = json.loads(done.read_text())
    if kept["config"] == key:
      return kept["numbers"]
  began = time.monotonic()
  train.train(config, workdir)
  numbers = evaluation.evaluate(config, workdir, pictures=False).metrics
  out = {k: float(v) for k, v in numbers.items()}
  out["minutes"] = (time.monotonic() - began) / 60
  done.write_text(json.dumps({"config": key, "numbers": out}))
  return out


def one_core_each(counter: Any, jobs: int) -> None:
  """Small networks gain little from a second core; two runs at once do."""
  with counter.get_lock():
    index = counter.value
    counter.value += 1
  if hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // jobs)
    first = index * share % len(cores)
    os.sched_setaffinity(0, cores[first : first + share])
