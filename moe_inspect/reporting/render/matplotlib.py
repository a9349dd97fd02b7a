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
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties

from moe_inspect.progress import phase
from moe_inspect.reporting.charts.spec import (
    PALETTE,
    Axis,
    Band,
    Chart,
    Heatmap,
    Line,
    Links,
    Mark,
    Panel,
    Points,
    Rule,
    Scale,
    round_numbers,
)
from moe_inspect.trace.output_dir import output_file, output_folder

SMALL = 8  # points: ticks, legends, numbers in cells
DASHES = {"": "-", "dot": ":", "dash": "--"}
NOTHING = -9.0  # the position of 0 on a scale of ratios: below all others
FEW = 12  # positions up to which dots are large
Ticks = list[tuple[float, str]]
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


class ColourBar(NamedTuple):
    """The colours of a scale with their values, and beside or below them what is shown: texts with
    their place, right of and below where it begins, and the colour of a swatch before them. inset,
    long: where the colours begin, and their length."""

    scale: Scale
    inset: float
    long: float
    ticks: list[tuple[float, str]]
    texts: list[tuple[float, float, str, str]]
    height: float


class Placed(NamedTuple):
    """A panel with all that its size depends on. title: its lines. height: of its axes; above: of
    its title, its legend and its colour bar. bar: its own, where panels do not share one."""

    panel: Panel
    title: Sequence[str]
    height: float
    above: float
    ends: tuple[float, float]
    ticks: Ticks
    legend_columns: int = 0
    bar: ColourBar | None = None


def draw(chart: Chart, width: float = WIDTH) -> Figure:
    """The figure of a chart, so many inches wide."""
    figure = Figure((width, 1))
    FigureCanvasAgg(figure)
    within = width - 2 * EDGE
    columns = min(chart.columns, len(chart.panels), max(1, int(within / BREADTH)))
    breadth = (within - GAP * (columns - 1)) / columns
    scales = {panel.heatmap.scale if panel.heatmap else None for panel in chart.panels}
    scale = scales.pop() if len(scales) == 1 else None  # of all panels
    bar = _colour_bar(figure, scale, within) if scale else None
    placed = [_place(figure, panel, breadth, columns, bar is None) for panel in chart.panels]
    rows = [placed[i : i + columns] for i in range(0, len(placed), columns)]
    title = _lines(figure, chart.title, 12, within, "bold")
    headline = _lines(figure, chart.headline, 9.5, within)
    below_title = EDGE + 0.05 + 0.25 * len(title)
    y = below_title + 0.2 * len(headline) + 0.06
    top = y + (bar.height if bar else 0)
    sizes = [max(p.above for p in row) + max(p.height for p in row) + BELOW for row in rows]
    height = top + sum(sizes) + BETWEEN * (len(rows) - 1) + EDGE
    figure.set_figheight(height)
    for lines, at, size, weight in (
        (title, EDGE, 12, "bold"),
        (headline, below_title, 9.5, "normal"),
    ):
        figure.text(
            EDGE / width,
            1 - at / height,
            plain("\n".join(lines)),
            va="top",
            fontsize=size,
            weight=weight,
            linespacing=1.4,
        )
    if bar:
        _draw_colour_bar(figure, bar, EDGE, y)
    lefts = [max(_beside(figure, p) for p in placed[column::columns]) for column in range(columns)]
    for row, size in zip(rows, sizes, strict=True):
        above = max(p.above for p in row)
        for column, p in enumerate(row):
            left = EDGE + column * (breadth + GAP)
            _panel(figure, p, left, lefts[column], top, above, breadth)
        top += size + BETWEEN
    return figure


def _place(figure: Figure, panel: Panel, breadth: float, columns: int, alone: bool) -> Placed:
    lines = _lines(figure, panel.title, 9.5, breadth, "bold") if panel.title else []
    title = 0.08 + 0.18 * len(lines) if lines else 0
    if heatmap := panel.heatmap:
        R, _ = heatmap.values.shape
        tallest = 5.6 if columns == 1 else 3.6
        height = float(np.clip(R * np.clip(tallest / R, 0.09, 0.3), 0.6, tallest + 1))
        ticks = named_ticks(panel.y, R, height / LINE)
        bar = _colour_bar(figure, heatmap.scale, breadth) if alone else None
        above = title + (bar.height if bar else 0)
        return Placed(panel, lines, height, above, (-0.5, R - 0.5), ticks, bar=bar)
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
        if of.bar:
            _draw_colour_bar(figure, of.bar, left, top + above - of.bar.height)
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


def _colour_bar(figure: Figure, scale: Scale, room: float) -> ColourBar:
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
    return ColourBar(scale, inset, long, kept, texts, SCALE + max(0.0, y - 0.25))


