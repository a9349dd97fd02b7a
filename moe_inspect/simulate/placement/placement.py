"""`simulate placement`: expert parallelism. Which GPU should hold which expert, fitted on the
trace's first part and judged on the rest, or on workloads and judged on others.

Replicas of an expert share its load evenly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from moe_inspect.analysis.counting.engine import count_trace
from moe_inspect.analysis.counting.select import Selection, select
from moe_inspect.errors import MoeInspectError
from moe_inspect.progress import tracked
from moe_inspect.simulate.placement import policies as policy
from moe_inspect.simulate.placement import windows as fitting
from moe_inspect.simulate.placement.forecast import local_search
from moe_inspect.simulate.placement.plan import placement_of, plan_table
from moe_inspect.simulate.placement.policies import CURRENT, Layout, layouts_of
from moe_inspect.simulate.placement.pricing import PRICED, PlanTimes, in_use, pricing_of, traffic_of
from moe_inspect.simulate.placement.tables import alike, fastest, tables_of, worth
from moe_inspect.simulate.placement.text import chart, verdict
from moe_inspect.simulate.placement.workloads import Workloads, workload, workloads_of
from moe_inspect.simulate.result import Settings, Simulation, repeatable, simulation, too_few
from moe_inspect.simulate.step import imbalance_tables
from moe_inspect.trace.reader import Trace, open_trace

DISPATCHES = ("even", "lp")

FIT_SHARE = 0.5  # of a trace alone

# from the load of each expert, [E], or that of each window, [W, E], to the expert of each slot;
# with True, windows are workloads
Policy = Callable[..., np.ndarray]


def _of_sum(place: Callable[[np.ndarray, Layout], np.ndarray]) -> Policy:
    """A policy that looks at the sum over the windows."""
    return lambda load, layout, apart=False: place(np.atleast_2d(load).sum(0), layout)


BY_SUM = (policy.contiguous, policy.round_robin, policy.greedy, policy.eplb, policy.eplb_global)
POLICIES = {place.__name__.replace("_", "-"): _of_sum(place) for place in BY_SUM}
# what engines refit as they run
ONLINE = {name: POLICIES[name] for name in ("eplb", "eplb-global", "greedy")}
POLICIES["local-search"] = lambda load, *how: local_search(np.atleast_2d(load), *how)


@repeatable
def simulate_placement(
    trace: Trace | str | Path,
    *others: Trace | str | Path,
    judge: Sequence[Trace | str | Path] | None = None,
    fit_domains: str | Iterable[str] | None = None,
    fit_phase: str | None = None,
    fit_weights: Sequence[float] | None = None,
    gpus: int | None = None,
    nodes: int = 1,
    physical_experts: int | None = None,
    groups: int | None = None,
    policies: Sequence[str] | None = None,
    placement: str | Path | None = None,
    fit_share: float | None = None,
    dispatch: Literal["even", "lp"] = "even",
    hardware: str | None = None,
    engine: str | None = None,
    dtype: str | None = None,
    kernel: str | None = None,
    latency: str | Path | None = None,
    batch_tokens: Sequence[int] | None = None,
    sweep: Sequence[int] | None = None,
    layers: str | int | Iterable[int | str] | None = None,
    domains: str | Iterable[str] | None = None,
    phase: str | None = None,
) -> Simulation:
    """What placements of the experts on GPUs cost, by policy.

    `others`: traces of the same model, for one plan that is fitted on all. `judge`: traces that
    plans are judged on. `fit_domains`, `fit_phase`: plans are fitted on these domains (each for
    itself, as a trace), or this phase, and judged on the other domains or phases. `fit_weights`:
    weights of the traces or domains fitted on; default equal. `gpus`: default up to 8.
    `physical_experts`: slots of a layer, replicas included; default one per expert. `groups`: of
    experts, for hierarchical EPLB; default the model config's. `policies`: names of POLICIES;
    default all. `placement`: the plan in use, a file that an engine reads, as the policy "current";
    default contiguous. `fit_share`: of a trace alone, plans are fitted on this first share, above 0
    to 1, and judged on the rest; default 0.5. `dispatch`: "lp" adds the least load of the busiest
    GPU that any dispatch among replicas could reach. `hardware`, `engine`, `dtype`, `kernel`: whose
    measured times steps are priced with, of those that the constants have; the policies are then
    compared by time. `latency`: a file of constants, or a csv of `LatencyModel.fit`; by default the
    constants that are part of moe-inspect. `batch_tokens`: numbers of tokens of a step, over all
    GPUs, by the largest of which policies are compared; default 64, 512 and 4096. `sweep`: numbers
    of slots, of which each is priced. `layers`, `domains`, `phase`: what is selected.

    Tables: placement (a row per router and policy), policies, windows, plan (the recommended
    policy's), with workloads judged (a row per policy and workload), where priced steps (a row per
    policy and tokens of a step), imbalance (of the placement in use on all that is selected of the
    first trace, a row per phase, domain and tokens), imbalance_layers (a row per layer too),
    rebalancing (a row per change of the plan) and traffic (a row per pair of GPUs), and where asked
    for sweep (a row per number of slots). Times are in ms, of the mean step; `cost` is the time ÷
    that of an even load − 1.
    MoeInspectError for settings out of range, numbers that do not divide, and traces of other
    routers."""
    trace = open_trace(trace)
    traces = [trace, *map(open_trace, (*others, *(judge or ())))]
    every = [select(each, layers, domains, phase) for each in traces]
    selection, apart = every[0], bool(len(traces) > 1 or fit_domains or fit_phase)
    names = list(policies or POLICIES)
    current = {} if placement is None else placement_of(placement, trace, selection)
    for expert_P in current.values():
        physical_experts = physical_experts or len(expert_P)
        if len(expert_P) != physical_experts:
            raise MoeInspectError(
                f"{placement} has {len(expert_P)} slots per layer: give --physical-experts "
                f"{len(expert_P)}, or none"
            )
    layouts = layouts_of(trace, selection, gpus, nodes, physical_experts, groups)
    unknown = [name for name in names if name not in POLICIES]
    parts = sum(map(bool, (others, fit_domains, fit_phase)))
    for is_wrong, said in (
        (unknown, f"no policy {', '.join(unknown)}: there are {', '.join(POLICIES)}"),
        (dispatch not in DISPATCHES, f"dispatch {dispatch}: give one of {', '.join(DISPATCHES)}"),
        (
            fit_share is not None and not 0 < fit_share <= 1,
            f"fit share {fit_share}: give a share of the trace above 0 and at most 1",
        ),
        (
            apart and fit_share is not None,
            "--fit-share is for one trace that is judged on its own later part",
        ),
        (
            parts + bool(fit_phase and phase) > 1,
            "plans are fitted on several traces, domains, or a phase: give one of these",
        ),
        (fit_weights and not apart, "fit_weights are for several traces or domains fitted on"),
    ):
        if is_wrong:
            raise MoeInspectError(said)
    named = {"gpu": hardware, "engine": engine, "dtype": dtype, "kernel": kernel}
    pricing = pricing_of(named, latency, batch_tokens, sweep)
    among = None
    if apart:
        among = workloads_of(traces, every, 1 + len(others), fit_domains, fit_phase, fit_weights)
    selection, windows, loads = _seen(trace, selection, among, fit_share)
    empty = fitting.PlacementPlans(trace, selection, windows, layouts, loads, {})
    place = partial(_placed, empty, among)
    plans = place(layouts, names, current)
    tables = tables_of(plans, fitting.ranks_reached(plans.judging), dispatch == "lp")
    if among:
        tables["judged"] = among.table(plans, tables["windows"])
        ratio = tables["policies"].set_index("policy")["max_over_mean"]
        tables["policies"]["slower_p"] = among.slower_p(plans, ratio)
    priced: Settings = dict.fromkeys((*PRICED, "costs"))
    times = dict[str, PlanTimes]()
    layout, alone = next(iter(layouts.values())), not (apart or trace.counts_only)
    if pricing:
        judged = among.judged or among.fitted if among else [workload(trace, selection)]
        priced, times = pricing.added(tables, plans, judged, ONLINE)
        strongest = "local-search" if "local-search" in names else names[-1]
        sizes = {
            P: layouts_of(trace, selection, gpus, nodes, P, groups) for P in sorted(sweep or ())
        }
        slots = ((P, place(of, [strongest], {})) for P, of in sizes.items())
        tables |= pricing.swept(slots, judged, priced["batch_tokens"])
        costs, priced["costs"] = imbalance_tables(
            trace, every[0], pricing.prices, in_use(plans), layout, pricing.sizes
        )
        tables |= costs
    best, same = fastest(tables["policies"]), list[str]()
    if (tables["windows"]["part"] == "judged").any():
        best, *same = alike(tables["policies"], (CURRENT, *POLICIES), worth(priced["error"]))
    tables["plan"] = plan_table(plans, best)
    if pricing and plans.judging:  # tokens are told apart
        sent = traffic_of(times[best].sent_GG, layout.nodes)
        tables["traffic"] = sent.assign(policy=best)[["policy", *sent]]
    settings: Settings = {
        "gpus": layout.gpus,
        "nodes": layout.nodes,
        "groups": layout.groups,
        "physical_experts": physical_experts,
        "policies": [*([CURRENT] if current else []), *names],
        "placement": str(placement) if placement is not None else None,
        "fitted_on": [one.name for one in among.fitted] if among else None,
        "fit_weights": fit_weights,
        "fit_share": (fit_share or FIT_SHARE) if alone else None,
        "window": -(-windows.tokens // (len(windows.edge_W) - 1)) if alone else None,
        "dispatch": dispatch,
        **priced,
        "recommended": best,
        "as_fast": same,
        "layers": trace.blocks,
        "moe_layers": sorted({r.layer for r in trace.routers}),
        "stacks": sorted({trace.routers[r].stack for r in selection.routers}),
        "counts_only": not plans.judging,
        "fed": trace.fed_by_length if alone else "",
    }
    few = among.too_few if among else too_few(trace, selection)
    shown = ("policies", "steps") if pricing else ("policies",)
    return simulation(trace, few, tables, settings, verdict, chart, shown)


def _placed(
    empty: fitting.PlacementPlans,
    among: Workloads | None,
    layouts: dict[int, Layout],
    policies: Sequence[str],
    current: dict[int, np.ndarray],
) -> fitting.PlacementPlans:
    """The plan in use, by router, where one is given, and those of these policies."""
    in_use = {(r, CURRENT): expert_P for r, expert_P in current.items()}
    plans = replace(empty, layouts=layouts, of=in_use)
    several = among is not None and len(among.fitted) > 1
    for r in tracked(plans.selection.routers, "placing", "routers"):
        for name in policies:
            load_WE = plans.loads[r][: plans.windows.fit]
            plans.of[r, name] = POLICIES[name](load_WE, layouts[r], several)
    if among is None:
        return plans if plans.trace.counts_only else replace(plans, judging=[plans])
    windows, loads = among.windows(judged=True)
    plans = replace(plans, windows=windows, loads=loads)
    return replace(plans, judging=[*among.judging(plans)])


def _seen(
    trace: Trace, selection: Selection, among: Workloads | None, fit_share: float | None
) -> tuple[Selection, fitting.FitWindows, dict[int, np.ndarray]]:
    """What plans are fitted to: windows of the trace, or of its only workload; one where it holds
    counts, in no order; or several workloads, a window each."""
    if among and (len(among.fitted) > 1 or trace.counts_only):
        return selection, *among.windows(judged=False)
    if trace.counts_only:
        counts, whole = count_trace(trace, selection), np.array([0.0, 1.0])
        loads = {r: counts.load_E(r)[None] for r in selection.routers}
        return selection, fitting.FitWindows(whole, 1, trace.n_tokens), loads
    if among:
        selection, fit_share = among.fitted[0].selection, 1.0
    windows = fitting.fit_windows_of(trace, selection, fit_share or FIT_SHARE)
    return selection, windows, fitting.loads_of(trace, selection, windows)
