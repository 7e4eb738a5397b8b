"""Qwen2.5-Omni in JAX."""
