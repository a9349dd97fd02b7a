"""`moe-inspect atlas`: a static site of many traces."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from moe_inspect.cli.help.complete import traces as complete
from moe_inspect.cli.progress import shown
from moe_inspect.cli.progress.phases import site_of
from moe_inspect.cli.report.request import amount_of_text
from moe_inspect.text import plural, print_stderr


def atlas(
    traces: Annotated[
        list[str],
        typer.Argument(
            metavar="TRACE...",
            help="Directories of the traces, in the order of the index.",
            show_default=False,
            autocompletion=complete,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            metavar="DIR",
            help="Directory of the site; open its index.html, or copy it to any web server.",
            show_default=False,
        ),
    ],
    text: Annotated[
        str,
        typer.Option(
            metavar="N|all",
            help="Documents per domain to show in full on each page; 0 is none.",
        ),
    ] = "1",
    add: Annotated[
        bool,
        typer.Option(
            "--add",
            help="Keep existing pages. Otherwise, pages of traces that are not named are removed.",
        ),
    ] = False,
) -> None:
    """Build a static site: one page per trace, and an index.

    The index compares their models and can be searched by expert, domain and token. Pages of
    unchanged traces are kept. Needs neither torch nor a server."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as in `report`
    amount = amount_of_text(text)
    from moe_inspect.site import atlas as run
    from moe_inspect.trace.reader import open_trace

    opened = [open_trace(path) for path in traces]
    for path, trace in zip(traces, opened, strict=True):
        if trace.status != "complete":
            print_stderr(f"warning: {path} is not complete (status {trace.status})")
    with shown(*site_of(opened)):
        table = run(opened, output, text=amount, add=add)
    made = int(table["made"].sum())
    print_stderr(
        f"wrote {output / 'index.html'}: {plural(len(table), 'trace')}, "
        f"{plural(made, 'page')} made, {len(table) - made} kept"
    )
