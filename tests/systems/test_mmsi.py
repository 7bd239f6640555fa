import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from configs import mmsi as configs
from jaxshape import system as system_lib
from jaxshape.backbones import resnet, style_transfer, vgg
from jaxshape.data import styles
from jaxshape.engine import classifiers, pytorch
from jaxshape.errors import InputError
from jaxshape.filters import stylization
from jaxshape.layers import apply
from jaxshape.systems import mmsi

RNG = np.random.default_rng(0)
KEY = jax.random.key(3)


def _config(mode="tiny", **changes):
  """A mode, with the paper's weight and form of the loss."""
  config = configs.get_config(mode)
  paper = {"weights.mutual": 0.8, "mutual.axis": "channel"}
  config.update_from_flattened_dict({**paper, **changes})
  return config.lock()


def _batch(n=4, size=16, side=12):
  draw = np.random.default_rng(1)
  return {
    "image": draw.integers(0, 256, (n, size, size, 3), np.uint8),
    "style": draw.integers(0, 256, (n, 2, side, side, 3), np.uint8),
    "label": np.arange(n, dtype=np.int32),
  }


def _entropy(logits, labels, smoothing):
  x = np.float64(logits)
  log = x - np.log(np.exp(x).sum(-1, keepdims=True))
  rows = np.arange(len(x))
  return -(1 - smoothing) * log[rows, labels] - smoothing * log.mean(-1)


def _mmsi(a, b, axis):
  """Eq. 2, one correlation at a time."""
  pairs = (
    zip(a, b, strict=True) if axis == "channel" else zip(a.T, b.T, strict=True)
  )
  rho = np.array([np.corrcoef(x, y)[0, 1] for x, y in pairs])
  return (0.5 * np.log(1 - rho**2)).mean()


def _seen(names, stages=1, channels=6):
  draw = lambda *shape: RNG.normal(size=shape).astype(np.float32)
  return {
    name: mmsi.Seen(
      jnp.asarray(draw(4, 5)),
      tuple(jnp.asarray(draw(4, channels + i)) for i in range(stages)),
    )
    for name in names
  }


@pytest.mark.parametrize("axis", ["channel", "batch"])
@pytest.mark.parametrize("stages", [1, 3])
def test_the_objective_is_equation_4(axis, stages):
  seen = _seen(("x", "s", "s'"), stages)
  labels = np.array([0, 3, 1, 4])
  config = _config(**{"mutual.axis": axis, "label_smoothing": 0.1})
  got, metrics = mmsi.objective(config, seen, {"label": labels})
  entropy = {
    name: _entropy(view.logits, labels, 0.1).mean()
    for name, view in seen.items()
  }
  mutual = np.mean(
    [
      _mmsi(np.float64(a), np.float64(b), axis)
      for a, b in zip(seen["s"].latents, seen["s'"].latents, strict=True)
    ]
  )
  want = entropy["x"] + 0.8 * mutual + 0.1 * entropy["s"] + 0.1 * entropy["s'"]
  np.testing.assert_allclose(got, want, rtol=1e-5)
  np.testing.assert_allclose(metrics["mutual_information"], -mutual, rtol=1e-4)
  right = {n: (v.logits.argmax(-1) == labels).mean() for n, v in seen.items()}
  np.testing.assert_allclose(metrics["top1"], right["x"])
  np.testing.assert_allclose(
    metrics["top1_stylized"], (right["s"] + right["s'"]) / 2
  )


def test_schemes_are_choices_of_the_weights():
  seen, batch = _seen(("x", "s", "s'")), {"label": np.array([2, 0, 1, 4])}
  entropy = {
    n: _entropy(v.logits, batch["label"], 0.0).mean() for n, v in seen.items()
  }
  mutual = _mmsi(
    *(np.float64(seen[n].latents[0]) for n in ("s", "s'")), "channel"
  )
  styled = {n: seen[n] for n in ("s", "s'")}
  sin = (entropy["s"] + entropy["s'"]) / 2
  for mode, views, changes, want in (
    ("small_sin", styled, {}, sin + 0.8 * mutual),
    ("small_sin", styled, {"weights.mutual": 0.0}, sin),
    ("small_finetune", {"x": seen["x"]}, {}, entropy["x"]),
    (
      "small", seen, {"weights.mutual": 0.0},
      entropy["x"] + 0.1 * (entropy["s"] + entropy["s'"]),
    ),
  ):  # fmt: skip
    got, _ = mmsi.objective(_config(mode, **changes), views, batch)
    np.testing.assert_allclose(got, want, rtol=1e-5, err_msg=mode)


