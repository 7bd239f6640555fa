"""Describes images by vectors, so that similar ones are found.

python -m jaxshape.describe photos/ --weights=network.pth --output=photos.npy

The file is one of torchvision's residual networks, or one of the public
retrieval networks (cnnimageretrieval-pytorch), which say themselves how they
pool and whiten. Writes descriptors, float32 [images, dimensions], normalized,
and beside them a `.txt` with the images' names in the same order.

Images keep their shape, the longer side is at most `--image_size`; each is
described at several `--scales`. Photos are turned upright (EXIF). A run that
was stopped goes on where it was if the same command is given again.

Programs are compiled for images of a size. So that not every photo has one of
its own, images are padded to multiples of `--bucket` pixels; a mask keeps what
is computed as it is without padding, to rounding. Networks that pool by regions
(`rmac`, or regional ones) cannot be padded: they compile for every size.

Reference:
  Radenovic et al., "Fine-tuning CNN Image Retrieval with No Human Annotation",
  TPAMI 2019, Sec. 3, and its public code.
"""

from collections.abc import Mapping, Sequence
import hashlib
import io
import json
import math
import os
import pathlib
import time
from typing import Any
import zipfile

from absl import flags
import jax
import numpy as np
from tqdm import tqdm

from jaxshape.backbones import resnet, retrieval
from jaxshape.data import decode, photos, revisited
from jaxshape.engine import command, pickled, processes, pytorch
from jaxshape.errors import InputError, few
from jaxshape.retrieval import descriptors

_SAVE_SECONDS = 10.0
_LEFT, _DONE, _BROKEN = 0, 1, 2


def load(
  weights: str | os.PathLike[str] | None,
  *,
  backbone: str | None = None,
  pooling: str | None = None,
  p: float | None = None,
  dtype: str = "float32",
) -> retrieval.Network:
  """The network of a file of PyTorch, which runs nothing of that file.

  Args:
    weights: Of torchvision or of the public retrieval code; None draws the
      weights, which is of use for trying things out only.
    backbone: Of `resnet.VARIANTS`; None for what the file says, else resnet101.
    pooling: One of `retrieval.POOLINGS`; None for what the file says, else
      "gem".
    p: GeM's exponent; None for what the file says, else 3.
    dtype: What is computed in, "float32" or "bfloat16".

  Returns:
    The network.

  Raises:
    InputError: The file is not there, or is of another kind of network.
  """
  tensors, meta = None, {}
  if weights is not None:
    tensors, meta = pytorch.load(weights), _meta(weights)
  try:
    return retrieval.make(
      tensors, meta, backbone=backbone, pooling=pooling, p=p, dtype=dtype
    )
  except InputError as error:
    if weights is None:
      raise
    raise InputError(f"{weights}: {error}") from error


