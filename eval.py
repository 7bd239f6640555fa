"""Evaluates checkpoints through the evaluators that training uses.

python eval.py --workdir=runs/a                a report of one run
python eval.py --workdir=runs/a,runs/b         side by side, and in one figure

Writes `metrics.json`, the figures and one self-contained `report.html`.
"""

import os
import pathlib

from absl import flags
from ml_collections import config_flags
from tqdm import tqdm

from jaxshape import system as system_lib
from jaxshape.engine import (
  command,
  logs,
  processes,
  report,
  runtime,
  settings,
)
from jaxshape.errors import InputError
from jaxshape.typing import Config


def evaluate(
  config: Config,
  workdir: str | os.PathLike[str],
  *,
  step: int | str | None = None,
  pictures: bool = True,
) -> report.Result:
  """Runs every evaluator of a system on a checkpoint.

  Args:
    config: As for training.
    workdir: The run's folder.
    step: Which checkpoint, or "best"; the newest intact one by default.
    pictures: Whether to draw.

  Returns:
    All numbers, named "<evaluator>/<metric>", and all figures.

  Raises:
    InputError: There is no intact checkpoint, though the system trains.
  """
  settings.check(config)
  mesh = runtime.make_mesh(config.mesh)
  runtime.check_batch_size(config.batch_size, mesh)
  system = system_lib.load(config)
  state = runtime.restored(system, config, workdir, mesh, step=step)
  metrics, figures, plots = {}, {}, {}
  for name, evaluator in tqdm(
    system.evaluators.items(),
    unit="evaluator",
    disable=True if processes.index() else None,
  ):
    numbers, outputs = runtime.evaluate(
      evaluator, state, mesh, stuck=config.stuck_seconds
    )
    metrics |= {f"{name}/{k}": v for k, v in numbers.items()}
    if pictures and evaluator.pictures is not None and not processes.index():
      drawn = evaluator.pictures(runtime.local(state), outputs)
      figures |= {f"{name}-{k}": figure for k, figure in drawn.items()}
    if pictures and evaluator.plots is not None:
      plots |= {f"{name}-{k}": p for k, p in evaluator.plots(outputs).items()}
  return report.Result(
    name=_name(workdir),
    step=int(state.step),
    metrics=metrics,
    pictures=figures,
    plots=plots,
    history=logs.read(workdir),
    config=config.to_dict(),
  )


def _name(workdir: str | os.PathLike[str]) -> str:
  """What a run is called in the report."""
  return pathlib.PurePath(os.path.abspath(workdir)).name


def main() -> None:
  """The command line."""
  values = flags.FLAGS
  if not values.workdir:
    raise InputError("name the run to evaluate with --workdir=runs/<name>.")
  names = [_name(workdir) for workdir in values.workdir]
  if not all(values.workdir) or len(set(names)) < len(names):
    raise InputError(
      "the folders of --workdir must have last parts that differ, got "
      f"{', '.join(map(repr, values.workdir))}."
    )
  given = None
  if flags.FLAGS["config"].value is not None:
    given = command.require_config()
  configs = [given or command.read_config(w) for w in values.workdir]
  step = values.checkpoint
  if step is not None and step != "best":
    if not step.isdecimal():
      raise InputError(f"give a step or best, got --checkpoint={step}.")
    step = int(step)
  results = [
    evaluate(config, workdir, step=step)
    for config, workdir in zip(configs, values.workdir, strict=True)
  ]
  if processes.index():
    return
  output = values.output or os.path.join(values.workdir[0], "eval")
  page = report.write(output, results, title=" against ".join(names))
  print(report.text_table(results))  # noqa: T201 (this is the answer)
  print(f"report: {page}")  # noqa: T201


if __name__ == "__main__":
  config_flags.DEFINE_config_file(
    "config", None, "A file[:mode] of configs/ instead of the run's own config."
  )
  flags.DEFINE_list("workdir", None, "One run, or several with commas between.")
  flags.DEFINE_string("checkpoint", None, "A step, or best; else the newest.")
  flags.DEFINE_string("output", None, "Folder to write; <workdir>/eval if not.")
  command.run(main)
