"""The verdict and the chart of `simulate placement`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from moe_inspect.simulate.placement.tables import recommended
from moe_inspect.text import plural

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WORTH = 0.01  # share of the time saved below which no policy counts as better
MARKERS = "os^vDP"


def verdict(tables: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """Plain sentences, most important first."""
    rows: dict[str, Any] = {row["policy"]: row for row in tables["policies"].to_dict("records")}
    best = rows[recommended(tables["policies"])]
    first = rows.get("contiguous") or next(iter(rows.values()))
    gpus = settings["gpus"]
    sentences = [
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
        sentences.append(
            f"{best['policy']} brings that to {best['slowdown']:.2f}x"
            + (f" ({', '.join(others)})" if others else "")
            + f": {saved:.0%} less time."
        )
    elif len(rows) > 1:
        sentences.append(f"No other policy is more than {WORTH:.0%} faster than {first['policy']}.")
    if (searched := rows.get("local-search")) and any(name.startswith("eplb") for name in rows):
        wasted = max(row["colocated"] for name, row in rows.items() if name.startswith("eplb"))
        if wasted:
            sentences.append(
                f"EPLB puts up to {plural(wasted, 'replica')} on a GPU that already has the same "
                f"expert; local-search {searched['colocated']:,}."
            )
    if settings["counts_only"]:
        sentences.append(
            "Counts only: placements are fitted and judged on the same counts, and the GPUs that a "
            "token reaches are unknown. Both need a trace with decisions."
        )
    else:
        sentences += _aged(tables, settings, best["policy"])
        moved = best["moved_bytes_per_token"]
        sentences.append(
            f"Under {best['policy']} a token reaches {best['ranks_per_token']:.2f} GPUs per layer"
            + (f" on {best['nodes_per_token']:.2f} nodes" if settings["nodes"] > 1 else "")
            + (
                f"; dispatch and combine move {moved / 1024:,.0f} KiB per token over all layers."
                if np.isfinite(moved)
                else "."
            )
        )
    if settings["dispatch"] == "lp":
        least = ", ".join(
            f"{name} {row['lp_slowdown']:.2f}x ({row['by_window_slowdown']:.2f}x)"
            for name, row in rows.items()
        )
        sentences.append(
            "With optimal dispatch among replicas (a linear program per window) the slowdown would "
            f"be at least, in brackets with even sharing: {least}."
        )
    sentences.append(
        f"Recommended, and written by -o: the plan of {settings['recommended']}"
        + (
            ", the fastest on the judged part."
            if settings["recommended"] == best["policy"]
            else ", as --minimize asks."
        )
    )
    sentences.append(
        "Simulated: replicas of an expert share its load evenly and at random; the time of a "
        "layer is that of its busiest GPU."
    )
    return sentences


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
        return ["Fitted and judged on the whole trace: the balance on unseen text is unknown."]
    row = next(row for row in tables["policies"].to_dict("records") if row["policy"] == policy)
    return [
        f"Fitted on the first {100 * settings['fit_share']:.3g}%, {policy} has max/mean "
        f"{row['fit_max_over_mean']:.3f} there and "
        f"{1 / row['balancedness_sglang']:.3f} on the rest; per window of "
        f"{plural(settings['window'], 'token')} {fit.mean():.3f} in the fitted part, "
        f"{judged.iloc[0]:.3f} just after it, {judged.iloc[-1]:.3f} at the end."
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
        "On the part not fitted on" if aged else "Counts only: fitted and judged on the same",
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
