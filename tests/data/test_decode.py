import io
import pickle
import struct
import zlib

import numpy as np
from PIL import Image, ImageOps
import pytest

from jaxshape.data import decode
from jaxshape.errors import InputError


def smooth(width, height, seed=0):
  rng = np.random.default_rng(seed)
  small = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
  return Image.fromarray(small).resize(
    (width, height), Image.Resampling.BICUBIC
  )


def encode(image, kind="PNG", **options):
  file = io.BytesIO()
  image.save(file, kind, **options)
  return file.getvalue()


def png_header(width, height):
  def chunk(name, data):
    crc = zlib.crc32(name + data)
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", crc)

  head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
  pixels = zlib.compress(b"\0" * 1000)
  return (
    b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", head)
    + chunk(b"IDAT", pixels)
    + chunk(b"IEND", b"")
  )


@pytest.mark.parametrize("interpolation", decode.INTERPOLATIONS)
@pytest.mark.parametrize("size", [(50, 37), (37, 50), (41, 41), (20, 90)])
def test_center_is_resizing_all_then_cropping(interpolation, size):
  image = smooth(*size)
  decoder = decode.Decoder(
    image_size=28, resize_to=32, interpolation=interpolation
  )
  scaled = [32 * side // min(size) for side in size]
  all_of_it = image.resize(scaled, Image.Resampling[interpolation.upper()])
  left, top = (round((side - 28) / 2) for side in scaled)
  want = all_of_it.crop((left, top, left + 28, top + 28))
  got = decoder(encode(image), name="x")
  assert got.shape == (28, 28, 3)
  assert got.dtype == np.uint8
  # Pillow's boxes are float32. Where one ends between two pixels, the last
  # digit decides; elsewhere it shifts a rounding, in either of the two passes.
  hard = interpolation in ("nearest", "box")
  off = np.abs(got.astype(int) - np.asarray(want))
  assert off.max() <= (255 if hard else 2)
  assert np.mean(off > 1) < (0.05 if hard else 0.005)


def test_an_image_of_the_right_size_is_taken_as_it_is():
  image = smooth(24, 24)
  got = decode.Decoder(image_size=24, resize_to=24)(encode(image), name="x")
  np.testing.assert_array_equal(got, image)


@pytest.mark.parametrize(("size", "short"), [(224, 256), (64, 73), (32, 36)])
def test_the_usual_evaluation_size(size, short):
  image = encode(smooth(90, 80))
  usual = decode.Decoder(image_size=size)(image, name="x")
  same = decode.Decoder(image_size=size, resize_to=short)(image, name="x")
  np.testing.assert_array_equal(usual, same)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("crop", ["center", "random"])
def test_pictures_are_turned_upright(orientation, crop):
  image = smooth(40, 24)
  exif = Image.Exif()
  exif[0x0112] = orientation
  data = encode(image, "PNG", exif=exif)
  upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
  decoder = decode.Decoder(image_size=16, crop=crop)
  got = decoder(data, name="x", rng=np.random.default_rng(3))
  want = decoder(encode(upright), name="x", rng=np.random.default_rng(3))
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
  ("mode", "value", "want"),
  [
    ("L", 77, (77, 77, 77)),
    ("1", 1, (255, 255, 255)),
    ("LA", (10, 0), (255, 255, 255)),  # Transparent: white shows.
    ("RGBA", (200, 100, 0, 255), (200, 100, 0)),
    ("RGBA", (0, 0, 0, 51), (204, 204, 204)),  # 255 * (1 - 51 / 255)
    ("I;16", 0x4DFF, (0x4D, 0x4D, 0x4D)),
  ],
)
def test_modes_become_rgb(mode, value, want):
  image = Image.new(mode, (8, 8), value)
  got = decode.Decoder(image_size=8)(encode(image), name="x")
  np.testing.assert_allclose(got[4, 4], want, atol=1)


