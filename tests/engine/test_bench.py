import functools
import logging
import shutil

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh
from ml_collections import ConfigDict
import numpy as np
from PIL import Image
import pytest

from jaxshape.backbones import registry
from jaxshape.engine import (
  attack_evaluators,
  bench,
  classifiers,
  evaluators,
  runtime,
)
from jaxshape.errors import InputError
from jaxshape.layers import apply
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
    for split, name in (
      ("conflict", f"{shape}{k}-{texture}{k}"),
      ("edges", f"{shape}{k}"),
    ):
      path = root / split / shape / f"{name}.png"
      path.parent.mkdir(parents=True, exist_ok=True)
      Image.fromarray(image).save(path)
  return root, rows


THOUSAND = tuple(map(str, range(1000)))


def _imagenet(root, *, kind="cue_conflict", **changes):
  """A config of a head of 1,000 classes, which has no data but stimuli."""
  config = _config(
    categories="imagenet",
    stimuli=root and f"{kind}:{root}",
    cue_conflict="conflict",
    **changes,
  )
  config.data.eval_splits = ()
  return config


def _measurers(config, classes=THOUSAND):
  splits = classifiers.Splits(config)
  return bench.evaluators(config, _classifier(classes), splits)


def _decision(image):
  """By hand: the category of the highest mean probability."""
  logits = np.asarray(_classifier(THOUSAND).logits(STATE, image[None]))[0]
  p = np.exp(logits - logits.max())
  p /= p.sum()
  table = categories.IMAGENET_TO_16
  score = [p[table == c].mean() for c in range(16)]
  return categories.CATEGORIES[int(np.argmax(score))]


@pytest.mark.parametrize("kind", ["cue_conflict", "folder"])
def test_imagenet_heads_decide_between_16_categories(stimuli, kind):
  root, rows = stimuli
  made = _measurers(_imagenet(root, kind=kind, stimuli_splits=("edges",)))
  assert list(made) == ["cue_conflict", "stimuli_edges"]
  shape = texture = right = conflicts = 0
  for image, *names in rows:
    decision = _decision(image)
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
  figures = made["cue_conflict"].pictures(STATE, outputs)
  assert list(figures) == ["by class", "published", "decisions"]
  got, _ = runtime.evaluate(made["stimuli_edges"], STATE, MESH)
  assert got["top1"] == pytest.approx(right / len(rows))


def test_options_that_commands_can_set_are_given_where_they_are_set(
  stimuli, tmp_path
):
  root, _ = stimuli
  copy = shutil.copytree(root, tmp_path / "stimuli")
  (first, *_) = sorted((copy / "conflict").glob("*/*.png"))
  first.write_bytes(first.read_bytes()[:50])
  config = _imagenet(copy)
  assert config.bench.stimuli_options.skip_damaged is None
  with pytest.raises(InputError, match=f"{first.name} is damaged"):
    list(_measurers(config)["cue_conflict"].data())
  config.bench.stimuli_options.skip_damaged = True
  # As a run's config is read again.
  config.bench = ConfigDict(config.bench.to_dict())
  batches = list(_measurers(config)["cue_conflict"].data())
  all_batches = _measurers(_imagenet(root))["cue_conflict"].data()
  count = lambda found: sum(float(np.sum(b["mask"])) for b in found)
  assert count(batches) == count(all_batches) - 1


def test_stimuli_are_shown_whole(stimuli):
  # A quarter of the side: a cut would show fewer than all 16 cells.
  root, rows = stimuli
  config = _imagenet(root)
  config.data.image_size = 8
  config.data.options = ConfigDict({"interpolation": "box"})
  splits = classifiers.Splits(_config())
  made = bench.evaluators(config, _classifier(THOUSAND), splits)
  (first, *_) = made["cue_conflict"].data()
  want = min(rows, key=lambda row: row[1])[0][::4, ::4]
  known = {row[0][::4, ::4].tobytes() for row in rows}
  assert first["image"][0].shape == want.shape
  assert {image.tobytes() for image in first["image"]} <= known


def test_whatever_looks_at_pictures_can_look_at_the_stimuli(stimuli):
  root, rows = stimuli
  config = _imagenet(
    root,
    corruption_split="stimuli:edges",
    corruptions=("contrast",),
    severities=(5,),
    saliency=("stimuli:conflict",),
    stylized=("stimuli:edges",),
    style_strength=0.0,
    dimensionality="stimuli:edges",
    dimensionality_examples=10,
    attacks__split="stimuli:edges",
    attacks__names=("fgsm",),
    attacks__white_box=(4.0,),
  )
  made = _measurers(config)
  assert list(made) == [
    "cue_conflict", "corruption", "saliency_stimuli_conflict",
    "stylized_stimuli_edges", "dimensionality", "white_box",
  ]  # fmt: skip
  right = np.mean([_decision(image) == shape for image, shape, _ in rows])
  got, _ = runtime.evaluate(made["stylized_stimuli_edges"], STATE, MESH)
  assert got["top1"] == pytest.approx(right)  # Nothing is restyled.
  got, _ = runtime.evaluate(made["white_box"], STATE, MESH)
  assert got["clean_top1"] == pytest.approx(right)
  assert got["fgsm_4_top1"] < right
  for name in ("corruption", "saliency_stimuli_conflict", "dimensionality"):
    runtime.rehearse(made[name], STATE, MESH)
  (first, *_) = made["dimensionality"].data()
  assert sum(b["mask"].sum() for b in made["dimensionality"].data()) == 10
  (first, *_) = made["saliency_stimuli_conflict"].data()
  assert len(set(first["label"].tolist())) > 2  # Of several categories.


