"""Loss and every gradient against torch autograd on the oracle, small and in float32."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch

from omni_jax.config import OmniConfig
from tests import conversations, oracle, training
from train import losses

KINDS = ["image", "audio", "video", "text"]
CLIPS = ["sound in two videos"]


def _oracle_loss(thinker, sample, prompt, total):
    """The oracle's summed cross-entropy of the assistant's tokens over the labels of all samples."""
    logits = thinker(**conversations.oracle_inputs([prompt])).logits[0]
    labels = torch.tensor(sample.labels).long()
    return torch.nn.functional.cross_entropy(logits, labels, ignore_index=-1, reduction="sum") / total


@pytest.fixture(scope="module")
def packed(model, checkpoint):
    """Five samples in two rows: every modality, several samples a row."""
    read = training.reader(model, checkpoint)
    first, second = training.samples(read, KINDS), training.samples(read, CLIPS)
    return [first, second], training.batch(model, [first, second])


def _value_and_grad(cfg: OmniConfig, params, batch, how=training.FLOAT32):
    def loss(tree):
        return losses.text_loss(cfg, {"thinker": tree}, batch, losses.counts(batch), how)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params["thinker"])


@pytest.fixture(scope="module")
def thinker_gradients(model, checkpoint, packed):
    return _value_and_grad(model.config, training.stacked(checkpoint, model), packed[1])


def test_thinker_loss_and_gradients_of_every_modality(model, oracle_thinker, packed, thinker_gradients):
    """Packed rows against the oracle's samples one by one: segments, media places, towers, decoder and head."""
    rows, batch = packed
    (loss, metrics), grads = thinker_gradients
    samples = [s for row in rows for s in row]
    total = sum(int((s.labels >= 0).sum()) for s in samples)
    want = 0.0
    oracle_thinker.zero_grad()
    try:
        for kind, sample in zip([*KINDS, *CLIPS], samples):
            prompt = model.processor(training.answered(kind), add_generation_prompt=False)
            part = _oracle_loss(oracle_thinker, sample, prompt, total)
            part.backward()
            want += part.item()
        theirs = training.oracle_gradients(oracle_thinker, oracle.STACKS)
    finally:
        oracle_thinker.zero_grad(set_to_none=True)
    assert abs(float(loss) - want) < 1e-5 * want
    assert metrics["text_loss"] == loss
    print("largest gradient error", training.compare(grads, theirs, 2e-4))
