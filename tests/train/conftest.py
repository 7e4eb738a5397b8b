"""What the tests of training share: a checkpoint that compiles fast."""

from __future__ import annotations

import dataclasses
import pathlib

import pytest

from omni_jax import config as C
from omni_jax.checkpoint.publish import write_random


@pytest.fixture(scope="session")
def short_checkpoint(tmp_path_factory) -> pathlib.Path:
    """All parts of a tiny checkpoint, each with the fewest layers, for tests of the loop and not of the model: it
    compiles in a fraction of the time. The tests of the losses hold the whole of it to the oracle."""
    cfg = C.preset("tiny")
    assert cfg.talker is not None
    assert cfg.token2wav is not None
    stages = {
        "upsample_rates": (5, 3), "upsample_kernel_sizes": (11, 7), "upsample_initial_channel": 16,
        "resblock_kernel_sizes": (3,), "resblock_dilation_sizes": ((3,),),
    }  # fmt: skip
    thinker = dataclasses.replace(
        cfg.thinker,
        text=dataclasses.replace(cfg.thinker.text, num_hidden_layers=1),
        vision=dataclasses.replace(cfg.thinker.vision, depth=1, fullatt_block_indexes=(0,)),
        audio=dataclasses.replace(cfg.thinker.audio, encoder_layers=1),
    )
    decoder = dataclasses.replace(cfg.talker.decoder, num_hidden_layers=1)
    dit = dataclasses.replace(cfg.token2wav.dit, num_hidden_layers=1, look_ahead_layers=(0,), look_backward_layers=(0,))
    sound = C.Token2WavConfig(dit, dataclasses.replace(cfg.token2wav.bigvgan, **stages))
    short = C.OmniConfig(thinker, dataclasses.replace(cfg.talker, decoder=decoder), sound)
    folder = tmp_path_factory.mktemp("short") / "tiny"
    write_random(folder, short, seed=1, dtype="float32")
    return folder
