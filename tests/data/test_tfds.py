import io
import json
import pickle
import shutil
import struct
import subprocess
import sys

from array_record.python import array_record_data_source
import numpy as np
from PIL import Image
import pytest
import tensorflow_datasets

from jaxshape.data import decode, sources, tfds
from jaxshape.errors import InputError

COUNT = 10


def picture(i):
  pixels = np.random.default_rng(i).integers(
    0, 256, (16, 16, 3), dtype=np.uint8
  )
  return Image.fromarray(pixels)


class Tiny(tensorflow_datasets.core.GeneratorBasedBuilder):
  """Ten pictures in their order."""

  VERSION = tensorflow_datasets.core.Version("1.2.0")
  RELEASE_NOTES = {"1.2.0": "First."}  # noqa: RUF012, as TFDS has it.

  def _info(self):
    features = tensorflow_datasets.features
    return tensorflow_datasets.core.DatasetInfo(
      builder=self,
      features=features.FeaturesDict(
        {
          "image": features.Image(shape=(16, 16, 3), encoding_format="png"),
          "label": features.ClassLabel(names=["disc", "square"]),
          "depth": features.Image(shape=(None, None, 1), dtype=np.uint16),
          "id": np.int64,
          "name": features.Text(),
        }
      ),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    del dl_manager
    return {"train": self._generate_examples()}

  def _generate_examples(self):
    for i in range(COUNT):
      files = io.BytesIO(), io.BytesIO()
      picture(i).save(files[0], "PNG")
      Image.new("I;16", (20, 10), 256 * i).save(files[1], "PNG")
      for file in files:
        file.seek(0)
      image, depth = files
      label = {"label": i % 2, "id": i, "name": "x"}
      yield i, {"image": image, "depth": depth, **label}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  root = tmp_path_factory.mktemp("prepared")
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("TQDM_DISABLE", "1")
    Tiny(data_dir=root, file_format="array_record").download_and_prepare()
  return root


@pytest.fixture
def root(prepared, tmp_path):
  """A copy that a test may damage."""
  return shutil.copytree(prepared, tmp_path / "root")


def crc32c(data):
  crc = 0xFFFFFFFF
  for byte in data:
    crc ^= byte
    for _ in range(8):
      crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
  return crc ^ 0xFFFFFFFF


def masked(data):
  crc = crc32c(data)
  rotated = (crc >> 15 | crc << 17) & 0xFFFFFFFF
  return struct.pack("<I", rotated + 0xA282EAD8 & 0xFFFFFFFF)


@pytest.fixture
def tfrecords(root):
  """The same data set as two TFRecord files, of 4 and 6 records."""
  folder = root / "tiny" / "1.2.0"
  (old,) = folder.glob("*array_record*")
  records = array_record_data_source.ArrayRecordDataSource([str(old)])
  for shard, part in enumerate((range(4), range(4, COUNT))):
    with (folder / f"tiny-train.tfrecord-0000{shard}-of-00002").open("wb") as f:
      for i in part:
        length = struct.pack("<Q", len(records[i]))
        f.write(length + masked(length) + records[i] + masked(records[i]))
  old.unlink()
  info = json.loads((folder / "dataset_info.json").read_text())
  info["fileFormat"] = "tfrecord"
  info["splits"][0]["shardLengths"] = ["4", "6"]
  (folder / "dataset_info.json").write_text(json.dumps(info))
  return root


def open_source(root, name="tiny", split="train", **options):
  options = {"image_size": 16, **options}
  return tfds.open_source(name, split=split, data_dir=str(root), **options)


def check(source, numbers):
  assert len(source) == len(numbers)
  for k, i in enumerate(numbers):
    np.testing.assert_array_equal(source[k]["image"], picture(i))
    assert source[k]["label"] == i % 2
    assert source[k]["label"].dtype == np.int32


def test_checksum_of_the_test_itself():
  assert crc32c(b"123456789") == 0xE3069283  # RFC 3720, B.4.


@pytest.mark.parametrize("files", ["prepared", "tfrecords"])
def test_examples_come_back(files, request):
  root = request.getfixturevalue(files)
  source = open_source(root)
  assert source.classes == ("disc", "square")
  check(source, range(COUNT))
  check(open_source(root, split="train[:80%]"), range(8))
  check(open_source(root, split="train[3:6]"), range(3, 6))
  check(open_source(root, split="train[5:]+train[:2]"), [5, 6, 7, 8, 9, 0, 1])
  check(pickle.loads(pickle.dumps(source)), range(COUNT))


def test_other_keys(prepared):
  source = open_source(
    prepared, image_key="depth", label_key="id", image_size=4
  )
  assert source.classes == ()
  assert source[7]["label"] == 7
  np.testing.assert_array_equal(source[7]["image"], np.full((4, 4, 3), 7))
  assert open_source(prepared, label_key=None)[1]["label"] == -1


def test_squares_of_one_size_are_taken_whole(prepared):
  got = open_source(prepared, image_size=8)[0]["image"]
  want = picture(0).resize((8, 8), Image.Resampling.BILINEAR)
  np.testing.assert_array_equal(got, want)
  assert np.any(
    open_source(prepared, image_size=8, resize_to=9)[0]["image"] != want
  )


def test_random_boxes_and_cache(prepared):
  source = open_source(prepared, crop="random")
  one, two, other = (
    sources.read(source, 0, np.random.default_rng(s))["image"]
    for s in (0, 0, 1)
  )
  np.testing.assert_array_equal(one, two)
  assert np.any(one != other)
  cached = open_source(prepared, cache=10**6)
  assert cached.sample is None
  assert cached[0]["image"] is cached[0]["image"]


def test_names_and_places(root, monkeypatch):
  base = root / "tiny"
  shutil.copytree(base / "1.2.0", base / "1.10.0")
  info = base / "1.10.0" / "dataset_info.json"
  info.write_text(info.read_text().replace('"1.2.0"', '"1.10.0"'))
  assert "1.10.0" in open_source(root).name  # Newest, not last by letters.
  for name in ("tiny:1.2.0", "tiny/1.2.0"):
    assert "1.2.0" in open_source(root, name).name
  monkeypatch.setenv("TFDS_DATA_DIR", str(root))
  assert len(sources.load("tfds:tiny", split="train", image_size=16)) == COUNT
  base.rename(root / "cfg")
  (root / "tiny").mkdir()
  (root / "cfg").rename(root / "tiny" / "cfg")
  assert len(open_source(root, "tiny/cfg")) == COUNT
  with pytest.raises(
    InputError, match="has configs: tfds:tiny/X with X one of cfg"
  ):
    open_source(root)


def test_tensorflow_is_not_imported(prepared):
  code = (
    "import sys; from jaxshape.data import sources\n"
    "source = sources.load('tfds:tiny', split='train', image_size=16,"
    f" data_dir={str(prepared)!r})\n"
    "source[3]; assert 'tensorflow' not in sys.modules"
  )
  subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
  ("key", "value"),
  [
    ("pythonClassName", "this.Zen"),
    ("python_class_name", "this.Zen"),
    ("type", "this.Zen"),
    # Below the right package, but not loaded: it would be imported.
    ("pythonClassName", "tensorflow_datasets.core.features.test_feature.X"),
    ("pythonClassName", "tensorflow_datasets.core.features..this.Zen"),
  ],
)
def test_foreign_code_is_not_imported(root, key, value):
  path = root / "tiny" / "1.2.0" / "features.json"
  features = json.loads(path.read_text())
  feature = features["featuresDict"]["features"]["name"]
  del feature["pythonClassName"]
  feature[key] = value
  path.write_text(json.dumps(features))
  with pytest.raises(InputError, match=f"names '{value}', which is no feature"):
    open_source(root)
  assert "this" not in sys.modules


