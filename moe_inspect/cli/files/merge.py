"""`moe-inspect merge`: traces of one model become one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moe_inspect.cli.help.complete import traces as complete
from moe_inspect.cli.progress import shown
from moe_inspect.cli.progress.phases import MERGING, VERIFYING
from moe_inspect.text import plural, print_stderr


def merge(
    traces: Annotated[
        list[Path],
        typer.Argument(
            metavar="TRACE...",
            help="Directories of two traces or more, of the same model and with the same columns.",
            show_default=False,
            autocompletion=complete,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            metavar="DIR",
            help="Directory of the trace to write.",
            show_default=False,
        ),
    ],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing trace.")
    ] = False,
) -> None:
    """Write one trace that holds several traces of the same model.

    Each is verified first. Documents get new numbers, and trace.json says what came from where."""
    from moe_inspect.trace.derived.merge import merge as run

    with shown(*VERIFYING * len(traces), *MERGING * len(traces)):
        trace = run(traces, output, overwrite=overwrite)
    print_stderr(
        f"merged {plural(len(traces), 'trace')}, {plural(trace.n_tokens, 'token')} into {output}"
    )
