"""Meshes by name, and where every parameter, cache and main activation of the published models lies on them.

Nothing is allocated: the meshes are abstract, so that those of several hosts are checked as well.
"""

from __future__ import annotations

import collections
import math
import re

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from omni_jax import buckets, load
from omni_jax import config as C
from omni_jax.model import parameters, stages
from omni_jax.model.kv_cache import CACHE_AXES
from omni_jax.parallel import meshes
from omni_jax.parallel.sharding import MESH_AXES, MeshError
from tests.cli import test_main

CONFIGS = {name: C.preset(name) for name in ("3b", "7b")}
MODELS = [(name, mesh) for name in CONFIGS for mesh in ("1", "2x2", "2x4", "4x4", "8x8")]

# Chips → (data, fsdp, tensor, sequence): the tensor axis takes the kv heads, 2 and 4.
SIZES = {
    ("3b", "1"): (1, 1, 1, 1), ("7b", "1"): (1, 1, 1, 1),
    ("3b", "1x2"): (1, 1, 2, 1), ("7b", "1x2"): (1, 1, 2, 1),
    ("3b", "2x2"): (1, 1, 2, 2), ("7b", "2x2"): (1, 1, 4, 1),
    ("3b", "2x4"): (1, 1, 2, 4), ("7b", "2x4"): (1, 1, 4, 2),
    ("3b", "4x4"): (2, 1, 2, 4), ("7b", "4x4"): (2, 1, 4, 2),
    ("3b", "2x2x4"): (2, 1, 2, 4), ("7b", "2x2x4"): (2, 1, 4, 2),
    ("3b", "8x8"): (8, 1, 2, 4), ("7b", "8x8"): (8, 1, 4, 2),
    ("3b", "16x16"): (32, 1, 2, 4), ("7b", "16x16"): (32, 1, 4, 2),
    ("3b", "data=2,tensor=2,sequence=2"): (2, 1, 2, 2), ("3b", "fsdp=8"): (1, 8, 1, 1),
}  # fmt: skip

