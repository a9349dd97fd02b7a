"""`moe-inspect report`: what a trace says, in words, tables or pictures."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_inspect.cli.emit import Format, SafeCsv, emit, format_of, text_to
from moe_inspect.errors import MoeInspectError
from moe_inspect.text import say

if TYPE_CHECKING:
    from moe_inspect.reporting.render.html import Section
    from moe_inspect.reporting.report import Report
    from moe_inspect.reporting.verdict.gate import Gate


class Phase(StrEnum):
    prefill = "prefill"
    decode = "decode"
    encoder = "encode"


class Simulated(StrEnum):
    capacity = "capacity"
    placement = "placement"
    decode = "decode"
    cache = "cache"
    routing = "routing"


def report(
    trace: Annotated[
        str | None,
        typer.Argument(help="The directory of a trace, or its URL (s3://…).", show_default=False),
    ] = None,
    table: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="One table instead of the report: summary, balance, load, domains, "
            "specialization, vocabulary, coactivation, "
            "transitions, repetition, locality, router, esft, windows, drift or verdict.",
            show_default=False,
        ),
    ] = None,
    format: Annotated[
        Format | None,
        typer.Option(
            help=(
                "Of the table; json is one object a line. By default what the file's ending "
                "says, else table."
            ),
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help="Write to this file instead of stdout.", show_default=False
        ),
    ] = None,
    safe_csv: SafeCsv = False,
    plots: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Also write pictures (PNG and SVG) into this directory.",
            show_default=False,
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Also write a page that opens in any browser, on its own.",
            show_default=False,
        ),
    ] = None,
    simulate: Annotated[
        list[Simulated] | None,
        typer.Option(
            help="With --html: a section on what this simulation says, by its defaults; repeated.",
            show_default=False,
        ),
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Only these layers, e.g. 0-3,7.", show_default=False)
    ] = None,
    domain: Annotated[
        list[str] | None,
        typer.Option(
            help="Only tokens of this domain; repeated or comma-separated.", show_default=False
        ),
    ] = None,
    phase: Annotated[
        Phase | None,
        typer.Option(
            help="Only prompt tokens, generated ones, or those fed to an encoder.",
            show_default=False,
        ),
    ] = None,
    top: Annotated[
        int,
        typer.Option(
            min=0,
            help=(
                "Token ids an expert in the vocabulary table, partners in tables of pairs; 0 is "
                "all."
            ),
        ),
    ] = 20,
    window: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens of a window in windows and drift; by default a 64th of the trace.",
            show_default=False,
        ),
    ] = None,
    threshold: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="From where the verdict says so (summary lists them); repeated.",
            show_default=False,
        ),
    ] = None,
    fail_above: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METRIC=VALUE",
            help="Exit with 3 if any router selected is above; repeated.",
            show_default=False,
        ),
    ] = None,
    fail_below: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METRIC=VALUE",
            help="Exit with 3 if any router selected is below; repeated.",
            show_default=False,
        ),
    ] = None,
    list_metrics: Annotated[
        bool, typer.Option("--list-metrics", help="Every metric: definition, range, source.")
    ] = False,
    scheduler: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Count on this dask.distributed cluster, all but what goes by token id.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Say where the tokens went: balance, and what each expert takes.

    Which layers and experts are out of balance, against what chance gives, and what each expert
    specialises in. Needs neither torch nor the model."""
    ending = format_of(output)
    if list_metrics:
        import pandas as pd

        from moe_inspect.analysis.metrics.registry import listing

        emit(pd.DataFrame(listing()), format or ending or Format.table, output, safe_csv)
        return
    if trace is None:
        raise typer.BadParameter("give the directory of a trace", param_hint="TRACE")
    if table is None and (format or ending or Format.table) is not Format.table:
        from moe_inspect.reporting.report import TABLES

        asked = f"--format {format}" if format else f"-o {output}"
        raise typer.BadParameter(f"{asked} is of one table: add --table {', '.join(TABLES)}")
    if table and not format and not ending:
        raise typer.BadParameter(
            f"-o {output}: no format goes by this ending, add --format {', '.join(Format)}"
        )
    if simulate and (html is None or domain or phase):
        raise typer.BadParameter(
            "--simulate is of all the text, for a page: give it with --html, without --domain "
            "and --phase"
        )
    from moe_inspect.reporting.render.terminal import print_report
    from moe_inspect.reporting.report import report as make
    from moe_inspect.reporting.verdict.gate import breaches, gated

    domains = [label for value in domain or [] for label in value.split(",")]
    limits = {name: value for text in threshold or [] for name, value in [_threshold(text)]}
    gates = [*_gates(fail_above, above=True), *_gates(fail_below, above=False)]
    with _progress() as progress:
        made = make(
            trace,
            layers=layers,
            domains=domains,
            phase=phase and phase.value,
            top=top,
            window=window,
            thresholds=limits,
            scheduler=scheduler,
            progress=progress,
        )
        wanted = (
            [table]
            if table
            else ["balance", "specialization", *(["router"] if made.trace.has_weights else [])]
        )
        made.prepare([*wanted, *(gated()[g.metric] for g in gates)])
        for name in wanted:  # what has something to count
            made.tables[name]
        breached = breaches(made, gates)
    if made.warning:
        say(f"warning: {made.warning}")
    if plots is not None:
        from moe_inspect.reporting.render.matplotlib import write_pictures

        for path in write_pictures(made, plots):
            say(f"wrote {path}")
    if html is not None:
        from moe_inspect.reporting.render.html import write_page
        from moe_inspect.reporting.render.page import report_page

        write_page(html, report_page(made, _simulated(made, simulate or [], layers)))
        say(f"wrote {html}")
    if table:
        form = format or ending or Format.table
        if table == "verdict" and form is Format.json:
            from moe_inspect.reporting.verdict.checks import verdict_table

            frame = verdict_table(made.verdict(), values=True)
        else:
            frame = made.tables[table]
        emit(frame, form, output, safe_csv)
    else:
        with text_to(output) as file:
            print_report(made, file)
    for line in breached:
        say(f"failed: {line}")
    if breached:
        raise typer.Exit(3)


