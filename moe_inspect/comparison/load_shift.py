"""Two traces of which one holds counts only, compared by the load of the experts. `layer, router`
are A's.

E experts, W windows of steps. An axis of 2 is the two traces.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property

import numpy as np
import pandas as pd

from moe_inspect.analysis.counting.select import select
from moe_inspect.analysis.metrics import two_traces as tt
from moe_inspect.analysis.metrics.balance import max_vio, nan_for_zero
from moe_inspect.analysis.metrics.chance import ALPHA, FEWEST_TO_JUDGE, LONG_DOCUMENT, z_of
from moe_inspect.analysis.metrics.registry import metrics_of
from moe_inspect.analysis.metrics.uncertainty import special
from moe_inspect.analysis.metrics.windows import step_floors, step_total_variation
from moe_inspect.comparison import result
from moe_inspect.comparison.diagnosis import Collapse, said_of_collapse
from moe_inspect.comparison.pairing import layers_named
from moe_inspect.comparison.result import LOAD_TABLES, Row
from moe_inspect.comparison.steps import StepWindows, step_windows
from moe_inspect.reporting.charts import spec
from moe_inspect.reporting.report import Report
from moe_inspect.reporting.tables.load import design_effect
from moe_inspect.reporting.tables.registry import table
from moe_inspect.reporting.verdict.findings import (
    BEYOND_LONG_DOCUMENTS,
    Finding,
    Severity,
    beyond_documents,
    capital,
    finding,
)
from moe_inspect.text import format_ratio, join_first, plural
from moe_inspect.trace.reader import Trace

SIDES: tuple[str, str] = ("a", "b")
COLOURS: dict[str, str] = dict(zip(SIDES, ("c1", "c2"), strict=True))


class Loads(result.Paired):
    """Traces A and B, at least one of which holds counts only, each with its report; they may still
    be written. Nothing is counted before it is asked for."""

    refused = result.OF_DECISIONS

    def __init__(
        self, a: Trace, b: Trace, options: result.PairSettings, progress: result.Progress = None
    ):
        super().__init__(a, b, options)
        self.reports: dict[str, Report] = {}
        for side, trace, routers in zip(SIDES, (a, b), zip(*self.pairs, strict=True), strict=True):
            layers = sorted({trace.routers[r].layer for r in routers})
            selection = select(trace, layers, options.domains, options.phase)
            self.reports[side] = Report(trace, selection, progress=progress)

    @property
    def why(self) -> str:
        of = dict.fromkeys(str(trace.path) for trace in self.traces if trace.counts_only)
        return f"{' and '.join(of)} {'hold' if len(of) > 1 else 'holds'} counts only, no decisions"

    @property
    def shown_tables(self) -> list[str]:
        several = len(self.steps.first_W) > 1
        return [name for name in self.kind.excerpts if several or name != "diverged"]

    @cached_property
    def steps(self) -> StepWindows:
        """The load in windows of the steps that both traces have."""
        selections = [self.reports[side].selection for side in SIDES]
        return step_windows(self.traces, selections, self.pairs)

    def load_2E(self, router: int) -> np.ndarray:
        """float64 [2, E]: the load of a router of A, and of the one of B that goes with it."""
        of = (self.of(side, "load", router)["assignments"] for side in SIDES)
        return np.stack([assignments.to_numpy(float) for assignments in of])

    def design_effect(self, router: int) -> float:
        """How much more than of independent tokens the load varies, if decisions tell it."""
        mine = {"a": router, "b": dict(self.pairs)[router]}
        effects = (design_effect(self.reports[side].counts, mine[side]) for side in SIDES)
        return float(np.nanmax([1.0, *effects]))

    @cached_property
    def documents_known(self) -> bool:
        """Whether a trace tells how alike the tokens of a document are."""
        every = [made.counts for made in self.reports.values()]
        units = [len(counts.units) for counts in every if not counts.documents_unknown]
        return max(units, default=0) >= FEWEST_TO_JUDGE

    @property
    def chance(self) -> str:
        """What the floors are of."""
        return "chance" if self.documents_known else "chance of independent tokens"

    def of(self, side: str, table: str, router: int) -> pd.DataFrame:
        """The rows of a table of one trace's report about a router of A, or the one of B."""
        r = dict(self.pairs)[router] if side == "b" else router
        rows = self.reports[side].tables[table]
        return rows[rows["router"] == r]


BALANCE = tuple(metrics_of("balance", {"load_LE"}))
NUMBERS = ("dead_experts", "starved_experts")  # whole, and may be missing
# the floor is a mean, and counts know no documents, whose tokens are alike: as in the report on
# counts, what is below twice the floor may be chance
BEYOND = 2
IN_A_ROW = 3  # windows beyond chance from which on two runs differ: a single one may be chance
WINDOW = ("first_step", "last_step", "load_shift", "load_shift_floor")
DIVERGED_TYPES = {
    **dict.fromkeys(("layer", "router", "windows", "windows_beyond_chance"), "int64"),
    "since_step": "Int64",
    **dict.fromkeys(("windows_since", "beyond_chance_since"), "int64"),
    **{f"most_{name}": "int64" if "step" in name else "float64" for name in WINDOW},
}


