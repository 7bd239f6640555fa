import functools

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
from PIL import Image
import pytest

from jaxshape.engine import (
  attack_evaluators,
  bench,
  classifiers,
  evaluators,
  runtime,
)
from jaxshape.errors import InputError
from jaxshape.metrics import categories
from jaxshape.system import TrainState

MESH = runtime.make_mesh({"data": -1, "model": 1})
SIZE = 32
STATE = TrainState(jnp.int32(0), {}, {}, {})


def _config(**changes):
  config = ConfigDict()
  config.batch_size = 8
  config.mesh = ConfigDict({"data": -1, "model": 1})
  config.data = ConfigDict(
    {
      "source": "textured_shapes",
      "data_dir": "",
      "image_size": SIZE,
      "train_split": "train",
      "eval_splits": ("test", "outline"),
      "options": {"num_examples": 12},
    }
  )
  config.bench = bench.defaults()
  for name, value in changes.items():
    *parts, last = name.split("__")
    functools.reduce(getattr, parts, config.bench)[last] = value
  return config


@functools.cache
def _weights(classes):
  return np.random.default_rng(0).normal(size=(48, classes)).astype(np.float32)


def _features(images):
  x = jnp.asarray(images, jnp.float32) / 255 - 0.5
  n = SIZE // 4
  return x.reshape(len(x), 4, n, 4, n, 3).mean((2, 4))


def _classifier(classes):
  def head(state, features):
    del state
    flat = features.reshape(*features.shape[:-3], 48)
    return 9 * flat @ jnp.asarray(_weights(len(classes)))

  return evaluators.Classifier(lambda _, x: _features(x), head, classes)


def _made(**changes):
  config = _config(**changes)
  splits = classifiers.Splits(config)
  return bench.evaluators(config, _classifier(splits.classes), splits)


def test_by_default_there_is_nothing_but_the_splits():
  assert list(_made()) == ["test", "outline"]


def test_everything_at_once():
  made = _made(
    cue_conflict="cue_conflict",
    corruption_split="test",
    corruptions=("contrast",),
    saliency=("outline",),
    stylized=("test",),
    dimensionality="test",
    attacks__split="test",
    attacks__names=("fgsm", "pgd"),
    attacks__white_box=(0.5, 8.0),
    attacks__surrogate="runs/other",
  )
  assert list(made) == [
    "test", "outline", "cue_conflict", "corruption", "saliency_outline",
    "stylized_test", "dimensionality", "transferred", "white_box",
  ]  # fmt: skip
  numbers, _ = runtime.evaluate(made["cue_conflict"], STATE, MESH)
  assert numbers["decided_share"] <= 1
  numbers, outputs = runtime.evaluate(made["white_box"], STATE, MESH)
  plots = made["white_box"].plots(outputs)
  assert list(plots) == ["fgsm", "pgd"]
  clean, *attacked = plots["fgsm"].values
  assert plots["fgsm"].places == (0.0, 0.5, 8.0)
  assert clean == numbers["clean_top1"]
  assert attacked == [numbers["fgsm_0.5_top1"], numbers["fgsm_8_top1"]]


def test_restyled_and_paired_examples_have_what_their_evaluators_need():
  made = _made(stylized=("test",), dimensionality="test", style_strength=0.0)
  for name, count in (("stylized_test", 1), ("dimensionality", 2)):
    (first, *_) = made[name].data()
    assert first["style"].shape == (8, count, SIZE, SIZE, 3)
    assert ("other" in first) == (count == 2)
    runtime.rehearse(made[name], STATE, MESH)
  again = _made(
    stylized=("test",),
    style_options=ConfigDict({"seed": 0}),
    style_strength=0.0,
  )
  (first, *_), (other, *_) = (
    found["stylized_test"].data() for found in (made, again)
  )
  np.testing.assert_array_equal(first["image"], other["image"])
  assert (first["style"] != other["style"]).any()  # Training's seed is 0.


def test_a_surrogate_of_other_classes_is_refused(monkeypatch):
  def load(workdir, *, mesh):
    assert dict(mesh) == {"data": -1, "model": 1}
    return attack_evaluators.Surrogate(
      workdir, lambda state, x: None, STATE, ("cat", "dog"), MESH
    )

  monkeypatch.setattr(attack_evaluators, "load_surrogate", load)
  made = _made(attacks__split="test", attacks__surrogate="runs/other")
  with pytest.raises(InputError, match=r"runs/other tells 2 classes.* 16"):
    runtime.rehearse(made["transferred"], STATE, MESH)


@pytest.fixture(scope="module")
def stimuli(tmp_path_factory):
  root = tmp_path_factory.mktemp("stimuli")
  draw = np.random.default_rng(3)
  rows = []
  for k in range(24):
    shape, texture = draw.choice(["cat", "dog", "oven", "truck"], 2)
    texture = "bird" if k % 8 == 1 else texture
    low = draw.integers(0, 256, (4, 4, 3)).astype(np.uint8)
    image = low.repeat(8, 0).repeat(8, 1)
    rows.append((image, shape, texture))
    for split in ("conflict", "edges"):
      path = root / split / shape / f"{shape}{k}-{texture}{k}.png"
      path.parent.mkdir(parents=True, exist_ok=True)
      Image.fromarray(image).save(path)
  return root, rows


