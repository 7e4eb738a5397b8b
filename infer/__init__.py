"""Generation runs and benchmarks on top of `omni_jax`."""
