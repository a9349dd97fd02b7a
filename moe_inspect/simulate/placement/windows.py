"""Passes of `simulate placement` over a trace: the loads of windows of tokens, the first of which
plans are fitted on; and how many GPUs (or nodes) a token reaches under a plan.

Of each chosen expert one replica is used, any with the same chance and independently: GPU g is
reached with probability 1 − Π (1 − its share of the expert).

T tokens, K slots of a decision, N decisions of a router, E experts, W windows, G GPUs, P physical
slots.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import TypeVar

import numpy as np

from moe_inspect.analysis.counting.select import Selection
from moe_inspect.analysis.tasks import by_shard, summed
from moe_inspect.errors import MoeInspectError
from moe_inspect.simulate import kernels_numba
from moe_inspect.simulate.placement.policies import Layout, shares
from moe_inspect.simulate.sampling import Plan
from moe_inspect.simulate.shards import count_taken, routed, taken
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.shard import Shard

WINDOWS = 16
SWEPT_GPUS = 128  # of several plans, in one sweep over the decisions

Key = TypeVar("Key")
Reached = dict[tuple[int, str], tuple[float, float]]  # GPUs and nodes, by (router, policy)


@dataclass(frozen=True)
class FitWindows:
    """Tokens in order, each rank's on their own: window w covers the shares edge_W[w] to edge_W[w +
    1] of every rank's tokens. Plans are fitted on the first `fit` windows and judged on the rest.
    `tokens`: number in all windows; `of_rank`: number by rank; `before`: number before each shard
    in its rank, by (rank, index). `names`: of the workloads, if windows are workloads."""

    edge_W: np.ndarray
    fit: int
    tokens: int
    of_rank: dict[int, int] = field(default_factory=dict[int, int])
    before: dict[tuple[int, int], int] = field(default_factory=dict[tuple[int, int], int])
    names: tuple[str, ...] = ()

    @property
    def judged(self) -> slice:
        whole = len(self.edge_W) - 1
        return slice(self.fit if self.fit < whole else 0, whole)

    @property
    def first_W(self) -> np.ndarray:
        """The tokens before each window, and all of them, as `window_of` deals them: the first of a
        rank's n tokens in window w is the least i with i / n at edge_W[w] or beyond. int64 [W + 1]
        """
        if not self.of_rank:
            return np.round(self.edge_W * self.tokens).astype(np.int64)
        first_W = np.zeros(len(self.edge_W), np.int64)
        for n in filter(None, self.of_rank.values()):
            of_W = np.ceil(self.edge_W * n)  # or one off, as products are rounded
            of_W -= (of_W - 1) / n >= self.edge_W
            first_W += (of_W + (of_W / n < self.edge_W)).astype(np.int64)
        return first_W


@dataclass(frozen=True)
class PlacementPlans:
    """The expert of every slot, int64 [P], by (router, policy), with what the plans were made from.
    `loads`: assignments of each router's experts by window, int64 [W, E]. `judging`: the same plans
    on the tokens of each trace that they are judged on; none if there are only counts."""

    trace: Trace
    selection: Selection
    windows: FitWindows
    layouts: dict[int, Layout]
    loads: dict[int, np.ndarray]
    of: dict[tuple[int, str], np.ndarray]
    judging: Sequence[PlacementPlans] = ()

    @property
    def policies(self) -> list[str]:
        return list(dict.fromkeys(policy for _, policy in self.of))

    def plan(self, policy: str) -> Plan:
        return {r: self.of[r, policy] for r in self.selection.routers}


def fit_windows_of(trace: Trace, selection: Selection, fit_share: float) -> FitWindows:
    """Windows whose first part has the share `fit_share` of the tokens. MoeInspectError if nothing
    is selected."""
    of_rank, before = dict[int, int](), dict[tuple[int, int], int]()
    selected = (shard.files.tokens for shard in trace.shards)
    if selection.domains is not None or selection.phase:
        selected = by_shard(trace, None, count_taken, selection)
    for shard, n in zip(trace.shards, selected, strict=True):
        rank = shard.files.rank
        before[rank, shard.files.index] = of_rank.get(rank, 0)
        of_rank[rank] = of_rank.get(rank, 0) + n
    tokens = sum(of_rank.values())
    if not tokens:
        none = "has no tokens in this selection" if trace.n_tokens else "holds no tokens yet"
        raise MoeInspectError(f"{trace.path} {none}")
    fit = max(1, round(WINDOWS * fit_share))
    rest = 0 if fit_share == 1 else max(1, WINDOWS - fit)
    fitted_W, rest_W = np.linspace(0, fit_share, fit + 1), np.linspace(fit_share, 1, rest + 1)
    return FitWindows(np.append(fitted_W, rest_W[1:]), fit, tokens, of_rank, before)


def window_of(shard: Shard, taken_T: np.ndarray, windows: FitWindows) -> np.ndarray:
    """The window of each token of a shard that is taken. int64 [T]"""
    rank = shard.files.rank
    index_T = windows.before[rank, shard.files.index] + np.cumsum(taken_T) - 1
    share_T = index_T / max(1, windows.of_rank[rank])
    return np.searchsorted(windows.edge_W, share_T, side="right") - 1


def decisions(
    shard: Shard, selection: Selection, windows: FitWindows, since: int = 0
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(router, ids int16 [K, T], window of each token int64 [T]) of a shard. What lies before the
    window `since` is not read."""
    taken_T = taken(shard, selection)
    window_T = window_of(shard, taken_T, windows)
    wanted_T = taken_T & (window_T >= since)
    routers = selection.routers if wanted_T.any() else ()
    found = routed(shard, routers, lambda _, seen: (wanted_T[seen], window_T[seen]))
    for r, (kept_N, window_N), ids_KN in found:
        if not kept_N.all():
            ids_KN, window_N = np.ascontiguousarray(ids_KN[:, kept_N]), window_N[kept_N]
        yield r, ids_KN, window_N


