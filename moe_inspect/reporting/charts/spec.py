"""A chart as data: panels of marks over two axes, which every drawer draws alike.

A chart is a function decorated with @chart in any file of this folder. It takes the data of a
report and returns a Chart, or a text that says why this trace has none to show ("" if another chart
says so already). `render/matplotlib.py` draws charts as PNG and SVG, `render/html.py` puts them on
the page.

L routers, E experts, R rows, C columns of a heatmap, N points of a series.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from moe_inspect.analysis.metrics.registry import metrics
from moe_inspect.errors import MoeInspectError
from moe_inspect.later import import_folder, pd
from moe_inspect.progress import tracked
from moe_inspect.reporting.tables.data import ReportData
from moe_inspect.text import layer_label, no_such
from moe_inspect.trace.schema import Router

MOST_LINES = 12  # routers that can be told apart as lines; more make a heatmap
FEW_CELLS = 160  # cells of a heatmap up to which each shows its number
TINT = 1.1  # a ratio from which on the colour says whether it is above or below 1

# Colours by purpose: on a light background, on a dark one. c1 to c8 are the colour-blind safe
# palette of Okabe and Ito, darkened or lightened for contrast.
PALETTE: dict[str, tuple[str, str]] = {
    "c1": ("#0072b2", "#56aee8"),
    "c2": ("#b8730a", "#f0b040"),
    "c3": ("#008764", "#2fc79a"),
    "c4": ("#b0578b", "#e59cc6"),
    "c5": ("#2f93cf", "#9fd6ff"),
    "c6": ("#c75400", "#ff9a5c"),
    "c7": ("#4a5361", "#c3cbd6"),
    "c8": ("#8a8200", "#efe442"),
    "baseline": ("#6b7482", "#98a3b1"),
    "bad": ("#b2382a", "#ff6f61"),  # only for what the verdict calls a fault
    "band": ("#dfe3e8", "#2b3440"),
    # of a ratio: ¼, ½, 1/TINT, 1, TINT, 2, 4, the most there can be; zero; unknown
    "low": ("#2166ac", "#58a9ff"),
    "lower": ("#92c5de", "#2c6ea5"),
    "below": ("#d3e5f0", "#1d3a54"),
    "even": ("#f6f6f4", "#1c222b"),
    "above": ("#fbdcca", "#4a2e29"),
    "higher": ("#f4a582", "#9a4632"),
    "high": ("#c4202f", "#ff7d5e"),
    "highest": ("#5e0f82", "#ffe27a"),
    "dead": ("#101010", "#ffffff"),
    "unknown": ("#d4d7db", "#3b434f"),
    # of an amount, from the least to the most
    "least": ("#eef3f7", "#1b2530"),
    "middle": ("#7fb0d3", "#2f6f9f"),
    "most": ("#0b3c63", "#a9dcff"),
}
SERIES = tuple(f"c{i}" for i in range(1, 9))
# ratio → colour; from 4 on, "highest" is at the scale's end
RATIOS = (0.25, 0.5, 1 / TINT, 1.0, TINT, 2.0, 4.0)
RATIO = dict(zip(RATIOS, ("low", "lower", "below", "even", "above", "higher", "high"), strict=True))
AMOUNT = ("least", "middle", "most")

Dash = Literal["", "dot", "dash"]


@dataclass(frozen=True)
class Axis:
    """labels: names of the positions 0, 1, …; without labels the axis shows numbers. ticks:
    (position, label) of the ticks, which are otherwise at round numbers. low, high: the range that
    the axis shows at least; it grows with the data. log: by powers of two."""

    title: str = ""
    labels: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    log: bool = False
    ticks: tuple[tuple[float, str], ...] = ()


@dataclass(frozen=True)
class Line:
    """x, y: float [N], NaN where the line breaks. low, high: float [N], the ends of an interval."""

    x: np.ndarray
    y: np.ndarray
    name: str
    colour: str
    dash: Dash = ""
    dots: bool = False
    low: np.ndarray | None = None
    high: np.ndarray | None = None


@dataclass(frozen=True)
class Points:
    """Like Line, without the line. "tick": a short dash, the reference for dots of its colour."""

    x: np.ndarray
    y: np.ndarray
    name: str
    colour: str
    shape: Literal["dot", "tick"] = "dot"
    low: np.ndarray | None = None
    high: np.ndarray | None = None


@dataclass(frozen=True)
class Band:
    """The area between low and high, behind everything else. x, low, high: float [N]"""

    x: np.ndarray
    low: np.ndarray
    high: np.ndarray
    name: str


@dataclass(frozen=True)
class Bars:
    """A bar from low to high at each x. float [N]"""

    x: np.ndarray
    low: np.ndarray
    high: np.ndarray
    name: str
    colour: str


@dataclass(frozen=True)
class Rule:
    """A horizontal line through the panel. Without a name it is not in the legend."""

    y: float
    name: str = ""
    colour: str = "baseline"
    dash: Dash = ""


@dataclass(frozen=True)
class Scale:
    """How a heatmap is coloured. "ratio": by log₂ around 1, so that a half is as far from 1 as
    double; 0 has a colour of its own. "amount": from little to much, linear or by log₂. low, high:
    where the colours end; for a ratio low is ¼ and high at least 4. end: what `high` is ("E/k"), if
    no value can be beyond it. title: what is shown. unknown: the meaning of cells without a value,
    if they are coloured; otherwise they are blank. beyond: whether values may be above high."""

    kind: Literal["ratio", "amount"]
    title: str
    low: float = 0.25
    high: float = 4.0
    unknown: str = ""
    end: str = ""
    log: bool = False
    beyond: bool = True

    def place(self, values: np.ndarray) -> np.ndarray:
        """The positions of values on the scale: 0 at low, 1 at high; −∞ for a ratio of 0."""
        if self.kind == "ratio" or self.log:
            with np.errstate(divide="ignore"):
                return np.log2(values / self.low) / np.log2(self.high / self.low)
        return (values - self.low) / (self.high - self.low)

    def stops(self) -> list[tuple[float, str]]:
        """(position, colour): the colours between them are mixed."""
        if self.kind == "amount":
            return [(i / (len(AMOUNT) - 1), name) for i, name in enumerate(AMOUNT)]
        of = RATIO | ({self.high: "highest"} if self.high > max(RATIO) else {})
        return list(zip(self.place(np.array([*of])).tolist(), of.values(), strict=True))

    def ticks(self) -> list[tuple[float, str]]:
        """(position, label) of the colour bar, at round numbers."""
        if self.kind == "ratio" or (self.log and self.high >= 4 * self.low):
            octaves = math.ceil(math.log2(self.high / self.low))
            values = self.low * 2.0 ** np.arange(octaves)
        else:
            values = np.array(round_numbers(self.low, self.high, 4))
        names = {0.25: "≤ ¼", 0.5: "½"} if self.kind == "ratio" else {}
        number = f"{self.high:.3g}"
        end = f"{self.end} = {number}" if self.end else "≥ " * self.beyond + number
        labels = [names.get(value, f"{value:g}") for value in values.tolist()]
        ticks = [
            (at, label)
            for at, label in zip(self.place(values).tolist(), labels, strict=True)
            # those that fit beside the label of the end: a bar has room for six characters per tick
            if (1 - at) * 6 * (len(labels) + 1) > (len(label) + len(end)) / 2
        ]
        return [*ticks, (1.0, end)]


def round_numbers(low: float, high: float, most: int) -> list[float]:
    """Multiples of 1, 2, 2.5 or 5 times a power of ten from low to high, about `most` of them."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [float(f"{i * step:.9g}") for i in range(first, math.floor(high / step + 1e-9) + 1)]