def test_a_step_weighs_the_views_of_the_augmented_image():
  # Always flipped, so that nothing is left to draw.
  flip = {"horizontal_flip": {"probability": 1.0}}
  config = _config(
    **{
      "augment": ml_collections.ConfigDict(flip),
      "mutual.stages": (1, -1),
      "optimizer.warmup_steps": 0,
    }
  )
  system, batch = system_lib.load(config), _batch()
  state = jax.jit(system.init)(jax.random.key(0))
  net = classifiers.network(config, num_classes=16)
  normalize = classifiers.normalizer(config)
  flipped = np.float32(batch["image"][:, :, ::-1])
  draw = mmsi.stylizer(config.style)
  views = {"x": jnp.asarray(flipped)} | {
    name: draw(flipped, batch["style"][:, i])
    for i, name in enumerate(("s", "s'"))
  }

  @jax.jit
  def by_hand(images):
    # All views in one batch, in another order than the system has them.
    call = functools.partial(
      apply.apply, net, state.params["net"], state.extra["net"]
    )
    features, _ = call(
      normalize(images), method="stages", train=True, update=True
    )
    logits, _ = call(features[-1], method="head")
    part = lambda y, i: y[4 * i : 4 * i + 4]
    seen = {
      name: mmsi.Seen(
        part(logits, i),
        tuple(part(features[k], i).mean((1, 2)) for k in (0, 2)),
      )
      for i, name in enumerate(views)
    }
    return mmsi.objective(config, seen, batch)[0]

  after, metrics = jax.jit(system.train_step)(state, batch, KEY)
  want = by_hand(jnp.concatenate(list(views.values())))
  np.testing.assert_allclose(metrics["net/loss"], want, rtol=1e-4)
  # It would be seen if the styles were laid on what is not flipped.
  views["s"] = draw(np.float32(batch["image"]), batch["style"][:, 0])
  other = by_hand(jnp.concatenate(list(views.values())))
  assert abs(float(other) - float(want)) > 1e-3
  assert metrics["net/finite"] == 1
  kernel = lambda s: np.asarray(s.params["net"]["conv1"]["kernel"])
  assert np.abs(kernel(after) - kernel(state)).max() > 1e-5


def test_separate_views_are_normalized_by_themselves():
  net = resnet.ResNet((1,), "basic", 5, width=4, stem="small")
  images = {
    name: jnp.asarray(RNG.normal(i, 1 + i, (3, 6, 6, 3)), jnp.float32)
    for i, name in enumerate(("x", "s", "s'"))
  }
  params, start = apply.init(net, KEY, images["x"], train=False)

  @functools.partial(jax.jit, static_argnames="separate")
  def see(given, *, separate):
    images = {name: given[name] for name in ("x", "s", "s'")}  # In order.
    return mmsi._see(net, params, start, images, stages=(0,), separate=separate)

  @jax.jit
  def forward(view, collections):
    features, collections = apply.apply(
      net, params, collections, view, method="features", train=True, update=True
    )
    return features.mean((1, 2)), collections

  got, statistics = see(images, separate=True)
  collections = start
  for name, view in images.items():
    z, collections = forward(view, collections)
    np.testing.assert_allclose(got[name].latents[0], z, rtol=1e-4, atol=1e-5)
  for x, y in zip(
    jax.tree.leaves(statistics), jax.tree.leaves(collections), strict=True
  ):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
  joint, _ = see(images, separate=False)
  assert np.abs(joint["s"].logits - got["s"].logits).max() > 1e-2
  together, _ = forward(
    jnp.concatenate([images[n] for n in ("s'", "x", "s")]), start
  )
  np.testing.assert_allclose(
    joint["s'"].latents[0], together[:3], rtol=1e-4, atol=1e-5
  )
  np.testing.assert_allclose(
    joint["s"].latents[0], together[6:], rtol=1e-4, atol=1e-5
  )


def test_the_term_counts_from_its_step_on():
  options = {"mutual.start": 2, "accumulate": 2, "optimizer.warmup_steps": 0}
  system, batch = system_lib.load(_config(**options)), _batch()
  state, step = system.init(jax.random.key(0)), jax.jit(system.train_step)
  losses = {}
  for number in (1, 2):
    _, metrics = step(state.replace(step=jnp.int32(number)), batch, KEY)
    losses[number] = metrics["net/loss"]
  shared = metrics["net/mutual_information"]
  assert shared > 0.01
  np.testing.assert_allclose(losses[2], losses[1] - 0.8 * shared, rtol=1e-4)


def test_twins_see_the_same_images_and_styles():
  batches = []
  for mutual in (0.8, 0.0):
    stream = system_lib.load(
      _config(**{"weights.mutual": mutual, "style.options.count": 4})
    ).train_data(1)
    batches.append(next(stream))
    stream.close()
  for name in ("image", "style", "label"):
    np.testing.assert_array_equal(batches[0][name], batches[1][name])
  assert batches[0]["style"].shape == (16, 2, 32, 32, 3)
  pool = styles.open_styles("generated", image_size=32, count=4)
  known = {pool[i]["image"].tobytes() for i in range(4)}
  for pair in batches[0]["style"]:
    a, b = (style.tobytes() for style in pair)
    assert a != b
    assert {a, b} <= known


