"""What the pictures of a report are made of: their registry, colours, figures without pyplot, and
axes of layers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from moe_inspect.reporting.report import Report

PLOTS: dict[str, Callable[[Report], Figure | None]] = {}
# Okabe and Ito's colours, which the colour-blind tell apart; yellow, too light on white, comes last
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKS = ("-", "--", ":", "-.")


# what DejaVu Sans has no letters for (Chinese, Japanese, Korean), where it is installed
OTHER_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans CJK KR",
    "WenQuanYi Micro Hei",
    "PingFang SC",
    "Hiragino Sans",
    "Microsoft YaHei",
)


@contextmanager
def letters() -> Iterator[None]:
    """Labels in any script that an installed font has; a letter that none has is a box, without a
    warning for each."""
    installed = {font.name for font in font_manager.fontManager.ttflist}
    family = ["DejaVu Sans", *(name for name in OTHER_FONTS if name in installed)]
    with matplotlib.rc_context({"font.family": family}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        yield


def plot(function: Callable[[Report], Figure | None]) -> Callable[[Report], Figure | None]:
    """Registers a plot under the function's name, which is also its file's."""
    PLOTS[function.__name__] = function
    return function


def new_grid(width: float, height: float, rows: int, columns: int) -> tuple[Figure, Any]:
    """A figure of so many inches, and its axes [rows, columns]."""
    figure = Figure((width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def new_figure(width: float, height: float) -> tuple[Figure, Any]:
    figure, axes = new_grid(width, height, 1, 1)
    return figure, axes[0, 0]


def breadth(layers: int) -> float:
    return float(np.clip(0.28 * layers, 6.5, 15))


def bare(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.92", lw=0.8)
    axes.set_axisbelow(True)


def plain(text: str) -> str:
    """A label of the corpus: $ would begin a formula, and a leading _ would hide it from the
    legend."""
    text = text.replace("$", r"\$")
    return "\u200a" + text if text.startswith("_") else text


def layer_ticks(axis: Any, labels: list[str]) -> None:
    step = max(1, len(labels) // 32)
    axis.set_ticks(range(0, len(labels), step), labels[::step])
    axis.set_tick_params(labelsize=8)
