"""Byte-level BPE: equal to `tokenizers` itself, from either set of files, and streamed without broken characters."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tokenizers
from transformers import Qwen2TokenizerFast

from omni_jax.processing.tokenizer import BYTES, Detokenizer, Tokenizer, TokenizerError
from tests.tokenizer import SPECIALS, trained, write_tokenizer

TEXTS = [
    "", " ", "Hello, world!", "it's   12345 ducks\n\n  and  more\t", "Привет, мир",
    "naïve café — 你好，世界 🙂👩‍👩‍👧‍👦",
    "e\u0301 becomes é", "\u0000\u0007", "a" * 300, "DON'T I'LL we've", "code: def f(x):\r\n    return x**2",
    "<|im_start|>user\nhi<|im_end|>\n", "<tool_call>{}", "<|im_end", "<<|im_end|>>",
]  # fmt: skip


@pytest.fixture(scope="module", params=["tokenizer.json", "vocab and merges"])
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, parts=request.param != "tokenizer.json")
    return Tokenizer.from_folder(folder)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_equal_the_oracle_s(tokenizer, text):
    oracle = Qwen2TokenizerFast(tokenizer_object=tokenizers.Tokenizer.from_str(trained()))
    assert tokenizer.encode(text, controls=True) == oracle(text)["input_ids"]


def test_text_from_outside_makes_no_special_token(tokenizer):
    for text in (*TEXTS, "<|IMAGE|><|AUDIO|><|vision_bos|>" * 3, *SPECIALS):
        ids = tokenizer.encode(text)
        assert not set(ids) & set(tokenizer.controls.values())
        assert tokenizer.decode(ids) == text.replace("e\u0301", "é")


def test_names_and_ids(tokenizer):
    assert set(tokenizer.controls) == set(SPECIALS)
    for name, token in tokenizer.controls.items():
        assert tokenizer.id(name) == token
        assert tokenizer.name(token) == name
    assert tokenizer.size == max(tokenizer.controls.values()) + 2
    with pytest.raises(TokenizerError, match="no token '<nope>'"):
        tokenizer.id("<nope>")


def test_decoding_equals_the_oracle_s(tokenizer):
    backend = tokenizers.Tokenizer.from_str(trained())
    rng = np.random.default_rng(0)
    for _ in range(300):
        ids = rng.integers(0, backend.get_vocab_size() - 1, rng.integers(1, 30)).tolist()
        for skip in (True, False):
            assert tokenizer.decode(ids, skip_controls=skip) == backend.decode(ids, skip_special_tokens=skip)


def test_streaming_never_emits_half_a_character(tokenizer):
    text = "naïve 🙂👩‍👩‍👧‍👦 你好，世界 end"
    ids = tokenizer.encode(text)
    assert len(ids) > len(text)  # this small vocabulary cuts most of these characters into bytes
    stream = Detokenizer(tokenizer)
    pieces = [stream.push(i) for i in ids]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) + stream.finish() == text
    cut = Detokenizer(tokenizer)
    assert cut.push(tokenizer.encode("🙂")[0]) == ""
    assert cut.finish() == "\ufffd"


def test_controls_that_the_files_do_not_mark(tmp_path):
    raw = json.loads(trained())
    token = next(t for t in raw["added_tokens"] if t["content"] == "<|IMAGE|>")
    token["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    assert token["id"] in Tokenizer.from_folder(tmp_path).encode("<|IMAGE|>")
    marked = Tokenizer.from_folder(tmp_path, [token["id"]])
    assert marked.controls["<|IMAGE|>"] == token["id"]
    assert token["id"] not in marked.encode("<|IMAGE|>")
    assert marked.encode("a<|IMAGE|>", controls=True)[-1] == token["id"]


def test_ids_that_are_not_in_use(tokenizer):
    """Models have spare rows in their embedding; a sampled one has no text."""
    assert tokenizer.decode([tokenizer.size + 5]) == ""
    with pytest.raises(TokenizerError, match="-1 is negative"):
        tokenizer.decode([-1])


def test_byte_alphabet_equals_the_oracle_s():
    assert set(BYTES) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    assert sorted(BYTES.values()) == list(range(256))


def test_added_tokens_file(tmp_path):
    """Without `tokenizer_config.json` the older `added_tokens.json` names them."""
    write_tokenizer(tmp_path, parts=True)
    (tmp_path / "tokenizer_config.json").unlink()
    raw = json.loads(trained())
    (tmp_path / "added_tokens.json").write_text(json.dumps({t["content"]: t["id"] for t in raw["added_tokens"]}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("<|im_end|>", controls=True) == [tokenizer.id("<|im_end|>")]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", "{", "tokenizer.json cannot be read"),
        ("vocab.json", "{", "vocab.json cannot be read as JSON"),
        ("vocab.json", '{"a": 0}', "merges.txt does not fit vocab.json"),
        ("vocab.json", None, "neither tokenizer.json nor vocab.json"),
        ("merges.txt", None, "neither tokenizer.json nor merges.txt"),
        ("tokenizer_config.json", "[", "tokenizer_config.json cannot be read as JSON"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"99999": {"content": "<x>", "special": true}}}',
            "should be 99999",
        ),
    ],
)
def test_broken_files(file, content, message, tmp_path):
    write_tokenizer(tmp_path, parts=True)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_text(content)
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_folder(tmp_path)
