"""What a comparison of loads is made of: the report of each trace, and which router goes with
which."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pandas as pd

from moe_inspect.analysis.counting.select import select
from moe_inspect.analysis.metrics.chance import FEWEST_TO_JUDGE
from moe_inspect.comparison.aligning.pairing import routers_of_one_model
from moe_inspect.comparison.data import TABLES, Options
from moe_inspect.comparison.loads.steps import StepWindows, step_windows
from moe_inspect.errors import MoeInspectError
from moe_inspect.reporting.report import Report, report
from moe_inspect.reporting.tables.registry import LazyTables, Table
from moe_inspect.reporting.verdict.chance import beyond_documents
from moe_inspect.reporting.verdict.gate import gated
from moe_inspect.trace.reader import Trace

LOAD_TABLES: dict[str, Table] = {}
SIDES = ("a", "b")
# how decisions belong together, which counts do not tell
OF_DECISIONS = ("shift_positions", "shift_routes", "drop_last", "drop_zero_filled")


class LoadData:
    """Traces A and B, at least one of which holds counts only; they may still be written. Nothing
    is counted before it is asked for. DifferentModelsError where the routers have other experts
    or another k."""

    def __init__(
        self, a: Trace, b: Trace, options: Options, progress: Callable[[int], None] | None = None
    ):
        self.a, self.b, self.options = a, b, options
        for name in OF_DECISIONS:
            if getattr(options, name):
                raise MoeInspectError(f"{self.why}, which {name} needs: leave it out")
        self.selection = select(a, options.layers, options.domains, options.phase)
        shift = options.shift_layers
        self.pairs = routers_of_one_model(a, b, self.selection.routers, shift, options.layers)
        settings: dict[str, Any] = {"domains": options.domains, "phase": options.phase}
        self.reports: dict[str, Report] = {
            side: report(
                trace,
                layers=sorted({trace.routers[pair[i]].layer for pair in self.pairs}),
                **settings,
                progress=progress,
            )
            for i, (side, trace) in enumerate(zip(SIDES, (a, b), strict=True))
        }
        self.tables: Mapping[str, pd.DataFrame] = LazyTables(self, LOAD_TABLES)

    @property
    def trace(self) -> Trace:
        """The one whose routers name what is compared."""
        return self.a

    @property
    def why(self) -> str:
        """Why decisions cannot be compared."""
        of = [str(trace.path) for trace in (self.a, self.b) if trace.counts_only]
        names = " and ".join(dict.fromkeys(of))
        return f"{names} {'hold' if len(set(of)) > 1 else 'holds'} counts only, no decisions"

    @cached_property
    def steps(self) -> StepWindows:
        """The load of both in windows of the same steps."""
        a, b = (self.reports[side].selection for side in SIDES)
        return step_windows((self.a, self.b), self.pairs, (a, b))

    def design_effect(self, router: int) -> float:
        """How much more than with independent tokens the load of a router of A varies, where a
        trace of decisions tells it; else 1."""
        effects = [self.of(side, "balance", router)["design_effect"].iloc[0] for side in SIDES]
        return float(np.nanmax([1.0, *map(float, effects)]))

    @cached_property
    def documents_known(self) -> bool:
        """Whether a trace of decisions tells how alike the tokens of a document are."""
        units = [len(of.counts.units) for of in self.reports.values() if not of.counts.counts_only]
        return max(units, default=0) >= FEWEST_TO_JUDGE

    def beyond_text(self, shift: float, floor: float) -> bool:
        """Whether no other text explains that so much of the load moves, where independent tokens
        move `floor` by chance."""
        return self.documents_known or beyond_documents(shift, floor)

    @property
    def chance(self) -> str:
        """What the floors are of."""
        return "chance" if self.documents_known else "chance of independent tokens"

    @property
    def refused(self) -> list[str]:
        """The tables of a comparison of decisions that counts cannot have."""
        return [name for name in TABLES if name not in LOAD_TABLES]

    def refuse(self, what: Literal["table", "metric"], name: str) -> None:
        """MoeInspectError for a table, or a metric of a gate, that a comparison of decisions has
        and counts cannot have: with the reason."""
        of_decisions = TABLES if what == "table" else gated(TABLES)
        there = LOAD_TABLES if what == "table" else gated(LOAD_TABLES)
        if name in of_decisions and name not in there:
            raise MoeInspectError(
                f"{self.why}: there is no {what} {name!r}, only {', '.join(there)}"
            )

    def of(self, side: str, table: str, router: int) -> Any:
        """The rows of a table of one trace's report that are about a router of A, or the one of B
        that goes with it."""
        r = dict(self.pairs)[router] if side == "b" else router
        rows: Any = self.reports[side].tables[table]
        return rows[rows["router"] == r]
