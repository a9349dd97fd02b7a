"""The pass over two aligned traces: shard by shard of A, on threads.

T tokens of a shard that are compared, N of them with another decision, K slots, E experts, U units,
X cells.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moe_inspect.analysis.counting.counts import CLUSTERS
from moe_inspect.analysis.counting.engine import LONG
from moe_inspect.analysis.counting.select import Selection
from moe_inspect.comparison.aligning.align import Alignment
from moe_inspect.comparison.aligning.rows import Rows, rows_of_shard
from moe_inspect.comparison.counting import counts as ct
from moe_inspect.comparison.counting.confidence import (
    Margins,
    decile_of,
    logit_margin,
    logit_shift,
    weight_margin,
)
from moe_inspect.comparison.counting.slots import Differing, Slots, differing, weight_difference
from moe_inspect.trace.reader import Trace

BLOCK = 8192  # decisions whose pairs of experts are gone through at a time


@dataclass(frozen=True)
class Job:
    """What is compared. routers: (router of A, router of B) of equal shape. margins: of A's
    decisions, None where none is known or asked for. load: whether A's load is counted.
    drop_zero_filled: whether tokens with expert 0 in every slot of either trace are left out."""

    a: Trace
    b: Trace
    alignment: Alignment
    routers: tuple[tuple[int, int], ...]
    selection: Selection
    margins: Margins | None = None
    load: bool = True
    drop_zero_filled: bool = False

    @cached_property
    def long(self) -> bool:
        """Whether compiling pays: loading the compiler takes a second."""
        slots = sum(self.a.routers[r].top_k for r, _ in self.routers)
        return self.alignment.segments.tokens * slots >= LONG

    @property
    def weights(self) -> bool:
        return self.a.has_weights and self.b.has_weights

    @property
    def logits(self) -> bool:
        return "logits" in self.a.tables and "logits" in self.b.tables


def count_pair(
    job: Job, threads: int | None = None, progress: Callable[[int], None] | None = None
) -> ct.PairCounts:
    """The counts of everything that is compared. `progress` is told of decisions done."""
    listed = job.a.routers
    total = ct.PairCounts.zero(
        job.alignment.a.domains,
        {r: listed[r].experts for r, _ in job.routers},
        {listed[r].stack for r, _ in job.routers},
    )
    for decisions in _on_threads(job, total, threads):
        if progress:
            progress(decisions)
    return total


def _on_threads(job: Job, total: ct.PairCounts, threads: int | None) -> Iterator[int]:
    numbers = np.unique(job.alignment.segments.shard_a).tolist()
    threads = len(os.sched_getaffinity(0)) if threads is None else threads
    if threads == 1 or len(numbers) == 1:
        yield from (_count_shard(job, number, total) for number in numbers)
        return
    with ThreadPoolExecutor(threads) as pool:
        ahead: deque[Future[int]] = deque()
        for number in numbers:
            ahead.append(pool.submit(_count_shard, job, number, total))
            if len(ahead) > threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _count_shard(job: Job, number: int, total: ct.PairCounts) -> int:
    """Adds the counts of a shard of A to `total`. The decisions compared."""
    decisions = 0
    for stack in sorted(total.decisions_UX):
        routers = [pair for pair in job.routers if job.a.routers[pair[0]].stack == stack]
        rows = rows_of_shard((job.a, job.b), job.alignment, number, stack, job.selection)
        if job.drop_zero_filled and not rows.alike:
            rows = rows.take(~_zero_filled(job, rows, routers))
        if not len(rows):
            continue
        decisions += len(rows) * len(routers)
        sums = TokenSums.zero(len(rows), job.logits)
        for pair in routers:
            _count_router(job, rows, pair, number, total, sums)
        with total.lock:
            _add_tokens(rows, stack, number, len(routers), sums, total)
    return decisions


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
    """differs_T: routers at which a token's sets differ. zero_a_T, zero_b_T: routers at which they
    do and every slot of A, of B, is expert 0. shift_T: Σ over routers of the shift of its
    log-probabilities, None where logits are not known."""

    differs_T: np.ndarray
    zero_a_T: np.ndarray
    zero_b_T: np.ndarray
    shift_T: np.ndarray | None

    @classmethod
    def zero(cls, T: int, logits: bool) -> TokenSums:
        nothing = [np.zeros(T, np.int64) for _ in range(3)]
        return cls(*nothing, shift_T=np.zeros(T) if logits else None)


def _add_tokens(
    rows: Rows, stack: str, number: int, routers: int, sums: TokenSums, total: ct.PairCounts
) -> None:
    differs_T = sums.differs_T
    ct.add_cells(total.decisions_UX[stack], rows.unit_T, rows.cell_T)
    total.layers_N += np.bincount(differs_T, minlength=len(total.layers_N))
    document_D, first_D, at_T = np.unique(rows.document_T, return_index=True, return_inverse=True)
    tokens_D = np.bincount(at_T)
    mismatch_D = np.bincount(at_T, differs_T).astype(np.int64)
    domain_D = rows.unit_T[first_D] // CLUSTERS
    table = np.stack([document_D, domain_D, tokens_D, tokens_D * routers, mismatch_D], axis=1)
    total.documents.setdefault(number, np.zeros((0, 5), np.int64))
    total.documents[number] = np.concatenate([total.documents[number], table])
    total.shards_alike += rows.alike
    total.last_tokens += int(rows.last_T.sum())
    total.zero_filled_a += int((sums.zero_a_T == routers).sum())
    total.zero_filled_b += int((sums.zero_b_T == routers).sum())
    if sums.shift_T is not None:
        gamma_T = np.exp(-sums.shift_T / routers)
        total.gamma += ct.fixed(float(gamma_T.sum()))
        total.gamma_below += int((gamma_T < ct.GAMMA_FLOOR).sum())
        total.gamma_tokens += len(gamma_T)


def _count_router(
    job: Job,
    rows: Rows,
    pair: tuple[int, int],
    number: int,
    total: ct.PairCounts,
    sums: TokenSums,
) -> None:
    r, other = pair
    listed, counts = job.a.routers[r], total.of[r]
    E, K = listed.experts, listed.top_k
    slots_a: Slots | None = None
    if not rows.alike or job.load:
        slots_a = rows.of_a(lambda shard: shard.slots(r)[:K], r)
    if job.load and slots_a is not None:
        load_XE = _load(slots_a, rows, E, job.long)
        with total.lock:
            counts.load_UE[rows.units[0]] += load_XE
    weights_a: Slots | None = None
    if job.a.has_weights and (job.margins or (job.weights and not rows.alike)):
        weights_a = rows.of_a(lambda shard: shard.slot_weights(r)[:K], r)
    decile_T, margin_T = _margin(job, rows, r, weights_a)
    if decile_T is not None:
        known_T = np.isfinite(margin_T)
        with total.lock:
            ct.add_cells(counts.margin_UM, rows.unit_T[known_T], decile_T[known_T])
    if rows.alike or slots_a is None:
        with total.lock:
            counts.logit_decisions += len(rows) * job.logits
        return
    slots_b = rows.of_b(lambda shard: shard.slots(other)[:K], other)
    found = differing(slots_a, slots_b, E)
    l1_U, weights_differ = None, 0
    if job.weights and weights_a is not None:
        weights_b = rows.of_b(lambda shard: shard.slot_weights(other)[:K], other)
        l1_T = weight_difference(found, weights_a, weights_b)
        l1_U = np.bincount(rows.unit_T, l1_T, len(counts.l1_U))
        weights_differ = int(np.count_nonzero(l1_T))
    kl = None
    if sums.shift_T is not None:
        logits_a, logits_b = (
            rows.of_a(lambda shard: (shard.logits(r),), r)[0],
            rows.of_b(lambda shard: (shard.logits(other),), other)[0],
        )
        shift_T, kl_T = logit_shift(logits_a, logits_b, slots_a, listed.scoring)
        sums.shift_T += shift_T
        kl = float(kl_T.sum())
    with total.lock:
        if l1_U is not None:
            counts.l1_U += np.rint(l1_U * ct.UNIT).astype(np.int64)
            counts.weights_differ += weights_differ
        if kl is not None:
            counts.kl += ct.fixed(kl)
            counts.logit_decisions += len(rows)
        if found.short_T is not None:
            counts.short_U += np.bincount(rows.unit_T, found.short_T, len(counts.short_U)).astype(
                np.int64
            )
        _add_differing(found, rows, counts, sums, number)
        if decile_T is not None:
            _add_margins(found, rows, counts, decile_T, margin_T, number)


def _margin(
    job: Job, rows: Rows, r: int, weights_a: Slots | None
) -> tuple[np.ndarray | None, np.ndarray]:
    """int64 [T], float32 [T]: the decile of each margin of A, and the margin; None, and nothing,
    where the router's are not known."""
    if job.margins is None or r not in job.margins.edges:
        return None, np.zeros(0, np.float32)
    if job.margins.source == "weights":
        assert weights_a is not None
        margin_T = weight_margin(weights_a)
    else:
        k = job.a.routers[r].top_k
        margin_T = logit_margin(rows.of_a(lambda shard: (shard.logits(r),), r)[0], k)
    return decile_of(margin_T, job.margins.edges[r]), margin_T


