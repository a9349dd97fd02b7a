"""The experts of a GGUF model: their sizes, from the headers of its files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from moe_inspect.errors import MoeInspectError
from moe_inspect.files import why_unread
from moe_inspect.model.config import MOST_EXPERTS, MOST_LAYERS
from moe_inspect.model.gguf.header import read_gguf
from moe_inspect.trace.schema import Router

EXPERT_TENSOR = re.compile(r"blk\.(\d+)\.ffn_(?:gate_up|gate|up|down)_exps\.(?:weight|bias)")
SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


def parts_of(path: Path) -> list[Path]:
    """The files of a model that is split (NAME-00001-of-00003.gguf), else the one file."""
    found = SPLIT.fullmatch(path.name)
    if found is None:
        return [path]
    parts = [
        path.with_name(f"{found[1]}-{n:05}-of-{found[3]}.gguf") for n in range(1, int(found[3]) + 1)
    ]
    if missing := next((part for part in parts if not part.is_file()), None):
        raise MoeInspectError(f"{path} is one of {len(parts)} files of a model: no {missing.name}")
    return parts


@dataclass(frozen=True)
class LayerExperts:
    """The routed experts of a layer: how many, and the bytes of one, as quantised."""

    experts: int
    nbytes: int


def layer_experts(path: Path) -> dict[int, LayerExperts]:
    """Layer → its routed experts, by the tensors `blk.N.ffn_{gate,up,down,gate_up}_exps`.
    MoeInspectError where the model has none."""
    found: dict[int, LayerExperts] = {}
    for part in parts_of(path):
        for tensor in read_gguf(part).tensors.values():
            match = EXPERT_TENSOR.fullmatch(tensor.name)
            if match is None:
                continue
            layer, experts = int(match[1]), tensor.shape[-1] if tensor.shape else 0
            before = found.get(layer, LayerExperts(experts, 0))
            if not 1 <= experts <= MOST_EXPERTS or layer >= MOST_LAYERS:
                raise MoeInspectError(f"{part}: {tensor.name} is of {experts} experts")
            if before.experts != experts:
                raise MoeInspectError(
                    f"{part}: {tensor.name} is of {experts} experts, another tensor of its layer "
                    f"of {before.experts}"
                )
            found[layer] = LayerExperts(experts, before.nbytes + tensor.nbytes // experts)
    if not found:
        raise MoeInspectError(f"{path} has no tensors of experts (blk.N.ffn_…_exps)")
    return found


def expert_mb_of(path: Path, routers: dict[int, Router]) -> dict[int, float]:
    """Router → the size of one of its experts in 10^6 bytes. MoeInspectError where the model has
    other experts in one of their layers."""
    if not path.is_file():
        raise MoeInspectError(why_unread(path, "file"))
    found = layer_experts(path)
    for r, router in routers.items():
        there = found[router.layer].experts if router.layer in found else 0
        if there != router.experts:
            raise MoeInspectError(
                f"{path} has {there} experts in layer {router.layer}, the trace {router.experts} "
                f"(router {r}): is it the traced model?"
            )
    return {r: found[router.layer].nbytes / 1e6 for r, router in routers.items()}
