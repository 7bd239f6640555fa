"""Texture suppression on three domains, judged by the fourth."""

from benchmarks.claims import Claim, Study, pacs_photo

DOMAINS = ("art_painting", "cartoon", "photo", "sketch")


def _of(domain: str) -> dict[str, object]:
  """All domains but one to train on, that one to evaluate."""
  others = "+".join(f"{other}_train" for other in DOMAINS if other != domain)
  return {"data.train_split": others, "data.eval_splits": (domain,)}


STUDY = Study(
  config=pacs_photo.STUDY.config,
  variants={
    f"{name} {domain}": {**pacs_photo.STUDY.variants[name], **_of(domain)}
    for domain in DOMAINS
    for name in (pacs_photo.PLAIN, pacs_photo.UNION)
  },
  seeded=("seed",),
  metrics=(*pacs_photo.metrics(DOMAINS), "minutes"),
  claims=tuple(
    Claim(
      f"the union names more of {domain}, trained on the other three",
      f"{domain}/mean_class_accuracy",
      f"{pacs_photo.UNION} {domain}",
      f"{pacs_photo.PLAIN} {domain}",
    )
    for domain in DOMAINS
  ),
  notes=(
    "PACS at 64 px. Each column is a network that never saw the domain in its "
    "name, the only one that it is judged by; the settings are those of "
    "pacs_photo.md.",
  ),
)
