"""Starting the processes of a job and watching them: where one dies, the others are ended, and a line says so."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from omni_jax.errors import InputError

# Seconds between two looks at the processes, and for the others to end by themselves before they are killed.
POLL, GRACE = 0.2, 5.0


@dataclass(frozen=True)
class Cluster:
    """Which processes make up a job.

    Attributes:
      coordinator: address of the first one, "host:port"; None where the machines know it (Cloud TPU, GKE, SLURM).
      process, count: which of how many this is.
      patience: seconds after which a silent process counts as dead.
    """

    coordinator: str | None = None
    process: int | None = None
    count: int | None = None
    patience: int = 60


def parse_join(text: str, patience: int) -> Cluster:
    """`auto`, or `HOST:PORT,INDEX/COUNT`. Raises InputError for anything else."""
    if text == "auto":
        return Cluster(patience=patience)
    address, _, place = text.partition(",")
    index, _, count = place.partition("/")
    host, _, port = address.rpartition(":")
    if not (host and port.isdigit() and index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise InputError(
            f"--join {text!r} is neither auto nor HOST:PORT,INDEX/COUNT, such as 10.0.0.1:4321,0/2 on the first of two"
        )
    return Cluster(address, int(index), int(count), patience)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def end_with_parent() -> None:
    """Ends this process soon after the one that started it: nobody would watch it any more."""
    parent = os.getppid()

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(POLL)
        os._exit(1)

    threading.Thread(target=look, daemon=True).start()


def _how(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    with contextlib.suppress(ValueError):
        return f"was ended by {signal.Signals(-code).name}"
    return f"was ended by signal {-code}"


def watch(commands: Sequence[Sequence[str]], env: Mapping[str, str] | None = None, names: Sequence[str] = ()) -> None:
    """Runs processes until all have ended well.

    Where one ends badly the others are asked to end, and killed after GRACE seconds.

    Args:
      commands: their arguments.
      env: variables besides those of this process.
      names: what messages call them; "process 0" and so on by default.
    Raises:
      ProcessError: one of them ended badly; the message names it and says how.
    """
    processes: list[subprocess.Popen] = []

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop) if threading.current_thread() is threading.main_thread() else None
    try:
        for command in commands:
            processes.append(subprocess.Popen(command, env=os.environ | (env or {})))
        while True:
            codes = [p.poll() for p in processes]
            bad = [i for i, code in enumerate(codes) if code]
            if bad:
                name = names[bad[0]] if names else f"process {bad[0]} of {len(processes)}"
                code = codes[bad[0]]
                assert code is not None
                raise ProcessError(f"{name} {_how(code)}", code)
            if all(code == 0 for code in codes):
                return
            time.sleep(POLL)
    finally:
        _end(processes)
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _end(processes: Sequence[subprocess.Popen]) -> None:
    for p in processes:
        if p.poll() is None:
            p.terminate()
    deadline = time.monotonic() + GRACE
    for p in processes:
        try:
            p.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            p.kill()
            p.wait()


class ProcessError(Exception):
    """A process of a job ended badly.

    Attributes:
      code: its exit code; negative for a signal.
    """

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code