# Every parameter: which of its axes is split. C: over all chips of a copy; V: over those that divide the vision tower's
# 3420 features; a dot: whole. What has only dots is whole on each chip by choice: it is small, or a convolution.
PARAMETERS = {
    r"thinker\.model\.embed_tokens\.weight": ". C",
    r"thinker\.lm_head\.weight": "C .",
    r"(thinker|talker)\.model\.layers\.self_attn\.[qkv]_proj\.weight": ". C .",
    r"(thinker|talker)\.model\.layers\.self_attn\.[qkv]_proj\.bias": ". C",
    r"(thinker|talker)\.model\.layers\.self_attn\.o_proj\.weight": ". . C",
    r"(thinker|talker)\.model\.layers\.mlp\.(gate|up)_proj\.weight": ". C .",
    r"(thinker|talker)\.model\.layers\.mlp\.down_proj\.weight": ". . C",
    r"(thinker|talker)\.model\.layers\.\w+_layernorm\.weight": ". .",
    r"(thinker|talker)\.model\.norm\.weight": ".",
    r"talker\.model\.embed_tokens\.weight": ". C",
    r"talker\.codec_head\.weight": "C .",
    r"talker\.thinker_to_talker_proj\.weight": ". .",
    r"talker\.thinker_to_talker_proj\.bias": ".",
    r"thinker\.visual\.patch_embed\.proj\.weight": ". . . . .",
    r"thinker\.visual\.blocks\.attn\.[qkv]\.weight": ". C .",
    r"thinker\.visual\.blocks\.attn\.[qkv]\.bias": ". C",
    r"thinker\.visual\.blocks\.attn\.proj\.weight": ". . C",
    r"thinker\.visual\.blocks\.mlp\.(gate|up)_proj\.weight": ". V .",
    r"thinker\.visual\.blocks\.mlp\.(gate|up)_proj\.bias": ". V",
    r"thinker\.visual\.blocks\.mlp\.down_proj\.weight": ". . V",
    r"thinker\.visual\.blocks\.(norm[12]\.weight|(attn\.proj|mlp\.down_proj)\.bias)": ". .",
    r"thinker\.visual\.merger\.mlp\.0\.weight": "V .",
    r"thinker\.visual\.merger\.mlp\.0\.bias": "V",
    r"thinker\.visual\.merger\.mlp\.2\.weight": ". V",
    r"thinker\.visual\.merger\.(mlp\.2\.bias|ln_q\.weight)": ".",
    r"thinker\.audio_tower\.conv1\.weight": "C . .",
    r"thinker\.audio_tower\.conv1\.bias": "C",
    r"thinker\.audio_tower\.conv2\.weight": ". C .",
    r"thinker\.audio_tower\.(conv2|ln_post|proj)\.bias": ".",
    r"thinker\.audio_tower\.ln_post\.weight": ".",
    r"thinker\.audio_tower\.(proj|audio_bos_eos_token)\.weight": ". .",
    r"thinker\.audio_tower\.layers\.self_attn\.[qkv]_proj\.weight": ". C .",
    r"thinker\.audio_tower\.layers\.self_attn\.[qv]_proj\.bias": ". C",
    r"thinker\.audio_tower\.layers\.self_attn\.out_proj\.weight": ". . C",
    r"thinker\.audio_tower\.layers\.fc1\.weight": ". C .",
    r"thinker\.audio_tower\.layers\.fc1\.bias": ". C",
    r"thinker\.audio_tower\.layers\.fc2\.weight": ". . C",
    r"thinker\.audio_tower\.layers\.(\w+_layer_norm\.(weight|bias)|(fc2|self_attn\.out_proj)\.bias)": ". .",
    r"token2wav\.code2wav_dit_model\.transformer_blocks\.attn_norm\.linear\.weight": ". C .",
    r"token2wav\.code2wav_dit_model\.transformer_blocks\.attn_norm\.linear\.bias": ". C",
    r"token2wav\.code2wav_dit_model\.transformer_blocks\.attn\.to_[qkv]\.weight": ". C .",
    r"token2wav\.code2wav_dit_model\.transformer_blocks\.attn\.to_[qkv]\.bias": ". C",
    r"token2wav\.code2wav_dit_model\.transformer_blocks\.attn\.to_out\.0\.weight": ". . C",
    r"token2wav\.code2wav_dit_model\.transformer_blocks\.ff\.ff\.0\.weight": ". C .",
    r"token2wav\.code2wav_dit_model\.transformer_blocks\.ff\.ff\.0\.bias": ". C",
    r"token2wav\.code2wav_dit_model\.transformer_blocks\.ff\.ff\.3\.weight": ". . C",
    r"token2wav\.code2wav_dit_model\.transformer_blocks\.(attn\.to_out\.0|ff\.ff\.3)\.bias": ". .",
    r"token2wav\.code2wav_dit_model\.(time_embed|text_embed|input_embed|rotary_embed|norm_out|proj_out)\..*": "...",
    r"token2wav\.code2wav_bigvgan_model\..*": "...",
}
# Most bytes that a chip holds of a part's weights beside its share; the DiT keeps ECAPA and its small layers whole.
SHARES = {"decoder": 1.001, "vision": 1.71, "audio": 1.06, "talker": 1.035, "dit": 1.22}


def placement(name: str, mesh: str) -> meshes.Placement:
    cfg = CONFIGS[name]
    sizes = meshes.axis_sizes(mesh, cfg)
    abstract = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    return meshes.Placement(cfg, abstract, abstract)


def copy_axes(name: str, mesh: str) -> tuple[str, ...]:
    """The mesh axes that one copy of the model is cut over."""
    sizes = meshes.axis_sizes(mesh, CONFIGS[name])
    return tuple(a for a in ("tensor", "sequence") if sizes[a] > 1)


def vision_axes(name: str, mesh: str) -> tuple[str, ...]:
    """3420 = 4 × 855: four chips of a copy take part in the vision tower's MLP, and in its merger."""
    axes, sizes = copy_axes(name, mesh), meshes.axis_sizes(mesh, CONFIGS[name])
    return axes if math.prod(sizes[a] for a in axes) <= 4 else (max(axes, key=sizes.__getitem__),)


