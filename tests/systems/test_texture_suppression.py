import collections

import chex
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from PIL import Image
import pytest
from scipy import ndimage

from configs import texture_suppression as configs
from jaxshape import system as system_lib
from jaxshape.data import textured_shapes
from jaxshape.engine import checkpoints, pytorch, runtime
from jaxshape.errors import InputError
from jaxshape.filters import (
  bilateral,
  cartoon,
  diffusion,
  median,
  stylization,
)
from jaxshape.systems import texture_suppression

IMAGES = np.random.default_rng(0).integers(0, 256, (24, 8, 10, 3), np.uint8)
KEY = jax.random.key(3)


def _suppression(**changes):
  config = configs.get_config("tiny").suppression
  config.update(changes)
  return config


def _suppress(key=KEY, images=IMAGES, filtered=None, **changes):
  batch = {"image": images, "label": np.arange(len(images))}
  if filtered is not None:
    batch["filtered"] = filtered
  out = texture_suppression.suppress(_suppression(**changes), key, batch)
  assert out.keys() == batch.keys()
  np.testing.assert_array_equal(out["label"], batch["label"])
  assert out["image"].dtype == jnp.float32
  return np.asarray(out["image"])


def _config(**changes):
  config = configs.get_config("tiny")
  config.update_from_flattened_dict(changes)
  return config.lock()


def _diffused(iterations, kappa=20.0):
  return np.asarray(
    diffusion.perona_malik(
      np.float32(IMAGES), kappa=kappa, step_size=0.1, iterations=iterations
    )
  )


def _batch(n=8, size=32):
  draw = np.random.default_rng(1)
  return {
    "image": draw.integers(0, 256, (n, size, size, 3), np.uint8),
    "label": np.arange(n, dtype=np.int32),
    "filtered": np.float32(np.arange(n) % 2),
  }


def _step(config, batch):
  system = system_lib.load(config)
  state = jax.jit(system.init)(jax.random.key(0))
  return state, *jax.jit(system.train_step)(state, batch, KEY)


def test_original_images_stay_as_they_are():
  np.testing.assert_array_equal(_suppress(policy="original"), IMAGES)


def test_filtered_images_are_diffused_for_a_drawn_number_of_iterations():
  got = _suppress(policy="filtered", iterations=(2, 4))
  known = np.stack([_diffused(n) for n in (2, 3, 4)])
  distance = np.abs(known - got).max((2, 3, 4))  # [iterations, images]
  np.testing.assert_allclose(distance.min(0), 0, atol=1e-3)
  drawn = distance.argmin(0)
  assert set(drawn) == {0, 1, 2}  # Both ends, and each image its own.
  assert (np.sort(distance, axis=0)[1] > 1).all()


def test_the_filters_options_are_those_of_the_config():
  options = {"kappa": 50.0, "step_size": 0.2, "conduction": "rational"}
  got = _suppress(policy="filtered", iterations=(3, 3), **options)
  want = diffusion.perona_malik(np.float32(IMAGES), iterations=3, **options)
  np.testing.assert_allclose(got, want, atol=1e-3)
  assert np.abs(got - _diffused(3)).max() > 1


def test_the_union_filters_the_marked_copies_alone():
  marks = np.float32(np.arange(24) % 3 == 0)
  got = _suppress(filtered=marks, policy="union", iterations=(3, 3))
  want = np.where(marks[:, None, None, None] > 0, _diffused(3), IMAGES)
  np.testing.assert_allclose(got, want, atol=1e-3)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_share_of_the_images_is_filtered(share):
  images = np.resize(IMAGES[:, :4, :4], (500, 4, 4, 3))
  got = _suppress(images=images, policy="probability", probability=share)
  changed = np.abs(got - images).max((1, 2, 3)) > 1e-3
  # Four standard deviations of a binomial draw.
  assert abs(changed.mean() - share) <= 4 * np.sqrt(share * (1 - share) / 500)