def _add_differing(
    found: Differing, rows: Rows, counts: ct.RouterCounts, sums: TokenSums, number: int
) -> None:
    """What the decisions that are not equal slot by slot add."""
    before_T = sums.differs_T > 0
    counts.before += int(before_T.sum())
    unit_N = rows.unit_T[found.at]
    ct.add_units(counts.reordered_U, unit_N)
    ct.add_units(counts.first_differs_U, unit_N[found.a[0] != found.b[0]])
    other = np.flatnonzero(found.missing_N)
    at = found.at[other]
    unit_N, cell_N = unit_N[other], rows.cell_T[at]
    ct.add_cells(counts.mismatch_UX, unit_N, cell_N)
    ct.add_cells(counts.missing_UX, unit_N, cell_N, found.missing_N[other])
    again = int(before_T[at].sum())
    counts.again += again
    counts.new += len(at) - again
    sums.differs_T[at] += 1
    sums.zero_a_T[found.at] += (found.a == 0).all(0)
    sums.zero_b_T[found.at] += (found.b == 0).all(0)
    counts.last_mismatch += int(rows.last_T[at].sum())
    for experts, moved, sign in ((found.a, found.lost_KN, -1), (found.b, found.gained_KN, 1)):
        slot, n = np.nonzero(moved)
        cells = rows.unit_T[found.at[n]] * counts.E + experts[slot, n]
        np.add.at(counts.moved_UE.reshape(-1), cells, sign)
    for n in range(0, len(found.at), BLOCK):
        part = slice(n, n + BLOCK)
        flipped_KKN = found.lost_KN[:, None, part] & found.gained_KN[None, :, part]
        i, j, of = np.nonzero(flipped_KKN)
        cells = found.a[:, part][i, of].astype(np.int64) * counts.E + found.b[:, part][j, of]
        np.add.at(counts.flips_EE.reshape(-1), cells, 1)


def _add_margins(
    found: Differing,
    rows: Rows,
    counts: ct.RouterCounts,
    decile_T: np.ndarray,
    margin_T: np.ndarray,
    number: int,
) -> None:
    at = found.at[found.missing_N > 0]
    at = at[np.isfinite(margin_T[at])]
    ct.add_cells(counts.margin_mismatch_UM, rows.unit_T[at], decile_T[at])
    step = -(-len(at) // ct.MOST_FLIPS) or 1
    counts.flip_margins[number] = margin_T[at[::step]]


def _load(slots: Slots, rows: Rows, E: int, fast: bool) -> np.ndarray:
    """int64 [X, E]: assignments of each expert in each of the units of `rows`."""
    unit_X, at_T = rows.units
    if fast:
        from moe_inspect.comparison.counting.kernels_numba import load

        return load(slots, at_T, len(unit_X), E)
    base_T = at_T * (E + 1)
    load_C = np.zeros(len(unit_X) * (E + 1), np.int64)
    for slot in slots:
        load_C += np.bincount(base_T + slot, minlength=len(load_C))
    return load_C.reshape(-1, E + 1)[:, :E]
