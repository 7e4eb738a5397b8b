"""Tests; the oracle (transformers 4.57.6) is imported here and in benchmarks only."""
