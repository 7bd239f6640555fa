import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import texture_suppression
from configs import transfer as configs
from jaxshape import system as system_lib
from jaxshape.backbones import resnet
from jaxshape.engine import checkpoints, command, pretrained, pytorch, runtime
from jaxshape.errors import InputError
from jaxshape.system import TrainState
from jaxshape.systems import transfer
import train

KEY = jax.random.key(3)


def _config(mode="tiny", **changes):
  config = configs.get_config(mode)
  if mode != "tiny":
    config.width, config.batch_size = 4, 16
    config.data.image_size = 32
    config.steps = 6
    config.data.options.num_examples = 40
  config.optimizer.warmup_steps = 0
  config.update_from_flattened_dict(changes)
  return config.lock()


def _first(system):
  batches = system.train_data(0)
  batch = next(batches)
  batches.close()
  return batch


def _step(config, batch=None):
  system = system_lib.load(config)
  batch = _first(system) if batch is None else batch
  assert system.train_step is not None
  state = jax.jit(system.init)(jax.random.key(0))
  return state, *jax.jit(system.train_step)(state, batch, KEY)


def _apart(a, b):
  """Paths of the leaves that differ."""
  pairs = zip(
    jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
  )
  return {
    jax.tree_util.keystr(path, simple=True, separator="/")
    for (path, x), y in pairs
    if np.any(np.asarray(x) != np.asarray(y))
  }


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A run of another system, of another backbone than the config's."""
  config = texture_suppression.get_config("tiny")
  config.width, config.steps, config.save_every = 6, 1, 1
  config.suppression.policy = "original"
  config.optimizer.warmup_steps = 0
  config.std = (50.0, 60.0, 70.0)
  folder = tmp_path_factory.mktemp("runs") / "a"
  return folder, train.train(config.lock(), folder)


def _check_that_the_head_moved_alone(before, after, classes):
  moved = _apart(before.params, after.params)
  assert moved == {"net/fc/kernel", "net/fc/bias"}
  assert not _apart(before.extra, after.extra)
  kept = {np.shape(leaf) for leaf in jax.tree.leaves(after.opt_state)}
  assert kept == {(), (16, classes), (classes,)}


def test_fine_tuning_moves_all_of_it_and_the_statistics():
  before, after, _ = _step(_config())
  everything = _apart(
    before.params, jax.tree.map(lambda x: x + 1, before.params)
  )
  # The scale that starts a block at 0 keeps what is before it for a step.
  assert _apart(before.params, after.params) >= {
    name for name in everything if "bn2/scale" in name or "fc/" in name
  }
  assert _apart(before.extra, after.extra)


def test_the_multilabel_loss_leaves_out_what_does_not_count():
  config = _config(augment={}, head="linear")
  system = system_lib.load(config)
  batch = dict(_first(system))
  batch["labels"] = np.random.default_rng(0).choice(
    np.array([-1, 0, 1], np.float32), batch["labels"].shape
  )
  state, after, metrics = _step(config, batch)
  _check_that_the_head_moved_alone(state, after, 20)
  logits = np.asarray(system.predict(state, batch), np.float64)
  y: Any = batch["labels"]
  each = np.log1p(np.exp(logits)) - logits * (y == 1)
  np.testing.assert_allclose(
    metrics["net/loss"], each[y >= 0].mean(), rtol=1e-4
  )
  right = ((logits > 0) == (y == 1))[y >= 0].mean()
  np.testing.assert_allclose(metrics["net/labels_right"], right, rtol=1e-5)


def test_the_segmentation_loss_leaves_out_the_void():
  config = _config("small_segmentation", augment={})
  system = system_lib.load(config)
  batch = _first(system)
  state, after, metrics = _step(config, batch)
  _check_that_the_head_moved_alone(state, after, 21)
  logits = np.asarray(system.predict(state, batch), np.float64)
  y = batch["segmentation"]
  assert logits.shape == (16, 32, 32, 21)
  assert (y == 255).any()
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  own = np.take_along_axis(log_p, np.minimum(y, 20)[..., None], -1)[..., 0]
  np.testing.assert_allclose(
    metrics["net/loss"], -own[y != 255].mean(), rtol=1e-4
  )


def test_maps_are_mirrored_with_their_images():
  config = _config("small_segmentation")
  assert config.augment
  batch = _first(system_lib.load(config))
  mirrored = {k: v[:, :, ::-1] if v.ndim > 2 else v for k, v in batch.items()}
  out = transfer._augmentation(config, 21)(KEY, batch)
  turned = 0
  for i in range(16):
    rows = mirrored if np.any(out["image"][i] != batch["image"][i]) else batch
    turned += rows is mirrored
    np.testing.assert_array_equal(out["image"][i], rows["image"][i])
    np.testing.assert_array_equal(
      out["segmentation"][i], rows["segmentation"][i]
    )
  assert 0 < turned < 16


def test_a_run_gives_its_backbone_and_all_but_its_head(run):
  folder, other = run
  config = _config(pretrained=str(folder))
  system = system_lib.load(config)
  state = jax.jit(system.init)(jax.random.key(5))
  assert state.params["net"]["conv1"]["kernel"].shape[-1] == 6  # Not 4.
  moved = _apart(
    {k: v for k, v in other.params["net"].items() if k != "fc"},
    {k: v for k, v in state.params["net"].items() if k != "fc"},
  )
  assert not moved
  assert not _apart(other.extra["net"], state.extra["net"])
  assert state.params["net"]["fc"]["kernel"].shape == (24, 20)
  assert pretrained.adopt(config).std == (50.0, 60.0, 70.0)


