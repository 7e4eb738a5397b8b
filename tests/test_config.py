"""Configurations: against transformers' own classes, both spellings, absent fields, and wrong ones."""

import copy
import dataclasses
import json

import pytest
from transformers.models.qwen2_5_omni import configuration_qwen2_5_omni as theirs

from omni_jax import config as C
from tests.tiny import tiny_config

PRESETS = ["3b", "7b", "tiny"]
CLASSES = {
    C.VisionConfig: theirs.Qwen2_5OmniVisionEncoderConfig,
    C.AudioConfig: theirs.Qwen2_5OmniAudioEncoderConfig,
    C.DecoderConfig: theirs.Qwen2_5OmniTextConfig,
    C.ThinkerConfig: theirs.Qwen2_5OmniThinkerConfig,
    C.TalkerConfig: theirs.Qwen2_5OmniTalkerConfig,
    C.DiTConfig: theirs.Qwen2_5OmniDiTConfig,
    C.BigVGANConfig: theirs.Qwen2_5OmniBigVGANConfig,
}
# What 4.57.6 writes into its code instead of its configuration, or does not set at all.
OURS_ALONE = {
    (C.VisionConfig, "rms_norm_eps"), (C.AudioConfig, "layer_norm_eps"), (C.DiTConfig, "time_freq_dim"),
    (C.ThinkerConfig, "vision_start_token_id"), (C.ThinkerConfig, "vision_end_token_id"),
    (C.ThinkerConfig, "eos_token_id"), (C.ThinkerConfig, "pad_token_id"),
}  # fmt: skip
RENAMED = {
    "audio_token_id": "audio_token_index",
    "image_token_id": "image_token_index",
    "video_token_id": "video_token_index",
}


def plain(value):
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value


def their_value(cfg, name, config):
    """The value of one of our fields in a configuration of theirs."""
    if name == "mrope_section":
        return (config.rope_scaling or {"mrope_section": [16, 24, 24]})["mrope_section"]
    if name == "head_dim" and not hasattr(config, "head_dim"):
        return config.hidden_size // config.num_attention_heads
    return getattr(config, RENAMED.get(name, name) if isinstance(cfg, C.ThinkerConfig) else name)


def assert_equal(cfg, config):
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if dataclasses.is_dataclass(value):
            nested = {"text": "text_config", "vision": "vision_config", "audio": "audio_config", "dit": "dit_config"}
            nested |= {"thinker": "thinker_config", "talker": "talker_config", "token2wav": "token2wav_config"}
            nested |= {"bigvgan": "bigvgan_config"}
            assert_equal(value, config if field.name == "decoder" else getattr(config, nested[field.name]))
        elif (type(cfg), field.name) not in OURS_ALONE:
            assert plain(value) == plain(their_value(cfg, field.name, config)), (type(cfg), field.name)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_round_trip_through_json_and_transformers(name):
    cfg = C.preset(name)
    raw = json.loads(json.dumps(C.to_dict(cfg)))
    assert C.from_dict(raw) == cfg
    config = theirs.Qwen2_5OmniConfig(**copy.deepcopy(raw))
    assert_equal(cfg, config)
    # What transformers writes of it is read as the same, too.
    assert C.from_dict(json.loads(config.to_json_string(use_diff=False))) == cfg


def test_to_dict_keeps_what_presets_lack():
    cfg = tiny_config(eos_token_id=(5, 6), pad_token_id=7)
    assert C.from_dict(C.to_dict(cfg)) == cfg
    alone = dataclasses.replace(cfg, talker=None, token2wav=None)
    assert C.from_dict(C.to_dict(alone)) == alone
    single = C.to_dict(cfg)
    single["thinker_config"]["eos_token_id"] = 5
    assert C.from_dict(single).thinker.eos_token_id == (5,)


@pytest.mark.parametrize("ours", CLASSES, ids=lambda c: c.__name__)
def test_absent_fields_take_the_defaults_of_transformers(ours):
    assert_equal(ours(), CLASSES[ours]())


