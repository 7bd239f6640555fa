"""Names every point of LiDAR scans: anybody's own, or a benchmark's.

python -m jaxshape.segment my.bin --workdir=runs/scans
python -m jaxshape.segment drive/ --workdir=runs/scans --sensor=vlp16
python -m jaxshape.segment semantic_kitti:<root> --split=test --workdir=...

Writes a `.label` file per scan, with the raw ids of the labels, and a picture
of it; scans in SemanticKITTI's layout go to `sequences/NN/predictions/`, as its
benchmark wants them. No labels, no display and no accelerator are needed.
"""

from collections.abc import Sequence
import logging
import pathlib
import time
from typing import Any

from absl import flags
import jax
import numpy as np
from tqdm import tqdm

from jaxshape import system as system_lib
from jaxshape.data import (
  lidar_labels,
  scan_files,
  semantic_kitti,
  sources,
  stream,
)
from jaxshape.engine import (
  command,
  processes,
  runtime,
  scan_pictures,
)
from jaxshape.errors import InputError
from jaxshape.geometry import spherical
from jaxshape.typing import Config

# Of the range image's rows; below, the sensor has other beams than the config.
_FEW_ROWS = 0.6
_OUTSIDE = 0.05
# Kinds of data that would read labels.
_LABELLED = ("semantic_kitti", "nuscenes_lidarseg")


def segment(
  config: Config,
  workdir: str,
  scans: str,
  *,
  output: str | pathlib.Path,
  split: str = "",
  step: int | None = None,
  pictures: int = 20,
) -> list[pathlib.Path]:
  """Writes the labels of scans, and pictures of the first ones.

  Args:
    config: The run's; `config.sensor` says what sensor the scans are from.
    workdir: The run's folder.
    scans: A scan, a folder of scans, or "kind:name" of LiDAR data.
    output: Folder to write.
    split: Of data that have splits.
    step: Which checkpoint; the newest intact one by default.
    pictures: How many scans are drawn.

  Returns:
    The label files, in the order of the scans.

  Raises:
    InputError: The scans cannot be read, or there is no checkpoint.
  """
  if pictures < 0:
    raise InputError(f"pictures must be at least 0, got {pictures}.")
  labels = lidar_labels.load(config.labels)
  source = _source(scans, split)
  output = pathlib.Path(output)
  output.mkdir(parents=True, exist_ok=True)  # Before the network is made.
  mesh = runtime.make_mesh(config.mesh)
  system = system_lib.load(config)
  state = runtime.restored(system, config, workdir, mesh, step=step)
  predict = jax.jit(system.predict)
  written, counts = [], np.zeros(len(labels.classes), np.int64)
  official = isinstance(source, semantic_kitti.SemanticKitti)
  began = time.perf_counter()
  batches = stream.evaluate(source, batch_size=1)
  for name in tqdm(source.scans, unit="scan", disable=None):
    batch = next(batches)
    said = np.asarray(predict(state, batch)["label"][0])
    valid = np.asarray(batch["valid"][0], bool)
    points, said = np.asarray(batch["points"][0])[valid], said[valid]
    raw = labels.raw_labels(said)
    if official:
      written.append(semantic_kitti.write_predictions(output, name, raw))
    else:
      written.append(output / f"{name}.label")
      written[-1].parent.mkdir(parents=True, exist_ok=True)
      scan_files.write_labels(written[-1], raw)
    if len(written) == 1:
      _check_density(config, points)
    if len(written) <= pictures:
      _draw(config, labels, batch, said, written[-1].with_suffix(".png"))
    counts += np.bincount(said, minlength=len(counts))
  batches.close()
  took = time.perf_counter() - began
  _report(labels.classes, counts, len(written), took)
  return written


def _source(scans: str, split: str) -> Any:
  """The data that a person names by a path, or as "kind:name"."""
  kind, _, name = scans.partition(":")
  if not name or kind not in sources.kinds():
    return sources.load(f"scans:{scans}", split=split)
  # Labels may be missing, and nothing here looks at them.
  unread: dict[str, Any] = {"labelled": False} if kind in _LABELLED else {}
  return sources.load(scans, split=split, **unread)


def _project(
  config: Config, points: np.ndarray, remission: np.ndarray | None
) -> spherical.Projection:
  """The range image, as the network sees it if it sees one."""
  return spherical.project(
    points, remission, **config.sensor, **config.get("projection", {})
  )


