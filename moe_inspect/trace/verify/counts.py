"""Rules of counts: every expert of every router once, sums within what the tokens allow.

D domains, E experts, N rows.
"""

from __future__ import annotations

import numpy as np

from moe_inspect.trace import schema
from moe_inspect.trace.shard import Shard
from moe_inspect.trace.verify.verification import (
    Verification,
    Violation,
    codes_of,
    expect_equal,
    read_table,
)


def check_counts(shard: Shard, found: Verification) -> None:
    name, routers = shard.files.paths["counts"], shard.trace.routers
    table = read_table(
        shard,
        "counts",
        [f.name for f in schema.counts_schema(shard.trace.has_weights, shard.trace.has_energy)],
    )
    labels: dict[str, int] = {}
    router_N, layer_N, expert_N = (table[c].to_numpy() for c in ("router", "layer", "expert"))
    domain_N = codes_of(table["domain"], name, "domain", labels)
    if (wrong_N := router_N >= len(routers)).any():
        raise Violation(
            name,
            int(wrong_N.argmax()),
            f"router is {router_N[wrong_N.argmax()]}, the manifest lists {len(routers)}",
        )
    expect_equal(name, "layer", layer_N, np.array([r.layer for r in routers])[router_N])
    for column in ("assignments", "first_choice"):
        values = table[column].fill_null(0).to_numpy()
        if (wrong_N := values < 0).any():
            raise Violation(name, int(wrong_N.argmax()), f"{column} is {values[wrong_N.argmax()]}")
    if table["assignments"].null_count:
        raise Violation(
            name, int(table["assignments"].is_null().to_numpy().argmax()), "assignments is null"
        )
    load_N, first_N = table["assignments"].to_numpy(), table["first_choice"].fill_null(0).to_numpy()
    if (wrong_N := first_N > load_N).any():
        n = int(wrong_N.argmax())
        raise Violation(name, n, f"first_choice is {first_N[n]} of {load_N[n]} assignments")
    for r, router in enumerate(routers):
        rows = np.nonzero(router_N == r)[0]
        if (wrong := expert_N[rows] >= router.experts).any():
            n = int(rows[wrong.argmax()])
            raise Violation(
                name, n, f"expert is {expert_N[n]}, router {r} has {router.experts} experts"
            )
        times_DE = np.zeros((len(labels), router.experts), np.int64)
        np.add.at(times_DE, (domain_N[rows], expert_N[rows]), 1)
        times_DE = times_DE[np.unique(domain_N)]
        if (times_DE != 1).any():
            d, e = (int(i[0]) for i in np.nonzero(times_DE != 1))
            raise Violation(
                name,
                int(rows[0]) if len(rows) else 0,
                f"router {r} lists expert {e} {times_DE[d, e]} times in one domain",
            )
        total, most = int(load_N[rows].sum()), shard.files.tokens * router.top_k
        if total > most or int(first_N[rows].sum()) > shard.files.tokens:
            said = (
                f"router {r} has {total} assignments and {int(first_N[rows].sum())} first "
                f"choices of {shard.files.tokens} tokens × {router.top_k}"
            )
            raise Violation(name, int(rows[0]), said)
        found.assignments += total
        found.empty_slots += most - total
        found.decisions += shard.files.tokens
    for column, least, there in (
        ("weight_sum", -np.inf, shard.trace.has_weights),
        ("energy", 0.0, shard.trace.has_energy),
    ):
        if there:
            _check_sums(table[column].to_numpy(), name, column, least)


def _check_sums(sums_N: np.ndarray, name: str, column: str, least: float) -> None:
    if (wrong_N := ~(np.isfinite(sums_N) & (sums_N >= least))).any():
        raise Violation(name, int(wrong_N.argmax()), f"{column} is {sums_N[wrong_N.argmax()]}")
