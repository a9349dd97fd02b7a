"""The load by which SGLang and ktransformers place experts.

L layers, E experts.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np

from moe_inspect.analysis.counting.engine import count_trace
from moe_inspect.analysis.counting.select import select
from moe_inspect.errors import MoeInspectError
from moe_inspect.trace.files.atomic import draft_of
from moe_inspect.trace.reader import Trace


def sglang(trace: Trace, output: Path) -> None:
    """logical_count, by which SGLang's --init-expert-location places replicas: int64 [1, layers,
    experts] as its recorder writes it (.pt, also for ktransformers), or [layers, experts] (.json).
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
