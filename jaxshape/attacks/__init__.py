"""Images changed so little that a person sees the same, and a network not."""
