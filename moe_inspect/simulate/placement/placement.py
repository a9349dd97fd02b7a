"""`simulate placement`: expert parallelism. Which GPU gets which expert, fitted on the trace's
first part, judged on the rest.

L routers, E experts, P slots, G GPUs, W windows, T tokens, K slots of a decision. Replicas of an
expert share its load evenly.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from moe_inspect.analysis.counting.select import Selection, select
from moe_inspect.errors import MoeInspectError
from moe_inspect.model.sizes import hidden_bytes, text_config
from moe_inspect.simulate.placement.dispatch import least_busiest
from moe_inspect.simulate.placement.policies import POLICIES, Layout, colocated, shares
from moe_inspect.simulate.placement.windows import Windows, counted, decisions, loads_of, windows_of
from moe_inspect.simulate.result import Simulation
from moe_inspect.simulate.shards import check_domains, is_small
from moe_inspect.text import layer_label
from moe_inspect.trace.reader import Trace, open_trace

DISPATCHES = ("even", "lp")
MOST_SLOTS = 2**20  # of a layer
SAMPLE = 8_192  # decisions of a router by which --minimize ranks judges an exchange
CHUNK = 16_384  # tokens at a time in numpy


def simulate_placement(
    trace: Trace | str | Path,
    *,
    gpus: int | None = None,
    nodes: int = 1,
    physical_experts: int | None = None,
    groups: int | None = None,
    policies: Sequence[str] | None = None,
    fit_share: float = 0.5,
    window: int | None = None,
    minimize: Literal["ranks"] | None = None,
    slack: float = 0.0,
    dispatch: Literal["even", "lp"] = "even",
    layers: str | int | Iterable[int] | None = None,
    domains: str | Iterable[str] | None = None,
    phase: str | None = None,
) -> Simulation:
    """What placements of the experts on GPUs come to. `physical_experts`: slots in all, replicas
    included (default: one an expert).
    `groups`: of experts, for hierarchical EPLB (default: the config's). `window`: tokens, for how a
    plan ages. `minimize`: "ranks" lets "ours" trade its lead over EPLB's balance (and `slack` of
    the load more) for GPUs that a token need not reach. `dispatch`: "lp" adds the least load of the
    busiest GPU that any dispatch among the replicas of an expert could reach, beside that of even
    sharing."""
    trace = trace if isinstance(trace, Trace) else open_trace(trace)
    selection = select(trace, layers, domains, phase)
    chosen = list(policies or POLICIES)
    layouts = _layouts(trace, selection, gpus, nodes, physical_experts, groups)
    if unknown := [name for name in chosen if name not in POLICIES]:
        raise MoeInspectError(f"no policy {', '.join(unknown)}: there are {', '.join(POLICIES)}")
    for name, value, fits, rule in (
        ("dispatch", dispatch, dispatch in DISPATCHES, f"one of {', '.join(DISPATCHES)}"),
        ("fit share", fit_share, 0 < fit_share <= 1, "a share of the trace above 0 and at most 1"),
        ("slack", slack, slack >= 0, "a share of a GPU's load from 0 up"),
        ("window", window, window is None or window >= 1, "a number of tokens from 1 up"),
    ):
        if not fits:
            raise MoeInspectError(f"{name} {value}: give {rule}")
    if trace.counts_only and (minimize or window is not None):
        asked = "fewer ranks" if minimize else "windows"
        raise MoeInspectError(
            f"{trace.path} holds counts only, no tokens to tell {asked} by: "
            f"{trace.more_than_counts}"
        )
    check_domains(trace, selection)
    small = is_small(trace, selection.routers)
    if trace.counts_only:
        windows, loads = counted(trace, selection)
    else:
        windows = windows_of(trace, selection, fit_share, window)
        loads = loads_of(trace, selection, windows, small)
    fitted = {r: load_WE[: windows.fit].sum(0) for r, load_WE in loads.items()}
    plans = {
        (r, name): POLICIES[name](loads[r][: windows.fit], layouts[r])
        for r in selection.routers
        for name in chosen
    }
    if minimize and "ours" in chosen and not trace.counts_only:
        _fewer_ranks(trace, selection, windows, layouts, fitted, plans, slack)
    reach = {} if trace.counts_only else _reach(trace, selection, windows, layouts, plans, small)
    tables = _tables(trace, windows, layouts, loads, plans, reach, dispatch)
    best = "ours" if minimize and "ours" in chosen else recommended(tables["policies"])
    tables["plan"] = _plan(
        trace, layouts, {r: plan for (r, name), plan in plans.items() if name == best}, best
    )
    one = next(iter(layouts.values()))
    settings: dict[str, Any] = {
        "gpus": one.gpus,
        "nodes": one.nodes,
        "groups": one.groups,
        "physical_experts": physical_experts,
        "policies": chosen,
        "fit_share": None if trace.counts_only else fit_share,
        "window": None if trace.counts_only else -(-windows.tokens // (len(windows.edge_W) - 1)),
        "minimize": minimize,
        "dispatch": dispatch,
        "recommended": best,
        "layers": model_layers(trace),
        "moe_layers": sorted({r.layer for r in trace.routers}),
        "stacks": sorted({trace.routers[r].stack for r in selection.routers}),
        "counts_only": trace.counts_only,
    }
    from moe_inspect.simulate.placement.text import figure, verdict

    label_of = {r: layer_label(trace.routers, r) for r in range(len(trace.routers))}
    return Simulation(
        "placement",
        tables,
        verdict(tables, settings),
        settings,
        lambda: figure(tables, settings, label_of),
        ("policies",),
    )


def model_layers(trace: Trace) -> int:
    """All blocks of the model, dense ones too; where the config does not say, as many as there are
    up to the last router."""
    known = text_config(trace).get("num_hidden_layers")
    return max(known if isinstance(known, int) else 0, 1 + max(r.layer for r in trace.routers))


def _layouts(
    trace: Trace,
    selection: Selection,
    gpus: int | None,
    nodes: int,
    slots: int | None,
    groups: int | None,
) -> dict[int, Layout]:
    """The layout of each router, checked."""
    sizes = {trace.routers[r].experts for r in selection.routers}
    if slots is not None and slots < max(sizes):
        raise MoeInspectError(
            f"{slots} physical experts for {max(sizes)} experts: each needs a slot, give at "
            f"least {max(sizes)}"
        )
    if slots is not None and slots > MOST_SLOTS:
        raise MoeInspectError(f"{slots:,} physical experts: give {MOST_SLOTS:,} at most")
    held = {slots} if slots is not None else sizes
    if gpus is None:  # two slots a GPU at least, or there would be nothing to choose
        most = max(1, min(8, min(held) // 2))
        gpus = next(
            (g for g in range(most, 0, -1) if not any(n % g for n in held) and g % nodes == 0), 0
        )
        if not gpus:
            raise MoeInspectError(
                f"no number of GPUs up to {most} divides {_listed(held)} slots and among {nodes} "
                "nodes: give gpus"
            )
    if gpus < 1 or nodes < 1 or gpus % nodes:
        raise MoeInspectError(
            f"{gpus} GPUs on {nodes} nodes: give each node the same number of GPUs"
        )
    if uneven := sorted(n for n in held if n % gpus):
        raise MoeInspectError(
            f"{uneven[0]} physical experts on {gpus} GPUs: each GPU holds the same number, give "
            f"a multiple of {gpus}"
        )
    if groups is None:
        known = text_config(trace).get("n_group")
        groups = (
            known
            if isinstance(known, int) and known > 0 and not any(E % known for E in sizes)
            else 1
        )
    if groups < 1 or any(E % groups for E in sizes):
        raise MoeInspectError(
            f"{groups} groups of {_listed(sizes)} experts: groups are of the same size, give a "
            "divisor"
        )
    return {
        r: Layout(slots or trace.routers[r].experts, gpus, nodes, groups) for r in selection.routers
    }


def _listed(values: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(values)))


def reached_numpy(ids_KT: np.ndarray, share_EG: np.ndarray) -> float:
    """The sum over decisions of the GPUs each is expected to reach: Σ_t Σ_g 1 − Π_k (1 − share).
    The twin of what `reach.counter` gives."""
    miss_EG = np.vstack(
        [1 - share_EG, np.ones(share_EG.shape[1])]
    )  # the last row: −1, a slot that routed nowhere
    total = 0.0
    for start in range(0, ids_KT.shape[1], CHUNK):
        total += float((1 - miss_EG[ids_KT[:, start : start + CHUNK]].prod(0)).sum())
    return total


def _reach(
    trace: Trace,
    selection: Selection,
    windows: Windows,
    layouts: dict[int, Layout],
    plans: dict[tuple[int, str], np.ndarray],
    small: bool,
) -> dict[tuple[int, str], tuple[float, float]]:
    """GPUs and nodes that a token of the judged part reaches, its own included, by (router,
    policy)."""
    share = {
        key: [
            shares(plan, trace.routers[key[0]].experts, n)
            for n in (layouts[key[0]].gpus, layouts[key[0]].nodes)
        ]
        for key, plan in plans.items()
    }
    if small:
        total = reached_numpy
    else:
        from moe_inspect.simulate.placement.ranks_reached import counter

        counters = {id(s): counter(s) for pair in share.values() for s in pair}

        def total(ids_KT: np.ndarray, share_EG: np.ndarray) -> float:
            return counters[id(share_EG)](ids_KT)

    sums, tokens = {key: np.zeros(2) for key in plans}, dict.fromkeys(selection.routers, 0)
    for r, ids_KT, _ in decisions(trace, selection, windows, since=windows.judged.start):
        tokens[r] += ids_KT.shape[1]
        routed = int((ids_KT >= 0).any(0).sum())
        for key in [key for key in plans if key[0] == r]:
            gpu_EG, node_EN = share[key]
            by_node = total(ids_KT, node_EN) if layouts[r].nodes > 1 else routed
            sums[key] += (total(ids_KT, gpu_EG), by_node)
    return {
        key: (s[0] / tokens[key[0]], s[1] / tokens[key[0]])
        for key, s in sums.items()
        if tokens[key[0]]
    }


def _fewer_ranks(
    trace: Trace,
    selection: Selection,
    windows: Windows,
    layouts: dict[int, Layout],
    fitted: dict[int, np.ndarray],
    plans: dict[tuple[int, str], np.ndarray],
    slack: float,
) -> None:
    """Replaces the plans of "ours" by ones that reach fewer GPUs, on a sample of the decisions they
    were fitted on. No GPU is loaded more than the best EPLB's heaviest × (1 + slack)."""
    from moe_inspect.simulate.placement.ranks_reached import fewer_reached

    step = max(1, int(windows.tokens * windows.edge_W[windows.fit]) // SAMPLE)
    samples: dict[int, list[np.ndarray]] = {r: [] for r in selection.routers}
    for r, ids_KT, window_T in decisions(trace, selection, windows):
        samples[r].append(ids_KT[:, window_T < windows.fit][:, ::step])
    for r, parts in samples.items():
        ids_KM, layout, load_E = (
            np.ascontiguousarray(np.concatenate(parts, axis=1)),
            layouts[r],
            fitted[r],
        )
        best = min(
            _gpu_load(load_E, POLICIES[name](load_E, layout), layout.gpus).max()
            for name in ("eplb", "eplb-global")
        )
        plans[r, "ours"] = fewer_reached(
            plans[r, "ours"], layout.gpus, load_E, ids_KM, best * (1 + slack)
        )


def _gpu_load(load_E: np.ndarray, expert_P: np.ndarray, gpus: int) -> np.ndarray:
    """float64 [G]"""
    return load_E @ shares(expert_P, len(load_E), gpus)


def _ratio(load_G: np.ndarray) -> float:
    return float(load_G.max() / load_G.mean()) if load_G.any() else np.nan


def _tables(
    trace: Trace,
    windows: Windows,
    layouts: dict[int, Layout],
    loads: dict[int, np.ndarray],
    plans: dict[tuple[int, str], np.ndarray],
    reach: dict[tuple[int, str], tuple[float, float]],
    dispatch: str,
) -> dict[str, Any]:
    size = hidden_bytes(trace)
    judged, rows, window_rows = windows.judged, [], []
    first_W = np.round(windows.edge_W * windows.tokens).astype(np.int64)
    for (r, name), plan in plans.items():
        layout, load_WE = layouts[r], loads[r]
        share_EG, where = (
            shares(plan, trace.routers[r].experts, layout.gpus),
            {"layer": trace.routers[r].layer, "router": r},
        )
        even_W, mean_W = (load_WE @ share_EG).max(1), load_WE.sum(1) / layout.gpus
        by_window = {"by_window_max_over_mean": _over(even_W[judged], mean_W[judged])}
        lp_W = least_busiest(load_WE, share_EG) if dispatch == "lp" else None
        if lp_W is not None:
            by_window["lp_max_over_mean"] = _over(lp_W[judged], mean_W[judged])
        load_G = load_WE[judged].sum(0) @ share_EG
        ratio = _ratio(load_G)
        ranks, on_nodes = reach.get((r, name), (np.nan, np.nan))
        sent = 2 * ranks * (1 - 1 / layout.gpus)
        rows.append(
            where
            | {
                "policy": name,
                "max_over_mean": ratio,
                "balancedness": 1 / ratio,
                "slowdown": ratio,
                "ranks_per_token": ranks,
            }
            | {
                "nodes_per_token": on_nodes,
                "activations_per_token": sent,
                "moved_bytes_per_token": sent * size if size else np.nan,
            }
            | {
                "fit_max_over_mean": _ratio(load_WE[: windows.fit].sum(0) @ share_EG),
                "colocated": colocated(plan, layout.gpus),
            }
            | {"max_load": load_G.max(), "mean_load": load_G.mean()}
            | by_window
        )
        for w, load_E in enumerate(load_WE):
            ratio = _ratio(load_E @ share_EG)
            window_rows.append(
                {
                    "window": w,
                    "first_token": first_W[w],
                    "tokens": first_W[w + 1] - first_W[w],
                    "part": "fit" if w < windows.fit else "judged",
                }
                | where
                | {"policy": name, "max_over_mean": ratio, "balancedness": 1 / ratio}
                | (
                    {}
                    if lp_W is None
                    else {"lp_max_over_mean": _over(lp_W[w : w + 1], mean_W[w : w + 1])}
                )
            )
    table = pd.DataFrame(rows)
    return {"placement": table, "policies": _by_policy(table), "windows": pd.DataFrame(window_rows)}


def _over(most_W: np.ndarray, mean_W: np.ndarray) -> float:
    """Load of the busiest GPU over the mean, of windows one after the other: in each, all wait for
    its busiest GPU. NaN without a load."""
    return float(most_W.sum() / mean_W.sum()) if mean_W.any() else np.nan


def _plan(
    trace: Trace, layouts: dict[int, Layout], plans: dict[int, np.ndarray], policy: str
) -> Any:
    """A row per router and slot."""
    rows = []
    for r, plan in plans.items():
        layout, replicas_E = layouts[r], np.bincount(plan, minlength=trace.routers[r].experts)
        where = {"layer": trace.routers[r].layer, "router": r, "policy": policy}
        for p, e in enumerate(plan.tolist()):
            gpu = p * layout.gpus // layout.slots
            node = gpu * layout.nodes // layout.gpus
            rows.append(
                where
                | {"slot": p, "gpu": gpu, "node": node, "expert": e, "replicas": replicas_E[e]}
            )
    return pd.DataFrame(rows)


def recommended(by_policy: Any) -> str:
    """The policy with the least slowdown on the judged part; of equals ours, then the first."""
    rows = by_policy[["policy", "slowdown"]].to_dict("records")
    return min(rows, key=lambda row: (round(row["slowdown"], 9), row["policy"] != "ours"))["policy"]


def _mean(mine: Any, column: str) -> float:
    """Of a ratio to the mean load, over layers that weigh as their load."""
    return float((mine[column] * mine["mean_load"]).sum() / mine["mean_load"].sum())


def _by_policy(table: Any) -> Any:
    """One row a policy. balancedness_sglang: mean over layers of mean ÷ max; balancedness_vllm: Σ
    mean ÷ Σ max."""
    rows = []
    for name, mine in table.dropna(subset=["max_over_mean"]).groupby("policy", sort=False):
        vllm = mine["mean_load"].sum() / mine["max_load"].sum()
        rows.append(
            {
                "policy": name,
                "balancedness_sglang": mine["balancedness"].mean(),
                "balancedness_vllm": vllm,
                "slowdown": 1 / vllm,
            }
            | {
                "worst_max_over_mean": mine["max_over_mean"].max(),
                "fit_max_over_mean": mine["fit_max_over_mean"].mean(),
            }
            | {
                "ranks_per_token": mine["ranks_per_token"].mean(),
                "nodes_per_token": mine["nodes_per_token"].mean(),
            }
            | {
                "moved_bytes_per_token": mine["moved_bytes_per_token"].sum(min_count=1),
                "colocated": mine["colocated"].sum(),
            }
            | {
                f"{how}_slowdown": _mean(mine, f"{how}_max_over_mean")
                for how in ("by_window", "lp")
                if f"{how}_max_over_mean" in mine
            }
        )
    if not rows:
        raise MoeInspectError(
            "no router made an assignment in the part that is judged, what --fit-share leaves: "
            "there is no load to place"
        )
    return pd.DataFrame(rows)
