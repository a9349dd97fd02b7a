"""Draws charts as PNG and SVG, by matplotlib without pyplot: in a notebook pyplot's figures and
backend are the user's.

R rows, C columns of a heatmap.
"""

# matplotlib's own types leave **kwargs unknown
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import io
import warnings
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from functools import singledispatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from moe_inspect.errors import writing
from moe_inspect.reporting.charts.spec import (
    AMOUNT,
    FAR,
    PALETTE,
    RATIO,
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
)

if TYPE_CHECKING:
    from moe_inspect.reporting.tables.data import ReportData

DPI = 200
DASHES = {"": "-", "dot": ":", "dash": "--"}
NOTHING = -99.0  # the position of 0 on a logarithmic scale: below all others
# for letters that DejaVu Sans lacks (Chinese, Japanese, Korean), if installed
OTHER_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans CJK KR",
    "WenQuanYi Micro Hei",
    "PingFang SC",
    "Hiragino Sans",
    "Microsoft YaHei",
)


def write_pictures(data: ReportData, directory: str | Path) -> list[Path]:
    """Draws every chart that the trace has the data for. Returns the files."""
    return write_charts(draw_charts(data)[0], directory)


def write_charts(charts: Iterable[Chart], directory: str | Path) -> list[Path]:
    """Draws charts as NAME.png and NAME.svg. Returns the files."""
    directory, written = Path(directory), list[Path]()
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
    for chart in charts:
        with letters():
            figure = draw(chart)
            shown = settle_layout(figure)
            for path in (directory / f"{chart.name}.png", directory / f"{chart.name}.svg"):
                with writing(path):
                    path.write_bytes(picture(figure, path.suffix[1:], chart.description, shown))
                written.append(path)
    return written


def settle_layout(figure: Figure) -> Bbox:
    """Computes the layout of a figure once for several files; it takes longer than drawing. Returns
    the part of the figure to save, in inches."""
    figure.draw_without_rendering()
    figure.set_layout_engine(None)  # with any engine, "none" too, savefig draws twice
    return figure.get_tightbbox().padded(matplotlib.rcParams["savefig.pad_inches"])


def picture(
    figure: Figure, format: str, description: str = "", shown: Bbox | None = None, dpi: int = DPI
) -> bytes:
    """The bytes of a figure as a file of format "png" or "svg"; the same figure gives the same
    bytes. Letters of an SVG are paths, so that it looks the same everywhere. `shown`: from
    `settle_layout`, for a figure that is saved more than once."""
    file = io.BytesIO()
    metadata: dict[str, str | None] = {"Description": description} if description else {}
    if format == "svg":
        metadata["Date"] = None
    figure.savefig(file, format=format, dpi=dpi, bbox_inches=shown or "tight", metadata=metadata)
    return file.getvalue()


