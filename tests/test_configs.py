"""What the configs of public weights say, and that they measure."""

import jax
import numpy as np
from PIL import Image
import pytest

from configs import imagenet
import eval as eval_script
from jaxshape import system as system_lib
from jaxshape import weights
from jaxshape.backbones import efficientnet, registry
from jaxshape.engine import command, pytorch
from jaxshape.errors import InputError
from jaxshape.metrics import categories

NETWORKS = [mode for mode in imagenet.MODES if mode != "tiny"]


def test_every_mode_is_a_network_that_can_be_made():
  assert set(NETWORKS) <= set(registry.names())
  for mode in NETWORKS:
    config = imagenet.get_config(mode)
    assert config.backbone == mode
    assert config.data.options.resize_to > config.data.image_size


def test_preprocessing_is_that_of_the_weights():
  # As published: torchvision's, and of efficientnet-lite-pytorch.
  config = imagenet.get_config("resnet50")
  assert (config.data.image_size, config.data.options.resize_to) == (224, 256)
  assert config.data.options.interpolation == "bilinear"
  np.testing.assert_allclose(np.divide(config.mean, 255), (0.485, 0.456, 0.406))
  np.testing.assert_allclose(np.divide(config.std, 255), (0.229, 0.224, 0.225))
  config = imagenet.get_config("efficientnet_lite2")
  assert config.data.image_size == 260
  assert config.data.options.interpolation == "bicubic"
  np.testing.assert_allclose(np.divide(config.mean, 255), [0.498] * 3)
  np.testing.assert_allclose(np.divide(config.std, 255), [0.502] * 3)
  published = efficientnet.PREPROCESSING["efficientnet_b3"]
  assert imagenet.get_config("efficientnet_b3").mean == published.mean


def _small():
  config = imagenet.get_config("resnet18")
  config.backbone, config.width = "resnet8", 4
  config.data.image_size = 32
  config.batch_size = 8
  config.bench.saliency = ()
  config.bench.dimensionality = ""
  return config


@pytest.fixture(scope="module")
def stimuli(tmp_path_factory):
  root = tmp_path_factory.mktemp("stimuli")
  draw = np.random.default_rng(0)
  names = categories.CATEGORIES[:4]
  for k in range(12):
    shape, texture = names[k % 4], names[(k + 1 + k // 4) % 4]
    for split, name in (
      ("cue_conflict", f"{shape}{k}-{texture}{k}"),
      ("edges", f"{shape}{k}"),
      ("silhouettes", f"{shape}{k}"),
    ):
      path = root / split / shape / f"{name}.png"
      path.parent.mkdir(parents=True, exist_ok=True)
      Image.fromarray(draw.integers(0, 256, (32, 32, 3), np.uint8)).save(path)
  return root


def test_a_file_of_weights_becomes_a_run_that_is_measured(tmp_path, stimuli):
  config = _small().lock()
  system = system_lib.load(config)
  state = jax.jit(system.init)(jax.random.key(1))
  pytorch.save(tmp_path / "net.pth", system.weights.save(state))
  run = tmp_path / "run"
  weights.load(config, [tmp_path / "net.pth"], run)
  stored = command.read_config(run)
  assert stored.data.options.interpolation == "bilinear"
  # Nothing is at hand yet.
  assert eval_script.evaluate(stored, run).metrics == {}
  with stored.unlocked():
    stored.bench.stimuli = f"cue_conflict:{stimuli}"
  result = eval_script.evaluate(stored, run)
  groups = {name.partition("/")[0] for name in result.metrics}
  assert groups == {"cue_conflict", "stimuli_edges", "stimuli_silhouettes"}
  assert result.metrics["cue_conflict/decided_share"] <= 1
  assert set(result.pictures) >= {
    "cue_conflict-by class",
    "cue_conflict-published",
    "cue_conflict-decisions",
  }
  with stored.unlocked():
    stored.bench.cue_conflict = "cue_conflicts"
  with pytest.raises(InputError, match="did you mean cue_conflict"):
    eval_script.evaluate(stored, run)
