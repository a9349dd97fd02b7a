"""The tables on the load of two traces. `layer, router` are A's.

E experts. An axis of 2 is the two traces.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pandas as pd

from moe_inspect.analysis.metrics import two_traces as tt
from moe_inspect.analysis.metrics.balance import max_vio, nan_for_zero
from moe_inspect.analysis.metrics.chance import ALPHA
from moe_inspect.analysis.metrics.registry import metrics_of
from moe_inspect.analysis.metrics.uncertainty import special
from moe_inspect.analysis.metrics.windows import step_floors, step_total_variation
from moe_inspect.comparison.loads.data import Loads
from moe_inspect.comparison.result import LOAD_TABLES, SIDES, facts_of_both, said_of_models
from moe_inspect.reporting.tables.registry import table

BALANCE = tuple(metrics_of("balance", {"load_LE"}))
NUMBERS = ("dead_experts", "starved_experts")  # whole, and may be missing
OF_EXPERT = ("assignments", "share", "load_ratio")
# the floor is a mean, and counts know no documents, whose tokens are alike: as in the report on
# counts, what is below twice the floor may be chance
BEYOND = 2
IN_A_ROW = 3  # windows beyond chance from which on two runs differ: a single one may be chance
STEPS = ("first_step", "last_step")
WINDOWS = {
    **dict.fromkeys(("layer", "router", "window", *STEPS, "tokens_a", "tokens_b"), "int64"),
    **dict.fromkeys(("load_shift", "load_shift_floor"), "float64"),
    "beyond_chance": "bool",
    **dict.fromkeys(("max_vio_a", "max_vio_b"), "float64"),
    "expert": "int64",
    **dict.fromkeys(("load_ratio_a", "load_ratio_b"), "float64"),
}
DIVERGED = {
    **dict.fromkeys(("layer", "router", "windows", "windows_beyond_chance"), "int64"),
    "since_step": "Int64",
    **dict.fromkeys(("windows_since", "beyond_chance_since"), "int64"),
    **dict.fromkeys((f"most_{name}" for name in STEPS), "int64"),
    **dict.fromkeys(("most_load_shift", "most_load_shift_floor"), "float64"),
}


@table(tables=LOAD_TABLES)
def summary(data: Loads) -> pd.DataFrame:
    """One row per fact: key, and its value in A and in B (text)."""
    return facts_of_both(_facts(data))


def _facts(data: Loads) -> Iterator[tuple[object, ...]]:
    both = data.a, data.b
    counts = [data.reports[side].counts for side in SIDES]
    yield from said_of_models(*both)
    yield "holds", *("counts" if trace.counts_only else "decisions" for trace in both)
    yield "status", *(trace.status for trace in both)
    yield "tokens", *(of.tokens for of in counts)
    yield "domains", *(", ".join(of.domains) for of in counts)


@table(
    by_router=tuple(f"{name}_{x}" for name in BALANCE for x in (*SIDES, "difference")),
    tables=LOAD_TABLES,
)
def balance(data: Loads) -> pd.DataFrame:
    """One row per router: the balance in A, in B, and B's minus A's, beside the max_over_mean
    that chance gives documents like these (expected_by_chance)."""
    rows = list[dict[str, object]]()
    for r, _ in data.pairs:
        of = {side: data.of(side, "balance", r).iloc[0] for side in SIDES}
        row = {name: of["a"][name] for name in ("layer", "router", "experts", "top_k")}
        row |= {f"tokens_{side}": of[side]["tokens"] for side in SIDES}
        for name in BALANCE:
            a, b = (float(of[side].astype(float)[name]) for side in SIDES)
            row |= {f"{name}_a": a, f"{name}_b": b, f"{name}_difference": b - a}
        row |= {f"expected_by_chance_{side}": of[side]["expected_by_chance"] for side in SIDES}
        rows.append(row)
    whole = ("layer", "router", "experts", "top_k", *(f"tokens_{side}" for side in SIDES))
    experts = [f"{name}_{x}" for name in NUMBERS for x in (*SIDES, "difference")]
    return pd.DataFrame(rows).astype(
        {**dict.fromkeys(whole, "int64"), **dict.fromkeys(experts, "Int64")}
    )


@table(by_router=("load_shift", "jsd_bits"), tables=LOAD_TABLES)
def load_shift(data: Loads) -> pd.DataFrame:
    """One row per router: how far apart the load of the two traces is (total variation and
    Jensen–Shannon divergence of the shares), and how far chance alone takes two traces of so many
    tokens that route alike (…_floor): of independent tokens, times the design effect of documents
    where a trace of decisions tells it."""
    rows = list[dict[str, float]]()
    for r, _ in data.pairs:
        router = data.a.routers[r]
        load_2E = np.stack([data.of(s, "load", r)["assignments"].to_numpy(float) for s in SIDES])
        effect = data.design_effect(r)
        share_E = load_2E.sum(0) / max(load_2E.sum(), 1)
        # null slots make no load
        floors = step_floors(share_E, load_2E.sum(1) / router.top_k, router.top_k, effect)
        rows.append(
            {
                "layer": router.layer,
                "router": r,
                "load_shift": tt.load_shift(load_2E),
                "load_shift_floor": float(floors[0][0]),
                "jsd_bits": tt.load_shift_jsd_bits(load_2E),
                "jsd_bits_floor": float(floors[1][0]),
            }
        )
    return pd.DataFrame(rows)


@table(tables=LOAD_TABLES)
def windows(data: Loads) -> pd.DataFrame:
    """One row per router and window of steps that both traces have: how far apart their load is
    and how far chance alone takes it (load_shift_floor), whether that is beyond chance, how even
    each is, and the expert whose load differs most."""
    steps, parts = data.steps, [pd.DataFrame(columns=list(WINDOWS)).astype(WINDOWS)]
    for r, load_2WE in steps.load_2WE.items():
        router, W = data.a.routers[r], len(steps.first_W)
        tokens_2W = load_2WE.sum(2) / router.top_k  # null slots make no load
        share_WE = load_2WE.sum(0) / nan_for_zero(load_2WE.sum((0, 2)))[:, None]
        moved_W = step_total_variation(load_2WE)[0]
        floor_W = step_floors(share_WE, tokens_2W, router.top_k, data.design_effect(r))[0][0]
        ratio_2WE = load_2WE / nan_for_zero(load_2WE.mean(2))[..., None]
        expert_W = np.abs(np.nan_to_num(ratio_2WE[1] - ratio_2WE[0])).argmax(1)
        columns: dict[str, object] = {
            "layer": router.layer,
            "router": r,
            "window": np.arange(W),
            "first_step": steps.first_W,
            "last_step": steps.last_W,
            "tokens_a": np.rint(tokens_2W[0]),
            "tokens_b": np.rint(tokens_2W[1]),
            "load_shift": moved_W,
            "load_shift_floor": floor_W,
            "beyond_chance": moved_W > floor_W * times_floor(data, r),
            "max_vio_a": max_vio(load_2WE[0]),
            "max_vio_b": max_vio(load_2WE[1]),
            "expert": expert_W,
            "load_ratio_a": ratio_2WE[0, np.arange(W), expert_W],
            "load_ratio_b": ratio_2WE[1, np.arange(W), expert_W],
        }
        parts.append(pd.DataFrame(columns).astype(WINDOWS))
    return pd.concat(parts, ignore_index=True)


@table(by_router=("windows_beyond_chance",), tables=LOAD_TABLES)
def diverged(data: Loads) -> pd.DataFrame:
    """One row per router: in how many windows of steps the load differs by more than chance, since
    which step (the first of IN_A_ROW windows in a row that do; empty where there are none), and
    where it differs most."""
    rows, every = list[dict[str, object]](), cast(Any, data.tables["windows"])
    for _, of in every.groupby("router", sort=False):
        beyond_W = of["beyond_chance"].to_numpy(bool)
        start = first_run(beyond_W, min(IN_A_ROW, len(of)))
        most = of.loc[of["load_shift"].fillna(-1).idxmax()]
        rows.append(
            {
                "layer": most["layer"],
                "router": most["router"],
                "windows": len(of),
                "windows_beyond_chance": int(beyond_W.sum()),
                "since_step": pd.NA if start is None else of["first_step"].iloc[start],
                "windows_since": 0 if start is None else len(of) - start,
                "beyond_chance_since": 0 if start is None else int(beyond_W[start:].sum()),
                **{f"most_{name}": most[name] for name in ("first_step", "last_step")},
                **{f"most_{name}": most[name] for name in ("load_shift", "load_shift_floor")},
            }
        )
    return pd.DataFrame(rows, columns=list(DIVERGED)).astype(DIVERGED)


def times_floor(data: Loads, r: int) -> float:
    """How many times its floor the total variation of two loads of a router of A must be to be
    beyond chance, at ALPHA for all routers together; at least BEYOND. The fewer experts its load
    varies over, the more the distance itself varies: over n of them (counted by how much each
    varies, as of two that share all tokens), it is taken for a chi variable of n − 1 degrees of
    freedom."""
    k = data.a.routers[r].top_k
    of_both = [data.of(side, "load", r)["assignments"].to_numpy(float) for side in SIDES]
    load_E = np.sum(of_both, axis=0)
    chosen_E = np.clip(k * load_E / max(load_E.sum(), 1), 0, 1)
    error_E = np.sqrt(chosen_E * (1 - chosen_E))
    n = error_E.sum() ** 2 / max((error_E**2).sum(), 1e-12)
    half = max(1.0, n - 1) / 2
    highest = math.sqrt(special("gammainccinv")(half, ALPHA / len(data.pairs)))
    return max(BEYOND, highest * math.exp(math.lgamma(half) - math.lgamma(half + 0.5)))


def first_run(true_W: np.ndarray, length: int) -> int | None:
    """Where the first `length` True in a row begin; None without."""
    if not 0 < length <= len(true_W):
        return None
    (starts,) = np.nonzero(np.lib.stride_tricks.sliding_window_view(true_W, length).all(1))
    return int(starts[0]) if len(starts) else None


@table(tables=LOAD_TABLES)
def load(data: Loads) -> pd.DataFrame:
    """One row per expert of a router: its load in A, in B, and B's minus A's; absolute
    (assignments), as a share of the router's, and relative to the mean (load_ratio)."""
    parts = list[pd.DataFrame]()
    for r, _ in data.pairs:
        of = {side: data.of(side, "load", r).reset_index(drop=True) for side in SIDES}
        part = of["a"][["layer", "router", "expert"]].copy()
        for name in OF_EXPERT:
            a, b = (of[side][name] for side in SIDES)
            part[f"{name}_a"], part[f"{name}_b"] = a, b
            if name != "assignments":  # which also differ with the number of tokens
                part[f"{name}_difference"] = b - a
        parts.append(part)
    return pd.concat(parts, ignore_index=True)