@pytest.mark.parametrize("key", ["json", "content"])
def test_foreign_code_is_not_imported_from_json_within_json(root, key):
  path = root / "tiny" / "1.2.0" / "features.json"
  features = json.loads(path.read_text())
  inner = json.dumps({"feature": {"type": "this.Zen", "content": "{}"}})
  features["featuresDict"]["features"]["name"] = {
    "pythonClassName": "tensorflow_datasets.core.features.features_dict."
    "FeaturesDict",
    "jsonFeature": {key: inner},
  }
  path.write_text(json.dumps(features))
  with pytest.raises(InputError, match="names 'this.Zen', which is no feature"):
    open_source(root)
  assert "this" not in sys.modules


@pytest.mark.parametrize("text", ["", "[" * 10**5, "\xff\xfe", "[1]", "{}"])
def test_broken_metadata(root, text):
  (root / "tiny" / "1.2.0" / "features.json").write_text(text, "latin-1")
  with pytest.raises(InputError, match=r"1\.2\.0"):
    open_source(root)


def test_damaged_array_records_are_named(root):
  (path,) = (root / "tiny" / "1.2.0").glob("*array_record*")
  whole = path.read_bytes()
  path.write_bytes(whole[: len(whole) // 2])
  with pytest.raises(
    InputError, match="tiny-train.array_record-00000-of-00001"
  ):
    open_source(root)[0]
  path.unlink()
  with pytest.raises(InputError, match="00000-of-00001 is missing"):
    open_source(root)


def test_damaged_images_are_named(tfrecords):
  path = tfrecords / "tiny" / "1.2.0" / "tiny-train.tfrecord-00001-of-00002"
  data = path.read_bytes()
  path.write_bytes(data.replace(b"\x89PNG", b"\x00PNG"))
  source = open_source(tfrecords)
  source[3]
  with pytest.raises(
    decode.DamagedError, match="00001-of-00002: example 4 of tiny"
  ):
    source[4]


@pytest.mark.parametrize(
  ("change", "says"),
  [
    (lambda d: d[:-1], "is cut off or damaged at byte"),
    (lambda d: d[: len(d) * 2 // 5], "is cut off or damaged at byte"),
    (lambda d: d + b"\0" * 5, "is cut off or damaged at byte"),
    (lambda d: d + d, "has 12 records, dataset_info.json says 6"),
    (lambda _: b"", "has 0 records"),
    (
      lambda d: b"\xff" * 8 + d[8:],
      "damaged at byte 0 of .*, in record 0 of 6",
    ),
    (lambda d: d[:8] + b"\0\0\0\0" + d[12:], "length of record 0"),
  ],
)
def test_damaged_tfrecord_files_are_named(tfrecords, change, says):
  path = tfrecords / "tiny" / "1.2.0" / "tiny-train.tfrecord-00001-of-00002"
  path.write_bytes(change(path.read_bytes()))
  with pytest.raises(InputError, match="tfrecord-00001-of-00002 .*" + says):
    open_source(tfrecords)
  check(open_source(tfrecords, split="train[:4]"), range(4))


@pytest.mark.parametrize(
  ("options", "says"),
  [
    ({"split": "test"}, "no split 'test'; there are: train, and parts like"),
    ({"split": "train[:"}, r"no split 'train\[:'"),
    ({"split": "train[3:3]"}, "has no examples"),
    (
      {"image_key": "img"},
      "image_key='img' is no .* its features are: depth, id",
    ),
    ({"image_key": "label"}, "image_key='label' is no"),
    ({"label_key": "class"}, "label_key='class' is no whole number"),
    ({"label_key": "name"}, "label_key='name' is no whole number"),
    ({"name": ""}, "such as tfds:imagenet2012; in .* there are: tiny"),
    (
      {"name": "mnist"},
      "mnist is not prepared in .*there are: tiny.*prepare it",
    ),
    ({"name": "tiny:2.0.0"}, "tiny 2.0.0 is not prepared"),
  ],
)
def test_what_is_not_there(prepared, options, says):
  with pytest.raises(InputError, match=says) as caught:
    open_source(prepared, **options)
  assert "\n" not in str(caught.value)