def describe(
  root: str | os.PathLike[str],
  output: str | os.PathLike[str],
  *,
  network: retrieval.Network,
  scales: Sequence[float] = retrieval.SCALES,
  image_size: int = 1024,
  whitening: descriptors.Whitening | None = None,
  dimensions: int | None = None,
  names: Sequence[str] | None = None,
  boxes: Mapping[str, photos.Box] | None = None,
  skip_broken: bool = False,
  batch_size: int | None = None,
  bucket: int = 128,
) -> tuple[pathlib.Path, list[str]]:
  """Writes the descriptors of a folder of images.

  Args:
    root: The folder; all images in it and below, by name.
    output: Ends with ".npy"; beside it lie a ".txt" and, until all is done, a
      ".npy.part" and a ".npy.progress", by which a stopped run goes on.
    network: As `load` gives it.
    scales: By which the images are resized.
    image_size: Pixels of the longer side, at most.
    whitening: Applied last; None for none.
    dimensions: How many of its dimensions are kept; None for all.
    names: Images below `root`, in this order; None for all by name.
    boxes: What is cut out of images, by name: left, top, right and bottom.
    skip_broken: Whether images that cannot be decoded are left out.
    batch_size: None for 1 on CPUs, 8 elsewhere.
    bucket: Images are padded to multiples of it; 1 for exact sizes.

  Returns:
    The file of descriptors, and the names of the images that were left out.

  Raises:
    InputError: There are no images, one is damaged, the output is there, or a
      run that was stopped had other settings.
  """
  root, output = pathlib.Path(root), pathlib.Path(output)
  _check(scales, image_size, batch_size, bucket, output)
  listed = photos.listed(root, names)
  boxes = boxes or {}
  if unknown := [name for name in boxes if name not in set(listed)]:
    raise InputError(f"there are boxes of no image: {few(unknown)}.")
  width = network.dimensions
  if whitening is not None:
    blank = np.zeros((1, width), np.float32)
    width = descriptors.whiten(blank, whitening, dimensions=dimensions).shape[1]
  elif dimensions is not None:
    raise InputError("dimensions are of a whitening, and none is given.")
  settings = {
    "images": decode.digest(f"{n} {_stamp(root / n)}" for n in listed),
    "boxes": decode.digest(f"{n} {boxes[n]}" for n in sorted(boxes)),
    "network": _digest(
      [network.variables, network.mean, network.std, whitening]
    ),
    "pooling": [network.pooling, network.regional],
    "dtype": np.dtype(network.net.dtype).name,
    "scales": list(scales),
    "image_size": image_size,
    "dimensions": dimensions,
  }
  variables = jax.device_put(network.variables)
  extract = retrieval.make_extract(network, scales)
  if batch_size is None:
    batch_size = 1 if jax.default_backend() == "cpu" else 8
  began = time.perf_counter()
  with _Rows(output, len(listed), width, settings) as rows:
    todo = np.flatnonzero(rows.status == _LEFT)
    bar = tqdm(
      total=len(listed),
      initial=len(listed) - len(todo),
      unit="image",
      disable=None,
    )
    read = lambda i: photos.read_image(
      root / listed[i], image_size=image_size, box=boxes.get(listed[i])
    )
    step = (bucket, image_size) if network.padded else (1, image_size)
    for places, images, sizes in photos.batches(
      todo.tolist(), read, size=batch_size, step=step, skip_broken=skip_broken
    ):
      if images is None:
        rows.status[places] = _BROKEN
      else:
        found = extract(variables, images, sizes)
        if whitening is not None:
          found = descriptors.whiten(found, whitening, dimensions=dimensions)
        found = np.asarray(found)[: len(places)]
        bad = ~np.isfinite(found).all(axis=1)
        if bad.any():
          raise InputError(
            f"the network gives no finite numbers for "
            f"{root / listed[places[int(np.argmax(bad))]]}."
          )
        rows.write(places, found)
      bar.update(len(places))
    bar.close()
    left_out = [listed[i] for i in np.flatnonzero(rows.status == _BROKEN)]
    if len(left_out) == len(listed):
      raise InputError(f"{root}: all {len(listed)} images are damaged.")
    rows.finish(listed)
  took = time.perf_counter() - began
  print(  # noqa: T201 (this is the answer)
    f"{len(todo)} images in {took:.1f} s, {len(todo) / took:.2f} images/s"
  )
  return output, left_out


