import itertools
import math
import pickle

import numpy as np
import pytest

from jaxshape.data import landmarks, revisited, sfm120k, sources
from jaxshape.errors import InputError

D = 64
SMALL = {"dimensions": D, "landmarks": 6, "distractors": 130}


def world(split="test", seed=3, dimensions=D):
  return landmarks.world(seed=seed, split=split, dimensions=dimensions)


def views(angle, detail=0.0, night=0.0, seen=1.0):
  columns = np.broadcast_arrays(np.atleast_1d(angle), detail, night, seen)
  return landmarks.Views(*np.stack(columns).astype(np.float32))


def average_precision(order, positives, junk):
  """The trapezoids of the revisited protocol, one hit after the other."""
  left = [row for row in order if row not in junk]
  total, hits = 0.0, 0
  for rank, row in enumerate(left):
    if row in positives:
      before = hits / rank if rank else 1.0
      hits += 1
      total += (before + hits / (rank + 1)) / 2 / len(positives)
  return total


def test_views_lie_on_the_sheet_that_the_formula_says(monkeypatch):
  # Without noise, in the landmark's own coordinates, view by view.
  monkeypatch.setattr(landmarks, "_NOISE", 0.0)
  shared = world(dimensions=128)
  _, _, frame = landmarks.landmark(shared, 2)
  taken = views([0.0, 0.6, -1.5, 3.0], [0.0, 0.4, -0.2, 0.1])
  content = landmarks._on_sheet(frame, taken)
  x = landmarks._render(shared, np.random.default_rng(0), content, taken)
  for row, angle, detail in zip(x, taken.angle, taken.detail, strict=True):
    want = [
      math.sqrt(0.75) * math.cos(detail) * math.cos(angle),
      math.sqrt(0.75) * math.cos(detail) * math.sin(angle),
      math.sqrt(0.75) * math.sin(detail),
      math.sqrt(0.10),
    ]
    got = frame @ row
    np.testing.assert_allclose(got * want[3] / got[3], want, atol=2e-5)
    rest = row - got @ frame
    # Nothing else is there but light, of a share of about 0.15.
    assert abs(shared.identity @ rest).max() < 1e-6
    assert 0.1 < (rest**2).sum() < 0.35


def test_what_hides_a_landmark_weakens_it_as_the_formula_says():
  shared = world(dimensions=256)
  _, _, frame = landmarks.landmark(shared, 0)
  for seen in (1.0, 0.5, 0.2):
    taken = views(np.zeros(200), seen=seen)
    content = landmarks._on_sheet(frame, taken)
    x = landmarks._render(shared, np.random.default_rng(0), content, taken)
    # Of s^2 + (1 - s^2 + 0.4^2) = 1.16, sqrt(0.75) s is the front's.
    want = math.sqrt(0.75 / 1.16) * seen
    np.testing.assert_allclose((x @ frame[0]).mean(), want, atol=0.015)


def test_labels_by_hand():
  shown = views(
    [0.3, 0.3, 0.3, 0.3, 1.1, 1.95, 0.3],
    [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.9],
    [0.0, 0.0, 0.0, 0.6, 0.0, 0.0, 0.0],
    [0.9, 0.6, 0.3, 0.9, 0.9, 0.9, 0.9],
  )
  kinds = np.stack(landmarks.labels(shown, views(0.0)))
  want = ["easy", "hard", "junk", "hard", "hard", "junk", "hard"]
  names = np.array(["easy", "hard", "junk"])
  assert (kinds.sum(0) == 1).all()
  assert names[kinds.argmax(0)].tolist() == want


