"""An item of a realtime conversation beside what the model is told of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omni_jax.processing.tokenizer import Tokenizer
from omni_jax.runtime.reply import first_tokens


@dataclass
class Entry:
    """An item, and what stands for it in the conversation of the model: a message or a part of one.

    Of a spoken reply also the ids that the conversation holds, and the seconds of audio that they are.
    """

    item: dict[str, Any]
    inside: dict[str, Any] | None
    ids: tuple[int, ...] = ()
    seconds: float = 0.0

    def cut(self, seconds: float, tokenizer: Tokenizer) -> bool:
        """Keeps of a spoken reply what was said in so many seconds, in proportion; whether nothing is left."""
        if self.inside is None or seconds >= self.seconds:
            return False
        keep = round(len(self.ids) * seconds / self.seconds)
        text, whole = first_tokens(tokenizer, self.ids, keep)
        self.ids, self.seconds = self.ids[:whole], seconds
        self.item["content"][0]["transcript"] = self.inside["content"] = text
        return not text
