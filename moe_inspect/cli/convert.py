"""`moe-inspect import`: files of inference engines and training frameworks → a trace; `moe-inspect
export`: a trace → the file of another tool."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from moe_inspect import exporters, importers
from moe_inspect.cli.capture import model_option
from moe_inspect.cli.options import (
    REQUIRED,
    FactsOptions,
    NewTrace,
    Overwrite,
    TraceArgument,
    argument,
    option,
)
from moe_inspect.cli.progress import shown
from moe_inspect.text import no_such, plural, print_stderr

if TYPE_CHECKING:
    ExportFormat = ExportBy = StrEnum
else:
    ExportFormat = StrEnum("ExportFormat", {name: name for name in exporters.MODULES})
    SCORES = "reap gate frequency ean mean-norm saliency"
    ExportBy = StrEnum("ExportBy", {by: by for by in SCORES.split()})

FORMATS = {
    "import": {
        name: reads.replace("`", "").partition(";")[0]
        for name, (_, reads) in importers.MODULES.items()
    },
    "export": {name: writes for name, (_, writes) in exporters.MODULES.items()},
}


def import_(
    *,
    format: str = argument(
        "auto (recognise the files), or one of the formats below.", "FORMAT", default=REQUIRED
    ),
    sources: list[str] = argument(
        "Files or folders. DOMAIN=SRC labels the tokens of one.", "SRC...", default=REQUIRED
    ),
    output: NewTrace,
    facts: FactsOptions,
    pipeline_stages: int | None = model_option(
        "megatron: number of pipeline stages, if each numbers its layers from 0.", min=1
    ),
    map: list[str] | None = option(
        "table, counts: names of the columns, like layer=block,expert=id,count=hits, or a "
        "FILE.yaml of them.",
        "MAP",
    ),
    overwrite: Overwrite = False,
    workers: int | None = option(
        "Processes that parse lines of JSON (default: one per core for large files).", min=1
    ),
) -> None:
    """Convert recordings of engines and trainers to a trace.

    Examples:
    moe-inspect import auto recorded/ -o runs/served --model Qwen/Qwen3-30B-A3B
    moe-inspect import counts loads.csv -o runs/loads --top-k 8"""
    from moe_inspect.importers.run import default_workers
    from moe_inspect.making import import_trace

    if format not in (*importers.MODULES, "auto"):
        raise typer.BadParameter(no_such("format", format, [*importers.MODULES, "auto"]))
    known = facts.keywords()

    def warn(line: str) -> None:
        print_stderr(line if line.startswith("recognised as") else f"warning: {line}")

    with shown() as bar:
        trace = import_trace(
            format,
            sources,
            output,
            **known,
            pipeline_stages=pipeline_stages,
            map=",".join(map) if map else None,
            overwrite=overwrite,
            progress=bar.counted("importing", "bytes") if bar else None,
            warn=warn,
            workers=workers or default_workers(sources),
        )
    print_stderr(
        f"imported {plural(trace.n_tokens, 'token')}, {plural(len(trace.routers), 'router')} into "
        f"{output}"
    )


def export(
    *,
    trace: TraceArgument,
    format: ExportFormat = option("What to write: see Formats.", "FORMAT", default=REQUIRED),
    output: Path = option("File to write.", "PATH", flags=("-o", "--output"), default=REQUIRED),
    by: ExportBy | None = option("pruning: the score of the experts. Default: reap.", "SCORE"),
    gpu_layers: int | None = option("llama-cpp: how many layers' experts fit on the GPU.", min=0),
    keep: float | None = option(
        "pruning: keep at least this share of the experts of each layer. Default: 0.75."
    ),
) -> None:
    """Convert a trace to the format of another tool.

    Examples:
    moe-inspect export runs/a --format counts -o counts.csv
    moe-inspect export runs/a --format sglang -o distribution.json"""
    from moe_inspect.exporters.run import export_trace

    made = export_trace(
        trace, format.value, output, by=by and by.value, gpu_layers=gpu_layers, keep=keep
    )
    print_stderr(f"wrote {made}")