def test_imagenet_heads_decide_between_16_categories(stimuli):
  root, rows = stimuli
  config = _config(
    categories="imagenet",
    stimuli=f"folder:{root}",
    stimuli_options=ConfigDict({"resize_to": SIZE}),
    stimuli_splits=("edges",),
    cue_conflict="conflict",
  )
  config.data.eval_splits = ()
  classifier = _classifier(tuple(map(str, range(1000))))
  made = bench.evaluators(config, classifier, classifiers.Splits(config))
  assert list(made) == ["cue_conflict", "stimuli_edges"]
  shape = texture = right = conflicts = 0
  for image, *names in rows:
    logits = np.asarray(classifier.logits(STATE, image[None]))[0]
    p = np.exp(logits - logits.max())
    p /= p.sum()
    table = categories.IMAGENET_TO_16
    score = [p[table == c].mean() for c in range(16)]
    decision = categories.CATEGORIES[int(np.argmax(score))]
    right += decision == names[0]
    if names[0] != names[1]:
      conflicts += 1
      shape += decision == names[0]
      texture += decision == names[1]
  assert shape
  assert texture
  assert conflicts < len(rows)
  got, outputs = runtime.evaluate(made["cue_conflict"], STATE, MESH)
  assert got["shape_bias"] == pytest.approx(shape / (shape + texture))
  assert got["decisions"] == shape + texture
  assert got["shape_top1"] == pytest.approx(shape / conflicts)
  assert got["shape_match"] == pytest.approx(shape / len(rows))
  plot = made["cue_conflict"].plots(outputs)["by class"]
  assert plot.places == categories.CATEGORIES
  got, _ = runtime.evaluate(made["stimuli_edges"], STATE, MESH)
  assert got["top1"] == pytest.approx(right / len(rows))


def test_a_categorizers_logits_are_logarithms_of_the_scores():
  classifier = bench.categorizer(
    _classifier(tuple("x" * 1000)), aggregate="sum"
  )
  image = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3))
  logits = classifier.logits(STATE, image)
  p = jax.nn.softmax(_classifier(tuple("x" * 1000)).logits(STATE, image))
  want = categories.scores(p, aggregate="sum")
  np.testing.assert_allclose(np.exp(logits), want, rtol=1e-4)
  assert classifier.classes == categories.CATEGORIES


def test_stimuli_are_labelled_by_the_names_of_their_classes(stimuli):
  class Other:
    classes = ("truck", "cat")

    def __getitem__(self, i):
      return {"label": np.int32(i - 1), "texture": np.int32(1 - i)}

    def __len__(self):
      return 3

  found = bench.Categorized(Other())
  number = categories.CATEGORIES.index
  got = [
    (int(r["label"]), int(r["texture"]))
    for r in map(found.__getitem__, range(3))
  ]
  cat, truck = number("cat"), number("truck")
  assert got == [(-1, cat), (truck, truck), (cat, -1)]
  Other.classes = ("tabby", "cat")
  with pytest.raises(InputError, match="among the categories .*got tabby"):
    bench.Categorized(Other())
  root, _ = stimuli
  config = _config(categories="imagenet", stimuli=f"folder:{root}")
  splits = classifiers.Splits(config)
  with pytest.raises(InputError, match="a head of 1,000 classes, got 16"):
    bench.evaluators(config, _classifier(splits.classes), splits)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"categories": "cifar"}, r"categories must be .* 'imagenet', got 'cifar'"),
    ({"aggregate": "median"}, r"aggregate must be .* got 'median'"),
    ({"style_strength": 1.5}, r"style_strength must be in 0..1, got 1.5"),
    ({"dimensionality_examples": -1}, "dimensionality_examples must be 0"),
    ({"attacks__examples": -1}, "attacks.examples must be 0 or more, got -1"),
    ({"corruptions": ("fog",)}, "corruption_split must name"),
    ({"attacks__white_box": (1.0,)}, "attacks.split must name the split"),
    ({"categories": "imagenet"}, "stimuli must name data that are labelled"),
    ({"stimuli_splits": ("edges",)}, "stimuli must name the data"),
    (
      {"attacks__split": "test", "attacks__white_box": (300.0,)},
      r"config.bench.attacks.white_box .*255.*300",
    ),
    (
      {"attacks__epsilons": (8.0, -1.0)},
      r"config.bench.attacks.epsilons .*255.*-1",
    ),
    (
      {
        "attacks__split": "test",
        "attacks__white_box": (1.0,),
        "attacks__names": ("cw",),
      },
      r"'cw'.*fgsm",
    ),
    (
      {"corruption_split": "test", "corruptions": ("rain",)},
      r"there is no 'rain'",
    ),
  ],
)
def test_what_does_not_fit_is_refused_by_name(changes, message):
  with pytest.raises(InputError, match=message):
    _made(**changes)


def test_styles_that_are_not_there_are_refused_when_opened(tmp_path):
  made = _made(stylized=("test",), style_source=f"folder:{tmp_path}")
  with pytest.raises(InputError, match=str(tmp_path)):
    runtime.rehearse(made["stylized_test"], STATE, MESH)


def test_an_older_runs_bench_has_the_defaults_of_what_it_lacks():
  config = _config()
  config.bench = ConfigDict({"cue_conflict": "cue_conflict", "filtered": "x"})
  splits = classifiers.Splits(config)
  made = bench.evaluators(config, _classifier(splits.classes), splits)
  assert list(made) == ["test", "outline", "cue_conflict"]
  config.bench = ConfigDict({"stylized": 3})
  with pytest.raises(InputError, match="config.bench: .*stylized"):
    bench.evaluators(config, _classifier(splits.classes), splits)
