"""Where the speech of a conversation goes, and where spoken turns come from: loudspeaker and microphone, or files."""

from __future__ import annotations

import math
import pathlib
import queue
import threading
from typing import TYPE_CHECKING, Any, Protocol

from omni_jax.errors import InputError

if TYPE_CHECKING:
    import numpy as np

# Samples a second of the microphone, and of a block of it: 32 ms, what voice activity is decided on.
MICROPHONE_RATE, MICROPHONE_BLOCK = 16000, 512


class Player(Protocol):
    """Plays the speech of one reply after another."""

    @property
    def is_playing(self) -> bool:
        """Whether something of the reply is still to be heard."""
        ...

    @property
    def played_seconds(self) -> float | None:
        """Seconds of the reply that were heard; None where it is not known, or nothing is playing."""
        ...

    def play(self, samples: np.ndarray, wait: float | None = 0.0) -> None:
        """Takes the next float32 samples of the reply, at 24 kHz. `wait`: see `AudioEvent.head_start`."""
        ...

    def finish(self) -> None:
        """No more samples of this reply come."""
        ...

    def stop(self) -> float | None:
        """Falls silent at once; returns what `played_seconds` was."""
        ...

    def close(self) -> None:
        """Gives the device back."""
        ...


class WavFolder:
    """Writes each reply into a file of its own: reply-001.wav, reply-002.wav, … after those that are there."""

    def __init__(self, folder: pathlib.Path, notes: Any):
        """`notes`: a rich console that says which file was written."""
        self.folder, self._notes = folder, notes
        self._pieces: list[np.ndarray] = []

    is_playing = False
    played_seconds = None

    def play(self, samples: np.ndarray, wait: float | None = 0.0) -> None:
        """Keeps them until the reply is whole."""
        del wait
        self._pieces.append(samples)

    def finish(self) -> None:
        """Writes the file. Raises OutputError where that is not possible."""
        import numpy as np

        from omni_jax.model.token2wav import SAMPLE_RATE
        from omni_jax.processing.encode import OutputError, write_audio

        pieces, self._pieces = self._pieces, []
        if not pieces:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise OutputError(f"the folder {self.folder} cannot be made ({e}); give another --speech-dir") from None
        number = 1
        while (path := self.folder / f"reply-{number:03}.wav").exists():
            number += 1
        samples = np.concatenate(pieces)
        write_audio(path, samples, SAMPLE_RATE)
        self._notes.print(f"{len(samples) / SAMPLE_RATE:.2f} s of speech in {path}", style="dim", soft_wrap=True)

    def stop(self) -> None:
        """Writes what there is of the reply: nobody knows what of it will be heard."""
        self.finish()

    def close(self) -> None:
        """Nothing is held."""


class Loudspeaker:
    """Plays through a device, block by block as its driver asks for them."""

    def __init__(self, devices: Any):
        """`devices`: the module sounddevice, or what does the same."""
        import numpy as np

        from omni_jax.model.token2wav import SAMPLE_RATE

        self._lock, self._rate = threading.Lock(), SAMPLE_RATE
        self._left, self._played = np.zeros(0, np.float32), 0
        self._silent = 0.0  # samples to wait before those that are left
        self._stream = devices.OutputStream(
            samplerate=SAMPLE_RATE, channels=1, dtype="float32", callback=self._fill
        )  # fmt: skip
        self._stream.start()

    def _fill(self, out: np.ndarray, frames: int, _time: Any, _status: Any) -> None:
        """Called by the device's thread, with out [frames, 1] to be filled."""
        with self._lock:
            quiet = int(min(frames, self._silent))
            self._silent -= quiet
            block, self._left = self._left[: frames - quiet], self._left[frames - quiet :]
            self._played += len(block)
        out[:] = 0
        out[quiet : quiet + len(block), 0] = block

    @property
    def is_playing(self) -> bool:
        """Whether samples are left."""
        with self._lock:
            return len(self._left) > 0

    @property
    def played_seconds(self) -> float | None:
        """What has left the device, by its own account of its delay."""
        with self._lock:
            return max(0.0, self._played / self._rate - self._stream.latency) if len(self._left) else None

    def play(self, samples: np.ndarray, wait: float | None = 0.0) -> None:
        """Queues them."""
        import numpy as np

        with self._lock:
            if wait is None:
                self._silent = math.inf
            elif wait or math.isinf(self._silent):
                self._silent = round(wait * self._rate)
            self._left = np.concatenate([self._left, samples])

    def finish(self) -> None:
        """The rest is played; the next reply counts anew once it is."""
        with self._lock:
            if math.isinf(self._silent):
                self._silent = 0
            if not len(self._left):
                self._played = 0

    def stop(self) -> float | None:
        """Drops what is left."""
        played = self.played_seconds
        with self._lock:
            self._left, self._played, self._silent = self._left[:0], 0, 0
        return played

    def close(self) -> None:
        """Closes the stream."""
        self._stream.close()


class Microphone:
    """Blocks of sound from a device, while it is open."""

    rate = MICROPHONE_RATE

    def __init__(self, devices: Any):
        """`devices`: the module sounddevice, or what does the same."""
        self._blocks: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()
        self._stream = devices.InputStream(
            samplerate=self.rate, channels=1, dtype="float32", blocksize=MICROPHONE_BLOCK,
            callback=lambda block, *_: self._blocks.put(block[:, 0].copy()),
        )  # fmt: skip

    def blocks(self) -> list[np.ndarray]:
        """What has come in since the last call."""
        found = []
        while not self._blocks.empty():
            found.append(self._blocks.get())
        return found

    def __enter__(self) -> Microphone:
        self._stream.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()


def sound_devices() -> Any:
    """The module sounddevice, of the extra `live`; None where it, or the library under it, is not installed."""
    try:
        import sounddevice
    except (ImportError, OSError):
        return None
    return sounddevice


def open_loudspeaker() -> Loudspeaker | None:
    """The loudspeaker; None where the machine has none that can be used."""
    devices = sound_devices()
    if devices is None:
        return None
    try:
        devices.query_devices(kind="output")
        return Loudspeaker(devices)
    except (ValueError, devices.PortAudioError):
        return None


def open_microphone() -> Microphone:
    """The microphone. Raises InputError where there is none that can be used."""
    devices = sound_devices()
    if devices is None:
        raise InputError("the microphone needs sounddevice and PortAudio; install omni-jax[live], or use /audio FILE")
    try:
        devices.query_devices(kind="input")
        return Microphone(devices)
    except (ValueError, devices.PortAudioError) as e:
        raise InputError(f"there is no microphone that can be used ({e}); use /audio FILE") from None
