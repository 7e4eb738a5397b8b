"""The commands about speech: `omni-jax encode`, `vocode`, `voices`."""

from __future__ import annotations

import dataclasses
import pathlib
import sys

import tyro
from rich.console import Console

from omni_jax.cli.arguments import array_file, codes_file
from omni_jax.cli.flags import Flags
from omni_jax.settings import Dtype, ModelSource, SpeechSettings, VocoderSettings


def encode(
    recordings: tyro.conf.Positional[tuple[pathlib.Path, ...]],
    *,
    model: pathlib.Path = pathlib.Path("nano"),
    mels: pathlib.Path | None = None,
) -> None:
    """Encode recordings as the codec ids that a Talker learns; prints one JSON object a recording.

    Only checkpoints that hold `codec.safetensors`, as nano does, can do this: the published model's encoder was never
    released.

    Args:
      recordings: Sound files, or clips with sound.
      model: Checkpoint folder, the folder of a codec, or nano, the model that is installed with the package.
      mels: Folder for the mel frames that Token2Wav learns from: one .npy a recording, named in its object.
    """
    import json

    import numpy as np
    from rich.progress import track

    from omni_jax.checkpoint.sources import folder_of
    from omni_jax.files import replacing
    from omni_jax.processing.audio import load_audio
    from omni_jax.processing.codec import CodecError, load_codec, speech_mel
    from omni_jax.processing.media import MediaError

    if not recordings:
        raise MediaError("no recording is given; name at least one")
    codec = load_codec(folder_of(model))
    if mels is not None:
        names = [r.stem for r in recordings]
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise CodecError(
                f"two recordings are called {twice[0]}, and their mel frames would be one file; rename one"
            )
        mels.mkdir(parents=True, exist_ok=True)
    shown = sys.stderr.isatty() and not sys.stdout.isatty()
    for recording in track(recordings, "encode", console=Console(stderr=True), disable=not shown):
        try:
            samples = load_audio(str(recording), codec.mel.rate)
            found = {"audio": str(recording), "codes": codec.encode(samples).tolist()}
        except CodecError as e:
            raise MediaError(f"{recording}: {e}") from None
        if mels is not None:
            file = mels / f"{recording.stem}.npy"
            frames = speech_mel(samples, codec.mel)[: len(found["codes"]) * codec.frames]
            with replacing(file) as out:
                np.save(out, frames)
            found["mel"] = str(file)
        print(json.dumps(found))


def vocode(
    out: tyro.conf.Positional[pathlib.Path],
    model: Flags[ModelSource],
    vocoder: Flags[VocoderSettings],
    *,
    codes: pathlib.Path,
    noise: pathlib.Path | None = None,
    seed: int = 0,
    speech_dtype: Dtype = "float32",
) -> None:
    """Synthesize audio from codec ids.

    Args:
      out: Audio file (wav, flac, mp3 or opus, by its suffix), or .npy for float32 samples at 24 kHz.
      codes: Codec ids: a .npy row of whole numbers, or JSON: a list, or what `generate --json` prints.
      noise: A .npy of float32 (2 x codes, mel) to start from, in place of random noise.
      seed: Seed of the noise.
      speech_dtype: Dtype in which Token2Wav multiplies, as in generate.
    """
    from omni_jax.processing.encode import check_writable, format_of, write_atomically, write_audio

    check_writable(out)
    if out.suffix != ".npy":
        format_of(out)
    settings = SpeechSettings(**dataclasses.asdict(vocoder) | {"seed": seed})
    row, start = codes_file(codes), None if noise is None else [array_file(noise)]
    import numpy as np

    from omni_jax.model import token2wav
    from omni_jax.runtime import speech
    from omni_jax.runtime.compilation import use_compilation_cache

    use_compilation_cache(traces=True)
    vocoder_of = speech.Vocoder.from_folder(model.model, mesh=model.mesh, dtype=speech_dtype)
    wave = vocoder_of([row], [settings], start)[0]
    if out.suffix == ".npy":
        write_atomically(out, lambda file: np.save(file, wave))
    else:
        write_audio(out, wave, token2wav.SAMPLE_RATE)


def voices(path: tyro.conf.Positional[pathlib.Path] = pathlib.Path("nano")) -> None:
    """List the voices of a checkpoint or of a voice file.

    Args:
      path: Checkpoint folder, spk_dict.pt, voice pack, or nano.
    """
    from rich.table import Table
    from rich.text import Text

    from omni_jax.checkpoint.sources import folder_of
    from omni_jax.checkpoint.speakers import load_voices, pick_voice

    found = load_voices(folder_of(path))
    default = pick_voice(found).name
    table = Table("voice", "begins with id", "reference", "")
    for name, voice in found.items():
        seconds = len(voice.ref_mel) / 100
        table.add_row(Text(name), str(voice.bos_token), f"{seconds:.2f} s", "default" if name == default else "")
    Console(highlight=False).print(table)
