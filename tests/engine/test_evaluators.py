import collections
import math

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure
import numpy as np
import pytest

from jaxshape.data import sources, stream
from jaxshape.engine import evaluators, runtime
from jaxshape.errors import InputError
from jaxshape.filters import corruption
from jaxshape.metrics import published, robustness
from jaxshape.system import TrainState

CLASSES = ("a", "b", "c", "d", "e", "f", "g")
CASES = ("impulse_noise", "brightness"), (5, 1)
MESH = runtime.make_mesh({"data": -1, "model": 1})
BATCH_SIZES = (8, 24)


class Source:
  """21 random images; some rows are not to be counted."""

  classes = CLASSES

  def __init__(self):
    draw = np.random.default_rng(0)
    n = 21
    self.rows = {
      "image": draw.integers(0, 256, (n, 6, 4, 3)).astype(np.uint8),
      "label": draw.integers(0, 7, n).astype(np.int32),
      "texture": draw.integers(0, 7, n).astype(np.int32),
      "mask": np.ones(n, np.float32),
    }
    # Right answers, not only wrong ones: a random classifier has too few.
    named = np.argmax(_logits(self.rows["image"]), axis=1)
    self.rows["label"][::3] = named[::3]
    self.rows["label"][2::3] = named[2::3]
    self.rows["texture"][1::6] = named[1::6]
    self.rows["texture"][6] = self.rows["label"][6]  # No conflict.
    self.rows["texture"][9] = -1  # No class, where the shape is named.
    self.rows["mask"][[3, 10]] = 0  # What stands in for a damaged image.

  def __len__(self):
    return len(self.rows["label"])

  def __getitem__(self, i):
    return {name: rows[i] for name, rows in self.rows.items()}

  def counted(self):
    return [self[i] for i in range(len(self)) if self.rows["mask"][i]]


# Channels speak by their square: Grad-CAM's weights depend on the image.
WEIGHTS = np.random.default_rng(1).normal(size=(3, 7)).astype(np.float32)


