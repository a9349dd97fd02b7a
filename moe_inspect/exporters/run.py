"""A trace → a file of another tool: what `moe-inspect export` calls."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path

from moe_inspect.errors import MoeInspectError, own_options, writing
from moe_inspect.exporters import MODULES
from moe_inspect.text import no_such
from moe_inspect.trace.manifest import refuse_within_trace
from moe_inspect.trace.reader import Trace, open_trace


def exporters() -> dict[str, Callable[..., None]]:
    """The functions of MODULES, in their order: each takes a trace, the file to write and options
    of its own."""
    return {
        name: getattr(
            importlib.import_module(f"moe_inspect.exporters.{module}"), name.replace("-", "_")
        )
        for name, (module, _) in MODULES.items()
    }


def options_of(exporter: Callable[..., None]) -> list[str]:
    return list(inspect.signature(exporter).parameters)[2:]


def export_trace(
    trace: str | Path | Trace,
    format: str,
    output: str | Path,
    *,
    by: str | None = None,
    gpu_layers: int | None = None,
    keep: float | None = None,
) -> Path:
    """Writes a trace in the format of another tool, and returns `output`.

    Args:
        trace: a trace or its directory.
        format: "sglang" (`logical_count` for --init-expert-location, .pt or .json), "llama-cpp"
            (its option -ot), "pruning" (.json: scores, and the experts that go), "counts" (.csv,
            .json or .parquet) or "routing-profile" (.json, what simulators of serving need of the
            routing).
        output: the file to write.
        by: pruning: the score of the experts: "reap" (the default), "gate", "frequency", "ean",
            "mean-norm" or "saliency".
        keep: pruning: the least share of the experts of each layer that stays, 0.75 by default.
        gpu_layers: llama-cpp: how many layers' experts stay on the GPU.

    Raises:
        MoeInspectError: the format is unknown, or the trace lacks what it needs.
    """
    known = exporters()
    if format not in known:
        raise MoeInspectError(no_such("format", format, known))
    takers = {name: options_of(exporter) for name, exporter in known.items()}
    options = own_options(format, {"by": by, "keep": keep, "gpu_layers": gpu_layers}, takers)
    opened, output = open_trace(trace), Path(output)
    with writing(output):
        refuse_within_trace(output)
        known[format](opened, output, **options)
    return output
