"""The losses of the tokens of two aligned traces (`trace --token-loss`), and the entropies of their
predictions, in a pass of its own: few ask for it.

T tokens of a shard that are compared, K slots, E experts, N decisions, U units (clusters of
documents).
"""

from __future__ import annotations

from typing import cast

import numpy as np

from moe_inspect.analysis.counting.counts import CLUSTERS
from moe_inspect.comparison.aligning.align import AlignedShard, Alignment
from moe_inspect.comparison.aligning.rows import Columns, Rows
from moe_inspect.comparison.counting.count import Job, by_runs, rows_by_stack
from moe_inspect.comparison.counting.router_sums import sets, unequal
from moe_inspect.trace.shard import Shard

SUMS = ("tokens", "a", "b", "apart", "entropy_a", "entropy_b")


def loss_sums(job: Job, alignment: Alignment) -> dict[str, np.ndarray]:
    """Of the tokens whose loss both traces know, and whose next token both have: of SUMS their
    number, Σ of their loss in A and in B, Σ |B's loss − A's|, and Σ of the entropy of their
    prediction in A and in B. float64 [2, U] each: the tokens that choose the same experts at every
    router compared, and the others. Nats."""
    total, broken = _zero(job), alignment.segments.broken
    # the rows after which a sequence does not go on with a token that both have
    ends = {
        number: last.row_a + last.length - 1
        for number in alignment.shards
        for last in [broken.in_shard(number)]
    }
    for _, part in by_runs(job, alignment, _sums, ends):
        for name, values in part.items():
            total[name] += values
    return total


def _zero(job: Job) -> dict[str, np.ndarray]:
    return {name: np.zeros((2, len(job.domains) * CLUSTERS)) for name in SUMS}


def _sums(
    job: Job, shards: list[AlignedShard], ends: dict[int, np.ndarray]
) -> dict[str, np.ndarray]:
    found, U = _zero(job), len(job.domains) * CLUSTERS
    for aligned in shards:
        for _, rows, routers in rows_by_stack(job, aligned):
            (loss_a_T, entropy_a_T), (loss_b_T, entropy_b_T) = (
                of(_losses, None) for of in (rows.of_a, rows.of_b)
            )
            at = np.flatnonzero(
                np.isfinite(loss_a_T)
                & np.isfinite(loss_b_T)
                & ~np.isin(rows.a.rows, ends[aligned.number])
            )
            cell_T = (_differ(job, rows, routers) * U + rows.unit_T)[at]
            a_T, b_T = loss_a_T[at], loss_b_T[at]
            of = (None, a_T, b_T, np.abs(b_T - a_T), entropy_a_T[at], entropy_b_T[at])
            for name, values_T in zip(SUMS, of, strict=True):
                found[name] += np.bincount(cell_T, values_T, 2 * U).reshape(2, U)
    return found


def _losses(shard: Shard) -> Columns:
    table = shard.tokens(["loss_nats", "entropy_nats"])
    columns = (cast("np.ndarray", table[name].to_numpy()) for name in table.column_names)
    return tuple(column.astype(np.float64) for column in columns)


def _differ(job: Job, rows: Rows, routers: list[tuple[int, int]]) -> np.ndarray:
    """bool [T]: another set of experts at any of the routers."""
    differ_T = np.zeros(len(rows), bool)
    for r, other in () if rows.alike else routers:
        E, K = job.a.routers[r].experts, job.a.routers[r].top_k
        slots_a = rows.of_a(lambda shard, r=r, K=K: shard.slots(r)[:K], r)
        slots_b = rows.of_b(lambda shard, r=other, K=K: shard.slots(r)[:K], other)
        at_N = unequal(slots_a, slots_b)
        a_KN, b_KN = (np.stack([slot_T[at_N] for slot_T in side]) for side in (slots_a, slots_b))
        _, _, missing_N = sets(a_KN, b_KN, E)
        differ_T[at_N[missing_N > 0]] = True
    return differ_T
