"""`simulate placement`: expert parallelism. Which GPU should hold which expert, fitted on the
trace's first part and judged on the rest.

Replicas of an expert share its load evenly.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from moe_inspect.analysis.counting.select import select
from moe_inspect.errors import MoeInspectError
from moe_inspect.progress import phase as begun
from moe_inspect.simulate.placement.layouts import Plans, layouts_of
from moe_inspect.simulate.placement.policies.policies import FORMER_NAMES, POLICIES
from moe_inspect.simulate.placement.ranks_reached import ranks_reached, reach_fewer
from moe_inspect.simulate.placement.tables import plan_table, recommended, tables_of
from moe_inspect.simulate.placement.text import chart, verdict
from moe_inspect.simulate.placement.windows import fit_windows_of, loads_of, loads_of_counts
from moe_inspect.simulate.result import Simulation, repeatable
from moe_inspect.simulate.shards import check_domains
from moe_inspect.text import layer_label
from moe_inspect.trace.reader import Trace, open_trace

DISPATCHES = ("even", "lp")


@repeatable
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
    layers: str | int | Iterable[int | str] | None = None,
    domains: str | Iterable[str] | None = None,
    phase: str | None = None,
) -> Simulation:
    """What placements of the experts on GPUs cost, by policy.

    `gpus`: default up to 8. `physical_experts`: slots of a layer, replicas included; default one
    per expert. `groups`: of experts, for hierarchical EPLB; default the model config's. `policies`:
    names of POLICIES; default all. `fit_share`: plans are fitted on this first share of the trace,
    above 0 to 1, and judged on the rest. `window`: tokens of a window, for how a plan ages; default
    16 windows. `minimize`: "ranks" lets local-search trade its lead over EPLB's balance (and
    `slack`, a share of a GPU's load, beyond that) for fewer GPUs reached per token. `dispatch`:
    "lp" adds the least load of the busiest GPU that any dispatch among replicas could reach.
    `layers`, `domains`, `phase`: what is selected.

    Tables: placement (a row per router and policy), policies, windows, plan (the recommended
    policy's). MoeInspectError for settings out of range and numbers that do not divide."""
    trace = open_trace(trace)
    selection = select(trace, layers, domains, phase)
    names = [FORMER_NAMES.get(name, name) for name in policies or POLICIES]
    fewer_ranks = bool(minimize) and "local-search" in names
    layouts = layouts_of(trace, selection, gpus, nodes, physical_experts, groups)
    _check(trace, names, fit_share, window, minimize, slack, dispatch)
    check_domains(trace, selection)
    if trace.counts_only:
        windows, loads = loads_of_counts(trace, selection)
    else:
        windows = fit_windows_of(trace, selection, fit_share, window)
        loads = loads_of(trace, selection, windows)
    of, advance = dict[tuple[int, str], np.ndarray](), begun("placing", len(layouts), "routers")
    for r in selection.routers:
        for name in names:
            of[r, name] = POLICIES[name](loads[r][: windows.fit], layouts[r])
        advance(1)
    plans = Plans(trace, selection, windows, layouts, loads, of)
    if fewer_ranks:
        reach_fewer(plans, "local-search", slack)
    reached = {} if trace.counts_only else ranks_reached(plans)
    tables = tables_of(plans, reached, dispatch == "lp")
    best = "local-search" if fewer_ranks else recommended(tables["policies"])
    tables["plan"] = plan_table(plans, best)
    layout, counted = next(iter(layouts.values())), trace.counts_only
    shown = {
        "gpus": layout.gpus,
        "nodes": layout.nodes,
        "groups": layout.groups,
        "physical_experts": physical_experts,
        "policies": names,
        "fit_share": None if counted else fit_share,
        "window": None if counted else -(-windows.tokens // (len(windows.edge_W) - 1)),
        "minimize": minimize,
        "dispatch": dispatch,
        "recommended": best,
        "layers": trace.blocks,
        "moe_layers": sorted({r.layer for r in trace.routers}),
        "stacks": sorted({trace.routers[r].stack for r in selection.routers}),
        "counts_only": counted,
    }
    label_of = {r: layer_label(trace.routers, r) for r in range(len(trace.routers))}
    return Simulation(
        "placement",
        tables,
        verdict(tables, shown),
        shown,
        chart(tables, shown, label_of),
        ("policies",),
    )


def _check(
    trace: Trace,
    policies: Sequence[str],
    fit_share: float,
    window: int | None,
    minimize: str | None,
    slack: float,
    dispatch: str,
) -> None:
    if unknown := [name for name in policies if name not in POLICIES]:
        raise MoeInspectError(f"no policy {', '.join(unknown)}: there are {', '.join(POLICIES)}")
    if dispatch not in DISPATCHES:
        raise MoeInspectError(f"dispatch {dispatch}: give one of {', '.join(DISPATCHES)}")
    if not 0 < fit_share <= 1:
        rule = "a share of the trace above 0 and at most 1"
        raise MoeInspectError(f"fit share {fit_share}: give {rule}")
    if not slack >= 0:
        raise MoeInspectError(f"slack {slack}: give a share of a GPU's load from 0 up")
    if window is not None and window < 1:
        raise MoeInspectError(f"window {window}: give a number of tokens from 1 up")
    if trace.counts_only and (minimize or window is not None):
        asked = "--minimize" if minimize else "--window"
        raise MoeInspectError(
            f"{trace.path} holds counts only, no tokens, which {asked} needs: "
            f"{trace.more_than_counts}"
        )
