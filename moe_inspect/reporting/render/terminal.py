"""The report as text: on one screen (findings, the load of every expert, the worst layers), or in
full, the tables cut short."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import TextIO

import numpy as np
import pandas as pd
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from moe_inspect.reporting.render import console as text
from moe_inspect.reporting.render.console import wrapped
from moe_inspect.reporting.render.heatmap import heatmap_lines
from moe_inspect.reporting.tables.data import ReportData, Row, records
from moe_inspect.reporting.tables.registry import Excerpt, highest_rows
from moe_inspect.reporting.tables.summary import notes, title_of
from moe_inspect.reporting.verdict.findings import Finding, findings, verdict_of
from moe_inspect.text import layer_label, plural, printable

COLOUR_OF = {"critical": "red", "warning": "yellow"}  # of a finding; others have none


def print_report(data: ReportData, file: TextIO) -> None:
    """What fits the screen, on a terminal of 80 columns and 24 lines or more. The gravest findings
    come first, then the map and the table have the room that is left; the last line says what is
    not shown."""
    console, verdict = text.console_for(file), verdict_of(data)
    titled = f"{title_of(data)} · {data.trace.path} · {data.trace.status}"
    head = wrapped(Text(printable(titled), style="bold"), console)
    head += wrapped(Text(printable(verdict.sample.text), style="dim"), console)
    if data.baseline is not None:  # the rest of the report is the same without it
        about = [one for one in findings(data) if one.group == "Specialization"]
        _print_parts([head, _bullets(about, console)], console)
        return
    gravest = _bullets(verdict.warnings, console) + headline_lines(verdict.headline, console)
    lines = text.screen_lines(console)
    routers = len(data.selection.routers)
    least_rows, least_map = min(routers, lines // 9), min(routers, lines * 2 // 9)
    # empty lines, titles of map and table, the last line
    fixed = len(head) + len(gravest) + 5 + len(heatmap_lines(data, console, 1)) - 1 + 2 + 1
    room = lines - fixed - least_rows
    others = verdict.others[: verdict.most_others]
    said, shown = _that_fit(others, room - least_map, console)
    left_out = len(verdict.others) - shown
    rows_of_map = min(routers, max(least_map, room - len(said)))
    rows = lines - fixed - len(said) - rows_of_map
    more = [
        f"{plural(n, of)}: --table {table}"
        for table, n, of in (
            ("verdict", left_out, "more finding"),
            ("summary", len(notes(data)), "note"),
        )
        if n
    ]
    last = Text("; ".join([*more, "page: --html FILE"]), style="dim")
    parts = [
        head,
        gravest,
        said,
        heatmap_lines(data, console, rows_of_map),
        _worst_layers(data, rows, console) if rows > 0 else [],
        wrapped(last, console),
    ]
    _print_parts([part for part in parts if part], console)


def _print_parts(parts: Sequence[Sequence[Text]], console: Console) -> None:
    """Print the lines of each part, with an empty line between parts."""
    for n, part in enumerate(parts):
        if n:
            console.print()
        for line in part:
            console.print(line, soft_wrap=True)


def finding_lines(found: Finding | str, console: Console) -> list[Text]:
    """A finding as a bullet: a grave one begins with its severity, in colour on a terminal."""
    text, colour = _coloured(found)
    style = colour if console.is_terminal else ""
    return wrapped(Text(text, style=style), console, Text("• ", style=style))


def headline_lines(headline: Finding | str, console: Console) -> list[Text]:
    """The headline as a paragraph in bold, which begins with its severity if it is grave."""
    text, colour = _coloured(headline)
    style = f"bold {colour}" if colour and console.is_terminal else "bold"
    return wrapped(Text(text, style=style), console)


def _coloured(finding: Finding | str) -> tuple[str, str]:
    """The text of a finding, which begins with its severity if it is grave, and its colour."""
    if isinstance(finding, str):
        return printable(finding), ""
    colour = COLOUR_OF.get(finding.severity, "")
    severity = f"{finding.severity.capitalize()}: " if finding.is_grave else ""
    return severity + printable(finding.text), colour


def _bullets(findings: Iterable[Finding], console: Console) -> list[Text]:
    return [line for one in findings for line in finding_lines(one, console)]


def _that_fit(findings: list[Finding], most: int, console: Console) -> tuple[list[Text], int]:
    """The lines of the first findings that fit, and how many fit."""
    lines = list[Text]()
    for n, finding in enumerate(findings):
        more = finding_lines(finding, console)
        if len(lines) + len(more) > most:
            return lines, n
        lines += more
    return lines, len(findings)


def _worst_layers(data: ReportData, most: int, console: Console) -> list[Text]:
    """A row per layer, the worst first, beside what chance would give."""
    table = data.tables["balance"].sort_values("max_vio", ascending=False, kind="stable")
    columns = ["layer", "busiest expert", "max/mean", "expected by chance", "95% interval", "dead"]
    cells = [
        [layer_label(data.trace.routers, int(one["router"])), *_balance(one)]
        for one in records(table.head(most))
    ]
    widths = [max(map(cell_len, column)) for column in zip(columns, *cells, strict=True)]
    right = [True] * len(columns)
    what = "layers" if table["layer"].is_unique else "routers"
    some = len(cells) < len(table)
    said = f"the {len(cells)} worst of {len(table)} {what}" if some else f"{what}, worst first"
    head = Text(text.table_row(columns, widths, right), style="dim")
    rows = [Text(text.table_row(line, widths, right)) for line in cells]
    lines = [Text(said, style="bold"), head, *rows]
    return [one for line in lines for one in wrapped(line, console)]


def _balance(one: Row) -> list[str]:
    if not one["assignments"]:
        return ["–", "no load", "–", "–", "–"]
    low, high = one["max_over_mean_low"], one["max_over_mean_high"]
    return [
        str(one["busiest_expert"]),
        f"{one['max_over_mean']:.2f}x",
        f"{one['expected_by_chance']:.2f}x",
        "–" if np.isnan(low) else f"{low:.2f}-{high:.2f}x",
        f"{one['dead_experts']}",
    ]


def print_verdict(said: Sequence[Finding | str], console: Console) -> None:
    """A bullet per finding."""
    for found in said:
        for line in finding_lines(found, console):
            console.print(line, soft_wrap=True)


def print_excerpt(
    whole: pd.DataFrame, name: str, excerpt: Excerpt, most: int, command: str, console: Console
) -> None:
    """At most so many rows of a table; on a terminal those columns that fit; and the command that
    prints the others."""
    frame = excerpt.rows(whole, most)
    title = excerpt.title(name, frame, whole)
    if excerpt.columns and console.is_terminal:
        frame = frame[[c for c in excerpt.columns if c in frame.columns]]
    shown = text.print_frame(frame, console, title, fitting=console.is_terminal)
    left_out = ["all rows"] if len(frame) < len(whole) else []
    if columns := len(whole.columns) - shown:
        left_out.append(plural(columns, "more column"))
    if left_out:
        more = f"+ {' and '.join(left_out)}: {f'{command} --table {name}'.strip()}"
        console.print(Text(printable(more), style="dim"))


def excerpt_of_balance(data: ReportData) -> Excerpt:
    """The least balanced routers; the router is named where a layer has several."""
    layers = [router.layer for router in data.trace.routers]
    columns = "layer router max_over_mean expected_by_chance max_over_mean_low max_over_mean_high "
    columns += "busiest_expert dead_experts cv gini max_vio_batch"
    named = [name for name in columns.split() if name != "router" or len({*layers}) < len(layers)]
    rows = partial(highest_rows, column="max_vio")
    return Excerpt("the least balanced routers", rows, tuple(named))
