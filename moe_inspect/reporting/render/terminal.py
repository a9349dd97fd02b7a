"""The report as text: on one screen (findings, the load of every expert, the worst layers), or in
full, the tables cut short."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TextIO

import numpy as np
import pandas as pd
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from moe_inspect.reporting.render import console as text
from moe_inspect.reporting.render.console import print_lines, wrapped
from moe_inspect.reporting.render.heatmap import MOST_ROUTERS, heatmap_lines
from moe_inspect.reporting.tables.data import ReportData, Row, records
from moe_inspect.reporting.tables.registry import ROWS, Excerpt, highest_rows
from moe_inspect.reporting.tables.summary import notes, title_of
from moe_inspect.reporting.verdict.checks import findings
from moe_inspect.reporting.verdict.findings import Finding
from moe_inspect.text import layer_label, plural, printable

MOST_FINDINGS = 5  # on a terminal
COLOUR_OF = {"critical": "red", "warning": "yellow"}  # of a finding; others have none


def print_one_screen(data: ReportData, title: Text, console: Console) -> None:
    """What fits the screen, on a terminal of 80 columns and 24 lines or more. The gravest findings
    come first, then the map and the table have the room that is left; the last line says what is
    not shown."""
    head, lines = wrapped(title, console), text.screen_lines(console)
    routers = len(data.selection.routers)
    least_rows, least_map = min(routers, lines // 9), min(routers, lines * 2 // 9)
    # empty lines, titles of map and table, the last line
    fixed = len(head) + 4 + len(heatmap_lines(data, console, 1)) - 1 + 2 + 1
    room = lines - fixed - least_rows
    said, left_out = _gravest(findings(data), room - least_map, console)
    rows_of_map = min(routers, max(least_map, room - len(said)))
    rows = lines - fixed - len(said) - rows_of_map
    more = [
        plural(n, of) for n, of in ((left_out, "more finding"), (len(notes(data)), "note")) if n
    ]
    adds = f"{', '.join(more)} and tables" if more else "tables"
    last = Text(f"--full adds {adds}; --html FILE writes a page", style="dim")
    parts = [
        head,
        said,
        heatmap_lines(data, console, rows_of_map),
        _worst_layers(data, rows, console),
        wrapped(last, console),
    ]
    for n, part in enumerate(parts):
        if n:
            console.print()
        for line in part:
            console.print(line, soft_wrap=True)


def finding_lines(found: Finding | str, console: Console) -> list[Text]:
    """A finding as a bullet: a grave one begins with its severity, in colour on a terminal."""
    if isinstance(found, str):
        return wrapped(Text(printable(found)), console, Text("• "))
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


def print_report(data: ReportData, file: TextIO, full: bool = False) -> None:
    """The report on one screen; `full`: with every finding and note, and excerpts of the tables."""
    console, model = text.console_for(file), title_of(data)
    title = Text(printable(f"{model} · {data.trace.path} · {data.trace.status}"), style="bold")
    if not full:
        print_one_screen(data, title, console)
        return
    print_lines(title, "", console)
    console.print()
    print_verdict(findings(data), console)
    console.print()
    most = MOST_ROUTERS if console.is_terminal else len(data.selection.routers)
    for line in heatmap_lines(data, console, most):
        console.print(line, no_wrap=True, overflow="crop")
    command = f"moe-inspect report {shlex.quote(str(data.trace.path))}"
    has_router = data.trace.has_weights or "logits" in data.trace.tables
    absent = {"vocabulary"} if data.counts.counts_only else set[str]()
    absent |= set() if has_router else {"router"}
    for name, excerpt in excerpts_of(data).items():
        alone = len(data.counts.domains) < 2 and data.selection.domains is None
        if name == "domains" and alone:
            labels = ", ".join(map(repr, data.counts.domains))
            console.print()
            console.print(Text(f"domains: only one, {labels}: nothing to compare it with"))
        elif name not in absent:
            table = data.tables[name]
            if name == "specialization" and not table["domain_mi_bits"].notna().any():
                excerpt = replace(excerpt, what="the first routers")
            print_excerpt(table, name, excerpt, ROWS, command, console)
    if notes(data):
        console.print()
    for note in notes(data):
        print_lines(note, "dim", console, Text("note: ", "dim"))


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


def _most_and_least_loaded(frame: pd.DataFrame, most: int) -> pd.DataFrame:
    if len(frame) <= most:
        return frame
    ordered = frame.sort_values("load_ratio", ascending=False, kind="stable")
    ordered = ordered.dropna(subset="load_ratio")
    half = most // 2
    return pd.concat([ordered.head(half), ordered.iloc[half:].tail(most - half)])


def _furthest_above_mean(frame: pd.DataFrame, most: int) -> pd.DataFrame:
    rise = frame["activation"] - frame["activation"] / frame["lift"]
    return frame.loc[rise.nlargest(most).index]


def _most_exclusive(frame: pd.DataFrame, most: int) -> pd.DataFrame:
    # first choices may be unknown
    fraction = frame["first_choice_fraction"].fillna(frame["fraction"])
    return frame.loc[(fraction * np.log1p(frame["count"])).nlargest(most).index]


def _excerpt(what: str, rows: Callable[[pd.DataFrame, int], pd.DataFrame], of: str) -> Excerpt:
    return Excerpt(what, rows, ("layer", "router", *of.split()))


# table → what of it, in the order of the report: which rows, in words and chosen, and which columns
EXCERPTS = {
    "balance": _excerpt(
        "the least balanced routers",
        partial(highest_rows, column="max_vio"),
        "max_over_mean expected_by_chance max_over_mean_low max_over_mean_high busiest_expert "
        "dead_experts cv gini max_vio_batch",
    ),
    "load": _excerpt(
        "the most and the least loaded experts",
        _most_and_least_loaded,
        "expert assignments share load_ratio first_choice",
    ),
    "domains": _excerpt(
        "furthest above the mean over the domains, by activation minus that mean",
        _furthest_above_mean,
        "domain expert tokens activation lift",
    ),
    "specialization": _excerpt(
        "the routers that separate domains best",
        partial(highest_rows, column="domain_mi_bits"),
        "domain_mi_bits domain_mi_null_bits token_mi_bits token_mi_null_bits jsd_bits "
        "vocabulary_specialization",
    ),
    "router": _excerpt(
        "the least confident routers",
        partial(highest_rows, column="gate_entropy_nats", otherwise="weight_entropy_nats"),
        "weight_mass weight_entropy_nats aux_loss z_loss gate_entropy_nats top_k_mass tie_rate",
    ),
    "vocabulary": _excerpt(
        "the token ids that go to one expert most exclusively",
        _most_exclusive,
        "expert token count fraction first_choice_fraction",
    ),
}


def excerpts_of(data: ReportData) -> dict[str, Excerpt]:
    """EXCERPTS of a trace: the router is named where a layer has several."""
    if len({r.layer for r in data.trace.routers}) < len(data.trace.routers):
        return EXCERPTS
    return {
        name: replace(of, columns=tuple(c for c in of.columns if c != "router"))
        for name, of in EXCERPTS.items()
    }
