"""`moe-inspect verify`: checks a trace by the rules of its format."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from moe_inspect.cli.emit import to_stdout
from moe_inspect.cli.help.complete import traces
from moe_inspect.cli.progress import shown
from moe_inspect.cli.progress.phases import VERIFYING
from moe_inspect.text import print_stderr


def verify(
    trace: Annotated[
        str,
        typer.Argument(
            metavar="TRACE",
            help="Directory or URL of the trace.",
            show_default=False,
            autocompletion=traces,
        ),
    ],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as one JSON object.")
    ] = False,
) -> None:
    """Check every file of a trace: checksums, ids, counts, order.

    Names the first violation by file and row, and exits with 1."""
    from moe_inspect.trace.verify import verify as check

    with shown(*VERIFYING):
        found = check(trace)
    with to_stdout():
        if as_json:
            print(json.dumps(found.record()))
        elif found.ok:
            print(found)
    if not found.ok:
        if not as_json:
            print_stderr(f"error: {found}")
        raise typer.Exit(1)
