"""Pictures of a report, as PNG. The only file that imports matplotlib.

L routers, E experts, D domains. A plot is a function decorated with @plot that draws one figure, or returns None where the
trace does not hold what it shows.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import TwoSlopeNorm
from matplotlib.ticker import FuncFormatter, MaxNLocator

from moe_inspect.analysis.balance import load_ratio
from moe_inspect.errors import MoeInspectError
from moe_inspect.report.verdict import chance

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from moe_inspect.report.report import Report

PLOTS: dict[str, Callable[[Report], Figure | None]] = {}
PANELS = 8  # layers shown where each takes a panel
FAR = np.log2(4)  # colours are saturated at a quarter and at four times the mean
DEAD = "#202020"


def plot(function: Callable[[Report], Figure | None]) -> Callable[[Report], Figure | None]:
    """Registers a plot under the function's name, which is also its file's."""
    PLOTS[function.__name__] = function
    return function


def write_plots(report: Report, directory: str | Path) -> list[Path]:
    """Draws every plot the trace has the data for. Returns the files."""
    directory, written = Path(directory), []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, draw in PLOTS.items():
            if (figure := draw(report)) is None:
                continue
            figure.savefig(directory / f"{name}.png", dpi=150, bbox_inches="tight")
            plt.close(figure)
            written.append(directory / f"{name}.png")
    except OSError as error:
        raise MoeInspectError(f"cannot write {directory}: {error.strerror or error}") from None
    return written


@plot
def load(report: Report) -> Figure | None:
    """Load ratio of every expert at every layer."""
    routers = report.selection.routers
    widest = max(report.trace.routers[r].experts for r in routers)
    ratio_LE = np.full((len(routers), widest), np.nan)
    for row, r in enumerate(routers):
        load_E = report.counts.load_E(r)
        ratio_LE[row, : len(load_E)] = load_ratio(load_E[None])[0]
    width, height = float(np.clip(0.16 * widest, 5, 15)), float(np.clip(0.3 * len(routers), 2, 12))
    figure, axes = plt.subplots(figsize=(width + 2, height + 1.2), layout="constrained")
    image = _ratios(axes, ratio_LE)
    _layer_ticks(axes.yaxis, [_label(report, r) for r in routers])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
    axes.set(xlabel="expert", ylabel="layer")
    if ratio_LE.size <= 160:
        _numbers(axes, ratio_LE)
    worst = np.nan_to_num(ratio_LE, nan=-1)
    at = np.unravel_index(worst.argmax(), worst.shape)
    dead = int((ratio_LE == 0).sum())
    title = f"Busiest: expert {at[1]} of layer {_label(report, routers[int(at[0])])}, {worst.max():.2f}x the mean load of its layer"
    axes.set_title(title + (f"; {dead} dead (black)" if dead else "; no dead expert"), loc="left", fontsize=10)
    _colour_bar(figure, image, axes, "load ÷ mean load of the layer")
    return figure


@plot
def balance(report: Report) -> Figure | None:
    """max/mean of the load by layer, with its interval, against what chance gives."""
    table: Any = report.tables["balance"]
    if not table["max_vio"].notna().any():
        return None
    x, vio = np.arange(len(table)), table["max_vio"].to_numpy()
    figure, axes = plt.subplots(figsize=(float(np.clip(0.28 * len(table), 6.5, 15)), 4.5), layout="constrained")
    floor = np.array([chance(row) for row in table.to_dict("records")])
    axes.fill_between(
        np.r_[-0.5, x, len(x) - 0.5],
        1,
        1 + np.r_[floor[0], floor, floor[-1]],
        color="0.85",
        label="what chance gives documents like these",
        lw=0,
    )
    low, high = table["max_vio_low"].to_numpy(), table["max_vio_high"].to_numpy()
    if not np.isnan(low).all():
        # drawn for the busiest expert, whose share the interval is of
        axes.vlines(x, 1 + low, 1 + high, color="#c0392b", alpha=0.45, lw=4, label="95% interval, by document")
    axes.plot(x, 1 + vio, "o", ms=5, color="#c0392b", label="busiest expert, all tokens")
    if table["max_vio_batch"].notna().any():
        axes.plot(x, 1 + table["max_vio_batch"], "_", ms=9, mew=1.5, color="#2c3e50", label="busiest expert of a batch, mean over batches")
    axes.axhline(1, color="0.3", lw=0.8)
    pooled = report.pooled_max_over_mean()
    if pooled is not None:
        axes.axhline(pooled, color="#2980b9", lw=1, ls="--", label=f"pooled over layers: {pooled:.2f}")
    _layer_ticks(axes.xaxis, [_label(report, r) for r in report.selection.routers])
    worst = int(np.nanargmax(vio))
    label = _label(report, report.selection.routers[worst])
    axes.set_title(
        f"Layer {label} is the least balanced: its busiest expert gets {1 + vio[worst]:.2f}x the mean load", loc="left", fontsize=10
    )
    axes.set(xlabel="layer", ylabel="max ÷ mean load", xlim=(-0.5, len(x) - 0.5))
    axes.set_ylim(bottom=min(0.98, axes.get_ylim()[0]))
    figure.legend(fontsize=8, frameon=False, loc="outside lower left", ncols=2)  # within the axes its marks look like data
    axes.spines[["top", "right"]].set_visible(False)
    return figure


@plot
def domains(report: Report) -> Figure | None:
    """Lift: the activation of each expert in each domain ÷ its mean over the domains, its own included; a panel a layer."""
    counts, D = report.counts, len(report.counts.domains)
    if D < 2:
        return None
    table: Any = report.tables["domains"]
    information = {r: _spread(table, r) for r in report.selection.routers}
    chosen = sorted(sorted(information, key=lambda r: -information[r])[:PANELS])
    widest = max(counts.routers[r].experts for r in chosen)
    columns = 1 if widest > 64 or len(chosen) == 1 else 2
    rows = -(-len(chosen) // columns)
    width = float(np.clip(0.16 * widest, 4, 13 / columns))
    size = (columns * width + 2.5, rows * (float(np.clip(0.24 * D, 0.8, 6)) + 0.75) + 0.6)
    figure, grid = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    image = None
    for axes, r in zip(grid.flat, chosen, strict=False):
        E = counts.routers[r].experts
        image = _ratios(axes, table.loc[table["router"] == r, "lift"].to_numpy().reshape(D, E))
        axes.set_title(f"layer {_label(report, r)}", fontsize=9, loc="left")
        axes.set_yticks(range(D), [d if len(d) <= 18 else d[:17] + "…" for d in counts.domains], fontsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
        axes.tick_params(axis="x", labelsize=8)
    for axes in grid.flat[len(chosen) :]:
        axes.set_axis_off()
    for axes in grid[-1]:
        axes.set_xlabel("expert")
    shown = "" if len(chosen) == len(information) else f" (the {len(chosen)} of {len(information)} layers that differ most by domain)"
    figure.suptitle(f"Activation of each expert in each domain, against its mean over the domains{shown}", fontsize=10, x=0.01, ha="left")
    if image is not None:
        _colour_bar(figure, image, grid.ravel().tolist(), "activation ÷ its mean over the domains")
    return figure


def _spread(table: Any, router: int) -> float:
    """How far the activations of a router are from the same in every domain."""
    rows = table[table["router"] == router]
    return float((rows["activation"] * np.log2(rows["lift"].clip(lower=1e-9))).sum())


def _ratios(axes: Any, ratio: np.ndarray) -> Any:
    """A ratio on a logarithmic scale on which a half is as far from 1 as double; zero is black, missing white."""
    colours = plt.get_cmap("RdBu_r").with_extremes(bad="white", under=DEAD)
    exponent = np.where(ratio == 0, -99, np.clip(np.log2(np.where(ratio > 0, ratio, 1)), -FAR, FAR))
    values = np.ma.masked_invalid(np.where(np.isnan(ratio), np.nan, exponent))
    return axes.imshow(values, aspect="auto", cmap=colours, norm=TwoSlopeNorm(0, -FAR, FAR), interpolation="nearest")


def _numbers(axes: Any, ratio_LE: np.ndarray) -> None:
    for (row, column), value in np.ndenumerate(ratio_LE):
        if not np.isnan(value):
            dark = value == 0 or abs(np.log2(value)) > 1.3
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color="white" if dark else "black")


def _colour_bar(figure: Any, image: Any, axes: Any, label: str) -> None:
    bar = figure.colorbar(image, ax=axes, ticks=[-2, -1, 0, 1, 2], pad=0.01, fraction=0.03, aspect=35)
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda exponent, _: {-2: "≤ 1/4", -1: "1/2", 0: "1", 1: "2", 2: "≥ 4"}[round(exponent)]))
    bar.set_label(label, fontsize=9)


def _layer_ticks(axis: Any, labels: list[str]) -> None:
    step = max(1, len(labels) // 32)
    axis.set_ticks(range(0, len(labels), step), labels[::step])
    axis.set_tick_params(labelsize=8)


def _label(report: Report, router: int) -> str:
    layer = report.trace.routers[router].layer
    several = sum(r.layer == layer for r in report.trace.routers) > 1
    return f"{layer}/{router}" if several else str(layer)
