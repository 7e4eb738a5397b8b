"""The benchmark's parts at the tiny size: both sides get the same weights, and the table says what was run."""

from __future__ import annotations

import json
import sys

import jax
import numpy as np
import pytest

from omni_jax import config as C
from omni_jax.errors import InputError
from omni_jax.infer.analysis.depth import truncate_layers
from omni_jax.infer.bench import footprint, reference, speech, text
from omni_jax.model.layers import unstack


def test_both_sides_share_their_weights():
    import torch

    weights = reference.SharedWeights(C.preset("tiny"), "thinker.visual.")
    tree, state = weights.tree(), weights.state_dict(torch)
    assert isinstance(tree["blocks"], tuple)
    ours = tree["blocks"][2]["mlp"]["down_proj"]["weight"]
    theirs = state["blocks.2.mlp.down_proj.weight"]
    assert ours.unsafe_buffer_pointer() == theirs.data_ptr()
    np.testing.assert_array_equal(np.asarray(ours).astype(np.float32), theirs.float().numpy())


def test_every_stage_runs(monkeypatch, capsys):
    monkeypatch.setattr(speech, "DIT_FRAMES", (48, 96))  # of the reference, the long one takes most of the time
    text.main((*text.STAGES, "talker", "dit", "vocoder"), "tiny", 1, 2, as_json=True)
    out = json.loads(capsys.readouterr().out)
    assert [r["stage"] for r in out["rows"]] == [
        "decode", "prefill", "audio", "vision", "talker", "dit", "dit", "vocoder",
    ]  # fmt: skip
    for row in out["rows"]:
        assert row["ratio"] == pytest.approx(row["torch_s"] / row["jax_s"])
        assert row["jax_s"] > 0
    table = text.markdown(out["rows"], "tiny")
    assert table.count("\n| ") == 9
    with pytest.raises(InputError, match="decode, prefill, audio, vision"):
        text.run(["decode", "singer"], preset="tiny")


def test_weights_and_cache(model):
    """The sizes that memory is compared with are those of the real arrays."""
    weights, cache = footprint.weights_and_cache(model.config, 40)
    loaded = sum(a.nbytes for a in jax.tree.leaves(model.params["thinker"]))
    assert weights * 2 == loaded  # the fixture is float32
    text = model.config.thinker.text
    assert cache == 2 * text.num_hidden_layers * text.num_key_value_heads * 1536 * text.head_dim * 4


def test_measured_commands():
    out, seconds, peak = text.measured([sys.executable, "-c", "x = bytearray(300 << 20); print('done')"])
    assert (out, seconds > 0) == ("done\n", True)
    assert peak > 300 << 20
    with pytest.raises(InputError, match="failed"):
        text.measured([sys.executable, "-c", "raise SystemExit(3)"])


def test_cut_stacks_keep_their_widths():
    cfg = truncate_layers(C.preset("3b"), 8)
    assert (cfg.thinker.text.num_hidden_layers, cfg.thinker.vision.depth, cfg.thinker.audio.encoder_layers) == (8, 8, 8)
    assert cfg.thinker.vision.fullatt_block_indexes == (7,)
    assert cfg.thinker.text.hidden_size == C.preset("3b").thinker.text.hidden_size
    assert len(unstack({"w": np.zeros((3, 2))})) == 3


def test_footprint_of_speech(monkeypatch, capsys):
    """Tiny shapes, both sides in processes of their own."""
    monkeypatch.setattr(footprint, "SPEECH_SECONDS", (1, 2))
    monkeypatch.setattr(footprint, "PEAK_SECONDS", 1)
    monkeypatch.setattr(footprint, "RUNS", 1)
    footprint.main(None, "tiny", None, ["speech"], as_json=True)
    found = json.loads(capsys.readouterr().out)["speech"]
    assert found["growth"] == found["evaluation_long_s"] / found["evaluation_short_s"]
    assert min(found["peak_ours_bytes"], found["peak_reference_bytes"]) > 100 << 20
    with pytest.raises(InputError, match="--model"):
        footprint.main(None, "tiny", None, ["generate"], as_json=True)
