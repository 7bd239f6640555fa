"""Texture suppression on real photographs, judged by drawings and paintings."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.claims import Claim, Study

DOMAINS = ("art_painting", "cartoon", "sketch")
PLAIN, UNION = "plain", "union"


def variant(policy: str, **suppression: Any) -> dict[str, Any]:
  """Changes of the config, from options of its `suppression`."""
  given = {"policy": policy, **suppression}
  return {f"suppression.{name}": value for name, value in given.items()}


def metrics(splits: Sequence[str]) -> tuple[str, ...]:
  """Accuracy as a mean over pictures, and over classes."""
  names = ("top1", "mean_class_accuracy")
  return tuple(f"{split}/{name}" for split in splits for name in names)


def claims(variants: Mapping[str, str], splits: Sequence[str]) -> list[Claim]:
  """That variants beat the plain one, class by class.

  Args:
    variants: What each does, by its name.
    splits: What is evaluated.
  """
  return [
    Claim(
      f"{what} names more of {split}, as a mean over classes",
      f"{split}/mean_class_accuracy",
      name,
      PLAIN,
    )
    for name, what in variants.items()
    for split in splits
  ]


STUDY = Study(
  config="configs/texture_suppression.py:domains",
  variants={
    PLAIN: variant("original"),
    UNION: variant("union"),
    "filtered": variant("filtered"),
    "drawn": variant("union", iterations=(0, 20)),
    "gaussian": variant("union", filter="gaussian"),
    "bilateral": variant("union", filter="bilateral"),
    "cartoon": variant("union", filter="cartoon"),
  },
  seeded=("seed",),
  metrics=(*metrics(("photo_val", *DOMAINS)), "minutes"),
  claims=(
    *claims({UNION: "training on photographs and filtered ones"}, DOMAINS),
    *claims({"filtered": "training on filtered ones alone"}, DOMAINS),
    Claim(
      "the union loses at most 0.02 on photographs",
      "photo_val/top1",
      UNION,
      PLAIN,
      margin=0.02,
    ),
    *(
      Claim(
        f"diffusion helps more than {name} on sketches (Table 4)",
        "sketch/mean_class_accuracy",
        UNION,
        name,
      )
      for name in ("gaussian", "bilateral", "cartoon")
    ),
  ),
  notes=(
    "PACS at 64 px, 1,505 photographs to train on, 165 to validate; all "
    "variants have the same number of steps.",
  ),
)
