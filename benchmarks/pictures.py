"""Draws the README's pictures.

python -m benchmarks.pictures
"""

import pathlib

import jax
import numpy as np
from PIL import Image

from jaxshape import images
from jaxshape.data import textured_shapes
from jaxshape.filters import (
  bilateral,
  blur,
  cartoon,
  diffusion,
  median,
  stylization,
)

FOLDER = pathlib.Path("docs")


def main() -> None:
  """Writes all of them."""
  FOLDER.mkdir(exist_ok=True)
  sheet = textured_shapes.sheet(image_size=64)
  Image.fromarray(sheet).save(FOLDER / "textured_shapes.png", optimize=True)
  filters = Image.fromarray(_filters())
  filters.save(FOLDER / "suppression.png", optimize=True)
  photograph = Image.fromarray(_photograph())
  photograph.save(FOLDER / "filters.jpg", quality=88)


def _photograph() -> np.ndarray:
  """The example under eight filters, three in a row with itself first."""
  image = images.example()[:, 20:440]
  angle = np.linspace(0, 60 * np.pi, 224)
  wave = 128 + 60 * np.sin(angle[:, None] + 2 * np.cos(angle / 7))
  style = np.stack([wave, 0.8 * wave, 255 - wave], -1)
  shown = [
    image,
    diffusion.perona_malik(image, iterations=40),
    diffusion.robust(image, iterations=80),
    bilateral.bilateral(image, sigma_color=100.0, sigma_space=10.0),
    median.median(image, size=9),
    blur.gaussian(image, sigma=3.0),
    cartoon.cartoon(image),
    cartoon.cartoon(image, preset="pyramid"),
    stylization.match_statistics(image, style),
  ]
  return _tiles(np.asarray(shown).reshape(3, 3, *image.shape))


def _tiles(pictures: np.ndarray) -> np.ndarray:
  """Rows of pictures [rows, columns, H, W, C] as one, on white."""
  border = [(0, 0), (0, 0), (2, 2), (2, 2), (0, 0)]
  tiles = np.pad(pictures, border, constant_values=255)
  r, n, h, w, c = tiles.shape
  picture = tiles.transpose(0, 2, 1, 3, 4).reshape(r * h, n * w, c)
  return np.clip(np.round(picture), 0, 255).astype(np.uint8)


def _filters() -> np.ndarray:
  """Rows: the picture, diffusion of 20 and 50 iterations, blur of sigma 3."""
  source = textured_shapes.open_source(split="test", image_size=128)
  pictures = np.stack([source[i]["image"] for i in (0, 2, 5, 8, 10, 12, 14)])
  pictures = pictures.astype(np.float32)
  diffused = jax.jit(lambda x, n: diffusion.perona_malik(x, iterations=n))
  rows = [
    pictures,
    diffused(pictures, 20),
    diffused(pictures, 50),
    blur.gaussian(pictures, sigma=3.0),
  ]
  return _tiles(np.asarray(rows))


if __name__ == "__main__":
  main()
