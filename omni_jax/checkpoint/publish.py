"""Making a whole random checkpoint in the published layout, for tests, demos and measurements at true sizes."""

from __future__ import annotations

import hashlib
import json
import math
import pathlib
from collections.abc import Iterator

import ml_dtypes
import numpy as np

from omni_jax.checkpoint import keys, tokenizer_files
from omni_jax.checkpoint.convert import building
from omni_jax.checkpoint.safetensors_io import BLOCK, CheckpointError, write_checkpoint
from omni_jax.checkpoint.speakers import SPEAKERS_FILE, write_speakers
from omni_jax.config import OmniConfig, to_dict
from omni_jax.model.parameters import inv_freq
from omni_jax.model.voice import Voice
from omni_jax.progress import progress_bar

REFERENCE_FRAMES = (310, 257)  # of the two voices' reference mels: about three seconds
HEAD_STD = 3.0  # of the logits: argmax is no tie, and sampling still chooses among several tokens


def deviation(name: str, shape: tuple[int, ...], cfg: OmniConfig) -> tuple[float, float]:
    """Mean and standard deviation of a random tensor, such that signals keep about unit size through every part."""
    if name.endswith(".bias"):
        return 0.0, 0.05
    if name.endswith((".act.alpha", ".act.beta")):
        return 0.0, 0.3  # logarithms of the snake's two factors
    if len(shape) == 1:
        return 1.0, 0.2
    if "embed_tokens" in name or "codec_embed" in name or "audio_bos_eos_token" in name:
        return 0.0, 1.0
    fan_in = math.prod(shape[1:])
    if name.endswith(("lm_head.weight", "codec_head.weight")):
        return 0.0, HEAD_STD / math.sqrt(fan_in)
    if ".ups." in name and cfg.token2wav is not None:
        # A transposed convolution, (in, out, kernel): each output sees kernel / rate taps of every input channel.
        rate = cfg.token2wav.bigvgan.upsample_rates[int(name.split(".ups.")[1].split(".")[0])]
        return 0.0, 1 / math.sqrt(shape[0] * shape[2] / rate)
    # The vocoder's residual blocks add up, and its last layer must not clip.
    gain = 0.3 if ".resblocks." in name else 0.1 if "conv_post" in name else 1.0
    return 0.0, gain / math.sqrt(fan_in)


def random_voices(cfg: OmniConfig, seed: int) -> dict[str, Voice]:
    """Two voices under the published names, with random vectors and log-mels of a plausible size."""
    assert cfg.token2wav is not None
    dit, voices = cfg.token2wav.dit, {}
    for (name, bos_token), frames in zip(tokenizer_files.voice_token_ids(cfg).items(), REFERENCE_FRAMES, strict=True):
        rng = np.random.Generator(np.random.SFC64(np.random.SeedSequence([seed, *name.encode()])))
        cond = rng.standard_normal(dit.enc_emb_dim, np.float32)
        mel = rng.standard_normal((frames, dit.mel_dim), np.float32) * np.float32(2) - np.float32(5)
        voices[name] = Voice(name, bos_token, cond, mel)
    return voices


