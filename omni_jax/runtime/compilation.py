"""The on-disk cache of compiled programs, and of their traces."""

from __future__ import annotations

import os
import pathlib


def use_compilation_cache(folder: str | None = None, *, traces: bool = False) -> None:
    """Compiled programs are kept between runs.

    Args:
      folder: where; "" keeps none. By default as JAX_COMPILATION_CACHE_DIR says, which may be empty as well, else in
        `omni-jax/programs` of the user's cache folder.
      traces: keep traces too (`omni_jax.programs`): for processes that run programs, not for those that compile them
        for other machines.
    """
    import jax

    from omni_jax import programs

    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    if folder is None:
        folder = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(home) / "omni-jax" / "programs"))
    if folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        if traces:
            programs.keep_traces(pathlib.Path(folder, "traces"))
