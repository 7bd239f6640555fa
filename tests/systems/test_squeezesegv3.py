import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import squeezesegv3 as configs
from jaxshape import system as system_lib
from jaxshape.data import semantic_kitti
from jaxshape.errors import InputError
from jaxshape.geometry import spherical
from jaxshape.systems import squeezesegv3


def _config(**changes):
  config = configs.get_config("tiny")
  config.update_from_flattened_dict(changes)
  return config.lock()


@pytest.fixture(scope="module")
def tiny():
  config = _config()
  system = system_lib.load(config)
  batches = system.train_data(0)
  batch = next(batches)
  batches.close()
  return config, system, jax.jit(system.init)(jax.random.key(0)), batch


def _two(batch):
  return {name: leaf[:2] for name, leaf in batch.items()}


def test_every_point_gets_the_label_of_its_pixel_without_the_vote(tiny):
  config, _, state, batch = tiny
  system = system_lib.load(_config(**{"knn.use": False}))
  evaluator = system.evaluators["test"]
  batch = {**_two(batch), "mask": np.ones(2, np.float32)}
  said = np.asarray(jax.jit(system.predict)(state, batch)["label"])
  seen = squeezesegv3.project(config, batch)
  shown = np.asarray(seen.index)[np.asarray(seen.mask)]
  assert said.shape == batch["label"].shape
  for i in range(2):
    row, column = np.asarray(seen.row[i]), np.asarray(seen.column[i])
    # All points of a pixel agree, and padding has no label.
    pixel = row * config.sensor.width + column
    for place in np.unique(pixel[row >= 0])[:200]:
      assert len(np.unique(said[i][pixel == place])) == 1
    assert (said[i][row < 0] == 0).all()
  assert len(shown)
  # The evaluator counts just these.
  tables = jax.jit(evaluator.step)(state, batch)
  assert set(tables) == {"pixel", "image"}
  valid = batch["valid"]
  right = (said == batch["label"])[valid & (batch["label"] > 0)].sum()
  assert np.trace(np.asarray(tables["pixel"])[1:, 1:]) == right


def test_the_image_shows_the_label_of_the_nearest_point(tiny):
  config, _, _, batch = tiny
  seen = squeezesegv3.project(config, batch)
  truth = np.asarray(squeezesegv3._on_image(seen, batch["label"]))
  index, mask = np.asarray(seen.index), np.asarray(seen.mask)
  for i in range(len(index)):
    want = np.where(mask[i], batch["label"][i][index[i]], 0)
    np.testing.assert_array_equal(truth[i], want)
  far = squeezesegv3.project(_config(**{"projection.keep": "farthest"}), batch)
  depths = [np.asarray(s.image)[..., 0][mask].mean() for s in (seen, far)]
  assert depths[0] < depths[1]


def test_empty_pixels_reach_the_network_as_zeros(tiny):
  config, _, _, batch = tiny
  none = {**_two(batch), "valid": np.zeros_like(batch["valid"][:2])}
  seen = squeezesegv3.project(config, none)
  assert not np.asarray(seen.mask).any()
  assert not np.asarray(squeezesegv3._normalize(config, seen)).any()


def test_scans_without_a_single_point_or_label_train_and_predict(tiny):
  _, system, state, batch = tiny
  empty = {
    **batch,
    "valid": np.zeros_like(batch["valid"]),
    "label": np.zeros_like(batch["label"]),
    "points": np.full_like(batch["points"], np.nan),
  }
  after, metrics = jax.jit(system.train_step)(state, empty, jax.random.key(0))
  assert float(metrics["net/loss"]) == 0
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(after.params))
  said = jax.jit(system.predict)(state, _two(empty))["label"]
  assert not np.asarray(said).any()


def test_the_crf_smooths_the_labels(tiny):
  _, _, state, batch = tiny
  smooth = system_lib.load(
    _config(**{"crf.iterations": 3, "crf.sigma": 5.0, "knn.use": False})
  )
  rough = system_lib.load(_config(**{"knn.use": False}))
  changes = []
  for each in (rough, smooth):
    said = np.asarray(jax.jit(each.predict)(state, _two(batch))["label"])
    changes.append(np.mean(said[:, 1:] != said[:, :-1]))
  assert changes[1] < changes[0]


def test_public_weights_come_in_and_go_out_unchanged(tiny):
  _, system, state, _ = tiny
  tensors = system.weights.save(state)
  assert "backbone.enc1.residual_0.attention_x.0.weight" in tensors
  other = system.init(jax.random.key(1))
  back = system.weights.load(other, tensors)
  for name in ("params", "extra"):
    for x, y in zip(
      jax.tree.leaves(getattr(back, name)),
      jax.tree.leaves(getattr(state, name)),
      strict=True,
    ):
      np.testing.assert_array_equal(x, y)
  assert set(system.weights.parts.values()) == {
    name.split(".")[0] + "." for name in tensors
  }


