"""`moe-inspect sql`: a trace asked in SQL."""

from __future__ import annotations

from typing import Annotated

import typer

from moe_inspect.cli.emit import Format, SafeCsv, emit, format_of
from moe_inspect.cli.help.complete import traces
from moe_inspect.cli.options import Output


def sql(
    trace: Annotated[
        str,
        typer.Argument(metavar="TRACE", help="Directory or URL of a trace.", autocompletion=traces),
    ],
    query: Annotated[
        str,
        typer.Argument(
            metavar="QUERY",
            help="A DuckDB SELECT over the views routing (a row per assignment), tokens, "
            "documents, vocabulary and load.",
        ),
    ],
    format: Annotated[
        Format | None,
        typer.Option(help="Default: by the ending of the file, else a table.", show_default=False),
    ] = None,
    output: Output = None,
    safe_csv: SafeCsv = False,
) -> None:
    """Query a trace in SQL (DuckDB), read-only."""
    form = format or format_of(output)
    if form is None:
        raise typer.BadParameter(f"--output {output}: end it in .txt, .csv, .json or .parquet")
    from moe_inspect.query import sql as ask

    emit(ask(trace, query), form, output, safe_csv)
