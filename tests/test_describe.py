"""Folders of photos in, descriptors out."""

import functools
import pickle
import subprocess
import sys
import zipfile

import jax
import numpy as np
from PIL import Image
import pytest

from jaxshape import describe
from jaxshape.backbones import resnet, retrieval
from jaxshape.data import photos
from jaxshape.errors import InputError
from jaxshape.layers import apply
from jaxshape.retrieval import descriptors

RNG = np.random.default_rng(0)
SIZES = {"a.png": (24, 16), "b/c.png": (11, 20), "d.png": (50, 40)}
SCALES = (1.0, 2**0.5)
DIMENSIONS = 16
WHITENINGS = {
  form: {
    "m": RNG.normal(size=(DIMENSIONS, 1)),
    "P": RNG.normal(size=(DIMENSIONS, DIMENSIONS)),
  }
  for form in ("ss", "ms")
}


def _tensors():
  """As the public code names those of a tiny network."""
  net = resnet.make("resnet8", num_classes=1, width=4)
  made = apply.init(net, jax.random.key(0), np.zeros((1, 8, 8, 3)), train=False)
  draw = lambda x: RNG.uniform(0.5, 1.5, x.shape).astype(np.float32)
  made = jax.tree.map(lambda x: np.asarray(x) if x.ndim > 1 else draw(x), made)
  tensors = resnet.to_state_dict(net, *made, form="retrieval")
  return tensors | {
    "pool.p": np.float32([2.5]),
    "whiten.weight": RNG.normal(size=(16, 16)).astype(np.float32),
    "whiten.bias": RNG.normal(size=16).astype(np.float32),
  }


TENSORS = _tensors()
META = {
  "architecture": "resnet8",
  "pooling": "gem",
  "mean": [0.4, 0.5, 0.6],
  "std": [0.2, 0.3, 0.2],
  "Lw": {"places": WHITENINGS},
}


def _save(path, tensors=TENSORS, **meta):
  """As the public code saves networks, arrays in place of tensors."""
  content = {"meta": {**META, **meta}, "state_dict": tensors, "epoch": 3}
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("archive/data.pkl", pickle.dumps(content, protocol=2))
  return path


@pytest.fixture(scope="module")
def network(tmp_path_factory):
  """The network of such a file."""
  return describe.load(_save(tmp_path_factory.mktemp("net") / "n.pth"))


@pytest.fixture
def folder(tmp_path):
  """Photos, and files that are none."""
  for name, (height, width) in SIZES.items():
    path = tmp_path / "photos" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
  (tmp_path / "photos" / "notes.txt").write_text("no photo")
  (tmp_path / "photos" / ".hidden.png").write_text("no photo")
  return tmp_path / "photos"


def _describe(folder, output, network, **options):
  options = {"image_size": 32, "bucket": 32, "scales": SCALES, **options}
  return describe.describe(folder, output, network=network, **options)


def _bilinear(x, scale):
  for axis in (0, 1):
    n = x.shape[axis]
    out = [np.take(x, 0, axis)] * int(n * scale)
    for i in range(len(out)):
      at = max((i + 0.5) / scale - 0.5, 0)
      low, part = int(at), at - int(at)
      first, second = (np.take(x, min(low + k, n - 1), axis) for k in (0, 1))
      out[i] = (1 - part) * first + part * second
    x = np.stack(out, axis)
  return x


def _unit(v):
  return v / np.linalg.norm(v)


def _expected(pixels, network):
  """The public network, step by step, on one image at its own size."""
  x = (pixels / 255 - META["mean"]) / META["std"]
  found = []
  for scale in SCALES:
    image = np.float32(x if scale == 1 else _bilinear(x, scale))[None]
    maps, _ = apply.apply(
      network.net,
      network.variables["params"],
      network.variables["collections"],
      image,
      train=False,
      method="features",
    )
    maps = np.maximum(np.float64(maps[0]), 1e-6)
    pooled = _unit((maps**2.5).mean((0, 1)) ** (1 / 2.5))
    weight, bias = TENSORS["whiten.weight"], TENSORS["whiten.bias"]
    found.append(_unit(weight @ pooled + bias))
  return _unit(sum(found))


# Golden.


def test_descriptors_are_those_of_the_public_network(
  folder, network, tmp_path, capsys
):
  assert network.mean == (0.4, 0.5, 0.6)
  output, left_out = _describe(folder, tmp_path / "out.npy", network)
  assert "3 images in" in capsys.readouterr().out
  assert not left_out
  assert (tmp_path / "out.txt").read_text().split() == sorted(SIZES)
  got = np.load(output)
  assert got.dtype == np.float32
  assert got.shape == (3, DIMENSIONS)
  # One that is padded, and one that has been made smaller.
  for i, name in ((0, "a.png"), (2, "d.png")):
    image = Image.open(folder / name)
    image.thumbnail((32, 32), Image.Resampling.LANCZOS, reducing_gap=None)
    want = _expected(np.asarray(image), network)
    np.testing.assert_allclose(got[i], want, atol=1e-5)
  left = sorted(p.name for p in tmp_path.iterdir())
  assert left == ["out.npy", "out.txt", "photos"]