def _added(total: dict[Key, np.ndarray], other: dict[Key, np.ndarray]) -> dict[Key, np.ndarray]:
    for key, values in other.items():
        total[key] = total[key] + values if key in total else values
    return total


def loads_of(trace: Trace, selection: Selection, windows: FitWindows) -> dict[int, np.ndarray]:
    """Assignments of each expert in each window, int64 [W, E], a router."""
    W = len(windows.edge_W) - 1
    loads = {r: np.zeros((W, trace.routers[r].experts), np.int64) for r in selection.routers}
    for part in summed(trace, "counting loads", _added, _loads, selection, windows):
        for (r, window), load_E in part.items():
            loads[r][window] += load_E
    return loads


def _loads(
    shard: Shard, selection: Selection, windows: FitWindows
) -> dict[tuple[int, int], np.ndarray]:
    """The assignments of each expert in a shard, by (router, window)."""
    found = dict[tuple[int, int], np.ndarray]()
    for r, ids_KT, window_T in decisions(shard, selection, windows):
        if len(window_T):
            first, E = int(window_T[0]), shard.trace.routers[r].experts
            load_WE = window_loads(ids_KT, window_T - first, E)
            found |= {(r, first + w): load_E for w, load_E in enumerate(load_WE)}
    return found


def window_loads(ids_KT: np.ndarray, window_T: np.ndarray, E: int) -> np.ndarray:
    """Assignments of each expert in each window. int64 [W, E]. Windows rise; an id of −1 is a slot
    that routed nowhere."""
    W, cell_T = int(window_T[-1]) + 1, window_T * (E + 1) + 1
    counts = sum(np.bincount(cell_T + ids_T, minlength=W * (E + 1)) for ids_T in ids_KT)
    return np.reshape(counts, (W, E + 1))[:, 1:]


def ranks_reached(every: Iterable[PlacementPlans]) -> Reached:
    """GPUs and nodes that a token of the judged parts is expected to reach, its own included, by
    (router, policy). `every`: the same plans, of a trace each."""
    sums = dict[tuple[int, str], np.ndarray]()
    for plans in every:
        asked = plans.selection, plans.windows, plans.layouts, plans.of
        sums = reduce(_added, summed(plans.trace, "counting ranks", _added, _reached, *asked), sums)
    return {
        key: (float(gpus / tokens), float(nodes / tokens))
        for key, (tokens, gpus, nodes) in sums.items()
        if tokens
    }


def _reached(
    shard: Shard,
    selection: Selection,
    windows: FitWindows,
    layouts: dict[int, Layout],
    plans: dict[tuple[int, str], np.ndarray],
) -> dict[tuple[int, str], np.ndarray]:
    """Tokens of the judged part of a shard, and the GPUs and nodes that they reach, by (router,
    policy). float64 [3]"""
    found = dict[tuple[int, str], np.ndarray]()
    for r, ids_KT, _ in decisions(shard, selection, windows, windows.judged.start):
        E, layout = shard.trace.routers[r].experts, layouts[r]
        mine = {key: expert_P for key, expert_P in plans.items() if key[0] == r}
        gpus, nodes = (
            reached([shares(expert_P, E, n) for expert_P in mine.values()], ids_KT)
            # one node is reached by every decision that routes anywhere
            if n > 1
            else [float((ids_KT >= 0).any(0).sum())] * len(mine)
            for n in (layout.gpus, layout.nodes)
        )
        for n, key in enumerate(mine):
            found[key] = np.array([ids_KT.shape[1], gpus[n], nodes[n]])
    return found


def reached(plans: Sequence[np.ndarray], ids_KT: np.ndarray) -> list[float]:
    """Sum over decisions of the GPUs reached under each plan, given as the shares [E, G]. One sweep
    over the decisions takes plans of SWEPT_GPUS, or one plan."""
    gpus, found = plans[0].shape[1], list[float]()
    at_once = max(1, SWEPT_GPUS // gpus)
    for first in range(0, len(plans), at_once):
        miss_EG = 1 - np.hstack(plans[first : first + at_once])
        # the last row: a slot that routed nowhere
        miss_EG = np.vstack([miss_EG, np.ones(miss_EG.shape[1])]).astype(np.float32)
        found += kernels_numba.reached(ids_KT, miss_EG, gpus).tolist()
    return found