def spec(row: str, c: tuple[str, ...], v: tuple[str, ...]) -> P:
    one = {".": None, "C": c if len(c) > 1 else (c or (None,))[0], "V": v if len(v) > 1 else (v or (None,))[0]}
    return P(*(one[axis] for axis in row.split()))


def leaves(tree):
    found = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in found}


@pytest.mark.parametrize(("name", "mesh"), SIZES)
def test_sizes_of_meshes(name, mesh):
    assert tuple(meshes.axis_sizes(mesh, CONFIGS[name]).values()) == SIZES[name, mesh]


@pytest.mark.parametrize(("name", "mesh"), MODELS)
def test_every_parameter(name, mesh):
    """The partition of each parameter by name, what is whole by choice, and the bytes that a chip holds."""
    placed = placement(name, mesh)
    found, specs = leaves(stages.stage_shardings(placed)), leaves(parameters.param_specs(CONFIGS[name]))
    assert set(found) == set(specs)
    c, v = copy_axes(name, mesh), vision_axes(name, mesh)
    copy = math.prod(placed.thinker.shape[a] for a in c)
    used, held, whole = set(), collections.Counter(), collections.Counter()
    for path, sharding in found.items():
        [row] = [(p, r) for p, r in PARAMETERS.items() if re.fullmatch(p, path)]
        used.add(row[0])
        shape = specs[path].shape
        want = P(*[None] * len(shape)) if row[1] == "..." else spec(row[1], c, v)
        assert sharding.spec == want, path
        part = stages.inner_part(*path.split(".")[:2])
        part = "decoder" if part == "thinker" else part
        held[part] += math.prod(sharding.shard_shape(shape))
        whole[part] += math.prod(shape)
    assert used == set(PARAMETERS)
    for part, most in SHARES.items():
        assert 1 <= held[part] * copy / whole[part] < most, part
    assert held["bigvgan"] == whole["bigvgan"]