def amount(title: str, low: float, values: np.ndarray, least: float, *, log: bool = False) -> Scale:
    """A scale from low to the 99th percentile of the values or `least`, if more; rounded up."""
    known = values[np.isfinite(values)]
    top = max(least, float(np.quantile(known, 0.99)) if known.size else least)
    step = 10.0 ** math.floor(math.log10(top)) / 10
    rounded = [f * step for f in (10, 11, 12, 15, 20, 25, 30, 40, 50, 60, 80, 100)]
    high = float(f"{next(value for value in rounded if value >= top * 0.9999):.9g}")
    beyond = bool(known.size and known.max() > high)
    return Scale("amount", title, low, high, log=log, beyond=beyond)


@dataclass(frozen=True)
class Heatmap:
    """values: float [R, C], NaN for no value; row 0 on top. cells: str [R, C], the text in the
    cells. notes: str [R, C], shown with a cell's value."""

    values: np.ndarray
    scale: Scale
    cells: np.ndarray | None = None
    notes: np.ndarray | None = None


Mark = Line | Points | Band | Bars | Rule | Heatmap


@dataclass(frozen=True)
class Panel:
    """Marks over two axes, the first at the back."""

    marks: tuple[Mark, ...]
    x: Axis
    y: Axis
    title: str = ""

    @property
    def heatmap(self) -> Heatmap | None:
        return next((mark for mark in self.marks if isinstance(mark, Heatmap)), None)


