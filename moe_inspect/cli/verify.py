"""`moe-inspect verify`: whether a trace is what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from moe_inspect.cli.emit import to_stdout
from moe_inspect.text import printable, say


def verify(
    trace: Annotated[Path, typer.Argument(help="The directory of a trace.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Check the invariants of a trace, ours or imported.

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
            say(f"error: {where}: {found.violation}")
        raise typer.Exit(1)
