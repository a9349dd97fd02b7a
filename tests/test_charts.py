"""Charts of reports and simulations: each is written once, and the picture and the page draw the
same of it."""

from __future__ import annotations

import base64
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex
from matplotlib.text import Text

from moe_inspect.errors import MoeInspectError
from moe_inspect.public import Trace, report
from moe_inspect.reporting.charts import spec
from moe_inspect.reporting.charts.spec import Axis, Chart, Heatmap, Line, Panel, Points, Scale
from moe_inspect.reporting.render import html, payload
from moe_inspect.reporting.render.matplotlib import DPI, colour_map, draw, letters, named_ticks
from moe_inspect.reporting.report import Report
from moe_inspect.reporting.tables.registry import TABLES
from moe_inspect.reporting.verdict.findings import uneven
from moe_inspect.simulate.cache import simulate_cache
from moe_inspect.simulate.placement.placement import simulate_placement
from moe_inspect.simulate.result import Simulation
from moe_inspect.simulate.routing import simulate_routing
from tests.conftest import ROOT
from tests.support.sweep import sample
from tests.support.synthetic import uniform_ids, write_trace

SAMPLES = ("balanced", "collapsed", "untrained")


@cache
def of(trace: str) -> Report:
    return report(ROOT / "sample_traces" / trace)


@cache
def drawn(trace: str) -> dict[str, Chart]:
    charts, left_out = spec.draw_charts(of(trace))
    assert left_out == []
    return {chart.name: chart for chart in charts}


@pytest.mark.parametrize(
    ("trace", "name"), sample([(x, y) for x in SAMPLES for y in spec.every_chart()], 4)
)
def test_the_picture_and_the_page_show_the_same(trace: str, name: str):
    chart = drawn(trace)[name]
    with letters():
        figure = draw(chart)
        assert overlapping(figure) == []
    title, caption = (text.get_text() for text in figure.texts[:2])
    assert chart.headline == caption.replace("\n", " ")
    assert chart.title == title == html.chart_section(chart).title
    shown = [axes for axes in figure.axes if axes.get_label() != "scale"]
    assert len(shown) == len(chart.panels)
    for axes, panel in zip(shown, chart.panels, strict=True):
        on_page = payload.panel_json(panel)
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
                assert to_hex(line.get_color()) == spec.PALETTE[mark.colour][0]
                on_paper, on_screen = line.get_ydata(), np.array(page_mark["y"], float)
                assert on_screen == pytest.approx(on_paper, rel=1e-4, nan_ok=True)
        assert len(axes.images) == (panel.heatmap is not None)
        if panel.heatmap:
            R, C = panel.heatmap.values.shape
            [image] = axes.images
            assert image.get_array().shape == (R, C)  # type: ignore[union-attr]
            page_mark = on_page["marks"][0]
            assert (page_mark["rows"], page_mark["columns"]) == (R, C)


# chart, panel and mark → the column that it shows, of the table below the chart
SHOWN = {
    ("specialization", 0, "domain"): "domain_mi_bits",
    ("specialization", 0, "domain: by chance"): "domain_mi_null_bits",
    ("specialization", 0, "token id"): "token_mi_bits",
    ("specialization", 0, "token id: by chance"): "token_mi_null_bits",
    ("drift", 1, "to the next window"): "total_variation",
    ("drift", 1, "to the next window: chance"): "total_variation_floor",
    ("drift", 1, "first to last window"): "first_to_last",
    ("drift", 1, "first to last window: chance"): "first_to_last_floor",
}


def marks_of(chart: Chart, panel: int) -> dict[str, Any]:
    return {mark.name: mark for mark in chart.panels[panel].marks if hasattr(mark, "name")}


