"""One run of a study, in a process of its own."""

from collections.abc import Mapping
import importlib
import json
import os
import pathlib
import shutil
import sys
import time
from typing import Any

from benchmarks import claims


def run(
  name: str,
  variant: str,
  seed: int,
  folder: str,
  at_hand: Mapping[str, str],
) -> dict[str, float]:
  """Trains and evaluates one variant; in a process of its own."""
  study: claims.Study = importlib.import_module(
    f"benchmarks.claims.{name}"
  ).STUDY
  own = variant if variant == claims.BEFORE else f"{variant}-{seed}"
  workdir = pathlib.Path(folder) / own
  workdir.mkdir(parents=True, exist_ok=True)
  log = (workdir / "log.txt").open("a", buffering=1, encoding="utf-8")
  sys.stdout = sys.stderr = log
  import jax  # noqa: PLC0415 (takes the log as its output, like what follows)

  # Seeds of one variant are one program.
  cache = pathlib.Path(folder, "compiled")
  jax.config.update("jax_compilation_cache_dir", str(cache.absolute()))
  import eval as evaluation  # noqa: PLC0415
  from jaxshape.engine import checkpoints  # noqa: PLC0415
  import train  # noqa: PLC0415

  path, mode = study.config.split(":")
  module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
  config = module.get_config(mode)
  config.update_from_flattened_dict(study.changes(variant, seed, folder))
  config.update_from_flattened_dict(at_hand)
  config.lock()
  done = workdir / "numbers.json"
  key = config.to_json_best_effort()
  key += checkpoints.versions()["code"]
  begun = workdir / "key.txt"
  if not begun.exists() or begun.read_text() != key:
    # Of another config or other code: nothing of it may be used.
    shutil.rmtree(workdir / checkpoints.FOLDER, ignore_errors=True)
    done.unlink(missing_ok=True)
    begun.write_text(key)
  if done.exists():
    return json.loads(done.read_text())
  began = time.monotonic()
  train.train(config, workdir)
  numbers = evaluation.evaluate(config, workdir, pictures=False).metrics
  out = {k: float(v) for k, v in numbers.items()}
  out["minutes"] = (time.monotonic() - began) / 60
  whole = done.with_suffix(".tmp")
  whole.write_text(json.dumps(out))
  whole.replace(done)
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
