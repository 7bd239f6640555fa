"""What came out of an evaluation: tables, JSON, pictures and one HTML page.

A metric is called `evaluator/name`, possibly with more parts. Numbers are kept
as fractions everywhere but in the tables for people, where the metrics that
`KINDS` knows as fractions are per cent. The page needs no network, no other
file and no script, and shows no path of the machine that made it.
"""

import base64
from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import importlib.metadata
import importlib.resources
import io
import json
import math
import os
import pathlib
import platform
import re
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from jaxshape.engine import comparison
from jaxshape.errors import InputError

if TYPE_CHECKING:  # Drawing is not needed to train.
  from matplotlib.figure import Figure

MAX_BYTES = 3_000_000
# The files are written in the first form; the page takes the first that fits.
FORMS = (("png", 110), ("jpeg", 110), ("jpeg", 70), ("jpeg", 45))
# Enough for a chart as wide as these.
MAX_POINTS = 240
CHART_WIDTH, CHART_HEIGHT = 340, 190
# Metrics that are drawn over the evaluators that have them.
HEADLINES = ("top1", "miou", "mAP")
LEFT, RIGHT, TOP, BOTTOM = 46, 20, 10, 22
MISSING = "\N{EN DASH}"


class Kind(NamedTuple):
  """How a metric is shown: per cent or not; more (1) or less (-1) is better."""

  percent: bool = False
  better: int = 0


KINDS = {
  "accuracy": Kind(percent=True, better=1),
  "acc": Kind(percent=True, better=1),
  "top1": Kind(percent=True, better=1),
  "top5": Kind(percent=True, better=1),
  "shape_bias": Kind(percent=True, better=1),
  "miou": Kind(percent=True, better=1),
  "iou": Kind(percent=True, better=1),
  "map": Kind(percent=True, better=1),
  "mp": Kind(percent=True, better=1),
  "gain": Kind(percent=True, better=1),
  "drop": Kind(percent=True, better=-1),
  "error": Kind(percent=True, better=-1),
  "ece": Kind(percent=True, better=-1),
  "mce": Kind(percent=True, better=-1),
  "confidence": Kind(percent=True),
  "spread": Kind(percent=True),
  "share": Kind(percent=True),
  "match": Kind(percent=True),
  "loss": Kind(better=-1),
  "cross_entropy": Kind(better=-1),
  "entropy": Kind(),
  "decisions": Kind(),
  "examples": Kind(),
}


@dataclasses.dataclass(frozen=True)
class Result:
  """What one checkpoint was found to do: a column of the tables.

  Attributes:
    name: What the column is called, unlike any other's.
    metrics: Numbers by name, fractions as fractions.
    step: The checkpoint's; None for numbers from elsewhere, such as a paper's.
    pictures: Figures by name.
    plots: What is drawn together with other results' plots of the same name.
    history: The rows of `metrics.jsonl`, each with its `"step"`.
    config: What the run was given, nested or flat.
  """

  name: str
  metrics: Mapping[str, float]
  step: int | None = None
  pictures: "Mapping[str, Figure]" = dataclasses.field(default_factory=dict)
  plots: Mapping[str, comparison.Plot] = dataclasses.field(default_factory=dict)
  history: Sequence[Mapping[str, Any]] = ()
  config: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Cell(NamedTuple):
  """One number of a table."""

  text: str
  best: bool


class Row(NamedTuple):
  """One metric of a table."""

  label: str
  cells: list[Cell]


def kind(metric: str) -> Kind:
  """How a metric is shown, from its name.

  The last part of the name that is a key of `KINDS`, or ends or begins with one
  (`top1_error`, `confidence_correct`), decides; the longest key wins, and an
  ending wins over a beginning. `IoU/car` is a kind of `IoU`.

  Args:
    metric: The full name.

  Returns:
    Its kind; plain, with no better side, if nothing fits.
  """
  keys = sorted(KINDS, key=len, reverse=True)
  for part in reversed(metric.lower().split("/")):
    for fits in (
      lambda key, part=part: part == key or part.endswith("_" + key),
      lambda key, part=part: part.startswith(key + "_"),
    ):
      for key in keys:
        if fits(key):
          return KINDS[key]
  return Kind()


