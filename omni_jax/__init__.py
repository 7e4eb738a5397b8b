"""Qwen2.5-Omni in JAX: `load` a checkpoint, then `generate` or `stream`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omni_jax.api import Omni as Omni
    from omni_jax.api import load as load
    from omni_jax.errors import InputError as InputError
    from omni_jax.events import AudioEvent as AudioEvent
    from omni_jax.events import DoneEvent as DoneEvent
    from omni_jax.events import ErrorEvent as ErrorEvent
    from omni_jax.events import Reply as Reply
    from omni_jax.events import TextEvent as TextEvent
    from omni_jax.events import TrimEvent as TrimEvent
    from omni_jax.events import TurnEvent as TurnEvent
    from omni_jax.runtime.memory_model import MemoryNeedError as MemoryNeedError
    from omni_jax.runtime.speech import PARTS as PARTS
    from omni_jax.settings import GenerationSettings as GenerationSettings
    from omni_jax.settings import MediaSettings as MediaSettings
    from omni_jax.settings import SpeechSettings as SpeechSettings

_HOMES = {
    "Omni": "api", "load": "api", "InputError": "errors", "GenerationSettings": "settings", "Reply": "events",
    "SpeechSettings": "settings", "TextEvent": "events", "DoneEvent": "events", "PARTS": "model.stages",
    "MediaSettings": "settings", "MemoryNeedError": "runtime.memory_model", "AudioEvent": "events",
    "ErrorEvent": "events", "TrimEvent": "events", "TurnEvent": "events",
}  # fmt: skip
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Imports on first use: the command answers `--help` without waiting for jax."""
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"omni_jax.{_HOMES[name]}"), name)
