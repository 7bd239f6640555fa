"""Transformer encoders: tokens that look at each other, then at themselves.

Post-norm, as in the paper below and in `torch.nn.TransformerEncoderLayer`; the
parts have its names, so that weights can be carried over. Weights start from
what PyTorch starts from, except that layers of a stack differ from each other.
Parameters are float32; `dtype` is what is computed in between, and the scores,
their softmax and the normalizations are float32 always.

Reference:
  Vaswani et al., "Attention Is All You Need", NeurIPS 2017, Sec. 3.
"""

from collections.abc import Mapping
import math
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxshape.errors import InputError, few
from jaxshape.typing import Array, ArrayLike, Bool, Float, PyTree, typed

Dtype = Any
Tokens = Float[ArrayLike, "*batch length width"]
Mask = Bool[ArrayLike, "*batch length"]

INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def _dense(
  inputs: int, features: int, dtype: Dtype, name: str, **options: Any
) -> nn.Dense:
  """A linear layer that starts as PyTorch's does, its bias included."""
  reach = 1 / math.sqrt(inputs)

  def bias(key: Any, shape: Any, dtype: Any = jnp.float32) -> Array:
    return jax.random.uniform(key, shape, dtype, -reach, reach)

  given = {"kernel_init": INIT, "bias_init": bias, **options}
  return nn.Dense(features, dtype=dtype, name=name, **given)


def _alike(key: Array, shape: Any, dtype: Any = jnp.float32) -> Array:
  """Xavier's start of queries, keys and values; keys as the queries."""
  whole = nn.initializers.xavier_uniform()(key, shape, dtype)
  query, _, value = jnp.split(whole, 3, axis=1)
  return jnp.concatenate([query, query, value], axis=1)


class SelfAttention(nn.Module):
  """Every token asks every other one: multi-head attention.

  head_h = softmax(Q_h K_h' / sqrt(width / heads)) V_h, with Q, K, V linear in
  the tokens; the heads, side by side, pass a last linear layer.

  Attributes:
    heads: How many; they divide the width.
    dropout: Share of the attention's weights that training sets to 0.
    dtype: What is computed in.
    alike: Whether queries and keys start equal, so that a token first asks
      those that are like itself.

  Reference:
    Vaswani et al., "Attention Is All You Need", NeurIPS 2017, Eq. 1 and
    Sec. 3.2.2.
  """

  heads: int
  dropout: float = 0.1
  dtype: Dtype = jnp.float32
  alike: bool = False

  @nn.compact
  @typed
  def __call__(
    self, tokens: Tokens, *, mask: Mask | None = None, train: bool
  ) -> Float[Array, "*batch length width"]:
    """What each token heard.

    Args:
      tokens: Of a width that the heads divide; finite, also where masked.
      mask: True where a token may be asked; None if all may.
      train: Whether to drop, which takes a key.

    Returns:
      A linear function of the values' means. A token that is not to be asked
      has a weight of exactly 0; where none is, the means are 0.
    """
    x = jnp.asarray(tokens, self.dtype)
    *batch, length, width = x.shape
    size = width // self.heads
    # The initial spread of the three is that of one matrix, as in PyTorch.
    project = _dense(
      width,
      3 * width,
      self.dtype,
      "in_proj",
      kernel_init=_alike if self.alike else nn.initializers.xavier_uniform(),
      bias_init=nn.initializers.zeros,
    )
    # Heads before tokens: products of contiguous matrices are the fastest form
    # on CPUs, and the copies are small beside the linear layers.
    parts = project(x).reshape(*batch, length, 3, self.heads, size)
    order = len(batch)
    parts = jnp.transpose(
      parts, (*range(order), order + 1, order + 2, order, order + 3)
    )
    query, key, value = (parts[..., i, :, :, :] for i in range(3))
    scores = jnp.einsum(
      "...qd,...kd->...qk",
      query * size**-0.5,
      key,
      preferred_element_type=jnp.float32,
    )
    if mask is not None:
      asked = jnp.asarray(mask)[..., None, None, :]
      # Finite, so that rows without any token stay so; the second `where` is
      # for these rows alone.
      scores = jnp.where(asked, scores, jnp.finfo(jnp.float32).min)
      weights = jnp.where(asked, jax.nn.softmax(scores), 0.0)
    else:
      weights = jax.nn.softmax(scores)
    weights = nn.Dropout(self.dropout, deterministic=not train)(weights)
    heard = jnp.einsum("...qk,...kd->...qd", weights.astype(self.dtype), value)
    heard = jnp.swapaxes(heard, -3, -2).reshape(*batch, length, width)
    out = _dense(
      width,
      width,
      self.dtype,
      "out_proj",
      bias_init=nn.initializers.zeros,
    )
    return out(heard)


