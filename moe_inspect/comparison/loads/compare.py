"""LoadComparison: the load of two traces, as tables and as a verdict."""

from __future__ import annotations

import moe_inspect.comparison.loads.tables as _tables  # noqa: F401 (registers them)
from moe_inspect.comparison.loads.data import LOAD_TABLES, LoadData
from moe_inspect.comparison.loads.verdict import findings
from moe_inspect.reporting.verdict.findings import Finding

__all__ = ["LOAD_TABLES", "LoadComparison"]


class LoadComparison(LoadData):
    """What `compare` returns where a trace holds counts only. `tables["load_shift"]` and the others
    are DataFrames, computed when first asked for; `verdict()` is what they come to, in plain
    sentences."""

    def __repr__(self) -> str:
        return (
            f"LoadComparison({str(self.a.path)!r}, {str(self.b.path)!r}, tables: "
            f"{', '.join(LOAD_TABLES)})"
        )

    def verdict(self) -> list[Finding]:
        """Whether the load differs by more than chance, where, and how even it is in each trace: a
        Finding each."""
        return findings(self)
