"""`omni-jax demo`."""

from __future__ import annotations

import json
import pathlib
import time
from typing import Any

from omni_jax.cli.flags import Flags
from omni_jax.cli.generate import load_model
from omni_jax.settings import GenerationSettings, ModelSettings, SpeechSettings

LONGEST = 40  # tokens of an answer


def demo(model: Flags[ModelSettings], *, out: pathlib.Path = pathlib.Path("omni-jax-demo")) -> None:
    """Show what the included model sees, hears, watches and says.

    It is asked about a digit, a drawing, a picture by voice, and a clip with its sound; and it reads a sentence out.

    The files that it is asked about were held out of its training. Any other model can be asked the same.

    Args:
      out: Folder for the spoken answers.
    """
    from rich.console import Console
    from rich.text import Text

    from omni_jax.checkpoint.sources import INCLUDED_FOLDER
    from omni_jax.model.token2wav import SAMPLE_RATE
    from omni_jax.processing.encode import write_audio

    media = INCLUDED_FOLDER / "demo"
    console, notes = Console(highlight=False), Console(stderr=True, highlight=False, markup=False)
    began = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    loaded = load_model(model, True, notes.is_terminal)
    notes.print(f"the files are in {media}", style="dim", soft_wrap=True)
    for number, asked in enumerate(json.loads((media / "demo.json").read_text("utf-8")), 1):
        messages = [{"role": "user", "content": [_placed(item, media) for item in asked["content"]]}]
        console.print(Text("you   ", "dim") + Text(_shown(asked["content"])))
        spoken = SpeechSettings(voice=asked["voice"], mode="exact") if "voice" in asked else None
        reply = loaded.generate(messages, GenerationSettings(max_new_tokens=LONGEST), speech=spoken)
        console.print(Text("model ", "dim") + Text(reply.text.strip(), "bold"))
        if reply.waveform is not None:
            file = out / f"{number}.wav"
            write_audio(file, reply.waveform, SAMPLE_RATE)
            notes.print(f"      spoken by {asked['voice']}, {reply.seconds:.1f} s: {file}", style="dim", soft_wrap=True)
    notes.print(f"{time.perf_counter() - began:.1f} s, loading and compiling included", style="dim")


def _placed(item: dict[str, Any], folder: pathlib.Path) -> dict[str, Any]:
    """An item of a message whose file has its whole path."""
    return item if item["type"] == "text" else item | {item["type"]: str(folder / item[item["type"]])}


def _shown(content: list[dict[str, Any]]) -> str:
    return "  ".join(i["text"] if i["type"] == "text" else f"[{i[i['type']]}]" for i in content)
