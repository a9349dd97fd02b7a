"""The load of every expert, by router and domain: what `counts`, `sglang` and `esft` write.

T tokens, K slots, E experts, D domains.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from moe_inspect.trace.reader import Trace
from moe_inspect.trace.shard import Shard

FLOATS = ("weight_sum", "energy")
# of one router: domain → column → [E]
Sums = dict[str, dict[str, np.ndarray]]


def sums_by_domain(trace: Trace) -> list[Sums]:
    """Of each router: domain → column → [E]. weight_sum is missing without weights, first_choice
    and energy where the source did not say."""
    made: list[Sums] = [{} for _ in trace.routers]
    for shard in trace.shards:
        for r, domain, sums in _counted(shard) if trace.counts_only else _summed(shard):
            total = made[r].setdefault(domain, {})
            for name, values_E in sums.items():
                total[name] = total[name] + values_E if name in total else values_E
    return made


def _summed(shard: Shard) -> Iterator[tuple[int, str, dict[str, np.ndarray]]]:
    domain_T = np.array(shard.tokens(["domain"])["domain"].to_pylist(), object)
    labels, code_T = np.unique(domain_T.astype(str), return_inverse=True)
    for r, router in enumerate(shard.trace.routers):
        E, seen_T = router.experts, shard.seen(r)
        code = code_T if seen_T is None else code_T[seen_T]
        ids_TK = shard.ids(r).astype(np.int64)
        weights_TK = shard.weights(r) if shard.trace.has_weights else None
        cells_TK = code[:, None] * E + ids_TK
        there_TK = ids_TK >= 0

        def sums_of(cells: np.ndarray, weights: np.ndarray | None = None, E: int = E) -> np.ndarray:
            return np.bincount(cells, weights, len(labels) * E).reshape(-1, E)

        count_DE = sums_of(cells_TK[there_TK])
        first_DE = sums_of(cells_TK[:, 0][there_TK[:, 0]]) if router.first_choice_known else None
        weight_DE = (
            None if weights_TK is None else sums_of(cells_TK[there_TK], weights_TK[there_TK])
        )
        for d, label in enumerate(labels):
            made = {"count": count_DE, "first_choice": first_DE, "weight_sum": weight_DE}
            yield (
                r,
                str(label),
                {name: values_DE[d] for name, values_DE in made.items() if values_DE is not None},
            )


def _counted(shard: Shard) -> Iterator[tuple[int, str, dict[str, np.ndarray]]]:
    table = shard.counts()
    router_N, expert_N = table["router"].to_numpy(), table["expert"].to_numpy()
    domain_N = np.array(table["domain"].to_pylist(), object)
    columns = {"count": "assignments"} | {n: n for n in ("first_choice", "weight_sum", "energy")}
    there = {
        name: table[c].to_numpy()
        for name, c in columns.items()
        if c in table.column_names and not table[c].null_count
    }
    for r, router in enumerate(shard.trace.routers):
        known = {
            name: values
            for name, values in there.items()
            if name != "first_choice" or router.first_choice_known
        }
        for domain in dict.fromkeys(domain_N[router_N == r]):
            rows = (router_N == r) & (domain_N == domain)
            weigh = {
                name: np.bincount(expert_N[rows], values[rows], router.experts)
                for name, values in known.items()
            }
            yield (
                r,
                domain,
                {n: v if n in FLOATS else v.astype(np.int64) for n, v in weigh.items()},
            )
