"""Two different models as charts over relative depth, as text and as a page."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TextIO

import numpy as np
from rich.text import Text

from moe_inspect.comparison.models.data import SIDES, ModelData
from moe_inspect.comparison.models.verdict import findings
from moe_inspect.errors import MoeInspectError
from moe_inspect.reporting.charts.spec import Axis, Chart, Line, Panel, known_interval
from moe_inspect.reporting.render.console import (
    console_for,
    print_and_count,
    print_frame,
    rows_that_fit,
)
from moe_inspect.reporting.render.html import Page, Section, chart_section, page_html
from moe_inspect.reporting.render.notebook import Cell, verdict_cell
from moe_inspect.reporting.render.python import python_call, table_of
from moe_inspect.reporting.render.terminal import print_verdict
from moe_inspect.text import printable

STEPS = 100  # of the axis of relative depth
DEPTH = Axis(
    "relative depth: 0% is the first layer, 100% the last",
    tuple(f"{i}%" for i in range(STEPS + 1)),
)
COLOURS = dict(zip(SIDES, ("c1", "c2"), strict=True))
EXCERPTS = {
    "balance": (
        "layer",
        "router",
        "trace",
        "depth",
        "max_over_mean",
        "expected_by_chance",
        "dead_experts",
    ),
    "specialization": ("layer", "router", "trace", "depth", "explained_by_domain", "jsd_bits"),
    "spans": (
        "layer",
        "router",
        "trace",
        "depth",
        "explained_by_text",
        "explained_by_text_low",
        "explained_by_text_high",
    ),
}


def _lines(
    table: Any, column: str, low: str = "", high: str = "", floor: str = ""
) -> tuple[Line, ...]:
    marks = list[Line]()
    for side in SIDES:
        rows = table[table["trace"] == side].sort_values("depth", kind="stable")
        x, name = (STEPS * rows["depth"].to_numpy(float)).round(), side.upper()
        ends = known_interval(rows[low], rows[high]) if low else (None, None)
        marks.append(Line(x, rows[column].to_numpy(float), name, COLOURS[side], "", True, *ends))
        if floor:
            y = rows[floor].to_numpy(float)
            marks.append(Line(x, y, f"{name}: chance", COLOURS[side], dash="dot"))
    return tuple(marks)


def load_by_depth(data: ModelData) -> Chart:
    """How even the load is, by relative depth."""
    table = data.tables["balance"]
    ends = "max_over_mean_low", "max_over_mean_high"
    marks = _lines(table, "max_over_mean", *ends, "expected_by_chance")
    return Chart(
        "How even the load is",
        "Load of the busiest expert ÷ mean load, by relative depth",
        (Panel(marks, DEPTH, Axis("max ÷ mean load", low=1)),),
        text="1 is even; at most E/k is possible. Bars are 95% intervals over documents.",
        table=table,
    )


def domains_by_depth(data: ModelData) -> Chart:
    """The share that the domain explains, by relative depth."""
    table = data.tables["specialization"]
    return Chart(
        "Specialization by domain",
        "Share of what a domain could tell about the expert, by relative depth",
        (Panel(_lines(table, "explained_by_domain"), DEPTH, Axis("share, beyond chance", low=0)),),
        text="Beyond chance. 0: all domains are alike; 1: as different as their "
        "number, E and k allow.",
        table=table,
    )


def texts_by_depth(data: ModelData) -> Chart:
    """The share that the text of a span explains, by relative depth."""
    table = data.tables["spans"]
    marks = _lines(table, "explained_by_text", "explained_by_text_low", "explained_by_text_high")
    return Chart(
        "Do experts follow the text?",
        "Share of the entropy of the first choice that a span's text explains, by relative depth",
        (Panel(marks, DEPTH, Axis("share, beyond chance", low=0)),),
        text="The same spans of text for both, however their tokenizers cut them; beyond shuffled "
        "spans. 1: the text alone decides the first expert. Bars are 95% intervals over "
        "documents.",
        table=table,
    )


CHARTS: tuple[Callable[[ModelData], Chart], ...] = (
    load_by_depth,
    domains_by_depth,
    texts_by_depth,
)

# chart → its group on the page and its table
GROUP_AND_TABLE = {
    "load_by_depth": ("Balance", "balance"),
    "domains_by_depth": ("Specialization", "specialization"),
    "texts_by_depth": ("Specialization", "spans"),
}
EXPERT = ["trace", "router", "expert"]


def draw_model_charts(data: ModelData) -> tuple[list[Chart], list[str]]:
    """All charts that the two have the data for, and why others are missing."""
    charts, left_out = list[Chart](), list[str]()
    for make in CHARTS:
        try:
            charts.append(replace(make(data), name=make.__name__))
        except MoeInspectError as error:
            left_out.append(str(error))
    return charts, list(dict.fromkeys(left_out))


def models_page(made: ModelData) -> str:
    """The page, as HTML."""
    charts, left_out = draw_model_charts(made)
    sections = list[Section]()
    for chart in charts:
        group, name = GROUP_AND_TABLE[chart.name]
        code = _python(made, name)
        sections.append(replace(chart_section(chart), group=group, python=code))
    if not made.why_not("vocabulary"):
        rows: Any = made.tables["vocabulary"]
        text = "Spans of text that choose an expert first most exclusively, one per expert."
        best = rows.groupby(EXPERT, sort=False).head(1)
        code = f"{_python(made, 'vocabulary')}.groupby({EXPERT}, sort=False).head(1)"
        section = Section(
            "Texts of experts",
            text,
            table=best,
            group="Specialization",
            name="vocabulary",
            python=code,
        )
        sections.append(section)
    for name, title in (("summary", "About these models"), ("refused", "Not compared")):
        code = _python(made, name)
        sections.append(Section(title, table=made.tables[name], name=name, python=code))
    return page_html(
        Page(
            "Two models, side by side",
            f"A {made.a.path} · B {made.b.path}",
            verdict=findings(made),
            sections=sections,
            left_out=left_out,
            footer="Figures of two models are comparable if they are shares of what is possible or "
            "are shown beside chance. Made by moe-inspect.",
        )
    )


def _python(made: ModelData, table: str) -> str:
    return table_of(python_call("compare_models", [made.a, made.b], made.options), table)


def models_cell(made: ModelData) -> Cell:
    """What a notebook shows: the verdict, and how even the load of each is."""
    title = f"A {made.a.path} · B {made.b.path}"
    return verdict_cell(title, findings(made), made.tables, load_by_depth(made))


def print_models(made: ModelData, file: TextIO) -> None:
    """The whole text."""
    console = console_for(file)
    title = f"A {made.a.path} · B {made.b.path}"
    lines = print_and_count(partial(print_verdict, findings(made)), console, title)
    there = {name: columns for name, columns in EXCERPTS.items() if not made.why_not(name)}
    most = rows_that_fit(console, lines + 2, len(there), 5) // 2 if console.is_terminal else ROWS
    for name, columns in there.items():
        frame: Any = made.tables[name]
        if console.is_terminal:
            frame = frame[list(columns)]
        shown = _apart(frame, max(most, 1))
        cut = len(shown) < len(frame)
        title = f"{name}: {max(most, 1)} routers of each trace at most" if cut else name
        print_frame(shown, console, title, fitting=console.is_terminal)
    paths = " ".join(shlex.quote(str(trace.path)) for trace in (made.a, made.b))
    command = f"experts' texts: moe-inspect compare {paths} --table vocabulary"
    console.print(Text(printable(command), style="dim"))


ROWS = 8  # of a trace in a file; --table has them all


def _apart(frame: Any, most: int) -> Any:
    """At most `most` routers of each trace, spread over its depth."""
    kept = list[Any]()
    for side in SIDES:
        rows = frame[frame["trace"] == side]
        at = np.unique(np.linspace(0, max(len(rows) - 1, 0), min(most, len(rows))).round())
        kept += rows.index[at.astype(int)].tolist()
    return frame.loc[kept]