def table(results: Sequence[Result]) -> dict[str, list[Row]]:
  """Metrics as rows, by the part of their name before the first slash.

  Args:
    results: The columns.

  Returns:
    Rows by group, in the order in which the metrics first appear; the best of
    several columns is marked where one side is known to be better.
  """
  groups: dict[str, list[Row]] = {}
  for metric in dict.fromkeys(m for r in results for m in r.metrics):
    group, slash, label = metric.partition("/")
    if not slash:
      group, label = "", metric
    percent, better = kind(metric)
    values = [float(r.metrics.get(metric, math.nan)) for r in results]
    texts = [_number(v, percent=percent) for v in values]
    finite = {t: better * v for t, v in zip(texts, values, strict=True)}
    finite = {t: v for t, v in finite.items() if math.isfinite(v)}
    # Where all look alike none is the best.
    best = max(finite, key=finite.__getitem__) if len(finite) > 1 else None
    cells = [Cell(text, better != 0 and text == best) for text in texts]
    row = Row(label + (" %" if percent else ""), cells)
    groups.setdefault(group, []).append(row)
  return groups


def text_table(results: Sequence[Result]) -> str:
  """The table for a terminal; an asterisk marks the best of several columns.

  Args:
    results: The columns.

  Returns:
    Lines of equal length.
  """
  lines = [["", *(r.name for r in results)]]
  for group, rows in table(results).items():
    if group:
      lines.append([group])
    for row in rows:
      label = ("  " if group else "") + row.label
      cells = [c.text + ("*" if c.best else " ") for c in row.cells]
      lines.append([label, *cells])
  lines = [line + [""] * (len(results) + 1 - len(line)) for line in lines]
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  return "\n".join(
    "  ".join(
      text.ljust(width) if i == 0 else text.rjust(width)
      for i, (text, width) in enumerate(zip(line, widths, strict=True))
    )
    for line in lines
  )


def markdown_table(results: Sequence[Result]) -> str:
  """The table for a README; the best of several columns is bold.

  Args:
    results: The columns.

  Returns:
    Lines of a table in GitHub's Markdown.
  """
  escape = lambda text: re.sub(r"([\\|*_<`])", r"\\\1", text)
  lines = [["metric", *(escape(r.name) for r in results)]]
  lines.append(["---", *("---:" for _ in results)])
  for group, rows in table(results).items():
    for row in rows:
      label = escape(f"{group}/{row.label}" if group else row.label)
      cells = [f"**{c.text}**" if c.best else c.text for c in row.cells]
      lines.append([label, *cells])
  return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write(
  folder: str | os.PathLike[str],
  results: Sequence[Result],
  *,
  title: str,
  notes: Sequence[str] = (),
) -> pathlib.Path:
  """Writes `metrics.json`, `figures/<name>-<picture>.png` and `report.html`.

  Of several results, `figures/all-<plot>.png` shows what they can share.

  Args:
    folder: Made if it is missing; what is in it is overwritten.
    results: One column each, in this order.
    title: Of the page.
    notes: Paragraphs below the title.

  Returns:
    The path of the page.

  Raises:
    InputError: No results, two of one name, or a folder that cannot be made.
  """
  names = [r.name for r in results]
  if not names:
    raise InputError("There is nothing to report: no results were given.")
  twice = sorted({n for n in names if names.count(n) > 1})
  if twice:
    raise InputError(
      f"Two results are called {twice[0]!r}; give each a name of its own."
    )
  folder = pathlib.Path(folder)
  try:
    (folder / "figures").mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise InputError(
      f"The report cannot be written to {str(folder)!r} ({error.strerror}); "
      "name a folder that can be made."
    ) from error
  numbers = {
    r.name: {m: _finite(v) for m, v in r.metrics.items()} for r in results
  }
  text = json.dumps(numbers, indent=2, allow_nan=False, ensure_ascii=False)
  (folder / "metrics.json").write_text(text + "\n", encoding="utf-8")
  together = _together(results)
  taken: set[str] = set()
  for column, figures in [
    ("all", together),
    *((r.name, r.pictures) for r in results),
  ]:
    for name, figure in figures.items():
      file = _file_name(f"{column}-{name}", taken)
      (folder / "figures" / f"{file}.png").write_bytes(_encode(figure))
  page = folder / "report.html"
  page.write_bytes(_page(results, together, title=title, notes=notes))
  return page


