"""`moe-inspect merge`: traces of one model become one."""

from __future__ import annotations

from typing import Annotated

import typer

from moe_inspect.cli.help.complete import traces as complete
from moe_inspect.cli.progress import shown
from moe_inspect.cli.progress.phases import MERGING, VERIFYING
from moe_inspect.text import plural, print_stderr


def merge(
    traces: Annotated[
        list[str],
        typer.Argument(
            metavar="TRACE...",
            help="Directories or URLs of traces of one model, with the same columns.",
            show_default=False,
            autocompletion=complete,
        ),
    ],
    output: Annotated[
        str,
        typer.Option(
            "-o",
            "--output",
            metavar="DIR",
            help="Directory of the trace to write, or its URL.",
            show_default=False,
        ),
    ],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing trace.")
    ] = False,
) -> None:
    """Merge several traces of the same model into one.

    Each is verified first. Documents are renumbered; trace.json records where they came from."""
    from moe_inspect.trace.derived.merge import merge as run

    with shown(*VERIFYING * len(traces), *MERGING * len(traces)):
        trace = run(traces, output, overwrite=overwrite)
    print_stderr(
        f"merged {plural(len(traces), 'trace')}, {plural(trace.n_tokens, 'token')} into {output}"
    )