def test_gaussian_blur_is_scipys_of_a_drawn_width():
  got = _suppress(policy="filtered", filter="gaussian", sigma=(1.5, 1.5))
  for image, blurred in zip(np.float64(IMAGES), got, strict=True):
    want = ndimage.gaussian_filter(
      image, (1.5, 1.5, 0), mode="mirror", radius=(6, 6, 0)
    )
    np.testing.assert_allclose(blurred, want, atol=1e-2)
  # What is left of a point tells the width.
  point = np.zeros((32, 33, 33, 3), np.float32)
  point[:, 16, 16] = 255
  got = _suppress(
    images=point, policy="filtered", filter="gaussian", sigma=(1.0, 2.0)
  )
  x = np.arange(-8, 9)
  peak = lambda s: 255 / np.exp(-(x**2) / (2 * s * s)).sum() ** 2
  peaks = got[:, 16, 16, 0]
  assert peak(2.0) - 1e-2 <= peaks.min() < peak(1.7)
  assert peak(1.3) < peaks.max() <= peak(1.0) + 1e-2


FILTERS = {
  "robust": lambda x: diffusion.robust(x, iterations=4),
  "bilateral": lambda x: bilateral.bilateral(
    x, diameter=5, sigma_color=50.0, sigma_space=3.0
  ),
  "median": lambda x: median.median(x, size=3),
  "cartoon": lambda x: cartoon.cartoon(x, preset="strong"),
}


@pytest.mark.parametrize("name", FILTERS)
def test_other_filters_are_options(name):
  marks = np.float32(np.arange(24) % 2)
  got = _suppress(
    filtered=marks,
    policy="union",
    filter=name,
    iterations=(4, 4),
    diameter=5,
    sigma_color=(50.0, 50.0),
    sigma_space=3.0,
    size=3,
    preset="strong",
  )
  want = np.array(FILTERS[name](np.float32(IMAGES)))
  want[::2] = IMAGES[::2]
  np.testing.assert_allclose(got, want, atol=1e-3)


@pytest.mark.parametrize("policy", ["filtered", "probability"])
def test_draws_are_a_function_of_the_key(policy):
  a, b, c = (
    _suppress(key=jax.random.key(seed), policy=policy) for seed in (1, 1, 2)
  )
  np.testing.assert_array_equal(a, b)
  assert (a != c).any()


def test_an_epoch_of_the_union_has_every_image_twice():
  system = system_lib.load(_config())
  batches = system.train_data(0)
  epoch = [next(batches) for _ in range(5)]  # 2 x 40 images in batches of 16.
  batches.close()
  images = np.concatenate([batch["image"] for batch in epoch])
  marks = np.concatenate([batch["filtered"] for batch in epoch])
  seen = collections.Counter(
    (image.tobytes(), float(mark))
    for image, mark in zip(images, marks, strict=True)
  )
  assert set(seen.values()) == {1}
  assert len({image for image, _ in seen}) == 40
  assert not (marks[:40] == marks[0]).all()  # Shuffled as one epoch.


def test_other_policies_see_every_image_once():
  system = system_lib.load(_config(**{"suppression.policy": "filtered"}))
  batches = system.train_data(0)
  images = np.concatenate([next(batches)["image"] for _ in range(5)])[:40]
  batches.close()
  assert len({image.tobytes() for image in images}) == 40


def test_a_step_of_the_union_is_one_on_data_that_were_filtered_before():
  options = {"suppression.iterations": (3, 3), "optimizer.warmup_steps": 0}
  batch = _batch()
  before, got, metrics = _step(_config(**options), batch)
  filtered = diffusion.perona_malik(np.float32(batch["image"]), iterations=3)
  marked = batch["filtered"][:, None, None, None] > 0
  batch["image"] = np.where(marked, filtered, batch["image"])
  plain = _config(**options, **{"suppression.policy": "original"})
  _, want, expected = _step(plain, batch)
  np.testing.assert_allclose(
    metrics["net/loss"], expected["net/loss"], rtol=1e-5
  )
  kernel = lambda state: np.asarray(state.params["net"]["fc"]["kernel"])
  np.testing.assert_allclose(kernel(got), kernel(want), atol=1e-5)
  assert np.abs(kernel(got) - kernel(before)).max() > 1e-3


def test_predictions_do_not_depend_on_the_suppression():
  systems = [
    system_lib.load(_config(**{"suppression.policy": policy}))
    for policy in ("original", "filtered")
  ]
  state = jax.jit(systems[0].init)(jax.random.key(0))
  a, b = (jax.jit(s.predict)(state, _batch()) for s in systems)
  assert a.shape == (8, len(textured_shapes.CLASSES))
  np.testing.assert_array_equal(a, b)


