"""What a trace says of the model's weights: how they are quantised, and which adapter they have."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

# what quantisers call the number of bits
BITS = ("bits", "w_bit", "nbits", "weight_bits", "num_bits")
NUMBER = re.compile(r"(u?int|float|fp)_?(\d+)", re.IGNORECASE)


def quantization(manifest: Mapping[str, Any]) -> str:
    """E.g. "mxfp4", "bitsandbytes 4 bit", "torchao int8"; "" where the weights are not
    quantised, or the trace does not say."""
    model = _mapping(manifest.get("model"))
    if stored := _mapping(model.get("dequantized_from")):
        dtype = _mapping(manifest.get("capture")).get("dtype")
        return f"{_named(stored)} dequantized" + (f" to {dtype}" if dtype else "")
    config = _mapping(model.get("config"))
    found = config.get("quantization_config")
    for inner in config.values():  # of a multimodal model's language model
        found = found or _mapping(inner).get("quantization_config")
    return _named(_mapping(found))


def adapter(manifest: Mapping[str, Any]) -> str:
    """E.g. "LORA adapter of allenai/OLMoE-1B-7B-0924"; "" where there is none."""
    about = _mapping(_mapping(manifest.get("model")).get("adapter"))
    if not about:
        return ""
    base = about.get("base")
    return f"{about.get('kind') or 'PEFT'} adapter" + (f" of {base}" if base else "")


def _named(config: Mapping[str, Any]) -> str:
    method = str(config.get("quant_method") or config.get("quant_algo") or "").lower()
    if method == "gguf":
        return " ".join([method, *(kind.lower() for kind in _mapping(config.get("tensors")))])
    if config.get("load_in_4bit") is True or config.get("_load_in_4bit") is True:
        return f"{method or 'bitsandbytes'} 4 bit"
    if config.get("load_in_8bit") is True or config.get("_load_in_8bit") is True:
        return f"{method or 'bitsandbytes'} 8 bit"
    if method == "torchao":
        # Int8DynamicActivationInt4WeightConfig: the weights come last
        stated = config.get("quant_type")
        kind = _mapping(_mapping(stated).get("default", stated)).get("_type", stated)
        kinds = NUMBER.findall(str(kind))
        return " ".join([method, *("".join(kind).lower() for kind in kinds[-1:])])
    weights = config
    for group in _mapping(config.get("config_groups")).values():  # compressed-tensors
        weights = _mapping(_mapping(group).get("weights")) or weights
    bits = next((weights[b] for b in BITS if type(weights.get(b)) is int), None)
    if bits is None or not method:
        return method
    return f"{method} {weights['type']}{bits}" if weights.get("type") else f"{method} {bits} bit"


def _mapping(value: Any) -> Mapping[str, Any]:
    return cast(Mapping[str, Any], value) if isinstance(value, Mapping) else {}
