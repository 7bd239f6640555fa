"""Augmentation of LiDAR scans on the device, drawn per scan from its own key.

A function takes one scan, a mapping with "points" [P, 3] in metres (x ahead,
y left, z up), "remission" [P] and "valid" [P], and all that it draws comes from
the key: `jax.vmap` over split keys draws for each scan by itself. Other entries
("label") are handed on. Points that are not valid stay as they are.

Reference:
  Milioto et al., "RangeNet++: Fast and Accurate LiDAR Semantic Segmentation",
  IROS 2019 (flips); Xu et al., "SqueezeSegV3", ECCV 2020.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxshape.data import options
from jaxshape.typing import Array, Batch, typed
from jaxshape.typing import Key as KeyOf

Key = KeyOf[Array, ""]
Scan = Mapping[str, Any]  # Arrays, NumPy's or JAX's.
Number = float | int


def _moved(scan: Scan, points: jax.Array) -> dict[str, Any]:
  """The scan with other points, where they are valid."""
  old = jnp.asarray(scan["points"])
  valid = jnp.asarray(scan["valid"])[:, None]
  return {**scan, "points": jnp.where(valid, points.astype(old.dtype), old)}


def _check_probability(probability: Number, name: str = "probability") -> None:
  if not 0 <= probability <= 1:
    raise ValueError(f"{name} must be in 0..1, got {probability}.")


def _check_not_negative(name: str, value: Number) -> None:
  if not 0 <= value < float("inf"):
    raise ValueError(f"{name} must be at least 0, got {value}.")


@typed
def random_flip(
  key: Key, scan: Scan, *, probability: Number = 0.5
) -> dict[str, Any]:
  """Mirrors left and right: y -> -y.

  Args:
    key: A PRNG key.
    scan: See the module.
    probability: Of mirroring.

  Returns:
    The scan or its mirror image.
  """
  _check_probability(probability)
  sign = jnp.where(jax.random.bernoulli(key, probability), -1.0, 1.0)
  return _moved(scan, scan["points"] * jnp.stack([jnp.ones(()), sign, 1.0]))


@typed
def random_rotation(
  key: Key, scan: Scan, *, degrees: Number = 180.0
) -> dict[str, Any]:
  """Turns the scan about the z axis by an angle uniform in -degrees..degrees.

  Args:
    key: A PRNG key.
    scan: See the module.
    degrees: The largest angle, 0..180.

  Returns:
    The turned scan.
  """
  if not 0 <= degrees <= 180:
    raise ValueError(f"degrees must be in 0..180, got {degrees}.")
  largest = np.deg2rad(degrees)
  angle = jax.random.uniform(key, minval=-largest, maxval=largest)
  c, s = jnp.cos(angle), jnp.sin(angle)
  x, y, z = (jnp.asarray(scan["points"])[:, i] for i in range(3))
  # Not as a matrix product, which accelerators round to fewer bits.
  return _moved(scan, jnp.stack([c * x - s * y, s * x + c * y, z], axis=-1))


@typed
def random_scale(
  key: Key, scan: Scan, *, scale: Sequence[Number] = (0.95, 1.05)
) -> dict[str, Any]:
  """Scales all coordinates by one factor, uniform in a range.

  Args:
    key: A PRNG key.
    scan: See the module.
    scale: Least and largest factor, above 0.

  Returns:
    The larger or smaller scan.
  """
  if len(scale) != 2 or not 0 < scale[0] <= scale[1] < float("inf"):
    raise ValueError(
      f"scale must be (low, high) with 0 < low <= high, got {tuple(scale)}."
    )
  factor = jax.random.uniform(key, minval=scale[0], maxval=scale[1])
  return _moved(scan, scan["points"] * factor)


@typed
def random_jitter(
  key: Key,
  scan: Scan,
  *,
  sigma: Number = 0.02,
  limit: Number = 0.1,
  remission: Number = 0.0,
) -> dict[str, Any]:
  """Adds normal noise to each coordinate, and to the remission.

  Args:
    key: A PRNG key.
    scan: See the module.
    sigma: Standard deviation in metres, at least 0.
    limit: The most that a coordinate moves, in metres, at least 0.
    remission: Standard deviation of the remission's noise, at least 0; the
      result is not below 0.

  Returns:
    The noisy scan.
  """
  for name, value in (
    ("sigma", sigma), ("limit", limit), ("remission", remission)
  ):  # fmt: skip
    _check_not_negative(name, value)
  place_key, strength_key = jax.random.split(key)
  points = jnp.asarray(scan["points"])
  noise = sigma * jax.random.normal(place_key, points.shape, points.dtype)
  scan = _moved(scan, points + jnp.clip(noise, -limit, limit))
  if remission == 0:
    return scan
  strength = jnp.asarray(scan["remission"])
  noise = jax.random.normal(strength_key, strength.shape, strength.dtype)
  noisy = jnp.maximum(strength + remission * noise, 0)
  return {**scan, "remission": jnp.where(scan["valid"], noisy, strength)}


@typed
def random_drop(
  key: Key, scan: Scan, *, share: Sequence[Number] = (0.0, 0.5)
) -> dict[str, Any]:
  """Loses points: a share of them, uniform in a range, is no longer valid.

  Args:
    key: A PRNG key.
    scan: See the module.
    share: Least and largest share that is lost, 0..1.

  Returns:
    The scan with "valid" False where points are lost.
  """
  if len(share) != 2 or not 0 <= share[0] <= share[1] <= 1:
    raise ValueError(
      f"share must be (low, high) with 0 <= low <= high <= 1, "
      f"got {tuple(share)}."
    )
  share_key, point_key = jax.random.split(key)
  lost = jax.random.uniform(share_key, minval=share[0], maxval=share[1])
  valid = jnp.asarray(scan["valid"])
  kept = jax.random.uniform(point_key, valid.shape) >= lost
  return {**scan, "valid": valid & kept}


_KNOWN: dict[str, Callable[..., dict[str, Any]]] = {
  "random_flip": random_flip,
  "random_rotation": random_rotation,
  "random_scale": random_scale,
  "random_jitter": random_jitter,
  "random_drop": random_drop,
}


def make(
  config: Mapping[str, Any],
) -> Callable[[jax.Array, Batch], dict[str, Any]]:
  """Makes the augmentation of batches that a config describes.

  Args:
    config: From the functions' names to their options, in the order in which
      they act: `{"random_flip": {}, "random_rotation": {"degrees": 45}}`.

  Returns:
    A compiled function of a key and a batch with "points" [B, P, 3],
    "remission" [B, P] and "valid" [B, P]. Scan i gets the key i of
    `split(key, B)`, and step j the key j of `split(scan's key, steps)`.

  Raises:
    InputError: A name or an option is not known.
    ValueError: An option is outside its range.
  """
  steps = [
    options.bind("scan_augment", _KNOWN, name, given)
    for name, given in config.items()
  ]
  fields = ("points", "remission", "valid")

  def one(key: jax.Array, scan: Scan) -> Scan:
    keys = jax.random.split(key, max(1, len(steps)))
    for function, step_key in zip(steps, keys, strict=False):
      scan = function(step_key, scan)
    return scan

  # What options are wrong shall be said here, not in the first step.
  shape = {
    "points": jax.ShapeDtypeStruct((1, 3), jnp.float32),
    "remission": jax.ShapeDtypeStruct((1,), jnp.float32),
    "valid": jax.ShapeDtypeStruct((1,), jnp.bool_),
  }
  jax.eval_shape(one, jax.random.key(0), shape)

  @jax.jit
  def augment(key: jax.Array, batch: Batch) -> dict[str, Any]:
    scans = {name: jnp.asarray(batch[name]) for name in fields}
    keys = jax.random.split(key, len(scans["points"]))
    return {**batch, **jax.vmap(one)(keys, scans)}

  return augment
