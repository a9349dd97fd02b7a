"""Which capture records a model: dispatch or tap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moe_inspect.errors import MoeInspectError
from moe_inspect.model.routers import Site, is_expert_parallel, wants_expert_parallel

CAPTURES = ("auto", "dispatch", "tap")


def mode_of(model: Any, sites: Sequence[Site], capture: str, outputs: bool = False) -> str:
    """The mode of a `capture` option: "auto" is dispatch where the model would run the stock
    grouped_mm on a GPU, or where the experts' `outputs` are to be seen, else tap."""
    if capture not in CAPTURES:
        raise MoeInspectError(f"no capture {capture!r}: choose from {', '.join(CAPTURES)}")
    called = [s.module for s in sites if s.adapter is None or s.adapter.method]
    fp8 = any(type(m).__name__.startswith("FP8") for m in called)  # has a registry of its own
    parallel = any(is_expert_parallel(m) for m in called)
    if wants_expert_parallel(model) and not all(hasattr(m, "_is_expert_parallel") for m in called):
        raise MoeInspectError(
            "this release of transformers gives experts local ids under expert parallelism: "
            "use 5.24, which gives global ones"
        )
    on_interface = all(hasattr(m, "is_transposed") and hasattr(m, "has_gate") for m in called)
    can = bool(called) and on_interface and hasattr(model, "set_experts_implementation")
    if outputs and capture == "tap":
        raise MoeInspectError(
            "a tap does not see what the experts return: record output norms and peaks with "
            "--capture dispatch"
        )
    can = can and not (outputs and any(s.adapter is not None for s in sites))
    if (capture == "dispatch" or outputs) and (fp8 or parallel or not can):
        why = (
            "has FP8 experts"
            if fp8
            else "runs expert-parallel"
            if parallel
            else "is not on transformers' experts interface"
        )
        instead = (
            "what its experts return is not seen: trace without --output-norms, --output-peaks"
            if outputs
            else "use --capture tap"
        )
        raise MoeInspectError(f"{type(model).__name__} {why}: {instead}")
    if outputs:
        return "dispatch"
    if capture != "auto":
        return capture
    stock = (
        can
        and not fp8
        and not parallel
        and set(model.get_experts_implementation().values()) == {"grouped_mm"}
    )
    return "dispatch" if stock and next(model.parameters()).is_cuda else "tap"
