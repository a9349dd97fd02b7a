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

    writes: str
    run: Callable[..., None]

    @property
    def options(self) -> list[str]:
        return list(inspect.signature(self.run).parameters)[2:]


def exporters() -> dict[str, Exporter]:
    """All of MODULES, in their order."""
    made = dict[str, Exporter]()
    for name, (module, writes) in MODULES.items():
        loaded = importlib.import_module(f"moe_inspect.exporters.{module}")
        made[name] = Exporter(writes, getattr(loaded, module))
    return made


def need_decisions(trace: Trace, format: str) -> None:
    """MoeInspectError for a trace of counts only."""
    if trace.counts_only:
        raise MoeInspectError(
            f"{trace.path} holds counts only, no decisions: {format} needs those; --format "
            "counts or sglang"
        )
