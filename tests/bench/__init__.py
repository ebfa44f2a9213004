"""Benchmarks of raywb, each against what a user would use instead: ``python -m tests.bench``."""
