"""Writes a comparison: as text or one table, with pictures and a page where they were asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import typer

from moe_inspect.cli.compare.options import CompareOptions
from moe_inspect.cli.emit import Format, emit, format_of, text_to
from moe_inspect.cli.pictures import save_pictures, table_format
from moe_inspect.cli.report.write import table_of
from moe_inspect.errors import MoeInspectError
from moe_inspect.text import print_stderr

if TYPE_CHECKING:
    from moe_inspect.comparison.checkpoints import Checkpoints
    from moe_inspect.comparison.compare import Comparison, LoadComparison
    from moe_inspect.comparison.models.compare import ModelComparison
    from moe_inspect.reporting.tables.registry import Table
    from moe_inspect.reporting.verdict.gate import Gate

    Made = Comparison | LoadComparison | ModelComparison | Checkpoints


@dataclass(frozen=True)
class Request:
    """What was asked for, checked. table: None for the text."""

    table: str | None
    format: Format
    gates: Sequence[Gate]
    options: CompareOptions


def requested(options: CompareOptions, tables: Mapping[str, Table], main: str) -> Request:
    """Raises a usage error where the options do not go together. main: the table that a format
    alone asks for."""
    from moe_inspect.reporting.tables.registry import check_table

    form = table_format(options) or format_of(options.output)
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
        return [gate(text, above, tables) for text in texts or []]
    except MoeInspectError as error:
        raise typer.BadParameter(f"{option}: {error}") from None


def write_files(made: Made, options: CompareOptions) -> None:
    """The pictures and the page."""
    save_pictures(made, options)
    if options.html is not None:
        print_stderr(f"wrote {made.to_html(options.html)}")


def write(made: Made, request: Request, tables: Mapping[str, Table]) -> None:
    """Writes the text or the table; exits with 3 where a gate failed."""
    from moe_inspect.reporting.verdict.gate import breaches

    options, breached = request.options, breaches(made, request.gates, tables)
    if request.table is None:
        with text_to(options.output) as file:
            made.write_text(file)
    else:
        table = table_of(made, request.table, request.format)
        emit(table, request.format, options.output, options.safe_csv)
    for line in breached:
        print_stderr(f"failed: {line}")
    if breached:
        raise typer.Exit(3)
