"""What the commands of `simulate` share: options, lists of numbers, and how a simulation is
shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from moe_inspect.cli.emit import Format, SafeCsv, emit, format_of, text_to
from moe_inspect.cli.help.complete import traces
from moe_inspect.cli.options import Output, Scheduler
from moe_inspect.cli.pictures import (
    FormatOfAny,
    Only,
    Plots,
    Width,
    save_pictures,
    table_format,
)
from moe_inspect.text import no_such, print_stderr

if TYPE_CHECKING:
    from moe_inspect.simulate.result import Simulation
    from moe_inspect.trace.reader import Trace

N = TypeVar("N", int, float)

TraceArgument = Annotated[
    str,
    typer.Argument(
        metavar="TRACE",
        help="The directory of a trace, or its URL (s3://…).",
        show_default=False,
        autocompletion=traces,
    ),
]


@dataclass(frozen=True)
class ShowOptions:
    """Where a simulation runs and how it is shown."""

    scheduler: Scheduler = None
    table: Annotated[
        str | None,
        typer.Option(
            "--table",
            metavar="NAME",
            help="Print this table instead of the summary.",
            show_default=False,
        ),
    ] = None
    format: FormatOfAny = None
    output: Output = None
    safe_csv: SafeCsv = False
    plots: Plots = None
    only: Only = None
    width: Width = None
    html: Annotated[
        Path | None,
        typer.Option(
            "--html",
            metavar="FILE",
            help="Also write an HTML page of the summary, the chart and the tables.",
            show_default=False,
        ),
    ] = None


def opened(trace: str, options: ShowOptions) -> Trace:
    from moe_inspect.trace.reader import open_trace

    return open_trace(trace, scheduler=options.scheduler)


def numbers(values: Sequence[str], option: str, kind: type[N], least: float = 1) -> list[N]:
    """["1", "8"] → [1, 8], each at least `least`; what is no such number is a usage error that
    names the option."""
    found: list[N] = []
    for text in values:
        try:
            found.append(kind(text))
        except ValueError:
            raise typer.BadParameter(
                f"{option}: {text!r} is not a {'whole ' if kind is int else ''}number"
            ) from None
        if not found[-1] >= least:
            raise typer.BadParameter(f"{option}: {text} is below {least:g}")
    return found


def show(simulation: Simulation, options: ShowOptions) -> None:
    """The verdict and the tables as text; or one table, where --table, --format or the ending of
    the file asks for it."""
    table, format, output = options.table, table_format(options), options.output
    ending = format_of(output)
    main = next(iter(simulation.tables))
    if table is not None and table not in simulation.tables:
        raise typer.BadParameter(no_such("table", table, simulation.tables))
    if output is not None and format is None and ending is None:
        raise typer.BadParameter(
            f"-o {output}: no format has this ending, add --format {', '.join(Format)}"
        )
    save_pictures(simulation, options)
    if options.html is not None:
        print_stderr(f"wrote {simulation.to_html(options.html)}")
    if table or format or ending is not Format.table:
        form = format or ending or Format.table
        emit(simulation.tables[table or main], form, output, options.safe_csv)
        return
    with text_to(output) as file:
        simulation.write_text(file)
