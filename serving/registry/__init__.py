"""Knows which models are served, and which of them a request names."""
