import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxshape.engine import runtime, scan_evaluators
from jaxshape.system import TrainState

CLASSES = ("unlabeled", "car", "road", "pole")
COLORS = np.array([[0, 0, 0], [0, 0, 255], [255, 0, 255], [255, 240, 150]])
STATE = TrainState(jnp.zeros((), jnp.int32), {}, {}, {})


def _scans(count=5, size=30, seed=0):
  rng = np.random.default_rng(seed)
  return {
    "points": rng.normal(size=(count, size, 3)).astype(np.float32) * 10,
    "label": rng.integers(0, 3, (count, size)).astype(np.int32),
    "said": rng.integers(0, 4, (count, size)).astype(np.int32),
    "valid": rng.random((count, size)) < 0.8,
    "image": rng.integers(0, 4, (count, 4, 8)).astype(np.int32),
    "truth": rng.integers(0, 3, (count, 4, 8)).astype(np.int32),
  }


def _segmenter(*, image=True):
  """A network that says what the batch holds already."""
  return scan_evaluators.Segmenter(
    lambda state, batch: (batch["said"], batch["label"]),
    ("pixel", "knn"),
    (
      lambda state, batch: {
        "prediction": batch["image"],
        "truth": batch["truth"],
        "range": jnp.where(batch["truth"] > 0, 5.0, -1.0),
      }
    )
    if image
    else None,
    CLASSES,
    COLORS,
  )


def _data(scans, batch_size):
  def batches():
    count = len(scans["label"])
    for start in range(0, count, batch_size):
      rows = np.arange(start, start + batch_size)
      taken = {k: v[np.minimum(rows, count - 1)] for k, v in scans.items()}
      yield {**taken, "mask": np.float32(rows < count)}

  return batches


def _evaluate(segmenter, scans, batch_size=2):
  evaluator = scan_evaluators.scans(segmenter, _data(scans, batch_size))
  outputs = [jax.jit(evaluator.step)(STATE, b) for b in evaluator.data()]
  return evaluator, outputs, evaluator.summarize(outputs)


def _iou(truth, said, number):
  """Of the benchmark: what has no label does not count at all."""
  said, truth = said[truth > 0], truth[truth > 0]
  both = ((said == number) & (truth == number)).sum()
  return both / max(1, ((said == number) | (truth == number)).sum())


def test_numbers_are_those_of_all_points_that_are_there():
  scans = _scans()
  _, _, numbers = _evaluate(_segmenter(), scans)
  truth = scans["label"][scans["valid"]]
  said = scans["said"][scans["valid"]]
  # Poles are in no label, so they are no part of the mean.
  want = [_iou(truth, said, number) for number in (1, 2)]
  assert numbers["mIoU"] == pytest.approx(np.mean(want), abs=1e-6)
  # The last way of naming points is the one whose classes are listed.
  assert numbers["IoU/car"] == numbers["mIoU_knn"] == numbers["acc_knn"] == 1
  assert "IoU/pole" not in numbers
  assert "IoU/unlabeled" not in numbers
  want = [_iou(scans["truth"], scans["image"], number) for number in (1, 2)]
  assert numbers["mIoU_image"] == pytest.approx(np.mean(want), abs=1e-6)


def test_saying_unlabeled_costs_on_the_benchmark_only():
  scans = _scans()
  shy = scan_evaluators.Segmenter(
    lambda state, batch: (jnp.where(batch["said"] == 3, batch["label"], 0),),
    ("pixel",),
    None,
    CLASSES,
    COLORS,
  )
  _, _, numbers = _evaluate(shy, scans)
  assert numbers["mIoU_training_code"] == 1
  assert numbers["mIoU"] < 0.5
  assert "mIoU_image" not in numbers


def test_classes_that_do_not_count_are_no_part_of_the_numbers():
  scans = _scans()
  segmenter = dataclasses.replace(_segmenter(), ignore=(0, 2))
  _, _, numbers = _evaluate(segmenter, scans)
  truth = scans["label"][scans["valid"]]
  said = scans["said"][scans["valid"]]
  truth = np.where(truth == 2, 0, truth)
  assert numbers["mIoU"] == pytest.approx(_iou(truth, said, 1), abs=1e-6)
  counted = (truth > 0) & (said != 0) & (said != 2)
  right = (said == truth)[counted].mean()
  assert numbers["acc"] == pytest.approx(right, abs=1e-6)
  assert "IoU/road" not in numbers


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_numbers_do_not_depend_on_the_batch_size(batch_size):
  scans = _scans()
  want = _evaluate(_segmenter(), scans, 5)[-1]
  got = _evaluate(_segmenter(), scans, batch_size)[-1]
  assert got == want


def test_it_runs_where_scans_are_spread_over_devices():
  scans = _scans(8)
  evaluator = scan_evaluators.scans(_segmenter(), _data(scans, 8))
  mesh = runtime.make_mesh({"data": -1, "model": 1})
  numbers, _ = runtime.evaluate(evaluator, STATE, mesh)
  assert numbers == dict(_evaluate(_segmenter(), scans, 8)[-1])


def test_scans_without_labels_are_no_number():
  scans = _scans()
  scans["label"][:] = 0
  _, _, numbers = _evaluate(_segmenter(image=False), scans)
  assert np.isnan(numbers["mIoU"])


def test_pictures_show_what_there_is():
  scans = _scans()
  evaluator, outputs, _ = _evaluate(_segmenter(), scans)
  figures = evaluator.pictures(STATE, outputs)
  assert set(figures) == {"by class", "from above", "range image"}
  assert len(figures["range image"].axes) == 4
  assert len(figures["from above"].axes) == 3
  # Without labels nothing can be wrong.
  scans["label"][:], scans["truth"][:] = 0, 0
  batch = next(iter(_data(scans, 1)()))
  figures = scan_evaluators.show(_segmenter(), STATE, batch)
  titles = [axis.get_title(loc="left") for axis in figures["range image"].axes]
  assert titles == ["range", "prediction"]
  assert len(figures["from above"].axes) == 1
