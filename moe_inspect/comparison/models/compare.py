"""ModelComparison: two different models on the same text, as tables and as a verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from moe_inspect.comparison.compare import opened
from moe_inspect.comparison.models.data import MODEL_TABLES, ModelData
from moe_inspect.comparison.models.verdict import findings
from moe_inspect.reporting.shown import Shown
from moe_inspect.reporting.verdict.findings import Finding
from moe_inspect.trace.reader import Trace

if TYPE_CHECKING:
    from moe_inspect.reporting.charts.spec import Chart
    from moe_inspect.reporting.render.notebook import Cell


class ModelComparison(ModelData, Shown):
    """`tables["balance"]` and the others are DataFrames, computed when first asked for;
    `verdict()` is what they come to, in plain sentences."""

    def __repr__(self) -> str:
        return (
            f"ModelComparison({str(self.a.path)!r}, {str(self.b.path)!r}, tables: "
            f"{', '.join(MODEL_TABLES)})"
        )

    def verdict(self) -> list[Finding]:
        """What can be compared and what it comes to, and what cannot: a Finding each."""
        return findings(self)

    def write_text(self, file: TextIO) -> None:
        from moe_inspect.comparison.models.shown import print_models

        print_models(self, file)

    def charts(self) -> tuple[list[Chart], list[str]]:
        from moe_inspect.comparison.models.shown import draw_model_charts

        return draw_model_charts(self)

    def page(self) -> str:
        from moe_inspect.comparison.models.shown import models_page

        return models_page(self)

    def cell(self) -> Cell:
        from moe_inspect.comparison.models.shown import models_cell

        return models_cell(self)


def compare_models(
    a: Trace | str | Path,
    b: Trace | str | Path,
    *,
    domains: str | Iterable[str] | None = None,
    phase: str | None = None,
    top: int = 20,
    reasons: Iterable[str] = (),
    progress: Callable[[int], None] | None = None,
) -> ModelComparison:
    """Two models of other shapes, or with other tokenizers, side by side: balance, specialization
    by domain, and how far experts follow the same spans of text, whatever tokens they are cut
    into.

    `domains`, `phase`: as in `report`. `top`: texts per expert in `vocabulary`, 0 for all.
    `reasons`: why they are different, beside what their shapes and tokenizers tell. `progress` is
    called with the number of decisions read. What these two do not have is refused when it is asked
    for, by MoeInspectError, and listed in the table `refused`."""
    settings = {"domains": domains, "phase": phase, "top": top}
    return ModelComparison(opened(a), opened(b), **settings, reasons=reasons, progress=progress)
