"""Networks that describe images: convolutions, pooling, whitening, scales.

x -> features -> [local whitening] -> pooling -> norm -> [whitening -> norm],
the mean over several sizes of the image, and norm. Images of several sizes go
in one batch: they lie in upper left corners, and a mask keeps what is computed
as it is without padding, to rounding.

Reference:
  Radenovic et al., "Fine-tuning CNN Image Retrieval with No Human Annotation",
  TPAMI 2019, Sec. 3, and its public code.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxshape.backbones import resnet
from jaxshape.errors import InputError
from jaxshape.layers import apply
from jaxshape.retrieval import descriptors

POOLINGS = ("gem", "mac", "spoc", "rmac")
SCALES = (1.0, math.sqrt(2), math.sqrt(0.5))
# Of ImageNet, where a file says nothing else.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Network(NamedTuple):
  """What makes a descriptor of an image.

  Attributes:
    net: Its convolutions.
    variables: Parameters and other collections of those, and the arrays
      `p`, `whiten`, `local` and `regional` of what comes after them, None where
      there is none; layers are pairs of a weight [out, in] and a bias.
    pooling: One of `POOLINGS`.
    regional: Whether regions are pooled instead of the whole.
    mean: Of the channels, for pixels in 0..1.
    std: Likewise.
    whitenings: Learned ones that the file brings along, by data set, and there
      by "ss" (one scale) and "ms" (several).
  """

  net: resnet.ResNet
  variables: Mapping[str, Any]
  pooling: str
  regional: bool
  mean: tuple[float, ...]
  std: tuple[float, ...]
  whitenings: Mapping[str, Mapping[str, descriptors.Whitening]]

  @property
  def padded(self) -> bool:
    """Whether images of several sizes may share a batch."""
    return not self.regional and self.pooling != "rmac"

  @property
  def dimensions(self) -> int:
    """Of its descriptors."""
    if self.variables["whiten"] is not None:
      return len(self.variables["whiten"][1])
    stages, block = len(self.net.stage_sizes), self.net.block
    return self.net.width * 2 ** (stages - 1) * (4 if block != "basic" else 1)

  def power(self, scales: Sequence[float]) -> float:
    """How the public code averages over the scales."""
    plain = self.pooling == "gem" and not self.regional
    p = self.variables["p"]
    if len(scales) < 2 or not plain or self.variables["whiten"] is not None:
      return 1.0
    return float(p.reshape(-1)[0]) if np.size(p) == 1 else 1.0


def make(
  tensors: Mapping[str, np.ndarray] | None,
  meta: Mapping[str, Any],
  *,
  backbone: str | None = None,
  pooling: str | None = None,
  p: float | None = None,
  dtype: str = "float32",
) -> Network:
  """The network that tensors and notes of the public code describe.

  Args:
    tensors: By key, as in `resnet.from_state_dict`; None draws the weights,
      which is of use for trying things out only.
    meta: What the public code's files say of their networks ("architecture",
      "pooling", "regional", "mean", "std", "Lw"), as far as it is there.
    backbone: Of `resnet.VARIANTS`; None for what `meta` says, else resnet101.
    pooling: One of `POOLINGS`; None for what `meta` says, else "gem".
    p: GeM's exponent; None for that of the tensors, else 3.
    dtype: What is computed in, "float32" or "bfloat16".

  Returns:
    The network.

  Raises:
    InputError: The tensors are of another network, or an option is none.
  """
  if dtype not in ("float32", "bfloat16"):
    raise InputError(f"dtype must be float32 or bfloat16, got {dtype!r}.")
  drawn = tensors is None
  tensors = {k.removeprefix("module."): v for k, v in (tensors or {}).items()}
  name = _chosen("backbone", backbone, meta.get("architecture"), "resnet101")
  pooling = _chosen("pooling", pooling, meta.get("pooling"), "gem")
  if pooling not in POOLINGS:
    raise InputError(
      f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}."
    )
  stem = tensors.get("conv1.weight", tensors.get("features.0.weight"))
  width = None if stem is None else len(stem)
  net = resnet.make(
    name, num_classes=1, width=width, dtype=jnp.dtype(dtype).type
  )
  if drawn:
    image = jnp.zeros((1, net.stride, net.stride, 3))
    params, collections = jax.jit(
      lambda key: apply.init(net, key, image, train=False)
    )(jax.random.key(0))
  else:
    try:
      params, collections = resnet.from_state_dict(net, tensors, head=False)
    except InputError as error:
      raise InputError(f"the file is not of a {name}: {error}") from error
  stored = tensors.get("pool.p", tensors.get("pool.rpool.p"))
  exponent = p if p is not None else 3.0 if stored is None else stored
  variables = {
    "params": params,
    "collections": collections,
    "p": np.asarray(exponent, np.float32),
    "whiten": _layer(tensors, "whiten"),
    "local": _layer(tensors, "lwhiten"),
    "regional": _layer(tensors, "pool.whiten"),
  }
  if not (variables["p"] > 0).all():
    raise InputError(f"p must be positive, got {variables['p']}.")
  regional = bool(meta.get("regional")) or variables["regional"] is not None
  return Network(
    net,
    variables,
    pooling,
    regional,
    _three(meta.get("mean"), _MEAN),
    _three(meta.get("std"), _STD),
    _whitenings(meta.get("Lw")),
  )


def make_extract(
  network: Network, scales: Sequence[float]
) -> Callable[..., jax.Array]:
  """A compiled function from images to descriptors.

  Args:
    network: As `load` gives it.
    scales: By which the images are resized, each positive.

  Returns:
    A function of `network.variables`, images uint8 [batch, height, width, 3]
    that lie in the upper left corners, and their heights and widths [batch, 2].
  """

  def single(variables: Any, x: jax.Array, sizes: jax.Array) -> jax.Array:
    mask = (jnp.arange(x.shape[1])[:, None] < sizes[:, None, None, 0]) & (
      jnp.arange(x.shape[2]) < sizes[:, None, None, 1]
    )
    params, collections = variables["params"], variables["collections"]
    maps, _ = apply.apply(
      network.net,
      params,
      collections,
      x,
      train=False,
      mask=mask if network.padded else None,
      method="features",
    )
    maps = maps.astype(jnp.float32)
    if variables["local"] is not None:
      maps = _linear(maps, variables["local"])
    step = network.net.stride
    options: dict[str, Any] = (
      {"mask": mask[:, ::step, ::step]} if network.padded else {}
    )
    if network.pooling == "gem":
      options["p"] = variables["p"]
    pool = functools.partial(getattr(descriptors, network.pooling), **options)
    if network.regional:
      layer = variables["regional"]
      out = descriptors.regional(
        maps,
        pooling=pool,
        whiten=None if layer is None else lambda v: _linear(v, layer),
      )
    else:
      out = pool(maps)
    out = descriptors.l2_normalize(out)
    if variables["whiten"] is None:
      return out
    return descriptors.l2_normalize(_linear(out, variables["whiten"]))

  @jax.jit
  def compiled(
    variables: Any, images: jax.Array, sizes: jax.Array
  ) -> jax.Array:
    x = images.astype(jnp.float32) / 255
    x = (x - jnp.asarray(network.mean)) / jnp.asarray(network.std)
    every = [
      single(variables, resize(x, sizes[0], scale), after)
      for scale, after in zip(scales, sizes[1:], strict=True)
    ]
    if len(every) == 1:
      return every[0]
    power = network.power(scales)
    return descriptors.aggregate_scales(jnp.stack(every), power=power)

  def extract(
    variables: Any, images: np.ndarray, sizes: np.ndarray
  ) -> jax.Array:
    every = [
      sizes,
      *([[after(n, s) for n in row] for row in sizes] for s in scales),
    ]
    return compiled(variables, images, np.asarray(every, np.int32))

  return extract


def resize(x: jax.Array, sizes: jax.Array, scale: float) -> jax.Array:
  """Images at another size, as the public code makes it: bilinearly.

  Pixel i of the result lies at (i + 1/2) / scale - 1/2; nothing is smoothed
  before. This is `torch.nn.functional.interpolate` with that `scale_factor`.

  Args:
    x: [batch, height, width, channels], the images in the upper left corners.
    sizes: Heights and widths of those, [batch, 2].
    scale: Positive.

  Returns:
    The images; what lies beyond theirs has no meaning.
  """
  if scale == 1:
    return x
  for axis in (0, 1):
    where = (np.arange(after(x.shape[axis + 1], scale)) + 0.5) / scale - 0.5
    where = np.maximum(where, 0)
    low, last = where.astype(np.int32), sizes[:, axis, None] - 1
    take = jax.vmap(functools.partial(jnp.take, axis=axis, mode="clip"))
    part = np.expand_dims(np.float32(where - low), (1, 2) if axis == 0 else 1)
    first = take(x, jnp.minimum(low, last))
    x = first + part * (take(x, jnp.minimum(low + 1, last)) - first)
  return x


def _chosen(name: str, said: str | None, stored: Any, default: str) -> str:
  if said is None:
    return default if stored is None else str(stored)
  if stored is not None and said != stored:
    raise InputError(f"the file is of {name} {stored}, not of {said}.")
  return said


def _whitenings(
  stored: Any,
) -> dict[str, dict[str, descriptors.Whitening]]:
  """Those of `meta["Lw"]`: by data set, then "ss" and "ms"."""
  out: dict[str, dict[str, descriptors.Whitening]] = {}
  for name, forms in stored.items() if isinstance(stored, Mapping) else ():
    try:
      out[str(name)] = {
        form: descriptors.Whitening(
          np.asarray(part["m"], np.float32).reshape(-1),
          np.asarray(part["P"], np.float32),
        )
        for form, part in forms.items()
      }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
      raise InputError(
        f"the file has a whitening {name} that is no arrays m and P."
      ) from error
  return out


def _three(stored: Any, default: tuple[float, ...]) -> tuple[float, ...]:
  if stored is None:
    return default
  values = stored.tolist() if isinstance(stored, np.ndarray) else stored
  numbers = isinstance(values, list | tuple) and len(values) == 3
  if not numbers or not all(isinstance(x, float | int) for x in values):
    raise InputError(f"the file has {stored!r} as mean or std of 3 colors.")
  return tuple(float(x) for x in values)


def _layer(
  tensors: Mapping[str, np.ndarray], name: str
) -> tuple[np.ndarray, np.ndarray] | None:
  weight, bias = (tensors.get(f"{name}.{part}") for part in ("weight", "bias"))
  if weight is None and bias is None:
    return None
  if weight is None or bias is None or weight.shape[:1] != bias.shape:
    raise InputError(f"the file has half a layer {name}.")
  return np.asarray(weight, np.float32), np.asarray(bias, np.float32)


def _linear(x: jax.Array, layer: Any) -> jax.Array:
  weight, bias = layer
  highest = jax.lax.Precision.HIGHEST
  return jnp.matmul(x, jnp.asarray(weight).T, precision=highest) + bias


def after(size: int, scale: float) -> int:
  """Pixels along an axis at another scale, as PyTorch counts them."""
  return max(1, math.floor(int(size) * scale))