def test_marks_show_columns_with_their_intervals():
    ends = (("", "y"), ("_low", "low"), ("_high", "high"))
    for (name, panel, mark), column in SHOWN.items():
        table: Any = of("balanced").tables.complete(name)
        found = marks_of(drawn("balanced")[name], panel)[mark]
        for end, shown in ends:
            if f"{column}{end}" in table:
                values = table[f"{column}{end}"].to_numpy()
                assert getattr(found, shown) == pytest.approx(values, nan_ok=True), mark
    table = of("balanced").tables["repetition"]
    lines = marks_of(drawn("balanced")["repetition"], 0)
    for domain, rows in table.groupby("domain"):
        for end, shown in ends:
            values = rows[f"first_choice{end}"].to_numpy()
            assert getattr(lines[domain], shown) == pytest.approx(values)


@pytest.mark.parametrize("trace", SAMPLES)
def test_a_chart_says_in_words_what_it_shows_and_red_is_for_faults(trace: str):
    assert list(drawn(trace)) == list(spec.every_chart())  # in the order of the page
    assert {table for of in spec.every_chart().values() for table in of.tables} <= set(TABLES)
    for name, chart in drawn(trace).items():
        assert len(chart.description) > len(chart.title) + 20
        assert chart.text
        assert chart.table is not None or chart.interactive
        marks: list[Any] = [mark for panel in chart.panels for mark in panel.marks]
        red = sum(len(mark.x) for mark in marks if getattr(mark, "colour", "") == "bad")
        uneven_routers = sum(uneven(of(trace), row) for row in of(trace).loaded)
        assert red == (uneven_routers if name == "balance" else 0)


def overlapping(figure: Any) -> list[str]:
    """Texts of a figure that overlap others or reach beyond its edge."""
    figure.draw_without_rendering()
    shown = [text for text in figure.findobj(Text) if text.get_text().strip()]
    texts = [(text.get_text(), text.get_window_extent()) for text in shown if text.get_visible()]
    found, page = list[str](), figure.bbox
    for i, (text, box) in enumerate(texts):
        if not (box.x0 >= 0 and box.y0 >= 0 and box.x1 <= page.x1 and box.y1 <= page.y1):
            found.append(f"{text!r} is cut")
        for other, beside in texts[:i]:
            width = min(box.x1, beside.x1) - max(box.x0, beside.x0)
            height = min(box.y1, beside.y1) - max(box.y0, beside.y0)
            if width > 0.5 and height > 1.5:
                found.append(f"{text!r} over {other!r}")
    return found


def test_pictures_of_a_large_model_can_be_read(tmp_path: Path):
    """60 × 128, six domains; expert 5 of layer 30 is chosen by every token, 9 and 40 of layer 7 by
    the same third."""
    rng, T, E = np.random.default_rng(0), 600, 128
    ids = [uniform_ids(rng, T, E, 4) for _ in range(60)]
    ids[30][~(ids[30] == 5).any(1), 0] = 5
    apart = ~np.isin(ids[7], (9, 40)).any(1) & (np.arange(T) % 3 == 0)
    ids[7][apart, :2] = 9, 40
    labels = [f"domain number {d}" for d in range(6)]
    document = np.arange(T) // 20
    trace = write_trace(tmp_path / "t", ids, E, document=document, domain_of_document=labels)
    charts = {chart.name: chart for chart in spec.draw_charts(report(trace, window=100))[0]}
    with letters():
        for name, chart in charts.items():
            figure = draw(chart)
            assert overlapping(figure) == [], name
            assert figure.get_figwidth() * DPI <= 2_000
            smallest = min(float(text.get_fontsize()) for text in figure.findobj(Text))
            assert smallest * DPI / 72 >= 22  # 11 pixels at half size
        figure.text(0, 0.99, "over the title")
        assert overlapping(figure) != []
    repetition = charts["repetition"].panels[0].heatmap
    assert repetition is not None
    assert repetition.values.shape == (6, 60)
    load = charts["load"].panels[0].heatmap
    assert load is not None
    assert load.scale.ticks()[-1] == (1.0, "E/k = 32")
    assert charts["balance"].panels[0].y.log
    [matrix] = [p for p in charts["coactivation"].panels if p.title.startswith("layer 7:")]
    assert {"9", "40"} <= set(matrix.y.labels) == set(matrix.x.labels)
    assert len(matrix.y.labels) < 64
    windows = charts["windows"].panels[0].x
    assert [label for _, label in windows.ticks] == [f"{n}" for n in range(0, 501, 50)]