class _Rows:
  """A file of descriptors that grows in any order and outlives its writer.

  What the progress says is done has reached the disk before it says so.
  """

  def __init__(
    self, output: pathlib.Path, count: int, width: int, settings: Any
  ):
    """Goes on with what is there, or begins."""
    self.output, self.settings = output, json.dumps(settings, sort_keys=True)
    self.part = output.with_name(f"{output.name}.part")
    self.progress = output.with_name(f"{output.name}.progress")
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
      header,
      {"descr": "<f4", "fortran_order": False, "shape": (count, width)},
    )
    self.start, self.width, self.saved = header.tell(), width, time.monotonic()
    self.status = np.full(count, _LEFT, np.uint8)
    size = self.start + 4 * count * width
    if self.progress.exists() and self.part.exists():
      self._resume(size)
    else:
      output.parent.mkdir(parents=True, exist_ok=True)
      with self.part.open("wb") as file:
        file.write(header.getvalue())
        file.truncate(size)
    self.file = self.part.open("r+b")

  def __enter__(self) -> "_Rows":
    return self

  def __exit__(self, *_: object) -> None:
    if not self.file.closed:  # Stopped: what was done is kept.
      self._save()
      self.file.close()

  def _resume(self, size: int) -> None:
    try:
      with np.load(self.progress) as stored:
        status, settings = stored["status"], str(stored["settings"])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
      raise InputError(
        f"{self.progress} is damaged; remove it to begin anew."
      ) from error
    if settings != self.settings:
      old, new = json.loads(settings), json.loads(self.settings)
      changed = [name for name in new if old.get(name) != new[name]]
      raise InputError(
        f"{self.part} is of a run with other {', '.join(changed)}; give the "
        f"same command to go on, or remove {self.progress} to begin anew."
      )
    if self.part.stat().st_size == size and status.shape == self.status.shape:
      # What was broken may have been mended.
      self.status = np.where(status == _DONE, status, _LEFT)
    else:
      raise InputError(f"{self.part} is damaged; remove it to begin anew.")

  def write(self, places: Sequence[int], found: np.ndarray) -> None:
    """Puts rows where they belong."""
    for place, row in zip(places, np.asarray(found, "<f4"), strict=True):
      self.file.seek(self.start + 4 * self.width * int(place))
      self.file.write(row.tobytes())
    self.status[list(places)] = _DONE
    if time.monotonic() - self.saved > _SAVE_SECONDS:
      self._save()

  def _save(self) -> None:
    self.file.flush()
    os.fsync(self.file.fileno())
    text = io.BytesIO()
    np.savez(text, status=self.status, settings=np.array(self.settings))
    _replace(self.progress, text.getvalue())
    self.saved = time.monotonic()

  def finish(self, listed: Sequence[str]) -> None:
    """Gives the files their names, the descriptors last."""
    self._save()
    self.file.close()
    kept, part = np.flatnonzero(self.status == _DONE), self.part
    if len(kept) < len(self.status):
      part = self.output.with_name(f"{self.output.name}.whole")
      rows: Any = np.load(self.part, mmap_mode="r")
      with part.open("wb") as file:
        shape = (len(kept), self.width)
        np.lib.format.write_array_header_1_0(
          file, {"descr": "<f4", "fortran_order": False, "shape": shape}
        )
        for i in range(0, len(kept), 4096):
          file.write(rows[kept[i : i + 4096]].tobytes())
        file.flush()
        os.fsync(file.fileno())
      del rows
    names = "".join(f"{listed[i]}\n" for i in kept.tolist())
    _replace(self.output.with_suffix(".txt"), names.encode())
    part.replace(self.output)
    self.part.unlink(missing_ok=True)
    self.progress.unlink(missing_ok=True)


def choose_whitening(
  network: retrieval.Network, name: str, scales: Sequence[float]
) -> descriptors.Whitening:
  """A learned whitening: of the network's file, or of one of its own.

  Args:
    network: As `load` gives it.
    name: Of the data set that the network's file has one of; or the path of a
      file of PyTorch with "m" and "P", or an `.npz` with "mean" and
      "projection".
    scales: The network's file has one for a single scale and one for several.

  Returns:
    The whitening.

  Raises:
    InputError: There is none of that name, or it is for other descriptors.
  """
  path = pathlib.Path(name)
  if path.is_file() and path.suffix == ".npz":
    try:
      with np.load(path) as stored:
        found = descriptors.Whitening(stored["mean"], stored["projection"])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
      raise InputError(
        f"{path} holds no mean and projection ({error})."
      ) from error
  elif path.is_file():
    stored = pytorch.load(path)
    if not {"m", "P"} <= set(stored):
      raise InputError(f"{path} holds {few(list(stored))}, not m and P.")
    found = descriptors.Whitening(stored["m"], stored["P"])
  elif name in network.whitenings:
    found = network.whitenings[name]["ss" if len(scales) == 1 else "ms"]
  else:
    raise InputError(
      f"whitening {name!r} is no file, and the network's file has "
      f"{few(list(network.whitenings)) or 'none'}."
    )
  mean = np.asarray(found.mean, np.float32).reshape(-1)
  found = descriptors.Whitening(mean, np.asarray(found.projection, np.float32))
  blank = np.zeros((1, network.dimensions), np.float32)
  descriptors.whiten(blank, found)  # Refuses what does not fit.
  return found


