"""Which layers' experts llama.cpp keeps on the GPU: its option -ot (--override-tensor).

llama.cpp has the experts of a layer in one tensor a projection, so that they move by layer. Memory
and caches serve a layer best whose load is on few experts: layers whose load is spread over the
most experts stay on the GPU. E experts.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moe_inspect.analysis.counting.engine import count_trace
from moe_inspect.analysis.counting.select import select
from moe_inspect.analysis.metrics.balance import entropy_nats, nan_for_zero
from moe_inspect.errors import MoeInspectError
from moe_inspect.trace.files.atomic import draft_of
from moe_inspect.trace.reader import Trace


def llama_cpp(trace: Trace, output: Path, gpu_layers: int | None = None) -> None:
    """A line of options: the experts of all layers but `gpu_layers` on the CPU, the layers with the
    fewest experts in effective use (e to the entropy of their load) first."""
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
