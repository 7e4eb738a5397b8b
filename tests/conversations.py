"""Conversations of every kind, with media made on the spot, and their prompts in the reference's form."""

from __future__ import annotations

import contextlib
import functools
import io
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image

from omni_jax import buckets
from omni_jax.processing import positions as P
from omni_jax.processing.processor import Prompt
from tests import media


def _image(height: int, width: int, seed: int = 0) -> dict[str, Any]:
    file = io.BytesIO()
    Image.fromarray(media.picture(height, width, seed)).save(file, "PNG")
    return {"type": "image", "image": file.getvalue()}


def _audio(seconds: float, seed: int = 0) -> dict[str, Any]:
    return {"type": "audio", "audio": media.encode_sound(media.tone(seconds, seed=seed), 16000, "WAV")}


def _video(seconds: float, sound: float | None = None, seed: int = 0, **options: Any) -> dict[str, Any]:
    frames = [media.picture(56, 84, seed + i) for i in range(round(seconds * 10))]
    track = None if sound is None else media.tone(sound)
    return {"type": "video", "video": media.encode_video(frames, 10, sound=track), "max_pixels": 56 * 84} | options


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _user(*content: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


@functools.cache
def all_kinds() -> dict[str, list[dict[str, Any]]]:
    """Name → messages, not to be changed. Clips have their sound on or off for a whole conversation, as the reference
    wants it."""
    system = {"role": "system", "content": "You are a helpful assistant."}
    listen = {"use_audio_in_video": True}
    return {
        "text": [system, _user(_text("What is a cat?"))],
        "image": [system, _user(_image(60, 90), _text("What is this?"))],
        "audio": [system, _user(_audio(2.33), _text("What do you hear?"))],
        "video": [system, _user(_video(2.4), _text("What happens?"))],
        "short sound in video": [system, _user(_video(5.0, 2.5, **listen), _text("What happens?"))],
        "long sound in video": [system, _user(_video(2.0, 4.4, **listen), _text("What happens?"))],
        "mixed": [
            system,
            _user(
                _image(30, 200), _audio(0.5), _video(1.2), _text("Compare"), _image(84, 56, 3), _audio(3.1, 2),
                _video(2.2, fps=4), _text("all of these."),
            ),
        ],
        "turns": [
            system,
            _user(_image(56, 56), _text("One?")),
            {"role": "assistant", "content": "A picture."},
            _user(_audio(1.0), _text("Two?")),
            {"role": "assistant", "content": [_text("A tone.")]},
            _user(_image(56, 112, 5), _text("Three?")),
        ],
        "sound in two videos": [
            system, _user(_video(1.4, 2.1, **listen), _video(2.6, 2.5, 7, **listen), _audio(1.1), _text("Which?")),
        ],
    }  # fmt: skip


def oracle_inputs(prompts: list[Prompt], pad: int = 0) -> dict[str, Any]:
    """Keyword arguments of the reference's Thinker for a left-padded batch of our prompts."""
    import torch  # not at the top: processes without the reference make conversations too

    width = max(len(p.ids) for p in prompts)
    ids = np.full((len(prompts), width), pad, np.int64)
    mask = np.zeros((len(prompts), width), np.int64)
    for row, p in enumerate(prompts):
        ids[row, width - len(p.ids) :], mask[row, width - len(p.ids) :] = p.ids, 1
    out: dict[str, Any] = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    images = [i for p in prompts for i in p.images]
    videos = [v for p in prompts for v in p.videos]
    audios = [a for p in prompts for a in p.audios]
    if images:
        out["pixel_values"] = torch.tensor(np.concatenate([i.pixels for i in images]))
        out["image_grid_thw"] = torch.tensor([i.grid for i in images])
    if videos:
        out["pixel_values_videos"] = torch.tensor(np.concatenate([v.pixels for v in videos]))
        out["video_grid_thw"] = torch.tensor([v.grid for v in videos])
        out["video_second_per_grid"] = torch.tensor([v.seconds_per_grid for v in videos])
    if audios:
        frames = max(len(a) for a in audios)
        features = np.zeros((len(audios), audios[0].shape[1], frames), np.float32)
        live = np.zeros((len(audios), frames), np.int64)
        for i, a in enumerate(audios):
            features[i, :, : len(a)], live[i, : len(a)] = a.T, 1
        out["input_features"], out["feature_attention_mask"] = torch.tensor(features), torch.tensor(live)
    out["use_audio_in_video"] = any(isinstance(s, P.AudioVideo) for p in prompts for s in p.segments)
    return out


def in_slots_of_generate() -> contextlib.AbstractContextManager[Any]:
    """In it a batch job of short prompts makes slots of the capacity that `generate` does, which leaves room for a
    longer reply: the job then runs the programs of a call of `generate` before it, if its `batch_size` is also that
    call's."""
    return mock.patch.object(buckets, "CACHE", tuple(slots for slots in buckets.CACHE if slots >= 1536))
