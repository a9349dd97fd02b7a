"""Which capture records a model: dispatch or tap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moe_inspect.errors import MoeInspectError
from moe_inspect.model.routers import Site, is_expert_parallel, wants_expert_parallel

CAPTURES = ("auto", "dispatch", "tap")
NOT_ON_INTERFACE = "is not on transformers' experts interface"


def mode_of(model: Any, sites: Sequence[Site], capture: str, outputs: bool = False) -> str:
    """The mode of a `capture` option: "auto" is dispatch where the model would run the stock
    grouped_mm on a GPU, or where the experts' `outputs` are to be seen, else tap."""
    if capture not in CAPTURES:
        raise MoeInspectError(f"no capture {capture!r}: choose from {', '.join(CAPTURES)}")
    called = _called(sites)
    if wants_expert_parallel(model) and not all(hasattr(m, "_is_expert_parallel") for m in called):
        raise MoeInspectError(
            "this release of transformers gives experts local ids under expert parallelism: "
            "use 5.24, which gives global ones"
        )
    obstacle = _obstacle(model, sites)
    if outputs and capture == "tap":
        raise MoeInspectError(
            "a tap does not see what the experts return: record output norms and peaks with "
            "--capture dispatch"
        )
    if not obstacle and outputs and any(s.adapter is not None for s in sites):
        obstacle = NOT_ON_INTERFACE
    if (capture == "dispatch" or outputs) and obstacle:
        instead = (
            "what its experts return is not seen: trace without --output-norms, --output-peaks"
            if outputs
            else "use --capture tap"
        )
        raise MoeInspectError(f"{type(model).__name__} {obstacle}: {instead}")
    if outputs:
        return "dispatch"
    if capture != "auto":
        return capture
    stock = not obstacle and set(model.get_experts_implementation().values()) == {"grouped_mm"}
    return "dispatch" if stock and next(model.parameters()).is_cuda else "tap"


def takes_implementation(model: Any, sites: Sequence[Site]) -> bool:
    """Whether the experts of these sites run what `set_experts_implementation` says."""
    return not _obstacle(model, sites)


def _called(sites: Sequence[Site]) -> list[Any]:
    """The experts modules that are called with a choice."""
    return [s.module for s in sites if s.adapter is None or s.adapter.method]


def _obstacle(model: Any, sites: Sequence[Site]) -> str:
    """Why the model's experts cannot be given an implementation of ours; "" if they can."""
    called = _called(sites)
    if any(type(m).__name__.startswith("FP8") for m in called):
        return "has FP8 experts"  # which have a registry of their own
    if any(is_expert_parallel(m) for m in called):
        return "runs expert-parallel"
    on_interface = all(hasattr(m, "is_transposed") and hasattr(m, "has_gate") for m in called)
    if not called or not on_interface or not hasattr(model, "set_experts_implementation"):
        return NOT_ON_INTERFACE
    return ""
