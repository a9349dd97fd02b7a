"""Comparison: what two traces of the same tokens have in common, as tables and as a verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import moe_inspect.comparison.tables as _tables  # noqa: F401 (registers them)
from moe_inspect.comparison.data import TABLES, Options, PairData
from moe_inspect.comparison.loads.compare import LoadComparison
from moe_inspect.comparison.verdict import findings
from moe_inspect.errors import MoeInspectError
from moe_inspect.reporting.shown import Shown
from moe_inspect.reporting.verdict.findings import Finding
from moe_inspect.trace.reader import Trace, open_trace

if TYPE_CHECKING:
    from moe_inspect.reporting.charts.spec import Chart
    from moe_inspect.reporting.render.notebook import Cell

__all__ = ["TABLES", "Comparison", "compare"]


class Comparison(PairData, Shown):
    """`tables["agreement"]` and the others are DataFrames, computed when first asked for;
    `verdict()` is what they come to, in plain sentences. `print(comparison)` is one screen of
    it."""

    def __repr__(self) -> str:
        return (
            f"Comparison({str(self.a.path)!r}, {str(self.b.path)!r}, tables: {', '.join(TABLES)})"
        )

    def verdict(self) -> list[Finding]:
        """Whether it is the same routing, where it is not, and what to do: a Finding each, with a
        plain sentence in `text`; most important first."""
        return findings(self)

    def write_text(self, file: TextIO) -> None:
        from moe_inspect.comparison.text import print_comparison

        print_comparison(self, file)

    def charts(self) -> tuple[list[Chart], list[str]]:
        from moe_inspect.comparison.charts import draw_charts

        return draw_charts(self)

    def page(self) -> str:
        from moe_inspect.comparison.page import comparison_page

        return comparison_page(self)

    def cell(self) -> Cell:
        from moe_inspect.comparison.cells import comparison_cell

        return comparison_cell(self)


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
) -> Comparison | LoadComparison:
    """Compares the decisions of two traces, token by token: do they choose the same experts?

    Tokens are aligned by document, position and token id, or by the content of sequences where
    documents are numbered otherwise. `noise`: a second run of A, compared with A as what is no
    difference. `layers`, `domains`, `phase`: as in `report`, by A's names. `top`: rows of the
    tables of experts and documents, 0 for all. `shift_layers`: layer n of B is compared with
    n + shift_layers of A. `shift_positions`: tokens at position n of A are at n + shift_positions
    of B. `shift_routes`: the same of B's routes alone, not of its token ids. `drop_last`: without
    the last token of each sequence. `drop_zero_filled`: without tokens that one trace sends to
    expert 0 in every slot. `progress` is called with the number of decisions compared.
    MoeInspectError where the traces cannot be aligned.

    Where a trace holds counts only (`--counts-only`, the history of a training run), the load of
    the experts is compared, as a LoadComparison, also while the trace is still being written."""
    options = Options(
        layers,
        domains,
        phase,
        top,
        shift_layers,
        shift_positions,
        shift_routes,
        drop_last,
        drop_zero_filled,
    )
    first, second = opened(a), opened(b)
    if first.counts_only or second.counts_only:
        made = LoadComparison(first, second, options, progress)
        if noise is not None:
            raise MoeInspectError(f"{made.why}, which noise needs: leave it out")
        return made
    base = None if noise is None else PairData(first, opened(noise), options, progress=progress)
    return Comparison(first, second, options, noise=base, progress=progress)


def opened(trace: Trace | str | Path) -> Trace:
    return trace if isinstance(trace, Trace) else open_trace(trace)
