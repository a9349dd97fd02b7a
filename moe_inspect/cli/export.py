"""`moe-inspect export`: a trace as the file of another tool."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_inspect.cli.emit import SafeCsv
from moe_inspect.cli.experts.options import By
from moe_inspect.cli.formats import FormatsCommand
from moe_inspect.cli.help.complete import traces
from moe_inspect.exporters import MODULES
from moe_inspect.text import print_stderr

if TYPE_CHECKING:
    ExportFormat = ExportBy = StrEnum
else:
    ExportFormat = StrEnum("ExportFormat", {name: name for name in MODULES})
    # "token" is ESFT's own name of frequency
    ExportBy = StrEnum("ExportBy", {by: by for by in (*By, "token") if by != By.random})


class ExportCommand(FormatsCommand):
    def formats(self) -> dict[str, str]:
        from moe_inspect.exporters.registry import exporters

        return {name: exporter.writes for name, exporter in exporters().items()}


def export(
    trace: Annotated[
        str,
        typer.Argument(
            metavar="TRACE",
            help="Directory or URL of the trace.",
            show_default=False,
            autocompletion=traces,
        ),
    ],
    format: Annotated[
        ExportFormat, typer.Option(help="What to write: see Formats.", show_default=False)
    ],
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            metavar="PATH",
            help="File to write; for esft, a folder.",
            show_default=False,
        ),
    ],
    top_p: Annotated[
        float | None,
        typer.Option(
            help=(
                "esft: train the fewest experts per layer whose scores sum to this share. "
                "Default: 0.2."
            ),
            show_default=False,
        ),
    ] = None,
    by: Annotated[
        ExportBy | None,
        typer.Option(
            "--by",
            "--score",
            help=(
                "esft, pruning: the score of the experts, as in prune. Default: frequency (token) "
                "for esft, reap for pruning."
            ),
            show_default=False,
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="With --by aimer: the model, a directory or a hub id.",
            show_default=False,
        ),
    ] = None,
    losses: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help=(
                "With --by ablation: a table written by moe-inspect ablate; for esft, its table "
                "domains."
            ),
            show_default=False,
        ),
    ] = None,
    gpu_layers: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="llama-cpp: how many layers' experts fit on the GPU.",
            show_default=False,
        ),
    ] = None,
    keep: Annotated[
        float | None,
        typer.Option(
            help="pruning: keep at least this share of the experts of each layer. Default: 0.75.",
            show_default=False,
        ),
    ] = None,
    safe_csv: SafeCsv = False,
) -> None:
    """Convert a trace to the format of another tool."""
    from moe_inspect.exporters.run import export_trace

    made = export_trace(
        trace,
        format.value,
        output,
        top_p=top_p,
        by=by and by.value,
        weights=weights,
        losses=losses,
        gpu_layers=gpu_layers,
        keep=keep,
        safe_csv=safe_csv,
    )
    print_stderr(f"wrote {made}")