def _meta(path: str | os.PathLike[str]) -> Mapping[str, Any]:
  """What a file says of itself beside its tensors, which have been read."""
  data = pytorch.file(path).read_bytes()
  file = io.BytesIO(data)
  try:
    if data.startswith(b"PK"):
      with zipfile.ZipFile(file) as archive:
        names = [n for n in archive.namelist() if f"/{n}".endswith("/data.pkl")]
        file = io.BytesIO(archive.read(min(names, key=len)))
    elif data.startswith(b"\x80"):  # Before PyTorch 1.6: three pickles first.
      for _ in range(3):
        pickled.read(file)
    else:
      return {}
    content = pickled.read(file)
    meta = content.get("meta") if isinstance(content, dict) else None
    return _plain(meta) if isinstance(meta, dict) else {}
  except pickled.Unfit as error:
    raise InputError(f"{path} {error}.") from error


def _plain(node: Any, depth: int = 0) -> Any:
  """The same with arrays of NumPy; what is nested without end is left out."""
  if isinstance(node, dict):
    return {k: _plain(v, depth + 1) for k, v in node.items() if depth < 5}
  return (
    pickled.array(node, "meta") if isinstance(node, pickled.Array) else node
  )


def _check(
  scales: Sequence[float],
  image_size: int,
  batch_size: int | None,
  bucket: int,
  output: pathlib.Path,
) -> None:
  if not scales or not all(0 < s < math.inf for s in scales):
    raise InputError(f"scales must be positive numbers, got {list(scales)}.")
  least = {"image_size": image_size, "batch_size": batch_size, "bucket": bucket}
  for name, value in least.items():
    if value is not None and value < 1:
      raise InputError(f"{name} must be 1 or more, got {value}.")
  if output.suffix != ".npy":
    raise InputError(f"output must end with .npy, got {output}.")
  stopped = output.with_name(f"{output.name}.progress").exists()
  for path in (output, output.with_suffix(".txt")):
    if path.exists() and not (stopped and path != output):
      raise InputError(f"{path} is there already; remove it or name another.")


def _stamp(path: pathlib.Path) -> str:
  status = path.stat()
  return f"{status.st_size} {status.st_mtime_ns}"


def _digest(tree: Any) -> str:
  """Of all numbers in it, so that another network is noticed."""
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    digest.update(f"{jax.tree_util.keystr(path)} {np.shape(leaf)}".encode())
    digest.update(np.ascontiguousarray(leaf).tobytes())
  return digest.hexdigest()


def _replace(path: pathlib.Path, content: bytes) -> None:
  """Writes a file that is never half there."""
  part = path.with_name(f"{path.name}.new")
  with part.open("wb") as file:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())
  part.replace(path)


