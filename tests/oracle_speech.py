"""Whole answers of the oracle, text and speech, and what went through its Talker on the way."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch

from omni_jax.processing.processor import Prompt
from tests import conversations


@dataclasses.dataclass
class Spoken:
    """An answer of the oracle.

    Attributes:
      ids: the reply, the ending id included.
      codes: what its Talker said, without the last one, which 4.57.6 drops whatever it is.
      sums: [T + 2, E], the Talker's prompt before the projection.
      scores: [codes + 1, V], the logits that each code was drawn from.
      wave: samples, where Token2Wav ran.
    """

    ids: list[int]
    codes: list[int]
    sums: np.ndarray
    scores: np.ndarray
    wave: np.ndarray | None


@torch.no_grad()
def answer(
    omni: Any,
    prompt: Prompt,
    eos: Sequence[int],
    *,
    tokens: int,
    codes: int,
    speaker: str = "Chelsie",
    noise: np.ndarray | None = None,
    **talker: Any,
) -> Spoken:
    """The reference's `generate`: greedy text of `tokens` ids, greedy speech of at most `codes` codes.

    Args:
      noise: [frames, mel]: Token2Wav runs from it; without it, the vocoding is left out.
      **talker: its settings, such as `repetition_penalty=1.3`.
    """
    sums, scores = [], []

    def before(module: Any, args: Any, kwargs: Any) -> None:
        if kwargs.get("inputs_embeds") is not None:
            sums.append(kwargs["inputs_embeds"])  # the forward adds the codec embeddings in place

    hooks = [
        omni.talker.register_forward_pre_hook(before, with_kwargs=True),
        omni.talker.register_forward_hook(lambda module, args, out: scores.append(out.logits[0, -1].numpy())),
    ]
    made: list[torch.Tensor] = []

    def vocode(code: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        made.append(code)
        return torch.zeros(0) if noise is None else real(code, **kwargs)

    config = omni.config.talker_config
    ends = [config.tts_codec_pad_token_id, config.tts_codec_end_token_id]
    real = omni.token2wav.forward
    options = {"do_sample": False, "pad_token_id": 0} | talker
    start = None if noise is None else torch.tensor(noise)[None]
    vocoder = mock.patch.object(omni.token2wav, "forward", vocode)
    try:
        with vocoder, mock.patch.object(torch, "randn", return_value=start):
            ids, wave = omni.generate(
                **conversations.oracle_inputs([prompt]), return_audio=True, thinker_max_new_tokens=tokens,
                thinker_do_sample=False, thinker_eos_token_id=list(eos), thinker_pad_token_id=0,
                talker_max_new_tokens=codes + 1, talker_eos_token_id=ends, speaker=speaker,
                **{f"talker_{k}": v for k, v in options.items()},
            )  # fmt: skip
    finally:
        for hook in hooks:
            hook.remove()
    return Spoken(
        ids[0, len(prompt.ids) :].tolist(), made[0][0].tolist(), sums[0][0].numpy(), np.stack(scores),
        None if noise is None else wave.numpy(),
    )  # fmt: skip
