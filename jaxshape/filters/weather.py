"""Snow, frost, fog and spatter on an image.

Images are [..., H, W, 3] in 0..255. Parameters are for some 224 pixels as in
`corruption`, and every image of a batch has weather of its own.

Reference for all: Hendrycks and Dietterich, "Benchmarking Neural Network
Robustness to Common Corruptions and Perturbations", ICLR 2019, Section 4.1;
the parameters are those of the code that made the published set.
"""

import functools
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from jaxshape import images
from jaxshape.filters import blur, distortion, severities
from jaxshape.typing import Array, ArrayLike, Float, Key, Num, Size, typed

Rgb = Num[ArrayLike, "*batch height width 3"]
Corrupted = Float[Array, "*batch height width 3"]


def _unit(image: Any) -> jax.Array:
  return images.as_float32(image) / 255


def _full(x: jax.Array) -> jax.Array:
  return 255 * jnp.clip(x, 0, 1)


@typed
def plasma(
  key: Key[Array, ""], *, size: Size, decay: float | int | Array
) -> Float[Array, "{size} {size}"]:
  """A random landscape that goes on at its opposite side: diamond-square.

  Between four points comes their mean plus noise, until there is no room; the
  noise starts even within -1..1 and falls to 1 / decay^2 of that each time.

  Args:
    key: A PRNG key.
    size: The side, a power of 2.
    decay: Larger is smoother; may be traced.

  Returns:
    Heights, scaled to 0..1.

  Raises:
    ValueError: The size is no power of 2.

  Reference:
    Fournier, Fussell and Carpenter, "Computer Rendering of Stochastic Models",
    Communications of the ACM, 1982.
  """
  if size < 1 or size & (size - 1):
    raise ValueError(f"size must be a power of 2, got {size}.")
  size = int(size)
  # Three new points for each old one, and one to begin with.
  draw = jax.random.uniform(key, (size * size,), minval=-1, maxval=1)
  back = lambda x, axis: jnp.roll(x, -1, axis)
  on = lambda x, axis: jnp.roll(x, 1, axis)
  land = jnp.zeros((1, 1))
  for level in range(size.bit_length() - 1):
    n = 2**level
    noise = draw[n * n : 4 * n * n].reshape(3, n, n) * decay ** (-2.0 * level)
    # Fused, every point would compute all of its ancestors again.
    land = lax.optimization_barrier(land)
    # The corners of a tile, then its middle, its upper and its left edge.
    pair = land + back(land, 0)
    middle = (pair + back(pair, 1)) / 4 + noise[0]
    middle = lax.optimization_barrier(middle)
    upper = (middle + on(middle, 0) + land + back(land, 1)) / 4 + noise[1]
    left = (middle + on(middle, 1) + land + back(land, 0)) / 4 + noise[2]
    rows = [jnp.stack([land, upper], -1), jnp.stack([left, middle], -1)]
    land = jnp.stack(rows, 1).reshape(2 * n, 2 * n)
  land = lax.optimization_barrier(land)
  land = land - land.min()
  highest = land.max()
  return land / jnp.where(highest > 0, highest, 1)


def _power(n: int) -> int:
  return 1 << max(n - 1, 0).bit_length()


@jax.jit
def _fog(key: Any, image: Any, thickness: Any, decay: Any) -> jax.Array:
  height, width = image.shape[-3:-1]

  def run(key: Any, x: jax.Array) -> jax.Array:
    land = plasma(key, size=_power(max(height, width)), decay=decay)
    brightest = x.max()
    x = x + thickness * land[:height, :width, None]
    return x * brightest / (brightest + thickness)

  return _full(severities.per_image(key, run, _unit(image)))


@typed
def fog(key: Key[Array, ""], image: Rgb, *, severity: int) -> Corrupted:
  """Adds banks of fog and darkens until the brightest stays as bright.

  y = (x + t plasma) max(x) / (max(x) + t).

  Args:
    key: A PRNG key.
    image: Values in 0..255.
    severity: 1 to 5; (t, decay) = (1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5),
      (3, 1.4).

  Returns:
    The image in fog.

  Reference:
    Hendrycks and Dietterich 2019, "Fog".

  Note:
    The landscape's side is the next power of 2, 256 for the published images.
  """
  thickness, decay = severities.pick(
    severity, ((1.5, 2.0), (2.0, 2.0), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4))
  )
  return _fog(key, image, thickness, decay)


