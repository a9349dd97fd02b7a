"""`moe-inspect verify`: whether a trace is what it says."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from moe_inspect.cli.emit import quiet_pipe


def verify(
    trace: Annotated[Path, typer.Argument(help="The directory of a trace.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Check the invariants of a trace, ours or imported.

    Names the first violation by file and row, and exits with 1."""
    from moe_inspect.trace.verify import verify as check

    found = check(trace)
    with quiet_pipe():
        if as_json:
            print(json.dumps(found.record(), ensure_ascii=False))
        elif found.ok:
            print(
                f"{trace} is fine: {found.tokens:,} tokens, {found.decisions:,} decisions, {found.assignments:,} assignments in {found.shards} shards"
            )
            print("\n".join(f"  {line}" for line in found.checked))
        sys.stdout.flush()
    if not found.ok:
        if not as_json:
            where = f"{trace / (found.file or '')}" + (f" row {found.row}" if found.row is not None else "")
            print(f"error: {where}: {found.violation}", file=sys.stderr)
        raise typer.Exit(1)
