"""`python -m omni_jax.cli`: the same as `omni-jax`."""

from omni_jax.cli.main import main

if __name__ == "__main__":
    main()
