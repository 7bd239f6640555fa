"""Trains every variant of a study over seeds and writes what came out.

python -m benchmarks.claims texture_suppression

A study is `STUDY` in benchmarks/claims/<name>.py. Runs that are finished are
not trained again, runs that were stopped go on. Studies of real pictures need
--data_dir, the folder in which they lie unpacked, and fine-tuning --weights.
"""

import argparse
from collections.abc import Mapping, Sequence
import concurrent.futures
import importlib
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import pkgutil
import platform
import sys
import time
from typing import Any

import numpy as np

from benchmarks import claims, machine
from benchmarks.claims import _runs

RESULTS = pathlib.Path(__file__).parent.parent / "results"


def main() -> None:
  """The command line."""
  names = [
    m.name
    for m in pkgutil.iter_modules(claims.__path__)
    if not m.name.startswith("_")
  ]
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("name", choices=names)
  parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
  parser.add_argument("--variants", nargs="+", help="some of the study's")
  parser.add_argument("--workdir", default="runs/claims")
  parser.add_argument("--output", help="benchmarks/results for a whole study")
  parser.add_argument("--data_dir", help="where real data lie")
  parser.add_argument("--weights", help="file of a network trained by others")
  parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
  values = parser.parse_args()
  study: claims.Study = importlib.import_module(
    f"benchmarks.claims.{values.name}"
  ).STUDY
  chosen = values.variants or list(study.variants)
  if unknown := sorted(set(chosen) - set(study.variants)):
    sys.exit(f"error: no variants {unknown}; there are: {list(study.variants)}")
  seeds: list[int] = values.seeds
  runs = list(itertools.product(seeds, chosen))
  folder = pathlib.Path(values.workdir) / values.name
  # Not part of the study, which is the same wherever they lie.
  at_hand = {
    field: os.path.abspath(given)
    for field, given in (
      ("data.data_dir", values.data_dir),
      ("pretrained", values.weights),
    )
    if given
  }
  found: dict[tuple[int, str], dict[str, float]] = {}
  context = multiprocessing.get_context("spawn")
  began = time.monotonic()
  with concurrent.futures.ProcessPoolExecutor(
    values.jobs,
    mp_context=context,
    initializer=_runs.one_core_each,
    initargs=(context.Value("i", 0), values.jobs),
  ) as pool:
    if study.before is not None:
      pool.submit(
        _runs.run, values.name, claims.BEFORE, 0, str(folder), at_hand
      ).result()
    tasks = {
      pool.submit(
        _runs.run, values.name, variant, seed, str(folder), at_hand
      ): (seed, variant)
      for seed, variant in runs
    }
    for task in concurrent.futures.as_completed(tasks):
      found[tasks[task]] = task.result()
      done, took = len(found), time.monotonic() - began
      seed, variant = tasks[task]
      left = took / done * (len(runs) - done)
      print(
        f"[{done}/{len(runs)}] {variant} seed {seed}: "
        + "  ".join(
          f"{m} {found[seed, variant][m]:.3f}" for m in study.metrics[:3]
        )
        + f"  ({took / 60:.1f} min, {left / 60:.1f} min left)",
        flush=True,
      )
  text, data = summarize(study, values.name, chosen, seeds, found)
  # A part of the study does not overwrite the committed table.
  whole = chosen == list(study.variants) and len(seeds) >= 5
  output = pathlib.Path(values.output or (RESULTS if whole else folder))
  output.mkdir(parents=True, exist_ok=True)
  (output / f"{values.name}.json").write_text(json.dumps(data, indent=1) + "\n")
  (output / f"{values.name}.md").write_text(text)
  print(text)


