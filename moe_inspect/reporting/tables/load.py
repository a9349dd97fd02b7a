"""Tables of the load: of every router, of every expert, and over time, in windows of the trace in
the order of execution. `layer, router` come first. L routers, E experts, U documents, S sizes of
forward passes, W windows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from moe_inspect.analysis.counting.counts import INPUTS, Counts, values_of
from moe_inspect.analysis.metrics import balance as bal
from moe_inspect.analysis.metrics import chance
from moe_inspect.analysis.metrics import specialization as sp
from moe_inspect.analysis.metrics import uncertainty as unc
from moe_inspect.analysis.metrics import windows as win
from moe_inspect.analysis.metrics.registry import metrics_of
from moe_inspect.later import pd
from moe_inspect.reporting.tables.data import ReportData, Row, once, records
from moe_inspect.reporting.tables.registry import AsColumns, as_frame, table

BALANCE = tuple(
    dict.fromkeys(
        [
            *metrics_of("balance", {"load_LE"}),
            *("busiest_expert", "expected_by_chance", "max_over_mean_low", "max_over_mean_high"),
            *("max_vio_batch", "busiest_p", "least_used_p", "empty_slots", "dropped", "drop_rate"),
            *(m.column for m in metrics_of("balance", INPUTS).values()),
        ]
    )
)


UNLISTED = ("min_over_max", "design_effect", "noise_floor_batch")


@table(by_router=BALANCE, unlisted=UNLISTED)
def balance(data: ReportData) -> AsColumns:
    """One row per router: how even its load is, and what is expected by chance."""
    return _balance(data.counts, data.thresholds.starved, data.trace.drops)


def balance_of(counts: Counts) -> pd.DataFrame:
    """Return the balance table of any counts, also of a recording in progress."""
    return as_frame(_balance(counts, bal.STARVED, drops=False)).drop(columns=[*UNLISTED])


def _balance(counts: Counts, starved: float, drops: bool) -> AsColumns:
    p_values = _p_values(counts)

    def values(r: int) -> Row:
        router, load_E, dropped_E = counts.routers[r], counts.load_E(r), counts.dropped_E(r)
        E, k, T, total = router.experts, router.top_k, counts.tokens_of(r), int(load_E.sum())
        low, high, slots, dropped = math.nan, math.nan, k * T, float(dropped_E.sum())
        if not counts.documents_unknown:
            units = counts.of[r].assignments_UE, counts.domain_of_unit_U
            low, high = unc.max_vio_interval(*units)
        most = E * T / total if total else math.nan  # every token goes there
        effect = design_effect(counts, r)
        batch, floor = _by_batch(counts, r)
        lost = slots - total if drops and math.isnan(dropped) else dropped
        return {
            "experts": E,
            "top_k": k,
            "tokens": T,
            "assignments": total,
            **values_of(counts, r, "balance"),
            "min_over_max": load_E.min() / load_E.max() if total else math.nan,
            "starved_experts": float(bal.starved_experts(load_E[None], starved)[0]),
            "busiest_expert": int(bal.busiest_expert(load_E[None])[0]) if total else None,
            "max_over_mean_low": min(1 + low, most),
            "max_over_mean_high": min(1 + high, most),
            "design_effect": effect,
            "expected_by_chance": 1 + floor_of(counts, r) * widened(effect),
            "max_vio_batch": batch,
            "noise_floor_batch": floor,
            "empty_slots": slots - total,
            "dropped": dropped,
            "drop_rate": lost / slots if slots else math.nan,
            **p_values[r],
        }

    rows = [{"layer": counts.routers[r].layer, "router": r, **values(r)} for r in counts.indices]
    names = ("layer", "router", "experts", "top_k", "tokens", "assignments", *BALANCE, *UNLISTED)
    columns = {name: np.array([row.get(name, math.nan) for row in rows]) for name in names}
    for name in ("dead_experts", "starved_experts", "busiest_expert"):
        known = columns[name].astype(float)
        columns[name] = np.ma.array(np.nan_to_num(known).astype(np.int64), mask=np.isnan(known))
    columns["min_tokens"] = columns["min_tokens"].astype(np.int64)
    return columns


def floor_of(counts: Counts, r: int) -> float:
    """The max_vio that independent tokens give a router by chance. Empty slots make no load."""
    E, k = counts.routers[r].experts, counts.routers[r].top_k
    return unc.noise_floor(int(counts.load_E(r).sum()) / k, E, k, counts.filled(r))


@once
def chosen(data: ReportData) -> list[Row]:
    """The rows of `balance` of what routers chose: before drops, where these are known."""
    if not data.trace.has_dropped:
        return data.loaded
    before, starved = data.counts.before_drops(), data.thresholds.starved
    frame = as_frame(_balance(before, starved, data.trace.drops))
    return records(frame.dropna(subset=["max_vio"]))


def _p_values(counts: Counts) -> dict[int, dict[str, float]]:
    """By router, how likely documents like these make any router's busiest expert as busy, and
    any's least used one as little used, by chance: none where documents are unknown or too few."""
    found: dict[int, dict[str, float]] = {r: {} for r in counts.indices}
    if not counts.documents_tell:
        return found
    loads = {r: load_E for r in counts.indices if (load_E := counts.load_E(r)).any()}
    domain_U = counts.domain_of_unit_U
    nulls = [chance.evenness_nulls(counts.of[r].assignments_UE, domain_U) for r in loads]
    apart = [np.array([of_E.max(), of_E.min()]) / of_E.mean() - 1 for of_E in loads.values()]
    for side, name in enumerate(("busiest_p", "least_used_p")):
        p_L = chance.joint_p([abs(of[side]) for of in apart], [of[side] for of in nulls])
        for r, p in zip(loads, p_L, strict=True):
            found[r][name] = float(p)
    return found


