"""Measures over HTTP whether an adapter is better than its base."""
