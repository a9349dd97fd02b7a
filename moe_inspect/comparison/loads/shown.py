"""The load of two traces as charts by layer, as text and as a page."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TextIO

import numpy as np
from rich.text import Text

from moe_inspect.comparison.loads.compare import LoadComparison
from moe_inspect.comparison.loads.data import SIDES
from moe_inspect.reporting.charts.spec import Axis, Chart, Line, Panel, Points
from moe_inspect.reporting.render.console import console_for, print_frame
from moe_inspect.reporting.render.html import Page, Section, chart_section, page_html
from moe_inspect.reporting.render.terminal import print_verdict
from moe_inspect.text import layer_label, printable

ROWS = 10  # of a table; --table has them all
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


def _layers(data: LoadComparison) -> Axis:
    return Axis("layer", tuple(layer_label(data.a.routers, r) for r, _ in data.pairs))


def load_shift(data: LoadComparison) -> Chart:
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
        text="The share of the assignments that go to other experts. The dash is what chance alone "
        "moves between two traces of so many tokens.",
        table=table,
    )


def max_vio(data: LoadComparison) -> Chart:
    """How even the load is in each."""
    table: Any = data.tables["balance"]
    x, marks = np.arange(len(table), dtype=float), list[Line]()
    for side in SIDES:
        vio, floor = (table[f"{c}_{side}"].to_numpy(float) for c in ("max_vio", "noise_floor"))
        marks.append(Line(x, vio, side.upper(), COLOURS[side], dots=True))
        marks.append(Line(x, floor, f"{side.upper()}: chance", COLOURS[side], dash="dot"))
    return Chart(
        "How even the load is",
        "MaxVio, the load of the busiest expert above the mean",
        (Panel(tuple(marks), _layers(data), Axis("(max − mean) / mean", low=0)),),
        text="0 is even.",
        table=table,
    )


def draw_load_charts(data: LoadComparison) -> list[Chart]:
    """All charts."""
    return [replace(make(data), name=make.__name__) for make in (load_shift, max_vio)]


def loads_page(made: LoadComparison) -> str:
    """The page, as HTML."""
    sections = [chart_section(chart) for chart in draw_load_charts(made)]
    titles = {"load": "Experts", "summary": "About these traces", "refused": "Not compared"}
    sections += [Section(title, table=made.tables[name]) for name, title in titles.items()]
    return page_html(
        Page(
            "The load of two traces",
            f"A {made.a.path} · B {made.b.path}",
            verdict=made.verdict(),
            sections=sections,
            footer="Counts tell the load of experts, not decisions. Made by moe-inspect.",
        )
    )


def print_loads(made: LoadComparison, file: TextIO) -> None:
    """The whole text."""
    console = console_for(file)
    console.print(Text(printable(f"A {made.a.path} · B {made.b.path}"), style="bold"))
    console.print()
    print_verdict(made.verdict(), console)
    for name, worst in (("load_shift", "load_shift"), ("balance", "max_vio_b")):
        whole: Any = made.tables[name]
        frame = whole.nlargest(ROWS, worst) if len(whole) > ROWS else whole
        if name == "balance" and console.is_terminal:
            frame = frame[list(ON_A_TERMINAL)]
        cut = len(frame) < len(whole)
        title = f"{name}: the highest {worst}, {ROWS} of {len(whole):,} rows" if cut else name
        print_frame(frame.sort_values(["layer", "router"]), console, title, console.is_terminal)
