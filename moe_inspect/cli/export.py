"""`moe-inspect export`: a trace for tools that read something else."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from moe_inspect.cli.emit import SafeCsv
from moe_inspect.text import say


class Score(StrEnum):
    token = "token"
    gate = "gate"


class Export(StrEnum):
    sglang = "sglang"
    esft = "esft"
    counts = "counts"
    long_parquet = "long-parquet"


def export(
    trace: Annotated[Path, typer.Argument(help="The directory of a trace.", show_default=False)],
    format: Annotated[Export, typer.Option(help="For which tool.", show_default=False)],
    output: Annotated[
        Path,
        typer.Option("-o", "--output", help="The file, or of esft the folder.", show_default=False),
    ],
    top_p: Annotated[
        float | None,
        typer.Option(
            help=(
                "esft: train the fewest experts of each layer whose scores sum to this share. "
                "Default: 0.2."
            ),
            show_default=False,
        ),
    ] = None,
    score: Annotated[
        Score | None,
        typer.Option(
            help="esft: share of the assignments (token) or of the gate weight. Default: token.",
            show_default=False,
        ),
    ] = None,
    safe_csv: SafeCsv = False,
) -> None:
    """Write a trace as other tools read it.

    sglang: the load, for --init-expert-location of SGLang and ktransformers (.pt, .json); esft: per
    domain the expert weights, scores and training configuration; counts: load by expert and domain
    (.csv, .json, .parquet); long-parquet: one row per assignment."""
    from moe_inspect.exporters.run import export_trace

    made = export_trace(
        trace, format.value, output, top_p=top_p, score=score and score.value, safe_csv=safe_csv
    )
    say(f"wrote {made}")
