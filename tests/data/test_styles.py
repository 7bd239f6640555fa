import pickle

import numpy as np
from PIL import Image
import pytest

from jaxshape.data import sources, stream, styles, textured_shapes, textures
from jaxshape.errors import InputError


class _Numbers:
  """Examples that are their numbers, with a draw of their own."""

  classes = ("only",)

  @property
  def fingerprint(self):
    return {"drawn": "numbers"}

  def __len__(self):
    return 6

  def __getitem__(self, i):
    if not 0 <= i < 6:
      raise IndexError(i)
    return {"image": np.full((8, 8, 3), i, np.uint8), "label": np.int32(0)}

  def sample(self, i, rng):
    return {**self[i], "drawn": rng.random()}


def _pool(count=5, size=16, **given):
  return styles.open_styles("generated", image_size=size, count=count, **given)


def _folder(root, count=4, size=20):
  draw = np.random.default_rng(0)
  for i in range(count):
    place = root / ("." if i % 2 else "school")
    place.mkdir(parents=True, exist_ok=True)
    pixels = draw.integers(0, 256, (size, size, 3), np.uint8)
    Image.fromarray(pixels).save(place / f"{i}.png")
  return root


def test_generated_styles_are_a_function_of_seed_and_number():
  first, again, other = _pool(seed=1), _pool(seed=1), _pool(seed=2)
  images = np.stack([first[i]["image"] for i in range(len(first))])
  assert images.dtype == np.uint8
  assert images.shape == (5, 16, 16, 3)
  np.testing.assert_array_equal(images[3], again[3]["image"])
  assert (images[3] != other[3]["image"]).any()
  assert len({image.tobytes() for image in images}) == 5
  # More styles, or another place in another process, change none.
  np.testing.assert_array_equal(images[4], _pool(count=9, seed=1)[4]["image"])
  copy = pickle.loads(pickle.dumps(first))
  np.testing.assert_array_equal(images[2], copy[2]["image"])
  with pytest.raises(IndexError, match=r"0\.\.4, got 5"):
    first[5]


def test_generated_styles_have_texture_and_colour():
  pool = _pool(count=60, size=64)
  images = np.float32([pool[i]["image"] for i in range(60)])
  light = images.mean(-1)
  # Stronger than the textures of the generated pictures, which are 6 to 24.
  assert 20 < np.median(light.std((1, 2))) < 60
  means = images.mean((1, 2))
  assert (means.std(0) > 20).all()
  assert np.ptp(means, axis=-1).mean() > 15


def test_generated_styles_hold_out_the_novel_families():
  assert _pool().classes == textures.TRAINING
  assert not set(_pool().classes) & set(textures.NOVEL)
  pool = _pool(count=40, families=("rings", "stripes"))
  assert pool.classes == ("rings", "stripes")
  assert {int(pool[i]["label"]) for i in range(40)} == {0, 1}


def test_generated_styles_are_not_the_textures_of_generated_pictures(
  monkeypatch,
):
  seeds = []
  default_rng = np.random.default_rng

  def spy(seed):
    seeds.append(np.random.SeedSequence(seed).generate_state(4).tobytes())
    return default_rng(seed)

  monkeypatch.setattr(np.random, "default_rng", spy)
  for seed in (0, 1):
    pool = _pool(seed=seed, size=8)
    for i in range(5):
      pool[i]
    for split in textured_shapes.SPLITS:
      shapes = textured_shapes.open_source(
        split=split, image_size=32, seed=seed, num_examples=5
      )
      for i in range(5):
        shapes[i]
  assert len(seeds) == len(set(seeds)) == 2 * (5 + 6 * 5)


def test_every_image_of_a_folder_is_a_style(tmp_path):
  _folder(tmp_path)
  for spec in (f"folder:{tmp_path}", str(tmp_path)):
    found = styles.open_styles(spec, image_size=12)
    assert found.files == ["1.png", "3.png", "school/0.png", "school/2.png"]
    assert found[0]["image"].shape == (12, 12, 3)
  below = styles.open_styles(
    "folder:school", image_size=12, data_dir=str(tmp_path)
  )
  assert len(below) == 2
  # Boxes that are drawn are of the decoder.
  drawn = styles.open_styles(str(tmp_path), image_size=12, crop="random")
  a, b = (drawn.sample(0, np.random.default_rng(s))["image"] for s in (0, 1))
  assert (a != b).any()


def test_an_intact_style_stands_in_for_a_damaged_one(tmp_path):
  _folder(tmp_path)
  (tmp_path / "0.jpg").write_bytes(b"no image")
  found = styles.open_styles(str(tmp_path), image_size=12)
  np.testing.assert_array_equal(found[0]["image"], found[1]["image"])
  assert found.damaged == ("0.jpg",)
  assert styles.Styled(_Numbers(), found).damaged == ("0.jpg",)
  with pytest.raises(InputError, match=r"0\.jpg is no image"):
    styles.open_styles(str(tmp_path), image_size=12, skip_damaged=False)
  for path in tmp_path.rglob("*.png"):
    path.write_bytes(b"")
  with pytest.raises(InputError, match="all 5 images are damaged"):
    styles.open_styles(str(tmp_path), image_size=12)


def test_other_data_serve_as_styles():
  found = styles.open_styles(
    "textured_shapes", image_size=32, split="test", num_examples=3
  )
  want = textured_shapes.open_source(split="test", image_size=32)
  np.testing.assert_array_equal(found[2]["image"], want[2]["image"])