def summarize(
  study: claims.Study,
  name: str,
  variants: Sequence[str],
  seeds: Sequence[int],
  found: Mapping[tuple[int, str], Mapping[str, float]],
) -> tuple[str, dict[str, Any]]:
  """The table with mean and spread, the claims, and all raw numbers."""
  rows = [
    "| metric | " + " | ".join(variants) + " |",
    "|---|" + "---:|" * len(variants),
  ]
  for metric in study.metrics:
    cells = []
    for variant in variants:
      # Not every variant is measured by everything.
      values = np.asarray(
        [found[seed, variant].get(metric, math.nan) for seed in seeds]
      )
      spread = values.std(ddof=1) if len(seeds) > 1 else 0.0
      measured = not np.isnan(values).all()
      cell = f"{_spell(values.mean())} ± {_spell(spread)}" if measured else "-"
      cells.append(cell)
    rows.append(f"| {metric} | " + " | ".join(cells) + " |")
  verdicts = [
    _judge(claim, seeds, found)
    for claim in study.claims
    if {claim.better, claim.than} <= set(variants)
  ]
  minutes = [found[run]["minutes"] for run in found]
  some = list(variants) != list(study.variants)
  lines = [
    f"# Claims of {name}",
    "",
    f"`python -m benchmarks.claims {name} --seeds "
    + " ".join(map(str, seeds))
    + (f" --variants {' '.join(variants)}" if some else "")
    + "`",
    "",
    f"Config `{study.config}`, seeds {', '.join(map(str, seeds))}; "
    "mean ± standard deviation over seeds; fractions, not per cent. "
    f"{len(found)} runs of {np.mean(minutes):.1f} minutes on one core each, "
    "training and evaluation.",
    "",
    *rows,
    "",
    "| claim | difference, 95 % interval | seeds with that sign | verdict |",
    "|---|---:|---:|---|",
    *verdicts,
    "",
    *[f"- {note}" for note in study.notes],
    "",
    f"Machine: {platform.machine()}, {machine.processor()}; Python "
    f"{platform.python_version()}, "
    + ", ".join(f"{k} {v}" for k, v in _versions().items())
    + ".",
    "",
  ]
  data = {
    "config": study.config,
    "variants": {k: dict(v) for k, v in study.variants.items()},
    "runs": [
      {
        "seed": seed,
        "variant": variant,
        # JSON has no NaN.
        **{
          name: value if math.isfinite(value) else None
          for name, value in found[seed, variant].items()
        },
      }
      for seed, variant in sorted(found)
    ],
  }
  return "\n".join(lines), data


def _judge(
  claim: claims.Claim,
  seeds: Sequence[int],
  found: Mapping[tuple[int, str], Mapping[str, float]],
) -> str:
  """A row: the paired difference over seeds, and whether the claim holds."""
  from scipy import stats  # noqa: PLC0415 (a test dependency)

  gains = np.asarray(
    [
      claim.sign
      * (
        found[seed, claim.better][claim.metric]
        - found[seed, claim.than][claim.than_metric or claim.metric]
      )
      for seed in seeds
    ]
  )
  mean, n = gains.mean(), len(gains)
  half = math.nan
  if n > 1:
    error = gains.std(ddof=1) / math.sqrt(n)
    half = float(stats.t.ppf(0.975, n - 1) * error)
  low, high = mean - half, mean + half
  floor = 0.0 if claim.margin is None else -claim.margin
  verdict = "undecided"  # Also where the interval is not a number.
  if low > floor:
    verdict = "holds"
  elif high <= floor:
    verdict = "does not hold"
  signs = int((gains > floor).sum())
  shown = claim.sign * mean, *sorted((claim.sign * low, claim.sign * high))
  difference = "{:+.3f} [{:+.3f}, {:+.3f}]".format(*shown)
  return f"| {claim.text} | {difference} | {signs} of {n} | {verdict} |"


def _spell(value: float) -> str:
  return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"


def _versions() -> dict[str, str]:
  from jaxshape.engine import checkpoints  # noqa: PLC0415

  return checkpoints.versions()


if __name__ == "__main__":
  main()
