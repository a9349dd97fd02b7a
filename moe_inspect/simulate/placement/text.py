"""The verdict and the chart of `simulate placement`."""

from __future__ import annotations

from typing import Any

import numpy as np

from moe_inspect.analysis.metrics.chance import ALPHA, FEWEST_TO_JUDGE
from moe_inspect.reporting.charts import spec
from moe_inspect.simulate.placement.price_text import by_memory, by_pair, priced
from moe_inspect.simulate.placement.tables import time_of, worth
from moe_inspect.simulate.result import SIMULATED, Frame, Labels, Settings, Tables
from moe_inspect.text import plural

LISTED = 4  # workloads that a sentence names
UNFITTED = ("contiguous", "round-robin")  # policies that do not look at the load
ALIKE = 0.001  # relative difference below which lines cannot be told apart
BUSIEST = "busiest GPU ÷ mean GPU"


def verdict(tables: Tables, settings: Settings, label_of: Labels) -> list[str]:
    rows = {row["policy"]: row for row in tables["policies"].to_dict("records")}
    best = rows[settings["recommended"]]
    first = rows.get("contiguous") or next(iter(rows.values()))
    takes = f"the MoE layers take {first['slowdown']:.2f}x the time of perfect balance"
    if settings["times"]:
        takes = f"the busiest GPU has {first['slowdown']:.2f}x the mean load"
    sentences = [
        f"On {plural(settings['gpus'], 'GPU')} with the {first['policy']} placement, {takes} "
        f"(balancedness {first['balancedness_vllm']:.2f} by vLLM's convention, "
        f"{first['balancedness_sglang']:.2f} by SGLang's; "
        f"worst layer {first['worst_max_over_mean']:.2f}x)."
    ]
    by = time_of(tables["policies"])
    saved, least = 1 - best[by] / first[by], worth(settings["error"])
    if best is not first and (saved >= least or settings["minimize"]):
        others = ", ".join(
            f"{name} {row['slowdown']:.2f}x"
            for name, row in rows.items()
            if row not in (best, first)
        )
        # what --minimize gives up balance for is no claim of time
        less = "" if settings["minimize"] else f": {saved:.0%} less time"
        sentences.append(
            f"{best['policy']} brings that to {best['slowdown']:.2f}x"
            f"{f' ({others})' if others else ''}{less}."
        )
    elif len(rows) > 1:
        fastest = min(row[by] for row in rows.values())
        more = f"by more than {least:.0%}"
        if 1 - fastest / first[by] >= least:
            more = f"beyond chance (at best {fastest:.3g}{' ms' if by == 'ms' else 'x'})"
        sentences.append(f"No other policy is faster than {first['policy']} {more}.")
    wasted = [(row["colocated"], name) for name, row in rows.items() if name not in UNFITTED]
    eplbs = (one for one in wasted if one[1].startswith("eplb"))
    most, eplb = max(eplbs, key=lambda one: one[0], default=(0, ""))
    if most:
        each = [f"{name} {n:,}" for n, name in wasted if not name.startswith("eplb")]
        layers = plural(tables["placement"]["layer"].nunique(), "layer")
        sentences.append(
            f"{eplb} places {plural(most, 'replica')}, over {layers}, on a GPU that already has "
            f"the same expert{'; ' if each else ''}{', '.join(each)}."
        )
    if settings["times"]:
        sentences += priced(tables, rows, settings, _unseen(tables))
    sentences += _aged(tables, settings, best["policy"])
    if not settings["counts_only"]:
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
    return [
        *sentences,
        _advice(tables, settings, first["policy"], saved),
        "Simulated: replicas of an expert share its load evenly and at random; the time of a "
        f"layer is that of its {'slowest' if settings['times'] else 'busiest'} GPU"
        + (f", with {settings['times']}." if settings["times"] else "."),
    ]


def _advice(tables: Tables, settings: Settings, first: str, saved: float) -> str:
    """Which plan to take, and why; `saved`: of the time that the policy `first` takes."""
    name, same = settings["recommended"], settings["as_fast"]
    if settings["too_few"]:
        return f"-o FILE saves {name}."
    if settings["minimize"] and name == "local-search":
        return f"Recommended: {name}, chosen by --minimize."
    least = worth(settings["error"])
    if not _unseen(tables):
        if saved < least and name != first:
            less = f"-o FILE saves {name}, which is less than {least:.0%} faster."
            return f"Recommended: keep {first}. {less}"
        return f"-o FILE saves {name}, the fastest on what it is fitted on."
    if not same:
        return f"Recommended: {name}, the fastest on the judged part."
    of = tables["policies"]
    known = of.get("ms_p" if time_of(of) == "ms" else "slower_p")
    beyond = " or beyond chance" if known is not None and known.notna().any() else ""
    return (
        f"Recommended: {name}, the simplest (--help lists it first) of those that are no slower "
        f"than the fastest by {least:.0%}{beyond}: {', '.join([name, *same])}."
    )


def _unseen(tables: Tables) -> bool:
    """Whether plans are judged on what they are not fitted to."""
    return (tables["windows"]["part"] == "judged").any()


