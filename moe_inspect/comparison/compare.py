"""Comparing two traces: decision by decision if they are of one model and both hold decisions, by
the load of the experts if one holds counts only, by their summaries if the models differ."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import pandas as pd

# this registers the tables of decisions, in their order, and how they are shown
import moe_inspect.comparison.charts  # noqa: F401
from moe_inspect.analysis.counting.select import select
from moe_inspect.comparison.decisions import Decisions
from moe_inspect.comparison.load_shift import Loads
from moe_inspect.comparison.misaligned import physical_ids
from moe_inspect.comparison.pairing import DifferentModelsError
from moe_inspect.comparison.result import (
    MODEL_TABLES,
    OF_DECISIONS,
    TABLES,
    Comparison,
    ComparisonKind,
    PairSettings,
    Progress,
    facts_table,
)
from moe_inspect.reporting.report import Report
from moe_inspect.reporting.tables.registry import Excerpt, table
from moe_inspect.reporting.tables.summary import facts
from moe_inspect.reporting.verdict.findings import Finding, finding
from moe_inspect.trace.reader import Trace, open_trace

__all__ = ["TABLES", "Comparison", "compare"]


def compare(
    a: Trace | str | Path,
    b: Trace | str | Path,
    *,
    noise: Trace | str | Path | None = None,
    layers: str | int | Iterable[int | str] | None = None,
    domains: str | Iterable[str] | None = None,
    phase: str | None = None,
    top: int = 20,
    shift_layers: int = 0,
    shift_positions: int = 0,
    shift_routes: int = 0,
    drop_last: bool = False,
    drop_zero_filled: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Comparison:
    """Compare the decisions of two traces, token by token: do they choose the same experts?

    Tokens are aligned by document, position and token id, or by the content of sequences if
    documents are numbered differently. `noise`: a second run of A; differences between the two runs
    are noise. `layers`, `domains`, `phase`: as in `report`, by A's names. `top`: rows of the tables
    of experts and documents, 0 for all. `shift_layers`: compare layer n of B with layer
    n + shift_layers of A. `shift_positions`: tokens at position n of A are at n + shift_positions
    of B. `shift_routes`: shift B's routes, but not its token ids. `drop_last`: leave out the last
    token of each sequence. `drop_zero_filled`: leave out tokens that one trace sends to expert 0 in
    every slot. `progress` is called with the number of decisions compared. Raises MoeInspectError
    if the traces cannot be aligned.

    If a trace holds counts only (`--counts-only`, the history of a training run), the load of the
    experts is compared, even while the trace is being written. For models of different shapes or
    tokenizers, the result is a table of the summaries of both reports. Options that do not apply
    are refused."""
    options = PairSettings(
        *(layers, domains, phase, top, shift_layers, shift_positions, shift_routes),
        *(drop_last, drop_zero_filled, None if noise is None else open_trace(noise)),
    )
    first, second = open_trace(a), open_trace(b)
    kind = Loads if first.counts_only or second.counts_only else Decisions
    try:
        return kind(first, second, options, progress)
    except DifferentModelsError as error:
        if noise is not None:
            raise
        return Models(first, second, options, error.reasons, progress)


# --- different models: their summaries, side by side

MOST_ROWS = 24  # of the summaries in the text


class Models(Comparison):
    """Traces A and B of different models. `reasons`: how the models differ, a phrase each."""

    def __init__(
        self,
        a: Trace,
        b: Trace,
        options: PairSettings,
        reasons: Sequence[str],
        progress: Progress = None,
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
    if (replicas := physical_ids(data.a, data.b)) is not None:
        yield replicas
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
