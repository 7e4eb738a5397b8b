"""Small random configurations, the same on both sides: ours, and the oracle's built from `to_dict`."""

from __future__ import annotations

import dataclasses

from omni_jax import config as C


def tiny_config(**thinker: object) -> C.OmniConfig:
    """The nano preset with the special-token ids moved into its small vocabulary."""
    cfg = C.preset("nano")
    ids = {
        "audio_token_id": 1200, "image_token_id": 1201, "video_token_id": 1202, "audio_start_token_id": 1203,
        "audio_end_token_id": 1204, "vision_start_token_id": 1205, "vision_end_token_id": 1206, "user_token_id": 1207,
    }  # fmt: skip
    talker = dataclasses.replace(
        cfg.talker, tts_text_start_token_id=1208, tts_text_end_token_id=1209, tts_text_pad_token_id=1210
    )
    return dataclasses.replace(cfg, talker=talker, thinker=dataclasses.replace(cfg.thinker, **(ids | thinker)))
