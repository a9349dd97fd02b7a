"""`moe-inspect compare`: do two traces have the same routing?"""

from __future__ import annotations

from dataclasses import dataclass

from moe_inspect.cli.help import TABLES, traces
from moe_inspect.cli.options import (
    REQUIRED,
    GateOptions,
    Options,
    Scheduler,
    SelectionOptions,
    argument,
    exit_if_failed,
    limit,
    option,
)
from moe_inspect.cli.progress import shown
from moe_inspect.cli.show import ShowOptions, table_option
from moe_inspect.errors import MoeInspectError


@dataclass(frozen=True, kw_only=True)
class CompareOptions(ShowOptions):
    table: str | None = table_option(
        f"One table instead of the text: {TABLES['compare']}; for counts {TABLES['counts']}; "
        f"for two models {TABLES['models']}."
    )


@dataclass(frozen=True, kw_only=True)
class SelectionOfA(SelectionOptions):
    layers: list[str] | None = option("Only these layers of A, e.g. 0-3,7.", "LAYERS")


@dataclass(frozen=True, kw_only=True)
class PairOptions(Options):
    """How the decisions of two traces belong together."""

    panel = "Alignment"

    noise: str | None = option(
        "A second run of A: differences between these two runs are noise.",
        "TRACE",
        autocompletion=traces,
    )
    shift_layers: int = option("Compare layer n of B with layer n + N of A.", "N", default=0)
    shift_positions: int = option(
        "Tokens at position n of A are at position n + N of B.", "N", default=0
    )
    shift_routes: int = option(
        "The routes of B's token n + N are those of A's token n.", "N", default=0
    )
    drop_last: bool = option(
        "Leave out the last token of each sequence, which generation never feeds.", default=False
    )
    drop_zero_filled: bool = option(
        "Leave out tokens that one trace sends to expert 0 in every slot.", default=False
    )


@dataclass(frozen=True, kw_only=True)
class PairGates(GateOptions):
    fail_above: list[str] | None = limit(
        "Exit with 3 above: set_mismatch=0.01, tokens_mismatch=0.05."
    )
    fail_below: list[str] | None = limit("Exit with 3 below: overlap=0.99.")


def compare(
    *,
    a: str = argument(
        "A trace, or its URL (s3://…).", "A", autocompletion=traces, default=REQUIRED
    ),
    b: str = argument(
        "Another trace of the same tokens.", "B", autocompletion=traces, default=REQUIRED
    ),
    selection: SelectionOfA,
    pair: PairOptions,
    show: CompareOptions,
    scheduler: Scheduler = None,
    top: int = option(
        "Rows per router in flips, rows in documents and movers; 0 is all.", min=0, default=20
    ),
    limits: PairGates,
) -> None:
    """Compare the routing of two traces, token by token.

    Shows where they choose different experts, and whether rounding, another model or a misalignment
    explains it. Traces of counts are compared by load, two different models by their summaries.

    Examples:
    moe-inspect compare runs/bf16 runs/fp8
    moe-inspect compare runs/bf16 runs/fp8 --table flips --format csv
    moe-inspect compare runs/train runs/serve --fail-above set_mismatch=0.01"""
    from moe_inspect.comparison.compare import compare as compare_traces
    from moe_inspect.public import open_trace
    from moe_inspect.reporting.tables.registry import check_table
    from moe_inspect.reporting.verdict.gate import check_gates

    opened = [open_trace(path, scheduler=scheduler) for path in (a, b)]
    noise = pair.noise and open_trace(pair.noise, scheduler=scheduler)
    settings = {**selection.keywords(), **pair.keywords(), "noise": noise, "top": top}
    with shown():
        made = compare_traces(*opened, **settings)
        for name in (show.table, *limits.metrics):
            if name and (why := made.why_not(name)):
                raise MoeInspectError(why)
        tables = made.kind.tables
        table, _ = show.chosen(tables, made.main_table)
        check_table(table or made.main_table, tables)
        gates = limits.gates(tables)
        made.verdict()  # which counts
        result = check_gates(made, gates, tables)
    show.show(made)
    exit_if_failed(*result)
