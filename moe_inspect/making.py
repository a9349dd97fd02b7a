"""The functions that write a trace and return it, as the public `Trace`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import ParamSpec, Unpack

from moe_inspect.capture.options import TraceKeywords, TraceOptions
from moe_inspect.importers import run as importing
from moe_inspect.public import Trace, open_trace
from moe_inspect.trace import merge as merging
from moe_inspect.trace import reader
from moe_inspect.trace.files.location import output_location

Options = ParamSpec("Options")


def with_public_trace(function: Callable[Options, reader.Trace]) -> Callable[Options, Trace]:
    """The function with the public `Trace` as its result."""

    @wraps(function)
    def run(*args: Options.args, **options: Options.kwargs) -> Trace:
        return open_trace(function(*args, **options))

    return run


import_trace = with_public_trace(importing.import_trace)
merge = with_public_trace(merging.merge)


def trace_model(
    model: str,
    out: str | Path,
    options: TraceOptions | None = None,
    *,
    progress: Callable[[int, int | None], None] | None = None,
    **changes: Unpack[TraceKeywords],
) -> Trace:
    """Feeds a corpus to a model and records every routing decision as a trace at `out`.

    model     a hub id, a directory, or "demo" (bundled, offline)
    out       directory of the trace
    options   settings; each field of `TraceOptions` may also be given as a keyword:
              `trace_model("demo", "runs/a", max_tokens=10_000, logits=True)`
    progress  called with (tokens done, tokens in all or None) after every forward pass

    Raises MoeInspectError for errors the caller can fix."""
    from moe_inspect.capture.run import trace_model as run

    chosen = replace(options or TraceOptions(), **changes)
    return open_trace(run(model, output_location(out), chosen, progress))
