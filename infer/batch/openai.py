"""Lines in the form of OpenAI's batch files: requests with a `custom_id` and a `body`, and the responses to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omni_jax.errors import unknown_name
from omni_jax.events import Reply
from omni_jax.infer.batch.records import JobError

URL = "/v1/chat/completions"
KEYS = ("custom_id", "method", "url", "body")
# Fields of a body → our settings.
SETTINGS = {
    "max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens", "temperature": "temperature",
    "top_p": "top_p", "top_k": "top_k", "min_p": "min_p", "repetition_penalty": "repetition_penalty", "seed": "seed",
    "stop": "stop", "stop_token_ids": "stop_ids",
}  # fmt: skip
# Fields that change nothing where they have one of these values (None: any value).
NEUTRAL: dict[str, tuple[Any, ...] | None] = {
    "model": None, "user": None, "metadata": None, "store": None, "service_tier": None, "safety_identifier": None,
    "prompt_cache_key": None, "stream": (False,), "n": (1,),
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "response_format": ({"type": "text"},),
    "tool_choice": ("auto",), "parallel_tool_calls": None,
}  # fmt: skip
OTHERS = ("messages", "tools", "logprobs", "top_logprobs", "modalities", "audio")


class FieldError(JobError):
    """A field of a body that cannot be used; `param` is its name."""

    def __init__(self, param: str, message: str):
        super().__init__(message)
        self.param = param


def is_request(data: Mapping[str, Any]) -> bool:
    """Whether a line is in this form."""
    return "body" in data


def read_request(data: Mapping[str, Any]) -> dict[str, Any]:
    """A line of OpenAI's form as one of ours: `messages`, `tools`, `settings` and `voice`.

    What it asks for and this model does not do is refused, and not left out in silence.

    Raises:
      JobError: it is no request for a chat completion, or asks for something else.
    """
    body = data["body"]
    if set(data) - set(KEYS) or not isinstance(body, Mapping):
        raise JobError(f"it must be an object with {', '.join(KEYS)}, of which body is an object")
    if data.get("method", "POST") != "POST" or data.get("url", URL) != URL:
        raise JobError(f"it asks for {data.get('method', 'POST')} {data.get('url', URL)}; only POST {URL} is answered")
    return read_body(body)


def read_body(body: Mapping[str, Any], others: Mapping[str, tuple[Any, ...] | None] = {}) -> dict[str, Any]:
    """The body of a request for a chat completion: `messages`, `tools`, `settings`, `speaks` and `voice`.

    Args:
      others: further fields that the caller reads itself, with the values that may stand in them (None: any).
    Raises:
      FieldError: it asks for something that this model does not do.
    """
    neutral = {**NEUTRAL, **others}
    known = (*SETTINGS, *neutral, *OTHERS)
    for name, value in body.items():
        if name not in known:
            raise FieldError(name, unknown_name("field of body", name, known))
        allowed = neutral.get(name)
        if allowed is not None and value is not None and value not in allowed:
            raise FieldError(name, f"its {name} is {str(value)[:80]}, which is not supported; leave it out")
    out: dict[str, Any] = {"messages": body.get("messages"), "tools": body.get("tools")}
    out["settings"] = {SETTINGS[n]: v for n, v in body.items() if n in SETTINGS and v is not None}
    if not isinstance(body.get("logprobs"), bool | None):
        raise FieldError("logprobs", f"its logprobs is {str(body['logprobs'])[:80]}; give true or false")
    if body.get("logprobs"):
        out["settings"]["logprobs"] = 0 if body.get("top_logprobs") is None else body["top_logprobs"]
    modalities = ["text"] if body.get("modalities") is None else body["modalities"]
    audio = {} if body.get("audio") is None else body["audio"]
    if modalities not in (["text"], ["text", "audio"], ["audio", "text"]):
        raise FieldError("modalities", f"its modalities are {str(modalities)[:80]}; give text, or text and audio")
    if not isinstance(audio, Mapping):
        raise FieldError("audio", f"its audio is {str(audio)[:80]}; give an object with voice and format")
    out["speaks"] = "audio" in modalities
    if out["speaks"] and audio.get("voice") is not None:
        out["voice"] = audio["voice"]
    return out


def response(model: str, reply: Reply, tokens: Any) -> dict[str, Any]:
    """The `response` of a record: a chat completion.

    Args:
      model: its name.
      tokens: text of an id, for log-probabilities.
    """
    choice: dict[str, Any] = {
        "index": 0,
        "message": {"role": "assistant", "content": reply.text},
        "finish_reason": finish_reason(reply),
        "logprobs": logprobs(reply, tokens),
    }
    made = len(reply.token_ids)
    usage = {
        "prompt_tokens": reply.prompt_tokens, "completion_tokens": made, "total_tokens": reply.prompt_tokens + made,
    }  # fmt: skip
    body = {"object": "chat.completion", "model": model, "choices": [choice], "usage": usage}
    return {"status_code": 200, "body": body}


def finish_reason(reply: Reply) -> str:
    """Why it ended, in OpenAI's words."""
    return "stop" if reply.finish_reason in ("eos", "stop") else "length"


def logprobs(reply: Reply, tokens: Any) -> dict[str, Any] | None:
    """The log-probabilities of a choice; None where they were not asked for. `tokens`: text of an id."""
    if reply.logprobs is None:
        return None
    return {
        "content": [
            {
                "token": tokens(t.id),
                "logprob": t.logprob,
                "top_logprobs": [{"token": tokens(i), "logprob": p} for i, p in t.top],
            }
            for t in reply.logprobs
        ]
    }