def _together(results: Sequence[Result]) -> "dict[str, Figure]":
  """What several results share: their headlines, then their plots."""
  if len(results) < 2:
    return {}
  drawn = {r.name: {**_headlines(results, r), **r.plots} for r in results}
  return comparison.figures(drawn)


def _headlines(
  results: Sequence[Result], one: Result
) -> Mapping[str, comparison.Plot]:
  """A result's metrics that several evaluators have, over all of them."""
  found = {}
  for name in HEADLINES:
    metrics = dict.fromkeys(m for r in results for m in r.metrics)
    metrics = [m for m in metrics if m.partition("/")[2] == name]
    values = [float(one.metrics.get(m, math.nan)) for m in metrics]
    if len(metrics) > 1 and not all(map(math.isnan, values)):
      groups = [m.partition("/")[0] for m in metrics]
      found[name] = comparison.Plot("bars", groups, values, "evaluator", name)
  return found


def image_sheet(
  images: Any,
  *,
  titles: Any = None,
  maps: Any = None,
  row_names: Sequence[str] | None = None,
  column_names: Sequence[str] | None = None,
  inches: float = 1.3,
) -> "Figure":
  """Images in rows and columns, as a figure.

  Args:
    images: Rows of images [height, width, 1 or 3], 0..255, as nested sequences
      or one array; None leaves a place empty.
    titles: Rows of small titles, one above each image, or None.
    maps: Rows of heat maps [height, width], not negative, of any resolution,
      to be laid over the images, each scaled by its own maximum; None for none.
    row_names: Left of each row.
    column_names: Above the first image of each column, if it has no title.
    inches: Width and height of one image.

  Returns:
    The figure; the caller saves it.
  """
  from matplotlib.figure import Figure  # noqa: PLC0415 (takes a second)
  from matplotlib.layout_engine import (  # noqa: PLC0415
    ConstrainedLayoutEngine,
  )

  columns = max((len(row) for row in images), default=0)
  if columns == 0:
    raise ValueError("images must hold one image or more, got none.")
  margin = 0.17 * (titles is not None)
  size = columns * inches, len(images) * (inches + margin)
  layout = ConstrainedLayoutEngine(
    w_pad=0.02, h_pad=0.02, wspace=0.0, hspace=0.0
  )
  figure = Figure(figsize=size, layout=layout)
  grid = figure.subplots(len(images), columns, squeeze=False)
  for i, row in enumerate(images):
    for j, axes in enumerate(grid[i]):
      axes.set(xticks=[], yticks=[])
      for spine in axes.spines.values():
        spine.set_visible(False)
      if j == 0 and row_names is not None:
        axes.set_ylabel(row_names[i], fontsize=8)
      if i == 0 and column_names is not None:
        axes.set_title(column_names[j], fontsize=8)
      if j >= len(row) or row[j] is None:
        continue
      picture = np.asarray(row[j], np.float32)
      height, width, channels = picture.shape
      picture = np.clip(picture / 255, 0, 1)
      axes.imshow(picture if channels == 3 else picture.repeat(3, axis=2))
      if titles is not None and titles[i][j]:
        axes.set_title(titles[i][j], fontsize=8, pad=2)
      if maps is not None and maps[i][j] is not None:
        heat = np.asarray(maps[i][j], np.float32)
        axes.imshow(
          heat / max(float(heat.max()), 1e-12),
          vmin=0,
          vmax=1,
          cmap="turbo",
          alpha=0.45,
          interpolation="bilinear",
          extent=(-0.5, width - 0.5, height - 0.5, -0.5),
        )
  return figure


