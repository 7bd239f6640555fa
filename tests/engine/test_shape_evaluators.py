import jax.numpy as jnp
import numpy as np
import pytest

from jaxshape.data import stream, styles
from jaxshape.engine import evaluators, runtime, shape_evaluators
from jaxshape.errors import InputError
from jaxshape.filters import stylization
from jaxshape.system import TrainState

CLASSES = ("cat", "dog", "owl")
MESH = runtime.make_mesh({"data": -1, "model": 1})
SIZE, COUNT = 16, 11
WEIGHTS = np.random.default_rng(1).normal(size=(5, 3)).astype(np.float32)
MIX = np.random.default_rng(2).normal(size=(3, 5)).astype(np.float32)


class Source:
  """Random images, one of which stands in for a damaged one."""

  classes = CLASSES

  def __init__(self, seed=0, files=None):
    draw = np.random.default_rng(seed)
    low = draw.integers(0, 256, (COUNT, 4, 4, 3)).astype(np.uint8)
    self.images = low.repeat(4, axis=1).repeat(4, axis=2)
    self.labels = draw.integers(0, 3, COUNT).astype(np.int32)
    self.mask = np.ones(COUNT, np.float32)
    if files:
      self.files = files

  def __len__(self):
    return len(getattr(self, "files", self.images))

  def __getitem__(self, i):
    return {
      "image": self.images[i],
      "label": self.labels[i],
      "mask": self.mask[i],
    }


SOURCE, STYLES = Source(), Source(seed=1)
SOURCE.mask[4] = 0
STATE = TrainState(jnp.int32(0), {"net": jnp.asarray(WEIGHTS)}, {}, {})


def _features(images):
  x = (images / 255 - 0.5) @ MIX
  return jnp.tanh(x).reshape(len(x), 4, 4, 4, 4, 5).mean((2, 4))


def _classifier():
  return evaluators.Classifier(
    lambda state, images: _features(jnp.asarray(images, jnp.float32)),
    lambda state, x: 9 * x.mean((-3, -2)) @ state.params["net"],
    CLASSES,
  )


def _run(make, batch_size, source, **options):
  evaluator = make(
    _classifier(),
    lambda: stream.evaluate(source, batch_size=batch_size),
    **options,
  )
  return *runtime.evaluate(evaluator, STATE, MESH), evaluator


@pytest.mark.parametrize("batch_size", [8, 16])
def test_changed_images_are_what_is_classified(batch_size):
  change = lambda images: 255 - images[:, ::-1]
  numbers, outputs, evaluator = _run(
    shape_evaluators.changed, batch_size, SOURCE, change=change, name="upset"
  )
  right = [
    _classifier().logits(STATE, change(image[None]))[0].argmax() == label
    for image, label, real in zip(
      np.float32(SOURCE.images), SOURCE.labels, SOURCE.mask, strict=True
    )
    if real
  ]
  assert 0 < np.mean(right) < 1
  np.testing.assert_allclose(numbers["top1"], np.mean(right), rtol=1e-6)
  figure = evaluator.pictures(STATE, outputs)["what is classified"]
  shown = [axes.images[0].get_array() for axes in figure.axes if axes.images]
  assert len(shown) == 2 * min(8, int(SOURCE.mask[:batch_size].sum()))


def test_outlines_are_dark_on_white_and_flat_areas_empty():
  image = np.full((1, 24, 24, 3), 200, np.float32)
  image[:, 8:16, 8:16] = (30, 90, 60)
  lines = np.asarray(shape_evaluators.outlines(jnp.asarray(image)))
  assert set(np.unique(lines)) == {0, 255}
  assert (lines == lines[..., :1]).all()
  # Beside a border the mean of 9 pixels holds both; far from it, one alone.
  assert (lines[0, 8, 8:16] == 0).all()
  assert (lines[0, :4] == 255).all()
  assert (lines[0, 7, 8:16] == 255).all()


def _restyled(image, style):
  return np.asarray(
    stylization.match_statistics(np.float32(image), np.float32(style))
  )


def test_stylized_accuracy_row_by_row():
  source = styles.Styled(SOURCE, STYLES, count=1)
  right = []
  for i in np.flatnonzero(SOURCE.mask):
    row = source[i]
    image = _restyled(row["image"], row["style"][0])
    logits = _features(image[None]).mean((1, 2)) @ WEIGHTS
    right.append(np.argmax(logits) == row["label"])
  assert 0 < np.mean(right) < 1
  for batch_size in (8, 16):
    got, outputs, evaluator = _run(
      shape_evaluators.stylized, batch_size, source
    )
    assert got["top1"] == pytest.approx(np.mean(right))
  figures = evaluator.pictures(STATE, outputs)
  assert list(figures) == ["confusion", "calibration", "what is classified"]
  shown = figures["what is classified"].axes
  assert len(shown) == 3 * 8
  first = np.asarray(shown[16].images[0].get_array())
  row = source[0]
  want = _restyled(row["image"], row["style"][0]) / 255
  np.testing.assert_allclose(first, want, atol=1e-4)


