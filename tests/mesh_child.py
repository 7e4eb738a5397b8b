"""Run by test_mesh_equal.py in a process of its own: every network and whole generations on eight virtual devices
beside one. Prints one line of JSON.

python -m tests.mesh_child CHECKPOINT FOLDER
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

os.environ["JAX_COMPILATION_CACHE_DIR"] = ""

import jax
import numpy as np

from omni_jax import PARTS, api, config, load
from omni_jax.infer.batch import job
from omni_jax.infer.bench import reference, text
from omni_jax.model import audio, talker, token2wav, vision
from omni_jax.parallel import meshes
from omni_jax.runtime import slots
from omni_jax.runtime.talker_stage import TalkerStage
from omni_jax.runtime.thinker_stage import ThinkerStage
from omni_jax.settings import GenerationSettings, SpeechSettings
from tests import conversations

# Name → (mesh, mesh of speech, LONG_PROMPT or None, whether it speaks).
LAYOUTS: dict[str, tuple[str, str | None, int | None, bool]] = {
    "2x4": ("2x4", None, None, True),
    "data, tensor and sequence": ("data=2,tensor=2,sequence=2", None, None, False),
    "data, fsdp and sequence": ("data=2,fsdp=2,sequence=2", None, None, False),
    "fsdp and tensor": ("fsdp=2,tensor=4", None, None, False),
    "long prompts": ("2x4", None, 64, False),
    "speech apart": ("2x2", "2x2", None, True),
}
BENCHED = ("decode", "talker")
GREEDY = [GenerationSettings(max_new_tokens=n) for n in (9, 6)]
SPOKEN = [SpeechSettings(temperature=0.0, max_codes=11, watchdog=None), SpeechSettings(seed=3, max_codes=7)]


def messages() -> list[Any]:
    """A picture, a clip and a sound in one prompt, and a text: unequal lengths of one bucket, read together."""
    media = [conversations._image(56, 84), conversations._video(1.2), conversations._audio(2.3)]
    asked = ([*media, conversations._text("Compare")], [conversations._text("What is a cat? " * 10)])
    return [[conversations._user(*content)] for content in asked]


def live(cache: Any, size: int) -> list[np.ndarray]:
    """Keys and values of the live slots, row by row."""
    k, v = (np.stack([np.asarray(x) for x in a]) if isinstance(a, tuple) else np.asarray(a) for a in (cache.k, cache.v))
    lengths = np.asarray(cache.lengths)
    return [a[:, row, :, : lengths[row]] for a in (k, v) for row in range(size)]


def split(array: Any) -> list[str]:
    """What each axis is split over; a dash for nothing, and nothing for the last axes that are whole."""
    names = ["-" if axis is None else str(axis) for axis in array.sharding.spec]
    return names[: 1 + max((i for i, name in enumerate(names) if name != "-"), default=-1)]


@contextlib.contextmanager
def kept(found: dict[str, list], size: int) -> Iterator[None]:
    """Keeps what the networks give while a generation runs, and where their arrays lie."""

    def keep(stack: contextlib.ExitStack, module: Any, name: str, what: Any, of: Any) -> None:
        whole = getattr(module, name)

        def run(*args: Any, **kwargs: Any) -> Any:
            out = whole(*args, **kwargs)
            found.setdefault(what if isinstance(what, str) else what(*args), []).extend(of(out, *args))
            return out

        stack.enter_context(mock.patch.object(module, name, run))

    def read(out: tuple, program: Any, params: Any, before: Any, tokens: slots.Tokens) -> list:
        state, embeddings, hidden = out
        if program.hears_reply:
            return [*live(state.cache, size), np.asarray(state.last)[:size]]
        if not isinstance(state.cache.k, tuple):
            found["where"] = [split(state.cache.k), split(hidden)]
        rows = [np.asarray(a)[i, :n] for a in (hidden, embeddings) for i, n in enumerate(tokens.counts) if n]
        return [*rows, *live(state.cache, size)]

    def part(what: str) -> Any:
        return lambda program, *args: f"{'talker' if program.hears_reply else 'thinker'} {what}"

    def drawn(out: jax.Array, params: Any, cfg: Any, codes: Any, lengths: np.ndarray, *args: Any) -> list:
        """The true frames: what padding holds has no meaning."""
        return [np.asarray(out)[row, : n * cfg.repeats] for row, n in enumerate(lengths)]

    with contextlib.ExitStack() as stack:
        keep(stack, vision, "vision_features", "vision", lambda out, *args: [out])
        keep(stack, audio, "audio_features", "audio", lambda out, *args: [out])
        keep(stack, slots, "extend", part("prefill"), read)
        keep(stack, slots, "step", part("decode"), lambda out, *args: live(out[0].cache, size))
        keep(stack, token2wav, "sample_mel", "dit", drawn)
        keep(stack, token2wav, "vocode_mel", "bigvgan", lambda out, *args: [np.asarray(out)])
        yield


def error(a: np.ndarray, b: np.ndarray) -> float:
    """Largest difference, in parts of the largest value."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return 0.0 if not a.size else float(np.max(np.abs(a - b)) / np.max(np.abs(b)))