class EncoderLayer(nn.Module):
  """One layer of a transformer's encoder, normalized after each residual.

  y = norm1(x + attend(x)), z = norm2(y + linear2(relu(linear1(y)))); training
  drops after both sub-layers, after the ReLU and among the attention's weights.

  Attributes:
    heads: How many heads the attention has; they divide the width.
    feedforward: Width of the layer in between; None for the tokens' width.
    dropout: Share that training sets to 0, in [0, 1).
    epsilon: Of the normalizations.
    attention: Whether tokens attend to each other. Without, a linear layer on
      each token by itself takes that place, and the mask changes nothing.
    dtype: What is computed in.
    alike: As in `SelfAttention`.

  Reference:
    Vaswani et al., "Attention Is All You Need", NeurIPS 2017, Sec. 3.1-3.3.
  """

  heads: int
  feedforward: int | None = None
  dropout: float = 0.1
  epsilon: float = 1e-5
  attention: bool = True
  dtype: Dtype = jnp.float32
  alike: bool = False

  @nn.compact
  @typed
  def __call__(
    self, tokens: Tokens, *, mask: Mask | None = None, train: bool
  ) -> Float[Array, "*batch length width"]:
    """Encodes tokens.

    Args:
      tokens: Of a width that the heads divide; finite, also where masked.
      mask: True where other tokens may attend to this one; None if to all.
      train: Whether to drop, which takes a key.

    Returns:
      One token for each, the masked ones included, in the type of `dtype`.

    Raises:
      ValueError: An option is outside its range, or does not fit the width.
    """
    x = jnp.asarray(tokens, self.dtype)
    width = x.shape[-1]
    self.check(width)
    drop = nn.Dropout(self.dropout, deterministic=not train)
    norm = lambda name: nn.LayerNorm(
      epsilon=self.epsilon,
      dtype=self.dtype,
      use_fast_variance=False,
      name=name,
    )
    if self.attention:
      attend = SelfAttention(
        self.heads, self.dropout, self.dtype, self.alike, name="self_attn"
      )
      heard = attend(x, mask=mask, train=train)
    else:
      heard = _dense(width, width, self.dtype, "connected")(x)
    x = norm("norm1")(x + drop(heard))
    inner = width if self.feedforward is None else self.feedforward
    y = drop(nn.relu(_dense(width, inner, self.dtype, "linear1")(x)))
    y = drop(_dense(inner, width, self.dtype, "linear2")(y))
    return norm("norm2")(x + y)

  @nn.nowrap
  def check(self, width: int) -> None:
    """Refuses options that do not fit.

    Args:
      width: Of the tokens.

    Raises:
      ValueError: An option is outside its range, or does not fit the width.
    """
    if self.heads < 1 or width % self.heads or width == 0:
      raise ValueError(
        f"heads must be 1 or more and divide the width {width}, got "
        f"{self.heads}."
      )
    if self.feedforward is not None and self.feedforward < 1:
      raise ValueError(
        f"feedforward must be 1 or more, got {self.feedforward}."
      )
    if not 0 <= self.dropout < 1:
      raise ValueError(
        f"dropout must be at least 0 and below 1, got {self.dropout}."
      )
    if not 0 < self.epsilon < math.inf:
      raise ValueError(
        f"epsilon must be above 0 and finite, got {self.epsilon}."
      )


class Encoder(nn.Module):
  """A stack of encoder layers.

  Attributes:
    layers: How many.
    heads: As in `EncoderLayer`, and so on.
    feedforward: Width of the layers in between; None for the tokens' width.
    dropout: Share that training sets to 0, in [0, 1).
    epsilon: Of the normalizations.
    attention: Whether tokens attend to each other.
    dtype: What is computed in.
    alike: As in `SelfAttention`.

  Reference:
    Vaswani et al., "Attention Is All You Need", NeurIPS 2017, Sec. 3.1.
  """

  layers: int
  heads: int
  feedforward: int | None = None
  dropout: float = 0.1
  epsilon: float = 1e-5
  attention: bool = True
  dtype: Dtype = jnp.float32
  alike: bool = False

  @nn.compact
  @typed
  def __call__(
    self, tokens: Tokens, *, mask: Mask | None = None, train: bool
  ) -> Float[Array, "*batch length width"]:
    """Encodes tokens.

    Args:
      tokens: Of a width that the heads divide; finite, also where masked.
      mask: True where other tokens may attend to this one; None if to all.
      train: Whether to drop, which takes a key.

    Returns:
      One token for each, the masked ones included, in the type of `dtype`.

    Raises:
      ValueError: An option is outside its range, or does not fit the width.
    """
    if self.layers < 1:
      raise ValueError(f"layers must be 1 or more, got {self.layers}.")
    x = jnp.asarray(tokens, self.dtype)
    for i in range(self.layers):
      layer = EncoderLayer(
        self.heads,
        self.feedforward,
        self.dropout,
        self.epsilon,
        self.attention,
        self.dtype,
        self.alike,
        name=f"layers_{i}",
      )
      x = layer(x, mask=mask, train=train)
    return x


