"""Sets of labels for LiDAR scans, by name or from a file."""

import importlib
import importlib.util
import re

from jaxshape.data import semantic_kitti
from jaxshape.errors import InputError


def load(name: str) -> semantic_kitti.Labels:
  """The set of labels that a config names; no data need to be there.

  Args:
    name: A kind of data that has labels of its own (`semantic_kitti`), or a
      file in the form of `semantic-kitti.yaml`.

  Returns:
    Classes, colors, and the maps between raw labels and train ids.

  Raises:
    InputError: There is no such set.
  """
  if name.endswith((".yaml", ".yml")):
    return semantic_kitti.read_yaml(name)
  module = f"jaxshape.data.{name}"
  if re.fullmatch(r"\w+", name) and importlib.util.find_spec(module):
    found = importlib.import_module(module)
    if hasattr(found, "builtin_labels"):
      return found.builtin_labels()
  raise InputError(
    f"config.labels must be a kind of data with labels, such as "
    f"semantic_kitti, or a .yaml file like semantic-kitti.yaml, got {name!r}."
  )
