import pickle
import shutil

import numpy as np
from PIL import Image
import pytest
import xxhash

from jaxshape.data import sources, stream
from jaxshape.errors import InputError

DOMAINS = ("art_painting", "photo", "sketch")
CLASSES = ("cat", "dog")
COUNT = 20  # Of each class in each domain.


def write(path, value=0):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new("RGB", (6, 6), (value,) * 3).save(path)


def load(root, split, **options):
  return sources.load(f"domains:{root}", split=split, image_size=4, **options)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  root = tmp_path_factory.mktemp("domains")
  for d, domain in enumerate(DOMAINS):
    for c, name in enumerate(CLASSES):
      for i in range(COUNT):
        write(root / domain / name / f"{i}.png", 100 * d + 50 * c + i)
  (root / "readme.txt").touch()
  return root


@pytest.fixture
def root(made, tmp_path):
  return shutil.copytree(made, tmp_path / "domains")


def test_a_domain(made):
  source = load(made, "photo")
  assert len(source) == 2 * COUNT
  assert (source.classes, source.domains) == (CLASSES, DOMAINS)
  for i, example in enumerate(source):
    name, file = source.files[i].split("/")[1:]
    assert example["label"] == CLASSES.index(name)
    assert example["domain"] == 1
    assert example["image"][0, 0, 0] == 100 + 50 * example["label"] + int(
      file.split(".")[0]
    )
  assert source[0]["domain"].dtype == np.int32


def test_parts_follow_from_the_paths_alone(made, root):
  def share(file):
    return xxhash.xxh3_64_intdigest(file.encode()) / 2**64

  whole = load(made, "photo").files
  train, val = (
    load(made, f"photo_{part}", validation=0.3).files
    for part in ("train", "val")
  )
  assert val == [file for file in whole if share(file) < 0.3]
  assert train == [file for file in whole if share(file) >= 0.3]
  assert 0 < len(val) < len(train)
  shutil.rmtree(root / "sketch")
  for i in range(COUNT // 2):
    (root / "photo" / "dog" / f"{2 * i}.png").unlink()
  write(root / "photo" / "cat" / "new.png")
  again = load(root, "photo_val", validation=0.3).files
  there = {file for file in val if (root / file).exists()}
  assert there <= set(again) <= there | {"photo/cat/new.png"}


def test_several_domains_in_an_order_of_their_own(made):
  source = load(made, "sketch + photo_train+art_painting")
  whole = [load(made, d) for d in ("art_painting", "photo_train", "sketch")]
  assert list(source.files) == [file for s in whole for file in s.files]
  want = np.repeat([0, 1, 2], [len(s) for s in whole])
  assert [int(e["domain"]) for e in source] == want.tolist()
  other = load(made, "photo_train+art_painting+sketch")
  assert stream.fingerprint(source) == stream.fingerprint(other)
  parts = load(made, "photo_val+photo_train", validation=0.3)
  assert sorted(parts.files) == load(made, "photo").files
  assert stream.fingerprint(parts) != stream.fingerprint(whole[1])


def test_a_domain_called_as_a_part_is_itself(root):
  shutil.copytree(root / "photo", root / "photo_val")
  assert len(load(root, "photo_val")) == 2 * COUNT
  assert len(load(root, "photo_val_train")) < 2 * COUNT


def test_classes_fix_the_labels(root):
  shutil.rmtree(root / "photo" / "dog")
  source = load(root, "photo", classes=("emu", "dog", "cat"))
  assert source.classes == ("emu", "dog", "cat")
  assert {int(e["label"]) for e in source} == {2}


def test_boxes_copies_and_damage(root):
  source = load(root, "photo+sketch", crop="random", skip_damaged=True)
  (root / "sketch" / "cat" / "3.png").write_bytes(b"")
  copy = pickle.loads(pickle.dumps(source))
  one, two = (
    sources.read(s, 7, np.random.default_rng(0)) for s in (source, copy)
  )
  np.testing.assert_array_equal(one["image"], two["image"])
  assert (one["domain"], one["mask"], copy.domains) == (1, 1, DOMAINS)
  at = source.files.index("sketch/cat/3.png")
  assert (source[at]["domain"], source[at]["mask"]) == (2, 0)
  assert source.damaged == ("sketch/cat/3.png",)


@pytest.mark.parametrize(
  ("split", "options", "message"),
  [
    ("foto", {}, r"no domain 'foto' \(did you mean photo\?\); there are: art"),
    ("photo_test", {}, "no domain 'photo_test'"),
    ("photo+", {}, "no domain ''"),
    ("photo+photo_val", {"validation": 0.3}, "names pictures of .* twice"),
    ("photo_val", {"validation": 1e-9}, r"photo has too few pictures \(40\)"),
    ("photo", {"validation": 1.0}, r"validation must be in \(0, 1\), got 1.0"),
    ("photo", {"classes": ("cat", "dogs")}, r"dog \(did you mean dogs\?\)"),
    ("photo", {"classes": ("cat", "dog", "cat")}, "unique, got 'cat' twice"),
  ],
)
def test_options_that_do_not_fit(made, split, options, message):
  with pytest.raises(InputError, match=message):
    load(made, split, **options)


def test_domains_must_have_the_same_classes(root, tmp_path):
  (root / "sketch" / "dog").rename(root / "sketch" / "dogs")
  with pytest.raises(InputError, match=r"/sketch has other .*: dog, dogs"):
    load(root, "photo")
  (tmp_path / "flat" / "photo").mkdir(parents=True)
  with pytest.raises(InputError, match="flat/photo holds no class folders"):
    load(tmp_path / "flat", "photo")
  with pytest.raises(InputError, match="holds no folders; domains are"):
    load(tmp_path / "flat" / "photo", "photo")
