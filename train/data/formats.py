"""Records as other trainers write them, to ours: `{"messages": [...]}`, for preferences with `chosen` and `rejected`.

Each form has one function. What a function does not know stays in the record, where the check refuses it by name.
Sources: the data documentation of LLaMA-Factory (ShareGPT, Alpaca), ms-swift and TRL.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from omni_jax.train.data.lines import DataError

Form = Literal["auto", "messages", "sharegpt", "alpaca", "swift", "trl"]
Record = dict[str, Any]

_MEDIA = {"image": "images", "video": "videos", "audio": "audios"}
_SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
    "bot": "assistant", "chatgpt": "assistant", "system": "system", "observation": "tool", "tool": "tool",
    "function_call": "assistant",
}  # fmt: skip


def detect(record: Mapping[str, Any]) -> Form:
    """The form of a record, by its keys; ours where no other fits."""
    if "conversations" in record:
        return "sharegpt"
    if "instruction" in record:
        return "alpaca"
    if "prompt" in record or ("messages" not in record and isinstance(record.get("chosen"), list)):
        return "trl"
    if {"query", "response", "rejected_response", *_MEDIA.values()} & set(record):
        return "swift"
    return "messages"


def canonical(record: Record, form: Form = "auto") -> Record:
    """A record in our form; one that is in it already comes back as it is.

    Raises:
      DataError: a record that is not of its form; the message says what is missing.
    """
    chosen = detect(record) if form == "auto" else form
    return record if chosen == "messages" else _READERS[chosen](dict(record))


def sharegpt(record: Record) -> Record:
    """`{"conversations": [{"from": "human", "value": …}, …]}`, perhaps `system`, media lists, `chosen`, `rejected`."""
    turns = _list(record, "conversations")
    messages = [_turn(turn, f"turn {i}") for i, turn in enumerate(turns)]
    for key in ("chosen", "rejected"):
        if isinstance(record.get(key), dict):
            record[key] = _turn(record[key], key)["content"]
    return _placed(record, _system(record) + messages)


def alpaca(record: Record) -> Record:
    """`{"instruction": …, "input": …, "output": …}`, perhaps `system`, `history`, media lists, `chosen`, `rejected`."""
    asked = "\n".join(filter(None, (_text(record, "instruction"), _text(record, "input", ""))))
    messages = [*_system(record), *_history(record), {"role": "user", "content": asked}]
    if "output" in record:
        output = _text(record, "output")
        if output or "chosen" not in record:
            messages.append({"role": "assistant", "content": output})
    return _placed(record, messages)


def swift(record: Record) -> Record:
    """`{"messages": […], "images": […]}` with `<image>` in the text, or `query`, `response`, `history`; perhaps
    `rejected_response`."""
    if "messages" in record:
        messages = list(_list(record, "messages"))
    else:
        messages = [*_history(record), {"role": "user", "content": _text(record, "query")}]
        messages.append({"role": "assistant", "content": _text(record, "response")})
    messages = _system(record) + messages
    if "rejected_response" in record:
        record["rejected"] = _text(record, "rejected_response")
        if not messages or not isinstance(messages[-1], dict) or messages[-1].get("role") != "assistant":
            raise DataError("it has a rejected_response, but its last message is not the assistant's; add that")
        record["chosen"] = messages.pop()["content"]
    return _placed(record, messages)


def trl(record: Record) -> Record:
    """`prompt` with `completion`, or with `chosen` and `rejected`: texts or lists of messages; `prompt` may be in the
    lists themselves."""
    prompt = record.pop("prompt", None)
    messages = _messages(prompt, "user", "prompt") if prompt is not None else []
    if "completion" in record:
        return _placed(record, messages + _messages(record.pop("completion"), "assistant", "completion"))
    if "chosen" not in record or "rejected" not in record:
        raise DataError("it has neither completion nor chosen and rejected beside prompt; add what is to be learned")
    sides = {key: _messages(record[key], "assistant", key) for key in ("chosen", "rejected")}
    if prompt is None:
        shared = 0
        while shared < min(map(len, sides.values())) - 1 and sides["chosen"][shared] == sides["rejected"][shared]:
            shared += 1
        messages, sides = sides["chosen"][:shared], {key: side[shared:] for key, side in sides.items()}
    for key, side in sides.items():
        if len(side) != 1 or side[0].get("role") != "assistant":
            raise DataError(
                f"{key} must be one message of the assistant after what both sides share; it has {len(side)}"
            )
        record[key] = side[0].get("content")
    return _placed(record, messages)


_READERS: dict[str, Callable[[Record], Record]] = {"sharegpt": sharegpt, "alpaca": alpaca, "swift": swift, "trl": trl}


def _list(record: Record, key: str) -> list[Any]:
    value = record.pop(key, None)
    if not isinstance(value, list):
        raise DataError(f"its {key} are {type(value).__name__}; give a list")
    return value


_REQUIRED = "\0"


def _text(record: Record, key: str, default: str = _REQUIRED) -> str:
    value = record.pop(key, default)
    if value is None and default != _REQUIRED:
        return default
    if not isinstance(value, str) or value == _REQUIRED:
        raise DataError(
            f"it lacks {key}" if value == _REQUIRED else f"its {key} is {type(value).__name__}; give a string"
        )
    return value


def _system(record: Record) -> list[dict[str, Any]]:
    text = _text(record, "system", "")
    return [{"role": "system", "content": text}] if text else []


def _history(record: Record) -> list[dict[str, Any]]:
    """Earlier turns as pairs of question and answer."""
    history, out = record.pop("history", None) or [], []
    for pair in history:
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError("its history must be a list of pairs: [question, answer]")
        out += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return out


def _turn(turn: Any, where: str) -> dict[str, Any]:
    """A turn of ShareGPT as a message; further keys, such as a weight, stay."""
    if not isinstance(turn, dict):
        raise DataError(f'{where} is {type(turn).__name__}; give {{"from": …, "value": …}}')
    rest = {k: v for k, v in turn.items() if k not in ("from", "value", "role", "content")}
    speaker, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if not isinstance(speaker, str) or speaker not in _SPEAKERS:
        raise DataError(f"{where} is from {speaker!r}; known are {', '.join(_SPEAKERS)}")
    if speaker == "function_call" and isinstance(text, str):
        text = f"<tool_call>\n{text}\n</tool_call>"
    return {"role": _SPEAKERS[speaker], "content": text} | rest


def _messages(given: Any, role: str, key: str) -> list[dict[str, Any]]:
    """Messages of a text of a role, or of a list of messages."""
    if isinstance(given, str):
        return [{"role": role, "content": given}]
    if not isinstance(given, list) or not all(isinstance(m, dict) for m in given):
        raise DataError(f"its {key} is neither a text nor a list of messages; make it one")
    return list(given)


def _placed(record: Record, messages: Sequence[Any]) -> Record:
    """The record with media of `images`, `videos` and `audios` put where its messages have their marks: `<image>` in a
    text, or an item `{"type": "image"}`. Where there is no mark of a kind, they precede the first user message."""
    given = {kind: _list(record, key) for kind, key in _MEDIA.items() if record.get(key) is not None}
    for key in _MEDIA.values():
        record.pop(key, None)
    left = {kind: [_source(item, kind) for item in items] for kind, items in given.items()}
    marked: set[str] = set()
    out = []
    for message in messages:
        if isinstance(message, dict) and given:
            message = message | {"content": _filled(message.get("content"), left, marked)}
        out.append(message)
    for kind, items in left.items():
        if items and kind in marked:
            raise DataError(f"it has {len(given[kind])} {_MEDIA[kind]} and fewer <{kind}> marks; give as many marks")
        if items:
            place = next((i for i, m in enumerate(out) if isinstance(m, dict) and m.get("role") == "user"), None)
            if place is None:
                raise DataError(f"it has {_MEDIA[kind]}, but no message of the user to put them in")
            content = out[place]["content"]
            text = [{"type": "text", "text": content}] if isinstance(content, str) else list(content or [])
            out[place] = out[place] | {"content": items + text}
    return record | {"messages": out}


def _source(item: Any, kind: str) -> dict[str, Any]:
    if isinstance(item, dict):
        item = next((item[k] for k in ("path", "url", kind) if item.get(k)), None)
    return {"type": kind, kind: item}


def _filled(content: Any, left: dict[str, list[Any]], marked: set[str]) -> Any:
    """A message's content with the next media in place of its marks."""

    def take(kind: str) -> Any:
        marked.add(kind)
        if not left[kind]:
            raise DataError(f"it has more <{kind}> marks than {_MEDIA[kind]}; give as many")
        return left[kind].pop(0)

    def pieces(text: str) -> list[Any]:
        out: list[Any] = []
        for piece in re.split("(" + "|".join(f"<{kind}>" for kind in left) + ")", text):
            if piece[1:-1] in left and piece == f"<{piece[1:-1]}>":
                out.append(take(piece[1:-1]))
            elif piece:
                out.append({"type": "text", "text": piece})
        return out

    if isinstance(content, str):
        made = pieces(content)
        return content if all(p["type"] == "text" for p in made) else made
    out = []
    for item in content if isinstance(content, list) else []:
        kind = item.get("type") if isinstance(item, dict) else None
        if kind in left and not any(item.get(k) for k in (kind, "url", "path")):
            out.append(take(kind))
        elif kind == "text" and isinstance(item.get("text"), str):
            out += pieces(item["text"])
        else:
            out.append(item)
    return out if isinstance(content, list) else content
