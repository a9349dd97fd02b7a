"""moe-inspect: where do the tokens of a Mixture-of-Experts model go?

    import moe_inspect

    with moe_inspect.record(model, "runs/a", tokenizer=tokenizer):  # any Hugging Face MoE
        model(**batch)
    trace = moe_inspect.open_trace("runs/a")
    trace.report().tables["balance"]  # a pandas DataFrame
    trace.simulate.placement(gpus=8)

Nothing heavy is imported before it is used; a trace and its report never import torch.
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
    from moe_inspect.capture.server.serve import serve_engine
    from moe_inspect.comparison.compare import Comparison, compare
    from moe_inspect.comparison.mismatch import mismatch
    from moe_inspect.importers.run import import_trace
    from moe_inspect.model.custom.spec import RouterSpec, register_router
    from moe_inspect.model.describe import describe
    from moe_inspect.reporting.report import Report, report
    from moe_inspect.simulate.result import Simulation
    from moe_inspect.site.build import atlas
    from moe_inspect.trace.derived.merge import merge
    from moe_inspect.trace.reader import Trace, open_trace
    from moe_inspect.trace.verify import verify

__all__ = [
    "Comparison",
    "MoeInspectError",
    "Report",
    "RouterSpec",
    "Simulation",
    "Trace",
    "ablate",
    "atlas",
    "compare",
    "describe",
    "describe_weights",
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
    "serve_engine",
    "trace_engine",
    "trace_model",
    "verify",
]

# where each name is defined; imported when it is first used
_HOMES = {
    "Comparison": "moe_inspect.comparison.compare",
    "RouterSpec": "moe_inspect.model.custom.spec",
    "Report": "moe_inspect.reporting.report",
    "Simulation": "moe_inspect.simulate.result",
    "Trace": "moe_inspect.trace.reader",
    "ablate": "moe_inspect.api",
    "atlas": "moe_inspect.site.build",
    "compare": "moe_inspect.comparison.compare",
    "describe": "moe_inspect.model.describe",
    "describe_weights": "moe_inspect.api",
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
    "serve_engine": "moe_inspect.capture.server.serve",
    "trace_engine": "moe_inspect.api",
    "trace_model": "moe_inspect.api",
    "verify": "moe_inspect.trace.verify",
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
