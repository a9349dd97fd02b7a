"""Draws charts as PNG, SVG and PDF, laid out as on the page, by matplotlib without pyplot: in a
notebook pyplot's figures and backend are the user's.

Type has the same size in every picture, however wide: what does not fit is wrapped. Lengths are in
inches, from the top left.
"""

# matplotlib's own types leave **kwargs unknown
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import io
import warnings
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties

from moe_inspect.progress import phase
from moe_inspect.reporting.charts.spec import Chart, Panel, Scale
from moe_inspect.reporting.render.marks import (
    SMALL,
    Ticks,
    colour,
    colour_map,
    draw_mark,
    named_ticks,
    plain,
    value_ticks,
    vertical_range,
    write_cells,
)
from moe_inspect.trace.output_dir import output_file, output_folder

DPI = 200
WIDTH = 9.8  # of a picture, where no other is asked for
FORMATS = ("png", "svg")
BREADTH = 2.9  # least of a panel beside others
EDGE, GAP = 0.12, 0.3  # around it, between panels
BETWEEN = 0.2  # rows of panels
LINE = 0.17  # height of a line of SMALL type
BELOW = 0.42  # room for the labels and the title of a horizontal axis
SCALE = 0.45  # height of a colour bar with its labels
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


def write_charts(
    charts: Sequence[Chart],
    directory: str | Path,
    width: float | None = None,
    formats: Sequence[str] | None = None,
) -> list[Path]:
    """Draws each chart, so many inches wide, as NAME.FORMAT: "png", "svg" or "pdf". Returns the
    files."""
    directory, written = output_folder(directory), list[Path]()
    advance = phase("writing pictures", len(charts), "pictures")
    for chart in charts:
        with letters():
            figure = draw(chart, width or WIDTH)
            for path in (directory / f"{chart.name}.{format}" for format in formats or FORMATS):
                with output_file(path) as draft:
                    draft.write_bytes(picture(figure, path.suffix[1:], chart.description))
                written.append(path)
        advance(1)
    return written


def picture(figure: Figure, format: str, description: str = "", dpi: int = DPI) -> bytes:
    """The bytes of a figure as a file of format "png", "svg" or "pdf"; the same figure gives the
    same bytes. Text of an SVG or a PDF stays text, which can be searched and edited."""
    file = io.BytesIO()
    described, dated = {"pdf": ("Subject", "CreationDate")}.get(format, ("Description", "Date"))
    metadata: dict[str, str | None] = {described: description} if description else {}
    if format != "png":
        metadata[dated] = None
    text: Any = {"svg.fonttype": "none", "svg.hashsalt": "moe-inspect", "pdf.fonttype": 42}
    with matplotlib.rc_context(text):
        figure.savefig(file, format=format, dpi=dpi, metadata=metadata)
    return file.getvalue()


