"""`moe-inspect export`: a trace for tools that read something else."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Export(StrEnum):
    sglang = "sglang"
    esft = "esft"
    counts = "counts"
    long_parquet = "long-parquet"


def export(
    trace: Annotated[Path, typer.Argument(help="The directory of a trace.", show_default=False)],
    format: Annotated[Export, typer.Option(help="For which tool.", show_default=False)],
    output: Annotated[Path, typer.Option("-o", "--output", help="The file, or of esft the folder.", show_default=False)],
) -> None:
    """Write a trace as other tools read it.

    sglang: a JSON for --init-expert-location; esft: folders for its config generator; counts: load by expert and domain (.csv, .json,
    .parquet); long-parquet: a row an assignment."""
    from moe_inspect.trace.export import export_trace

    print(f"wrote {export_trace(trace, format.value, output)}", file=sys.stderr)
