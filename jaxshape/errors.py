"""What a person did, said in one line."""


class InputError(ValueError):
  """Something that a person gave does not fit; the message says what to do.

  Scripts print the message alone. Anything else that is raised is a defect of
  the program and keeps its traceback.
  """
