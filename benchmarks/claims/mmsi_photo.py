"""Mutual shape information on real photographs, judged by other domains."""

from benchmarks.claims import Claim, Study, pacs_photo

PLAIN, TWIN, MMSI = "plain", "ce", "mmsi"
STUDY = Study(
  config="configs/mmsi.py:domains",
  variants={
    PLAIN: {"weights.mutual": 0.0, "weights.stylized": 0.0},
    TWIN: {"weights.mutual": 0.0},
    MMSI: {},
  },
  seeded=("seed",),
  metrics=(
    *pacs_photo.metrics(("photo_val", *pacs_photo.DOMAINS)),
    "dimensionality/shape_share",
    "dimensionality/correlation/shape_share",
    "stylized_photo_val/top1",
    "minutes",
  ),
  claims=(
    *(
      Claim(
        f"MMSI names more of {domain} than its twin without the term",
        f"{domain}/mean_class_accuracy",
        MMSI,
        TWIN,
      )
      for domain in pacs_photo.DOMAINS
    ),
    *(
      Claim(
        f"more of its neurons stand for shape{how}",
        f"dimensionality/{name}shape_share",
        MMSI,
        TWIN,
      )
      for how, name in (("", ""), (", by correlation", "correlation/"))
    ),
    Claim(
      "it loses at most 0.02 on photographs",
      "photo_val/top1",
      MMSI,
      TWIN,
      margin=0.02,
    ),
    *(
      Claim(
        f"the styles alone name more of {domain} than no styles",
        f"{domain}/mean_class_accuracy",
        TWIN,
        PLAIN,
      )
      for domain in pacs_photo.DOMAINS
    ),
  ),
  notes=(
    "PACS photographs at 64 px; the styles are generated textures, the weights "
    "and the axis those of configs/mmsi.py:small, chosen on generated "
    "pictures; nothing was tuned on PACS.",
  ),
)
