"""The load of the experts in two traces, at least one of which holds counts only: a trace of
decisions is counted first. Two histories are also compared in windows of the steps that both have.
`layer, router` are A's.

E experts, W windows of steps, N shards. An axis of 2 is the two traces.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from moe_inspect.analysis.counting.count_shard import count_shard
from moe_inspect.analysis.counting.counts import Counts
from moe_inspect.analysis.counting.engine import WINDOW_CELLS, WINDOWS
from moe_inspect.analysis.counting.router_counts import BASE
from moe_inspect.analysis.counting.select import select
from moe_inspect.analysis.metrics import two_traces as tt
from moe_inspect.analysis.metrics.balance import max_vio, nan_for_zero
from moe_inspect.analysis.metrics.chance import ALPHA, LONG_DOCUMENT, z_of
from moe_inspect.analysis.metrics.registry import metrics_of
from moe_inspect.analysis.metrics.uncertainty import special
from moe_inspect.analysis.metrics.windows import step_floors, step_total_variation
from moe_inspect.analysis.tasks import by_shard
from moe_inspect.comparison import result
from moe_inspect.comparison.diagnosis import Collapse, collapse_findings
from moe_inspect.comparison.pairing import layers_named
from moe_inspect.comparison.result import LOAD_TABLES, Row
from moe_inspect.reporting.report import Report
from moe_inspect.reporting.tables.load import design_effect
from moe_inspect.reporting.tables.registry import table
from moe_inspect.reporting.verdict.findings import (
    BEYOND_LONG_DOCUMENTS,
    Finding,
    Severity,
    beyond_documents,
    finding,
)
from moe_inspect.text import format_ratio, join_first, plural
from moe_inspect.trace.reader import Trace

SIDES: tuple[str, str] = ("a", "b")


class Loads(result.Paired):
    """The loads of traces A and B, from the counts of a report on each; the traces may still be
    written. Nothing is counted before it is needed."""

    refused = result.OF_DECISIONS

    def __init__(
        self, a: Trace, b: Trace, options: result.PairSettings, progress: result.Progress = None
    ):
        super().__init__(a, b, options)
        self.reports = list[Report]()
        for trace, routers in zip((a, b), self.routers_2, strict=True):
            layers = sorted({trace.routers[r].layer for r in routers})
            selection = select(trace, layers, options.domains, options.phase)
            self.reports.append(Report(trace, selection, progress=progress))

    @property
    def routers_2(self) -> list[list[int]]:
        """The routers of A that are compared, and those of B."""
        return [[*routers] for routers in zip(*self.pairs, strict=True)]

    @property
    def why(self) -> str:
        paths = dict.fromkeys(str(trace.path) for trace in self.traces if trace.counts_only)
        holds = "hold" if len(paths) > 1 else "holds"
        return f"{' and '.join(paths)} {holds} counts only, no decisions"

    @property
    def shown_tables(self) -> list[str]:
        several = len(self.steps.first_W) > 1
        return [name for name in self.kind.excerpts if several or name != "diverged"]

    @cached_property
    def steps(self) -> StepWindows:
        """The load in windows of the steps that both traces have."""
        return step_windows(self)

    def sides(self, router: int) -> list[tuple[Counts, int]]:
        """The counts of A and of B, each with its router: a router of A and its partner in B."""
        routers = router, dict(self.pairs)[router]
        return [(report.counts, r) for report, r in zip(self.reports, routers, strict=True)]

    def load_2E(self, router: int) -> np.ndarray:
        """Load of a router of A and of its partner in B. float64 [2, E]"""
        return np.stack([counts.load_E(r).astype(float) for counts, r in self.sides(router)])

    def design_effect(self, router: int) -> float:
        """Factor by which the load varies more than that of independent tokens; 1 if unknown."""
        return float(np.nanmax([1.0, *(design_effect(*side) for side in self.sides(router))]))

    @cached_property
    def documents_known(self) -> bool:
        """Whether a trace shows how similar the tokens of a document are."""
        return any(report.counts.documents_tell for report in self.reports)

    @property
    def chance(self) -> str:
        """Name of the chance that the floors are for."""
        return "chance" if self.documents_known else "chance of independent tokens"

    def table_2(self, name: str) -> Iterator[pd.DataFrame]:
        """A table of the report on A and of the one on B: rows of the routers that are compared."""
        for report, routers in zip(self.reports, self.routers_2, strict=True):
            yield report.tables[name].set_index("router").loc[routers].reset_index()


BALANCE = tuple(metrics_of("balance", {"load_LE"}))
NUMBERS = ("dead_experts", "starved_experts")  # whole numbers, which may be missing
# the floor is a mean of independent tokens, and the tokens of a document are similar: as in the
# report on counts, a shift of less than twice the floor may be chance
BEYOND = 2
IN_A_ROW = 3  # windows beyond chance that show two runs to differ: a single one may be chance
MOST_NAMED = 4  # layers, or steps, in a sentence
WINDOW = ("first_step", "last_step", "load_shift", "load_shift_floor")
DIVERGED_TYPES = {
    **dict.fromkeys(("layer", "router", "windows", "windows_beyond_chance"), "int64"),
    "since_step": "Int64",
    **dict.fromkeys(("windows_since", "beyond_chance_since"), "int64"),
    **{f"most_{name}": "int64" if "step" in name else "float64" for name in WINDOW},
}


@table(tables=LOAD_TABLES)
def summary(data: Loads) -> pd.DataFrame:
    """One row per fact: key, and its value in A and in B (text)."""
    models = [trace.manifest.get("model") or {} for trace in data.traces]
    facts: result.Facts = {"trace": [trace.path for trace in data.traces]}
    for key in ("id", "revision", "class"):
        facts[f"model_{key}"] = [model.get(key) or "" for model in models]
    facts["holds"] = ["counts" if trace.counts_only else "decisions" for trace in data.traces]
    facts["status"] = [trace.status for trace in data.traces]
    facts["tokens"] = [report.counts.tokens for report in data.reports]
    facts["domains"] = [", ".join(report.counts.domains) for report in data.reports]
    return result.facts_table(facts, SIDES)


@table(
    by_router=tuple(f"{name}_{x}" for name in BALANCE for x in (*SIDES, "difference")),
    tables=LOAD_TABLES,
)
def balance(data: Loads) -> pd.DataFrame:
    """One row per router: the balance in A, in B, and B's minus A's, and what chance gives."""
    a, b = data.table_2("balance")
    frame = a[["layer", "router", "experts", "top_k"]].astype("int64")
    frame["tokens_a"], frame["tokens_b"] = (x["tokens"].astype("int64") for x in (a, b))
    for name in BALANCE:
        kind = "Int64" if name in NUMBERS else "float64"
        values_a, values_b = (x[name].to_numpy(float, na_value=np.nan) for x in (a, b))
        columns = {"a": values_a, "b": values_b, "difference": values_b - values_a}
        for end, values in columns.items():
            frame[f"{name}_{end}"] = pd.Series(values).astype(kind)
    for side, table_of_side in zip(SIDES, (a, b), strict=True):
        frame[f"expected_by_chance_{side}"] = table_of_side["expected_by_chance"]
    return frame


@table(by_router=("load_shift", "jsd_bits"), tables=LOAD_TABLES)
def load_shift(data: Loads) -> pd.DataFrame:
    """One row per router: the distance between the loads of the two traces, and the distance that
    chance alone gives between two traces with equal routers and this many tokens (…_floor)."""
    rows = list[Row]()
    for r, _ in data.pairs:
        load_2E, k = data.load_2E(r), data.a.routers[r].top_k
        share_E = load_2E.sum(0) / max(load_2E.sum(), 1)
        # null slots make no load
        (floor,), (jsd_floor,) = step_floors(share_E, load_2E.sum(1) / k, k, data.design_effect(r))
        shift = {"load_shift": tt.load_shift(load_2E), "load_shift_floor": float(floor)}
        jsd = {"jsd_bits": tt.load_shift_jsd_bits(load_2E), "jsd_bits_floor": float(jsd_floor)}
        rows.append({**data.place(r), **shift, **jsd})
    return pd.DataFrame(rows)


@table(tables=LOAD_TABLES)
def windows(data: Loads) -> pd.DataFrame:
    """One row per router and window of steps that both traces have: the distance between the loads
    and that by chance, how even each load is, and the expert whose load differs most."""
    steps, W, parts = data.steps, len(data.steps.first_W), list[pd.DataFrame]()
    for r, load_2WE in steps.load_2WE.items():
        k = data.a.routers[r].top_k
        tokens_2W = load_2WE.sum(2) / k  # null slots make no load
        share_WE = load_2WE.sum(0) / nan_for_zero(load_2WE.sum((0, 2)))[:, None]
        moved_W = step_total_variation(load_2WE)[0]
        floor_W = step_floors(share_WE, tokens_2W, k, data.design_effect(r))[0][0]
        ratio_2WE = load_2WE / nan_for_zero(load_2WE.mean(2))[..., None]
        expert_W = np.abs(np.nan_to_num(ratio_2WE[1] - ratio_2WE[0])).argmax(1)
        tokens_a_W, tokens_b_W = np.rint(tokens_2W).astype(np.int64)
        ratio_a_W, ratio_b_W = ratio_2WE[:, np.arange(W), expert_W]
        columns = {
            **{name: np.full(W, value) for name, value in data.place(r).items()},
            "window": np.arange(W),
            "first_step": steps.first_W,
            "last_step": steps.last_W,
            "tokens_a": tokens_a_W,
            "tokens_b": tokens_b_W,
            "load_shift": moved_W,
            "load_shift_floor": floor_W,
            "beyond_chance": moved_W > floor_W * times_floor(data, r),
            "max_vio_a": max_vio(load_2WE[0]),
            "max_vio_b": max_vio(load_2WE[1]),
            "expert": expert_W,
            "load_ratio_a": ratio_a_W,
            "load_ratio_b": ratio_b_W,
        }
        parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)


@table(by_router=("windows_beyond_chance",), tables=LOAD_TABLES)
def diverged(data: Loads) -> pd.DataFrame:
    """One row per router: the number of windows of steps in which the load differs by more than
    chance; the first step of IN_A_ROW such windows in a row, or empty; and the window in which the
    load differs most."""
    rows = list[Row]()
    for _, frame in data.tables["windows"].groupby("router", sort=False):
        W, beyond_W = len(frame), frame["beyond_chance"].to_numpy(bool)
        in_a_row = np.lib.stride_tricks.sliding_window_view(beyond_W, min(IN_A_ROW, W)).all(1)
        start = int(in_a_row.argmax()) if in_a_row.any() else W
        most = frame.iloc[frame["load_shift"].fillna(-1).argmax()]
        row = {
            "layer": most["layer"],
            "router": most["router"],
            "windows": W,
            "windows_beyond_chance": int(beyond_W.sum()),
            "since_step": frame["first_step"].iloc[start] if start < W else pd.NA,
            "windows_since": W - start,
            "beyond_chance_since": int(beyond_W[start:].sum()),
        }
        rows.append(row | {f"most_{name}": most[name] for name in WINDOW})
    return pd.DataFrame(rows, columns=list(DIVERGED_TYPES)).astype(DIVERGED_TYPES)


def times_floor(data: Loads, r: int) -> float:
    """Factor by which the total variation of two loads must exceed its floor to be beyond chance,
    at ALPHA for all routers together. The fewer experts the load varies over, the more the distance
    itself varies: it is taken for a chi variable of n − 1 degrees of freedom, where n is the
    effective number of these experts, weighted by how much each varies."""
    k, load_E = data.a.routers[r].top_k, data.load_2E(r).sum(0)
    chosen_E = np.clip(k * load_E / max(load_E.sum(), 1), 0, 1)
    error_E = np.sqrt(chosen_E * (1 - chosen_E))
    n = error_E.sum() ** 2 / max((error_E**2).sum(), 1e-12)
    half = max(1.0, n - 1) / 2
    highest = math.sqrt(special("gammainccinv")(half, ALPHA / len(data.pairs)))
    return max(BEYOND, highest * math.exp(math.lgamma(half) - math.lgamma(half + 0.5)))


@table(tables=LOAD_TABLES)
def load(data: Loads) -> pd.DataFrame:
    """One row per expert of a router: its load in A, in B, and B's minus A's."""
    a, b = data.table_2("load")
    frame = a[["layer", "router", "expert"]].copy()
    for name in ("assignments", "share", "load_ratio"):
        frame[f"{name}_a"], frame[f"{name}_b"] = a[name], b[name]
        if name != "assignments":  # which also differ with the number of tokens
            frame[f"{name}_difference"] = b[name] - a[name]
    return frame


def shifted(data: Loads) -> Iterator[Finding]:
    """The first line: whether the load differs by more than chance."""
    rows = data.tables["load_shift"].dropna(subset=["load_shift"])
    if not len(rows):
        yield finding("load_shift", "warning", "No router has load in both traces.")
        return
    if not rows["load_shift"].any():
        text = "Each expert has the same share of the load in A and B."
        yield finding("load_shift", "good", text, load_shift=0.0, routers=0)
        return
    limit = rows["load_shift_floor"] * [times_floor(data, int(r)) for r in rows["router"]]
    beyond = rows[rows["load_shift"] > limit]
    severity, n = _severity(data, beyond, "load_shift"), len(beyond)
    row = (beyond if n else rows).nlargest(1, "load_shift").iloc[0]
    r, shifts = int(row["router"]), row[["load_shift", "load_shift_floor"]]
    moved, floor = shifts
    which = f"The load of {n} of {plural(len(rows), 'router')}" if n else "No load"
    text = (
        f"{which} differs by more than {data.chance}: up to {moved:.2%} of it moves, in layer "
        f"{data.label(r)} (by chance {floor:.2%} on average, at most {limit.loc[row.name]:.2%} "
        "with this many tokens)."
    )
    values: Row = {"routers": n, **shifts}
    if n:
        ratio_2E = (load_2E := data.load_2E(r)) / load_2E.mean(1, keepdims=True)
        expert = int(np.abs(ratio_2E[1] - ratio_2E[0]).argmax())
        a, b = map(format_ratio, ratio_2E[:, expert])
        text += f" Expert {expert} changes most: {a}x the mean load in A, {b}x in B."
        values["expert"] = expert
    yield finding("load_shift", severity, text, data.place(r), **values)


def collapsed(data: Loads) -> Iterator[Finding]:
    """Routers that are collapsed in one trace alone, if no documents explain the difference."""
    beyond = list[Collapse]()
    for r, _ in data.pairs:
        load_2E = data.load_2E(r)
        tokens_2 = np.array([counts.tokens_of(x) for counts, x in data.sides(r)])
        one = Collapse.of(r, load_2E, tokens_2)
        if one.differs and tokens_2.all():
            effect = data.design_effect(r) if data.documents_known else LONG_DOCUMENT
            share = load_2E[:, one.expert].sum() / tokens_2.sum()
            error = math.sqrt(effect * share * (1 - share) * (1 / tokens_2).sum())
            if one.share - one.other_share > z_of(ALPHA / len(data.pairs)) * error:
                beyond.append(one)
    assumed = "" if data.documents_known else f"; {BEYOND_LONG_DOCUMENTS}"
    yield from collapse_findings(data, beyond, assumed)


def _severity(data: Loads, beyond: pd.DataFrame, shift: str) -> Severity:
    """Severity of a shift of the load of these routers, which is beyond chance. Without known
    documents, a shift that other text may explain is a note. shift: the column of the shift."""
    if not len(beyond):
        return "good"
    moved = zip(beyond[shift], beyond[f"{shift}_floor"], strict=True)
    sure = data.documents_known or any(beyond_documents(*pair) for pair in moved)
    return "warning" if sure else "note"


def by_step(data: Loads) -> Iterator[Finding]:
    """Since which step the load differs, and which steps are not compared."""
    steps, W = data.steps, len(data.steps.first_W)
    if steps.why_none:
        yield finding("by_step", "note", f"Not compared step by step: {steps.why_none}.")
        return
    if W < 2 and not any(steps.left_out):
        return
    rows = data.tables["diverged"].dropna(subset=["since_step"])
    rows = rows.sort_values("since_step", kind="stable")
    about, since = None, None
    text = (
        f"Step by step, no load differs by more than {data.chance}, in "
        f"{plural(W, 'window')} of {steps.units} {steps.first_W[0]:,} to {steps.last_W[-1]:,}."
    )
    if len(rows):
        about, since = data.place(int(rows["router"].iloc[0])), int(rows["since_step"].iloc[0])
        most = rows.iloc[rows["most_load_shift"].argmax()]
        text = (
            f"Step by step: {_since(data, rows)}. Most in {steps.units} "
            f"{int(most['most_first_step']):,} to {int(most['most_last_step']):,}, where "
            f"{most['most_load_shift']:.2%} of the load moves in layer "
            f"{data.label(int(most['router']))} (chance alone: "
            f"{most['most_load_shift_floor']:.2%})."
        )
    lacking = [f"{left} of {name}" for name, left in zip("AB", steps.left_out, strict=True) if left]
    if lacking:
        text += (
            f" Left out: {steps.units} {' and '.join(lacking)}, missing in the other; the totals "
            "include them."
        )
    values: Row = {"since_step": since, "windows": W, "routers": len(rows)}
    severity = _severity(data, rows, "most_load_shift")
    yield finding("by_step", severity, text, about, **values, left_out=steps.left_out)


def _since(data: Loads, rows: pd.DataFrame) -> str:
    """The steps from which the load of routers differs, in words."""
    steps, parts = data.steps, list[str]()
    for since, frame in rows.groupby("since_step"):
        is_first = since == steps.first_W[0]
        start = f"the first {steps.unit}" if is_first else f"{steps.unit} {since:,}"
        fewest, most = frame["beyond_chance_since"].min(), frame["beyond_chance_since"].max()
        parts.append(
            f"from {start} on in {_layers(data, [*frame['router']])} "
            f"({'at least ' if fewest < most else ''}{fewest:,} of the "
            f"{plural(int(frame['windows_since'].iloc[0]), 'window')} since)"
        )
    text = f"the load differs by more than {data.chance} {join_first(parts, MOST_NAMED, '; ')}"
    same = [r for r, _ in data.pairs if r not in set(rows["router"])]
    return f"{text}; not in {_layers(data, same)}" if same else text


def _layers(data: Loads, routers: list[int]) -> str:
    return layers_named([data.label(r) for r in routers], MOST_NAMED)


def balances(data: Loads) -> Iterator[Finding]:
    """How even the load of each trace is."""
    rows = data.tables["balance"].dropna(subset=["max_over_mean_a", "max_over_mean_b"])
    if not len(rows):
        return
    parts, values = list[str](), Row()
    for side in SIDES:
        ratio, dead = rows[f"max_over_mean_{side}"], int(rows[f"dead_experts_{side}"].sum())
        worst = data.label(int(rows["router"].iloc[ratio.argmax()]))
        chance = rows[f"expected_by_chance_{side}"].median()
        values |= {f"max_over_mean_{side}": ratio.median(), f"dead_experts_{side}": dead}
        parts.append(
            f"{side.upper()} has {ratio.median():.2f}x in the median layer (expected by chance: "
            f"{chance:.2f}x), {ratio.max():.2f}x in layer {worst}, and {plural(dead, 'expert')} "
            "without load"
        )
    text = f"Load of the busiest expert ÷ mean load: {'; '.join(parts)}."
    yield finding("balance", "note", text, **values)


def counts_only(data: Loads) -> Iterator[Finding]:
    """That only the load is compared, and what that leaves open."""
    names = [name for name, x in zip("AB", data.traces, strict=True) if x.counts_only]
    text = (
        f"{' and '.join(names)} {'hold' if len(names) > 1 else 'holds'} counts only: only loads "
        "are compared, not decisions. It is unknown whether both saw the same text; different text "
        "changes the load too."
    )
    yield finding("counts_only", "note", text)


def warnings(data: Loads) -> Iterator[Finding]:
    """Why the counts of a trace are incomplete."""
    for side, report in zip(SIDES, data.reports, strict=True):
        if report.warning:
            text = f"{side.upper()}: {report.warning}."
            yield finding("incomplete", "warning", text, trace=side)


# in the order in which they are read
CHECKS = (
    *(shifted, collapsed, by_step, balances, counts_only, warnings),
    result.missing_layers,
)


# --- windows of the steps that both traces have

STEP, PASS = "step", "forward pass"
UNITS = {STEP: "steps", PASS: "forward passes"}


@dataclass(frozen=True)
class StepWindows:
    """The load of two traces in windows of steps."""

    first_W: np.ndarray  # int64: the first and last step of each window
    last_W: np.ndarray
    load_2WE: dict[int, np.ndarray]  # int64, by router of A
    unit: str  # what a step is
    left_out: tuple[str, ...]  # of A and of B, the steps in no window, as text
    why_none: str  # why there is no window, or ""

    @property
    def units(self) -> str:
        return UNITS[self.unit]


def step_windows(data: Loads) -> StepWindows:
    """Cut windows wherever both traces were committed at the same step: one shard of a trace may
    be several of the other. Windows of which a trace has only a part are left out; if there are
    very many, neighbours are joined."""
    traces, pairs = data.traces, data.pairs
    units, why_none = [STEP if trace.is_history else PASS for trace in traces], ""
    for name, trace in zip("AB", traces, strict=True):
        if trace.by_document or not trace.counts_only:
            holds = "counts by document" if trace.counts_only else "decisions"
            why_none = why_none or f"{name} holds {holds}, not counts by step"
    if why_none:
        units = [PASS]
    elif units[0] != units[1]:
        in_a, in_b = ("steps of a training run" if x == STEP else UNITS[x] for x in units)
        why_none = f"A counts {in_a}, B {in_b}"
    spans = [] if why_none else [_spans(trace) for trace in traces]
    first_W, last_W, windows = _windows(spans)
    left_out = tuple(_steps(x[w < 0]) for x, w in zip(spans, windows, strict=True)) or ("", "")
    if spans and not len(first_W):
        why_none = f"A has {UNITS[units[0]]} {left_out[0]}, B {left_out[1]}"
    sizes = {r: traces[0].routers[r].experts for r, _ in pairs}
    W = min(len(first_W), max(WINDOWS, WINDOW_CELLS // max(1, sum(sizes.values()))))
    joined_W = np.arange(len(first_W)) * W // max(1, len(first_W))
    start_W = np.searchsorted(joined_W, np.arange(W))
    end_W = np.searchsorted(joined_W, np.arange(W), "right") - 1
    load_2WE = {r: np.zeros((2, W, E), np.int64) for r, E in sizes.items()}
    for side, window_N in enumerate(windows):
        parts = by_shard(traces[side], None, count_shard, data.reports[side].selection, BASE)
        for w, counts in zip(window_N, parts, strict=True):
            for pair in pairs if w >= 0 else ():
                load_2WE[pair[0]][side, joined_W[w]] += counts.load_E(pair[side])
    return StepWindows(first_W[start_W], last_W[end_W], load_2WE, units[0], left_out, why_none)


def _spans(trace: Trace) -> np.ndarray:
    """The first and last step of every shard, and its rank. int64 [N, 3]"""
    spans, following = list[tuple[int, int, int]](), dict[int, int]()
    for shard in trace.shards:
        files = shard.files
        first = files.first_batch
        if first is None:  # counts need not state it: it follows the shard before
            first = min(following.get(files.rank, int(trace.is_history)), files.last_batch)
        spans.append((first, files.last_batch, files.rank))
        following[files.rank] = files.last_batch + 1
    return np.array(spans, np.int64).reshape(-1, 3)


def _windows(spans: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """first_W and last_W; and for each trace, the window of every shard, −1 for none. [N]"""
    every = np.concatenate([np.zeros((0, 3), np.int64), *spans])
    edges = np.unique(np.r_[every[:, 0], every[:, 1] + 1])
    # an edge within a shard of either trace is not an edge of both
    within = np.zeros(len(edges) + 1, np.int64)
    np.add.at(within, np.searchsorted(edges, every[:, 0], "right"), 1)
    np.add.at(within, np.searchsorted(edges, every[:, 1], "right"), -1)
    edges = edges[within.cumsum()[:-1] == 0]
    steps_W = np.diff(edges)
    complete_W, windows = np.ones(len(steps_W), bool), list[np.ndarray]()
    for first_N, last_N, rank_N in (x.T for x in spans):
        window_N = np.searchsorted(edges, first_N, "right") - 1
        recorded_W = np.zeros(len(steps_W), np.int64)
        np.add.at(recorded_W, window_N, last_N - first_N + 1)
        complete_W &= recorded_W == steps_W * len(np.unique(rank_N))  # every rank has all steps
        windows.append(window_N)
    number_W = np.where(complete_W, complete_W.cumsum() - 1, -1)
    first_W, last_W = edges[:-1][complete_W], edges[1:][complete_W] - 1
    return first_W, last_W, [number_W[window_N] for window_N in windows]


def _steps(spans: np.ndarray) -> str:
    """The steps of shards as text, neighbours together: "1 to 20, 41 to 60"; "" without any."""
    runs = list[list[int]]()
    for first, last, _ in sorted(spans.tolist()):
        if runs and first <= runs[-1][1] + 1:
            runs[-1][1] = max(last, runs[-1][1])
        else:
            runs.append([first, last])
    return ", ".join(f"{a:,} to {b:,}" if a < b else f"{a:,}" for a, b in runs)
