"""`omni-jax batch`: conversations from a file to a file, on one device, one machine or all hosts of a pod.

A mesh that takes the chips of all hosts makes them work on every batch together; else each host has a copy of the model
and a share of the lines. Either way a job that was cut off goes on where it was (`records`).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from omni_jax.checkpoint.fingerprint import adapter_digest, fingerprint
from omni_jax.checkpoint.sources import local_files
from omni_jax.errors import InputError, print_warnings
from omni_jax.infer.batch import launch, openai, records
from omni_jax.infer.batch.records import JobError, Line
from omni_jax.infer.batch.requests import Reading
from omni_jax.settings import ErrorEvent, GenerationSettings, SpeechSettings, Watchdog

# Batches whose prompts are made ready together, then sorted by length: more of them hold more media in memory.
AHEAD = 2
# Threads that read media while the device works.
READERS = 2
# Seconds between lines of progress where there is no terminal, and between looks at the other processes' parts.
REPORT, POLL = 30.0, 0.2
RUN = (sys.executable, "-m", "omni_jax.infer.batch.job")
# What a line can provoke: its record says so, and the job goes on. Failures of the machine are others and end the job.
LINE_ERRORS = (ValueError, TypeError, OverflowError, RecursionError)


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
    progress: bool = False
    bar: bool = False

    def lines(self) -> list[Line]:
        """The lines of the input, each with the digest of all that its answer depends on."""
        data = dataclasses.asdict(self)
        what = {name: data[name] for name in ("settings", "speech", "speech_format", "media", "dtype")}
        what |= {"model": str(fingerprint(self.model)), "adapter": self.adapter and adapter_digest(self.adapter)}
        return records.read_lines(self.source, what)

    def to_json(self) -> str:
        """For another process; see `from_json`."""
        return json.dumps(dataclasses.asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> Job:
        """What `to_json` has written."""
        data = json.loads(text)
        data |= {name: pathlib.Path(data[name]) for name in ("source", "out")}
        data["settings"], speech = GenerationSettings(**data["settings"]), data["speech"]
        if speech is not None:
            dog = speech["watchdog"]
            data["speech"] = SpeechSettings(**speech | {"watchdog": None if dog is None else Watchdog(**dog)})
        return cls(**data)


@dataclass(frozen=True)
class Request:
    """A line as it was understood, made ready for the model."""

    line: Line
    named: Mapping[str, Any]
    prompt: Any
    settings: GenerationSettings
    speech: SpeechSettings | None
    openai: str | None = None

    def answer(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The record of this line."""
        return _record(self.line, self.named, values)


