"""What `simulate placement` says and draws of its tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from moe_inspect.simulate.placement.tables import recommended
from moe_inspect.text import plural

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WORTH = 0.01  # share of the time under which none is better
MARKERS = "os^vDP"


def verdict(tables: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """Plain sentences, most important first."""
    rows: dict[str, Any] = {row["policy"]: row for row in tables["policies"].to_dict("records")}
    best = rows[recommended(tables["policies"])]
    first = rows.get("contiguous") or next(iter(rows.values()))
    gpus = settings["gpus"]
    said = [
        f"On {plural(gpus, 'GPU')} the {first['policy']} placement makes the MoE layers "
        f"{first['slowdown']:.2f}x as slow as perfect balance "
        f"would (balancedness {first['balancedness_vllm']:.2f} by vLLM's convention, "
        f"{first['balancedness_sglang']:.2f} by SGLang's; "
        f"worst layer {first['worst_max_over_mean']:.2f}x)."
    ]
    saved = 1 - best["slowdown"] / first["slowdown"]
    if best is not first and saved >= WORTH:
        others = [
            f"{name} {row['slowdown']:.2f}x"
            for name, row in rows.items()
            if row not in (best, first)
        ]
        said.append(
            f"{best['policy']} brings that to {best['slowdown']:.2f}x"
            + (f" ({', '.join(others)})" if others else "")
            + f": {saved:.0%} less time."
        )
    elif len(rows) > 1:
        said.append(
            f"No other policy saves as much as {WORTH:.0%} of the time that {first['policy']} "
            "takes."
        )
    if (searched := rows.get("local-search")) and any(name.startswith("eplb") for name in rows):
        wasted = max(row["colocated"] for name, row in rows.items() if name.startswith("eplb"))
        if wasted:
            said.append(
                f"EPLB puts up to {plural(wasted, 'replica')} beside another of the same "
                f"expert; local-search {searched['colocated']:,}."
            )
    if settings["counts_only"]:
        said.append(
            "Counts only: fitted on what it is judged by, and no ranks a token reaches; both "
            "need a trace with decisions."
        )
    else:
        said += _aged(tables, settings, best["policy"])
        moved = best["moved_bytes_per_token"]
        said.append(
            f"Under {best['policy']} a token reaches {best['ranks_per_token']:.2f} GPUs a layer"
            + (f" on {best['nodes_per_token']:.2f} nodes" if settings["nodes"] > 1 else "")
            + (
                f"; {moved / 1024:,.0f} KiB go there and back a token, all layers."
                if np.isfinite(moved)
                else "."
            )
        )
    if settings["dispatch"] == "lp":
        least = ", ".join(
            f"{name} {row['lp_slowdown']:.2f}x ({row['by_window_slowdown']:.2f}x)"
            for name, row in rows.items()
        )
        said.append(
            "If dispatch chose among replicas as a linear program would, window by window, the "
            "slowdown could fall to, at best (in brackets "
            f"with even sharing): {least}."
        )
    said.append(
        f"Recommended, and written by -o: the plan of {settings['recommended']}"
        + (
            ", which is the least slow on the judged part."
            if settings["recommended"] == best["policy"]
            else ", as --minimize asks."
        )
    )
    said.append(
        "Simulated: replicas of an expert share its load evenly and at random; the time of a "
        "layer is that of its busiest GPU."
    )
    return said


def _aged(tables: dict[str, Any], settings: dict[str, Any], policy: str) -> list[str]:
    by_window: Any = tables["windows"]
    mine = (
        by_window[by_window["policy"] == policy]
        .groupby(["window", "part"], sort=True)["max_over_mean"]
        .mean()
        .reset_index()
    )
    fit, judged = (
        mine[mine["part"] == "fit"]["max_over_mean"],
        mine[mine["part"] == "judged"]["max_over_mean"],
    )
    if not len(judged):
        return [
            "Fitted on the whole trace and judged by it: what new text would cost is not known."
        ]
    row = next(row for row in tables["policies"].to_dict("records") if row["policy"] == policy)
    return [
        f"Fitted on the first {100 * settings['fit_share']:.3g}%, {policy} has max/mean "
        f"{row['fit_max_over_mean']:.3f} there and "
        f"{1 / row['balancedness_sglang']:.3f} on the rest; by window of "
        f"{plural(settings['window'], 'token')} {fit.mean():.3f} while fitted, "
        f"{judged.iloc[0]:.3f} right after, {judged.iloc[-1]:.3f} at the end."
    ]


def figure(tables: dict[str, Any], settings: dict[str, Any], label_of: dict[int, str]) -> Figure:
    """Left: max/mean over GPUs by layer, on the judged part. Right: by window, the mean over
    layers, as the plan ages."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    whole, by_window = tables["placement"], tables["windows"]
    aged = by_window["window"].nunique() > 1
    made = Figure(figsize=(11 if aged else 6.5, 4.2), layout="constrained")
    grid: Any = made.subplots(1, 2 if aged else 1, squeeze=False)[0]
    routers = whole.drop_duplicates("router")
    names = settings["policies"]
    for number, name in enumerate(names):  # side by side, or those that tie would hide each other
        aside = (number - (len(names) - 1) / 2) * 0.7 / len(names)
        style: dict[str, Any] = {
            "color": f"C{number}",
            "label": name,
            "marker": MARKERS[number % len(MARKERS)],
            "ms": 5,
        }
        grid[0].plot(
            np.arange(len(routers)) + aside,
            whole[whole["policy"] == name]["max_over_mean"],
            ls="",
            **style,
        )
        if aged:
            mean = by_window[by_window["policy"] == name].groupby("window")["max_over_mean"].mean()
            grid[1].plot(mean.index + aside, mean, lw=1, **style)
    for edge in range(1, len(routers)):
        grid[0].axvline(edge - 0.5, color="0.9", lw=0.8, zorder=0)
    labels = [label_of[r] for r in routers["router"]]
    step = max(1, len(labels) // 24)
    grid[0].set_xticks(range(0, len(labels), step), labels[::step], fontsize=8)
    grid[0].set(xlabel="layer", ylabel="busiest GPU ÷ mean GPU")
    grid[0].set_title(
        "On the part that was not fitted" if aged else "Counts: fitted on what it is judged by",
        loc="left",
        fontsize=10,
    )
    if aged:
        fitted = by_window.loc[by_window["part"] == "fit", "window"].max() + 0.5
        grid[1].axvspan(-0.5, fitted, color="0.92", lw=0)
        grid[1].xaxis.set_major_locator(MaxNLocator(integer=True))
        grid[1].set(
            xlabel=f"window of {settings['window']:,} tokens (grey: fitted on)",
            xlim=(-0.5, by_window["window"].max() + 0.5),
        )
        grid[1].set_title("As the plan ages, mean over layers", loc="left", fontsize=10)
    for axes in grid:
        axes.axhline(1, color="0.3", lw=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    made.legend(
        *grid[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=6,
        fontsize=8,
        frameon=False,
    )
    return made