def test_originals_alone_need_no_styles():
  config = _config(
    **{
      "weights.mutual": 0.0,
      "weights.stylized": 0.0,
      "style.source": "folder:/no/such/folder",
    }
  )
  stream = system_lib.load(config).train_data(0)
  batch = next(stream)
  stream.close()
  assert "style" not in batch
  config = _config(**{"style.source": "folder:/no/such/folder"})
  with pytest.raises(InputError, match="no folder /no/such/folder"):
    system_lib.load(config).train_data(0)


def test_styles_are_matched_by_statistics_as_strongly_as_is_asked():
  batch = _batch(2)
  draw = mmsi.stylizer(_config(**{"style.alpha": 0.5, "style.scale": 4}).style)
  want = stylization.match_statistics(
    batch["image"], batch["style"][:, 0], strength=0.5, scale=4
  )
  np.testing.assert_array_equal(
    draw(batch["image"], batch["style"][:, 0]), want
  )


def test_styles_are_drawn_by_networks_from_files(tmp_path):
  nets = {"encoder": vgg.Encoder(2), "decoder": vgg.Decoder(2)}
  inputs = {
    "encoder": jnp.zeros((1, 16, 16, 3)), "decoder": jnp.zeros((1, 2, 2, 16))
  }  # fmt: skip
  tensors, options = {}, {"style.method": "adain", "style.alpha": 0.5}
  for name, net in nets.items():
    params, _ = apply.init(net, KEY, inputs[name])
    tensors[name] = vgg.to_state_dict(net, params, {})
    path = tmp_path / f"{name}.safetensors"
    pytorch.save(path, tensors[name])
    options[f"style.{name}_weights"] = str(path)
  batch = _batch(2)
  draw = mmsi.stylizer(_config(**options).style)
  stylize = style_transfer.stylizer(style_transfer.style_params(**tensors))
  image, style = batch["image"], batch["style"][:, 0]
  want = stylize(image, style, alpha=0.5)
  np.testing.assert_array_equal(draw(image, style), want)
  # It may be asked for first while a step is traced, and stay.
  system = system_lib.load(_config(**options))
  state = jax.eval_shape(system.init, KEY)
  for _ in range(2):
    jax.eval_shape(system.train_step, state, batch, KEY)
  (tmp_path / "decoder.safetensors").unlink()
  with pytest.raises(InputError, match="decoder"):
    system_lib.load(_config(**options)).train_data(0)
  options["style.encoder_weights"] = ""
  with pytest.raises(InputError, match="encoder_weights must be a file"):
    system_lib.load(_config(**options)).train_data(0)


@pytest.mark.parametrize(
  ("name", "value", "message"),
  [
    ("weights.mutual", -0.1, "weights.mutual must be a number .*-0.1"),
    ("weights.original", float("nan"), "weights.original must be .*nan"),
    ("weights.stylized", float("inf"), "weights.stylized must be .*inf"),
    ("mutual.axis", "neuron", "mutual.axis must be one of channel, batch"),
    ("mutual.stages", (), r"mutual.stages must be some of the 3 .*got \(\)"),
    ("mutual.stages", (0,), r"mutual.stages must be .*got \(0,\)"),
    ("mutual.stages", (1, 4), r"mutual.stages must be .*got \(1, 4\)"),
    ("mutual.start", -1, "mutual.start must be a step before .*-1"),
    ("mutual.start", 6, "mutual.start must be .* config.steps=6, got 6"),
    ("mutual.epsilon", 1.0, "mutual.epsilon must be .*1.0"),
    ("style.method", "paint", "style.method must be one of .*'paint'"),
    ("style.alpha", 1.5, r"style.alpha must be in 0\.\.1, got 1.5"),
    ("style.scale", 3, "style.scale must be 0 .*at least 4, got 3"),
    ("style.image_size", -1, "style.image_size must be 0 .*-1"),
    ("dtype", "float64", "dtype must be one of"),
  ],
)
def test_what_does_not_fit_is_refused_before_training(name, value, message):
  with pytest.raises(InputError, match=message):
    system_lib.load(_config(**{name: value}))


def test_a_network_that_no_label_reaches_is_refused():
  config = _config(**{"weights.original": 0.0, "weights.stylized": 0.0})
  with pytest.raises(InputError, match="knows the labels"):
    system_lib.load(config)


def test_stages_count_from_either_end():
  for names, want in (((-1,), (2,)), ((3, 1), (0, 2)), ((-2, 2, 3), (1, 2))):
    assert mmsi._stages(_config(**{"mutual.stages": names}), 3) == want
