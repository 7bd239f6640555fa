import pickle

import numpy as np
from PIL import Image
import pytest

from jaxshape.data import cue_conflict, sources, stream
from jaxshape.errors import InputError

SHAPES = ("bird", "cat", "dog")
# The layout of the public repository.
PUBLIC = "stimuli/style-transfer-preprocessed-512"


def write(path, value=0):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new("RGB", (8, 8), (value,) * 3).save(path)


def load(root, split="cue_conflict", **options):
  return sources.load(
    f"cue_conflict:{root}", split=split, image_size=8, **options
  )


@pytest.fixture
def root(tmp_path):
  for s, shape in enumerate(SHAPES):
    for t, texture in enumerate(SHAPES):
      name = f"{shape}{s + 9}-{texture}{t + 1}.png"
      write(tmp_path / "cue_conflict" / shape / name, 10 * s + t)
    for split in ("edges", "silhouettes"):
      write(tmp_path / split / shape / f"{shape}{s + 1}.png", 100 + s)
  return tmp_path


def test_shapes_and_textures_are_read_from_names(root):
  source = load(root)
  assert (len(source), source.classes) == (9, SHAPES)
  for i, example in enumerate(source):
    shape, texture = divmod(i, 3)
    assert (example["label"], example["texture"]) == (shape, texture)
    assert example["image"][0, 0, 0] == 10 * shape + texture
    assert example["texture"].dtype == np.int32


def test_the_public_layout_is_a_root_itself(root, caplog):
  public = root.parent / PUBLIC
  public.parent.mkdir()
  (root / "cue_conflict").rename(public)
  for split in ("test", "cue_conflict"):
    assert [int(e["texture"]) for e in load(public, split)] == [0, 1, 2] * 3
  assert not caplog.records


def test_drawings_have_no_texture(root):
  for split in ("edges", "silhouettes"):
    source = load(root, split)
    assert sorted(source[0]) == ["image", "label"]
    assert [int(e["label"]) for e in source] == [0, 1, 2]


def test_classes_fix_both_labels(root, caplog):
  source = load(root, classes=("truck", "dog", "cat", "bird"))
  assert [int(e["label"]) for e in source] == [3, 3, 3, 2, 2, 2, 1, 1, 1]
  assert [int(e["texture"]) for e in source] == [3, 2, 1] * 3
  assert not caplog.records
  write(root / "cue_conflict" / "cat" / "cat1-spoon1.png")
  source = load(root)
  assert int(source[source.files.index("cat/cat1-spoon1.png")]["texture"]) == -1
  assert "1 cue-conflict images have a texture that is no class (spoon)" in (
    caplog.text
  )


def test_stimuli_are_shown_whole(tmp_path):
  y, x = np.mgrid[:8, :8].astype(np.uint8)
  pixels = np.stack([30 * x, 30 * y, x * y], axis=-1)
  path = tmp_path / "cat" / "cat1-cat2.png"
  path.parent.mkdir()
  Image.fromarray(pixels).save(path)
  np.testing.assert_array_equal(load(tmp_path)[0]["image"], pixels)
  cut = load(tmp_path, resize_to=10)[0]["image"]
  assert (cut != pixels).any()


def test_fingerprint_boxes_copies_and_damage(root):
  source = load(root, crop="random", skip_damaged=True)
  before = stream.fingerprint(source)
  copy = pickle.loads(pickle.dumps(source))
  one, two = (
    sources.read(s, 4, np.random.default_rng(0)) for s in (source, copy)
  )
  assert one["texture"] == two["texture"] == 1
  np.testing.assert_array_equal(one["image"], two["image"])
  (root / "cue_conflict" / source.files[0]).write_bytes(b"")
  assert [float(source[i]["mask"]) for i in range(3)] == [0, 1, 1]
  assert source.damaged == ("bird/bird9-bird1.png",)
  (root / "cue_conflict" / source.files[0]).unlink()
  assert stream.fingerprint(load(root)) != before


def test_a_view_of_other_images():
  class Fixed:
    classes = SHAPES

    def __len__(self):
      return 3

    def __getitem__(self, i):
      return {"label": np.int32(i)}

  files = ["cat/cat1-dog12.png", "dog/dog2-spoon1.jpg", "bird10-bird3.png"]
  view = cue_conflict.Stimuli(Fixed(), files, SHAPES)
  assert [int(view[i]["texture"]) for i in range(3)] == [2, -1, 0]
  assert [int(view[i]["label"]) for i in range(3)] == [0, 1, 2]
  assert (len(view), view.classes) == (3, SHAPES)
  with pytest.raises(InputError, match=r"cat1-bicycle2.png, got cat/1.png"):
    cue_conflict.Stimuli(Fixed(), ["cat/1.png"], SHAPES)


@pytest.mark.parametrize(
  ("file", "split", "message"),
  [
    ("cue_conflict/cat/picture.png", "cue_conflict", r"got cat/picture.png"),
    ("cue_conflict/cat/cat1-2.png", "cue_conflict", r"got cat/cat1-2.png"),
    ("cue_conflict/cat/cat1_dog2.png", "cue_conflict", r"got cat/cat1_dog2"),
    ("cue_conflict/cat/dog1-cat2.png", "cue_conflict", r"got cat/dog1-cat2"),
    ("edges/cat/dog1.png", "edges", r"as cat/cat1.png, got cat/dog1.png;"),
    ("edges/cat/cat 1.b.png", "edges", r"got cat/cat 1.b.png"),
    ("edges/cat/cat1-dog1.png", "edges", r"shape and texture.* got bird/bird1"),
    ("new/cat/dog_1.png", "new", r"as cat/cat1.png, got cat/dog_1.png;"),
    ("new/cat/cat1-spoon1.png", "new", r"no texture of the 1 .* classes cat"),
    ("new/cat/cat1.txt", "new", r"new/cat has no images"),
    ("new/cat1-dog1.png", "new", r"no split 'new'; there are: cue_c"),
    ("new/cat/cat1.png", "edgs", r"no split 'edgs' \(did you mean edges\?\)"),
  ],
)
def test_names_that_do_not_parse(root, file, split, message):
  (root / file).parent.mkdir(parents=True, exist_ok=True)
  (root / file).touch()
  with pytest.raises(InputError, match=message):
    load(root, split)


def test_what_is_not_there(root):
  match = r"not in classes: dog \(did you mean dogs\?\)"
  with pytest.raises(InputError, match=match):
    load(root, classes=("bird", "cat", "dogs"))
  with pytest.raises(InputError, match="There is no folder"):
    load(root / "nowhere")
  with pytest.raises(InputError, match="cue_conflict needs a path"):
    load("")
  (root / "empty").mkdir()
  with pytest.raises(InputError, match="empty holds no class folders"):
    load(root / "empty")
