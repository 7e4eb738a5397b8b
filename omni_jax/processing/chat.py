"""Conversations: the Hugging Face and OpenAI forms read into one, and the chat template that writes the prompt."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import pathlib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

from omni_jax.errors import InputError, warn
from omni_jax.files import read_json
from omni_jax.processing.media import MediaError, decode_base64, local_path
from omni_jax.processing.options import Kind, check_option

ROLES = ("system", "user", "assistant", "tool")
# Of a message, beside role and content: what chat templates read of calls of tools and their results.
TOOL_KEYS = ("tool_calls", "tool_call_id", "name")
# The system message under which the model was trained to speak; speech is only right under exactly this one.
SPEECH_SYSTEM_MESSAGE = (
    "You are Qwen, a virtual human developed by the Qwen Team, Alibaba Group, capable of perceiving auditory and "
    "visual inputs, as well as generating text and speech."
)

# Content type → kind, and the keys under which its source may stand.
_TYPES: dict[str, tuple[Kind, tuple[str, ...]]] = {
    "text": ("text", ("text",)),
    "image": ("image", ("image", "url", "path")),
    "audio": ("audio", ("audio", "url", "path")),
    "video": ("video", ("video", "url", "path")),
    "image_url": ("image", ("image_url",)),
    "audio_url": ("audio", ("audio_url",)),
    "video_url": ("video", ("video_url",)),
    "input_audio": ("audio", ("input_audio",)),
}


class ConversationError(InputError):
    """A conversation that cannot be read; the one-line message names the message's index and the remedy."""


@dataclass(frozen=True)
class Part:
    """One piece of a message: a text, or a medium with its `source` and the options given beside it."""

    kind: Kind
    source: Any
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Message:
    """What one side says.

    Attributes:
      role: one of ROLES.
      parts: its content.
      plain: whether the content was a string: templates may tell the two apart.
      calls: those of TOOL_KEYS that it has.
    """

    role: str
    parts: tuple[Part, ...]
    plain: bool = False
    calls: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """Its texts, joined."""
        return "".join(p.source for p in self.parts if p.kind == "text")


def with_system_message(conversation: tuple[Message, ...], *, speech: bool) -> tuple[Message, ...]:
    """The one rule for system messages, of the command, Python, batch jobs, training and servers.

    A conversation's own system message stays. Without one, a conversation that is to be spoken, or that speech is
    trained on, gets the published one, SPEECH_SYSTEM_MESSAGE. In any other, the chat template decides; the published
    template writes "You are a helpful assistant.". An InputWarning says where speech has another one.
    """
    if not speech:
        return conversation
    if conversation[0].role != "system":
        return (Message("system", (Part("text", SPEECH_SYSTEM_MESSAGE),), plain=True), *conversation)
    if conversation[0].text.strip() != SPEECH_SYSTEM_MESSAGE:
        warn(
            "speech degrades under another system message than the one that the model was trained to speak under; "
            "leave the system message out, and put instructions into the user's first message"
        )
    return conversation


def _source(value: Any, key: str, where: str) -> Any:
    """The source in a content item; OpenAI's forms wrap it in an object."""
    if key in ("image_url", "audio_url", "video_url") and isinstance(value, Mapping):
        value = value.get("url")
    elif key == "input_audio":
        if not isinstance(value, Mapping) or not isinstance(value.get("data"), str | bytes):
            raise ConversationError(f'{where}: input_audio must be {{"data": base64, "format": …}}')
        data = value["data"]
        if isinstance(data, bytes) or data.startswith("data:"):
            return data
        try:
            return decode_base64(data, f"{where}: input_audio.data")
        except MediaError as e:
            raise ConversationError(str(e)) from None
    if value is None or (isinstance(value, str | bytes | list | tuple) and not value):
        raise ConversationError(f"{where}: {key} is empty; give a path, URL or bytes")
    return value