def test_a_strength_of_0_leaves_the_images_as_they_are():
  source = styles.Styled(SOURCE, STYLES, count=1)
  got, _, _ = _run(shape_evaluators.stylized, 16, source, strength=0.0)
  plain, _, _ = _run(evaluators.accuracy, 16, source)
  assert got == pytest.approx(plain, nan_ok=True)


def test_dimensionality_row_by_row():
  source = styles.Styled(shape_evaluators.Pairs(SOURCE), STYLES, count=2)
  latent = lambda image: np.float64(_features(image[None]).mean((1, 2))[0])
  pairs = {"shape": [], "texture": []}
  for i in range(COUNT):
    row = source[i]
    if not row["mask"]:
      continue
    one, two = row["style"]
    anchor = latent(_restyled(row["image"], one))
    pairs["shape"].append((anchor, latent(_restyled(row["image"], two))))
    pairs["texture"].append((anchor, latent(_restyled(row["other"], one))))
  # The public estimator, and the mean correlation, by their formulas.
  every = np.concatenate([np.asarray(p) for p in pairs.values()])
  total = every.reshape(-1, 5).var(0).sum()
  scores, correlations = [], []
  for found in pairs.values():
    a, b = np.moveaxis(np.asarray(found), 1, 0)
    mu = (a.mean(0) + b.mean(0)) / 2
    scores.append(((a - mu) * (b - mu)).mean(0).sum() / total)
    rho = [np.corrcoef(x, y)[0, 1] for x, y in zip(a.T, b.T, strict=True)]
    correlations.append(np.mean(rho))
  softmax = lambda s: np.exp([*s, 1]) / np.exp([*s, 1]).sum()
  whole = np.floor(5 * softmax(scores))
  whole[2] = 5 - whole[:2].sum()
  for batch_size in (8, 16):
    got, outputs, evaluator = _run(
      shape_evaluators.dimensionality, batch_size, source
    )
    names = ("shape", "texture", "residual")
    shares = [got[f"{name}_share"] for name in names]
    np.testing.assert_allclose(shares, whole / 5, rtol=1e-6)
    shares = [got[f"correlation/{name}_share"] for name in names]
    np.testing.assert_allclose(shares, softmax(correlations), rtol=1e-3)
    np.testing.assert_allclose(
      [got["shape_score"], got["texture_score"]], scores, rtol=1e-3
    )
    assert got["neurons"] == 5
    assert got["pairs"] == 2 * len(pairs["shape"])
  plot = evaluator.plots(outputs)["neurons by correlation"]
  np.testing.assert_allclose(plot.values, softmax(correlations), rtol=1e-3)
  figures = evaluator.pictures(STATE, outputs)
  assert list(figures) == ["neurons", "pairs"]
  assert len(figures["neurons"].axes[0].containers) == 2


def test_where_nothing_varies_there_is_no_share():
  rows = {name: np.ones((4, 5), np.float32) for name in ("shape", "texture")}
  outputs = [
    {"mask": np.ones(4), "anchor": np.ones((4, 5), np.float32), **rows}
  ]
  evaluator = shape_evaluators.dimensionality(_classifier(), lambda: None)
  got = evaluator.summarize(outputs)
  assert np.isnan(got["shape_share"])
  assert got["correlation/shape_share"] == pytest.approx(
    1 / (2 + np.e)  # Two zero scores beside the residual's 1.
  )


def test_pairs_are_of_two_classes_and_follow_from_the_number():
  pairs = shape_evaluators.Pairs(SOURCE)
  for i in range(COUNT):
    other = pairs[i]["other"]
    (j,) = (j for j in range(COUNT) if (SOURCE.images[j] == other).all())
    assert SOURCE.labels[j] != SOURCE.labels[i]
    assert pairs[i]["mask"] == (i != 4 and j != 4)
    np.testing.assert_array_equal(pairs[i]["other"], other)
  one = Source()
  one.labels[:] = 1  # Then any other will do, but never itself.
  same = shape_evaluators.Pairs(one)
  assert all((same[i]["other"] != same[i]["image"]).any() for i in range(COUNT))


def test_what_data_lack_is_named():
  with pytest.raises(InputError, match=r'needs examples with "style", got im'):
    _run(shape_evaluators.stylized, 8, SOURCE)
  source = styles.Styled(SOURCE, STYLES, count=2)
  with pytest.raises(InputError, match=r'needs examples with "other"'):
    _run(shape_evaluators.dimensionality, 8, source)
  alone = Source(files=["one.png"])
  with pytest.raises(InputError, match="two examples or more, got 1"):
    shape_evaluators.Pairs(alone)
  with pytest.raises(
    ValueError, match=r"style_strength must be in 0..1, got 2"
  ):
    shape_evaluators.stylized(_classifier(), lambda: None, strength=2.0)
