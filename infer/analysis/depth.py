"""Models of full width and reduced depth, for measurements that scale with depth in a known way."""

from __future__ import annotations

import dataclasses

from omni_jax.config import OmniConfig


def truncate_layers(cfg: OmniConfig, layers: int | None) -> OmniConfig:
    """The configuration with each stack truncated to `layers` and widths unchanged; None leaves it whole.

    Layers that see more than others (full attention of the vision tower, neighbours in the DiT) stay so where they are
    kept. Where none of a kind is left, one takes its place: the last of the vision tower, the first of the DiT.
    """
    if layers is None:
        return cfg
    n = layers

    def kept(which: tuple[int, ...], instead: int) -> tuple[int, ...]:
        return tuple(i for i in which if i < n) or (instead,)

    t, k, w = cfg.thinker, cfg.talker, cfg.token2wav
    depth = min(n, t.vision.depth)
    thinker = dataclasses.replace(
        t, text=dataclasses.replace(t.text, num_hidden_layers=min(n, t.text.num_hidden_layers)),
        audio=dataclasses.replace(t.audio, encoder_layers=min(n, t.audio.encoder_layers)),
        vision=dataclasses.replace(
            t.vision, depth=depth, fullatt_block_indexes=kept(t.vision.fullatt_block_indexes, depth - 1)
        ),
    )  # fmt: skip
    if k is not None:
        k = dataclasses.replace(
            k, decoder=dataclasses.replace(k.decoder, num_hidden_layers=min(n, k.decoder.num_hidden_layers))
        )
    if w is not None:
        d = w.dit
        w = dataclasses.replace(w, dit=dataclasses.replace(
            d, num_hidden_layers=min(n, d.num_hidden_layers), look_ahead_layers=kept(d.look_ahead_layers, 0),
            look_backward_layers=kept(d.look_backward_layers, 0),
        ))  # fmt: skip
    return dataclasses.replace(cfg, thinker=thinker, talker=k, token2wav=w)
