"""What `omni-jax plan` is asked about: a request before it is made."""

from __future__ import annotations

from dataclasses import dataclass

from omni_jax.settings import MediaSettings, option


@dataclass(frozen=True, kw_only=True)
class Asked(MediaSettings):
    """What the user wants to run."""

    batch: int = option(1, "Conversations at once, each with the same media.", (1, 2**20))
    prompt: int = option(256, "Tokens of each prompt beside its media.", (1, 2**24))
    reply: int = option(1024, "Maximum number of tokens of a reply.", (1, 2**24))
    image: tuple[str, ...] = option((), "An image, as WIDTHxHEIGHT.")
    video: tuple[str, ...] = option((), "A video, as WIDTHxHEIGHT:SECONDS or WIDTHxHEIGHT:SECONDS@FPS.")
    audio: tuple[float, ...] = option((), "Seconds of audio.", (0.0, 1e5))
    speech: float = option(0.0, "Seconds of speech to answer with; 0 is text only.", (0.0, 1e6))
