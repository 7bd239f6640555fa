"""The style guide as a test: it holds for files that do not exist yet."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path("jaxshape")
FILES = sorted(p for p in ROOT.rglob("*.py"))
AREAS = (
  "filters", "transforms", "geometry", "points", "matching", "retrieval",
  "clustering", "losses", "metrics", "attacks", "explanations", "video",
)  # fmt: skip
# What each layer may import of this package, besides typing and errors.
ALLOWED = {
  **dict.fromkeys(AREAS, AREAS),
  "layers": (*AREAS, "layers"),
  "backbones": (*AREAS, "layers", "backbones"),
  "data": (*AREAS, "data"),
  "engine": (*AREAS, "layers", "backbones", "data", "engine", "system"),
  "systems": (
    *AREAS, "layers", "backbones", "data", "engine", "system",
  ),
}  # fmt: skip
# The areas run in Colab with JAX alone.
PURE = ("jax", "numpy", "jaxtyping", "beartype", "jaxshape")
VAGUE = ("utils", "helpers", "common", "misc", "util", "helper")
LINES = {"systems": 400}


def _area(path):
  parts = path.relative_to(ROOT).parts
  return parts[0] if len(parts) > 1 else path.stem


def _tree(path):
  return ast.parse(path.read_text(encoding="utf-8"))


def _imports(tree):
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0
      for alias in node.names:
        yield f"{node.module}.{alias.name}"


def _public(tree):
  for node in tree.body:
    if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
      yield node


def _ids(paths):
  return [str(p) for p in paths]


@pytest.mark.parametrize("path", FILES, ids=_ids(FILES))
def test_imports_point_one_way(path):
  area = _area(path)
  if area not in ALLOWED:
    return
  for name in _imports(_tree(path)):
    top, *rest = name.split(".")
    if top == "jaxshape":
      target = rest[0] if rest else ""
      assert target in (*ALLOWED[area], "typing", "errors", "images"), name
      if area == "systems":
        assert target != "systems", "a system imports no other"
    elif area in AREAS:
      assert top in PURE or top in sys.stdlib_module_names, name
    if area == "engine":
      assert not name.startswith("jaxshape.systems"), name


@pytest.mark.parametrize("path", FILES, ids=_ids(FILES))
def test_files_are_named_by_what_they_do_and_stay_short(path):
  assert path.stem not in VAGUE
  lines = len(path.read_text(encoding="utf-8").splitlines())
  assert lines <= LINES.get(_area(path), 700), lines


def test_the_machinery_is_read_in_half_an_hour():
  files = [
    "train.py", "eval.py", "jaxshape/system.py", "jaxshape/engine/steps.py",
    "jaxshape/engine/runtime.py", "jaxshape/engine/optimizers.py",
    "jaxshape/engine/checkpoints.py", "jaxshape/engine/logs.py",
    "jaxshape/engine/command.py", "jaxshape/engine/settings.py",
  ]  # fmt: skip
  assert _code(files) <= 2150, _code(files)
  # What only several processes need is read apart.
  apart = _code(["jaxshape/engine/processes.py"])
  assert apart <= 450, apart


def _code(files):
  count = 0
  for file in files:
    for line in pathlib.Path(file).read_text(encoding="utf-8").splitlines():
      count += bool(line.strip()) and not line.strip().startswith("#")
  return count


def test_packages_hold_a_docstring_and_nothing_else():
  for path in ROOT.rglob("__init__.py"):
    body = _tree(path).body
    assert len(body) == 1, path
    assert isinstance(body[0], ast.Expr), path


def test_nothing_outside_a_systems_file_knows_its_name():
  names = [p.stem for p in (ROOT / "systems").glob("[!_]*.py")]
  others = [p for p in FILES if _area(p) != "systems"]
  for path in [*others, pathlib.Path("train.py"), pathlib.Path("eval.py")]:
    for node in ast.walk(_tree(path)):
      if isinstance(node, ast.Compare):
        text = ast.unparse(node)
        assert not any(f"'{name}'" in text for name in names), (path, text)


AREA_FILES = [p for p in FILES if _area(p) in AREAS and p.name != "__init__.py"]


@pytest.mark.parametrize("path", AREA_FILES, ids=_ids(AREA_FILES))
def test_functions_of_the_areas_follow_the_style(path):
  tree = _tree(path)
  assert ast.get_docstring(tree), path
  for function in _public(tree):
    where = f"{path}:{function.name}"
    arguments = function.args
    assert arguments.kwarg is None, f"{where} forwards **options"
    # Options have a default, and what has a default is keyword-only.
    assert not arguments.defaults, f"{where} has positional defaults"
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args)]
    assert "rng" not in names, where
    if "key" in names:
      assert names[0] == "key", f"{where}: key comes first"
    for default in arguments.kw_defaults:
      mutable = isinstance(default, ast.List | ast.Dict | ast.Set)
      assert not mutable, f"{where} has a mutable default"
    decorators = [ast.unparse(d) for d in function.decorator_list]
    assert any("typed" in d for d in decorators), f"{where} is not @typed"
    text = ast.get_docstring(function)
    assert text, f"{where} has no docstring"
    parameters = [*names, *(a.arg for a in arguments.kwonlyargs)]
    if len(parameters) > 1:
      for name in parameters:
        assert re.search(rf"^\s*{name}:", text, re.M), f"{where}: {name}"
    if function.returns is None or ast.unparse(function.returns) != "None":
      assert "Returns:" in text or len(parameters) <= 1, where


def test_every_area_file_names_its_sources():
  for path in AREA_FILES:
    text = path.read_text(encoding="utf-8")
    if not any(_public(_tree(path))):
      continue
    assert "Reference:" in text or "Source:" in text, path


def test_tests_mirror_the_package():
  for path in sorted(pathlib.Path("tests").glob("*/test_*.py")):
    area = path.parent.name
    if area in {p.name for p in ROOT.iterdir()}:
      target = ROOT / area / path.name.removeprefix("test_")
      assert target.exists(), f"{path} tests nothing"
  for path in AREA_FILES:
    if any(_public(_tree(path))):
      mirror = pathlib.Path("tests") / _area(path) / f"test_{path.name}"
      assert mirror.exists(), f"{path} has no {mirror}"


def test_the_areas_import_without_the_rest():
  modules = [".".join(p.with_suffix("").parts) for p in AREA_FILES]
  code = (
    f"import sys\nfor name in {modules!r}: __import__(name)\n"
    "heavy = {'flax', 'optax', 'orbax', 'grain', 'tensorflow_datasets', "
    "'ml_collections', 'matplotlib', 'PIL', 'scipy'}\n"
    "print(sorted(heavy & {m.split('.')[0] for m in sys.modules}))\n"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  # JAX itself brings SciPy.
  assert set(ast.literal_eval(done.stdout)) <= {"scipy"}, done.stdout


def test_texts_name_no_machine_and_leave_nothing_unfinished():
  tracked = subprocess.run(
    ["git", "ls-files"], capture_output=True, text=True, check=False
  ).stdout.split()
  words = ("TODO", "FIXME", "/home/", "/root/", "/work/")
  for name in tracked:
    path = pathlib.Path(name)
    if path.suffix not in {".py", ".md", ".toml", ".txt", ".html", ".ipynb"}:
      continue
    if not path.exists() or path.parts[0] == "tests":
      continue
    text = path.read_text(encoding="utf-8")
    for word in words:
      assert word not in text, f"{name} holds {word}"