def test_the_filtered_split_is_seen_through_the_strongest_filter():
  system = system_lib.load(_config())
  state = jax.jit(system.init)(jax.random.key(0))
  batch = {**_batch(), "mask": np.ones(8, np.float32)}
  got = jax.jit(system.evaluators["filtered_test"].step)(state, batch)
  batch["image"] = np.asarray(
    diffusion.perona_malik(np.float32(batch["image"]), iterations=4)
  )
  want = jax.jit(system.evaluators["test"].step)(state, batch)
  for name in ("confidence", "entropy"):
    np.testing.assert_allclose(got[name], want[name], rtol=1e-4)


def test_corruptions_are_measured_on_examples_that_were_drawn():
  config = _config(
    **{"bench.corruption_examples": 10, "bench.severities": (1, 5)}
  )
  evaluator = system_lib.load(config).evaluators["corruption"]
  whole = system_lib.load(_config()).evaluators["test"].data()
  images = np.concatenate([b["image"][b["mask"] > 0] for b in whole])
  place = {image.tobytes(): i for i, image in enumerate(images)}
  assert len(place) == 40
  drawn = collections.defaultdict(list)
  for batch in evaluator.data():
    for row in np.flatnonzero(batch["mask"]):
      drawn[int(batch["corruption"][row])].append(
        place[batch["image"][row].tobytes()]
      )
  assert set(drawn) == {0, 1, 2, 3}  # Two kinds by two severities.
  assert all(rows == drawn[0] for rows in drawn.values())
  assert len(set(drawn[0])) == 10
  assert max(drawn[0]) > 10  # Not those at the beginning.


def test_half_precision_trains_parameters_in_full():
  config = _config(dtype="bfloat16", **{"optimizer.warmup_steps": 0})
  before, after, metrics = _step(config, _batch())
  assert metrics["net/finite"] == 1
  assert np.isfinite(metrics["net/loss"])
  for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
    assert x.dtype == y.dtype
    assert y.dtype in (jnp.float32, jnp.int32)
  system = system_lib.load(config)
  logits = jax.jit(system.predict)(after, _batch())
  assert logits.dtype == jnp.float32
  assert jnp.isfinite(logits).all()


def test_fine_tuning_takes_everything_but_the_optimizer(tmp_path):
  system = system_lib.load(_config())
  state = jax.jit(system.init)(jax.random.key(0))
  state = state.replace(
    step=jnp.int32(7),
    extra=jax.tree.map(lambda x: x + 0.5, state.extra),
    opt_state=jax.tree.map(lambda x: x + 1, state.opt_state),
  )
  saved = checkpoints.Checkpoints(tmp_path)
  saved.save(state, config=_config().to_dict(), metrics={})
  saved.wait()
  assert configs.get_config("small_finetune").suppression.policy == "original"
  tuned = system_lib.load(_config(**{"suppression.policy": "original"}))
  fresh = jax.jit(tuned.init)(jax.random.key(1))
  got, report = checkpoints.initialize_from(fresh, tmp_path)
  for part in ("params", "extra"):
    for x, y in zip(
      jax.tree.leaves(getattr(got, part)),
      jax.tree.leaves(getattr(state, part)),
      strict=True,
    ):
      np.testing.assert_array_equal(x, y)
  assert int(got.step) == 0
  for x, y in zip(
    jax.tree.leaves(got.opt_state),
    jax.tree.leaves(fresh.opt_state),
    strict=True,
  ):
    np.testing.assert_array_equal(x, y)
  assert "left as they were" not in report


def test_only_the_data_to_evaluate_are_enough_to_know_the_classes(tmp_path):
  for name in ("cat", "dog", "emu"):
    folder = tmp_path / "pets" / "test" / name
    folder.mkdir(parents=True)
    Image.fromarray(IMAGES[0]).save(folder / "0.png")
  options = {
    "data.source": f"folder:{tmp_path / 'pets'}",
    "data.eval_splits": ("test",),
    "data.options": ml_collections.ConfigDict(),
  }
  config = _config(**options)
  system = system_lib.load(config)
  state = jax.eval_shape(system.init, jax.random.key(0))
  assert state.params["net"]["fc"]["kernel"].shape[-1] == 3
  with pytest.raises(InputError, match="pets"):
    system.train_data(0)
  with pytest.raises(InputError, match="pets"):
    system_lib.load(_config(**{**options, "data.eval_splits": ()}))


