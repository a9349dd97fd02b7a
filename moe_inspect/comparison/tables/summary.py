"""The table of facts: what was compared, how it was aligned, what was recorded otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd

from moe_inspect.comparison.data import TABLES, PairData
from moe_inspect.reporting.tables.registry import table
from moe_inspect.text import ranges, storable

# of the manifest: what makes two runs of one model differ
RECORDED = {
    "model": ("id", "revision", "class"),
    "capture": ("mode", "device", "dtype", "experts_implementation", "engine", "versions"),
}


@table(tables=TABLES)
def summary(data: PairData) -> pd.DataFrame:
    """One row per fact: key, value (text)."""
    rows = [(key, storable(str(value))) for key, value in facts(data)]
    return pd.DataFrame(rows, columns=["key", "value"]).astype({"key": "str", "value": "str"})


def facts(data: PairData) -> Iterator[tuple[str, object]]:
    """The rows of `summary`."""
    alignment, options = data.alignment, data.options
    yield from (("a", data.a.path), ("b", data.b.path))
    if data.noise is not None:
        yield "noise", data.noise.b.path
    yield from (
        ("tokens_a", alignment.a.tokens),
        ("tokens_b", alignment.b.tokens),
        ("tokens_compared", data.counts.tokens),
        ("decisions_compared", data.decisions),
        ("layers", ranges({data.router(r).layer for r, _ in data.pairs})),
        ("aligned_by", alignment.by),
        ("token_ids", "checked" if alignment.ids_known else "unknown, not checked"),
        ("sequences_diverged", alignment.diverged),
        ("tokens_after_divergence", alignment.other_ids),
    )
    if data.counts.shards_alike:
        yield "shards_alike", f"{data.counts.shards_alike}: the same files, not compared row by row"
    shifts = {n: getattr(options, n) for n in SHIFTS if getattr(options, n)}
    yield from shifts.items()
    for key, values in recorded_otherwise(data).items():
        yield f"differs_{key}", f"{values[0]} | {values[1]}"


SHIFTS = ("shift_layers", "shift_positions", "shift_routes", "drop_last")


def recorded_otherwise(data: PairData) -> dict[str, tuple[Any, Any]]:
    """What the manifests say differently of how the two were recorded: dtype → ("float32",
    "bfloat16")."""
    found = dict[str, tuple[Any, Any]]()
    for part, names in RECORDED.items():
        of_a, of_b = (trace.manifest.get(part) or {} for trace in (data.a, data.b))
        for name in names:
            if of_a.get(name) != of_b.get(name):
                found[name] = (of_a.get(name), of_b.get(name))
    plan_a, plan_b = (
        (trace.manifest.get("corpus") or {}).get("plan") or {} for trace in (data.a, data.b)
    )
    for name in ("max_length", "batch_tokens", "special_tokens", "generate", "random_init"):
        if plan_a.get(name) != plan_b.get(name):
            found[name] = (plan_a.get(name), plan_b.get(name))
    return found