def test_whitening_of_the_file(network):
  scales = (1.0,)
  found = describe.choose_whitening(network, "places", scales)
  np.testing.assert_allclose(found.projection, WHITENINGS["ss"]["P"], rtol=1e-6)
  found = describe.choose_whitening(network, "places", SCALES)
  np.testing.assert_allclose(found.mean, WHITENINGS["ms"]["m"][:, 0], rtol=1e-6)
  with pytest.raises(InputError, match="'oxford' is no file.* has places"):
    describe.choose_whitening(network, "oxford", SCALES)


def test_power_is_that_of_gem_where_nothing_was_whitened(network):
  plain = {**network.variables, "whiten": None}
  assert network.power(SCALES) == 1
  assert network._replace(variables=plain).power(SCALES) == 2.5
  assert network._replace(variables=plain).power([1.0]) == 1
  other = network._replace(variables=plain, pooling="mac")
  assert other.power(SCALES) == 1


# Runs that stop.


def test_a_stopped_run_goes_on(folder, network, tmp_path, monkeypatch):
  whole, _ = _describe(folder, tmp_path / "whole.npy", network)
  read, seen = photos.read_image, []

  def stopping(path, **options):
    seen.append(path.name)
    if path.name == "d.png" and len(seen) <= 3:
      raise KeyboardInterrupt
    return read(path, **options)

  monkeypatch.setattr(photos, "read_image", stopping)
  output = tmp_path / "part.npy"
  with pytest.raises(KeyboardInterrupt):
    _describe(folder, output, network, batch_size=1)
  assert not output.exists()
  assert not output.with_suffix(".txt").exists()
  with pytest.raises(InputError, match="other scales; give the same command"):
    _describe(folder, output, network, scales=(1.0,))
  seen.clear()
  seen += ["gone"] * 3
  _describe(folder, output, network, batch_size=1)
  assert seen[3:] == ["d.png"]
  np.testing.assert_allclose(np.load(output), np.load(whole), atol=1e-6)
  with pytest.raises(InputError, match="is there already"):
    _describe(folder, output, network)


def test_broken_images_are_named_or_left_out(folder, network, tmp_path):
  whole, _ = _describe(folder, tmp_path / "whole.npy", network)
  (folder / "ab.png").write_bytes((folder / "a.png").read_bytes()[:200])
  output = tmp_path / "out.npy"
  with pytest.raises(InputError, match=r"ab\.png is damaged.*--skip_broken"):
    _describe(folder, output, network)
  _, left_out = _describe(folder, output, network, skip_broken=True)
  assert left_out == ["ab.png"]
  np.testing.assert_allclose(np.load(output), np.load(whole), atol=1e-6)
  assert output.with_suffix(".txt").read_text().split() == sorted(SIZES)


# Reading.


def test_boxes_are_cut_out(folder, tmp_path):
  file = tmp_path / "boxes.txt"
  file.write_text("a.png 1.2 2 9 11.9\n\nb/my c.png 0 0 5 5\n")
  boxes = photos.read_boxes(file)
  assert boxes["b/my c.png"] == (0, 0, 5, 5)
  got = photos.read_image(folder / "a.png", image_size=99, box=boxes["a.png"])
  pixels = np.asarray(Image.open(folder / "a.png"))
  np.testing.assert_array_equal(got, pixels[2:12, 1:9])
  for text, message in (
    ("a.png 1 2 3", "line 1: give a name"),
    ("a.png 5 2 3 9", "line 1: a.png has the empty box"),
    ("a.png 1 1 3 9\na.png 1 1 3 9", "line 2: a.png is there twice"),
  ):
    file.write_text(text)
    with pytest.raises(InputError, match=message):
      photos.read_boxes(file)
  with pytest.raises(InputError, match=r"a.png is 16 x 24, beside its box"):
    photos.read_image(folder / "a.png", image_size=9, box=(20, 1, 30, 9))


def test_photos_are_turned_upright_and_transparency_is_white(tmp_path):
  exif = Image.Exif()
  exif[0x0112] = 6
  Image.new("RGB", (6, 4)).save(tmp_path / "turned.jpg", exif=exif)
  got = photos.read_image(tmp_path / "turned.jpg", image_size=99)
  assert got.shape == (6, 4, 3)
  Image.new("RGBA", (3, 2), (0, 0, 0, 0)).save(tmp_path / "clear.png")
  got = photos.read_image(tmp_path / "clear.png", image_size=99)
  assert np.all(got == 255)


