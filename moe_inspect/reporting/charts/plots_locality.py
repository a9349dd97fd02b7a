"""Pictures of what goes with what came before: the token before, the window before, the layer
before.

L routers. Of a trace that does not hold what a plot shows it returns None.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from moe_inspect.reporting.charts.plots_parts import (
    COLOURS,
    MARKS,
    bare,
    breadth,
    layer_ticks,
    new_figure,
    new_grid,
    plain,
    plot,
)
from moe_inspect.reporting.tables.pairs import LENGTHS
from moe_inspect.text import cut, layer_label, readable

if TYPE_CHECKING:
    from moe_inspect.reporting.report import Report


@plot
def repetition(report: Report) -> Figure | None:
    """How often the next token has the same first choice, by layer and domain."""
    if report.counts.counts_only:
        return None
    table: Any = report.tables["repetition"]
    if table["first_choice"].isna().all():
        return None
    chosen = list(report.selection.routers)
    figure, axes = new_figure(breadth(len(chosen)), 4.2)
    names = ["first_choice", "first_choice_low", "first_choice_high"]
    share = table.pivot_table(
        index="router", columns="domain", values=names, sort=False, dropna=False
    ).reindex(chosen)
    for i, name in enumerate(share["first_choice"].columns):
        low, high = (share[bound][name].to_numpy() for bound in names[1:])
        axes.vlines(range(len(chosen)), low, high, color=COLOURS[i % 8], alpha=0.45, lw=3)
        axes.plot(
            share["first_choice"][name].to_numpy(),
            color=COLOURS[i % 8],
            ls=MARKS[i // 8 % 4],
            marker="o",
            ms=3,
            lw=1.3,
            label=plain(cut(readable(name))),
        )
    random = table.groupby("router")["first_choice_random"].first().reindex(chosen)
    axes.plot(random.to_numpy(), color="0.5", ls=":", lw=1.5, label="by chance")
    layer_ticks(axes.xaxis, [layer_label(report.trace.routers, r) for r in chosen])
    axes.set(xlabel="layer", ylabel="share of pairs of consecutive tokens")
    axes.set_ylim(bottom=0)
    intervals = (
        ", with 95% intervals by document" if table["first_choice_low"].notna().any() else ""
    )
    axes.set_title(
        f"Consecutive tokens with the same first choice{intervals}", loc="left", fontsize=10
    )
    figure.legend(fontsize=8, frameon=False, loc="outside lower left", ncols=5)
    bare(axes)
    return figure


@plot
def locality(report: Report) -> Figure | None:
    """How far a choice can be told from the token, the segment and the layer before, by layer,
    beside what chance gives."""
    if report.counts.counts_only:
        return None
    table: Any = report.tables["locality"]
    lines = {
        "The first choice of the token before": [
            ("first_choice_repetition", None, "the same again")
        ],
        "The experts of a segment (SRP)": [
            (f"srp_{m}", f"srp_{m}_by_load", f"{m} tokens") for m in LENGTHS
        ],
        "The first choice at the next layer": [("next_accuracy", "next_accuracy_null", "foretold")],
    }
    panels = {title: kinds for title, kinds in lines.items() if table[kinds[0][0]].notna().any()}
    if not panels:
        return None
    figure, grid = new_grid(breadth(len(table)), 2.9 * len(panels), len(panels), 1)
    x = np.arange(len(table))
    for axes, (title, kinds) in zip(grid[:, 0], panels.items(), strict=True):
        for i, (name, by_chance, said) in enumerate(kinds):
            axes.vlines(
                x, table[f"{name}_low"], table[f"{name}_high"], color=COLOURS[i], alpha=0.45, lw=3
            )
            axes.plot(
                table[name].to_numpy(), color=COLOURS[i], marker="o", ms=3, lw=1.3, label=said
            )
            if by_chance:
                axes.plot(
                    table[by_chance].to_numpy(),
                    color=COLOURS[i],
                    ls=":",
                    lw=1.5,
                    label=f"{said}: by chance, at these loads",
                )
        _by_layer(report, axes, table, "share" if len(kinds) == 1 else "SRP", title)
    grid[0, 0].figure.suptitle(
        "How far a choice can be told, with 95% intervals", x=0.01, ha="left", fontsize=11
    )
    return figure


@plot
def drift(report: Report) -> Figure | None:
    """How far the load moves between windows, beside chance, and what that costs a placement made
    for the window before."""
    if report.counts.counts_only:
        return None
    table: Any = report.tables["drift"]
    if not table["total_variation"].notna().any():
        return None
    figure, grid = new_grid(breadth(len(table)), 5.8, 2, 1)
    moved, cost = grid[:, 0]
    for i, (name, said) in enumerate(
        (
            ("total_variation", "from a window to the next"),
            ("first_to_last", "from the first to the last"),
        )
    ):
        moved.plot(table[name].to_numpy(), color=COLOURS[i], marker="o", ms=3, lw=1.3, label=said)
        moved.plot(
            table[f"{name}_floor"].to_numpy(),
            color=COLOURS[i],
            ls=":",
            lw=1.5,
            label=f"{said}: by chance",
        )
    for i, (name, said) in enumerate(
        (
            ("balancedness_fresh", "packed for the window itself"),
            ("balancedness_stale", "for the one before"),
        )
    ):
        cost.plot(table[name].to_numpy(), color=COLOURS[i], marker="o", ms=3, lw=1.3, label=said)
    _by_layer(report, moved, table, "share of assignments", "How far the load moves")
    gpus = sorted({int(n) for n in table["gpus"]})
    _by_layer(
        report,
        cost,
        table,
        "mean ÷ max load of GPUs",
        f"What an old placement costs, {' or '.join(map(str, gpus))} GPUs",
    )
    return figure


def _by_layer(report: Report, axes: Any, table: Any, ylabel: str, title: str) -> None:
    layer_ticks(axes.xaxis, [layer_label(report.trace.routers, int(r)) for r in table["router"]])
    axes.set(xlabel="layer", ylabel=ylabel)
    axes.set_title(title, loc="left", fontsize=10)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    bare(axes)
