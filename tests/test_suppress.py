"""Folders of images in, filtered copies out."""

import json
import subprocess
import sys

import jax
import numpy as np
from PIL import Image
import pytest

from jaxshape import suppress
from jaxshape.data import photos, suppression
from jaxshape.errors import InputError
from jaxshape.filters import diffusion, median

RNG = np.random.default_rng(0)
# Height and width; two sizes that several images have.
SIZES = {
  "a.png": (9, 14),
  "b/c d.jpg": (12, 7),
  "b/e.PNG": (9, 14),
  "f.webp": (9, 14),
  "g.bmp": (12, 7),
}
WRITTEN = ["a.png", "b/c d.png", "b/e.PNG", "f.png", "g.png"]
FEW = {"options": {"iterations": 2}}


@pytest.fixture
def folder(tmp_path):
  """Pictures, and files that are none."""
  for name, (height, width) in SIZES.items():
    path = tmp_path / "photos" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
  (tmp_path / "photos" / "notes.txt").write_text("no photo")
  (tmp_path / "photos" / ".hidden.png").write_text("no photo")
  return tmp_path / "photos"


def _pixels(path):
  with Image.open(path) as image:
    return np.asarray(image.convert("RGB"))


def _tree(root):
  paths = [p.relative_to(root).as_posix() for p in root.rglob("*")]
  return sorted(p for p in paths if "." in p)


def _diffused(image, iterations, *, kappa, step_size):
  """Perona and Malik's Eq. 7 and 8, pixel by pixel."""
  u = image.astype(np.float64)
  for _ in range(iterations):
    new = u.copy()
    for y, x in np.ndindex(*u.shape[:2]):
      for v, w in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
        if 0 <= v < u.shape[0] and 0 <= w < u.shape[1]:
          d = u[v, w] - u[y, x]
          new[y, x] += step_size * np.exp(-((d / kappa) ** 2)) * d
    u = new
  return u


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_every_image_is_filtered_at_its_own_size(folder, tmp_path, batch_size):
  out = tmp_path / "out"
  written, left_out = suppress.suppress(
    folder,
    out,
    options={"iterations": 2, "kappa": 60, "step_size": 0.2},
    batch_size=batch_size,
  )
  assert [p.relative_to(out).as_posix() for p in written] == WRITTEN
  assert left_out == []
  assert _tree(out) == [*WRITTEN, "suppression.json"]
  for source, name in zip(SIZES, WRITTEN, strict=True):
    got = _pixels(out / name)
    assert got.shape == (*SIZES[source], 3)
    want = _diffused(_pixels(folder / source), 2, kappa=60, step_size=0.2)
    # Rounded, and perhaps on the other side of a half.
    assert np.abs(got - want).max() < 0.501


def test_what_is_written_is_what_the_function_gives(folder, tmp_path):
  out = tmp_path / "out"
  suppress.suppress(folder, out, filter="median", options={"size": 3})
  for source, name in zip(SIZES, WRITTEN, strict=True):
    want = median.median(_pixels(folder / source), size=3)
    np.testing.assert_array_equal(_pixels(out / name), want)


def test_all_filters_but_the_one_that_needs_a_batch_are_there():
  assert set(suppress.FILTERS) == set(suppression.FILTERS) - {"stylized"}
  for name in suppress.FILTERS:
    options = {"sigma": 1.5} if name == "gaussian" else {}
    suppress._program(name, options)  # Refuses what the filter refuses.


def test_jpeg_keeps_names_and_quality(folder, tmp_path):
  blank = np.full((16, 16, 3), 90, np.uint8)
  Image.fromarray(blank).save(folder / "flat.JPEG")
  fine, coarse = tmp_path / "fine", tmp_path / "coarse"
  for out, quality in ((fine, 95), (coarse, 5)):
    suppress.suppress(folder, out, format="jpeg", quality=quality, **FEW)
  assert _tree(fine) == [
    "a.jpg",
    "b/c d.jpg",
    "b/e.jpg",
    "f.jpg",
    "flat.JPEG",
    "g.jpg",
    "suppression.json",
  ]
  with Image.open(fine / "a.jpg") as image:
    assert image.format == "JPEG"
    assert image.layer[1][1:3] == (1, 1)  # Colours at full resolution.
  assert (coarse / "a.jpg").stat().st_size < (fine / "a.jpg").stat().st_size
  assert np.abs(_pixels(fine / "flat.JPEG").astype(int) - 90).max() <= 1


