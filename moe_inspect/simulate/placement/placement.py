"""`simulate placement`: expert parallelism. Which GPU should hold which expert, fitted on the
trace's first part and judged on the rest, or fitted on workloads and judged on others.

Replicas of an expert share its load evenly. W windows, E experts, P slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from moe_inspect.analysis.counting.engine import count_trace
from moe_inspect.analysis.counting.select import Selection, select
from moe_inspect.errors import MoeInspectError
from moe_inspect.progress import tracked
from moe_inspect.simulate.placement import windows as fitting
from moe_inspect.simulate.placement.plan import placement_of, plan_table
from moe_inspect.simulate.placement.policies import CURRENT, POLICIES, Layout, layouts_of, policy
from moe_inspect.simulate.placement.pricing import (
    PRICED,
    PlanTimes,
    Pricing,
    pricing_of,
    traffic_of,
)
from moe_inspect.simulate.placement.search import local_search
from moe_inspect.simulate.placement.tables import alike, fastest, tables_of, worth
from moe_inspect.simulate.placement.text import chart, verdict
from moe_inspect.simulate.placement.windows import PlacementPlans
from moe_inspect.simulate.placement.workloads import Workloads, workload, workloads_of
from moe_inspect.simulate.price import KernelName
from moe_inspect.simulate.result import Settings, Simulation, repeatable, simulation, too_few
from moe_inspect.simulate.sampling import Plan
from moe_inspect.trace.reader import Trace, open_trace

DISPATCHES = ("even", "lp")
FIT_SHARE = 0.5  # of the only trace

policy(by_window=True)(local_search)
# policies that engines refit as they run
ONLINE = {name: POLICIES[name] for name in ("eplb", "eplb-global", "greedy")}


@dataclass(frozen=True)
class FitOptions:
    """The text that plans are fitted on: the first `traces` traces, domains or a phase of the only
    trace, with weights; or the first share of it."""

    traces: int
    domains: str | Iterable[str] | None
    phase: str | None
    weights: Sequence[float] | None
    share: float | None

    def workloads(
        self, traces: Sequence[Trace], selections: Sequence[Selection]
    ) -> Workloads | None:
        """The workloads that plans are fitted and judged on; None for the first part and the rest
        of the only trace."""
        parts = [self.traces > 1, self.domains, self.phase]
        alone, share = len(traces) == 1 and not any(parts), self.share
        parts.append(self.phase and selections[0].phase)
        for is_wrong, message in (
            (
                share is not None and not 0 < share <= 1,
                f"fit share {share}: give a share of the trace above 0 and at most 1",
            ),
            (
                share is not None and not alone,
                "--fit-share is for one trace that is judged on its own later part",
            ),
            (
                sum(map(bool, parts)) > 1,
                "plans are fitted on several traces, domains, or a phase: give one of these",
            ),
            (self.weights and alone, "fit_weights are for several traces or domains fitted on"),
        ):
            if is_wrong:
                raise MoeInspectError(message)
        fitted = self.traces, self.domains, self.phase, self.weights
        return None if alone else workloads_of(traces, selections, *fitted)


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
    """Compare placements of the experts on GPUs, by policy.

    `others`: more traces of the same model, for one plan that is fitted on all. `judge`: traces
    that plans are judged on. `fit_domains`, `fit_phase`: plans are fitted on these domains (each
    counts as a trace) or this phase, and judged on the other domains or phases. `fit_weights`:
    weights of the traces or domains fitted on; default equal. `gpus`: default up to 8.
    `physical_experts`: slots per layer, replicas included; default one per expert. `groups`: groups
    of experts, for hierarchical EPLB; default as in the model's config. `policies`: names of
    POLICIES; default all. `placement`: the plan in use, a file that an engine reads, as the policy
    "current"; default contiguous. `fit_share`: if there is only one trace, plans are fitted on this
    first share of it, above 0 to 1, and judged on the rest; default 0.5. `dispatch`: "lp" adds the
    smallest load of the busiest GPU that any dispatch among replicas could reach. `hardware`,
    `engine`, `dtype`, `kernel`: the kernel whose measured times steps are priced with; policies are
    then compared by time. `latency`: a file of constants, or a csv for `LatencyModel.fit`; default
    the constants that are part of moe-inspect. `batch_tokens`: tokens per step, over all GPUs;
    policies are compared by the largest; default 64, 512 and 4096. `sweep`: numbers of slots to
    price. `layers`, `domains`, `phase`: the selected part of each trace.

    Tables: placement (a row per router and policy), policies, windows, plan (of the recommended
    policy); with workloads judged (a row per policy and workload); with prices steps (a row per
    policy and tokens per step), imbalance (the placement in use on the selected part of the first
    trace, a row per phase, domain and tokens), imbalance_layers (a row per layer too), rebalancing
    (a row per change of the plan), traffic (a row per pair of GPUs), and with `sweep` sweep (a row
    per number of slots). Times are in ms, of the mean step; `cost` is the time ÷ the time of an
    even load − 1.
    MoeInspectError for settings out of range, numbers that do not divide, and traces of other
    routers."""
    traces = [open_trace(each) for each in (trace, *others, *(judge or ()))]
    selections = [select(each, layers, domains, phase) for each in traces]
    named = KernelName(hardware=hardware, engine=engine, dtype=dtype, kernel=kernel)
    return _simulated(
        traces,
        selections,
        FitOptions(1 + len(others), fit_domains, fit_phase, fit_weights, fit_share),
        partial(layouts_of, traces[0], selections[0], gpus, nodes, groups),
        physical_experts,
        placement,
        list(policies or POLICIES),
        dispatch,
        pricing_of(named, latency, batch_tokens, sweep),
    )


def _simulated(
    traces: list[Trace],
    selections: list[Selection],
    fit: FitOptions,
    layouts: Callable[[int | None], dict[int, Layout]],
    slots: int | None,
    plan_file: str | Path | None,
    names: list[str],
    dispatch: str,
    pricing: Pricing | None,
) -> Simulation:
    """The simulation of the policies `names`. `layouts`: from slots per layer to the layout of each
    router; `plan_file`: the plan in use."""
    trace, selection = traces[0], selections[0]
    current = {} if plan_file is None else placement_of(plan_file, trace, selection)
    if (used := next(map(len, current.values()), slots)) != (slots or used):
        raise MoeInspectError(
            f"{plan_file} has {used} slots per layer: give --physical-experts {used}, or none"
        )
    layout_of = layouts(used)
    layout = next(iter(layout_of.values()))
    if unknown := [name for name in names if name not in POLICIES]:
        raise MoeInspectError(f"no policy {', '.join(unknown)}: there are {', '.join(POLICIES)}")
    if dispatch not in DISPATCHES:
        raise MoeInspectError(f"dispatch {dispatch}: give one of {', '.join(DISPATCHES)}")
    workloads = fit.workloads(traces, selections)
    place = partial(_placed, _loads(trace, selection, workloads, fit.share), workloads)
    plans = place(layout_of, names, current)
    tables = tables_of(plans, fitting.ranks_reached(plans.judging), dispatch == "lp")
    if workloads:
        tables["judged"] = workloads.table(plans, tables["windows"])
        ratio = tables["policies"].set_index("policy")["max_over_mean"]
        tables["policies"]["slower_p"] = workloads.slower_p(plans, ratio)
    priced: Settings = dict.fromkeys(PRICED)
    times = dict[str, PlanTimes]()
    if pricing:
        judged = (workloads.judged or workloads.fitted) if workloads else None
        judged = judged or [workload(trace, selection)]
        strongest = "local-search" if "local-search" in names else names[-1]
        sweep = {size: layouts(size) for size in pricing.sweep}
        swept = ((size, place(each, [strongest], {})) for size, each in sweep.items())
        priced, times = pricing.added(tables, plans, judged, ONLINE, swept, selection)
    best, as_fast = _recommended(tables, priced["error"])
    tables["plan"] = plan_table(plans, best)
    if pricing and plans.judging:  # there are decisions
        tables["traffic"] = traffic_of(times[best].sent_GG, layout.nodes, best)
    in_order = not (workloads or trace.counts_only)
    windows = plans.windows
    settings: Settings = {
        "gpus": layout.gpus,
        "nodes": layout.nodes,
        "groups": layout.groups,
        "physical_experts": used,
        "policies": [*([CURRENT] if current else []), *names],
        "placement": str(plan_file) if plan_file is not None else None,
        "fitted_on": [each.name for each in workloads.fitted] if workloads else None,
        "fit_weights": fit.weights,
        "fit_share": (fit.share or FIT_SHARE) if in_order else None,
        "window": -(-windows.tokens // (len(windows.edge_W) - 1)) if in_order else None,
        "dispatch": dispatch,
        **priced,
        "recommended": best,
        "as_fast": as_fast,
        "layers": trace.blocks,
        "moe_layers": sorted({router.layer for router in trace.routers}),
        "stacks": sorted({trace.routers[r].stack for r in selection.routers}),
        "counts_only": not plans.judging,
        "fed": trace.fed_by_length if in_order else "",
    }
    few = workloads.too_few if workloads else too_few(trace, selection)
    shown = ("policies", "steps") if pricing else ("policies",)
    return simulation(trace, few, tables, settings, verdict, chart, shown)


def _loads(
    trace: Trace, selection: Selection, workloads: Workloads | None, fit_share: float | None
) -> PlacementPlans:
    """The loads that plans are fitted on, as yet without plans. A window is a part of the trace or
    of its only workload; all of a trace that holds counts, which have no order; or a workload, if
    there are several."""
    if workloads and (len(workloads.fitted) > 1 or trace.counts_only):
        windows, loads = workloads.windows(judged=False)
    elif trace.counts_only:
        counts, edge_W = count_trace(trace, selection), np.array([0.0, 1.0])
        windows = fitting.FitWindows(edge_W, 1, trace.n_tokens)
        loads = {r: counts.load_E(r)[None] for r in selection.routers}
    else:
        if workloads:
            selection, fit_share = workloads.fitted[0].selection, 1.0
        windows = fitting.fit_windows_of(trace, selection, fit_share or FIT_SHARE)
        loads = fitting.loads_of(trace, selection, windows)
    return PlacementPlans(trace, selection, windows, {}, loads, {})


def _placed(
    loads: PlacementPlans,
    workloads: Workloads | None,
    layouts: dict[int, Layout],
    policies: Sequence[str],
    current: Plan,
) -> PlacementPlans:
    """The plans of these policies, and the plan in use if there is one, on the judged part."""
    placed = {(r, CURRENT): expert_P for r, expert_P in current.items()}
    plans = replace(loads, layouts=layouts, of=placed)
    several = workloads is not None and len(workloads.fitted) > 1
    for r in tracked(plans.selection.routers, "placing", "routers"):
        for name in policies:
            load_WE = plans.loads[r][: plans.windows.fit]
            plans.of[r, name] = POLICIES[name](load_WE, layouts[r], several)
    if workloads is None:
        return plans if plans.trace.counts_only else replace(plans, judging=[plans])
    windows, judged_loads = workloads.windows(judged=True)
    plans = replace(plans, windows=windows, loads=judged_loads)
    return replace(plans, judging=[*workloads.judging(plans)])


def _recommended(tables: Mapping[str, pd.DataFrame], error: float | None) -> tuple[str, list[str]]:
    """The policy to recommend, and the others that are no slower. Of plans that are judged on what
    they are fitted to, the fastest."""
    if not (tables["windows"]["part"] == "judged").any():
        return fastest(tables["policies"]), []
    best, *as_fast = alike(tables["policies"], (CURRENT, *POLICIES), worth(error))
    return best, as_fast
