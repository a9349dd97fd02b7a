"""The options of `moe-inspect report`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from moe_inspect.cli.emit import SafeCsv
from moe_inspect.cli.help.complete import metrics, tables, traces
from moe_inspect.cli.options import Domains, Html, Layers, OfPhase, Output, Scheduler
from moe_inspect.cli.pictures import FormatOfAny, Only, Plots, Width


class Simulated(StrEnum):
    capacity = "capacity"
    placement = "placement"
    decode = "decode"
    cache = "cache"
    routing = "routing"


@dataclass(frozen=True)
class ReportOptions:
    """As given on the command line."""

    trace: Annotated[
        str | None,
        typer.Argument(
            metavar="TRACE",
            autocompletion=traces,
            help="The directory of a trace, or its URL (s3://…).",
            show_default=False,
        ),
    ] = None
    full: Annotated[
        bool,
        typer.Option("--full", help="Print every finding and note, and excerpts of the tables."),
    ] = False
    table: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Print one table instead of the report.",
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
    simulate: Annotated[
        list[Simulated] | None,
        typer.Option(
            help="With --html: add a section with this simulation at its defaults.",
            show_default=False,
        ),
    ] = None
    text: Annotated[
        str | None,
        typer.Option(
            metavar="N|all",
            help=(
                "With --html: documents per domain to show in full; 0 is none. Default: those "
                "that differ most between domains, 1 MB in total."
            ),
            show_default=False,
        ),
    ] = None
    layers: Layers = None
    domain: Domains = None
    phase: OfPhase = None
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="TRACE",
            autocompletion=traces,
            help=(
                "A trace of an untrained or earlier model over the same text: say what "
                "specialisation is beyond it."
            ),
            show_default=False,
        ),
    ] = None
    top: Annotated[
        int,
        typer.Option(
            min=0,
            help=(
                "Token ids per expert in vocabulary, partners per expert in tables of pairs; 0 is "
                "all."
            ),
        ),
    ] = 20
    window: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens per window in the tables windows and drift (default: 1/64 of the trace).",
            show_default=False,
        ),
    ] = None
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="With --table worth: compute AIMER from these weights, a directory or a hub id.",
            show_default=False,
        ),
    ] = None
    threshold: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="A threshold of the verdict, e.g. uneven=0.3 (summary lists them).",
            show_default=False,
        ),
    ] = None
    fail_above: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METRIC=VALUE",
            autocompletion=metrics,
            help="Exit with 3 if the metric of any selected router is above.",
            show_default=False,
        ),
    ] = None
    fail_below: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METRIC=VALUE",
            autocompletion=metrics,
            help="Exit with 3 if the metric of any selected router is below.",
            show_default=False,
        ),
    ] = None
    rules: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help=(
                "Exit with 3 if any window breaks a rule of this file, one per line, e.g. max_vio "
                "> 1 for 3 windows."
            ),
            show_default=False,
        ),
    ] = None
    list_metrics: Annotated[
        bool, typer.Option("--list-metrics", help="List every metric: definition, range, source.")
    ] = False
    scheduler: Scheduler = None