def _features(images):
  x = images.astype(np.float64) / 255 - 0.5
  n, height, width, _ = x.shape
  return x.reshape(n, height // 2, 2, width // 2, 2, 3).mean((2, 4))


def _logits(images):
  return 1500 * _features(images).mean((1, 2)) ** 2 @ WEIGHTS


def _classifier():
  def features(state, images):
    del state
    x = jnp.asarray(images, jnp.float32) / 255 - 0.5
    n, height, width, _ = x.shape
    return x.reshape(n, height // 2, 2, width // 2, 2, 3).mean((2, 4))

  def head(state, features):
    return 1500 * features.mean((-3, -2)) ** 2 @ state.params["net"]

  return evaluators.Classifier(features, head, CLASSES)


SOURCE = Source()
STATE = TrainState(jnp.int32(0), {"net": jnp.asarray(WEIGHTS)}, {}, {})


def _data(batch_size, source=SOURCE):
  return lambda: stream.evaluate(source, batch_size=batch_size)


def _run(make, batch_size, **options):
  evaluator = make(_classifier(), _data(batch_size), **options)
  numbers, outputs = runtime.evaluate(evaluator, STATE, MESH)
  return numbers, outputs, evaluator


def _softmax(logits):
  p = np.exp(logits - logits.max())
  return p / p.sum()


@pytest.mark.parametrize("batch_size", BATCH_SIZES)
def test_accuracy_row_by_row(batch_size):
  top1, top5, sure, entropies = [], [], [], []
  by_class = collections.defaultdict(list)
  bins = [[0, 0.0, 0] for _ in range(15)]
  for row in SOURCE.counted():
    logits = _logits(row["image"][None])[0]
    p = _softmax(logits)
    order = np.argsort(-logits)
    right = order[0] == row["label"]
    top1.append(right)
    by_class[int(row["label"])].append(right)
    top5.append(row["label"] in order[:5])
    if right:
      sure.append(p.max())
      entropies.append(-(p * np.log(p)).sum())
    cell = bins[math.ceil(p.max() * 15) - 1]
    cell[0] += 1
    cell[1] += p.max()
    cell[2] += right
  want = {
    "top1": np.mean(top1),
    "mean_class_accuracy": np.mean([np.mean(x) for x in by_class.values()]),
    "top5": np.mean(top5),
    "confidence_correct": np.mean(sure),
    "entropy_correct": np.mean(entropies),
    "ece": sum(abs(hits - conf) for _, conf, hits in bins) / len(top1),
  }
  got, _, _ = _run(evaluators.accuracy, batch_size)
  assert len(top1) == 19
  assert 0 < want["top1"] < want["top5"] < 1
  assert got.keys() == want.keys()
  for name, value in want.items():
    np.testing.assert_allclose(got[name], value, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("batch_size", BATCH_SIZES)
def test_cue_conflict_row_by_row(batch_size):
  shape = texture = conflicts = 0
  for row in SOURCE.counted():
    if row["label"] == row["texture"] or row["texture"] < 0:
      continue
    conflicts += 1
    named = np.argmax(_logits(row["image"][None])[0])
    shape += named == row["label"]
    texture += named == row["texture"]
  got, _, _ = _run(evaluators.cue_conflict, batch_size)
  assert 0 < shape != texture > 0
  assert shape + texture < conflicts < 19
  want = {
    "shape_bias": shape / (shape + texture),
    "decisions": shape + texture,
    "decided_share": (shape + texture) / conflicts,
    "shape_top1": shape / conflicts,
    "texture_top1": texture / conflicts,
    "shape_match": shape / 19,  # Of all trials, in conflict or not.
    "texture_match": texture / 19,
  }
  assert got == pytest.approx(want)


def test_cue_conflict_by_another_rule():
  fold = lambda logits: jnp.argmax(logits, axis=-1) % 2
  got, outputs, evaluator = _run(
    evaluators.cue_conflict, 8, decide=fold, classes=CLASSES[:2]
  )
  shape = texture = 0
  for row in SOURCE.counted():
    if row["label"] != row["texture"] >= 0 and row["label"] < 2:
      decision = np.argmax(_logits(row["image"][None])[0]) % 2
      shape += decision == row["label"]
      texture += decision == row["texture"]
  assert got["decisions"] == shape + texture > 0
  plot = evaluator.plots(outputs)["by class"]
  assert list(plot.places) == list(CLASSES[:2])
  assert plot.whole == pytest.approx(shape / (shape + texture))


@pytest.mark.parametrize("batch_size", BATCH_SIZES)
def test_corruptions_row_by_row(batch_size):
  names, severities = CASES
  errors = np.zeros((2, 2))
  for a, b in np.ndindex(2, 2):
    wrong = []
    for i in np.flatnonzero(SOURCE.rows["mask"]):
      image = np.float32(SOURCE[i]["image"])
      key = jax.random.fold_in(jax.random.key(4), i)
      seen = corruption.corrupt(
        key, image, name=names[a], severity=severities[b]
      )
      named = np.argmax(_logits(np.asarray(seen)[None])[0])
      wrong.append(named != SOURCE[i]["label"])
    errors[a, b] = np.mean(wrong)
  got, outputs, evaluator = _run(
    evaluators.corruptions,
    batch_size,
    names=names,
    severities=severities,
    seed=4,
  )
  want = {
    "mean_error": errors.mean(),
    "impulse_noise_error": errors[0].mean(),
    "brightness_error": errors[1].mean(),
    "severity_5_top1": 1 - errors[:, 0].mean(),
    "severity_1_top1": 1 - errors[:, 1].mean(),
  }
  assert len(set(errors.flat)) == 4
  assert list(got) == list(want)  # In the order that was asked for.
  assert got == pytest.approx(want)
  lines = evaluator.pictures(STATE, outputs)["severity"].axes[0].lines
  for line, row in zip(lines, [*errors, errors.mean(0)], strict=True):
    np.testing.assert_array_equal(line.get_xdata(), severities)
    np.testing.assert_allclose(line.get_ydata(), row)


def test_errors_are_compared_with_those_of_a_baseline():
  table = {
    "contrast": (0.2, 0.3, 0.4, 0.5, 0.6),
    "brightness": (0.5, 0.5, 0.6, 0.7, 0.7),
  }
  names, severities = ("brightness", "contrast"), (5, 1, 2, 3, 4)
  got, outputs, evaluator = _run(
    evaluators.corruptions,
    24,
    names=names,
    severities=severities,
    baseline=table,
    baseline_clean_error=0.1,
  )
  rows = {k: np.concatenate([o[k] for o in outputs]) for k in outputs[0]}
  real = rows.pop("mask") > 0
  case, wrong = rows["case"][real], rows["wrong"][real]
  errors = [wrong[case == n].mean() for n in range(11)]
  images = np.stack([row["image"] for row in SOURCE.counted()])
  labels = [row["label"] for row in SOURCE.counted()]
  clean = np.mean(np.argmax(_logits(images), axis=1) != labels)
  assert errors[10] == pytest.approx(clean)
  assert got["clean_error"] == pytest.approx(clean)
  ours = {"brightness": np.sum(errors[:5]), "contrast": np.sum(errors[5:10])}
  theirs = {name: np.sum(row) for name, row in table.items()}
  mce = np.mean([ours[n] / theirs[n] for n in names])
  assert got["mce"] == pytest.approx(mce)
  added = [(ours[n] - 5 * clean) / (theirs[n] - 0.5) for n in names]
  assert got["relative_mce"] == pytest.approx(np.mean(added))
  plots = evaluator.plots(outputs)
  want = np.reshape(errors[:10], (2, 5))
  np.testing.assert_allclose(plots["severity"].values, want.mean(0))
  np.testing.assert_allclose(plots["kind"].values, want.mean(1))
  assert len(evaluator.pictures(STATE, outputs)["severity"].axes[0].lines) == 3


def _map(image, named):
  """Grad-CAM by hand: a = d y / d A = 2 * 1500 * W mean(A) / Z."""
  a = _features(image[None])[0]
  weights = 2 * 1500 * WEIGHTS[:, named] * a.mean((0, 1)) / a[..., 0].size
  return np.maximum(a @ weights, 0)


@pytest.mark.parametrize("batch_size", BATCH_SIZES)
def test_saliency_row_by_row(batch_size):
  spreads, right = [], []
  for row in SOURCE.counted():
    named = np.argmax(_logits(row["image"][None])[0])
    strength = _map(row["image"], named)
    spreads.append(np.mean(strength > 0.9 * strength.max()))
    right.append(named == row["label"])
  got, _, _ = _run(evaluators.saliency, batch_size, threshold=0.9)
  want = {
    "spread_correct": np.mean(np.asarray(spreads)[right]),
    "spread": np.mean(spreads),
  }
  assert len(set(spreads)) > 1
  assert got == pytest.approx(want)


def test_each_image_has_one_draw_whatever_the_batch_size():
  options = {"names": ("gaussian_noise",), "severities": (2, 5)}
  rows = []
  for batch_size in BATCH_SIZES:
    _, outputs, _ = _run(evaluators.corruptions, batch_size, **options)
    out = {k: np.concatenate([o[k] for o in outputs]) for k in outputs[0]}
    real = out["mask"] > 0
    rows.append((out["case"][real], out["wrong"][real]))
  np.testing.assert_array_equal(*[case for case, _ in rows])
  np.testing.assert_array_equal(*[wrong for _, wrong in rows])
  _, outputs, _ = _run(evaluators.corruptions, 24, seed=1, **options)
  other = np.concatenate([o["wrong"][o["mask"] > 0] for o in outputs])
  assert (other != rows[0][1]).any()


def test_where_nothing_is_right_there_is_no_confidence():
  source = Source()
  named = np.argmax(_logits(source.rows["image"]), axis=1)
  source.rows["label"] = np.int32((named + 1) % 7)
  evaluator = evaluators.accuracy(_classifier(), _data(24, source))
  got, _ = runtime.evaluate(evaluator, STATE, MESH)
  assert got["top1"] == 0
  assert math.isnan(got["confidence_correct"])
  assert math.isnan(got["entropy_correct"])
  assert 0 < got["ece"] <= 1


def test_pictures_have_their_axes_and_titles():
  _, outputs, accuracy = _run(evaluators.accuracy, 24)
  figures = dict(accuracy.pictures(STATE, outputs))
  _, outputs, conflict = _run(evaluators.cue_conflict, 24)
  figures |= conflict.pictures(STATE, outputs)
  _, outputs, corrupted = _run(
    evaluators.corruptions, 24, names=CASES[0], severities=CASES[1]
  )
  figures |= corrupted.pictures(STATE, outputs)
  _, outputs, saliency = _run(evaluators.saliency, 24, shown=3)
  figures |= saliency.pictures(STATE, outputs)
  assert all(isinstance(figure, Figure) for figure in figures.values())
  assert {name: len(f.axes) for name, f in figures.items()} == {
    "confusion": 2,  # And the bar of its colours.
    "calibration": 1,
    "by class": 1,
    "decisions": 16,
    "severity": 1,
    "grad-cam": 6,  # Three images, without and with their maps.
  }
  confusion = figures["confusion"].axes[0].images[0].get_array()
  assert confusion.shape == (7, 7)
  sums = np.asarray(confusion).sum(1)
  assert set(np.round(sums, 6)) <= {0.0, 1.0}
  lines = {line.get_label(): line for line in figures["severity"].axes[0].lines}
  assert list(lines) == [*CASES[0], "mean"]
  np.testing.assert_array_equal(lines["mean"].get_xdata(), CASES[1])
  titles = [axes.get_title() for axes in figures["grad-cam"].axes[:3]]
  named = np.argmax(_logits(SOURCE.rows["image"][:3]), axis=1)
  for title, n, truth in zip(titles, named, SOURCE.rows["label"], strict=False):
    want = CLASSES[n]
    assert title == want if n == truth else f"{CLASSES[truth]} as {want}"


def test_saliency_shows_the_map_of_the_named_class():
  _, outputs, saliency = _run(evaluators.saliency, 24, shown=2)
  (figure,) = saliency.pictures(STATE, outputs).values()
  for i, axes in enumerate(figure.axes[2:]):
    image = SOURCE.rows["image"][i]
    named = np.argmax(_logits(image[None])[0])
    heat = np.asarray(axes.images[1].get_array())
    coarse = _map(image, named)
    assert heat.shape == (6, 4)
    # The strongest cell is the strongest region of the picture.
    row, column = np.unravel_index(np.argmax(heat), heat.shape)
    strongest = np.unravel_index(np.argmax(coarse), coarse.shape)
    assert (row // 2, column // 2) == strongest


def test_padding_is_not_shown():
  # Rows 0 to 4, of which the fourth does not count; three are padding.
  few = sources.Subset(SOURCE, range(5))
  saliency = evaluators.saliency(_classifier(), _data(8, few))
  _, outputs = runtime.evaluate(saliency, STATE, MESH)
  (figure,) = saliency.pictures(STATE, outputs).values()
  assert len(figure.axes) == 2 * 4
  shown = np.asarray(figure.axes[3].images[0].get_array())
  want = SOURCE.rows["image"][4] / 255
  np.testing.assert_allclose(shown, want, atol=1 / 255)


def test_data_without_textures_are_refused():
  source = Source()
  del source.rows["texture"]
  evaluator = evaluators.cue_conflict(_classifier(), _data(8, source))
  with pytest.raises(
    InputError, match='needs examples with "texture", got image, index, label'
  ):
    runtime.evaluate(evaluator, STATE, MESH)


def test_corruptions_that_do_not_exist_are_refused_before_training():
  options = {"names": ("rain",), "severities": (1,)}
  with pytest.raises(InputError, match=r"'rain'.*there are: .*contrast"):
    evaluators.corruptions(_classifier(), _data(8), **options)
  options = {"names": ("contrast",), "severities": (0, 1)}
  with pytest.raises(InputError, match=r"severities must be .*1 to 5.*0, 1"):
    evaluators.corruptions(_classifier(), _data(8), **options)
  options = {"names": ("contrast",), "severities": ()}
  with pytest.raises(InputError, match="severities must be"):
    evaluators.corruptions(_classifier(), _data(8), **options)


def _numpy_model(images):
  return _logits(np.asarray(images))


def test_any_function_from_images_to_logits_is_measured_without_compiling():
  model = evaluators.of_logits(_numpy_model, classes=CLASSES)
  for make in (evaluators.accuracy, evaluators.cue_conflict):
    want, _, _ = _run(make, 8)
    got, outputs = evaluators.measure(make(model, _data(24)))
    assert got == pytest.approx(want, rel=1e-5)
    assert len(outputs) == 1
  # A function of JAX may as well be compiled.
  jitted = evaluators.of_logits(
    lambda x: _classifier().logits(STATE, x), classes=CLASSES
  )
  got, _ = runtime.evaluate(evaluators.accuracy(jitted, _data(8)), STATE, MESH)
  want, _, _ = _run(evaluators.accuracy, 8)
  assert got == pytest.approx(want, rel=1e-5)


def test_logits_of_other_classes_are_refused():
  model = evaluators.of_logits(_numpy_model, classes=CLASSES[:3])
  with pytest.raises(
    InputError, match=r"\[images, classes\], \[8, 3\], got.*7"
  ):
    evaluators.measure(evaluators.accuracy(model, _data(8)))
  nothing = evaluators.accuracy(model, lambda: iter(()))
  with pytest.raises(InputError, match="got no batch"):
    evaluators.measure(nothing)


@pytest.mark.parametrize("batch_size", BATCH_SIZES)
def test_decisions_are_shown_beside_what_they_decided_between(batch_size):
  _, outputs, evaluator = _run(
    evaluators.cue_conflict, batch_size, shown=5, beside=published.SHAPE_BIAS
  )
  figures = evaluator.pictures(STATE, outputs)
  assert list(figures) == ["by class", "published", "decisions"]
  conflict = [
    (row, np.argmax(_logits(row["image"][None])[0]))
    for row in SOURCE.counted()
    if row["label"] != row["texture"] >= 0
  ]
  places = np.linspace(0, len(conflict) - 1, 5).astype(int)
  sheet = figures["decisions"].axes
  assert len(sheet) == 5
  for axes, place in zip(sheet, places, strict=True):
    row, named = conflict[place]
    titles = [CLASSES[n] for n in (row["label"], row["texture"], named)]
    assert axes.get_title() == " / ".join(titles)
    shown = np.asarray(axes.images[0].get_array())
    np.testing.assert_allclose(shown, row["image"] / 255, atol=1e-6)
  colors = {axes.title.get_color() for axes in sheet}
  assert len(colors) > 1  # By shape, by texture, by neither.
  bars = figures["published"].axes[0]
  names = [label.get_text() for label in bars.get_yticklabels()]
  widths = [bar.get_width() for bar in bars.patches]
  assert widths == sorted(widths)
  own = evaluator.summarize(outputs)["shape_bias"]
  assert widths[names.index("this network")] == pytest.approx(own)
  assert "people (Geirhos et al. 2019, Sec. 3.1)" in names


def test_without_a_conflict_there_is_no_sheet():
  source = Source()
  source.rows["texture"] = source.rows["label"]
  evaluator = evaluators.cue_conflict(_classifier(), _data(24, source))
  got, outputs = runtime.evaluate(evaluator, STATE, MESH)
  assert got["decisions"] == 0
  assert list(evaluator.pictures(STATE, outputs)) == ["by class"]


FILES = (("fog", 1), ("fog", 3), ("snow", 1), ("snow", 3), ("snow", 5))


@pytest.mark.parametrize("batch_size", BATCH_SIZES)
def test_errors_on_published_corrupted_files_row_by_row(batch_size):
  source = Source()
  source.rows["corruption"] = np.int32(np.arange(21) // 4 % 5)
  wrong = collections.defaultdict(list)
  for row in source.counted():
    named = np.argmax(_logits(row["image"][None])[0])
    wrong[FILES[row["corruption"]]].append(named != row["label"])
  error = {case: np.mean(found) for case, found in wrong.items()}
  evaluator = evaluators.corrupted(
    _classifier(), _data(batch_size, source), cases=lambda: FILES
  )
  got, outputs = runtime.evaluate(evaluator, STATE, MESH)
  assert got == pytest.approx(
    {
      "mean_error": np.mean([error[case] for case in FILES]),
      "fog_error": (error["fog", 1] + error["fog", 3]) / 2,
      "snow_error": np.mean([error["snow", s] for s in (1, 3, 5)]),
      "severity_1_top1": 1 - (error["fog", 1] + error["snow", 1]) / 2,
      "severity_3_top1": 1 - (error["fog", 3] + error["snow", 3]) / 2,
      "severity_5_top1": 1 - error["snow", 5],
    }
  )
  figures = evaluator.pictures(STATE, outputs)
  lines = {line.get_label(): line for line in figures["severity"].axes[0].lines}
  fog = [error["fog", 1], error["fog", 3], np.nan]
  np.testing.assert_allclose(lines["fog"].get_ydata(), fog)
  assert list(lines) == ["fog", "snow", "mean"]
  assert list(evaluator.plots(outputs)) == ["severity", "kind"]


def _all_cases(errors):
  """Outputs of one row per percent, wrong as often as a table says."""
  cases = [(name, s) for name in errors for s in (1, 2, 3, 4, 5)]
  wrong = [
    np.arange(1000) < round(1000 * errors[name][s - 1]) for name, s in cases
  ]
  rows = {
    "mask": np.ones(1000 * len(cases), np.float32),
    "case": np.arange(len(cases), dtype=np.int32).repeat(1000),
    "wrong": np.concatenate(wrong).astype(np.float32),
  }
  return cases, [rows]


def test_mce_is_given_where_all_15_are_there_and_the_classes_are_imagenets():
  table = {k: np.round(v, 3) for k, v in robustness.ALEXNET_ERRORS.items()}
  table["spatter"] = np.full(5, 0.1)
  cases, outputs = _all_cases(table)
  thousand = evaluators.Classifier(
    lambda *_: None, lambda *_: None, range(1000)
  )
  evaluator = evaluators.corrupted(thousand, lambda: None, cases=lambda: cases)
  got = evaluator.summarize(outputs)
  assert got["mce"] == pytest.approx(1, abs=1e-3)  # That of AlexNet itself.
  all_15 = np.mean([table[name] for name in robustness.ALEXNET_ERRORS])
  assert got["mean_15_error"] == pytest.approx(all_15)
  assert got["mean_error"] == pytest.approx((15 * all_15 + 0.1) / 16)
  assert "relative_mce" not in got  # Files hold no plain images.
  drawn = evaluator.pictures(STATE, outputs)
  assert list(drawn) == ["severity", "published"]
  fewer = [case for case in cases if case != ("fog", 4)]
  number = {case: i for i, case in enumerate(cases)}
  rows = outputs[0]
  left = rows["case"] != number["fog", 4]
  some = {name: row[left] for name, row in rows.items()}
  some["case"] = np.searchsorted([number[c] for c in fewer], some["case"])
  for classes, chosen, given in (
    (range(1000), fewer, some),
    (range(10), cases, rows),
  ):
    other = evaluators.Classifier(lambda *_: None, lambda *_: None, classes)
    evaluator = evaluators.corrupted(
      other, lambda: None, cases=lambda chosen=chosen: chosen
    )
    got = evaluator.summarize([given])
    assert "mce" not in got
    assert list(evaluator.pictures(STATE, [given])) == ["severity"]


def test_the_baseline_of_corruptions_is_that_of_imagenet_alone():
  options = {
    "names": tuple(robustness.ALEXNET_ERRORS),
    "severities": (1, 2, 3, 4, 5),
  }
  counts = {}
  for classes in (CLASSES, tuple(map(str, range(1000)))):
    model = evaluators.Classifier(lambda *_: None, lambda *_: None, classes)
    made = evaluators.corruptions(model, _data(24), **options)
    counts[len(classes)] = sum(1 for _ in made.data())
  assert counts == {7: 75, 1000: 76}  # And the plain images.


def test_corrupted_images_say_which_case_they_are():
  evaluator = evaluators.corrupted(_classifier(), _data(8), cases=lambda: FILES)
  with pytest.raises(InputError, match='needs examples with "corruption"'):
    runtime.evaluate(evaluator, STATE, MESH)
