"""Random checkpoints in the published layout: whole, deterministic, and loadable by transformers 4.57.6."""

import dataclasses
import hashlib
import json

import ml_dtypes
import numpy as np
import pytest
import tokenizers
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    Qwen2_5OmniForConditionalGeneration,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2VLImageProcessor,
    WhisperFeatureExtractor,
)

from omni_jax import config as C
from omni_jax.checkpoint import keys, tokenizer_files
from omni_jax.checkpoint.folder import open_checkpoint
from omni_jax.checkpoint.load import load_params
from omni_jax.checkpoint.publish import write_random
from omni_jax.checkpoint.safetensors_io import CheckpointError
from omni_jax.checkpoint.speakers import load_voices

TEXTS = [
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|audio_bos|><|AUDIO|><|audio_eos|>",
    "What do you see?  Two  spaces, a tab\t, CRLF\r\n\r\n and 12345 it's I'LL",
    "naïve cafe\u0301 漢字かな 😀 \u200b الْعَرَبِيَّة",  # a combining accent: NFC composes it
    "<tool_call>{}</tool_call><|vision_bos|><|IMAGE|><|VIDEO|><|vision_eos|><|nothing|>",
    "",
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("publish") / "tiny"
    return folder, write_random(folder, C.preset("tiny"), max_shard_bytes=2_000_000)


def digests(folder):
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()}


def test_files(tiny):
    folder, cfg = tiny
    assert C.load_config(folder) == cfg
    names = {f.name for f in folder.iterdir()}
    assert {
        "config.json", "generation_config.json", "preprocessor_config.json", "chat_template.json", "tokenizer.json",
        "vocab.json", "merges.txt", "tokenizer_config.json", "model.safetensors.index.json", "spk_dict.pt",
    } <= names  # fmt: skip
    assert sum(name.endswith(".safetensors") for name in names) > 2
    tensors = open_checkpoint(folder, cfg)
    assert set(tensors) == set(keys.tensor_shapes(cfg))
    for name, tensor in tensors.items():
        assert tensor.dtype == (np.float32 if name.startswith("token2wav") else ml_dtypes.bfloat16)


def test_same_arguments_same_bytes(tiny, tmp_path):
    folder, _ = tiny
    write_random(tmp_path / "again", C.preset("tiny"), max_shard_bytes=2_000_000)
    assert digests(tmp_path / "again") == digests(folder)
    write_random(tmp_path / "other", C.preset("tiny"), max_shard_bytes=2_000_000, seed=1)
    mine, other = digests(folder), digests(tmp_path / "other")
    weights = {n for n in mine if n.endswith(".safetensors")}
    assert {n for n in mine if mine[n] != other[n]} == weights | {"spk_dict.pt"}


def test_whole_or_absent(tmp_path, tiny, monkeypatch):
    from omni_jax.checkpoint import publish

    with pytest.raises(CheckpointError, match="exists already"):
        write_random(tiny[0], C.preset("tiny"))
    with pytest.raises(CheckpointError, match="dtype 'int8'"):
        write_random(tmp_path / "x", C.preset("tiny"), dtype="int8")

    def full_disk(name, *args):
        if "talker" in name:
            raise OSError(28, "No space left on device")
        return random_blocks(name, *args)

    random_blocks = publish.random_blocks
    monkeypatch.setattr(publish, "random_blocks", full_disk)
    with pytest.raises(CheckpointError, match="cannot be written: No space left on device"):
        write_random(tmp_path / "x", C.preset("tiny"))
    assert not list(tmp_path.iterdir())