def test_an_empty_file_is_the_default_of_transformers():
    raw = {"model_type": "qwen2_5_omni", "thinker_config": {}, "talker_config": {}, "token2wav_config": {}}
    cfg = C.from_dict(raw)
    assert cfg == C.OmniConfig(C.ThinkerConfig(), C.TalkerConfig(), C.Token2WavConfig())
    assert_equal(cfg, theirs.Qwen2_5OmniConfig(thinker_config={}, talker_config={}, token2wav_config={}))


def test_published_figures():
    three, seven = C.preset("3b"), C.preset("7b")
    assert (three.thinker.text.hidden_size, three.thinker.text.num_hidden_layers) == (2048, 36)
    assert (seven.thinker.text.hidden_size, seven.thinker.text.num_hidden_layers) == (3584, 28)
    assert three.thinker.vision.hidden_size == seven.thinker.vision.hidden_size == 1280
    assert three.talker.decoder.mrope_section == (16, 16, 0)
    assert seven.talker.decoder.head_dim == 128
    assert three.thinker.vision.window_patches == 8
    assert three.thinker.vision.patch_dim == 1176
    assert three.thinker.audio.chunk_frames == 200
    with pytest.raises(C.ConfigError, match="unknown preset '5b'; known are 3b, 7b, tiny"):
        C.preset("5b")


def test_both_spellings_of_the_dit():
    raw = C.to_dict(C.preset("tiny"))
    dit = raw["token2wav_config"]["dit_config"]
    names = (("hidden_size", "dim"), ("num_hidden_layers", "depth"), ("num_attention_heads", "heads"))
    for name, short in names:
        dit[short] = dit.pop(name)
    assert C.from_dict(raw) == C.preset("tiny")
    for name, short in names:  # where both are there, the class's own spelling counts
        dit[name] = dit[short]
        dit[short] = 3
    assert C.from_dict(raw) == C.preset("tiny")


def test_both_spellings_of_the_media_tokens():
    raw = C.to_dict(tiny_config())
    for kind in ("audio", "image", "video"):
        raw["thinker_config"][f"{kind}_token_id"] = raw["thinker_config"].pop(f"{kind}_token_index")
    assert C.from_dict(raw) == tiny_config()


def test_a_thinker_alone_and_speech_switched_off():
    cfg = tiny_config()
    alone = C.from_dict(C.to_dict(cfg)["thinker_config"])
    assert alone == C.OmniConfig(thinker=cfg.thinker)
    assert C.from_dict(C.to_dict(cfg) | {"enable_audio_output": False}) == alone


@pytest.mark.parametrize(
    ("mel_frames", "tokens"), [(1, 0), (2, 0), (3, 1), (4, 1), (6, 1), (7, 2), (200, 50), (30000, 7500)]
)
def test_audio_token_count(mel_frames, tokens):
    assert C.AudioConfig().token_count(mel_frames) == tokens


@pytest.mark.parametrize("model_type", ["qwen2_vl", None, 3])
def test_unknown_model_type(model_type):
    with pytest.raises(C.ConfigError, match=f"model_type {model_type!r} is not Qwen2.5-Omni; known are"):
        C.from_dict({"model_type": model_type})


def test_files_that_cannot_be_read(tmp_path):
    file = tmp_path / "config.json"
    with pytest.raises(C.ConfigError, match=r"config.json does not exist"):
        C.load_config(tmp_path)
    for data in (b"", b"{", b"\xff\xfe", b"[" * 100_000):
        file.write_bytes(data)
        with pytest.raises(C.ConfigError, match=r"cannot be read as JSON") as e:
            C.load_config(tmp_path)
        assert "\n" not in str(e.value)
    file.write_text("[]")
    with pytest.raises(C.ConfigError, match="must hold a JSON object"):
        C.load_config(tmp_path)
    file.write_text('{"model_type": "bert"}')
    with pytest.raises(C.ConfigError, match=r"config.json: model_type 'bert'"):
        C.load_config(tmp_path)