def _simulated(
    made: Report, names: list[Simulated], layers: str | None
) -> Generator[Section | str]:
    """A section each, or why the trace has none to give."""
    import moe_inspect
    from moe_inspect.simulate.page import section

    for name in dict.fromkeys(names):
        try:
            asked = {"uneven": made.thresholds.uneven} if name is Simulated.routing else {}
            yield section(
                getattr(moe_inspect, f"simulate_{name}")(made.trace, layers=layers, **asked)
            )
        except MoeInspectError as error:
            yield str(error)


def _threshold(text: str) -> tuple[str, float]:
    from moe_inspect.reporting.tables.thresholds import thresholds_with

    name, _, value = text.partition("=")
    try:
        thresholds_with({name.strip(): float(value)})
    except (ValueError, MoeInspectError) as error:
        said = str(error) if isinstance(error, MoeInspectError) else "write it like uneven=0.3"
        raise typer.BadParameter(f"--threshold {text}: {said}") from None
    return name.strip(), float(value)


def _gates(texts: list[str] | None, above: bool) -> list[Gate]:
    if not texts:
        return []
    from moe_inspect.reporting.verdict.gate import gate

    try:
        return [gate(text, above) for text in texts]
    except MoeInspectError as error:
        raise typer.BadParameter(
            f"{'--fail-above' if above else '--fail-below'}: {error}"
        ) from None


@contextmanager
def _progress() -> Generator[Callable[[int], None] | None]:
    """Decisions read so far, on a terminal: each once for the load and once more where token ids
    count."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.completed:,.0f} decisions read"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("")
        yield lambda decisions: bar.advance(task, decisions)