ACTIVATIONS = {
    "residual": ("batch", "length", "act_embed"),
    "projected": ("batch", "length", "act_proj"),
    "queries": ("attend_batch", "attend_length", "act_heads", None),
    "keys": ("attend_batch", None, "act_kv_heads", None),
    "mlp": ("batch", "length", "act_mlp"),
    "logits": ("batch", "act_vocab"),
    "cache": CACHE_AXES,
}
T, S, D, B = "tensor", "sequence", "data", ("data", "sequence")
TS = ("tensor", "sequence")
# (model, mesh, part, batch, new tokens) → where its activations and its cache lie.
LIE = {
    # A decode step: the cache by kv heads, and by rows where they fill the sequence axis, else by slots.
    ("3b", "2x4", "thinker", 1, 1): [P(None, None, None), P(None, None, TS), P(None, None, T, None),
        P(None, None, T, None), P(None, None, TS), P(None, TS), P(None, None, T, S, None)],
    ("3b", "2x4", "thinker", 32, 1): [P(None, None, None), P(None, None, TS), P(S, None, T, None),
        P(S, None, T, None), P(None, None, TS), P(None, TS), P(None, S, T, None, None)],
    ("3b", "2x2", "thinker", 1, 1): [P(None, None, None), P(None, None, TS), P(None, None, T, None),
        P(None, None, T, None), P(None, None, TS), P(None, TS), P(None, None, T, S, None)],
    ("3b", "4x4", "thinker", 32, 1): [P(D, None, None), P(D, None, TS), P(B, None, T, None),
        P(B, None, T, None), P(D, None, TS), P(D, TS), P(None, B, T, None, None)],
    ("3b", "4x4", "thinker", 1, 1): [P(None, None, None), P(None, None, TS), P(None, None, T, None),
        P(None, None, T, None), P(None, None, TS), P(None, TS), P(None, None, T, S, None)],
    # Two rows fill the data axis but not the sequence axis.
    ("3b", "4x4", "thinker", 2, 1): [P(D, None, None), P(D, None, TS), P(D, None, T, None),
        P(D, None, T, None), P(D, None, TS), P(D, TS), P(None, D, T, S, None)],
    # 7B has four kv heads: 2x2 is taken by them alone.
    ("7b", "2x2", "thinker", 1, 1): [P(None, None, None), P(None, None, T), P(None, None, T, None),
        P(None, None, T, None), P(None, None, T), P(None, T), P(None, None, T, None, None)],
    ("7b", "2x4", "thinker", 32, 1): [P(None, None, None), P(None, None, TS), P(S, None, T, None),
        P(S, None, T, None), P(None, None, TS), P(None, TS), P(None, S, T, None, None)],
    # A prefill: the query heads of a kv head over the sequence axis where they divide (8 of 3B do, 7 of 7B do not),
    # else the queries.
    ("3b", "2x4", "thinker", 1, 1024): [P(None, None, None), P(None, None, TS), P(None, None, TS, None),
        P(None, None, T, None), P(None, None, TS), P(None, TS), P(None, None, T, S, None)],
    ("7b", "2x4", "thinker", 1, 1024): [P(None, None, None), P(None, None, TS), P(None, S, T, None),
        P(None, None, T, None), P(None, None, TS), P(None, TS), P(None, None, T, S, None)],
    # From LONG_PROMPT on the residual stream is cut, and with it the hidden features of the MLP.
    ("3b", "2x4", "thinker", 1, 32768): [P(None, S, None), P(None, S, T), P(None, None, TS, None),
        P(None, None, T, None), P(None, S, T), P(None, T), P(None, None, T, S, None)],
    ("7b", "4x4", "thinker", 1, 32768): [P(None, S, None), P(None, S, T), P(None, S, T, None),
        P(None, None, T, None), P(None, S, T), P(None, T), P(None, None, T, S, None)],
    # The Talker of 3B has 14 heads for 2 kv heads, that of 7B 12 for 4.
    ("3b", "2x4", "talker", 1, 1): [P(None, None, None), P(None, None, TS), P(None, None, T, None),
        P(None, None, T, None), P(None, None, TS), P(None, TS), P(None, None, T, S, None)],
    ("7b", "2x4", "talker", 32, 1): [P(None, None, None), P(None, None, TS), P(S, None, T, None),
        P(S, None, T, None), P(None, None, TS), P(None, TS), P(None, S, T, None, None)],
    # Axes that the kv heads do not divide leave attention whole: a kv head would have to be cut.
    ("3b", "tensor=8", "thinker", 32, 1): [P(None, None, None), P(None, None, T), P(None, None, None, None),
        P(None, None, None, None), P(None, None, T), P(None, T), P(None, None, None, None, None)],
    ("3b", "fsdp=8", "thinker", 32, 1): [P("fsdp", None, None), P("fsdp", None, None), P("fsdp", None, None, None),
        P("fsdp", None, None, None), P("fsdp", None, None), P("fsdp", None), P(None, "fsdp", None, None, None)],
    # Towers: frames and chunks over copies, heads over the chips of a copy.
    ("3b", "4x4", "vision", 4, 1): [P(D, None, None), P(D, None, TS), P(D, None, TS, None),
        P(D, None, TS, None), P(D, None, S), P(D, None), None],
    ("3b", "4x4", "vision", 1, 1): [P(None, None, None), P(None, None, TS), P(None, None, TS, None),
        P(None, None, TS, None), P(None, None, S), P(None, None), None],
    # 20 heads of the audio tower: four chips take them.
    ("3b", "4x4", "audio", 16, 1): [P(D, None, None), P(D, None, TS), P(D, None, S, None),
        P(D, None, S, None), P(D, None, TS), P(D, None), None],
    ("3b", "2x4", "dit", 1, 1): [P(None, None, None), P(None, None, TS), P(None, None, TS, None),
        P(None, None, TS, None), P(None, None, TS), P(None, None), None],
    ("3b", "4x4", "bigvgan", 2, 1): [P(D, None, None), P(D, None, None), P(D, None, None, None),
        P(D, None, None, None), P(D, None, None), P(D, None), None],
}  # fmt: skip


