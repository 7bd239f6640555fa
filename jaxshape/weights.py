"""Weights of a paper's public code, into a run and out of one.

python -m jaxshape.weights load --config=configs/x.py --file=a.pth \
    --workdir=runs/x
python -m jaxshape.weights save --workdir=runs/x --file=b.pth

`load` makes a run whose only checkpoint, at step 0, holds what the files hold:
`eval.py --workdir=runs/x` measures it, and `train.py --config.init_from=runs/x`
starts from it. `save` writes a run's newest checkpoint, the averaged parameters
if there are any, as PyTorch reads it; by the name's ending, or as safetensors.
`--file` may be several files with commas between, or a folder of those that
the public code writes. `--check` compares with the files and writes nothing.
"""

from collections.abc import Mapping, Sequence
import hashlib
import json
import os
import sys
from typing import Any, NamedTuple

from absl import flags
from etils import epath
import jax
import jax.numpy as jnp
from ml_collections import config_flags
import numpy as np

from jaxshape import system as system_lib
from jaxshape.engine import (
  checkpoints,
  command,
  processes,
  pytorch,
  runtime,
  settings,
  steps,
)
from jaxshape.errors import InputError
from jaxshape.system import System, TrainState, Weights
from jaxshape.typing import Config

RECORD = "weights.json"
_ENDINGS = ("", ".pth", ".pt", ".safetensors")
_SHOWN = 5
# Of 32-bit floats that went through another dtype of the same width or more.
_RELATIVE = 1e-6


class Row(NamedTuple):
  """A tensor of the table.

  Attributes:
    name: As the public code has it.
    shape: Its own.
    state: "taken", "not used", "differs by ..." or "not in the file".
  """

  name: str
  shape: tuple[int, ...]
  state: str

  @property
  def wrong(self) -> bool:
    """Whether the two sides do not hold the same."""
    return self.state.startswith(("differs", "not in"))


class Report(NamedTuple):
  """What was read or written.

  Attributes:
    state: Of the run.
    rows: For each tensor.
    digests: SHA-256 of each file, by its path: people tell each other by it
      which one it was.
  """

  state: TrainState
  rows: list[Row]
  digests: Mapping[str, str]


def load(
  config: Config,
  files: Sequence[str | os.PathLike[str]],
  workdir: str | os.PathLike[str] | None,
) -> Report:
  """Makes a run whose state holds the tensors of files.

  Args:
    config: With the fields of `engine/settings.py` and those of its system.
    files: Of PyTorch, or one folder of them.
    workdir: The new run's folder; None compares and writes nothing.

  Returns:
    The state at step 0, and what it is made of.

  Raises:
    InputError: The system knows no public weights, the files do not fit, the
      state does not keep what they hold, or the folder holds a run already.
  """
  settings.check(config)
  system, weights = _with_weights(config)
  if system.train_step is None:
    raise InputError(
      f"the system {config.system!r} trains nothing, so no run of it is read."
    )
  if workdir is not None:
    _refuse_run(workdir)
  tensors = read(files, weights.parts)
  key, _ = jax.random.split(jax.random.key(config.seed))
  fresh = runtime.initialize(system.init, key, runtime.make_mesh(config.mesh))
  state = _placed(weights.load(fresh, tensors), fresh)
  rows = compare(weights.save(state), tensors)
  if wrong := [f"{row.name} {row.state}" for row in rows if row.wrong]:
    raise InputError(
      f"the state does not keep {len(wrong)} of the tensors: "
      + "; ".join(wrong[:_SHOWN])
      + ", so nothing is written."
    )
  if not runtime.finite(state):
    raise InputError("the files hold numbers that are not finite.")
  report = Report(state, rows, _digests(files, weights))
  if workdir is not None:
    _write_run(config, report, workdir)
  return report


def save(
  config: Config,
  workdir: str | os.PathLike[str],
  file: str | os.PathLike[str],
  *,
  step: int | None = None,
  check: bool = False,
) -> Report:
  """Writes a run's tensors for the public code.

  Args:
    config: The run's.
    workdir: The run's folder.
    file: A name that is not taken; one of a folder, ending with "/", gets the
      files that the public code keeps.
    step: Which checkpoint; the newest intact one by default.
    check: Compares with the file, which is there, and writes nothing.

  Returns:
    The state of that step, and what was written or compared.

  Raises:
    InputError: The system knows no public weights, the run has no checkpoint,
      or there is such a file already.
  """
  settings.check(config)
  system, weights = _with_weights(config)
  mesh = runtime.make_mesh(config.mesh)
  state = runtime.restored(system, config, workdir, mesh, step=step)
  tensors = weights.save(state.replace(params=steps.evaluation_params(state)))
  if check:
    rows = compare(tensors, read([file], weights.parts))
  else:
    _write_files(tensors, file, weights.parts)
    rows = [Row(name, np.shape(x), "written") for name, x in tensors.items()]
  return Report(state, rows, _digests([file], weights))


