"""The pass over two aligned traces: shard by shard of A.

T tokens of a shard that are compared, N of them with another decision, K slots, E experts, U units,
X cells.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from moe_inspect.analysis.counting.counts import CLUSTERS
from moe_inspect.analysis.counting.engine import LONG
from moe_inspect.analysis.counting.select import Selection
from moe_inspect.analysis.tasks import runs_of, workers
from moe_inspect.comparison.aligning.align import AlignedShard, Alignment
from moe_inspect.comparison.aligning.rows import Rows, rows_of_shard
from moe_inspect.comparison.counting import counts as ct
from moe_inspect.comparison.counting.confidence import (
    Margins,
    decile_of,
    logit_margin,
    logit_shift,
)
from moe_inspect.comparison.counting.kernels_numpy import Slots
from moe_inspect.comparison.counting.router_sums import Decisions, RouterSums
from moe_inspect.progress import phase
from moe_inspect.trace.reader import Trace


@dataclass(frozen=True)
class Job:
    """What is compared. routers: (router of A, router of B) of equal shape. domains: of A. tokens:
    how many. margins: of A's decisions, None where none is known or asked for. load: whether A's
    load is counted.
    drop_zero_filled: whether tokens with expert 0 in every slot of either trace are left out."""

    a: Trace
    b: Trace
    routers: tuple[tuple[int, int], ...]
    selection: Selection
    domains: tuple[str, ...]
    tokens: int
    margins: Margins | None = None
    load: bool = True
    drop_zero_filled: bool = False

    @cached_property
    def long(self) -> bool:
        """Whether compiling pays: loading the compiler takes a second."""
        slots = sum(self.a.routers[r].top_k for r, _ in self.routers)
        return self.tokens * slots >= LONG

    @property
    def weights(self) -> bool:
        return self.a.has_weights and self.b.has_weights

    @property
    def logits(self) -> bool:
        return "logits" in self.a.tables and "logits" in self.b.tables


def by_runs(
    job: Job, alignment: Alignment, function: Callable[..., Any], *arguments: Any, threads: int = 1
) -> Iterator[tuple[list[int], Any]]:
    """function(job, shards, *arguments) of runs of A's shards, in order, beside their numbers."""
    numbers = alignment.shards
    runs = [[numbers[i] for i in run] for run in runs_of(job.a, len(numbers))]
    tasks = (([alignment.of_shard(number) for number in run],) for run in runs)
    with workers(job.a, job.b, threads=threads) as at:
        found = at.each(_of_run, (job, function, arguments), tasks)
        yield from zip(runs, found, strict=True)


def _of_run(
    job: Job, function: Callable[..., Any], arguments: tuple[Any, ...], shards: list[AlignedShard]
) -> Any:
    return function(job, shards, *arguments)


