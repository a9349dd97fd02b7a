"""`moe-inspect check`: are the files of a trace whole, and its routes right?"""

from __future__ import annotations

from moe_inspect.cli.help import traces as complete
from moe_inspect.cli.options import TraceArgument, exit_if_failed, option
from moe_inspect.cli.progress import shown
from moe_inspect.cli.show import ShowOptions
from moe_inspect.text import join_first


def check(
    *,
    trace: TraceArgument,
    against: str | None = option(
        "A right trace of the same model, on any text: is each layer the same one?",
        "TRACE",
        autocompletion=complete,
    ),
    quick: bool = option("Check the files only, not the routes.", default=False),
    show: ShowOptions,
) -> None:
    """Check a trace: its files, then its routes.

    Files: checksums, schema, counts. Routes, without a reference: buffers that were not written,
    other tokens' routes, layers over layers, ids that are no expert's. States what is wrong, where,
    how sure that is, and which published bug looks like it. If the files are broken, the routes are
    not read. Exits with 3 if anything is wrong; notes do not count.

    Examples:
    moe-inspect check runs/a
    moe-inspect check runs/a --quick
    moe-inspect check runs/new --against runs/right --format json"""
    from moe_inspect.checking.check import check_trace

    show.chosen(("findings",), "findings")  # a usage error comes before the trace is read
    with shown():
        made = check_trace(trace, against, quick)
    show.show(made)
    exit_if_failed([join_first(made.wrong)] if made.wrong else [])