def read(
  files: Sequence[str | os.PathLike[str]], parts: Mapping[str, str]
) -> dict[str, np.ndarray]:
  """The tensors of several files as those of one.

  Args:
    files: Those of a folder, where one folder is given.
    parts: Beginnings that the names in some files lack, by the file's name.

  Returns:
    Tensors by name; without "module.", if all begin with that.

  Raises:
    InputError: A file is not there or not readable, or two hold one name.
  """
  out: dict[str, np.ndarray] = {}
  for path in paths(files, parts):
    prefix = _prefix(path.name, parts)
    for name, value in _bare(pytorch.load(path)).items():
      whole = name if name.startswith(prefix) else prefix + name
      if whole in out:
        raise InputError(f"{path} holds {whole}, and another file does, too.")
      out[whole] = value
  return out


def paths(
  files: Sequence[str | os.PathLike[str]], parts: Mapping[str, str]
) -> list[Any]:
  """The files that were named, or that the public code keeps in a folder."""
  named = [pytorch.file(path) for path in files]
  if len(named) != 1 or not named[0].is_dir():
    return named
  folder, out, missing = named[0], [], []
  if not parts:
    raise InputError(f"{folder} is a folder; name the file in it.")
  for part in parts:
    there = [folder / f"{part}{end}" for end in _ENDINGS]
    found = [path for path in there if path.is_file()]
    out += found[:1]
    missing += [] if found else [part]
  if missing:
    raise InputError(
      f"{folder} holds no {', '.join(missing)}; wanted are "
      f"{', '.join(parts)}, or the files by name with commas between."
    )
  return out


