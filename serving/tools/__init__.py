"""Function calls: offered by a request, written by a model, read out of its text."""
