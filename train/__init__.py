"""Fine-tuning on top of `omni_jax`."""
