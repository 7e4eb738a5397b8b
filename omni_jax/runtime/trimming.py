"""What a conversation keeps of media that have to make room: a note, and what was said in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from omni_jax.processing import positions as P
from omni_jax.processing.processor import Medium

# What stands for a medium that had to make room.
GONE = "({kind} of an earlier turn)"
SAID = "({kind} of an earlier turn, in which was said: {words})"
# What stands for one that came in live, where a conversation is written down.
LIVE = "({kind} that came in live)"
# What the model is asked for the words; the language begins with a space, or is left out.
QUESTION = "Transcribe the{language} audio into text."
# A second of audio is 25 tokens, and of speech seldom more than 7: what is written on and on is not the words.
WORDS_SHARE = 3


def make_room(messages: list[dict[str, Any]], transcribe: Callable[[Medium], str] | None) -> bool:
    """Gives up the oldest medium of a conversation, or where there is none, its oldest turn.

    Args:
      messages: of the conversation; changed.
      transcribe: the words of audio, which stay; None keeps a note alone.
    Returns:
      Whether there was anything to give up.
    """
    for message in messages:
        if not isinstance(message["content"], list):
            continue
        for i, part in enumerate(message["content"]):
            if part["type"] != "text":
                message["content"][i] = {"type": "text", "text": _note(part, transcribe)}
                return True
    first = 1 if messages and messages[0]["role"] == "system" else 0
    if len(messages) - first < 2:
        return False
    del messages[first : first + 2]
    return True


def _note(part: Mapping[str, Any], transcribe: Callable[[Medium], str] | None) -> str:
    medium = part.get(part["type"])
    words = transcribe(medium) if transcribe and isinstance(medium, Medium) and medium.audio is not None else ""
    return SAID.format(kind=part["type"], words=words) if words else GONE.format(kind=part["type"])


def question(medium: Medium) -> list[dict[str, Any]]:
    """A conversation that asks for the words of a medium's audio; of a video its pictures are left out."""
    assert isinstance(medium.segment, P.Audio | P.AudioVideo)
    heard = Medium(P.Audio(medium.segment.tokens), audio=medium.audio)
    asked = QUESTION.format(language="")
    return [{"role": "user", "content": [{"type": "audio", "audio": heard}, {"type": "text", "text": asked}]}]


def plain(content: Any) -> Any:
    """A message's content without arrays: media as they were given, or a note for those that came in live."""
    return content if isinstance(content, str) else [_plain_part(part) for part in content]


def _plain_part(part: Mapping[str, Any]) -> dict[str, Any]:
    medium = part.get(part["type"])
    if not isinstance(medium, Medium):
        return dict(part)
    if medium.item is not None:
        return dict(medium.item)
    return {"type": "text", "text": LIVE.format(kind=part["type"])}