@pytest.mark.parametrize(
    ("part", "field", "value", "message"),
    [
        ("text_config", "hidden_size", "64", r"config.thinker.text.hidden_size is '64', where a whole number"),
        ("text_config", "hidden_size", 64.5, "where a whole number"),
        ("text_config", "hidden_size", -64, "where a whole number"),
        ("text_config", "hidden_size", True, "where a whole number"),
        ("text_config", "num_key_value_heads", 0, "where a whole number"),
        ("text_config", "num_key_value_heads", 3, "4 heads cannot share 3 kv heads"),
        ("text_config", "rope_theta", "big", "where a number"),
        ("text_config", "hidden_act", ["silu"], "where text"),
        ("text_config", "tie_word_embeddings", "no", "where true or false"),
        ("vision_config", "hidden_act", "quick_gelu", None),
        (
            "vision_config",
            "hidden_act",
            "xielu",
            r"config.thinker.vision.hidden_act: activation 'xielu' is unknown; did",
        ),
        ("audio_config", "activation_function", "prelu", "activation_function: activation 'prelu' is unknown"),
        ("text_config", "rope_scaling", "mrope", "rope_scaling must be an object"),
        ("text_config", "rope_scaling", {"type": "yarn"}, "has type 'yarn'"),
        ("text_config", "rope_scaling", {"mrope_section": [1, 2]}, "must sum to head_dim / 2 = 8"),
        ("text_config", "rope_scaling", {"mrope_section": "abc"}, "mrope_section is 'abc', where a list"),
        ("text_config", "use_sliding_window", True, "not supported"),
        ("vision_config", "fullatt_block_indexes", 7, "where a list of whole numbers"),
        ("vision_config", "fullatt_block_indexes", ["7"], "where a list of whole numbers"),
        ("audio_config", "d_model", None, None),
        ("audio_config", "d_model", 64.0, None),
    ],
)
def test_wrong_fields(part, field, value, message):
    raw = C.to_dict(C.preset("tiny"))
    raw["thinker_config"][part][field] = value
    if message is None:
        C.from_dict(raw)
    else:
        with pytest.raises(C.ConfigError, match=message):
            C.from_dict(raw)


def test_quantized_checkpoints_and_a_byte_order_mark(tmp_path):
    raw = C.to_dict(C.preset("tiny"))
    (tmp_path / "config.json").write_text(json.dumps(raw), "utf-8-sig")
    assert C.load_config(tmp_path) == C.preset("tiny")
    quantized = {"quantization_config": {"quant_method": "fp8"}}
    for more in (quantized, {"thinker_config": raw["thinker_config"] | quantized}):
        with pytest.raises(C.ConfigError, match="the checkpoint is quantized with 'fp8', fp8; GPTQ and AWQ of 4 bits"):
            C.from_dict(raw | more)
    four_bits = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}
    assert C.from_dict(raw | four_bits) == C.preset("tiny")


def test_convolutions_of_the_vocoder_have_a_middle():
    raw = C.to_dict(C.preset("tiny"))
    raw["token2wav_config"]["bigvgan_config"]["resblock_kernel_sizes"] = [3, 8, 11]
    with pytest.raises(C.ConfigError, match=r"resblock_kernel_sizes is '\[3, 8, 11\]', where a list of odd sizes"):
        C.from_dict(raw)


def test_any_value_of_another_kind_is_an_error_or_ignored():
    """Every field in turn takes values of every JSON kind; only ConfigError may come of it."""
    raw = C.to_dict(C.preset("tiny"))

    def places(tree, path=()):
        for key, value in tree.items():
            yield (*path, key)
            if isinstance(value, dict):
                yield from places(value, (*path, key))

    for path in places(raw):
        for value in ("x", -1, 0, 1.5, True, [], [[]], ["x"], [1], {}, {"a": 1}, float("nan"), 10**30, None):
            broken = copy.deepcopy(raw)
            at = broken
            for key in path[:-1]:
                at = at[key]
            at[path[-1]] = value
            try:
                cfg = C.from_dict(broken)
            except C.ConfigError:
                continue
            hash(cfg)  # frozen through and through
