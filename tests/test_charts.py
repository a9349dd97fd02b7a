"""Charts: each is written once, and the picture and the page draw the same of it."""

from __future__ import annotations

import base64
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex

from moe_inspect.reporting.charts import spec
from moe_inspect.reporting.charts.spec import (
    PALETTE,
    Axis,
    Band,
    Chart,
    Heatmap,
    Line,
    Links,
    Panel,
    Points,
    Rule,
    Scale,
    draw_charts,
    every_chart,
)
from moe_inspect.reporting.render import html
from moe_inspect.reporting.render.matplotlib import draw, letters
from moe_inspect.reporting.report import Report, report
from moe_inspect.reporting.tables.registry import TABLES
from moe_inspect.reporting.verdict.chance import uneven
from tests.conftest import ROOT
from tests.synthetic import uniform_ids, write_trace

SAMPLES = ("balanced", "collapsed", "untrained")


@cache
def of(sample: str) -> Report:
    return report(ROOT / "sample_traces" / sample)


@cache
def drawn(sample: str) -> dict[str, Chart]:
    charts, left_out = draw_charts(of(sample))
    assert left_out == []
    return {chart.name: chart for chart in charts}


@pytest.mark.parametrize("sample", SAMPLES)
def test_every_chart_of_a_sample_is_drawn_in_the_order_of_the_page(sample: str):
    assert list(drawn(sample)) == list(every_chart())
    assert {table for tables in spec.TABLES_OF.values() for table in tables} <= set(TABLES)


@pytest.mark.parametrize("name", every_chart())
@pytest.mark.parametrize("sample", SAMPLES)
def test_the_picture_and_the_page_show_the_same(sample: str, name: str):
    chart = drawn(sample)[name]
    with letters():
        figure = draw(chart)
        figure.draw_without_rendering()
    assert chart.headline in figure.get_suptitle()
    section = html.chart_section(chart)
    assert section.title == chart.title
    assert chart.title.replace(" ", "\\ ") in figure.get_suptitle()
    shown = [axes for axes in figure.axes if axes.axison and not hasattr(axes, "_colorbar")]
    assert len(shown) == len(chart.panels)
    for axes, panel in zip(shown, chart.panels, strict=True):
        on_page = html.panel_json(panel)
        assert axes.get_title(loc="left") == panel.title
        assert (axes.get_xlabel(), axes.get_ylabel()) == (panel.x.title, panel.y.title)
        assert (on_page["x"]["title"], on_page["y"]["title"]) == (panel.x.title, panel.y.title)
        assert len(on_page["marks"]) == len(panel.marks)
        legend = axes.get_legend()
        in_picture = [text.get_text() for text in legend.get_texts()] if legend else []
        named = [mark["name"] for mark in on_page["marks"] if mark.get("name")]
        assert in_picture == named
        lines = {line.get_label(): line for line in axes.lines}
        for mark, page_mark in zip(panel.marks, on_page["marks"], strict=True):
            if isinstance(mark, (Line, Points)) and mark.name:
                line: Any = lines[mark.name]
                assert to_hex(line.get_color()) == PALETTE[mark.colour][0]
                on_paper, on_screen = line.get_ydata(), np.array(page_mark["y"], float)
                assert on_screen == pytest.approx(on_paper, rel=1e-4, nan_ok=True)
        assert len(axes.images) == (panel.heatmap is not None)
        if panel.heatmap:
            R, C = panel.heatmap.values.shape
            [image] = axes.images
            assert image.get_array().shape == (R, C)  # type: ignore[union-attr]
            page_mark = on_page["marks"][0]
            assert (page_mark["rows"], page_mark["columns"]) == (R, C)


@pytest.mark.parametrize("name", every_chart())
def test_a_chart_says_in_words_what_it_shows_and_red_is_for_faults(name: str):
    for sample in SAMPLES:
        chart = drawn(sample)[name]
        assert len(chart.description) > len(chart.title) + 20
        assert chart.text
        assert chart.table is not None or chart.interactive
        marks: list[Any] = [mark for panel in chart.panels for mark in panel.marks]
        red = sum(len(mark.x) for mark in marks if getattr(mark, "colour", "") == "bad")
        uneven_routers = sum(uneven(of(sample), row) for row in of(sample).loaded)
        assert red == (uneven_routers if name == "balance" else 0)


def every_mark() -> Chart:
    x = np.arange(4.0)
    y = np.array([1.0, np.nan, 3.0, 2.0])
    marks = (
        Band(x, x * 0, x, "band"),
        Rule(1, "rule", dash="dash"),
        Links(x, x, x + 1),
        Line(x, y, "line", "c1", "dot", True, y - 1, y + 1),
        Points(x, y, "dots", "c2", "dot", y - 1, y + 1),
        Points(x, y, "ticks", "c3", "tick"),
    )
    axis = Axis("layer", ("0", "1", "2", "3"))
    heat = Heatmap(np.array([[0, 0.5], [np.nan, 9]]), Scale("ratio", "ratio", unknown="unknown"))
    panels = (Panel(marks, axis, Axis("y", low=0, high=9)), Panel((heat,), Axis("e"), Axis("l")))
    return Chart("All", "Every mark there is", panels, columns=2)


def test_both_drawers_know_every_mark():
    chart = every_mark()
    kinds = {type(mark) for panel in chart.panels for mark in panel.marks}
    assert kinds == set(spec.Mark.__args__)  # type: ignore[attr-defined]
    axes = draw(chart).axes[0]
    assert axes.get_ylim()[1] == 9
    assert sum(isinstance(found, LineCollection) for found in axes.collections) == 3
    page = [html.panel_json(panel) for panel in chart.panels]
    assert page[0]["marks"][3]["y"] == [1, None, 3, 2]
    script = html.asset("chart.js")
    assert all(f'"{kind.__name__.lower()}"' in script for kind in kinds - {Points})
    with pytest.raises(TypeError, match="no way to draw str"):
        draw(Chart("t", "c", (Panel(("mark",), Axis(), Axis()),)))  # type: ignore[arg-type]


@pytest.mark.parametrize(("routers", "heatmap"), [(12, False), (13, True)])
def test_more_routers_than_can_be_told_apart_make_a_heatmap(
    tmp_path: Path, routers: int, heatmap: bool
):
    rng = np.random.default_rng(0)
    trace = write_trace(tmp_path / "t", [uniform_ids(rng, 400, 8, 2)] * routers, 8)
    charts = {chart.name: chart for chart in draw_charts(report(trace, window=100))[0]}
    assert (charts["windows"].panels[0].heatmap is not None) == heatmap
    assert (charts["drift"].panels[0].heatmap is not None) == heatmap


def test_the_values_of_a_heatmap_survive_their_codes():
    rng = np.random.default_rng(0)
    values = np.where(rng.random((7, 9)) < 0.2, np.nan, rng.random((7, 9)) * 3)
    values[2, 3] = 0
    coded = html._coded(values)
    codes = np.frombuffer(base64.b64decode(coded["values"]), "<u2")
    step = (coded["high"] - coded["low"]) / (html.LAST_CODE - 1)
    back = np.where(codes == html.LAST_CODE, np.nan, coded["low"] + codes * step)
    assert back.reshape(7, 9) == pytest.approx(values, abs=3e-5, nan_ok=True)
    assert back.reshape(7, 9)[2, 3] == 0  # no load at all has a colour of its own
