"""`moe-inspect report`: what a trace says, as text, tables, pictures or a page.

The options are checked (`_request`), the report is built (`_build`), then what was asked for is
written (`_write`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperOption

from moe_inspect.cli.emit import Format, SafeCsv, emit, format_of, text_to
from moe_inspect.errors import MoeInspectError
from moe_inspect.text import print_stderr

if TYPE_CHECKING:
    import pandas as pd

    from moe_inspect.reporting.render.html import Section
    from moe_inspect.reporting.report import Report
    from moe_inspect.reporting.verdict.gate import Gate


class Phase(StrEnum):
    prefill = "prefill"
    decode = "decode"
    encoder = "encode"


class Simulated(StrEnum):
    capacity = "capacity"
    placement = "placement"
    decode = "decode"
    cache = "cache"
    routing = "routing"


@dataclass(frozen=True)
class Request:
    """What was asked for, checked. selection: the arguments of `moe_inspect.report`."""

    trace: str
    table: str | None
    format: Format
    output: Path | None
    safe_csv: bool
    plots: Path | None
    html: Path | None
    simulate: Sequence[Simulated]
    selection: dict[str, Any]
    gates: Sequence[Gate]


def report(
    trace: Annotated[
        str | None,
        typer.Argument(help="The directory of a trace, or its URL (s3://…).", show_default=False),
    ] = None,
    table: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="One table instead of the report.", show_default=False),
    ] = None,
    format: Annotated[
        Format | None,
        typer.Option(
            help=(
                "Format of the table; json is one object per line. By default from the file's "
                "ending, else table."
            ),
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help="Write to this file instead of stdout.", show_default=False
        ),
    ] = None,
    safe_csv: SafeCsv = False,
    plots: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Also write pictures (PNG and SVG) into this directory.",
            show_default=False,
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Also write a self-contained page that opens in any browser.",
            show_default=False,
        ),
    ] = None,
    simulate: Annotated[
        list[Simulated] | None,
        typer.Option(
            help="With --html: add a section with this simulation at its defaults; repeatable.",
            show_default=False,
        ),
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Only these layers, e.g. 0-3,7.", show_default=False)
    ] = None,
    domain: Annotated[
        list[str] | None,
        typer.Option(
            help="Only tokens of this domain; repeatable or comma-separated.", show_default=False
        ),
    ] = None,
    phase: Annotated[
        Phase | None,
        typer.Option(
            help="Only prompt tokens (prefill), generated ones (decode), or an encoder's (encode).",
            show_default=False,
        ),
    ] = None,
    top: Annotated[
        int,
        typer.Option(
            min=0,
            help=(
                "Token ids per expert in vocabulary, partners per expert in tables of pairs; 0 is "
                "all."
            ),
        ),
    ] = 20,
    window: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens per window in windows and drift; by default a 64th of the trace.",
            show_default=False,
        ),
    ] = None,
    threshold: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="A threshold of the verdict, e.g. uneven=0.3 (summary lists them); repeatable.",
            show_default=False,
        ),
    ] = None,
    fail_above: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METRIC=VALUE",
            help="Exit with 3 if the metric of any selected router is above; repeatable.",
            show_default=False,
        ),
    ] = None,
    fail_below: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METRIC=VALUE",
            help="Exit with 3 if the metric of any selected router is below; repeatable.",
            show_default=False,
        ),
    ] = None,
    list_metrics: Annotated[
        bool, typer.Option("--list-metrics", help="List every metric: definition, range, source.")
    ] = False,
    scheduler: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Count on this dask.distributed cluster, except what is by token id.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Report load balance and expert specialisation.

    Which layers and experts are out of balance, compared with chance, and what each expert
    specialises in. Needs neither torch nor the model."""
    if list_metrics:
        emit(_metrics(), format or format_of(output) or Format.table, output, safe_csv)
        return
    if trace is None:
        raise typer.BadParameter("give the directory of a trace", param_hint="TRACE")
    if simulate and (html is None or domain or phase):
        raise typer.BadParameter(
            "--simulate takes all tokens and adds to a page: give it with --html, without --domain "
            "and --phase"
        )
    request = Request(
        trace=trace,
        table=table,
        format=_format(table, format, output),
        output=output,
        safe_csv=safe_csv,
        plots=plots,
        html=html,
        simulate=simulate or [],
        selection={
            "layers": layers,
            "domains": [label for value in domain or [] for label in value.split(",")],
            "phase": phase and phase.value,
            "top": top,
            "window": window,
            "thresholds": dict(_threshold(text) for text in threshold or []),
            "scheduler": scheduler,
        },
        gates=[*_gates(fail_above, above=True), *_gates(fail_below, above=False)],
    )
    made, breached = _build(request)
    _write(made, request)
    for line in breached:
        print_stderr(f"failed: {line}")
    if breached:
        raise typer.Exit(3)