def _text(value: Any, where: str) -> Part:
    if not isinstance(value, str):
        raise ConversationError(f"{where}: text is {type(value).__name__}; give a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ConversationError(f"{where}: the text holds half of a surrogate pair; give valid Unicode") from None
    return Part("text", value)


def _part(item: Any, where: str) -> Part:
    if isinstance(item, str):
        return _text(item, where)
    if not isinstance(item, Mapping):
        raise ConversationError(f'{where} is {type(item).__name__}; give {{"type": "text", "text": …}} or the like')
    kind_name = item.get("type")
    if kind_name is None:  # some writers leave the type out
        kind_name = next((name for name in _TYPES if name in item), None)
    if not isinstance(kind_name, str) or kind_name not in _TYPES:
        raise ConversationError(f"{where} has type {kind_name!r}; known are {', '.join(_TYPES)}")
    kind, keys = _TYPES[kind_name]
    key = next((k for k in keys if k in item), None)
    if key is None:
        raise ConversationError(f"{where} of type {kind_name!r} lacks {keys[0]!r}")
    if kind == "text":
        return _text(item[key], where)
    options = {k: v for k, v in item.items() if k not in ("type", key) and v is not None}
    try:
        for name, value in options.items():
            check_option(name, value, where, kind)
    except InputError as e:
        raise ConversationError(str(e)) from None
    return Part(kind, _source(item[key], key, where), options)


def parse_conversation(messages: Any) -> tuple[Message, ...]:
    """Reads a conversation.

    Args:
      messages: a result of this function, which comes back as it is, or
        `[{"role": …, "content": str | [item, …]}, …]` with items in the Hugging Face form (`{"type": "image", "image":
        source, **options}`; also audio, video, text) or OpenAI's (`image_url`, `input_audio`, `audio_url`,
        `video_url`). Sources: see `media.fetch`.
    Raises:
      ConversationError: empty, an unknown role, type or option; the message says which message and item.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise ConversationError(f"a conversation is a list of messages, not {type(messages).__name__}; make it one")
    if messages and all(isinstance(m, Message) for m in messages):
        return tuple(messages)
    if not messages:
        raise ConversationError("the conversation is empty; give at least one message")
    out = []
    for i, message in enumerate(messages):
        where = f"message {i}"
        if not isinstance(message, Mapping):
            raise ConversationError(f'{where} is {type(message).__name__}; give {{"role": …, "content": …}}')
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ConversationError(f"{where} has role {role!r}; known are {', '.join(ROLES)}")
        calls = _calls(message, where)
        if content is None and "tool_calls" in calls:
            content = ""
        if isinstance(content, str):
            parts: tuple[Part, ...] = (_text(content, where),)
        elif isinstance(content, list | tuple):
            parts = tuple(_part(item, f"{where}, content item {j}") for j, item in enumerate(content))
        else:
            raise ConversationError(f"{where} has content of {type(content).__name__}; give a string or a list")
        if role == "user" and not any(p.kind != "text" or p.source for p in parts):
            raise ConversationError(f"{where} ({role}) has no content; give it a text or a medium, or leave it out")
        out.append(Message(role, parts, isinstance(content, str), calls))
    return tuple(out)


def _calls(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a message says of tools. Arguments that are JSON text, as OpenAI has them, become objects: templates write
    them as JSON."""
    calls = {key: message[key] for key in TOOL_KEYS if message.get(key)}
    given = calls.get("tool_calls")
    if given is None:
        return calls
    if not isinstance(given, list | tuple) or not all(isinstance(call, Mapping) for call in given):
        raise ConversationError(f"{where}: tool_calls must be a list of objects")
    calls["tool_calls"] = [_with_arguments(call, where) for call in given]
    return calls


def _with_arguments(call: Mapping[str, Any], where: str) -> dict[str, Any]:
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _with_arguments(call["function"], where)}
    if not isinstance(call.get("arguments"), str):
        return dict(call)
    try:
        return {**call, "arguments": json.loads(call["arguments"] or "{}")}
    except (ValueError, RecursionError) as e:
        raise ConversationError(f"{where}: the arguments of a tool call are not JSON ({e})") from None


def resolve(messages: Sequence[Message], folder: pathlib.Path) -> tuple[Message, ...]:
    """The conversation with relative paths of its media, those of a list of frames too, taken from a folder."""

    def one(source: Any) -> Any:
        if isinstance(source, list | tuple):
            return [one(frame) for frame in source]
        path = local_path(source)
        return source if path is None else str(folder / path)

    def part(p: Part) -> Part:
        return p if p.kind == "text" else dataclasses.replace(p, source=one(p.source))

    return tuple(dataclasses.replace(m, parts=tuple(part(p) for p in m.parts)) for m in messages)


