"""The verdict and the chart of `simulate placement`."""

from __future__ import annotations

import numpy as np

from moe_inspect.reporting.charts import spec
from moe_inspect.simulate.placement.tables import recommended
from moe_inspect.simulate.result import SIMULATED, Frame, Labels, Settings, Tables
from moe_inspect.text import plural

ALIKE = 0.001  # relative difference below which lines cannot be told apart
WORTH = 0.01  # share of the time saved below which no policy counts as better
BUSIEST = "busiest GPU ÷ mean GPU"


def verdict(tables: Tables, settings: Settings, label_of: Labels) -> list[str]:
    rows = {row["policy"]: row for row in tables["policies"].to_dict("records")}
    best = rows[recommended(tables["policies"])]
    first = rows.get("contiguous") or next(iter(rows.values()))
    sentences = [
        f"On {plural(settings['gpus'], 'GPU')} with the {first['policy']} placement, the MoE "
        f"layers take {first['slowdown']:.2f}x the time of perfect balance "
        f"(balancedness {first['balancedness_vllm']:.2f} by vLLM's convention, "
        f"{first['balancedness_sglang']:.2f} by SGLang's; "
        f"worst layer {first['worst_max_over_mean']:.2f}x)."
    ]
    saved = 1 - best["slowdown"] / first["slowdown"]
    if best is not first and saved >= WORTH:
        others = ", ".join(
            f"{name} {row['slowdown']:.2f}x"
            for name, row in rows.items()
            if row not in (best, first)
        )
        sentences.append(
            f"{best['policy']} brings that to {best['slowdown']:.2f}x"
            f"{f' ({others})' if others else ''}: {saved:.0%} less time."
        )
    elif len(rows) > 1:
        sentences.append(f"No other policy is more than {WORTH:.0%} faster than {first['policy']}.")
    wasted = max((rows[name]["colocated"] for name in rows if name.startswith("eplb")), default=0)
    if wasted and "local-search" in rows:
        sentences.append(
            f"EPLB puts up to {plural(wasted, 'replica')} on a GPU that already has the same "
            f"expert; local-search {rows['local-search']['colocated']:,}."
        )
    if settings["counts_only"]:
        sentences.append(
            "Counts only: placements are fitted and judged on the same counts, and the GPUs that a "
            "token reaches are unknown. Both need a trace with decisions."
        )
    else:
        sentences += _aged(tables, settings, best["policy"])
        said = (
            f"Under {best['policy']} a token reaches {best['ranks_per_token']:.2f} GPUs per layer"
        )
        if settings["nodes"] > 1:
            said += f" on {best['nodes_per_token']:.2f} nodes"
        if np.isfinite(moved := best["moved_bytes_per_token"]):
            said += f"; dispatch and combine move {moved / 1024:,.0f} KiB per token over all layers"
        sentences.append(f"{said}.")
    if settings["dispatch"] == "lp":
        least = ", ".join(
            f"{name} {row['lp_slowdown']:.2f}x ({row['by_window_slowdown']:.2f}x)"
            for name, row in rows.items()
        )
        sentences.append(
            "With optimal dispatch among replicas (a linear program per window), the slowdown "
            f"would be at least (in brackets: with even sharing): {least}."
        )
    name, on = settings["recommended"], "counts" if settings["counts_only"] else "judged part"
    said = f"Recommended: {name}, the fastest on the {on} (save with -o FILE)."
    if name != best["policy"]:
        said = f"Recommended: {name}, chosen by --minimize (save with -o FILE)."
    elif best is not first and saved < WORTH and not settings["minimize"]:
        said = (
            f"Recommended: keep {first['policy']}. -o FILE saves {name}, which is less than "
            f"{WORTH:.0%} faster on the {on}."
        )
    return [
        *sentences,
        said,
        "Simulated: replicas of an expert share its load evenly and at random; the time of a "
        "layer is that of its busiest GPU.",
    ]


