"""How `simulate placement` reads a trace: in windows of tokens, of which plans are fitted on the
first.

T tokens, K slots of a decision, N decisions of a router, E experts, W windows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from moe_inspect.analysis.counting.engine import count_trace
from moe_inspect.analysis.counting.select import Selection
from moe_inspect.analysis.tasks import by_shard, summed
from moe_inspect.errors import MoeInspectError
from moe_inspect.simulate.kernels_numba import count_windows
from moe_inspect.simulate.shards import Seen, count_taken, routed, taken
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.shard import Shard

WINDOWS = 16  # by default
MOST_WINDOWS = 4_096


@dataclass(frozen=True)
class FitWindows:
    """Tokens in order, each rank's on their own: window w covers the shares edge_W[w] to edge_W[w +
    1] of every rank's tokens. Plans are fitted on the first `fit` windows and judged on the rest.
    `tokens`: in all windows; of_rank: of each rank; `before`: those that each shard, by (rank,
    index), has before it in its rank."""

    edge_W: np.ndarray
    fit: int
    tokens: int
    of_rank: dict[int, int] = field(default_factory=dict[int, int])
    before: dict[tuple[int, int], int] = field(default_factory=dict[tuple[int, int], int])

    @property
    def judged(self) -> slice:
        whole = len(self.edge_W) - 1
        return slice(self.fit if self.fit < whole else 0, whole)


def loads_of_counts(trace: Trace, selection: Selection) -> tuple[FitWindows, dict[int, np.ndarray]]:
    """The loads of a trace of counts only. Counts know no order: one window, which plans are both
    fitted on and judged by."""
    counts = count_trace(trace, selection)
    loads = {r: counts.load_E(r)[None] for r in selection.routers}
    return FitWindows(np.array([0.0, 1.0]), 1, trace.n_tokens), loads


def fit_windows_of(
    trace: Trace, selection: Selection, fit_share: float, window: int | None
) -> FitWindows:
    of_rank, before = _selected(trace, selection)
    tokens = sum(of_rank.values())
    if not tokens:
        raise MoeInspectError(
            f"{trace.path} has no tokens in this selection"
            if trace.n_tokens
            else f"{trace.path} holds no tokens yet"
        )
    whole = WINDOWS if window is None else -(-tokens // window)
    if whole > MOST_WINDOWS:
        raise MoeInspectError(
            f"windows of {window} tokens: {whole:,} windows, more than {MOST_WINDOWS:,}; give at "
            f"least {-(-tokens // MOST_WINDOWS)}"
        )
    fit = max(1, round(whole * fit_share))
    rest = 0 if fit_share == 1 else max(1, whole - fit)
    edge_W = np.concatenate(
        [np.linspace(0, fit_share, fit + 1), np.linspace(fit_share, 1, rest + 1)[1:]]
    )
    return FitWindows(edge_W, fit, tokens, of_rank, before)


def _selected(
    trace: Trace, selection: Selection
) -> tuple[dict[int, int], dict[tuple[int, int], int]]:
    """The tokens selected of each rank, and before each shard."""
    of_rank, before = dict[int, int](), dict[tuple[int, int], int]()
    tokens_of = (
        (shard.files.tokens for shard in trace.shards)
        if selection.domains is None and not selection.phase
        else by_shard(trace, None, count_taken, selection)
    )
    for shard, tokens in zip(trace.shards, tokens_of, strict=True):
        rank = shard.files.rank
        before[rank, shard.files.index] = of_rank.get(rank, 0)
        of_rank[rank] = of_rank.get(rank, 0) + tokens
    return of_rank, before


def decisions(
    shard: Shard, selection: Selection, windows: FitWindows, since: int = 0
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(router, ids int16 [K, T], window of each token int64 [T]) of a shard. What lies before the
    window `since` is not read."""
    rank, taken_T = shard.files.rank, taken(shard, selection)
    index_T = windows.before[rank, shard.files.index] + np.cumsum(taken_T) - 1
    share_T = index_T / max(1, windows.of_rank[rank])
    window_T = np.searchsorted(windows.edge_W, share_T, side="right") - 1
    wanted_T = taken_T & (window_T >= since)

    def wanted(_: int, seen: Seen) -> tuple[np.ndarray, np.ndarray]:
        return wanted_T[seen], window_T[seen]

    routers = selection.routers if wanted_T.any() else ()
    for r, (kept_N, window_N), ids_KN in routed(shard, routers, wanted):
        if not kept_N.all():
            ids_KN, window_N = np.ascontiguousarray(ids_KN[:, kept_N]), window_N[kept_N]
        yield r, ids_KN, window_N


def loads_of(trace: Trace, selection: Selection, windows: FitWindows) -> dict[int, np.ndarray]:
    """Assignments of each expert in each window, int64 [W, E], a router."""
    loads = {
        r: np.zeros((len(windows.edge_W) - 1, trace.routers[r].experts), np.int64)
        for r in selection.routers
    }
    for part in summed(trace, "counting loads", _add_loads, _loads, selection, windows):
        for (r, window), load_E in part.items():
            loads[r][window] += load_E
    return loads


Loads = dict[tuple[int, int], np.ndarray]  # of each expert, by (router, window)


def _add_loads(total: Loads, other: Loads) -> Loads:
    for key, load_E in other.items():
        total[key] = total[key] + load_E if key in total else load_E
    return total


def _loads(shard: Shard, selection: Selection, windows: FitWindows) -> Loads:
    """The assignments in a shard."""
    found: Loads = {}
    for r, ids_KT, window_T in decisions(shard, selection, windows):
        if not len(window_T):
            continue
        first, last = int(window_T[0]), int(window_T[-1])
        load_WE = np.zeros((last - first + 1, shard.trace.routers[r].experts), np.int64)
        count_windows(ids_KT, window_T - first, load_WE)
        found |= {(r, first + w): load_E for w, load_E in enumerate(load_WE)}
    return found
