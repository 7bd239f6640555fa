"""A network that was really trained, on the public stimuli.

python -m benchmarks.real_network --data_dir=<folder> --weights=<lite0.pth>

The folder holds `texture_vs_shape/{cue_conflict,edges,silhouettes}`. Measured
are EfficientNet-Lite0's shape bias and accuracies, what another way to decode,
resize or decide would change, and, where torch and
`efficientnet-lite-pytorch` are there, how far its logits are from theirs.
"""

import argparse
from collections.abc import Callable, Mapping
import datetime
import importlib
import io
import pathlib
import platform
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from benchmarks import machine
from jaxshape.backbones import efficientnet
from jaxshape.data import cue_conflict
from jaxshape.engine import pytorch
from jaxshape.errors import InputError
from jaxshape.layers import apply
from jaxshape.metrics import categories, shape_bias

OUTPUT = pathlib.Path(__file__).parent / "results" / "real_network.md"
NAME = "efficientnet_lite0"
SPLITS = ("cue_conflict", "edges", "silhouettes")
SIZE = 224
BATCH = 32
COMPARED = 64  # Stimuli whose logits are compared with the public code's.


class Choice(NamedTuple):
  """A way from a file to a decision.

  Attributes:
    options: Of the source.
    quality: Of JPEG, through which the picture goes once more; 0 for not.
    aggregate: Of classes to categories.
  """

  options: Mapping[str, Any]
  quality: int = 0
  aggregate: str = "mean"


CHOICES = {
  "as it is: 224 px, not resized": Choice({}),
  "to 256 px, bicubic, the middle 224": Choice(
    {"resize_to": 256, "interpolation": "bicubic"}
  ),
  "to 256 px, bilinear, the middle 224": Choice(
    {"resize_to": 256, "interpolation": "bilinear"}
  ),
  "to 256 px, nearest, the middle 224": Choice(
    {"resize_to": 256, "interpolation": "nearest"}
  ),
  "JPEG of quality 75 once more": Choice({}, quality=75),
  "categories by their sum": Choice({}, aggregate="sum"),
  "categories by their best class": Choice({}, aggregate="max"),
}


class Seen(NamedTuple):
  """What came out for one split.

  Attributes:
    probabilities: [images, 1000].
    labels: Of the shapes.
    textures: Of the textures, or None.
  """

  probabilities: np.ndarray
  labels: np.ndarray
  textures: np.ndarray | None


