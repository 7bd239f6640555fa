r"""Takes the texture out of images: writes a filtered copy of a folder.

python -m jaxshape.suppress --images=photos/ --output=smooth/ --kappa=20
python -m jaxshape.suppress --images=photos/ --output=blurred/ \
    --filter=gaussian --sigma=2 --format=jpeg --quality=95

All images in the folder and below it are filtered at full strength and at their
own size, and written under their own names, as PNG or as JPEG: what the filter
gives for an image's pixels, rounded. Images are turned upright (EXIF), and
transparent ones are laid on white. A run that was stopped goes on if the same
command is given again: what is there is not written anew.

Programs are compiled for images of a size, and images are filtered in groups of
one size: nothing is padded, as a border that is moved changes what diffusion
gives. A folder of many sizes takes a compilation for each, of a second or so;
the command says beforehand how many there are.

Reference:
  Mishra et al., "Learning Visual Representations for Transfer Learning by
  Suppressing Texture", 2020, Sec. 3 ("Anisotropic ImageNet") and Table 4.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
import functools
import inspect
import io
import itertools
import json
import logging
import os
import pathlib
import time
import types
from typing import Any

from absl import flags
import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from jaxshape.data import decode, photos
from jaxshape.engine import command, processes
from jaxshape.errors import InputError, few
from jaxshape.filters import bilateral, blur, cartoon, diffusion, median

# Those of `data.suppression.FILTERS` that need no other image.
FILTERS: Mapping[str, Callable[..., jax.Array]] = types.MappingProxyType(
  {
    "perona_malik": diffusion.perona_malik,
    "robust": diffusion.robust,
    "gaussian": blur.gaussian,
    "bilateral": bilateral.bilateral,
    "median": median.median,
    "cartoon": cartoon.cartoon,
  }
)
FORMATS = ("png", "jpeg")
RECORD = "suppression.json"
_ENDINGS = {"png": (".png",), "jpeg": (".jpg", ".jpeg")}
# As `photos` reads them.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
# Of a batch, so that what is computed on the way fits into memory.
_MOST_PIXELS = 2**23
# More sizes than this are worth a word.
_MANY_SIZES = 20
# Each takes some of the areas of memory that a process may have.
_MOST_PROGRAMS = 64


def suppress(
  images: str | os.PathLike[str],
  output: str | os.PathLike[str],
  *,
  filter: str = "perona_malik",
  options: Mapping[str, Any] = types.MappingProxyType({}),
  format: str = "png",
  quality: int = 95,
  skip_damaged: bool = False,
  batch_size: int = 16,
) -> tuple[list[pathlib.Path], list[str]]:
  """Writes a filtered copy of a folder of images.

  Args:
    images: The folder; all images in it and below.
    output: The folder to write, new or of a run with the same settings, which
      is told by a small file in it.
    filter: One of `FILTERS`.
    options: Of that filter, by name; what is not given has its default.
      "gaussian" needs its `sigma`.
    format: One of `FORMATS`. The ending of a name is changed if it is not of
      the format.
    quality: Of JPEG, 1..100; colours keep their resolution.
    skip_damaged: Whether images that cannot be decoded are left out.
    batch_size: Images of one size at a time, fewer if they are large. The
      result does not depend on it.

  Returns:
    The files that were written, without those that had been there, and the
    names of the images that were left out.

  Raises:
    InputError: There are no images, one is damaged, an option does not fit, one
      folder lies in the other, or the output holds something else.
  """
  root, output = pathlib.Path(images), pathlib.Path(output)
  programs = _Programs(_program(filter, options))
  _check(root, output, format, quality=quality, batch_size=batch_size)
  names = _renamed(photos.listed(root, None), format)
  settings = {
    "images": str(root.resolve()),
    "filter": filter,
    "options": _filled(filter, options),
    "format": format,
    "quality": quality if format == "jpeg" else None,
  }
  _open(output, settings)
  todo = [name for name in names if not (output / names[name]).exists()]
  began = time.perf_counter()
  written: list[pathlib.Path] = []
  left_out: list[str] = []
  bar = tqdm(
    total=len(names),
    initial=len(names) - len(todo),
    unit="image",
    disable=None,
  )
  with futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
    read = lambda name: _read(root / name, skip_damaged=skip_damaged)
    saving: list[futures.Future[pathlib.Path]] = []
    batches = _batches(root, todo, batch_size, pool)
    try:
      for batch, pictures, size in _ahead(batches, read, pool):
        left_out += [n for n in batch if pictures[n] is None]
        filtered = _filtered(programs, pictures, size)
        # What the batch before gave was written meanwhile.
        written += [future.result() for future in saving]
        saving = [
          pool.submit(_write, output / names[name], pixels, format, quality)
          for name, pixels in filtered.items()
        ]
        bar.update(len(batch))
      written += [future.result() for future in saving]
    finally:
      pool.shutdown(wait=True, cancel_futures=True)
      bar.close()
  if len(left_out) == len(names):
    raise InputError(f"{root}: all {len(names)} images are damaged.")
  took = time.perf_counter() - began
  print(  # noqa: T201 (this is the answer)
    f"{len(written)} images in {took:.1f} s, {len(written) / took:.2f} "
    f"images/s; {len(names) - len(todo)} were there"
  )
  return sorted(written), sorted(left_out)


Filter = Callable[[np.ndarray], jax.Array]


class _Programs:
  """A filter, compiled for the sizes that were met last."""

  def __init__(self, run: Filter):
    self._run, self._shapes = run, set()
    self._compiled: Filter = self._fresh()

  def _fresh(self) -> Filter:
    # Of one and the same function all programs would be kept.
    return jax.jit(functools.partial(self._run))

  def __call__(self, images: np.ndarray) -> np.ndarray:
    """The filtered images, rounded to uint8."""
    if images.shape not in self._shapes:
      if len(self._shapes) == _MOST_PROGRAMS:
        self._compiled = self._fresh()
        self._shapes.clear()
      self._shapes.add(images.shape)
    found = np.asarray(self._compiled(images))
    return np.clip(np.rint(found), 0, 255).astype(np.uint8)


def _program(name: str, options: Mapping[str, Any]) -> Filter:
  """The filter as a function of a batch; every option is looked at."""
  there = ", ".join(FILTERS)
  if name == "stylized":
    raise InputError(
      "stylized images get the texture of others in a batch, so there is no "
      f"filtered copy of one; filter must be one of {there}."
    )
  if name not in FILTERS:
    raise InputError(f"filter must be one of {there}, got {name!r}.")
  known = list(_defaults(name))
  if unknown := [option for option in options if option not in known]:
    raise InputError(
      f"{unknown[0]} is no option of {name}; there are: {', '.join(known)}."
    )
  for option, value in options.items():
    if not isinstance(value, int | float | str | None):
      raise InputError(f"{option} must be a number or a word, got {value!r}.")
  if lacking := [o for o, v in _filled(name, options).items() if v is _NONE]:
    raise InputError(f"{name} needs {lacking[0]}: it has no default.")

  def run(images: np.ndarray) -> jax.Array:
    return FILTERS[name](images, **options)

  try:
    jax.eval_shape(run, jax.ShapeDtypeStruct((1, 32, 32, 3), np.uint8))
  except InputError:
    raise
  except (ValueError, TypeError) as error:  # Its range, or its type.
    raise InputError(f"{name}: {_first(error)}") from error
  return run


_NONE = inspect.Parameter.empty


def _first(error: Exception) -> str:
  return str(error).strip().split("\n")[0]


def _defaults(name: str) -> dict[str, Any]:
  """The options of a filter, `_NONE` where there is no default."""
  parameters = inspect.signature(FILTERS[name]).parameters.values()
  return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def _filled(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
  return {**_defaults(name), **options}


def _check(
  root: pathlib.Path,
  output: pathlib.Path,
  format: str,
  *,
  quality: int,
  batch_size: int,
) -> None:
  if format not in FORMATS:
    raise InputError(
      f"format must be one of {', '.join(FORMATS)}, got {format!r}."
    )
  if not 1 <= quality <= 100:
    raise InputError(f"quality must be in 1..100, got {quality}.")
  if batch_size < 1:
    raise InputError(f"batch_size must be 1 or more, got {batch_size}.")
  if not root.is_dir():
    raise InputError(f"there is no folder {root}; name one of images.")
  here, there = root.resolve(), output.resolve()
  if here.is_relative_to(there) or there.is_relative_to(here):
    raise InputError(
      f"the output {output} and the folder of images {root} must lie apart, "
      "neither in the other."
    )


def _renamed(listed: Sequence[str], format: str) -> dict[str, str]:
  """What each image is written as."""
  names, taken = {}, {}
  for name in listed:
    path = pathlib.PurePosixPath(name)
    if path.suffix.lower() not in _ENDINGS[format]:
      path = path.with_suffix(_ENDINGS[format][0])
    names[name] = str(path)
    # Disks may not tell upper from lower case.
    if (other := taken.setdefault(names[name].lower(), name)) != name:
      raise InputError(
        f"{other} and {name} would both be written as {names[name]}; rename "
        "one."
      )
  return names


def _open(output: pathlib.Path, settings: Mapping[str, Any]) -> None:
  """Begins a folder, or goes on with one that has the same settings."""
  record = output / RECORD
  if output.exists() and not output.is_dir():
    raise InputError(f"{output} is a file; name a folder to write.")
  if not record.exists():
    if output.is_dir() and any(output.iterdir()):
      raise InputError(
        f"{output} holds something else than a filtered copy (no {RECORD}); "
        "name an empty or a new folder."
      )
    output.mkdir(parents=True, exist_ok=True)
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    _replace(record, text.encode())
    return
  try:
    old = _flat(json.loads(record.read_text()))
  except (OSError, ValueError, AttributeError) as error:
    raise InputError(
      f"{record} is damaged; remove the folder to begin anew."
    ) from error
  new = _flat(json.loads(json.dumps(settings)))
  changed = [
    f"{name}: {old.get(name)} then, {new.get(name)} now"
    for name in sorted(set(old) | set(new))
    if old.get(name) != new.get(name)
  ]
  if changed:
    raise InputError(
      f"{output} was filtered otherwise ({few(changed)}); give the same "
      "command to go on, or name another --output."
    )


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
  options = settings.get("options", {})
  return {**{k: v for k, v in settings.items() if k != "options"}, **options}


_Batch = tuple[list[str], int]


def _batches(
  root: pathlib.Path,
  names: Sequence[str],
  batch_size: int,
  pool: futures.Executor,
) -> Iterator[_Batch]:
  """Images of one size, and how many are filtered together."""
  groups: dict[tuple[int, int], list[str]] = {}
  sizes = pool.map(lambda name: _size(root / name), names)
  for name, size in zip(names, sizes, strict=True):
    groups.setdefault(size, []).append(name)
  if len(groups) > _MANY_SIZES:
    logging.warning(
      "the %d images are of %d sizes, and a program is compiled for each.",
      len(names),
      len(groups),
    )
  for (width, height), group in groups.items():
    most = max(1, _MOST_PIXELS // max(1, width * height))
    count = min(batch_size, most, len(group))
    for start in range(0, len(group), count):
      yield group[start : start + count], count


def _size(path: pathlib.Path) -> tuple[int, int]:
  """Width and height as the file's first bytes say; (0, 0) if they do not."""
  try:
    if path.is_file():
      with Image.open(path, formats=_FORMATS) as image:
        return image.size
  except Exception:  # Whatever it is, reading the image says it.
    logging.debug("%s has no size.", path)
  return 0, 0


