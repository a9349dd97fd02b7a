"""`moe-inspect import`: what engines and labs have written → a trace."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from moe_inspect.importers import MODULES
from moe_inspect.text import say


def import_(
    format: Annotated[
        str,
        typer.Argument(
            metavar="FORMAT",
            help=f"auto, or one of {', '.join(MODULES)}.",
            show_default=False,
        ),
    ],
    sources: Annotated[
        list[str],
        typer.Argument(metavar="SRC...", help="[DOMAIN=]FILE or folder.", show_default=False),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="The directory of the trace.", show_default=False)
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help=(
                "A hub id or a directory: says what the files do not (experts, top-k, dense "
                "layers, vocabulary)."
            ),
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The same from a config.json; no transformers needed.",
            show_default=False,
        ),
    ] = None,
    experts: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Experts of each layer, where neither the files nor a config say.",
            show_default=False,
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Experts a token, where neither the files nor a config say.",
            show_default=False,
        ),
    ] = None,
    pipeline_stages: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=(
                "Pipeline stages of a Megatron run whose files number layers from 0 in each "
                "stage. Above 1 it needs --model or --config."
            ),
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing trace.")
    ] = False,
) -> None:
    """Turn the dumps of engines and labs into a trace.

    Counts, per-token choices or responses; report reads them like any other trace and says what
    they cannot tell."""
    from moe_inspect.importers import MODULES
    from moe_inspect.importers.run import import_trace

    if format not in (*MODULES, "auto"):
        raise typer.BadParameter(f"no format {format!r}: there are {', '.join(MODULES)} and auto")
    if model is not None and config is not None:
        raise typer.BadParameter("--model and --config say the same: give one")

    def warn(line: str) -> None:
        say(line if line.startswith("taken for") else f"warning: {line}")

    with _bar() as progress:
        trace = import_trace(
            format,
            sources,
            output,
            model=model or config,
            experts=experts,
            top_k=top_k,
            pipeline_stages=pipeline_stages,
            overwrite=overwrite,
            progress=progress,
            warn=warn,
        )
    say(f"imported {trace.n_tokens:,} tokens, {len(trace.routers)} routers into {output}")


@contextmanager
def _bar() -> Iterator[Callable[[int, int], None] | None]:
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("importing"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
