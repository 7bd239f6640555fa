import dataclasses
import importlib
import itertools
import json
import math
import pkgutil
import re

import numpy as np
from PIL import Image
import pytest
from scipy import stats

from benchmarks import claims
from benchmarks.claims import __main__ as claims_main
from benchmarks.claims import pacs_photo
from jaxshape import system as system_lib

SEEDS = (0, 1, 2, 3, 4)
PLAIN = (0.50, 0.55, 0.48, 0.52, 0.51)
STUDIES = sorted(
  m.name
  for m in pkgutil.iter_modules(claims.__path__)
  if not m.name.startswith("_")
)


def _found(ours, plain=PLAIN):
  found = {}
  for seed, a, b in zip(SEEDS, ours, plain, strict=False):
    found[seed, "ours"] = {"x/score": a, "minutes": 2.0}
    found[seed, "plain"] = {"x/score": b, "minutes": 1.0}
  return found


def _study(**claim):
  given = {"better": "ours", "than": "plain", **claim}
  made = claims.Claim("ours is ahead", "x/score", **given)
  return claims.Study(
    config="configs/some.py:small",
    variants={"plain": {"a.b": "c"}, "ours": {"a.b": "d", "e": (1, 2)}},
    seeded=("seed",),
    metrics=("x/score",),
    claims=(made,),
    notes=("A note.",),
  )


def _summary(found, *, seeds=SEEDS, variants=("plain", "ours"), **claim):
  study = _study(**claim)
  return claims_main.summarize(study, "some", variants, seeds, found)


def _row(text, first):
  (line,) = [x for x in text.splitlines() if x.startswith(f"| {first} |")]
  return [cell.strip() for cell in line.strip("|").split("|")]


def _claim(found, **options):
  """Difference, low, high, "n of m" and verdict of the claim's row."""
  text, _ = _summary(found, **options)
  _, difference, signs, verdict = _row(text, "ours is ahead")
  numbers = re.findall(r"[+-](?:[\d.]+|nan)", difference)
  return (*map(float, numbers), signs, verdict)


def _ours(*gains):
  return tuple(b + g for b, g in zip(PLAIN, gains, strict=False))


def test_the_table_holds_mean_and_sample_deviation():
  text, _ = _summary(_found(_ours(0.1, 0.1, 0.1, 0.1, 0.1)))
  _, plain, ours = _row(text, "x/score")
  assert plain == f"{np.mean(PLAIN):.3f} ± {np.std(PLAIN, ddof=1):.3f}"
  assert ours == f"{np.mean(PLAIN) + 0.1:.3f} ± {np.std(PLAIN, ddof=1):.3f}"


def test_the_interval_is_that_of_a_paired_t_test():
  ours = _ours(0.10, 0.02, 0.07, 0.05, 0.12)
  want = stats.ttest_rel(ours, PLAIN).confidence_interval(0.95)
  mean, low, high, signs, verdict = _claim(_found(ours))
  np.testing.assert_allclose([low, high], [want.low, want.high], atol=6e-4)
  assert mean == pytest.approx(0.072, abs=6e-4)
  assert (signs, verdict) == ("5 of 5", "holds")
  # Over unpaired seeds the spread of the seeds would hide a small lead.
  small = _ours(0.011, 0.010, 0.012, 0.010, 0.012)
  assert stats.ttest_ind(small, PLAIN).pvalue > 0.4
  assert _claim(_found(small))[-1] == "holds"


@pytest.mark.parametrize(
  ("gains", "options", "signs", "verdict"),
  [
    ((0.1, 0.12, 0.09, 0.1, 0.11), {}, "5 of 5", "holds"),
    ((-0.1, -0.12, -0.09, -0.1, -0.11), {}, "0 of 5", "does not hold"),
    ((0.1, -0.12, 0.09, -0.1, 0.11), {}, "3 of 5", "undecided"),
    # Where less is better, being below is being ahead.
    ((-0.1, -0.12, -0.09, -0.1, -0.11), {"sign": -1}, "5 of 5", "holds"),
    ((0.1, 0.12, 0.09, 0.1, 0.11), {"sign": -1}, "0 of 5", "does not hold"),
    # A margin allows to be behind, but not further.
    ((-0.01, -0.012, 0.0, -0.01, -0.005), {"margin": 0.02}, "5 of 5", "holds"),
    ((-0.01, -0.012, 0.0, -0.01, -0.005), {}, "0 of 5", "does not hold"),
    ((-0.1, -0.12, -0.09, -0.1, -0.11), {"margin": 0.02}, "0 of 5",
     "does not hold"),
    ((-0.1, 0.1, -0.03, 0.0, 0.01), {"margin": 0.02}, "3 of 5", "undecided"),
  ],
)  # fmt: skip
def test_verdicts(gains, options, signs, verdict):
  got = _claim(_found(_ours(*gains)), **options)
  assert got[3:] == (signs, verdict)
  # The difference is shown in the metric's own direction.
  assert got[0] == pytest.approx(np.mean(gains), abs=6e-4)
  assert got[1] <= got[0] <= got[2]


def test_a_stage_is_compared_with_the_same_network_without_it():
  found = _found(_ours(0.1, 0.1, 0.1, 0.1, 0.1))
  for row in found.values():
    row["x/before"] = row["x/score"] - 0.3
  got = _claim(found, than="ours", than_metric="x/before")
  assert got[0] == pytest.approx(0.3)