def compare(
  held: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> list[Row]:
  """Which tensors of files a state holds, and whether it holds the same.

  Args:
    held: Of the state.
    tensors: Of the files.

  Returns:
    A row for each name, in the order of the files.
  """
  rows = []
  for name, theirs in tensors.items():
    if name not in held:
      rows.append(Row(name, theirs.shape, "not used"))
      continue
    ours = np.asarray(held[name])
    rows.append(Row(name, theirs.shape, _difference(ours, theirs)))
  missing = [name for name in held if name not in tensors]
  return rows + [Row(n, np.shape(held[n]), "not in the file") for n in missing]


def table(rows: Sequence[Row]) -> str:
  """The rows as lines in columns."""
  width = max([len(row.name) for row in rows], default=0)
  shapes = [" x ".join(map(str, row.shape)) or "number" for row in rows]
  wide = max([len(shape) for shape in shapes], default=0)
  return "\n".join(
    f"{row.name:{width}}  {shape:{wide}}  {row.state}"
    for row, shape in zip(rows, shapes, strict=True)
  )


def _with_weights(config: Config) -> tuple[System, Weights]:
  if processes.count() > 1:
    raise InputError("weights are read and written by one process alone.")
  system = system_lib.load(config)
  if system.weights is None:
    raise InputError(
      f"the system {config.system!r} knows no weights of a public code."
    )
  return system, system.weights


def _refuse_run(workdir: str | os.PathLike[str]) -> None:
  saved = checkpoints.Checkpoints(workdir)
  if saved.steps():
    raise InputError(
      f"{saved.folder} holds a run already; give another --workdir."
    )


def _placed(state: TrainState, fresh: TrainState) -> TrainState:
  """The state where a fresh one lies, its averages made anew.

  What is not of the shapes of a fresh one is a defect of the system.
  """
  if isinstance(state.extra, Mapping) and "ema" in state.extra:
    average = jax.tree.map(jnp.copy, state.params)
    state = state.replace(extra={**state.extra, "ema": average})

  def put(path: Any, old: jax.Array, new: Any) -> jax.Array:
    if np.shape(new) != old.shape or jnp.result_type(new) != old.dtype:
      raise TypeError(
        f"{jax.tree_util.keystr(path)} is {jnp.result_type(new)}"
        f"{np.shape(new)} after weights.load, was {old.dtype}{old.shape}."
      )
    return jax.device_put(new, old.sharding)

  return jax.tree_util.tree_map_with_path(put, fresh, state)


def _write_run(
  config: Config, report: Report, workdir: str | os.PathLike[str]
) -> None:
  """A run's folder as train.py leaves it, and from where the weights are."""
  named = {os.path.basename(k): v for k, v in report.digests.items()}
  with checkpoints.lock(workdir):
    saved = checkpoints.Checkpoints(workdir, keep=config.keep)
    saved.save(report.state, config=config.to_dict(), metrics={})
    saved.wait()
    command.write_config(config, workdir)
    text = json.dumps({"sha256": named}, indent=2) + "\n"
    epath.Path(workdir).joinpath(RECORD).write_text(text)


def _write_files(
  tensors: Mapping[str, Any],
  file: str | os.PathLike[str],
  parts: Mapping[str, str],
) -> None:
  """One file, or those of a folder."""
  path = pytorch.file(file)
  if not os.fspath(file).endswith("/"):
    if path.exists():
      raise InputError(f"{path} is there already; give another --file.")
    pytorch.save(path, tensors)
    return
  if not parts:
    raise InputError(f"the public code keeps one file, got the folder {path}.")
  taken = [part for part in parts if (path / part).exists()]
  if taken:
    raise InputError(f"{path} holds {', '.join(taken)} already.")
  begins = tuple(parts.values())
  if homeless := [n for n in tensors if not n.startswith(begins)]:
    raise InputError(
      f"the public code keeps {', '.join(homeless[:_SHOWN])} in none of its "
      "files; give one --file."
    )
  path.mkdir(parents=True, exist_ok=True)
  for part, prefix in parts.items():
    own = {
      name.removeprefix(prefix): value
      for name, value in tensors.items()
      if name.startswith(prefix)
    }
    pytorch.save(path / part, own)


def _digests(
  files: Sequence[str | os.PathLike[str]], weights: Weights
) -> dict[str, str]:
  return {
    os.fspath(path): hashlib.sha256(path.read_bytes()).hexdigest()
    for path in paths(files, weights.parts)
  }


def _bare(tensors: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
  """Names as they were before the network was spread over devices."""
  wrapper = "module."
  if not all(name.startswith(wrapper) for name in tensors):
    return tensors
  return {name.removeprefix(wrapper): x for name, x in tensors.items()}


def _prefix(name: str, parts: Mapping[str, str]) -> str:
  """Of the longest part that a file's name begins with."""
  fitting = [
    part
    for part in parts
    if name == part or name.startswith((f"{part}.", f"{part}_", f"{part}-"))
  ]
  return parts[max(fitting, key=len)] if fitting else ""


def _difference(ours: np.ndarray, theirs: np.ndarray) -> str:
  if ours.shape != theirs.shape:
    return f"differs in shape: here it is {ours.shape}"
  a, b = ours.astype(np.float64), theirs.astype(np.float64)
  if np.allclose(a, b, rtol=_RELATIVE, atol=1e-30, equal_nan=True):
    return "taken"
  return f"differs by {np.nanmax(np.abs(a - b)):.3g}"


def main(verb: str) -> None:
  """The command line.

  Args:
    verb: "load" or "save".
  """
  values = flags.FLAGS
  if verb not in ("load", "save"):
    raise InputError(f"say load or save first, got {verb!r}; see --help.")
  if not values.file:
    raise InputError("name the file with --file=<path>.")
  if not values.workdir and not (verb == "load" and values.check):
    raise InputError("give the folder of the run with --workdir=runs/<name>.")
  if verb == "load":
    workdir = None if values.check else values.workdir
    report = load(command.require_config(), values.file, workdir)
  else:
    if len(values.file) > 1:
      raise InputError("save writes one --file; a folder/ for several.")
    named = flags.FLAGS["config"].value is not None
    report = save(
      command.require_config()
      if named
      else command.read_config(values.workdir),
      values.workdir,
      values.file[0],
      step=values.checkpoint,
      check=values.check,
    )
  _tell(report)


def _tell(report: Report) -> None:
  """Prints a report; what differs is an error."""
  _say(table(report.rows))
  used = [row for row in report.rows if row.state != "not used"]
  numbers = sum(int(np.prod(row.shape)) for row in used)
  count = sum(leaf.size for leaf in jax.tree.leaves(report.state.params))
  _say(
    f"{len(used)} tensors with {numbers:,} numbers; {count:,} parameters; "
    f"{len(report.rows) - len(used)} tensors not used"
  )
  for path, digest in report.digests.items():
    _say(f"sha256 {digest}  {path}")
  if wrong := [f"{row.name} {row.state}" for row in used if row.wrong]:
    raise InputError(
      f"{len(wrong)} tensors are not the same: " + "; ".join(wrong[:_SHOWN])
    )


def _say(text: str) -> None:
  print(text)  # noqa: T201 (this is the answer)


if __name__ == "__main__":
  config_flags.DEFINE_config_file(
    "config", None, "A file[:mode] of configs/; save takes the run's own."
  )
  flags.DEFINE_list("file", None, "Files with commas between, or a folder.")
  flags.DEFINE_string("workdir", None, "Folder of the run.")
  flags.DEFINE_integer("checkpoint", None, "The step to save; else the newest.")
  flags.DEFINE_bool("check", False, "Compare, and write nothing.")
  spoken = len(sys.argv) > 1 and not sys.argv[1].startswith("-")
  first = sys.argv.pop(1) if spoken else ""
  command.run(lambda: main(first))
