"""What a comparison of loads is made of: the report of each trace, and which router goes with
which."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from moe_inspect.analysis.counting.count_shard import count_shard
from moe_inspect.analysis.counting.engine import WINDOW_CELLS, WINDOWS
from moe_inspect.analysis.counting.router_counts import BASE
from moe_inspect.analysis.counting.select import Selection, select
from moe_inspect.analysis.metrics.chance import FEWEST_TO_JUDGE
from moe_inspect.analysis.tasks import by_shard
from moe_inspect.comparison.aligning.pairing import routers_of_one_model
from moe_inspect.comparison.decisions.data import OF_DECISIONS, Options
from moe_inspect.comparison.result import SIDES, Comparison, Tables
from moe_inspect.reporting.report import Report, report
from moe_inspect.reporting.verdict.findings import beyond_documents
from moe_inspect.trace.reader import Trace


class Loads(Comparison):
    """Traces A and B, at least one of which holds counts only; they may still be written. Nothing
    is counted before it is asked for. DifferentModelsError where the routers have other experts
    or another k."""

    def __init__(
        self, a: Trace, b: Trace, options: Options, progress: Callable[[int], None] | None = None
    ):
        self.a, self.b, self.options = a, b, options
        options.refuse(OF_DECISIONS, self.why)
        self.given = options.given
        self.selection = select(a, options.layers, options.domains, options.phase)
        shift = options.shift_layers
        self.pairs = routers_of_one_model(a, b, self.selection.routers, shift, options.layers)
        settings: dict[str, Any] = {"domains": options.domains, "phase": options.phase}
        self.reports: dict[str, Report] = {
            side: report(
                trace,
                layers=sorted({trace.routers[pair[i]].layer for pair in self.pairs}),
                **settings,
                progress=progress,
            )
            for i, (side, trace) in enumerate(zip(SIDES, (a, b), strict=True))
        }
        self.tables = Tables(self)

    @property
    def shown_tables(self) -> list[str]:
        several = len(self.steps.first_W) > 1
        return [name for name in self.kind.excerpts if several or name != "diverged"]

    @property
    def why(self) -> str:
        """Why decisions cannot be compared."""
        of = [str(trace.path) for trace in (self.a, self.b) if trace.counts_only]
        names = " and ".join(dict.fromkeys(of))
        return f"{names} {'hold' if len(set(of)) > 1 else 'holds'} counts only, no decisions"

    @cached_property
    def steps(self) -> StepWindows:
        """The load of both in windows of the same steps."""
        a, b = (self.reports[side].selection for side in SIDES)
        return step_windows((self.a, self.b), self.pairs, (a, b))

    def design_effect(self, router: int) -> float:
        """How much more than with independent tokens the load of a router of A varies, where a
        trace of decisions tells it; else 1."""
        effects = [self.of(side, "balance", router)["design_effect"].iloc[0] for side in SIDES]
        return float(np.nanmax([1.0, *map(float, effects)]))

    @cached_property
    def documents_known(self) -> bool:
        """Whether a trace of decisions tells how alike the tokens of a document are."""
        units = [len(of.counts.units) for of in self.reports.values() if not of.counts.counts_only]
        return max(units, default=0) >= FEWEST_TO_JUDGE

    def beyond_text(self, shift: float, floor: float) -> bool:
        """Whether no other text explains that so much of the load moves, where independent tokens
        move `floor` by chance."""
        return self.documents_known or beyond_documents(shift, floor)

    @property
    def chance(self) -> str:
        """What the floors are of."""
        return "chance" if self.documents_known else "chance of independent tokens"

    def of(self, side: str, table: str, router: int) -> Any:
        """The rows of a table of one trace's report that are about a router of A, or the one of B
        that goes with it."""
        r = dict(self.pairs)[router] if side == "b" else router
        rows: Any = self.reports[side].tables[table]
        return rows[rows["router"] == r]


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