@table(tables=LOAD_TABLES)
def refused(data: Loads) -> pd.DataFrame:
    """One row per table that these traces cannot have, and why."""
    names = [name for name in result.TABLES if name not in LOAD_TABLES]
    return pd.DataFrame({"table": names, "why": data.why}).astype("str")


@table(tables=LOAD_TABLES)
def summary(data: Loads) -> pd.DataFrame:
    """One row per fact: key, and its value in A and in B (text)."""
    both, counts = data.traces, [data.reports[side].counts for side in SIDES]
    facts = {
        "holds": ["counts" if trace.counts_only else "decisions" for trace in both],
        "status": [trace.status for trace in both],
        "tokens": [of.tokens for of in counts],
        "domains": [", ".join(of.domains) for of in counts],
    }
    models = [trace.manifest.get("model") or {} for trace in both]
    of_key = {f"model_{k}": [of.get(k) or "" for of in models] for k in ("id", "revision", "class")}
    of_both = {"trace": [trace.path for trace in both], **of_key, **facts}
    return result.facts_table(of_both, SIDES)


@table(
    by_router=tuple(f"{name}_{x}" for name in BALANCE for x in (*SIDES, "difference")),
    tables=LOAD_TABLES,
)
def balance(data: Loads) -> pd.DataFrame:
    """One row per router: the balance in A, in B, and B's minus A's, beside chance."""
    of_side = dict[str, pd.DataFrame]()
    for side, routers in zip(SIDES, zip(*data.pairs, strict=True), strict=True):
        of_side[side] = data.reports[side].tables["balance"].set_index("router").loc[[*routers]]
    a, b = of_side.values()
    frame = a.reset_index()[["layer", "router", "experts", "top_k"]].astype("int64")
    for side, of in of_side.items():
        frame[f"tokens_{side}"] = of["tokens"].to_numpy("int64")
    for name in BALANCE:
        kind = "Int64" if name in NUMBERS else "float64"
        of_a, of_b = (of[name].to_numpy(float, na_value=np.nan) for of in (a, b))
        columns = {"a": of_a, "b": of_b, "difference": of_b - of_a}
        for end, values in columns.items():
            frame[f"{name}_{end}"] = pd.Series(values).astype(kind)
    for side, of in of_side.items():
        frame[f"expected_by_chance_{side}"] = of["expected_by_chance"].to_numpy()
    return frame


@table(by_router=("load_shift", "jsd_bits"), tables=LOAD_TABLES)
def load_shift(data: Loads) -> pd.DataFrame:
    """One row per router: how far apart the load of the two traces is, and how far chance alone
    takes two traces of so many tokens that route alike (…_floor)."""
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
    """One row per router and window of steps that both traces have: how far apart their load is,
    beside chance, how even each is, and the expert whose load differs most."""
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
    """One row per router: in how many windows of steps the load differs by more than chance, since
    which step (of IN_A_ROW windows in a row that do; empty without), and where it differs most."""
    rows = list[Row]()
    for r, of in data.tables["windows"].groupby("router", sort=False):
        beyond_W, most = of["beyond_chance"].to_numpy(bool), of["load_shift"].fillna(-1).argmax()
        in_a_row = np.lib.stride_tricks.sliding_window_view(beyond_W, min(IN_A_ROW, len(of)))
        runs = np.flatnonzero(in_a_row.all(1))
        start = int(runs[0]) if len(runs) else len(of)
        row = {
            "windows": len(of),
            "windows_beyond_chance": int(beyond_W.sum()),
            "since_step": of["first_step"].iloc[start] if len(runs) else pd.NA,
            "windows_since": len(of) - start,
            "beyond_chance_since": int(beyond_W[start:].sum()),
        }
        row |= {f"most_{name}": of[name].iloc[most] for name in WINDOW}
        rows.append({"layer": of["layer"].iloc[0], "router": r, **row})
    return pd.DataFrame(rows, columns=list(DIVERGED_TYPES)).astype(DIVERGED_TYPES)