def test_transformers_loads_the_whole_model(tiny):
    folder, cfg = tiny
    model = Qwen2_5OmniForConditionalGeneration.from_pretrained(folder)
    _, info = PreTrainedModel.from_pretrained.__func__(
        Qwen2_5OmniForConditionalGeneration, folder, output_loading_info=True
    )
    voices = load_voices(folder)
    assert list(model.speaker_map) == list(voices) == ["Chelsie", "Ethan"]
    for name, voice in voices.items():
        assert model.speaker_map[name]["bos_token"] == voice.bos_token < cfg.thinker.text.vocab_size
        np.testing.assert_array_equal(model.speaker_map[name]["ref_mel"][0], voice.ref_mel)
    assert not any(info.values()), info
    assert model.thinker.generation_config.eos_token_id == [cfg.thinker.eos_token_id[0]]
    params = load_params(folder, cfg, parts=("thinker", "talker", "token2wav"), dtype=np.float32, unroll=False)
    theirs = model.state_dict()
    for name in keys.tensor_shapes(cfg):
        path, layer = keys.tree_path(name)
        leaf = params
        for key in path:
            leaf = leaf[key]
        mine = np.asarray(leaf) if layer is None else np.asarray(leaf)[layer]
        np.testing.assert_array_equal(mine, theirs[name].float().numpy(), err_msg=name)
        assert mine.std() > 0 or name == "token2wav.code2wav_bigvgan_model.conv_post.weight" or mine.size == 1


def test_transformers_loads_the_thinker(tiny):
    _, info = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(tiny[0], output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]


def test_tokenizer_is_the_same_everywhere(tiny):
    folder, cfg = tiny
    ours = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for fast in (True, False):
        theirs = AutoTokenizer.from_pretrained(folder, use_fast=fast)
        assert theirs.is_fast == fast
        for text in TEXTS:
            ids = ours.encode(text).ids
            assert theirs(text).input_ids == ids
            assert all(i < cfg.thinker.text.vocab_size for i in ids)
            assert theirs.decode(ids) == ours.decode(ids, skip_special_tokens=False)
        assert theirs.audio_token == "<|AUDIO|>"
        assert theirs.vision_bos_token == "<|vision_bos|>"
    assert ours.decode(ours.encode(TEXTS[1]).ids) == TEXTS[1]


@pytest.mark.parametrize("preset", ["tiny", "3b", "7b"])
def test_special_tokens_fit_the_configuration(preset):
    before = C.preset(preset)
    cfg, files = tokenizer_files.make_files(before)
    tokenizer = tokenizers.Tokenizer.from_str(files["tokenizer.json"])
    t, size = cfg.thinker, cfg.thinker.text.vocab_size
    ids = {
        "<|AUDIO|>": t.audio_token_id, "<|IMAGE|>": t.image_token_id, "<|VIDEO|>": t.video_token_id,
        "<|audio_bos|>": t.audio_start_token_id, "<|audio_eos|>": t.audio_end_token_id,
        "<|vision_bos|>": t.vision_start_token_id, "<|vision_eos|>": t.vision_end_token_id,
        "<|im_end|>": t.eos_token_id[0], "<|endoftext|>": t.pad_token_id, "user": t.user_token_id,
    }  # fmt: skip
    for token, i in ids.items():
        assert tokenizer.token_to_id(token) == i
        assert tokenizer.encode(token).ids == [i]
    voices = tokenizer_files.voice_token_ids(cfg)
    talker = cfg.talker
    nameless = [talker.tts_text_pad_token_id, talker.tts_text_start_token_id, talker.tts_text_end_token_id]
    nameless += voices.values()
    assert len(set(nameless)) == 5
    assert all(tokenizer.id_to_token(i) is None and i < size for i in nameless)
    if preset != "tiny":  # the published ids, so the published configuration
        kept = dataclasses.replace(t, eos_token_id=(), pad_token_id=None)
        assert dataclasses.replace(cfg, thinker=kept) == before
        assert voices == {"Chelsie": 151872, "Ethan": 151870}


def test_a_vocabulary_that_is_too_small():
    cfg = C.preset("tiny")
    text = dataclasses.replace(cfg.thinker.text, vocab_size=300)
    with pytest.raises(C.ConfigError, match=r"300 is too small .* needs 310"):
        tokenizer_files.make_files(dataclasses.replace(cfg, thinker=dataclasses.replace(cfg.thinker, text=text)))


