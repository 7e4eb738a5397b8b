"""What speech takes: checks of voices, the Talker's sampling settings, and Token2Wav of codes that are there."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from omni_jax import buckets
from omni_jax.checkpoint.load import load_params
from omni_jax.checkpoint.sources import local_files
from omni_jax.checkpoint.speakers import load_voices, pick_voice
from omni_jax.config import OmniConfig, Token2WavConfig, load_config
from omni_jax.errors import InputError
from omni_jax.model import token2wav
from omni_jax.model.parameters import has_speech_dtype
from omni_jax.model.sampling import Sampling
from omni_jax.model.stages import PARTS as PARTS
from omni_jax.model.stages import stage_formats, use_unrolled_layers
from omni_jax.model.voice import Voice
from omni_jax.parallel.meshes import LayoutFn, layout_fn, on_one_device, place
from omni_jax.runtime import slots
from omni_jax.settings import SpeechSettings

# Sets the Talker's random numbers apart from those of the Thinker and of the noise, which have the plain seed.
TALKER_SALT = 0x7A1CE500
# Codes that the Talker's cache has room for before it must grow: 10 s of speech.
TALKER_CACHE_STEP = 512
# For the rows of a batch that are not spoken.
SILENT = SpeechSettings(temperature=0.0, max_codes=1)


class SpeechError(InputError):
    """Speech that this model cannot give; the message says why."""


def check_speaks(cfg: OmniConfig, params: Mapping[str, Any]) -> None:
    """Raises SpeechError where a checkpoint has no Talker, or was loaded without it."""
    if cfg.talker is None or cfg.token2wav is None:
        raise SpeechError("this checkpoint has no Talker: it answers in text only")
    if "talker" not in params:
        raise SpeechError("this model was loaded for text only; load it with parts=omni_jax.PARTS to have it speak")


def check_voices(
    cfg: OmniConfig, voices: Mapping[str, Voice], settings: Sequence[SpeechSettings | None]
) -> None:  # fmt: skip
    """Raises VoiceError or SpeechError before anything is computed: an unknown voice, a mark without a vector."""
    assert cfg.talker is not None
    vocab = cfg.thinker.text.vocab_size
    marks = {"text end": cfg.talker.tts_text_end_token_id, "text pad": cfg.talker.tts_text_pad_token_id}
    for wanted in settings:
        if wanted is not None:
            voice = pick_voice(voices, wanted.voice)
            marks[f"bos_token of voice {voice.name!r}"] = voice.bos_token
    for name, token in marks.items():
        if not 0 <= token < vocab:
            raise SpeechError(f"{name} is id {token}, outside the model's vocabulary of {vocab}; fetch it again")


def draw_settings(settings: Sequence[SpeechSettings], stop_ids: tuple[int, ...]) -> Sampling:
    """The Talker's sampling settings of each row as arrays."""

    def of(name: str, dtype: Any) -> np.ndarray:
        return np.array([getattr(s, name) for s in settings], dtype)

    keys = np.array([[(s.seed >> 32) ^ TALKER_SALT, s.seed & 0xFFFFFFFF] for s in settings], np.uint32)
    return Sampling(
        of("temperature", np.float32), of("top_k", np.int32), of("top_p", np.float32),
        np.zeros(len(settings), np.float32), of("repetition_penalty", np.float32), keys,
        np.array([(*stop_ids, *[-1] * (slots.STOP_IDS - len(stop_ids)))] * len(settings), np.int32),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Vocoder:
    """Token2Wav of a checkpoint and its voices: codes to sound.

    Attributes:
      config, params: of Token2Wav.
      voices: by name.
      layout_for: how its programs lie on a mesh.
    """

    config: Token2WavConfig
    params: Any
    voices: Mapping[str, Voice]
    layout_for: LayoutFn = on_one_device

    @classmethod
    def from_folder(
        cls, path: str | pathlib.Path, *, mesh: str | jax.sharding.Mesh | None = None, dtype: Any = jnp.float32,
        progress: bool = False,
    ) -> Vocoder:  # fmt: skip
        """Loads Token2Wav alone, for codes that are there already.

        Args:
          path: the checkpoint folder.
          mesh: to lay it over; see `meshes.place`.
          dtype: in which it multiplies: float32 or bfloat16.
          progress: show a bar on stderr.
        Raises:
          InputError: a checkpoint without it, files that are missing or broken, or a mesh that does not fit.
        """
        with local_files(path) as (files, arrays):
            cfg = load_config(files)
            if cfg.token2wav is None:
                raise SpeechError(f"{path} has no Token2Wav: this checkpoint answers in text only")
            unroll = use_unrolled_layers(jax.default_backend(), mesh is not None)
            placement = None if mesh is None else place(cfg, mesh)
            shardings = stage_formats(cfg, placement, ("token2wav",))
            params = load_params(
                files, cfg, parts=("token2wav",), unroll=unroll, shardings=shardings, progress=progress, arrays=arrays,
                speech_dtype=dtype,
            )  # fmt: skip
            return cls(cfg.token2wav, params["token2wav"], load_voices(files), layout_fn(placement))

    def in_dtype(self, dtype: Any) -> Vocoder:
        """The same, multiplying in another dtype (`parameters.has_speech_dtype` names the weights that change)."""

        def cast(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
            names = ("token2wav", *(key.key for key in path if isinstance(key, jax.tree_util.DictKey)))
            return leaf.astype(dtype) if has_speech_dtype(names) else leaf

        return dataclasses.replace(self, params=jax.tree_util.tree_map_with_path(cast, self.params))

    def __call__(
        self, codes: Sequence[Any], settings: Sequence[SpeechSettings], noise: Sequence[Any] | None = None
    ) -> list[Float32[np.ndarray, " _"]]:
        """Speaks rows of codes, of unequal lengths; see `token2wav.token2wav`.

        Args:
          codes: one row of whole numbers for each request.
          settings: voice, seed, ODE steps and solver of each. Requests of equal steps and solver share a call, as many
            as the largest bucket of rows holds.
          noise: float32 [2 n, mel] for each row of n codes; by default drawn from the seeds.
        Returns:
          the samples of each row, at 24 kHz.
        Raises:
          CodeError: a code that there is no embedding for, or too many codes.
          InputError: noise of another shape, or an unknown voice.
        """
        waves: list[np.ndarray] = [np.zeros(0, np.float32)] * len(codes)
        flows = [token2wav.Flow(s.ode_steps, s.ode_solver) for s in settings]
        most = token2wav.ROW_BUCKETS[-1]
        alike = [[i for i, wanted in enumerate(flows) if wanted == flow] for flow in dict.fromkeys(flows)]
        for rows in (group[at : at + most] for group in alike for at in range(0, len(group), most)):
            made = token2wav.token2wav(
                self.config, self.params, [codes[i] for i in rows],
                [pick_voice(self.voices, settings[i].voice) for i in rows],
                noise=None if noise is None else [noise[i] for i in rows],
                seeds=[settings[i].seed for i in rows], flow=flows[rows[0]], layout_for=self.layout_for,
            )  # fmt: skip
            for i, wave in zip(rows, made, strict=True):
                waves[i] = wave
        return waves


def cache_slots(places: int, left: int) -> int:
    """Slots of the Talker's cache: a bucket for the places that are taken and the codes to come, but for no more than
    TALKER_CACHE_STEP of them: speech may last 4096 codes and mostly ends far sooner, and each step reads the whole
    cache."""
    return buckets.bucket(places + min(left, TALKER_CACHE_STEP), buckets.CACHE)
