"""What the load of two traces comes to: whether it differs by more than chance, where, and how even
each is; as findings and as charts."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pandas as pd

from moe_inspect.analysis.metrics.chance import ALPHA, LONG_DOCUMENT, z_of
from moe_inspect.comparison import result
from moe_inspect.comparison.decisions.verdict import Collapse, said_of_collapse
from moe_inspect.comparison.loads.tables import Loads, times_floor
from moe_inspect.comparison.result import COLOURS, SIDES
from moe_inspect.reporting.charts import spec
from moe_inspect.reporting.tables.registry import Excerpt
from moe_inspect.reporting.verdict.findings import Finding, Severity, beyond_documents, finding
from moe_inspect.text import format_ratio, join_first, plural

MOST_NAMED = 4  # layers, or steps, in a sentence


def shifted(data: Loads) -> Iterator[Finding]:
    """Whether the load differs by more than chance; the headline."""
    rows = data.tables["load_shift"].dropna(subset=["load_shift"])
    if not len(rows):
        yield finding("load_shift", "warning", "No router has load in both traces.")
        return
    limit = rows["load_shift_floor"] * [times_floor(data, int(r)) for r in rows["router"]]
    beyond = rows[rows["load_shift"] > limit]
    n, of = len(beyond), beyond if len(beyond) else rows
    row = of.iloc[of["load_shift"].argmax()]
    r, shifts = int(row["router"]), row[["load_shift", "load_shift_floor"]]
    said = f"No load differs by more than {data.chance}"
    if n:
        of_all = f"{n} of {plural(len(rows), 'router')}"
        said = f"The load of {of_all} differs by more than {data.chance}"
    text = (
        f"{said}: up to {row['load_shift']:.2%} of it moves, in layer {data.label(r)} "
        f"(chance alone moves {row['load_shift_floor']:.2%} with this many tokens)."
    )
    values: result.Row = {"routers": n, **shifts}
    if n:
        load = data.tables["load"]
        load = load[load["router"] == r]
        most = load.iloc[load["load_ratio_difference"].abs().argmax()]
        a, b = (format_ratio(most[f"load_ratio_{side}"]) for side in SIDES)
        text += f" Expert {int(most['expert'])} changes most: {a}x the mean load in A, {b}x in B."
        values["expert"] = int(most["expert"])
    severity = _severity(data, beyond, "load_shift")
    yield finding("load_shift", severity, text, row, **values)


def collapsed(data: Loads) -> Iterator[Finding]:
    """Whether in one of the traces a router sends most of its tokens to one expert, and not in the
    other; of counts, where no documents explain such a difference of the shares."""
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
    assumed = f"; beyond chance up to a design effect of {LONG_DOCUMENT:,}"
    yield from said_of_collapse(data, found, "" if data.documents_known else assumed)


def _severity(data: Loads, beyond: pd.DataFrame, shift: str) -> Severity:
    """Of routers whose load differs by more than the floor; of independent tokens, other text
    exceeds it. shift: the column that says by how much."""
    moved = zip(beyond[shift], beyond[f"{shift}_floor"], strict=True)
    if any(data.documents_known or beyond_documents(*of) for of in moved):
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
    first, since = rows.iloc[0] if len(rows) else None, None
    text = (
        f"Step by step, no load differs by more than {data.chance}, in "
        f"{plural(W, 'window')} of {steps.units} {steps.first_W[0]:,} to {steps.last_W[-1]:,}."
    )
    if first is not None:
        since, most = int(first["since_step"]), rows.iloc[rows["most_load_shift"].argmax()]
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
    values = {"windows": W, "routers": len(rows), "left_out": steps.left_out}
    severity = _severity(data, rows, "most_load_shift")
    yield finding("by_step", severity, text, first, since_step=since, **values)


def _since(data: Loads, rows: pd.DataFrame) -> str:
    """Since which step which layers differ, the earliest first."""
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
    labels = [data.label(r) for r in routers]
    return f"{'layer' if len(labels) == 1 else 'layers'} {join_first(labels, MOST_NAMED, ', ')}"


def balance(data: Loads) -> Iterator[Finding]:
    """How even the load is in each."""
    rows = data.tables["balance"].dropna(subset=["max_over_mean_a", "max_over_mean_b"])
    of_both = ("max_over_mean", "expected_by_chance", "dead_experts")
    of_side = {side: rows.rename(columns={f"{x}_{side}": x for x in of_both}) for side in SIDES}
    yield from result.balance_of_both(of_side, lambda _, r: data.label(r))


def counts_only(data: Loads) -> Iterator[Finding]:
    """That only the load is compared, and what that leaves open."""
    of = [name for name, x in (("A", data.a), ("B", data.b)) if x.counts_only]
    holds = f"{' and '.join(of)} {'hold' if len(of) > 1 else 'holds'} counts only"
    text = (
        f"{holds}: only loads are compared, not decisions. It is unknown whether both saw the "
        "same text; different text changes the load too."
    )
    yield finding("counts_only", "note", text)


def warnings(data: Loads) -> Iterator[Finding]:
    """What to know of a trace before believing its figures."""
    for side in SIDES:
        if said := data.reports[side].warning:
            yield finding("incomplete", "warning", f"{side.upper()}: {said}.", trace=side)


def shift_chart(data: Loads) -> spec.Chart:
    """How far the load moves, beside chance."""
    text = (
        "The share of the assignments that go to different experts. The dash is what chance alone "
        "moves between two traces of this many tokens."
    )
    return result.load_that_moves(data, "load_shift_floor", "chance", text, limited=False)


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


def _excerpt(column: str, *columns: str) -> Excerpt:
    def rows(frame: pd.DataFrame, most: int) -> pd.DataFrame:
        frame = frame.nlargest(most, column) if len(frame) > most else frame
        return frame.sort_values(["layer", "router"])

    return Excerpt(f"the highest {column}", rows, columns)


OF_BOTH = (f"{name}_{side}" for name in ("dead_experts", "entropy") for side in SIDES)
Loads.kind = result.Kind(
    of="counts",
    tables=result.LOAD_TABLES,
    main="load_shift",
    # in the order in which they are read
    checks=(
        *(shifted, collapsed, by_step, balance, counts_only, warnings),
        *(result.missing_layers, result.not_compared),
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
        "refused": ("", "Not compared", ""),
    },
    excerpts={
        "load_shift": _excerpt("load_shift"),
        "diverged": _excerpt("most_load_shift"),
        "balance": _excerpt(
            *("max_vio_b", "layer", "router", "max_vio_a", "max_vio_b", "max_vio_difference"),
            *OF_BOTH,
        ),
    },
)
