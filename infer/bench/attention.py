"""Attention of one layer by each kernel that the device runs, for `omni-jax bench chip --programs attention`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from omni_jax.config import OmniConfig
from omni_jax.model.kernels import cudnn, plain, prefill, triton

PROMPTS = (2048, 6144)
PACKED = (4, 2048)  # rows of several documents and their tokens, as training has them
DOCUMENTS = 4  # of a row
WINDOWS = 104  # of a picture of about 1,140 × 1,140
CHUNKS = 16  # of audio of 2 s
LOOPS = 10  # calls of a run, each of which takes the former's result

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@dataclass(frozen=True)
class Shape:
    """Attention that some layer of the model does.

    Attributes:
      what: in the table.
      rows, tokens, heads, kv_heads, size: of queries [rows, tokens, heads, size] and of the keys.
      causal: with keys as the cache has them, [rows, kv_heads, tokens, size].
      documents: of a row; 1: whole rows.
      backward: the gradients of all three as well.
    """

    what: str
    rows: int
    tokens: int
    heads: int
    kv_heads: int
    size: int
    causal: bool = False
    documents: int = 1
    backward: bool = False


def shapes(cfg: OmniConfig) -> Iterator[Shape]:
    """Prompts, packed rows and towers of a model."""
    text, vision, audio = cfg.thinker.text, cfg.thinker.vision, cfg.thinker.audio
    of_text = text.num_attention_heads, text.num_key_value_heads, text.head_dim
    for tokens in PROMPTS:
        yield Shape(f"a prompt of {tokens}", 1, tokens, *of_text, causal=True)
    for backward in (False, True):
        yield Shape("packed rows", *PACKED, *of_text, True, DOCUMENTS, backward)
    heads, window = vision.num_heads, vision.window_patches**2
    of_vision = heads, heads, vision.hidden_size // heads
    for backward in (False, True):
        yield Shape("vision, windows", WINDOWS, window, *of_vision, backward=backward)
    yield Shape("vision, a whole frame", 1, WINDOWS * window, *of_vision)
    heads = audio.encoder_attention_heads
    of_audio = heads, heads, audio.d_model // heads
    for backward in (False, True):
        yield Shape("audio, chunks", CHUNKS, audio.chunk_frames // 2, *of_audio, backward=backward)


def _kernels(shape: Shape, dtype: Any) -> Iterator[tuple[str, Attend]]:
    """Those that take the shape here; the first is what runs where no kernel does."""
    backend = jax.default_backend()
    by_triton = backend == "gpu" and triton.supported(dtype, shape.size)
    if shape.causal:
        ids = np.arange(shape.tokens, dtype=np.int32) * shape.documents // shape.tokens
        segments = None if shape.documents == 1 else jnp.tile(jnp.asarray(ids), (shape.rows, 1))
        yield "plain", functools.partial(plain.causal_attention, segments=segments)
        if by_triton:
            yield "Triton", functools.partial(triton.causal_attention, segments=segments)
        if segments is None and cudnn.supported(dtype, shape.size):
            yield "cuDNN", cudnn.causal_attention
        if backend == "tpu":
            yield "Pallas", lambda q, k, v: prefill.causal_attention(q, k, v, segments)[0]
        return
    mask, scale = jnp.ones((shape.rows, shape.tokens), bool), shape.size**-0.5
    yield "plain", functools.partial(plain.full_attention, key_mask=mask, scale=scale)
    if by_triton:
        yield "Triton", functools.partial(triton.full_attention, key_mask=mask, scale=scale)
    if backend == "tpu":
        yield "Pallas", functools.partial(prefill.full_attention, key_mask=mask, scale=scale)


def _repeated(attend: Attend, backward: bool) -> Callable[..., Any]:
    def forward(_: Any, given: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        q, k, v = given
        return attend(q, k, v), k, v

    def both(_: Any, given: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        changes = jax.grad(lambda *x: attend(*x).astype(jnp.float32).sum(), (0, 1, 2))(*given)
        return tuple(x + d for x, d in zip(given, changes, strict=True))

    return jax.jit(lambda *given: lax.fori_loop(0, LOOPS, both if backward else forward, given))


def cases(cfg: OmniConfig, dtype: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What the table calls them, and a run of `LOOPS` calls on random values."""
    rng = np.random.default_rng(0)
    for shape in shapes(cfg):
        queries = shape.rows, shape.tokens, shape.heads, shape.size
        keys = (shape.rows, shape.kv_heads, shape.tokens, shape.size) if shape.causal else queries
        given = [jnp.asarray(rng.standard_normal(s, np.float32), dtype) for s in (queries, keys, keys)]
        sizes = f"{shape.rows} × {shape.tokens}, heads of {shape.size}" + (", with gradients" if shape.backward else "")
        for name, attend in _kernels(shape, dtype):
            run = functools.partial(_repeated(attend, shape.backward), *given)
            yield f"{shape.what} ({sizes}): {name}", run
