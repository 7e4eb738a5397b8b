"""Which part a subtree belongs to, and the meshes that the parameters of a stage get."""

from __future__ import annotations

import jax
from jax.sharding import AbstractMesh, AxisType

from omni_jax import config as C
from omni_jax.model import stages
from omni_jax.parallel import meshes
from omni_jax.parallel.sharding import MESH_AXES


def test_parts_within_parts():
    assert stages.inner_part("thinker", "visual") == "vision"
    assert stages.inner_part("thinker", "audio_tower") == "audio"
    assert stages.inner_part("thinker", "model") == stages.inner_part("thinker", "lm_head") == "thinker"
    assert stages.inner_part("talker", "codec_head") == "talker"
    assert stages.inner_part("token2wav", "code2wav_dit_model") == "dit"
    assert stages.inner_part("token2wav", "code2wav_bigvgan_model") == "bigvgan"


def test_speech_has_its_own_mesh():
    cfg = C.preset("3b")
    types = (AxisType.Auto,) * len(MESH_AXES)
    text, speech = (AbstractMesh(s, MESH_AXES, axis_types=types) for s in ((1, 1, 2, 4), (1, 1, 2, 2)))
    placed = meshes.Placement(cfg, text, speech)
    assert placed.has_speech_mesh
    for part, tree in stages.stage_shardings(placed).items():
        assert {s.mesh for s in jax.tree.leaves(tree)} == {text if part == "thinker" else speech}
    only = stages.stage_shardings(placed, ("token2wav",))
    assert list(only) == ["token2wav"]
    assert not meshes.Placement(cfg, text, text).has_speech_mesh
