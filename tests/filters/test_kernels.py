import jax
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, params
import jax.numpy as jnp
import numpy as np
import pytest

from jaxshape.filters import diffusion, kernels


def random_planes(*shape, seed=0):
  rng = np.random.default_rng(seed)
  return rng.uniform(0, 255, shape).astype(np.float32)


def simulate(planes, steps, kappa, gamma, conduction):
  """Pallas' simulation of a GPU; it may not find two groups in conflict."""
  got = kernels.diffuse_planes(
    jnp.asarray(planes),
    jnp.asarray(steps),
    1 / jnp.asarray(kappa, jnp.float32),
    jnp.asarray(gamma, jnp.float32),
    conduction=conduction,
    interpret=params.InterpretGPUParams(detect_races=True),
    bound=max(steps),
  )
  got = np.asarray(got)
  assert not gpu_callbacks.get_races().races_found
  return got


def arguments(*shape):
  number = jax.ShapeDtypeStruct(shape[:1], jnp.float32)
  steps = jax.ShapeDtypeStruct(shape[:1], jnp.int32)
  return jax.ShapeDtypeStruct(shape, jnp.float32), steps, number, number


# Golden: the form of XLA.


@pytest.mark.parametrize(
  ("name", "shape", "groups", "steps"),
  [
    # Rows beyond the image, several planes, one of them left as it is.
    ("exponential", (3, 5, 9), 2, [3, 0, 1]),
    # Rows of two pieces, and strips that lie beyond the image as a whole.
    ("rational", (1, 3, 130), 8, [2]),
    # Rows without anything beyond the image, and strips of a single row.
    ("tukey", (1, 2, 128), 2, [2]),
  ],
)
def test_diffuse_planes_equals_perona_malik(
  monkeypatch, name, shape, groups, steps
):
  monkeypatch.setattr(kernels, "_GROUPS", groups)
  planes = random_planes(*shape)
  kappa = np.linspace(30, 90, shape[0])
  gamma = np.linspace(0.2, 0.1, shape[0])
  got = simulate(planes, steps, kappa, gamma, diffusion._CONDUCTIONS[name])
  want = diffusion.perona_malik(
    planes[..., None],
    kappa=kappa,
    step_size=gamma,
    iterations=np.array(steps),
    conduction=name,
  )
  np.testing.assert_allclose(got, want[..., 0], atol=1e-3)
  changed = np.abs(got - planes).max((1, 2))
  np.testing.assert_array_equal(changed > 1, np.array(steps) > 0)


# Laws.


def test_nan_goes_no_further_than_one_pixel_per_iteration(monkeypatch):
  monkeypatch.setattr(kernels, "_GROUPS", 2)
  planes = random_planes(1, 6, 7)
  planes[0, 2, 0] = np.nan
  got = simulate(planes, [2], [20.0], [0.1], diffusion._exponential)[0]
  y, x = np.mgrid[:6, :7]
  np.testing.assert_array_equal(np.isnan(got), abs(y - 2) + x <= 2)


def test_planes_that_fit_are_those_worth_it():
  worth = [(224, 224), (37, 200), (112, 512), (448, 128), (2, 8, 32, 70)]
  too_large = [(225, 225), (256, 256), (8, 513), (1024, 1024)]
  too_small = [(32, 32), (1, 1), (4, 224)]
  assert all(kernels.applies(shape) for shape in worth)
  assert not any(kernels.applies(shape) for shape in too_large + too_small)


# Transforms.


@pytest.mark.parametrize("name", diffusion._CONDUCTIONS)
@pytest.mark.parametrize("size", [(224, 224), (37, 200)])
def test_diffuse_planes_is_lowered_for_gpus(name, size):
  # Without a GPU it is not compiled any further.
  conduction = diffusion._CONDUCTIONS[name]
  filtered = jax.jit(
    lambda *args: kernels.diffuse_planes(*args, conduction=conduction)
  )
  lowered = filtered.trace(*arguments(2, *size)).lower(
    lowering_platforms=("cuda",)
  )
  assert lowered.as_text().count("@mosaic_gpu") == 1


def test_diffuse_planes_is_off_by_default():
  assert kernels.USED is False


def test_no_planes():
  got = kernels.diffuse_planes(
    jnp.zeros((0, 224, 224)),
    jnp.zeros(0, jnp.int32),
    jnp.zeros(0),
    jnp.zeros(0),
    conduction=diffusion._exponential,
  )
  assert got.shape == (0, 224, 224)


# Refusal.


@pytest.mark.parametrize("size", [(256, 256), (8, 513)])
def test_planes_that_do_not_fit_are_refused(size):
  with pytest.raises(ValueError, match=r"^planes must be .*got \d+ x \d+"):
    jax.eval_shape(
      lambda *args: kernels.diffuse_planes(
        *args, conduction=diffusion._exponential
      ),
      *arguments(1, *size),
    )


def test_wrong_shapes_are_refused_by_name():
  planes, steps, number, _ = arguments(2, 8, 128)
  with pytest.raises(TypeError, match="slope"):
    jax.eval_shape(
      lambda *args: kernels.diffuse_planes(
        *args, conduction=diffusion._exponential
      ),
      planes,
      steps,
      jax.ShapeDtypeStruct((3,), jnp.float32),
      number,
    )
