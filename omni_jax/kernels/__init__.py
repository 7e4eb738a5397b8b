"""Attention as TPU kernels and as plain jnp; `omni_jax.attention` chooses between them."""