def _aged(tables: Tables, settings: Settings, policy: str) -> list[str]:
    by_window = tables["windows"]
    by_part = by_window[by_window["policy"] == policy].groupby(["part", "window"])["max_over_mean"]
    mean = by_part.mean().dropna()  # windows without load
    fit, judged = (mean[mean.index.get_level_values("part") == part] for part in ("fit", "judged"))
    if not len(judged):
        return ["Fitted and judged on the whole trace: the balance on unseen text is unknown."]
    row = next(row for row in tables["policies"].to_dict("records") if row["policy"] == policy)
    return [
        # not all policies look at the load
        f"{policy} has max/mean {row['fit_max_over_mean']:.3f} on the first "
        f"{100 * settings['fit_share']:.3g}%, which policies may be fitted to, and "
        f"{1 / row['balancedness_sglang']:.3f} on the rest; per window of "
        f"{plural(settings['window'], 'token')} {fit.mean():.3f} in the first part, "
        f"{judged.iloc[0]:.3f} just after it, {judged.iloc[-1]:.3f} at the end."
    ]


def chart(tables: Tables, settings: Settings, label_of: Labels) -> spec.Chart:
    """max/mean over GPUs by layer, on the judged part; and by window, the mean over layers, as the
    plan ages."""
    by_window = tables["windows"]
    aged = by_window["window"].nunique() > 1
    title = "On the judged part" if aged else "Counts only: fitted and judged on the same counts"
    panels = [_by_layer(tables["placement"], settings["policies"], label_of, title)]
    if aged:
        panels.append(_by_window(by_window, settings))
    return spec.Chart(
        "Placement of experts",
        "Load of the busiest GPU ÷ mean load of the GPUs, by policy",
        tuple(panels),
        text=SIMULATED + "1 is perfect balance: the time of a layer is that of its busiest GPU.",
        name="placement",
    )


def _by_layer(whole: Frame, policies: list[str], label_of: Labels, title: str) -> spec.Panel:
    """Dots of the policies beside each other; of many layers a heatmap, in which those that tie do
    not hide each other."""
    wide = whole.pivot(index="policy", columns="router", values="max_over_mean").loc[policies]
    layers = spec.Axis("layer", tuple(label_of[r] for r in wide.columns))
    ratio_PL = wide.to_numpy(float)
    if len(wide.columns) > spec.MOST_LINES:
        heatmap = spec.Heatmap(ratio_PL, spec.amount(BUSIEST, 1, ratio_PL, 1.1, log=True))
        return spec.Panel((heatmap,), layers, spec.Axis("policy", tuple(policies)), title)
    x = np.arange(len(wide.columns), dtype=float)
    n = len(policies)
    dots = [
        spec.Points(x + (i - (n - 1) / 2) * 0.7 / n, ratio_PL[i], name, spec.SERIES[i])
        for i, name in enumerate(policies)
    ]
    return spec.Panel((spec.Rule(1), *dots), layers, spec.log_axis(BUSIEST, ratio_PL), title)


def _by_window(by_window: Frame, settings: Settings) -> spec.Panel:
    """A line per policy; those that lie on each other are one line with all their names."""
    mean = by_window.pivot_table(
        index="policy", columns="window", values="max_over_mean", aggfunc="mean"
    )
    policies = settings["policies"]
    same = dict[str, list[str]]()  # the first of those that lie on each other → all
    for name in policies:
        alike = (of for of in same if np.allclose(mean.loc[of], mean.loc[name], rtol=ALIKE))
        same.setdefault(next(alike, name), []).append(name)
    x = np.arange(len(mean.columns), dtype=float)
    lines = [
        spec.Line(
            x, mean.loc[of].to_numpy(float), " = ".join(names), *spec.look(policies.index(of))
        )
        for of, names in same.items()
    ]
    last = int(by_window.loc[by_window["part"] == "fit", "window"].max())
    fitted, top = np.array([-0.5, last + 0.5]), float(np.nanmax(mean.to_numpy()))
    band = spec.Band(fitted, np.ones(2), np.full(2, top), "fitted on")
    first_token = [settings["window"] * int(w) for w in mean.columns]
    return spec.Panel(
        (band, spec.Rule(1), *lines),
        spec.token_axis("first token of the window", first_token),
        spec.log_axis(BUSIEST, mean.to_numpy()),
        "As the plan ages, mean over layers",
    )
