"""From ids to text: stop strings across tokens, half characters, and the order of reasons to end."""

from __future__ import annotations

import pytest

from omni_jax.events import TokenLogprob
from omni_jax.runtime.reply import ReplyBuilder
from omni_jax.settings import GenerationSettings
from tests.tokenizer import small_tokenizer


def feed(text_ids, settings, room=10_000, eos=()):
    builder = ReplyBuilder(small_tokenizer(), settings, eos, room)
    pieces = []
    for i in text_ids:
        if builder.finish_reason:
            break
        pieces.append(builder.feed(TokenLogprob(i, 0.0)))
    return builder, pieces


def bytes_of(text: str) -> list[int]:
    """One id per byte, so that every cut is possible."""
    tokenizer = small_tokenizer()
    ids = {tokenizer.token_bytes(i): i for i in range(tokenizer.size)}
    return [ids[bytes([b])] for b in text.encode()]


@pytest.mark.parametrize("stop", ["STOP", "S", "TOP!", "é"])
def test_stop_strings_across_ids(stop):
    text = "abSTO café STOP! more"
    builder, pieces = feed(bytes_of(text), GenerationSettings(stop=("unseen", stop)))
    assert builder.finish_reason == "stop"
    assert builder.text == "".join(pieces) == text[: text.index(stop)]


def test_held_text_is_released():
    """What looked like the beginning of a stop string comes out when it turns out otherwise, and at the end."""
    builder, pieces = feed(bytes_of("aSTaSTO"), GenerationSettings(stop=("STOP",), max_new_tokens=7))
    assert pieces == ["a", "", "", "STa", "", "", "STO"]
    assert (builder.text, builder.finish_reason) == ("aSTaSTO", "length")


def test_no_half_characters():
    _, pieces = feed(bytes_of("é🙂x"), GenerationSettings())
    assert pieces == ["", "é", "", "", "", "🙂", "x"]
    cut, _ = feed(bytes_of("é🙂")[:-1], GenerationSettings(max_new_tokens=5))
    assert cut.text == "é\N{REPLACEMENT CHARACTER}"


def test_reasons():
    a, b = bytes_of("ab")
    assert feed([a, b], GenerationSettings(), eos=(b,))[0].finish_reason == "eos"
    assert feed([a, b], GenerationSettings(stop_ids=(b,)))[0].finish_reason == "stop"
    assert feed([a, b], GenerationSettings(max_new_tokens=2))[0].finish_reason == "length"
    assert feed([a, b], GenerationSettings(max_new_tokens=3), room=2)[0].finish_reason == "context"
    assert feed([a, b], GenerationSettings(max_new_tokens=2), eos=(b,))[0].finish_reason == "eos"
    builder, _ = feed([a, b], GenerationSettings(max_new_tokens=9), room=7)
    assert builder.left == 5
