"""Benchmarks: each performance claim as one command."""
