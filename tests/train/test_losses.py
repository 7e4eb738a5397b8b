"""Loss and every gradient against torch autograd on the oracle, small and in float32."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch

from omni_jax.config import OmniConfig
from omni_jax.train import losses
from tests import conversations, oracle, training

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
    rows, _ = packed
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


CODES = [5, 250, 17, 17, 99, 0, 256, 31, 4, 77, 120, 8]


def _oracle_code_states(omni, prompt, sample, voice, said):
    """The oracle's Talker, teacher-forced with its own modules: sums of vectors, projection, decoder; its hidden
    states at the places that are asked for a code."""
    begin = int(np.flatnonzero(sample.labels >= 0)[0]) + 1
    talker, out = omni.talker, omni.thinker(**conversations.oracle_inputs([prompt]), output_hidden_states=True)
    ids = torch.tensor(prompt.ids).long()[None]
    embeddings = out.hidden_states[0].clone()
    cfg = omni.config.thinker_config
    media = torch.isin(ids, torch.tensor([cfg.image_token_index, cfg.audio_token_index, cfg.video_token_index]))
    embeddings[media] = 0
    vectors = embeddings + out.hidden_states[-1]
    table, codes = omni.thinker.get_input_embeddings(), talker.get_input_embeddings()
    token = lambda i: torch.tensor([[i]])  # noqa: E731
    end = begin + int((sample.labels[begin:] >= 0).sum()) - 1
    reply = [*vectors[0, begin : end + 1], table(token(talker.text_eos_token))[0, 0]]
    reply += [table(token(talker.text_pad_token))[0, 0]] * len(said)
    places = [*vectors[0, :begin]]
    places += [table(token(voice))[0, 0] + codes(token(talker.codec_pad_token))[0, 0]]
    places += [reply[0] + codes(token(talker.codec_bos_token))[0, 0]]
    places += [codes(token(c))[0, 0] + reply[i + 1] for i, c in enumerate(said)]
    x = talker.thinker_to_talker_proj(torch.stack(places)[None])
    hidden = talker.model(inputs_embeds=x, position_ids=torch.tensor(sample.codes.positions).long()[:, None])[0]
    return hidden[0, begin + 1 :]


def test_talker_loss_and_gradients(speaker, checkpoint, oracle_omni):
    """Codes on a training Thinker, text loss included, of a picture's and a sound's conversation in one row."""
    read = training.reader(speaker, checkpoint, "talker")
    rows = [training.samples(read, ["image", "audio"], codes=CODES, voice="Ethan")]
    batch = training.batch(speaker, rows)
    params = training.stacked(checkpoint, speaker, ("thinker", "talker"))

    def loss(tree):
        return losses.speech_loss(speaker.config, tree, batch, losses.counts(batch), training.FLOAT32, text_weight=0.3)

    (got, metrics), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    oracle_omni.zero_grad()
    want, count = 0.0, 2 * (len(CODES) + 1)
    text_count = sum(int((s.labels >= 0).sum()) for s in rows[0])
    voice = read.voices["Ethan"].bos_token
    labels = torch.tensor([*CODES, oracle_omni.talker.codec_eos_token])
    try:
        for kind, sample in zip(("image", "audio"), rows[0]):
            prompt = speaker.processor(training.answered(kind), add_generation_prompt=False, speech=True)
            logits = oracle_omni.talker.codec_head(_oracle_code_states(oracle_omni, prompt, sample, voice, CODES))
            part = torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / count
            part = part + 0.3 * _oracle_loss(oracle_omni.thinker, sample, prompt, text_count)
            part.backward()
            want += part.item()
        for part, stacks in (("thinker", oracle.STACKS), ("talker", ("model.layers",))):
            theirs = training.oracle_gradients(getattr(oracle_omni, part), stacks)
            print(part, "largest gradient error", training.compare(grads[part], theirs, 2e-4))
    finally:
        oracle_omni.zero_grad(set_to_none=True)
    assert abs(float(got) - want) < 1e-5 * want
    assert metrics["code_loss"] < got


def test_packed_equals_unpacked(model, checkpoint, packed, thinker_gradients):
    """One sample a row gives the loss and the gradients that packed rows give."""
    rows = [[s] for row in packed[0] for s in row]
    (loss, _), grads = _value_and_grad(model.config, training.stacked(checkpoint, model), training.batch(model, rows))
    (want, _), theirs = thinker_gradients
    assert abs(float(loss) - float(want)) < 1e-6 * float(want)
    training.compare(grads, training.flat(theirs), 2e-5)


def test_remat_changes_no_gradient(model, checkpoint):
    batch = training.batch(model, [training.samples(training.reader(model, checkpoint), ["text", "image"])])
    params = training.stacked(checkpoint, model)
    loss, grads = {}, {}
    for remat in ("none", "dots", "full"):
        how = losses.ForwardOptions(training.FLOAT32.dtype, remat)
        (loss[remat], _), grads[remat] = _value_and_grad(model.config, params, batch, how)
    for remat in ("dots", "full"):
        assert abs(float(loss[remat]) - float(loss["none"])) < 1e-6
        training.compare(grads[remat], training.flat(grads["none"]), 1e-5)


def test_blocks_of_logits_equal_whole_ones():
    rng = np.random.default_rng(0)
    head = {"weight": rng.normal(size=(50, 8)).astype(np.float32)}
    hidden = rng.normal(size=(2, 16, 8)).astype(np.float32)
    labels = rng.integers(-1, 50, (2, 16))

    def total(hidden, size):
        return losses.token_logprobs(head, hidden, labels, size)[0].sum()

    whole, parts = (jax.value_and_grad(total)(hidden, size) for size in (1 << 30, 4 * 2 * 50 * 4))
    np.testing.assert_allclose(parts[0], whole[0], rtol=1e-6)
    np.testing.assert_allclose(parts[1], whole[1], atol=1e-5)
    hits = losses.token_logprobs(head, hidden, labels, 4 * 2 * 50 * 4)[1]
    best = (hidden @ head["weight"].T).argmax(-1)
    np.testing.assert_array_equal(hits, (best == labels) & (labels >= 0))


def test_preference_loss_is_the_papers():
    """Equation 7 of arXiv:2305.18290, by torch, with its gradient."""
    rng = np.random.default_rng(0)
    given = [rng.normal(size=6).astype(np.float32) * 5 for _ in range(4)]
    loss, margin = losses.preference_loss(*given, 0.3)
    grad = jax.grad(lambda c: losses.preference_loss(c, *given[1:], 0.3)[0].sum())(given[0])
    c, r, bc, br = (torch.tensor(g, requires_grad=True) for g in given)
    want = -torch.nn.functional.logsigmoid(0.3 * ((c - bc) - (r - br)))
    want.sum().backward()
    np.testing.assert_allclose(loss, want.detach().numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(grad, c.grad.numpy(), rtol=1e-5, atol=1e-6)
    assert (np.asarray(margin) > 0).tolist() == (want.detach().numpy() < np.log(2)).tolist()


@pytest.mark.parametrize("codes", [False, True], ids=["text", "codes"])
def test_dpo_loss_and_gradients(codes, speaker, checkpoint, oracle_omni):
    """Replies under the trained weights and under a base with another head, against the oracle's log-probabilities."""
    task, part, head = ("talker_dpo", "talker", "codec_head") if codes else ("dpo", "thinker", "lm_head")
    read = training.reader(speaker, checkpoint, task)
    record = {
        "messages": [{"role": "user", "content": "Is it true?"}, {"role": "assistant", "content": "Perhaps."},
                     {"role": "user", "content": "Sure?"}],
        "chosen": "Yes.", "rejected": "No, never.", "chosen_codes": [1, 2, 3, 4], "rejected_codes": [9, 8, 7],
        "voice": "Ethan", "name": "x line 1",
    }  # fmt: skip
    samples, said = read.samples(record), [record["chosen_codes"], record["rejected_codes"]]
    batch = training.batch(speaker, [[s] for s in samples])
    params = training.stacked(checkpoint, speaker, ("thinker", "talker"))
    other = np.asarray(params[part][head]["weight"])
    other = other + np.random.default_rng(0).normal(size=other.shape).astype(np.float32) * 0.3 * other.std()
    base = params | {part: params[part] | {head: {"weight": other}}}

    def loss(tree):
        return losses.dpo_loss(speaker.config, tree, base, batch, 1.0, training.FLOAT32, beta=0.3, codes=codes)

    (got, metrics), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    oracle_omni.zero_grad()
    voice, sums = read.voices["Ethan"].bos_token, []
    try:
        for sample, conversation, spoken in zip(samples, read.conversations(record), said):
            prompt = read.prompt(conversation)
            if codes:
                states = _oracle_code_states(oracle_omni, prompt, sample, voice, spoken)
                labels = torch.tensor([*spoken, oracle_omni.talker.codec_eos_token])
                weight = oracle_omni.talker.codec_head.weight
            else:
                out = oracle_omni.thinker(**conversations.oracle_inputs([prompt]), output_hidden_states=True)
                states, labels = out.hidden_states[-1][0], torch.tensor(sample.labels).long()
                weight = oracle_omni.thinker.lm_head.weight
            sums.append([
                -torch.nn.functional.cross_entropy(states @ w.T, labels, ignore_index=-1, reduction="sum")
                for w in (weight, torch.tensor(other))
            ])  # fmt: skip
        (chosen, base_chosen), (rejected, base_rejected) = sums
        margin = 0.3 * ((chosen - base_chosen.detach()) - (rejected - base_rejected.detach()))
        want = -torch.nn.functional.logsigmoid(margin)
        want.backward()
        for name, stacks in (("thinker", oracle.STACKS), ("talker", ("model.layers",)))[: 1 + codes]:
            theirs = training.oracle_gradients(getattr(oracle_omni, name), stacks)
            print(name, "largest gradient error", training.compare(grads[name], theirs, 5e-4))
    finally:
        oracle_omni.zero_grad(set_to_none=True)
    assert abs(margin.item()) > 0.01
    assert abs(float(metrics["margin"]) - margin.item()) < 1e-3 * abs(margin.item())
    assert abs(float(got) - want.item()) < 1e-5 * want.item()
