"""How much of an image each filter keeps where people see boundaries.

python -m benchmarks.boundaries --data=<folder of BSDS500's test images>

The folder holds images/<id>.jpg and boundaries/<id>.png, the mean of several
people's drawings (0..255). Gradients of light after a filter are compared with
those before: on boundaries, within two pixels of where at least half of the
people drew, and elsewhere, farther than five pixels from any drawing. Strengths
are chosen on the first 20 pictures so that all filters leave as much elsewhere
as Perona-Malik diffusion at p1's settings; the other pictures are measured.
"""

import argparse
from collections.abc import Callable, Mapping
import pathlib
import sys

import jax
import numpy as np
from PIL import Image

from jaxshape.filters import bilateral, blur, color, diffusion, median

OUTPUT = pathlib.Path(__file__).parent / "results" / "boundaries.md"
CHOOSING = 20

Filter = Callable[[np.ndarray, float], jax.Array]
# A filter as a function of its strength, the range to look in, and the words.
FILTERS: Mapping[str, tuple[Filter, tuple[float, float], str]] = {
  "Perona-Malik": (
    lambda x, k: diffusion.perona_malik(x, kappa=k),
    (20.0, 20.0),
    "kappa = {:.0f}, 20 iterations (p1)",
  ),
  "rational conduction": (
    lambda x, k: diffusion.perona_malik(x, kappa=k, conduction="rational"),
    (2.0, 80.0),
    "kappa = {:.1f}, 20 iterations",
  ),
  "coupled channels": (
    lambda x, k: diffusion.perona_malik(x, kappa=k, coupled=True),
    (5.0, 160.0),
    "kappa = {:.1f}, 20 iterations",
  ),
  "robust": (
    lambda x, f: diffusion.robust(
      x, scale=f * diffusion.gradient_scale(x), iterations=50
    ),
    (0.3, 20.0),
    "{:.2f} of its own scale, 50 iterations",
  ),
  "bilateral": (
    lambda x, s: bilateral.bilateral(x, sigma_color=s, sigma_space=3.0),
    (2.0, 400.0),
    "sigma_color = {:.0f}, sigma_space = 3",
  ),
  "Gaussian": (
    lambda x, s: blur.gaussian(x, sigma=s, radius=12),
    (0.2, 3.0),
    "sigma = {:.2f}",
  ),
  "median, 3 px": (lambda x, _: median.median(x, size=3), (3, 3), "size 3"),
  "median, 5 px": (lambda x, _: median.median(x, size=5), (5, 5), "size 5"),
}


def slopes(image: np.ndarray) -> np.ndarray:
  """The length of the gradient of light, [H, W]."""
  light = np.asarray(color.rgb_to_gray(image))[..., 0]
  down, right = np.gradient(light)
  return np.hypot(down, right)


def regions(drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Where boundaries are and where nobody sees one, as masks."""

  def near(mask: np.ndarray, reach: int) -> np.ndarray:
    wide = blur.box(
      mask[..., None].astype(np.float32),
      size=2 * reach + 1,
      border="constant",
    )
    return np.asarray(wide)[..., 0] > 1e-4

  return near(drawn >= 128, 2), ~near(drawn > 0, 5)


def kept(
  run: Callable[[np.ndarray], jax.Array], pictures: list[tuple]
) -> tuple[float, float]:
  """Shares of the gradients that a filter keeps: on boundaries, elsewhere."""
  sums = np.zeros((2, 2))
  for image, before, masks in pictures:
    after = slopes(np.asarray(run(image)))
    for i, mask in enumerate(masks):
      sums[i] += after[mask].sum(), before[mask].sum()
  on, elsewhere = sums[:, 0] / sums[:, 1]
  return float(on), float(elsewhere)


def strength(
  run: Filter, limits: tuple[float, float], pictures: list, goal: float
) -> float:
  """The strength that keeps as much elsewhere as is asked, by bisection."""
  low, high = limits
  for _ in range(12 if low < high else 0):
    middle = (low * high) ** 0.5
    _, elsewhere = kept(lambda x, s=middle: run(x, s), pictures)
    low, high = (middle, high) if elsewhere > goal else (low, middle)
  return (low * high) ** 0.5


def load(folder: pathlib.Path) -> list[tuple]:
  """Pictures, their slopes and their regions, in order of their names."""
  files = sorted((folder / "images").glob("*.jpg"))
  if not files:
    sys.exit(f"error: {folder}/images holds no .jpg; --data must name BSDS500.")
  pictures = []
  for file in files:
    with Image.open(file) as picture:
      image = np.asarray(picture.convert("RGB"))
    with Image.open(folder / "boundaries" / f"{file.stem}.png") as picture:
      drawn = np.asarray(picture)
    # Two shapes compile; all on their side are the same.
    if image.shape[0] > image.shape[1]:
      image, drawn = image.swapaxes(0, 1), drawn.swapaxes(0, 1)
    image = image.astype(np.float32)
    pictures.append((image, slopes(image), regions(drawn)))
  return pictures


def main() -> None:
  """The command line."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--data", required=True, type=pathlib.Path)
  parser.add_argument("--output", default=OUTPUT, type=pathlib.Path)
  options = parser.parse_args()
  pictures = load(options.data)
  some, rest = pictures[:CHOOSING], pictures[CHOOSING:]
  first = FILTERS["Perona-Malik"][0]
  _, goal = kept(lambda x: first(x, 20.0), some)
  rows = {}
  for name, (run, limits, words) in FILTERS.items():
    chosen = strength(run, limits, some, goal)
    on, elsewhere = kept(lambda x, r=run, s=chosen: r(x, s), rest)
    rows[name] = {
      "strength": words.format(chosen),
      "kept on boundaries": f"{on:.3f}",
      "kept elsewhere": f"{elsewhere:.3f}",
      "ratio": f"{on / elsewhere:.2f}",
    }
    print(name, rows[name], flush=True)
  lines = [["filter", *next(iter(rows.values()))], ["---"] * 5]
  lines += [[name, *row.values()] for name, row in rows.items()]
  text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
  options.output.write_text(
    "# Gradients kept on people's boundaries and elsewhere\n\n"
    f"`python -m benchmarks.boundaries --data=...` on {len(rest)} photographs "
    f"of BSDS500 (strengths chosen on {len(some)} others).\n\n{text}\n",
    encoding="utf-8",
  )


if __name__ == "__main__":
  main()
