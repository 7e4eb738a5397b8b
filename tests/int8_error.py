"""How far logits are from float32's at 3B widths, for each precision: the table of docs/quantization.md.

    python -m tests.int8_error

Eight layers of random weights, of which 1 % of the columns are five times as large; 128 random tokens. 12 GB of memory.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from omni_jax import config as C
from omni_jax.infer.analysis.depth import truncate_layers
from omni_jax.model import parameters, thinker
from omni_jax.model.kv_cache import init_cache
from omni_jax.model.quantize import multiplied_by_int8, quantize_params, quantized_specs

LAYERS, TOKENS = 8, 128


def weights(cfg: C.ThinkerConfig, dtype: str) -> dict[str, object]:
    """The decoder and its head."""
    rng = np.random.default_rng(0)

    def widened(path: tuple[object, ...], spec: parameters.ParamSpec) -> jax.Array:
        x = rng.standard_normal(spec.shape, np.float32)
        if not spec.matmul:
            return jnp.asarray(np.ones(spec.shape) if "norm" in jax.tree_util.keystr(path) else x, dtype)
        x[..., rng.random(spec.shape[-1]) < 0.01] *= 5
        return jnp.asarray(x / np.sqrt(spec.shape[-1]), dtype)

    specs = {name: parameters.thinker(cfg)[name] for name in ("model", "lm_head")}
    return jax.tree_util.tree_map_with_path(widened, specs)


def main() -> None:
    """Prints the table."""
    cfg = truncate_layers(C.preset("3b"), LAYERS).thinker
    ids = np.random.default_rng(1).integers(0, 150_000, (1, TOKENS)).astype(np.int32)
    positions = np.broadcast_to(np.arange(TOKENS, dtype=np.int32), (3, 1, TOKENS))

    def logits(params: dict[str, object], dtype: str, cache: str) -> np.ndarray:
        def run(params: dict[str, object]) -> jax.Array:
            slots = init_cache(cfg.text, 1, 256, jnp.dtype(cache), unroll=False)
            hidden = thinker.forward(cfg, params, thinker.embed(params, ids), positions, slots)[0]
            return thinker.logits(params, hidden)

        return np.asarray(jax.jit(run)(params), np.float32)

    want = logits(weights(cfg, "float32"), "float32", "float32")
    plain = weights(cfg, "bfloat16")
    small = quantize_params(plain, quantized_specs(parameters.thinker(cfg), "int8", ("thinker",)))
    rows = {
        "bf16": (plain, "bfloat16"), "bf16, cache int8": (plain, "int8"), "`int8`": (small, "bfloat16"),
        "`int8`, cache int8": (small, "int8"), "`int8`, activations int8": (multiplied_by_int8(small), "bfloat16"),
    }  # fmt: skip
    print("| | RMS error, relative | likeliest token as float32's |\n|---|---|---|")
    for name, (params, cache) in rows.items():
        got = logits(params, "bfloat16", cache)
        error = np.sqrt(np.mean(np.square(got - want)) / np.mean(np.square(want)))
        same = (got.argmax(-1) == want.argmax(-1)).mean()
        print(f"| {name} | {error:.3f} | {same:.0%} |", flush=True)


if __name__ == "__main__":
    main()
