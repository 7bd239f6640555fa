import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxshape import system as system_lib
from jaxshape.attacks import gradient
from jaxshape.data import stream
from jaxshape.engine import (
  attack_evaluators,
  checkpoints,
  classifiers,
  command,
  evaluators,
  report,
  runtime,
)
from jaxshape.errors import InputError
from jaxshape.system import System, TrainState
from tests.tiny import settings

CLASSES = ("a", "b", "c")
MESH = runtime.make_mesh({"data": -1, "model": 1})
SHAPE = (4, 4, 3)
EPSILONS = (8, 0.25, 0.75)
RISING = (0.25, 0.75, 8)


def _features(state, images):
  # Waves, on which one long step is not what many short ones are.
  x = jnp.asarray(images, jnp.float32) / 255 - 0.5
  return jnp.sin(60 * x) * state.params["net"]["scale"]


def _head(state, features):
  flat = features.reshape(*features.shape[:-3], -1)
  return flat @ state.params["net"]["w"]


def _state(noise):
  draw = np.random.default_rng(0)
  w = draw.normal(size=(48, 3)) + noise * draw.normal(size=(48, 3))
  w = w.astype(np.float32)
  net = {"w": jnp.asarray(w), "scale": jnp.ones(SHAPE)}
  return TrainState(jnp.int32(0), {"net": net}, {"net": net}, {})


CLASSIFIER = evaluators.Classifier(_features, _head, CLASSES)
STATE, OTHER = _state(0.0), _state(1.0)


class Source:
  """Images that the network mostly names, one not to be counted."""

  classes = CLASSES

  def __init__(self):
    draw = np.random.default_rng(2)
    n = 43
    images = draw.integers(0, 256, (n, *SHAPE)).astype(np.uint8)
    labels = np.array(CLASSIFIER.logits(STATE, images)).argmax(axis=-1)
    labels[::7] = (labels[::7] + 1) % 3
    mask = np.ones(n, np.float32)
    mask[4] = 0
    self.rows = {"image": images, "label": np.int32(labels), "mask": mask}

  def __len__(self):
    return len(self.rows["label"])

  def __getitem__(self, i):
    return {name: rows[i] for name, rows in self.rows.items()}


SOURCE = Source()


def _data(batch_size, source=SOURCE):
  return lambda: stream.evaluate(source, batch_size=batch_size)


def _run(*, batch_size=24, classifier=CLASSIFIER, **options):
  evaluator = attack_evaluators.attacked(
    classifier, _data(batch_size), epsilons=EPSILONS, **options
  )
  numbers, outputs = runtime.evaluate(evaluator, STATE, MESH)
  return numbers, outputs, evaluator


def _surrogate(state=OTHER, classes=CLASSES):
  return attack_evaluators.Surrogate(
    "theirs", CLASSIFIER.logits, state, classes, MESH
  )


REAL = np.flatnonzero(SOURCE.rows["mask"])


@functools.cache
def _made(made_on, *, seed=0):
  """Attacked images by case, by the functions of `attacks.gradient`."""
  state = STATE if made_on == "own" else OTHER
  logits_fn = functools.partial(CLASSIFIER.logits, state)
  images, labels = SOURCE.rows["image"][REAL], SOURCE.rows["label"][REAL]
  keys = [jax.random.fold_in(jax.random.key(seed), int(i)) for i in REAL]

  @jax.jit
  def attacked(epsilon):
    one = functools.partial(gradient.pgd, epsilon=epsilon)
    args = logits_fn, images, labels
    return {
      "fgsm": gradient.fgsm(*args, epsilon=epsilon),
      "pgd": jax.vmap(one, (0, None, 0, 0))(jnp.stack(keys), *args),
      "iterative_fgsm": gradient.iterative_fgsm(*args, epsilon=epsilon),
      "momentum_fgsm": gradient.momentum_fgsm(*args, epsilon=epsilon),
    }

  made = {epsilon: attacked(float(epsilon)) for epsilon in EPSILONS}
  return {"clean_top1": np.float32(images)} | {
    f"{attack}_{epsilon:g}_top1": np.asarray(made[epsilon][attack])
    for attack in attack_evaluators.ATTACKS
    for epsilon in EPSILONS
  }


def _row_by_row(made_on, *, seed=0):
  def top1(seen):
    logits = np.asarray(CLASSIFIER.logits(STATE, seen))
    return np.mean(logits.argmax(axis=-1) == SOURCE.rows["label"][REAL])

  made = _made(made_on, seed=seed)
  return {name: top1(images) for name, images in made.items()}