# PyTorch's name of each of a layer's parameters, ours, and the axes of its
# shape: e the tokens' width, f the width in between.
_REST = {
  "linear1.weight": (("linear1", "kernel"), "fe"),
  "linear1.bias": (("linear1", "bias"), "f"),
  "linear2.weight": (("linear2", "kernel"), "ef"),
  "linear2.bias": (("linear2", "bias"), "e"),
  "norm1.weight": (("norm1", "scale"), "e"),
  "norm1.bias": (("norm1", "bias"), "e"),
  "norm2.weight": (("norm2", "scale"), "e"),
  "norm2.bias": (("norm2", "bias"), "e"),
}
ATTENTIVE = {
  "self_attn.in_proj_weight": (("self_attn", "in_proj", "kernel"), "3e"),
  "self_attn.in_proj_bias": (("self_attn", "in_proj", "bias"), "3"),
  "self_attn.out_proj.weight": (("self_attn", "out_proj", "kernel"), "ee"),
  "self_attn.out_proj.bias": (("self_attn", "out_proj", "bias"), "e"),
  **_REST,
}
CONNECTED = {
  "connected.weight": (("connected", "kernel"), "ee"),
  "connected.bias": (("connected", "bias"), "e"),
  **_REST,
}


@typed
def to_state_dict(params: PyTree, prefix: str) -> dict[str, np.ndarray]:
  """The parameters of an `Encoder`, as PyTorch calls them.

  The names are those of `torch.nn.TransformerEncoder`. A stack without
  attention has `connected.weight` and `.bias` in place of `self_attn`.

  Args:
    params: Of an `Encoder`.
    prefix: What every name begins with, before "layers."; with its full stop.

  Returns:
    Arrays by name, in PyTorch's layout.
  """
  tensors = {}
  for i in range(len(params)):
    layer = params[f"layers_{i}"]
    names = ATTENTIVE if "self_attn" in layer else CONNECTED
    for name, (path, _) in names.items():
      value = layer
      for part in path:
        value = value[part]
      tensors[f"{prefix}layers.{i}.{name}"] = np.asarray(value).T.copy()
  return tensors


@typed
def from_state_dict(tensors: Mapping[str, Any], prefix: str) -> PyTree:
  """The parameters of an `Encoder` from PyTorch's.

  How many layers there are, how wide they are and whether they attend is read
  off the tensors; the heads leave no trace in them.

  Args:
    tensors: Arrays by name, as in `to_state_dict`. Names that do not begin with
      the prefix and "layers." are left alone, as is a "module." before all.
    prefix: What every name begins with, before "layers."; with its full stop.
      Of a single `TransformerEncoderLayer`, put "layers.0." before each name.

  Returns:
    Float32 parameters.

  Raises:
    InputError: There are no layers, or names are missing or not known, or an
      array is of another shape than its neighbours ask for or not finite.
  """
  start = re.compile(rf"(?:module\.)?{re.escape(prefix)}layers\.(.*)", re.S)
  matches = {name: start.fullmatch(name) for name in tensors}
  given = {m[1]: tensors[name] for name, m in matches.items() if m}
  if not given:
    seen = few(sorted(tensors)) or "nothing"
    raise InputError(
      f"the tensors hold no encoder: no name begins with "
      f"'{prefix}layers.'; they hold {seen}."
    )
  numbers = {n.split(".")[0] for n in given}
  count = 1 + max((int(n) for n in numbers if _number(n)), default=0)
  count = min(count, len(given))  # A number in a name is not a size.
  attends = any(".self_attn." in f".{name}" for name in given)
  names = ATTENTIVE if attends else CONNECTED
  sizes = _sizes(given)
  faults: dict[str, list[str]] = {
    "missing": [],
    "of another shape": [],
    "not finite": [],
  }
  params: dict[str, Any] = {}
  for i in range(count):
    for name, (path, axes) in names.items():
      full = f"{i}.{name}"
      if full not in given:
        faults["missing"].append(f"{prefix}layers.{full}")
        continue
      value = np.asarray(given.pop(full))
      want = tuple(sizes[axis] for axis in axes)
      if value.shape != want:
        faults["of another shape"].append(
          f"{prefix}layers.{full} {value.shape} instead of {want}"
        )
        continue
      value = value.astype(np.float32)
      if not np.isfinite(value).all():
        faults["not finite"].append(f"{prefix}layers.{full}")
      node = params.setdefault(f"layers_{i}", {})
      for part in path[:-1]:
        node = node.setdefault(part, {})
      node[path[-1]] = value.T.copy()
  faults["not known"] = [f"{prefix}layers.{name}" for name in given]
  said = [f"{what}: {few(names)}" for what, names in faults.items() if names]
  if said:
    raise InputError(
      f"the tensors do not fit an encoder of {count} layers; {'; '.join(said)}."
    )
  return params


def _sizes(given: Mapping[str, Any]) -> dict[str, int]:
  """The widths, as most of the layers' norms and biases have them."""
  shape = lambda end: [
    np.shape(v)[0]
    for name, v in given.items()
    if name.endswith(end) and np.ndim(v) == 1
  ]
  common = lambda sizes: max(sorted(set(sizes)), key=sizes.count, default=0)
  width = common(shape("norm1.weight") + shape("norm2.weight"))
  return {"e": width, "3": 3 * width, "f": common(shape("linear1.bias"))}


def _number(text: str) -> bool:
  return re.fullmatch(r"0|[1-9][0-9]{0,3}", text) is not None