def chosen(
  names: str | None, boxes: str | None
) -> tuple[list[str] | None, dict[str, photos.Box] | None]:
  """Which images are described, and what is cut out of them.

  Args:
    names: A text of names, or a ground truth of Revisited Oxford or Paris,
      whose database is meant; None for all images.
    boxes: A text of boxes, or such a ground truth, whose queries are meant;
      None for whole images.

  Returns:
    Names and boxes.

  Raises:
    InputError: A file is not of that form.
  """
  listed = cut = None
  if boxes:
    public = boxes.endswith(".pkl")
    cut = revisited.boxes(boxes) if public else photos.read_boxes(boxes)
    listed = list(cut) if public else None
  if names:
    public = names.endswith(".pkl")
    text = () if public else photos.lines(names)
    listed = revisited.images(names) if public else [line for _, line in text]
  return listed, cut


def main(arguments: Sequence[str]) -> None:
  """The command line."""
  values = flags.FLAGS
  if len(arguments) != 1:
    raise InputError(
      "name one folder of images, got "
      f"{' '.join(arguments) or 'nothing'}: python -m jaxshape.describe "
      "photos/ --weights=network.pth --output=photos.npy"
    )
  if not values.output:
    raise InputError("name the file to write with --output=descriptors.npy.")
  if (values.weights is None) != values.untrained:
    raise InputError(
      "name a trained network with --weights=network.pth (torchvision's, or of "
      "the public retrieval code), or give --untrained alone: its descriptors "
      "are of use for trying things out only."
    )
  if processes.index():
    raise InputError("images are described by one process.")
  try:
    scales = [float(s) for s in values.scales]
  except ValueError as error:
    raise InputError(
      f"--scales must be numbers, got {values.scales}."
    ) from error
  network = load(
    values.weights,
    backbone=values.backbone,
    pooling=values.pooling,
    p=values.p,
    dtype=values.dtype,
  )
  whitening = None
  if values.whitening:
    whitening = choose_whitening(network, values.whitening, scales)
  names, boxes = chosen(values.names, values.boxes)
  output, left_out = describe(
    arguments[0],
    values.output,
    network=network,
    scales=scales,
    image_size=values.image_size,
    whitening=whitening,
    dimensions=values.dimensions,
    names=names,
    boxes=boxes,
    skip_broken=values.skip_broken,
    batch_size=values.batch_size,
    bucket=values.bucket,
  )
  if left_out:
    print(f"left out, as they are broken: {', '.join(left_out)}")  # noqa: T201
  print(f"written: {output}, {output.with_suffix('.txt')}")  # noqa: T201


if __name__ == "__main__":
  flags.DEFINE_string("weights", None, "A file of PyTorch.")
  flags.DEFINE_bool("untrained", False, "Draws the weights instead.")
  flags.DEFINE_string("output", None, "The .npy file to write.")
  flags.DEFINE_enum(
    "backbone", None, list(resnet.VARIANTS), "If the file does not say it."
  )
  flags.DEFINE_enum(
    "pooling", None, retrieval.POOLINGS, "If the file does not say it."
  )
  flags.DEFINE_float("p", None, "GeM's exponent, else the file's, else 3.")
  flags.DEFINE_list(
    "scales",
    [str(s) for s in retrieval.SCALES],
    "With commas: 1,1.4142,0.7071.",
  )
  flags.DEFINE_integer("image_size", 1024, "Of the longer side, at most.")
  flags.DEFINE_string(
    "whitening", None, "A file, or a data set that --weights has one of."
  )
  flags.DEFINE_integer("dimensions", None, "Kept of the whitening's.")
  flags.DEFINE_string(
    "names", None, "A text of the images, one a line; or gnd_<name>.pkl."
  )
  flags.DEFINE_string(
    "boxes",
    None,
    "A text: name left top right bottom; or gnd_<name>.pkl, for its queries.",
  )
  flags.DEFINE_bool("skip_broken", False, "Leaves damaged images out.")
  flags.DEFINE_integer("batch_size", None, "1 on CPUs, 8 elsewhere.")
  flags.DEFINE_integer("bucket", 128, "Sides are padded to multiples of it.")
  flags.DEFINE_enum(
    "dtype", "float32", ("float32", "bfloat16"), "What is computed in."
  )
  command.run(main, arguments=True)