def _aged(tables: Tables, settings: Settings, policy: str) -> list[str]:
    """How the plan ages, and what cannot be told of it."""
    said, unknown = list[str](), list[str]()
    if "judged" in tables:
        said += _on_workloads(tables, policy)
        if tables["judged"].query("part == 'judged'")["p"].isna().any():
            unknown.append(
                "how much of that is chance, and of what sets policies apart (it takes "
                f"{FEWEST_TO_JUDGE} documents of each)"
            )
    elif _unseen(tables):
        said.append(_on_windows(tables, settings, policy))
    if not _unseen(tables):
        unknown.append("the balance on text that plans are not fitted on (--judge TRACE)")
    if settings["counts_only"]:
        unknown.append("which GPUs a token reaches (it takes decisions, not counts)")
    return [*said, *([f"Unknown: {'; '.join(unknown)}."] if unknown else [])]


def _on_windows(tables: Tables, settings: Settings, policy: str) -> str:
    by_window = tables["windows"]
    by_part = by_window[by_window["policy"] == policy].groupby(["part", "window"])["max_over_mean"]
    mean = by_part.mean().dropna()  # windows without load
    fit, judged = (mean[mean.index.get_level_values("part") == part] for part in ("fit", "judged"))
    row = next(row for row in tables["policies"].to_dict("records") if row["policy"] == policy)
    # not all policies look at the load
    return (
        f"{policy} has max/mean {row['fit_max_over_mean']:.3f} on the first "
        f"{100 * settings['fit_share']:.3g}%, which policies may be fitted to, and "
        f"{1 / row['balancedness_sglang']:.3f} on the rest; per window of "
        f"{plural(settings['window'], 'token')} {fit.mean():.3f} in the first part, "
        f"{judged.iloc[0]:.3f} just after it, {judged.iloc[-1]:.3f} at the end."
    )


def _on_workloads(tables: Tables, policy: str) -> list[str]:
    """How the plan does on what it is fitted on, and how it ages on the rest, beside chance."""
    rows = tables["judged"].sort_values("max_over_mean", ascending=False).to_dict("records")
    mine = [row for row in rows if row["policy"] == policy]
    fit, rest = ([row for row in mine if row["part"] == part] for part in ("fit", "judged"))
    mean = tables["policies"].set_index("policy")["fit_max_over_mean"][policy]
    on = f"{fit[0]['workload']} (max/mean {mean:.2f})"
    if len(fit) > 1:
        many = plural(len(fit), "workload")
        on = f"{many} (max/mean {mean:.2f} on average, at most {_on(fit[0])})"
    listed = LISTED if len(rest) > LISTED + 1 else len(rest)  # one more is named, too
    aged = ", ".join(_on(row) for row in rest[:listed])
    if more := rest[listed:]:
        aged += f" and at most {more[0]['max_over_mean']:.2f} on {len(more)} more"
    if policy in UNFITTED:
        return [f"{policy} is fitted to no load; beside {on} it has {aged}."] if aged else []
    return [f"{policy} is fitted on {on}{f': it has {aged}' if aged else ''}."]


def _on(row: dict[str, Any]) -> str:
    said = f"{row['max_over_mean']:.2f} on {row['workload']}"
    if row["p"] < ALPHA:
        return f"{said} (by chance at most {row['most_by_chance']:.2f})"
    # NaN where chance is not known, as of what plans are fitted to
    may_be = f" (may be chance, which gives up to {row['most_by_chance']:.2f})"
    return said + (may_be if row["p"] >= ALPHA else "")


def chart(tables: Tables, settings: Settings, label_of: Labels) -> spec.Chart:
    """max/mean over GPUs by layer, on the judged part; and by window or workload, the mean over
    layers, as the plan ages."""
    by_window, policies = tables["windows"], settings["policies"]
    title = "On the judged part" if _unseen(tables) else "Fitted and judged on the same text"
    panels = [_by_layer(tables["placement"], policies, label_of, title)]
    if "judged" in tables:
        panels.append(_by_workload(tables["judged"], policies))
    elif by_window["window"].nunique() > 1:
        panels.append(_by_window(by_window, settings))
    if "traffic" in tables:
        panels.append(by_pair(tables["traffic"]))
    if "sweep" in tables:
        panels.append(by_memory(tables["sweep"]))
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


def _by_workload(judged: Frame, policies: list[str]) -> spec.Panel:
    wide = judged.pivot(index="window", columns="policy", values="max_over_mean")[policies]
    rows = judged.drop_duplicates("window").set_index("window").loc[wide.index]
    names = rows["workload"] + rows["part"].map({"fit": " (fitted on)", "judged": ""})
    ratio_WP = wide.to_numpy(float)
    scale = spec.amount(BUSIEST, 1, ratio_WP, 1.1, log=True)
    heatmap = spec.Heatmap(ratio_WP, scale, spec.cell_numbers(ratio_WP))
    axes = spec.Axis("policy", tuple(policies)), spec.Axis("workload", tuple(names))
    return spec.Panel((heatmap,), *axes, "Each workload, mean over layers")


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
