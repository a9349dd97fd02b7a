"""Files from which other programs place experts, or drop them.

L layers, E experts.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np

from moe_inspect.analysis.counting.engine import count_trace
from moe_inspect.analysis.counting.select import select
from moe_inspect.analysis.metrics.balance import entropy_nats, nan_for_zero
from moe_inspect.analysis.scores import lowest, refuse_too_few, scores_of
from moe_inspect.errors import MoeInspectError
from moe_inspect.model.config import groups_of, text_config
from moe_inspect.trace.files.atomic import draft_of
from moe_inspect.trace.reader import Trace


def sglang(trace: Trace, output: Path) -> None:
    """Write logical_count, by which SGLang's --init-expert-location places replicas: int64 [1,
    layers, experts] as its recorder writes it (.pt, also for ktransformers), or [layers, experts]
    (.json).
    Their readers count every layer: dense ones are rows of zeros."""
    if output.suffix not in (".pt", ".json"):
        raise MoeInspectError(f"-o {output}: for SGLang the load is written as .pt or .json")
    sizes = {r.experts for r in trace.routers}
    if len(sizes) > 1 or len({r.layer for r in trace.routers}) < len(trace.routers):
        raise MoeInspectError(
            "SGLang needs one router per layer, all with the same number of experts: "
            "this model differs"
        )
    load_LE = np.zeros((trace.blocks, sizes.pop()), np.int64)
    counts = count_trace(trace, select(trace))
    for r, router in enumerate(trace.routers):
        load_LE[router.layer] = counts.load_E(r)
    with draft_of(output) as draft:
        if output.suffix == ".json":
            draft.write_text(json.dumps({"logical_count": load_LE.tolist()}) + "\n")
            return
        try:
            import torch
        except ImportError:
            raise MoeInspectError(
                "a .pt needs torch: pip install 'moe-inspect[trace]', or write it as .json"
            ) from None
        file = io.BytesIO()  # written in one go: torch has other errors for a full disk
        torch.save({"logical_count": torch.from_numpy(load_LE[None])}, file)
        draft.write_bytes(file.getvalue())


def llama_cpp(trace: Trace, output: Path, gpu_layers: int | None = None) -> None:
    """Write llama.cpp's option -ot (--override-tensor), which keeps the experts of all layers but
    `gpu_layers` on the CPU.

    llama.cpp has the experts of a layer in one tensor per projection, so that they move by layer.
    Memory and caches serve a layer best whose load is on few experts: the layers with the fewest
    experts in effective use (e to the entropy of their load) are the first that go to the CPU."""
    if gpu_layers is None:
        raise MoeInspectError("--format llama-cpp needs --gpu-layers: how many layers' experts fit")
    used: dict[int, float] = {}
    counts = count_trace(trace, select(trace))
    for r, router in enumerate(trace.routers):
        if router.stack:
            raise MoeInspectError("llama.cpp has no encoder-decoders with experts")
        load_E = counts.load_E(r)
        effective = np.exp(entropy_nats(load_E / nan_for_zero(load_E.sum())))  # NaN without load
        used[router.layer] = used.get(router.layer, 0.0) + float(np.nan_to_num(effective))
    if gpu_layers > len(used):
        raise MoeInspectError(f"--gpu-layers {gpu_layers}: {len(used)} layers have experts")
    spread_first = sorted(used, key=lambda layer: (-used[layer], layer))
    on_cpu = sorted(spread_first[gpu_layers:])
    blocks = "|".join(map(str, on_cpu))
    line = rf"-ot blk\.({blocks})\.ffn_(gate_up|gate|up|down)_exps=CPU" if on_cpu else ""
    with draft_of(output) as draft:
        draft.write_text(line + "\n")


def pruning(trace: Trace, output: Path, keep: float = 0.75, by: str = "reap") -> None:
    """Write one JSON object, which docs/interventions.md describes: the scores of all experts, and
    the experts that go by them, for programs that prune, quantise or merge experts. The same number
    of experts goes in each layer, and in each group if routers choose groups first."""
    scores = scores_of(trace, by)
    groups, _, _ = of_groups = groups_of(text_config(trace))
    several = len({router.layer for router in trace.routers}) < len(trace.routers)
    names = [router.path if several else str(router.layer) for router in trace.routers]
    for router in trace.routers:
        refuse_too_few(router.experts, router.top_k, keep, of_groups)
    gone = [lowest(of_E, keep, groups) for of_E in scores]
    capture = trace.manifest["capture"]
    made = {
        "format": 1,
        "model": (trace.manifest.get("model") or {}).get("id"),
        "trace": str(trace.path),
        "by": by,
        "scored_by": capture.get("format") if by == "saliency" else "moe-inspect",
        "keep": keep,
        "experts": {n: router.experts for n, router in zip(names, trace.routers, strict=True)},
        "dropped": dict(zip(names, gone, strict=True)),
        "kept": {
            n: sorted({*range(router.experts)} - {*of})
            for n, router, of in zip(names, trace.routers, gone, strict=True)
        },
        "scores": {n: of_E.tolist() for n, of_E in zip(names, scores, strict=True)},
    }
    with draft_of(output) as draft:
        draft.write_text(json.dumps(made, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