@contextmanager
def letters() -> Generator[None]:
    """Within it, labels use every installed font that has their letters; a letter that no font has
    is drawn as a box, without a warning."""
    installed = {font.name for font in font_manager.fontManager.ttflist}
    family = ["DejaVu Sans", *(name for name in OTHER_FONTS if name in installed), "sans-serif"]
    with matplotlib.rc_context({"font.family": family}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from (current )?font")
        yield


class Placed(NamedTuple):
    """A panel with all that its size depends on. title: its lines. height: of its axes; above: of
    its title, its legend and its colour bar."""

    panel: Panel
    title: Sequence[str]
    height: float
    above: float
    ends: tuple[float, float]
    ticks: Ticks
    legend_columns: int


def draw(chart: Chart, width: float = WIDTH) -> Figure:
    """The figure of a chart, so many inches wide."""
    figure = Figure((width, 1))
    FigureCanvasAgg(figure)
    within = width - 2 * EDGE
    columns = min(chart.columns, len(chart.panels), max(1, int(within / BREADTH)))
    breadth = (within - GAP * (columns - 1)) / columns
    scales = {panel.heatmap.scale for panel in chart.panels if panel.heatmap}
    shared = len(scales) == 1 and all(panel.heatmap for panel in chart.panels)
    placed = [_place(figure, panel, breadth, columns, shared) for panel in chart.panels]
    rows = [placed[i : i + columns] for i in range(0, len(placed), columns)]
    title = _lines(figure, chart.title, 12, within, "bold")
    headline = _lines(figure, chart.headline, 9.5, within)
    below_title = EDGE + 0.05 + 0.25 * len(title)
    y = below_title + 0.2 * len(headline) + 0.06
    top = y + (_colour_bar(figure, next(iter(scales)), EDGE, within).height if shared else 0)
    sizes = [max(p.above for p in row) + max(p.height for p in row) + BELOW for row in rows]
    height = top + sum(sizes) + BETWEEN * (len(rows) - 1) + EDGE
    figure.set_figheight(height)
    figure.text(
        EDGE / width,
        1 - EDGE / height,
        plain("\n".join(title)),
        va="top",
        fontsize=12,
        weight="bold",
        linespacing=1.4,
    )
    figure.text(
        EDGE / width,
        1 - below_title / height,
        plain("\n".join(headline)),
        va="top",
        fontsize=9.5,
        linespacing=1.4,
    )
    if shared:
        _draw_colour_bar(figure, _colour_bar(figure, next(iter(scales)), EDGE, within), y)
    lefts = [max(_beside(figure, p) for p in placed[column::columns]) for column in range(columns)]
    for row, size in zip(rows, sizes, strict=True):
        above = max(p.above for p in row)
        for column, p in enumerate(row):
            left = EDGE + column * (breadth + GAP)
            _panel(figure, p, left, lefts[column], top, above, breadth, shared)
        top += size + BETWEEN
    return figure


def _place(figure: Figure, panel: Panel, breadth: float, columns: int, shared: bool) -> Placed:
    lines = _lines(figure, panel.title, 9.5, breadth, "bold") if panel.title else []
    title = 0.08 + 0.18 * len(lines) if lines else 0
    if heatmap := panel.heatmap:
        R, _ = heatmap.values.shape
        tallest = 5.6 if columns == 1 else 3.6
        height = float(np.clip(R * np.clip(tallest / R, 0.09, 0.3), 0.6, tallest + 1))
        ticks = named_ticks(panel.y, R, height / LINE)
        bar = 0 if shared else _colour_bar(figure, heatmap.scale, 0, breadth).height
        return Placed(panel, lines, height, title + bar, (-0.5, R - 0.5), ticks, 0)
    names = [plain(name) for mark in panel.marks if (name := getattr(mark, "name", ""))]
    legend_columns = _legend_columns(figure, names, breadth)
    entries = [_entry(figure, name, breadth).count("\n") + 1 for name in names]
    rows = sum(entries) if legend_columns == 1 else -(-len(names) // (legend_columns or 1))
    low, high = vertical_range(panel)
    height = 2.1 if columns == 1 else 1.9
    ticks = value_ticks(panel.y, low, high, 5)
    above = title + (0.14 + 0.155 * rows if rows else 0.05)
    return Placed(panel, lines, height, above, (low, high), ticks, legend_columns)


def _panel(
    figure: Figure,
    of: Placed,
    left: float,
    beside: float,
    top: float,
    above: float,
    breadth: float,
    shared: bool,
) -> None:
    """Draws a panel. left, top: where it begins; beside, above: what lies left of and above its
    axes."""
    (width, height), panel = figure.get_size_inches(), of.panel
    right = _right(figure, panel)
    axes: Any = figure.add_axes(
        (
            (left + beside) / width,
            1 - (top + above + of.height) / height,
            (breadth - beside - right) / width,
            of.height / height,
        )
    )
    for mark in panel.marks:
        draw_mark(mark, axes)
    across = breadth - beside - right
    if panel.title:
        # over what belongs to the panel, which begins left of its axes
        axes.set_title(
            plain("\n".join(of.title)), loc="left", x=-beside / across, fontsize=9.5,
            weight="bold", pad=72 * (of.above - 0.02 - 0.18 * len(of.title)),
        )  # fmt: skip
    axes.set_ylim(of.ends[::-1] if panel.heatmap else of.ends)
    if panel.y.log:
        axes.set_yscale("log", base=2)
    axes.set_yticks([at for at, _ in of.ticks], [plain(label) for _, label in of.ticks])
    axes.minorticks_off()
    count = panel.heatmap.values.shape[1] if panel.heatmap else len(panel.x.labels)
    axes.set_xlim(-0.5, count - 0.5)
    ticks = named_ticks(
        panel.x, count, across / (_widest(figure, panel.x.labels or ("000",)) + 0.15)
    )
    axes.set_xticks([at for at, _ in ticks], [plain(label) for _, label in ticks])
    axes.set_xlabel(plain(panel.x.title), fontsize=SMALL)
    axes.set_ylabel(plain(panel.y.title), fontsize=SMALL)
    if panel.y.title:
        axes.yaxis.set_label_coords(-(beside - 0.08) / across, 0.5)
    axes.tick_params(labelsize=SMALL, length=2, pad=2, color="0.5")
    axes.spines[["top", "right"]].set_visible(False)
    if panel.heatmap:
        axes.spines[["left", "bottom"]].set_visible(False)
        cells, room = panel.heatmap.cells, across / count - 0.04
        if cells is not None and _widest(figure, set(cells.ravel())) < room:
            write_cells(panel.heatmap, axes)
        if not shared:
            bar = _colour_bar(figure, panel.heatmap.scale, left, breadth)
            _draw_colour_bar(figure, bar, top + above - bar.height)
        return
    axes.grid(axis="y", color="0.92", lw=0.8)
    axes.set_axisbelow(True)
    if of.legend_columns:
        handles, names = axes.get_legend_handles_labels()
        axes.legend(
            handles,
            [_entry(figure, name, breadth) for name in names],
            fontsize=SMALL,
            frameon=False,
            loc="lower left",
            bbox_to_anchor=(-beside / across, 1 + 0.05 / of.height),
            ncols=of.legend_columns,
            borderaxespad=0,
            borderpad=0.3,
            **LEGEND,
        )


LEGEND = {"handlelength": 2.0, "handletextpad": 0.6, "columnspacing": 1.4, "labelspacing": 0.35}


def _legend_columns(figure: Figure, names: Sequence[str], breadth: float) -> int:
    """How many columns of a legend fit beside each other. matplotlib fills one column after the
    other."""
    em = SMALL / 72
    for columns in range(len(names), 1, -1):
        widths = [_widest(figure, part) for part in np.array_split(np.array(names), columns)]
        handles = (LEGEND["handlelength"] + LEGEND["handletextpad"]) * columns
        between = LEGEND["columnspacing"] * (columns - 1) + 1
        if sum(widths) + em * (handles + between) <= breadth:
            return columns
    return min(1, len(names))


def _entry(figure: Figure, name: str, breadth: float) -> str:
    """A name in a legend, in lines that fit."""
    beside = SMALL / 72 * (LEGEND["handlelength"] + LEGEND["handletextpad"] + 1)
    return "\n".join(_lines(figure, name, SMALL, breadth - beside))


def _lines(
    figure: Figure, text: str, size: float, room: float, weight: str = "normal"
) -> list[str]:
    """The text in lines no wider than `room`, as far as its words are not."""
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}" if lines[-1] else word
        if lines[-1] and _widest(figure, [longer], size, weight) > room:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _beside(figure: Figure, of: Placed) -> float:
    """The room left of the axes for the labels and the title of the vertical axis."""
    labels = [label for _, label in of.ticks]
    return _widest(figure, labels) + 0.09 + (0.2 if of.panel.y.title else 0)


def _right(figure: Figure, panel: Panel) -> float:
    """The room right of the axes for half of a label below their end."""
    return max(0.05, _widest(figure, panel.x.labels[-1:]) / 2 - 0.03)


def _widest(
    figure: Figure, texts: Iterable[str], size: float = SMALL, weight: str = "normal"
) -> float:
    renderer: Any = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    font = FontProperties(size=size, weight=weight)
    widths: list[float] = [
        renderer.get_text_width_height_descent(text, font, False)[0] for text in texts
    ]
    return max(widths, default=0.0) / figure.dpi


class ColourBar(NamedTuple):
    """The colours of a scale with their values, and beside or below them what is shown: texts with
    their place, right of `left` and below the top, and the colour of a swatch before them."""

    scale: Scale
    left: float
    long: float
    ticks: list[tuple[float, str]]
    texts: list[tuple[float, float, str, str]]
    height: float


def _colour_bar(figure: Figure, scale: Scale, left: float, room: float) -> ColourBar:
    """No wider than `room`: labels that would run into the next are left out."""
    ticks = scale.ticks()
    half = {label: _widest(figure, [label]) / 2 for _, label in ticks}
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
        wide = _widest(figure, [text]) + (0.15 if name else 0)
        if x + wide > room and x > 0:
            x, y = 0.0, max(y, 0.25) + LINE
        texts.append((x, y, text, name))
        x += wide + 0.2
    return ColourBar(scale, left, long, kept, texts, SCALE + max(0.0, y - 0.25))


def _draw_colour_bar(figure: Figure, bar: ColourBar, top: float) -> None:
    width, height = figure.get_size_inches()
    thickness, inset = 0.09, _widest(figure, [bar.scale.ticks()[0][1]]) / 2
    axes: Any = figure.add_axes(
        (
            (bar.left + inset) / width,
            1 - (top + 0.06 + thickness) / height,
            bar.long / width,
            thickness / height,
        ),
        label="scale",
    )
    ramp, colours = np.linspace(0, 1, 512)[None], colour_map(bar.scale)
    axes.imshow(ramp, aspect="auto", cmap=colours, vmin=0, vmax=1, extent=(0, 1, 0, 1))
    axes.set_yticks([])
    axes.set_xticks([at for at, _ in bar.ticks], [label for _, label in bar.ticks])
    axes.tick_params(labelsize=SMALL, length=0, pad=2)
    axes.spines[:].set_visible(False)
    for x, y, text, name in bar.texts:
        at, middle = bar.left + x, 1 - (top + y) / height
        if name:
            swatch: Any = {"fontsize": SMALL + 2, "color": colour(name)}
            figure.text(at / width, middle, "■", va="center", **swatch)
            at += 0.15
        figure.text(at / width, middle, plain(text), va="center", fontsize=SMALL)
