"""The files of a batch job: conversations in, one a line, and records out, one for each of them.

While a job runs, each process appends to a part of its own; the output appears whole, in the order of the input.
Records name their line and a digest of it and of the settings, so that a job that was cut off goes on where it was.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from omni_jax.errors import InputError
from omni_jax.processing.encode import check_writable, write_atomically


class JobError(InputError):
    """A batch job that cannot run; the message says why."""


@dataclass(frozen=True)
class Line:
    """A line of the input. It stays in its file until it is its turn: media may stand in it.

    Attributes:
      number: from 1.
      digest: of the text and of what else the answer depends on.
      file: the input.
      start, size: where it stands there, in bytes.
    """

    number: int
    digest: str
    file: pathlib.Path = pathlib.Path()
    start: int = 0
    size: int = 0

    def read(self) -> str:
        """Its text. Raises JobError where it is not UTF-8, or the file cannot be read any more."""
        try:
            with open(self.file, "rb") as file:
                file.seek(self.start)
                return file.read(self.size).decode("utf-8-sig").strip()
        except UnicodeDecodeError as e:
            raise JobError(f"it is not UTF-8 ({e})") from None
        except OSError as e:
            raise JobError(f"{self.file} cannot be read any more ({e.strerror})") from None


def read_lines(path: pathlib.Path, settings: Mapping[str, Any]) -> list[Line]:
    """The lines of a job that are not blank; one of them is in memory at a time.

    Args:
      path: the input.
      settings: what the answers depend on besides, as plain data.
    Raises:
      JobError: it cannot be read, or has no line.
    """
    salt = f"{json.dumps(settings, sort_keys=True)}\n".encode()
    lines, start = [], 0
    try:
        with open(path, "rb") as file:
            for i, raw in enumerate(file, 1):
                # Bytes that are not UTF-8 are that line's error.
                text = raw.decode("utf-8-sig" if i == 1 else "utf-8", "surrogateescape").strip()
                if text:
                    digest = hashlib.sha256(salt + text.encode("utf-8", "surrogateescape")).hexdigest()[:16]
                    lines.append(Line(i, digest, path, start, len(raw)))
                start += len(raw)
    except OSError as e:
        raise JobError(f"{path} cannot be read ({e}); give a file with one conversation in JSON a line") from None
    if not lines:
        raise JobError(f"{path} has no line; give one conversation in JSON a line")
    return lines


def spool(file: BinaryIO, out: pathlib.Path) -> pathlib.Path:
    """Copies standard input beside the output, where the job and its processes read it line by line."""
    path = out.with_name(f"{out.name}.input")
    write_atomically(path, lambda target: shutil.copyfileobj(file, target))
    return path


def _parts(out: pathlib.Path) -> list[pathlib.Path]:
    pattern = re.compile(re.escape(out.name) + r"\.part-\d{5}")
    return sorted(p for p in out.absolute().parent.iterdir() if pattern.fullmatch(p.name))


def _records(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """The whole records of a file; a last line that was cut off is left out."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return
    for i, row in enumerate(data.split(b"\n")[:-1], 1):
        try:
            record = json.loads(row)
        except ValueError:
            record = None
        if not isinstance(record, dict) or not isinstance(record.get("line"), int):
            raise JobError(f"{path} line {i} is no record of a batch job; name another output, or remove the file")
        yield record


def answered(out: pathlib.Path, lines: Sequence[Line]) -> dict[int, dict[str, Any]]:
    """The records that are there already, by line.

    Raises:
      JobError: files that hold something else, or the answers to other lines or settings.
    """
    check_writable(out)
    digests = {line.number: line.digest for line in lines}
    found: dict[int, dict[str, Any]] = {}
    for path in (out, *_parts(out)):
        for record in _records(path):
            if digests.get(record["line"]) != record.get("digest"):
                raise JobError(
                    f"{path} answers line {record['line']} of another input, or under other settings or of "
                    "another model; name another output, or remove it"
                )
            found[record["line"]] = record
    return found


class OutputShard:
    """The file that one process appends to."""

    def __init__(self, out: pathlib.Path, process: int):
        """Opens it; raises JobError where it cannot be written, or another job is writing it."""
        self.path = out.with_name(f"{out.name}.part-{process:05d}")
        self._finished = self.path.with_name(f"{self.path.name}.finished")
        try:
            self._file: BinaryIO = open(self.path, "a+b")  # noqa: SIM115
        except OSError as e:
            raise JobError(f"{self.path} cannot be written ({e.strerror})") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise JobError(f"{self.path} is being written by another job; wait, or name another output") from None
        except OSError:
            pass  # a file system without locks
        self._finished.unlink(missing_ok=True)
        self._file.seek(0)
        whole = self._file.read().rpartition(b"\n")
        self._file.truncate(len(whole[0]) + len(whole[1]))

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends a record; what is written survives the process."""
        self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self._file.flush()

    def finish(self) -> None:
        """Says to the other processes that this one has no more to write."""
        os.fsync(self._file.fileno())
        self._finished.touch()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def give_up(self) -> None:
        """Closes the file, and takes it away where it holds nothing."""
        self._file.seek(0, os.SEEK_END)
        if not self._file.tell():
            self.path.unlink(missing_ok=True)
        self._file.close()

    @property
    def is_merged(self) -> bool:
        """Whether the output is there, which takes the marks away."""
        return not self._finished.exists()


def all_finished(out: pathlib.Path, processes: int) -> bool:
    """Whether every process of the job has finished its part."""
    return all(out.with_name(f"{out.name}.part-{i:05d}.finished").exists() for i in range(processes))


def merge(out: pathlib.Path, lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Writes the output, in the order of the input, and removes the parts. Returns the records."""
    found = answered(out, lines)
    absent = [line.number for line in lines if line.number not in found]
    if absent:
        raise JobError(f"{len(absent)} lines have no answer, the first is line {absent[0]}; start the job again")
    records = [found[line.number] for line in lines]

    def write(file: BinaryIO) -> None:
        file.writelines(json.dumps(r, ensure_ascii=False).encode() + b"\n" for r in records)

    write_atomically(out, write)
    _remove([*_parts(out), *(p.with_name(f"{p.name}.finished") for p in _parts(out))])
    return records


def _remove(paths: Iterable[pathlib.Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