_Pictures = dict[str, np.ndarray | None]


def _ahead(
  batches: Iterator[_Batch],
  read: Callable[[str], np.ndarray | None],
  pool: futures.Executor,
) -> Iterator[tuple[list[str], _Pictures, int]]:
  """Batches with their pixels, the next one read while one is used."""
  ahead: tuple[list[str], list[futures.Future], int] = [], [], 0
  for names, size in itertools.chain(batches, [([], 0)]):
    coming = [pool.submit(read, name) for name in names]
    now, ahead = ahead, (names, coming, size)
    if now[0]:
      found = (future.result() for future in now[1])
      yield now[0], dict(zip(now[0], found, strict=True)), now[2]


def _read(path: pathlib.Path, *, skip_damaged: bool) -> np.ndarray | None:
  try:
    return photos.read_image(path, image_size=2**31 - 1)
  except decode.DamagedError as error:
    if skip_damaged:
      logging.warning("left out: %s", error)
      return None
    raise decode.DamagedError(
      f"{error} Replace it, or leave such images out with --skip_damaged."
    ) from error


def _filtered(
  programs: _Programs, pictures: _Pictures, size: int
) -> dict[str, np.ndarray]:
  """The filtered images of a batch, uint8."""
  # By what was decoded: a note in the file may have turned it.
  shapes: dict[tuple[int, ...], dict[str, np.ndarray]] = {}
  for name, picture in pictures.items():
    if picture is not None:
      shapes.setdefault(picture.shape, {})[name] = picture
  out = {}
  for group in shapes.values():
    rows = list(group.values())
    rows += rows[-1:] * (size - len(rows))  # One program for all of a size.
    out |= dict(zip(group, programs(np.stack(rows)), strict=False))
  return out