@dataclass(frozen=True)
class Chart:
    """title: its subject. caption: what it shows of this trace, in one line. subset: which layers
    it shows, if not all. text: how to read it. table: the same in numbers, for those who cannot see
    it. definitions: term → meaning. interactive: the page's own widget for the same data, with all
    layers and domains ("map", "domains"). name: of the function and of the picture's file. group:
    the part of the page that it stands in."""

    title: str
    caption: str
    panels: tuple[Panel, ...]
    text: str = ""
    columns: int = 1
    table: pd.DataFrame | None = None
    definitions: Mapping[str, str] = field(default_factory=dict[str, str])
    interactive: str = ""
    subset: str = ""
    name: str = ""
    group: str = ""

    @property
    def columns_of_cells(self) -> int:
        """Columns of its widest heatmap, 0 if it has none."""
        heatmaps = [panel.heatmap for panel in self.panels]
        return max((one.values.shape[1] for one in heatmaps if one is not None), default=0)

    @property
    def headline(self) -> str:
        return f"{self.caption}, {self.subset}" if self.subset else self.caption

    @property
    def description(self) -> str:
        """The alternative text of the picture."""
        return f"{self.title}. {self.headline}."


Maker = Callable[["ReportData"], "Chart | str"]
GROUPS = ("Balance", "Specialization", "Serving", "Router", "")  # in the order of the page
INTERVALS = " Bars are 95% intervals over documents."
FAR = 5.0  # a ratio beyond which the others would lie on the axis
DASHES: tuple[Dash, ...] = ("", "dash", "dot")


class Registered(NamedTuple):
    """What makes a chart, the tables that it is drawn from, its part of the page."""

    make: Maker
    tables: tuple[str, ...]
    group: str


CHARTS: dict[str, Registered] = {}


def chart(*tables: str, group: str = "") -> Callable[[Maker], Maker]:
    """Registers a chart under the function's name, with the tables that it is drawn from and its
    group, one of GROUPS."""

    def register(function: Maker) -> Maker:
        CHARTS[function.__name__] = Registered(function, tables, group)
        return function

    return register


def every_chart() -> dict[str, Registered]:
    """CHARTS with every file of this folder read, in the order of the page."""
    import_folder(__package__ or "")
    return dict(sorted(CHARTS.items(), key=lambda item: GROUPS.index(item[1].group)))


def check_chart(name: str) -> None:
    """MoeInspectError where no chart has the name."""
    if name not in (there := every_chart()):
        raise MoeInspectError(no_such("chart", name, there))


