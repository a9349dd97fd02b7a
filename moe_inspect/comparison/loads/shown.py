"""The load of two traces as charts by layer, as text and as a page."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, TextIO

import numpy as np

from moe_inspect.comparison.loads.data import SIDES, LoadData
from moe_inspect.comparison.loads.tables import chance_limit
from moe_inspect.comparison.loads.verdict import findings
from moe_inspect.reporting.charts.spec import (
    MOST_LINES,
    Axis,
    Band,
    Chart,
    Heatmap,
    Line,
    Mark,
    Panel,
    Points,
    Scale,
    look,
)
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
from moe_inspect.text import layer_label, plural

ROWS = 10  # of a table in a file; --table has them all
ON_A_TERMINAL = (
    "layer",
    "router",
    "max_vio_a",
    "max_vio_b",
    "max_vio_difference",
    "dead_experts_a",
    "dead_experts_b",
    "entropy_a",
    "entropy_b",
)
COLOURS = dict(zip(SIDES, ("c1", "c2"), strict=True))


def _layers(data: LoadData) -> Axis:
    return Axis("layer", tuple(layer_label(data.a.routers, r) for r, _ in data.pairs))


def load_shift(data: LoadData) -> Chart:
    """How far the load moves, beside chance."""
    table: Any = data.tables["load_shift"]
    x = np.arange(len(table), dtype=float)
    moved, floor = (table[c].to_numpy(float) for c in ("load_shift", "load_shift_floor"))
    marks = (
        Points(x, moved, "B against A", "c1"),
        Points(x, floor, "chance", "c1", shape="tick"),
    )
    return Chart(
        "Load that moves",
        "Total variation of the experts' load between A and B",
        (Panel(marks, _layers(data), Axis("share of the load", low=0)),),
        text="The share of the assignments that go to different experts. The dash is what chance "
        "alone moves between two traces of this many tokens.",
        table=table,
    )


def max_vio(data: LoadData) -> Chart:
    """How even the load is in each."""
    table: Any = data.tables["balance"]
    x, marks = np.arange(len(table), dtype=float), list[Line]()
    for side in SIDES:
        names = ("max_over_mean", "expected_by_chance")
        ratio, floor = (table[f"{name}_{side}"].to_numpy(float) for name in names)
        marks.append(Line(x, ratio, side.upper(), COLOURS[side], dots=True))
        marks.append(Line(x, floor, f"{side.upper()}: chance", COLOURS[side], dash="dot"))
    return Chart(
        "How even the load is",
        "Load of the busiest expert ÷ mean load",
        (Panel(tuple(marks), _layers(data), Axis("max ÷ mean load", low=1)),),
        text="1 is even.",
        table=table,
    )


def by_step(data: LoadData) -> Chart | None:
    """How far the load moves in every window of steps; None where there are not two of them."""
    table: Any = data.tables["windows"]
    if table["window"].nunique() < 2:
        return None
    steps, moved = data.steps, "share of the load that moves"
    moved_LW, floor_LW = (
        table[c].to_numpy(float).reshape(len(data.pairs), -1)
        for c in ("load_shift", "load_shift_floor")
    )
    limit_LW = np.stack(
        [
            chance_limit(floor_W, data.a.routers[r].experts)
            for (r, _), floor_W in zip(data.pairs, floor_LW, strict=True)
        ]
    )
    time = Axis(f"first {steps.unit} of the window", tuple(f"{step:,}" for step in steps.first_W))
    x = np.arange(len(steps.first_W), dtype=float)
    if len(moved_LW) <= MOST_LINES:
        chance_W = np.nan_to_num(limit_LW).max(0)
        marks: list[Mark] = [Band(x, 0 * x, chance_W, "may be chance")]
        for i, (label, moved_W) in enumerate(zip(_layers(data).labels, moved_LW, strict=True)):
            marks.append(Line(x, moved_W, f"layer {label}", *look(i)))
        panel = Panel(tuple(marks), time, Axis(moved, low=0))
    else:
        beyond_LW = np.maximum(moved_LW - limit_LW, 0)
        high = float(np.nanmax(np.nan_to_num(beyond_LW))) or 1.0
        heatmap = Heatmap(beyond_LW, Scale("amount", f"{moved}, beyond chance", 0.0, high))
        panel = Panel((heatmap,), time, _layers(data))
    return Chart(
        "Since which step",
        f"How far the load of B is from that of A in the same {steps.units}, by layer",
        (panel,),
        text="Diverging runs leave the band of chance and stay outside. A window lies between two "
        f"{steps.units} at which both traces were written to disk; the table shows since "
        f"which {steps.unit} each layer differs.",
        table=data.tables["diverged"],
        definitions={
            "may be chance": "up to twice the total variation expected between two windows of this "
            "many tokens with equal routers; more with fewer than 8 experts."
        },
    )


def draw_load_charts(data: LoadData) -> list[Chart]:
    """All charts."""
    made = ((make, make(data)) for make in (load_shift, by_step, max_vio))
    return [replace(chart, name=make.__name__) for make, chart in made if chart is not None]


# chart → its group on the page and its table
CHARTS = {
    "load_shift": ("Change of the load", "load_shift"),
    "by_step": ("Change of the load", "diverged"),
    "max_vio": ("Load of each trace", "balance"),
}
# table → its group on the page and its title
TABLES = {
    "load": ("Load of each trace", "Experts"),
    "summary": ("", "About these traces"),
    "refused": ("", "Not compared"),
}


def loads_page(made: LoadData) -> str:
    """The page, as HTML."""
    sections = list[Section]()
    for chart in draw_load_charts(made):
        group, name = CHARTS[chart.name]
        code = _python(made, name)
        sections.append(replace(chart_section(chart), group=group, python=code))
    for name, (group, title) in TABLES.items():
        code = _python(made, name)
        table = made.tables[name]
        sections.append(Section(title, table=table, group=group, name=name, python=code))
    return page_html(
        Page(
            "The load of two traces",
            f"A {made.a.path} · B {made.b.path}",
            verdict=findings(made),
            sections=sections,
            footer="Counts hold the load of experts, no decisions. Made by moe-inspect.",
        )
    )


def _python(made: LoadData, table: str) -> str:
    return table_of(python_call("compare", [made.a, made.b], made.options.given()), table)


def loads_cell(made: LoadData) -> Cell:
    """What a notebook shows: the verdict, how far the load moves, and where the furthest."""
    whole: Any = made.tables["load_shift"]
    worst = whole.nlargest(len(whole), "load_shift")
    title = f"A {made.a.path} · B {made.b.path}"
    caption = f"load_shift, the highest of {plural(len(whole), 'router')}"
    return verdict_cell(title, findings(made), made.tables, load_shift(made), worst, caption)


def print_loads(made: LoadData, file: TextIO) -> None:
    """The whole text."""
    console = console_for(file)
    title = f"A {made.a.path} · B {made.b.path}"
    lines = print_and_count(partial(print_verdict, findings(made)), console, title)
    excerpts = {"load_shift": "load_shift", "diverged": "most_load_shift", "balance": "max_vio_b"}
    if len(made.steps.first_W) < 2:
        del excerpts["diverged"]
    most = rows_that_fit(console, lines, len(excerpts)) if console.is_terminal else ROWS
    for name, worst in excerpts.items():
        whole: Any = made.tables[name]
        frame = whole.nlargest(most, worst) if len(whole) > most else whole
        if name == "balance" and console.is_terminal:
            frame = frame[list(ON_A_TERMINAL)]
        cut = len(frame) < len(whole)
        title = f"{name}: the highest {worst}, {most} of {len(whole):,} rows" if cut else name
        print_frame(frame.sort_values(["layer", "router"]), console, title, console.is_terminal)
