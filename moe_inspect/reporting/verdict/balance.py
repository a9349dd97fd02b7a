"""How even the load of the routers is, what unevenness costs, and what averages hide.

Each check takes the report's data and returns one Finding or none. What chance can explain is never
called a fault.
"""

from __future__ import annotations

import math

import numpy as np

from moe_inspect.analysis.metrics import chance
from moe_inspect.analysis.metrics.chance import ALPHA, z_of
from moe_inspect.analysis.metrics.uncertainty import noise_of
from moe_inspect.reporting.tables.data import ReportData, Row, records, whole_batches, worst_of
from moe_inspect.reporting.tables.load import chosen
from moe_inspect.reporting.verdict import findings as fnd
from moe_inspect.reporting.verdict.data_checks import ranks_are_missing
from moe_inspect.reporting.verdict.findings import Finding, check, name_of, note, uneven
from moe_inspect.text import join_first, plural

COLLAPSED = 0.5  # share of a router's tokens that go to one expert


@check("load")
def balance(data: ReportData) -> Finding:
    """The headline: the router with the most uneven load, and whether that is a fault. Of what
    routers chose, before drops, where that is known."""
    rows = chosen(data)
    row, n = worst_of(rows), sum(uneven(data, row) for row in rows)
    if row is None:
        return fnd.critical("No router made any assignments: there is no load to judge.")
    severity, text = _judged(data, row, n, len(rows))
    ratio = ("max_over_mean", "max_over_mean_low", "max_over_mean_high", "expected_by_chance")
    return fnd.found(
        severity,
        text,
        row,
        expert=row["busiest_expert"],
        **{name: row[name] for name in ratio},
        token_share=_token_share(row),
        uneven_routers=n,
        routers=len(rows),
    )


def _judged(data: ReportData, row: Row, n: int, routers: int) -> tuple[fnd.Severity, str]:
    """What the worst row comes to, where n of the routers are uneven."""
    least = data.thresholds.uneven
    threshold = f"at least {1 + least:g}x and {fnd.beyond(data)}"
    where, by_chance = name_of(data, row), fnd.expected_by_chance(data, row)
    busiest = f"expert {int(row['busiest_expert'])} gets {row['max_over_mean']:.2f}x the mean load"
    if row["drop_rate"] > 0:
        before = f" before drops, {fnd.load_after(data, row)}"
        busiest += before if row["dropped"] > 0 else " after drops"
    if fnd.few_documents(data):
        return "note", (
            f"Too little data to judge balance: at worst, in {where}, {busiest} ({by_chance}), but "
            f"{fnd.FEW_DOCUMENTS}"
        )
    of = f"{n} of {routers} routers {'is' if n == 1 else 'are'} uneven ({threshold})"
    evidence = f"({_interval(row)}; {by_chance})"
    if uneven(data, row):
        overloaded = row["max_over_mean"] >= data.thresholds.overloaded
        severity = "critical" if overloaded and _token_share(row) >= COLLAPSED else "warning"
        if routers == 1:
            return severity, f"{fnd.capital(where)} is uneven ({threshold}): {busiest} {evidence}."
        worst = f"{fnd.capital(where)} is the worst balanced: {busiest} {evidence}"
        return severity, f"{worst}. {fnd.capital(of)}."
    dead = any(row["dead_experts"] for row in data.loaded)
    fine = "No expert is overloaded" if dead else "Balanced"
    if fnd.above_chance(data, row):
        return "good", f"{fine}: at worst, in {where}, {busiest} {evidence}."
    few = row["expected_by_chance"] >= 1 + least or row["max_vio"] >= least
    others = f"; {of}" if few and n else ""
    why = f"{busiest}, which {fnd.explained(data, row, sure=not few)} {evidence}{others}."
    said = "Too little data to judge balance" if few else fine
    if few and data.counts.documents_unknown and row["expected_by_chance"] < 1 + least:
        said = "Counts alone cannot tell whether the load is even"
    return "note" if few else "good", f"{said}: at worst, in {where}, {why}"


def _token_share(row: Row) -> float:
    """Share of the router's tokens that go to its busiest expert."""
    return round(row["max_over_mean"] * row["assignments"] / row["experts"]) / row["tokens"]


def _interval(row: Row) -> str:
    # at the ceiling of max_over_mean resampling documents moves nothing
    if row["assignments"] < row["experts"] * row["tokens"] and _token_share(row) == 1:
        return "every token goes to it"
    if math.isnan(row["max_over_mean_low"]):
        return "no interval from counts alone"
    return f"95% interval {row['max_over_mean_low']:.2f}-{row['max_over_mean_high']:.2f}x"


@check("load")
def training_alarms(data: ReportData) -> Finding | None:
    """The alarms over the windows of a training history, of which the pooled load shows little."""
    if data.history is None:
        return None
    windows, routers = plural(data.history.windows, "window"), set(data.selection.routers)
    alarms = [alarm for alarm in data.history.alarms if alarm.router in routers]
    if not alarms:
        return fnd.good(f"No alarm in {windows} of training.", alarms=0)
    first = alarms[0]
    others = f" {len(alarms) - 1} more: moe-inspect watch." if len(alarms) > 1 else ""
    text = f"{plural(len(alarms), 'alarm')} in {windows} of training. The first: {first}{others}"
    place = {"layer": first.layer, "router": first.router}
    return fnd.warning(text, place, alarms=len(alarms), step=first.step, since=first.since)