def test_a_landmark_depends_on_its_number_alone():
  few = landmarks.open_source(split="valid", **SMALL)
  more = {**SMALL, "landmarks": 9, "distractors": 260}
  many = landmarks.open_source(split="valid", **more)
  own = [np.flatnonzero(s.clusters >= 0) for s in (few, many)]
  n = len(own[0])
  assert n < len(own[1])
  np.testing.assert_array_equal(few.database[:n], many.database[:n])
  np.testing.assert_array_equal(
    few.database[n:], many.database[len(own[1]) :][:130]
  )
  np.testing.assert_array_equal(few.clusters[:n], many.clusters[:n])
  other = landmarks.open_source(split="valid", seed=1, **SMALL)
  assert other.fingerprint != few.fingerprint
  again = landmarks.open_source(split="valid", **SMALL)
  assert again.fingerprint == few.fingerprint


def test_splits_share_subspaces_and_no_landmark():
  worlds = [world(split) for split in landmarks.SPLITS]
  for shared in worlds[1:]:
    for name in ("identity", "style", "light"):
      want = getattr(worlds[0], name)
      np.testing.assert_array_equal(getattr(shared, name), want)
  basis = np.concatenate([worlds[0].identity, worlds[0].style])
  np.testing.assert_allclose(basis @ basis.T, np.eye(len(basis)), atol=1e-5)
  np.testing.assert_allclose(worlds[0].light @ basis.T, 0, atol=1e-5)
  fronts = [
    np.stack([landmarks.landmark(w, n)[2][0] for n in range(10)])
    for w in worlds
  ]
  for a, b in ((0, 1), (0, 2), (1, 2)):
    assert abs(fronts[a] @ fronts[b].T).max() < 0.8


def test_rows_are_unit_vectors_of_float32():
  shared = world()
  parts = [
    landmarks.landmark(shared, 1)[0],
    landmarks.distractors(shared, 0),
    landmarks.query(shared, 1, landmarks.landmark(shared, 1)[2], index=0)[0],
  ]
  for part in parts:
    assert part.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(part, axis=-1), 1, rtol=1e-5)
  assert parts[1].shape == (100, D)
  assert not np.array_equal(parts[1], landmarks.distractors(shared, 1))


def test_sizes_have_a_long_tail():
  shared = world("train")
  sizes = np.array([landmarks.size(shared, n) for n in range(400)])
  assert sizes.min() >= 2
  assert sizes.max() == 200
  assert sizes.mean() > 1.3 * np.median(sizes)
  assert (sizes < 8).mean() > 0.05
  assert len(landmarks.landmark(shared, 7)[0]) == sizes[7]


def test_only_the_test_split_has_views_that_show_next_to_nothing():
  for split, some in (("train", False), ("valid", False), ("test", True)):
    shared = world(split)
    seen = [landmarks.landmark(shared, n)[1].seen for n in range(12)]
    assert (np.concatenate(seen) < 0.399).any() == some


def test_views_are_alike_as_far_as_they_are_near():
  shared = world(dimensions=128)
  _, _, frame = landmarks.landmark(shared, 0)
  draw = np.random.default_rng(0)
  means = []
  front = None
  for angle in (0.0, 0.5, 1.0, math.pi / 2, 2.2):
    taken = views(np.full(100, angle))
    content = landmarks._on_sheet(frame, taken)
    x = landmarks._render(shared, draw, content, taken)
    front = x if front is None else front
    means.append((front @ x.T)[~np.eye(100, dtype=bool)].mean())
  assert all(a > b + 0.04 for a, b in itertools.pairwise(means))
  assert means[0] > 0.65
  # A quarter turn: style is left of what they share, and some light.
  assert abs(means[3] - 0.1 / 1.16) < 0.1


def test_groups_are_confusable_and_panoramas_near_to_all_of_them():
  shared = world(dimensions=128)
  frames = [landmarks.landmark(shared, n)[2] for n in range(60)]
  fronts = np.stack([f[0] for f in frames])
  same = fronts @ fronts.T
  within = same[np.arange(0, 60, 2), np.arange(1, 60, 2)]
  assert within.mean() > 0.12
  assert abs(same[0, 2:].mean()) < 0.05
  panoramas = np.stack(
    [landmarks.distractors(shared, g)[-4:] for g in range(9)]
  )
  near = [(panoramas[g] @ fronts[2 * g]).mean() for g in range(9)]
  far = [(panoramas[g] @ fronts[2 * g + 10]).mean() for g in range(9)]
  assert np.mean(near) > np.mean(far) + 0.1


