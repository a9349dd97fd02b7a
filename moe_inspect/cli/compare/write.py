"""Writes a comparison: as text or one table, with pictures and a page where they were asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TextIO

import typer

from moe_inspect.cli.compare.options import CompareOptions
from moe_inspect.cli.emit import Format, emit, format_of, text_to
from moe_inspect.cli.report.write import table_of
from moe_inspect.errors import MoeInspectError
from moe_inspect.text import print_stderr

if TYPE_CHECKING:
    import pandas as pd

    from moe_inspect.reporting.charts.spec import Chart
    from moe_inspect.reporting.tables.registry import Table
    from moe_inspect.reporting.verdict.findings import Finding
    from moe_inspect.reporting.verdict.gate import Gate
    from moe_inspect.trace.reader import Trace


class Made(Protocol):
    """A comparison of two traces, or of several."""

    @property
    def tables(self) -> Mapping[str, pd.DataFrame]: ...
    @property
    def trace(self) -> Trace: ...
    def verdict(self) -> list[Finding]: ...


@dataclass(frozen=True)
class Request:
    """What was asked for, checked. table: None for the text."""

    table: str | None
    format: Format
    gates: Sequence[Gate]
    options: CompareOptions


@dataclass(frozen=True)
class Shown:
    """How a comparison is shown."""

    text: Callable[[TextIO], None]
    charts: Callable[[], list[Chart]]
    page: Callable[[], str]


def requested(options: CompareOptions, tables: Mapping[str, Table], main: str) -> Request:
    """Raises a usage error where the options do not go together. main: the table that a format
    alone asks for."""
    from moe_inspect.reporting.tables.registry import check_table

    form = options.format or format_of(options.output)
    if form is None:
        raise typer.BadParameter(
            f"-o {options.output}: no format has this ending, add --format {', '.join(Format)}"
        )
    if options.table:
        check_table(options.table, tables)
    table = options.table or (None if form is Format.table else main)
    gates = [
        *_gates(options.fail_above, True, tables),
        *_gates(options.fail_below, False, tables),
    ]
    return Request(table, form, gates, options)


def _gates(texts: list[str] | None, above: bool, tables: Mapping[str, Table]) -> list[Gate]:
    from moe_inspect.reporting.verdict.gate import gate

    option = "--fail-above" if above else "--fail-below"
    try:
        return [gate(text, above, tables) for value in texts or [] for text in value.split(",")]
    except MoeInspectError as error:
        raise typer.BadParameter(f"{option}: {error}") from None


def write(made: Made, request: Request, shown: Shown, tables: Mapping[str, Table]) -> None:
    """Writes what was asked for; exits with 3 where a gate failed."""
    from moe_inspect.reporting.verdict.gate import breaches

    options, breached = request.options, breaches(made, request.gates, tables)
    if options.plots is not None:
        from moe_inspect.reporting.render.matplotlib import write_charts

        for path in write_charts(shown.charts(), options.plots):
            print_stderr(f"wrote {path}")
    if options.html is not None:
        from moe_inspect.reporting.render.html import write_page

        write_page(options.html, shown.page())
        print_stderr(f"wrote {options.html}")
    if request.table is None:
        with text_to(options.output) as file:
            shown.text(file)
    else:
        table = table_of(made, request.table, request.format)
        emit(table, request.format, options.output, options.safe_csv)
    for line in breached:
        print_stderr(f"failed: {line}")
    if breached:
        raise typer.Exit(3)
