"""The speech stages of `omni-jax bench`: Talker, DiT, BigVGAN, and Token2Wav as a whole, beside the reference.

The Talker is bf16 on both sides, Token2Wav float32.
"""

from __future__ import annotations

import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from omni_jax import buckets
from omni_jax import config as C
from omni_jax.infer.bench.reference import Row, SharedWeights, reference_config, reference_torch, timed_pairs
from omni_jax.model import dit, token2wav
from omni_jax.model.sampling import Sampling
from omni_jax.model.voice import Voice
from omni_jax.parallel.meshes import LayoutFn, Placement, layout_fn, on_one_device
from omni_jax.runtime import slots, speech

HISTORY = 512  # places of the Talker's cache that are live
# Codes of a timed run: speech is many codes in a row, and while a single one takes its 40 ms, the threads of the other
# side still spin on the cores.
CODES = 16
DIT_FRAMES = (200, 2000)  # mel frames, guided: two rows
SPEECH_SECONDS = (2, 10)
REFERENCE_FRAMES = 300  # of the voice's mel, 3 s
CODES_PER_SECOND = 50

Tick = Callable[[], None]


def _voice(cfg: C.DiTConfig, rng: np.random.Generator) -> Voice:
    cond = rng.standard_normal(cfg.enc_emb_dim, dtype=np.float32)
    return Voice("random", 0, cond, rng.standard_normal((REFERENCE_FRAMES, cfg.mel_dim), dtype=np.float32))


def _talker_row(cfg: C.OmniConfig, pairs: int, tick: Tick, placement: Placement | None) -> Row:
    """One code after 512 places, batch 1, greedy, the penalty on."""
    torch = reference_torch()
    from transformers import DynamicCache
    from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as M

    assert cfg.talker is not None
    part, decoder = cfg.talker, cfg.talker.decoder
    weights = SharedWeights(cfg, "talker.")
    reference_cfg = reference_config(cfg).talker_config
    with torch.device("meta"):
        model = M.Qwen2_5OmniTalkerForConditionalGeneration._from_config(reference_cfg)
    model.load_state_dict(weights.state_dict(torch), assign=True)
    rotary = M.Qwen2_5OmniRotaryEmbedding(reference_cfg)
    model.model.rotary_emb = rotary
    for layer in model.model.layers:
        layer.self_attn.rotary_emb = rotary
    model.eval()
    params, layout_for = weights.tree(placement), layout_fn(placement)

    one = functools.partial(np.full, 1)
    sampling = Sampling(
        one(0, np.float32), one(0, np.int32), one(1, np.float32), one(0, np.float32), one(1.05, np.float32),
        np.zeros((1, 2), np.uint32), np.full((1, slots.STOP_IDS), -1, np.int32),
    )  # fmt: skip
    reply: Any = np.random.default_rng(0).standard_normal((64, 1, part.embedding_size)).astype(jnp.bfloat16)
    room = buckets.bucket(HISTORY + max(speech.TALKER_CACHE_STEP, CODES * (pairs + 1)), buckets.CACHE)

    program, active = slots.talker_program(part), np.ones(1, bool)

    def begin() -> slots.Slots:
        """As after HISTORY places, of which only their number counts here."""
        with layout_for("talker"):
            state = slots.make_slots(
                program, params, 1, capacity=room, cache_dtype=jnp.float32, reply=len(reply), marks=reply[:2, 0]
            )
            nothing = np.zeros(1, np.int32)
            state = slots.append_reply(state, reply, nothing, nothing, np.full(1, len(reply) - 1, np.int32))
            lengths = np.full(1, len(reply) - 1, np.int32)
            state = slots.end_reply(slots.truncate(state, 0, HISTORY), active, lengths)
            return slots.begin(program, params, state, active, sampling, np.full(1, HISTORY, np.int32))[0]

    ours: dict[str, Any] = {"state": begin()}
    shape = (1, decoder.num_key_value_heads, HISTORY, decoder.head_dim)
    theirs: dict[str, Any] = {"cache": DynamicCache(), "token": torch.tensor([[1]])}
    for layer in range(decoder.num_hidden_layers):
        theirs["cache"].update(torch.randn(shape).bfloat16(), torch.randn(shape).bfloat16(), layer)
    heard = torch.randn(1, 1, part.embedding_size).bfloat16()
    seen_ids = torch.ones((1, HISTORY), dtype=torch.long)

    def our_codes() -> None:
        with layout_for("talker"):
            ours["state"], _, _ = slots.step(program, params, ours["state"], active, CODES)

    def their_step() -> None:
        x = model.thinker_to_talker_proj(model.model.embed_tokens(theirs["token"]) + heard)
        position = torch.full((3, 1, 1), theirs["cache"].get_seq_length())
        h = model.model(
            inputs_embeds=x, position_ids=position, past_key_values=theirs["cache"], use_cache=True
        ).last_hidden_state
        scores = model.codec_head(h[:, -1]).float()
        score = torch.gather(scores, 1, seen_ids)
        scores.scatter_(1, seen_ids, torch.where(score < 0, score * 1.05, score / 1.05))
        theirs["token"] = scores.argmax(-1, keepdim=True)

    @torch.inference_mode()
    def their_codes() -> None:
        for _ in range(CODES):
            their_step()

    times = timed_pairs(their_codes, our_codes, pairs, tick)
    what = f"one code of {CODES} after {HISTORY}, batch 1"
    return Row("talker", what, *([seconds / CODES for seconds in side] for side in times))


