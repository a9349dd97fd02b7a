"""`moe-inspect sample`: a trace of some of the documents of a trace."""

from __future__ import annotations

from typing import Annotated

import typer

from moe_inspect.cli.help.complete import traces as complete
from moe_inspect.cli.progress import shown
from moe_inspect.cli.progress.phases import SAMPLING, VERIFYING
from moe_inspect.text import plural, print_stderr


def sample(
    trace: Annotated[
        str,
        typer.Argument(
            metavar="TRACE",
            help="Directory or URL of a trace.",
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
    documents: Annotated[
        int | None, typer.Option(min=1, help="How many documents.", show_default=False)
    ] = None,
    share: Annotated[
        float | None,
        typer.Option(help="Share of the documents, above 0 to 1.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random choice.")] = 0,
    by_domain: Annotated[
        bool,
        typer.Option("--by-domain", help="Apply --documents or --share per domain."),
    ] = False,
    rest: Annotated[
        bool,
        typer.Option(
            "--rest", help="Take the documents that the same call without --rest leaves out."
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing trace.")
    ] = False,
) -> None:
    """Write a trace of some documents of a trace, chosen at random.

    Documents are kept whole, with all their records and their numbers."""
    from moe_inspect.trace.derived.sample import sample as run

    if (documents is None) == (share is None):
        raise typer.BadParameter("give the size of the sample: --documents or --share")
    if share is not None and not 0 < share <= 1:
        raise typer.BadParameter(f"--share is {share:g}: give a share above 0, up to 1")
    with shown(*VERIFYING, *SAMPLING, *VERIFYING):
        sampled = run(
            trace,
            output,
            documents=documents,
            share=share,
            seed=seed,
            by_domain=by_domain,
            rest=rest,
            overwrite=overwrite,
        )
    taken, of = sampled.manifest["corpus"]["documents"], sampled.manifest["sample"]["of"]
    print_stderr(
        f"sampled {taken:,} of {plural(of['documents'], 'document')}, "
        f"{plural(sampled.n_tokens, 'token')} into {output}"
    )
