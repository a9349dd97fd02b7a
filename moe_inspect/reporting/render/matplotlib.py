"""Draws charts as PNG, SVG and PDF, laid out as on the page, by matplotlib without pyplot: in a
notebook pyplot's figures and backend are the user's.

Type has the same size in every picture, however wide: what does not fit is wrapped. Lengths are in
inches, from the top left.
"""

# matplotlib's own types leave **kwargs unknown
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties

from moe_inspect.reporting.charts import spec

SMALL = 8  # points: ticks, legends, numbers in cells
DASHES = {"": "-", "dot": ":", "dash": "--"}
NOTHING = -9.0  # the position of 0 on a scale of ratios: below all others
FEW = 12  # positions up to which dots are large
Ticks = list[tuple[float, str]]
DPI = 200
WIDTH = 9.8  # of a picture, where no other is asked for
BREADTH = 2.9  # least of a panel beside others
EDGE, GAP = 0.12, 0.3  # around it, between panels
BETWEEN = 0.2  # rows of panels
LINE = 0.17  # height of a line of SMALL type
BELOW = 0.42  # room for the labels and the title of a horizontal axis
SCALE = 0.45  # height of a colour bar with its labels
# for letters that DejaVu Sans lacks (Chinese, Japanese, Korean), if installed
OTHER_FONTS = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK KR", "WenQuanYi Micro Hei"),
    *("PingFang SC", "Hiragino Sans", "Microsoft YaHei"),
)


