"""What a line of a batch job asks for: a list of messages, an object with them, or a request of OpenAI's form."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from omni_jax.infer.batch import openai
from omni_jax.infer.batch.records import JobError, Line
from omni_jax.settings import GenerationSettings, SpeechSettings, change

KEYS = ("messages", "id", "tools", "settings", "voice")
_FORM = f"it must be a list of messages, or an object with messages and perhaps {', '.join(KEYS[1:])}"


@dataclass(frozen=True)
class Ask:
    """A line as it was understood.

    Attributes:
      messages, tools: the conversation.
      settings, speech: how it is answered; speech is None for text alone.
      openai: the model's name in the response, where the line is in OpenAI's form; else None.
    """

    messages: Any
    settings: GenerationSettings
    speech: SpeechSettings | None
    tools: Any = None
    openai: str | None = None


@dataclass
class Reading:
    """What is known of a line so far, for the record of a line that cannot be read.

    Attributes:
      named: `id` or `custom_id`, which the record repeats.
    """

    named: dict[str, Any] = field(default_factory=dict)

    def read(self, line: Line, settings: GenerationSettings, speech: SpeechSettings | None) -> Ask:
        """Reads a line.

        Args:
          settings, speech: those of the job, which the line may change.
        Raises:
          InputError: it is no request, or has settings that are unknown or out of range.
        """
        data = _object(line)
        self.named = {key: data[key] for key in ("id", "custom_id") if data.get(key) is not None}
        name = None
        if openai.is_request(data):
            name = str((data["body"] if isinstance(data["body"], Mapping) else {}).get("model") or "")
            data = openai.read_request(data)
            if data.pop("speaks") and speech is None:
                raise JobError("it asks for audio, but the job has no --speech")
        if not isinstance(data.get("messages"), list) or set(data) - set(KEYS):
            raise JobError(_FORM)
        changes = data.get("settings", {})
        if not isinstance(changes, dict):
            raise JobError(f"its settings are {type(changes).__name__}; make them an object")
        if "voice" in data:
            if speech is None:
                raise JobError("it names a voice, but the job has no --speech")
            speech = dataclasses.replace(speech, voice=data["voice"])
        return Ask(data["messages"], change(settings, changes), speech, data.get("tools"), name)


def _object(line: Line) -> dict[str, Any]:
    """A line as an object: a list of messages stands for `{"messages": …}`. Raises JobError where it is neither."""
    try:
        data = json.loads(line.read())
    except (ValueError, RecursionError) as e:
        if isinstance(e, JobError):
            raise
        raise JobError(f"it is not JSON ({e})") from None
    if isinstance(data, list):
        data = {"messages": data}
    if not isinstance(data, dict):
        raise JobError(_FORM)
    return data
