"""Pictures of a report, as PNG and SVG, by matplotlib without pyplot: in a notebook pyplot's
figures and backend are the user's.

L routers, E experts, F experts of the next layer's router, W windows, D domains. A plot is a
function decorated with @plot that draws one figure, or returns None where the trace does not hold
what it shows.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from moe_inspect.analysis.metrics.balance import load_ratio
from moe_inspect.errors import writing
from moe_inspect.reporting.charts import plots_locality  # noqa: F401  (adds its own to PLOTS)
from moe_inspect.reporting.charts.plots_parts import (
    COLOURS,
    MARKS,
    PLOTS,
    bare,
    breadth,
    layer_ticks,
    letters,
    new_figure,
    new_grid,
    plain,
    plot,
)
from moe_inspect.reporting.tables.pairs import Met, chosen_next, chosen_together
from moe_inspect.reporting.verdict.chance import chance
from moe_inspect.text import cut, layer_label, readable

if TYPE_CHECKING:
    from moe_inspect.reporting.report import Report

PANELS = 8  # layers shown where each takes a panel
MATRICES = 4  # the same, where a panel is a matrix of experts
FAR = np.log2(4)  # colours are saturated at a quarter and at four times the mean
DEAD = "#202020"
UNSUPPORTED = "0.85"
LINES = 10  # routers that can be told apart as lines; more make a heatmap


def write_plots(report: Report, directory: str | Path) -> list[Path]:
    """Draws every plot the trace has the data for, as NAME.png and NAME.svg. Returns the files."""
    directory, written = Path(directory), []
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
    with letters():
        for name, draw in PLOTS.items():
            if (figure := draw(report)) is None:
                continue
            for path in (directory / f"{name}.png", directory / f"{name}.svg"):
                metadata = (
                    {"Date": None} if path.suffix == ".svg" else None
                )  # the same trace makes the same file
                with writing(path):
                    figure.savefig(path, dpi=200, bbox_inches="tight", metadata=metadata)
                written.append(path)
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
    figure, axes = new_figure(width + 2, height + 1.2)
    image = _ratios(axes, ratio_LE)
    layer_ticks(axes.yaxis, [layer_label(report.trace.routers, r) for r in routers])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
    axes.set(xlabel="expert", ylabel="layer")
    if ratio_LE.size <= 160:
        _numbers(axes, ratio_LE)
    worst = np.nan_to_num(ratio_LE, nan=-1)
    at = np.unravel_index(worst.argmax(), worst.shape)
    dead = int((ratio_LE == 0).sum())
    title = (
        f"Busiest: expert {at[1]} of layer "
        f"{layer_label(report.trace.routers, routers[int(at[0])])}, {worst.max():.2f}x the mean "
        "load of its layer"
    )
    axes.set_title(
        title + (f"; {dead} dead (black)" if dead else "; no dead expert"), loc="left", fontsize=10
    )
    _colour_bar(figure, image, axes, "load ÷ mean load of the layer")
    return figure


@plot
def balance(report: Report) -> Figure | None:
    """max/mean of the load by layer, with its interval, against what chance gives."""
    table: Any = report.tables["balance"]
    if not table["max_vio"].notna().any():
        return None
    x, vio = np.arange(len(table)), table["max_vio"].to_numpy()
    figure, axes = new_figure(breadth(len(table)), 4.5)
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
        axes.vlines(
            x,
            1 + low,
            1 + high,
            color="#c0392b",
            alpha=0.45,
            lw=4,
            label="95% interval, by document",
        )
    axes.plot(x, 1 + vio, "o", ms=5, color="#c0392b", label="busiest expert, all tokens")
    if table["max_vio_batch"].notna().any():
        axes.plot(
            x,
            1 + table["max_vio_batch"],
            "_",
            ms=9,
            mew=1.5,
            color="#2c3e50",
            label="busiest expert of a batch, mean over batches",
        )
    axes.axhline(1, color="0.3", lw=0.8)
    pooled = report.pooled_max_over_mean()
    if pooled is not None:
        axes.axhline(
            pooled, color="#2980b9", lw=1, ls="--", label=f"pooled over layers: {pooled:.2f}"
        )
    layer_ticks(
        axes.xaxis, [layer_label(report.trace.routers, r) for r in report.selection.routers]
    )
    worst = int(np.nanargmax(vio))
    label = layer_label(report.trace.routers, report.selection.routers[worst])
    axes.set_title(
        f"Layer {label} is the least balanced: its busiest expert gets {1 + vio[worst]:.2f}x the "
        "mean load",
        loc="left",
        fontsize=10,
    )
    axes.set(xlabel="layer", ylabel="max ÷ mean load", xlim=(-0.5, len(x) - 0.5))
    axes.set_ylim(bottom=min(0.98, axes.get_ylim()[0]))
    figure.legend(
        fontsize=8, frameon=False, loc="outside lower left", ncols=2
    )  # within the axes its marks look like data
    axes.spines[["top", "right"]].set_visible(False)
    return figure


@plot
def domains(report: Report) -> Figure | None:
    """Lift: the activation of each expert in each domain ÷ its mean over the domains, its own
    included; a panel a layer."""
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
    figure, grid = new_grid(*size, rows, columns)
    image = None
    for axes, r in zip(grid.flat, chosen, strict=False):
        E = counts.routers[r].experts
        image = _ratios(axes, table.loc[table["router"] == r, "lift"].to_numpy().reshape(D, E))
        axes.set_title(f"layer {layer_label(report.trace.routers, r)}", fontsize=9, loc="left")
        axes.set_yticks(range(D), [plain(cut(readable(d))) for d in counts.domains], fontsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
        axes.tick_params(axis="x", labelsize=8)
    for axes in grid.flat[len(chosen) :]:
        axes.set_axis_off()
    for axes in grid[-1]:
        axes.set_xlabel("expert")
    shown = (
        ""
        if len(chosen) == len(information)
        else f" (the {len(chosen)} of {len(information)} layers that differ most by domain)"
    )
    figure.suptitle(
        f"Activation of each expert in each domain, against its mean over the domains{shown}",
        fontsize=10,
        x=0.01,
        ha="left",
    )
    if image is not None:
        _colour_bar(figure, image, grid.ravel().tolist(), "activation ÷ its mean over the domains")
    return figure


@plot
def windows(report: Report) -> Figure | None:
    """max/mean of each router in windows of the trace, in the order it ran."""
    if report.counts.counts_only:
        return None
    table: Any = report.tables["windows"]
    if table["window"].nunique() < 2:
        return None
    ratio_LW = table.pivot_table(
        index="router", columns="window", values="max_over_mean", dropna=False
    )
    first_W = table.drop_duplicates("window").sort_values("window")["first_token"].to_numpy()
    labels = [layer_label(report.trace.routers, r) for r in ratio_LW.index]
    L, W = ratio_LW.shape
    if L <= LINES:
        figure, axes = new_figure(8, 4.2)
        for i, (label, ratio_W) in enumerate(zip(labels, ratio_LW.to_numpy(), strict=True)):
            axes.plot(
                ratio_W, color=COLOURS[i % 8], ls=MARKS[i // 8 % 4], lw=1.2, label=f"layer {label}"
            )
        floor_W = table.groupby("window")["noise_floor"].max().to_numpy()
        axes.fill_between(
            np.arange(W), 1, 1 + floor_W, color="0.88", lw=0, label="what chance gives"
        )
        axes.set_ylabel("max ÷ mean load")
        figure.legend(fontsize=8, frameon=False, loc="outside lower left", ncols=5)
        bare(axes)
    else:
        figure, axes = new_figure(float(np.clip(0.16 * W, 6, 13)), float(np.clip(0.18 * L, 3, 12)))
        most = max(float(np.nanquantile(ratio_LW, 0.99)), 1.1)
        image = axes.imshow(
            ratio_LW, aspect="auto", cmap="cividis", vmin=1, vmax=most, interpolation="nearest"
        )
        layer_ticks(axes.yaxis, labels)
        axes.set_ylabel("layer")
        figure.colorbar(
            image,
            ax=axes,
            pad=0.01,
            fraction=0.03,
            aspect=35,
            extend="max",
            label="max ÷ mean load",
        )
    shown = np.unique(np.linspace(0, W - 1, min(8, W)).round().astype(int))
    axes.set_xticks(shown, [f"{first_W[t]:,}" for t in shown], fontsize=8)
    axes.set_xlabel("first token of the window")
    axes.set_title(
        "Busiest expert against the mean load, window by window", loc="left", fontsize=10
    )
    return figure


@plot
def specialization(report: Report) -> Figure | None:
    """Bits that domain and token id tell of the expert, by layer, each beside what shuffled labels
    give."""
    table: Any = report.tables["specialization"]
    x = np.arange(len(table))
    figure, axes = new_figure(breadth(len(table)), 4.2)
    kinds = (
        ("domain", "domain_mi_bits", "domain_mi_null_bits"),
        ("domain, token id known", "domain_mi_given_token_bits", "domain_mi_given_token_null_bits"),
        ("token id", "token_mi_bits", "token_mi_null_bits"),
    )
    known = [kind for kind in kinds if table[kind[1]].notna().any()]
    if not known:
        return None
    for colour, (name, column, null) in zip(COLOURS, known, strict=False):
        axes.plot(x, table[column], color=colour, marker="o", ms=4, lw=1.4, label=name)
        axes.plot(x, table[null], color=colour, ls=":", lw=1.2, label=f"{name}, labels shuffled")
    layer_ticks(axes.xaxis, [layer_label(report.trace.routers, int(r)) for r in table["router"]])
    axes.set(xlabel="layer", ylabel="information on the expert (bits)")
    axes.set_ylim(bottom=0)
    axes.set_title("What the domain and the token id tell of the expert", loc="left", fontsize=10)
    figure.legend(fontsize=8, frameon=False, loc="outside lower left", ncols=3)
    bare(axes)
    return figure


@plot
def coactivation(report: Report) -> Figure | None:
    """Which experts one decision chooses together, against chance: a panel for each of the routers
    where it is most marked."""
    if report.counts.counts_only:
        return None
    met_of = {r: chosen_together(report, r) for r in _furthest(report.tables["coactivation"])}
    return _pairs(report, met_of, "Experts chosen together", "other expert")


@plot
def transitions(report: Report) -> Figure | None:
    """Which experts of the next layer the tokens of an expert go to, against chance."""
    if report.counts.counts_only:
        return None
    met_of = {
        r: met
        for r in _furthest(report.tables["transitions"])
        if (met := chosen_next(report, r)) is not None
    }
    return _pairs(report, met_of, "Experts of one layer and the next", "expert of the next layer")


@plot
def router(report: Report) -> Figure | None:
    """How decided each router is: entropy, margin and mass of its choice, from logits or else from
    gate weights."""
    if report.counts.counts_only:
        return None
    table: Any = report.tables["router"]
    names = {
        "gate_entropy_nats": "entropy of the softmax (nats)",
        "top_k_mass": "probability of the chosen k",
        "boundary_margin": "margin to the next expert (logits)",
        "weight_entropy_nats": "entropy of the k weights (nats)",
        "weight_margin": "first weight − second",
    }
    known = [name for name in names if name in table and table[name].notna().any()]
    from_logits = [name for name in known if not name.startswith("weight")]
    known = from_logits or known
    if not known:
        return None
    figure, grid = new_grid(breadth(len(table)), 1.7 * len(known) + 1, len(known), 1)
    for axes, name, colour in zip(grid[:, 0], known, COLOURS, strict=False):
        axes.plot(table[name].to_numpy(), color=colour, marker="o", ms=4, lw=1.3)
        axes.set_title(names[name], loc="left", fontsize=9)
        axes.set_ylim(0, 1.15 * (table[name].max() or 1))
        axes.set_xticks([])
        bare(axes)
    layer_ticks(
        grid[-1, 0].xaxis, [layer_label(report.trace.routers, int(r)) for r in table["router"]]
    )
    grid[-1, 0].set_xlabel("layer")
    figure.suptitle(
        f"How decided the routers are, from their {'logits' if from_logits else 'gate weights'}",
        fontsize=10,
        x=0.01,
        ha="left",
    )
    return figure


def _furthest(table: Any) -> list[int]:
    """The routers whose supported pairs are furthest from chance, in order of layers."""
    beyond = (
        ((table["probability"] - table["probability"] / table["lift"]).abs() * table["supported"])
        .groupby(table["router"])
        .sum()
    )
    return sorted(int(r) for r in beyond.nlargest(MATRICES).index)


def _pairs(report: Report, met_of: dict[int, Met], title: str, xlabel: str) -> Figure | None:
    """Lift of the supported pairs of experts [E, F], a panel for each router of `met_of`; the other
    pairs are grey."""
    if not met_of:
        return None
    chosen = list(met_of)
    columns = min(2, len(chosen))
    rows = -(-len(chosen) // columns)
    figure, grid = new_grid(4.6 * columns + 1, 4.1 * rows + 0.6, rows, columns)
    image = None
    for axes, r in zip(grid.flat, chosen, strict=False):
        image = _ratios(axes, supported_lift(met_of[r]), UNSUPPORTED)
        axes.set_title(f"layer {layer_label(report.trace.routers, int(r))}", fontsize=9, loc="left")
        axes.set(xlabel=xlabel, ylabel="expert")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axes.tick_params(labelsize=8)
    for axes in grid.flat[len(chosen) :]:
        axes.set_axis_off()
    routers = len(report.selection.routers)
    shown = (
        f" (the {len(chosen)} of {routers} layers furthest from chance)"
        if len(chosen) == MATRICES < routers
        else ""
    )
    figure.suptitle(
        f"{title}, against chance{shown}; grey: may be chance", fontsize=10, x=0.01, ha="left"
    )
    if image is not None:
        _colour_bar(figure, image, grid.ravel().tolist(), "times as often as by chance")
    return figure


def _spread(table: Any, router: int) -> float:
    """How far the activations of a router are from the same in every domain."""
    rows = table[table["router"] == router]
    return float((rows["activation"] * np.log2(rows["lift"].clip(lower=1e-9))).sum())


def supported_lift(met: Met) -> np.ndarray:
    """The lift of each pair that its evidence supports, NaN for the others. [E, F]"""
    lift_EF = np.full(met.count_EN.shape, np.nan)
    possible = np.nonzero(met.expected_EN > 0)
    supported = met.evidence(possible)["supported"]
    lift_EF[possible] = np.where(
        supported, met.count_EN[possible] / met.expected_EN[possible], np.nan
    )
    return lift_EF


def _ratios(axes: Any, ratio: np.ndarray, missing: str = "white") -> Any:
    """A ratio on a logarithmic scale on which a half is as far from 1 as double; zero is black."""
    colours = matplotlib.colormaps["RdBu_r"].with_extremes(bad=missing, under=DEAD)
    exponent = np.where(ratio == 0, -99, np.clip(np.log2(np.where(ratio > 0, ratio, 1)), -FAR, FAR))
    values = np.ma.masked_invalid(np.where(np.isnan(ratio), np.nan, exponent))
    return axes.imshow(
        values,
        aspect="auto",
        cmap=colours,
        norm=TwoSlopeNorm(0, -FAR, FAR),
        interpolation="nearest",
    )


def _numbers(axes: Any, ratio_LE: np.ndarray) -> None:
    for (row, column), value in np.ndenumerate(ratio_LE):
        if not np.isnan(value):
            dark = value == 0 or abs(np.log2(value)) > 1.3
            axes.text(
                column,
                row,
                f"{value:.2f}",
                ha="center",
                va="center",
                fontsize=7,
                color="white" if dark else "black",
            )


def _colour_bar(figure: Any, image: Any, axes: Any, label: str) -> None:
    bar = figure.colorbar(
        image, ax=axes, ticks=[-2, -1, 0, 1, 2], pad=0.01, fraction=0.03, aspect=35
    )
    bar.ax.yaxis.set_major_formatter(
        FuncFormatter(
            lambda exponent, _: {-2: "≤ 1/4", -1: "1/2", 0: "1", 1: "2", 2: "≥ 4"}[round(exponent)]
        )
    )
    bar.set_label(label, fontsize=9)
