"""The same classes in several domains: photos, paintings, cartoons, sketches.

`<root>/<domain>/<class>/...`, as PACS, VLCS, Office-Home and DomainNet lie when
unpacked: train on some domains, evaluate on each of the others.

Reference:
  Li et al., "Deeper, Broader and Artier Domain Generalization", ICCV 2017
  (PACS).
"""

from collections.abc import Mapping, Sequence
import pathlib

import numpy as np

from jaxshape.data import decode, folder
from jaxshape.errors import InputError

PARTS = ("train", "val")


class Domains(folder.Folder):
  """Pictures with "domain", the number of the domain they are from.

  Attributes:
    domains: Names of all domains below the root, in order.
  """

  domains: tuple[str, ...] = ()


def open_source(
  name: str,
  *,
  split: str,
  image_size: int,
  data_dir: str | None = None,
  classes: Sequence[str] | None = None,
  validation: float = 0.1,
  skip_damaged: bool = False,
  resize_to: int | None = None,
  interpolation: str = "bilinear",
  crop: str = "center",
  scale: tuple[float, float] = (0.08, 1.0),
  ratio: tuple[float, float] = (3 / 4, 4 / 3),
  max_pixels: int = 50_000_000,
  cache: int = 0,
) -> Domains:
  """Opens domains, or parts of them.

  Args:
    name: The folder of the domains; `~` is expanded.
    split: A domain, such as "photo", or its part for training or validation,
      "photo_train" or "photo_val"; or several, such as "photo_train+sketch".
    image_size: See `decode.Decoder`, like all options not named here.
    data_dir: What a relative `name` starts from.
    classes: Labels in a fixed order; domains may then lack some of them. By
      default, or if empty, the folders' names, sorted, the same in all domains
      below the root.
    validation: Which share of a domain is for validation, about. Whether a
      picture is depends on its path below the root alone.
    skip_damaged: See `folder.open_source`.
    resize_to: See `decode.Decoder`.
    interpolation: See `decode.Decoder`.
    crop: See `decode.Decoder`.
    scale: See `decode.Decoder`.
    ratio: See `decode.Decoder`.
    max_pixels: See `decode.Decoder`.
    cache: Bytes of memory for decoded images; 0 decodes anew each time.

  Returns:
    A source of "image", "label" and "domain", int32, which numbers all domains
    below the root; with `skip_damaged` also "mask", 0 where another image
    stands in.

  Raises:
    InputError: There is no such folder or domain, the domains have different
      classes, or a picture would be there twice.
  """
  decoder = decode.Decoder(
    image_size=image_size,
    resize_to=resize_to,
    interpolation=interpolation,
    crop=crop,
    scale=scale,
    ratio=ratio,
    max_pixels=max_pixels,
  )
  if not 0 < validation < 1:
    raise InputError(f"validation must be in (0, 1), got {validation}.")
  with folder.listing():
    root = folder.find_root(name, data_dir, kind="domains")
    domains = tuple(folder.subfolders(root))
    if not domains:
      raise InputError(
        f"{root} holds no folders; domains are <root>/<domain>/<class>/..."
      )
    # Sorted, so that the order in which they are named changes nothing.
    asked = sorted(_asked(root, x.strip(), domains) for x in split.split("+"))
    known = folder.by_name(classes) if classes else None
    numbers = folder.number_parts(root, domains, known)
    files, labels, of = _listed(root, asked, numbers, validation)
  if len(set(files)) < len(files):
    raise InputError(
      f"the split {split!r} names pictures of {root} twice; name each domain "
      "or each of its parts once."
    )
  source = Domains(
    root,
    files,
    labels,
    tuple(classes or numbers[domains[0]]),
    decoder=decoder,
    skip_damaged=skip_damaged,
    cache=cache,
    more={"domain": np.array([domains.index(d) for d in of], np.int32)},
  )
  source.domains = domains
  return source


def _asked(
  root: pathlib.Path, name: str, domains: Sequence[str]
) -> tuple[str, str]:
  """A domain and which part of it, empty for all."""
  if name in domains:
    return name, ""
  domain, _, part = name.rpartition("_")
  if domain in domains and part in PARTS:
    return domain, part
  splits = [*domains, *(f"{d}_{part}" for d in domains for part in PARTS)]
  raise InputError(
    f"{root} has no domain {name!r}{folder.near(name, splits)}; there are: "
    f"{folder.some(domains)}; a part is <domain>_train or <domain>_val, and "
    "several are joined by +."
  )


def _listed(
  root: pathlib.Path,
  asked: Sequence[tuple[str, str]],
  numbers: Mapping[str, Mapping[str, int]],
  validation: float,
) -> tuple[list[str], np.ndarray, list[str]]:
  """Files, their labels and their domains."""
  files, labels, of = [], [], []
  for domain, part in asked:
    below = {f"{domain}/{c}": i for c, i in numbers[domain].items()}
    found, their = folder.find_images(root, below)
    keep = np.ones(len(found), bool)
    if part:
      keep = np.array([_drawn(f) < validation for f in found]) == (
        part == "val"
      )
    if not keep.any():
      raise InputError(
        f"{root / domain} has too few pictures ({len(found)}) for a part "
        f"{domain}_{part} with validation={validation}."
      )
    files += [found[i] for i in np.flatnonzero(keep)]
    labels.append(their[keep])
    of += [domain] * int(keep.sum())
  return files, np.concatenate(labels), of


def _drawn(file: str) -> float:
  """A number within [0, 1) that follows from a path alone."""
  return int(decode.digest([file]), 16) / 2**64
