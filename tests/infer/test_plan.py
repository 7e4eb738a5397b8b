"""The plan beside what is planned: the compiler's account, the processor's tokens, the towers' calls."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time

import jax
import numpy as np
import pytest

from omni_jax import config as C
from omni_jax import load
from omni_jax.checkpoint import keys
from omni_jax.infer.analysis import plan as command
from omni_jax.infer.analysis import programs
from omni_jax.infer.analysis.compiled import Compiled, compile_program
from omni_jax.model import audio, vision
from omni_jax.parallel import meshes
from omni_jax.runtime import admission, memory_model
from omni_jax.runtime.media import Towers
from omni_jax.runtime.speech import PARTS
from omni_jax.settings import DEFAULT_PRECISION, GenerationSettings, Precision, SpeechSettings
from tests import media, plan_fit
from tests.ahead import needs_compiler
from tests.cli.test_main import run
from tests.compile_counter import count_compiles

HELLO = [{"role": "user", "content": "Hello there"}]


# --- memory


def other_size() -> C.OmniConfig:
    """A Thinker between tiny and 3B whose sizes no coefficient was fitted to."""
    cfg = C.preset("3b")
    text = dataclasses.replace(
        cfg.thinker.text, hidden_size=1536, intermediate_size=8960, num_attention_heads=12, num_hidden_layers=28
    )
    return dataclasses.replace(cfg, thinker=dataclasses.replace(cfg.thinker, text=text))


# None of these is among `plan_fit.FITTED`. Depth costs no compiling time: layers are scanned.
CASES = [
    (("thinker prefill", "other", "v5e:2x2", "", (2, 2048, 3072)), other_size),
    (("thinker decode", "3b", "v5e:1x1", "", (4, 8192)), None),
    (("talker decode", "3b", "v5e:1x1", "", (8, 4096)), None),
    (("vision", "3b", "v5e:1x1", "", (1, 4)), None),
    (("audio", "7b", "v5e:1x1", "", (4,)), None),
]


@needs_compiler
@pytest.mark.parametrize(("row", "config"), CASES, ids=[" ".join(map(str, c[0])) for c in CASES])
def test_the_sum_is_the_compilers(row, config):
    """Within 5 % of arguments, results and temporary memory, on models, meshes and sizes that were not fitted to."""
    case = plan_fit.Case(*row)
    assert case not in plan_fit.FITTED
    program, _, total = plan_fit.built(case, None if config is None else config())
    assert total == pytest.approx(compile_program(program).total, rel=0.05)


@needs_compiler
@pytest.mark.parametrize(("topology", "mesh"), [("v5e:1x1", "1"), ("v5e:2x4", "2x4"), ("v5e:2x4", "fsdp=2,tensor=4")])
def test_weights_and_caches_are_exact(topology, mesh):
    cfg = C.preset("tiny")
    place = meshes.place(cfg, mesh, devices=programs.topology(topology))
    sizes = dict(place.thinker.shape)

    def stored(x):
        local, fixed = list(x.sharding.shard_shape(x.shape)), x.format.layout
        if fixed is not None:  # whole tiles of 8 × 128
            minor, major = fixed.major_to_minor[-1], fixed.major_to_minor[-2]
            local[minor], local[major] = -(-local[minor] // 128) * 128, -(-local[major] // 8) * 8
        return math.prod(local) * x.dtype.itemsize

    def shards(tree):
        return sum(map(stored, jax.tree.leaves(tree)))

    for part in memory_model.PARTS:
        assert memory_model.weight_bytes(cfg, sizes, part, 2) == shards(programs.weights(cfg, place, part))
    for part, d in (("thinker", cfg.thinker.text), ("talker", cfg.talker.decoder)):
        for batch in (1, 8):
            cache = programs.cache_shapes(d, place.layout(part, batch), batch, 2048, jax.numpy.bfloat16)
            assert memory_model.cache_bytes(cfg, sizes, part, batch, 2048, 2) == shards((cache.k, cache.v))


def test_the_fit_finds_the_coefficients_that_made_the_figures(monkeypatch):
    """The least squares themselves: figures made of known coefficients give these back."""
    cfg = C.preset("tiny")
    uses = {
        plan_fit.Case("audio", "tiny", "none", "", (n,)): memory_model.audio(cfg, memory_model.ONE_CHIP, n, 2)
        for n in (1, 4, 8, 32)
    }
    exact = {case: use.own - use.working for case, use in uses.items()}
    monkeypatch.setattr(plan_fit, "built", lambda case: (None, uses[case], exact[case] + uses[case].working))
    made = {case: Compiled("", exact[case] + 5000 + int(1.75 * use.quantities["mlp"])) for case, use in uses.items()}
    found = plan_fit.fit(made)["audio"]
    assert sum(found[n] * uses[next(iter(uses))].quantities[n] for n in found) == pytest.approx(
        5000 + 1.75 * uses[next(iter(uses))].quantities["mlp"], rel=1e-3
    )


# --- tokens and calls


@pytest.mark.parametrize("size", [(336, 448), (100, 2000), (17, 23)], ids=str)
def test_a_picture_costs_what_the_processor_gives_it(model, size):
    content = [{"type": "image", "image": media.picture(*size)}, {"type": "text", "text": "?"}]
    prompt = model.prepare([{"role": "user", "content": content}])
    asked = command.Asked(image=(f"{size[1]}x{size[0]}",))
    (item,) = command.read_media(asked, model.config.thinker, None)
    assert item.grid == prompt.images[0].grid
    assert item.tokens == np.sum(prompt.ids == model.config.thinker.image_token_id)


@pytest.mark.parametrize(("frames", "fps", "options"), [(24, 8, {}), (15, 5, {"fps": 4.0, "max_pixels": 40000})])
def test_a_clip_and_its_sound_cost_what_the_processor_gives_them(model, frames, fps, options):
    seconds = frames / fps
    clip = media.encode_video(
        [media.picture(120, 160, seed) for seed in range(frames)], fps, sound=media.tone(seconds), rate=16000
    )
    content = [{"type": "video", "video": clip}, {"type": "text", "text": "?"}]
    prompt = model.prepare([{"role": "user", "content": content}], {"use_audio_in_video": True, **options})
    asked = command.Asked(video=(f"160x120:{seconds}@{fps}",), use_audio_in_video=True, **options)
    cfg = model.config.thinker
    pictures, sound = command.read_media(asked, cfg, None)
    assert pictures.grid == prompt.videos[0].grid
    assert pictures.tokens == np.sum(prompt.ids == cfg.video_token_id)
    # The encoder pads the track to whole blocks of its own.
    assert abs(sound.tokens - np.sum(prompt.ids == cfg.audio_token_id)) <= 2


@pytest.mark.parametrize("seconds", [0.03, 0.5, 2.0, 7.3])
def test_a_sound_costs_what_the_processor_gives_it(model, seconds):
    content = [{"type": "audio", "audio": (media.tone(seconds), 16000)}, {"type": "text", "text": "?"}]
    prompt = model.prepare([{"role": "user", "content": content}])
    (item,) = command.read_media(command.Asked(audio=(seconds,)), model.config.thinker, None)
    assert item.tokens == np.sum(prompt.ids == model.config.thinker.audio_token_id)


def test_the_calls_are_the_towers_own():
    cfg = C.preset("tiny").thinker
    grids = [(1, 32, 32), (5, 20, 30), (3, 32, 32), (1, 8, 60)]
    pictures = [(np.zeros((math.prod(g), cfg.vision.patch_dim), np.float32), g) for g in grids]
    mels = [np.zeros((n, cfg.audio.num_mel_bins), np.float32) for n in (1003, 3, 202, 401)]
    frames, chunks = memory_model.tower_calls(cfg, grids, [len(m) for m in mels])
    calls = [c.inputs[0].shape for c in vision.vision_calls(cfg.vision, pictures)]
    assert sorted((f, s * cfg.vision.window_patches**2) for f, s in frames) == sorted(c[:2] for c in calls)
    assert chunks == max(len(c.inputs[0]) for c in audio.audio_calls(cfg.audio, mels))
    assert memory_model.tower_calls(cfg, [], []) == ((), 0)


# --- least times


def test_a_decode_step_reads_each_weight_and_the_cache_once():
    cfg, chip = C.preset("3b"), memory_model.CHIPS["v5e"]
    request = memory_model.Request(1, 1024, 4096)
    found = {
        s.name: s
        for s in command.steps(cfg, memory_model.Meshes(memory_model.ONE_CHIP), request, chip, DEFAULT_PRECISION)
    }
    products = sum(
        math.prod(shape)
        for name, shape in keys.tensor_shapes(cfg).items()
        if name.startswith(("thinker.model.layers", "thinker.lm_head")) and len(shape) == 2
    )
    cache = memory_model.cache_bytes(cfg, memory_model.ONE_CHIP, "thinker", 1, 4096, 2)
    decode, prefill = found["Thinker decode"], found["Thinker prefill"]
    assert decode.bytes == 2 * products + cache
    assert (decode.bound, decode.seconds) == ("bandwidth", decode.bytes / 819e9)
    assert decode.operations == pytest.approx(2 * products + 4 * 36 * 16 * 128 * 4096)
    assert prefill.bound == "arithmetic"
    # Eight chips divide the work, and a batch does more of it.
    sizes = meshes.axis_sizes("2x4", cfg)
    split = {s.name: s for s in command.steps(cfg, memory_model.Meshes(sizes), request, chip, DEFAULT_PRECISION)}
    assert split["Thinker decode"].bytes == pytest.approx(decode.bytes / 8, rel=0.01)
    assert split["Thinker prefill"].operations == pytest.approx(prefill.operations / 8)


def test_the_sound_is_counted_by_its_weights():
    """One frame of BigVGAN: each convolution's weight as often as its rate says."""
    cfg = C.preset("3b")
    request = memory_model.Request(1, 1024, 4096, codes=12, spoken=1, reply=64, speech_slots=2048)
    chip, one = memory_model.CHIPS["v5e"], memory_model.Meshes(memory_model.ONE_CHIP)
    found = {s.name: s for s in command.steps(cfg, one, request, chip, DEFAULT_PRECISION)}
    half = {s.name: s for s in command.steps(cfg, one, request, chip, Precision(speech_dtype="bfloat16"))}
    for name in ("DiT flow", "BigVGAN"):
        assert half[name].operations == found[name].operations
        assert 0.49 < half[name].bytes / found[name].bytes < 0.56  # ECAPA and the embeddings stay float32
    g, operations, prefix = cfg.token2wav.bigvgan, 0.0, "token2wav.code2wav_bigvgan_model."
    for name, shape in keys.tensor_shapes(cfg).items():
        where = name.removeprefix(prefix).split(".")
        if name == f"{prefix}conv_pre.weight":
            operations += 2 * math.prod(shape)
        elif name.startswith(prefix) and where[0] == "ups" and len(shape) == 3:
            operations += 2 * math.prod(shape) * math.prod(g.upsample_rates[: int(where[1])])
        elif name.startswith(prefix) and where[0] == "resblocks" and len(shape) == 3:
            operations += 2 * math.prod(shape) * math.prod(g.upsample_rates[: int(where[1]) // 3 + 1])
    assert found["BigVGAN"].operations == 24 * operations
    assert found["DiT flow"].bound == "bandwidth"  # a quarter of a second of sound


# --- the command


def test_the_command_needs_no_tpu_compiler_and_compiles_nothing(monkeypatch, capsys, checkpoint):
    monkeypatch.setitem(sys.modules, "libtpu", None)  # importing it would raise
    with count_compiles() as n:
        code, out, err = run(
            monkeypatch, capsys, "plan", "--model", checkpoint, "--mesh", "2x2", "--speech-mesh", "1", "--image",
            "448x336", "--video", "320x240:4", "--audio", 3.5, "--speech", 5, "--batch", 3, "--json",
        )  # fmt: skip
    assert (code, err, n.value) == (0, "", 0)
    assert out.count("\n") == 1
    got = json.loads(out)
    assert got["fits"]
    assert got["devices"] == 5
    assert [m["tokens"] for m in got["media"]] == [192, 87, 560]
    assert got["prompt_tokens"] == 256 + 192 + 87 + 560 + 3 * 2
    assert {p["program"] for p in got["programs"]} == {
        "vision tower", "audio tower", "thinker prefill", "thinker decode", "talker prefill", "talker decode", "DiT",
        "BigVGAN",
    }  # fmt: skip
    assert got["peak"] == max(p["total"] for p in got["programs"])


def test_what_does_not_fit_exits_with_1(monkeypatch, capsys):
    code, out, err = run(monkeypatch, capsys, "plan", "--model", "7b", "--chip", "v5e")
    assert (code, err) == (1, "")
    assert "of 15.75 GiB on a device: it does not fit." in out
    code, out, _ = run(monkeypatch, capsys, "plan", "--model", "7b", "--chip", "v5e", "--mesh", "2x4")
    assert code == 0
    assert "it fits." in out
    assert "| thinker decode |" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--chip", "v9"), "--chip 'v9' is not known; known are v5e, v6e, v5p, h100, h200"),
        (("--model", "no/such/folder"), "config.json does not exist"),
        (("--mesh", "0x4"), "mesh '0x4' is neither chips"),
        (("--mesh", "tensor=2,tensor=2"), "names an axis twice"),
        (("--speech-mesh", "2"), "--speech-mesh goes with --speech"),
        (("--batch", "0"), "--batch is 0; it must be a whole number, at least 1"),
        (("--batch", "1000"), "--batch: 1000 is more than the 256"),
        (("--prompt", "40000"), "leaves no room for a reply in the context of 32768"),
        (("--reply", "-3"), "--reply is -3; it must be a whole number, at least 1"),
        (("--image", "448"), "--image '448' is not a size; give WIDTHxHEIGHT"),
        (("--image", "9000x10"), "too narrow"),
        (("--video", "640x360"), "seconds must be a number above 0"),
        (("--video", "big:10"), "--video 'big:10' is not a video"),
        (("--video", "640x360:10@0"), "frames a second must be a number above 0"),
        (("--video", "640x360:10", "--fps", "-1"), "--fps is -1.0; it must be a number, at least 1e-06"),
        (("--audio", "0.001"), "too short to become a token"),
        (("--audio", "nan"), "--audio is (nan,); it must be a list of numbers"),
        (("--speech", "-1"), "--speech is -1.0; it must be a number, at least 0"),
        (("--speech", "1000"), "--speech, in codes: 50000 is more than the 4104"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, tuple) else None,
)
def test_bad_input_is_one_line(monkeypatch, capsys, arguments, message):
    code, out, err = run(
        monkeypatch, capsys, "plan", *(() if "--model" in arguments else ("--model", "tiny")), *arguments
    )
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert message in err


# --- refusing


def test_a_request_that_does_not_fit_is_refused_before_anything_runs(model, monkeypatch):
    prompts = [model.prepare(HELLO)]
    settings = [GenerationSettings(max_new_tokens=2)]
    for _ in range(2):  # the second time only the end of the prompt is read, by other programs
        model.answer(prompts, settings)
    guard = admission.AdmissionControl(model.config, model.params, None, 4, 4)
    monkeypatch.setattr(model, "guard", guard)
    needed = max(p.own for p in memory_model.phases(model.config, guard.at, memory_model.Request(1, 64, 1536), 4))
    guard.limit = guard.weights["thinker"] + needed
    with count_compiles() as n:
        model.answer(prompts, settings)
        guard.limit -= 1
        with pytest.raises(
            memory_model.MemoryNeedError, match=r"thinker \w+ needs .* MiB on each device, which has .* MiB: "
        ):
            model.answer(prompts, settings)
        with pytest.raises(memory_model.MemoryNeedError, match="a smaller batch"):
            next(iter(model.stream(HELLO)))
    assert n.value == 0


def test_media_are_in_the_sum(model, monkeypatch):
    """A picture whose tower call needs more than all else is refused before the tower runs."""
    content = [{"type": "image", "image": media.picture(1400, 1400)}, {"type": "text", "text": "?"}]
    prompts = [model.prepare([{"role": "user", "content": content}])]
    guard = admission.AdmissionControl(model.config, model.params, None, 4, 4)
    width = 3072
    request = memory_model.Request(1, width, 4096, *admission.media_of(model.config, prompts))
    assert request.media == 3072
    assert request.frames == ((1, 176),)
    own = {p.use.name: p.own for p in memory_model.phases(model.config, guard.at, request, 4)}
    monkeypatch.setattr(model, "guard", guard)
    monkeypatch.setattr(Towers, "encode", lambda self, cells: pytest.fail("the towers ran"))
    guard.limit = guard.weights["thinker"] + max(own.values()) - 1
    with pytest.raises(memory_model.MemoryNeedError, match="needs"):
        model.answer(prompts, [GenerationSettings(max_new_tokens=2)])


def test_media_of_a_batch_may_outgrow_one_prompt(model):
    """A batch holds more vectors than the longest prompt has tokens: the sum takes the bucket that the batch takes."""
    (prompt,) = [model.prepare([{"role": "user", "content": [{"type": "image", "image": media.picture(56, 56, 0)}]}])]
    each = math.prod(prompt.images[0].grid) // model.config.thinker.vision.spatial_merge_size**2
    many = 65536 // each + 1
    vectors, *_ = admission.media_of(model.config, [prompt] * many)
    assert vectors >= many * each > 65536


def test_speech_is_refused_before_the_text_and_again_before_the_sound(speaker, monkeypatch):
    guard = admission.AdmissionControl(speaker.config, speaker.params, None, 4, 4)
    monkeypatch.setattr(speaker, "guard", guard)
    text = memory_model.Request(1, 64, 1536)
    guard.limit = guard.weights["thinker"] + max(p.own for p in memory_model.phases(speaker.config, guard.at, text, 4))
    prompts, settings = [speaker.prepare(HELLO)], [GenerationSettings(max_new_tokens=3)]
    assert len(speaker.answer(prompts, settings)[0].token_ids) <= 3
    with pytest.raises(memory_model.MemoryNeedError, match="BigVGAN needs"):
        speaker.answer(prompts, settings, [SpeechSettings(max_codes=4)])
    guard.limit = guard.weights["thinker"] + 2 * max(
        u.own for u in memory_model.sound(speaker.config, memory_model.ONE_CHIP, 1, 512)
    )
    assert speaker.answer(prompts, settings, [SpeechSettings(max_codes=4, temperature=0)])[0].codes is not None
    with pytest.raises(memory_model.MemoryNeedError, match="lower --max-codes"):
        guard.check_speech([4096] * 64)


def test_looking_costs_next_to_nothing(model):
    prompts = [model.prepare(HELLO)] * 4
    guard = admission.AdmissionControl(model.config, model.params, None, 4, 4)
    guard.limit = 1 << 60
    settings = [GenerationSettings()] * 4
    guard.check_request(prompts, 64, 1536, settings, True)
    best = math.inf
    for _ in range(20):
        began = time.perf_counter()
        guard.check_request(prompts, 64, 1536, settings, True)
        best = min(best, time.perf_counter() - began)
    assert best < 0.005  # measured: 0.9 ms


def test_a_model_that_does_not_fit_is_refused_before_it_is_read(checkpoint, monkeypatch):
    cfg = C.load_config(checkpoint)
    shapes = keys.tensor_shapes(cfg).items()
    need = sum(4 * math.prod(shape) for name, shape in shapes if keys.part_of(name) == "thinker")
    monkeypatch.setattr(admission, "memory_limit", lambda device: need)
    monkeypatch.setattr("omni_jax.api.load_params", lambda *a, **k: pytest.fail("the weights were read"))
    with pytest.raises(
        memory_model.MemoryNeedError, match=r"take .* of each device, which has .*: thinker .*, talker .*, tok"
    ):
        load(checkpoint, parts=PARTS, dtype="float32")
    with pytest.raises(pytest.fail.Exception, match="the weights were read"):
        load(checkpoint, dtype="float32")
    monkeypatch.setattr(admission, "memory_limit", lambda device: need - 1)
    with pytest.raises(memory_model.MemoryNeedError, match="choose a larger --mesh"):
        load(checkpoint, dtype="float32")


def test_on_a_mesh_each_device_holds_its_share(checkpoint, monkeypatch):
    """The same limit refuses one chip's worth and takes an eighth of it; nothing is laid out for that."""
    cfg = C.preset("7b")
    limit = memory_model.CHIPS["v5e"].memory
    by_mesh = {
        mesh: sum(
            sum(v.values())
            for v in memory_model.resident(cfg, memory_model.Meshes(meshes.axis_sizes(mesh, cfg)), 2).values()
        )
        for mesh in ("1", "2x4")
    }
    assert by_mesh["1"] > limit > by_mesh["2x4"]
    assert admission.memory_limit(jax.devices()[0]) is None  # a CPU does not say, so nothing is refused