class ReportCommand(TyperCommand):
    """Names the tables of the registry in the help of --table, which takes pandas: only then."""

    def __init__(self, *arguments: Any, **settings: Any):
        super().__init__(*arguments, **settings)
        for option in self.params:
            if option.name == "table":
                table: Any = option
                table.get_help_record = partial(_table_help, option)


def _table_help(option: Any, ctx: Any) -> tuple[str, str] | None:
    from moe_inspect.reporting.report import TABLES

    option.help = f"One table instead of the report: {', '.join(TABLES)}."

    return TyperOption.get_help_record(option, ctx)


# --- checking the options


def _format(table: str | None, form: Format | None, output: Path | None) -> Format:
    """The format asked for, else that of the file's ending. Raises where there is no such table."""
    ending = format_of(output)
    if table:
        from moe_inspect.reporting.report import check_table

        check_table(table)
    if table and not form and not ending:
        raise typer.BadParameter(
            f"-o {output}: no format has this ending, add --format {', '.join(Format)}"
        )
    chosen = form or ending or Format.table
    if table is None and chosen is not Format.table:
        from moe_inspect.reporting.report import TABLES

        asked = f"--format {form}" if form else f"-o {output}"
        raise typer.BadParameter(f"{asked} needs one table: add --table {', '.join(TABLES)}")
    return chosen


def _threshold(text: str) -> tuple[str, float]:
    from moe_inspect.reporting.tables.thresholds import thresholds_with

    name, _, value = (part.strip() for part in text.partition("="))
    try:
        thresholds_with({name: float(value)})
    except ValueError:
        reason = "expected NAME=VALUE, e.g. uneven=0.3"
    except MoeInspectError as error:
        reason = str(error)
    else:
        return name, float(value)
    raise typer.BadParameter(f"--threshold {text}: {reason}")


def _gates(texts: list[str] | None, above: bool) -> list[Gate]:
    if not texts:
        return []
    from moe_inspect.reporting.verdict.gate import gate

    try:
        return [gate(text, above) for text in texts]
    except MoeInspectError as error:
        option = "--fail-above" if above else "--fail-below"
        raise typer.BadParameter(f"{option}: {error}") from None


# --- building the report


def _build(request: Request) -> tuple[Report, list[str]]:
    """The report with everything counted that was asked for, and the gates that failed."""
    from moe_inspect.reporting.report import report as make
    from moe_inspect.reporting.verdict.gate import breaches, gated

    with _progress() as progress:
        made = make(request.trace, progress=progress, **request.selection)
        tables = [request.table] if request.table else _tables_of_text(made)
        made.prepare([*tables, *(gated()[gate.metric] for gate in request.gates)])
        for name in tables:  # what is counted when it is asked for
            made.tables[name]
        return made, breaches(made, request.gates)


def _tables_of_text(made: Report) -> list[str]:
    return ["balance", "specialization", *(["router"] if made.trace.has_weights else [])]


@contextmanager
def _progress() -> Generator[Callable[[int], None] | None]:
    """Decisions read so far, on a terminal: each once for the load and once more where token ids
    count."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.completed:,.0f} decisions read"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("")
        yield lambda decisions: bar.advance(task, decisions)


# --- writing what was asked for


def _write(made: Report, request: Request) -> None:
    if made.warning:
        print_stderr(f"warning: {made.warning}")
    if request.plots is not None:
        from moe_inspect.reporting.render.matplotlib import write_pictures

        for path in write_pictures(made, request.plots):
            print_stderr(f"wrote {path}")
    if request.html is not None:
        from moe_inspect.reporting.render.html import write_page
        from moe_inspect.reporting.render.page import report_page

        simulated = _simulated(made, request.simulate, request.selection["layers"])
        write_page(request.html, report_page(made, simulated))
        print_stderr(f"wrote {request.html}")
    if request.table:
        table = _table(made, request.table, request.format)
        emit(table, request.format, request.output, request.safe_csv)
    else:
        from moe_inspect.reporting.render.terminal import print_report

        with text_to(request.output) as file:
            print_report(made, file)


def _table(made: Report, name: str, form: Format) -> pd.DataFrame:
    if name == "verdict" and form is Format.json:  # which alone can hold the numbers of a finding
        from moe_inspect.reporting.verdict.checks import verdict_table

        return verdict_table(made.verdict(), values=True)
    return made.tables[name]


def _simulated(
    made: Report, names: Sequence[Simulated], layers: str | None
) -> Iterator[Section | str]:
    """A section per simulation, or why the trace has none to give."""
    import moe_inspect
    from moe_inspect.simulate.page import section

    for name in dict.fromkeys(names):
        try:
            limits = {"uneven": made.thresholds.uneven} if name is Simulated.routing else {}
            simulate = getattr(moe_inspect, f"simulate_{name}")
            yield section(simulate(made.trace, layers=layers, **limits))
        except MoeInspectError as error:
            yield str(error)


def _metrics() -> pd.DataFrame:
    import pandas as pd

    from moe_inspect.analysis.metrics.registry import listing

    return pd.DataFrame(listing())
