"""Names what is on images without labels: a folder of them, by any classifier.

python -m jaxshape.predict --workdir=runs/x --images=photos/ --output=named.csv

Writes a table with a row per image: its name below the folder, then classes and
their probabilities, the likeliest first. All images in the folder and below it
are read, in the order of their names, and cut as the run cuts those that it is
evaluated on. The batch size and the number of devices change nothing but the
last digits of floats.

A run that was stopped goes on where it was if the same command is given again.
`--categories=imagenet` gives the 16 categories of shape bias instead of the
1,000 classes of a head; `score1` is then the mean probability of the category's
classes, and scores do not add up to 1.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import csv
import dataclasses
import io
import json
import os
import pathlib
import time
from typing import Any, NamedTuple

from absl import flags
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np
from tqdm import tqdm
import xxhash

from jaxshape.data import decode, photos, sources, stream
from jaxshape.engine import (
  classifiers,
  command,
  processes,
  runtime,
  trained,
)
from jaxshape.errors import InputError, few, reading_config
from jaxshape.metrics import categories as categories_lib
from jaxshape.typing import Array, Config

CATEGORIES = ("imagenet",)
# Names of files are bytes, and need not be of any encoding.
_ENCODING: Mapping[str, Any] = {
  "encoding": "utf-8",
  "errors": "surrogateescape",
  "newline": "",
}


class Network(NamedTuple):
  """A trained network that names images.

  Attributes:
    logits: `(state, images 0..255) -> [batch, classes]`.
    state: Its parameters, any tree.
    classes: Names of the classes, in the order of the logits.
    decoder: Makes the network's input of an image.
    mesh: The devices, as `runtime.make_mesh` gives them.
    independent: Whether any number of classes may be there at once: each has
      a probability of its own.
  """

  logits: Callable[[Any, Any], Array]
  state: Any
  classes: Sequence[str]
  decoder: decode.Decoder
  mesh: Mesh
  independent: bool = False


def load(
  workdir: str | os.PathLike[str], *, step: int | str | None = None
) -> Network:
  """The network of a run, whatever its system and architecture.

  Args:
    workdir: The run's folder.
    step: Which checkpoint; "best" by the run's metric, the newest intact one
      by default.

  Returns:
    The network, on all devices.

  Raises:
    InputError: Nothing intact was trained there, or no classifier of images.
  """
  found = trained.classifier(workdir, step=step)
  with reading_config():
    decoder = _decoder(found.config, found.splits)
  independent = found.config.get("task") == "multilabel"
  return Network(
    found.logits,
    found.state,
    found.splits.classes,
    decoder,
    found.mesh,
    independent,
  )


def _decoder(config: Config, splits: classifiers.Splits) -> decode.Decoder:
  """How the run's data are cut in evaluation."""
  data = config.data
  options = classifiers.given(data.options)
  if options.get("fit", "crop") != "crop":
    raise InputError(
      f"the run pads its images (config.data.options.fit={options['fit']!r}), "
      "and only networks of cut ones are predicted with."
    )
  try:
    source = splits.some(data.train_split)
  except InputError:  # Only what is evaluated is at hand.
    source = splits.some(data.eval_splits[0])
  # Kinds of data have defaults of their own.
  own = getattr(source, "_decoder", None)
  if isinstance(own, decode.Decoder):
    return dataclasses.replace(own, crop="center")
  names = ("resize_to", "interpolation", "max_pixels")
  given = {name: options[name] for name in names if name in options}
  if len(source):  # Drawn by a program, at the network's size: nothing is cut.
    given.setdefault("resize_to", data.image_size)
  return decode.Decoder(image_size=data.image_size, **given)