def _reference_token2wav(cfg: C.OmniConfig, weights: SharedWeights, torch: Any) -> Any:
    """The reference's Token2Wav on the shared weights. Its filters and masks are buffers, so it is built whole."""
    from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as M

    model = M.Qwen2_5OmniToken2WavModel._from_config(reference_config(cfg).token2wav_config).float()
    missing, unexpected = model.load_state_dict(weights.state_dict(torch), strict=False, assign=True)
    assert not unexpected
    assert all("filter" in name or "inv_freq" in name for name in missing), missing
    return model.eval()


def _our_evaluation(
    cfg: C.DiTConfig, params: Any, voice: Voice, codes: np.ndarray, rng: np.random.Generator,
    layout_for: LayoutFn = on_one_device,
) -> tuple[Callable[[], None], np.ndarray]:  # fmt: skip
    """One guided evaluation of ours for codes [1, n], all that stays the same computed before; and its state."""
    count = token2wav.padded_codes(cfg, codes.shape[1])
    padded = np.pad(codes, ((0, 0), (0, count - codes.shape[1])))
    x = rng.standard_normal((1, count * cfg.repeats, cfg.mel_dim), dtype=np.float32)
    lengths = np.array([codes.shape[1]], np.int32)
    mel_lengths = np.array([REFERENCE_FRAMES], np.int32)
    fixed: Any = (padded, lengths, voice.cond[None], voice.ref_mel[None], mel_lengths)
    times: Any = np.array([0.3], np.float32)
    with layout_for("dit"):
        given = jax.jit(lambda p: dit.condition(p, cfg, *fixed))(params)
        modulation = jax.tree.map(lambda a: a[0], jax.jit(lambda p: dit.modulations(p, cfg, times))(params))
    evaluate = jax.jit(lambda p, x, m, g: dit.velocity(p, cfg, x, m, g))

    def run() -> None:
        with layout_for("dit"):
            jax.block_until_ready(evaluate(params, x, modulation, given))

    return run, x


