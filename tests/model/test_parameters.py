"""The declarations: consistent in themselves, and all that is derived from them holds the same trees."""

import math
import subprocess
import sys

import jax
import pytest

from omni_jax import config as C
from omni_jax.checkpoint import keys
from omni_jax.model import audio, declare, parameters, talker, thinker, token2wav, vision
from omni_jax.model.declare import ParamSpec
from omni_jax.parallel.sharding import check_names

CONFIGS = {name: C.preset(name) for name in ("3b", "7b", "tiny")}


@pytest.mark.parametrize("name", CONFIGS)
def test_axes_and_stacks(name):
    stacks = set()
    for path, spec in declare.walk(parameters.param_specs(CONFIGS[name])):
        check_names(spec.axes)
        named = [axis for axis in spec.axes if axis]
        assert len(named) == len(set(named)), f"{path}: an axis name may appear once"
        depth = parameters.stack_of(path)
        assert (depth is not None) == ("layers" in spec.axes) == (spec.axes[0] == "layers"), path
        stacks |= set() if depth is None else {(".".join(path[:depth]), spec.shape[0])}
    # One length for each stack, and no stack without parameters.
    assert sorted(stack for stack, _ in stacks) == sorted(parameters.STACKS)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_published_tensor_has_its_place(name):
    specs = dict(declare.walk(parameters.param_specs(CONFIGS[name])))
    count = 0
    for tensor, shape in keys.tensor_shapes(CONFIGS[name]).items():
        path, layer = keys.tree_path(tensor)
        assert shape == (specs[path].shape if layer is None else specs[path].shape[1:]), tensor
        count += math.prod(shape)
    assert count == sum(math.prod(spec.shape) for spec in specs.values())


def test_what_is_initialised_is_what_is_declared():
    cfg = CONFIGS["tiny"]
    made = {
        "thinker": jax.eval_shape(lambda key: thinker.init(cfg.thinker, key), jax.random.key(0)),
        "talker": jax.eval_shape(lambda key: talker.init(cfg.talker, key), jax.random.key(0)),
        "token2wav": jax.eval_shape(lambda key: token2wav.init(cfg.token2wav, key), jax.random.key(0)),
    }
    assert jax.tree.map(lambda x: x.shape, made) == jax.tree.map(lambda x: x.shape, parameters.param_specs(cfg))


def test_modules_declare_what_is_declared_for_them():
    """`Module.init` and `parameters` give one tree, but for the table that is only carried."""
    cfg, key = CONFIGS["tiny"].thinker, jax.random.key(0)
    shapes = lambda tree: jax.tree.map(lambda x: x.shape, tree)  # noqa: E731
    made = jax.eval_shape(vision.VisionTower(cfg.vision).init, key, *vision.vision_shapes(cfg.vision, 1, 1))
    assert shapes(made["params"]) == shapes(parameters.vision(cfg.vision))
    made = jax.eval_shape(audio.AudioTower(cfg.audio).init, key, *audio.audio_shapes(cfg.audio, 1))
    declared = parameters.audio(cfg.audio)
    del declared["audio_bos_eos_token"]
    assert shapes(made["params"]) == shapes(declared)


def test_initial_values():
    key, rotary = jax.random.key(0), parameters.dit(CONFIGS["tiny"].token2wav.dit)["rotary_embed"]
    made = declare.init(declare.stacked(declare.dense(64, 128), 3), key)
    assert made["weight"].shape == (3, 64, 128)
    assert float(made["weight"].std()) == pytest.approx(declare.INIT_STDDEV, rel=0.05)
    assert not made["bias"].any()
    made = declare.init(declare.norm(8, bias=True), key)
    assert (made["weight"] == 1).all()
    assert (made["bias"] == 0).all()
    frequencies = declare.init(rotary, key)["inv_freq"]
    assert frequencies[0] == 1
    assert (frequencies[1:] < frequencies[:-1]).all()


def test_matrices_that_are_multiplied_by():
    """What LoRA may adapt and int8 may quantize: no table, no convolution, no vector."""
    specs = {".".join(path): spec for path, spec in declare.walk(parameters.param_specs(CONFIGS["tiny"]))}
    found = {name for name, spec in specs.items() if spec.matmul}
    assert all(name.endswith(".weight") and specs[name].axes[-2:] != (None, "table") for name in found)
    multiplied = (
        "thinker.lm_head", "thinker.model.layers.mlp.up_proj", "thinker.visual.merger.mlp.0", "talker.codec_head",
        "thinker.audio_tower.layers.fc1", "token2wav.code2wav_dit_model.transformer_blocks.attn.to_out.0",
    )  # fmt: skip
    others = (
        "thinker.model.embed_tokens", "thinker.model.norm", "thinker.visual.patch_embed.proj",
        "thinker.audio_tower.conv1", "thinker.audio_tower.audio_bos_eos_token",
        "token2wav.code2wav_dit_model.text_embed.codec_embed", "token2wav.code2wav_bigvgan_model.conv_pre",
    )  # fmt: skip
    assert {f"{name}.weight" for name in multiplied} <= found
    assert {f"{name}.weight" for name in others} <= set(specs) - found


def test_each_axis_has_a_name():
    with pytest.raises(ValueError, match=r"1 axis names \('mlp',\) for a parameter of shape \(2, 3\)"):
        ParamSpec((2, 3), ("mlp",))


def test_shapes_are_known_without_jax():
    """`inspect` and `convert` start at once."""
    code = (
        "import sys; from omni_jax import config; from omni_jax.checkpoint import convert, keys, report; "
        "print(len(keys.tensor_shapes(config.preset('3b'))), {'jax', 'flax'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "2544 set()\n"
