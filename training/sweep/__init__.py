"""The sweep: one recipe trained at every combination of some fields' values."""
