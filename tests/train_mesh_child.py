"""Run by test_train_mesh.py in processes of their own: the number of devices is fixed when JAX starts.

python -m tests.train_mesh_child devices CHECKPOINT FOLDER
python -m tests.train_mesh_child process CHECKPOINT FOLDER PORT NUMBER
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omni_jax.train.config import Run

STEPS = 10  # of the two processes


def _pictures(folder: pathlib.Path) -> str:
    """Eight conversations, every third with a picture: hosts see different media."""
    from tests import conversations, training

    records = training.questions(8)
    for i in range(0, 8, 3):
        (folder / f"{i}.png").write_bytes(conversations._image(56, 56 + 28 * i, i)["image"])
        ask = records[i]["messages"][0]
        ask["content"] = [{"type": "image", "image": f"{i}.png"}, {"type": "text", "text": ask["content"]}]
    return training.write_lines(folder / "train.jsonl", records)


def devices(checkpoint: pathlib.Path, folder: pathlib.Path) -> None:
    """Two steps on a packed batch with media: on one device, and on a mesh of the eight."""
    import jax
    import numpy as np

    import omni_jax
    from omni_jax.parallel import meshes
    from omni_jax.train import checkpoints as K
    from omni_jax.train import step as S
    from omni_jax.train.config import Lora
    from tests import training

    model = omni_jax.load(checkpoint, dtype="float32")
    read = training.reader(model, checkpoint)
    kinds = ["image", "audio", "text", "text", "image", "text", "image", "audio"]
    rows = [[s] for s in training.samples(read, kinds)]
    rows[2] += training.samples(read, ["audio", "text"])
    batch = jax.tree.map(lambda x: x[None], training.batch(model, rows))
    params = S.flatten(training.stacked(checkpoint, model))
    texts = jax.tree.map(lambda x: x[None], training.batch(model, [[s] for s in training.samples(read, ["text"] * 8)]))
    for lora in (None, Lora(4, 8.0)):
        # The towers' backward pass takes long to compile: once is enough.
        run = training.run(
            checkpoint, folder / ("full" if lora is None else "lora"), "x", lora=lora,
            rates={"thinker": 1e-3} if lora is None else {"thinker.model": 1e-3}, data={"batch": 8},
            remat="full" if lora is None else "dots",
        )  # fmt: skip
        results = {}
        for mesh in (None, "fsdp=4,tensor=2" if lora is None else "data=2,fsdp=4"):
            placement = None if mesh is None else meshes.place(model.config, mesh)
            trainer = S.make_trainer(dataclasses.replace(run, mesh=mesh), model.config, placement)
            given = params
            if placement is not None:
                given = {n: jax.device_put(np.asarray(a), trainer.shardings[n]) for n, a in params.items()}
            state, frozen = trainer.init_state(given), trainer.freeze(given)
            placed = S.put(batch if lora is None else texts, trainer.mesh, 0, 1)
            if mesh is not None and lora is None:
                spread = [a for a in state.params.values() if not a.sharding.is_fully_replicated]
                assert sum(a.size for a in spread) > 0.9 * sum(a.size for a in state.params.values())
            losses = []
            for made in range(2):
                state, metrics = trainer.step(state, frozen, None, placed)
                losses.append(float(metrics["loss"]))
                if mesh is None and made == 0:
                    saved = K.Checkpoints(trainer.run)
                    saved.save(state, K.Progress())
                    saved.finish()
            results[mesh] = losses, {n: np.asarray(a) for n, a in state.params.items()}
            if mesh is None:
                continue
            # What one device saved, the mesh takes up.
            saved = K.Checkpoints(trainer.run)
            (restored, _) = saved.restore(trainer.state_shapes(), trainer.state_shardings(), print)
            assert int(restored.step) == 1
            restored, metrics = trainer.step(restored, frozen, None, placed)
            assert abs(float(metrics["loss"]) - results[None][0][1]) < 1e-5 * results[None][0][1], mesh
        for mesh, (losses, arrays) in results.items():
            want, theirs = results[None]
            assert np.allclose(losses, want, rtol=1e-5), (mesh, losses, want)
            for name, array in arrays.items():
                # AdamW moves every weight by about its rate, whatever the gradient's size: rounding shows.
                moved = np.abs(array - theirs[name])
                assert np.mean(moved) < 2e-5, (mesh, name, np.mean(moved))
            print("equal", lora, mesh, losses)


def process(checkpoint: pathlib.Path, folder: pathlib.Path, port: str, number: str) -> None:
    """One of two processes with four devices each, through the whole loop."""
    import jax

    # JAX looks for the signal once a second: the run that gets it must last longer.
    pause = 0.0 if (folder / "out").exists() else 0.2
    jax.distributed.initialize(f"localhost:{port}", 2, int(number), initialization_timeout=60)
    from omni_jax.train import loop, metrics
    from tests.compile_counter import count_compiles

    write, compiled = metrics.Writer.write, []

    def slowly(self, *given, **more):
        time.sleep(pause)
        write(self, *given, **more)
        compiled.append(count.value)

    metrics.Writer.write = slowly
    with count_compiles() as count:
        loop.train(run(checkpoint, folder, "data=2,fsdp=4"))
    # All batches have one shape: what the first two steps do not compile is compiled by none.
    assert len(set(compiled[1:])) == 1, compiled


def run(checkpoint: pathlib.Path, folder: pathlib.Path, mesh: str | None) -> Run:
    """What the two processes train, and one device alone."""
    from tests import training

    return training.run(
        checkpoint, folder, str(folder.parent / "train.jsonl"), mesh=mesh, steps=STEPS,
        rates={"thinker.model": 1e-3}, data={"batch": 8, "pack": False},
    )  # fmt: skip


if __name__ == "__main__":
    what, checkpoint, folder, *rest = sys.argv[1:]
    {"devices": devices, "process": process}[what](pathlib.Path(checkpoint), pathlib.Path(folder), *rest)
