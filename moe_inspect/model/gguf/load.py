"""GGUF models as transformers loads them: dequantised, and only of some architectures."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moe_inspect.errors import MoeInspectError
from moe_inspect.files import why_unread
from moe_inspect.model.gguf.header import PLAIN, TYPES, read_gguf

# mixtures of experts that transformers loads from GGUF to the same logits as the original; of
# gpt-oss transformers 5.24 finds no experts
ARCHITECTURES = ("qwen2moe", "qwen3moe", "minimax-m2")
# what transformers leaves at its default → the key of the metadata
SIZES = {
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
}
NEEDED = ("gguf", "accelerate")


def is_gguf(name: str) -> bool:
    """Whether a model's name is that of a GGUF file, which may be missing."""
    return name.endswith(".gguf")


def refuse_unless_loadable(path: Path) -> None:
    """MoeInspectError where transformers cannot load this file, as far as its header says."""
    if not path.is_file():
        raise MoeInspectError(why_unread(path, "file"))
    fields = read_gguf(path).fields
    kind = str(fields.get("general.architecture"))[:40]
    if kind not in ARCHITECTURES:
        raise MoeInspectError(
            f"{path} is of architecture {kind}, which cannot be loaded from GGUF: only "
            f"{', '.join(ARCHITECTURES)} can; use the original model"
        )
    if isinstance(parts := fields.get("split.count"), int) and parts > 1:
        raise MoeInspectError(
            f"{path} is one of {parts} files, and only whole models can be loaded: join them with "
            "llama-gguf-split --merge"
        )
    if (scaling := fields.get(f"{kind}.rope.scaling.type", "none")) != "none":
        raise MoeInspectError(
            f"{path} scales positions ({str(scaling)[:40]}), which is not read from GGUF: use the "
            "original model"
        )
    if missing := [package for package in NEEDED if find_spec(package) is None]:
        raise MoeInspectError(f"a GGUF needs {missing[0]}: pip install 'moe-inspect[gguf]'")


def load_config(path: Path) -> Any:
    """The config, with the sizes of experts that the file states."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
    fields = read_gguf(path).fields
    for name, key in SIZES.items():
        stated = fields.get(f"{fields['general.architecture']}.{key}")
        if isinstance(stated, int) and hasattr(config, name):
            setattr(config, name, stated)
    return config


def dequantized() -> dict[str, Any]:
    """The option by which transformers keeps no weights in the file's blocks, where it could."""
    import transformers

    kind = getattr(transformers, "GgufConfig", None)
    return {} if kind is None else {"quantization_config": kind(dequantize=True)}


def quantization(path: Path) -> dict[str, Any]:
    """How the weights are quantised in the file, as a quantization_config; empty where they are
    not."""
    counts: dict[str, int] = {}
    for tensor in read_gguf(path).tensors.values():
        name = TYPES[tensor.kind].name if tensor.kind in TYPES else str(tensor.kind)
        if name not in PLAIN:
            counts[name] = counts.get(name, 0) + 1
    types = dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))
    return {"quant_method": "gguf", "tensors": types} if types else {}