def test_white_box_row_by_row():
  want = _row_by_row("own", seed=3)
  got, _, _ = _run(seed=3)
  assert list(got) == list(want)  # In the order that was asked for.
  assert got == pytest.approx(want)
  for attack in ("pgd", "iterative_fgsm", "momentum_fgsm"):
    falling = [got[attack_evaluators.metric(attack, e)] for e in RISING]
    assert got["clean_top1"] > falling[0] > falling[1] >= falling[2]


def test_transferred_row_by_row():
  want = _row_by_row("theirs", seed=3)
  opened = []
  surrogate = lambda: opened.append(1) or _surrogate()
  evaluator = attack_evaluators.attacked(
    CLASSIFIER, _data(24), epsilons=EPSILONS, seed=3, surrogate=surrogate
  )
  assert not opened  # Not before the first batch is asked for.
  got, _ = runtime.evaluate(evaluator, STATE, MESH)
  assert got == pytest.approx(want)
  # Another network's weak points are weaker here.
  assert got["pgd_0.75_top1"] > _run(seed=3)[0]["pgd_0.75_top1"]
  runtime.evaluate(evaluator, STATE, MESH)
  assert len(opened) == 1


@pytest.mark.parametrize("batch_size", [8, 24])
def test_images_are_those_of_the_attacks(batch_size):
  want = _made("theirs", seed=3)
  evaluator = attack_evaluators.attacked(
    CLASSIFIER,
    _data(batch_size),
    epsilons=EPSILONS,
    seed=3,
    surrogate=_surrogate,
  )
  batches = list(evaluator.data())
  rows = {k: np.concatenate([b[k] for b in batches]) for k in batches[0]}
  real = rows["mask"] > 0
  for case, (name, images) in enumerate(want.items()):
    got = rows["image"][real & (rows["case"] == case)]
    np.testing.assert_allclose(got, images, atol=1e-3, err_msg=name)
    others = [other for other in want if other != name]
    assert all(np.abs(images - want[o]).max() > 0.02 for o in others)


def test_a_surrogate_that_is_the_network_itself_is_white_box():
  white, _, _ = _run(attacks=("pgd",))
  same, _, _ = _run(
    attacks=("pgd",), surrogate=functools.partial(_surrogate, STATE)
  )
  assert same == white
  assert len(set(white.values())) == 4


def test_one_program_holds_all_attacks_and_epsilons():
  traced = []

  def features(state, images):
    traced.append(images.shape)
    return _features(state, images)

  classifier = evaluators.Classifier(features, _head, CLASSES)
  _run(classifier=classifier)
  # The gradient, in the loop, and what is named.
  assert len(traced) <= 3


@pytest.mark.parametrize("surrogate", [None, _surrogate])
def test_pictures(surrogate):
  attacks = ("pgd", "momentum_fgsm")
  numbers, outputs, evaluator = _run(
    attacks=attacks, shown=3, surrogate=surrogate
  )
  figures = evaluator.pictures(STATE, outputs)
  lines = figures["accuracy"].axes[0].lines
  assert [line.get_label() for line in lines] == list(attacks)
  for line, attack in zip(lines, attacks, strict=True):
    np.testing.assert_allclose(line.get_xdata(), [0, *RISING])
    want = [numbers["clean_top1"]] + [
      numbers[attack_evaluators.metric(attack, e)] for e in RISING
    ]
    np.testing.assert_allclose(line.get_ydata(), want)
  grid = np.reshape(figures["images"].axes, (5, 3))
  names = [row[0].get_ylabel() for row in grid]
  change = "change x 10"
  assert names == ["original", "pgd 8", change, "momentum_fgsm 8", change]
  shown = lambda axes: 255 * np.asarray(axes.images[0].get_array())
  for n, column in enumerate(grid.T):
    label = SOURCE.rows["label"][n]
    assert column[0].get_title() == CLASSES[label]
    original, made, changed = map(shown, column[:3])
    np.testing.assert_allclose(original, SOURCE.rows["image"][n], atol=1e-3)
    moved = np.abs(made - original).max()
    assert 7 < moved < 8.01
    want = np.clip(127.5 + 10 * (made - original), 0, 255)
    np.testing.assert_allclose(changed, want, atol=1e-2)
    named = np.argmax(CLASSIFIER.logits(STATE, made[None]))
    assert column[1].get_title() == CLASSES[named]


def test_numbers_are_shown_as_per_cent():
  for name in ("clean_top1", attack_evaluators.metric("pgd", 0.5)):
    kind = report.kind(f"attacks/{name}")
    assert kind.percent
    assert kind.better == 1