@check("load")
def routers_without_load(data: ReportData) -> Finding | None:
    """Routers that made no assignments, where others did."""
    table = data.tables["balance"]
    silent = records(table[table["assignments"] == 0])
    if not silent or len(silent) == len(table):
        return None
    names = join_first([name_of(data, row) for row in silent])
    said = f"{len(silent)} of {len(table)} routers made no assignments: {names}."
    about, routers = silent[0] if len(silent) == 1 else None, [int(row["router"]) for row in silent]
    return fnd.critical(said, about, routers_without_load=routers, routers=len(table))


@check("cost")
def busiest_gpu(data: ReportData) -> Finding | None:
    """What unevenness comes to on GPUs: a layer is done when its busiest GPU is."""
    if ranks_are_missing(data):
        unknown = note("What imbalance costs is unknown: ranks are missing.")
        return None if data.costs is None else unknown
    if data.costs is not None:
        return note(" ".join(data.costs.said))
    worst = worst_of(data.loaded)
    if worst is None or not uneven(data, worst):
        return None
    mean_R = [row["assignments"] / row["experts"] for row in data.loaded]
    most_R = [row["max_over_mean"] * mean for row, mean in zip(data.loaded, mean_R, strict=True)]
    ratio, there = sum(most_R) / sum(mean_R), worst["max_over_mean"]
    alone = f" ({there:.2f}x at {name_of(data, worst)})" if len(data.loaded) > 1 else ""
    said = (
        f"With one GPU per expert, the busiest GPU of a layer gets {ratio:.2f}x the mean load"
        f"{alone}. What to do: compare placements in milliseconds with moe-inspect simulate "
        "placement, or train with a balancing loss per layer."
    )
    return note(said, worst, busiest_over_mean=ratio, busiest_over_mean_at_worst=there)


@check("cost")
def uneven_batches(data: ReportData) -> Finding | None:
    """What the sum over forward passes hides: each pass waits for its own busiest expert. That
    passes of few documents are less even than their sum is true of any model, and a note."""
    hidden = [row for row in data.loaded if _hidden(data, row) > 0]
    row = max(hidden, key=lambda row: row["max_vio_batch"] - row["max_vio"], default=None)
    if row is None or row["max_vio_batch"] < data.thresholds.uneven:
        return None
    passes = sum(n for n, _ in data.counts.of[int(row["router"])].batches.values())
    whole = int(_passes(data, row)[1].sum())
    larger = f"of {whole:,} of {passes:,} passes, the larger ones; " if whole < passes else ""
    batch, expected = 1 + row["max_vio_batch"], 1 + row["noise_floor_batch"]
    effect, cause = row["design_effect"], ""
    if math.isnan(effect) or fnd.few_documents(data):
        cause = " Whether its documents explain this is unknown: there are too few of them."
    elif not _beyond_documents(data, row):
        cause = (
            f" Each pass holds few documents, and tokens of one document choose alike (design "
            f"effect {effect:.1f}): larger or better mixed passes are more even."
        )
    said = (
        f"Single passes are less balanced than the total, most in {name_of(data, row)}: the "
        f"busiest expert of a pass gets {batch:.2f}x the mean load on average ({larger}"
        f"expected by chance: {expected:.2f}x), over all passes {row['max_over_mean']:.2f}x.{cause}"
    )
    values = {"max_over_mean_batch": batch, "max_over_mean": row["max_over_mean"]}
    values |= {"expected_by_chance": expected}
    return fnd.found("note" if cause else "warning", said, row, **values)


def _hidden(data: ReportData, row: Row) -> float:
    """How much less even passes are than their sum, beyond what chance gives; else at most 0."""
    tokens_S, passes_S = _passes(data, row)
    if passes_S.sum() < 2:
        return 0.0
    filled = data.counts.filled(int(row["router"]))
    _, sd_S = noise_of(tokens_S * filled, int(row["experts"]), int(row["top_k"]), filled)
    error = np.sqrt((passes_S * sd_S**2).sum()) / passes_S.sum()
    floor = row["noise_floor_batch"] + z_of(ALPHA / len(data.loaded)) * error
    return row["max_vio_batch"] - row["max_vio"] - floor


def _beyond_documents(data: ReportData, row: Row) -> bool:
    """Whether passes are less even than passes over the same documents in random order."""
    tokens_S, passes_S = _passes(data, row)
    counts, r = data.counts, int(row["router"])
    documents = counts.of[r].assignments_UE, counts.tokens_U_of(r)
    mean, sd = chance.passes_of_documents(*documents, tokens_S, passes_S)
    error = sd * math.sqrt(1 / passes_S.sum() + 1 / chance.PASSES)
    return bool(row["max_vio_batch"] > mean + z_of(ALPHA / len(data.loaded)) * error)


def _passes(data: ReportData, row: Row) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of the larger passes, and how many passes have so many. [S] each"""
    sizes = whole_batches(data.counts.of[int(row["router"])].batches)
    return np.array(list(sizes)), np.array([n for n, _ in sizes.values()])


@check("averages")
def averaging_hides(data: ReportData) -> Finding | None:
    """An uneven router that the load summed over all routers by expert number would not show."""
    pooled, row = data.pooled_max_over_mean(), worst_of(data.loaded)
    if pooled is None or row is None:
        return None
    if not uneven(data, row) or pooled - 1 > min(data.thresholds.uneven, row["max_vio"] / 2):
        return None
    routers, n = data.trace.routers, len(data.selection.routers)
    of = "layer" if len({routers[r].layer for r in data.selection.routers}) == n else "router"
    over = f"{of}s" if n == len(routers) else f"the {n} {of}s selected"
    said = (
        f"The load summed over {over} by expert number looks even (its busiest expert number gets "
        f"{pooled:.2f}x the mean) and hides {name_of(data, row)}."
    )
    return note(said, row, pooled_max_over_mean=pooled, max_over_mean=row["max_over_mean"])