def _dit_row(
    cfg: C.DiTConfig, params: Any, model: Any, frames: int, pairs: int, tick: Tick, layout_for: LayoutFn
) -> Row:
    """One guided evaluation. What does not change from one to the next is computed once here, 36 times there."""
    torch = reference_torch()
    rng = np.random.default_rng(frames)
    voice, codes = _voice(cfg, rng), rng.integers(0, cfg.num_embeds, (1, frames // cfg.repeats)).astype(np.int32)
    ours, x = _our_evaluation(cfg, params, voice, codes, rng, layout_for)

    @torch.inference_mode()
    def theirs() -> None:
        model(
            hidden_states=torch.from_numpy(x[:, :frames]), condition_vector=torch.from_numpy(voice.ref_mel[None]),
            speaker_embedding=torch.from_numpy(voice.cond)[None, None].repeat(1, frames, 1),
            quantized_code=torch.from_numpy(codes), time_step=torch.tensor(0.3),
        )  # fmt: skip

    return Row("dit", f"one guided evaluation, {frames} frames", *timed_pairs(theirs, ours, pairs, tick))


def evaluation_seconds(preset: str, lengths: Iterable[int], runs: int) -> list[float]:
    """Median seconds of one guided evaluation of the DiT for speech of some lengths in seconds; in turn."""
    part = C.preset(preset).token2wav
    assert part is not None
    cfg, params = part.dit, SharedWeights(C.preset(preset), "token2wav.code2wav_dit_model.").tree()
    rng, evaluations = np.random.default_rng(0), []
    for seconds in lengths:
        codes = rng.integers(0, cfg.num_embeds, (1, seconds * CODES_PER_SECOND)).astype(np.int32)
        evaluations.append(_our_evaluation(cfg, params, _voice(cfg, rng), codes, rng)[0])
    times: list[list[float]] = [[] for _ in evaluations]
    for evaluate in evaluations:
        evaluate()
    for _ in range(runs):
        for evaluate, seen in zip(evaluations, times, strict=True):
            began = time.perf_counter()
            evaluate()
            seen.append(time.perf_counter() - began)
    return [statistics.median(seen) for seen in times]


def speak_once(side: str, preset: str, seconds: int) -> None:
    """Token2Wav over random codes by `ours` or the `reference`, one ODE step: for the peak memory of a process."""
    cfg = C.preset(preset)
    part = cfg.token2wav
    assert part is not None
    rng = np.random.default_rng(0)
    voice, codes = _voice(part.dit, rng), rng.integers(0, part.dit.num_embeds, seconds * CODES_PER_SECOND)
    if side == "ours":
        params = SharedWeights(cfg, "token2wav.").tree()
        token2wav.token2wav(part, params, [codes], voice, flow=token2wav.Flow(2))
        return
    torch = reference_torch()
    from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as M

    # With weights of its own making: a second set beside it would count.
    model = M.Qwen2_5OmniToken2WavModel._from_config(reference_config(cfg).token2wav_config).float().eval()
    with torch.inference_mode():
        model(
            torch.from_numpy(codes)[None], conditioning=torch.from_numpy(voice.cond)[None],
            reference_mel=torch.from_numpy(voice.ref_mel)[None], num_steps=2,
        )  # fmt: skip


def _vocoder_row(cfg: C.BigVGANConfig, params: Any, model: Any, pairs: int, tick: Tick, layout_for: LayoutFn) -> Row:
    torch = reference_torch()
    frames = 2 * SPEECH_SECONDS[0] * CODES_PER_SECOND
    mel = np.random.default_rng(0).standard_normal((1, frames, cfg.mel_dim), dtype=np.float32)

    @torch.inference_mode()
    def theirs() -> None:
        model(torch.from_numpy(mel).transpose(1, 2))

    def ours() -> None:
        with layout_for("bigvgan"):
            np.asarray(token2wav.vocode_mel(params, cfg, mel, np.array([frames], np.int32)))

    what = f"BigVGAN, {SPEECH_SECONDS[0]} s of audio"
    return Row("vocoder", what, *timed_pairs(theirs, ours, pairs, tick))


def _token2wav_row(
    cfg: C.Token2WavConfig, params: Any, model: Any, seconds: int, pairs: int, tick: Tick, layout_for: LayoutFn
) -> Row:
    torch = reference_torch()
    rng = np.random.default_rng(seconds)
    voice, codes = _voice(cfg.dit, rng), rng.integers(0, cfg.dit.num_embeds, seconds * CODES_PER_SECOND)

    @torch.inference_mode()
    def theirs() -> None:
        model(
            torch.from_numpy(codes)[None], conditioning=torch.from_numpy(voice.cond)[None],
            reference_mel=torch.from_numpy(voice.ref_mel)[None],
        )  # fmt: skip

    def ours() -> None:
        token2wav.token2wav(cfg, params, [codes], voice, layout_for=layout_for)

    return Row("token2wav", f"codec ids to waveform, {seconds} s", *timed_pairs(theirs, ours, pairs, tick))


def rows(
    cfg: C.OmniConfig, pairs: int, stages: Iterable[str], tick: Tick, placement: Placement | None = None
) -> list[Row]:
    """Times the speech stages; see `bench.run`."""
    stages, out = set(stages), []
    if "talker" in stages:
        out.append(_talker_row(cfg, pairs, tick, placement))
        gc.collect()
    if stages & {"dit", "vocoder", "token2wav"}:
        assert cfg.token2wav is not None
        part = cfg.token2wav
        weights = SharedWeights(cfg, "token2wav.")
        model, params = _reference_token2wav(cfg, weights, reference_torch()), weights.tree(placement)
        layout_for = layout_fn(placement)
        flow, vocoder = params["code2wav_dit_model"], params["code2wav_bigvgan_model"]
        if "dit" in stages:
            out += [_dit_row(part.dit, flow, model.code2wav_dit_model, n, pairs, tick, layout_for) for n in DIT_FRAMES]
        if "vocoder" in stages:
            out.append(_vocoder_row(part.bigvgan, vocoder, model.code2wav_bigvgan_model, pairs, tick, layout_for))
        if "token2wav" in stages:
            out += [_token2wav_row(part, params, model, n, pairs, tick, layout_for) for n in SPEECH_SECONDS]
    return out
