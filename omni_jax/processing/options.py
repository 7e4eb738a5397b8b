"""The options of media items: one table of their names, types, ranges and meanings.

A conversation's items, the `media=` defaults of Python and training, and the documentation all follow it.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from omni_jax.errors import InputError

Kind = Literal["text", "image", "audio", "video"]
LARGEST = 1e12  # of any number: far beyond every medium, and float32 still holds it


@dataclass(frozen=True)
class MediaOption:
    """One option.

    Attributes:
      kinds: of the media that take it.
      help: what it does.
      type: of its value; a float may be given as a whole number.
      low, high: of its value.
      choices: its values, of a string.
    """

    kinds: tuple[Kind, ...]
    help: str
    type: type = float
    low: float = -LARGEST
    high: float = LARGEST
    choices: tuple[str, ...] = ()

    def complaint(self, value: Any) -> str | None:
        """What to give instead of a value that does not fit; None where it fits."""
        if self.type is bool:
            return None if isinstance(value, bool) else "give true or false"
        if self.type is str:
            fits = isinstance(value, str) and value in self.choices
            return None if fits else f"give one of {', '.join(self.choices)}"
        whole = self.type is int
        kind = "a whole number" if whole else "a number"
        # Compared, not converted: JSON may hold whole numbers that no float can.
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value or abs(value) == math.inf:
            return f"give {kind}"
        if whole and value != int(value):
            return "give a whole number"
        if value < self.low:
            return f"give {kind} of at least {self.low:g}" if self.low != MORE_THAN_0 else "give a positive number"
        return f"give {kind} of at most {self.high:g}" if value > self.high else None


MORE_THAN_0 = 5e-324
_PIXELS = (1, 1 << 26)  # an enlarged picture must not fill the memory
_BOTH: tuple[Kind, ...] = ("image", "video")
_ALL: tuple[Kind, ...] = ("image", "audio", "video")

OPTIONS: dict[str, MediaOption] = {
    "min_pixels": MediaOption(_BOTH, "fewest pixels of an image or frame, by enlarging it", int, *_PIXELS),
    "max_pixels": MediaOption(_BOTH, "most pixels of an image or frame, by shrinking it", int, 1),
    "resized_height": MediaOption(_BOTH, "height in pixels; with resized_width, in place of limits", int, 1, 1 << 16),
    "resized_width": MediaOption(_BOTH, "width in pixels; with resized_height, in place of limits", int, 1, 1 << 16),
    "total_pixels": MediaOption(("video",), "most pixels of all frames of a video, two frames counting once", int, 1),
    "fps": MediaOption(("video",), "frames taken a second; of a list of images, their own rate", float, MORE_THAN_0),
    "sample_fps": MediaOption(("video",), "another name of fps", float, MORE_THAN_0),
    "nframes": MediaOption(("video",), "frames taken, instead of fps; rounded to an even number", int, 1),
    "min_frames": MediaOption(("video",), "fewest frames taken", int, 1),
    "max_frames": MediaOption(("video",), "most frames taken", int, 2),
    "sample_by": MediaOption(
        ("video",), "take frames by their number or by their time; by default by time where the frame rate varies", str,
        choices=("frames", "time"),
    ),
    "video_start": MediaOption(("video",), "second from which the video is read"),
    "video_end": MediaOption(("video",), "second up to which the video is read"),
    "use_audio_in_video": MediaOption(("video",), "hear the audio track, too", bool),
    "fit": MediaOption((), "lower frames, then pixels, until the prompt fits; for all media together", bool),
    "private_urls": MediaOption((), "also fetch from private, local and reserved addresses; for all media", bool),
    "strict": MediaOption(("audio", "video"), "refuse files of which anything is missing or damaged", bool),
    "audio_start": MediaOption(("audio",), "second from which the audio is read"),
    "audio_end": MediaOption(("audio",), "second up to which the audio is read"),
}  # fmt: skip


def names(kind: Kind | None = None) -> tuple[str, ...]:
    """Options of one kind of media, or of all."""
    return tuple(name for name, option in OPTIONS.items() if kind is None or kind in option.kinds)


def check_option(name: str, value: Any, where: str, kind: Kind | None = None) -> None:
    """Raises InputError where an option is unknown to this kind of media (None: to all), or its value does not fit.

    Args:
      where: what to name in the message.
    """
    known = names(kind)
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        which = f"{kind} items do not know; " if kind else "is no media option; "
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(f"{where} has {name!r}, which {which}{hint}known are {', '.join(sorted(known)) or 'none'}")
    if complaint := OPTIONS[name].complaint(value):
        raise InputError(f"{where}: {name} is {value!r}; {complaint}")


# Alternatives: an item's own choice replaces a default of the other kind.
_ALTERNATIVES = (({"fps"}, {"nframes"}), ({"min_pixels", "max_pixels"}, {"resized_height", "resized_width"}))


def _one_name(options: Mapping[str, Any]) -> dict[str, Any]:
    """`sample_fps` as `fps`, which published code uses for lists of images."""
    out = {name: value for name, value in options.items() if value is not None}
    fps = out.pop("sample_fps", out.get("fps"))
    if out.setdefault("fps", fps) != fps:
        raise InputError(f"fps {out['fps']} and sample_fps {fps} differ; they are one option, give one of them")
    return {name: value for name, value in out.items() if value is not None}


def merge_options(defaults: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The options of one item: its own, and those defaults that its own leave open; None is no choice."""
    out, own = _one_name(defaults), _one_name(own)
    for one, other in [*_ALTERNATIVES, *[(b, a) for a, b in _ALTERNATIVES]]:
        if one & set(own):
            out = {name: value for name, value in out.items() if name not in other}
    return out | own
