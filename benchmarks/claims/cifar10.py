"""Texture suppression on CIFAR-10: clean, corrupted and outlined pictures."""

from benchmarks.claims import Claim, Study, pacs_photo

PLAIN, UNION = pacs_photo.PLAIN, pacs_photo.UNION
SEVERITIES = (1, 3, 5)
STUDY = Study(
  config="configs/texture_suppression.py:cifar_folder",
  variants={
    name: pacs_photo.STUDY.variants[name]
    for name in (PLAIN, UNION, "filtered", "gaussian")
  },
  seeded=("seed",),
  metrics=(
    "test/top1",
    "filtered_test/top1",
    "outlined_test/top1",
    "corruption/mean_error",
    *(f"corruption/severity_{number}_top1" for number in SEVERITIES),
    "minutes",
  ),
  claims=(
    Claim(
      "the union loses at most 0.02 on clean pictures",
      "test/top1",
      UNION,
      PLAIN,
      margin=0.02,
    ),
    Claim(
      "it makes fewer errors under corruption",
      "corruption/mean_error",
      UNION,
      PLAIN,
      sign=-1,
    ),
    *(
      Claim(
        f"at severity {number} too",
        f"corruption/severity_{number}_top1",
        UNION,
        PLAIN,
      )
      for number in SEVERITIES
    ),
    Claim("it names more outlines", "outlined_test/top1", UNION, PLAIN),
    Claim(
      "diffusion helps more than a Gaussian blur on outlines",
      "outlined_test/top1",
      UNION,
      "gaussian",
    ),
  ),
  notes=(
    "CIFAR-10 as JPEG files of quality 75, so the numbers are comparable among "
    "themselves only. Corruptions are those of the config, made here, on 1,000 "
    "of the pictures. Outlines are dark lines on white.",
  ),
)
