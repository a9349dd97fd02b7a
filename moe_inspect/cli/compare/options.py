"""The options of `moe-inspect compare`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from moe_inspect.cli.emit import SafeCsv
from moe_inspect.cli.help.complete import metrics, tables, traces
from moe_inspect.cli.options import Domains, Html, OfPhase, Output, Scheduler
from moe_inspect.cli.pictures import FormatOfAny, Only, Plots, Width

TraceA = Annotated[
    str,
    typer.Argument(
        metavar="A", help="A trace, or its URL (s3://…).", show_default=False, autocompletion=traces
    ),
]
TraceB = Annotated[
    str,
    typer.Argument(
        metavar="B",
        help="Another trace of the same tokens.",
        show_default=False,
        autocompletion=traces,
    ),
]
Traces = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="C",
        autocompletion=traces,
        help="Further checkpoints, in training order; each is compared with the last.",
        show_default=False,
    ),
]


@dataclass(frozen=True)
class CompareOptions:
    """As given on the command line."""

    noise: Annotated[
        str | None,
        typer.Option(
            metavar="TRACE",
            autocompletion=traces,
            help="A second run of A: differences between these two runs are noise.",
            show_default=False,
        ),
    ] = None
    table: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Print one table instead of the text.",
            show_default=False,
            autocompletion=tables,
        ),
    ] = None
    format: FormatOfAny = None
    output: Output = None
    safe_csv: SafeCsv = False
    plots: Plots = None
    only: Only = None
    width: Width = None
    html: Html = None
    scheduler: Scheduler = None
    layers: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LAYERS", help="Only these layers of A, e.g. 0-3,7.", show_default=False
        ),
    ] = None
    domain: Domains = None
    phase: OfPhase = None
    top: Annotated[
        int,
        typer.Option(
            min=0,
            help=(
                "Rows per router in flips, rows in documents and movers, texts per expert in "
                "vocabulary; 0 is all."
            ),
        ),
    ] = 20
    shift_layers: Annotated[
        int, typer.Option(metavar="N", help="Compare layer n of B with layer n + N of A.")
    ] = 0
    shift_positions: Annotated[
        int,
        typer.Option(metavar="N", help="Tokens at position n of A are at position n + N of B."),
    ] = 0
    shift_routes: Annotated[
        int,
        typer.Option(metavar="N", help="The routes of B's token n + N are those of A's token n."),
    ] = 0
    drop_last: Annotated[
        bool,
        typer.Option(
            "--drop-last",
            help="Leave out the last token of each sequence, which generation never feeds.",
        ),
    ] = False
    drop_zero_filled: Annotated[
        bool,
        typer.Option(
            "--drop-zero-filled",
            help="Leave out tokens that one trace sends to expert 0 in every slot.",
        ),
    ] = False
    fail_above: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METRIC=VALUE",
            autocompletion=metrics,
            help=(
                "Exit with 3 if the metric of any router, or of all tokens, is above: "
                "set_mismatch=0.01, tokens_mismatch=0.05, loss_difference_nats=0.01."
            ),
            show_default=False,
        ),
    ] = None
    fail_below: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METRIC=VALUE",
            autocompletion=metrics,
            help="Exit with 3 if the metric is below: overlap=0.99.",
            show_default=False,
        ),
    ] = None
