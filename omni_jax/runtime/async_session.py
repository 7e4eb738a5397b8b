"""A session for an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

from omni_jax.events import Event
from omni_jax.runtime.session import Session
from omni_jax.settings import MediaSettings, OutputMode


class AsyncSession:
    """A `Session` for an event loop: the same methods, awaited; the engine runs in a thread."""

    def __init__(self, session: Session):
        self.session = session

    async def send_text(self, text: str) -> None:
        """See `Session.send_text`."""
        self.session.send_text(text)

    async def send_image(self, image: Any) -> None:
        """See `Session.send_image`."""
        await asyncio.to_thread(self.session.send_image, image)

    async def send_item(self, item: Mapping[str, Any], media: MediaSettings | None = None) -> None:
        """See `Session.send_item`."""
        await asyncio.to_thread(self.session.send_item, item, media)

    async def send_audio(self, samples: Any, rate: float) -> None:
        """See `Session.send_audio`."""
        await asyncio.to_thread(self.session.send_audio, samples, rate)

    async def send_frame(self, frame: Any, seconds: float) -> None:
        """See `Session.send_frame`."""
        await asyncio.to_thread(self.session.send_frame, frame, seconds)

    async def commit(self, output: OutputMode | None = None) -> None:
        """See `Session.commit`."""
        await asyncio.to_thread(self.session.commit, output)

    async def events(self) -> AsyncIterator[Event]:
        """See `Session.events`."""
        found = self.session.events()
        while (event := await asyncio.to_thread(next, found, None)) is not None:
            yield event

    async def interrupt(self, played_seconds: float | None = None) -> None:
        """See `Session.interrupt`."""
        await asyncio.to_thread(self.session.interrupt, played_seconds)

    async def close(self) -> None:
        """See `Session.close`."""
        await asyncio.to_thread(self.session.close)

    async def __aenter__(self) -> AsyncSession:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