@pytest.mark.parametrize("name", sample(spec.every_chart(), 4))
def test_a_picture_as_wide_as_a_column_can_be_read(name: str):
    with letters():
        figure = draw(drawn("collapsed")[name], 3.3)
        assert overlapping(figure) == []
    assert figure.get_figwidth() == 3.3
    assert min(float(text.get_fontsize()) for text in figure.findobj(Text)) >= 8


def test_an_interval_that_reaches_down_to_0_has_a_place_on_a_logarithmic_axis():
    x, y = np.arange(2.0), np.array([2.0, 40.0])
    marks = (Points(x, y, "load", "c1", "dot", np.array([0.0, 20.0]), y + 1),)
    panel = Panel(marks, Axis("layer", ("0", "1")), Axis("max ÷ mean", low=1, log=True))
    bottom, top = draw(Chart("t", "c", (panel,))).axes[0].get_ylim()
    assert bottom == 1
    assert top == pytest.approx(41, rel=0.1)


def test_colours_tell_large_ratios_apart_and_show_the_direction():
    def shade(ratio: float, scale: Scale) -> np.ndarray:
        return 256 * np.array(colour_map(scale)(scale.place(np.array(ratio)))[:3])

    scale, capped = Scale("ratio", "load", high=32), Scale("ratio", "load")
    assert np.abs(shade(5, scale) - shade(21, scale)).sum() > 80
    assert np.abs(shade(5, capped) - shade(21, capped)).sum() == 0
    red, blue = (shade(r, scale)[0] - shade(r, scale)[2] for r in (1.1, 1 / 1.1))
    assert red > 40
    assert blue < -20
    assert [label for _, label in scale.ticks()] == ["≤ ¼", "½", "1", "2", "4", "8", "16", "≥ 32"]
    shares = np.linspace(0, 1, 1000)
    assert spec.amount("share", 0, shares, 0.5).ticks()[-1] == (1.0, "1")
    assert spec.amount("share", 0, np.r_[shares, 7], 0.5).ticks()[-1] == (1.0, "≥ 1")


def test_ticks_of_layers_are_at_round_numbers():
    for first, count, expected in ((0, 58, "0 5 10"), (3, 58, "5 10 15"), (1, 8, "1 2 3")):
        axis = Axis("layer", tuple(str(first + i) for i in range(count)))
        ticks = named_ticks(axis, count, 15)
        assert [label for _, label in ticks][:3] == expected.split()
        assert all(axis.labels[int(at)] == label for at, label in ticks)


def test_both_drawers_know_every_mark():
    x = np.arange(4.0)
    y = np.array([1.0, np.nan, 3.0, 2.0])
    marks = (
        spec.Band(x, x * 0, x, "band"),
        spec.Bars(x, x, x + 1, "bars", "c4"),
        spec.Rule(1, "rule", dash="dash"),
        Line(x, y, "line", "c1", "dot", True, y - 1, y + 1),
        Points(x, y, "dots", "c2", "dot", y - 1, y + 1),
        Points(x, y, "ticks", "c3", "tick"),
    )
    axis = Axis("layer", ("0", "1", "2", "3"))
    heat = Heatmap(np.array([[0, 0.5], [np.nan, 9]]), Scale("ratio", "ratio", unknown="unknown"))
    panels = (Panel(marks, axis, Axis("y", low=0, high=9)), Panel((heat,), Axis("e"), Axis("l")))
    chart = Chart("All", "Every mark there is", panels, columns=2)
    kinds = {type(mark) for panel in chart.panels for mark in panel.marks}
    assert kinds == set(spec.Mark.__args__)  # type: ignore[attr-defined]
    axes = draw(chart).axes[0]
    assert axes.get_ylim()[1] == 9
    assert sum(isinstance(found, LineCollection) for found in axes.collections) == 2
    page = [payload.panel_json(panel) for panel in chart.panels]
    assert page[0]["marks"][3]["y"] == [1, None, 3, 2]
    script = html.asset("chart.js")
    assert all(f'"{kind.__name__.lower()}"' in script for kind in kinds - {Points})
    with pytest.raises(TypeError, match="no way to draw str"):
        draw(Chart("t", "c", (Panel(("mark",), Axis(), Axis()),)))  # type: ignore[arg-type]


