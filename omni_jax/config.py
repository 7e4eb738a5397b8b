"""Configurations of Qwen2.5-Omni: frozen dataclasses, presets, and reading a published `config.json`.

The defaults of the dataclasses are the values that transformers 4.57.6 gives to absent fields; this is the one table of
them. Source: `Qwen2_5OmniConfig` and its parts in transformers 4.57.6.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from omni_jax.errors import InputError, unknown_name
from omni_jax.files import read_json
from omni_jax.packing import packing_of

MODEL_TYPES = ("qwen2_5_omni", "qwen2_5_omni_thinker")
C = TypeVar("C")
# Names of `hidden_act` and `activation_function`: those of transformers' table that have no parameters of their own.
ACTIVATIONS = (
    "gelu", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python", "gelu_python_tanh", "gelu_pytorch_tanh",
    "leaky_relu", "linear", "mish", "quick_gelu", "relu", "relu2", "relu6", "sigmoid", "silu", "swish", "tanh",
)  # fmt: skip


class ConfigError(InputError):
    """A configuration that cannot be used; the message names the field and the remedy."""


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower: a windowed ViT at native resolution."""

    depth: int = 32
    hidden_size: int = 3584
    hidden_act: str = "silu"
    intermediate_size: int = 3420
    num_heads: int = 16
    in_channels: int = 3
    patch_size: int = 14
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2
    window_size: int = 112
    out_hidden_size: int = 3584
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)
    rms_norm_eps: float = 1e-6  # 4.57.6 has no such field: its modules write 1e-6

    @property
    def patch_dim(self) -> int:
        """Values of one flattened patch: channels × frames × height × width."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def window_patches(self) -> int:
        """Patches along one side of an attention window."""
        return self.window_size // self.patch_size


@dataclass(frozen=True)
class AudioConfig:
    """The audio tower: a Whisper-like encoder over chunks of `2 * n_window` mel frames."""

    num_mel_bins: int = 128
    encoder_layers: int = 32
    encoder_attention_heads: int = 20
    encoder_ffn_dim: int = 5120
    d_model: int = 1280
    activation_function: str = "gelu"
    max_source_positions: int = 1500
    n_window: int = 100
    output_dim: int = 3584
    layer_norm_eps: float = 1e-5  # 4.57.6 has no such field: torch's LayerNorm default

    @property
    def chunk_frames(self) -> int:
        """Mel frames of one chunk; attention never leaves a chunk."""
        return 2 * self.n_window

    def token_count(self, mel_frames: int) -> int:
        """Number of audio tokens for `mel_frames` mel frames: conv stride 2, then pairwise mean."""
        return max(0, ((mel_frames - 1) // 2 + 1 - 2) // 2 + 1)


@dataclass(frozen=True)
class DecoderConfig:
    """A Qwen2.5 decoder with multimodal rotary positions; Thinker and Talker are both one."""

    vocab_size: int = 152064
    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int = 4
    head_dim: int = 128
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    mrope_section: tuple[int, ...] = (16, 24, 24)
    tie_word_embeddings: bool = False


@dataclass(frozen=True)
class ThinkerConfig:
    """Towers, decoder and the ids of the special tokens."""

    text: DecoderConfig = field(default_factory=DecoderConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    audio: AudioConfig = field(default_factory=AudioConfig)
    audio_token_id: int = 151646
    image_token_id: int = 151655
    video_token_id: int = 151656
    audio_start_token_id: int = 151647
    audio_end_token_id: int = 151648
    vision_start_token_id: int = 151652  # 4.57.6 has no default for these two; the published files carry them
    vision_end_token_id: int = 151653
    user_token_id: int = 872
    position_id_per_seconds: int = 25
    seconds_per_chunk: int = 2
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None


@dataclass(frozen=True)
class TalkerConfig:
    """The Talker: a small decoder over codec ids, and the ids that frame its prompt."""

    decoder: DecoderConfig = field(default_factory=lambda: DecoderConfig(vocab_size=8448))
    embedding_size: int = 3584
    tts_text_start_token_id: int = 151860
    tts_text_end_token_id: int = 151861
    tts_text_pad_token_id: int = 151859
    tts_codec_start_token_id: int = 8293
    tts_codec_end_token_id: int = 8294
    tts_codec_pad_token_id: int = 8292
    tts_codec_mask_token_id: int = 8296


@dataclass(frozen=True)
class DiTConfig:
    """The flow-matching DiT of Token2Wav, its ECAPA speaker encoder included."""

    hidden_size: int = 1024
    num_hidden_layers: int = 22
    num_attention_heads: int = 16
    ff_mult: int = 2
    emb_dim: int = 512
    head_dim: int = 64
    rope_theta: float = 10000.0
    max_position_embeddings: int = 32768
    block_size: int = 24
    look_ahead_layers: tuple[int, ...] = (10,)
    look_backward_layers: tuple[int, ...] = (0, 20)
    repeats: int = 2
    num_embeds: int = 8193
    mel_dim: int = 80
    enc_emb_dim: int = 192
    enc_dim: int = 128
    enc_channels: tuple[int, ...] = (256, 256, 256, 256, 768)
    enc_kernel_sizes: tuple[int, ...] = (5, 3, 3, 3, 1)
    enc_dilations: tuple[int, ...] = (1, 2, 3, 4, 1)
    enc_attention_channels: int = 64
    enc_res2net_scale: int = 2
    enc_se_channels: int = 64
    time_freq_dim: int = 256  # 4.57.6 has no such field: `DiTTimestepEmbedding` writes 256


@dataclass(frozen=True)
class BigVGANConfig:
    """The BigVGAN vocoder: mel frames to samples."""

    mel_dim: int = 80
    upsample_initial_channel: int = 1536
    resblock_kernel_sizes: tuple[int, ...] = (3, 7, 11)
    resblock_dilation_sizes: tuple[tuple[int, ...], ...] = ((1, 3, 5), (1, 3, 5), (1, 3, 5))
    upsample_rates: tuple[int, ...] = (5, 3, 2, 2, 2, 2)
    upsample_kernel_sizes: tuple[int, ...] = (11, 7, 4, 4, 4, 4)


@dataclass(frozen=True)
class Token2WavConfig:
    """Codec ids to waveform: DiT, then BigVGAN."""

    dit: DiTConfig = field(default_factory=DiTConfig)
    bigvgan: BigVGANConfig = field(default_factory=BigVGANConfig)


@dataclass(frozen=True)
class OmniConfig:
    """The whole model. `talker` and `token2wav` are None where a checkpoint carries the Thinker alone."""

    thinker: ThinkerConfig = field(default_factory=ThinkerConfig)
    talker: TalkerConfig | None = None
    token2wav: Token2WavConfig | None = None


# Published names that differ from ours. The first one present wins.
_SPELLINGS: dict[type, dict[str, tuple[str, ...]]] = {
    ThinkerConfig: {
        "text": ("text_config",),
        "vision": ("vision_config",),
        "audio": ("audio_config",),
        "audio_token_id": ("audio_token_index", "audio_token_id"),
        "image_token_id": ("image_token_index", "image_token_id"),
        "video_token_id": ("video_token_index", "video_token_id"),
    },
    DiTConfig: {
        "hidden_size": ("hidden_size", "dim"),
        "num_hidden_layers": ("num_hidden_layers", "depth"),
        "num_attention_heads": ("num_attention_heads", "heads"),
    },
    Token2WavConfig: {"dit": ("dit_config",), "bigvgan": ("bigvgan_config",)},
    OmniConfig: {"thinker": ("thinker_config",), "talker": ("talker_config",), "token2wav": ("token2wav_config",)},
}
_PARTS: dict[tuple[type, str], type] = {
    (ThinkerConfig, "text"): DecoderConfig,
    (ThinkerConfig, "vision"): VisionConfig,
    (ThinkerConfig, "audio"): AudioConfig,
    (Token2WavConfig, "dit"): DiTConfig,
    (Token2WavConfig, "bigvgan"): BigVGANConfig,
    (OmniConfig, "thinker"): ThinkerConfig,
    (OmniConfig, "talker"): TalkerConfig,
    (OmniConfig, "token2wav"): Token2WavConfig,
}


def _lookup(cls: type, name: str, raw: Mapping[str, Any]) -> Any:
    for spelling in _SPELLINGS.get(cls, {}).get(name, (name,)):
        if raw.get(spelling) is not None:
            return raw[spelling]
    return None


# What is counted to when the tensors are listed: a hostile file must not make that endless.
_COUNTS = ("num_hidden_layers", "depth", "encoder_layers", "enc_res2net_scale")
_MAX_COUNT = 10_000
_ODD = ("resblock_kernel_sizes",)  # their convolutions have a middle
# Lists that say one thing each of the same layers.
_TOGETHER: dict[type, tuple[tuple[str, ...], ...]] = {
    DiTConfig: (("enc_channels", "enc_kernel_sizes", "enc_dilations"),),
    BigVGANConfig: (("upsample_rates", "upsample_kernel_sizes"), ("resblock_kernel_sizes", "resblock_dilation_sizes")),
}


def _checked(where: str, name: str, value: Any, default: Any) -> Any:
    """The value, frozen, if it is of the kind of the default; whole floats pass for integers."""

    def wrong(kind: str) -> ConfigError:
        got = str(value)[:80]
        return ConfigError(f"{where}.{name} is {got!r}, where {kind} is expected; correct it in config.json")

    def number(v: Any, like: Any, kind: str) -> Any:
        if isinstance(like, tuple):
            if not isinstance(v, list | tuple) or not v:
                raise wrong(kind)
            return tuple(number(item, like[0], kind) for item in v)
        if isinstance(v, bool) or not isinstance(v, int | float) or not 0 <= v < 1 << 62:
            raise wrong(kind)
        if isinstance(like, float):
            return v
        if v != int(v) or (v == 0 and not isinstance(default, tuple) and not name.endswith("_id")):
            raise wrong(kind)
        if name in _COUNTS and v > _MAX_COUNT:
            raise wrong(f"at most {_MAX_COUNT}")
        if name in _ODD and v % 2 == 0:
            raise wrong("a list of odd sizes")
        return int(v)

    if isinstance(default, str | bool):
        if not isinstance(value, type(default)):
            raise wrong("text" if isinstance(default, str) else "true or false")
        if name.endswith(("_act", "activation_function")) and value not in ACTIVATIONS:
            raise ConfigError(f"{where}.{name}: " + unknown_name("activation", value, ACTIVATIONS))
        return value
    if isinstance(default, tuple):
        return number(value, default or (0,), "a list of whole numbers")
    return number(value, default, "a number" if isinstance(default, float) else "a whole number")


def _parse_decoder(raw: Mapping[str, Any], where: str, defaults: DecoderConfig, *, has_head_dim: bool) -> DecoderConfig:
    """Both decoders. The reference computes the Thinker's head size but reads the Talker's, 128 if absent."""
    values: dict[str, Any] = {}
    for f in dataclasses.fields(DecoderConfig):
        value = raw.get(f.name)
        if value is not None:
            values[f.name] = _checked(where, f.name, value, getattr(defaults, f.name))
    rope = raw.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ConfigError(f"{where}.rope_scaling must be an object, not {type(rope).__name__}")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "mrope"):
        raise ConfigError(f"{where}.rope_scaling has type {rope_type!r}; only plain multimodal RoPE is supported")
    if "mrope_section" in rope:
        section = rope["mrope_section"]
        values["mrope_section"] = _checked(where, "mrope_section", section, defaults.mrope_section)
    if raw.get("use_sliding_window"):
        raise ConfigError(f"{where}.use_sliding_window is true; no published Omni uses it and it is not supported")
    cfg = dataclasses.replace(defaults, **values)
    if "head_dim" not in values and not has_head_dim:
        cfg = dataclasses.replace(cfg, head_dim=cfg.hidden_size // cfg.num_attention_heads)
    # The reference splits 2 × the sections over head_dim, which must come out even.
    if sum(cfg.mrope_section) * 2 != cfg.head_dim:
        raise ConfigError(
            f"{where}: mrope_section {list(cfg.mrope_section)} must sum to head_dim / 2 = {cfg.head_dim // 2}"
        )
    if cfg.num_attention_heads % cfg.num_key_value_heads:
        raise ConfigError(f"{where}: {cfg.num_attention_heads} heads cannot share {cfg.num_key_value_heads} kv heads")
    return cfg


def _parse(cls: type[C], raw: Mapping[str, Any], where: str) -> C:
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{where} must be an object, not {type(raw).__name__}")
    if cls is DecoderConfig:
        return _parse_decoder(raw, where, DecoderConfig(), has_head_dim=False)  # type: ignore[return-value]
    values: dict[str, Any] = {}
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        if cls is TalkerConfig and f.name == "decoder":
            values[f.name] = _parse_decoder(raw, where, DecoderConfig(vocab_size=8448), has_head_dim=True)
            continue
        value = _lookup(cls, f.name, raw)
        part = _PARTS.get((cls, f.name))
        if part is not None:
            if value is not None or cls is not OmniConfig:
                values[f.name] = _parse(part, value or {}, f"{where}.{f.name}")
        elif f.name == "eos_token_id":
            ids = [] if value is None else value if isinstance(value, list) else [value]
            values[f.name] = _checked(where, f.name, ids, (0,)) if ids else ()
        elif value is not None:
            values[f.name] = _checked(where, f.name, value, f.default)
    cfg = cls(**values)
    for names in _TOGETHER.get(cls, ()):
        if len(set(lengths := [len(getattr(cfg, name)) for name in names])) > 1:
            raise ConfigError(f"{where}: {', '.join(names)} have {lengths} entries, where as many are expected of each")
    return cfg


def from_dict(raw: Mapping[str, Any]) -> OmniConfig:
    """Reads a published configuration (whole model, or a Thinker alone).

    Returns:
      The frozen configuration; absent fields take the dataclass defaults.
    Raises:
      ConfigError: unread quantization, unknown model type, or a field of the wrong kind; the message names it.
    """
    model_type = raw.get("model_type")
    try:
        packing_of(raw)
    except ValueError as e:
        raise ConfigError(str(e)) from None
    if model_type not in MODEL_TYPES:
        raise ConfigError(f"model_type {model_type!r} is not Qwen2.5-Omni; known are {', '.join(MODEL_TYPES)}")
    if model_type == "qwen2_5_omni_thinker":
        return OmniConfig(thinker=_parse(ThinkerConfig, raw, "config"))
    cfg = _parse(OmniConfig, raw, "config")
    if raw.get("enable_audio_output", True) is False:
        cfg = dataclasses.replace(cfg, talker=None, token2wav=None)
    return cfg


def absent_fields(raw: Mapping[str, Any]) -> frozenset[str]:
    """The fields of `from_dict(raw)` that take their defaults, dotted: `thinker.text.rope_theta`."""

    def fields(cls: type, raw: Mapping[str, Any], where: str) -> Iterator[str]:
        for f in dataclasses.fields(cls):
            name = f"{where}{f.name}"
            if f.name == "mrope_section":
                given = "mrope_section" in (raw.get("rope_scaling") or {})
            elif cls is TalkerConfig and f.name == "decoder":
                yield from fields(DecoderConfig, raw, f"{name}.")
                continue
            elif (part := _PARTS.get((cls, f.name))) is not None:
                yield from fields(part, _lookup(cls, f.name, raw) or {}, f"{name}.")
                continue
            else:
                given = _lookup(cls, f.name, raw) is not None
            if not given:
                yield name

    if raw.get("model_type") == "qwen2_5_omni_thinker":
        return frozenset(fields(ThinkerConfig, raw, "thinker."))
    return frozenset(fields(OmniConfig, raw, ""))


def load_config(path: str | pathlib.Path) -> OmniConfig:
    """Reads `config.json` from a checkpoint folder. Raises ConfigError with the path when it cannot."""
    file = pathlib.Path(path) / "config.json"
    try:
        raw = read_json(file, ConfigError)
    except FileNotFoundError:
        raise ConfigError(f"{file} does not exist; a checkpoint folder carries a config.json") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{file} must hold a JSON object")
    try:
        return from_dict(raw)
    except ConfigError as e:
        raise ConfigError(f"{file}: {e}") from None


def to_dict(cfg: OmniConfig) -> dict[str, Any]:
    """The published spelling of a configuration, as transformers 4.57.6 reads it. Inverse of `from_dict`."""

    def plain(value: Any) -> Any:
        return [plain(v) for v in value] if isinstance(value, tuple) else value

    def decoder(d: DecoderConfig) -> dict[str, Any]:
        out = {k: plain(v) for k, v in dataclasses.asdict(d).items() if k != "mrope_section"}
        return out | {"rope_scaling": {"type": "default", "mrope_section": list(d.mrope_section)}}

    def part(p: Any) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for f in dataclasses.fields(p):
            value = getattr(p, f.name)
            if isinstance(p, TalkerConfig) and f.name == "decoder":
                out |= decoder(value)
                continue
            name = _SPELLINGS.get(type(p), {}).get(f.name, (f.name,))[0]
            if isinstance(value, DecoderConfig):
                out[name] = decoder(value) | {"model_type": "qwen2_5_omni_text"}
            elif dataclasses.is_dataclass(value):
                out[name] = part(value)
            elif value is not None and not (f.name == "eos_token_id" and not value):
                out[name] = plain(value)
        return out

    out = part(cfg)
    thinker = out["thinker_config"] | {"model_type": "qwen2_5_omni_thinker"}
    thinker["audio_config"]["model_type"] = "qwen2_5_omni_audio_encoder"
    thinker["vision_config"]["model_type"] = "qwen2_5_omni_vision_encoder"
    out |= {"model_type": "qwen2_5_omni", "architectures": ["Qwen2_5OmniModel"], "thinker_config": thinker}
    if cfg.talker is not None:
        # The Talker repeats the Thinker's ids in its own part of the file.
        shared = ["audio_token_index", "image_token_index", "video_token_index", "position_id_per_seconds"]
        shared += ["audio_start_token_id", "audio_end_token_id", "vision_start_token_id", "vision_end_token_id"]
        out["talker_config"] |= {k: thinker[k] for k in (*shared, "seconds_per_chunk")}
        out["talker_config"] |= {
            "model_type": "qwen2_5_omni_talker",
            "spatial_merge_size": cfg.thinker.vision.spatial_merge_size,
        }
    out["enable_audio_output"] = cfg.talker is not None
    return out


def _published(text: DecoderConfig, talker: TalkerConfig) -> OmniConfig:
    vision = VisionConfig(hidden_size=1280, out_hidden_size=text.hidden_size)
    thinker = ThinkerConfig(text=text, vision=vision, audio=AudioConfig(output_dim=text.hidden_size))
    return OmniConfig(thinker, talker, Token2WavConfig(dit=DiTConfig()))


def _nano() -> OmniConfig:
    text = DecoderConfig(
        vocab_size=1280, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, mrope_section=(2, 3, 3), max_position_embeddings=32768,
    )  # fmt: skip
    vision = VisionConfig(
        depth=4, hidden_size=64, intermediate_size=112, num_heads=4, out_hidden_size=64, fullatt_block_indexes=(1, 3)
    )
    audio = AudioConfig(encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=128, d_model=64, output_dim=64)
    talker = TalkerConfig(
        decoder=dataclasses.replace(
            text, vocab_size=320, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=3,
            num_key_value_heads=1,
        ),
        embedding_size=64, tts_codec_start_token_id=261, tts_codec_end_token_id=262, tts_codec_pad_token_id=260,
        tts_codec_mask_token_id=264,
    )  # fmt: skip
    dit = DiTConfig(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=4, head_dim=16, emb_dim=32, num_embeds=257,
        look_ahead_layers=(2,), look_backward_layers=(0, 3), mel_dim=80, enc_emb_dim=192, enc_dim=16,
        enc_channels=(32, 32, 32, 32, 96), enc_attention_channels=16, enc_se_channels=16,
    )  # fmt: skip
    bigvgan = BigVGANConfig(upsample_initial_channel=128)
    return OmniConfig(ThinkerConfig(text=text, vision=vision, audio=audio), talker, Token2WavConfig(dit, bigvgan))


def preset(name: str) -> OmniConfig:
    """A configuration by name: `3b`, `7b` (the published ones) or `tiny` (tests and demos).

    `tiny` keeps the published special-token ids out of range on purpose: whoever makes a tiny checkpoint replaces
    them by its tokenizer's (`checkpoint.publish`). Raises ConfigError for an unknown name.
    """
    text7 = DecoderConfig()
    if name == "7b":
        talker = DecoderConfig(vocab_size=8448, hidden_size=896, num_hidden_layers=24, num_attention_heads=12)
        return _published(text7, TalkerConfig(decoder=talker, embedding_size=3584))
    if name == "3b":
        text3 = DecoderConfig(
            vocab_size=151936, hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16,
            num_key_value_heads=2,
        )  # fmt: skip
        talker = DecoderConfig(
            vocab_size=8448, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
            num_key_value_heads=2, head_dim=64, mrope_section=(16, 16, 0),
        )  # fmt: skip
        return _published(text3, TalkerConfig(decoder=talker, embedding_size=2048))
    if name == "tiny":
        return _nano()
    raise ConfigError(f"unknown preset {name!r}; known are 3b, 7b, tiny")