def random_blocks(
    name: str, shape: tuple[int, ...], dtype: np.dtype, cfg: OmniConfig, seed: int
) -> Iterator[np.ndarray]:
    """The values of one random tensor, in slices of about 32 MiB; they depend on the seed and the name only."""
    if name == keys.INV_FREQ:
        assert cfg.token2wav is not None
        exact = inv_freq(cfg.token2wav.dit)
        yield exact.astype(ml_dtypes.bfloat16).astype(dtype)  # the published files hold it rounded, too
        return
    digest = np.frombuffer(hashlib.sha256(name.encode()).digest(), np.uint32)
    rng = np.random.Generator(np.random.SFC64(np.random.SeedSequence([seed, *digest.tolist()])))
    mean, std = deviation(name, shape, cfg)
    left = math.prod(shape)
    if name == keys.CODEC_HEAD and cfg.talker is not None and cfg.token2wav is not None:
        # A trained Talker never draws an id that Token2Wav has no embedding for; a logit of 0 keeps these unlikely.
        values = rng.standard_normal(left, np.float32).reshape(shape) * np.float32(std)
        ends = [cfg.talker.tts_codec_pad_token_id, cfg.talker.tts_codec_end_token_id]
        mute = np.arange(shape[0]) > cfg.token2wav.dit.num_embeds
        values[mute & ~np.isin(np.arange(shape[0]), ends)] = 0
        yield values.astype(dtype, copy=False).reshape(-1)
        return
    while left:
        n = min(left, BLOCK // 4)
        values = rng.standard_normal(n, np.float32)
        values *= np.float32(std)
        values += np.float32(mean)
        if len(shape) == 1 and mean:  # norms: no outliers, and never through zero
            np.clip(values, 1 - 2.5 * std, 1 + 2.5 * std, out=values)
        yield values.astype(dtype, copy=False)
        left -= n


def write_random(
    path: str | pathlib.Path,
    cfg: OmniConfig,
    *,
    seed: int = 0,
    dtype: str = "bfloat16",
    max_shard_bytes: int = 5_000_000_000,
    corpus: str | None = None,
    progress: bool = False,
) -> OmniConfig:
    """Makes a complete checkpoint folder in the published layout, with random weights. This is `omni-jax init`.

    It holds the safetensors files (sharded, with an index, beyond `max_shard_bytes`), `config.json`,
    `generation_config.json`, `preprocessor_config.json`, `chat_template.json`, the tokenizer's four files and,
    where the model speaks, two voices (`spk_dict.pt`). Everything is the same for the same arguments. Memory stays at
    one 32 MiB slice; the folder takes its name only when it is whole.

    The tokenizer is a small one made here (about 1,500 pieces), under the published names of the special tokens. In a
    vocabulary as large as the published one these have the published ids, but ordinary text gets other ids than
    Qwen's tokenizer would give: with random weights that makes no difference.

    Args:
      path: the folder to make; it must be absent or empty.
      cfg: a preset or any other configuration. Special-token ids that its vocabulary cannot hold are replaced.
      seed: of the weights.
      dtype: "bfloat16" or "float32", of Thinker and Talker; Token2Wav is float32 as published.
      max_shard_bytes: largest size of one shard's data.
      corpus: text that the tokenizer is trained on; the package's own where none is given.
      progress: show a bar on stderr.
    Returns:
      The configuration as written.
    Raises:
      CheckpointError: the folder holds files already, the disk is full, or another dtype.
      ConfigError: the vocabulary is too small.
    """
    if dtype not in ("bfloat16", "float32"):
        raise CheckpointError(f"dtype {dtype!r} is not supported; use bfloat16 or float32")
    cfg, texts = tokenizer_files.make_files(cfg, corpus)
    texts["config.json"] = json.dumps(to_dict(cfg) | {"torch_dtype": dtype}, indent=2) + "\n"
    types = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}
    tensors = {
        name: (types["float32" if keys.published_dtype(name) == "float32" else dtype], shape)
        for name, shape in keys.tensor_shapes(cfg).items()
    }
    total = sum(math.prod(shape) * t.itemsize for t, shape in tensors.values())
    with (
        building(pathlib.Path(path), total) as place,
        progress_bar("writing", total, progress, in_bytes=True) as advance,
    ):
        folder = pathlib.Path(place)
        for name, text in texts.items():
            (folder / name).write_text(text, "utf-8")
        if cfg.talker is not None and cfg.token2wav is not None:
            write_speakers(folder / SPEAKERS_FILE, random_voices(cfg, seed))

        def blocks(name: str) -> Iterator[np.ndarray]:
            kind, shape = tensors[name]
            for block in random_blocks(name, shape, kind, cfg, seed):
                yield block
                advance(block.nbytes)

        write_checkpoint(folder, tensors, blocks, max_shard_bytes)
    return cfg