def _draw_colour_bar(figure: Figure, bar: ColourBar, left: float, top: float) -> None:
    width, height = figure.get_size_inches()
    thickness = 0.09
    axes: Any = figure.add_axes(
        (
            (left + bar.inset) / width,
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
        at, middle = left + x, 1 - (top + y) / height
        if name:
            swatch: Any = {"fontsize": SMALL + 2, "color": colour(name)}
            figure.text(at / width, middle, "■", va="center", **swatch)
            at += 0.15
        figure.text(at / width, middle, plain(text), va="center", fontsize=SMALL)


def colour(name: str) -> str:
    return PALETTE[name][0]


def plain(text: str) -> str:
    """A label of the corpus, escaped: $ would begin a formula, and a leading _ would hide it from
    the legend."""
    text = text.replace("$", r"\$")
    return "\u200a" + text if text.startswith("_") else text


def vertical_range(panel: Panel) -> tuple[float, float]:
    """The lower and upper end of the y axis of a panel without a heatmap."""
    values = [panel.y.low, panel.y.high]
    for mark in panel.marks:
        if isinstance(mark, Rule):
            values.append(mark.y)
            continue
        for of in ("y", "low", "high"):
            array = getattr(mark, of, None)
            # a logarithmic axis cannot show an interval that reaches down to 0
            shown = np.asarray([] if array is None else array, float)
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
    return (
        low if low == panel.y.low else low - margin,
        high if high == panel.y.high else high + margin,
    )


def named_ticks(axis: Axis, count: int, most: float) -> Ticks:
    """(position, label) of at most about `most` ticks of an axis with `count` positions, at round
    numbers."""
    if len(axis.ticks) > 1:
        return list(axis.ticks[:: step_of(len(axis.ticks) / most)])
    step, labels = step_of(count / most), axis.labels
    # layers that begin at 3 have their ticks at 5, 10, …, not at 3, 8, …
    start = int(labels[0]) if labels and labels[0].isdecimal() else 0
    numbered = all(label == str(start + i) for i, label in enumerate(labels))
    first = -start % step if numbered else 0
    return [(i, labels[i] if labels else str(i)) for i in range(first, count, step)]


def value_ticks(axis: Axis, low: float, high: float, most: int) -> Ticks:
    """(position, label) of the ticks of an axis of numbers."""
    if axis.log:
        powers = range(math.ceil(math.log2(low) - 1e-9), math.floor(math.log2(high)) + 1)
        return [(2.0**i, f"{2.0**i:g}") for i in powers]
    return [(v, f"{v:g}") for v in round_numbers(low, high, most)]


def step_of(least: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, … that is at least that."""
    power = 10 ** math.floor(math.log10(max(1.0, least)))
    return power * next(factor for factor in (1, 2, 5, 10) if factor * power >= least)


def draw_mark(mark: Mark, axes: Any) -> None:
    few = len(getattr(mark, "x", ())) <= FEW
    match mark:
        case Line():
            _interval(mark, axes)
            axes.plot(
                mark.x,
                mark.y,
                color=colour(mark.colour),
                ls=DASHES[mark.dash],
                lw=1.4,
                marker="o" if mark.dots else "",
                ms=3.5 if few else 2.4,
                label=plain(mark.name),
            )
        case Points():
            _interval(mark, axes)
            dot, large, small = ("o", 5, 3.4) if mark.shape == "dot" else ("_", 12, 7)
            axes.plot(
                mark.x,
                mark.y,
                dot,
                color=colour(mark.colour),
                ms=large if few else small,
                mew=0 if mark.shape == "dot" else 1.6,
                label=plain(mark.name),
            )
        case Band():
            label = plain(mark.name)
            axes.fill_between(mark.x, mark.low, mark.high, color=colour("band"), lw=0, label=label)
        case Rule():
            width, label = 1.2 if mark.dash else 0.8, plain(mark.name) or None
            dash = DASHES[mark.dash]
            axes.axhline(mark.y, color=colour(mark.colour), lw=width, ls=dash, label=label)
        case Links():
            axes.vlines(mark.x, mark.low, mark.high, color=colour("baseline"), lw=1, alpha=0.6)
        case Heatmap():
            shown: Any = {"cmap": colour_map(mark.scale), "interpolation": "nearest"}
            axes.imshow(_positions(mark.values, mark.scale), aspect="auto", vmin=0, vmax=1, **shown)
        case _:  # pyright: ignore[reportUnnecessaryComparison]
            raise TypeError(f"no way to draw {type(mark).__name__}")


def write_cells(mark: Heatmap, axes: Any) -> None:
    """The texts in the cells of a heatmap."""
    colours, at_RC = colour_map(mark.scale), _positions(mark.values, mark.scale)
    for (row, column), text in np.ndenumerate(mark.cells):
        if text:
            rgb = np.ravel(colours(at_RC[row : row + 1, column : column + 1]))[:3]
            axes.text(column, row, text, ha="center", va="center", fontsize=SMALL, color=_ink(rgb))


def _ink(rgb: np.ndarray) -> str:
    """Black or white, whichever has more contrast to a colour (WCAG: at least 4.5 : 1)."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return "black" if linear @ (0.2126, 0.7152, 0.0722) > 0.179 else "white"


def _interval(mark: Line | Points, axes: Any) -> None:
    if mark.low is not None and mark.high is not None:
        width = 3 if len(mark.x) <= FEW else 2
        axes.vlines(mark.x, mark.low, mark.high, color=colour(mark.colour), alpha=0.45, lw=width)


def _positions(values_RC: np.ndarray, scale: Scale) -> np.ndarray:
    """The positions of values on their scale, masked where there is no value; NOTHING where a ratio
    is 0."""
    at_RC = np.clip(scale.place(values_RC), 0, 1)
    if scale.kind == "ratio":
        at_RC = np.where(values_RC == 0, NOTHING, at_RC)
    return np.ma.masked_invalid(at_RC)


def colour_map(scale: Scale) -> Colormap:
    stops = [(at, colour(name)) for at, name in scale.stops()]
    colours = LinearSegmentedColormap.from_list(scale.kind, stops)
    unknown = colour("unknown") if scale.unknown else "white"
    under = colour("dead") if scale.kind == "ratio" else None
    return colours.with_extremes(bad=unknown, under=under)
