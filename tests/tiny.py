"""Small random configurations, the same on both sides: ours, and the oracle's built from `to_dict`."""

from __future__ import annotations

import dataclasses

from omni_jax import config as C


def shallow_config() -> C.OmniConfig:
    """The tiny preset with as few layers as show every kind of them: most of what the tests take is compiling.

    Two layers each of the decoders and towers (of vision, one in windows and one over whole frames), three DiT layers
    (one that looks back, one that looks ahead, one that does neither), and a vocoder of two stages, whose rates make
    240 samples of a frame as the six of the preset do. tests/model/test_bigvgan.py holds those six to the oracle.
    """
    cfg = C.preset("tiny")
    assert cfg.talker is not None
    assert cfg.token2wav is not None
    dit = dataclasses.replace(cfg.token2wav.dit, num_hidden_layers=3, look_ahead_layers=(1,), look_backward_layers=(0,))
    bigvgan = dataclasses.replace(
        cfg.token2wav.bigvgan, upsample_initial_channel=16, upsample_rates=(15, 16), upsample_kernel_sizes=(31, 32),
        resblock_kernel_sizes=(3, 7), resblock_dilation_sizes=((1, 3, 5), (1, 3, 5)),
    )  # fmt: skip
    thinker = dataclasses.replace(
        cfg.thinker,
        text=dataclasses.replace(cfg.thinker.text, num_hidden_layers=2),
        vision=dataclasses.replace(cfg.thinker.vision, depth=2, fullatt_block_indexes=(1,)),
    )
    return C.OmniConfig(thinker, cfg.talker, C.Token2WavConfig(dit, bigvgan))


def tiny_config(**thinker: object) -> C.OmniConfig:
    """The tiny preset with the special-token ids moved into its small vocabulary."""
    cfg = C.preset("tiny")
    ids = {
        "audio_token_id": 1200, "image_token_id": 1201, "video_token_id": 1202, "audio_start_token_id": 1203,
        "audio_end_token_id": 1204, "vision_start_token_id": 1205, "vision_end_token_id": 1206, "user_token_id": 1207,
    }  # fmt: skip
    talker = dataclasses.replace(
        cfg.talker, tts_text_start_token_id=1208, tts_text_end_token_id=1209, tts_text_pad_token_id=1210
    )
    return dataclasses.replace(cfg, talker=talker, thinker=dataclasses.replace(cfg.thinker, **(ids | thinker)))
