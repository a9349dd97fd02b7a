"""`moe-inspect import`: files of inference engines and training frameworks → a trace."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from moe_inspect.cli.capture import model_option
from moe_inspect.cli.options import CommitEvery, NewTrace, Overwrite, in_panel
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
    format: Annotated[
        str,
        Argument(
            metavar="FORMAT", help=f"auto (recognise the files), or one of {', '.join(MODULES)}."
        ),
    ],
    sources: Annotated[
        list[str],
        Argument(metavar="SRC...", help="Files or folders. DOMAIN=SRC labels the tokens of one."),
    ],
    output: NewTrace,
    model: Annotated[
        str | None,
        model_option(
            metavar="MODEL",
            help="Hub id or directory of the model, for what the files lack: number of experts, "
            "top-k, dense layers, vocabulary.",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        model_option(metavar="FILE", help="The same from a config.json, without transformers."),
    ] = None,
    experts: Annotated[
        int | None,
        model_option(
            min=1, help="Experts per layer, where neither the files nor a config give it."
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        model_option(
            min=1, help="Experts per token, where neither the files nor a config give it."
        ),
    ] = None,
    pipeline_stages: Annotated[
        int | None,
        model_option(
            min=1,
            help="megatron: pipeline stages of a run whose files number layers from 0 in each "
            "stage. More than one needs --model or --config.",
        ),
    ] = None,
    map: Annotated[
        list[str] | None,
        Option(
            metavar="MAP",
            help="table, counts: where the columns are, if they have other names: "
            "layer=block,expert=id,count=hits; in nested JSON: "
            "count=layers.{layer}.{expert}.hits; or a FILE.yaml of them.",
        ),
    ] = None,
    overwrite: Overwrite = False,
    commit_every: CommitEvery = None,
    workers: Annotated[
        int | None,
        run_option(
            min=1,
            help="Processes that parse lines of JSON (default: one per core for large files).",
        ),
    ] = None,
    scheduler: Annotated[
        str | None,
        run_option(
            metavar="ADDRESS",
            help="Parse lines of JSON on this dask.distributed cluster, whose workers see the "
            "files at the same path.",
        ),
    ] = None,
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
