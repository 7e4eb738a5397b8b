"""Checkpoints at full size: convert, verify, load, export; times, and peak resident memory. `make full-size` runs it.

    python -m tests.full_size out/3b [--scratch out/full-size] [--steps convert verify …]

The checkpoint is a random one of the published shapes (`omni-jax init`), made where it is not there yet. Each step runs
in a process of its own, which reports its VmHWM. The scratch folder needs room for twice the checkpoint.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

STEPS = ("convert", "verify", "generate", "shard", "export", "wide")
GIB = 2**30

CHILD = """
import json, sys, time
from tests import full_size
began = time.perf_counter()
out = getattr(full_size, sys.argv[1])(*sys.argv[2:])
seconds = time.perf_counter() - began
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
print(json.dumps({"seconds": seconds, "peak": peak, "result": out}))
"""


def child(name: str, *args: object, devices: int | None = None) -> dict:
    """Runs a function of this module in a new process: its result, seconds, and peak resident bytes."""
    env = dict(os.environ)
    if devices is not None:
        env |= {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", CHILD, name, *map(str, args)]
    run = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout)


def drop_cache(folder: pathlib.Path) -> None:
    """Sends the folder's files out of the page cache, so that copying and converting both read the disk."""
    os.sync()
    for file in folder.iterdir():
        if file.is_file():
            fd = os.open(file, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def copy(src: pathlib.Path, dst: pathlib.Path) -> float:
    """Seconds of a plain copy, each file synchronised to disk."""
    dst.mkdir(parents=True)
    began = time.perf_counter()
    for file in sorted(src.iterdir()):
        with open(file, "rb") as f, open(dst / file.name, "wb") as g:
            shutil.copyfileobj(f, g, 16 << 20)
            g.flush()
            os.fsync(g.fileno())
    return time.perf_counter() - began


def do_init(path: str, preset: str, layers: str = "") -> None:
    """A random checkpoint; `layers` cuts every stack of the model to so many."""
    from omni_jax import config as C
    from omni_jax.checkpoint.publish import write_random
    from omni_jax.infer.analysis.depth import truncate_layers

    write_random(path, truncate_layers(C.preset(preset), int(layers) if layers else None))


def do_convert(src: str, dst: str) -> int:
    from omni_jax.checkpoint.convert import convert

    return convert(src, dst)


def do_verify(folder: str) -> dict:
    from omni_jax.checkpoint.report import inspect

    found = inspect(folder, verify=True)
    return {"parameters": found["parameters"], **found["verified"]}


def do_export(src: str, dst: str) -> int:
    from omni_jax.checkpoint.convert import export

    return export(src, dst)


def do_generate(folder: str) -> dict:
    """Loads in bf16 and answers a few tokens."""
    from omni_jax import load

    began = time.perf_counter()
    model = load(folder, dtype="bfloat16")
    loaded = time.perf_counter() - began
    reply = model.generate([{"role": "user", "content": "What is a cat?"}], max_new_tokens=8)
    return {"load": loaded, "token_ids": list(reply.token_ids)}


def do_shard(folder: str) -> dict:
    """Loads the Thinker in bf16 over 2 × 4 devices: seconds, bytes on all devices, and the largest share of one."""
    import jax

    from omni_jax import load

    began = time.perf_counter()
    model = load(folder, dtype="bfloat16", mesh="fsdp=2,tensor=4")
    seconds = time.perf_counter() - began
    share = dict.fromkeys(jax.devices(), 0)
    for leaf in jax.tree.leaves(model.params):
        for shard in leaf.addressable_shards:
            share[shard.device] += shard.data.nbytes
    return {"load": seconds, "devices": sum(share.values()), "largest": max(share.values())}


def report(what: str, made: dict, note: str = "") -> None:
    """One line of the report."""
    print(f"{what}: {made['seconds']:.1f} s, peak {made['peak'] / GIB:.2f} GiB{'; ' if note else ''}{note}", flush=True)


def step_convert(src: pathlib.Path, scratch: pathlib.Path, limit: float) -> None:
    """Copy, convert, and copy again in one run, each from a cold page cache; the faster copy counts."""
    shutil.rmtree(scratch / "converted", ignore_errors=True)
    copies = []
    for turn in ("copy", "convert", "copy"):
        drop_cache(src)
        if turn == "convert":
            made = child("do_convert", src, scratch / "converted")
        else:
            copies.append(copy(src, scratch / "copy"))
            shutil.rmtree(scratch / "copy")
    plain = min(copies)
    ratio = made["seconds"] / plain
    seconds = " and ".join(f"{s:.1f} s" for s in copies)
    report(f"convert {src.name}", made, f"{made['result'] / 1e9:.2f} GB; copies {seconds}; ratio {ratio:.2f}")
    assert made["peak"] < limit * GIB, made
    assert ratio < 2, (made, plain)


def main() -> None:
    """Runs the steps; an assertion fails where a promise of docs/checkpoints.md does not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=pathlib.Path)
    parser.add_argument("--scratch", type=pathlib.Path, default=pathlib.Path("out/full-size"))
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    args = parser.parse_args()
    src, scratch = args.checkpoint, args.scratch
    scratch.mkdir(parents=True, exist_ok=True)
    if not src.exists():
        child("do_init", src, "3b")
    converted = scratch / "converted"
    for step in args.steps:
        if step == "convert":
            step_convert(src, scratch, 2.0)
        elif step == "verify":
            made = child("do_verify", converted)
            report("inspect --verify", made, str(made["result"]))
        elif step == "generate":
            answers = [child("do_generate", folder) for folder in (converted, src)]
            for kind, made in zip(("converted", "published"), answers, strict=True):
                report(
                    f"load and generate, {kind}",
                    made,
                    f"load {made['result']['load']:.1f} s; {made['result']['token_ids']}",
                )
            assert answers[0]["result"]["token_ids"] == answers[1]["result"]["token_ids"]
        elif step == "shard":
            for folder in (converted, src):
                made = child("do_shard", folder, devices=8)
                gib = {key: f"{made['result'][key] / GIB:.2f} GiB" for key in ("devices", "largest")}
                report(f"8 devices, {folder.name}", made, f"load {made['result']['load']:.1f} s; {gib}")
                # What the devices hold, one leaf on its way, and 0.75 GiB for the process.
                assert made["peak"] < made["result"]["devices"] + 2.25 * GIB, made
        elif step == "export":
            made = child("do_export", converted, scratch / "exported")
            same = [file.name for file in src.iterdir() if filecmp.cmp(file, scratch / "exported" / file.name, False)]
            report("export", made, f"{len(same)} of {len(list(src.iterdir()))} files equal byte for byte")
            assert len(same) == len(list(src.iterdir()))
            shutil.rmtree(scratch / "exported")
        else:
            wide = scratch / "wide"
            shutil.rmtree(wide, ignore_errors=True)
            child("do_init", wide / "7b-2-layers", "7b", 2)
            step_convert(wide / "7b-2-layers", wide, 2.5)
            shutil.rmtree(wide)


if __name__ == "__main__":
    main()
