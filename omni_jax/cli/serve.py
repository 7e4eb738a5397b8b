"""`omni-jax serve`."""

from __future__ import annotations

import math
import os
from typing import Any

from omni_jax.cli.flags import Flags
from omni_jax.errors import InputError
from omni_jax.infer.serve.options import ServeOptions
from omni_jax.settings import GenerationSettings, MediaSettings, ModelSettings, SpeechSettings

# What programs are compiled ahead for: tokens of a prompt that are new, seconds of audio, sides of pictures in pixels.
WARM_PROMPT, WARM_AUDIO, WARM_IMAGE = 1024, 30.0, 640


def serve(
    model: Flags[ModelSettings],
    options: Flags[ServeOptions],
    generation: Flags[GenerationSettings],
    media: Flags[MediaSettings],
    speech: Flags[SpeechSettings],
) -> None:
    """Serve a model over OpenAI's interfaces: chat completions and realtime sessions with speech, and a page to try it.

    The flags of generation, media and speech are what holds where a request says nothing else.
    """
    from omni_jax.cli.chat import load_speaking

    try:
        from omni_jax.infer.serve.replica import Replica
        from omni_jax.infer.serve.server import serve as run
    except ModuleNotFoundError as e:
        raise InputError(f"the server needs {e.name}; install omni-jax[serve]") from None
    if generation.logprobs is not None:
        raise InputError("--logprobs is what a request asks for; leave it out")
    loaded = load_speaking(model, "auto", True)
    if "talker" in loaded.params:
        loaded.check_speech([speech])
    driver = loaded.driver(options.max_sessions, capacity=options.context)
    name = os.path.basename(os.path.normpath(model.model))
    replica = Replica(loaded, driver, options, name, generation, speech, media)
    run(replica, lambda: None if options.no_warmup else _warm_up(loaded, driver, generation, speech))


def _warm_up(loaded: Any, driver: Any, generation: GenerationSettings, speech: SpeechSettings) -> None:
    """Compiles what requests of ordinary sizes meet."""
    from omni_jax.infer.serve.replica import LOG
    from omni_jax.model.token2wav import Flow
    from omni_jax.runtime.warmup import Workload, tower_shapes, warm_up

    cfg, mel, patch = loaded.config.thinker, loaded.processor.mel, loaded.config.thinker.vision.patch_size
    side = WARM_IMAGE // patch // 2 * 2
    frames, chunks = tower_shapes(cfg, [(1, side, side)], [round(WARM_AUDIO * mel.rate / mel.hop)])
    room = driver.engine.options.limit
    codes = min(speech.max_codes, math.ceil(20 * loaded.loaded.codes_per_second)) if "talker" in loaded.params else 0
    work = Workload(
        min(WARM_PROMPT, room // 2), min(WARM_PROMPT, room // 2), frames, chunks,
        min(generation.max_new_tokens, room // 2), codes, (Flow(speech.ode_steps, speech.ode_solver),),
    )  # fmt: skip
    report = warm_up(driver.engine, work)
    LOG.info("%d programs are ready after %.1f s", report.programs, report.seconds)
