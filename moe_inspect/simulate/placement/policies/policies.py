"""The POLICIES of placement: from the loads of one router's experts to the expert of each slot.

E experts, W windows, P slots, G GPUs, S = P / G slots of a GPU; slot p is on GPU p // S. A policy
is called with the load of each expert, [E], or that of each window, [W, E], and a Layout, and
returns the expert of each slot, int64 [P].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from moe_inspect.simulate.placement.layouts import Layout
from moe_inspect.simulate.placement.policies import eplb as published
from moe_inspect.simulate.placement.policies.search import search

FEWEST = 4  # windows from which their spread is estimated

Policy = Callable[[np.ndarray, Layout], np.ndarray]
POLICIES: dict[str, Policy] = {}
FORMER_NAMES = {"ours": "local-search"}  # still accepted


def policy(function: Policy, of_windows: bool = False) -> Policy:
    """Registers a policy under the function's name, with hyphens. It gets the sum over the windows,
    or with `of_windows` them all."""

    def registered(load: np.ndarray, layout: Layout) -> np.ndarray:
        load_WE = np.atleast_2d(load)
        return function(load_WE if of_windows else load_WE.sum(0), layout)

    POLICIES[function.__name__.replace("_", "-")] = registered
    return function


@policy
def contiguous(load_E: np.ndarray, layout: Layout) -> np.ndarray:
    """Experts in order, then from the first again: what SGLang does without a plan."""
    return np.arange(layout.slots) % len(load_E)


@policy
def round_robin(load_E: np.ndarray, layout: Layout) -> np.ndarray:
    """Expert e on GPU e mod G, then from the first again (vLLM's round_robin)."""
    gpu_P, position_P = np.divmod(np.arange(layout.slots), layout.slots // layout.gpus)
    return (position_P * layout.gpus + gpu_P) % len(load_E)


@policy
def greedy(load_E: np.ndarray, layout: Layout) -> np.ndarray:
    """One more replica for each of the busiest experts, as far as the slots go; then the heaviest
    first, each to the lightest GPU."""
    E = len(load_E)
    expert_P = np.concatenate(
        [np.arange(E), np.resize(np.argsort(-load_E, kind="stable"), layout.slots - E)]
    )
    each_P = (load_E / np.bincount(expert_P, minlength=E))[expert_P]
    gpu_P, position_P = published.pack(each_P, layout.gpus)
    placed_P = np.empty(layout.slots, np.int64)
    placed_P[gpu_P * (layout.slots // layout.gpus) + position_P] = expert_P
    return placed_P


@policy
def eplb(load_E: np.ndarray, layout: Layout) -> np.ndarray:
    """EPLB as DeepSeek published it, ties aside: hierarchical where the groups divide among the
    nodes, else global."""
    return published.eplb(load_E, layout.slots, layout.groups, layout.nodes, layout.gpus)


@policy
def eplb_global(load_E: np.ndarray, layout: Layout) -> np.ndarray:
    """EPLB without regard to groups and nodes."""
    return published.eplb(load_E, layout.slots, 1, 1, layout.gpus)


@partial(policy, of_windows=True)
def local_search(load_WE: np.ndarray, layout: Layout) -> np.ndarray:
    """A local search from EPLB's placements that keeps the replicas of an expert on different GPUs.
    With at least FEWEST windows, the placement is fitted to windows drawn from a forecast."""
    load_E, load_WE = load_WE.sum(0), load_WE[load_WE.any(axis=1)]
    starts = [eplb(load_E, layout), eplb_global(load_E, layout)]
    if len(load_WE) < FEWEST or layout.slots // layout.gpus >= len(load_E):
        return search(load_E, layout.slots, layout.gpus, starts)
    from moe_inspect.simulate.placement.policies.lasting import lasting

    return lasting(load_WE, layout.slots, layout.gpus, starts)