def _record(line: Line, named: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    return {"line": line.number, **named, "digest": line.digest, **values}


def _make_ready(model: Any, job: Job, line: Line) -> Request | dict[str, Any]:
    """The request of a line, or the record of what is wrong with it."""
    reading = Reading()
    try:
        ask = reading.read(line, job.settings, job.speech)
        if ask.speech is not None:
            model.check_speech([ask.speech])
        prompt = model.prepare(ask.messages, job.media, speech=ask.speech is not None, tools=ask.tools)
        return Request(line, reading.named, prompt, ask.settings, ask.speech, ask.openai)
    except LINE_ERRORS as e:
        return _record(line, reading.named, {"error": f"line {line.number}: {e}"})


def _answers(model: Any, job: Job, windows: Iterable[Sequence[Request | dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """The records, as they are made: a row that has ended takes the next request at once. Records that there are
    already go through."""
    engine: Any = None
    asked: dict[int, Request] = {}
    for window in windows:
        for request in window:
            if isinstance(request, dict):
                yield request
                continue
            try:
                engine = engine or _engine(model, job, request)
                asked[engine.submit(_engine_request(request))] = request
            except LINE_ERRORS as e:
                yield request.answer({"error": f"line {request.line.number}: {e}"})
            while engine is not None and engine.waiting:
                yield from _step(engine, model, job, asked)
    while engine is not None and not engine.is_idle:
        yield from _step(engine, model, job, asked)


def _engine(model: Any, job: Job, first: Request) -> Any:
    """An engine of as many rows as the job asks for; their room grows with what comes."""
    from omni_jax import buckets
    from omni_jax.runtime.engine import Engine, EngineOptions

    rows = buckets.bucket(job.batch_size, buckets.BATCH)
    need = min(len(first.prompt.ids) + first.settings.max_new_tokens, model.context)
    capacity = buckets.bucket(need, buckets.CACHE)
    return Engine(model.loaded, EngineOptions(rows, capacity, job.speech is not None, most=model.context))


def _engine_request(request: Request) -> Any:
    from omni_jax.runtime.turn import Request as EngineRequest

    return EngineRequest(request.prompt, request.settings, request.speech)


def _step(engine: Any, model: Any, job: Job, asked: dict[int, Request]) -> Iterator[dict[str, Any]]:
    """A round of the engine, and the records of the requests that ended in it."""
    for number, _, event in engine.step():
        request = asked.pop(number)
        if isinstance(event, ErrorEvent):
            yield request.answer({"error": f"line {request.line.number}: {event.error}"})
        else:
            yield request.answer(_values(model, job, request, event.reply))


def _values(model: Any, job: Job, request: Request, reply: Any) -> dict[str, Any]:
    values = reply.to_dict()
    if request.openai is not None:
        text_of = lambda token: model.processor.tokenizer.decode([token], skip_controls=False)  # noqa: E731
        values["response"] = openai.response(request.openai or os.path.basename(job.model), reply, text_of)
    if reply.waveform is not None:
        values["speech"] = str(_audio_file(job, request.line))
        values["waveform"] = reply.waveform  # until it is written
    return values


def _audio_file(job: Job, line: Line) -> pathlib.Path:
    return job.out.with_name(f"{job.out.name}.speech") / f"{line.number:08d}.{job.speech_format}"


def _write(job: Job, part: records.OutputShard, record: dict[str, Any]) -> None:
    """The sound first: a line with a record is not looked at again."""
    wave = record.pop("waveform", None)
    if wave is not None:
        from omni_jax.model.token2wav import SAMPLE_RATE
        from omni_jax.processing.encode import write_audio

        path = pathlib.Path(record["speech"])
        path.parent.mkdir(exist_ok=True)
        write_audio(path, wave, SAMPLE_RATE, job.speech_format)  # type: ignore[arg-type]
    part.write(record)


class _Progress:
    """A bar on a terminal, a line now and then elsewhere, nothing where it is not wanted."""

    def __init__(self, total: int, bar: bool, wanted: bool):
        self.total, self.count, self.failed, self.wanted = total, 0, 0, wanted
        self.said, self.bar = time.monotonic(), None
        if wanted and bar:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("answering"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar = Progress(*columns, console=Console(stderr=True))
            self.task = self.bar.add_task("answering", total=total)
            self.bar.start()

    def advance(self, failed: bool) -> None:
        self.count, self.failed = self.count + 1, self.failed + failed
        if self.bar is not None:
            self.bar.advance(self.task)
        elif self.wanted and (time.monotonic() - self.said > REPORT):
            self.said = time.monotonic()
            print(f"{self.count} of {self.total} lines answered", file=sys.stderr, flush=True)

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()


def work(job: Job, cluster: launch.Cluster | None = None) -> dict[str, Any]:
    """Answers this process's share of the lines, and waits for the others.

    Returns:
      how many `lines` the output has, how many of them `failed`, and how many were answered `before`.
    Raises:
      InputError: the job cannot run at all. A line that cannot be answered is no error but a record.
    """
    import jax

    if cluster is not None:
        jax.distributed.initialize(
            cluster.coordinator, cluster.count, cluster.process, heartbeat_timeout_seconds=cluster.patience
        )
    process, count = jax.process_index(), jax.process_count()
    lines = job.lines()
    part = records.OutputShard(job.out, process)
    done = _same_for_all(np.isin([line.number for line in lines], list(records.answered(job.out, lines))))
    todo = [line for line, known in zip(lines, done, strict=True) if not known]
    together = False
    if todo:
        try:
            model, together = _load(job)
        except InputError:
            part.give_up()
            raise
        mine = todo if together else todo[process::count]
        bar = _Progress(len(mine), job.bar, job.progress and process == 0)
        try:
            for record in _run(model, job, mine, _same_failures if together else None):
                if not together or process == 0:
                    _write(job, part, record)
                bar.advance("error" in record)
        finally:
            bar.stop()
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
        job.model, parts=parts, dtype=job.dtype, mesh=mesh, speech_mesh=speech_mesh, adapter=job.adapter, progress=show
    )
    return loaded, together


def _same_for_all(flags: np.ndarray) -> np.ndarray:
    """The flags of the first process: from here on no process writes what another still reads."""
    import jax

    if jax.process_count() == 1:
        return flags
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.broadcast_one_to_all(flags))


def _same_failures(failed: np.ndarray) -> np.ndarray:
    """Which lines failed on any host: all of them must make the same calls."""
    from jax.experimental import multihost_utils

    every: np.ndarray = np.asarray(multihost_utils.process_allgather(failed))
    return np.asarray(every.any(axis=0))


def _run(
    model: Any, job: Job, lines: Sequence[Line], agree: Callable[[np.ndarray], np.ndarray] | None
) -> Iterator[dict[str, Any]]:
    """Records, in the order in which they are made."""
    return _answers(model, job, _windows(model, job, lines, agree))


def _windows(
    model: Any, job: Job, lines: Sequence[Line], agree: Callable[[np.ndarray], np.ndarray] | None
) -> Iterator[list[Request | dict[str, Any]]]:
    """Lines made ready, or the records of those that cannot be. The next ones are made ready while the device works."""
    windows = [lines[i : i + AHEAD * job.batch_size] for i in range(0, len(lines), AHEAD * job.batch_size)]
    with ThreadPoolExecutor(READERS) as pool:
        coming: list = []
        for i, window in enumerate(windows):
            made = coming or [pool.submit(_make_ready, model, job, line) for line in window]
            ready = [f.result() for f in made]
            coming = [pool.submit(_make_ready, model, job, line) for line in windows[i + 1]] if windows[i + 1 :] else []
            if agree is not None:
                for at in np.flatnonzero(agree(np.array([isinstance(r, dict) for r in ready]))).tolist():
                    if not isinstance(ready[at], dict):
                        line = window[at]
                        ready[at] = _record(
                            line, ready[at].named, {"error": f"line {line.number}: another host cannot read it"}
                        )
            # Prompts of like length are read together.
            yield sorted(ready, key=lambda r: 0 if isinstance(r, dict) else len(r.prompt.ids))


def main(job: Job, processes: int, join: str | None, patience: int, as_json: bool) -> None:
    """The command behind `omni-jax batch`."""
    from omni_jax.config import load_config

    with local_files(job.model) as (folder, _):  # one line here, and not one of each process
        cfg = load_config(folder)
    if job.mesh is not None:
        from omni_jax.parallel.meshes import axis_sizes

        for name in (job.mesh, job.speech_mesh):
            if name is not None:
                axis_sizes(name, cfg)
    elif job.speech_mesh is not None:
        raise JobError("--speech-mesh is beside that of the text part: give --mesh as well, such as 1")
    lines = job.lines()
    before = len(records.answered(job.out, lines))
    if processes == 1 and join is None:
        work(job)
    else:
        clusters = [launch.parse_join(join, patience)] if join is not None else _local(processes, patience)
        commands = [[*RUN, job.to_json(), json.dumps(dataclasses.asdict(c))] for c in clusters]
        try:
            launch.watch(commands, names=[_called(c) for c in clusters])
        except launch.ProcessError as e:
            left = len(lines) - len(records.answered(job.out, lines))
            print(
                f"omni-jax: {e}; {left} of {len(lines)} lines are left: the same command goes on with them",
                file=sys.stderr,
            )
            sys.exit(2 if e.code == 2 else 1)
    made = records.answered(job.out, lines)
    failed = [n for n, record in sorted(made.items()) if "error" in record]
    if as_json:
        print(json.dumps({"lines": len(made), "failed": len(failed), "before": before, "out": str(job.out)}))
        return
    note = f"{len(made)} lines in {job.out}, {before} of them from before"
    if failed:
        note += f'; {len(failed)} could not be answered ("error"), the first is {made[failed[0]]["error"]}'
    print(note, file=sys.stderr)


def _local(processes: int, patience: int) -> list[launch.Cluster]:
    address = f"127.0.0.1:{launch.free_port()}"
    return [launch.Cluster(address, i, processes, patience) for i in range(processes)]


def _called(cluster: launch.Cluster) -> str:
    return "this host's process" if cluster.process is None else f"process {cluster.process} of {cluster.count}"


def _worker(job: str, cluster: str) -> None:
    """A process of a job with several; another one watches it."""
    from omni_jax.runtime.compilation import use_compilation_cache

    print_warnings()
    launch.end_with_parent()
    use_compilation_cache()
    try:
        work(Job.from_json(job), launch.Cluster(**json.loads(cluster)))
    except BaseException as e:
        # At once: an orderly end would wait for the other processes, and they for this one.
        if isinstance(e, InputError):
            print(f"omni-jax: {' '.join(str(e).split())}", file=sys.stderr, flush=True)
            os._exit(2)
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


if __name__ == "__main__":
    _worker(*sys.argv[1:])
