"""Codes and a voice to sound: the DiT draws a mel spectrogram out of noise, BigVGAN makes samples of it. Float32.

`sample_mel` and `vocode_mel` are the two compiled programs; both run on padded shapes from the lists below and give,
for every true frame and sample, what the unpadded shape gives. `token2wav` is the host's side: it checks, pads and
cuts, all in numpy, so that after one call per bucket nothing compiles.

Source: `Qwen2_5OmniToken2WavModel` in transformers 4.57.6.

B rows, N codes, L mel frames, M frames of a reference mel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int32, UInt32

from omni_jax import programs
from omni_jax.buckets import bucket
from omni_jax.config import DiTConfig, Token2WavConfig
from omni_jax.errors import InputError
from omni_jax.model import bigvgan, declare, dit, ecapa, ode, parameters
from omni_jax.model.layers import Params
from omni_jax.model.voice import Voice
from omni_jax.parallel.meshes import LayoutFn, on_one_device
from omni_jax.parallel.sharding import active_layout, constrain, replicate

SAMPLE_RATE = 24000
# In blocks of the DiT (0.24 s): about a fifth apart, so little work is padding; 342 hold the Talker's 4096 codes.
BLOCK_BUCKETS = (
    1, 2, 3, 4, 5, 6, 8, 9, 11, 13, 16, 19, 21, 26, 32, 38, 42, 52, 63, 76, 84, 104, 126, 168, 210, 252, 342,
)  # fmt: skip
REFERENCE_BUCKETS = (128, 256, 512, 1024, 2048)
ROW_BUCKETS = (1, 2, 4, 8, 16, 32, 64)
# Mel frames that BigVGAN makes sound of in one go, beside the context that their samples depend on: memory, and on a
# TPU the traffic of a second, would grow with the utterance.
PIECE_FRAMES = 480


class CodeError(InputError):
    """Codes that the DiT has no embedding for; the message names the code and its place."""


@dataclasses.dataclass(frozen=True)
class Flow:
    """How the mel spectrogram is drawn. The defaults are the published model's.

    Attributes:
      time_points: ends of the steps; 10 points are 9 steps.
      solver: a name of `ode.SOLVERS`: `rk38` evaluates the DiT 4 times a step, `midpoint` twice, `euler` once.
      guidance: how far to go beyond the null prediction; 0 leaves the null rows out, for half the cost.
      sway: crowds the time points towards the noise where negative.
    """

    time_points: int = 10
    solver: str = "rk38"
    guidance: float = 0.5
    sway: float = -1.0

    @property
    def evaluations(self) -> int:
        """How often the DiT runs."""
        return (self.time_points - 1) * len(ode.solver(self.solver).nodes)


def init(cfg: Token2WavConfig, key: jax.Array) -> Params:
    """Fresh float32 parameters of Token2Wav (`parameters.token2wav`)."""
    return declare.init(parameters.token2wav(cfg), key)


def samples_per_code(cfg: Token2WavConfig) -> int:
    """Samples that one code becomes: repeats × hop."""
    return cfg.dit.repeats * bigvgan.hop(cfg.bigvgan)


def padded_codes(cfg: DiTConfig, count: int) -> int:
    """The bucket of `count` codes: how many the compiled programs run on. Always whole blocks of the DiT."""
    blocks = bucket(-(-count * cfg.repeats // cfg.block_size), BLOCK_BUCKETS)
    if cfg.block_size % cfg.repeats:
        raise ValueError(f"dit_config: block_size {cfg.block_size} must be a multiple of repeats {cfg.repeats}")
    return blocks * cfg.block_size // cfg.repeats


@programs.jit(static_argnames=("cfg", "flow"))
def sample_mel(
    params: Params,
    cfg: DiTConfig,
    codes: Int32[Array, "B N"],
    lengths: Int[Array, " B"],
    spk: Float[Array, "B enc_emb_dim"],
    ref_mel: Float[Array, "B M mel_dim"],
    ref_lengths: Int[Array, " B"],
    noise: Float[Array, "B L mel_dim"],
    flow: Flow = Flow(),
) -> Float32[Array, "B L mel_dim"]:
    """Draws mel spectrograms.

    Args:
      params: the published `code2wav_dit_model` tree.
      codes: [B, N] int32, N of `padded_codes`; checked by the caller.
      lengths: [B] true codes.
      spk: [B, enc_emb_dim].
      ref_mel: [B, M, mel_dim]; ref_lengths: [B] true frames.
      noise: [B, N × repeats, mel_dim], the state at time 0.
      flow: static.
    Returns:
      [B, N × repeats, mel_dim] float32; frames beyond lengths × repeats are finite and without meaning.
    """
    # A TPU or a GPU would otherwise multiply in bf16 or TF32, and the reference is float32 throughout.
    with jax.default_matmul_precision("highest"):
        tableau = ode.solver(flow.solver)
        points = ode.time_points(flow.time_points, flow.sway)
        times = ode.evaluation_times(points, tableau)
        given = dit.condition(params, cfg, codes, lengths, spk, ref_mel, ref_lengths, guided=flow.guidance != 0)
        modulations = dit.modulations(params, cfg, jnp.asarray(times.reshape(-1)))
        modulations = jax.tree.map(lambda m: m.reshape(*times.shape, *m.shape[1:]), modulations)

        def velocity(x: jax.Array, modulation: Any) -> jax.Array:
            return dit.velocity(params, cfg, x, modulation, given, flow.guidance)

        return constrain(ode.integrate(velocity, noise, points, modulations, tableau), "batch", "length", None)


@programs.jit(static_argnames="cfg")
def vocode_mel(
    params: Params, cfg: Any, mel: Float[Array, "B L mel_dim"], lengths: Int[Array, " B"]
) -> Float32[Array, "B S"]:
    """`bigvgan.vocode`, compiled: [B, L, mel_dim] frames to [B, L × hop] samples, 0 beyond lengths × hop."""
    with jax.default_matmul_precision("highest"):
        return replicate(bigvgan.vocode(params, cfg, mel, lengths))


@programs.jit(static_argnames=("frames", "mel_dim"))
def draw_noise(keys: UInt32[Array, "B 2"], frames: int, mel_dim: int) -> Float32[Array, "B {frames} {mel_dim}"]:
    """Standard normal noise [B, frames, mel_dim] from raw keys [B, 2] uint32.

    A frame's values depend on the key and the frame alone, not on how many are drawn, so a padded length has the same.
    """

    return noise_at(keys, jnp.zeros(len(keys), jnp.int32), frames, mel_dim)


def noise_at(
    keys: UInt32[Array, "B 2"], starts: Int[Array, " B"], frames: int, mel_dim: int
) -> Float32[Array, "B {frames} {mel_dim}"]:
    """The noise of `frames` frames from frame `starts` [B] on: [B, frames, mel_dim], a stretch of `draw_noise`."""

    def row(data: jax.Array, start: jax.Array) -> jax.Array:
        # One key a frame: that values do not depend on the count is then no property of a generator's layout.
        key = jax.random.wrap_key_data(data, impl="threefry2x32")
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(start + jnp.arange(frames))
        return jax.vmap(lambda k: jax.random.normal(k, (mel_dim,)))(keys)

    return constrain(jax.vmap(row)(keys, starts), "batch", "length", None)


def noise_key(seed: int) -> tuple[int, int]:
    """A seed (0 … 2**64 - 1) as the raw key that `draw_noise` takes."""
    return divmod(int(seed), 2**32)


def most_codes(cfg: DiTConfig) -> int:
    """How many codes one call of `token2wav` takes."""
    return BLOCK_BUCKETS[-1] * cfg.block_size // cfg.repeats


def checked_codes(cfg: DiTConfig, codes: Any, row: int, first: int = 0) -> np.ndarray:
    """Codes as one int32 row.

    Args:
      codes: of one request, or its next ones.
      row: names the request in messages.
      first: the place of the first of them among the request's codes.
    Raises:
      CodeError: no whole numbers, or one outside the DiT's table.
    """
    array = np.asarray(codes)
    if array.size == 0:
        return np.zeros(0, np.int32)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise CodeError(f"codes of request {row} must be one row of whole numbers, not {array.dtype}{array.shape}")
    size = cfg.num_embeds + 1
    wrong = np.flatnonzero((array < 0) | (array >= size))
    if wrong.size:
        place = int(wrong[0])
        where = f"code {array[place]} at place {first + place} of request {row}"
        raise CodeError(f"{where} is outside the DiT's table of {size} codes")
    return array.astype(np.int32)


def check_count(cfg: DiTConfig, count: int, row: int) -> None:
    """Raises CodeError for more codes than one call takes."""
    if count > (most := most_codes(cfg)):
        raise CodeError(f"request {row} has {count} codes; at most {most} are spoken in one go, cut them up")


def check_voice(cfg: DiTConfig, voice: Voice) -> None:
    shortest = ecapa.shortest_mel(cfg)
    if voice.cond.shape != (cfg.enc_emb_dim,) or voice.ref_mel.shape[1:] != (cfg.mel_dim,):
        raise InputError(
            f"voice {voice.name!r} has a cond of {voice.cond.shape} and a ref_mel of {voice.ref_mel.shape}; this model "
            f"takes ({cfg.enc_emb_dim},) and (frames, {cfg.mel_dim})"
        )
    if len(voice.ref_mel) < shortest:
        frames = len(voice.ref_mel)
        raise InputError(f"voice {voice.name!r} has {frames} reference frames; at least {shortest} are needed")
    if len(voice.ref_mel) > REFERENCE_BUCKETS[-1]:
        frames, most = len(voice.ref_mel), REFERENCE_BUCKETS[-1]
        raise InputError(f"voice {voice.name!r} has {frames} reference frames; at most {most} fit, cut it")


def _padded(rows: Sequence[np.ndarray], count: int, length: int) -> np.ndarray:
    out = np.zeros((count, length, *rows[0].shape[1:]), rows[0].dtype)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def _per_row(value: Any, kind: type | tuple[type, ...], count: int, what: str) -> list[Any]:
    rows = [value] * count if isinstance(value, kind) else list(value)
    if len(rows) != count:
        raise ValueError(f"{len(rows)} {what} for {count} requests")
    return rows


class Drawn(NamedTuple):
    """Mel spectrograms of a batch, padded.

    Attributes:
      frames: [rows bucket, L, mel_dim] on the device; rows without codes are not among them.
      counts: [rows bucket] int32, true codes of each row.
      requests: which request each of the first rows is of.
      total: how many requests there were, those without codes included.
    """

    frames: jax.Array | None
    counts: np.ndarray
    requests: tuple[int, ...]
    total: int


def token2wav(
    cfg: Token2WavConfig,
    params: Params,
    codes: Sequence[Any],
    voices: Voice | Sequence[Voice],
    *,
    lengths: Sequence[int] | None = None,
    noise: Sequence[Any] | None = None,
    seeds: int | Sequence[int] = 0,
    flow: Flow = Flow(),
    layout_for: LayoutFn = on_one_device,
) -> list[np.ndarray]:
    """Speaks codes: `codes_to_mel`, then `mel_to_audio`; arguments and errors are theirs."""
    drawn = codes_to_mel(
        cfg, params, codes, voices, lengths=lengths, noise=noise, seeds=seeds, flow=flow, layout_for=layout_for
    )
    return mel_to_audio(cfg, params, drawn, layout_for)


def codes_to_mel(
    cfg: Token2WavConfig,
    params: Params,
    codes: Sequence[Any],
    voices: Voice | Sequence[Voice],
    *,
    lengths: Sequence[int] | None = None,
    noise: Sequence[Any] | None = None,
    seeds: int | Sequence[int] = 0,
    flow: Flow = Flow(),
    layout_for: LayoutFn = on_one_device,
) -> Drawn:
    """Draws the mel spectrograms of codes. Each row of a batch gets exactly what it would get alone.

    Args:
      cfg: the model.
      params: the published `token2wav` tree, float32.
      codes: one sequence of codes a request (50 codes/s), of unequal lengths, or [B, N] with `lengths`.
      voices: one for all, or one each.
      lengths: true codes of each row of `codes`; all by default.
      noise: [2 n, mel_dim] float32 for a request of n codes; by default drawn from `seeds`.
      seeds: one for all, or one each; 0 … 2**64 - 1.
      flow: solver settings.
      layout_for: how the programs lie on a mesh.
    Raises:
      CodeError: a code outside the DiT's table.
      ValueError: counts or shapes that do not fit together.
    """
    rows = [checked_codes(cfg.dit, row if lengths is None else row[: lengths[i]], i) for i, row in enumerate(codes)]
    for i, row in enumerate(rows):
        check_count(cfg.dit, len(row), i)
    every_voice = _per_row(voices, Voice, len(rows), "voices")
    every_seed = _per_row(seeds, (int, np.integer), len(rows), "seeds")
    if noise is not None and len(noise) != len(rows):
        raise ValueError(f"{len(noise)} noises for {len(rows)} requests")
    for voice in every_voice:
        check_voice(cfg.dit, voice)
    speaking = [i for i, row in enumerate(rows) if len(row)]
    if not speaking:
        return Drawn(None, np.zeros(0, np.int32), (), len(rows))

    count = bucket(len(speaking), ROW_BUCKETS)
    length = padded_codes(cfg.dit, max(len(rows[i]) for i in speaking))
    frames, mel_dim = length * cfg.dit.repeats, cfg.dit.mel_dim
    # Rows that only fill the bucket take one code and a short silent voice: nothing in them divides by zero.
    lens, refs = np.ones(count, np.int32), np.full(count, ecapa.shortest_mel(cfg.dit), np.int32)
    lens[: len(speaking)] = [len(rows[i]) for i in speaking]
    refs[: len(speaking)] = [len(every_voice[i].ref_mel) for i in speaking]
    mels = _padded([every_voice[i].ref_mel for i in speaking], count, bucket(int(refs.max()), REFERENCE_BUCKETS))
    spk = np.zeros((count, cfg.dit.enc_emb_dim), np.float32)
    spk[: len(speaking)] = [every_voice[i].cond for i in speaking]
    if noise is None:
        keys = np.zeros((count, 2), np.uint32)
        keys[: len(speaking)] = [noise_key(every_seed[i]) for i in speaking]
        with layout_for("dit", count):
            start: Any = draw_noise(keys, frames, mel_dim)
    else:
        given = [_checked_noise(noise[i], len(rows[i]) * cfg.dit.repeats, mel_dim, i) for i in speaking]
        start = _padded(given, count, frames)

    padded = _padded([rows[i] for i in speaking], count, length)
    with layout_for("dit", count):
        mel = sample_mel(params["code2wav_dit_model"], cfg.dit, padded, lens, spk, mels, refs, start, flow)
    return Drawn(mel, lens, tuple(speaking), len(rows))


def mel_to_audio(
    cfg: Token2WavConfig, params: Params, drawn: Drawn, layout_for: LayoutFn = on_one_device
) -> list[np.ndarray]:
    """Runs BigVGAN over drawn mels.

    Returns:
      For each request float32 samples at 24 kHz in [-1, 1], `samples_per_code` a code; none for no codes.
    """
    waves = [np.zeros(0, np.float32) for _ in range(drawn.total)]
    if drawn.frames is None:
        return waves
    tree, lengths = params["code2wav_bigvgan_model"], drawn.counts * np.int32(cfg.dit.repeats)
    count, frames = drawn.frames.shape[:2]
    with layout_for("bigvgan", count):
        layout = active_layout()
        rows, width = vocoder_call(cfg, count, frames, 1 if layout is None else layout.mesh.size)
    with layout_for("bigvgan", rows):
        if width == frames:
            sound = np.asarray(vocode_mel(tree, cfg.bigvgan, drawn.frames, lengths))
            every = [sound[row, : n * bigvgan.hop(cfg.bigvgan)] for row, n in enumerate(lengths)]
        else:
            whole = drawn.frames if drawn.frames.is_fully_addressable else jax.jit(replicate)(drawn.frames)
            mels = [mel[:n] for mel, n in zip(np.asarray(whole), lengths, strict=True)]
            every = _vocode_pieces(cfg, tree, mels[: len(drawn.requests)], rows, width)
    for row, i in enumerate(drawn.requests):
        waves[i] = every[row].copy()
    return waves


def vocoder_call(cfg: Token2WavConfig, rows: int, frames: int, devices: int = 1) -> tuple[int, int]:
    """Rows and frames of a call of BigVGAN for `rows` mels that are padded to `frames` frames. Longer ones than a piece
    and its context are cut into pieces, one for each device in a call."""
    width = PIECE_FRAMES + 2 * bigvgan.receptive_field(cfg.bigvgan)
    return (rows, frames) if frames <= width else (devices, width)


def _vocode_pieces(
    cfg: Token2WavConfig, params: Params, mels: Sequence[Float32[np.ndarray, "_ mel_dim"]], rows: int, width: int
) -> list[np.ndarray]:
    """The samples of mels, in calls of `rows` pieces; the same as of the whole, to float32's rounding."""
    hop, context = bigvgan.hop(cfg.bigvgan), (width - PIECE_FRAMES) // 2
    out = [np.zeros(len(mel) * hop, np.float32) for mel in mels]
    pieces = [(i, start) for i, mel in enumerate(mels) for start in range(0, len(mel), PIECE_FRAMES)]
    for group in (pieces[at : at + rows] for at in range(0, len(pieces), rows)):
        given, lengths = np.zeros((rows, width, cfg.dit.mel_dim), np.float32), np.ones(rows, np.int32)
        for row, (i, start) in enumerate(group):
            cut = mels[i][max(0, start - context) : start + PIECE_FRAMES + context]
            given[row, : len(cut)], lengths[row] = cut, len(cut)
        made = np.asarray(vocode_mel(params, cfg.bigvgan, given, lengths))
        for row, (i, start) in enumerate(group):
            wanted = out[i][start * hop : (start + PIECE_FRAMES) * hop]
            skip = min(start, context) * hop
            wanted[:] = made[row, skip : skip + len(wanted)]
    return out


def _checked_noise(noise: Any, frames: int, mel_dim: int, row: int) -> np.ndarray:
    array = np.asarray(noise)
    if array.dtype.kind not in "fiu" or not np.isfinite(array).all():
        raise InputError(f"noise of request {row} must hold finite numbers; {array.dtype} with others was given")
    array = array.astype(np.float32)
    if array.shape != (frames, mel_dim):
        raise InputError(f"noise of request {row} has shape {array.shape}; ({frames}, {mel_dim}) is needed")
    return array
