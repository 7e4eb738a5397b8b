"""The reference's own prompt parts: placeholder expansion, position ids, picture and mel features."""

from __future__ import annotations

import functools
import types

import numpy as np
import torch
from transformers import WhisperFeatureExtractor
from transformers.models.qwen2_5_omni import Qwen2_5OmniConfig, Qwen2_5OmniThinkerForConditionalGeneration
from transformers.models.qwen2_5_omni.processing_qwen2_5_omni import Qwen2_5OmniProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

from omni_jax import config as C
from omni_jax.processing import positions as P


@functools.lru_cache
def thinker(cfg: C.OmniConfig) -> Qwen2_5OmniThinkerForConditionalGeneration:
    return Qwen2_5OmniThinkerForConditionalGeneration(Qwen2_5OmniConfig(**C.to_dict(cfg)).thinker_config)


def mel_frames(tokens: int, cfg: C.OmniConfig) -> int:
    """A number of mel frames that becomes `tokens` tokens."""
    assert cfg.thinker.audio.token_count(4 * tokens) == tokens
    return 4 * tokens


def rope_index(cfg: C.OmniConfig, ids: np.ndarray, segments) -> tuple[np.ndarray, int]:
    """`get_rope_index`: positions [3, T] and the delta. Its audio-in-video is one flag for the whole prompt."""
    images = [s.grid for s in segments if isinstance(s, P.Image)]
    clips = [s for s in segments if isinstance(s, P.Video | P.AudioVideo)]
    sounds = [mel_frames(s.tokens, cfg) for s in segments if isinstance(s, P.Audio | P.AudioVideo)]
    in_video = {isinstance(s, P.AudioVideo) for s in clips}
    assert len(in_video) <= 1, "the oracle cannot mix clips with and without their sound"
    rows = torch.tensor(ids[None].astype(np.int64))
    positions, delta = thinker(cfg).get_rope_index(
        rows,
        image_grid_thw=torch.tensor(images) if images else None,
        video_grid_thw=torch.tensor([s.grid for s in clips]) if clips else None,
        attention_mask=torch.ones_like(rows),
        use_audio_in_video=in_video == {True},
        audio_seqlens=torch.tensor(sounds) if sounds else None,
        second_per_grids=torch.tensor([s.seconds_per_grid for s in clips]) if clips else None,
    )
    return positions[:, 0].numpy(), int(delta)


def expand(cfg: C.OmniConfig, text: str, segments, names: dict[str, str]) -> str:
    """The reference processor's expansion of placeholders. `names`: its attributes, such as `audio_token`."""
    bare = object.__new__(Qwen2_5OmniProcessor)
    merge = types.SimpleNamespace(merge_size=cfg.thinker.vision.spatial_merge_size)
    bare.__dict__ |= names | {"image_processor": merge, "video_processor": merge}
    clips = [s for s in segments if isinstance(s, P.Video | P.AudioVideo)]
    (out,) = bare.replace_multimodal_special_tokens(
        [text],
        iter([s.tokens for s in segments if isinstance(s, P.Audio | P.AudioVideo)]),
        iter([np.array(s.grid) for s in segments if isinstance(s, P.Image)]),
        iter([np.array(s.grid) for s in clips]),
        video_second_per_grid=iter([s.seconds_per_grid for s in clips]),
        use_audio_in_video=any(isinstance(s, P.AudioVideo) for s in clips),
        position_id_per_seconds=cfg.thinker.position_id_per_seconds,
        seconds_per_chunk=float(cfg.thinker.seconds_per_chunk),
    )
    return out


def image_features(images, **limits: int) -> tuple[np.ndarray, list]:
    """Pixels [N, D] and grids of the slow image processor."""
    limits = {"min_pixels": 3136, "max_pixels": 12845056} | limits
    out = Qwen2VLImageProcessor(**limits)(images=images, return_tensors="np", input_data_format="channels_last")
    return out["pixel_values"], [tuple(map(int, g)) for g in out["image_grid_thw"]]


def video_features(frames: np.ndarray) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Pixels and grid of one clip whose frames (uint8 [F, H, W, 3]) already have their final size."""
    processor = Qwen2VLImageProcessor(do_resize=False)
    size = {"shortest_edge": 1, "longest_edge": 1 << 40}
    pixels, grid = processor._preprocess(
        list(frames), do_resize=True, size=size, resample=3, do_rescale=True, rescale_factor=1 / 255, do_normalize=True,
        image_mean=processor.image_mean, image_std=processor.image_std, patch_size=14, temporal_patch_size=2,
        merge_size=2, do_convert_rgb=False,
    )  # fmt: skip
    return pixels, grid


@functools.lru_cache
def _extractor(bins: int, seconds: int) -> WhisperFeatureExtractor:
    return WhisperFeatureExtractor(feature_size=bins, chunk_length=seconds, return_attention_mask=True)


def mel_features(samples: np.ndarray, bins: int = 128, seconds: int = 300) -> np.ndarray:
    """Valid frames [L, M] of the reference's features."""
    out = _extractor(bins, seconds)(
        samples, sampling_rate=16000, padding="max_length", return_attention_mask=True, return_tensors="np"
    )
    return out["input_features"][0, :, : int(out["attention_mask"].sum())].T
