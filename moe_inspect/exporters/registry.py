"""What `export` writes: a name, what is written, the options that it takes."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass

from moe_inspect.errors import MoeInspectError
from moe_inspect.exporters import MODULES
from moe_inspect.trace.reader import Trace


@dataclass(frozen=True)
class Exporter:
    """`run(trace, output, **options)` writes the trace as `output`. `writes`: what that is, for
    help and documentation. `options`: the names of its keyword arguments."""

    name: str
    writes: str
    run: Callable[..., None]

    @property
    def options(self) -> list[str]:
        return list(inspect.signature(self.run).parameters)[2:]


_registered: dict[str, Exporter] = {}


def exporter(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers a function of (trace, output, and options with defaults)."""

    def register(run: Callable[..., None]) -> Callable[..., None]:
        _registered[name] = Exporter(name, MODULES[name][1], run)
        return run

    return register


def exporters() -> dict[str, Exporter]:
    """All of MODULES, in their order."""
    for module, _ in MODULES.values():
        importlib.import_module(f"moe_inspect.exporters.{module}")
    return {name: _registered[name] for name in MODULES}


def need_decisions(trace: Trace, format: str) -> None:
    """MoeInspectError for a trace of counts only."""
    if trace.counts_only:
        raise MoeInspectError(
            f"{trace.path} holds counts only, no decisions: {format} needs those; --format "
            "counts or sglang"
        )
