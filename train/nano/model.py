"""The checkpoint that the recipe begins with: nano's sizes, its own tokenizer, its two voices, its codec."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import numpy as np
from safetensors.numpy import load_file, save_file

from omni_jax.checkpoint.publish import write_random
from omni_jax.checkpoint.speakers import SPEAKERS_FILE, write_speakers
from omni_jax.config import (
    AudioConfig,
    BigVGANConfig,
    DecoderConfig,
    DiTConfig,
    OmniConfig,
    TalkerConfig,
    ThinkerConfig,
    Token2WavConfig,
    VisionConfig,
)  # fmt: skip
from omni_jax.model.voice import Voice
from omni_jax.processing.chat import SPEECH_SYSTEM_MESSAGE
from omni_jax.processing.codec import load_codec
from omni_jax.train.nano import words
from omni_jax.train.nano.pictures import SIDE
from omni_jax.train.nano.speech import CODES
from omni_jax.train.nano.voices import OWN

SEED = 7
REFERENCE_SECONDS = 3.0
LOUD = 6.0  # frames count as speech down to so much (natural log) below the loudest


def config() -> OmniConfig:
    """The sizes; special-token ids are replaced by the tokenizer's when the checkpoint is written."""
    text = DecoderConfig(
        vocab_size=1280, hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=48, mrope_section=(8, 8, 8), max_position_embeddings=32768,
    )  # fmt: skip
    vision = VisionConfig(
        depth=4,
        hidden_size=128,
        intermediate_size=320,
        num_heads=4,
        out_hidden_size=192,
        fullatt_block_indexes=(1, 3),
        window_size=SIDE,
    )
    audio = AudioConfig(encoder_layers=4, encoder_attention_heads=4, encoder_ffn_dim=640, d_model=160, output_dim=192)
    decoder = dataclasses.replace(
        text, vocab_size=CODES + 16, num_hidden_layers=5,
    )  # fmt: skip
    talker = TalkerConfig(
        decoder=decoder, embedding_size=192, tts_codec_pad_token_id=CODES + 2, tts_codec_start_token_id=CODES + 3,
        tts_codec_end_token_id=CODES + 4, tts_codec_mask_token_id=CODES + 6,
    )  # fmt: skip
    dit = DiTConfig(
        hidden_size=128, num_hidden_layers=5, num_attention_heads=4, head_dim=32, emb_dim=64, num_embeds=CODES,
        look_ahead_layers=(2,), look_backward_layers=(0, 4), mel_dim=80, enc_emb_dim=160, enc_dim=32,
        enc_channels=(48, 48, 48, 48, 144), enc_attention_channels=24, enc_se_channels=24,
    )  # fmt: skip
    bigvgan = BigVGANConfig(
        upsample_initial_channel=256, resblock_kernel_sizes=(3,), resblock_dilation_sizes=((1, 3, 5),)
    )
    return OmniConfig(ThinkerConfig(text=text, vision=vision, audio=audio), talker, Token2WavConfig(dit, bigvgan))


def speaker_vector(mels: list[np.ndarray]) -> np.ndarray:
    """float32 [2 × bands]: mean and deviation of each band over the frames that are speech, of unit length each.

    Args:
      mels: natural-log frames [L, bands] of one speaker's recordings.
    """
    frames = np.concatenate([m[m.max(1) >= m.max() - LOUD] for m in mels])
    parts = frames.mean(0) - frames.mean(), frames.std(0)
    return np.concatenate([p / np.linalg.norm(p) for p in parts]).astype(np.float32)


def own_voices(folder: pathlib.Path, token_ids: dict[str, int]) -> dict[str, Voice]:
    """The two voices from the training recordings: speaker vectors of all, and one as the reference."""
    records = [json.loads(line) for line in (folder / "own-train.jsonl").read_text().splitlines()]
    voices = {}
    for name in OWN:
        mels = [np.load(folder / r["mel"]).astype(np.float32) for r in records if r["voice"] == name]
        longest = next(m for m in mels if len(m) >= REFERENCE_SECONDS * 100)
        reference = longest[: int(REFERENCE_SECONDS * 100)]
        voices[name] = Voice(name, token_ids[name], speaker_vector(mels), reference)
    return voices


def corpus() -> str:
    """What the tokenizer is trained on: nano's vocabulary in sentences, and what surrounds them in conversations."""
    around = ["system\nYou are a helpful assistant.", f"system\n{SPEECH_SYSTEM_MESSAGE}", "user\n", "assistant\n"]
    lines = [*words.sentences("train", 4000, SEED), *(100 * around)]
    return "\n".join(line for text in lines for line in (text, f"{text[:1].upper()}{text[1:]}."))


def for_training(name: str, values: np.ndarray, layers: int) -> np.ndarray:
    """Random weights of tests as weights to learn from: no biases, plain norms, small residual branches and heads."""
    part, _, last = name.rpartition(".")
    if name.startswith("token2wav."):
        return values
    if last == "bias":
        return np.zeros_like(values)
    if values.ndim == 1:
        return np.ones_like(values)
    if part.endswith(("o_proj", "down_proj", "out_proj", "fc2", "attn.proj")):
        return (values / np.sqrt(2 * layers)).astype(values.dtype)
    return (values * 0.1).astype(values.dtype) if part.endswith(("lm_head", "codec_head")) else values


def write_base(data: pathlib.Path, path: pathlib.Path) -> None:
    """Writes the untrained checkpoint into a new folder. The same for the same recordings."""
    from omni_jax.checkpoint.tokenizer_files import voice_token_ids

    cfg = write_random(path, config(), seed=SEED, dtype="float32", corpus=corpus())
    file = path / "model.safetensors"
    layers = cfg.thinker.text.num_hidden_layers
    save_file({k: for_training(k, v, layers) for k, v in load_file(file).items()}, file, {"format": "pt"})
    write_speakers(path / SPEAKERS_FILE, own_voices(data, voice_token_ids(cfg)))
    load_codec(data).save(path)
