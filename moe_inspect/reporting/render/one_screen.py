"""The report on one screen: findings, the load of every expert, the worst layers."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from moe_inspect.reporting.render.console import screen_lines, table_row, wrapped
from moe_inspect.reporting.render.heatmap import heatmap_lines
from moe_inspect.reporting.tables.data import ReportData
from moe_inspect.reporting.tables.summary import notes
from moe_inspect.reporting.verdict.checks import findings
from moe_inspect.reporting.verdict.findings import Finding
from moe_inspect.text import layer_label, plural, printable

MOST_FINDINGS = 5  # on a terminal
COLOUR_OF = {"critical": "red", "warning": "yellow"}  # of a finding; others have none


def print_one_screen(data: ReportData, title: Text, console: Console) -> None:
    """What fits the screen, on a terminal of 80 columns and 24 lines or more. The gravest findings
    come first, then the map and the table have the room that is left; the last line says what is
    not shown."""
    head, lines = wrapped(title, console), screen_lines(console)
    routers = len(data.selection.routers)
    least_rows, least_map = min(routers, lines // 9), min(routers, lines * 2 // 9)
    # empty lines, titles of map and table, the last line
    fixed = len(head) + 4 + len(heatmap_lines(data, console, 1)) - 1 + 2 + 1
    room = lines - fixed - least_rows
    said, left_out = _gravest(findings(data), room - least_map, console)
    rows_of_map = min(routers, max(least_map, room - len(said)))
    rows = lines - fixed - len(said) - rows_of_map
    parts = [
        head,
        said,
        heatmap_lines(data, console, rows_of_map),
        _worst_layers(data, rows, console),
        wrapped(Text(_more(left_out, len(notes(data))), style="dim"), console),
    ]
    for n, part in enumerate(parts):
        if n:
            console.print()
        for line in part:
            console.print(line, soft_wrap=True)


def finding_lines(found: Finding, console: Console) -> list[Text]:
    """A finding as a bullet: a grave one begins with its severity, and has a colour on a
    terminal."""
    colour, said = COLOUR_OF.get(found.severity, ""), printable(found.text)
    if colour:
        said = f"{found.severity.capitalize()}: {said}"
    style = colour if console.is_terminal else ""
    return wrapped(Text(said, style=style), console, Text("• ", style=style))


def _gravest(found: list[Finding], most: int, console: Console) -> tuple[list[Text], int]:
    """The lines of the first findings that fit, of one at least; and how many do not."""
    lines = list[Text]()
    for n, one in enumerate(found):
        more = finding_lines(one, console)
        many = console.is_terminal and n == MOST_FINDINGS
        if many or (n and len(lines) + len(more) > most):
            return lines, len(found) - n
        lines += more
    return lines, 0


def _worst_layers(data: ReportData, most: int, console: Console) -> list[Text]:
    """A row per layer, the worst first, beside what chance would give."""
    table: Any = data.tables["balance"].sort_values("max_vio", ascending=False, kind="stable")
    columns = ["layer", "busiest expert", "max/mean", "expected by chance", "95% interval", "dead"]
    cells = [
        [layer_label(data.trace.routers, int(one["router"])), *_balance(one)]
        for one in table.head(most).to_dict("records")
    ]
    widths = [max(map(cell_len, column)) for column in zip(columns, *cells, strict=True)]
    right = [True] * len(columns)
    what = "layers" if table["layer"].is_unique else "routers"
    some = len(cells) < len(table)
    said = f"the {len(cells)} worst of {len(table)} {what}" if some else f"{what}, worst first"
    title = Text(said, style="bold")
    head = Text(table_row(columns, widths, right), style="dim")
    lines = [title, head, *(Text(table_row(line, widths, right)) for line in cells)]
    return [one for line in lines for one in wrapped(line, console)]


def _balance(one: dict[str, Any]) -> list[str]:
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


def _more(findings_left: int, notes_left: int) -> str:
    parts = [
        plural(findings_left, "more finding") if findings_left else "",
        plural(notes_left, "note") if notes_left else "",
        "tables",
    ]
    *some, last = [part for part in parts if part]
    return (
        f"--full adds {', '.join(some)}{' and ' if some else ''}{last}; --html FILE writes a page"
    )
