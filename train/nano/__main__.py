"""The whole recipe: `python -m omni_jax.train.nano`. What is there already is not made again, and runs go on."""

from __future__ import annotations

import multiprocessing
import pathlib
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Annotated, Any

import numpy as np
import tyro

from omni_jax.config import load_config
from omni_jax.errors import InputError
from omni_jax.files import replacing
from omni_jax.train import loop
from omni_jax.train.config import Run, load
from omni_jax.train.nano import features, model, pictures, records, release, resident, speech, voices

OUT = pathlib.Path("out/nano")  # as configs/nano.py names it
# The runs of `resident`, in this order, with those whose weights each begins with.
RUNS: dict[str, tuple[str, ...]] = {"see": (), "hear": (), "joint": ("see", "hear"), "talker": ("joint",)}
FINETUNED = ("vocoder", "flow")


def alone(work: Callable[..., Any], *args: Any) -> Any:
    """Calls in a process of its own: `resident.train` begins others as copies of it, and jax must be unused by then."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *args).result()


def make_data(processes: int) -> None:
    """Recordings, records, the untrained checkpoint, features."""
    data, packages = OUT / "data", OUT / "packages"
    voices.check_tools()
    pictures.fetch(packages)
    speech.make(data, processes)
    if not (OUT / "base").exists():
        model.write_base(data, OUT / "base")
    records.make(data, packages, processes)


def weights(names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The parameters that runs have trained, the later ones' before the earlier ones'."""
    out: dict[str, np.ndarray] = {}
    for name in names:
        with np.load(OUT / f"{name}.npz", allow_pickle=False) as held:
            out |= dict(held)
    return out


def learn(config: pathlib.Path, name: str, processes: int) -> None:
    """One run of `resident`, whose weights go to a file."""
    to = OUT / f"{name}.npz"
    if to.exists():
        return
    run, folder = load(f"{config}:{name}"), OUT / "features" / name
    features.make_features(run, OUT / "data" / f"{name}-train.jsonl", folder, processes)
    start = weights(RUNS[name])
    keep = OUT / f"{name}.state.npz"
    made = resident.train(
        run,
        features.load_features(folder, load_config(run.model).thinker),
        start=start,
        processes=processes,
        keep=keep,
    )
    with replacing(to) as file:
        np.savez(file, allow_pickle=False, **(start | made))
    keep.unlink(missing_ok=True)


def finetune(run: Run, name: str) -> None:
    """One run of `omni-jax finetune`, whose weights go to a file."""
    to = OUT / f"{name}.npz"
    if to.exists():
        return
    state = loop.train(run)
    with replacing(to) as file:
        np.savez(file, allow_pickle=False, **{n: np.asarray(a) for n, a in state.params.items()})


def main(
    config: pathlib.Path = pathlib.Path("configs/nano.py"),
    processes: Annotated[int, tyro.conf.arg(help="That make data and batches.")] = 2,
) -> None:
    """Make the data, train every part, and put the checkpoint together in out/nano/release.

    Args:
      config: The runs.
    """
    make_data(processes)
    for name in RUNS:
        alone(learn, config, name, processes)
    for name in FINETUNED:
        finetune(load(f"{config}:{name}"), name)
    if not (OUT / "release").exists():
        size = release.assemble(OUT / "base", weights((*RUNS, *FINETUNED)), OUT / "release")
        print(f"{OUT / 'release'}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except InputError as e:
        sys.exit(f"nano: {e}")
