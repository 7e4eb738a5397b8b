"""`omni-jax serve`."""

from __future__ import annotations

import os

from omni_jax.cli.flags import Flags
from omni_jax.errors import InputError
from omni_jax.infer.serve.options import ServeOptions
from omni_jax.settings import GenerationSettings, MediaSettings, ModelSettings, SpeechSettings


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
    from omni_jax import buckets
    from omni_jax.cli.chat import load_speaking
    from omni_jax.settings import change

    try:
        from omni_jax.infer.serve.pixels import MAX_PIXELS
        from omni_jax.infer.serve.replica import Replica
        from omni_jax.infer.serve.server import serve as run
        from omni_jax.infer.serve.warmup import prepare
    except ModuleNotFoundError as e:
        raise InputError(f"the server needs {e.name}; install omni-jax[serve]") from None
    if generation.logprobs is not None:
        raise InputError("--logprobs is what a request asks for; leave it out")
    loaded = load_speaking(model, "auto", True, options.compilation_cache)
    if "talker" in loaded.params:
        loaded.check_speech([speech])
    driver = loaded.driver(
        options.max_sessions, capacity=options.context, sizes=buckets.COARSE, max_codes=speech.max_codes
    )
    name = os.path.basename(os.path.normpath(model.model))
    # Of whole utterances a program for each length is needed, of blocks one: so all speech is made block by block.
    speech = change(speech, {"mode": "windowed"})
    if media.max_pixels is None:
        media = change(media, {"max_pixels": MAX_PIXELS})
    replica = Replica(loaded, driver, options, name, generation, speech, media)
    run(replica, lambda: None if options.no_warmup else prepare(replica))