def test_turned_images_are_written_upright_whatever_their_header_says(
  tmp_path,
):
  root = tmp_path / "photos"
  root.mkdir()
  exif = Image.Exif()
  exif[0x0112] = 6
  pixels = RNG.integers(0, 256, (6, 4, 3), dtype=np.uint8)
  Image.fromarray(pixels).save(root / "a.png")
  Image.fromarray(pixels).save(root / "b.png", exif=exif)
  Image.new("RGBA", (4, 6), (0, 0, 0, 0)).save(root / "c.png")
  out = tmp_path / "out"
  suppress.suppress(root, out, options={"iterations": 0})
  np.testing.assert_array_equal(_pixels(out / "a.png"), pixels)
  np.testing.assert_array_equal(_pixels(out / "b.png"), np.rot90(pixels, -1))
  assert (_pixels(out / "c.png") == 255).all()


# Runs that stop.


def test_a_stopped_run_goes_on(folder, tmp_path, monkeypatch):
  whole, out = tmp_path / "whole", tmp_path / "out"
  suppress.suppress(folder, whole, **FEW)
  read, seen = photos.read_image, []

  def stopping(path, **options):
    seen.append(path.name)
    if path.name == "g.bmp" and "again" not in seen:
      raise KeyboardInterrupt
    return read(path, **options)

  monkeypatch.setattr(photos, "read_image", stopping)
  with pytest.raises(KeyboardInterrupt):
    suppress.suppress(folder, out, batch_size=1, **FEW)
  there = set(_tree(out)) - {"suppression.json"}
  assert there < set(WRITTEN)
  assert there
  with pytest.raises(InputError, match="iterations: 2 then, 3 now"):
    suppress.suppress(folder, out, options={"iterations": 3})
  with pytest.raises(InputError, match="format: png then, jpeg now"):
    suppress.suppress(folder, out, format="jpeg", **FEW)
  seen[:] = ["again"]
  written, _ = suppress.suppress(folder, out, **FEW)
  assert len(seen) - 1 == len(WRITTEN) - len(there) == len(written)
  assert _tree(out) == _tree(whole)
  for name in WRITTEN:
    np.testing.assert_array_equal(_pixels(out / name), _pixels(whole / name))
  # The defaults are settings, too, whether they are said or not.
  said = {"options": {"iterations": 2, "kappa": 20.0}}
  assert suppress.suppress(folder, out, **said)[0] == []


def test_another_folder_of_images_is_refused(folder, tmp_path):
  out = tmp_path / "out"
  suppress.suppress(folder, out, **FEW)
  folder.rename(tmp_path / "moved")
  with pytest.raises(InputError, match="photos then, .*moved now"):
    suppress.suppress(tmp_path / "moved", out, **FEW)
  (out / "suppression.json").write_text('{"images": ')
  with pytest.raises(InputError, match=r"suppression\.json is damaged"):
    suppress.suppress(tmp_path / "moved", out, **FEW)


def test_damaged_images_are_named_or_left_out(folder, tmp_path):
  (folder / "ab.png").write_bytes((folder / "a.png").read_bytes()[:200])
  (folder / "web.jpg").write_text("<html>404</html>")
  out = tmp_path / "out"
  with pytest.raises(InputError, match=r"(ab\.png|web\.jpg) .*--skip_damaged"):
    suppress.suppress(folder, out, **FEW)
  _, left_out = suppress.suppress(folder, out, skip_damaged=True, **FEW)
  assert left_out == ["ab.png", "web.jpg"]
  assert _tree(out) == [*WRITTEN, "suppression.json"]
  # One that is mended is written when the command is given again.
  (folder / "ab.png").write_bytes((folder / "a.png").read_bytes())
  written, left_out = suppress.suppress(folder, out, skip_damaged=True, **FEW)
  assert [p.name for p in written] == ["ab.png"]
  assert left_out == ["web.jpg"]


def test_only_damaged_images_are_refused(tmp_path):
  (tmp_path / "photos").mkdir()
  (tmp_path / "photos" / "a.png").write_bytes(b"")
  with pytest.raises(InputError, match="all 1 images are damaged"):
    suppress.suppress(tmp_path / "photos", tmp_path / "o", skip_damaged=True)


