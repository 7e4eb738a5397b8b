"""`omni-jax batch`: conversations from a file to a file, on one device, one machine or all hosts of a pod.

A mesh that takes the chips of all hosts makes them work on every batch together; else each host has a copy of the model
and a share of the lines. Either way a job that was cut off goes on where it was (`records`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from omni_jax.checkpoint.fingerprint import adapter_digest, fingerprint
from omni_jax.checkpoint.sources import local_files
from omni_jax.errors import InputError
from omni_jax.infer.batch import answers, hosts, records
from omni_jax.infer.batch.records import JobError, Line
from omni_jax.progress import progress_bar
from omni_jax.settings import Activations, Dtype, GenerationSettings, KVCacheDtype, Quantize, SpeechSettings

# Seconds between lines of progress where there is no terminal, and between looks at the other processes' parts.
REPORT, POLL = 30.0, 0.2


@dataclass(frozen=True)
class Job:
    """What a batch job does.

    Attributes:
      model: checkpoint folder, hub id or URL.
      source, out: the files of lines and of records.
      settings: how to write; a line may change fields.
      speech: how to speak, or None; a line may name another voice.
      speech_format: of the sound files, which go into the folder OUT.speech.
      media: defaults of media items.
      mesh: see `meshes.axis_sizes`; None for one device a process.
      speech_mesh: further chips, for Talker and Token2Wav.
      dtype: of weights and computation.
      batch_size: conversations that are answered at the same time.
      adapter: folder of a PEFT adapter to merge into the weights.
      quantize, kv_cache, speech_dtype, activations: which weights are int8, whether keys and values are, in what
        Token2Wav multiplies, and whether features are int8; see `omni_jax.load`.
      folder: that relative paths of media begin in; by default the input's own.
      progress: show how far it is on stderr; `bar`: there is a terminal for a bar.
    """

    model: str
    source: pathlib.Path
    out: pathlib.Path
    settings: GenerationSettings
    speech: SpeechSettings | None = None
    speech_format: str = "wav"
    media: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    mesh: str | None = None
    speech_mesh: str | None = None
    dtype: str = "bfloat16"
    batch_size: int = 8
    adapter: str | None = None
    quantize: Quantize | None = None
    kv_cache: KVCacheDtype | None = None
    speech_dtype: Dtype = "float32"
    activations: Activations | None = None
    folder: pathlib.Path | None = None
    progress: bool = False
    bar: bool = False

    def lines(self) -> list[Line]:
        """The lines of the input, each with the digest of all that its answer depends on."""
        data = dataclasses.asdict(self)
        what = {name: data[name] for name in ("settings", "speech", "speech_format", "media", "dtype")}
        what |= {"model": str(fingerprint(self.model)), "adapter": self.adapter and adapter_digest(self.adapter)}
        what |= {name: data[name] for name in ("quantize", "kv_cache", "activations") if data[name] is not None}
        what |= {"speech_dtype": self.speech_dtype} if self.speech_dtype != "float32" else {}
        return records.read_lines(self.source, what)


class _Lines:
    """How far a job is, where there is no terminal for a bar: a line on stderr now and then."""

    def __init__(self, total: int):
        self.total, self.count, self.said = total, 0, time.monotonic()

    def advance(self) -> None:
        """One more line of the input is answered."""
        self.count += 1
        if time.monotonic() - self.said > REPORT:
            self.said = time.monotonic()
            print(f"{self.count} of {self.total} lines answered", file=sys.stderr, flush=True)


def work(job: Job) -> dict[str, Any]:
    """Answers this process's share of the lines, and waits for the others.

    Returns:
      how many `lines` the output has, how many of them `failed`, and how many were answered `before`.
    Raises:
      InputError: the job cannot run at all. A line that cannot be answered is no error but a record.
    """
    import jax

    process, count = jax.process_index(), jax.process_count()
    lines = job.lines()
    part = records.OutputShard(job.out, process)
    done = hosts.same_for_all(np.isin([line.number for line in lines], list(records.answered(job.out, lines))))
    todo = [line for line, known in zip(lines, done, strict=True) if not known]
    together = False
    if todo:
        try:
            model, together = _load(job)
        except InputError:
            part.give_up()
            raise
        mine = todo if together else todo[process::count]
        show, told = job.progress and process == 0, _Lines(len(mine))
        with progress_bar("answering", len(mine), show and job.bar) as advance:
            for record in answers.run(model, job, mine, hosts.same_failures if together else None):
                if not together or process == 0:
                    answers.write(job, part, record)
                advance()
                if show and not job.bar:
                    told.advance()
    part.finish()
    if process == 0:
        while not records.all_finished(job.out, count):
            time.sleep(POLL)
        merged = records.merge(job.out, lines)
    else:
        while not part.is_merged:
            time.sleep(POLL)
        merged = list(records.answered(job.out, lines).values())
    part.close()
    return {"lines": len(merged), "failed": sum("error" in r for r in merged), "before": int(done.sum())}


def _load(job: Job) -> tuple[Any, bool]:
    """The model, and whether all processes run it together."""
    import jax

    from omni_jax import api, config
    from omni_jax.parallel import meshes

    mesh, speech_mesh, together = None, None, False
    if job.mesh is not None:
        with local_files(job.model) as (folder, _):
            cfg = config.load_config(folder)
        chips = sum(math.prod(meshes.axis_sizes(m, cfg).values()) for m in (job.mesh, job.speech_mesh) if m is not None)
        together = jax.process_count() > 1 and chips > jax.local_device_count()
        placed = meshes.place(cfg, job.mesh, job.speech_mesh, jax.devices() if together else jax.local_devices())
        mesh, speech_mesh = placed.thinker, placed.speech if placed.has_speech_mesh else None
    parts = ("thinker",) if job.speech is None else api.PARTS
    show = job.progress and job.bar and jax.process_index() == 0
    loaded = api.load(
        job.model,
        parts=parts,
        dtype=job.dtype,
        mesh=mesh,
        speech_mesh=speech_mesh,
        adapter=job.adapter,
        quantize=job.quantize,
        kv_cache=job.kv_cache,
        speech_dtype=job.speech_dtype,
        activations=job.activations,
        progress=show,
    )
    return loaded, together


def main(job: Job, join: str | None, patience: int, as_json: bool) -> None:
    """The command behind `omni-jax batch`; with `join` it is one of several processes of a job."""
    from omni_jax.config import load_config

    if join is not None:
        cluster = hosts.parse_join(join, patience)
    with local_files(job.model) as (folder, _):
        cfg = load_config(folder)
    if job.mesh is not None:
        from omni_jax.parallel.meshes import axis_sizes

        for name in (job.mesh, job.speech_mesh):
            if name is not None:
                axis_sizes(name, cfg)
    elif job.speech_mesh is not None:
        raise JobError("--speech-mesh is beside that of the text part: give --mesh as well, such as 1")
    before = len(records.answered(job.out, lines := job.lines()))
    if join is None:
        work(job)
    else:
        with _at_once():
            cluster.join()
            work(job)
    made = records.answered(job.out, lines)
    failed = [n for n, record in sorted(made.items()) if "error" in record]
    if as_json:
        print(json.dumps({"lines": len(made), "failed": len(failed), "before": before, "out": str(job.out)}))
        return
    note = f"{len(made)} lines in {job.out}, {before} of them from before"
    if failed:
        note += f'; {len(failed)} could not be answered ("error"), the first is {made[failed[0]]["error"]}'
    print(note, file=sys.stderr)


@contextlib.contextmanager
def _at_once() -> Iterator[None]:
    """Ends the process where it fails: an orderly end would wait for the other hosts, and they for this one."""
    try:
        yield
    except BaseException as e:
        if isinstance(e, InputError):
            print(f"omni-jax: {' '.join(str(e).split())}", file=sys.stderr, flush=True)
            os._exit(2)
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