@contextmanager
def letters() -> Generator[None]:
    """Within it, labels use every installed font that has their letters; a letter that no font has
    is drawn as a box, without a warning."""
    installed = {font.name for font in font_manager.fontManager.ttflist}
    family = ["DejaVu Sans", *(name for name in OTHER_FONTS if name in installed)]
    with matplotlib.rc_context({"font.family": family}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from (current )?font")
        yield


def draw(chart: Chart) -> Figure:
    """The figure of a chart."""
    columns = min(chart.columns, len(chart.panels))
    rows = -(-len(chart.panels) // columns)
    sizes = [_size(panel, columns) for panel in chart.panels]
    heights = [max(h for _, h in sizes[row * columns :][:columns]) for row in range(rows)]
    width = columns * max(w for w, _ in sizes)
    figure = Figure((width, sum(heights) + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False, height_ratios=heights)
    for axes, panel in zip(grid.flat, chart.panels, strict=False):
        _panel(axes, panel)
    for axes in grid.flat[len(chart.panels) :]:
        axes.set_axis_off()
    figure.suptitle(
        f"$\\bf{{{_bold(chart.title)}}}$\n{_plain(chart.headline)}", fontsize=10, x=0.01, ha="left"
    )
    heatmaps = [panel.heatmap for panel in chart.panels if panel.heatmap]
    if heatmaps and len(heatmaps) == len(chart.panels):  # one scale for all
        _colour_bar(figure, heatmaps[0].scale, list(grid.flat))
    else:
        for axes, panel in zip(grid.flat, chart.panels, strict=False):
            if panel.heatmap:
                _colour_bar(figure, panel.heatmap.scale, axes)
    return figure


def _size(panel: Panel, columns: int) -> tuple[float, float]:
    """Width and height of a panel in inches, axes included."""
    if panel.heatmap is None:
        named = any(getattr(mark, "name", "") for mark in panel.marks)
        breadth = float(np.clip(0.18 * len(panel.x.labels), 5.5, 11.0))
        return breadth + (2.6 if named else 0), 2.4
    R, C = panel.heatmap.values.shape
    most = (14.0, 7.0) if columns == 1 else (6.0, 4.6)
    cell = 0.3 if panel.heatmap.cells is None else 0.36
    width = np.clip((0.16 if panel.heatmap.cells is None else 0.62) * C, 4.0, most[0])
    return float(width) + 1.6, float(np.clip(cell * R, 0.9, most[1])) + 0.8


def _panel(axes: Any, panel: Panel) -> None:
    for mark in panel.marks:
        _mark(mark, axes)
    if panel.title:
        axes.set_title(_plain(panel.title), loc="left", fontsize=9)
    if panel.heatmap:
        R, C = panel.heatmap.values.shape
        _ticks(axes.xaxis, panel.x, C, max(4, int(_size(panel, 1)[0] * 1.6)))
        _ticks(axes.yaxis, panel.y, R, 32)
        axes.tick_params(labelsize=8)
        return
    _ticks(axes.xaxis, panel.x, len(panel.x.labels), 24)
    axes.set_ylabel(panel.y.title, fontsize=9)
    axes.set_xlim(-0.5, len(panel.x.labels) - 0.5)
    low, high = axes.get_ylim()
    margin = 0.02 * (high - low)
    if panel.y.low is not None:
        axes.set_ylim(
            bottom=min(panel.y.low, low) if low < panel.y.low - 3 * margin else panel.y.low
        )
    if panel.y.high is not None:
        axes.set_ylim(top=max(panel.y.high, high))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.92", lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))


def _ticks(axis: Any, of: Axis, count: int, most: int) -> None:
    """The title and ticks of an axis with `count` positions, at most about `most` of them
    labelled."""
    axis.set_label_text(of.title, fontsize=9)
    if not of.labels:
        axis.set_major_locator(MaxNLocator(integer=True, nbins=min(most, 16)))
        return
    longest = max(len(label) for label in of.labels)
    step = -(-count // max(1, min(most, 160 // max(3, longest)) if axis.axis_name == "x" else most))
    axis.set_ticks(range(0, count, step), [_plain(label) for label in of.labels[::step]])


@singledispatch
def _mark(mark: Any, axes: Any) -> None:
    raise TypeError(f"no way to draw {type(mark).__name__}")


@_mark.register
def _(mark: Line, axes: Any) -> None:
    _interval(mark, axes)
    axes.plot(
        mark.x,
        mark.y,
        color=_colour(mark.colour),
        ls=DASHES[mark.dash],
        lw=1.4,
        marker="o" if mark.dots else "",
        ms=3.5,
        label=_plain(mark.name),
    )


@_mark.register
def _(mark: Points, axes: Any) -> None:
    _interval(mark, axes)
    few = len(mark.x) <= 12
    axes.plot(
        mark.x,
        mark.y,
        "o" if mark.shape == "dot" else "_",
        color=_colour(mark.colour),
        ms=(5 if few else 4) if mark.shape == "dot" else (10 if few else 7),
        mew=1 if mark.shape == "dot" else 1.6,
        label=_plain(mark.name),
    )


@_mark.register
def _(mark: Band, axes: Any) -> None:
    colour = _colour("band")
    axes.fill_between(mark.x, mark.low, mark.high, color=colour, lw=0, label=_plain(mark.name))


@_mark.register
def _(mark: Rule, axes: Any) -> None:
    axes.axhline(
        mark.y,
        color=_colour(mark.colour),
        lw=0.8 if not mark.dash else 1.2,
        ls=DASHES[mark.dash],
        label=_plain(mark.name) or None,
    )


@_mark.register
def _(mark: Links, axes: Any) -> None:
    axes.vlines(mark.x, mark.low, mark.high, color=_colour("baseline"), lw=1, alpha=0.6)


@_mark.register
def _(mark: Heatmap, axes: Any) -> None:
    axes.imshow(
        _position(mark.values, mark.scale),
        aspect="auto",
        cmap=_colours(mark.scale),
        norm=_range(mark.scale),
        interpolation="nearest",
    )
    if mark.cells is None:
        return
    norm, colours = _range(mark.scale), _colours(mark.scale)
    for (row, column), text in np.ndenumerate(mark.cells):
        if text:
            value = _position(mark.values[row : row + 1, column : column + 1], mark.scale)
            red, green, blue, _ = np.ravel(colours(norm(value)))
            light = 0.299 * red + 0.587 * green + 0.114 * blue
            ink = "black" if light > 0.5 else "white"
            axes.text(column, row, text, ha="center", va="center", fontsize=7, color=ink)


def _interval(mark: Line | Points, axes: Any) -> None:
    if mark.low is not None and mark.high is not None:
        axes.vlines(mark.x, mark.low, mark.high, color=_colour(mark.colour), alpha=0.45, lw=3)


def _position(values_RC: np.ndarray, scale: Scale) -> np.ndarray:
    """The positions of values on their scale, masked where there is no value."""
    if scale.kind == "amount":
        return np.ma.masked_invalid(values_RC)
    exponent = np.clip(np.log2(np.where(values_RC > 0, values_RC, 1)), -FAR, FAR)
    placed = np.where(values_RC == 0, NOTHING, exponent)
    return np.ma.masked_invalid(np.where(np.isnan(values_RC), np.nan, placed))


def _range(scale: Scale) -> Normalize:
    ends = (-FAR, FAR) if scale.kind == "ratio" else (scale.low, scale.high)
    return Normalize(*ends)


def _colours(scale: Scale) -> Colormap:
    names = RATIO if scale.kind == "ratio" else AMOUNT
    colours = LinearSegmentedColormap.from_list(scale.kind, [_colour(name) for name in names])
    unknown = _colour("unknown") if scale.unknown else "white"
    under = _colour("dead") if scale.kind == "ratio" else None
    return colours.with_extremes(bad=unknown, under=under)


def _colour_bar(figure: Figure, scale: Scale, axes: Any) -> None:
    mappable = ScalarMappable(_range(scale), _colours(scale))
    ticks = scale.ticks()
    at = [float(np.log2(v)) if scale.kind == "ratio" else v for v, _ in ticks]
    bar = figure.colorbar(mappable, ax=axes, ticks=at, pad=0.01, fraction=0.03, aspect=35)
    bar.ax.set_yticklabels([label for _, label in ticks], fontsize=8)
    bar.set_label(
        f"{scale.title}; grey: {scale.unknown}" if scale.unknown else scale.title, fontsize=9
    )


def _colour(name: str) -> str:
    return PALETTE[name][0]


def _plain(text: str) -> str:
    """A label of the corpus, escaped: $ would begin a formula, and a leading _ would hide it from
    the legend."""
    text = text.replace("$", r"\$")
    return "\u200a" + text if text.startswith("_") else text


def _bold(text: str) -> str:
    return text.replace(" ", r"\ ")
