"""The tables on the load of two traces. `layer, router` are A's.

E experts. An axis of 2 is the two traces.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd

from moe_inspect.analysis.metrics import two_traces as tt
from moe_inspect.analysis.metrics.registry import metrics_of
from moe_inspect.analysis.metrics.windows import step_floors
from moe_inspect.comparison.loads.data import LOAD_TABLES, SIDES, LoadData
from moe_inspect.reporting.tables.registry import table
from moe_inspect.text import storable

BALANCE = tuple(metrics_of("balance", {"load_LE"}))
NUMBERS = ("dead_experts", "starved_experts")  # whole, and may be missing
OF_EXPERT = ("assignments", "share", "load_ratio")


@table(tables=LOAD_TABLES)
def summary(data: LoadData) -> pd.DataFrame:
    """One row per fact: key, and its value in A and in B (text)."""
    rows = [(key, *(storable(str(value)) for value in values)) for key, *values in _facts(data)]
    return pd.DataFrame(rows, columns=["key", *SIDES]).astype("str")


def _facts(data: LoadData) -> Iterator[tuple[object, ...]]:
    both = data.a, data.b
    counts = [data.reports[side].counts for side in SIDES]
    yield "trace", *(trace.path for trace in both)
    for key in ("id", "revision", "class"):
        yield f"model_{key}", *((x.manifest.get("model") or {}).get(key) or "" for x in both)
    yield "holds", *("counts" if trace.counts_only else "decisions" for trace in both)
    yield "status", *(trace.status for trace in both)
    yield "tokens", *(of.tokens for of in counts)
    yield "domains", *(", ".join(of.domains) for of in counts)


@table(
    by_router=tuple(f"{name}_{x}" for name in BALANCE for x in (*SIDES, "difference")),
    tables=LOAD_TABLES,
)
def balance(data: LoadData) -> pd.DataFrame:
    """One row per router: the balance in A, in B, and B's minus A's, beside the max_vio that chance
    gives with so many tokens (noise_floor)."""
    rows = list[dict[str, object]]()
    for r, _ in data.pairs:
        of = {side: data.of(side, "balance", r).iloc[0] for side in SIDES}
        row = {name: of["a"][name] for name in ("layer", "router", "experts", "top_k")}
        row |= {f"tokens_{side}": of[side]["tokens"] for side in SIDES}
        for name in BALANCE:
            a, b = (float(of[side].astype(float)[name]) for side in SIDES)
            row |= {f"{name}_a": a, f"{name}_b": b, f"{name}_difference": b - a}
        row |= {f"noise_floor_{side}": of[side]["noise_floor"] for side in SIDES}
        rows.append(row)
    whole = ("layer", "router", "experts", "top_k", *(f"tokens_{side}" for side in SIDES))
    experts = [f"{name}_{x}" for name in NUMBERS for x in (*SIDES, "difference")]
    return pd.DataFrame(rows).astype(
        {**dict.fromkeys(whole, "int64"), **dict.fromkeys(experts, "Int64")}
    )


@table(by_router=("load_shift", "jsd_bits"), tables=LOAD_TABLES)
def load_shift(data: LoadData) -> pd.DataFrame:
    """One row per router: how far apart the load of the two traces is (total variation and
    Jensen–Shannon divergence of the shares), and how far chance alone takes two traces of so many
    tokens that route alike (…_floor): of independent tokens, times the design effect of documents
    where a trace of decisions tells it."""
    rows = list[dict[str, float]]()
    for r, _ in data.pairs:
        router = data.a.routers[r]
        load_2E = np.stack([data.of(s, "load", r)["assignments"].to_numpy(float) for s in SIDES])
        effect = np.nanmax(
            [1.0, *(float(data.of(s, "balance", r)["design_effect"].iloc[0]) for s in SIDES)]
        )
        share_E = load_2E.sum(0) / max(load_2E.sum(), 1)
        # null slots make no load
        floors = step_floors(share_E, load_2E.sum(1) / router.top_k, router.top_k, float(effect))
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
def load(data: LoadData) -> pd.DataFrame:
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


@table(tables=LOAD_TABLES)
def refused(data: LoadData) -> pd.DataFrame:
    """One row per table that counts cannot have, and why."""
    rows = [(name, data.why) for name in data.refused]
    return pd.DataFrame(rows, columns=["table", "why"]).astype("str")