def _by_batch(counts: Counts, router: int) -> tuple[float, float]:
    """Mean max_vio over passes, and their noise floor."""
    batches, filled = counts.of[router].batches, counts.filled(router)
    if not batches or filled <= 0:
        return math.nan, math.nan
    tokens_S, (passes_S, vio_sum_S) = np.array(list(batches)), np.array(list(batches.values())).T
    E, k = counts.routers[router].experts, counts.routers[router].top_k
    whole_S = bal.whole_passes(tokens_S)
    floor_S, _ = unc.noise_of(tokens_S[whole_S] * filled, E, k, filled)
    floor = np.average(floor_S, weights=passes_S[whole_S])
    return bal.max_vio_batch(vio_sum_S, passes_S, tokens_S), float(floor)


@table()
def load(data: ReportData) -> AsColumns:
    """One row per expert of a router: its load, absolute and relative to the mean."""
    counts = data.counts

    def columns(r: int) -> Columns:
        load_E = counts.load_E(r)
        return {
            "expert": np.arange(len(load_E)),
            "assignments": load_E,
            "share": sp.share_by_domain(load_E[None])[0],
            "load_ratio": bal.load_ratio(load_E[None])[0],
            "first_choice": counts.first_choice_E(r),
            "weight_sum": counts.weight_sum_E(r),
            "dropped": counts.dropped_E(r),
        }

    return rows_per_router(data, columns)


@once
def design_effects(data: ReportData) -> dict[int, float]:
    """`design_effect` of each router."""
    return {r: design_effect(data.counts, r) for r in data.selection.routers}


def widened(effect: float) -> float:
    """By how much the tokens of one document, which are alike, raise what chance gives independent
    ones: √ design effect, at least 1; 1 where it is unknown."""
    return math.sqrt(at_least_1(effect))


def at_least_1(effect: float) -> float:
    """A design effect; 1 where it is unknown."""
    return max(1.0, effect) if effect == effect else 1.0


def design_effect(counts: Counts, router: int) -> float:
    """That of documents on the load of a router; NaN where they are few or unknown."""
    if counts.documents_unknown:
        return math.nan
    loads_UE, tokens_U = counts.of[router].assignments_UE, counts.tokens_U_of(router)
    return unc.design_effect(loads_UE, tokens_U, counts.domain_of_unit_U)


Columns = Mapping[str, np.ndarray | float]  # a number is that of all rows


def rows_per_router(data: ReportData, columns: Callable[[int], Columns | None]) -> AsColumns:
    """A table of several rows per router, by column; `layer, router` come first. None leaves a
    router out; without any router the table has no columns."""
    parts = list[dict[str, np.ndarray]]()
    for r in data.selection.routers:
        if (of_router := columns(r)) is not None:
            rows = {"layer": data.counts.routers[r].layer, "router": r, **of_router}
            parts.append(dict(zip(rows, np.broadcast_arrays(*rows.values()), strict=True)))
    names = [*parts[0]] if parts else []
    # each part is given back once it is copied: the table can be large
    return {name: np.concatenate([rows.pop(name) for rows in parts]) for name in names}


def row_per_router(
    counts: Counts, routers: Iterable[int], names: Iterable[str], values: Callable[[int], Row]
) -> pd.DataFrame:
    """A table of one row per router: `layer, router`, then these columns."""
    rows = [{"layer": counts.routers[r].layer, "router": r, **values(r)} for r in routers]
    return pd.DataFrame(rows, columns=["layer", "router", *names])


