"""`moe-inspect text`: the text of a trace with its routes, and an expert's tokens in context."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from moe_inspect.cli.capture import ranges_of
from moe_inspect.cli.options import TraceArgument, in_panel, selection_option
from moe_inspect.cli.show import ShowOptions
from moe_inspect.errors import MoeInspectError

if TYPE_CHECKING:
    import pandas as pd

    from moe_inspect.public import Trace


expert_option = in_panel("With --experts")


def text(
    *,
    trace: TraceArgument,
    documents: list[str] | None = selection_option(
        "Print these documents, each token in the colour of its first expert.", "DOCUMENTS"
    ),
    layers: Annotated[
        list[str] | None,
        selection_option(
            "These layers, e.g. 0-3,7 (default: with --documents the first, else all).", "LAYERS"
        ),
    ] = None,
    experts: list[str] | None = selection_option(
        "Print the tokens routed to these experts of each layer, in context.", "EXPERTS"
    ),
    top: int = expert_option(
        "Number of tokens per expert, shared evenly by the domains; 0 is all.", min=0, default=20
    ),
    context: int = expert_option("Tokens of context on each side.", min=0, default=8),
    show: ShowOptions,
) -> None:
    """Show documents, or the tokens of experts, with their routes.

    Examples:
    moe-inspect text runs/a --documents 0 --layers 3
    moe-inspect text runs/a --layers 2 --experts 5
    moe-inspect text runs/a --layers 2 --experts 5,7 --context 12 --format csv"""
    if (documents is None) == (experts is None):
        raise typer.BadParameter("give either --documents N or --experts E, not both")
    from moe_inspect.public import open_trace
    from moe_inspect.reporting.shown import Result

    table, _ = show.chosen(("tokens",), "tokens")  # a usage error comes before the trace is read
    opened = open_trace(trace)
    if documents is not None:
        import pandas as pd

        numbers = ranges_of(documents, "documents") or []
        routers = opened.router_index(layers)
        if layers is None and table is None:  # the text shows one router: no other layer is read
            routers, layers = routers[:1], [str(opened.routers[routers[0]].layer)]
        frames = {number: opened.document(number, layers=layers) for number in numbers}
        frame = pd.concat(frames, names=["document", None]).reset_index("document")
        text = partial(_print_documents, opened, frame, routers)
    else:
        frame = opened.tokens_of(layers, experts, context, top=top or None)
        text = partial(_print_concordances, opened, frame)
    show.show(Result(f"text {trace}", {"tokens": frame}, text))


def _print_documents(
    trace: Trace, frame: pd.DataFrame, routers: Sequence[int], file: TextIO
) -> None:
    for number, rows in frame.groupby("document", sort=False):
        for router in routers:
            _print_document(trace, rows[rows["router"] == router], router, f"{number}", file)


def _print_document(
    trace: Trace, rows: pd.DataFrame, router: int, document: str, file: TextIO
) -> None:
    from moe_inspect.reporting.render.console import console_for
    from moe_inspect.reporting.render.routed_text import legend, routed_text

    if not len(rows) or not len(trace.vocabulary()):
        raise MoeInspectError(f"{trace.path} was recorded without a vocabulary: it has no text")
    listed, console = trace.routers[router], console_for(file)
    colours = console.is_terminal and not console.no_color
    title = f"document {document}, layer {listed.layer}, {listed.experts} experts"
    console.print(title, style="bold")
    console.print(legend(rows, listed.experts))
    console.print()
    console.print(routed_text(rows, colours))


def _print_concordances(trace: Trace, frame: Any, file: TextIO) -> None:
    for (layer, expert), tokens in frame.attrs["tokens"].items():
        rows = frame[(frame["layer"] == layer) & (frame["expert"] == expert)]
        _print_concordance(trace, rows, f"layer {layer}, expert {expert}", tokens, file)


def _print_concordance(
    trace: Trace, rows: pd.DataFrame, title: str, tokens: int, file: TextIO
) -> None:
    from rich.cells import cell_len
    from rich.text import Text

    from moe_inspect.reporting.render.console import console_for
    from moe_inspect.text import plural, readable

    words = [f"[{readable(text)}]" for text in rows["text"]]
    domains = [readable(domain) for domain in rows["domain"]]
    wide, of_domain = (max(map(cell_len, column), default=0) for column in (words, domains))
    console = console_for(file)
    shown = f"{len(rows):,} of " if len(rows) < tokens else ""
    console.print(f"{title}: {shown}{plural(tokens, 'token')}", style="bold")
    of_document = max((len(str(n)) for n in rows["document"]), default=0)
    after = 8 * trace.has_weights + of_domain + of_document + len("  document ")
    room = max((console.width - wide - after - 4) // 2, 8)
    left = [_fitted(readable(text), room, end=True) for text in rows["left"]]
    right = [_fitted(readable(text), room) for text in rows["right"]]
    of_left, of_right = (max(map(cell_len, column), default=0) for column in (left, right))
    for row, word, before, behind, domain in zip(
        rows.itertuples(), words, left, right, domains, strict=True
    ):
        line = Text(" " * (of_left - cell_len(before)) + before + " ")
        blanks = wide - cell_len(word)
        line.append(" " * (blanks // 2) + word + " " * (blanks - blanks // 2), style="bold")
        line.append(" " + behind + " " * (of_right - cell_len(behind)))
        if trace.has_weights:
            line.append(f"  {row.weight:.2f}")
        line.append(f"  {domain}" + " " * (of_domain - cell_len(domain)), style="dim")
        line.append(f"  document {row.document:>{of_document}}", style="dim")
        console.print(line, soft_wrap=True)


def _fitted(text: str, room: int, end: bool = False) -> str:
    """The first words of a text that fit so many cells, or its last; of a long word the part that
    does."""
    from rich.cells import cell_len

    from moe_inspect.trace.texts import CHARACTER

    if cell_len(text) <= room:
        return text
    characters = CHARACTER.findall(text)[:: -1 if end else 1]
    widths = accumulate(map(cell_len, characters))
    kept = [one for one, width in zip(characters, widths, strict=True) if width <= room]
    if end:
        kept = "".join(reversed(kept))
        return kept.partition(" ")[2] or kept
    kept = "".join(kept)
    return kept.rpartition(" ")[0] or kept
