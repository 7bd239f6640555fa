import numpy as np
import pytest

from benchmarks import real_instances as benchmark
from jaxshape import system as system_lib
from jaxshape.data import descriptors as descriptor_data
from jaxshape.data.retrieval_examples import Queries

NAMES = [
  f"{kind}/{i}/{j}.png"
  for kind, instances, images in (("faces", 6, 7), ("objects", 4, 9))
  for i in range(instances)
  for j in range(images)
]


def _instances(rows):
  return {NAMES[i].rpartition("/")[0] for i in rows}


def _source():
  """Two things; one query lies between them."""
  at = lambda *degrees: np.array(
    [[np.cos(d), np.sin(d)] for d in np.deg2rad(degrees)], np.float32
  )
  return Queries(
    database=at(-31, 2, 43, 59, 93, 122),
    queries=at(47, 7),
    clusters=np.array([0, 0, 0, 1, 1, 1], np.int32),
    query_clusters=np.array([0, 0], np.int32),
    k=4,
  )


def _by_hand(source, rows):
  """AP with trapezoids, one positive after another."""
  aps = []
  for row, cluster in zip(rows, source.query_clusters, strict=True):
    order = np.argsort(-(source.database @ row), kind="stable")
    hits = (source.clusters[order] == cluster).tolist()
    ap, seen = 0.0, 0
    for rank, hit in enumerate(hits):
      if hit:
        before = seen / rank if rank else 1.0
        seen += 1
        ap += (before + seen / (rank + 1)) / 2
    aps.append(ap / seen)
  return aps


def test_halves_keep_instances_apart():
  got = benchmark.halves(NAMES, 1)
  np.testing.assert_array_equal(
    np.sort(np.concatenate(got)), np.arange(len(NAMES))
  )
  train, test = _instances(got.train), _instances(got.database)
  assert not train & test
  assert _instances(got.queries) == test
  for kind, count in (("faces", 3), ("objects", 2)):
    assert sum(name.startswith(kind) for name in train) == count
    assert sum(name.startswith(kind) for name in test) == count
  assert len(got.queries) == 5 * len(test)
  again, other = benchmark.halves(NAMES, 1), benchmark.halves(NAMES, 2)
  np.testing.assert_array_equal(again.queries, got.queries)
  assert _instances(other.train) != train


def test_what_is_searched_teaches_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr(benchmark, "DIMENSIONS", 4)
  rows = np.random.default_rng(0).normal(size=(len(NAMES), 8))
  rows = (rows / np.linalg.norm(rows, axis=1)[:, None]).astype(np.float32)
  parts = benchmark.halves(NAMES, 1)
  white = benchmark.whitened(rows, parts)
  benchmark.write(white, NAMES, parts, tmp_path / "a")
  rows[parts.database] = rows[parts.database][::-1]
  white = benchmark.whitened(rows, parts)
  benchmark.write(white, NAMES, parts, tmp_path / "b")
  same = [
    np.array_equal(*(np.load(tmp_path / of / f"{stem}.npy") for of in "ab"))
    for stem in ("train", "test_queries", "test")
  ]
  assert same == [True, True, False]
  source = descriptor_data.open_source(
    str(tmp_path / "a"), split="test", neighbours=3
  )
  assert source.database.shape == (len(parts.database), 4)
  wanted = [NAMES[i].rpartition("/")[0] for i in parts.database]
  first = NAMES[parts.queries[0]].rpartition("/")[0]
  want = [i for i, name in enumerate(wanted) if name == first]
  np.testing.assert_array_equal(source.truth(0).easy, want)


def test_both_halves_are_searched_for_their_own_instances():
  parts = benchmark.halves(NAMES, 1)
  shown = [name.rpartition("/")[0] for name in NAMES]
  rows = np.eye(10, dtype=np.float32)[np.unique(shown, return_inverse=True)[1]]
  assert benchmark.plain(rows, NAMES, parts) == (1, 1)
  rows[parts.database] = rows[parts.database[::-1]]
  own, other = benchmark.plain(rows, NAMES, parts)
  assert own == 1
  assert other < 0.6


