"""The verdict and the chart of `simulate placement`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from moe_inspect.analysis.metrics.chance import ALPHA, FEWEST_TO_JUDGE
from moe_inspect.reporting.charts import spec
from moe_inspect.simulate.placement.policies import CURRENT, UNFITTED
from moe_inspect.simulate.placement.tables import time_of, worth
from moe_inspect.simulate.result import SIMULATED, Frame, Labels, Settings, Tables
from moe_inspect.simulate.step import cost_panels, cost_sentences
from moe_inspect.text import plural

LISTED = 4  # workloads that a sentence names
ALIKE = 0.001  # relative difference below which lines cannot be told apart
BUSIEST = "busiest GPU ÷ mean GPU"

Row = dict[str, Any]  # a row of the table policies


def verdict(tables: Tables, settings: Settings, label_of: Labels) -> list[str]:
    rows = {row["policy"]: row for row in tables["policies"].to_dict("records")}
    best = rows[settings["recommended"]]
    first = rows.get(CURRENT) or rows.get("contiguous") or next(iter(rows.values()))
    by = time_of(tables["policies"])
    in_use = settings["current"] if by == "ms" else first
    saved = 1 - best[by] / in_use[by]
    costs, times = settings["costs"], settings["times"]
    slowest, with_times = ("slowest", f", with {times}") if times else ("busiest", "")
    return [
        *(cost_sentences(tables, costs, label_of) if costs else []),
        _balance(first, settings),
        *_improvement(rows, best, first, saved, by, worth(settings["error"])),
        *_colocated(rows, tables["placement"]["layer"].nunique()),
        *(_priced(tables, rows, settings, _unseen(tables)) if times else []),
        *_aged(tables, settings, best["policy"]),
        *([] if settings["counts_only"] else [_reach(best, settings)]),
        *([_optimal_dispatch(rows)] if settings["dispatch"] == "lp" else []),
        _advice(tables, settings, first["policy"], saved),
        "Simulated: replicas of an expert share its load evenly and at random; the time of a "
        f"layer is that of its {slowest} GPU{with_times}.",
    ]


def _balance(row: Row, settings: Settings) -> str:
    ratio = f"{row['max_over_mean']:.2f}x"
    cost = f"the MoE layers take {ratio} the time of perfect balance"
    if settings["times"]:
        cost = f"the busiest GPU has {ratio} the mean load"
    return (
        f"On {plural(settings['gpus'], 'GPU')} with the {row['policy']} placement, {cost} "
        f"(worst layer {row['worst_max_over_mean']:.2f}x)."
    )


def _improvement(
    rows: dict[str, Row], best: Row, first: Row, saved: float, by: str, least: float
) -> list[str]:
    """How much the best policy improves on the first. `saved`: share of the time, which is compared
    by the column `by`; `least`: share that is worth a change."""
    if best is not first and saved >= least:
        others = ", ".join(
            f"{name} {row['max_over_mean']:.2f}x"
            for name, row in rows.items()
            if row not in (best, first)
        )
        others = f" ({others})" if others else ""
        return [
            f"{best['policy']} brings that to {best['max_over_mean']:.2f}x{others}: {saved:.0%} "
            "less time."
        ]
    if len(rows) == 1:
        return []
    fastest = min(row[by] for row in rows.values())
    margin = f"by more than {least:.0%}"
    if 1 - fastest / first[by] >= least:
        margin = f"beyond chance (at best {fastest:.3g}{' ms' if by == 'ms' else 'x'})"
    return [f"No other policy is faster than {first['policy']} {margin}."]


def _colocated(rows: dict[str, Row], layers: int) -> list[str]:
    """How many replicas EPLB places on a GPU that has the same expert, next to other policies."""
    replicas = {name: row["colocated"] for name, row in rows.items() if name not in UNFITTED}
    eplb = max((n for n in replicas if n.startswith("eplb")), key=replicas.__getitem__, default="")
    if not (eplb and replicas[eplb]):
        return []
    others = [f"{name} {n:,}" for name, n in replicas.items() if not name.startswith("eplb")]
    return [
        f"{eplb} places {plural(replicas[eplb], 'replica')}, over {plural(layers, 'layer')}, on a "
        f"GPU that already has the same expert{'; ' if others else ''}{', '.join(others)}."
    ]


def _reach(row: Row, settings: Settings) -> str:
    """How many GPUs and nodes a token reaches, and the bytes that it moves."""
    nodes = f" on {row['nodes_per_token']:.2f} nodes" if settings["nodes"] > 1 else ""
    moved = ""
    if np.isfinite(size := row["moved_bytes_per_token"]):
        moved = f"; dispatch and combine move {size / 1024:,.0f} KiB per token over all layers"
    return (
        f"Under {row['policy']} a token reaches {row['ranks_per_token']:.2f} GPUs per layer"
        f"{nodes}{moved}."
    )


def _optimal_dispatch(rows: dict[str, Row]) -> str:
    ratios = ", ".join(
        f"{name} {row['lp_max_over_mean']:.2f}x ({row['by_window_max_over_mean']:.2f}x)"
        for name, row in rows.items()
    )
    return (
        "With optimal dispatch among replicas (a linear program per window), the busiest GPU would "
        f"have at least these times the mean load (in brackets: with even sharing): {ratios}."
    )


def _advice(tables: Tables, settings: Settings, first: str, saved: float) -> str:
    """The recommended plan and the reason. `saved`: share of the time of the policy `first`."""
    name, same = settings["recommended"], settings["as_fast"]
    if settings["too_few"]:
        return f"-o FILE saves {name}."
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
    tested = known is not None and known.notna().any()
    beyond = f" or beyond chance (p < {ALPHA:g})" if tested else ""
    return (
        f"Recommended: {name}, the simplest (--help lists it first) of those that are no slower "
        f"than the fastest by {least:.0%}{beyond}: {', '.join([name, *same])}."
    )


def _unseen(tables: Tables) -> bool:
    """True if plans are judged on text that they are not fitted on."""
    return (tables["windows"]["part"] == "judged").any()


def _aged(tables: Tables, settings: Settings, policy: str) -> list[str]:
    sentences, unknown = list[str](), list[str]()
    if "judged" in tables:
        sentences += _on_workloads(tables, policy)
        if tables["judged"].query("part == 'judged'")["p"].isna().any():
            unknown.append(
                "how much of that is chance, and of what sets policies apart (it takes "
                f"{FEWEST_TO_JUDGE} documents of each)"
            )
    elif _unseen(tables):
        sentences.append(_on_windows(tables, settings, policy))
        sentences += [settings["fed"]] if settings["fed"] else []
    if not _unseen(tables):
        unknown.append("the balance on text that plans are not fitted on (--judge TRACE)")
    if settings["counts_only"]:
        unknown.append("which GPUs a token reaches (it takes decisions, not counts)")
    return [*sentences, *([f"Unknown: {'; '.join(unknown)}."] if unknown else [])]


def _on_windows(tables: Tables, settings: Settings, policy: str) -> str:
    by_window = tables["windows"]
    by_part = by_window[by_window["policy"] == policy].groupby(["part", "window"])["max_over_mean"]
    mean = by_part.mean().dropna()  # windows without load
    fit, judged = (mean[mean.index.get_level_values("part") == part] for part in ("fit", "judged"))
    row = next(row for row in tables["policies"].to_dict("records") if row["policy"] == policy)
    by_layer = tables["placement"].query("policy == @policy")
    # not all policies look at the load
    return (
        f"{policy} has max/mean {row['fit_max_over_mean']:.3f} on the first "
        f"{100 * settings['fit_share']:.3g}%, which policies may be fitted to, and "
        f"{1 / by_layer['balancedness'].mean():.3f} on the rest; per window of "
        f"{plural(settings['window'], 'token')} {fit.mean():.3f} in the first part, "
        f"{judged.iloc[0]:.3f} just after it, {judged.iloc[-1]:.3f} at the end."
    )


def _on_workloads(tables: Tables, policy: str) -> list[str]:
    """The balance of the plan on the workloads it is fitted on and on the others, with chance."""
    rows = tables["judged"].sort_values("max_over_mean", ascending=False).to_dict("records")
    rows = [row for row in rows if row["policy"] == policy]
    fit, rest = ([row for row in rows if row["part"] == part] for part in ("fit", "judged"))
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
    ratio = f"{row['max_over_mean']:.2f} on {row['workload']}"
    if row["p"] < ALPHA:
        return f"{ratio} (by chance at most {row['most_by_chance']:.2f})"
    # NaN if chance is unknown, as on text that plans are fitted on
    may_be = f" (may be chance, which gives up to {row['most_by_chance']:.2f})"
    return ratio + (may_be if row["p"] >= ALPHA else "")


def _priced(tables: Tables, rows: dict[str, Any], settings: Settings, unseen: bool) -> list[str]:
    """Sentences on prices. `rows`: of `policies`, by name; `unseen`: see `_unseen`."""
    sentences = _eplb(rows, settings, unseen)
    if "rebalancing" in tables:
        sentences += _rebalanced(tables, rows, settings)
    if "traffic" in tables and settings["nodes"] > 1:
        row, even = rows[settings["recommended"]], 1 - 1 / settings["nodes"]
        sentences.append(
            f"Under {row['policy']} {row['inter_node']:.0%} of the tokens that GPUs send go to "
            f"another node ({even:.0%} if they went anywhere alike), {row['intra_node']:.0%} to "
            "another GPU of the node."
        )
    if "sweep" in tables:
        sentences.append(_knee(tables["sweep"], settings))
    return sentences + [
        f"No step of {N:,} tokens in {text}, which is not in the times."
        for text, N in settings["unpriced"].items()
    ]


def _eplb(rows: dict[str, Any], settings: Settings, unseen: bool) -> list[str]:
    """Whether the faster EPLB is worth it, compared with the placement in use."""
    eplbs, first = [rows[name] for name in rows if name.startswith("eplb")], settings["current"]
    if not eplbs:
        return []
    best, error = min(eplbs, key=lambda row: row["ms"]), settings["error"]
    cost, first_cost = (max(row["ms"] - row["even_ms"], 0.0) for row in (best, first))
    less = f"{cost / first_cost - 1:+.0%}; of the step " if first_cost > 0 else "of the step "
    accuracy = f"model error {error:.0%}" if error is not None else "model error unknown"
    change = best["ms"] / first["ms"] - 1
    place = "in use" if settings["placement"] else "in order"
    line = (
        f"EPLB here: imbalance costs {cost:.2g} ms, on top of {best['even_ms']:.3g}, instead of "
        f"{first_cost:.2g} {place} ({less}{change:+.0%}, {accuracy})"
    ).replace("-", "−")
    worth_it = "worth it" if unseen else "worth it on the text that it is fitted on"
    return [f"{line}: {_doubt(best, first, settings) or worth_it}."]


def _doubt(row: Any, first: Any, settings: Settings) -> str:
    """Why a policy is not worth a change of the placement in use; "" if it is."""
    error, change = settings["error"], float(np.log(row["ms"] / first["ms"]))
    if settings["too_few"] or (np.isnan(p := row["current_p"]) and not settings["counts_only"]):
        return "too little text to tell whether it is worth it"
    if p >= ALPHA:
        return "no more than chance: not worth it"
    if error is None:
        return "what it is worth is unknown"
    if abs(change) <= worth(error):
        return "within the error: not worth it"
    return "slower: not worth it" if change > 0 else ""


def _rebalanced(tables: Tables, rows: dict[str, Any], settings: Settings) -> list[str]:
    table, ageing, N = tables["rebalancing"], settings["ageing"], settings["batch_tokens"]
    start, again = table.iloc[0], table.iloc[1:].drop(columns="window").mean(numeric_only=True)
    row, first, error = rows[start["policy"]], settings["current"], settings["error"]
    before = "the placement in use" if settings["placement"] else "experts in order"
    move = f"To rebalance from {before} to {start['policy']}, {_sent(start)}"
    move += " at the bandwidth within a node" if start["move_ms"] > 0 else ""
    if start["move_ms"] > 0 and not _doubt(row, first, settings):
        steps = start["move_ms"] / (first["ms"] - row["ms"])
        move += f", paid back after {plural(math.ceil(steps), 'step')}"
    if unknown := ageing.unknown or ("too little text" if settings["too_few"] else ""):
        often = f"How often it pays to do so again is unknown: {unknown}."
    elif ageing.p >= ALPHA:
        often = "Loads do not drift beyond chance: to rebalance again does not pay."
    elif error is None or np.log1p(ageing.most / row["ms"]) <= error:
        often = (
            f"As it ages, a plan loses up to {ageing.most:.2g} ms of a step, which is within the "
            "error of the times: to rebalance again is not known to pay."
        )
    elif not again["move_ms"] > 0:
        often = "How often it pays to do so again is unknown: the time of a move is."
    else:
        steps, windows = settings["window"] / N, len(table)  # steps of a window
        best = math.sqrt(2 * again["move_ms"] * steps / ageing.lost)
        beyond = f" (the trace has {_round(steps * windows)})" if best > steps * windows else ""
        often = (
            f"From window to window {_sent(again)}, and a plan loses up to {ageing.most:.2g} ms of "
            f"a step as it ages: to rebalance pays every {_round(best)} steps{beyond}; never "
            f"within {_round(again['move_ms'] / ageing.most)}."
        )
    return [f"{move}.", often]


def _sent(row: Any) -> str:
    size = (
        f"{row['moved_gb']:.3g} GB move, {row['moved_gb_of_gpu']:.3g} to the GPU that is sent most"
    )
    return size if np.isnan(row["move_ms"]) else f"{size}, in {row['move_ms']:.3g} ms"


def _round(steps: float) -> str:
    """Two digits, at least 1."""
    return f"{max(1.0, float(f'{steps:.2g}')):,.0f}"


def _knee(sweep: Frame, settings: Settings) -> str:
    """The number of slots from which more are not worth it."""
    least, fastest = worth(settings["error"]), sweep["ms"].min()
    if settings["too_few"] or (sweep["ms_p"].isna().any() and not settings["counts_only"]):
        return "How many slots are worth it is unknown: too little text."
    enough = sweep[(1 - fastest / sweep["ms"] < least) | (sweep["ms_p"] >= ALPHA)]
    first, knee, most = sweep.iloc[0], enough.iloc[0], sweep.iloc[-1]
    text = (
        f"{knee['physical_experts']} slots per layer are the knee of {knee['policy']}: "
        f"{_size(knee)}"
    )
    if knee["physical_experts"] > first["physical_experts"]:
        text += f", instead of {_size(first)} with {first['physical_experts']}"
    if knee["physical_experts"] == most["physical_experts"]:
        return f"{text}. They are the most that were tried."
    beyond = " or beyond chance" if sweep["ms_p"].notna().any() else ""
    return (
        f"{text}. More, up to {most['physical_experts']}, take no less time by {least:.0%}"
        f"{beyond} (at best {fastest:.3g} ms)."
    )


def _size(row: Any) -> str:
    return f"{row['ms']:.3g} ms and {row['memory_gb']:.3g} GB of a GPU"


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
        panels.append(_by_pair(tables["traffic"]))
    if "sweep" in tables:
        panels.append(_by_memory(tables["sweep"]))
    if settings["costs"]:
        panels += cost_panels(tables, settings["costs"], label_of)
    return spec.Chart(
        "Placement of experts",
        "Load of the busiest GPU ÷ mean load of the GPUs, by policy",
        tuple(panels),
        text=SIMULATED + "1 is perfect balance: the time of a layer is that of its busiest GPU.",
        name="placement",
    )


def _by_layer(whole: Frame, policies: list[str], label_of: Labels, title: str) -> spec.Panel:
    """A dot per policy and layer; if there are many layers a heatmap, which still shows ties."""
    wide = whole.pivot(index="policy", columns="router", values="max_over_mean").loc[policies]
    layers = spec.Axis("layer", tuple(label_of[r] for r in wide.columns))
    ratio_PL = wide.to_numpy(float)
    if len(wide.columns) > spec.MOST_LINES:
        heatmap = spec.Heatmap(ratio_PL, spec.amount(BUSIEST, 1, ratio_PL, 1.1, log=True))
        return spec.Panel((heatmap,), layers, spec.Axis("policy", tuple(policies)), title)
    x = np.arange(len(wide.columns), dtype=float)
    n = len(policies)
    dots = [
        spec.Points(x + (i - (n - 1) / 2) * 0.7 / n, ratio_PL[i], name, spec.look(i)[0])
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
        spec.token_axis(first_token),
        spec.log_axis(BUSIEST, mean.to_numpy()),
        "As the plan ages, mean over layers",
    )


def _by_pair(traffic: Frame) -> spec.Panel:
    wide = traffic.pivot(index="gpu_from", columns="gpu_to", values="tokens_per_step")
    sent_GG = wide.to_numpy(float)
    scale = spec.amount("tokens of a step", 0, sent_GG, 1)
    gpus = tuple(map(str, wide.columns))
    title = f"What GPUs send under {traffic['policy'].iloc[0]}, over all layers"
    heatmap = spec.Heatmap(sent_GG, scale)
    return spec.Panel((heatmap,), spec.Axis("to GPU", gpus), spec.Axis("from GPU", gpus), title)


def _by_memory(sweep: Frame) -> spec.Panel:
    x = np.arange(len(sweep), dtype=float)
    marks = (
        spec.Line(x, sweep["even_ms"].to_numpy(float), "even load", "baseline", "dash"),
        spec.Line(x, sweep["ms"].to_numpy(float), str(sweep["policy"].iloc[0]), "c1", "", True),
    )
    of = sweep[["physical_experts", "memory_gb"]].itertuples(index=False)
    memory = spec.Axis("slots per layer", tuple(f"{slots} ({gb:.3g} GB)" for slots, gb in of))
    return spec.Panel(
        marks,
        memory,
        spec.Axis("ms of a step", low=0),
        "Time against the memory of a GPU that experts take",
    )
