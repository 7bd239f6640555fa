import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import adain as configs
from jaxshape import system as system_lib
from jaxshape import weights
from jaxshape.backbones import vgg
from jaxshape.engine import pytorch
from jaxshape.errors import InputError
from jaxshape.systems import adain
from tests.backbones import test_vgg

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)


def made(**changes):
  config = configs.get_config("tiny")
  config.update(changes)
  return config.lock()


def spread(x):
  return np.sqrt(x.var((1, 2), ddof=1) + 1e-5)


# Golden.


def test_losses_equal_the_formulas():
  layers = [RNG.normal(size=(2, 4, 5, 3)), RNG.normal(size=(2, 2, 3, 6))]
  wanted = [RNG.normal(size=(2, 3, 3, 3)), RNG.normal(size=(2, 2, 2, 6))]
  layers, wanted = (
    [x.astype(np.float32) for x in group] for group in (layers, wanted)
  )
  got = adain.style_loss(layers, wanted)
  want = sum(
    ((a.mean((1, 2)) - b.mean((1, 2))) ** 2).mean(1)
    + ((spread(a) - spread(b)) ** 2).mean(1)
    for a, b in zip(layers, wanted, strict=True)
  )
  np.testing.assert_allclose(got, want, rtol=1e-5)
  got = adain.content_loss(layers[0], layers[0] + np.float32(2))
  np.testing.assert_allclose(got, [4, 4], rtol=1e-5)


def test_the_loss_of_a_step_is_that_of_the_whole_path():
  config = made(crop=0)
  system = system_lib.load(config)
  state = jax.jit(system.init)(KEY)
  batch = {
    "image": RNG.integers(0, 256, (2, 32, 32, 3), np.uint8),
    "style": RNG.integers(0, 256, (2, 1, 32, 32, 3), np.uint8),
  }
  _, metrics = jax.jit(system.train_step)(state, batch, KEY)
  params = jax.tree.map(np.asarray, adain.params_of(state))
  encode = lambda x: test_vgg.encode(params["encoder"], x)
  content, style = (
    encode(batch["image"] / 255),
    encode(batch["style"][:, 0] / 255),
  )
  c, s = content[-1], style[-1]
  mean = lambda x: x.mean((1, 2), keepdims=True)
  target = (c - mean(c)) / spread(c)[:, None, None]
  target = target * spread(s)[:, None, None] + mean(s)
  seen = encode(test_vgg.decode(params["decoder"], target))
  content_loss = ((seen[-1] - target) ** 2).mean()
  style_loss = sum(
    ((a.mean((1, 2)) - b.mean((1, 2))) ** 2).mean()
    + ((spread(a) - spread(b)) ** 2).mean()
    for a, b in zip(seen, style, strict=True)
  )
  for name, want in {
    "content_loss": content_loss,
    "style_loss": style_loss,
    "loss": content_loss + 10 * style_loss,
  }.items():
    got = metrics[f"decoder/{name}"]
    np.testing.assert_allclose(got, want, rtol=2e-3, err_msg=name)


# Laws.


def test_random_crops_are_parts_of_their_images():
  rows, columns = np.mgrid[:12, :12].astype(np.float32)
  images = np.stack([rows, columns, 0 * rows], -1)
  images = np.stack([images + np.float32([0, 0, i]) for i in range(6)])
  crop = jax.jit(lambda key: adain._random_crop(key, jnp.asarray(images), 5))
  got = np.asarray(crop(KEY))
  corners = set()
  for i, part in enumerate(got):
    top, left = part[0, 0, :2].astype(int)
    want = images[i, top : top + 5, left : left + 5]
    np.testing.assert_array_equal(part, want)
    corners.add((top, left))
  assert len(corners) > 1
  center = adain._center_crop(jnp.asarray(images), 6)
  np.testing.assert_array_equal(center, images[:, 3:9, 3:9])


# Public weights.


def tensors(width):
  return {
    name: vgg.to_state_dict(net, test_vgg.drawn(net)[0], {})
    for name, net in (
      ("vgg_normalised", vgg.Encoder(width)),
      ("decoder", vgg.Decoder(width)),
    )
  }


@pytest.fixture
def files(tmp_path):
  """A folder as the public code has it."""
  for name, content in tensors(2).items():
    pytorch.save(tmp_path / f"{name}.pth", content)
  return tmp_path


def test_public_files_go_into_a_run_and_out_of_it(files):
  report = weights.load(made(), [files], files / "run")
  assert {row.state for row in report.rows} == {"taken"}
  out = weights.save(made(), files / "run", f"{files / 'out'}/")
  assert len(out.rows) == len(report.rows)
  for name in ("vgg_normalised", "decoder"):
    (written,) = pathlib.Path(files / "out").glob(f"{name}*")
    want = pytorch.load(files / f"{name}.pth")
    got = pytorch.load(written)
    assert got.keys() == want.keys()
    for key, value in want.items():
      np.testing.assert_array_equal(got[key], value)
  # What a notebook does with them is what the run does.
  loaded = adain.load(files / "vgg_normalised.pth", files / "decoder.pth")
  own = adain.params_of(report.state)
  jax.tree.map(np.testing.assert_array_equal, loaded, own)


def test_the_encoder_comes_from_its_file_and_stays(files):
  config = made(encoder_weights=str(files / "vgg_normalised.pth"))
  system = system_lib.load(config)
  state = jax.eval_shape(system.init, KEY)
  assert set(state.params) == {"decoder"}
  frozen = adain._frozen(config, vgg.Encoder(2))
  want = pytorch.load(files / "vgg_normalised.pth")["2.weight"]
  kernel = frozen["conv1_1"]["kernel"]
  np.testing.assert_array_equal(kernel.transpose(3, 2, 0, 1), want)


# Refusals.


def test_files_that_do_not_fit_are_refused_by_name(files):
  path = files / "vgg_normalised.pth"
  for changes, message in (
    ({"encoder_weights": str(files / "no.pth")}, "encoder_weights=.*not there"),
    ({"encoder_weights": str(files / "decoder.pth")}, "encoder_weights=.*miss"),
    ({"encoder_weights": str(path), "width": 3}, r"\(2, 3, 3, 3\) instead of"),
  ):
    with pytest.raises(InputError, match=message):
      system_lib.load(made(**changes))
  system = system_lib.load(made())
  state = jax.eval_shape(system.init, KEY)
  with pytest.raises(InputError, match="neither of vgg_normalised nor of deco"):
    system.weights.load(state, {"x.weight": np.ones(1)})


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, got 'int8'"),
    ({"width": 0}, "width must be at least 1, got 0"),
    ({"crop": 40}, r"crop must be 0 .* in 9\.\.config.data.image_size=32, got"),
    ({"crop": 5}, "crop must be"),
    ({"crop": 0, "data": {"image_size": 8}}, "image_size must be at least 9"),
    ({"alpha": 1.5}, "alpha must be within 0..1, got 1.5"),
    ({"weights": {"style": -1.0}}, "weights.style must be 0 or more, got -1"),
    ({"weights": {"content": np.inf}}, "weights.content must be 0 or more"),
    ({"rate_decay": -1.0}, "rate_decay must be 0 or more, got -1"),
  ],
)
def test_configs_are_refused_by_name(changes, message):
  with pytest.raises(InputError, match=message):
    system_lib.load(made(**changes))