def answer(model: api.Omni, speaks: bool = True) -> tuple[dict[str, list], list[Any]]:
    """What the networks gave for the batch, and the replies."""
    asked = [model.prepare(m) for m in messages()]
    found: dict[str, list] = {}
    with kept(found, len(asked)):
        replies = model.answer(asked, GREEDY, SPOKEN if speaks else None)
    counts = {what: len(arrays) for what, arrays in found.items()}
    assert all(counts.values()), counts
    return found, replies


def guarded() -> Any:
    """`talker.reply_vectors` that first looks whether an array of the host may enter a program unasked."""
    whole, held = talker.reply_vectors, []

    def run(*args: Any) -> Any:
        try:
            jax.jit(lambda x: x + 1)(np.ones(3))
            held.append(False)
        except jax.errors.JaxRuntimeError as e:
            held.append("Disallowed host-to-device transfer" in str(e))
        return whole(*args)

    return mock.patch.object(talker, "reply_vectors", run), held


def as_files(folder: pathlib.Path) -> list[Any]:
    """`messages` with their media in files, as a job's lines name them."""
    lines = messages()
    for part in lines[0][0]["content"]:
        kind = part["type"]
        if isinstance(part[kind], bytes):
            (folder / kind).write_bytes(part[kind])
            part[kind] = str(folder / kind)
    return lines


def side_by_side(checkpoint: pathlib.Path, folder: pathlib.Path, model: api.Omni) -> dict[str, Any]:
    """A batch job on stages apart: in some rounds both decoders are asked before either is waited for. It answers
    the prompts of `answer` twice, mostly by the programs that were compiled for it."""
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in as_files(folder) * 2))
    task = job.Job(
        checkpoint, folder / "in.jsonl", folder / "out.jsonl", GREEDY[0], SPOKEN[0], dtype="float32", batch_size=2,
        media={"use_audio_in_video": False}, mesh="2x2", speech_mesh="2x2",
    )  # fmt: skip
    events: list[str] = []

    def noted(method: Any, what: str) -> Any:
        def run(*args: Any) -> Any:
            events.append(what)
            return method(*args)

        return run

    with contextlib.ExitStack() as stack:
        for stage, name in ((ThinkerStage, "write"), (TalkerStage, "talk")):
            fetch = noted(stage.fetch, f"{name}: wait")
            stack.enter_context(mock.patch.object(stage, "step", noted(stage.step, name)))
            stack.enter_context(
                mock.patch.object(stage, "fetch", staticmethod(fetch) if stage is ThinkerStage else fetch)
            )
        stack.enter_context(mock.patch.object(api, "load", return_value=model))
        stack.enter_context(conversations.in_slots_of_generate())
        counts = job.work(task)
    records = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    together = sum(events[i : i + 2] == ["write", "talk"] for i in range(len(events)))
    return {
        "counts": counts, "rounds together": together, "codes": [r["codec_ids"] for r in records],
        "ids": [r["token_ids"] for r in records], "files": [pathlib.Path(r["speech"]).exists() for r in records],
    }  # fmt: skip


