"""Several traces of one text, in the order of training: when does the routing settle?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from moe_inspect.comparison.checkpoints_data import (
    CHECKPOINT_TABLES,
    CheckpointData,
    saturation_chart,
)
from moe_inspect.comparison.compare import Comparison
from moe_inspect.comparison.data import Options
from moe_inspect.errors import MoeInspectError
from moe_inspect.reporting.shown import Shown
from moe_inspect.trace.reader import Trace, open_trace

if TYPE_CHECKING:
    from moe_inspect.reporting.charts.spec import Chart
    from moe_inspect.reporting.render.notebook import Cell

__all__ = ["CHECKPOINT_TABLES", "Checkpoints", "compare_checkpoints"]


class Checkpoints(CheckpointData, Shown):
    """`tables["saturation"]` and the others are DataFrames, computed when first asked for;
    `verdict()` is what they come to. `print(checkpoints)` is one screen of it."""

    def __repr__(self) -> str:
        return f"Checkpoints({self.names}, tables: {', '.join(CHECKPOINT_TABLES)})"

    def write_text(self, file: TextIO) -> None:
        from moe_inspect.comparison.text import print_checkpoints

        print_checkpoints(self, file)

    def charts(self) -> tuple[list[Chart], list[str]]:
        return [saturation_chart(self)], []

    def page(self) -> str:
        from moe_inspect.comparison.page import checkpoints_page

        return checkpoints_page(self)

    def cell(self) -> Cell:
        from moe_inspect.comparison.cells import checkpoints_cell

        return checkpoints_cell(self)


def compare_checkpoints(
    traces: Sequence[Trace | str | Path],
    *,
    layers: str | int | Iterable[int | str] | None = None,
    domains: str | Iterable[str] | None = None,
    phase: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> Checkpoints:
    """Compares traces of checkpoints, given in the order of training, each with the last.

    The traces are of the same text, by models of the same shape. `layers`, `domains`, `phase`: as
    in `report`. `progress` is called with the number of decisions compared. MoeInspectError where
    traces cannot be aligned."""
    if len(traces) < 2:
        raise MoeInspectError("give two or more checkpoints, in training order")
    opened = [x if isinstance(x, Trace) else open_trace(x) for x in traces]
    settings: dict[str, Any] = {"layers": layers, "domains": domains, "phase": phase}
    for trace in opened:
        if trace.counts_only:
            raise MoeInspectError(
                f"{trace.path} holds counts only, no decisions: give two traces, whose load can be "
                "compared"
            )
    made = [Comparison(x, opened[-1], Options(**settings), progress=progress) for x in opened[:-1]]
    return Checkpoints(made)
