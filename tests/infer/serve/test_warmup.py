"""What a server compiles before it serves. That nothing is compiled afterwards is checked after each test here."""

from __future__ import annotations

import base64
import io

import pytest
from PIL import Image

from omni_jax import buckets
from omni_jax.infer.serve.options import ServeOptions
from omni_jax.infer.serve.pixels import MAX_PIXELS, most_windows, windows_of
from omni_jax.infer.serve.replica import Replica
from omni_jax.infer.serve.warmup import workload
from omni_jax.runtime.warmup import programs
from omni_jax.settings import GenerationSettings, MediaSettings, SpeechSettings
from tests.infer.serve.conftest import NAME


def picture(width: int, height: int) -> str:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (90, 20, 60)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def test_how_many_programs_there_are(speaker):
    """With the command's defaults: few, and not more of them for a longer context or more sessions but in steps."""
    counts = []
    for rows, context in ((4, 8192), (8, 16384)):
        driver = speaker.driver(rows, capacity=context, sizes=buckets.COARSE)
        spoken = SpeechSettings(mode="windowed")
        made = Replica(speaker, driver, ServeOptions(), NAME, GenerationSettings(), spoken, MediaSettings())
        counts.append(len(programs(driver.engine, workload(made))))
        made.stop()
    assert counts[0] < 100
    assert counts[1] < 120


def test_media_and_prompts_of_any_size(http, replica):
    """Sizes that nothing was told of: long prompts, many pictures, repetition penalties over a prompt known before."""
    for words in (1, 70, 300):
        body = {"messages": [{"role": "user", "content": "word " * words}], "max_tokens": 3,
                "repetition_penalty": 1.1}  # fmt: skip
        for _ in range(2):
            assert http.post("/v1/chat/completions", json=body).status_code == 200
    for count, size in ((1, (30, 40)), (7, (64, 60))):
        content = [{"type": "image_url", "image_url": {"url": picture(*size)}}] * count
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 2}
        assert http.post("/v1/chat/completions", json=body).status_code == 200


@pytest.mark.parametrize("where", ["part", "media"])
def test_a_picture_that_is_too_large(http, where):
    part = {"type": "image_url", "image_url": {"url": picture(400, 400)}}
    body = {"messages": [{"role": "user", "content": [part]}]}
    (part if where == "part" else body.setdefault("media", {}))["max_pixels"] = 400 * 400
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert "tiles" in answer.json()["error"]["message"]


def test_windows(model):
    cfg = model.config.thinker
    side = cfg.vision.window_patches
    assert windows_of(cfg, (1, 2 * side, 3 * side)) == 6
    assert windows_of(cfg, (1, 2 * side + 2, 3 * side)) == 9
    assert most_windows(cfg, MAX_PIXELS) == 128
    assert most_windows(cfg, 1) == 1