def tables_of_charts() -> list[str]:
    """The tables that the charts are drawn from."""
    return list(dict.fromkeys(table for chart in every_chart().values() for table in chart.tables))


def draw_charts(data: ReportData) -> tuple[list[Chart], list[str]]:
    """All charts that the trace has the data for, and why the others are missing."""
    data.prepare(tables_of_charts())
    made = [chart_of(data, name) for name in tracked(every_chart(), "drawing", "charts")]
    charts = [one for one in made if isinstance(one, Chart)]
    return charts, [one for one in made if isinstance(one, str) and one]


def chart_of(data: ReportData, name: str) -> Chart | str:
    """One chart by its name."""
    of = every_chart()[name]
    try:
        made = of.make(data)
    except MoeInspectError as error:  # a table that this trace cannot give
        return str(error)
    return replace(made, name=name, group=of.group) if isinstance(made, Chart) else made


def definitions(*names: str) -> dict[str, str]:
    """The definitions of these metrics, from the registry."""
    known = metrics()
    return {name: known[name].formula for name in names}


def layer_axis(data: ReportData, routers: Iterable[int]) -> Axis:
    """An axis with a label per router."""
    return Axis("layer", tuple(layer_label(data.trace.routers, int(r)) for r in routers))


def token_axis(first_token: Iterable[int]) -> Axis:
    """An axis with a position per window, and ticks at round numbers of tokens."""
    first_W = np.array(list(first_token), float)
    marks = round_numbers(first_W[0], first_W[-1], 10) if len(first_W) > 1 else []
    at = np.interp(marks, first_W, np.arange(len(first_W)))
    # a window's position is its middle, its first token is at its left edge
    ticks = [(float(a) - 0.5, f"{mark:,.0f}") for a, mark in zip(at, marks, strict=True)]
    labels = tuple(f"{token:,.0f}" for token in first_W)
    return Axis("first token of the window", labels, ticks=tuple(ticks))


def load_scale(routers: Iterable[Router], title: str) -> Scale:
    """The scale of the load of experts ÷ its mean, up to E/k: every token."""
    return ratio_scale(title, max(router.experts / router.top_k for router in routers), "E/k")


def ratio_scale(title: str, most: float, end: str) -> Scale:
    """The scale of a ratio that is at most `most`, which is `end`."""
    return Scale("ratio", title, high=max(4.0, most), end=end if most >= 4 else "")


def log_axis(title: str, values: np.ndarray) -> Axis:
    """An axis of ratios from 1 on; logarithmic where one is far beyond the others."""
    return Axis(title, low=1, log=float(np.nanmax(values)) > FAR)


def chance_band(ratio_L: np.ndarray) -> Band:
    """The area from 1 to the ratio that chance gives each layer, as wide as the panel."""
    x = np.r_[-0.5, np.arange(len(ratio_L)), len(ratio_L) - 0.5]
    return Band(x, np.ones(len(x)), np.r_[ratio_L[0], ratio_L, ratio_L[-1]], "expected by chance")


def look(i: int) -> tuple[str, Dash]:
    """Colour and dash of series i: after eight colours the dash changes."""
    return SERIES[i % len(SERIES)], DASHES[i // len(SERIES) % len(DASHES)]


def known_interval(
    low: ArrayLike, high: ArrayLike
) -> tuple[np.ndarray, np.ndarray] | tuple[None, None]:
    """`low` and `high` of a mark; None where no value has an interval."""
    low, high = np.asarray(low, float), np.asarray(high, float)
    return (None, None) if np.isnan(low).all() else (low, high)


def cell_numbers(values_RC: np.ndarray) -> np.ndarray | None:
    """The text in the cells of a heatmap of ratios, None if it has many. str [R, C]"""
    if values_RC.size > FEW_CELLS:
        return None
    return np.array([["" if v != v else f"{v:.2f}" for v in row] for row in values_RC], object)
