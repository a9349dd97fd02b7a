"""The load of two traces of counts in windows of the steps that both have.

E experts, W windows of steps, N shards. An axis of 2 is the two traces.
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
    first_W: np.ndarray  # int64: the first and last step of each window
    last_W: np.ndarray
    load_2WE: dict[int, np.ndarray]  # int64, by router of A
    unit: str  # what a step is
    left_out: tuple[str, ...]  # of A and of B, the steps in no window, as text
    why_none: str  # why there is no window, "" where there are

    @property
    def units(self) -> str:
        return UNITS[self.unit]


def step_windows(
    traces: Sequence[Trace], selections: Sequence[Selection], pairs: Sequence[tuple[int, int]]
) -> StepWindows:
    """Windows that are cut wherever both traces were committed at the same step: one shard of a
    trace may be several of the other. Windows of which a trace has a part only are left out; where
    there are very many, neighbours are put together."""
    units, why_none = [STEP if trace.is_history else PASS for trace in traces], ""
    for name, trace in zip("AB", traces, strict=True):
        if trace.by_document or not trace.counts_only:
            holds = "counts by document" if trace.counts_only else "decisions"
            why_none = why_none or f"{name} holds {holds}, not counts by step"
    if why_none:
        units = [PASS]
    elif units[0] != units[1]:
        of_a, of_b = ("steps of a training run" if x == STEP else UNITS[x] for x in units)
        why_none = f"A counts {of_a}, B {of_b}"
    spans = [] if why_none else [_spans(trace) for trace in traces]
    first_W, last_W, windows = _windows(spans)
    left_out = tuple(_steps(of[w < 0]) for of, w in zip(spans, windows, strict=True)) or ("", "")
    if spans and not len(first_W):
        why_none = f"A has {UNITS[units[0]]} {left_out[0]}, B {left_out[1]}"
    sizes = {r: traces[0].routers[r].experts for r, _ in pairs}
    W = min(len(first_W), max(WINDOWS, WINDOW_CELLS // max(1, sum(sizes.values()))))
    joined_W = np.arange(len(first_W)) * W // max(1, len(first_W))
    start_W = np.searchsorted(joined_W, np.arange(W))
    end_W = np.searchsorted(joined_W, np.arange(W), "right") - 1
    load_2WE = {r: np.zeros((2, W, E), np.int64) for r, E in sizes.items()}
    for side, window_N in enumerate(windows):
        found = by_shard(traces[side], None, count_shard, selections[side], BASE)
        for w, counts in zip(window_N, found, strict=True):
            for pair in pairs if w >= 0 else ():
                load_2WE[pair[0]][side, joined_W[w]] += counts.load_E(pair[side])
    return StepWindows(first_W[start_W], last_W[end_W], load_2WE, units[0], left_out, why_none)


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
