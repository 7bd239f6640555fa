import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from PIL import Image
import pytest

from jaxshape.engine import classifiers, steps
from jaxshape.errors import InputError
from jaxshape.losses import classification
from jaxshape.system import TrainState

CLASSES = ("ant", "bee", "cow")


def _config(root="", **changes):
  config = ml_collections.ConfigDict(
    {
      "backbone": "resnet8", "width": 4, "stem": "", "dtype": "float32",
      "mean": (127.5, 127.5, 127.5), "std": (64.0, 32.0, 16.0),
      "batch_size": 4,
      "data": {
        "source": f"folder:{root}", "data_dir": "", "image_size": 8,
        "train_split": "train", "eval_splits": ("val",), "options": {},
      },
    }
  )  # fmt: skip
  config.update_from_flattened_dict(changes)
  return config


@pytest.fixture(name="root")
def _root(tmp_path):
  draw = np.random.default_rng(0)
  for split, classes in {
    "train": CLASSES, "val": CLASSES, "other": ("ant", "bee", "dog"),
  }.items():  # fmt: skip
    for name in classes:
      folder = tmp_path / split / name
      folder.mkdir(parents=True)
      for i in range(2):
        pixels = draw.integers(0, 256, (8, 8, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
  return tmp_path


def test_splits_give_every_example_once_in_order(root):
  splits = classifiers.Splits(_config(root))
  assert splits.classes == CLASSES
  source = splits.open("val")
  batches = list(splits.batches("val")())
  mask = np.concatenate([b["mask"] for b in batches])
  images = np.concatenate([b["image"] for b in batches])[mask > 0]
  np.testing.assert_array_equal(
    images, [source[i]["image"] for i in range(len(source))]
  )
  assert splits.some("val") is splits.some("val")


def test_a_part_of_a_split_is_drawn_once_and_for_all(root):
  splits = classifiers.Splits(_config(root))
  some = splits.some("val", most=3)
  assert len(some) == 3
  assert len({some[i]["label"] for i in range(3)}) > 1
  again = classifiers.Splits(_config(root)).some("val", most=3)
  np.testing.assert_array_equal(some.indices, again.indices)
  assert len(splits.some("val", most=6)) == len(splits.some("val")) == 6


def test_what_is_wrong_is_said_also_where_only_evaluation_is_at_hand(root):
  splits = {"data.train_split": "none", "data.eval_splits": ("nowhere",)}
  config = _config(root, **splits)
  with pytest.raises(InputError, match=r"split 'none'.*split 'nowhere'"):
    classifiers.Splits(config)


def test_other_classes_than_in_training_are_refused(root):
  splits = classifiers.Splits(_config(root))
  with pytest.raises(InputError, match="'other'.*cow, dog"):
    splits.open("other")
  with pytest.raises(InputError, match="nowhere"):
    splits.open("nowhere")


def test_classes_are_known_from_the_data_to_evaluate_alone(root):
  only = {"data.train_split": "gone"}
  assert classifiers.Splits(_config(root, **only)).classes == CLASSES
  with pytest.raises(InputError, match="gone"):
    classifiers.Splits(_config(root, **only, **{"data.eval_splits": ()}))


def test_one_class_is_nothing_to_tell_apart(tmp_path):
  (tmp_path / "train" / "ant").mkdir(parents=True)
  Image.new("RGB", (8, 8)).save(tmp_path / "train" / "ant" / "0.png")
  with pytest.raises(InputError, match="two classes or more.*got 1"):
    classifiers.Splits(_config(tmp_path))


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"dtype": "int8"}, "config.dtype .*'int8'"),
    ({"width": -1}, "config.width .*-1"),
    ({"std": (1.0, 1.0, 0.0)}, "config.mean and config.std"),
    ({"mean": (1.0, 1.0)}, "config.mean and config.std"),
  ],
)
def test_what_no_network_can_be_made_of_is_refused(changes, words):
  classifiers.check(_config())
  with pytest.raises(InputError, match=words):
    classifiers.check(_config(**changes))


def test_the_classifier_is_the_network_in_two_halves():
  config = _config(width=3)
  net = classifiers.network(config, num_classes=3)
  normalize = classifiers.normalizer(config)
  images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
  # A channel is normalized by its own mean and deviation.
  np.testing.assert_allclose(
    normalize(images), (images - 127.5) / [64, 32, 16], rtol=1e-6
  )
  variables = jax.jit(lambda k: net.init(k, normalize(images), train=False))(
    jax.random.key(0)
  )
  state = TrainState(
    step=jnp.zeros((), jnp.int32),
    params={"net": variables["params"]},
    opt_state={},
    extra={"net": {"batch_stats": variables["batch_stats"]}},
  )
  classifier = classifiers.classifier(net, normalize, CLASSES)
  want = net.apply(variables, normalize(images), train=False)
  got = classifier.logits(state, images)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
  # Averaged parameters come first.
  zeros = jax.tree.map(jnp.zeros_like, state.params)
  averaged = state.replace(extra={**state.extra, "ema": zeros})
  assert steps.evaluation_params(averaged) is zeros
  assert not np.any(classifier.logits(averaged, images))


def test_labels_are_targets_that_are_not_mixed():
  draw = np.random.default_rng(0)
  logits = jnp.asarray(draw.normal(size=(4, 3)), jnp.float32)
  labels = np.array([0, 2, 1, 1], np.int32)
  want = classification.cross_entropy(logits, labels, label_smoothing=0.1)
  got = classifiers.loss(logits, {"label": labels}, label_smoothing=0.1)
  np.testing.assert_allclose(got, want, rtol=1e-6)
  mixed = {"label": labels, "target": np.eye(3, dtype=np.float32)[labels]}
  got = classifiers.loss(logits, mixed, label_smoothing=0.1)
  np.testing.assert_allclose(got, want, rtol=1e-5)
