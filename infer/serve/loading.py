"""A replica from settings: the model is loaded, and its engine made, with nothing compiled yet."""

from __future__ import annotations

import os
from collections.abc import Sequence

from omni_jax import api, buckets
from omni_jax.errors import InputError
from omni_jax.infer.serve.options import ServeOptions
from omni_jax.infer.serve.pixels import MAX_PIXELS
from omni_jax.infer.serve.replica import Replica
from omni_jax.runtime.compilation import use_compilation_cache
from omni_jax.runtime.speech import SpeechError
from omni_jax.settings import GenerationSettings, MediaSettings, ModelSettings, SpeechSettings, change


def load_replica(
    model: ModelSettings, options: ServeOptions, generation: GenerationSettings, media: MediaSettings,
    speech: SpeechSettings, progress: bool = False,
) -> Replica:  # fmt: skip
    """A replica, to be warmed up and started.

    Args:
      generation, media, speech: what holds where a request says nothing else.
      progress: of loading, on standard error.
    Raises:
      InputError, and what `api.load` raises.
    """
    if generation.logprobs is not None:
        raise InputError("--logprobs is what a request asks for; leave it out")
    use_compilation_cache(options.compilation_cache, traces=True)
    loaded = _load(model, progress)
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
    return Replica(loaded, driver, options, name, generation, speech, media)


def _load(model: ModelSettings, progress: bool) -> api.Omni:
    """With all its parts, where it can speak."""

    def load(parts: Sequence[str]) -> api.Omni:
        return api.load(
            model.model, parts=parts, dtype=model.dtype, mesh=model.mesh, speech_mesh=model.speech_mesh,
            adapter=model.adapter, quantize=model.quantize, kv_cache=model.kv_cache, speech_dtype=model.speech_dtype,
            activations=model.activations,
            progress=progress,
        )  # fmt: skip

    try:
        return load(api.PARTS)
    except SpeechError:
        return load(("thinker",))
