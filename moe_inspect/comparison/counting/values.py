"""What two aligned traces hold beside routes, in passes of their own, as few ask for it: losses of
tokens and entropies of predictions, and the sizes of what experts return.

T tokens of a shard that are compared, E experts, N decisions, U units (clusters of documents).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np

from moe_inspect.analysis.counting.counts import CLUSTERS
from moe_inspect.comparison.aligning.align import OF_TOKENS, AlignedRows, Columns, Segments
from moe_inspect.comparison.counting import kernels
from moe_inspect.comparison.counting.count import Job, by_runs
from moe_inspect.trace.shard import Shard

Sums = dict[str, np.ndarray]
OfRouters = dict[tuple[int, str], np.ndarray]
Key = TypeVar("Key")
OF_LOSSES = ("tokens", "a", "b", "apart", "entropy_a", "entropy_b")


def loss_sums(job: Job, segments: Segments) -> Sums:
    """Of the tokens whose loss both traces know, and whose next token both have: of OF_LOSSES their
    number, Σ of their loss in A and in B, Σ |B's loss − A's|, and Σ of the entropy of their
    prediction in A and in B. float64 [2, U] each: the tokens that choose the same experts at every
    router compared, and the others. Nats."""
    # the rows after which a sequence does not go on with a token that both have
    broken = segments.broken
    last = {number: broken.in_shard(number) for number in segments.shards}
    ends = {number: of.row_a + of.length - 1 for number, of in last.items()}
    return _summed(job, segments, _losses, ends)


def output_sums(job: Job, segments: Segments) -> dict[int, Sums]:
    """By router of A, of two traces with norms. load, norm, gated: of A and of B, float64 [2, U,
    E]: assignments, Σ of the norms of outputs, Σ of gate weight × norm (NaN where a trace has no
    weights). Of the assignments that both made, float64 [E]: both, how many; both_norm, Σ of A's
    norms; both_change, Σ of |B's norm − A's|."""
    made = dict[int, Sums]()
    for (r, name), values in _summed(job, segments, _outputs).items():
        made.setdefault(r, {})[name] = values
    return made


def _summed(
    job: Job, segments: Segments, function: Callable[..., dict[Key, np.ndarray]], *arguments: object
) -> dict[Key, np.ndarray]:
    """What function(job, *arguments, shards) returns, added up over all shards."""
    total = function(job, *arguments, [])
    for _, part in by_runs(job, segments, function, *arguments):
        for name, values in part.items():
            total[name] += values
    return total


def _losses(job: Job, ends: dict[int, np.ndarray], shards: list[Segments]) -> Sums:
    U = len(job.domains) * CLUSTERS
    found: Sums = {name: np.zeros((2, U)) for name in OF_LOSSES}
    for segments in shards:
        for _, rows, routers in job.rows_by_stack(segments):
            a, b = rows.both(_losses_of_tokens, (OF_TOKENS, OF_TOKENS))
            going_on_T = ~np.isin(rows.row_T, ends[int(segments.shard_a[0])])
            at = np.flatnonzero(np.isfinite(a[0]) & np.isfinite(b[0]) & going_on_T)
            cell_T = (_differ(job, rows, routers) * U + rows.unit_T)[at]
            (a_T, entropy_a_T), (b_T, entropy_b_T) = (
                [of_T[at] for of_T in side] for side in (a, b)
            )
            of = (None, a_T, b_T, np.abs(b_T - a_T), entropy_a_T, entropy_b_T)
            for name, values_T in zip(OF_LOSSES, of, strict=True):
                found[name] += np.bincount(cell_T, values_T, 2 * U).reshape(2, U)
    return found


def _losses_of_tokens(shard: Shard, _: int) -> Columns:
    table = shard.tokens(["loss_nats", "entropy_nats"])
    return tuple(table[name].to_numpy().astype(np.float64) for name in table.column_names)


def _differ(job: Job, rows: AlignedRows, routers: list[tuple[int, int]]) -> np.ndarray:
    """bool [T]: another set of experts at any of the routers."""
    differ_T = np.zeros(len(rows), bool)
    for pair in () if rows.alike else routers:
        slots_a, slots_b = rows.both(Shard.slots, pair)
        at_N, a_KN, b_KN = kernels.unequal(slots_a, slots_b)
        _, _, missing_N = kernels.sets(a_KN, b_KN, job.a.routers[pair[0]].experts)
        differ_T[at_N[missing_N > 0]] = True
    return differ_T


def _outputs(job: Job, shards: list[Segments]) -> OfRouters:
    U, found = len(job.domains) * CLUSTERS, OfRouters()
    for r, _ in job.routers:
        E = job.a.routers[r].experts
        found |= {(r, name): np.zeros((2, U, E)) for name in ("load", "norm", "gated")}
        found |= {(r, name): np.zeros(E) for name in ("both", "both_norm", "both_change")}
    for segments in shards:
        for _, rows, routers in job.rows_by_stack(segments):
            for pair in routers:
                _add_outputs(job, rows, pair, found)
    return found


def _add_outputs(job: Job, rows: AlignedRows, pair: tuple[int, int], found: OfRouters) -> None:
    r, E = pair[0], job.a.routers[pair[0]].experts
    ids = rows.both(Shard.slots, pair)
    norms = rows.both(lambda shard, router: shard.slot_values(router, "norm"), pair)
    for side, trace in enumerate((job.a, job.b)):
        weights = rows.read(side, Shard.slot_weights, pair[side]) if trace.has_weights else None
        for slot, (id_T, norm_T) in enumerate(zip(ids[side], norms[side], strict=True)):
            gate_T = np.float64(np.nan) if weights is None else weights[slot].astype(np.float64)
            gated_T = np.broadcast_to(gate_T * norm_T, norm_T.shape)
            for name, values_T in (("load", None), ("norm", norm_T), ("gated", gated_T)):
                sums_UE = found[r, name][side]
                cell_T = rows.unit_T * (E + 1) + id_T
                sums = np.bincount(cell_T, values_T, len(sums_UE) * (E + 1))
                sums_UE += sums.reshape(-1, E + 1)[:, :E]
    for id_a_T, norm_a_T in zip(ids[0], norms[0], strict=True):
        for id_b_T, norm_b_T in zip(ids[1], norms[1], strict=True):
            at = np.flatnonzero((id_a_T == id_b_T) & (id_a_T != E))
            expert, before, now = id_a_T[at], norm_a_T[at], norm_b_T[at]
            found[r, "both"] += np.bincount(expert, minlength=E)
            found[r, "both_norm"] += np.bincount(expert, before, E)
            found[r, "both_change"] += np.bincount(expert, np.abs(now - before), E)
