"""`moe-inspect export`: a trace as the file of another tool."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from moe_inspect.cli.experts import By
from moe_inspect.cli.options import REQUIRED, TraceArgument, option
from moe_inspect.cli.show import SafeCsv, output_option
from moe_inspect.exporters import MODULES
from moe_inspect.text import print_stderr

if TYPE_CHECKING:
    ExportFormat = ExportBy = StrEnum
else:
    ExportFormat = StrEnum("ExportFormat", {name: name for name in MODULES})
    # "token" is ESFT's own name of frequency
    ExportBy = StrEnum("ExportBy", {by: by for by in (*get_args(By), "token") if by != "random"})


FORMATS = {name: writes for name, (_, writes) in MODULES.items()}


def export(
    *,
    trace: TraceArgument,
    format: ExportFormat = output_option("What to write: see Formats.", "FORMAT", default=REQUIRED),
    output: Path = output_option(
        "File to write; for esft, a folder.", "PATH", flags=("-o", "--output"), default=REQUIRED
    ),
    top_p: float | None = option(
        "esft: train the fewest experts per layer whose scores sum to this share. Default: 0.2."
    ),
    by: ExportBy | None = option(
        "esft, pruning: the score of the experts, as in prune, or token. Default: frequency "
        "(token) for esft, reap for pruning.",
        "SCORE",
        flags=("--by", "--score"),
    ),
    weights: str | None = option("With --by aimer: the model, a directory or a hub id.", "MODEL"),
    losses: Path | None = option(
        "With --by ablation: a table written by moe-inspect ablate; for esft, its table domains.",
        "FILE",
    ),
    gpu_layers: int | None = option("llama-cpp: how many layers' experts fit on the GPU.", min=0),
    keep: float | None = option(
        "pruning: keep at least this share of the experts of each layer. Default: 0.75."
    ),
    safe_csv: SafeCsv = False,
) -> None:
    """Convert a trace to the format of another tool.

    Examples:
    moe-inspect export runs/a --format counts -o counts.csv
    moe-inspect export runs/a --format sglang -o distribution.json"""
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
