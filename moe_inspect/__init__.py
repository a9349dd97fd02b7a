"""moe-inspect: where do the tokens of a Mixture-of-Experts model go?

    import moe_inspect

    with moe_inspect.record(model, "runs/a", tokenizer=tokenizer):  # any Hugging Face MoE
        model(**batch)
    trace = moe_inspect.open_trace("runs/a")
    moe_inspect.report(trace).tables["balance"]  # a pandas DataFrame

Nothing heavy is imported before it is used; `open_trace` and `report` never import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from moe_inspect.errors import MoeInspectError

if TYPE_CHECKING:
    from moe_inspect.api import (
        ablate,
        describe_weights,
        intervene,
        prune,
        record,
        trace_engine,
        trace_model,
    )
    from moe_inspect.capture.hook.probes import probe
    from moe_inspect.capture.options import EngineOptions, TraceOptions
    from moe_inspect.capture.server.serve import serve_engine
    from moe_inspect.comparison.compare import (
        Checkpoints,
        Comparison,
        compare,
        compare_checkpoints,
        compare_models,
    )
    from moe_inspect.comparison.mismatch import mismatch
    from moe_inspect.exporters.run import export_trace
    from moe_inspect.importers.run import import_trace
    from moe_inspect.interventions.ablation import Ablation
    from moe_inspect.interventions.pruning.run import Pruning
    from moe_inspect.model.custom.spec import RouterSpec, register_router
    from moe_inspect.model.describe import describe
    from moe_inspect.model.description import Description
    from moe_inspect.query import sql
    from moe_inspect.reporting.report import Report, report
    from moe_inspect.simulate.cache import simulate_cache
    from moe_inspect.simulate.capacity import simulate_capacity
    from moe_inspect.simulate.decode import simulate_decode
    from moe_inspect.simulate.placement.placement import simulate_placement
    from moe_inspect.simulate.placement.plan import write_plan
    from moe_inspect.simulate.result import Simulation
    from moe_inspect.simulate.routing import simulate_routing
    from moe_inspect.site.build import atlas
    from moe_inspect.trace.derived.merge import merge
    from moe_inspect.trace.derived.sample import sample
    from moe_inspect.trace.reader import Trace, open_trace
    from moe_inspect.trace.verify import Verification, verify

__all__ = [
    "Ablation",
    "Checkpoints",
    "Comparison",
    "Description",
    "EngineOptions",
    "MoeInspectError",
    "Pruning",
    "Report",
    "RouterSpec",
    "Simulation",
    "Trace",
    "TraceOptions",
    "Verification",
    "ablate",
    "atlas",
    "compare",
    "compare_checkpoints",
    "compare_models",
    "describe",
    "describe_weights",
    "export_trace",
    "import_trace",
    "intervene",
    "merge",
    "mismatch",
    "open_trace",
    "probe",
    "prune",
    "record",
    "register_router",
    "report",
    "sample",
    "serve_engine",
    "simulate_cache",
    "simulate_capacity",
    "simulate_decode",
    "simulate_placement",
    "simulate_routing",
    "sql",
    "trace_engine",
    "trace_model",
    "verify",
    "write_plan",
]

# where each name is defined; imported when it is first used
_HOMES = {
    "Ablation": "moe_inspect.interventions.ablation",
    "Checkpoints": "moe_inspect.comparison.compare",
    "Comparison": "moe_inspect.comparison.compare",
    "Description": "moe_inspect.model.description",
    "EngineOptions": "moe_inspect.capture.options",
    "Pruning": "moe_inspect.interventions.pruning.run",
    "RouterSpec": "moe_inspect.model.custom.spec",
    "Report": "moe_inspect.reporting.report",
    "Simulation": "moe_inspect.simulate.result",
    "Trace": "moe_inspect.trace.reader",
    "TraceOptions": "moe_inspect.capture.options",
    "Verification": "moe_inspect.trace.verify",
    "ablate": "moe_inspect.api",
    "atlas": "moe_inspect.site.build",
    "compare": "moe_inspect.comparison.compare",
    "compare_checkpoints": "moe_inspect.comparison.compare",
    "compare_models": "moe_inspect.comparison.compare",
    "describe": "moe_inspect.model.describe",
    "describe_weights": "moe_inspect.api",
    "export_trace": "moe_inspect.exporters.run",
    "import_trace": "moe_inspect.importers.run",
    "intervene": "moe_inspect.api",
    "merge": "moe_inspect.trace.derived.merge",
    "mismatch": "moe_inspect.comparison.mismatch",
    "open_trace": "moe_inspect.trace.reader",
    "probe": "moe_inspect.capture.hook.probes",
    "prune": "moe_inspect.api",
    "register_router": "moe_inspect.model.custom.spec",
    "record": "moe_inspect.api",
    "report": "moe_inspect.reporting.report",
    "sample": "moe_inspect.trace.derived.sample",
    "serve_engine": "moe_inspect.capture.server.serve",
    "simulate_cache": "moe_inspect.simulate.cache",
    "simulate_capacity": "moe_inspect.simulate.capacity",
    "simulate_decode": "moe_inspect.simulate.decode",
    "simulate_placement": "moe_inspect.simulate.placement.placement",
    "simulate_routing": "moe_inspect.simulate.routing",
    "sql": "moe_inspect.query",
    "trace_engine": "moe_inspect.api",
    "trace_model": "moe_inspect.api",
    "verify": "moe_inspect.trace.verify",
    "write_plan": "moe_inspect.simulate.placement.plan",
}

if not TYPE_CHECKING:  # type checkers resolve the imports above, and see misspelt names as errors

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'moe_inspect' has no attribute {name!r}")
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
