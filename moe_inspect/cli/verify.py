"""`moe-inspect verify`: checks a trace by the rules of its format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from moe_inspect.cli.emit import to_stdout
from moe_inspect.text import print_stderr, printable


def verify(
    trace: Annotated[
        Path, typer.Argument(metavar="TRACE", help="Directory of the trace.", show_default=False)
    ],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as one JSON object.")
    ] = False,
) -> None:
    """Check every file of a trace: checksums, ids, counts, order.

    Names the first violation by file and row, and exits with 1."""
    from moe_inspect.trace.verify import verify as check

    found = check(trace)
    with to_stdout():
        if as_json:
            print(json.dumps(found.record()))
        elif found.ok:
            state = {
                "complete": "is fine",
                "recording": "is still being written, and fine so far",
                "interrupted": (
                    f"was interrupted{' and can be resumed' if found.resumable else ''}; what is "
                    "committed is fine"
                ),
            }[found.status or "complete"]
            counts = (
                f"{found.tokens:,} tokens, {found.decisions:,} decisions, {found.assignments:,} "
                f"assignments in {found.shards} shards"
            )
            print(printable(f"{trace} {state}: {counts}"))
            print("\n".join(f"  {line}" for line in found.checked))
    if not found.ok:
        if not as_json:
            where = f"{trace / (found.file or '')}" + (
                f" row {found.row}" if found.row is not None else ""
            )
            print_stderr(f"error: {where}: {found.violation}")
        raise typer.Exit(1)
