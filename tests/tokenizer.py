"""A small byte-level BPE in the published layout, trained on the spot, and the configuration that fits it."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from omni_jax import config as C
from omni_jax.processing.tokenizer import SPLIT, Tokenizer
from tests.tiny import tiny_config

SPECIALS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>", "<|vision_bos|>",
    "<|vision_eos|>", "<|vision_pad|>", "<|IMAGE|>", "<|VIDEO|>", "<tts_pad>", "<tts_text_bos>", "<tts_text_eod>",
]  # fmt: skip
CORPUS = [
    "system\nYou are a helpful assistant. You are Qwen, a virtual human, capable of perceiving auditory and visual",
    "user\nWhat is in this picture, and what do you hear? Describe the clip in one sentence, please.",
    "assistant\nA cat looks at the camera while a voice counts from one to ten. Привет, мир! 你好，世界。 café 🙂",
] * 3


@functools.lru_cache
def trained() -> str:
    """A `tokenizer.json` of Qwen2's kind: NFC, its split pattern, 256 bytes and some merges, special tokens last."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=420, initial_alphabet=sorted(alphabet), show_progress=False)
    )
    backend.add_special_tokens(SPECIALS)
    backend.add_tokens(["<tool_call>"])
    return backend.to_str()


def write_tokenizer(folder: pathlib.Path, *, parts: bool = False) -> None:
    """Writes `tokenizer.json`, or with `parts` the older `vocab.json`, `merges.txt`, `tokenizer_config.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    if not parts:
        (folder / "tokenizer.json").write_text(trained(), "utf-8")
        return
    raw = json.loads(trained())
    (folder / "vocab.json").write_text(json.dumps(raw["model"]["vocab"]), "utf-8")
    merges = [" ".join(m) if isinstance(m, list) else m for m in raw["model"]["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", "utf-8")
    added = {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in raw["added_tokens"]}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}), "utf-8")


def config_with_tokenizer() -> C.OmniConfig:
    """The tiny configuration with the ids of the trained tokenizer."""
    backend = tokenizers.Tokenizer.from_str(trained())
    cfg = tiny_config()
    names = {
        "audio_token_id": "<|AUDIO|>", "image_token_id": "<|IMAGE|>", "video_token_id": "<|VIDEO|>",
        "audio_start_token_id": "<|audio_bos|>", "audio_end_token_id": "<|audio_eos|>",
        "vision_start_token_id": "<|vision_bos|>", "vision_end_token_id": "<|vision_eos|>",
    }  # fmt: skip
    ids = {field: backend.token_to_id(name) for field, name in names.items()}
    return dataclasses.replace(cfg, thinker=dataclasses.replace(cfg.thinker, **ids))


@functools.lru_cache
def small_tokenizer() -> Tokenizer:
    """The trained tokenizer as the library reads it."""
    return Tokenizer(tokenizers.Tokenizer.from_str(trained()))
