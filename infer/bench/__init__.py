"""Benchmarks against the reference, and footprints."""
