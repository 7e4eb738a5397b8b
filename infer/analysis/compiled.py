"""On-disk cache of compiler reports: compiling for a pod takes minutes a program, reading its text a second.

A record is found by everything that the compiler saw (the lowered program, the chips, the versions and flags), so one
of an older program is never taken for a new one's, and the same program of two models is compiled once.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import importlib.metadata
import json
import os
import pathlib
import time
from dataclasses import dataclass
from typing import Any

import jax

from omni_jax.errors import InputError
from omni_jax.files import replacing
from omni_jax.infer.analysis.programs import Program

# Packages that hold a compiler, or hand it a program, and the platform that they are for.
COMPILERS = {"jax": "", "jaxlib": "", "libtpu": "tpu", "jax-cuda12-plugin": "gpu", "jax-cuda12-pjrt": "gpu"}
# Without a GPU to try tiles on, XLA chooses those of its own (Triton) products by rule, and gives up where none fits;
# cuBLAS is then left to multiply, as it is one of the candidates on a GPU.
UNTILED = "Couldn't find output tile sizes"


@dataclass(frozen=True)
class Compiled:
    """The compiler's memory report of a program, in bytes on one device.

    Attributes:
      text: the optimised program; "" where there is none.
      arguments, results, shared: of its interface; `shared` is what of the results lies where arguments lay.
      temp: beside them.
      peak: of all, by the compiler's simulation; it counts fast memory as well.
      seconds: of compilation.
      error: why the program does not fit, in one line; None where it does.
    """

    text: str
    arguments: int = 0
    results: int = 0
    shared: int = 0
    temp: int = 0
    peak: int = 0
    seconds: float = 0.0
    error: str | None = None

    @property
    def total(self) -> int:
        """Everything that the program holds in HBM."""
        return self.arguments + self.results - self.shared + self.temp


def compile_program(program: Program, keep: pathlib.Path | None = None) -> Compiled:
    """Compiles a program, or returns the cached report of the same one.

    Args:
      program: which.
      keep: folder of records; None to compile always. It is made if it is not there.
    Raises:
      InputError: the folder cannot be written, or holds a record that is none.
    """
    lowered = program.lower()
    file = keep / f"{_key(lowered, program.layout.mesh)}.json.gz" if keep is not None else None
    if file is not None and file.exists():
        return _read(file)
    begin = time.perf_counter()
    try:
        compiled = _compile(lowered)
    except jax.errors.JaxRuntimeError as e:
        reason = " ".join(str(e).split())
        if "RESOURCE_EXHAUSTED" not in reason and "memory" not in reason:
            raise
        out = Compiled("", seconds=time.perf_counter() - begin, error=reason[:300])
    else:
        seconds, m = time.perf_counter() - begin, compiled.memory_analysis()
        out = Compiled(
            compiled.as_text(), m.argument_size_in_bytes, m.output_size_in_bytes, m.alias_size_in_bytes,
            m.temp_size_in_bytes, m.peak_memory_in_bytes, seconds,
        )  # fmt: skip
    if file is not None:
        _write(file, out)
    return out


def _compile(lowered: Any) -> Any:
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as e:
        if UNTILED not in str(e):
            raise
        return lowered.compile(compiler_options={"xla_gpu_enable_triton_gemm": False})


def _key(lowered: Any, mesh: jax.sharding.Mesh) -> str:
    found = {p.metadata["Name"]: p.version for p in importlib.metadata.distributions() if p.metadata["Name"]}
    devices = mesh.devices.flat
    seen = [
        {n: found.get(n) if platform in ("", devices[0].platform) else None for n, platform in COMPILERS.items()},
        {name: os.environ.get(name) for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")},
        [(d.device_kind, getattr(d, "coords", d.id)) for d in devices],
        lowered.as_text(),
    ]
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()


def _read(file: pathlib.Path) -> Compiled:
    try:
        with gzip.open(file, "rt", encoding="utf-8") as f:
            return Compiled(**json.load(f))
    except (OSError, EOFError, ValueError, TypeError) as e:
        raise InputError(f"{file}: not a record of a compiled program ({e}); delete it") from None


def _write(file: pathlib.Path, out: Compiled) -> None:
    data = gzip.compress(json.dumps(dataclasses.asdict(out)).encode())
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"{file.parent}: cannot keep what the compiler said: {e.strerror}") from None
    with replacing(file) as f:
        f.write(data)
