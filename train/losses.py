"""Losses on text and on codes: cross-entropy and preferences. Pure functions over parameters and a `Batch`.

B rows, T tokens, P codes, D hidden, V vocabulary. Every sum runs in float32.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from omni_jax.config import DecoderConfig, OmniConfig, TalkerConfig, ThinkerConfig
from omni_jax.model import thinker
from omni_jax.model.audio import AudioTower
from omni_jax.model.decoder import Decoder
from omni_jax.model.layers import Params, dense
from omni_jax.model.vision import VisionTower
from omni_jax.parallel.meshes import LayoutFn, on_one_device
from omni_jax.parallel.on_mesh import ways
from omni_jax.parallel.sharding import constrain
from omni_jax.train.data.batch import Batch, Media, Speech, Tokens

# Logits that exist at one time on a device; beyond this they are taken a block of places at a time, and again in the
# backward pass.
LOGIT_BYTES = 512 * 2**20
IMPOSSIBLE = -1e9  # of log-probabilities
Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class ForwardOptions:
    """How the model is run.

    Attributes:
      dtype: of the computation.
      remat: what the backward pass computes again.
      layout_for: the layouts of a mesh (`meshes.layout_fn`).
      ctc_room: how many of the towers' outputs and how many labels a row holds at most; None: as many as tokens.
    """

    dtype: Any = jnp.bfloat16
    remat: str = "full"
    layout_for: LayoutFn = on_one_device
    ctc_room: tuple[int, int] | None = None


def token_logprobs(
    head: Params, hidden: jax.Array, labels: jax.Array, logit_bytes: int = LOGIT_BYTES
) -> tuple[jax.Array, jax.Array]:
    """The log-probability of each label, and whether it is the likeliest id.

    Args:
      head: the output projection's tree, `weight` [V, D].
      hidden: [B, T, D].
      labels: int32 [B, T], -1 where none is asked.
    Returns:
      float32 [B, T], 0 where none is asked, and bool [B, T].
    """

    def block(x: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        logits = constrain(dense(head, x[0], jnp.float32), "batch", None, "act_vocab")
        asked = x[1] >= 0
        own = jnp.take_along_axis(logits, jnp.maximum(x[1], 0)[..., None], axis=-1)[..., 0]
        logprob = own - jax.nn.logsumexp(logits, axis=-1)
        hit = asked & (own >= lax.stop_gradient(jnp.max(logits, axis=-1)))
        return jnp.where(asked, logprob, 0.0), hit

    batch, length, _ = hidden.shape
    # Gathered here, it is gathered once and not for every block.
    head = head | {"weight": constrain(head["weight"], "act_vocab", None)}
    size, row = length, 4 * batch * head["weight"].shape[0] // (ways("batch") * ways("act_vocab"))
    while size % 2 == 0 and size * row > logit_bytes:
        size //= 2
    if size == length:
        return block((hidden, labels))
    blocks = jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(batch, length // size, size, *x.shape[2:]), 1, 0), (hidden, labels)
    )
    out = lax.map(jax.checkpoint(block), blocks)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, length), out)


def decode(
    cfg: DecoderConfig, params: Params, x: jax.Array, positions: jax.Array, segments: jax.Array, how: ForwardOptions
) -> jax.Array:
    """Hidden states [B, T, D] of packed rows: x [B, T, D], positions [B, 3, T], segments [B, T]. Runs in a layout."""
    tree = {"layers": params["layers"], "norm": params["norm"]}
    rows = jnp.moveaxis(positions, 1, 0)
    hidden, _ = Decoder(cfg, how.remat).apply({"params": tree}, x, rows, segments=segments)
    return hidden


def ctc_loss(
    cfg: OmniConfig, params: Mapping[str, Params], batch: Batch, total: Metrics, how: ForwardOptions
) -> tuple[jax.Array, Metrics]:
    """This micro batch's part of the mean, by the token, of the connectionist temporal classification loss.

    It teaches the audio tower what the assistant writes: its outputs lie among the Thinker's embeddings, so their
    products with these are the scores, and no head is added. The padding token, which texts never hold, is the blank.
    One conversation a row. Rows without audio, or with more tokens than audio, count as 0.

    Source: Graves et al. 2006; `optax.ctc_loss` would hold the vocabulary's one-hot vector of every label of a row.
    """
    tree, tokens, blank = params["thinker"], batch.tokens, cfg.thinker.pad_token_id
    assert blank is not None  # a `Trainer` says what to do
    vectors = media_vectors(cfg.thinker, tree, batch.media, how)
    if vectors is None or tokens.media_index is None:
        return jnp.zeros(()), {}
    length = tokens.ids.shape[1]
    frames, texts = how.ctc_room or (length, length)
    heard, written = tokens.media_index >= 0, tokens.labels >= 0
    # Both to the front of their rows; the labels without the ending mark, which is the last of them.
    index = _first(tokens.media_index, heard, frames)
    labels = _first(tokens.labels, written, texts)
    frame_count, count = jnp.sum(heard, axis=1), jnp.sum(written, axis=1) - 1
    x = vectors[jnp.maximum(index, 0)].astype(jnp.float32)
    table = tree["model"]["embed_tokens"]["weight"].astype(jnp.float32)
    ids = jnp.pad(jnp.maximum(labels, 0), ((0, 0), (1, 0)), constant_values=blank)
    # Of the whole vocabulary only the sum is kept.
    total_score = jax.nn.logsumexp(jnp.einsum("btd,vd->btv", x, table) / math.sqrt(x.shape[-1]), axis=-1)
    scores = jnp.einsum("btd,bnd->btn", x, table[ids]) / math.sqrt(x.shape[-1]) - total_score[..., None]
    loss = -ctc_logprob(scores, frame_count, labels, count)
    fits = (count > 0) & (frame_count >= count)
    return jnp.sum(jnp.where(fits, loss, 0.0)) / total["tokens"], {}


def _first(values: jax.Array, chosen: jax.Array, size: int) -> jax.Array:
    """[B, size]: the chosen values of each row, in order, and others behind them."""
    order = jnp.argsort(~chosen, axis=1, stable=True)[:, :size]
    return jnp.take_along_axis(values, order, axis=1)


def ctc_logprob(scores: jax.Array, frames: jax.Array, labels: jax.Array, count: jax.Array) -> jax.Array:
    """float32 [B]: log-probability of each row's labels over all alignments. Its memory does not grow with V.

    Args:
      scores: [B, T, 1 + N], log-probabilities of the blank and of each label of the row at each frame.
      frames: int32 [B], frames of the row, from 0 to T.
      labels: int32 [B, N].
      count: int32 [B], labels of the row, from 0 to N.
    Source: Graves et al. 2006, equations 5 to 8.
    """
    B, N = labels.shape
    # Finite, so that the gradient of a sum of impossible alignments is no NaN.
    blank = jnp.full((B, N + 1), IMPOSSIBLE).at[:, 0].set(0.0)  # ending in the blank behind so many labels
    label = jnp.full((B, N), IMPOSSIBLE)  # ending in this label
    # Between two equal labels there must be a blank.
    repeated = jnp.pad(labels[:, 1:] == labels[:, :-1], ((0, 0), (1, 0)), constant_values=True)

    def frame(state: tuple[jax.Array, jax.Array], given: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        (blank, label), (at, score) = state, given
        before = jnp.pad(label, ((0, 0), (1, 0)), constant_values=IMPOSSIBLE)
        skipped = jnp.where(repeated, IMPOSSIBLE, before[:, :-1])
        new_label = score[:, 1:] + jnp.logaddexp(jnp.logaddexp(label, blank[:, :-1]), skipped)
        new_blank = score[:, :1] + jnp.logaddexp(blank, before)
        live = (at < frames)[:, None]
        return (jnp.where(live, new_blank, blank), jnp.where(live, new_label, label)), None

    steps = jnp.arange(scores.shape[1]), jnp.moveaxis(scores, 1, 0)
    (blank, label), _ = lax.scan(frame, (blank, label), steps)
    ends = jnp.pad(label, ((0, 0), (1, 0)), constant_values=IMPOSSIBLE)
    last = jnp.maximum(count, 0)[:, None]
    return jnp.take_along_axis(jnp.logaddexp(blank, ends), last, axis=1)[:, 0]


def media_vectors(cfg: ThinkerConfig, params: Params, media: Media, how: ForwardOptions) -> jax.Array | None:
    """All the towers' outputs one after another, [M, D], which `Tokens.media_index` points into."""
    remat = how.remat != "none"
    out: list[Any] = []
    for pixels, positions, valid in media.vision:
        eyes = VisionTower(cfg.vision, remat)
        with how.layout_for("vision", len(pixels)):
            out.append(eyes.apply({"params": params["visual"]}, pixels.astype(how.dtype), positions, valid))
    if media.audio is not None:
        mel, lengths = media.audio
        ears = AudioTower(cfg.audio, remat)
        with how.layout_for("audio", len(mel)):
            out.append(ears.apply({"params": params["audio_tower"]}, mel.astype(how.dtype), lengths))
    return jnp.concatenate([x.reshape(-1, x.shape[-1]) for x in out]) if out else None


