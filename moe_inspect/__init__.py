"""moe-inspect: where do the tokens of a Mixture-of-Experts model go?

    import moe_inspect

    with moe_inspect.record(model, "runs/a", tokenizer=tok):   # any Hugging Face MoE, also in a
    training loop
        model(**batch)
    trace = moe_inspect.open_trace("runs/a")
    moe_inspect.report(trace).tables["balance"]                # a pandas DataFrame

Nothing heavy is imported until it is used; `open_trace` and `report` never import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from moe_inspect.errors import MoeInspectError

if TYPE_CHECKING:
    from moe_inspect.capture.hook.recorder import record
    from moe_inspect.capture.run import trace_model
    from moe_inspect.capture.server.run import trace_engine
    from moe_inspect.importers.run import import_trace
    from moe_inspect.model.describe import Description, describe
    from moe_inspect.reporting.report import (
        Report,
        report,
    )  # the package itself is callable: see report/__init__.py
    from moe_inspect.simulate.cache import simulate_cache
    from moe_inspect.simulate.capacity import simulate_capacity
    from moe_inspect.simulate.decode import simulate_decode
    from moe_inspect.simulate.placement.placement import simulate_placement
    from moe_inspect.simulate.placement.plan import write_plan
    from moe_inspect.simulate.routing import simulate_routing
    from moe_inspect.trace.export import export_trace
    from moe_inspect.trace.reader import Trace, open_trace
    from moe_inspect.trace.verify import Verification, verify

__all__ = [
    "Description",
    "MoeInspectError",
    "Report",
    "Trace",
    "Verification",
    "describe",
    "export_trace",
    "import_trace",
    "open_trace",
    "record",
    "report",
    "simulate_cache",
    "simulate_capacity",
    "simulate_decode",
    "simulate_placement",
    "simulate_routing",
    "trace_engine",
    "trace_model",
    "verify",
    "write_plan",
]

_HOMES = {
    "describe": "moe_inspect.model.describe",
    "Description": "moe_inspect.model.describe",
    "record": "moe_inspect.capture.hook.recorder",
    "trace_engine": "moe_inspect.capture.server.run",
    "trace_model": "moe_inspect.capture.run",
    "Report": "moe_inspect.reporting.report",
    "Trace": "moe_inspect.trace.reader",
    "export_trace": "moe_inspect.trace.export",
    "import_trace": "moe_inspect.importers.run",
    "Verification": "moe_inspect.trace.verify",
    "verify": "moe_inspect.trace.verify",
    "open_trace": "moe_inspect.trace.reader",
    "simulate_cache": "moe_inspect.simulate.cache",
    "simulate_capacity": "moe_inspect.simulate.capacity",
    "simulate_decode": "moe_inspect.simulate.decode",
    "simulate_placement": "moe_inspect.simulate.placement.placement",
    "write_plan": "moe_inspect.simulate.placement.plan",
    "simulate_routing": "moe_inspect.simulate.routing",
}


def __getattr__(name: str) -> Any:
    if name == "report":
        return importlib.import_module("moe_inspect.report")
    if name not in _HOMES:
        raise AttributeError(f"module 'moe_inspect' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
