"""The on-disk cache of compiled programs."""

from __future__ import annotations

import os
import pathlib


def use_compilation_cache() -> None:
    """Compiled programs are kept between runs, unless JAX_COMPILATION_CACHE_DIR says where or is empty."""
    import jax

    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(home) / "omni-jax" / "programs"))
    if folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
