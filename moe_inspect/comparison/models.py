"""Two traces of different models: their summaries, side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pandas as pd

from moe_inspect.analysis.counting.select import select
from moe_inspect.comparison.aligning.misaligned import replicas
from moe_inspect.comparison.result import (
    MODEL_TABLES,
    OF_DECISIONS,
    Comparison,
    ComparisonKind,
    PairSettings,
    facts_table,
)
from moe_inspect.reporting.report import Report
from moe_inspect.reporting.tables.registry import Excerpt, table
from moe_inspect.reporting.tables.summary import facts
from moe_inspect.reporting.verdict.findings import Finding, finding
from moe_inspect.trace.reader import Trace

MOST_ROWS = 24  # of the summaries in the text


class Models(Comparison):
    """Traces A and B of different models. `reasons`: how the models differ, a phrase each."""

    def __init__(
        self,
        a: Trace,
        b: Trace,
        options: PairSettings,
        reasons: Sequence[str],
        progress: Callable[[int], None] | None = None,
    ):
        self.reasons = reasons
        given = {k: v for k, v in options.given.items() if k in ("domains", "phase")}
        super().__init__(a, b, given)
        options.refuse((*OF_DECISIONS, "layers", "shift_layers"), self.why)
        self.reports = [
            Report(trace, select(trace, None, options.domains, options.phase), progress=progress)
            for trace in self.traces
        ]

    @property
    def why(self) -> str:
        different = f"of different models ({'; '.join(self.reasons)})"
        return f"{self.a.path} (A) and {self.b.path} (B) are {different}"


@table(tables=MODEL_TABLES)
def summary(data: Models) -> pd.DataFrame:
    """One row per fact of the two reports' summaries: key, and its value in A and in B (text)."""
    # thresholds and notes say how a report judges, not what a trace holds
    a, b = (
        {k: v for k, v in facts(made) if k != "note" and not k.startswith("threshold_")}
        for made in data.reports
    )
    return facts_table({key: (a.get(key, ""), b.get(key, "")) for key in a | b}, ("a", "b"))


def different(data: Models) -> Iterator[Finding]:
    """How the models differ, and that the tokens are not compared."""
    if (found := replicas(data.a, data.b)) is not None:
        text = (
            f"The {found['physical']} ids of {found['trace']} are physical ids of "
            f"{found['logical']} experts: mapped by shared tokens, the traces agree (beyond "
            f"chance {found['agreement']:.1%}). Map them to logical ids before comparing."
        )
        yield finding("physical_ids", "critical", text, **found)
        return
    text = (
        f"Different models: {'; '.join(data.reasons)}. The table shows the summaries of their "
        "reports side by side: it is no comparison of tokens."
    )
    yield finding("different_models", "note", text, reasons=list(data.reasons))


Models.kind = ComparisonKind(
    of="different models",
    tables=MODEL_TABLES,
    main="summary",
    checks=(different,),
    title="Two models, side by side",
    footer="Figures of different models depend on their numbers of experts and on their text.",
    charts={},
    sections={"summary": ("", "The summaries of both", "")},
    excerpts={"summary": Excerpt("the first rows", lambda frame, _: frame.head(MOST_ROWS))},
)
