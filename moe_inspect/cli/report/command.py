"""The command: its options are checked, the report is built, then what was asked for is written."""

from __future__ import annotations

import os

import typer

from moe_inspect.cli.emit import Format, format_of
from moe_inspect.cli.help.complete import FOLDERS, tables_in
from moe_inspect.cli.options import TableCommand, with_options
from moe_inspect.cli.pictures import table_format
from moe_inspect.cli.progress import shown
from moe_inspect.cli.report.build import build, phases_of
from moe_inspect.cli.report.metrics import list_metrics
from moe_inspect.cli.report.options import ReportOptions
from moe_inspect.cli.report.request import requested
from moe_inspect.cli.report.write import write, write_files
from moe_inspect.text import print_stderr


@with_options(ReportOptions)
def report(options: ReportOptions) -> None:
    """Report load balance and expert specialisation.

    Which layers and experts are out of balance, compared with chance, and what each expert
    specialises in. Needs neither torch nor the model."""
    if options.list_metrics:
        form = table_format(options) or format_of(options.output) or Format.table
        list_metrics(form, options.output, options.safe_csv)
        return
    # before numpy is imported: with small matrices, threads of a BLAS mostly wait for each other
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    request = requested(options)
    from moe_inspect.trace.reader import open_trace

    trace = open_trace(request.trace)
    with shown(*phases_of(trace, request)):
        made, failed = build(trace, request)
        write_files(made, request)
    write(made, request)
    for line in failed:
        print_stderr(line)
    if failed:
        raise typer.Exit(3)


class ReportCommand(TableCommand):
    def tables_help(self) -> str:
        return (
            f"One table instead of the report: {', '.join(sorted(tables_in(*FOLDERS['report'])))}."
        )