DRIFT = (
    "windows",
    *("total_variation", "total_variation_floor", "window_jsd_bits"),
    *("first_to_last", "first_to_last_floor"),
    *("trend_expert", "trend_first", "trend_last", "trend_p"),
)


@table("windows")
def windows(data: ReportData) -> pd.DataFrame:
    """One row per window of tokens, in the order of execution: its balance and the one expected by
    chance of as many tokens of documents like these; the distance of its load from that of the
    window before and the one expected by chance."""
    counts = data.decisions("windows")

    def columns(r: int) -> Columns:
        index_W, first_W, tokens_W, load_WE = _windows(counts, r)
        E, k = counts.routers[r].experts, counts.routers[r].top_k
        tv_floor, jsd_floor = _floors(data, r, load_WE)
        floor_W, _ = unc.noise_of(load_WE.sum(1) / k, E, k, counts.filled(r))
        steps = {
            "total_variation": win.step_total_variation(load_WE),
            "total_variation_floor": tv_floor,
            "jsd_bits": win.step_jsd_bits(load_WE),
            "jsd_floor_bits": jsd_floor,
        }
        return {
            "window": index_W,
            "first_token": first_W,
            "tokens": tokens_W,
            "max_over_mean": bal.max_over_mean(load_WE),
            "busiest_expert": np.where(load_WE.sum(1) > 0, bal.busiest_expert(load_WE), -1),
            "expected_by_chance": 1 + floor_W * widened(design_effects(data)[r]),
            **{name: np.r_[np.nan, step][: len(tokens_W)] for name, step in steps.items()},
        }

    frame = pd.DataFrame(rows_per_router(data, columns))
    busiest = frame["busiest_expert"].astype("Int64")
    return frame.assign(busiest_expert=busiest.mask(busiest < 0))


@table("windows", by_router=DRIFT)
def drift(data: ReportData) -> pd.DataFrame:
    """One row per router: how far its load moves from one window to the next, and how far chance
    alone moves it. Windows with fewer than half the tokens of the largest are left out.
    trend_expert: the expert whose share rises or falls most steadily, with its load ÷ mean load in
    the first quarter of the trace and in the last (trend_first, trend_last), and the probability
    that documents by chance give any expert of any router such a trend (trend_p)."""
    counts = data.decisions("drift")

    def values(r: int) -> Row:
        _, _, tokens_W, load_WE = _windows(counts, r)
        load_WE = load_WE[bal.whole_passes(tokens_W)]
        tv_floor, _ = _floors(data, r, load_WE)
        ends, _ = _floors(data, r, load_WE[[0, -1]]) if len(load_WE) > 1 else (tv_floor, None)
        return {
            "windows": len(load_WE),
            "total_variation": win.total_variation(load_WE),
            "total_variation_floor": _mean(tv_floor),
            "window_jsd_bits": win.window_jsd_bits(load_WE),
            "first_to_last": win.first_to_last(load_WE),
            "first_to_last_floor": _mean(ends),
            **_trend(data, r, load_WE),
        }

    frame = row_per_router(counts, data.selection.routers, DRIFT, values)
    return frame.astype({"trend_expert": "Int64"})


def _trend(data: ReportData, router: int, load_WE: np.ndarray) -> dict[str, float]:
    counts = data.counts
    p_E = win.trend_p(load_WE, counts.of[router].assignments_UE, counts.domain_of_unit_U)
    if np.isnan(p_E).all() or not counts.documents_tell:
        return {}
    e = int(np.nanargmin(p_E))
    first, last = win.quarter_ratio(load_WE)[:, e].tolist()
    p = min(1.0, float(p_E[e]) * len(p_E) * len(data.selection.routers))
    return {"trend_expert": e, "trend_first": first, "trend_last": last, "trend_p": p}


def _windows(counts: Counts, router: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """index, first token, tokens, load_WE of the windows in which the router saw any token."""
    listed = list(counts.windows(router))
    index_W, first_W, tokens_W = (np.array([w[i] for w in listed], np.int64) for i in range(3))
    load_WE = np.array([load_E for *_, load_E in listed], np.int64)
    return index_W, first_W, tokens_W, load_WE.reshape(-1, counts.routers[router].experts)


def _floors(data: ReportData, router: int, load_WE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The total variation and JSD of each window and the one before that chance gives."""
    load_E, k = data.counts.load_E(router), data.counts.routers[router].top_k
    share_E, effect = load_E / max(load_E.sum(), 1), at_least_1(design_effects(data)[router])
    return win.step_floors(share_E, load_WE.sum(1) / k, k, effect)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan
