"""The pass over two aligned traces: shard by shard of A.

T tokens of a shard that are compared, N of them with another decision, K slots, E experts, U units,
V units in the shard, X cells.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import TypeVar

import numpy as np

from moe_inspect.analysis.counting.counts import CLUSTERS
from moe_inspect.analysis.counting.engine import LONG
from moe_inspect.analysis.counting.select import Selection
from moe_inspect.analysis.tasks import runs_of, workers
from moe_inspect.comparison.aligning.align import Segments
from moe_inspect.comparison.aligning.rows import AlignedRows, Columns, rows_of_shard
from moe_inspect.comparison.counting import counts as ct
from moe_inspect.comparison.counting import kernels_numpy
from moe_inspect.comparison.counting.logits import Margins, decile_of, logit_margin, logit_shift
from moe_inspect.progress import phase
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.shard import Shard

Made = TypeVar("Made")


@dataclass(frozen=True)
class Job:
    """What is compared. routers: (router of A, router of B) of equal shape. domains: of A. tokens:
    how many. margins: of A's decisions, None where none is known or asked for. load: whether A's
    load is counted. drop_zero_filled: whether tokens with expert 0 in every slot of either trace
    are left out."""

    a: Trace
    b: Trace
    routers: tuple[tuple[int, int], ...]
    selection: Selection
    domains: tuple[str, ...]
    tokens: int
    margins: Margins | None = None
    load: bool = True
    drop_zero_filled: bool = False

    @property
    def kernels(self) -> ModuleType:
        """Compiled ones where that pays: loading the compiler takes a second."""
        if self.tokens * sum(self.a.routers[r].top_k for r, _ in self.routers) < LONG:
            return kernels_numpy
        from moe_inspect.comparison.counting import kernels_numba

        return kernels_numba

    @property
    def weights(self) -> bool:
        return self.a.has_weights and self.b.has_weights

    @property
    def logits(self) -> bool:
        return "logits" in self.a.tables and "logits" in self.b.tables

    def zero(self) -> ct.ComparisonCounts:
        listed = {r: self.a.routers[r] for r, _ in self.routers}
        experts = {r: router.experts for r, router in listed.items()}
        stacks = {router.stack for router in listed.values()}
        return ct.ComparisonCounts.zero(self.domains, experts, stacks)

    def rows_by_stack(
        self, segments: Segments
    ) -> Iterator[tuple[str, AlignedRows, list[tuple[int, int]]]]:
        """The tokens of a shard of A that are compared, and the routers they reach; once per stack
        that has any."""
        for stack in sorted({self.a.routers[r].stack for r, _ in self.routers}):
            routers = [pair for pair in self.routers if self.a.routers[pair[0]].stack == stack]
            traces = self.a, self.b
            rows = rows_of_shard(traces, segments, self.domains, stack, self.selection)
            if self.drop_zero_filled and not rows.alike:
                zero_2T = np.ones((2, len(rows)), bool)  # in every slot of every router of A, of B
                for pair in routers:
                    for zero_T, slots in zip(zero_2T, rows.both(Shard.slots, pair), strict=True):
                        for slot_T in slots:
                            zero_T &= slot_T == 0
                rows = rows.take(~zero_2T.any(0))
            if len(rows):
                yield stack, rows, routers


def by_runs(
    job: Job,
    segments: Segments,
    function: Callable[..., Made],
    *arguments: object,
    threads: int = 1,
) -> Iterator[tuple[list[int], Made]]:
    """function(job, *arguments, shards) of runs of A's shards, in order, beside their numbers."""
    numbers = segments.shards
    runs = [[numbers[i] for i in run] for run in runs_of(job.a, len(numbers))]
    tasks = (([segments.in_shard(number) for number in run],) for run in runs)
    with workers(job.a, job.b, threads=threads) as at:
        yield from zip(runs, at.each(function, (job, *arguments), tasks), strict=True)


