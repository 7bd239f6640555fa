import pickle
import sys

import numpy as np
from PIL import Image
import pytest

from jaxshape.data import sources
from jaxshape.errors import InputError


class Fixed:
  """Examples whose image is their number."""

  classes = ("even", "odd")
  damaged: tuple[str, ...] = ()

  def __len__(self):
    return 5

  def __getitem__(self, i):
    return example(i, -1)


class Drawing(Fixed):
  def sample(self, i, rng):
    return example(i, rng.integers(1000))


def example(i, drawn):
  image = np.full((2, 2, 3), i, np.uint8)
  return {"image": image, "label": np.int32(i % 2), "drawn": np.int32(drawn)}


def test_doubled_is_originals_then_marked_copies():
  doubled = sources.Doubled(Fixed())
  assert len(doubled) == 10
  examples = [doubled[j] for j in range(10)]
  assert [int(e["image"][0, 0, 0]) for e in examples] == [*range(5), *range(5)]
  assert [float(e["filtered"]) for e in examples] == [0] * 5 + [1] * 5
  assert examples[0]["filtered"].dtype == np.float32
  assert doubled.classes == ("even", "odd")


def test_subset_has_the_given_examples():
  subset = sources.Subset(Fixed(), [3, 0, 3])
  assert [int(e["image"][0, 0, 0]) for e in subset] == [3, 0, 3]


def test_views_draw_if_their_source_draws():
  view = sources.Doubled(sources.Subset(Drawing(), [4, 2]))
  rng = np.random.default_rng
  want = Drawing().sample(2, rng(7))["drawn"]
  assert sources.read(view, 3, rng(7))["drawn"] == want != -1
  assert sources.read(view, 3)["drawn"] == -1
  assert sources.Doubled(sources.Subset(Fixed(), [4, 2])).sample is None
  copy = pickle.loads(pickle.dumps(view))
  assert sources.read(copy, 3, rng(7))["drawn"] == want


def test_views_pass_on_what_is_damaged():
  source = Fixed()
  assert sources.Doubled(source).damaged == ()
  source.damaged = ("a.png",)
  assert sources.Doubled(sources.Subset(source, [1])).damaged == ("a.png",)


@pytest.mark.parametrize("spec", ["folder:{}", "{}"])
def test_a_path_is_a_folder(tmp_path, spec):
  Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
  source = sources.load(spec.format(tmp_path), split="train", image_size=8)
  assert len(source) == 1


def test_kinds_outside_the_package(tmp_path, monkeypatch):
  (tmp_path / "mine").mkdir()
  (tmp_path / "mine" / "data.py").write_text(
    "def open_source(name, *, split, image_size, data_dir=None, twice=False):\n"
    "  return [name, split, image_size, twice]\n"
  )
  monkeypatch.syspath_prepend(tmp_path)
  got = sources.load("mine.data:x:y", split="test", image_size=8, twice=True)
  assert got == ["x:y", "test", 8, True]


def test_kinds_are_the_modules_that_open_sources():
  kinds = sources.kinds()
  assert {"folder", "tfds"} <= set(kinds)
  assert not {"decode", "sources", "stream"} & set(kinds)


def test_a_missing_library_is_named(monkeypatch):
  monkeypatch.delitem(sys.modules, "jaxshape.data.tfds", raising=False)
  monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
  with pytest.raises(
    InputError, match="needs tensorflow_datasets: pip install"
  ):
    sources.load("tfds:mnist", split="train", image_size=8)


@pytest.mark.parametrize(
  ("spec", "options", "says"),
  [
    ("", {}, "data must be 'kind:name' or a path, got ''; the kinds are: "),
    (
      "flder:x",
      {},
      "data 'flder:x' is of no known kind.*kinds are: corrupted, .*domains",
    ),
    ("stream:x", {}, "no known kind"),
    ("json.decoder:x", {}, "no known kind"),
    ("no.such.module:x", {}, "no known kind"),
    ("folder:x", {"resize": 1}, r"option 'resize' \(did you mean resize_to"),
    ("folder:x", {"qqq": 1}, "no option 'qqq'; there are: classes, skip_dam"),
  ],
)
def test_unknown_kinds_and_options(spec, options, says):
  with pytest.raises(InputError, match=says):
    sources.load(spec, split="train", image_size=8, **options)


def test_numbers_out_of_range():
  with pytest.raises(IndexError, match=r"0\.\.9, got 10"):
    sources.Doubled(Fixed())[10]
  with pytest.raises(IndexError, match=r"0\.\.0, got 1"):
    sources.Subset(Fixed(), [2])[1]
  with pytest.raises(ValueError, match=r"indices must be in 0\.\.4, got 5"):
    sources.Subset(Fixed(), [0, 5])
