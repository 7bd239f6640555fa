"""What a paper claims, trained and measured over seeds."""

from collections.abc import Mapping, Sequence
import dataclasses
import pathlib
from typing import Any

# What the run is called that comes before all others.
BEFORE = "before"


@dataclasses.dataclass(frozen=True)
class Claim:
  """That one variant does better than another by a metric.

  Attributes:
    text: The claim in words.
    metric: "<evaluator>/<metric>".
    better: The variant that should be ahead.
    than: The variant it is compared with, trained on the same budget.
    than_metric: The metric that `than` is measured by, where it is another:
      what a stage adds to the very same network.
    sign: 1 if more of the metric is better, -1 if less is.
    margin: None to ask for a lead whose interval excludes 0; else how far
      `better` may fall behind and still count as "within noise".
  """

  text: str
  metric: str
  better: str
  than: str
  than_metric: str | None = None
  sign: int = 1
  margin: float | None = None


@dataclasses.dataclass(frozen=True)
class Study:
  """The runs behind the claims of one system.

  Attributes:
    config: "configs/<name>.py:<mode>".
    variants: Changes of the config by the variant's name, as dotted fields.
    seeded: Fields that are set to the seed.
    metrics: Rows of the table.
    claims: What should come out.
    notes: Lines for below the table.
    before: Changes of the config, also of its seeds, of a run that comes before
      all others and is none of the variants, such as a network to attack.
    known_as: The field of all others that its folder goes to.
  """

  config: str
  variants: Mapping[str, Mapping[str, Any]]
  seeded: Sequence[str]
  metrics: Sequence[str]
  claims: Sequence[Claim]
  notes: Sequence[str] = ()
  before: Mapping[str, Any] | None = None
  known_as: str = ""

  def changes(self, variant: str, seed: int, folder: str) -> dict[str, Any]:
    """What a run of the study changes in the config.

    Args:
      variant: Its name, or `BEFORE`.
      seed: Of the run.
      folder: Where the study's runs are.

    Returns:
      Values by dotted field.
    """
    if variant == BEFORE:
      return dict(self.before or {})
    out = {**self.variants[variant], **dict.fromkeys(self.seeded, seed)}
    if self.before is not None:
      out[self.known_as] = str(pathlib.Path(folder, BEFORE).absolute())
    return out