def predict(
  images: str | os.PathLike[str],
  output: str | os.PathLike[str],
  *,
  network: Network,
  top: int = 5,
  categories: str | None = None,
  skip_damaged: bool = False,
  batch_size: int = 64,
) -> tuple[pathlib.Path, list[str]]:
  """Writes the likeliest classes of every image of a folder.

  Args:
    images: The folder; all images in it and below, by name.
    output: Ends with ".csv", outside that folder; a ".csv.part" beside it lets
      a stopped run go on.
    network: As `load` gives it.
    top: How many classes are named, at most all.
    categories: Of `CATEGORIES`, what the classes are gathered to; None for the
      classes themselves.
    skip_damaged: Whether images that cannot be decoded are left out.
    batch_size: Images at a time, of all devices together; what these do not
      share evenly is rounded up.

  Returns:
    The table, and the names of the images that were left out.

  Raises:
    InputError: There are no images, one is damaged, the output is there or
      lies in the folder, or a run that was stopped had other settings.
  """
  root, output = pathlib.Path(images), pathlib.Path(output)
  _check(
    root, output, network, top=top, categories=categories, batch=batch_size
  )
  listed = photos.listed(root, None)
  names = categories_lib.CATEGORIES if categories else tuple(network.classes)
  top = min(top, len(names))
  number = "score" if categories else "probability"
  word = "category" if categories else "class"
  header = ["file"]
  for k in range(1, top + 1):
    header += [f"{word}{k}", f"{number}{k}"]
  settings = {
    "images": str(root.resolve()),
    "network": _digest(network),
    "top": top,
    "categories": categories,
  }
  began = time.perf_counter()
  with _Rows(output, header, settings) as rows:
    todo = [n for n in listed if not rows.has(n, _stamp(root / n))]
    rest = _Images(root, todo, network.decoder, skip_damaged=skip_damaged)
    bar = tqdm(
      total=len(listed),
      initial=len(listed) - len(todo),
      unit="image",
      disable=None,
    )
    found = _run(network, rest, top, categories, batch_size)
    for index, mask, probabilities, order, finite in found:
      real = np.flatnonzero((index >= 0) & (mask > 0))
      bad = real[~finite[real]]
      if bad.size:
        raise InputError(
          "the network gives no finite numbers for "
          f"{root / todo[index[bad[0]]]}."
        )
      for i in real.tolist():
        pairs = zip(order[i].tolist(), probabilities[i].tolist(), strict=True)
        row = [text for k, p in pairs for text in (names[k], f"{p:.6g}")]
        file = todo[index[i]]
        rows.add([file, *row], rest.stamps[file])
      rows.flush()
      bar.update(int((index >= 0).sum()))
    bar.close()
    left_out = rows.missing(listed)
    if len(left_out) == len(listed):
      raise InputError(f"{root}: all {len(listed)} images are damaged.")
    rows.finish(listed)
  took = time.perf_counter() - began
  print(  # noqa: T201 (this is the answer)
    f"{len(todo)} images in {took:.1f} s, {len(todo) / took:.2f} images/s"
  )
  return output, left_out


def _check(
  root: pathlib.Path,
  output: pathlib.Path,
  network: Network,
  *,
  top: int,
  categories: str | None,
  batch: int,
) -> None:
  for name, value in {"top": top, "batch_size": batch}.items():
    if value < 1:
      raise InputError(f"{name} must be 1 or more, got {value}.")
  if categories not in (None, *CATEGORIES):
    raise InputError(
      f"categories must be one of {', '.join(CATEGORIES)}, got {categories!r}."
    )
  count = len(network.classes)
  if categories and (network.independent or count != 1000):
    raise InputError(
      "categories=imagenet gathers the 1,000 classes of ImageNet, of which an "
      f"image shows one; the network tells {count} classes apart"
      f"{', each by itself' * network.independent}."
    )
  if not root.is_dir():
    raise InputError(f"there is no folder {root}; name one of images.")
  if output.suffix.lower() != ".csv":
    raise InputError(f"output must end with .csv, got {output}.")
  if output.resolve().is_relative_to(root.resolve()):
    raise InputError(
      f"{output} lies in the folder of the images, {root}; write elsewhere."
    )
  if output.exists():
    raise InputError(f"{output} is there already; remove it or name another.")