# Refusal.


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"scales": ()}, "scales must be positive"),
    ({"scales": (0.0,)}, "scales must be positive"),
    ({"image_size": 0}, "image_size must be 1 or more, got 0"),
    ({"names": ["a.png", "gone.png"]}, "lacks images: gone.png"),
    ({"boxes": {"x.png": (0, 0, 1, 1)}}, "boxes of no image: x.png"),
    ({"dimensions": 3}, "dimensions are of a whitening"),
  ],
)
def test_bad_options_are_refused(folder, network, tmp_path, options, message):
  with pytest.raises(InputError, match=message):
    _describe(folder, tmp_path / "out.npy", network, **options)
  assert not list(tmp_path.glob("out*"))


def test_bad_folders_and_outputs_are_refused(network, tmp_path):
  (tmp_path / "empty").mkdir()
  for folder, output, message in (
    ("empty", "out.npy", "holds no images"),
    ("gone", "out.npy", "there is no folder .*gone"),
    ("empty", "out.txt", "must end with .npy"),
  ):
    with pytest.raises(InputError, match=message):
      _describe(tmp_path / folder, tmp_path / output, network)


@pytest.mark.parametrize(
  ("change", "options", "message"),
  [
    ({"architecture": "vgg16"}, {}, "'vgg16' is no backbone"),
    ({}, {"backbone": "resnet14"}, "of backbone resnet8, not of resnet14"),
    ({"architecture": "resnet14"}, {}, "not of a resnet14.*missing"),
    ({"mean": "web"}, {}, "'web' as mean or std"),
    ({"Lw": {"x": {"ss": 1}}}, {}, "whitening x that is no arrays"),
    ({"pooling": "max"}, {}, "pooling must be one of gem, mac"),
  ],
)
def test_other_networks_are_refused(tmp_path, change, options, message):
  path = _save(tmp_path / "n.pth", **change)
  with pytest.raises(InputError, match=message) as error:
    describe.load(path, **options)
  assert str(path) in str(error.value)


def test_nothing_of_a_file_is_run(tmp_path):
  class Harm:
    def __reduce__(self):
      return print, ("harm",)

  path = _save(tmp_path / "n.pth", x=Harm())
  with pytest.raises(InputError, match=r"n.pth needs .*print"):
    describe.load(path)


def test_the_command_refuses_random_features(tmp_path):
  done = subprocess.run(
    [sys.executable, "-m", "jaxshape.describe", "photos", "--output=a.npy"],
    capture_output=True,
    text=True,
    check=False,
    cwd=tmp_path,
  )
  assert done.returncode == 1
  assert len(done.stderr.strip().splitlines()) == 1
  assert "--weights=network.pth" in done.stderr
  assert "--untrained" in done.stderr


def test_regions_compile_for_the_size_itself(network):
  other = network._replace(pooling="rmac")
  assert not other.padded
  extract = retrieval.make_extract(other, (1.0,))
  image = RNG.integers(0, 256, (1, 16, 12, 3), dtype=np.uint8)
  got = extract(other.variables, image, np.array([[16, 12]]))
  assert got.shape == (1, DIMENSIONS)
  assert descriptors.regions(4, 3, levels=1) == [(0, 0, 3), (1, 0, 3)]


def test_a_public_ground_truth_names_images_and_boxes(tmp_path):
  entry = {"easy": [0], "hard": [], "junk": [1], "bbx": [1, 2.5, 30, 40]}
  content = {"imlist": ["a", "b"], "qimlist": ["q"], "gnd": [entry]}
  path = tmp_path / "gnd_some.pkl"
  path.write_bytes(pickle.dumps(content, protocol=2))
  names, boxes = describe.chosen(None, str(path))
  assert names == ["q.jpg"]
  assert boxes == {"q.jpg": (1.0, 2.5, 30.0, 40.0)}
  assert describe.chosen(str(path), None) == (["a.jpg", "b.jpg"], None)
  (tmp_path / "some.txt").write_text("x.png\n\ny.png\n")
  assert describe.chosen(str(tmp_path / "some.txt"), None)[0] == [
    "x.png",
    "y.png",
  ]
  assert describe.chosen(None, None) == (None, None)
  del entry["bbx"]
  path.write_bytes(pickle.dumps(content, protocol=2))
  with pytest.raises(InputError, match=r"gnd\[0\] has no bbx of four numbers"):
    describe.chosen(None, str(path))


def test_what_is_cut_out_is_scaled_like_the_whole_photo(tmp_path):
  Image.new("RGB", (80, 40), "red").save(tmp_path / "a.png")
  read = functools.partial(photos.read_image, tmp_path / "a.png")
  assert read(image_size=40).shape == (20, 40, 3)
  assert read(image_size=40, box=(0, 0, 40, 20)).shape == (10, 20, 3)
  assert read(image_size=99, box=(0, 0, 40, 20)).shape == (20, 40, 3)
