"""Where in an image the evidence for a class lies.

The maps are those of the formulas, not scaled, and as coarse as the features;
for a picture, `resize` them and then `normalize` them.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxshape.typing import Array, ArrayLike, Bool, Float, Int, Num, typed


@typed
def grad_cam(
  head: Callable[[Array], Array],
  features: Float[ArrayLike, "batch height width channels"],
  class_index: Int[ArrayLike, " batch"],
) -> Float[Array, "batch height width"]:
  """Weighs the features by how much each channel raises a class.

  L = relu(sum_k a_k A^k), a_k = 1/Z sum_ij d y_c / d A^k_ij, with Z positions.

  Args:
    head: From one example's features [height, width, channels] to its logits.
    features: A, of the layer to be explained.
    class_index: c, per example; usually the label or the prediction.

  Returns:
    One map per example, not negative.

  Reference:
    Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via
    Gradient-based Localization", ICCV 2017, Eq. 1 and 2.
  """

  def explain(a: Array, c: Array) -> Array:
    weights = jnp.mean(jax.grad(lambda a: head(a)[c])(a), axis=(0, 1))
    return jax.nn.relu(jnp.einsum("hwk,k->hw", a, weights))

  features = jnp.asarray(features, jnp.float32)
  return jax.vmap(explain)(features, jnp.asarray(class_index))


@typed
def cam(
  features: Float[ArrayLike, "batch height width channels"],
  kernel: Float[ArrayLike, "channels classes"],
  class_index: Int[ArrayLike, " batch"],
) -> Float[Array, "batch height width"]:
  """Weighs the features by the linear layer that follows their mean.

  M_c = sum_k w_k^c f_k.

  Args:
    features: f, of the layer whose spatial mean the linear layer reads.
    kernel: w.
    class_index: c, per example.

  Returns:
    One map per example, of either sign.

  Reference:
    Zhou et al., "Learning Deep Features for Discriminative Localization", CVPR
    2016, Eq. 2.
  """
  weights = jnp.asarray(kernel)[:, jnp.asarray(class_index)]
  return jnp.einsum("bhwk,kb->bhw", jnp.asarray(features), weights)


@typed
def pseudo_labels(
  maps: Float[ArrayLike, "*batch height width classes"],
  present: Num[ArrayLike, "*batch classes"] | Bool[ArrayLike, "*batch classes"],
  *,
  threshold: float = 0.15,
) -> Int[Array, "*batch height width"]:
  """Names every pixel by the strongest of the classes that the image shows.

  argmax_k M_k(x) / max_y M_k(y) over the classes k that are there, where this
  share is the threshold or more; the background elsewhere.

  Args:
    maps: M, as from `cam`, one per class, at the size of the answer. What is
      negative counts as 0, and a map that is never positive as 0 everywhere.
    present: Above 0 where the image is known to show the class.
    threshold: Share of a map's maximum, above 0 and at most 1.

  Returns:
    0 for the background, and k + 1 for class k.

  Raises:
    ValueError: The threshold is outside its range.

  Reference:
    Zhou et al., "Learning Deep Features for Discriminative Localization", CVPR
    2016, Sec. 3.2 (a share of the maximum); Islam et al., "Maximizing Mutual
    Shape Information", BMVC 2022, Sec. 4.4 (one label per pixel).
  """
  if not 0.0 < threshold <= 1.0:
    raise ValueError(
      f"threshold must be above 0 and at most 1, got {threshold}."
    )
  maps = jax.nn.relu(jnp.asarray(maps, jnp.float32))
  top = jnp.max(maps, axis=(-3, -2), keepdims=True)
  shown = (jnp.asarray(present) > 0)[..., None, None, :]
  shares = jnp.where(shown & (top > 0), maps / jnp.where(top > 0, top, 1), 0)
  best = jnp.argmax(shares, axis=-1) + 1
  return jnp.where(jnp.max(shares, axis=-1) >= threshold, best, 0)


@typed
def resize(
  maps: Float[ArrayLike, "batch height width"], *, height: int, width: int
) -> Float[Array, "batch {height} {width}"]:
  """Brings maps to the size of the images, bilinearly.

  Args:
    maps: One per example.
    height: Of the images, at least 1.
    width: Of the images, at least 1.

  Returns:
    The maps, with pixel centres at half-integers as in OpenCV.
  """
  if min(height, width) < 1:
    raise ValueError(
      f"height and width must be 1 or more, got {height} and {width}."
    )
  maps = jnp.asarray(maps)
  shape = (maps.shape[0], height, width)
  return jax.image.resize(maps, shape, "linear", antialias=False)


@typed
def normalize(
  maps: Float[ArrayLike, "*batch height width"],
) -> Float[Array, "*batch height width"]:
  """Stretches each map to 0..1 by its own minimum and maximum.

  Args:
    maps: One per example.

  Returns:
    Maps for pictures; a constant one becomes 0 everywhere.
  """
  maps = jnp.asarray(maps)
  maps = maps - jnp.min(maps, axis=(-2, -1), keepdims=True)
  # The constant is that of the public implementation.
  return maps / (1e-7 + jnp.max(maps, axis=(-2, -1), keepdims=True))


@typed
def spread(
  maps: Float[ArrayLike, "*batch height width"], *, threshold: float = 0.5
) -> Float[Array, "*batch"]:
  """The share of the area in which a map is strong.

  #{M_ij > threshold max M} / #{ij}: broad where the whole object counts, small
  where one detail does.

  Args:
    maps: Not negative, as from `grad_cam`.
    threshold: Share of the map's maximum, 0 or more and below 1.

  Returns:
    One number per map, 0..1; 0 for a map that is 0 everywhere, NaN for one with
    a NaN in it.
  """
  if not 0.0 <= threshold < 1.0:
    raise ValueError(
      f"threshold must be 0 or more and below 1, got {threshold}."
    )
  maps = jnp.asarray(maps)
  top = jnp.max(maps, axis=(-2, -1), keepdims=True)
  share = jnp.mean(maps > threshold * top, axis=(-2, -1), dtype=jnp.float32)
  return jnp.where(jnp.isnan(top[..., 0, 0]), jnp.nan, share)
