"""What config.json says of quantized weights: which 4-bit layouts are read, and what is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

REMEDY = "give the original in bfloat16; --quantize int8 halves its memory"
# Methods that people meet, and what they are.
_OTHERS = {
    "bitsandbytes": "of bitsandbytes, which only that library reads",
    "compressed-tensors": "of compressed-tensors (vLLM)",
    "fbgemm_fp8": "fp8",
    "fp8": "fp8",
    "gguf": "of llama.cpp",
}


@dataclass(frozen=True)
class Packing:
    """How the 4-bit weights of a published checkpoint are packed.

    Attributes:
      method: "gptq" packs eight inputs into an int32, "awq" eight outputs in an interleaved order.
      zero_offset: what is added to a stored zero point: 1 in the first format of AutoGPTQ.
      group: inputs that share a scale; -1 for all.
    """

    method: Literal["gptq", "awq"]
    zero_offset: int
    group: int


def quantization_config(raw: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The `quantization_config` of a config.json: the model's, the Thinker's or its text model's; None without one."""
    thinker = raw.get("thinker_config")
    parts = [raw, thinker, *(p.get("text_config") for p in (raw, thinker) if isinstance(p, Mapping))]
    found = [p["quantization_config"] for p in parts if isinstance(p, Mapping) and p.get("quantization_config")]
    return found[0] if found else None


def packing_of(raw: Mapping[str, Any]) -> Packing | None:
    """How the weights of a checkpoint with this config.json are packed; None where they are not quantized.

    Raises:
      ValueError: quantized in another way than is read; one line with the method and what to do.
    """
    given = quantization_config(raw)
    if given is None:
        return None
    method = given.get("quant_method") if isinstance(given, Mapping) else None
    if method not in ("gptq", "awq"):
        what = _OTHERS.get(str(method), "which is not known here")
        raise ValueError(
            f"the checkpoint is quantized with {str(method)[:40]!r}, {what}; GPTQ and AWQ of 4 bits are read: {REMEDY}"
        )
    bits, group = given.get("bits", given.get("w_bit")), given.get("group_size", given.get("q_group_size", -1))
    if bits != 4 or isinstance(group, bool) or not isinstance(group, int) or (group < 1 and group != -1):
        raise ValueError(
            f"the checkpoint is quantized with {method} of {str(bits)[:20]} bits in groups of {str(group)[:20]}, "
            f"which is not read; 4 bits are: {REMEDY}"
        )
    known = {"gptq": ("gptq", "gptq_v2"), "awq": ("gemm",)}[method]
    name = given.get("checkpoint_format" if method == "gptq" else "version") or known[0]
    if str(name).lower() not in known:
        raise ValueError(
            f"the checkpoint is packed in the {method} format {str(name)[:40]!r}, which is not read; "
            f"{' and '.join(known)} can be: {REMEDY}"
        )
    return Packing(method, int(method == "gptq" and str(name).lower() == "gptq"), group)


def without_packing(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json of weights that are no longer packed."""
    nested = ("thinker_config", "text_config")
    return {
        key: without_packing(value) if key in nested and isinstance(value, Mapping) else value
        for key, value in raw.items()
        if key != "quantization_config"
    }