def test_styles_are_drawn_for_each_example_and_differ():
  pool = _pool()
  known = [pool[i]["image"].tobytes() for i in range(5)]
  styled = styles.Styled(_Numbers(), pool, count=3)
  chosen = []
  for seed in range(200):
    example = styled.sample(2, np.random.default_rng(seed))
    assert example["style"].shape == (3, 16, 16, 3)
    assert (example["image"] == 2).all()
    chosen.append([known.index(image.tobytes()) for image in example["style"]])
  assert all(len(set(row)) == 3 for row in chosen)
  # Each of five takes each place 40 times of 200: four standard deviations.
  counts = [
    np.bincount(place, minlength=5) for place in zip(*chosen, strict=True)
  ]
  assert (np.abs(np.array(counts) - 40) < 4 * np.sqrt(200 * 0.2 * 0.8)).all()


def test_an_example_draws_what_it_draws_without_styles():
  content = _Numbers()
  styled = styles.Styled(content, _pool())
  a = styled.sample(1, np.random.default_rng(7))
  assert a["drawn"] == content.sample(1, np.random.default_rng(7))["drawn"]
  b = styled.sample(1, np.random.default_rng(7))
  np.testing.assert_array_equal(a["style"], b["style"])


def test_without_a_generator_the_number_decides():
  styled = styles.Styled(_Numbers(), _pool(count=50))
  assert len(styled) == 6
  assert styled.classes == ("only",)
  assert "drawn" not in styled[0]
  np.testing.assert_array_equal(styled[3]["style"], styled[3]["style"])
  assert (styled[3]["style"] != styled[4]["style"]).any()
  with pytest.raises(IndexError):
    styled[6]


def test_batches_of_an_epoch_have_styles_of_their_own():
  styled = styles.Styled(_Numbers(), _pool(count=50))
  options = {"batch_size": 3, "seed": 0, "threads": 1}
  batches = stream.train(styled, **options)
  seen = [next(batches) for _ in range(4)]  # Two epochs.
  batches.close()
  assert seen[0]["style"].shape == (3, 2, 16, 16, 3)
  rows = {
    (int(image[0, 0, 0]), style.tobytes())
    for batch in seen
    for image, style in zip(batch["image"], batch["style"], strict=True)
  }
  assert len(rows) == 12  # Six examples, each in two pairs of styles.
  later = stream.train(styled, **options, start_step=3)
  np.testing.assert_array_equal(next(later)["style"], seen[3]["style"])
  later.close()


def test_a_run_notices_other_styles():
  mark = lambda pool: stream.fingerprint(styles.Styled(_Numbers(), pool))
  stream.check_same(mark(_pool()), mark(_pool()))
  assert mark(_pool())["drawn"] == "numbers"
  for other in (_pool(seed=3), _pool(count=6), _pool(families=("wood",))):
    with pytest.raises(InputError, match="styles"):
      stream.check_same(mark(other), mark(_pool()))


@pytest.mark.parametrize(
  ("spec", "given", "message"),
  [
    ("", {}, "styles must be generated, a folder .*got ''"),
    ("paintings", {}, "'paintings' is of no known kind"),
    ("generated:wood", {}, "no variants, got 'generated:wood'"),
    ("folder:", {}, "need its path"),
    ("./no/such/folder", {}, "no folder no/such/folder"),
    ("generated", {"count": 0}, "count .*1 or more, got 0"),
    ("generated", {"seed": -1}, "seed .*0 or more, got -1"),
    ("generated", {"families": ("woods",)}, r"no 'woods' \(did you mean wood"),
    ("generated", {"families": ()}, r"families .*must be some of .*got \(\)"),
    ("generated", {"families": "wood"}, "families .*must be some of"),
    ("generated", {"sizes": 3}, "no option 'sizes'"),
    ("generated", {"cache": -1}, "cache must be .*-1"),
    ("lidar_scenes", {}, r"must hold images \[16, 16, 3\], got no images"),
  ],
)
def test_what_is_no_source_of_styles_is_refused(spec, given, message):
  with pytest.raises(InputError, match=message):
    styles.open_styles(spec, image_size=16, **given)


def test_folders_without_styles_are_refused_by_name(tmp_path):
  with pytest.raises(InputError, match=f"{tmp_path} holds no images"):
    styles.open_styles(str(tmp_path), image_size=16)
  file = tmp_path / "a.txt"
  file.write_text("no picture")
  with pytest.raises(InputError, match=f"{tmp_path} holds no images"):
    styles.open_styles(str(tmp_path), image_size=16)
  with pytest.raises(InputError, match=f"{file} is a file"):
    styles.open_styles(str(file), image_size=16)


def test_sizes_and_counts_that_do_not_fit_are_refused():
  for size in (4, 2000):
    with pytest.raises(InputError, match=rf"8\.\.1024, got {size}"):
      _pool(size=size)
  with pytest.raises(InputError, match="3 or more.*got 2"):
    styles.Styled(_Numbers(), _pool(count=2), count=3)
  with pytest.raises(ValueError, match="count must be at least 1, got 0"):
    styles.Styled(_Numbers(), _pool(), count=0)


def test_styles_do_not_count_as_a_kind_of_data():
  assert "styles" not in sources.kinds()


def test_options_that_are_none_are_as_good_as_not_given():
  some = styles.open_styles("generated", image_size=32, count=None, seed=None)
  assert len(some) == len(styles.open_styles("generated", image_size=32)) > 1
