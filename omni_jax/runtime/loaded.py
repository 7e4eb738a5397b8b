"""A loaded model, as the engine takes it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omni_jax import buckets
from omni_jax.config import OmniConfig
from omni_jax.model import token2wav
from omni_jax.model.voice import Voice
from omni_jax.parallel.meshes import LayoutFn, Placement, layout_fn
from omni_jax.processing.processor import Prompt, PromptError, check_context
from omni_jax.processing.tokenizer import Tokenizer
from omni_jax.runtime.admission import AdmissionControl


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """Configuration, weights and tokenizer of a checkpoint, and where they lie.

    Attributes:
      config: the configuration.
      params: `{"thinker": …}`, with "talker" and "token2wav" where it speaks.
      tokenizer: ids to text.
      eos: ids that end a reply.
      voices: by name; empty where the model was loaded for text only.
      placement: the meshes of the stages; None for one device.
      dtype: of the computation.
      cache_dtype: of keys and values.
      admission: refuses what the devices' memory cannot hold.
    """

    config: OmniConfig
    params: Any
    tokenizer: Tokenizer
    eos: tuple[int, ...]
    voices: Mapping[str, Voice]
    placement: Placement | None
    dtype: Any
    cache_dtype: Any
    admission: AdmissionControl

    @functools.cached_property
    def layout_for(self) -> LayoutFn:
        """The context that a call of a part runs in."""
        return layout_fn(self.placement)

    @property
    def has_speech_mesh(self) -> bool:
        """Whether speech has chips of its own."""
        return self.placement is not None and self.placement.has_speech_mesh

    @property
    def context(self) -> int:
        """Most tokens of prompt and reply together: the config's, as far as the buckets reach."""
        return min(self.config.thinker.text.max_position_embeddings, buckets.PROMPT[-1])

    @property
    def codes_per_second(self) -> float:
        """Codec ids of a second of speech."""
        assert self.config.token2wav is not None
        return token2wav.SAMPLE_RATE / token2wav.samples_per_code(self.config.token2wav)

    def check_prompt(self, prompt: Prompt, capacity: int | None = None) -> None:
        """Refuses what the model cannot read.

        Args:
          prompt: of `Processor`.
          capacity: tokens that a row has room for, reply included.
        Raises:
          PromptError: a prompt that leaves no room for a reply, or ids outside the vocabulary.
        """
        size, vocab = len(prompt.ids), self.config.thinker.text.vocab_size
        room = self.context if capacity is None else min(capacity, self.context)
        check_context(prompt, room)
        # JAX gathers clamp: an id beyond the table would silently read its last row.
        if size == 0 or prompt.ids.min() < 0 or prompt.ids.max() >= vocab:
            raise PromptError(
                f"the prompt holds ids outside the model's vocabulary of {vocab}; "
                "the tokenizer belongs to another checkpoint"
            )