def test_attacks_that_do_not_exist_are_refused_before_training():
  refused = functools.partial(attack_evaluators.attacked, CLASSIFIER, _data(8))
  with pytest.raises(InputError, match=r"no 'deepfool'; there are: fgsm, pgd"):
    refused(attacks=("fgsm", "deepfool"))
  for attacks in ((), "fgsm"):
    with pytest.raises(InputError, match="attacks must be some of fgsm"):
      refused(attacks=attacks)
  for epsilons in ((), (0,), (2, -1), (256,), (float("nan"),)):
    with pytest.raises(InputError, match=r"epsilons must be .* at most 255"):
      refused(epsilons=epsilons)
  with pytest.raises(InputError, match=r"epsilons must differ, got \(2, 2\)"):
    refused(epsilons=(2, 2))


def test_surrogates_of_other_classes_are_refused():
  for classes, match in (
    (("a", "b"), "theirs tells 2 classes apart and .* 3; .* differ in c"),
    (("a", "b", "d"), "tells 3 .* 3; .* differ in c, d"),
    (("b", "a", "c"), "differ in their order"),
  ):
    evaluator = attack_evaluators.attacked(
      CLASSIFIER,
      _data(8),
      surrogate=functools.partial(_surrogate, classes=classes),
    )
    with pytest.raises(InputError, match=match):
      runtime.rehearse(evaluator, STATE, MESH)


def make(config):
  """A system for the runs below: this file is its module."""

  def init(key):
    w = jax.random.normal(key, (3, len(classes)))
    return TrainState(jnp.int32(7), {"net": w}, {"net": {"mean": w}}, {})

  def predict(state, batch):
    pixels = jnp.asarray(batch["image"], jnp.float32)
    return pixels.mean((1, 2)) @ state.params["net"][:, : config.outputs]

  classes = classifiers.Splits(config).classes
  return System(init, lambda *_: None, predict, lambda _: iter(()), {})


def _config(**changes):
  config = settings.config("regression", outputs=99).unlock()
  config.system = "tests.engine.test_attack_evaluators"
  config.data = {
    "source": "textured_shapes",
    "data_dir": "",
    "image_size": 32,
    "train_split": "train",
    "eval_splits": ("test",),
    "options": {"num_examples": 4},
  }
  config.update(changes)
  return config


def _trained(folder, config):
  """A run's folder, as if `train.py` had made it."""
  system = system_lib.load(config)
  state = runtime.initialize(system.init, jax.random.key(5), MESH)
  folder.mkdir()
  command.write_config(config.to_dict(), folder)
  saved = checkpoints.Checkpoints(folder)
  saved.save(state, config=json.loads(config.to_json_best_effort()), metrics={})
  saved.wait()
  return system, state


def test_a_run_is_loaded_as_surrogate(tmp_path):
  folder, config = tmp_path / "theirs", _config()
  system, state = _trained(folder, config)
  got = attack_evaluators.load_surrogate(folder, mesh={"data": 8, "model": 1})
  assert got.name == str(folder)
  assert got.mesh.shape["data"] == 8
  images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3))
  want = system.predict(state, {"image": images})
  logits = got.logits(got.state, images)
  np.testing.assert_allclose(logits, want, rtol=1e-5)
  assert not jax.tree.leaves(got.state.opt_state)
  classes = classifiers.Splits(config).classes
  assert got.classes == classes
  theirs = functools.partial(attack_evaluators.load_surrogate, folder)
  evaluator = attack_evaluators.attacked(CLASSIFIER, _data(8), surrogate=theirs)
  match = f"{folder} tells {len(classes)} .* 3; they have to"
  with pytest.raises(InputError, match=match):
    runtime.rehearse(evaluator, STATE, MESH)


def test_runs_that_name_no_images_are_refused(tmp_path):
  fewer, other = tmp_path / "fewer", tmp_path / "other"
  _trained(fewer, _config(outputs=2))
  other.mkdir()
  command.write_config(settings.config("closed_form").to_dict(), other)
  for folder in (fewer, other):
    with pytest.raises(InputError, match="gives no logits of images"):
      attack_evaluators.load_surrogate(folder)


def test_folders_that_hold_no_classifier_are_refused(tmp_path):
  load = attack_evaluators.load_surrogate
  with pytest.raises(InputError, match="surrogate must be the --workdir"):
    load("")
  with pytest.raises(InputError, match="is not there"):
    load(tmp_path / "nothing")
  with pytest.raises(InputError, match=r"holds no config\.json"):
    load(tmp_path)
