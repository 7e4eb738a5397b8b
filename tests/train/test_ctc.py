"""What the towers learn without the decoder: loss and gradients beside the oracle's towers and torch's CTC."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from omni_jax.train import losses
from omni_jax.train.config import RunError
from omni_jax.train.data.jsonl import DataError
from omni_jax.train.nano.batches import ctc_room
from omni_jax.train.step import make_trainer
from tests import conversations, oracle, training

KINDS = ["audio", "image"]
ANSWER = "A cat."


def _vectors(thinker, kind, inputs):
    if kind == "audio":
        lengths = inputs["feature_attention_mask"].sum(-1)
        return thinker.get_audio_features(
            inputs["input_features"], feature_attention_mask=inputs["feature_attention_mask"],
            audio_feature_lengths=lengths,
        )  # fmt: skip
    return thinker.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])


def _oracle_loss(thinker, kind, prompt, sample, blank):
    vectors = _vectors(thinker, kind, conversations.oracle_inputs([prompt]))
    table = thinker.model.embed_tokens.weight
    scores = (vectors @ table.T / table.shape[1] ** 0.5).log_softmax(-1)
    asked = sample.labels[sample.labels >= 0]
    target = torch.tensor(asked[:-1].copy()).long()  # without the ending mark
    lengths = (torch.tensor([len(scores)]), torch.tensor([len(target)]))
    return torch.nn.functional.ctc_loss(scores[:, None], target[None], *lengths, blank=blank, reduction="sum")


@pytest.mark.parametrize("room", [None, "measured"])
def test_loss_and_gradients(model, checkpoint, oracle_thinker, room):
    read = training.reader(model, checkpoint)
    answered = {kind: training.answered(kind, ANSWER) for kind in KINDS}
    samples = [s for kind in KINDS for s in read.samples({"messages": answered[kind], "name": kind})]
    batch = training.batch(model, [[s] for s in samples])

    how = training.FLOAT32
    if room == "measured":
        how = dataclasses.replace(how, ctc_room=ctc_room(model.config.thinker, samples))
        assert max(how.ctc_room) < batch.tokens.ids.shape[1]

    def loss(tree):
        return losses.ctc_loss(model.config, {"thinker": tree}, batch, losses.counts(batch), how)

    (ours, _), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(training.stacked(checkpoint, model)["thinker"])
    total, want = sum(int((s.labels >= 0).sum()) for s in samples), 0.0
    oracle_thinker.zero_grad()
    try:
        for kind, sample in zip(KINDS, samples):
            prompt = model.processor(answered[kind], add_generation_prompt=False)
            part = _oracle_loss(oracle_thinker, kind, prompt, sample, model.config.thinker.pad_token_id) / total
            part.backward()
            want += part.item()
        theirs = training.oracle_gradients(oracle_thinker, oracle.STACKS)
    finally:
        oracle_thinker.zero_grad(set_to_none=True)
    assert abs(float(ours) - want) < 1e-5 * want
    print("largest gradient error", training.compare(grads, theirs, 2e-4))


def test_logprob_of_labels_beside_torch():
    """Rows of several lengths, equal neighbours among the labels, one with no frame to spare, an empty text."""
    rng = np.random.default_rng(5)
    frames, count, classes = np.array([12, 9, 5, 4]), np.array([5, 1, 3, 0]), 7
    labels = np.array([[3, 3, 1, 1, 3], [6, 0, 0, 0, 0], [2, 2, 4, 0, 0], [0] * 5], np.int32)
    logits = torch.tensor(rng.normal(0, 2, (4, 12, classes)).astype(np.float32), requires_grad=True)
    lengths = torch.tensor(frames), torch.tensor(count)
    want = torch.nn.functional.ctc_loss(
        logits.log_softmax(-1).transpose(0, 1), torch.tensor(labels), *lengths, reduction="none"
    )
    want.sum().backward()

    def loss(logits):
        ids = np.concatenate([np.zeros((4, 1), np.int32), labels], 1)
        scores = jnp.take_along_axis(jax.nn.log_softmax(logits), ids[:, None], axis=2)
        return -losses.ctc_logprob(scores, frames, labels, count)

    values = logits.detach().numpy()
    np.testing.assert_allclose(loss(values), want.detach().numpy(), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda x: loss(x).sum())(values), logits.grad.numpy(), atol=2e-6)


def test_spelled_answers(model, checkpoint):
    """The characters stand behind the conversation, whose own places ask for nothing; the mark at the end stays."""
    record = {"messages": training.answered("audio", "A cat, twice."), "name": "x"}
    (whole,), (spelled,) = (training.reader(model, checkpoint, "ctc", spell=s).samples(record) for s in (False, True))
    tokenizer, end = model.processor.tokenizer, whole.labels[whole.labels >= 0][-1]
    letters = [i for c in "A cat, twice." for i in tokenizer.encode(c)]
    assert len(letters) > (whole.labels >= 0).sum()
    assert spelled.labels[spelled.labels >= 0].tolist() == [*letters, end]
    assert spelled.ids.tolist() == [*whole.ids, *letters, end]
    assert spelled.labels[len(whole.ids) - 1 : -1].tolist() == spelled.ids[len(whole.ids) :].tolist()
    assert spelled.positions.shape == (3, len(spelled.ids))
    with pytest.raises(DataError, match="tokens and characters"):
        training.reader(model, checkpoint, "ctc", spell=True, sequence=len(whole.ids) + 3).samples(record)


def test_texts_longer_than_the_sound_and_rows_without_media_count_nothing(model, checkpoint):
    """A picture has few vectors; a text of more tokens cannot be aligned with them, and its loss would be infinite."""
    read = training.reader(model, checkpoint)
    longer = [*training.answered("image", "never " * 400)]
    rows = [[s] for m in (longer, training.answered("text")) for s in read.samples({"messages": m, "name": "x"})]
    batch, params = training.batch(model, rows), training.stacked(checkpoint, model)
    loss, _ = losses.ctc_loss(model.config, params, batch, losses.counts(batch), training.FLOAT32)
    assert float(loss) == 0.0
    text = training.batch(model, rows[1:])
    assert float(losses.ctc_loss(model.config, params, text, losses.counts(text), training.FLOAT32)[0]) == 0.0


def test_a_model_without_a_padding_token_says_so(model, checkpoint, tmp_path):
    cfg = dataclasses.replace(model.config, thinker=dataclasses.replace(model.config.thinker, pad_token_id=None))
    run = training.run(checkpoint, tmp_path, "x", task="ctc", rates={"thinker.audio_tower": 1e-3})
    trainer = make_trainer(run, cfg)
    with pytest.raises(RunError, match="pad_token_id"):
        trainer.loss({}, None, None, {}, jax.random.key(0))


def test_corrupted_codes():
    """A share of the codes is exchanged for others of the table; marks and absent codes stay."""
    codec = np.where(np.arange(4000) % 4 == 0, -1, np.arange(4000) % 300).astype(np.int32)[None]
    none = np.zeros_like(codec)
    speech = losses.Speech(none, none, codec, none, none[:, None], none)
    out = np.asarray(losses.corrupted(speech, 0.25, 256, jax.random.key(3)).codec)
    fixed = (codec < 0) | (codec >= 256)
    assert (out[fixed] == codec[fixed]).all()
    assert ((out[~fixed] >= 0) & (out[~fixed] < 256)).all()
    assert 0.2 < (out != codec)[~fixed].mean() < 0.3
    assert (np.asarray(losses.corrupted(speech, 0.0, 256, jax.random.key(3)).codec) == codec).all()
