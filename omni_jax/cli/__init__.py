"""The `omni-jax` command."""
