"""The server: OpenAI's interfaces over one engine. A thin translation between protocols and `omni_jax.runtime`."""
