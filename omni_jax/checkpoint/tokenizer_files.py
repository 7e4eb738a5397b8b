"""The tokenizer and processor files of a made checkpoint: a small Qwen-like byte-level BPE under the Omni names.

By default the tokenizer is trained on a text that the package carries (`corpus.txt`), so it is the same everywhere. Its
special tokens have the published ids where the vocabulary reaches that far, else ids at the end of the vocabulary.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
from typing import Any

from omni_jax.config import ConfigError, OmniConfig
from omni_jax.processing.chat import built_in_template
from omni_jax.processing.tokenizer import SPLIT

FIRST_SPECIAL = 151643
# The named tokens of the published tokenizer in the order of their ids, and whether they count as special.
SPECIAL = {
    "<|endoftext|>": True, "<|im_start|>": True, "<|im_end|>": True, "<|AUDIO|>": True, "<|audio_bos|>": True,
    "<|audio_eos|>": True, "<|box_end|>": True, "<|quad_start|>": True, "<|quad_end|>": True, "<|vision_bos|>": True,
    "<|vision_eos|>": True, "<|vision_pad|>": True, "<|IMAGE|>": True, "<|VIDEO|>": True, "<tool_call>": False,
    "</tool_call>": False, "<|fim_prefix|>": False, "<|fim_middle|>": False, "<|fim_suffix|>": False,
    "<|fim_pad|>": False, "<|repo_name|>": False, "<|file_sep|>": False,
}  # fmt: skip
# Ids without a string that a small vocabulary keeps free at its end: the Talker's text marks and the voices.
NAMELESS = 16
MAX_PIECES = 1536  # the corpus gives no more useful ones


def special_ids(vocab_size: int) -> dict[str, int]:
    """The ids of the named special tokens in a vocabulary of this size."""
    full = vocab_size >= FIRST_SPECIAL + len(SPECIAL)
    first = FIRST_SPECIAL if full else vocab_size - NAMELESS - len(SPECIAL)
    return {name: first + i for i, name in enumerate(SPECIAL)}


def voice_token_ids(cfg: OmniConfig) -> dict[str, int]:
    """The Thinker-vocabulary ids that stand for the two published voices in a made checkpoint (`spk_dict.pt`)."""
    if cfg.thinker.text.vocab_size > 151872:
        return {"Chelsie": 151872, "Ethan": 151870}
    return {"Chelsie": cfg.thinker.text.vocab_size - 1, "Ethan": cfg.thinker.text.vocab_size - 3}


def _train(pieces: int, corpus: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A byte-level BPE of at most `pieces` pieces: vocabulary and merges."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT), "isolated"), bytes_only])
    trainer = trainers.BpeTrainer(
        vocab_size=pieces,
        min_frequency=1,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(corpus.splitlines(keepends=True), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def _tokenizer_json(vocab: dict[str, int], merges: list[tuple[str, str]], special: dict[str, int]) -> str:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT), "isolated"), bytes_only])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    raw = json.loads(tokenizer.to_str())
    # Only tokens that the model's vocabulary holds may have ids with a gap before them; they are put in here, since
    # the library warns of each missing id when it writes such a vocabulary (it reads them in silence).
    raw["model"]["vocab"] = vocab | special
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    raw["added_tokens"] = [{"id": i, "content": n, **flags, "special": SPECIAL[n]} for n, i in special.items()]
    return json.dumps(raw, indent=1, ensure_ascii=False)


def _processor_files(cfg: OmniConfig) -> dict[str, dict[str, Any]]:
    vision, audio = cfg.thinker.vision, cfg.thinker.audio
    processor = {
        "processor_class": "Qwen2_5OmniProcessor",
        "feature_extractor_type": "WhisperFeatureExtractor",
        "image_processor_type": "Qwen2VLImageProcessor",
        "feature_size": audio.num_mel_bins,
        "sampling_rate": 16000,
        "hop_length": 160,
        "n_fft": 400,
        "chunk_length": 300,
        "n_samples": 300 * 16000,
        "nb_max_frames": 30000,
        "dither": 0.0,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": True,
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    return {"preprocessor_config.json": processor, "chat_template.json": {"chat_template": built_in_template()}}


def make_files(cfg: OmniConfig, corpus: str | None = None) -> tuple[OmniConfig, dict[str, str]]:
    """Trains the tokenizer for a configuration and writes out the small files beside the weights.

    Args:
      cfg: any configuration; its special-token ids are replaced by the tokenizer's.
      corpus: text that the tokenizer is trained on; the package's own where none is given.
    Returns:
      The configuration with those ids (and eos, pad), and file name → text: `tokenizer.json`, `vocab.json`,
      `merges.txt`, `tokenizer_config.json`, `preprocessor_config.json`, `chat_template.json`,
      `generation_config.json`. `config.json` is the caller's.
    Raises:
      ConfigError: the vocabulary is too small for the bytes and the special tokens.
    """
    size = cfg.thinker.text.vocab_size
    special = special_ids(size)
    pieces = min(MAX_PIECES, special["<|endoftext|>"])
    if pieces < 256 + 16:
        need = 256 + 16 + len(SPECIAL) + NAMELESS
        raise ConfigError(f"a vocabulary of {size} is too small for a byte-level tokenizer; it needs {need}")
    if corpus is None:
        corpus = (importlib.resources.files("omni_jax.checkpoint") / "corpus.txt").read_text("utf-8")
    vocab, merges = _train(pieces, corpus)
    user = 872 if len(vocab) > 872 and size > FIRST_SPECIAL else vocab.get("user", 0)
    by_id = {i: piece for piece, i in vocab.items()}
    if "user" in vocab and vocab["user"] != user:  # ids carry no meaning in a BPE: exchange two
        vocab[by_id[user]], vocab["user"] = vocab["user"], user
    vocab = dict(sorted(vocab.items(), key=lambda item: item[1]))

    full = special["<|endoftext|>"] == FIRST_SPECIAL
    first_nameless = special["<|file_sep|>"] + 1
    thinker = dataclasses.replace(
        cfg.thinker,
        audio_token_id=special["<|AUDIO|>"],
        image_token_id=special["<|IMAGE|>"],
        video_token_id=special["<|VIDEO|>"],
        audio_start_token_id=special["<|audio_bos|>"],
        audio_end_token_id=special["<|audio_eos|>"],
        vision_start_token_id=special["<|vision_bos|>"],
        vision_end_token_id=special["<|vision_eos|>"],
        user_token_id=user,
        eos_token_id=(special["<|im_end|>"],),
        pad_token_id=special["<|endoftext|>"],
    )
    talker = cfg.talker
    if talker is not None and not full:
        talker = dataclasses.replace(
            talker,
            tts_text_pad_token_id=first_nameless,
            tts_text_start_token_id=first_nameless + 1,
            tts_text_end_token_id=first_nameless + 2,
        )
    names = {
        "image_token": "<|IMAGE|>", "audio_token": "<|AUDIO|>", "video_token": "<|VIDEO|>",
        "vision_bos_token": "<|vision_bos|>", "vision_eos_token": "<|vision_eos|>",
        "audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>",
    }  # fmt: skip
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    tokenizer_config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "processor_class": "Qwen2_5OmniProcessor",
        "add_prefix_space": False,
        "add_bos_token": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "errors": "replace",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": False,
        "model_max_length": cfg.thinker.text.max_position_embeddings,
        "additional_special_tokens": [name for name, is_special in SPECIAL.items() if is_special],
        "extra_special_tokens": names,
        "added_tokens_decoder": {
            str(i): {"content": name, "special": SPECIAL[name], **flags} for name, i in special.items()
        },
        "chat_template": built_in_template(),
        **names,
    }
    generation = {
        "bos_token_id": special["<|im_start|>"],
        "eos_token_id": [special["<|im_end|>"], special["<|endoftext|>"]],
        "pad_token_id": special["<|endoftext|>"],
    }
    objects = _processor_files(cfg) | {"tokenizer_config.json": tokenizer_config, "generation_config.json": generation}
    texts = {name: json.dumps(value, indent=2, ensure_ascii=False) + "\n" for name, value in objects.items()}
    texts["tokenizer.json"] = _tokenizer_json(vocab, merges, special)
    texts["vocab.json"] = json.dumps(vocab, ensure_ascii=False)
    texts["merges.txt"] = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges)
    return dataclasses.replace(cfg, thinker=thinker, talker=talker), texts
