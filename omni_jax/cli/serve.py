"""`omni-jax serve`."""

from __future__ import annotations

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
    try:
        from omni_jax.infer.serve.loading import load_replica
        from omni_jax.infer.serve.server import serve as run
        from omni_jax.infer.serve.warmup import prepare
    except ModuleNotFoundError as e:
        raise InputError(f"the server needs {e.name}; install omni-jax[serve]") from None
    replica = load_replica(model, options, generation, media, speech, progress=True)
    run(replica, lambda: None if options.no_warmup else prepare(replica))