def count_pair(
    job: Job,
    segments: Segments,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> ct.ComparisonCounts:
    """The counts of everything that is compared. `progress` is told of decisions done."""
    total, advance = job.zero(), phase("comparing", job.tokens, "tokens")
    threads = len(os.sched_getaffinity(0)) if threads is None else threads
    # threads add to the same counts: they are whole numbers, whose order shows nowhere
    local = job.a.scheduler is None and job.b.scheduler is None
    here = (total, threading.Lock()) if local else None
    for numbers, (decisions, part) in by_runs(job, segments, _count, here, threads=threads):
        if part is not None:
            total.merge(*part)
        advance(sum(segments.in_shard(number).tokens for number in numbers))
        if progress:
            progress(decisions)
    return total


def _count(
    job: Job, here: tuple[ct.ComparisonCounts, threading.Lock] | None, shards: list[Segments]
) -> tuple[int, tuple[ct.ComparisonCounts, np.ndarray] | None]:
    """The decisions compared; and their counts with the units that they are of, where they are not
    added to those `here`."""
    total, lock = here or (job.zero(), threading.Lock())
    decisions = 0
    for segments in shards:
        for stack, rows, routers in job.rows_by_stack(segments):
            decisions += len(rows) * len(routers)
            tokens, number = TokenSums(rows, job.logits), int(segments.shard_a[0])
            for pair in routers:
                counts = _count_router(job, tokens, pair, number)
                with lock:
                    total.of[pair[0]].merge(counts, tokens.unit_V)
            with lock:
                tokens.add_to(total, stack, number, len(routers))
    return decisions, None if here else (total.of_units(total.units), total.units)


class TokenSums:
    """Sums over the routers that tokens reach, one after the other. unit_V: the units there are;
    place_T: which of these each token is in. differs_T: routers at which a token's sets differ.
    differing: tokens with any so far. zero_2T: routers at which slots differ and every one of A, of
    B, is expert 0. shift_T: Σ of the shift of its log-probabilities, None where logits are not
    known."""

    def __init__(self, rows: AlignedRows, logits: bool):
        self.rows = rows
        self.unit_V, self.place_T = np.unique(rows.unit_T, return_inverse=True)
        self.differs_T, self.differing = np.zeros(len(rows), np.int64), 0
        self.zero_2T = np.zeros((2, len(rows)), np.int64)
        self.shift_T = np.zeros(len(rows)) if logits else None

    def add_to(self, total: ct.ComparisonCounts, stack: str, number: int, routers: int) -> None:
        rows, decisions_UX = self.rows, total.decisions_UX[stack]
        cell_T = rows.unit_T * ct.CELLS + rows.cell_T
        decisions_UX += np.bincount(cell_T, minlength=decisions_UX.size).reshape(-1, ct.CELLS)
        total.layers_N += np.bincount(self.differs_T, minlength=len(total.layers_N))
        document_D, first_D, at_T = np.unique(
            rows.document_T, return_index=True, return_inverse=True
        )
        tokens_D, domain_D = np.bincount(at_T), rows.unit_T[first_D] // CLUSTERS
        mismatch_D = np.bincount(at_T, self.differs_T).astype(np.int64)
        table = np.stack([document_D, domain_D, tokens_D, tokens_D * routers, mismatch_D], axis=1)
        before = total.documents.get(number, table[:0])
        total.documents[number] = np.concatenate([before, table])
        total.shards_alike += rows.alike
        total.last_tokens += int(rows.last_T.sum())
        zero_a, zero_b = (self.zero_2T == routers).sum(1).tolist()
        total.zero_filled_a += zero_a
        total.zero_filled_b += zero_b
        if self.shift_T is not None:
            gamma_T = np.exp(-self.shift_T / routers)
            total.gamma += ct.fixed(float(gamma_T.sum()))
            total.gamma_below += int((gamma_T < ct.GAMMA_FLOOR).sum())
            total.gamma_tokens += len(gamma_T)


def logits_of(shard: Shard, router: int) -> Columns:
    return (shard.logits(router),)


def _count_router(
    job: Job, tokens: TokenSums, pair: tuple[int, int], number: int
) -> ct.PairRouterCounts:
    """The counts of one router in a shard, in the units of its tokens."""
    rows, unit_T, r, kernels = tokens.rows, tokens.place_T, pair[0], job.kernels
    E, V = job.a.routers[r].experts, len(tokens.unit_V)
    counts = ct.PairRouterCounts.zero(E, V)
    counts.logit_decisions = len(rows) * job.logits
    if rows.alike and not job.load:
        return counts
    slots_a = rows.read(0, Shard.slots, r)
    slots_b = slots_a if rows.alike else rows.read(1, Shard.slots, pair[1])
    load_VE = np.zeros((V, E + 1), np.uint32)
    kernels.add_load(slots_a, unit_T, load_VE)
    counts.load_UE = load_VE[:, :E]
    if load_VE[:, E].any():
        short_T = kernels_numpy.nowhere_in_both(slots_a, slots_b, E)
        kernels.add_cells(counts.short_UX, unit_T, rows.cell_T, short_T)
    margin_T, decile_T = None, np.zeros(0, np.uint8)
    if job.margins is not None and r in job.margins.edges:
        margin_T = logit_margin(rows.read(0, logits_of, r)[0], slots_a)
        decile_T = decile_of(margin_T, job.margins.edges[r])
        known_T = np.isfinite(margin_T).view(np.uint8)
        kernels.add_cells(counts.margin_UM, unit_T, decile_T, known_T)
    counts.before = tokens.differing
    if rows.alike:
        if margin_T is not None:
            counts.flip_margins[number] = margin_T[:0]
        return counts

    at = kernels_numpy.unequal(slots_a, slots_b)
    a_KN, b_KN = (np.stack([slot_T[at] for slot_T in side]) for side in (slots_a, slots_b))
    lost_KN, gained_KN, missing_N = kernels_numpy.sets(a_KN, b_KN, E)
    unit_N, cell_N = unit_T[at], rows.cell_T[at]
    counts.reordered_U += np.bincount(unit_N, minlength=V)
    counts.first_differs_U += np.bincount(unit_N[a_KN[0] != b_KN[0]], minlength=V)
    kernels.add_cells(counts.mismatch_UX, unit_N, cell_N, missing_N > 0)
    kernels.add_cells(counts.missing_UX, unit_N, cell_N, missing_N)
    kernels.add_moves(a_KN, b_KN, lost_KN, gained_KN, unit_N, counts.moved_UE, counts.flips_EE)
    if job.weights:
        weights = rows.both(Shard.slot_weights, pair)
        l1_T = kernels_numpy.weight_difference(kernels, a_KN, b_KN, E, at, *weights)
        counts.l1_U += np.rint(np.bincount(unit_T, l1_T, V) * ct.UNIT).astype(np.int64)
        counts.weights_differ = int(np.count_nonzero(l1_T))
    if tokens.shift_T is not None:
        (logits_a,), (logits_b,) = rows.both(logits_of, pair)
        shift_T, kl_T = logit_shift(logits_a, logits_b, slots_a, job.a.routers[r].scoring)
        tokens.shift_T += shift_T
        counts.kl = ct.fixed(float(kl_T.sum()))

    # what depends on the routers before this one, or is of single tokens
    tokens.zero_2T[:, at] += np.stack([(a_KN == 0).all(0), (b_KN == 0).all(0)])
    at = at[missing_N > 0]
    counts.again = int((tokens.differs_T[at] > 0).sum())
    counts.new = len(at) - counts.again
    counts.last_mismatch = int(rows.last_T[at].sum())
    tokens.differing += counts.new
    tokens.differs_T[at] += 1
    if margin_T is not None:
        at = at[np.isfinite(margin_T[at])]
        known_N = np.ones(len(at), np.uint8)
        kernels.add_cells(counts.margin_mismatch_UM, unit_T[at], decile_T[at], known_N)
        counts.flip_margins[number] = margin_T[at[:: -(-len(at) // ct.MOST_FLIPS) or 1]]
    return counts
