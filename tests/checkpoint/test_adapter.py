"""PEFT adapters: merged at load and at convert, kept apart, and refused; the merge against peft's own."""

from __future__ import annotations

import copy
import json

import numpy as np
import peft
import pytest
import safetensors.numpy
import torch

from omni_jax import config as C
from omni_jax import load
from omni_jax.checkpoint import keys
from omni_jax.checkpoint.adapter import apply_adapter
from omni_jax.checkpoint.convert import convert, export
from omni_jax.checkpoint.folder import open_checkpoint
from omni_jax.checkpoint.load import load_params
from omni_jax.checkpoint.report import inspect
from omni_jax.checkpoint.safetensors_io import CheckpointError
from tests.checkpoint.test_convert import same_bytes, state
from tests.cli.test_main import run


@pytest.fixture(scope="module")
def peft_adapter(oracle_thinker, tmp_path_factory):
    """(folder that peft saved, the Thinker's state dict after peft's merge)."""
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "down_proj", "lm_head"], modules_to_save=["ln_post"],
        alpha_pattern={"layers.1.mlp.down_proj": 3}, use_rslora=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = peft.get_peft_model(copy.deepcopy(oracle_thinker), config)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(std=0.1)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder, {n: t.numpy() for n, t in model.merge_and_unload().state_dict().items()}


@pytest.fixture
def hand_made(tmp_path):
    """`make(config changes, tensors)` → a folder in the layout of PEFT, written by hand."""

    def make(tensors=None, **changes):
        folder = tmp_path / "lora"
        folder.mkdir(exist_ok=True)
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]} | changes
        (folder / "adapter_config.json").write_text(json.dumps(config))
        rng = np.random.default_rng(0)
        module = "base_model.model.thinker.model.layers.1.self_attn.q_proj"
        default = {
            f"{module}.lora_A.weight": rng.standard_normal((2, 64), np.float32),
            f"{module}.lora_B.weight": rng.standard_normal((64, 2), np.float32),
        }
        safetensors.numpy.save_file(default if tensors is None else tensors, folder / "adapter_model.safetensors")
        return folder

    return make


def params_of(path, **options):
    return load_params(path, C.load_config(path), dtype=np.float32, unroll=False, **options)["thinker"]


def test_the_merge_is_that_of_peft(checkpoint, peft_adapter):
    folder, merged = peft_adapter
    got, plain = params_of(checkpoint, adapter=folder), params_of(checkpoint)
    changed = 0
    for name, want in merged.items():
        path, layer = keys.tree_path(f"thinker.{name}")
        mine, base = got, plain
        for key in path[1:]:
            mine, base = mine[key], base[key]
        mine, base = (np.asarray(x if layer is None else x[layer]) for x in (mine, base))
        np.testing.assert_allclose(mine, want, rtol=0, atol=2e-6, err_msg=name)
        changed += not np.array_equal(mine, base)
    # q_proj and down_proj of 2 decoder layers, q_proj of 2 audio layers, down_proj of 2 vision blocks (and no biases),
    # the head, and `ln_post` whole.
    assert changed == 2 * 2 + 2 + 2 + 1 + 2


def test_transformers_and_we_answer_alike_with_it(checkpoint, oracle_thinker, peft_adapter, tmp_path):
    folder, merged = peft_adapter
    theirs = copy.deepcopy(oracle_thinker)
    theirs.load_state_dict({n: torch.from_numpy(t) for n, t in merged.items()})
    model = load(checkpoint, dtype="float32", adapter=folder)
    messages = [{"role": "user", "content": "What is a cat?"}]
    prompt = torch.from_numpy(model.prepare(messages).ids[None].astype(np.int64))
    want = theirs.generate(input_ids=prompt, max_new_tokens=6, do_sample=False, eos_token_id=list(model.eos))
    reply = model.generate(messages, max_new_tokens=6)
    assert list(reply.token_ids) == want[0, prompt.shape[1] :].tolist()
    # Merged at convert: the same weights, and so the same answer.
    convert(checkpoint, tmp_path / "c", adapter=folder)
    assert load(tmp_path / "c", dtype="float32").generate(messages, max_new_tokens=6).token_ids == reply.token_ids


@pytest.mark.parametrize("spelling", ["whole", "transformers5", "alone", "named"])
def test_spellings_of_the_keys(checkpoint, hand_made, spelling):
    tensors = safetensors.numpy.load_file(hand_made() / "adapter_model.safetensors")
    change = {
        "whole": lambda n: n,
        "transformers5": lambda n: n.replace("thinker.model.", "thinker.model.language_model."),
        "alone": lambda n: n.replace("model.thinker.", "model."),
        "named": lambda n: n.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."),
    }[spelling]
    got = params_of(checkpoint, adapter=hand_made({change(n): t for n, t in tensors.items()}))
    plain = params_of(checkpoint)
    a, b = tensors.values() if next(iter(tensors)).endswith("lora_A.weight") else reversed(tensors.values())
    want = np.array(plain["model"]["layers"]["self_attn"]["q_proj"]["weight"])
    want[1] += 2 * b @ a  # alpha 4 over rank 2
    np.testing.assert_allclose(got["model"]["layers"]["self_attn"]["q_proj"]["weight"], want, rtol=0, atol=1e-5)