@functools.partial(jax.jit, static_argnames=("factor", "radius"))
def _snow(
  key: Any,
  image: Any,
  flakes: Any,
  sigma: Any,
  keep: Any,
  *,
  factor: float,
  radius: int,
) -> jax.Array:
  mean, deviation, least = flakes

  def run(key: Any, x: jax.Array) -> jax.Array:
    of_flakes, of_angle = jax.random.split(key)
    noise = jax.random.normal(of_flakes, (*x.shape[:2], 1))
    layer = distortion.zoom(mean + deviation * noise, factor=factor)
    layer = jnp.clip(jnp.where(layer < least, 0, layer), 0, 1)
    angle = jax.random.uniform(of_angle, (), minval=-135, maxval=-45)
    layer = distortion.smear(layer, angle=angle, sigma=sigma, radius=radius)
    grey = x @ jnp.array([0.299, 0.587, 0.114])
    pale = jnp.maximum(x, 1.5 * grey[..., None] + 0.5)
    return keep * x + (1 - keep) * pale + layer + layer[::-1, ::-1]

  return _full(severities.per_image(key, run, _unit(image)))


@typed
def snow(key: Key[Array, ""], image: Rgb, *, severity: int) -> Corrupted:
  """Pales an image and lets flakes fall over it.

  y = k x + (1 - k) max(x, 1.5 grey(x) + .5) + s + s turned by 180 degrees, with
  s = smear(n) of enlarged normal noise n, 0 where it is below a threshold.

  Args:
    key: A PRNG key; gives the noise and the angle, even within -135..-45
      degrees.
    image: Values in 0..255.
    severity: 1 to 5; (mean and deviation of the noise, enlargement, threshold,
      radius and sigma of the smear, k) = (.1, .3, 3, .5, 10, 4, .8),
      (.2, .3, 2, .5, 12, 4, .7), (.55, .3, 4, .9, 12, 8, .7),
      (.55, .3, 4.5, .85, 12, 8, .65), (.55, .3, 2.5, .85, 12, 12, .55).

  Returns:
    The image in snow.

  Reference:
    Hendrycks and Dietterich 2019, "Snow".

  Note:
    The published code rounds s to bytes before and after the smear.
  """
  mean, deviation, factor, least, radius, sigma, keep = severities.pick(
    severity,
    (
      (0.1, 0.3, 3.0, 0.5, 10, 4, 0.8),
      (0.2, 0.3, 2.0, 0.5, 12, 4, 0.7),
      (0.55, 0.3, 4.0, 0.9, 12, 8, 0.7),
      (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
      (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    ),
  )
  flakes = mean, deviation, least
  return _snow(key, image, flakes, sigma, keep, factor=factor, radius=radius)


# Frost: how many directions its needles have, and their half length in pixels
# along with its deviation. Chosen, like all numbers of `_rime`, so that mean,
# deviation and correlation between neighbours are those of the photographs.
_DIRECTIONS = 5
_NEEDLE = 9
_NEEDLE_SIGMA = 8.0


def _rime(key: Any, height: int, width: int) -> jax.Array:
  """Something like a photograph of a frosted window, [h, w, 3] in 0..1."""
  of_needles, of_land, of_look = jax.random.split(key, 3)
  size = _power(max(height, width))
  n = _DIRECTIONS
  lands = jax.vmap(lambda k: plasma(k, size=size, decay=1.5))(
    jax.random.split(of_land, n + 1)
  )[:, :height, :width]

  def bright(x: jax.Array) -> jax.Array:
    deviation = x.std((0, 1), keepdims=True)
    return (x - x.mean((0, 1), keepdims=True)) / jnp.maximum(deviation, 1e-6)

  # Crystals grow in few directions, each where its own patch is.
  look = jax.random.uniform(of_look, (n + 3,))
  # Beyond a border there would be longer ones.
  margin = 2 * _NEEDLE
  shape = (n, height + 2 * margin, width + 2 * margin, 1)
  noise = jax.random.uniform(of_needles, shape)
  needles = distortion.smear(
    noise + 2 * blur.box(noise, size=3),
    angle=180 * look[3:],
    sigma=_NEEDLE_SIGMA,
    radius=_NEEDLE,
  )[:, margin : margin + height, margin : margin + width]
  needles = jax.vmap(bright)(needles)[..., 0]
  # What is rescaled should not be computed again for its own mean.
  crystals = lax.optimization_barrier(jnp.max(needles * lands[1:], axis=0))
  crystals, light = bright(crystals[..., None]), bright(lands[0, ..., None])
  pattern = 0.85 * crystals + 0.6 * light
  level, contrast, blue = look[:3]
  level = 0.42 + 0.38 * level
  tint = jnp.stack([-0.07, 0.01, 0.06]) * (0.4 + 1.2 * blue)
  return jnp.clip(level + tint + (0.06 + 0.08 * contrast) * pattern, 0, 1)


@jax.jit
def _frost(key: Any, image: Any, keep: Any, share: Any) -> jax.Array:
  def run(key: Any, x: jax.Array) -> jax.Array:
    return keep * x + share * _rime(key, *x.shape[:2])

  return _full(severities.per_image(key, run, _unit(image)))


@typed
def frost(key: Key[Array, ""], image: Rgb, *, severity: int) -> Corrupted:
  """Looks through a frosted window: a x + b frost.

  Args:
    key: A PRNG key.
    image: Values in 0..255.
    severity: 1 to 5; (a, b) = (1, .4), (.8, .6), (.7, .7), (.65, .7),
      (.6, .75).

  Returns:
    The image behind frost.

  Reference:
    Hendrycks and Dietterich 2019, "Frost".

  Note:
    The published code cuts its frost out of five photographs. Here it is drawn:
    needles in some directions over bluish patches of uneven light, as bright,
    as uneven and as fine as those. Do not compare single pictures, and numbers
    with care.
  """
  keep, share = severities.pick(
    severity, ((1.0, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))
  )
  return _frost(key, image, keep, share)


# Spatter: the water's surface is lit with filters of images in 0..255, [h, w].


def _shifted(x: jax.Array, down: int, right: int) -> jax.Array:
  """The value at an offset of at most 2 pixels, 0 beyond the border."""
  height, width = x.shape
  wide = jnp.pad(x, 2)
  return wide[2 + down : 2 + down + height, 2 + right : 2 + right + width]


def _edges(x: jax.Array, low: float, high: float) -> jax.Array:
  """Canny's edges: ridges of the gradient that are joined to a high one."""
  height, width = x.shape
  wide = jnp.pad(x, 1, mode="edge")
  at = lambda i, j: wide[1 + i : 1 + i + height, 1 + j : 1 + j + width]
  across = lambda i: at(i, 1) - at(i, -1)
  along = lambda j: at(1, j) - at(-1, j)
  dx = across(-1) + 2 * across(0) + across(1)
  dy = along(-1) + 2 * along(0) + along(1)
  steep = jnp.abs(dx) + jnp.abs(dy)
  near = functools.partial(_shifted, steep)
  flat = jnp.abs(dy) < math.tan(math.pi / 8) * jnp.abs(dx)
  upright = jnp.abs(dy) > math.tan(3 * math.pi / 8) * jnp.abs(dx)
  falls = (dx < 0) != (dy < 0)
  ridge = jnp.where(
    falls,
    (steep > near(-1, 1)) & (steep > near(1, -1)),
    (steep > near(-1, -1)) & (steep > near(1, 1)),
  )
  sideways = (steep > near(0, -1)) & (steep >= near(0, 1))
  lengthways = (steep > near(-1, 0)) & (steep >= near(1, 0))
  ridge = jnp.where(flat, sideways, jnp.where(upright, lengthways, ridge))
  weak = ridge & (steep > low)

  def grow(edges: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
    old, _ = edges
    new = functools.reduce(
      jnp.logical_or,
      (_shifted(old, i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)),
    )
    new = new & weak
    return new, jnp.any(new != old)

  start = weak & (steep > high), jnp.array(True)
  return lax.while_loop(lambda edges: edges[1], grow, start)[0]


# The lengths of steps to the pixels around, as OpenCV has them for 5 x 5.
_STEPS = (
  *((i, j, 1.0) for i, j in ((0, 1), (1, 0), (0, -1), (-1, 0))),
  *((i, j, 1.4) for i in (-1, 1) for j in (-1, 1)),
  *((i, j, 2.1969) for i in (-2, 2) for j in (-1, 1)),
  *((i, j, 2.1969) for i in (-1, 1) for j in (-2, 2)),
)
_FAR = 20


def _distance(edges: jax.Array) -> jax.Array:
  """How far the next edge is, at most `_FAR` pixels."""

  def closer(_: Any, x: jax.Array) -> jax.Array:
    # 0 beyond the border would be an edge.
    ways = (_shifted(x - _FAR, i, j) + _FAR + d for i, j, d in _STEPS)
    return functools.reduce(jnp.minimum, ways, x)

  start = jnp.where(edges, 0.0, float(_FAR))
  return lax.fori_loop(0, _FAR, closer, start)


def _equalized(x: jax.Array) -> jax.Array:
  """Spreads whole numbers in 0.._FAR over 0..255, as evenly as they come."""
  values = jnp.arange(_FAR + 1)
  count = jnp.sum(x[..., None] == values, (0, 1))
  first = jnp.argmax(count > 0)
  rest = x.size - count[first]
  total = jnp.cumsum(count) - count[first]
  table = jnp.round(total * (255 / jnp.maximum(rest, 1)))
  table = jnp.where(rest > 0, table, first)
  return jnp.take(table, x.astype(jnp.int32))


def _box(x: jax.Array) -> jax.Array:
  return blur.box(x[..., None], size=3)[..., 0]


def _shine(layer: jax.Array) -> jax.Array:
  """Light on drops [h, w] in 0..255, brightest where slopes face one way."""
  distance = _distance(_edges(layer, 50, 150))
  height = _equalized(jnp.floor(_box(distance)))
  wide = jnp.pad(height, 1, mode="reflect")
  slope = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])
  rows, columns = height.shape
  lit = sum(
    float(slope[i, j]) * wide[i : i + rows, j : j + columns]
    for i, j in zip(*np.nonzero(slope), strict=True)
  )
  return jnp.round(_box(jnp.clip(lit, 0, 255)))


_WATER = np.array([175, 238, 238], np.float32) / 255
_MUD = np.array([63, 42, 20], np.float32) / 255


def _drops(layer: jax.Array, strength: Any) -> jax.Array:
  """How much water there is at each pixel of a layer [h, w] in 0..1."""
  layer = jnp.floor(255 * jnp.minimum(layer, 1))
  drops = layer * _shine(layer)
  most = drops.max()
  return strength * drops / jnp.where(most > 0, most, 1)


def _splashes(layer: jax.Array, softness: Any) -> jax.Array:
  """How much mud there is."""
  mud = (layer > 0).astype(jnp.float32)[..., None]
  soft = blur.gaussian(mud, sigma=softness, radius=6, border="edge")[..., 0]
  return jnp.where(soft < 0.8, 0, soft)


@functools.partial(jax.jit, static_argnames=("spread", "muddy"))
def _spatter(
  key: Any,
  image: Any,
  liquid: Any,
  strength: Any,
  *,
  spread: int,
  muddy: bool,
) -> jax.Array:
  mean, deviation, least = liquid

  def run(key: Any, x: jax.Array) -> jax.Array:
    noise = jax.random.normal(key, (*x.shape[:2], 1))
    layer = mean + deviation * blur.gaussian(noise, sigma=spread, border="edge")
    layer = layer[..., 0]
    layer = jnp.where(layer > least, layer, 0)
    if muddy:
      mud = _splashes(layer, strength)[..., None]
      return x * (1 - mud) + mud * _MUD
    return x + _drops(layer, strength)[..., None] * _WATER

  return _full(severities.per_image(key, run, _unit(image)))


@typed
def spatter(key: Key[Array, ""], image: Rgb, *, severity: int) -> Corrupted:
  """Splashes water on the lens, from severity 4 on mud.

  The liquid is where smoothed noise exceeds a threshold. Water shines by the
  slope of the distance to its edges: x + w (175, 238, 238) / 255. Mud covers:
  x (1 - m) + m (63, 42, 20) / 255.

  Args:
    key: A PRNG key.
    image: Values in 0..255.
    severity: 1 to 5; (mean and deviation of the noise, sigma of its smoothing,
      threshold, strongest w or sigma of m) = (.65, .3, 4, .69, .6),
      (.65, .3, 3, .68, .6), (.65, .3, 2, .68, .5), (.65, .3, 1, .65, 1.5),
      (.67, .4, 1, .65, 1.5).

  Returns:
    The image with drops or splashes.

  Reference:
    Hendrycks and Dietterich 2019, "Spatter" (an extra corruption); Canny, "A
    Computational Approach to Edge Detection", PAMI 1986, for the edges.
  """
  mean, deviation, spread, least, strength = severities.pick(
    severity,
    (
      (0.65, 0.3, 4, 0.69, 0.6),
      (0.65, 0.3, 3, 0.68, 0.6),
      (0.65, 0.3, 2, 0.68, 0.5),
      (0.65, 0.3, 1, 0.65, 1.5),
      (0.67, 0.4, 1, 0.65, 1.5),
    ),
  )
  liquid = mean, deviation, least
  return _spatter(
    key, image, liquid, strength, spread=spread, muddy=severity > 3
  )
