"""Query expansion that learns, three times as long."""

from benchmarks.claims import Study, lattqe

FULL = lattqe.FULL
STEPS = 6000
STUDY = Study(
  config=lattqe.STUDY.config,
  variants={
    FULL: {
      **lattqe.STUDY.variants[FULL],
      "dba.start": STEPS,
      "steps": STEPS + 150,
      "optimizer.total_steps": STEPS,
    },
  },
  seeded=lattqe.STUDY.seeded,
  metrics=lattqe.STUDY.metrics,
  claims=tuple(claim for claim in lattqe.STUDY.claims if claim.than == FULL),
  notes=(
    "The landmarks, networks and settings of lattqe.md for 6,000 instead of "
    "2,000 steps; nothing else was changed, and no seed was looked at before.",
  ),
)