def thinker_states(
    cfg: ThinkerConfig, params: Params, tokens: Tokens, media: Media, how: ForwardOptions
) -> tuple[jax.Array, jax.Array]:
    """Input embeddings and hidden states after the final norm, each [B, T, D]."""
    vectors = media_vectors(cfg, params, media, how)
    with how.layout_for("thinker", *tokens.ids.shape):
        x = thinker.embed(params, tokens.ids, vectors, tokens.media_index).astype(how.dtype)
        return x, decode(cfg.text, params["model"], x, tokens.positions, tokens.segments, how)


def talker_states(
    cfg: TalkerConfig,
    params: Params,
    table: jax.Array,
    embeddings: jax.Array,
    hidden: jax.Array,
    tokens: Tokens,
    speech: Speech,
    how: ForwardOptions,
) -> jax.Array:
    """The Talker's hidden states [B, P, D] with the true codes before each place.

    Args:
      params: the Talker's.
      table: the Thinker's embeddings.
      embeddings, hidden: of `thinker_states`.
    """
    if tokens.media_index is not None:
        embeddings = jnp.where((tokens.media_index >= 0)[..., None], jnp.zeros((), embeddings.dtype), embeddings)

    def known(index: jax.Array, rows: jax.Array) -> jax.Array:
        return jnp.where((index >= 0)[..., None], rows, jnp.zeros((), rows.dtype)).astype(how.dtype)

    heard = jnp.take_along_axis(embeddings + hidden, jnp.maximum(speech.source, 0)[..., None], axis=1)
    codes = params["model"]["embed_tokens"]["weight"]
    x = known(speech.source, heard) + known(speech.text, table[jnp.maximum(speech.text, 0)])
    x = x + known(speech.codec, codes[jnp.maximum(speech.codec, 0)])
    with how.layout_for("talker", *speech.source.shape):
        x = constrain(dense(params["thinker_to_talker_proj"], x), "batch", "length", "act_embed")
        return decode(cfg.decoder, params["model"], x, speech.positions, speech.segments, how)