def _write(
  path: pathlib.Path, pixels: np.ndarray, format: str, quality: int
) -> pathlib.Path:
  file = io.BytesIO()
  options: dict[str, Any] = {}
  if format == "jpeg":
    options = {"quality": quality, "subsampling": 0}
  Image.fromarray(pixels).save(file, format.upper(), **options)
  path.parent.mkdir(parents=True, exist_ok=True)
  _replace(path, file.getvalue())
  return path


def _replace(path: pathlib.Path, content: bytes) -> None:
  """Writes a file that is never half there."""
  part = path.with_name(f".{path.name}.new")
  try:
    with part.open("wb") as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
    part.replace(path)
  finally:
    part.unlink(missing_ok=True)


_OPTIONS = (
  "iterations",
  "kappa",
  "scale",
  "step_size",
  "conduction",
  "coupled",
  "sigma",
  "diameter",
  "sigma_color",
  "sigma_space",
  "size",
  "preset",
)


def main() -> None:
  """The command line."""
  values = flags.FLAGS
  if not values.images:
    raise InputError("name a folder of images with --images=<folder>.")
  if not values.output:
    raise InputError("name the folder to write with --output=<folder>.")
  if processes.index():
    raise InputError("images are filtered by one process.")
  given = {name: values[name].value for name in _OPTIONS}
  _, left_out = suppress(
    values.images,
    values.output,
    filter=values.filter,
    options={k: v for k, v in given.items() if v is not None},
    format=values.format,
    quality=values.quality,
    skip_damaged=values.skip_damaged,
    batch_size=values.batch_size,
  )
  if left_out:
    print(  # noqa: T201
      f"left out, as they are damaged: {len(left_out)}, {few(left_out)}"
    )
  print(f"written: {values.output}")  # noqa: T201