def test_classical_expansions_are_those_of_the_equations(monkeypatch):
  monkeypatch.setattr(benchmark, "SIZES", (1, 3))
  monkeypatch.setattr(benchmark, "ALPHAS", (2.0,))
  source = _source()
  got = benchmark.classical(source)
  assert list(got) == ["no expansion", "AQE", "AQEwD", "alpha-QE", "DQE"]
  q = np.stack([source.query(i) for i in range(2)])
  order = np.argsort(-(q @ source.database.T), axis=1, kind="stable")
  for n in (1, 3):
    near = source.database[order[:, :n]]
    similarities = np.einsum("qd,qnd->qn", q, near)
    decay = (n - np.arange(1, n + 1)) / n
    want = {
      "AQE": q + near.sum(axis=1),
      "AQEwD": q + np.einsum("n,qnd->qd", decay, near),
      "alpha-QE": q + np.einsum("qn,qnd->qd", similarities**2, near),
    }
    for name, rows in want.items():
      key = (n, 2.0) if name == "alpha-QE" else (n,)
      np.testing.assert_allclose(got[name][key], _by_hand(source, rows))
  plain = got["no expansion"][(0,)]
  np.testing.assert_allclose(plain, _by_hand(source, q))
  assert not np.allclose(plain, got["AQE"][(3,)])
  assert set(got["DQE"]) == {(1,), (3,)}


def test_networks_see_as_many_neighbours_as_they_are_made_for(monkeypatch):
  monkeypatch.setattr(benchmark, "ALL", 2)
  source = _source()

  def predict(state, batch):
    assert batch["neighbours"].shape == (2, 2, 2)
    mask = batch["valid"][..., None]
    return {
      "expanded": batch["query"]
      + state * (mask * batch["neighbours"]).sum(axis=1)
    }

  got = benchmark.learned(source, predict, 1.0, sizes=(1, 2, 4))
  near = source.database[source.found().indices]
  assert set(got) == {(1,), (2,)}
  for n in (1, 2):
    rows = source.queries + near[:, :n].sum(axis=1)
    np.testing.assert_allclose(got[n,], _by_hand(source, rows))
  still = benchmark.learned(source, predict, 0.0, sizes=(2,))
  np.testing.assert_allclose(still[2,], _by_hand(source, source.queries))


def test_the_first_of_equals_is_the_best():
  aps = lambda *values: np.array(values)
  tried = {(1,): aps(0.2, 0.4), (2,): aps(0.5, 0.3), (4,): aps(0.3, 0.5)}
  assert benchmark.best(tried) == (2,)


def test_the_settings_are_those_of_a_system(tmp_path):
  config = benchmark.settings(tmp_path, 3)
  assert system_lib.load(config).refresh is not None
  assert config.seed == 3
  assert config.data.source == f"descriptors:{tmp_path}"


def test_the_page_tells_means_over_divisions():
  kinds = [np.array(["faces", "objects"])] * 2
  first = {
    "no expansion": {(0,): np.array([0.2, 0.6])},
    "alpha-QE": {
      (2, 3.0): np.array([0.4, 0.8]),
      (32, 3.0): np.array([0.1, 0.3]),
      (32, 1.0): np.array([0.1, 0.1]),
    },
  }
  second = {
    "no expansion": {(0,): np.array([0.4, 0.8])},
    "alpha-QE": {
      (2, 3.0): np.array([0.2, 0.2]),
      (32, 3.0): np.array([0.1, 0.1]),
      (32, 1.0): np.array([0.4, 0.6]),
    },
  }
  alike = {"whitened": [(0.5, 0.9), (0.3, 0.9)]}
  page = benchmark.text([first, second], kinds, alike, count=1840, seeds=[1, 7])
  assert (
    "--seeds 1 7` on 1,840 images of faces and objects: 2 divisions" in page
  )
  rows = [x for x in page.splitlines() if x.startswith(("| no", "| alpha"))]
  assert rows[0] == (
    "| no expansion |  |  | 50.0 ± 14.1 |  | 30.0 ± 14.1 | 70.0 ± 14.1 |  |"
  )
  # 0.6 and 0.5 after 0.4 and 0.6; with 32: 0.2 and 0.5.
  assert rows[1] == (
    "| alpha-QE | 2, 32 | alpha 3, 1 | 55.0 ± 7.1 | +5.0, 1 of 2 | "
    "40.0 ± 0.0 | 70.0 ± 14.1 | 35.0 ± 21.2 |"
  )
  assert "| whitened | 40.0 ± 14.1 | 90.0 ± 0.0 |" in page


def test_without_descriptors_images_are_needed(tmp_path, capsys):
  with pytest.raises(SystemExit):
    benchmark.main([f"--descriptors={tmp_path / 'none.npy'}"])
  assert "give --images" in capsys.readouterr().err