def _number(value: float, *, percent: bool) -> str:
  if math.isnan(value):
    return MISSING
  if math.isinf(value):
    return "\N{INFINITY}" if value > 0 else "-\N{INFINITY}"
  if percent:
    return f"{100 * value:.2f}"
  return f"{int(value):,}" if value.is_integer() else f"{value:.4g}"


def _finite(value: Any) -> float | None:
  """A number for JSON, which knows neither NaN nor infinity."""
  value = math.nan if value is None else float(value)
  return value if math.isfinite(value) else None


def _file_name(text: str, taken: set[str]) -> str:
  base = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")[:120] or "picture"
  name, count = base, 2
  while name.lower() in taken:  # Some file systems know one case only.
    name, count = f"{base}-{count}", count + 1
  taken.add(name.lower())
  return name


def _encode(
  figure: "Figure", form: str = FORMS[0][0], dpi: int = FORMS[0][1]
) -> bytes:
  buffer = io.BytesIO()
  metadata = {"Software": None} if form == "png" else None
  figure.savefig(buffer, format=form, dpi=dpi, metadata=metadata)
  return buffer.getvalue()


def _page(
  results: Sequence[Result],
  together: "Mapping[str, Figure]",
  *,
  title: str,
  notes: Sequence[str],
) -> bytes:
  import jinja2  # noqa: PLC0415 (training needs neither of the two)
  from markupsafe import Markup  # noqa: PLC0415

  source = importlib.resources.files("jaxshape.engine") / "report.html"
  environment = jinja2.Environment(
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
    finalize=lambda x: (
      _private(x) if isinstance(x, str) and not isinstance(x, Markup) else x
    ),
  )
  template = environment.from_string(source.read_text(encoding="utf-8"))
  differing, common = _settings([r.config for r in results])
  values = {
    "title": title,
    "notes": notes,
    "results": results,
    "systems": list(dict.fromkeys(_systems(results))),
    "table": table(results),
    "charts": list(_charts(results)),
    "differing": differing,
    "common": common,
    "versions": _versions(),
    "width": CHART_WIDTH,
    "height": CHART_HEIGHT,
    "left": LEFT,
    "right": RIGHT,
  }
  for form, dpi in FORMS:
    pictures = {
      name: [
        (r.name, Markup(_inline(r.pictures[name], form, dpi)))
        for r in results
        if name in r.pictures
      ]
      for name in dict.fromkeys(p for r in results for p in r.pictures)
    }
    shared = {
      name: Markup(_inline(figure, form, dpi))
      for name, figure in together.items()
    }
    page = template.render(
      values, together=shared, pictures=pictures, left_out=False
    ).encode()
    if len(page) <= MAX_BYTES:
      return page
  return template.render(
    values, together={}, pictures={}, left_out=True
  ).encode()


def _inline(figure: "Figure", form: str, dpi: int) -> str:
  data = base64.b64encode(_encode(figure, form, dpi)).decode()
  return f"data:image/{form};base64,{data}"


def _systems(results: Sequence[Result]) -> Iterator[str]:
  for r in results:
    if "system" in r.config:
      yield str(r.config["system"])


def _versions() -> dict[str, str]:
  versions = {}
  for name in ("jaxshape", "jax", "jaxlib"):
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      versions[name] = "not installed"
  versions["python"] = platform.python_version()
  devices = jax.devices()
  versions["device"] = f"{len(devices)} x {devices[0].device_kind}"
  return versions


# An absolute path or one from a home directory, not a part of a longer word.
_PATH = re.compile(
  r"(?<![\w.~/\\])(?:~[\w.-]*|[A-Za-z]:(?=\\)|(?=/\w))"
  r"(?:[/\\][^\s/\\'\",;:)\]}>]+)+[/\\]?"
)