@pytest.mark.parametrize("case", LIE, ids=lambda case: " ".join(map(str, case)))
def test_activations_and_caches(case):
    name, mesh, part, batch, length = case
    rules = meshes.rules(part, CONFIGS[name], meshes.axis_sizes(mesh, CONFIGS[name]), batch, length)
    for (what, axes), want in zip(ACTIVATIONS.items(), LIE[case], strict=True):
        if want is not None:
            assert rules.spec(axes) == want, what


@pytest.mark.parametrize(("name", "mesh"), [(n, m) for n, m in MODELS if m != "1"])
@pytest.mark.parametrize("part", ["thinker", "talker"])
def test_a_cache_is_never_held_twice_by_a_copy(name, mesh, part):
    """At every batch bucket and every capacity, and each shape that reaches the program is divided."""
    cfg = CONFIGS[name]
    decoder = cfg.thinker.text if part == "thinker" else cfg.talker.decoder
    placed = placement(name, mesh)
    copy = math.prod(placed.thinker.shape[a] for a in copy_axes(name, mesh))
    for batch in buckets.BATCH:
        data = math.gcd(batch, placed.thinker.shape["data"])
        data = data if data == placed.thinker.shape["data"] else 1
        for capacity in (buckets.CACHE[0], 3072, buckets.CACHE[-1]):
            shape = (decoder.num_hidden_layers, batch, decoder.num_key_value_heads, capacity, decoder.head_dim)
            shard = placed.layout(part, batch).sharding(CACHE_AXES, shape).shard_shape(shape)
            assert math.prod(shard) * copy * data == math.prod(shape)


@pytest.mark.parametrize("length", buckets.PROMPT)
def test_every_prompt_bucket_can_be_cut(length):
    for name, mesh in MODELS:
        layout = placement(name, mesh).layout("thinker", 1, length)
        d = CONFIGS[name].thinker.text
        layout.sharding(ACTIVATIONS["residual"], (1, length, d.hidden_size))
        layout.sharding(ACTIVATIONS["queries"], (1, length, d.num_attention_heads, d.head_dim))
        if length >= meshes.LONG_PROMPT and layout.mesh.shape["sequence"] > 1:
            assert layout.rules.table["length"] == ("sequence",)


def test_parts_that_are_not_there():
    text = C.OmniConfig(thinker=CONFIGS["3b"].thinker, talker=None, token2wav=None)
    for part in ("talker", "dit", "bigvgan"):
        if part != "bigvgan":
            with pytest.raises(MeshError, match="this model has no T"):
                meshes.rules(part, text, meshes.axis_sizes("2x2", text))


@pytest.mark.parametrize(
    ("mesh", "said"),
    [
        ("2*4", "'2\\*4' is neither chips such as 1, 2x2, 2x4 or 4x4 nor axes such as data=2,tensor=4"),
        ("0x4", "neither chips"), ("2x2x2x2", "neither chips"), ("", "neither chips"), ("tensor=0", "neither chips"),
        ("tensors=2", r"\(axes are data, fsdp, tensor, sequence\)"), ("tensor=2,tensor=2", "names an axis twice"),
        ("3", "'3' has 3 chips, which neither batches nor heads divide over; name a power of two"),
        ("2x3", "6 chips"), ("tensor=3", r"tensor=3 divides neither heads nor hidden features .* \(16 heads of 128"),
        ("tensor=2,sequence=3", "sequence=3 divides neither"), ("fsdp=3", "fsdp=3 divides neither"),
    ],
)  # fmt: skip
def test_names_that_mean_nothing_or_do_not_fit(mesh, said):
    with pytest.raises(MeshError, match=said) as e:
        meshes.axis_sizes(mesh, CONFIGS["3b"])
    assert "\n" not in str(e.value)