@contextmanager
def letters() -> Generator[None]:
    """Within it, labels use every installed font that has their letters; a letter that no font has
    is drawn as a box, without a warning."""
    installed = {font.name for font in font_manager.fontManager.ttflist}
    family = ["DejaVu Sans", *(name for name in OTHER_FONTS if name in installed), "sans-serif"]
    with matplotlib.rc_context({"font.family": family}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from (current )?font")
        yield


@letters()
def picture(figure: Figure, format: str, description: str = "", dpi: int = DPI) -> bytes:
    """The bytes of a figure as a file of format "png", "svg" or "pdf"; the same figure gives the
    same bytes. Text of an SVG or a PDF stays text, which can be searched and edited."""
    file = io.BytesIO()
    described, dated = {"pdf": ("Subject", "CreationDate")}.get(format, ("Description", "Date"))
    metadata: dict[str, str | None] = {described: description} if description else {}
    if format != "png":
        metadata |= {dated: None}
    text: Any = {"svg.fonttype": "none", "svg.hashsalt": "moe-inspect", "pdf.fonttype": 42}
    with matplotlib.rc_context(text):
        figure.savefig(file, format=format, dpi=dpi, metadata=metadata)
    return file.getvalue()


class ColourBar(NamedTuple):
    """The colours of a scale with their values, and beside or below them what is shown: texts with
    their place, right of and below where it begins, and the colour of a swatch before them. inset,
    long: where the colours begin, and their length."""

    scale: spec.Scale
    inset: float
    long: float
    ticks: Ticks
    texts: list[tuple[float, float, str, str]]
    height: float


class PlacedPanel(NamedTuple):
    """A panel with all that its size depends on. title: its lines. height: of its axes; above: of
    its title, its legend and its colour bar; beside: of what stands left of its axes. bar: its own,
    where panels do not share one."""

    panel: spec.Panel
    title: Sequence[str]
    height: float
    above: float
    beside: float
    ends: tuple[float, float]
    ticks: Ticks
    legend_columns: int = 0
    bar: ColourBar | None = None


@letters()
def draw(chart: spec.Chart, width: float = WIDTH) -> Figure:
    """The figure of a chart, so many inches wide."""
    return _Sheet(chart, width).draw(chart)


LEGEND = {"handlelength": 2.0, "handletextpad": 0.6, "columnspacing": 1.4, "labelspacing": 0.35}


class _Sheet:
    """A figure of so many columns of panels, each as wide as `breadth`."""

    def __init__(self, chart: spec.Chart, width: float):
        self.figure, self.within = Figure((width, 1)), width - 2 * EDGE
        FigureCanvasAgg(self.figure)
        most = max(1, int(self.within / BREADTH))
        self.columns = min(chart.columns, len(chart.panels), most)
        self.breadth = (self.within - GAP * (self.columns - 1)) / self.columns

    def draw(self, chart: spec.Chart) -> Figure:
        figure, within, columns = self.figure, self.within, self.columns
        scales = {panel.heatmap.scale if panel.heatmap else None for panel in chart.panels}
        scale = scales.pop() if len(scales) == 1 else None  # of all panels
        bar = self._colour_bar(scale, within) if scale else None
        placed = [self._place(panel, bar is None) for panel in chart.panels]
        rows = [placed[i : i + columns] for i in range(0, len(placed), columns)]
        title = self._lines(chart.title, 12, within, "bold")
        headline = self._lines(chart.headline, 9.5, within)
        below_title = EDGE + 0.05 + 0.25 * len(title)
        y = below_title + 0.2 * len(headline) + 0.06
        top = y + (bar.height if bar else 0)
        sizes = [max(p.above for p in row) + max(p.height for p in row) + BELOW for row in rows]
        figure.set_figheight(top + sum(sizes) + BETWEEN * (len(rows) - 1) + EDGE)
        above_all = partial(self._text, EDGE, va="top", linespacing=1.4)
        above_all(EDGE, "\n".join(title), fontsize=12, weight="bold")
        above_all(below_title, "\n".join(headline), fontsize=9.5, weight="normal")
        if bar:
            self._draw_colour_bar(bar, EDGE, y)
        besides = [max(p.beside for p in placed[column::columns]) for column in range(columns)]
        for row, size in zip(rows, sizes, strict=True):
            above = max(p.above for p in row)
            for column, (p, beside) in enumerate(zip(row, besides, strict=False)):
                self._panel(p, EDGE + column * (self.breadth + GAP), beside, top, above)
            top += size + BETWEEN
        return figure

    def _axes(self, left: float, top: float, width: float, height: float, label: str = "") -> Axes:
        """Axes in a box that begins so far from the left and from the top."""
        wide, high = self.figure.get_size_inches()
        box = left / wide, 1 - (top + height) / high, width / wide, height / high
        return self.figure.add_axes(box, label=label)

    def _text(self, left: float, top: float, text: str, **style: Any) -> None:
        wide, high = self.figure.get_size_inches()
        self.figure.text(left / wide, 1 - top / high, plain(text), **style)

    def _place(self, panel: spec.Panel, alone: bool) -> PlacedPanel:
        lines = self._lines(panel.title, 9.5, self.breadth, "bold") if panel.title else []
        above = 0.08 + 0.18 * len(lines) if lines else 0
        legend_columns, bar = 0, None
        if heatmap := panel.heatmap:
            R, _ = heatmap.values.shape
            tallest = 5.6 if self.columns == 1 else 3.6
            height = float(np.clip(R * np.clip(tallest / R, 0.09, 0.3), 0.6, tallest + 1))
            ends, ticks = (-0.5, R - 0.5), named_ticks(panel.y, R, height / LINE)
            bar = self._colour_bar(heatmap.scale, self.breadth) if alone else None
            above += bar.height if bar else 0
        else:
            names = [plain(name) for mark in panel.marks if (name := getattr(mark, "name", ""))]
            legend_columns = self._legend_columns(names)
            entries = [self._entry(name).count("\n") + 1 for name in names]
            rows = sum(entries) if legend_columns == 1 else -(-len(names) // (legend_columns or 1))
            height = 2.1 if self.columns == 1 else 1.9
            ends = vertical_range(panel)
            ticks = value_ticks(panel.y, *ends)
            above += 0.14 + 0.155 * rows if rows else 0.05
        # room for the labels and the title of the vertical axis
        beside = self._widest([label for _, label in ticks]) + 0.09 + (0.2 if panel.y.title else 0)
        return PlacedPanel(panel, lines, height, above, beside, ends, ticks, legend_columns, bar)

    def _panel(self, of: PlacedPanel, left: float, beside: float, top: float, above: float) -> None:
        """left, top: where it begins; beside, above: what lies left of and above its axes."""
        panel, heatmap = of.panel, of.panel.heatmap
        # right of the axes, half of a label below their end
        right = max(0.05, self._widest(panel.x.labels[-1:]) / 2 - 0.03)
        across = self.breadth - beside - right
        axes = self._axes(left + beside, top + above, across, of.height)
        for mark in panel.marks:
            draw_mark(mark, axes)
        if panel.title:
            # over what belongs to the panel, which begins left of its axes
            pad = 72 * (of.above - 0.02 - 0.18 * len(of.title))
            style: Any = {"x": -beside / across, "fontsize": 9.5, "weight": "bold", "pad": pad}
            axes.set_title(plain("\n".join(of.title)), loc="left", **style)
        low, high = of.ends
        axes.set_ylim((high, low) if heatmap else (low, high))
        if panel.y.log:
            axes.set_yscale("log", base=2)
        axes.set_yticks([at for at, _ in of.ticks], [plain(label) for _, label in of.ticks])
        axes.minorticks_off()
        count = heatmap.values.shape[1] if heatmap else len(panel.x.labels)
        axes.set_xlim(-0.5, count - 0.5)
        most = across / (self._widest(panel.x.labels or ("000",)) + 0.15)
        ticks = named_ticks(panel.x, count, most)
        axes.set_xticks([at for at, _ in ticks], [plain(label) for _, label in ticks])
        axes.set_xlabel(plain(panel.x.title), fontsize=SMALL)
        axes.set_ylabel(plain(panel.y.title), fontsize=SMALL)
        if panel.y.title:
            axes.yaxis.set_label_coords(-(beside - 0.08) / across, 0.5)
        axes.tick_params(labelsize=SMALL, length=2, pad=2, color="0.5")
        axes.spines[["top", "right"]].set_visible(False)
        if heatmap:
            axes.spines[["left", "bottom"]].set_visible(False)
            cells, room = heatmap.cells, across / count - 0.04
            if cells is not None and self._widest(set(cells.ravel())) < room:
                _write_cells(heatmap, cells, axes)
            if of.bar:
                self._draw_colour_bar(of.bar, left, top + above - of.bar.height)
            return
        axes.grid(axis="y", color="0.92", lw=0.8)
        axes.set_axisbelow(True)
        if of.legend_columns:
            handles, names = axes.get_legend_handles_labels()
            axes.legend(
                handles,
                [self._entry(name) for name in names],
                fontsize=SMALL,
                frameon=False,
                loc="lower left",
                bbox_to_anchor=(-beside / across, 1 + 0.05 / of.height),
                ncols=of.legend_columns,
                borderaxespad=0,
                borderpad=0.3,
                **LEGEND,
            )

    def _legend_columns(self, names: Sequence[str]) -> int:
        """How many fit beside each other: matplotlib fills one column after the other."""
        em = SMALL / 72
        for columns in range(len(names), 1, -1):
            widths = [self._widest(part) for part in np.array_split(np.array(names), columns)]
            handles = (LEGEND["handlelength"] + LEGEND["handletextpad"]) * columns
            between = LEGEND["columnspacing"] * (columns - 1) + 1
            if sum(widths) + em * (handles + between) <= self.breadth:
                return columns
        return min(1, len(names))

    def _entry(self, name: str) -> str:
        """A name in a legend, in lines that fit."""
        beside = SMALL / 72 * (LEGEND["handlelength"] + LEGEND["handletextpad"] + 1)
        return "\n".join(self._lines(name, SMALL, self.breadth - beside))

    def _lines(self, text: str, size: float, room: float, weight: str = "normal") -> list[str]:
        """The text in lines no wider than `room`, as far as its words are not."""
        lines = [""]
        for word in text.split(" "):
            longer = f"{lines[-1]} {word}" if lines[-1] else word
            if lines[-1] and self._widest([longer], size, weight) > room:
                lines.append(word)
            else:
                lines[-1] = longer
        return lines

    def _widest(self, texts: Iterable[str], size: float = SMALL, weight: str = "normal") -> float:
        renderer: Any = self.figure.canvas.get_renderer()  # type: ignore[attr-defined]
        font = FontProperties(size=size, weight=weight)
        widths: list[float] = [
            renderer.get_text_width_height_descent(text, font, False)[0] for text in texts
        ]
        return max(widths, default=0.0) / self.figure.dpi

    def _colour_bar(self, scale: spec.Scale, room: float) -> ColourBar:
        """No wider than `room`: labels that would run into the next are left out."""
        ticks = scale.ticks()
        half = {label: self._widest([label]) / 2 for _, label in ticks}
        inset, end = half[ticks[0][1]], half[ticks[-1][1]]
        long = min(0.42 * len(ticks), room - inset - end)
        kept, after = list[tuple[float, str]](), np.inf
        for at, label in reversed(ticks):
            if at * long + half[label] + 0.03 <= after:
                kept.append((at, label))
                after = at * long - half[label]
        swatches = [(scale.title, "")]
        swatches += [("none", "dead")] if scale.kind == "ratio" else []
        swatches += [(scale.unknown, "unknown")] if scale.unknown else []
        x, y, texts = inset + long + end + 0.12, 0.105, list[tuple[float, float, str, str]]()
        for text, name in swatches:
            wide = self._widest([text]) + (0.15 if name else 0)
            if x + wide > room and x > 0:
                x, y = 0.0, max(y, 0.25) + LINE
            texts.append((x, y, text, name))
            x += wide + 0.2
        return ColourBar(scale, inset, long, kept, texts, SCALE + max(0.0, y - 0.25))

    def _draw_colour_bar(self, bar: ColourBar, left: float, top: float) -> None:
        axes = self._axes(left + bar.inset, top + 0.06, bar.long, 0.09, label="scale")
        ramp, colours = np.linspace(0, 1, 512)[None], colour_map(bar.scale)
        axes.imshow(ramp, aspect="auto", cmap=colours, vmin=0, vmax=1, extent=(0, 1, 0, 1))
        axes.set_yticks([])
        axes.set_xticks([at for at, _ in bar.ticks], [label for _, label in bar.ticks])
        axes.tick_params(labelsize=SMALL, length=0, pad=2)
        axes.spines[:].set_visible(False)
        for x, y, text, name in bar.texts:
            at = left + x
            if name:
                self._text(at, top + y, "■", va="center", fontsize=SMALL + 2, color=colour(name))
                at += 0.15
            self._text(at, top + y, text, va="center", fontsize=SMALL)


def colour(name: str) -> str:
    return spec.PALETTE[name][0]


def plain(text: str) -> str:
    """A label, escaped: $ would begin a formula, and a leading _ would hide it from the legend."""
    text = text.replace("$", r"\$")
    return "\u200a" + text if text.startswith("_") else text


def vertical_range(panel: spec.Panel) -> tuple[float, float]:
    """The lower and upper end of the y axis of a panel without a heatmap."""
    values = [panel.y.low, panel.y.high]
    for array in (getattr(mark, of, None) for mark in panel.marks for of in ("y", "low", "high")):
        # a logarithmic axis cannot show an interval that reaches down to 0
        shown = np.atleast_1d(np.asarray([] if array is None else array, float))
        shown = shown[np.isfinite(shown) & ((shown > 0) | (not panel.y.log))]
        if len(shown):
            values += [float(shown.min()), float(shown.max())]
    known = [value for value in values if value is not None]
    low, high = min(known, default=0.0), max(known, default=1.0)
    if not high > low:
        low, high = low - 0.5, low + 0.5
    if panel.y.log:
        return (low if low == panel.y.low else low / 1.05), high * 1.05
    margin = 0.04 * (high - low)
    below, above = (0 if low == panel.y.low else margin), (0 if high == panel.y.high else margin)
    return low - below, high + above


def named_ticks(axis: spec.Axis, count: int, most: float) -> Ticks:
    """(position, label) of at most about `most` of `count` positions, at round numbers."""
    if len(axis.ticks) > 1:
        return list(axis.ticks[:: step_of(len(axis.ticks) / most)])
    step, labels = step_of(count / most), axis.labels
    # layers that begin at 3 have their ticks at 5, 10, …, not at 3, 8, …
    start = int(labels[0]) if labels and labels[0].isdecimal() else 0
    numbered = all(label == str(start + i) for i, label in enumerate(labels))
    first = -start % step if numbered else 0
    return [(i, labels[i] if labels else str(i)) for i in range(first, count, step)]


def value_ticks(axis: spec.Axis, low: float, high: float) -> Ticks:
    """(position, label) of the ticks of an axis of numbers."""
    if axis.log:
        powers = range(math.ceil(math.log2(low) - 1e-9), math.floor(math.log2(high)) + 1)
        return [(2.0**i, f"{2.0**i:g}") for i in powers]
    return [(value, f"{value:g}") for value in spec.round_numbers(low, high, 5)]


def step_of(least: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, … that is at least that."""
    power = 10 ** math.floor(math.log10(max(1.0, least)))
    return power * next(factor for factor in (1, 2, 5, 10) if factor * power >= least)


def draw_mark(mark: spec.Mark, axes: Axes) -> None:
    few = len(getattr(mark, "x", ())) <= FEW
    style: dict[str, Any] = {"label": plain(getattr(mark, "name", "")) or None}
    usual = "band" if isinstance(mark, spec.Band) else "baseline"
    style["color"] = colour(getattr(mark, "colour", usual))
    if isinstance(mark, spec.Line | spec.Points) and mark.low is not None and mark.high is not None:
        wide = 3 if few else 2
        axes.vlines(mark.x, mark.low, mark.high, color=style["color"], alpha=0.45, lw=wide)
    match mark:
        case spec.Line():
            dots, size = "o" if mark.dots else "", 3.5 if few else 2.4
            axes.plot(mark.x, mark.y, ls=DASHES[mark.dash], lw=1.4, marker=dots, ms=size, **style)
        case spec.Points(shape="dot"):
            axes.plot(mark.x, mark.y, "o", ms=5 if few else 3.4, mew=0, **style)
        case spec.Points():
            axes.plot(mark.x, mark.y, "_", ms=12 if few else 7, mew=1.6, **style)
        case spec.Band():
            axes.fill_between(mark.x, mark.low, mark.high, lw=0, **style)
        case spec.Bars():
            axes.bar(mark.x, mark.high - mark.low, 0.8, mark.low, lw=0, **style)
        case spec.Rule():
            axes.axhline(mark.y, lw=1.2 if mark.dash else 0.8, ls=DASHES[mark.dash], **style)
        case spec.Heatmap():
            shown: Any = {"cmap": colour_map(mark.scale), "interpolation": "nearest"}
            axes.imshow(_positions(mark.values, mark.scale), aspect="auto", vmin=0, vmax=1, **shown)
        case _:  # pyright: ignore[reportUnnecessaryComparison]
            raise TypeError(f"no way to draw {type(mark).__name__}")


def _write_cells(mark: spec.Heatmap, cells_RC: np.ndarray, axes: Axes) -> None:
    """The texts of the cells, black or white: at least 4.5 : 1 to the colour below (WCAG)."""
    rgb_RC3 = colour_map(mark.scale)(_positions(mark.values, mark.scale))[..., :3]
    linear_RC3 = np.where(rgb_RC3 <= 0.04045, rgb_RC3 / 12.92, ((rgb_RC3 + 0.055) / 1.055) ** 2.4)
    light_RC = linear_RC3 @ (0.2126, 0.7152, 0.0722) > 0.179
    for (row, column), text in np.ndenumerate(cells_RC):
        ink = "black" if light_RC[row, column] else "white"
        if text:
            axes.text(column, row, text, ha="center", va="center", fontsize=SMALL, color=ink)


def _positions(values_RC: np.ndarray, scale: spec.Scale) -> np.ndarray:
    """Positions of values on their scale, masked where none; NOTHING where a ratio is 0."""
    at_RC = np.clip(scale.place(values_RC), 0, 1)
    if scale.kind == "ratio":
        at_RC = np.where(values_RC == 0, NOTHING, at_RC)
    return np.ma.masked_invalid(at_RC)


def colour_map(scale: spec.Scale) -> Colormap:
    stops = [(at, colour(name)) for at, name in scale.stops()]
    colours = LinearSegmentedColormap.from_list(scale.kind, stops)
    unknown = colour("unknown") if scale.unknown else "white"
    under = colour("dead") if scale.kind == "ratio" else None
    return colours.with_extremes(bad=unknown, under=under)
