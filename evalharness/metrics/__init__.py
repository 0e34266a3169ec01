"""Scores of a completion against its reference, as metric scripts of the `evaluate` library."""