def _check_density(config: Config, points: np.ndarray) -> None:
  """Warns where a scan does not look like one of the sensor."""
  sensor, seen = config.sensor, _project(config, points, None)
  if not np.asarray(seen.mask).any():
    logging.warning("no point of the scan can be seen: all are 0 or no number.")
    return
  rows = float(np.asarray(seen.mask).any(axis=1).mean())
  finite = points[np.isfinite(points).all(axis=1)]
  flat = np.linalg.norm(finite[:, :2], axis=1)
  pitch = np.degrees(np.arctan2(finite[:, 2], flat))
  outside = (pitch > sensor.fov_up + 1) | (pitch < -abs(sensor.fov_down) - 1)
  share = float(outside.mean()) if len(finite) else 0.0
  if rows < _FEW_ROWS or share > _OUTSIDE:
    logging.warning(
      "%d of the %d rows of the range image hold points, and %.0f %% of the "
      "points are outside the field of view of %+g to %+g degrees: is the scan "
      "of another sensor? Name it with --sensor (%s), or set "
      "--height, --fov_up and --fov_down. A network that was trained with "
      "another sensor names such points badly.",
      round(rows * sensor.height),
      sensor.height,
      100 * share,
      sensor.fov_down,
      sensor.fov_up,
      ", ".join(scan_files.SENSORS),
    )


def _draw(
  config: Config,
  labels: semantic_kitti.Labels,
  batch: Any,
  said: np.ndarray,
  path: pathlib.Path,
) -> None:
  valid = np.asarray(batch["valid"][0], bool)
  points = np.asarray(batch["points"][0])[valid]
  seen = _project(config, points, np.asarray(batch["remission"][0])[valid])
  mask = np.asarray(seen.mask)
  pixels = said[np.where(mask, seen.index, 0)]
  there = np.unique(said)
  figure = scan_pictures.overview(
    {
      "range": scan_pictures.depth(np.asarray(seen.image)[..., 0], mask),
      "labels": scan_pictures.paint(pixels, labels.colors, mask),
    },
    points,
    scan_pictures.paint(said, labels.colors),
    classes=[labels.classes[i] for i in there],
    colors=labels.colors[there],
  )
  figure.savefig(path, dpi=110)


def _report(
  classes: Sequence[str], counts: np.ndarray, scans: int, seconds: float
) -> None:
  total = max(1, counts.sum())
  lines = [
    f"{classes[i]:>16} {counts[i] / total:7.1%} {counts[i]:>12,} points"
    for i in np.argsort(-counts)
    if counts[i]
  ]
  print("\n".join(lines))  # noqa: T201 (this is the answer)
  print(f"{scans} scans in {seconds:.1f} s")  # noqa: T201


def main(arguments: Sequence[str]) -> None:
  """The command line."""
  values = flags.FLAGS
  if len(arguments) != 1:
    raise InputError(
      "name one scan, a folder of scans, or kind:name, got "
      f"{' '.join(arguments) or 'nothing'}: python -m jaxshape.segment my.bin "
      "--workdir=runs/<name>"
    )
  if not values.workdir:
    raise InputError(
      "name a trained run with --workdir=runs/<name>: train one with train.py "
      "--config=configs/squeezesegv3.py, or make one of public weights with "
      "python -m jaxshape.weights."
    )
  config = command.read_config(values.workdir).copy_and_resolve_references()
  if "sensor" not in config or "labels" not in config:
    raise InputError(
      f"{values.workdir} holds a run of {config.system!r}, which names no "
      "points of scans."
    )
  if values.sensor:
    config.sensor.update(scan_files.SENSORS[values.sensor]._asdict())
  for name in ("height", "width", "fov_up", "fov_down"):
    if values[name].present:
      config.sensor[name] = values[name].value
  if processes.index():
    raise InputError("scans are segmented by one process.")
  written = segment(
    config.lock(),
    values.workdir,
    arguments[0],
    output=values.output or "segmented",
    split=values.split,
    step=values.checkpoint,
    pictures=values.pictures,
  )
  print(f"written: {written[0]}" + ", ..." * (len(written) > 1))  # noqa: T201


if __name__ == "__main__":
  flags.DEFINE_string("workdir", None, "The run whose network is used.")
  flags.DEFINE_integer("checkpoint", None, "A step; else the newest.")
  flags.DEFINE_enum(
    "sensor", None, list(scan_files.SENSORS), "If not the run's own."
  )
  flags.DEFINE_integer("height", 64, "Rows of the range image, else the run's.")
  flags.DEFINE_integer("width", 2048, "Its columns, else the run's.")
  flags.DEFINE_float("fov_up", 3.0, "Degrees of the first row.")
  flags.DEFINE_float("fov_down", -25.0, "Degrees of the last row, negative.")
  flags.DEFINE_string("split", "", "Of data that have splits.")
  flags.DEFINE_string("output", None, "Folder to write; ./segmented if not.")
  flags.DEFINE_integer("pictures", 20, "How many scans are drawn.")
  command.run(main, arguments=True)