def test_a_finished_run_does_not_need_the_run_it_began_with(run, tmp_path):
  moved, own = tmp_path / "moved", tmp_path / "own"
  shutil.copytree(run[0], moved)
  config = _config(pretrained=str(moved))
  system = system_lib.load(config)
  state = jax.jit(system.init)(jax.random.key(5))
  saved = checkpoints.Checkpoints(own)
  saved.save(state, config=config.to_dict(), metrics={})
  saved.wait()
  command.write_config(config, own)
  shutil.rmtree(moved)
  again = command.read_config(own)
  mesh = runtime.make_mesh(again.mesh)
  got = runtime.restored(system_lib.load(again), again, own, mesh)
  assert not _apart(state.params["net"], got.params["net"])
  with pytest.raises(InputError, match="moved is not there"):
    system_lib.load(_config(pretrained=str(moved)))


def test_features_that_stay_are_seen_once_and_say_the_same(run):
  folder, _ = run
  options = {"head": "linear", "augment": {}, "pretrained": str(folder)}
  seen_once = _first(system_lib.load(_config(**options)))
  assert set(seen_once) == {"features", "labels"}
  assert seen_once["features"].shape == (16, 24)
  # Drawn anew each time, though nothing comes of it.
  options["augment"] = {"horizontal_flip": {"probability": 0.0}}
  images = _first(system_lib.load(_config(**options)))
  np.testing.assert_array_equal(images["labels"], seen_once["labels"])
  results = [_step(_config(**options), b) for b in (images, seen_once)]
  for name in ("net/loss", "net/gradient_norm"):
    values = [metrics[name] for _, _, metrics in results]
    np.testing.assert_allclose(*values, rtol=1e-4)
  system = system_lib.load(_config(**options))
  said = [system.predict(results[0][1], b) for b in (images, seen_once)]
  np.testing.assert_allclose(*said, rtol=1e-4, atol=1e-5)


def test_torchvisions_names_are_read_from_a_file(tmp_path):
  net = resnet.make("resnet8", num_classes=7, width=4, stem="imagenet")
  image = np.zeros((1, 32, 32, 3), np.float32)
  variables = jax.jit(lambda: net.init(KEY, image, train=False))()
  tensors = resnet.to_state_dict(
    net, variables["params"], {"batch_stats": variables["batch_stats"]}
  )
  path = tmp_path / "a.safetensors"
  pytorch.save(path, tensors)
  system = system_lib.load(_config(pretrained=str(path)))
  state = jax.jit(system.init)(jax.random.key(5))
  for name in ("conv1", "layer2_0"):
    assert not _apart(variables["params"][name], state.params["net"][name])
  assert state.params["net"]["fc"]["bias"].shape == (20,)
  tensors.pop("conv1.weight")
  pytorch.save(path, tensors)
  system = system_lib.load(_config(pretrained=str(path)))
  with pytest.raises(InputError, match=r"conv1\.weight"):
    system.init(KEY)


def test_networks_that_do_not_fit_are_refused(run, tmp_path):
  folder, _ = run
  with pytest.raises(InputError, match=r"config.pretrained: .* is not there"):
    system_lib.load(_config(pretrained=str(tmp_path / "none")))
  config = configs.get_config("tiny")
  command.write_config(config, tmp_path)
  with pytest.raises(InputError, match="pretrained: .* holds no checkpoint"):
    system_lib.load(_config(pretrained=str(tmp_path))).init(KEY)
  state = TrainState(jnp.int32(0), {"a": jnp.ones(2)}, {}, {})
  saved = checkpoints.Checkpoints(tmp_path)
  saved.save(state, config={"system": "x"}, metrics={})
  saved.wait()
  with pytest.raises(InputError, match="pretrained: nothing in .* fits"):
    system_lib.load(_config(pretrained=str(tmp_path))).init(KEY)
  del config.std
  command.write_config(config, tmp_path)
  with pytest.raises(InputError, match="whose config has no std"):
    system_lib.load(_config(pretrained=str(tmp_path)))
  # The same names in another width.
  other = command.read_config(folder).copy_and_resolve_references()
  other.width = 4
  command.write_config(other, tmp_path)
  (tmp_path / "checkpoints").rename(tmp_path / "old")
  (tmp_path / "checkpoints").symlink_to(folder / "checkpoints")
  with pytest.raises(InputError, match="pretrained: .* (fits|lacks)"):
    system_lib.load(_config(pretrained=str(tmp_path))).init(KEY)


@pytest.mark.parametrize(
  ("changes", "match"),
  [
    ({"task": "detection"}, "config.task must be one of single, multilabel"),
    ({"head": "frozen"}, "config.head must be one of linear, fine_tune"),
    ({"bench.cam_threshold": 0.0}, "cam_threshold must be above 0"),
    ({"task": "segmentation"}, "cam_split needs config.task='multilabel'"),
    ({"width": -1}, "config.width must be at least 0"),
    (
      {
        "task": "segmentation",
        "bench.cam_split": "",
        "augment": {"random_crop": {"padding": 4}},
      },
      "may have horizontal_flip alone",
    ),
  ],
)
def test_configs_that_mean_nothing_are_refused(changes, match):
  with pytest.raises(InputError, match=match):
    system_lib.load(_config(**changes))


def test_data_of_another_task_are_refused():
  config = _config(**{"task": "single", "bench.cam_split": ""})
  with pytest.raises(InputError, match="task='single' needs examples with"):
    _step(config)
