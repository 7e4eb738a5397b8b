"""The key table: every tensor of a published checkpoint, by name, shape and place in the parameter tree.

The tree is the published names split on ".", with the layer number of the stacked containers lifted to a leading
axis: `thinker.model.layers.7.self_attn.q_proj.weight` is row 7 of
`params["thinker"]["model"]["layers"]["self_attn"]["q_proj"]["weight"]`.

Source: the state dicts of `Qwen2_5OmniForConditionalGeneration` and
`Qwen2_5OmniThinkerForConditionalGeneration` in transformers 4.57.6.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from omni_jax.config import (
    AudioConfig,
    BigVGANConfig,
    DecoderConfig,
    DiTConfig,
    OmniConfig,
    TalkerConfig,
    ThinkerConfig,
    VisionConfig,
)

Shape = tuple[int, ...]
Shapes = dict[str, Shape]
Path = tuple[str, ...]
Layout = Literal["published", "transformers5"]

PARTS = ("thinker", "talker", "token2wav")

# The containers whose equal layers are stacked.
STACKS = (
    "thinker.model.layers",
    "thinker.visual.blocks",
    "thinker.audio_tower.layers",
    "talker.model.layers",
    "token2wav.code2wav_dit_model.transformer_blocks",
)

# A buffer, not a weight: some writers leave it out, and then the formula holds.
INV_FREQ = "token2wav.code2wav_dit_model.rotary_embed.inv_freq"
LM_HEAD = "thinker.lm_head.weight"
CODEC_HEAD = "talker.codec_head.weight"

# Prefixes as transformers 5 writes them, and as published.
_TRANSFORMERS5 = (
    ("thinker.model.language_model.", "thinker.model."),
    ("thinker.model.visual.", "thinker.visual."),
    ("thinker.model.audio_tower.", "thinker.audio_tower."),
)


def _linear(name: str, *shape: int, bias: bool = True) -> Shapes:
    """A weight (out, in) or, for convolutions, (out, in, kernel...); and a bias (out)."""
    out: Shapes = {f"{name}.weight": shape}
    return out | {f"{name}.bias": shape[:1]} if bias else out


def _norm(name: str, size: int, *, bias: bool = False) -> Shapes:
    return _linear(name, size, bias=bias)


def _repeat(prefix: str, count: int, layer: Shapes) -> Shapes:
    return {f"{prefix}.{i}.{name}": shape for i in range(count) for name, shape in layer.items()}


def _decoder(prefix: str, c: DecoderConfig, embedding: int) -> Shapes:
    queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    layer = (
        _linear("self_attn.q_proj", queries, c.hidden_size)
        | _linear("self_attn.k_proj", keys, c.hidden_size)
        | _linear("self_attn.v_proj", keys, c.hidden_size)
        | _linear("self_attn.o_proj", c.hidden_size, queries, bias=False)
        | _linear("mlp.gate_proj", c.intermediate_size, c.hidden_size, bias=False)
        | _linear("mlp.up_proj", c.intermediate_size, c.hidden_size, bias=False)
        | _linear("mlp.down_proj", c.hidden_size, c.intermediate_size, bias=False)
        | _norm("input_layernorm", c.hidden_size)
        | _norm("post_attention_layernorm", c.hidden_size)
    )
    return (
        {f"{prefix}.embed_tokens.weight": (c.vocab_size, embedding)}
        | _repeat(f"{prefix}.layers", c.num_hidden_layers, layer)
        | _norm(f"{prefix}.norm", c.hidden_size)
    )


def _vision(prefix: str, c: VisionConfig) -> Shapes:
    d, merged = c.hidden_size, c.hidden_size * c.spatial_merge_size**2
    block = _norm("norm1", d) | _norm("norm2", d)
    for name in ("q", "k", "v", "proj"):
        block |= _linear(f"attn.{name}", d, d)
    block |= _linear("mlp.gate_proj", c.intermediate_size, d) | _linear("mlp.up_proj", c.intermediate_size, d)
    block |= _linear("mlp.down_proj", d, c.intermediate_size)
    kernel = (c.temporal_patch_size, c.patch_size, c.patch_size)
    return (
        _linear(f"{prefix}.patch_embed.proj", d, c.in_channels, *kernel, bias=False)
        | _repeat(f"{prefix}.blocks", c.depth, block)
        | _norm(f"{prefix}.merger.ln_q", d)
        | _linear(f"{prefix}.merger.mlp.0", merged, merged)
        | _linear(f"{prefix}.merger.mlp.2", c.out_hidden_size, merged)
    )


def _audio(prefix: str, c: AudioConfig) -> Shapes:
    d = c.d_model
    layer = _linear("self_attn.k_proj", d, d, bias=False)
    for name in ("v_proj", "q_proj", "out_proj"):
        layer |= _linear(f"self_attn.{name}", d, d)
    layer |= _norm("self_attn_layer_norm", d, bias=True) | _norm("final_layer_norm", d, bias=True)
    layer |= _linear("fc1", c.encoder_ffn_dim, d) | _linear("fc2", d, c.encoder_ffn_dim)
    return (
        _linear(f"{prefix}.conv1", d, c.num_mel_bins, 3)
        | _linear(f"{prefix}.conv2", d, d, 3)
        | {f"{prefix}.audio_bos_eos_token.weight": (2, c.output_dim)}  # carried, though the reference never reads it
        | _repeat(f"{prefix}.layers", c.encoder_layers, layer)
        | _norm(f"{prefix}.ln_post", d, bias=True)
        | _linear(f"{prefix}.proj", c.output_dim, d)
    )


def _thinker(prefix: str, c: ThinkerConfig) -> Shapes:
    out = _decoder(f"{prefix}.model", c.text, c.text.hidden_size)
    out |= _vision(f"{prefix}.visual", c.vision) | _audio(f"{prefix}.audio_tower", c.audio)
    if not c.text.tie_word_embeddings:
        out[LM_HEAD] = (c.text.vocab_size, c.text.hidden_size)
    return out


def _talker(prefix: str, c: TalkerConfig) -> Shapes:
    d = c.decoder
    return (
        _linear(f"{prefix}.thinker_to_talker_proj", d.hidden_size, c.embedding_size)
        | _decoder(f"{prefix}.model", d, c.embedding_size)
        | _linear(f"{prefix}.codec_head", d.vocab_size, d.hidden_size, bias=False)
    )


def _ecapa(prefix: str, c: DiTConfig) -> Shapes:
    channels, kernels, last = c.enc_channels, c.enc_kernel_sizes, c.enc_channels[-1]
    out = _linear(f"{prefix}.blocks.0.conv", channels[0], c.mel_dim, kernels[0])
    for i in range(1, len(channels) - 1):
        block, width, part = f"{prefix}.blocks.{i}", channels[i], channels[i] // c.enc_res2net_scale
        out |= _linear(f"{block}.tdnn1.conv", width, channels[i - 1], 1) | _linear(
            f"{block}.tdnn2.conv", width, width, 1
        )
        for j in range(c.enc_res2net_scale - 1):
            out |= _linear(f"{block}.res2net_block.blocks.{j}.conv", part, part, kernels[i])
        out |= _linear(f"{block}.se_block.conv1", c.enc_se_channels, width, 1)
        out |= _linear(f"{block}.se_block.conv2", width, c.enc_se_channels, 1)
    return (
        out
        | _linear(f"{prefix}.mfa.conv", last, last, kernels[-1])
        | _linear(f"{prefix}.asp.tdnn.conv", c.enc_attention_channels, 3 * last, 1)
        | _linear(f"{prefix}.asp.conv", last, c.enc_attention_channels, 1)
        | _linear(f"{prefix}.fc", c.enc_dim, 2 * last, 1)
    )


def _dit(prefix: str, c: DiTConfig) -> Shapes:
    d, heads = c.hidden_size, c.num_attention_heads * c.head_dim
    block = _linear("attn_norm.linear", 6 * d, d)
    for name in ("to_q", "to_k", "to_v"):
        block |= _linear(f"attn.{name}", heads, d)
    block |= _linear("attn.to_out.0", d, heads)
    block |= _linear("ff.ff.0", c.ff_mult * d, d) | _linear("ff.ff.3", d, c.ff_mult * d)
    return (
        _linear(f"{prefix}.time_embed.time_mlp.0", d, c.time_freq_dim)
        | _linear(f"{prefix}.time_embed.time_mlp.2", d, d)
        | {f"{prefix}.text_embed.codec_embed.weight": (c.num_embeds + 1, c.emb_dim)}
        | _linear(f"{prefix}.input_embed.proj", d, c.mel_dim + c.enc_dim + c.enc_emb_dim + c.emb_dim)
        | _ecapa(f"{prefix}.input_embed.spk_encoder", c)
        | {f"{prefix}.rotary_embed.inv_freq": (c.head_dim // 2,)}
        | _repeat(f"{prefix}.transformer_blocks", c.num_hidden_layers, block)
        | _linear(f"{prefix}.norm_out.linear", 2 * d, d)
        | _linear(f"{prefix}.proj_out", c.mel_dim, d)
    )


def _bigvgan(prefix: str, c: BigVGANConfig) -> Shapes:
    width = [c.upsample_initial_channel // 2**i for i in range(len(c.upsample_rates) + 1)]
    out = _linear(f"{prefix}.conv_pre", width[0], c.mel_dim, 7)
    for i, kernel in enumerate(c.upsample_kernel_sizes):
        # A transposed convolution: torch stores (in, out, kernel).
        out |= {f"{prefix}.ups.{i}.0.weight": (width[i], width[i + 1], kernel)}
        out |= {f"{prefix}.ups.{i}.0.bias": (width[i + 1],)}
    block = 0
    for w in width[1:]:
        for kernel, dilations in zip(c.resblock_kernel_sizes, c.resblock_dilation_sizes, strict=True):
            name = f"{prefix}.resblocks.{block}"
            for j in range(len(dilations)):
                out |= _linear(f"{name}.convs1.{j}", w, w, kernel) | _linear(f"{name}.convs2.{j}", w, w, kernel)
            for j in range(2 * len(dilations)):
                out |= {f"{name}.activations.{j}.act.{p}": (w,) for p in ("alpha", "beta")}
            block += 1
    out |= {f"{prefix}.activation_post.act.{p}": (width[-1],) for p in ("alpha", "beta")}
    return out | _linear(f"{prefix}.conv_post", 1, width[-1], 7, bias=False)


def tensor_shapes(cfg: OmniConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint of this configuration: published name → shape, in the published order of parts.

    A part that the configuration lacks (`talker`, `token2wav`) has no entries, nor has the head where it is tied to
    the embedding.
    """
    out = _thinker("thinker", cfg.thinker)
    if cfg.talker is not None:
        out |= _talker("talker", cfg.talker)
    if cfg.token2wav is not None:
        out |= _dit("token2wav.code2wav_dit_model", cfg.token2wav.dit)
        out |= _bigvgan("token2wav.code2wav_bigvgan_model", cfg.token2wav.bigvgan)
    return out