if __name__ == "__main__":
  flags.DEFINE_string("images", None, "A folder; images below it count.")
  flags.DEFINE_string("output", None, "The folder to write.")
  flags.DEFINE_string("filter", "perona_malik", f"One of {', '.join(FILTERS)}.")
  flags.DEFINE_integer("iterations", None, "Of perona_malik and robust.")
  flags.DEFINE_float("kappa", None, "Of perona_malik.")
  flags.DEFINE_float("scale", None, "Of robust; else each image's own.")
  flags.DEFINE_float("step_size", None, "Of perona_malik and robust.")
  flags.DEFINE_string("conduction", None, "Of perona_malik.")
  flags.DEFINE_bool("coupled", None, "Of perona_malik and robust.")
  flags.DEFINE_float("sigma", None, "Of gaussian, in pixels.")
  flags.DEFINE_integer("diameter", None, "Of bilateral and cartoon.")
  flags.DEFINE_float("sigma_color", None, "Of bilateral and cartoon.")
  flags.DEFINE_float("sigma_space", None, "Of bilateral and cartoon.")
  flags.DEFINE_integer("size", None, "Of median.")
  flags.DEFINE_string("preset", None, "Of cartoon.")
  flags.DEFINE_enum("format", "png", FORMATS, "What is written.")
  flags.DEFINE_integer("quality", 95, "Of JPEG, 1..100.")
  flags.DEFINE_bool("skip_damaged", False, "Leaves damaged images out.")
  flags.DEFINE_integer("batch_size", 16, "Images of one size at a time.")
  command.run(main)