def test_class_weights_are_those_of_the_labels():
  labels = semantic_kitti.builtin_labels()
  config = _config()
  weights = np.asarray(squeezesegv3._class_weights(config, labels))
  want = 1 / (labels.frequencies + config.loss.epsilon)
  want[0] = 0
  np.testing.assert_allclose(weights, want, rtol=1e-6)
  assert (
    squeezesegv3._class_weights(_config(**{"loss.weights": "none"}), labels)
    is None
  )


def test_the_modes_are_the_published_networks():
  for mode, millions in {"ssgv3_21": 9.247140, "ssgv3_53": 25.959588}.items():
    config = configs.get_config(mode)
    system = system_lib.load(config.lock())
    state = jax.eval_shape(system.init, jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert count == round(millions * 1e6)


def test_the_larger_network_has_range_and_z_exchanged_as_its_public_config():
  small, large = (configs.get_config(f"ssgv3_{n}") for n in (21, 53))
  order = [3, 1, 2, 0, 4]
  for name in ("mean", "std"):
    assert large[name] == tuple(small[name][i] for i in order)
    assert configs.get_config("rangenet_53")[name] == small[name]


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"network.variant": "xyz"}, "variant must be one of .*isk.*xyz"),
    ({"network.depth": 34}, "depth must be one of 21, 53, got 34"),
    ({"network.dtype": "int8"}, "config.network.dtype must be .*int8"),
    ({"network.width": 0}, "width must be 1 or more, got 0"),
    ({"sensor.width": 100}, "width must be .*100"),
    ({"sensor.height": 0}, "config.sensor.height must be .*got 0"),
    ({"sensor.fov_up": -30.0}, "fov_up"),
    ({"projection.keep": "last"}, "keep must be .*last"),
    ({"projection.rows": "mine"}, "rows must be .*mine"),
    ({"loss.weights": "equal"}, "config.loss.weights must be .*equal"),
    ({"loss.reduction": "sum"}, "config.loss.reduction must be .*sum"),
    ({"knn.window": 4}, "window must be odd, got 4"),
    ({"knn.neighbours": 0}, "neighbours must be 1 or more, got 0"),
    ({"labels": "cityscapes"}, "config.labels must be .*cityscapes"),
    ({"labels": "gone.yaml"}, "gone.yaml"),
    ({"mean": (0.0, 0.0, 0.0)}, "five numbers"),
    ({"std": (1.0, 1.0, 0.0, 1.0, 1.0)}, "std above 0"),
    ({"std": ("a", "b", "c", "d", "e")}, "five numbers"),
    ({"mean": (0.0, float("nan"), 0.0, 0.0, 0.0)}, "five numbers"),
    ({"data.source": "semantic_kitti:/nowhere"}, "/nowhere"),
    ({"data.source": "textured_shapes"}, "other classes"),
    ({"data.source": "lidar_scenes:x"}, "no variants"),
    ({"data.train_split": "tran"}, "tran"),
    ({"augment.random_flop": {}}, "random_flop"),
  ],
)
def test_bad_configs_are_refused_in_one_line(changes, message):
  config = configs.get_config("tiny")
  with config.unlocked():
    for name, value in changes.items():
      group, _, field = name.rpartition(".")
      (config[group] if group else config)[field] = value

  def start():
    system_lib.load(config.lock()).train_data(0).close()

  with pytest.raises(InputError, match=message) as refused:
    start()
  assert "\n" not in str(refused.value)


def test_labels_and_data_must_mean_the_same(tmp_path):
  path = tmp_path / "mine.yaml"
  path.write_text(
    "labels: {0: none, 1: thing}\nlearning_map: {0: 0, 1: 1}\n"
    "learning_map_inv: {0: 0, 1: 1}\n"
  )
  config = _config(**{"labels": str(path), "loss.weights": "none"})
  system = system_lib.load(config)
  with pytest.raises(InputError, match="other classes than config.labels"):
    system.train_data(0)
  config = _config(**{"labels": str(path)})
  with pytest.raises(InputError, match="content.*loss.weights=none"):
    system_lib.load(config)


def test_points_outside_the_field_of_view_are_clamped_as_in_public_code():
  config = _config()
  points = np.array([[[5.0, 0, 5.0], [5.0, 0, -5.0]]], np.float32)
  seen = squeezesegv3.project(
    config,
    {
      "points": points,
      "remission": np.zeros((1, 2), np.float32),
      "valid": np.ones((1, 2), bool),
    },
  )
  assert seen.row.tolist() == [[0, config.sensor.height - 1]]
  assert isinstance(seen, spherical.Projection)
  assert jnp.isfinite(seen.image).all()