def _private(text: str) -> str:
  """The text with only the last part of each path, and no one's home."""

  def shorten(match: re.Match[str]) -> str:
    parts = [p for p in re.split(r"[/\\]", match[0]) if p]
    parts = [p for p in parts if not p.endswith(":")]
    if parts[0] in ("home", "Users"):
      parts = parts[2:]
    elif parts[0] == "root" or parts[0].startswith("~"):
      parts = parts[1:]
    return "\N{HORIZONTAL ELLIPSIS}/" + "".join(parts[-1:])

  return _PATH.sub(shorten, text)


def _settings(
  configs: Sequence[Mapping[str, Any]],
) -> tuple[list[tuple[str, list[str]]], list[tuple[str, list[str]]]]:
  """Settings in which the runs differ, and those that they share."""
  # A column without a config has its numbers from elsewhere.
  flat = [dict(_flatten(config)) for config in configs]
  given = [f for f in flat if f]
  differing, common = [], []
  for key in dict.fromkeys(k for f in flat for k in f):
    texts = [f.get(key, MISSING) for f in flat]
    if len({f.get(key) for f in given}) > 1:
      differing.append((key, texts))
    else:
      common.append((key, [t for t in texts if t != MISSING][:1]))
  return differing, common


def _flatten(config: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
  for key, value in config.items():
    if hasattr(value, "items"):
      yield from _flatten(value, f"{prefix}{key}.")
    else:
      yield f"{prefix}{key}", str(value)


class Chart(NamedTuple):
  """One training curve per result, in pixels."""

  name: str
  lines: list[list[str]]
  across: list[tuple[float, str]]
  up: list[tuple[float, str]]


def _charts(results: Sequence[Result]) -> Iterator[Chart]:
  keys = dict.fromkeys(k for r in results for row in r.history for k in row)
  for key in keys:
    curves = [_curve(r.history, key) for r in results]
    points = [piece for curve in curves for piece in curve]
    if (
      key not in ("step", "time")
      and points
      and np.ptp(np.concatenate(points)[:, 0]) > 0
    ):
      yield _chart(key, curves)


def _chart(name: str, curves: list[list[np.ndarray]]) -> Chart:
  from matplotlib.ticker import MaxNLocator  # noqa: PLC0415 (takes a second)

  points = np.concatenate([piece for curve in curves for piece in curve])
  (x0, y0), (x1, y1) = points.min(0), points.max(0)
  up = MaxNLocator(4).tick_values(y0, y1 if y1 > y0 else y0 + 1)
  across = MaxNLocator(4, integer=True).tick_values(x0, x1)
  y0, y1 = up[0], up[-1]
  width = (CHART_WIDTH - LEFT - RIGHT) / (x1 - x0)
  height = (CHART_HEIGHT - TOP - BOTTOM) / (y1 - y0)
  right = lambda x: round(float(LEFT + (x - x0) * width), 1)
  down = lambda y: round(float(CHART_HEIGHT - BOTTOM - (y - y0) * height), 1)
  return Chart(
    name,
    [
      # A lone point is drawn as a line to itself.
      [
        " ".join(
          f"{right(x)},{down(y)}"
          for x, y in (piece if len(piece) > 1 else piece.repeat(2, axis=0))
        )
        for piece in curve
      ]
      for curve in curves
    ],
    [(right(x), f"{x:,.0f}") for x in across if x0 <= x <= x1],
    [(down(y), f"{y:.4g}") for y in up],
  )


def _curve(history: Sequence[Mapping[str, Any]], key: str) -> list[np.ndarray]:
  """Pieces [points, 2] of a curve, broken where it is not finite."""
  rows = [(r["step"], _finite(r[key])) for r in history if key in r]
  pieces: list[list[tuple[float, float]]] = [[]]
  for step, value in rows:
    if value is None:
      pieces.append([])
    else:
      pieces[-1].append((step, value))
  group = max(1, math.ceil(len(rows) / MAX_POINTS))
  return [
    np.array([np.mean(p[i : i + group], 0) for i in range(0, len(p), group)])
    for p in pieces
    if p
  ]
