"""What breaks a training run, and what is left of it: see `__main__`."""

import dataclasses


@dataclasses.dataclass
class Row:
  """What came of one fault.

  Attributes:
    fault: What was done to the run.
    tries: How often.
    found: What came out, in words.
    failures: What was lost, differs or was said badly; empty if all is well.
    skipped: Why it was not tried.
    seconds: How long it all took.
  """

  fault: str
  tries: int = 0
  found: str = ""
  failures: list[str] = dataclasses.field(default_factory=list)
  skipped: str = ""
  seconds: float = 0.0