def _run(
  network: Network,
  source: "_Images",
  top: int,
  categories: str | None,
  batch_size: int,
) -> Iterator[tuple[np.ndarray, ...]]:
  """The likeliest classes of batches, one being computed while one is used.

  Yields numbers of images (-1 for padding), their mask (0 for damaged ones),
  the highest probabilities and their classes, and what is finite.
  """
  if not len(source):
    return

  def name(state: Any, images: Array) -> tuple[Array, ...]:
    logits = jnp.asarray(network.logits(state, images), jnp.float32)
    finite = jnp.isfinite(logits).all(axis=-1)
    if network.independent:
      p = jax.nn.sigmoid(logits)
    else:
      p = jax.nn.softmax(logits, axis=-1)
    if not categories:
      return *jax.lax.top_k(p, top), finite
    order = categories_lib.ranking(p)[..., :top]
    score = categories_lib.scores(p)
    return jnp.take_along_axis(score, order, axis=-1), order, finite

  run = jax.jit(name)
  shared = network.mesh.shape["data"]
  size = -(-min(batch_size, len(source)) // shared) * shared
  with contextlib.closing(stream.evaluate(source, batch_size=size)) as batches:
    ahead = None
    for batch in batches:
      placed = runtime.place({"image": batch["image"]}, network.mesh)
      now = batch["index"], batch["mask"], *run(network.state, placed["image"])
      if ahead is not None:
        yield tuple(map(np.asarray, ahead))
      ahead = now
    if ahead is not None:
      yield tuple(map(np.asarray, ahead))


class _Images:
  """Images of a folder as a source; damaged ones are told by their mask."""

  classes = ()

  def __init__(
    self,
    root: pathlib.Path,
    files: Sequence[str],
    decoder: decode.Decoder,
    *,
    skip_damaged: bool,
  ):
    self._root, self._files, self._decoder = root, files, decoder
    self._skip_damaged = skip_damaged
    self.stamps: dict[str, str] = {}

  def __len__(self) -> int:
    return len(self._files)

  def __getitem__(self, i: int) -> sources.Example:
    path = self._root / self._files[i]
    if not path.is_file():  # A pipe named x.jpg would wait for ever.
      raise InputError(f"{path} is gone or is no regular file.")
    try:
      self.stamps[self._files[i]] = _stamp(path)
      with path.open("rb") as file:
        image = self._decoder(file, name=str(path))
      return {"image": image, "mask": np.float32(1)}
    except decode.DamagedError as error:
      if not self._skip_damaged:
        raise decode.DamagedError(
          f"{error} Replace it, or leave such images out with --skip_damaged."
        ) from error
    except OSError as error:
      raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    size = self._decoder.image_size
    blank = np.zeros((size, size, 3), np.uint8)
    return {"image": blank, "mask": np.float32(0)}


class _Rows:
  """A table that grows in any order and outlives its writer.

  Its part begins with a line of settings, and each row ends with what tells its
  image from another of that name.
  """

  def __init__(
    self, output: pathlib.Path, header: Sequence[str], settings: Any
  ):
    """Goes on with what is there, or begins."""
    self._output, self._header = output, list(header)
    self._part = output.with_name(f"{output.name}.part")
    self._rows: dict[str, tuple[str, str]] = {}  # Line and stamp, by file.
    text = json.dumps(settings, sort_keys=True) + "\n"
    output.parent.mkdir(parents=True, exist_ok=True)
    if self._part.exists():
      self._resume(settings)
    # What a killed run left half of is gone, and the next row is a whole one.
    for line, stamp in self._rows.values():
      text += _line([line, stamp])
    _replace(self._part, text)
    self._file = self._part.open("a", **_ENCODING)

  def __enter__(self) -> "_Rows":
    return self

  def __exit__(self, *_: object) -> None:
    self._file.close()
    if not self._rows:
      self._part.unlink(missing_ok=True)

  def _resume(self, settings: Mapping[str, Any]) -> None:
    try:
      with self._part.open(**_ENCODING) as file:
        old = json.loads(file.readline())
        changed = [name for name in settings if old.get(name) != settings[name]]
        if not changed:
          # Zeros are what a machine that lost its power may leave.
          lines = (line.replace("\0", "") for line in file)
          for row in csv.reader(lines):
            if len(row) == 2 and row[0].endswith("\n") and row[1]:
              kept = next(csv.reader(io.StringIO(row[0], newline="")))
              if len(kept) == len(self._header):
                self._rows[kept[0]] = row[0], row[1]
    except (ValueError, AttributeError, csv.Error, StopIteration) as error:
      raise InputError(
        f"{self._part} is damaged; remove it to begin anew."
      ) from error
    if changed:
      raise InputError(
        f"{self._part} is of a run with other {', '.join(changed)}; give the "
        "same command to go on, or remove it to begin anew."
      )

  def has(self, file: str, stamp: str) -> bool:
    """Whether a row is that of this very image; one of another is dropped."""
    if file in self._rows and self._rows[file][1] != stamp:
      del self._rows[file]
    return file in self._rows

  def add(self, row: Sequence[str], stamp: str) -> None:
    """Adds what an image is named."""
    line = _line(row)
    self._rows[row[0]] = line, stamp
    self._file.write(_line([line, stamp]))

  def flush(self) -> None:
    """Lets what was added survive the program."""
    self._file.flush()

  def missing(self, listed: Sequence[str]) -> list[str]:
    """The images without a row."""
    return [file for file in listed if file not in self._rows]

  def finish(self, listed: Sequence[str]) -> None:
    """Writes the table, its rows in the order of the images."""
    rows = [self._rows[file][0] for file in listed if file in self._rows]
    _replace(self._output, "".join([_line(self._header), *rows]))
    self._file.close()
    self._part.unlink()


def _line(row: Sequence[str]) -> str:
  text = io.StringIO(newline="")
  csv.writer(text, lineterminator="\n").writerow(row)
  return text.getvalue()


def _replace(path: pathlib.Path, text: str) -> None:
  """Writes a file that is never half there."""
  part = path.with_name(f"{path.name}.new")
  with part.open("w", **_ENCODING) as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  part.replace(path)


def _stamp(path: pathlib.Path) -> str:
  try:
    status = path.stat()
  except OSError as error:
    raise InputError(f"{path} cannot be read: {error.strerror}.") from error
  return f"{status.st_size} {status.st_mtime_ns}"


def _digest(network: Network) -> str:
  """Of all that decides on a row, so that another network is noticed."""
  digest = xxhash.xxh3_64()
  seen = [tuple(network.classes), network.decoder, network.independent]
  digest.update(repr(seen).encode(errors="surrogateescape"))
  for path, leaf in jax.tree_util.tree_flatten_with_path(network.state)[0]:
    dtype = getattr(leaf, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
      continue  # Nothing is drawn.
    digest.update(f"{jax.tree_util.keystr(path)} {np.shape(leaf)}".encode())
    digest.update(np.ascontiguousarray(leaf).tobytes())
  return digest.hexdigest()


def main() -> None:
  """The command line."""
  values = flags.FLAGS
  if not values.workdir:
    raise InputError(
      "name a trained run with --workdir=runs/<name>: train one with train.py, "
      "such as --config=configs/texture_suppression.py."
    )
  if not values.images:
    raise InputError("name a folder of images with --images=<folder>.")
  step = values.checkpoint
  if step is not None and step != "best":
    if not step.isdecimal():
      raise InputError(f"give a step or best, got --checkpoint={step}.")
    step = int(step)
  if processes.index():
    raise InputError("images are predicted by one process.")
  root = pathlib.Path(values.images)
  if not root.is_dir():  # Before the network is made.
    raise InputError(f"there is no folder {root}; name one of images.")
  output, left_out = predict(
    root,
    values.output,
    network=load(values.workdir, step=step),
    top=values.top,
    categories=values.categories,
    skip_damaged=values.skip_damaged,
    batch_size=values.batch_size,
  )
  if left_out:
    print(  # noqa: T201
      f"left out, as they are damaged: {len(left_out)}, {few(left_out)}"
    )
  print(f"written: {output}")  # noqa: T201


if __name__ == "__main__":
  flags.DEFINE_string("workdir", None, "The run whose network is used.")
  flags.DEFINE_string("images", None, "A folder; images below it count.")
  flags.DEFINE_string("output", "predictions.csv", "The table to write.")
  flags.DEFINE_integer("top", 5, "How many classes of an image are named.")
  flags.DEFINE_string("checkpoint", None, "A step, or best; else the newest.")
  flags.DEFINE_integer("batch_size", 64, "Images at a time.")
  flags.DEFINE_enum(
    "categories", None, CATEGORIES, "16 categories instead of 1,000 classes."
  )
  flags.DEFINE_bool("skip_damaged", False, "Leaves damaged images out.")
  command.run(main)
