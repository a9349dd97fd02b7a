"""`moe-inspect import`: files of inference engines and training frameworks → a trace."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from moe_inspect.cli.capture import model_option
from moe_inspect.cli.options import (
    REQUIRED,
    CommitEvery,
    NewTrace,
    Overwrite,
    argument,
    in_panel,
    option,
)
from moe_inspect.cli.progress import shown
from moe_inspect.importers import MODULES
from moe_inspect.text import no_such, plural, print_stderr

if TYPE_CHECKING:
    from moe_inspect.workers import Workers

run_option = in_panel("Run")


@contextmanager
def _workers(
    workers: int | None, scheduler: str | None, sources: list[str]
) -> Generator[int | Workers]:
    from moe_inspect.importers.run import default_workers

    if scheduler is None:
        yield workers or default_workers(sources)
        return
    from moe_inspect.analysis.tasks import cluster

    with cluster(scheduler, []) as at:
        yield at


FORMATS = {name: reads.replace("`", "") for name, (_, reads) in MODULES.items()}


def import_(
    *,
    format: str = argument(
        f"auto (recognise the files), or one of {', '.join(MODULES)}.", "FORMAT", default=REQUIRED
    ),
    sources: list[str] = argument(
        "Files or folders. DOMAIN=SRC labels the tokens of one.", "SRC...", default=REQUIRED
    ),
    output: NewTrace,
    model: str | None = model_option(
        "Hub id or directory of the model, for what the files lack: number of experts, "
        "top-k, dense layers, vocabulary.",
        "MODEL",
    ),
    config: Path | None = model_option(
        "The same from a config.json, without transformers.", "FILE"
    ),
    experts: int | None = model_option(
        "Experts per layer, where neither the files nor a config give it.", min=1
    ),
    top_k: int | None = model_option(
        "Experts per token, where neither the files nor a config give it.", min=1
    ),
    pipeline_stages: int | None = model_option(
        "megatron: pipeline stages of a run whose files number layers from 0 in each "
        "stage. More than one needs --model or --config.",
        min=1,
    ),
    map: list[str] | None = option(
        "table, counts: where the columns are, if they have other names: "
        "layer=block,expert=id,count=hits; in nested JSON: "
        "count=layers.{layer}.{expert}.hits; or a FILE.yaml of them. Decisions have position, "
        "experts, weights; or a row per slot: position, slot, expert, weight.",
        "MAP",
    ),
    overwrite: Overwrite = False,
    commit_every: CommitEvery = None,
    workers: int | None = run_option(
        "Processes that parse lines of JSON (default: one per core for large files).", min=1
    ),
    scheduler: str | None = run_option(
        "Parse lines of JSON on this dask.distributed cluster, whose workers see the "
        "files at the same path.",
        "ADDRESS",
    ),
) -> None:
    """Convert recordings of engines and trainers to a trace.

    Reports read it like any other trace, and state what is missing.

    Examples:
    moe-inspect import auto recorded/ -o runs/served --model Qwen/Qwen3-30B-A3B
    moe-inspect import counts loads.csv -o runs/loads --top-k 8"""
    from moe_inspect.importers.run import import_trace

    if format not in (*MODULES, "auto"):
        raise typer.BadParameter(no_such("format", format, [*MODULES, "auto"]))
    if model is not None and config is not None:
        raise typer.BadParameter("--model and --config exclude each other: give one")

    def warn(line: str) -> None:
        print_stderr(line if line.startswith("recognised as") else f"warning: {line}")

    if workers is not None and scheduler is not None:
        raise typer.BadParameter("--workers and --scheduler exclude each other: give one")
    with shown() as bar, _workers(workers, scheduler, sources) as at:
        trace = import_trace(
            format,
            sources,
            output,
            model=model or config,
            experts=experts,
            top_k=top_k,
            pipeline_stages=pipeline_stages,
            map=",".join(map) if map else None,
            overwrite=overwrite,
            commit_every=commit_every,
            progress=bar.counted("importing", "bytes") if bar else None,
            warn=warn,
            workers=at,
        )
    print_stderr(
        f"imported {plural(trace.n_tokens, 'token')}, {plural(len(trace.routers), 'router')} into "
        f"{output}"
    )