def test_a_surrogate_of_imagenet_is_judged_by_categories_too(
  stimuli, monkeypatch
):
  def load(workdir, *, mesh):
    del mesh
    model = _classifier(THOUSAND).logits
    return attack_evaluators.Surrogate(
      workdir, model, STATE, tuple("x" * 1000), MESH
    )

  monkeypatch.setattr(attack_evaluators, "load_surrogate", load)
  root, _ = stimuli
  config = _imagenet(
    root,
    attacks__split="stimuli:edges",
    attacks__names=("fgsm",),
    attacks__white_box=(4.0,),
    attacks__epsilons=(4.0,),
    attacks__surrogate="runs/other",
  )
  made = _measurers(config)
  # The other network is this very one.
  got, _ = runtime.evaluate(made["transferred"], STATE, MESH)
  want, _ = runtime.evaluate(made["white_box"], STATE, MESH)
  assert got == pytest.approx(want)


def test_without_stimuli_what_needs_them_is_left_out(caplog):
  ready = {
    "stimuli_splits": ("edges",),
    "corruption_split": "stimuli:edges",
    "corruptions": ("contrast",),
    "saliency": ("stimuli:edges", "test"),
    "stylized": ("stimuli:edges",),
    "dimensionality": "stimuli:edges",
    "attacks__split": "stimuli:edges",
    "attacks__white_box": (1.0,),
  }
  assert list(_measurers(_imagenet("", **ready))) == ["saliency_test"]
  assert not caplog.records
  assert not _measurers(_imagenet(""))
  assert "as config.bench.stimuli is empty" in caplog.text


def test_stimuli_without_splits_are_of_one_kind(stimuli, caplog):
  root, _ = stimuli
  config = _imagenet(root / "conflict", stimuli_splits=("edges",))
  with caplog.at_level(logging.WARNING):
    made = _measurers(config)
  assert list(made) == ["cue_conflict"]
  assert "holds one kind of stimuli; edges are left out" in caplog.text
  runtime.rehearse(made["cue_conflict"], STATE, MESH)
  config = _imagenet(root / "conflict", saliency=("stimuli:edges",))
  made = _measurers(config)
  with pytest.raises(InputError, match="'conflict', and no 'edges'"):
    runtime.rehearse(made["saliency_stimuli_edges"], STATE, MESH)


def test_names_that_the_stimuli_do_not_have_are_refused(stimuli, tmp_path):
  root, _ = stimuli
  made = _measurers(_imagenet(root, stimuli_splits=("edge",)))
  with pytest.raises(InputError, match=r"edge.*edges"):
    runtime.rehearse(made["stimuli_edge"], STATE, MESH)
  path = tmp_path / "conflict" / "tabby" / "tabby1-cat1.png"
  path.parent.mkdir(parents=True)
  Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path)
  for kind in ("cue_conflict", "folder"):
    made = _measurers(_imagenet(tmp_path, kind=kind))
    with pytest.raises(InputError, match="tabby"):
      runtime.rehearse(made["cue_conflict"], STATE, MESH)
  with pytest.raises(InputError, match="a head of 1,000 classes, got 16"):
    _measurers(_imagenet(root), tuple("x" * 16))


