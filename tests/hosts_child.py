"""Run by test_hosts.py, twice at a time: one of two processes of four virtual devices, which hold one model together.
Prints one line of JSON.

python -m tests.hosts_child CHECKPOINT FOLDER PORT NUMBER
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import sys
from typing import Any
from unittest import mock

os.environ["JAX_COMPILATION_CACHE_DIR"] = ""

import jax
import numpy as np

from omni_jax import PARTS, api, config
from omni_jax.checkpoint import load as reading
from omni_jax.infer.batch import answers, job
from omni_jax.parallel import sharding
from omni_jax.settings import GenerationSettings, SpeechSettings
from tests import conversations

MESH = "2x4"
GREEDY = [GenerationSettings(max_new_tokens=n) for n in (9, 6)]
SPOKEN = [SpeechSettings(temperature=0.0, max_codes=11, watchdog=None), SpeechSettings(seed=3, max_codes=7)]


def messages() -> list[Any]:
    """A picture and a question, and a question alone."""
    asked = ([conversations._image(56, 84), conversations._text("What is this?")], [conversations._text("Why?")])
    return [[conversations._user(*content)] for content in asked]


def loading(checkpoint: pathlib.Path) -> tuple[api.Omni, dict[str, Any]]:
    """The model over the devices of both processes; its slices beside the whole, and the bytes that were read."""
    read, sizes = reading._read_leaf, []

    def counted(*args: Any) -> Any:
        sizes.append(read(*args))
        return sizes[-1]

    # As on TPUs: where the rules fix an order in memory, the matrices lie so.
    with mock.patch.object(reading, "_read_leaf", counted), mock.patch.object(sharding, "TILED", ("cpu",)):
        model = api.load(checkpoint, parts=PARTS, dtype="float32", mesh=MESH)
    whole = reading.load_params(checkpoint, config.load_config(checkpoint), parts=PARTS, dtype=np.float32, unroll=False)
    equal = []

    def compare(mine: jax.Array, full: Any) -> None:
        full = np.asarray(full)
        equal.extend(np.array_equal(np.asarray(s.data), full[s.index]) for s in mine.addressable_shards)

    jax.tree.map(compare, model.params, whole)
    split = [a for a in jax.tree.leaves(model.params) if not a.is_fully_replicated]
    devices = {d.process_index for a in split for d in a.sharding.device_set}
    return model, {
        "equal": all(equal), "shards": len(equal), "hosts": sorted(devices),
        "read": sum(a.nbytes for a in sizes), "whole": sum(a.nbytes for a in jax.tree.leaves(whole)),
        "split": sum(a.nbytes for a in split),
        "turned": sum(a.format.layout.major_to_minor != tuple(range(a.ndim)) for a in jax.tree.leaves(model.params)),
    }  # fmt: skip


def conversation(model: api.Omni) -> list[Any]:
    """A session of two turns, the first of which is spoken in blocks: ids and codes of the replies. With several
    processes the first one has the session."""
    driver = model.driver(2, capacity=1536)  # the shapes of `generate` before it
    spoken = dataclasses.replace(SPOKEN[0], mode="exact")
    if jax.process_index():
        driver.follow()
        return []
    said = []
    samples = np.random.default_rng(0).normal(size=36000).astype(np.float32) * 0.1
    with model.session(GREEDY[0], speech=spoken, driver=driver) as session:
        for at in range(0, len(samples), 4000):
            session.send_audio(samples[at : at + 4000], 16000)
        session.commit()
        said.append(list(session.events())[-1].reply)
        session.send_text("And now?")
        session.commit()
        said.append(list(session.events())[-1].reply)
    if jax.process_count() > 1:
        driver.stop()
    return [[list(r.token_ids), None if r.codes is None else list(r.codes)] for r in said]


def shares(checkpoint: pathlib.Path, folder: pathlib.Path) -> tuple[dict[str, Any], list[int]]:
    """A job whose processes have a copy of the model each, and the lines that this process has answered."""
    task = job.Job(
        checkpoint, folder / "in.jsonl", folder / "shared.jsonl", GREEDY[0], dtype="float32",
        media={"use_audio_in_video": False},
    )  # fmt: skip
    own, write = [], answers.write

    def noted(*args: Any) -> None:
        own.append(args[2]["line"])
        write(*args)

    with mock.patch.object(answers, "write", noted):
        return job.work(task), own


def main(checkpoint: pathlib.Path, folder: pathlib.Path, port: str, number: str) -> None:
    """Loads, generates, and runs a batch job, all with the other process."""
    # On a busy machine gloo once got a message of one program in the collective of another ("192 vs 4"). Dispatched
    # synchronously, a program has ended on all devices of its process before the next one starts.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.distributed.initialize(f"localhost:{port}", 2, int(number), initialization_timeout=60)
    model, loaded = loading(checkpoint)
    replies = model.generate(messages(), GREEDY, speech=SPOKEN)
    np.savez(folder / f"waves{number}.npz", *[r.waveform for r in replies])
    task = job.Job(
        checkpoint, folder / "in.jsonl", folder / "two.jsonl", GREEDY[0], SPOKEN[0], dtype="float32", mesh=MESH,
        media={"use_audio_in_video": False}, batch_size=2,
    )  # fmt: skip
    with mock.patch.object(api, "load", return_value=model), conversations.in_slots_of_generate():
        counts = job.work(task)
    shared, own = shares(checkpoint, folder)
    said = conversation(model)
    out = {"said": said, "loading": loaded, "ids": [r.token_ids for r in replies], "codes": [r.codes for r in replies]}
    out |= {"counts": counts, "shared": shared, "own": own}
    print(json.dumps(out | {"devices": [jax.device_count(), jax.local_device_count()]}))


if __name__ == "__main__":
    checkpoint, folder, *rest = sys.argv[1:]
    main(pathlib.Path(checkpoint), pathlib.Path(folder), *rest)
