"""Two histories of counts, step by step: the load of the experts in windows of the same steps.

W windows, N shards, E experts. An axis of 2 is the two traces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_inspect.analysis.counting.count_shard import count_shard
from moe_inspect.analysis.counting.engine import WINDOW_CELLS, WINDOWS
from moe_inspect.analysis.counting.router_counts import BASE
from moe_inspect.analysis.counting.select import Selection
from moe_inspect.analysis.tasks import by_shard
from moe_inspect.trace.reader import Trace

STEP, PASS = "step", "forward pass"
UNITS = {STEP: "steps", PASS: "forward passes"}


@dataclass(frozen=True)
class StepWindows:
    """first_W, last_W: int64 [W], the first and last step of each window. load_2WE: by router of A,
    int64 [2, W, E]. `unit`: what a step is. `left_out`: of A and of B, the steps in no window, as
    text. `why_none`: why there is no window, "" where there are."""

    first_W: np.ndarray
    last_W: np.ndarray
    load_2WE: dict[int, np.ndarray]
    unit: str
    left_out: tuple[str, str]
    why_none: str

    @property
    def units(self) -> str:
        return UNITS[self.unit]


def step_windows(
    traces: tuple[Trace, Trace],
    pairs: Sequence[tuple[int, int]],
    selections: tuple[Selection, Selection],
) -> StepWindows:
    """The steps that both traces have, cut wherever both were committed at the same step: one shard
    of a trace may be several of the other. Windows of which a trace has a part only are left out;
    where there are very many, neighbours are put together. `pairs`: routers of A and of B."""
    unit, why_none = _unit(traces)
    spans = tuple(_spans(trace) for trace in traces) if not why_none else ()
    first_W, last_W, windows = _windows(spans)
    left_out = tuple(_steps(of[w < 0]) for of, w in zip(spans, windows, strict=True))
    if spans and not len(first_W):
        why_none = f"A has {UNITS[unit]} {left_out[0]}, B {left_out[1]}"
    experts = sum(traces[0].routers[r].experts for r, _ in pairs)
    W = min(len(first_W), max(WINDOWS, WINDOW_CELLS // max(1, experts)))
    joined_W = np.arange(len(first_W)) * W // max(1, len(first_W))
    start_W = np.searchsorted(joined_W, np.arange(W))
    end_W = np.searchsorted(joined_W, np.arange(W), "right") - 1
    load_2WE = {r: np.zeros((2, W, traces[0].routers[r].experts), np.int64) for r, _ in pairs}
    for side, window_N in enumerate(windows):
        found = by_shard(traces[side], None, count_shard, selections[side], BASE)
        for w, counts in zip(window_N, found, strict=True):
            if w >= 0:
                for pair in pairs:
                    load_2WE[pair[0]][side, joined_W[w]] += counts.load_E(pair[side])
    a, b = left_out or ("", "")
    return StepWindows(first_W[start_W], last_W[end_W], load_2WE, unit, (a, b), why_none)


def _unit(traces: tuple[Trace, Trace]) -> tuple[str, str]:
    """What a step is, and why the two cannot be compared by step ("" if they can)."""
    for name, trace in zip("AB", traces, strict=True):
        if not trace.counts_only:
            return PASS, f"{name} holds decisions, not counts by step"
    units = [STEP if trace.is_history else PASS for trace in traces]
    of = {STEP: "steps of a training run", PASS: "forward passes"}
    why = "" if units[0] == units[1] else f"A counts {of[units[0]]}, B {of[units[1]]}"
    return units[0], why


def _spans(trace: Trace) -> np.ndarray:
    """The first and last step of every shard, and its rank. int64 [N, 3]"""
    spans, following = list[tuple[int, int, int]](), dict[int, int]()
    for shard in trace.shards:
        files = shard.files
        first = files.first_batch
        if first is None:  # counts need not say it: after the shard before
            first = min(following.get(files.rank, int(trace.is_history)), files.last_batch)
        spans.append((first, files.last_batch, files.rank))
        following[files.rank] = files.last_batch + 1
    return np.array(spans, np.int64).reshape(-1, 3)


def _windows(spans: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """first_W, last_W, and of each trace the window of every shard, −1 for none. [N]"""
    every = np.concatenate([np.zeros((0, 3), np.int64), *spans])
    edges = np.unique(np.r_[every[:, 0], every[:, 1] + 1])
    # an edge that lies within a shard of either trace is none of both
    within = np.zeros(len(edges) + 1, np.int64)
    np.add.at(within, np.searchsorted(edges, every[:, 0], "right"), 1)
    np.add.at(within, np.searchsorted(edges, every[:, 1], "right"), -1)
    edges = edges[within.cumsum()[:-1] == 0]
    steps_W = np.diff(edges)
    whole_W, windows = np.ones(len(steps_W), bool), list[np.ndarray]()
    for of in spans:
        window_N = np.searchsorted(edges, of[:, 0], "right") - 1
        found_W = np.zeros(len(steps_W), np.int64)
        np.add.at(found_W, window_N, of[:, 1] - of[:, 0] + 1)
        whole_W &= found_W == steps_W * len(np.unique(of[:, 2]))  # every rank has all steps
        windows.append(window_N)
    number_W = np.where(whole_W, whole_W.cumsum() - 1, -1)
    return edges[:-1][whole_W], edges[1:][whole_W] - 1, [number_W[of] for of in windows]


def _steps(spans: np.ndarray) -> str:
    """The steps of shards as text, neighbours together: "1 to 20, 41 to 60"; "" without any."""
    runs = list[list[int]]()
    for first, last, _ in sorted(spans.tolist()):
        if runs and first <= runs[-1][1] + 1:
            runs[-1][1] = max(last, runs[-1][1])
        else:
            runs.append([first, last])
    return ", ".join(f"{a:,} to {b:,}" if a < b else f"{a:,}" for a, b in runs)
