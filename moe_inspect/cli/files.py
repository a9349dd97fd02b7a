"""Commands that read and write traces as such: `moe-inspect verify`, `merge`, `sample`."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from typer import Argument

from moe_inspect.cli.emit import to_stdout
from moe_inspect.cli.help import traces as complete
from moe_inspect.cli.options import AsJson, NewTrace, Overwrite, TraceArgument, in_panel
from moe_inspect.cli.progress import shown
from moe_inspect.text import plural, print_stderr

documents_option = in_panel("Documents")


def verify(trace: TraceArgument, as_json: AsJson = False) -> None:
    """Check every file of a trace: checksums, ids, counts, order.

    Names the first violation by file and row, and exits with 1.

    Examples:
    moe-inspect verify runs/a
    moe-inspect verify runs/a --json"""
    from moe_inspect.trace.verify import verify as check

    with shown():
        found = check(trace)
    with to_stdout():
        if as_json:
            print(json.dumps(found.record()))
        elif found.ok:
            print(found)
    if not found.ok:
        if not as_json:
            print_stderr(f"error: {found}")
        raise typer.Exit(1)


def merge(
    traces: Annotated[
        list[str],
        Argument(
            metavar="TRACE...",
            help="Directories or URLs of traces of one model, with the same columns.",
            autocompletion=complete,
        ),
    ],
    output: NewTrace,
    overwrite: Overwrite = False,
) -> None:
    """Merge several traces of the same model into one.

    Each is verified first. Documents are renumbered; trace.json records where they came from.

    Examples:
    moe-inspect merge runs/a runs/b -o runs/all
    moe-inspect merge runs/a runs/b runs/c -o runs/all --overwrite"""
    from moe_inspect.trace.derived.merge import merge as run

    with shown():
        trace = run(traces, output, overwrite=overwrite)
    print_stderr(
        f"merged {plural(len(traces), 'trace')}, {plural(trace.n_tokens, 'token')} into {output}"
    )


def sample(
    trace: TraceArgument,
    output: NewTrace,
    documents: Annotated[int | None, documents_option(min=1, help="How many documents.")] = None,
    share: Annotated[
        float | None, documents_option(help="Share of the documents, above 0 to 1.")
    ] = None,
    seed: Annotated[int, documents_option(min=0, help="Seed of the random choice.")] = 0,
    by_domain: Annotated[
        bool, documents_option(help="Apply --documents or --share per domain.")
    ] = False,
    rest: Annotated[
        bool,
        documents_option(help="Take the documents that the same call without --rest leaves out."),
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Write a trace of some documents of a trace, chosen at random.

    Documents are kept whole, with all their records and their numbers.

    Examples:
    moe-inspect sample runs/a -o runs/few --documents 100
    moe-inspect sample runs/a -o runs/tenth --share 0.1 --by-domain
    moe-inspect sample runs/a -o runs/others --share 0.1 --by-domain --rest"""
    from moe_inspect.trace.derived.sample import sample as run

    if (documents is None) == (share is None):
        raise typer.BadParameter("give the size of the sample: --documents or --share")
    if share is not None and not 0 < share <= 1:
        raise typer.BadParameter(f"--share is {share:g}: give a share above 0, up to 1")
    with shown():
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