def test_truth_is_of_the_querys_landmark():
  source = landmarks.open_source(split="test", queries=9, **SMALL)
  assert len(source) == 9
  np.testing.assert_array_equal(source.query_clusters, np.arange(9) % 6)
  for i in range(9):
    truth = source.truth(i)
    rows = np.concatenate(truth)
    want = np.flatnonzero(source.clusters == source.query_clusters[i])
    np.testing.assert_array_equal(np.sort(rows), want)
    # Held out, and not the landmark's other query either.
    assert (source.database @ source.query(i)).max() < 0.99
  assert (source.clusters[-130:] == -1).all()
  assert not np.array_equal(source.query(0), source.query(6))


def test_queries_of_the_other_splits_are_spread_over_landmarks():
  source = landmarks.open_source(split="valid", queries=8, **SMALL)
  rows = source.query_rows
  assert len(set(rows.tolist())) == 8
  np.testing.assert_array_equal(source.query_clusters[:6], np.arange(6))
  everything = landmarks.open_source(split="train", **SMALL)
  np.testing.assert_array_equal(
    np.sort(everything.query_rows), np.flatnonzero(everything.clusters >= 0)
  )


def test_examples_and_specs():
  options = {**SMALL, "neighbours": 5}
  source = sources.load("landmarks", split="train", **options)
  assert "landmarks" in sources.kinds()
  example = source[3]
  assert example["query"].shape == (D,)
  assert example["neighbours"].shape == (5, D)
  assert example["relevant"].dtype == bool
  drawn = source.sample(3, np.random.default_rng(0))
  row = np.flatnonzero((source.database == drawn["positive"]).all(1))
  assert row != source.query_rows[3]
  assert source.clusters[row] == example["cluster"]


def test_expansion_helps_as_far_as_it_keeps_to_the_topic():
  # As with the public descriptors: a few neighbours help, many drift, and who
  # knew the relevant ones would win far more. Only seeds from 1000 up.
  gains = {"none": [], "few": [], "many": [], "known": []}
  for seed in (1003, 1004):
    source = landmarks.open_source(split="test", seed=seed, queries=60)
    x = source.database
    q = np.stack([source.query(i) for i in range(60)])
    near = np.argsort(-q @ x.T, axis=1)[:, :64]
    known = [
      row[np.isin(row, source.truth(i).relevant)] for i, row in enumerate(near)
    ]
    chosen = {
      "none": [row[:0] for row in near],
      "few": [row[:2] for row in near],
      "many": list(near),
      "known": known,
    }
    for name, rows in chosen.items():
      expanded = [a + x[r].sum(0) for a, r in zip(q, rows, strict=True)]
      order = np.argsort(-np.stack(expanded) @ x.T, axis=1)
      for i in range(60):
        truth = source.truth(i)
        positives = set(truth.relevant.tolist())
        if positives:
          junk = set(truth.junk.tolist())
          ap = average_precision(order[i].tolist(), positives, junk)
          gains[name].append(ap)
  mean = {name: np.mean(values) for name, values in gains.items()}
  assert 0.45 < mean["none"] < 0.7, mean
  assert mean["none"] + 0.03 < mean["few"] < mean["none"] + 0.12, mean
  assert mean["many"] < mean["none"] - 0.03, mean
  assert mean["known"] > mean["few"] + 0.08, mean


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  root = tmp_path_factory.mktemp("landmarks")
  options = ["--seed=5", "--dimensions=32", "--scale=0.04", "--extra=70"]
  landmarks.main([str(root), *options])
  return root


