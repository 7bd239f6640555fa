"""What each part of LAttQE brings: Table 2."""

from benchmarks.claims import Claim, Study, lattqe

FULL = lattqe.FULL
SHORT = {"data.eval_splits": ("test",), "bench.compare": False}
STUDY = Study(
  config=lattqe.STUDY.config,
  variants={
    FULL: SHORT,
    "no_attention": {**SHORT, "network.attention": False},
    "no_positions": {**SHORT, "network.positions": False},
    "no_visual": {**SHORT, "network.visual": False},
    "no_auxiliary": {**SHORT, "loss.auxiliary": 0.0},
  },
  seeded=lattqe.STUDY.seeded,
  metrics=(
    "test/mAP",
    "test/mAP_medium",
    "test/mAP_hard",
    "test/mAP_none",
    "test/mAP_at_1",
    "test/mAP_at_4",
    "test/mAP_at_16",
    "test/drop",
    "test_dba/mAP",
    "minutes",
  ),
  claims=tuple(
    Claim(
      f"the full model beats the one without {label} (Table 2: 70.0 against "
      f"{number})",
      "test/mAP",
      FULL,
      name,
    )
    for label, name, number in (
      ("self-attention", "no_attention", 66.0),
      ("positions", "no_positions", 63.2),
      ("visual embedding", "no_visual", 65.1),
      ("the auxiliary loss", "no_auxiliary", 68.5),
    )
  ),
  notes=(lattqe.STUDY.notes[0], lattqe.STUDY.notes[2]),
)