def _mesh(count):
  devices = np.asarray(jax.devices()[:count]).reshape(count, 1)
  return Mesh(devices, ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def test_decisions_do_not_depend_on_batches_and_devices(stimuli):
  root, rows = stimuli
  net = registry.make("resnet8", num_classes=1000, width=4, stem="imagenet")
  blank = jnp.zeros((1, SIZE, SIZE, 3))
  params, extra = apply.init(net, jax.random.key(0), blank, train=False)
  state = TrainState(jnp.int32(0), {"net": params}, {}, {"net": extra})
  judge = classifiers.classifier(net, lambda x: x / 64.0 - 2, THOUSAND)
  decisions = []
  for batch_size, count in ((8, 8), (24, 8), (16, 2), (5, 1)):
    config = _imagenet(root)
    config.batch_size = batch_size
    splits = classifiers.Splits(_config())
    made = bench.evaluators(config, judge, splits)["cue_conflict"]
    _, outputs = runtime.evaluate(made, state, _mesh(count))
    found = evaluators.real_rows(outputs)
    assert found["index"].tolist() == list(range(len(rows)))
    decisions.append(found["prediction"])
  assert len(set(decisions[0].tolist())) > 1
  for other in decisions[1:]:
    np.testing.assert_array_equal(other, decisions[0])


def _write(path, image):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(image).save(path)


def test_a_head_is_restricted_to_the_classes_of_a_split(tmp_path):
  draw = np.random.default_rng(5)
  present, rows = (7, 30, 281, 900), []
  for k in range(20):
    low = draw.integers(0, 256, (4, 4, 3)).astype(np.uint8)
    image = low.repeat(8, 0).repeat(8, 1)
    rows.append((image, present[k % 4]))
    _write(tmp_path / "r" / str(present[k % 4]) / f"{k}.png", image)
  config = _config(restricted=("r",))
  config.data.source = f"imagenet:{tmp_path}"
  config.data.options = ConfigDict({"resize_to": SIZE})
  config.data.eval_splits = ("r",)
  made = _measurers(config)
  logits = _classifier(THOUSAND).logits(STATE, np.stack([x for x, _ in rows]))
  among = np.take(present, np.argmax(logits[:, np.array(present)], axis=1))
  labels = [label for _, label in rows]
  got, _ = runtime.evaluate(made["r"], STATE, MESH)
  assert got["top1"] == pytest.approx(np.equal(among, labels).mean()) != 0
  assert got["top5"] == 1  # There are four.
  assert all(np.isfinite(list(got.values())))
  config.bench.restricted = ()
  plain, _ = runtime.evaluate(_measurers(config)["r"], STATE, MESH)
  assert plain["top1"] < got["top1"]
  config.bench.restricted = ("a",)
  with pytest.raises(
    InputError, match="among config.data.eval_splits, got 'a'"
  ):
    _measurers(config)
  made = _made(restricted=("test",))
  with pytest.raises(InputError, match="'test' does not say which classes"):
    runtime.rehearse(made["test"], STATE, MESH)


def test_published_corrupted_files_are_read_by_case(tmp_path):
  draw = np.random.default_rng(6)
  classes = ("dog", "cat")  # Not in the order of the folders.
  judge, wrong = _classifier(classes), {}
  for case in (("fog", 1), ("fog", 2), ("snow", 1)):
    wrong[case] = []
    for k in range(6):
      image = draw.integers(0, 256, (4, 4, 3)).astype(np.uint8)
      image = image.repeat(8, 0).repeat(8, 1)
      name = classes[k % 2]
      _write(tmp_path / case[0] / str(case[1]) / name / f"{k}.png", image)
      named = np.argmax(judge.logits(STATE, image[None])[0])
      wrong[case].append(classes[named] != name)
  config = _config(corrupted=f"corrupted:{tmp_path}")
  config.data.eval_splits = ()
  splits = classifiers.Splits(_config())
  made = bench.evaluators(config, judge, splits)
  got, outputs = runtime.evaluate(made["corrupted"], STATE, MESH)
  error = {case: np.mean(found) for case, found in wrong.items()}
  assert 0 < error["snow", 1] < 1
  assert got["snow_error"] == pytest.approx(error["snow", 1])
  fog = (error["fog", 1] + error["fog", 2]) / 2
  assert got["fog_error"] == pytest.approx(fog)
  assert list(made["corrupted"].pictures(STATE, outputs)) == ["severity"]
  made = bench.evaluators(config, _classifier(("dog", "owl")), splits)
  with pytest.raises(InputError, match=r"bench.corrupted .*dog, owl; got cat"):
    runtime.rehearse(made["corrupted"], STATE, MESH)
  made = bench.evaluators(config, _classifier(THOUSAND), splits)
  with pytest.raises(InputError, match="WordNet ids"):
    runtime.rehearse(made["corrupted"], STATE, MESH)


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


def test_labels_are_renumbered_by_the_names_of_their_classes():
  class Other:
    classes = ("truck", "cat")

    def __getitem__(self, i):
      return {"label": np.int32(i - 1), "texture": np.int32(1 - i)}

    def __len__(self):
      return 3

  found = bench.Renumbered(Other(), categories.CATEGORIES, what="these")
  number = categories.CATEGORIES.index
  got = [
    (int(r["label"]), int(r["texture"]))
    for r in map(found.__getitem__, range(3))
  ]
  cat, truck = number("cat"), number("truck")
  assert got == [(-1, cat), (truck, truck), (cat, -1)]
  Other.classes = ("tabby", "cat")
  with pytest.raises(InputError, match="of these must be among .*got tabby"):
    bench.Renumbered(Other(), categories.CATEGORIES, what="these")
  Other.classes = ()
  with pytest.raises(InputError, match="got images without classes"):
    bench.Renumbered(Other(), categories.CATEGORIES, what="these")


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
    ({"corrupted": "folder:x"}, "corrupted must be corrupted:<folder>, got 'f"),
    ({"stimuli": "folder:x"}, "categories must say what labels .*'folder:x'"),
    (
      {"stimuli": "folder:x", "categories": "imagenet", "cue_conflict": ""},
      "cue_conflict must name what to measure the shape bias on of 'folder:x'",
    ),
    ({"stimuli_splits": ("edges",)}, "stimuli must name the data"),
    ({"saliency": ("stimuli:edges",)}, "given for 'stimuli:edges', got ''"),
    ({"dimensionality": "stimuli:x"}, "given for 'stimuli:x', got ''"),
    ({"categories": "imagenet"}, "a head of 1,000 classes, got 16"),
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
