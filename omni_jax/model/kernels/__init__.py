"""Attention as TPU kernels and as plain jnp; `omni_jax.model.attention` chooses between them."""