def test_written_test_set_is_read_as_the_public_one(folder):
  made = landmarks.open_source(
    split="test", seed=5, dimensions=32, landmarks=3, distractors=160, queries=4
  )
  read = revisited.open_source(str(folder), split="test")
  np.testing.assert_array_equal(read.database[:], made.database)
  assert len(read) == len(made) == 4
  for i in range(4):
    np.testing.assert_array_equal(read.query(i), made.query(i))
    for got, want in zip(read.truth(i), made.truth(i), strict=True):
      np.testing.assert_array_equal(got, want)
  content = pickle.loads((folder / "gnd_test.pkl").read_bytes())
  assert sorted(content) == ["gnd", "imlist", "qimlist"]
  assert sorted(content["gnd"][0]) == ["bbx", "easy", "hard", "junk"]
  assert all(type(row) is int for row in content["gnd"][0]["easy"])


def test_written_training_sets_are_read_as_the_public_ones(folder):
  for split, name, count, others in (
    ("train", "train", 120, 1800), ("valid", "val", 4, 80)
  ):  # fmt: skip
    made = landmarks.open_source(
      split=split, seed=5, dimensions=32, landmarks=count, distractors=others
    )
    read = sfm120k.open_source(str(folder), split=split)
    np.testing.assert_array_equal(read.database[:], made.database)
    table = pickle.loads((folder / "retrieval-SfM-120k.pkl").read_bytes())[name]
    assert len(set(table["cids"])) == len(table["cids"]) == len(made.clusters)
    clusters = np.array(table["cluster"])
    known = made.clusters >= 0
    np.testing.assert_array_equal(clusters[known], made.clusters[known])
    # A distractor shares its cluster with nothing.
    assert len(set(clusters[~known].tolist())) == others
    assert clusters[~known].min() == count
    q, p = np.array(table["qidxs"]), np.array(table["pidxs"])
    assert (q != p).all()
    np.testing.assert_array_equal(clusters[q], clusters[p])
    assert len(q) > 0.8 * known.sum()
    drawn = read.sample(0, np.random.default_rng(0))
    assert drawn["positive"].shape == (32,)


def test_extra_distractors_go_on_after_those_of_the_test_set(folder):
  made = landmarks.open_source(
    split="test", seed=5, dimensions=32, landmarks=3, distractors=230
  )
  extra = np.load(folder / "distractors.npy", mmap_mode="r")
  np.testing.assert_array_equal(extra, made.database[-70:])
  read = revisited.open_source(
    str(folder), split="test", distractors="distractors.npy"
  )
  np.testing.assert_array_equal(read.database[:], made.database)
  assert not list(folder.glob("*.part"))


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"name": "small"}, "no variants"),
    ({"split": "val"}, "train, valid, test"),
    ({"seed": -1}, "seed must be"),
    ({"dimensions": 8}, "dimensions must be in 16"),
    ({"landmarks": 0}, "landmarks must be in 1"),
    ({"landmarks": 2.5}, "landmarks must be in 1"),
    ({"distractors": -1}, "distractors must be in 0"),
    ({"queries": 0}, "queries must be in 1"),
    ({"neighbours": 0}, "neighbours must be"),
  ],
)
def test_options_are_refused_by_name(options, message):
  options = {"split": "test", "landmarks": 2, "distractors": 10, **options}
  with pytest.raises(InputError, match=message):
    landmarks.open_source(options.pop("name", ""), **options)


def test_writing_refuses_by_name(tmp_path):
  with pytest.raises(InputError, match="scale must be"):
    landmarks.write(tmp_path, scale=0.0)
  with pytest.raises(InputError, match="extra must be"):
    landmarks.write(tmp_path, extra=-1)
  (tmp_path / "file").write_text("")
  with pytest.raises(InputError, match="file cannot be written"):
    landmarks.write(tmp_path / "file", scale=0.01)
