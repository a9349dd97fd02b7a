"""`moe-inspect report`: what a trace says, in words, tables or pictures."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from moe_inspect.cli.emit import Format, emit, format_of, text_to


class Phase(StrEnum):
    prefill = "prefill"
    decode = "decode"


def report(
    trace: Annotated[Path, typer.Argument(help="The directory of a trace.", show_default=False)],
    table: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="One table instead of the report: summary, balance, load, domains, specialization or vocabulary.",
            show_default=False,
        ),
    ] = None,
    format: Annotated[
        Format | None,
        typer.Option(
            help="Of the table; json is one object a line. By default what the file's ending says, else table.", show_default=False
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write to this file instead of stdout.", show_default=False)] = None,
    plots: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also write pictures (PNG) into this directory.", show_default=False)
    ] = None,
    layers: Annotated[str | None, typer.Option(help="Only these layers, e.g. 0-3,7.", show_default=False)] = None,
    domain: Annotated[
        list[str] | None, typer.Option(help="Only tokens of this domain; repeated or comma-separated.", show_default=False)
    ] = None,
    phase: Annotated[Phase | None, typer.Option(help="Only prompt tokens, or only generated ones.", show_default=False)] = None,
    top: Annotated[int, typer.Option(min=0, help="Token ids an expert in the vocabulary table; 0 is all.")] = 20,
) -> None:
    """Say where the tokens went: balance, and what each expert takes.

    Which layers and experts are out of balance, against what chance gives, and what each expert specialises in. Needs neither
    torch nor the model."""
    ending = format_of(output)
    if table is None and (format or ending or Format.table) is not Format.table:
        from moe_inspect.report.tables import TABLES

        asked = f"--format {format}" if format else f"-o {output}"
        raise typer.BadParameter(f"{asked} is of one table: add --table {', '.join(TABLES)}")
    if table and not format and not ending:
        raise typer.BadParameter(f"-o {output}: no format goes by this ending, add --format {', '.join(Format)}")
    from moe_inspect.report.report import report as make
    from moe_inspect.report.terminal import print_report

    domains = [label for value in domain or [] for label in value.split(",")]
    with _progress() as progress:
        made = make(trace, layers=layers, domains=domains, phase=phase and phase.value, top=top, progress=progress)
        for name in [table] if table else ("balance", "specialization"):  # what has something to count
            made.tables[name]
    if made.warning:
        print(f"warning: {made.warning}", file=sys.stderr)
    if plots is not None:
        from moe_inspect.report.plots import write_plots

        for path in write_plots(made, plots):
            print(f"wrote {path}", file=sys.stderr)
    if table:
        emit(made.tables[table], format or ending or Format.table, output)
        return
    with text_to(output) as file:
        print_report(made, file)


@contextmanager
def _progress() -> Iterator[Callable[[int], None] | None]:
    """Decisions read so far, on a terminal: each once for the load and once more where token ids count."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.completed:,.0f} decisions read"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("")
        yield lambda decisions: bar.advance(task, decisions)
