import json
import logging

import numpy as np
import pytest

from jaxshape.data import sources
from jaxshape.errors import InputError


def unit(*shape, seed=0):
  rows = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
  return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


ROWS, ASKED = unit(6, 4), unit(2, 4, seed=1)
LABELS = ["b", "a", "a", "-", "b", "c"]
ALONE = [1, 0, 0, -1, 1, 2]  # The labels, sorted by name.


@pytest.fixture
def root(tmp_path):
  np.save(tmp_path / "mine.npy", ROWS)
  return tmp_path


def open_it(root, **options):
  options = {"split": "mine", "neighbours": 2, **options}
  return sources.load(f"descriptors:{root}", **options)


def tell(root, content, name="mine.json"):
  (root / name).write_text(json.dumps(content))


def truth(source):
  return [
    [part.tolist() for part in source.truth(i)] for i in range(len(source))
  ]


def test_without_labels_all_rows_are_queries(root):
  source = open_it(root)
  np.testing.assert_array_equal(source.database, ROWS)
  assert source.query_rows.tolist() == list(range(6))
  assert source.clusters is None
  assert truth(source)[2] == [[], [], [2]]
  example = source[0]
  order = [i for i in np.argsort(-ROWS @ ROWS[0]) if i != 0][:2]
  np.testing.assert_allclose(example["neighbours"], ROWS[order])
  assert not example["relevant"].any()


@pytest.mark.parametrize(
  ("name", "text"),
  [
    ("mine_labels.txt", "b\na\na\n-\nb\nc\n"),
    ("mine_labels.txt", "b\r\na\r\na\r\n\r\nb\r\nc"),
    ("mine.csv", "name,Label\nx,b\ny,a\nz,a\nu,-1\nv,b\nw,c\n"),
    ("mine.csv", 'Label\nb\na\n"a"\n\nb\nc\n'),
    ("mine.json", '["b", "a", "a", null, "b", "c"]'),
    ("mine.json", '{"labels": ["b", "a", "a", "", "b", "c"]}'),
  ],
)
def test_labels_say_what_is_relevant(name, text, root):
  (root / name).write_bytes(text.encode())
  source = open_it(root)
  assert source.clusters.tolist() == ALONE
  assert source.clusters.dtype == np.int32
  # Only rows whose label another row has.
  assert source.query_rows.tolist() == [0, 1, 2, 4]
  want = [[[4], [], [0]], [[2], [], [1]], [[1], [], [2]], [[0], [], [4]]]
  assert truth(source) == want


def test_labels_may_be_numbers(root):
  tell(root, [10, 9, 9, -1, 10, 30])
  assert open_it(root).query_rows.tolist() == [0, 1, 2, 4]


def test_queries_have_labels_of_their_own(root, caplog):
  np.save(root / "mine_queries.npy", ASKED)
  (root / "mine_queries.txt").write_text("one.jpg\ntwo.jpg\n")
  (root / "mine_labels.txt").write_text("\n".join(LABELS))
  with caplog.at_level(logging.WARNING):
    assert truth(open_it(root)) == [[[], [], []]] * 2
  assert "queries have none; nothing is relevant" in caplog.text
  (root / "mine_queries_labels.txt").write_text("a\nz\n")
  source = open_it(root)
  np.testing.assert_array_equal(source.queries, ASKED)
  assert source.names == ("one.jpg", "two.jpg")
  assert source.query_clusters.tolist() == [0, -1]
  assert truth(source) == [[[1, 2], [], []], [[], [], []]]
  (root / "mine_queries_labels.txt").write_text("y\nz\n")
  with pytest.raises(InputError, match="no label of the queries, such as 'y'"):
    open_it(root)
  (root / "mine_queries_labels.txt").unlink()
  (root / "mine_labels.txt").unlink()
  tell(root, {"labels": LABELS, "query_labels": ["c", "b"]})
  assert truth(open_it(root)) == [[[5], [], []], [[0, 4], [], []]]


def test_relevant_rows_may_be_listed(root):
  np.save(root / "mine_queries.npy", ASKED)
  tell(root, [[3, 1], []])
  assert truth(open_it(root)) == [[[1, 3], [], []], [[], [], []]]
  told = {"relevant": [[3], [2]], "hard": [[0], []], "junk": [[], [5, 4]]}
  tell(root, told)
  assert truth(open_it(root)) == [[[3], [0], []], [[2], [], [4, 5]]]


def test_rows_that_are_queries_may_be_listed(root):
  (root / "mine.txt").write_text("\n".join("uvwxyz"))
  tell(root, {"query_rows": [5, 1], "relevant": [[5, 3], [2]]})
  source = open_it(root)
  assert source.query_rows.tolist() == [5, 1]
  assert source.names == ("z", "v")
  # No row is an answer to itself.
  assert truth(source) == [[[3], [], [5]], [[2], [], [1]]]


@pytest.mark.parametrize(
  ("content", "text"),
  [
    (LABELS[:5], "has 5 labels, but there are 6 rows"),
    ([[1], [2]], "relevant has 2 entries; .* each of the 6 queries"),
    ({"relevant": 3}, "relevant has no list entries"),
    ({"relevant": [[6]] + [[]] * 5}, r"relevant\[0\] must be .* 0..5"),
    ({"relevant": [[True]] + [[]] * 5}, r"relevant\[0\] must be"),
    ({"relevant": [[]] * 6}, "no query has a relevant row"),
    ({"hard": [[1]] * 6}, "has hard, but not relevant"),
    ({"query_rows": [7]}, "query_rows must be a list of rows"),
    ({"query_rows": []}, "query_rows is empty"),
    ({"label": LABELS}, "has the key 'label'; there are: labels,"),
    ({"labels": [1.5] * 6}, "labels must be a list of texts"),
    ("b", "holds a str"),
    (list("abcdef"), "no two rows have the same label"),
  ],
)
def test_labels_that_do_not_fit_are_refused(content, text, root):
  tell(root, content)
  with pytest.raises(InputError, match=text):
    open_it(root)


def test_files_that_do_not_fit_are_refused(root):
  for data in (b"{", b"[" * 100_000, b"\xff"):
    (root / "mine.json").write_bytes(data)
    with pytest.raises(InputError, match="mine.json cannot be read as JSON"):
      open_it(root)
  tell(root, LABELS)
  (root / "mine.csv").write_text("name\na\n")
  with pytest.raises(InputError, match="columns name; wanted one called label"):
    open_it(root)
  (root / "mine.csv").write_text("name,label\na\n")
  with pytest.raises(InputError, match="line 2 has 1 cells, but the first"):
    open_it(root)
  (root / "mine.csv").write_text('label\n"a\n')
  with pytest.raises(InputError, match="mine.csv cannot be read as CSV"):
    open_it(root)
  (root / "mine.csv").write_text("label\n" + "a\n" * 6)
  with pytest.raises(InputError, match="labels in the .json and mine.csv"):
    open_it(root)
  (root / "mine.csv").unlink()
  np.save(root / "mine_queries.npy", ASKED[:, :3])
  with pytest.raises(
    InputError, match=r"queries.npy has .* 3 numbers, .* of 4"
  ):
    open_it(root)
  np.save(root / "mine_queries.npy", ASKED)
  tell(root, {"query_rows": [1]})
  with pytest.raises(InputError, match="there is a file of queries, too"):
    open_it(root)
  with pytest.raises(InputError, match=r"no database: looked for test.npy"):
    open_it(root, split="test")
