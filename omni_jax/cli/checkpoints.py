"""The commands about checkpoint folders: `omni-jax init`, `convert`, `export`, `inspect`."""

from __future__ import annotations

import json
import pathlib
import sys
import time
from typing import Any, Literal

import tyro
from rich.filesize import decimal

from omni_jax.cli.flags import Flag, Json
from omni_jax.errors import InputError
from omni_jax.settings import Quantize


def report(verb: str, target: str, size: int, began: float, as_json: bool) -> None:
    """Says what was made, on stderr, or as one line of JSON on stdout."""
    seconds = time.perf_counter() - began
    if as_json:
        print(json.dumps({"path": target, "bytes": size, "seconds": seconds}))
    else:
        print(f"{verb} {decimal(size)} to {target} in {seconds:.1f} s", file=sys.stderr)


def init(
    path: tyro.conf.Positional[pathlib.Path],
    *,
    preset: Literal["tiny", "3b", "7b"] = "tiny",
    seed: int = 0,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
) -> None:
    """Make a checkpoint folder with random weights in the published layout, for trying things out.

    Args:
      path: Folder to make; it must not exist.
      preset: Size: tiny (tests and demos), 3b or 7b (the published shapes; their tokenizer is only a stand-in).
      seed: Of the weights.
      dtype: Of the stored weights; Token2Wav is always float32.
    """
    from omni_jax.checkpoint.publish import write_random
    from omni_jax.config import preset as config_of

    write_random(path, config_of(preset), seed=seed, dtype=dtype, progress=sys.stderr.isatty())


def convert(
    src: tyro.conf.Positional[str],
    dst: tyro.conf.Positional[str],
    *,
    dtype: Literal["keep", "bfloat16", "float32"] = "keep",
    speech_dtype: Literal["keep", "bfloat16", "float32"] = "keep",
    parts: str | None = None,
    adapter: pathlib.Path | None = None,
    keep_adapter: Flag = False,
    quantize: Quantize | None = None,
    as_json: Json = False,
) -> None:
    """Make an Orbax checkpoint of a published one, with everything that belongs to it.

    Args:
      src: Checkpoint folder, or a model on the hub (Qwen/Qwen2.5-Omni-3B).
      dst: Folder to make, or a URL (gs://bucket/folder).
      dtype: Of the stored weights; bfloat16 leaves Token2Wav in float32.
      speech_dtype: Of the weights that Token2Wav multiplies by. bfloat16 halves them, for `--speech-dtype bfloat16`.
      parts: Which to take, with commas: thinker,talker,token2wav. All there are if not given.
      adapter: Folder of a PEFT adapter (LoRA) to merge into the weights.
      keep_adapter: Put the adapter beside the weights instead.
      quantize: Store weights as int8, with a scale for each output row: int8, the projections of Thinker and Talker;
        int8-head, also their output heads; int8-all, also the towers.
    """
    from omni_jax.checkpoint.convert import convert as run

    began = time.perf_counter()
    wanted = None if parts is None else tuple(parts.split(","))
    size = run(
        src, dst, dtype=dtype, speech_dtype=speech_dtype, parts=wanted, adapter=adapter, keep_adapter=keep_adapter,
        quantize=quantize, progress=sys.stderr.isatty(),
    )  # fmt: skip
    report("converted", dst, size, began, as_json)


def export(
    src: tyro.conf.Positional[str],
    dst: tyro.conf.Positional[pathlib.Path],
    *,
    peft: Flag = False,
    step: str | None = None,
    base: str | None = None,
    graft: str | None = None,
    max_shard_gb: float | None = None,
    as_json: Json = False,
) -> None:
    """Give a converted checkpoint, or what a fine-tuning run has learned, back in the published layout.

    Args:
      src: Folder that `omni-jax convert` made, or its URL; the folder of a run of `omni-jax finetune`; or, with
        --graft, a Thinker.
      dst: Folder to make.
      peft: Of a run with adapters: write these alone, as PEFT reads them, instead of merging them.
      step: Of a run: which checkpoint: last, best (the least loss of an evaluation), or a step; by default the last.
      base: Of a run: where the model that it began with lies now; by default where it lay then.
      graft: Put the Thinker of SRC into this whole checkpoint, whose other parts, voices and files are kept.
      max_shard_gb: Cut new shards of at most so many GB; by default they are those of the original (else 5).
    """
    if max_shard_gb is not None and not 0 < max_shard_gb < 1e6:
        raise InputError(f"--max-shard-gb {max_shard_gb} must be above 0")
    began, shard = time.perf_counter(), max(1, int((max_shard_gb or 5) * 1e9))
    run = "://" not in src and (pathlib.Path(src) / "checkpoints").is_dir()
    of_run = [f"--{name}" for name, given in (("peft", peft), ("step", step), ("base", base)) if given]
    if of_run and (not run or graft is not None):
        raise InputError(f"{', '.join(of_run)} go with a run of omni-jax finetune, which {src} is not")
    if graft is not None:
        from omni_jax.checkpoint.graft import graft as put

        size = put(src, graft, dst, shard_bytes=shard, progress=sys.stderr.isatty())
    elif not run:
        from omni_jax.checkpoint import convert as converted

        cut = None if max_shard_gb is None else shard
        size = converted.export(src, dst, max_shard_bytes=cut, progress=sys.stderr.isatty())
    else:
        from omni_jax.train import export as trained

        size = trained.export(src, dst, peft=peft, shard_bytes=shard, which=step or "last", base=base)
    report("exported", str(dst), size, began, as_json)


def inspect(
    path: tyro.conf.Positional[str],
    *,
    verify: Flag = False,
    as_json: Json = False,
) -> None:
    """Show what a checkpoint holds: parts, sizes, dtypes, voices, and the whole configuration.

    Args:
      path: Checkpoint folder of either kind, a model on the hub, or the URL of a converted folder.
      verify: Read every array and check its shape, that it is finite, and its checksum.
    """
    from omni_jax.checkpoint.report import inspect as run

    found = run(path, verify=verify, progress=sys.stderr.isatty())
    if as_json:
        print(json.dumps(found, ensure_ascii=False))
    else:
        _print_tables(found)


def _print_tables(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    parts = Table("part", *(("tensors", "parameters", "bytes")), "dtypes", title=f"{found['kind']} checkpoint")
    for column in parts.columns[1:4]:
        column.justify = "right"
    for name, part in found["parts"].items():
        kinds = ", ".join(f"{dtype} × {count}" for dtype, count in part["dtypes"].items())
        parts.add_row(name, f"{part['tensors']:,}", f"{part['parameters']:,}", f"{part['bytes']:,}", kinds)
    tensors = sum(part["tensors"] for part in found["parts"].values())
    parts.add_row("total", f"{tensors:,}", f"{found['parameters']:,}", f"{found['bytes']:,}", "", style="bold")
    console.print(parts)
    console.print(f"voices: {', '.join(found['voices']) or 'none'}")
    if found["adapter"]:
        console.print("adapter: beside the weights, not merged")
    config = Table("field", "value", "", title="configuration")
    for name, value in found["config"].items():
        config.add_row(name, str(value), "default" if name in found["defaults"] else "")
    console.print(config)
    if found["defaults"]:
        console.print(f"default: left out of config.json, {len(found['defaults'])} of {len(found['config'])} fields")
    if "verified" in found:
        sums = found["verified"]["checksums"]
        against = f"checksums ({sums}) agree" if sums != "none" else "this folder carries no checksums"
        console.print(f"verified: {tensors:,} tensors have their shapes and are finite; {against}")
