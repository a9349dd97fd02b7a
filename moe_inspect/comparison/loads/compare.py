"""LoadComparison: the load of two traces, as tables and as a verdict."""

from __future__ import annotations

from typing import TYPE_CHECKING, TextIO

import moe_inspect.comparison.loads.tables as _tables  # noqa: F401 (registers them)
from moe_inspect.comparison.loads.data import LOAD_TABLES, LoadData
from moe_inspect.comparison.loads.verdict import findings
from moe_inspect.reporting.shown import Shown
from moe_inspect.reporting.verdict.findings import Finding

if TYPE_CHECKING:
    from moe_inspect.reporting.charts.spec import Chart
    from moe_inspect.reporting.render.notebook import Cell

__all__ = ["LOAD_TABLES", "LoadComparison"]


class LoadComparison(LoadData, Shown):
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

    def write_text(self, file: TextIO) -> None:
        from moe_inspect.comparison.loads.shown import print_loads

        print_loads(self, file)

    def charts(self) -> tuple[list[Chart], list[str]]:
        from moe_inspect.comparison.loads.shown import draw_load_charts

        return draw_load_charts(self), []

    def page(self) -> str:
        from moe_inspect.comparison.loads.shown import loads_page

        return loads_page(self)

    def cell(self) -> Cell:
        from moe_inspect.comparison.loads.shown import loads_cell

        return loads_cell(self)