def test_processor_files(tiny):
    folder, cfg = tiny
    image = Qwen2VLImageProcessor.from_pretrained(folder)
    assert (image.min_pixels, image.max_pixels, image.patch_size, image.merge_size) == (3136, 12845056, 14, 2)
    assert image.image_mean == Qwen2VLImageProcessor().image_mean
    assert image.image_std == Qwen2VLImageProcessor().image_std
    audio = WhisperFeatureExtractor.from_pretrained(folder)
    assert (audio.feature_size, audio.sampling_rate, audio.hop_length, audio.n_fft) == (128, 16000, 160, 400)
    assert (audio.chunk_length, audio.n_samples, audio.nb_max_frames) == (300, 4_800_000, 30000)
    assert GenerationConfig.from_pretrained(folder).eos_token_id[0] == cfg.thinker.eos_token_id[0]


def test_chat_template(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny[0])
    stored = json.loads((tiny[0] / "chat_template.json").read_text())["chat_template"]
    assert tokenizer.chat_template == stored
    items = [{"type": "image", "image": "a"}, {"type": "audio", "audio": "b"}, {"type": "text", "text": "Hi"}]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": items}, {"role": "assistant", "content": "Yes"}, {"role": "user", "content": "?"}],
        tokenize=False, add_generation_prompt=True,
    )  # fmt: skip
    assert prompt == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_bos|><|IMAGE|><|vision_eos|><|audio_bos|><|AUDIO|><|audio_eos|>Hi<|im_end|>\n"
        "<|im_start|>assistant\nYes<|im_end|>\n<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_signals_keep_their_size(tiny):
    """The deviations follow the fan-in, so that no part of the random model saturates or fades."""
    folder, cfg = tiny
    params = load_params(folder, cfg, parts=("thinker", "talker", "token2wav"), dtype=np.float32, unroll=False)
    head = np.asarray(params["thinker"]["lm_head"]["weight"])
    assert 2.8 < head.std() * np.sqrt(head.shape[1]) < 3.2
    up = np.asarray(params["thinker"]["model"]["layers"]["mlp"]["up_proj"]["weight"])
    assert 0.95 < up.std() * np.sqrt(up.shape[2]) < 1.05
    norm = np.asarray(params["thinker"]["model"]["layers"]["input_layernorm"]["weight"])
    assert 0.5 <= norm.min() < 0.8 < 1.2 < norm.max() <= 1.5
    ups = np.asarray(params["token2wav"]["code2wav_bigvgan_model"]["ups"]["0"]["0"]["weight"])
    assert 0.9 < ups.std() * np.sqrt(ups.shape[0] * 11 / 5) < 1.1
    inv_freq = np.asarray(params["token2wav"]["code2wav_dit_model"]["rotary_embed"]["inv_freq"])
    np.testing.assert_array_equal(inv_freq, inv_freq.astype(ml_dtypes.bfloat16).astype(np.float32))
    np.testing.assert_allclose(inv_freq, 10000.0 ** -(np.arange(0, 16, 2) / 16), rtol=4e-3)


def test_no_code_without_an_embedding_is_likely(tiny):
    """The rows of the Talker's head that Token2Wav could not speak are silent, but for those that end the speech."""
    folder, cfg = tiny
    head = np.asarray(load_params(folder, cfg, parts=("talker",), unroll=False)["talker"]["codec_head"]["weight"])
    mute = np.flatnonzero(~head.any(axis=1))
    ends = {cfg.talker.tts_codec_pad_token_id, cfg.talker.tts_codec_end_token_id}
    beyond = set(range(cfg.token2wav.dit.num_embeds + 1, cfg.talker.decoder.vocab_size))
    assert set(mute.tolist()) == beyond - ends
