"""Draws the README's pictures.

python -m benchmarks.pictures
"""

import pathlib

import jax
import numpy as np
from PIL import Image

from jaxshape.data import textured_shapes
from jaxshape.filters import blur, diffusion

FOLDER = pathlib.Path("docs")


def main() -> None:
  """Writes all of them."""
  FOLDER.mkdir(exist_ok=True)
  sheet = textured_shapes.sheet(image_size=64)
  Image.fromarray(sheet).save(FOLDER / "textured_shapes.png", optimize=True)
  filters = Image.fromarray(_filters())
  filters.save(FOLDER / "suppression.png", optimize=True)


def _filters() -> np.ndarray:
  """Rows: the picture, diffusion of 20 and 50 iterations, blur of sigma 3."""
  source = textured_shapes.open_source(split="test", image_size=128)
  images = np.stack([source[i]["image"] for i in (0, 2, 5, 8, 10, 12, 14)])
  images = images.astype(np.float32)
  diffused = jax.jit(
    lambda images, n: diffusion.perona_malik(images, iterations=n)
  )
  rows = [
    images,
    diffused(images, 20),
    diffused(images, 50),
    blur.gaussian(images, sigma=3.0),
  ]
  tiles = np.pad(
    np.asarray(rows),
    [(0, 0), (0, 0), (2, 2), (2, 2), (0, 0)],
    constant_values=255,
  )
  r, n, h, w, c = tiles.shape
  picture = tiles.transpose(0, 2, 1, 3, 4).reshape(r * h, n * w, c)
  return np.clip(np.round(picture), 0, 255).astype(np.uint8)


if __name__ == "__main__":
  main()