def main(arguments: list[str] | None = None) -> None:
  """The command line."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--data_dir", required=True)
  parser.add_argument("--weights", required=True)
  parser.add_argument("--output", default=str(OUTPUT))
  values = parser.parse_args(arguments)
  try:
    text = page(values.data_dir, values.weights)
  except InputError as error:
    sys.exit(f"error: {error}")
  pathlib.Path(values.output).write_text(text)
  print(text)


def page(data_dir: str, weights: str) -> str:
  """Measures everything.

  Args:
    data_dir: With `texture_vs_shape`.
    weights: The public file.

  Returns:
    The page.
  """
  logits = network(weights)
  seen: dict[tuple[str, str], Seen] = {}
  began = time.perf_counter()
  decoded: dict[Any, Seen] = {}
  for name, choice in CHOICES.items():
    for split in SPLITS:
      pixels = split, choice.quality, *sorted(choice.options.items())
      if pixels not in decoded:
        decoded[pixels] = look(logits, data_dir, split, choice)
      seen[name, split] = decoded[pixels]
  took = time.perf_counter() - began
  said = {
    (name, split): np.asarray(
      categories.decide(
        seen[name, split].probabilities, aggregate=CHOICES[name].aggregate
      )
    )
    for name, split in seen
  }
  first = next(iter(CHOICES))
  lines = [
    "# A network that was really trained, on the public stimuli",
    "",
    "`python -m benchmarks.real_network --data_dir=<folder> --weights=<file>`",
    "",
    f"EfficientNet-Lite0 (`{pathlib.Path(weights).name}`), trained on ImageNet "
    "by others, on the stimuli of Geirhos et al. (ICLR 2019; CC BY 4.0). "
    f"{machine.processor()}; Python {platform.python_version()}, jax "
    f"{jax.__version__}, Pillow {Image.__version__}; "
    f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}; "
    f"{took:.0f} s for all.",
    "",
    "| | shape bias | decisions for shape or texture, of those in conflict | "
    "edges | silhouettes | decisions that differ from the first row's, of "
    f"{sum(len(said[first, s]) for s in SPLITS):,} |",
    "|---|---:|---:|---:|---:|---:|",
  ]
  for name in CHOICES:
    counts = count(seen[name, "cue_conflict"], said[name, "cue_conflict"])
    bias, decisions = shape_bias.shape_bias(counts.sum(axis=0))
    right = [
      np.mean(said[name, split] == seen[name, split].labels)
      for split in SPLITS[1:]
    ]
    differ = sum(
      int(np.sum(said[name, split] != said[first, split])) for split in SPLITS
    )
    cells = (
      f"{float(bias):.4f}",
      f"{int(decisions)} of {int(counts.sum())}",
      *(f"{x:.4f}" for x in right),
      str(differ),
    )
    lines.append(f"| {name} | " + " | ".join(cells) + " |")
  counts = count(seen[first, "cue_conflict"], said[first, "cue_conflict"])
  by_class, _ = shape_bias.shape_bias(counts)
  lines += [
    "",
    "| | " + " | ".join(categories.CATEGORIES) + " |",
    "|---|" + "---:|" * len(categories.CATEGORIES),
    "| shape bias | " + " | ".join(f"{x:.2f}" for x in by_class) + " |",
    "| decisions | "
    + " | ".join(str(int(n)) for n in counts[:, :2].sum(axis=1))
    + " |",
    "",
    reference(logits, data_dir, weights),
    "",
  ]
  return "\n".join(lines)


def network(weights: str) -> Callable[[np.ndarray], np.ndarray]:
  """The network of a file: from images 0..255 to logits."""
  net = efficientnet.make(NAME, num_classes=1000)
  params, collections = efficientnet.from_state_dict(net, pytorch.load(weights))
  given = efficientnet.PREPROCESSING[NAME]
  mean, std = (jnp.asarray(x, jnp.float32) for x in (given.mean, given.std))

  @jax.jit
  def run(images: jax.Array) -> jax.Array:
    x = (images.astype(jnp.float32) - mean) / std
    return apply.apply(net, params, collections, x, train=False)[0]

  def logits(images: np.ndarray) -> np.ndarray:
    padded = np.resize(images, (BATCH, *images.shape[1:]))
    return np.asarray(run(padded))[: len(images)]

  return logits


def look(
  logits: Callable[[np.ndarray], np.ndarray],
  data_dir: str,
  split: str,
  choice: Choice,
) -> Seen:
  """All pictures of a split through the network."""
  source = cue_conflict.open_source(
    "texture_vs_shape",
    split=split,
    image_size=SIZE,
    data_dir=data_dir,
    classes=categories.CATEGORIES,
    **choice.options,
  )
  found = []
  examples = [source[i] for i in range(len(source))]
  for begin in range(0, len(examples), BATCH):
    images = [e["image"] for e in examples[begin : begin + BATCH]]
    if choice.quality:
      images = [_encoded(image, choice.quality) for image in images]
    found.append(logits(np.stack(images)))
  every = np.concatenate(found)
  textures = None
  if "texture" in examples[0]:
    textures = np.array([e["texture"] for e in examples])
  return Seen(
    np.asarray(jax.nn.softmax(every)),
    np.array([e["label"] for e in examples]),
    textures,
  )


def count(seen: Seen, decisions: np.ndarray) -> np.ndarray:
  """Decisions for shape, texture and neither, by class of the shape."""
  assert seen.textures is not None
  return np.asarray(
    shape_bias.count_decisions(
      decisions,
      seen.labels,
      seen.textures,
      num_classes=len(categories.CATEGORIES),
      mask=seen.textures >= 0,
    )
  )


def reference(
  logits: Callable[[np.ndarray], np.ndarray], data_dir: str, weights: str
) -> str:
  """A line on the difference from the public code's logits."""
  try:
    torch = importlib.import_module("torch")
    public = importlib.import_module("efficientnet_lite_pytorch")
  except ImportError as error:
    return f"The public code was not at hand ({error.name} is missing)."
  model = public.EfficientNet.from_name("efficientnet-lite0").eval()
  model.load_state_dict(torch.load(weights, weights_only=True))
  source = cue_conflict.open_source(
    "texture_vs_shape",
    split=SPLITS[0],
    image_size=SIZE,
    data_dir=data_dir,
    classes=categories.CATEGORIES,
  )
  rows = np.linspace(0, len(source) - 1, COMPARED).astype(int)
  images = np.stack([source[int(i)]["image"] for i in rows])
  ours = np.concatenate(
    [logits(images[i : i + BATCH]) for i in range(0, len(images), BATCH)]
  )
  x = (images.astype(np.float32) / 255 - 0.498) / 0.502
  with torch.no_grad():
    theirs = model(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()
  same = int(np.sum(ours.argmax(1) == theirs.argmax(1)))
  return (
    f"Logits of {COMPARED} stimuli against `efficientnet-lite-pytorch`, torch "
    f"{torch.__version__}: largest difference {np.abs(ours - theirs).max():.1e}"
    f" (largest logit {np.abs(theirs).max():.1f}), same class for {same} of "
    f"{COMPARED}."
  )


def _encoded(image: np.ndarray, quality: int) -> np.ndarray:
  file = io.BytesIO()
  Image.fromarray(image).save(file, "JPEG", quality=quality)
  return np.asarray(Image.open(file).convert("RGB"))


if __name__ == "__main__":
  main()
