"""`omni-jax batch`."""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from dataclasses import dataclass

import tyro

from omni_jax.cli.flags import Flags, Json
from omni_jax.cli.speaking import SpeechFormat, speech_of
from omni_jax.errors import InputError
from omni_jax.infer.batch.options import BatchOptions
from omni_jax.settings import GenerationSettings, MediaSettings, ModelSettings, SpeechSettings, check, option


@dataclass(frozen=True)
class SpeechFolder:
    """Whether the answers are spoken, and how they are stored."""

    speech: bool = option(False, "Also speak the answers, into the folder OUT.speech.")
    speech_format: SpeechFormat | None = option(None, "Audio format of the files. Default: wav.")
    no_watchdog: bool = option(False, "Do not cut off speech that loops, falls silent or outgrows its text.")

    def __post_init__(self) -> None:
        """Raises InputError naming the setting that is wrong."""
        check(self)


def batch(
    source: tyro.conf.Positional[pathlib.Path],
    out: tyro.conf.Positional[pathlib.Path],
    model: Flags[ModelSettings],
    job: Flags[BatchOptions],
    generation: Flags[GenerationSettings],
    media: Flags[MediaSettings],
    output: Flags[SpeechFolder],
    speech: Flags[SpeechSettings],
    as_json: Json = False,
) -> None:
    """Answer the conversations of a file, one a line, on one device, a machine or all hosts of a pod.

    A line that cannot be answered gives a record with an "error"; the job goes on. Started again, it goes on with the
    lines that have no record yet. OUT appears when it is whole; until then it grows in OUT.part-*.

    Args:
      source: Input, - for standard input. A line holds a list of messages, or an object: messages, and perhaps id,
        tools, settings and voice; or a request of OpenAI's batch files.
      out: Output: one JSON record a line, in the order of the input. With several hosts, on a disk that all share.
    """
    spoken = speech_of(
        output.speech, speech, model, seed=generation.seed, no_watchdog=output.no_watchdog,
        audio_format=output.speech_format,
    )  # fmt: skip
    from omni_jax.infer.batch.job import Job, main
    from omni_jax.infer.batch.records import spool
    from omni_jax.runtime.compilation import use_compilation_cache

    what = Job(
        model.model, source, out, generation, spoken, output.speech_format or "wav", media.given(),
        model.mesh, model.speech_mesh, model.dtype, job.batch_size, adapter=model.adapter, quantize=model.quantize,
        kv_cache=model.kv_cache, speech_dtype=model.speech_dtype, activations=model.activations, progress=not as_json,
        bar=sys.stderr.isatty(),
    )  # fmt: skip
    use_compilation_cache(traces=True)
    if str(source) == "-":
        if job.join is not None:
            raise InputError("standard input belongs to one host; with --join, give a file that all hosts see")
        source = spool(sys.stdin.buffer, out)
        try:
            main(dataclasses.replace(what, source=source, folder=pathlib.Path.cwd()), job.join, job.patience, as_json)
        finally:
            source.unlink(missing_ok=True)
        return
    main(what, job.join, job.patience, as_json)