def read_template(folder: str | pathlib.Path) -> str:
    """The chat template of a checkpoint: `chat_template.jinja`, `chat_template.json` or the one in
    `tokenizer_config.json`; else the built-in one, which writes the published format.

    Raises:
      ConversationError: a broken file.
    """
    folder = pathlib.Path(folder)
    file = folder / "chat_template.jinja"
    try:
        if file.exists():
            return file.read_text("utf-8")
        for file in (folder / "chat_template.json", folder / "tokenizer_config.json"):
            found = read_json(file, ConversationError).get("chat_template") if file.exists() else None
            if isinstance(found, list):  # several by name
                found = {t["name"]: t["template"] for t in found}.get("default")
            if isinstance(found, str):
                return found
    except ConversationError:
        raise
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as e:
        raise ConversationError(f"{file}: the chat template cannot be read ({e}); fetch the file again") from None
    return built_in_template()


def built_in_template() -> str:
    """The chat template of the published checkpoints, in our own arrangement: the same prompts."""
    return (pathlib.Path(__file__).parent / "chat_template.jinja").read_text("utf-8")


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    """Templates come from the network: the sandbox keeps them from Python's internals and from changing arguments."""
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    env.filters["tojson"] = lambda x, **kw: json.dumps(x, ensure_ascii=False, **kw)
    env.globals |= {"raise_exception": _refuse, "strftime_now": _now}
    return env.from_string(template)


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """Plain data with each of its strings changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_map_strings(k, change): _map_strings(v, change) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_map_strings(v, change) for v in value]
    return value


def has_place_for(template: str, name: str) -> bool:
    """Whether a chat template writes `tools`, or `tool_calls`."""
    return re.search(rf"\b{name}\b", template) is not None


def _check_tools(messages: Sequence[Message], tools: Any, template: str) -> None:
    """Raises ConversationError where the template would leave out what the conversation says of tools."""
    if tools is not None and not (isinstance(tools, list | tuple) and all(isinstance(t, Mapping) for t in tools)):
        raise ConversationError("tools must be a list of objects, as chat completion requests have them")
    called = any("tool_calls" in m.calls for m in messages)
    for name, wanted in (("tools", bool(tools)), ("tool_calls", called)):
        if wanted and not has_place_for(template, name):
            raise ConversationError(
                f"the chat template of this checkpoint has no place for {name}; write them into the messages' text"
            )


def render(
    messages: Sequence[Message],
    template: str,
    *,
    tools: Any = None,
    add_generation_prompt: bool = True,
    controls: Collection[str] = (),
) -> tuple[str, str]:
    """Writes the prompt's text.

    Names of special tokens in the messages' own text must not act as such, not even when the template joins them from
    two texts. So a mark, a character that the conversation does not use, follows each character of a text that could
    begin a name: a name without the mark comes from the template.

    Args:
      template: Jinja source, as `transformers` takes it.
      tools: that the model may call: JSON objects for the template.
      add_generation_prompt: end with the opening of the assistant's turn.
      controls: names of special tokens.
    Returns:
      The text, and the mark to remove from it.
    Raises:
      ConversationError: the template fails.
    """
    _check_tools(messages, tools, template)
    texts = [m.text for m in messages]
    _map_strings([tools, *(m.calls for m in messages)], lambda text: texts.append(text) or text)  # type: ignore[func-returns-value]
    first = {name[0] for name in controls}
    # Private-use characters; one of them is free unless a text uses all 6,400.
    used = set().union(*texts) | set(template)
    mark = next((c for c in map(chr, range(0xE000, 0xF900)) if c not in used), None)
    if mark is None:
        raise ConversationError("the conversation uses every private-use character of Unicode; remove some")

    def guard(text: str) -> str:
        return "".join([c + mark if c in first else c for c in text])

    plain = []
    for message in messages:
        items = [
            {"type": "text", "text": guard(p.source)} if p.kind == "text" else {"type": p.kind, p.kind: p.kind}
            for p in message.parts
        ]
        content = items[0]["text"] if message.plain else items
        plain.append({"role": message.role, "content": content} | _map_strings(message.calls, guard))
    given = {} if tools is None else {"tools": _map_strings(tools, guard)}
    try:
        text = _compiled(template).render(messages=plain, add_generation_prompt=add_generation_prompt, **given)
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, ArithmeticError, RecursionError) as e:
        raise ConversationError(f"the chat template fails ({e}); see whether it fits this conversation") from None
    return text, mark