def benchmark() -> dict[str, Any]:
    """Ours over eight devices, the reference on one: all stages but the long ones, and where a weight lies."""
    cfg = config.preset("tiny")
    head = reference.SharedWeights(cfg, "thinker.").tree(meshes.place(cfg, "2x4"))["lm_head"]["weight"]
    rows = text.run(BENCHED, preset="tiny", pairs=1, layers=2, mesh="2x4", progress=False)
    return {"stages": [r.stage for r in rows], "seconds": [r.summary()["jax_s"] for r in rows],
            "head": str(head.sharding.spec), "sum": float(np.asarray(head, np.float64).sum()),
            "want": float(reference.SharedWeights(cfg, "thinker.lm_head.").arrays["thinker.lm_head.weight"]
                          .astype(np.float64).sum())}  # fmt: skip


def main(checkpoint: pathlib.Path, folder: pathlib.Path) -> None:
    """All comparisons, as JSON."""
    one = load(checkpoint, parts=PARTS, dtype="float32")
    want, replies = answer(one)
    print("one device", time.process_time(), file=sys.stderr)
    out: dict[str, Any] = {"devices": jax.device_count(), "layouts": {}, "seconds": {}}
    for name, (mesh, speech_mesh, long, speaks) in LAYOUTS.items():
        began = time.perf_counter()
        with mock.patch.object(meshes, "LONG_PROMPT", long or meshes.LONG_PROMPT):
            meshes._rules.cache_clear()
            parts = PARTS if speaks else ("thinker",)
            model = load(checkpoint, parts=parts, dtype="float32", mesh=mesh, speech_mesh=speech_mesh)
            guard, held = guarded()
            with guard if speech_mesh is not None else contextlib.nullcontext():
                got, made = answer(model, speaks)
        meshes._rules.cache_clear()
        where = got.pop("where")
        out["layouts"][name] = {
            "errors": {what: max(map(error, got[what], want[what])) for what in got},
            "counts equal": all(len(got[what]) == len(want[what]) for what in got),
            "ids": [r.token_ids == w.token_ids for r, w in zip(made, replies, strict=True)],
            "codes": [r.codes == w.codes for r, w in zip(made, replies, strict=True)],
            "lengths": [len(r.codes or ()) for r in made],
            "sound": max(error(r.waveform, w.waveform) for r, w in zip(made, replies, strict=True)) if speaks else None,
            "where": where, "guarded": held,
            "devices": {part: sorted(d.id for d in jax.tree.leaves(tree)[0].sharding.device_set)
                        for part, tree in model.params.items()},
        }  # fmt: skip
        out["seconds"][name] = time.perf_counter() - began
        print(name, out["seconds"][name], time.process_time(), file=sys.stderr, flush=True)
    began = time.perf_counter()
    out["side by side"] = side_by_side(checkpoint, folder, model)
    alone = one.generate(messages(), GREEDY[0], speech=SPOKEN[0]) * 2
    out["on one device"] = {"ids": [r.token_ids for r in alone], "codes": [r.codes for r in alone]}
    out["seconds"]["side by side"] = time.perf_counter() - began
    print("side by side", time.process_time(), file=sys.stderr)
    began = time.perf_counter()
    out["bench"] = benchmark()
    out["seconds"]["bench"] = time.perf_counter() - began
    print(json.dumps(out))


if __name__ == "__main__":
    main(*map(pathlib.Path, sys.argv[1:]))