def count_pair(
    job: Job,
    alignment: Alignment,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> ct.PairCounts:
    """The counts of everything that is compared. `progress` is told of decisions done."""
    total = _zero(job)
    advance = phase("comparing", job.tokens, "tokens")
    threads = len(os.sched_getaffinity(0)) if threads is None else threads
    # threads add to the same counts: they are whole numbers, whose order shows nowhere
    here = total if job.a.scheduler is None and job.b.scheduler is None else None
    for numbers, (decisions, part) in by_runs(job, alignment, _count, here, threads=threads):
        if part is not None:
            total.merge(*part)
        advance(sum(alignment.segments.in_shard(number).tokens for number in numbers))
        if progress:
            progress(decisions)
    return total


def _zero(job: Job) -> ct.PairCounts:
    listed = job.a.routers
    return ct.PairCounts.zero(
        job.domains,
        {r: listed[r].experts for r, _ in job.routers},
        {listed[r].stack for r, _ in job.routers},
    )


def _count(
    job: Job, shards: list[AlignedShard], into: ct.PairCounts | None
) -> tuple[int, tuple[ct.PairCounts, np.ndarray] | None]:
    """The decisions compared; and their counts with the units that they are of, where they are not
    added `into` others."""
    total = _zero(job) if into is None else into
    decisions = sum(_count_shard(job, aligned, total) for aligned in shards)
    if into is not None:
        return decisions, None
    return decisions, (total.of_units(total.units), total.units)


def _count_shard(job: Job, aligned: AlignedShard, total: ct.PairCounts) -> int:
    """Adds the counts of a shard of A to `total`. The decisions compared."""
    decisions = 0
    for stack, rows, routers in rows_by_stack(job, aligned):
        decisions += len(rows) * len(routers)
        tokens = TokenSums.zero(len(rows), job.logits)
        for pair in routers:
            _count_router(job, rows, pair, aligned.number, total, tokens)
        with total.lock:
            _add_tokens(rows, stack, aligned.number, len(routers), tokens, total)
    return decisions


def rows_by_stack(
    job: Job, aligned: AlignedShard
) -> Iterator[tuple[str, Rows, list[tuple[int, int]]]]:
    """The tokens of a shard of A that are compared, and the routers they reach; once per stack that
    has any."""
    for stack in sorted({job.a.routers[r].stack for r, _ in job.routers}):
        routers = [pair for pair in job.routers if job.a.routers[pair[0]].stack == stack]
        rows = rows_of_shard((job.a, job.b), aligned, stack, job.selection)
        if job.drop_zero_filled and not rows.alike:
            rows = rows.take(~_zero_filled(job, rows, routers))
        if len(rows):
            yield stack, rows, routers


def _zero_filled(job: Job, rows: Rows, routers: list[tuple[int, int]]) -> np.ndarray:
    """bool [T]: every slot of every router is expert 0, in A or in B."""
    zero_a_T, zero_b_T = np.ones((2, len(rows)), bool)
    for r, other in routers:
        for slot in rows.of_a(lambda shard, r=r: shard.slots(r), r):
            zero_a_T &= slot == 0
        for slot in rows.of_b(lambda shard, r=other: shard.slots(r), other):
            zero_b_T &= slot == 0
    return zero_a_T | zero_b_T


@dataclass
class TokenSums:
    """differs_T: routers at which a token's sets differ. differing: tokens with any so far.
    zero_a_T, zero_b_T: routers at which slots differ and every one of A, of B, is expert 0.
    shift_T: Σ over routers of the shift of its log-probabilities, None where logits are not
    known."""

    differs_T: np.ndarray
    zero_a_T: np.ndarray
    zero_b_T: np.ndarray
    shift_T: np.ndarray | None
    differing: int = 0

    @classmethod
    def zero(cls, T: int, logits: bool) -> TokenSums:
        nothing = [np.zeros(T, np.int64) for _ in range(3)]
        return cls(*nothing, shift_T=np.zeros(T) if logits else None)


def _add_tokens(
    rows: Rows, stack: str, number: int, routers: int, tokens: TokenSums, total: ct.PairCounts
) -> None:
    ct.add_cells(total.decisions_UX[stack], rows.unit_T, rows.cell_T)
    total.layers_N += np.bincount(tokens.differs_T, minlength=len(total.layers_N))
    document_D, first_D, at_T = np.unique(rows.document_T, return_index=True, return_inverse=True)
    tokens_D = np.bincount(at_T)
    mismatch_D = np.bincount(at_T, tokens.differs_T).astype(np.int64)
    domain_D = rows.unit_T[first_D] // CLUSTERS
    table = np.stack([document_D, domain_D, tokens_D, tokens_D * routers, mismatch_D], axis=1)
    total.documents.setdefault(number, np.zeros((0, 5), np.int64))
    total.documents[number] = np.concatenate([total.documents[number], table])
    total.shards_alike += rows.alike
    total.last_tokens += int(rows.last_T.sum())
    total.zero_filled_a += int((tokens.zero_a_T == routers).sum())
    total.zero_filled_b += int((tokens.zero_b_T == routers).sum())
    if tokens.shift_T is not None:
        gamma_T = np.exp(-tokens.shift_T / routers)
        total.gamma += ct.fixed(float(gamma_T.sum()))
        total.gamma_below += int((gamma_T < ct.GAMMA_FLOOR).sum())
        total.gamma_tokens += len(gamma_T)


def _count_router(
    job: Job,
    rows: Rows,
    pair: tuple[int, int],
    number: int,
    total: ct.PairCounts,
    tokens: TokenSums,
) -> None:
    r, other = pair
    listed, counts = job.a.routers[r], total.of[r]
    K = listed.top_k
    if rows.alike and not job.load:
        with total.lock:
            counts.logit_decisions += len(rows) * job.logits
        return
    slots_a = rows.of_a(lambda shard: shard.slots(r)[:K], r)
    slots_b = None if rows.alike else rows.of_b(lambda shard: shard.slots(other)[:K], other)
    weights_a = weights_b = None
    if job.weights and not rows.alike:
        weights_a = rows.of_a(lambda shard: shard.slot_weights(r)[:K], r)
        weights_b = rows.of_b(lambda shard: shard.slot_weights(other)[:K], other)
    decile_T, margin_T = _margin(job, rows, r, slots_a)
    unit_V, unit_T = rows.units
    decisions = Decisions(
        listed.experts,
        len(unit_V),
        unit_T,
        rows.cell_T,
        slots_a,
        slots_b,
        (weights_a, weights_b) if weights_a and weights_b else None,
        decile_T,
        margin_T,
    )
    sums = RouterSums(decisions, job.long)
    kl = 0
    if tokens.shift_T is not None and not rows.alike:
        logits_a = rows.of_a(lambda shard: (shard.logits(r),), r)[0]
        logits_b = rows.of_b(lambda shard: (shard.logits(other),), other)[0]
        shift_T, kl_T = logit_shift(logits_a, logits_b, slots_a, listed.scoring)
        tokens.shift_T += shift_T
        kl = ct.fixed(float(kl_T.sum()))
    with total.lock:
        counts.add(sums, unit_V)
        counts.kl += kl
        counts.logit_decisions += len(rows) * job.logits
        _add_mismatched(rows, sums, margin_T, number, counts, tokens)


def _margin(
    job: Job, rows: Rows, r: int, slots_a: Slots
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """uint8 [T], float32 [T]: the decile of each margin of A, and the margin; None where the
    router's are not known."""
    if job.margins is None or r not in job.margins.edges:
        return None, None
    margin_T = logit_margin(rows.of_a(lambda shard: (shard.logits(r),), r)[0], slots_a)
    return decile_of(margin_T, job.margins.edges[r]), margin_T


def _add_mismatched(
    rows: Rows,
    sums: RouterSums,
    margin_T: np.ndarray | None,
    number: int,
    counts: ct.RouterCounts,
    tokens: TokenSums,
) -> None:
    """What of the decisions with another set depends on the routers before this one, or is of
    single tokens."""
    at = sums.at[sums.missing_N > 0]
    again = int((tokens.differs_T[at] > 0).sum())
    counts.before += tokens.differing
    counts.again += again
    counts.new += len(at) - again
    counts.last_mismatch += int(rows.last_T[at].sum())
    tokens.differing += len(at) - again
    tokens.differs_T[at] += 1
    tokens.zero_a_T[sums.at] += sums.zero_a_N
    tokens.zero_b_T[sums.at] += sums.zero_b_N
    if margin_T is not None:
        at = at[np.isfinite(margin_T[at])]
        counts.flip_margins[number] = margin_T[at[:: -(-len(at) // ct.MOST_FLIPS) or 1]]