def part_of(name: str) -> str:
    """The part a published name belongs to: `thinker`, `talker` or `token2wav` (its first component)."""
    return name.split(".", 1)[0]


def published_dtype(name: str) -> str:
    """The dtype that the published files store a tensor in: float32 in Token2Wav, bfloat16 elsewhere."""
    return "float32" if part_of(name) == "token2wav" else "bfloat16"


def is_bare(names: Iterable[str]) -> bool:
    """Whether the names are those of a Thinker saved alone, which lack the `thinker.` prefix."""
    return not any(part_of(name) in PARTS for name in names)


def canonical(name: str, *, bare: bool = False) -> str:
    """A stored name in either layout → the published name.

    Args:
      name: as stored: published, or as transformers 5 writes it.
      bare: the checkpoint is a Thinker alone (`is_bare`).
    """
    full = f"thinker.{name}" if bare else name
    for prefix, published in _TRANSFORMERS5:
        if full.startswith(prefix):
            return published + full[len(prefix) :]
    return full


def spelled(name: str, *, layout: Layout = "published", bare: bool = False) -> str:
    """A published name → the name stored in a layout. Inverse of `canonical`."""
    if layout == "transformers5":
        for prefix, published in _TRANSFORMERS5:
            if name.startswith(published):
                name = prefix + name[len(published) :]
                break
    return name.removeprefix("thinker.") if bare else name


def tree_path(name: str) -> tuple[tuple[str, ...], int | None]:
    """A published name → its path in the parameter tree, and its layer where it belongs to a stack (else None)."""
    for stack in STACKS:
        if name.startswith(stack + "."):
            layer, rest = name[len(stack) + 1 :].split(".", 1)
            return (*stack.split("."), *rest.split(".")), int(layer)
    return tuple(name.split(".")), None


def stack_of(path: tuple[str, ...]) -> int | None:
    """How many leading components of a tree path name its stack; None outside stacks."""
    for stack in STACKS:
        head = tuple(stack.split("."))
        if path[: len(head)] == head:
            return len(head)
    return None


def tree_name(path: tuple[str, ...], layer: int | None = None) -> str:
    """A path in the parameter tree, and the layer where it belongs to a stack → the published name.

    Raises:
      ValueError: a layer given outside a stack, or none given inside one.
    """
    depth = stack_of(path)
    if (depth is None) != (layer is None):
        raise ValueError(f"{'.'.join(path)} {'needs a' if layer is None else 'has no'} layer number")
    return ".".join(path if depth is None else (*path[:depth], str(layer), *path[depth:]))
