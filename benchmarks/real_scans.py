"""What the vote of neighbours mends on real scans, and what simulation teaches.

python -m benchmarks.real_scans --data=<folder in SemanticKITTI's layout>

First, every pixel gets the true label of the point that it shows, so that all
that is wrong afterwards comes from points that share a pixel: once labels go
straight back to the points, once through the vote of the nearest neighbours.
Then, if the runs of `benchmarks.claims squeezesegv3` are there, the networks
that were trained on simulated streets alone name the points of the real scans.
"""

import argparse
import pathlib

import jax
import numpy as np

from benchmarks.claims import squeezesegv3 as study
from jaxshape import system as system_lib
from jaxshape.data import semantic_kitti, stream
from jaxshape.engine import command, runtime, scan_evaluators
from jaxshape.errors import InputError
from jaxshape.geometry import spherical
from jaxshape.metrics import segmentation
from jaxshape.points import refinement

OUTPUT = pathlib.Path(__file__).parent / "results" / "real_scans.md"
SHAPES = ((64, 2048), (64, 1024), (64, 512), (32, 1024), (16, 256))
SETTINGS = {"5 x 5, k 5": (5, 5), "7 x 7, k 7": (7, 7)}


def restored(
  source: semantic_kitti.SemanticKitti, height: int, width: int
) -> dict[str, tuple[float, float]]:
  """Names points by their pixels, which are all labelled rightly.

  Args:
    source: Labelled scans.
    height: Of the range image.
    width: Likewise.

  Returns:
    The mIoU and the accuracy, by the way of giving labels to the points.
  """
  count = len(source.classes)
  tables = {name: np.zeros((count, count)) for name in ("pixel", *SETTINGS)}
  for scan in map(source.__getitem__, range(len(source))):
    seen = spherical.project(
      scan["points"],
      scan["remission"],
      height=height,
      width=width,
      valid=scan["valid"],
    )
    image = np.where(seen.mask, scan["label"][np.maximum(seen.index, 0)], 0)
    said = {"pixel": spherical.unproject_labels(image, seen.row, seen.column)}
    for name, (window, neighbours) in SETTINGS.items():
      said[name] = refinement.knn_labels(
        image,
        seen.image[..., 0],
        np.linalg.norm(scan["points"], axis=-1),
        seen.row,
        seen.column,
        window=window,
        neighbours=neighbours,
        num_classes=count,
      )
    for name, labels in said.items():
      tables[name] += np.asarray(
        segmentation.confusion_matrix(
          scan["label"], labels, num_classes=count, mask=scan["valid"]
        )
      )
  return {name: _numbers(table) for name, table in tables.items()}


def _numbers(table: np.ndarray) -> tuple[float, float]:
  """The mIoU over the classes that the scans hold, and the accuracy."""
  accuracy = segmentation.accuracy(table)
  return scan_evaluators.mean_iou(table), float(accuracy)


def transferred(
  source: semantic_kitti.SemanticKitti, runs: pathlib.Path
) -> dict[str, list[float]]:
  """The mIoU of trained networks, by variant, one per seed.

  Args:
    source: Labelled scans.
    runs: The workdirs, `<variant>-<seed>`.

  Returns:
    Lists in the order of the seeds; variants that were not trained are absent.
  """
  found: dict[str, list[float]] = {}
  for variant in study.STUDY.variants:
    for workdir in sorted(runs.glob(f"{variant}-*")):
      try:
        config = command.read_config(workdir)
      except InputError:
        continue
      mesh = runtime.make_mesh(config.mesh)
      system = system_lib.load(config)
      state = runtime.restored(system, config, workdir, mesh)
      predict = jax.jit(system.predict)
      count = len(source.classes)
      table = np.zeros((count, count))
      for batch in stream.evaluate(source, batch_size=1):
        said = predict(state, batch)["label"]
        table += np.asarray(
          segmentation.confusion_matrix(
            batch["label"], said, num_classes=count, mask=batch["valid"]
          )
        )
      found.setdefault(variant, []).append(_numbers(table)[0])
      print(variant, found[variant], flush=True)
  return found


def text(
  count: int,
  mended: dict[str, dict[str, tuple[float, float]]],
  found: dict[str, list[float]],
) -> str:
  """The page that is committed.

  Args:
    count: How many scans there were.
    mended: `restored` by the shape of the range image.
    found: `transferred`.

  Returns:
    Markdown.
  """
  ways = ["pixel", *SETTINGS]
  lines = [
    "# Real scans",
    "",
    f"`python -m benchmarks.real_scans --data=...` on {count} labelled scans "
    "of SemanticKITTI. Means are over the classes that they hold.",
    "",
    "Points that get the true label of their pixel, and through the vote of "
    "their neighbours: mIoU (accuracy).",
    "",
    "| range image | " + " | ".join(ways) + " |",
    "|---|" + "---:|" * len(ways),
  ]
  for shape, numbers in mended.items():
    cells = [f"{m:.3f} ({a:.3f})" for m, a in (numbers[way] for way in ways)]
    lines.append(f"| {shape} | " + " | ".join(cells) + " |")
  if found:
    lines += [
      "",
      "Networks that saw simulated streets only (the runs of "
      "`benchmarks.claims squeezesegv3`): mIoU on these scans, mean ± standard "
      "deviation over seeds.",
      "",
      "| variant | mIoU | seeds |",
      "|---|---:|---:|",
    ]
    for variant, values in found.items():
      spread = np.std(values, ddof=1) if len(values) > 1 else 0.0
      lines.append(
        f"| {variant} | {np.mean(values):.3f} ± {spread:.3f} | {len(values)} |"
      )
  return "\n".join(lines) + "\n"


def main() -> None:
  """The command line."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--data", required=True)
  parser.add_argument(
    "--sequences", nargs="+", default=["00"], help="such as 00 08"
  )
  parser.add_argument(
    "--runs", default="runs/claims/squeezesegv3", type=pathlib.Path
  )
  parser.add_argument("--output", default=OUTPUT, type=pathlib.Path)
  options = parser.parse_args()
  source = semantic_kitti.open_source(
    options.data, split="train", sequences=options.sequences
  )
  mended = {f"{h} x {w}": restored(source, h, w) for h, w in SHAPES}
  page = text(len(source), mended, transferred(source, options.runs))
  options.output.write_text(page, encoding="utf-8")
  print(page)


if __name__ == "__main__":
  main()