def text_logprobs(
    cfg: OmniConfig, params: Mapping[str, Params], batch: Batch, how: ForwardOptions
) -> tuple[jax.Array, jax.Array]:
    """`token_logprobs` of the Thinker's labels."""
    tree = params["thinker"]
    _, hidden = thinker_states(cfg.thinker, tree, batch.tokens, batch.media, how)
    return _of_text(tree, hidden, batch.tokens, how)


def _of_text(tree: Params, hidden: jax.Array, tokens: Tokens, how: ForwardOptions) -> tuple[jax.Array, jax.Array]:
    with how.layout_for("thinker", *tokens.ids.shape):
        return token_logprobs(tree.get("lm_head", tree["model"]["embed_tokens"]), hidden, tokens.labels)


def corrupted(speech: Speech, share: float, codes: int, key: jax.Array) -> Speech:
    """The Talker's places with a share of the codes that they hear exchanged for random ones of `codes`."""
    chance, other = jax.random.split(key)
    shape = speech.codec.shape
    hit = (speech.codec >= 0) & (speech.codec < codes) & jax.random.bernoulli(chance, share, shape)
    heard = jnp.where(hit, jax.random.randint(other, shape, 0, codes), speech.codec)
    return dataclasses.replace(speech, codec=heard)


def code_logprobs(
    cfg: OmniConfig, params: Mapping[str, Params], batch: Batch, how: ForwardOptions
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`token_logprobs` of the Talker's labels, and the Thinker's hidden states, which a loss on the text takes.

    Raises:
      ValueError: a batch without codes, or a model without a Talker.
    """
    if batch.speech is None or cfg.talker is None:
        raise ValueError("the Talker's loss needs codes and a Talker")
    tree, speaker = params["thinker"], params["talker"]
    embeddings, hidden = thinker_states(cfg.thinker, tree, batch.tokens, batch.media, how)
    table = tree["model"]["embed_tokens"]["weight"]
    said = talker_states(cfg.talker, speaker, table, embeddings, hidden, batch.tokens, batch.speech, how)
    with how.layout_for("talker", *batch.speech.labels.shape):
        return *token_logprobs(speaker["codec_head"], said, batch.speech.labels), hidden


def counts(batch: Batch) -> Metrics:
    """How many labels the micro batches of a step have together: what their sums are divided by."""
    out = {"tokens": jnp.sum(batch.tokens.labels >= 0)}
    if batch.speech is not None:
        out["codes"] = jnp.sum(batch.speech.labels >= 0)
    return {name: jnp.maximum(n, 1).astype(jnp.float32) for name, n in out.items()}


def text_loss(
    cfg: OmniConfig, params: Mapping[str, Params], batch: Batch, total: Metrics, how: ForwardOptions
) -> tuple[jax.Array, Metrics]:
    """This micro batch's part of the mean cross-entropy of the assistant's tokens, and of the accuracy."""
    logprobs, hits = text_logprobs(cfg, params, batch, how)
    loss = -jnp.sum(logprobs) / total["tokens"]
    return loss, {"text_loss": loss, "accuracy": jnp.sum(hits) / total["tokens"]}


def speech_loss(
    cfg: OmniConfig,
    params: Mapping[str, Params],
    batch: Batch,
    total: Metrics,
    how: ForwardOptions,
    text_weight: float = 0.0,
) -> tuple[jax.Array, Metrics]:
    """The same for the Talker's codes; the text's own loss is added with a weight, for training both."""
    logprobs, hits, hidden = code_logprobs(cfg, params, batch, how)
    loss = -jnp.sum(logprobs) / total["codes"]
    metrics = {"code_loss": loss, "accuracy": jnp.sum(hits) / total["codes"]}
    if text_weight:
        text, _ = _of_text(params["thinker"], hidden, batch.tokens, how)
        metrics["text_loss"] = -jnp.sum(text) / total["tokens"]
        loss = loss + text_weight * metrics["text_loss"]
    return loss, metrics


def preference_loss(
    chosen: jax.Array, rejected: jax.Array, base_chosen: jax.Array, base_rejected: jax.Array, beta: float
) -> tuple[jax.Array, jax.Array]:
    """Direct preference optimisation, for each pair: the loss, and the margin of the rewards.

    Args:
      chosen, rejected: [pairs] log-probabilities of whole replies.
      base_chosen, base_rejected: the same under the model that training began with.
      beta: how strongly to stay near it.
    Source: Rafailov et al. 2023 (arXiv:2305.18290), equation 7.
    """
    margin = beta * ((chosen - base_chosen) - (rejected - base_rejected))
    return -jax.nn.log_sigmoid(margin), margin


def dpo_loss(
    cfg: OmniConfig,
    params: Mapping[str, Params],
    base: Mapping[str, Params],
    batch: Batch,
    pairs: jax.Array,
    how: ForwardOptions,
    *,
    beta: float,
    codes: bool = False,
) -> tuple[jax.Array, Metrics]:
    """This micro batch's part of the mean preference loss; rows 2i are chosen, rows 2i + 1 rejected.

    Args:
      base: the parameters that training began with.
      pairs: of the whole step.
      codes: prefer speech instead of text.
    """
    labels = batch.speech.labels if codes and batch.speech is not None else batch.tokens.labels
    run = code_logprobs if codes else text_logprobs

    def replies(tree: Mapping[str, Params]) -> jax.Array:
        return jnp.sum(run(cfg, tree, batch, how)[0], axis=1)

    policy, start = replies(params), lax.stop_gradient(replies(base))
    real = jnp.any(labels[0::2] >= 0, axis=1)
    loss, margin = preference_loss(policy[0::2], policy[1::2], start[0::2], start[1::2], beta)
    mean = jnp.sum(jnp.where(real, loss, 0)) / pairs
    won = jnp.sum(real & (margin > 0)) / pairs
    return mean, {"preferred": won, "margin": jnp.sum(jnp.where(real, margin, 0)) / pairs}