def test_one_seed_decides_nothing():
  found = _found(_ours(0.3)[:1], PLAIN[:1])
  mean, _, _, signs, verdict = _claim(found, seeds=(0,))
  assert mean == pytest.approx(0.3)
  assert (signs, verdict) == ("1 of 1", "undecided")


def test_numbers_that_are_missing_decide_nothing():
  ours = (math.nan, *_ours(0.1, 0.1, 0.1, 0.1, 0.1)[1:])
  text, data = _summary(_found(ours))
  assert _row(text, "ours is ahead")[-1] == "undecided"
  assert "NaN" not in json.dumps(data)


def test_what_a_variant_is_not_measured_by_is_left_blank():
  found = _found(_ours(0.1, 0.1, 0.1, 0.1, 0.1))
  study = dataclasses.replace(_study(), metrics=("x/score", "x/other"))
  for (_, variant), row in found.items():
    if variant == "ours":
      row["x/other"] = 0.5
  text, _ = claims_main.summarize(
    study, "some", ("plain", "ours"), SEEDS, found
  )
  assert _row(text, "x/other") == ["x/other", "-", "0.500 ± 0.000"]


def test_the_raw_numbers_survive_json():
  found = _found(_ours(0.1, 0.2, 0.3, 0.4, 1 / 3))
  _, data = _summary(found)
  back = json.loads(json.dumps(data))
  assert back["config"] == "configs/some.py:small"
  assert back["variants"]["ours"] == {"a.b": "d", "e": [1, 2]}
  again = {(run.pop("seed"), run.pop("variant")): run for run in back["runs"]}
  assert again == found
  text, _ = _summary(again)
  assert text == _summary(found)[0]


def test_claims_without_their_variants_are_left_out():
  found = _found(_ours(0.1, 0.1, 0.1, 0.1, 0.1))
  ours = {run: row for run, row in found.items() if run[1] == "ours"}
  text, data = _summary(ours, variants=("ours",))
  assert "ours is ahead" not in text
  assert {run["variant"] for run in data["runs"]} == {"ours"}
  assert "--variants ours" in text  # The command that makes this table.
  assert "--variants" not in _summary(found)[0]


def test_the_page_says_what_made_it():
  text, _ = _summary(_found(_ours(0.1, 0.1, 0.1, 0.1, 0.1)))
  assert "`python -m benchmarks.claims some --seeds 0 1 2 3 4`" in text
  assert "Config `configs/some.py:small`, seeds 0, 1, 2, 3, 4;" in text
  assert "10 runs of 1.5 minutes" in text
  assert "- A note." in text
  for name in ("jax ", "jaxlib ", "Python "):
    assert name in text


@pytest.fixture(scope="module")
def real(tmp_path_factory):
  """A folder in which lies what studies of real pictures read."""
  root = tmp_path_factory.mktemp("real")
  domains = [f"pacs/{d}" for d in ("photo", *pacs_photo.DOMAINS)]
  for part in (*domains, "cifar10/train", "cifar10/test"):
    for name, number in itertools.product(("dog", "cat"), range(8)):
      path = root / part / name / f"{number}.png"
      path.parent.mkdir(parents=True, exist_ok=True)
      Image.new("RGB", (8, 8), (30 * number, 90, 0)).save(path)
  return str(root)


@pytest.mark.parametrize("name", STUDIES)
def test_studies_change_fields_that_exist_and_claim_what_is_measured(
  name, real
):
  study = importlib.import_module(f"benchmarks.claims.{name}").STUDY
  path, mode = study.config.split(":")
  module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
  names = {"minutes"}
  first = (claims.BEFORE,) if study.before is not None else ()
  for variant in (*first, *study.variants):
    config = module.get_config(mode)
    config.update_from_flattened_dict(study.changes(variant, 7, "runs"))
    if config.data.source.startswith(("domains:", "folder:")):
      config.data.data_dir = real
    names |= set(system_lib.load(config.lock()).evaluators)
  for claim in study.claims:
    assert {claim.better, claim.than} <= set(study.variants)
    assert claim.metric in study.metrics
    assert claim.than_metric in (None, *study.metrics)
    assert claim.sign in (-1, 1)
  for metric in study.metrics:
    assert metric.split("/")[0] in names, metric


def test_what_comes_before_is_known_to_all_others(tmp_path):
  study = dataclasses.replace(
    _study(), before={"seed": 100, "e": (3,)}, known_as="bench.network"
  )
  folder = str(tmp_path)
  assert study.changes(claims.BEFORE, 7, folder) == {"seed": 100, "e": (3,)}
  assert study.changes("plain", 7, folder) == {
    "a.b": "c",
    "seed": 7,
    "bench.network": str(tmp_path / "before"),
  }
  assert _study().changes("plain", 7, folder) == {"a.b": "c", "seed": 7}


def test_a_study_is_not_changed_by_its_summary():
  study = _study()
  before = dataclasses.asdict(study)
  claims_main.summarize(
    study, "some", ("plain", "ours"), SEEDS, _found(_ours(0, 0, 0, 0, 0))
  )
  assert dataclasses.asdict(study) == before
