"""The on-disk cache of compiled programs."""

from __future__ import annotations

import os
import pathlib


def use_compilation_cache(folder: str | None = None) -> None:
    """Compiled programs are kept between runs.

    Args:
      folder: where; "" keeps none. By default as JAX_COMPILATION_CACHE_DIR says, which may be empty as well, else in
        `omni-jax/programs` of the user's cache folder.
    """
    import jax

    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    if folder is None:
        folder = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(home) / "omni-jax" / "programs"))
    if folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