def test_slices_are_those_of_the_whole(checkpoint, hand_made):
    name = "thinker.model.layers.1.self_attn.q_proj.weight"
    merged = apply_adapter(open_checkpoint(checkpoint, C.load_config(checkpoint)), hand_made())[name]
    whole, part = np.empty(merged.shape, np.float32), np.empty((5, 7), np.float32)
    merged.read(whole)
    merged.read(part, (slice(3, 8), slice(50, 57)))
    np.testing.assert_allclose(part, whole[3:8, 50:57], rtol=1e-6)


def test_kept_apart(checkpoint, hand_made, tmp_path):
    folder = hand_made()
    convert(checkpoint, tmp_path / "c", adapter=folder, keep_adapter=True)
    assert inspect(tmp_path / "c")["adapter"] is True
    export(tmp_path / "c", tmp_path / "e")
    assert same_bytes(state(tmp_path / "e"), state(checkpoint))
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "e" / "adapter" / file).read_bytes() == (folder / file).read_bytes()
    # The base as it was, unless the adapter is asked for.
    base, merged = params_of(tmp_path / "c"), params_of(tmp_path / "c", adapter=tmp_path / "c" / "adapter")
    weight = lambda p: np.asarray(p["model"]["layers"]["self_attn"]["q_proj"]["weight"])  # noqa: E731
    np.testing.assert_array_equal(weight(base), weight(params_of(checkpoint)))
    np.testing.assert_array_equal(weight(merged), weight(params_of(checkpoint, adapter=folder)))
    assert not np.array_equal(weight(merged), weight(base))
    # It goes along to the next folder, unless it is merged on the way.
    convert(tmp_path / "c", tmp_path / "along", parts=("thinker",))
    convert(tmp_path / "c", tmp_path / "merged", parts=("thinker",), adapter=tmp_path / "c" / "adapter")
    assert inspect(tmp_path / "along")["adapter"] is True
    assert inspect(tmp_path / "merged")["adapter"] is False
    np.testing.assert_array_equal(weight(params_of(tmp_path / "merged")), weight(merged))
    with pytest.raises(CheckpointError, match="no adapter to keep; give its folder with --adapter"):
        convert(checkpoint, tmp_path / "x", keep_adapter=True)


def test_the_command_takes_a_converted_folder_and_an_adapter(checkpoint, hand_made, tmp_path, monkeypatch, capsys):
    convert(checkpoint, tmp_path / "c")
    options = ["--text", "Hi", "--max-new-tokens", 4, "--dtype", "float32", "--json", "--adapter", hand_made()]
    code, out, _ = run(monkeypatch, capsys, "generate", "--model", tmp_path / "c", *options)
    assert code == 0
    model = load(checkpoint, dtype="float32", adapter=hand_made())
    message = [{"role": "user", "content": "Hi"}]
    assert json.loads(out)["token_ids"] == list(model.generate(message, max_new_tokens=4).token_ids)


A = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
BAD = {
    "another kind": ({"peft_type": "IA3"}, None, "peft_type 'IA3' cannot be merged; only LORA can"),
    "base changed": (
        {"init_lora_weights": "pissa_niter_4"},
        None,
        "init_lora_weights is 'pissa_niter_4', which is not",
    ),
    "dora": ({"use_dora": True}, None, "use_dora is 'True', which is not supported"),
    "transposed": ({"fan_in_fan_out": True}, None, "fan_in_fan_out is 'True'"),
    "no alpha": ({"lora_alpha": None}, None, "alpha of 'lora_alpha' is not a number"),
    "alpha of text": ({"lora_alpha": "4"}, None, "is not a number"),
    "pattern": ({"alpha_pattern": {"(a+)+$": 3}}, None, "is more than a name"),
    "pattern of another kind": ({"alpha_pattern": [1]}, None, "alpha_pattern"),
    "nothing": ({}, {}, "holds no LoRA weights"),
    "half": ({}, {A: np.zeros((2, 64), np.float32)}, "do not fit"),
    "unknown": ({}, {"base_model.model.x.lora_embedding_A": np.zeros(2, np.float32)}, "not part of a plain LoRA"),
    "another model": (
        {},
        {A.replace("layers.1", "layers.9"): np.zeros((2, 64), np.float32)},
        "lacks; it is for another model",
    ),
    "whole numbers": ({}, {A: np.zeros((2, 64), np.int8)}, "int8 where a float is asked"),
    "replaced by another shape": (
        {},
        {A: np.zeros((2, 64), np.float32), "base_model.model.lm_head.weight": np.zeros((3, 3), np.float32)},
        "is \\[3, 3\\], not",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_adapters(checkpoint, hand_made, tmp_path, case):
    changes, tensors, message = BAD[case]
    with pytest.raises(CheckpointError, match=message) as e:
        convert(checkpoint, tmp_path / "c", adapter=hand_made(tensors, **changes))
    assert str(tmp_path / "lora") in str(e.value)
    assert "\n" not in str(e.value)
    assert not (tmp_path / "c").exists()


def test_no_adapter_there(checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match="give the folder of a PEFT adapter"):
        params_of(checkpoint, adapter=tmp_path)
    (tmp_path / "adapter_config.json").write_text("[" * 10000)
    with pytest.raises(CheckpointError, match="not sound JSON"):
        params_of(checkpoint, adapter=tmp_path)