def test_palettes_and_cmyk_become_rgb():
  image = Image.new("P", (8, 8), 1)
  image.putpalette([255, 0, 0, 0, 0, 250])
  decoder = decode.Decoder(image_size=8)
  np.testing.assert_array_equal(
    decoder(encode(image), name="x")[0, 0], [0, 0, 250]
  )
  clear = encode(image, transparency=1)
  np.testing.assert_array_equal(decoder(clear, name="x")[0, 0], [255] * 3)
  cyan = encode(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG", quality=95)
  np.testing.assert_allclose(
    decoder(cyan, name="x")[4, 4], [0, 255, 255], atol=4
  )


def test_random_boxes_keep_to_scale_and_ratio():
  # Red tells x, green tells y: a picture of where the box is.
  y, x = np.mgrid[:256, :256]
  place = np.stack([x, y, 0 * x], -1).astype(np.uint8)
  decoder = decode.Decoder(
    image_size=64,
    crop="random",
    scale=(0.1, 0.5),
    ratio=(0.5, 2.0),
    interpolation="nearest",
  )
  areas, shapes = [], []
  for seed in range(60):
    rng = np.random.default_rng(seed)
    got = decoder(Image.fromarray(place), name="x", rng=rng).astype(float)
    width, height = (np.ptp(got[..., c]) * 64 / 63 for c in (0, 1))
    areas.append(width * height / 256**2)
    shapes.append(width / height)
  assert 0.08 < min(areas) < 0.2
  assert 0.4 < max(areas) < 0.53
  assert 0.47 < min(shapes) < 0.8
  assert 1.3 < max(shapes) < 2.15


def test_random_is_a_function_of_the_generator():
  data = encode(smooth(60, 50), "JPEG")
  decoder = decode.Decoder(image_size=16, crop="random")
  one, two, other = (
    decoder(data, name="x", rng=np.random.default_rng(s)) for s in (1, 1, 2)
  )
  np.testing.assert_array_equal(one, two)
  assert np.any(one != other)
  center = decode.Decoder(image_size=16)(data, name="x")
  np.testing.assert_array_equal(decoder(data, name="x"), center)


@pytest.mark.parametrize("orientation", [1, 6])
def test_large_jpegs_are_decoded_small_with_the_same_result(
  orientation, monkeypatch
):
  sizes = []

  def rgb(image, original=decode._rgb):
    sizes.append(image.size)
    return original(image)

  monkeypatch.setattr(decode, "_rgb", rgb)
  exif = Image.Exif()
  exif[0x0112] = orientation
  image = smooth(640, 400)
  decoder = decode.Decoder(image_size=32, crop="random", scale=(0.5, 0.9))
  got, want = (
    decoder(data, name="x", rng=np.random.default_rng(0)).astype(int)
    for data in (
      encode(image, "JPEG", exif=exif, quality=95),
      encode(image, "PNG", exif=exif),  # Always decoded in full.
    )
  )
  assert sizes == [(80, 50), (640, 400)]
  assert np.abs(got - want).mean() < 2
  assert np.abs(got - want).max() < 20


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (2, 7)])
@pytest.mark.parametrize("crop", ["center", "random"])
def test_odd_shapes(size, crop):
  data = encode(Image.new("RGB", size, (9, 8, 7)))
  decoder = decode.Decoder(image_size=16, crop=crop)
  got = decoder(data, name="x", rng=np.random.default_rng(0))
  np.testing.assert_array_equal(got, np.full((16, 16, 3), (9, 8, 7)))


def test_cache_keeps_to_its_limit():
  calls = []

  def make(i):
    calls.append(i)
    return {"image": np.full(100, i, np.uint8), "label": np.int32(i)}

  cache = decode.Cache(250)  # Two examples of 104 bytes.
  for _ in range(2):
    for i in range(3):
      got = cache.get(i, lambda i=i: make(i))
      assert got["image"][0] == got["label"] == i
  assert calls == [0, 1, 2, 2]
  with pytest.raises(ValueError, match="read-only"):
    cache.get(0, lambda: make(0))["image"][0] = 1
  again = pickle.loads(pickle.dumps(cache))
  again.get(0, lambda: make(0))
  assert calls[-1] == 0


@pytest.mark.parametrize(
  ("data", "says"),
  [
    (b"", "no image"),
    (b"not an image" * 9, "no image"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image"),
    (encode(smooth(64, 64), "JPEG")[:700], "damaged"),
    (encode(smooth(64, 64), "PNG")[:700], "damaged"),
    (encode(Image.new("F", (8, 8), 0.5), "TIFF"), "32 bits"),
    (png_header(7100, 7100), "max_pixels=50000000"),
    (png_header(10_000, 10_000), "max_pixels"),  # Pillow's warning.
    (png_header(60_000, 60_000), "max_pixels"),  # Pillow's error.
  ],
)
def test_damaged_images_are_named(data, says):
  decoder = decode.Decoder(image_size=8)
  with pytest.raises(decode.DamagedError, match=says) as caught:
    decoder(data, name="photos/a.jpg")
  message = str(caught.value)
  assert message.startswith("photos/a.jpg ")
  assert "\n" not in message


def test_a_bomb_is_refused_before_it_is_unpacked():
  data = encode(Image.new("1", (6000, 6000)))
  assert len(data) < 20_000
  decoder = decode.Decoder(image_size=8, max_pixels=6000 * 6000 - 1)
  with pytest.raises(decode.DamagedError, match="max_pixels=35999999"):
    decoder(data, name="x")


def test_a_disk_that_fails_is_no_damaged_image():
  class Failing(io.BytesIO):
    def read(self, *_):
      raise OSError(5, "Input/output error")

  with pytest.raises(InputError, match="cannot be read: Input") as caught:
    decode.Decoder(image_size=8)(Failing(), name="x")
  assert not isinstance(caught.value, decode.DamagedError)


@pytest.mark.parametrize(
  ("options", "says"),
  [
    ({"image_size": 0}, "image_size must be an integer >= 1, got 0"),
    ({"image_size": 8.0}, "image_size"),
    ({"resize_to": 7}, "resize_to must be an integer >= image_size=8, got 7"),
    ({"interpolation": "cubic"}, "interpolation must be one of nearest, box"),
    ({"crop": "corner"}, "crop must be one of center, random, got 'corner'"),
    ({"scale": (0.5, 1.5)}, "scale must be"),
    ({"ratio": (2.0, 1.0)}, "ratio must be"),
    ({"max_pixels": 10**9}, "max_pixels must be"),
  ],
)
def test_bad_options(options, says):
  with pytest.raises(InputError, match=says):
    decode.Decoder(**{"image_size": 8, **options})


def test_a_cache_of_random_boxes_is_refused():
  decoder = decode.Decoder(image_size=8, crop="random")
  with pytest.raises(InputError, match="crop='center'"):
    decode.make_cache(1, decoder)
  with pytest.raises(InputError, match="cache must be"):
    decode.Cache(-1)
