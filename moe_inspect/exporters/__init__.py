"""One file per format that other tools read. A new format takes its file and a line here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_inspect.errors import MoeInspectError

if TYPE_CHECKING:
    from moe_inspect.trace.reader import Trace

# name → module of this package, whose function of that name writes it, and what it writes
MODULES = {
    "sglang": (
        "sglang",
        "the load, for --init-expert-location of SGLang and ktransformers (.pt, .json)",
    ),
    "llama-cpp": ("llama_cpp", "-ot of llama.cpp: which layers' experts stay on the CPU (a line)"),
    "esft": ("esft", "per domain the expert weights, scores and training configuration (a folder)"),
    "pruning": ("pruning", "scores of the experts, and the experts to drop (.json)"),
    "counts": ("counts", "load by expert and domain (.csv, .json, .parquet)"),
    "routing-profile": (
        "routing_profile",
        "load, distinct experts, locality, drift for simulators of serving (.json)",
    ),
}


def need_decisions(trace: Trace, format: str) -> None:
    """MoeInspectError for a trace of counts only."""
    if trace.counts_only:
        raise MoeInspectError(
            f"{trace.path} holds counts only, no decisions: {format} needs those; --format "
            "counts or sglang"
        )