def test_the_values_of_a_heatmap_survive_their_codes():
    rng = np.random.default_rng(0)
    values = np.where(rng.random((7, 9)) < 0.2, np.nan, rng.random((7, 9)) * 3)
    values[2, 3] = 0
    coded = payload._coded(values)
    codes = np.frombuffer(base64.b64decode(coded["values"]), "<u2")
    step = (coded["high"] - coded["low"]) / (payload.LAST_CODE - 1)
    back = np.where(codes == payload.LAST_CODE, np.nan, coded["low"] + codes * step)
    assert back.reshape(7, 9) == pytest.approx(values, abs=3e-5, nan_ok=True)
    assert back.reshape(7, 9)[2, 3] == 0  # no load at all has a colour of its own


POLICIES = ("contiguous", "greedy", "eplb")


def skewed(root: Path, layers: int) -> Trace:
    """Expert 0 of each layer is chosen by half of the tokens."""
    rng = np.random.default_rng(0)
    ids = [uniform_ids(rng, 800, 8, 2) for _ in range(layers)]
    for of in ids:
        of[::2] = [0, 1]
    return write_trace(root, ids, 8, document=np.arange(800) // 40, batch_tokens=100)


def test_policies_that_lie_on_each_other_are_one_line_with_all_their_names(tmp_path: Path):
    simulated = simulate_placement(skewed(tmp_path / "t", 2), gpus=2, policies=POLICIES)
    assert simulated.chart is not None
    by_layer, by_window = simulated.chart.panels
    dots = [mark for mark in by_layer.marks if isinstance(mark, Points)]
    assert [mark.name for mark in dots] == list(POLICIES)
    assert len({float(mark.x[0]) for mark in dots}) == 3  # beside each other
    windows = simulated.tables["windows"].groupby(["policy", "window"])["max_over_mean"].mean()
    tie = np.allclose(windows["greedy"], windows["eplb"], rtol=1e-3)
    names = [mark.name for mark in by_window.marks if isinstance(mark, Line)]
    assert names == (["contiguous", "greedy = eplb"] if tie else list(POLICIES))
    assert tie


def test_many_layers_make_a_heatmap_and_every_chart_can_be_read(tmp_path: Path):
    trace = skewed(tmp_path / "t", 14)
    placed = simulate_placement(trace, gpus=2, policies=POLICIES)
    assert placed.chart is not None
    heatmap = placed.chart.panels[0].heatmap
    assert heatmap is not None
    assert heatmap.values.shape == (3, 14)
    for simulated in (placed, simulate_cache(trace), simulate_routing(trace)):
        assert overlapping(simulated.plot()) == []
        made = simulated.page()
        assert "data-panel" in made
        assert "<img" not in made  # charts follow the theme, pictures do not
        again: dict[str, Any] = {}
        exec(simulated.python, again)
        for name, table in simulated.tables.items():
            assert table.equals(again["made"].tables[name])


def test_nothing_to_draw_is_said(tmp_path: Path):
    nowhere = np.full((40, 2), np.iinfo(np.uint16).max, np.uint16)
    made = report(write_trace(tmp_path / "t", [nowhere], 8))
    for name in ("load", "balance"):
        with pytest.raises(MoeInspectError, match=f"^{name}: no router made an assignment$"):
            made.plot(name)
    assert "load: no router made an assignment" in made.page()
    with pytest.raises(MoeInspectError, match="has nothing to draw"):
        Simulation("x", {}, []).plot()


def test_the_python_of_a_simulation_names_the_trace_as_it_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    skewed(Path("t"), 2)
    by_place, by_name = simulate_cache("t", slots=[2]), simulate_cache(trace="t", slots=[2])
    expected = "import moe_inspect\n\nmade = moe_inspect.open_trace('t').simulate.cache(slots=[2])"
    assert by_place.python == by_name.python == expected
    assert str(tmp_path) not in by_place.page()