def test_few_programs_are_kept(monkeypatch):
  monkeypatch.setattr(suppress, "_MOST_PROGRAMS", 2)
  programs = suppress._Programs(lambda x: 255 - x)
  kept = []
  for width in (3, 4, 3, 5):
    image = RNG.integers(0, 256, (1, 2, width, 3), dtype=np.uint8)
    np.testing.assert_array_equal(programs(image), 255 - image)
    kept.append(programs._compiled)
  assert kept[0] is kept[1] is kept[2] is not kept[3]


def test_floats_are_rounded_and_kept_in_range():
  values = np.float32([-3.2, 0.49, 0.51, 254.6, 300.0, 7.0]).reshape(1, 1, 2, 3)
  programs = suppress._Programs(lambda _: jax.numpy.asarray(values))
  got = programs(np.zeros((1, 1, 2, 3), np.uint8))
  assert got.dtype == np.uint8
  np.testing.assert_array_equal(got.ravel(), [0, 0, 1, 255, 255, 7])


# Refusal.


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"filter": "stylized"}, "stylized images get the texture of others"),
    ({"filter": "perona"}, "filter must be one of perona_malik.*'perona'"),
    ({"options": {"kapa": 1}}, "kapa is no option of perona_malik.* kappa"),
    ({"options": {"kappa": 0.0}}, "kappa must be above 0, got 0.0"),
    ({"options": {"kappa": [20.0]}}, "kappa must be a number or a word"),
    ({"options": {"iterations": -1}}, "iterations must be in 0"),
    ({"options": {"conduction": "x"}}, "conduction must be one of expo.*'x'"),
    ({"filter": "gaussian"}, "gaussian needs sigma"),
    ({"filter": "gaussian", "options": {"kappa": 2}}, "kappa is no option of"),
    ({"filter": "median", "options": {"size": 4}}, "size must be odd.*4"),
    ({"format": "gif"}, "format must be one of png, jpeg, got 'gif'"),
    ({"quality": 0}, r"quality must be in 1\.\.100, got 0"),
    ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
  ],
)
def test_bad_options_are_refused(folder, tmp_path, options, message):
  with pytest.raises(InputError, match=message):
    suppress.suppress(folder, tmp_path / "out", **options)
  assert not (tmp_path / "out").exists()


def test_bad_folders_are_refused(folder, tmp_path):
  (tmp_path / "empty").mkdir()
  (tmp_path / "other").mkdir()
  (tmp_path / "other" / "x.txt").write_text("mine")
  (tmp_path / "file").write_text("")
  for source, output, message in (
    ("gone", "out", "there is no folder .*gone"),
    ("empty", "out", "holds no images"),
    ("photos", "photos", "must lie apart"),
    ("photos", "photos/b/new", "must lie apart"),
    ("photos/b", "photos", "must lie apart"),
    ("photos", "other", "holds something else than a filtered copy"),
    ("photos", "file", "is a file; name a folder"),
  ):
    with pytest.raises(InputError, match=message):
      suppress.suppress(tmp_path / source, tmp_path / output, **FEW)
  assert not (tmp_path / "out").exists()
  assert (tmp_path / "other" / "x.txt").read_text() == "mine"
  Image.new("RGB", (3, 3)).save(folder / "a.bmp")
  with pytest.raises(InputError, match=r"a\.bmp and a\.png would both be"):
    suppress.suppress(folder, tmp_path / "out", **FEW)


def test_the_command(folder, tmp_path):
  (folder / "ab.png").write_bytes(b"no image")
  command = [
    sys.executable, "-m", "jaxshape.suppress", "--images=photos",
    "--output=out", "--iterations=3", "--kappa=40", "--skip_damaged",
  ]  # fmt: skip
  done = subprocess.run(
    command, capture_output=True, text=True, check=False, cwd=tmp_path
  )
  assert done.returncode == 0, done.stderr
  assert "left out, as they are damaged: 1, ab.png" in done.stdout
  assert _tree(tmp_path / "out") == [*WRITTEN, "suppression.json"]
  want = diffusion.perona_malik(
    _pixels(folder / "a.png"), iterations=3, kappa=40
  )
  got = _pixels(tmp_path / "out" / "a.png")
  assert np.abs(got - np.asarray(want)).max() < 0.501
  record = json.loads((tmp_path / "out" / "suppression.json").read_text())
  assert record["options"]["step_size"] == 0.1
