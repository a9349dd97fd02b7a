"""What two aligned traces hold beside routes, in passes of their own, as few ask for it: the losses
of tokens and the entropies of their predictions (`trace --token-loss`), and the sizes of what
experts return (`trace --output-norms`).

T tokens of a shard that are compared, K slots, E experts, N decisions, U units (clusters of
documents).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np

from moe_inspect.analysis.counting.counts import CLUSTERS
from moe_inspect.comparison.aligning.align import AlignedShard, Alignment
from moe_inspect.comparison.aligning.rows import Columns, Rows
from moe_inspect.comparison.counting.count import Job, by_runs, rows_by_stack
from moe_inspect.comparison.counting.kernels_numpy import Slots
from moe_inspect.comparison.counting.router_sums import sets, unequal
from moe_inspect.trace.shard import Shard

SUMS = ("tokens", "a", "b", "apart", "entropy_a", "entropy_b")


def loss_sums(job: Job, alignment: Alignment) -> dict[str, np.ndarray]:
    """Of the tokens whose loss both traces know, and whose next token both have: of SUMS their
    number, Σ of their loss in A and in B, Σ |B's loss − A's|, and Σ of the entropy of their
    prediction in A and in B. float64 [2, U] each: the tokens that choose the same experts at every
    router compared, and the others. Nats."""
    total, broken = _no_losses(job), alignment.segments.broken
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


def _no_losses(job: Job) -> dict[str, np.ndarray]:
    return {name: np.zeros((2, len(job.domains) * CLUSTERS)) for name in SUMS}


def _sums(
    job: Job, shards: list[AlignedShard], ends: dict[int, np.ndarray]
) -> dict[str, np.ndarray]:
    found, U = _no_losses(job), len(job.domains) * CLUSTERS
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


@dataclass
class OutputSums:
    """Of one router. load, norm, gated: of A and of B, float64 [2, U, E]: assignments, Σ of the
    norms of outputs, Σ of gate weight × norm (NaN where a trace has no weights). Of the
    assignments that both made, float64 [E]: both_E, how many; norm_E, Σ of A's norms; change_E, Σ
    of |B's norm − A's|."""

    load: np.ndarray
    norm: np.ndarray
    gated: np.ndarray
    both_E: np.ndarray
    norm_E: np.ndarray
    change_E: np.ndarray

    @classmethod
    def zero(cls, U: int, E: int) -> OutputSums:
        return cls(*(np.zeros((2, U, E)) for _ in range(3)), *(np.zeros(E) for _ in range(3)))

    def add(self, other: OutputSums) -> None:
        for name, values in vars(other).items():
            setattr(self, name, getattr(self, name) + values)


def output_sums(job: Job, alignment: Alignment) -> dict[int, OutputSums]:
    """By router of A. Both traces hold norms."""
    total = _no_outputs(job)
    for _, part in by_runs(job, alignment, _outputs):
        for r, sums in part.items():
            total[r].add(sums)
    return total


def _no_outputs(job: Job) -> dict[int, OutputSums]:
    U = len(job.domains) * CLUSTERS
    return {r: OutputSums.zero(U, job.a.routers[r].experts) for r, _ in job.routers}


def _outputs(job: Job, shards: list[AlignedShard]) -> dict[int, OutputSums]:
    found = _no_outputs(job)
    for aligned in shards:
        for _, rows, routers in rows_by_stack(job, aligned):
            for r, other in routers:
                K = job.a.routers[r].top_k
                _add(job, rows, r, other, K, found[r])
    return found


def _add(job: Job, rows: Rows, r: int, other: int, K: int, sums: OutputSums) -> None:
    _, U, E = sums.load.shape

    def by_unit(slot_T: np.ndarray, values_T: np.ndarray | None) -> np.ndarray:
        cell_T = rows.unit_T * (E + 1) + slot_T
        return np.bincount(cell_T, values_T, U * (E + 1)).reshape(U, E + 1)[:, :E]

    ids_a, ids_b = (
        rows.of_a(lambda shard: shard.slots(r)[:K], r),
        rows.of_b(lambda shard: shard.slots(other)[:K], other),
    )
    norms_a, norms_b = (
        rows.of_a(lambda shard: shard.slot_values(r, "norm")[:K], r),
        rows.of_b(lambda shard: shard.slot_values(other, "norm")[:K], other),
    )
    weights: list[Slots | None] = [None, None]
    if job.a.has_weights:
        weights[0] = rows.of_a(lambda shard: shard.slot_weights(r)[:K], r)
    if job.b.has_weights:
        weights[1] = rows.of_b(lambda shard: shard.slot_weights(other)[:K], other)
    for side, (ids, norms) in enumerate(((ids_a, norms_a), (ids_b, norms_b))):
        of_side = weights[side]
        for slot, (id_T, norm_T) in enumerate(zip(ids, norms, strict=True)):
            sums.load[side] += by_unit(id_T, None)
            sums.norm[side] += by_unit(id_T, norm_T)
            gate_T = np.float64(np.nan) if of_side is None else of_side[slot].astype(np.float64)
            sums.gated[side] += by_unit(id_T, np.broadcast_to(gate_T * norm_T, norm_T.shape))
    for id_a_T, norm_a_T in zip(ids_a, norms_a, strict=True):
        for id_b_T, norm_b_T in zip(ids_b, norms_b, strict=True):
            at = np.flatnonzero((id_a_T == id_b_T) & (id_a_T != E))
            expert, before, now = id_a_T[at], norm_a_T[at], norm_b_T[at]
            sums.both_E += np.bincount(expert, minlength=E)
            sums.norm_E += np.bincount(expert, before, E)
            sums.change_E += np.bincount(expert, np.abs(now - before), E)
