"""The key table: complete, of the right shapes, and invertible in both layouts."""

import dataclasses
import hashlib
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_jax import config as C
from omni_jax.checkpoint import keys
from omni_jax.model import parameters

# sha256 over the sorted lines "name [shape]" of the published 3B checkpoint: 2,544 tensors.
PUBLISHED_3B = "9c982c2392345bbe8be7a9eadc4cb5bbb17cfa4f456154d663e0d313830029c1"
NAMES = {name: list(keys.tensor_shapes(C.preset(name))) for name in ("3b", "7b", "tiny")}


def test_published_3b():
    shapes = keys.tensor_shapes(C.preset("3b"))
    listing = "\n".join(sorted(f"{name} {list(shape)}" for name, shape in shapes.items()))
    assert len(shapes) == 2544
    assert hashlib.sha256(listing.encode()).hexdigest() == PUBLISHED_3B
    # Counted from the modules: embedding and norm, layers × tensors, and what stands alone.
    bigvgan = [n for n in shapes if "bigvgan" in n]
    dit = [n for n in shapes if "code2wav_dit" in n]
    assert len(bigvgan) == 2 + 6 * 2 + 18 * (6 * 2 + 6 * 2) + 2 + 1 == 449
    assert sum(n.startswith("thinker.model.") for n in shapes) == 36 * 12 + 2
    assert sum(n.startswith("thinker.visual.") for n in shapes) == 32 * 16 + 6
    assert sum(n.startswith("thinker.audio_tower.") for n in shapes) == 32 * 15 + 9
    assert sum(n.startswith("talker.") for n in shapes) == 24 * 12 + 2 + 3
    assert len(dit) == 22 * 14 + 4 + 1 + 2 + (2 + 3 * 10 + 2 + 4 + 2) + 1 + 4
    sizes = {
        "thinker.model.": 3_085_938_688, "thinker.lm_head.": 311_164_928, "thinker.visual.": 668_684_288,
        "thinker.audio_tower.": 637_676_544, "talker.model.": 375_199_616, "talker.codec_head.": 7_569_408,
        "talker.thinker_to_talker_proj.": 1_835_904, "token2wav.code2wav_dit_model.": 333_607_760 + 32,
        "token2wav.code2wav_bigvgan_model.": 115_443_504,
    }  # fmt: skip
    for prefix, size in sizes.items():
        assert sum(math.prod(s) for n, s in shapes.items() if n.startswith(prefix)) == size, prefix
    assert sum(sizes.values()) == 5_537_120_672


@pytest.mark.parametrize(
    ("preset", "name", "shape"),
    [
        ("3b", "thinker.model.layers.35.self_attn.k_proj.weight", (256, 2048)),
        ("3b", "talker.model.embed_tokens.weight", (8448, 2048)),
        ("3b", "token2wav.code2wav_dit_model.input_embed.proj.weight", (1024, 912)),
        ("3b", "token2wav.code2wav_bigvgan_model.ups.5.0.weight", (48, 24, 4)),
        ("7b", "thinker.lm_head.weight", (152064, 3584)),
        ("7b", "talker.model.layers.0.self_attn.o_proj.weight", (896, 1536)),
        ("7b", "talker.thinker_to_talker_proj.weight", (896, 3584)),
        ("7b", "thinker.audio_tower.proj.weight", (3584, 1280)),
    ],
)
def test_spot_shapes(preset, name, shape):
    assert keys.tensor_shapes(C.preset(preset))[name] == shape


def test_parameters_of_7b():
    assert 10.6e9 < sum(math.prod(s) for s in keys.tensor_shapes(C.preset("7b")).values()) < 10.8e9


def test_oracle_state_dict_has_the_same_keys():
    import torch
    from transformers import Qwen2_5OmniConfig, Qwen2_5OmniForConditionalGeneration

    for change in ({}, {"enc_res2net_scale": 4, "ff_mult": 3}):
        cfg = C.preset("tiny")
        dit = dataclasses.replace(cfg.token2wav.dit, **change)
        cfg = dataclasses.replace(cfg, token2wav=dataclasses.replace(cfg.token2wav, dit=dit))
        with torch.device("meta"):
            model = Qwen2_5OmniForConditionalGeneration(Qwen2_5OmniConfig(**C.to_dict(cfg)))
        theirs = {name: tuple(t.shape) for name, t in model.state_dict().items()}
        assert theirs == keys.tensor_shapes(cfg)


def test_every_name_survives_the_tree_and_both_layouts():
    for names in NAMES.values():
        places = set()
        for name in names:
            path, layer = keys.tree_path(name)
            assert keys.tree_name(path, layer) == name
            places.add((path, layer))
            assert keys.canonical(keys.spelled(name, layout="transformers5")) == name
            assert keys.canonical(name) == name  # the published layout is its own canonical form
            if keys.part_of(name) == "thinker":
                for layout in ("published", "transformers5"):
                    stored = keys.spelled(name, layout=layout, bare=True)
                    assert not stored.startswith("thinker.")
                    assert keys.canonical(stored, bare=True) == name
        assert len(places) == len(names)


@settings(max_examples=100, deadline=None)
@given(
    stack=st.sampled_from(parameters.STACKS),
    layer=st.integers(0, 10**6),
    rest=st.lists(st.from_regex(r"[a-z0-9_]{1,12}", fullmatch=True), min_size=1, max_size=5),
    layout=st.sampled_from(["published", "transformers5"]),
)
def test_any_layer_number_is_invertible(stack, layer, rest, layout):
    name = ".".join([stack, str(layer), *rest])
    assert keys.tree_path(name) == ((*stack.split("."), *rest), layer)
    assert keys.tree_name(*keys.tree_path(name)) == name
    assert keys.canonical(keys.spelled(name, layout=layout)) == name


def test_tree_name_refuses_a_layer_in_the_wrong_place():
    with pytest.raises(ValueError, match="needs a layer"):
        keys.tree_name(("thinker", "model", "layers", "mlp"))
    with pytest.raises(ValueError, match="has no layer"):
        keys.tree_name(("thinker", "lm_head", "weight"), 3)


def test_transformers5_spelling():
    spell = {
        "thinker.model.layers.0.mlp.up_proj.weight": "thinker.model.language_model.layers.0.mlp.up_proj.weight",
        "thinker.visual.merger.ln_q.weight": "thinker.model.visual.merger.ln_q.weight",
        "thinker.audio_tower.proj.bias": "thinker.model.audio_tower.proj.bias",
        "thinker.lm_head.weight": "thinker.lm_head.weight",
        "talker.model.norm.weight": "talker.model.norm.weight",
    }
    for name, stored in spell.items():
        assert keys.spelled(name, layout="transformers5") == stored
    assert keys.is_bare(["model.norm.weight", "lm_head.weight"])
    assert not keys.is_bare(["thinker.model.norm.weight"])


def test_parts_and_tied_head():
    cfg = C.preset("tiny")
    alone = dataclasses.replace(cfg, talker=None, token2wav=None)
    assert {keys.part_of(n) for n in keys.tensor_shapes(alone)} == {"thinker"}
    text = dataclasses.replace(cfg.thinker.text, tie_word_embeddings=True)
    tied = dataclasses.replace(cfg, thinker=dataclasses.replace(cfg.thinker, text=text))
    assert set(keys.tensor_shapes(cfg)) - set(keys.tensor_shapes(tied)) == {keys.LM_HEAD}
    assert keys.published_dtype("token2wav.x") == "float32"
    assert keys.published_dtype("talker.x") == "bfloat16"
