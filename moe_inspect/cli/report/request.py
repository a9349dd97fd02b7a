"""What the options of `moe-inspect report` ask for, checked before anything is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from moe_inspect.cli.emit import Format, format_of
from moe_inspect.cli.pictures import Drawing, table_format
from moe_inspect.cli.report.options import ReportOptions, Simulated
from moe_inspect.errors import MoeInspectError

if TYPE_CHECKING:
    from moe_inspect.alarms.rules import Rule
    from moe_inspect.reporting.render.texts.documents import Amount
    from moe_inspect.reporting.verdict.gate import Gate


@dataclass(frozen=True)
class Request:
    """What was asked for. selection: the arguments of `moe_inspect.report`."""

    trace: str
    full: bool
    table: str | None
    format: Format
    output: Path | None
    safe_csv: bool
    drawing: Drawing
    html: Path | None
    simulate: Sequence[Simulated]
    text: Amount
    selection: dict[str, Any]
    gates: Sequence[Gate]
    rules: Sequence[Rule]


def requested(options: ReportOptions) -> Request:
    """Raises a usage error where the options do not go together."""
    if options.trace is None:
        raise typer.BadParameter("give the directory of a trace", param_hint="TRACE")
    if options.simulate and (options.html is None or options.domain or options.phase):
        raise typer.BadParameter(
            "--simulate takes all tokens and adds to a page: give it with --html, without --domain "
            "and --phase"
        )
    if options.weights and options.table != "worth":
        raise typer.BadParameter("--weights adds a column to one table: add --table worth")
    form = table_format(options)
    _check_charts(options.only or [])
    return Request(
        trace=options.trace,
        full=options.full,
        table=options.table,
        format=_format(options.table, form, options.output),
        output=options.output,
        safe_csv=options.safe_csv,
        drawing=options,
        html=options.html,
        simulate=options.simulate or [],
        text=_text(options.text, options.html),
        selection={
            "layers": options.layers,
            "domains": options.domain,
            "phase": options.phase and options.phase.value,
            "baseline": options.baseline,
            "top": options.top,
            "window": options.window,
            "weights": options.weights and _checkpoint(options.weights),
            "thresholds": _thresholds(options.threshold or []),
            "scheduler": options.scheduler,
        },
        gates=[
            *_gates(options.fail_above, above=True),
            *_gates(options.fail_below, above=False),
        ],
        rules=_rules(options.rules),
    )


def _format(table: str | None, form: Format | None, output: Path | None) -> Format:
    """The format asked for, else that of the file's ending. Raises where there is no such table."""
    ending = format_of(output)
    if table:
        from moe_inspect.reporting.report import check_table

        check_table(table)
    if table and not form and not ending:
        raise typer.BadParameter(
            f"-o {output}: no format has this ending, add --format {', '.join(Format)}"
        )
    chosen = form or ending or Format.table
    if table is None and chosen is not Format.table:
        from moe_inspect.reporting.report import TABLES

        asked = f"--format {form}" if form else f"-o {output}"
        raise typer.BadParameter(f"{asked} needs one table: add --table {', '.join(TABLES)}")
    return chosen


def _check_charts(names: Sequence[str]) -> None:
    if names:
        from moe_inspect.reporting.charts.spec import check_chart

        for name in names:
            check_chart(name)


def _checkpoint(model: str) -> Path:
    from moe_inspect.model.load import checkpoint_dir

    return checkpoint_dir(model)


def _thresholds(texts: list[str]) -> dict[str, float]:
    of_name: dict[str, float] = {}
    for text in texts:
        name, value = _threshold(text)
        if name in of_name:
            raise typer.BadParameter(f"--threshold {text}: {name} is given twice")
        of_name[name] = value
    return of_name


def _threshold(text: str) -> tuple[str, float]:
    from moe_inspect.reporting.tables.thresholds import thresholds_with

    name, _, value = (part.strip() for part in text.partition("="))
    try:
        thresholds_with({name: float(value)})
    except ValueError:
        reason = "expected NAME=VALUE, e.g. uneven=0.3"
    except MoeInspectError as error:
        reason = str(error)
    else:
        return name, float(value)
    raise typer.BadParameter(f"--threshold {text}: {reason}")


def _text(asked: str | None, html: Path | None) -> Amount:
    if asked is None:
        return None
    if html is None:
        raise typer.BadParameter("--text is about the page: give it with --html")
    return amount_of_text(asked)


def amount_of_text(asked: str) -> Amount:
    """What --text says: a number of documents, or all."""
    if asked == "all":
        return "all"
    if not (asked.isascii() and asked.isdecimal()):
        raise typer.BadParameter(f"--text {asked}: give a number of documents, or all")
    return int(asked)


def _rules(path: Path | None) -> list[Rule]:
    if path is None:
        return []
    from moe_inspect.alarms.rules import read_rules

    try:
        return read_rules(path)
    except MoeInspectError as error:
        raise typer.BadParameter(f"--rules: {error}") from None


def _gates(texts: list[str] | None, above: bool) -> list[Gate]:
    if not texts:
        return []
    from moe_inspect.reporting.verdict.gate import gate

    try:
        return [gate(text, above) for text in texts]
    except MoeInspectError as error:
        option = "--fail-above" if above else "--fail-below"
        raise typer.BadParameter(f"{option}: {error}") from None
