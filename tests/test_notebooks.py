"""The notebooks run from top to bottom; cells are executed as they stand."""

import json
import pathlib
import re

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest

from jaxshape import images

NOTEBOOKS = sorted(pathlib.Path("notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_runs(path, monkeypatch):
  mpl.use("Agg")
  shown = []
  monkeypatch.setattr(plt, "show", lambda: shown.append(plt.gcf()))
  small = images.example()[::5, ::5]
  monkeypatch.setattr(images, "example", lambda: small)
  monkeypatch.setenv("NOTEBOOK_MODE", "tiny")
  cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
  codes = [
    "".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"
  ]
  # Figures that pyplot does not know of are shown by what notebooks call
  # display.
  names = {"__name__": path.stem, "display": shown.append}
  for i, code in enumerate(codes):
    # What the notebook's own commands do, tests have done already.
    python = re.sub(r"^(\s*)[%!].*$", r"\1pass", code, flags=re.M)
    exec(compile(python, f"{path.name}, cell {i}", "exec"), names)
  assert len(shown) >= len(codes) / 2
  for figure in shown:
    for axis in figure.axes:
      for drawn in axis.get_images():
        values = np.asarray(drawn.get_array())
        assert np.isfinite(values).all()
        assert np.ptp(values) > 0, axis.get_title()
  plt.close("all")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_shown_was_really_run(path):
  notebook = json.loads(path.read_text(encoding="utf-8"))
  codes = [c for c in notebook["cells"] if c["cell_type"] == "code"]
  counts = [cell["execution_count"] for cell in codes]
  assert counts == list(range(1, len(codes) + 1))
  for cell in codes:
    assert not any(o["output_type"] == "error" for o in cell["outputs"])
  assert path.stat().st_size < 3_000_000