def times_floor(data: Loads, r: int) -> float:
    """How many times its floor the total variation of two loads must be to be beyond chance, at
    ALPHA for all routers together. The fewer experts the load varies over, the more the distance
    itself varies: over n (counted by how much each varies, as of two that share all tokens), it is
    taken for a chi variable of n − 1 degrees of freedom."""
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
    every = [[data.of(side, "load", r) for r, _ in data.pairs] for side in SIDES]
    a, b = (pd.concat(of, ignore_index=True) for of in every)
    frame = a[["layer", "router", "expert"]].copy()
    for name in ("assignments", "share", "load_ratio"):
        frame[f"{name}_a"], frame[f"{name}_b"] = a[name], b[name]
        if name != "assignments":  # which also differ with the number of tokens
            frame[f"{name}_difference"] = b[name] - a[name]
    return frame


MOST_NAMED = 4  # layers, or steps, in a sentence


def shifted(data: Loads) -> Iterator[Finding]:
    """Whether the load differs by more than chance; the headline."""
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
    whose = f"the load of {n} of {plural(len(rows), 'router')} differs" if n else "no load differs"
    text = (
        f"{capital(whose)} by more than {data.chance}: up to {moved:.2%} of it moves, in layer "
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
    """Of counts, where no documents explain such a difference of the shares."""
    found = list[Collapse]()
    for r, _ in data.pairs:
        load_2E = data.load_2E(r)
        tokens_2 = np.array([data.of(side, "balance", r)["tokens"].iloc[0] for side in SIDES])
        one = Collapse.of(r, load_2E, tokens_2)
        if one.differs and tokens_2.all():
            effect = data.design_effect(r) if data.documents_known else LONG_DOCUMENT
            share = load_2E[:, one.expert].sum() / tokens_2.sum()
            error = math.sqrt(effect * share * (1 - share) * (1 / tokens_2).sum())
            if one.share - one.other_share > z_of(ALPHA / len(data.pairs)) * error:
                found.append(one)
    assumed = f"; {BEYOND_LONG_DOCUMENTS}"
    yield from said_of_collapse(data, found, "" if data.documents_known else assumed)


def _severity(data: Loads, beyond: pd.DataFrame, shift: str) -> Severity:
    """Severity of a difference of the load of these routers, which is beyond chance. Other text
    exceeds the floor of independent tokens. shift: the column that says by how much."""
    moved = zip(beyond[shift], beyond[f"{shift}_floor"], strict=True)
    if any(of[0] > of[1] if data.documents_known else beyond_documents(*of) for of in moved):
        return "warning"
    return "note" if len(beyond) else "good"


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
    steps, said = data.steps, list[str]()
    for since, of in rows.groupby("since_step"):
        first = since == steps.first_W[0]
        start = f"the first {steps.unit}" if first else f"{steps.unit} {since:,}"
        fewest, most = of["beyond_chance_since"].min(), of["beyond_chance_since"].max()
        said.append(
            f"from {start} on in {_layers(data, [*of['router']])} "
            f"({'at least ' if fewest < most else ''}{fewest:,} of the "
            f"{plural(int(of['windows_since'].iloc[0]), 'window')} since)"
        )
    text = f"the load differs by more than {data.chance} {join_first(said, MOST_NAMED, '; ')}"
    same = [r for r, _ in data.pairs if r not in set(rows["router"])]
    return f"{text}; not in {_layers(data, same)}" if same else text


def _layers(data: Loads, routers: list[int]) -> str:
    return layers_named([data.label(r) for r in routers], MOST_NAMED)


def said_of_balance(data: Loads) -> Iterator[Finding]:
    rows = data.tables["balance"].dropna(subset=["max_over_mean_a", "max_over_mean_b"])
    if not len(rows):
        return
    said, values = list[str](), Row()
    for side in SIDES:
        ratio, dead = rows[f"max_over_mean_{side}"], int(rows[f"dead_experts_{side}"].sum())
        worst = data.label(int(rows["router"].iloc[ratio.argmax()]))
        chance = rows[f"expected_by_chance_{side}"].median()
        values |= {f"max_over_mean_{side}": ratio.median(), f"dead_experts_{side}": dead}
        said.append(
            f"{side.upper()} has {ratio.median():.2f}x in the median layer (expected by chance: "
            f"{chance:.2f}x), {ratio.max():.2f}x in layer {worst}, and {plural(dead, 'expert')} "
            "without load"
        )
    text = f"Load of the busiest expert ÷ mean load: {'; '.join(said)}."
    yield finding("balance", "note", text, **values)


def counts_only(data: Loads) -> Iterator[Finding]:
    """That only the load is compared, and what that leaves open."""
    of = [name for name, x in zip("AB", data.traces, strict=True) if x.counts_only]
    text = (
        f"{' and '.join(of)} {'hold' if len(of) > 1 else 'holds'} counts only: only loads are "
        "compared, not decisions. It is unknown whether both saw the same text; different text "
        "changes the load too."
    )
    yield finding("counts_only", "note", text)


def not_compared(data: Loads) -> Iterator[Finding]:
    """The tables of decisions that counts cannot have."""
    names = data.tables["refused"]["table"].tolist()
    text = f"Tables left out: {', '.join(names)}: {data.why}."
    yield finding("refused", "note", text, tables=names, why=data.why)


def warnings(data: Loads) -> Iterator[Finding]:
    for side in SIDES:
        if said := data.reports[side].warning:
            yield finding("incomplete", "warning", f"{side.upper()}: {said}.", trace=side)


def shift_chart(data: Loads) -> spec.Chart:
    """How far the load moves, beside chance."""
    text = (
        "The share of the assignments that go to different experts. The dash is what chance alone "
        "moves between two traces of this many tokens."
    )
    return result.load_that_moves(data, "load_shift_floor", "chance", text)


def balance_chart(data: Loads) -> spec.Chart:
    """How even the load is in each."""
    table = data.tables["balance"]
    x, marks = np.arange(len(table), dtype=float), list[spec.Line]()
    for side, colour in COLOURS.items():
        names = ("max_over_mean", "expected_by_chance")
        ratio, floor = (table[f"{name}_{side}"].to_numpy(float) for name in names)
        marks.append(spec.Line(x, ratio, side.upper(), colour, dots=True))
        marks.append(spec.Line(x, floor, f"{side.upper()}: chance", colour, dash="dot"))
    return spec.Chart(
        "How even the load is",
        "Load of the busiest expert ÷ mean load",
        (spec.Panel(tuple(marks), data.layers_axis, spec.Axis("max ÷ mean load", low=1)),),
        text="1 is even.",
        table=table,
    )


def step_chart(data: Loads) -> spec.Chart | str:
    """How far the load moves in every window of steps; none where there are not two of them."""
    steps, table, moved = data.steps, data.tables["windows"], "share of the load that moves"
    if len(steps.first_W) < 2:
        return ""
    shape, names = (len(data.pairs), -1), ("load_shift", "load_shift_floor")
    moved_LW, floor_LW = (table[name].to_numpy(float).reshape(shape) for name in names)
    limit_LW = floor_LW * np.array([[times_floor(data, r)] for r, _ in data.pairs])
    labels = tuple(f"{step:,}" for step in steps.first_W)
    time = spec.Axis(f"first {steps.unit} of the window", labels)
    x = np.arange(len(labels), dtype=float)
    if len(moved_LW) <= spec.MOST_LINES:
        chance_W = np.nan_to_num(limit_LW).max(0)
        marks: list[spec.Mark] = [spec.Band(x, 0 * x, chance_W, "may be chance")]
        for i, (label, moved_W) in enumerate(zip(data.layers_axis.labels, moved_LW, strict=True)):
            marks.append(spec.Line(x, moved_W, f"layer {label}", *spec.look(i)))
        panel = spec.Panel(tuple(marks), time, spec.Axis(moved, low=0))
    else:
        beyond_LW = np.maximum(moved_LW - limit_LW, 0)
        high = float(np.nan_to_num(beyond_LW).max()) or 1.0
        scale = spec.Scale("amount", f"{moved}, beyond chance", 0.0, high)
        panel = spec.Panel((spec.Heatmap(beyond_LW, scale),), time, data.layers_axis)
    return spec.Chart(
        "Since which step",
        f"How far the load of B is from that of A in the same {steps.units}, by layer",
        (panel,),
        text="Diverging runs leave the band of chance and stay outside. A window lies between two "
        f"{steps.units} at which both traces were written to disk; the table shows since "
        f"which {steps.unit} each layer differs.",
        table=data.tables["diverged"],
        definitions={
            "may be chance": "up to twice the total variation expected between two windows of this "
            "many tokens with equal routers; more where few experts have most of the load."
        },
    )


OF_BOTH = (f"{name}_{side}" for name in ("dead_experts", "entropy") for side in SIDES)
Loads.kind = result.ComparisonKind(
    of="counts",
    tables=LOAD_TABLES,
    main="load_shift",
    checks=(
        *(shifted, collapsed, by_step, said_of_balance, counts_only, warnings),
        *(result.missing_layers, not_compared),
    ),
    title="The load of two traces",
    footer="Counts hold the load of experts, no decisions.",
    charts={
        "load_shift": (shift_chart, "Change of the load", "load_shift"),
        "by_step": (step_chart, "Change of the load", "diverged"),
        "max_vio": (balance_chart, "Load of each trace", "balance"),
    },
    sections={
        "load": ("Load of each trace", "Experts", ""),
        "summary": ("", "About these traces", ""),
        "refused": ("", "Tables left out", ""),
    },
    excerpts={
        "load_shift": result.highest("load_shift"),
        "diverged": result.highest("most_load_shift"),
        "balance": result.highest(
            "max_vio_b",
            *("layer", "router", "max_vio_a", "max_vio_b", "max_vio_difference", *OF_BOTH),
        ),
    },
)