@pytest.mark.parametrize("width", [(0.0, 0.0), (10.0, 20.0)])
def test_any_width_of_the_blur_fits(width):
  options = {"suppression.filter": "gaussian", "suppression.sigma": width}
  system = system_lib.load(_config(**options))
  state = jax.eval_shape(system.init, jax.random.key(0))
  batch = {**_batch(), "mask": np.ones(8, np.float32)}
  jax.eval_shape(system.evaluators["filtered_test"].step, state, batch)


@pytest.mark.parametrize(
  ("name", "value", "message"),
  [
    ("policy", "both", "policy must be one of original, union.*'both'"),
    ("filter", "blur", "filter must be one of perona_malik, robust.*'blur'"),
    ("iterations", (4, 2), r"iterations must be a range.*\(4, 2\)"),
    ("iterations", (-1, 2), r"iterations must be a range.*\(-1, 2\)"),
    ("iterations", (2, 3, 4), r"iterations must be a range.*\(2, 3, 4\)"),
    ("sigma", (3.0, 1.0), r"sigma must be a range.*\(3.0, 1.0\)"),
    ("probability", 1.5, r"probability must be in 0..1, got 1.5"),
    ("kappa", 0.0, "kappa must be above 0, got 0"),
    ("step_size", 0.5, "step_size must be above 0 and at most 0.25, got 0.5"),
    ("conduction", "cubic", "conduction must be one of .*'cubic'"),
  ],
)
def test_what_does_not_fit_is_refused_before_training(name, value, message):
  with pytest.raises(InputError, match=message):
    system_lib.load(_config(**{f"suppression.{name}": value}))


def test_styles_of_a_batch_are_no_measure_of_a_network():
  system = system_lib.load(_config(**{"suppression.filter": "stylized"}))
  assert "filtered_test" not in system.evaluators
  images = _batch()["image"]
  got = _suppress(images=images, policy="filtered", filter="stylized")
  want = stylization.match_statistics(
    np.float32(images), np.float32(np.roll(images, 1, axis=0))
  )
  np.testing.assert_allclose(got, want, atol=1e-2)


def test_weights_have_the_names_of_the_backbones_public_code(tmp_path):
  system = system_lib.load(_config())
  state = jax.jit(system.init)(KEY)
  tensors = system.weights.save(state)
  assert {"conv1.weight", "bn1.running_var", "fc.bias"} <= tensors.keys()
  other = system.weights.load(jax.jit(system.init)(jax.random.key(4)), tensors)
  chex.assert_trees_all_equal(other.params, state.params)
  # Another task begins with all but the head.
  path = tmp_path / "a.safetensors"
  pytorch.save(path, tensors)
  tuned = system_lib.load(_config(pretrained=str(path)))
  begun = jax.jit(tuned.init)(jax.random.key(5))
  ours, theirs = dict(begun.params["net"]), dict(state.params["net"])
  assert np.abs(ours.pop("fc")["kernel"] - theirs.pop("fc")["kernel"]).max() > 0
  chex.assert_trees_all_equal(ours, theirs)
  # A run is read from its checkpoint, also where the file is gone.
  path.unlink()
  tuned = system_lib.load(_config(pretrained=str(path)))
  mesh = runtime.make_mesh({"data": -1, "model": 1})
  shapes = runtime.abstract_state(tuned.init, KEY, mesh)
  chex.assert_trees_all_equal_shapes_and_dtypes(shapes.params, begun.params)
  with pytest.raises(InputError, match=r"a\.safetensors is not there"):
    tuned.init(KEY)


def test_what_a_file_leaves_out_is_fresh(tmp_path):
  # Of a VGG network no linear layer is taken, not the last one alone.
  options = {"backbone": "vgg11", "width": 2, "stem": ""}
  system = system_lib.load(_config(**options))
  state = jax.jit(system.init)(KEY)
  path = tmp_path / "a.safetensors"
  pytorch.save(path, system.weights.save(state))
  tuned = system_lib.load(_config(pretrained=str(path), **options))
  begun = jax.jit(tuned.init)(jax.random.key(5))
  chex.assert_trees_all_equal_shapes(begun.params, state.params)
  ours, theirs = begun.params["net"], state.params["net"]
  for name in ours:
    same = (ours[name]["kernel"] == theirs[name]["kernel"]).all()
    assert same == (not name.startswith("fc")), name
