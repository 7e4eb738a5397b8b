"""Every parameter of the model, declared once: published name, shape, logical axes, initialiser.

The keys of the nested trees are the published names split on "."; the equal layers of a stack share one entry, whose
leading axis is "layers". What else must know about parameters is derived: the Linen modules take theirs from here, and
so do `init`, the key table of checkpoints, shardings, the memory model and the targets of LoRA.

Nothing here imports jax. Source: the state dicts of `Qwen2_5OmniForConditionalGeneration` and
`Qwen2_5OmniThinkerForConditionalGeneration` in transformers 4.57.6.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

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
)
from omni_jax.model.declare import Declared, ParamSpec, Path, conv, dense, norm, stacked, table, vector, weight
from omni_jax.settings import Quantize

PARTS = ("thinker", "talker", "token2wav")
# The containers whose equal layers are stacked: in published names a layer number follows them.
STACKS = (
    "thinker.model.layers",
    "thinker.visual.blocks",
    "thinker.audio_tower.layers",
    "talker.model.layers",
    "token2wav.code2wav_dit_model.transformer_blocks",
)
# Where the matrices lie that each mode of `quantize` stores as int8.
_LAYERS = ("thinker.model.layers", "talker.model.layers")
_HEADS = ("thinker.lm_head", "talker.codec_head")
QUANTIZED: Mapping[Quantize, tuple[str, ...]] = {
    "int8": _LAYERS,
    "int8-head": _LAYERS + _HEADS,
    "int8-all": ("thinker", "talker"),
}
# Where the matrices lie that `speech_dtype` covers; all else of Token2Wav is float32.
_SPEECH = (STACKS[-1], "token2wav.code2wav_bigvgan_model")
# Shifts, scales and gates of one layer of the DiT: for attention, then for the feed-forward part.
DIT_MODULATIONS = 6


def gated_mlp(size: int, hidden: int, *, bias: bool = False) -> Declared:
    """Of `layers.GatedMLP`."""
    return {
        "gate_proj": dense(hidden, size, ("mlp", "embed"), bias=bias),
        "up_proj": dense(hidden, size, ("mlp", "embed"), bias=bias),
        "down_proj": dense(size, hidden, ("embed", "mlp"), bias=bias),
    }


def decoder_layer(cfg: DecoderConfig) -> Declared:
    """Of one layer of Thinker or Talker."""
    d, queries, keys = cfg.hidden_size, cfg.num_attention_heads * cfg.head_dim, cfg.num_key_value_heads * cfg.head_dim
    return {
        "self_attn": {
            "q_proj": dense(queries, d, ("heads", "embed")),
            "k_proj": dense(keys, d, ("kv_heads", "embed")),
            "v_proj": dense(keys, d, ("kv_heads", "embed")),
            "o_proj": dense(d, queries, ("embed", "heads"), bias=False),
        },
        "mlp": gated_mlp(d, cfg.intermediate_size),
        "input_layernorm": norm(d),
        "post_attention_layernorm": norm(d),
    }


def decoder(cfg: DecoderConfig) -> Declared:
    """Of `decoder.Decoder`."""
    return {"layers": stacked(decoder_layer(cfg), cfg.num_hidden_layers), "norm": norm(cfg.hidden_size)}


def vision_block(cfg: VisionConfig) -> Declared:
    """Of one layer of the vision tower."""
    d = cfg.hidden_size
    return {
        "norm1": norm(d),
        "norm2": norm(d),
        "attn": {
            "q": dense(d, d, ("heads", "embed")),
            "k": dense(d, d, ("heads", "embed")),
            "v": dense(d, d, ("heads", "embed")),
            "proj": dense(d, d, ("embed", "heads")),
        },
        "mlp": gated_mlp(d, cfg.intermediate_size, bias=True),
    }


def vision(cfg: VisionConfig) -> Declared:
    """Of `vision.VisionTower`."""
    d, merged = cfg.hidden_size, cfg.hidden_size * cfg.spatial_merge_size**2
    patch = (cfg.in_channels, cfg.temporal_patch_size, cfg.patch_size, cfg.patch_size)
    return {
        "patch_embed": {"proj": {"weight": weight(d, *patch, axes=("embed", None, None, None, None))}},
        "blocks": stacked(vision_block(cfg), cfg.depth),
        "merger": {
            "ln_q": norm(d),
            "mlp": {
                "0": dense(merged, merged, ("mlp", "embed")),
                "2": dense(cfg.out_hidden_size, merged, ("embed", "mlp")),
            },
        },
    }


def audio_layer(cfg: AudioConfig) -> Declared:
    """Of one layer of the audio tower."""
    d, ff = cfg.d_model, cfg.encoder_ffn_dim
    return {
        "self_attn": {
            "k_proj": dense(d, d, ("heads", "embed"), bias=False),
            "v_proj": dense(d, d, ("heads", "embed")),
            "q_proj": dense(d, d, ("heads", "embed")),
            "out_proj": dense(d, d, ("embed", "heads")),
        },
        "self_attn_layer_norm": norm(d, bias=True),
        "fc1": dense(ff, d, ("mlp", "embed")),
        "fc2": dense(d, ff, ("embed", "mlp")),
        "final_layer_norm": norm(d, bias=True),
    }


def audio(cfg: AudioConfig) -> Declared:
    """Of `audio.AudioTower`."""
    d = cfg.d_model
    return {
        "conv1": conv(d, cfg.num_mel_bins, 3, ("mlp", None)),
        "conv2": conv(d, d, 3, ("embed", "mlp")),
        "audio_bos_eos_token": table(2, cfg.output_dim, (None, "embed")),  # carried: the reference never reads it
        "layers": stacked(audio_layer(cfg), cfg.encoder_layers),
        "ln_post": norm(d, bias=True),
        "proj": dense(cfg.output_dim, d, (None, "embed")),
    }


def thinker(cfg: ThinkerConfig) -> Declared:
    """Of the Thinker with its towers; a head that is tied to the embedding is not a parameter."""
    text = cfg.text
    tree: Declared = {
        "model": {"embed_tokens": table(text.vocab_size, text.hidden_size, (None, "table")), **decoder(text)},
        "visual": vision(cfg.vision),
        "audio_tower": audio(cfg.audio),
    }
    if not text.tie_word_embeddings:
        tree["lm_head"] = dense(text.vocab_size, text.hidden_size, ("vocab", "embed"), bias=False)
    return tree


def talker(cfg: TalkerConfig) -> Declared:
    """Of the Talker."""
    d = cfg.decoder
    return {
        "thinker_to_talker_proj": dense(d.hidden_size, cfg.embedding_size, ("embed", None)),
        "model": {"embed_tokens": table(d.vocab_size, cfg.embedding_size, (None, "table")), **decoder(d)},
        "codec_head": dense(d.vocab_size, d.hidden_size, ("vocab", "embed"), bias=False),
    }


def ecapa(cfg: DiTConfig) -> Declared:
    """Of the speaker encoder inside the DiT."""
    channels, widths, scale = cfg.enc_channels, cfg.enc_kernel_sizes, cfg.enc_res2net_scale
    blocks: Declared = {"0": {"conv": conv(channels[0], cfg.mel_dim, widths[0])}}
    for i in range(1, len(channels) - 1):
        out, part = channels[i], channels[i] // scale
        blocks[str(i)] = {
            "tdnn1": {"conv": conv(out, channels[i - 1], 1)},
            "res2net_block": {"blocks": {str(j): {"conv": conv(part, part, widths[i])} for j in range(scale - 1)}},
            "tdnn2": {"conv": conv(out, out, 1)},
            "se_block": {"conv1": conv(cfg.enc_se_channels, out, 1), "conv2": conv(out, cfg.enc_se_channels, 1)},
        }
    last, attention = channels[-1], cfg.enc_attention_channels
    return {
        "blocks": blocks,
        "mfa": {"conv": conv(last, last, widths[-1])},
        "asp": {"tdnn": {"conv": conv(attention, 3 * last, 1)}, "conv": conv(last, attention, 1)},
        "fc": conv(cfg.enc_dim, 2 * last, 1),
    }


def inv_freq(cfg: DiTConfig) -> np.ndarray:
    """The rotary frequencies of the DiT by the formula, float32 [head_dim / 2]."""
    return 1.0 / cfg.rope_theta ** (np.arange(0, cfg.head_dim, 2, dtype=np.float32) / cfg.head_dim)


def dit(cfg: DiTConfig) -> Declared:
    """Of the DiT."""
    d, inner, ff = cfg.hidden_size, cfg.num_attention_heads * cfg.head_dim, cfg.hidden_size * cfg.ff_mult
    layer = {
        "attn_norm": {"linear": dense(DIT_MODULATIONS * d, d, ("mlp", "embed"))},
        "attn": {
            "to_q": dense(inner, d, ("heads", "embed")),
            "to_k": dense(inner, d, ("heads", "embed")),
            "to_v": dense(inner, d, ("heads", "embed")),
            "to_out": {"0": dense(d, inner, ("embed", "heads"))},
        },
        "ff": {"ff": {"0": dense(ff, d, ("mlp", "embed")), "3": dense(d, ff, ("embed", "mlp"))}},
    }
    into = cfg.mel_dim + cfg.enc_dim + cfg.emb_dim + cfg.enc_emb_dim
    return {
        "time_embed": {"time_mlp": {"0": dense(d, cfg.time_freq_dim), "2": dense(d, d)}},
        "text_embed": {"codec_embed": table(cfg.num_embeds + 1, cfg.emb_dim, ("vocab", None))},
        "input_embed": {"proj": dense(d, into), "spk_encoder": ecapa(cfg)},
        # Stored, not computed: the published values are rounded to bf16, and the model was trained with those.
        "rotary_embed": {"inv_freq": vector(cfg.head_dim // 2, init=lambda key, shape: inv_freq(cfg))},
        "transformer_blocks": stacked(layer, cfg.num_hidden_layers),
        "norm_out": {"linear": dense(2 * d, d)},
        "proj_out": dense(cfg.mel_dim, d),
    }


def _snake(channels: int) -> Declared:
    return {"act": {"alpha": vector(channels), "beta": vector(channels)}}


def bigvgan(cfg: BigVGANConfig) -> Declared:
    """Of BigVGAN."""
    channels = cfg.upsample_initial_channel
    ups: Declared = {}
    blocks: Declared = {}
    for i, width in enumerate(cfg.upsample_kernel_sizes):
        # A transposed convolution stores (in, out, width).
        ups[str(i)] = {"0": {"weight": weight(channels, channels // 2, width), "bias": vector(channels // 2)}}
        channels //= 2
        for size, dilations in zip(cfg.resblock_kernel_sizes, cfg.resblock_dilation_sizes, strict=True):
            convs = {str(j): conv(channels, channels, size) for j in range(len(dilations))}
            activations = {str(j): _snake(channels) for j in range(2 * len(dilations))}
            blocks[str(len(blocks))] = {"convs1": convs, "convs2": convs, "activations": activations}
    return {
        "conv_pre": conv(cfg.upsample_initial_channel, cfg.mel_dim, 7),
        "ups": ups,
        "resblocks": blocks,
        "activation_post": _snake(channels),
        "conv_post": {"weight": weight(1, channels, 7)},
    }


def token2wav(cfg: Token2WavConfig) -> Declared:
    """Of Token2Wav: the DiT with its speaker encoder, and BigVGAN."""
    return {"code2wav_dit_model": dit(cfg.dit), "code2wav_bigvgan_model": bigvgan(cfg.bigvgan)}


@functools.lru_cache(maxsize=32)
def param_specs(cfg: OmniConfig, parts: tuple[str, ...] = PARTS) -> dict[str, Any]:
    """`{part: tree of ParamSpec}` of those parts that the configuration has. Equal calls share the trees: only read."""
    declare = {"thinker": thinker, "talker": talker, "token2wav": token2wav}
    return {p: declare[p](getattr(cfg, p)) for p in parts if getattr(cfg, p) is not None}  # type: ignore[operator]


def is_quantized(path: Path, spec: ParamSpec, mode: Quantize | None) -> bool:
    """Whether a mode of `quantize` stores the parameter at a path as int8: only what `layers.dense` multiplies by."""
    name = ".".join(path)
    return mode is not None and spec.matmul and any(name.startswith(f"{place}.") for place in QUANTIZED[mode])


def has_speech_dtype(path: Path) -> bool:
    """Whether the parameter at a path has the `speech_dtype`: the weights of the DiT's layers and of BigVGAN."""
    name = ".".join(path)
    return path[-1] == "weight" and any(name.startswith(f"{place}.") for place in _SPEECH)


def stack_of(path: tuple[str, ...]) -> int | None:
    """How many leading components of a path name its stack; None outside stacks."""
    for stack in STACKS:
        head = tuple(stack.split("."))
        if path[: len(head)] == head:
            return len(head)
    return None