def test_meshes_that_are_larger_than_the_machine():
    cfg, here = CONFIGS["3b"], len(jax.devices())
    with pytest.raises(MeshError, match=rf"a mesh of 64 chips .* needs more devices than the {here} there are \(cpu\)"):
        meshes.place(cfg, "8x8")
    with pytest.raises(MeshError, match=rf"meshes 1 and 8x8 take more than the {here} devices"):
        meshes.place(cfg, "1", "8x8")


@pytest.mark.parametrize(
    ("mesh", "said"),
    [
        ("8x8", "(cpu); choose a smaller --mesh, or start on a larger machine"),
        ("2x3", "'2x3' has 6 chips, which neither batches nor heads divide over; name a power of two"),
        ("tensor=3", "tensor=3 divides neither heads nor hidden features of this model"),
        ("model=2", "'model=2' is neither chips such as 1, 2x2, 2x4 or 4x4 nor axes"),
        ("data=2,data=2", "'data=2,data=2' names an axis twice"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "vocode", "batch", "bench", "speech"])
def test_commands_say_so_in_one_line(monkeypatch, capsys, checkpoint, tmp_path, command, mesh, said):
    (tmp_path / "codes.json").write_text("[1, 2]")
    (tmp_path / "in.jsonl").write_text('[{"role": "user", "content": "Hi"}]\n')
    model = ("--model", checkpoint)
    arguments = {
        "generate": (*model, "--text", "Hi", "--mesh", mesh),
        "speech": (*model, "--text", "Hi", "--mesh", "1", "--speech-mesh", mesh, "--speech", tmp_path / "x.wav"),
        "vocode": (*model, "--codes", tmp_path / "codes.json", tmp_path / "x.wav", "--mesh", mesh),
        "batch": (tmp_path / "in.jsonl", tmp_path / "out.jsonl", *model, "--mesh", mesh),
        "bench": ("--preset", "tiny", "--stages", "decode", "--mesh", mesh),
    }[command]
    code, out, err = run("generate" if command == "speech" else command, monkeypatch, capsys, arguments)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    if (command, mesh) == ("speech", "8x8"):
        said = "meshes 1 and 8x8 take more than the"
    assert said in err
    assert not list(tmp_path.glob("out*")) + list(tmp_path.glob("x*"))


def test_speech_meshes_go_with_speech(monkeypatch, capsys, checkpoint):
    for flags, said in ((("--mesh", "1"), "--speech-mesh goes with --speech"), ((), "goes with --speech")):
        arguments = ("--model", checkpoint, "--text", "Hi", "--speech-mesh", "1", *flags)
        code, _, err = run("generate", monkeypatch, capsys, arguments)
        assert (code, err.count("\n")) == (2, 1)
        assert said in err
    with pytest.raises(MeshError, match="the Thinker has none; give it one as well"):
        load(checkpoint, speech_mesh="1")


def run(command, monkeypatch, capsys, arguments):
    return test_main.run(monkeypatch, capsys, command, *arguments)


class Device:
    """A chip of a host that is not there."""

    platform = "cpu"

    def __init__(self, number: int, host: int):
        self.id, self.process_index = number, host


def test_hosts_without_work_are_refused():
    pod = [Device(i, i // 4) for i in range(16)]
    assert meshes.make_mesh({"data": 2, "tensor": 2, "sequence": 4}, pod).devices.shape == (2, 1, 2, 4)
    with pytest.raises(MeshError, match="leaves whole hosts without work; there are 16 chips"):
        meshes.make_mesh({"tensor": 2, "sequence": 4}, pod)
    with pytest.raises(MeshError, match="chips of several hosts"):
        meshes.place(CONFIGS["3b"], "2x2", "2x2", pod)
    with pytest.raises(MeshError, match="chips of several hosts"):
        meshes.place(CONFIGS["3b"], "2x4", "2x4", pod)
    own = meshes.place(CONFIGS["3b"], "1x2", "1x2", pod[:4])
    assert own.has_speech_mesh
    assert [d.id for d in own.thinker.devices.flat] == [0, 1]
    assert [d.id for d in own.speech.devices.flat] == [2, 3]
    assert own.thinker.axis_names == MESH_AXES
