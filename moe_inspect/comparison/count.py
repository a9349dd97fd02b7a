"""The passes over two aligned traces, shard by shard of A. Their counts merge by addition, as whole
numbers, so that the order of shards changes nothing. Another pass sums the output norms.

T tokens of a shard that are compared, N of them with another decision, K slots, E experts, U units
(clusters of a domain's documents), V units in the shard, X cells (phase × position decile), M
margin deciles.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import numpy as np

from moe_inspect.analysis.counting.counts import CLUSTERS
from moe_inspect.analysis.counting.kernels import load, weight_sum
from moe_inspect.analysis.counting.router_counts import narrowed
from moe_inspect.analysis.counting.select import Selection
from moe_inspect.analysis.tasks import runs_of, workers
from moe_inspect.comparison import align, kernels
from moe_inspect.progress import phase
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.shard import Shard

Result = TypeVar("Result")
Sums = dict[str, np.ndarray]
UNIT = 2**24  # sums of weights and logits are whole numbers of 1/UNIT
MOST_WAITING = 2**26  # pairs of experts in the counts of shards that are counted at once
MOST_FLIPS = 256  # margins of flips per shard and router, for their median
GAMMA_FLOOR = 0.8


def fixed(value: float) -> int:
    """A sum of floats as a whole number, so that sums do not depend on the order."""
    return round(value * UNIT)


@dataclass
class PairRouterCounts:
    """Counts of one router of A and its partner in B, by unit."""

    E: int
    mismatch_UX: np.ndarray  # decisions with different sets of experts
    missing_UX: np.ndarray  # assignments that the other trace did not make
    short_UX: np.ndarray  # slots that route nowhere in both
    reordered_U: np.ndarray  # decisions with a different order of slots
    first_differs_U: np.ndarray  # decisions with a different first choice
    l1_U: np.ndarray  # Σ of weight differences
    load_UE: np.ndarray  # A's assignments
    moved_UE: np.ndarray  # B's minus A's
    margin_UM: np.ndarray  # decisions by A's margin
    margin_mismatch_UM: np.ndarray  # decisions with different sets, by A's margin
    flips_EE: np.ndarray  # pairs of an expert that B dropped and one that it took instead
    # A's margins of decisions with different sets, by shard
    flip_margins: dict[int, np.ndarray] = field(default_factory=dict)
    last_mismatch: int = 0  # last tokens of sequences with different sets
    weights_differ: int = 0  # decisions with different weights of an expert that both chose
    new: int = 0  # tokens whose sets differ first here
    kl: int = 0  # Σ of KL(A ‖ B)

    @classmethod
    def zero(cls, E: int, U: int) -> PairRouterCounts:
        size = {"U": U, "X": align.CELLS, "E": E, "M": align.DECILES}
        shapes = {name: [size[x] for x in name.rpartition("_")[2]] for name in TABLES}
        tables: dict[str, Any] = {
            # tables by expert take nearly all the memory; no cell of them reaches 2^31
            name: np.zeros(shape, np.int32 if "E" in name.rpartition("_")[2] else np.int64)
            for name, shape in shapes.items()
        }
        return cls(E, **tables)

    def narrow(self) -> PairRouterCounts:
        """The same counts in the narrowest types, to be sent and added to others."""
        return replace(self, **{name: narrowed(getattr(self, name)) for name in TABLES})

    def merge(self, other: PairRouterCounts, unit_V: np.ndarray) -> None:
        """Add the counts of another shard, whose units are `unit_V`."""
        self.flip_margins |= other.flip_margins
        for name in BY_UNIT:
            getattr(self, name)[unit_V] += getattr(other, name)
        self.flips_EE += other.flips_EE
        add_numbers(self, other)


def add_numbers(total: Counts, other: Counts) -> None:
    """Add the numbers of two counts of one kind."""
    for name in NUMBERS[type(other)]:
        setattr(total, name, getattr(total, name) + getattr(other, name))


TABLES = [f.name for f in fields(PairRouterCounts) if f.type == "np.ndarray"]
BY_UNIT = [name for name in TABLES if "_U" in name]


@dataclass
class ComparisonCounts:
    """Counts of two traces, or of one shard of A in its units. A unit is domain · CLUSTERS +
    document % CLUSTERS."""

    domains: tuple[str, ...]  # A's labels
    of: dict[int, PairRouterCounts]
    decisions_UX: dict[str, np.ndarray]  # by stack: tokens that reach its routers
    layers_N: np.ndarray  # tokens by the number of routers at which their sets differ
    # by shard: rows (document, domain, tokens, decisions, decisions with another set)
    documents: dict[int, np.ndarray] = field(default_factory=dict)
    shards_alike: int = 0
    gamma: int = 0  # Σ of RSPO's router shift
    gamma_below: int = 0  # tokens under GAMMA_FLOOR
    last_tokens: int = 0  # tokens that are the last of their sequence
    # tokens that differ and of which every slot of every router is expert 0 in one trace
    zero_filled_a: int = 0
    zero_filled_b: int = 0

    def merge(self, other: ComparisonCounts, unit_V: np.ndarray) -> None:
        """Add the counts of another shard, or of another stack of one, whose units are
        `unit_V`."""
        for r, counts in other.of.items():
            self.of[r].merge(counts, unit_V)
        for stack, decisions_UX in other.decisions_UX.items():
            self.decisions_UX[stack][unit_V] += decisions_UX
        for number, rows in other.documents.items():
            before = self.documents.get(number, rows[:0])
            self.documents[number] = np.concatenate([before, rows])
        self.layers_N += other.layers_N
        add_numbers(self, other)

    @property
    def tokens(self) -> int:
        return int(self.layers_N.sum())

    @property
    def units(self) -> np.ndarray:
        """The units (clusters of documents) that have any token."""
        return np.flatnonzero(sum(x.sum(1) for x in self.decisions_UX.values()))

    @property
    def domain_U(self) -> np.ndarray:
        """int64 [U]: the domain of each unit."""
        return np.repeat(np.arange(len(self.domains)), CLUSTERS)

    def document_rows(self) -> np.ndarray:
        """int64 [documents, 5], ascending."""
        rows = np.concatenate([np.zeros((0, 5), np.int64), *self.documents.values()])
        names, at = np.unique(rows[:, 0], return_inverse=True)
        total = np.zeros((len(names), 5), np.int64)
        np.add.at(total, at, rows)
        total[:, 0], total[at, 1] = names, rows[:, 1]
        return total


Counts = PairRouterCounts | ComparisonCounts
NUMBERS = {
    kind: [f.name for f in fields(kind) if f.type == "int" and f.name != "E"]
    for kind in (PairRouterCounts, ComparisonCounts)
}


@dataclass(frozen=True)
class Job:
    """What is compared, and what is counted of it."""

    a: Trace
    b: Trace
    routers: tuple[tuple[int, int], ...]  # (router of A, router of B) of equal shape
    selection: Selection
    domains: tuple[str, ...]  # A's labels
    tokens: int  # number of tokens
    # deciles of A's margins, if they are known
    margins: kernels.Margins | None = None
    load: bool = True  # whether A's load is counted
    # whether to leave out tokens with expert 0 in every slot of either trace
    drop_zero_filled: bool = False

    @property
    def weights(self) -> bool:
        return self.a.has_weights and self.b.has_weights

    @property
    def logits(self) -> bool:
        return "logits" in self.a.tables and "logits" in self.b.tables

    def zero(self) -> ComparisonCounts:
        listed, U = {r: self.a.routers[r] for r, _ in self.routers}, len(self.domains) * CLUSTERS
        of = {r: PairRouterCounts.zero(router.experts, U) for r, router in listed.items()}
        stacks = {router.stack for router in listed.values()}
        decisions_UX = {stack: np.zeros((U, align.CELLS), np.int64) for stack in stacks}
        return ComparisonCounts(self.domains, of, decisions_UX, np.zeros(len(of) + 1, np.int64))

    def rows_by_stack(
        self, segments: align.Segments
    ) -> Iterator[tuple[str, align.AlignedRows, list[tuple[int, int]]]]:
        """Each stack, the tokens of a shard of A that are compared, and the routers they reach."""
        for stack in sorted({self.a.routers[r].stack for r, _ in self.routers}):
            routers = [pair for pair in self.routers if self.a.routers[pair[0]].stack == stack]
            traces = self.a, self.b
            rows = align.rows_of_shard(traces, segments, self.domains, stack, self.selection)
            if self.drop_zero_filled and not rows.alike:
                zero_2T = np.ones((2, len(rows)), bool)  # expert 0 everywhere in A, in B
                for pair in routers:
                    for zero_T, slots in zip(zero_2T, rows.both(Shard.slots, pair), strict=True):
                        for slot_T in slots:
                            zero_T &= slot_T == 0
                rows = rows.take(~(zero_2T[0] | zero_2T[1]))
            if len(rows):
                yield stack, rows, routers


def by_runs(
    job: Job,
    segments: align.Segments,
    function: Callable[[Job, list[align.Segments]], Result],
    threads: int = 1,
) -> Iterator[tuple[int, Result]]:
    """Call function(job, shards) on runs of A's shards, in order. Yield the number of tokens of
    each run, and the result."""
    numbers = segments.shards
    runs = [[number] for number in numbers]  # few counts wait to be added
    if job.a.scheduler or job.b.scheduler:
        runs = [[numbers[i] for i in run] for run in runs_of(job.a, len(numbers))]
    tasks = (([segments.in_shard(number) for number in run],) for run in runs)
    tokens_N = np.bincount(segments.shard_a, segments.length)
    sizes = (int(tokens_N[run].sum()) for run in runs)
    with workers(job.a, job.b, threads=threads) as at:
        yield from zip(sizes, at.each(function, (job,), tasks), strict=True)


def count_pair(
    job: Job,
    segments: align.Segments,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> ComparisonCounts:
    """The counts of everything that is compared. `progress` is called with the number of decisions
    done."""
    total, advance = job.zero(), phase("comparing", job.tokens, "tokens")
    threads = len(os.sched_getaffinity(0)) if threads is None else threads
    pairs = sum(job.a.routers[r].experts ** 2 for r, _ in job.routers)
    threads = max(1, min(threads, MOST_WAITING // pairs))
    for tokens, (decisions, parts) in by_runs(job, segments, _count, threads):
        while parts:  # so that each is freed once it is added
            total.merge(*parts.pop())
        advance(tokens)
        if progress:
            progress(decisions)
    return total


def _count(
    job: Job, shards: list[align.Segments]
) -> tuple[int, list[tuple[ComparisonCounts, np.ndarray]]]:
    """Count shards. Return the number of decisions, and the counts and units by shard and stack."""
    parts, decisions = list[tuple[ComparisonCounts, np.ndarray]](), 0
    for segments in shards:
        for stack, rows, routers in job.rows_by_stack(segments):
            decisions += len(rows) * len(routers)
            tokens, number = TokenSums(rows, job.logits), int(segments.shard_a[0])
            of = {pair[0]: _count_router(job, tokens, pair, number).narrow() for pair in routers}
            parts.append((tokens.counts(job, of, stack, number), tokens.unit_V))
    return decisions, parts


class TokenSums:
    """Sums over the routers that tokens reach, one after the other."""

    def __init__(self, rows: align.AlignedRows, logits: bool):
        self.rows, T = rows, len(rows)
        # the units of the shard, and the place of each token's unit among them
        self.unit_V, self.place_T = np.unique(rows.unit_T, return_inverse=True)
        # number of routers at which the token's sets differ
        self.differs_T = np.zeros(T, np.int64)
        # number of routers at which slots differ and all slots of A, or of B, are expert 0
        self.zero_2T = np.zeros((2, T), np.int64)
        # Σ of the shift of its log-probabilities, if logits are known
        self.shift_T = np.zeros(T) if logits else None

    def counts(
        self, job: Job, of: dict[int, PairRouterCounts], stack: str, number: int
    ) -> ComparisonCounts:
        """The counts of a shard: of its routers (`of`), and of its tokens."""
        rows = self.rows
        decisions_VX = np.zeros((len(self.unit_V), align.CELLS), np.int64)
        kernels.add_cells(decisions_VX, self.place_T, rows.cell_T)
        document_D, first_D, at_T = np.unique(
            rows.document_T, return_index=True, return_inverse=True
        )
        tokens_D, domain_D = np.bincount(at_T), rows.unit_T[first_D] // CLUSTERS
        mismatch_D = np.bincount(at_T, self.differs_T).astype(np.int64)
        table = np.stack([document_D, domain_D, tokens_D, tokens_D * len(of), mismatch_D], axis=1)
        layers_N = np.bincount(self.differs_T, minlength=len(job.routers) + 1)
        total = ComparisonCounts(job.domains, of, {stack: decisions_VX}, layers_N, {number: table})
        total.shards_alike = int(rows.alike)
        total.last_tokens = int(rows.last_T.sum())
        total.zero_filled_a, total.zero_filled_b = (self.zero_2T == len(of)).sum(1).tolist()
        if self.shift_T is not None:
            gamma_T = np.exp(-self.shift_T / len(of))
            total.gamma = fixed(float(gamma_T.sum()))
            total.gamma_below = int((gamma_T < GAMMA_FLOOR).sum())
        return total


def logits_of(shard: Shard, router: int) -> align.Columns:
    return (shard.logits(router),)


def _count_router(
    job: Job, tokens: TokenSums, pair: tuple[int, int], number: int
) -> PairRouterCounts:
    """The counts of one router in a shard, in the units of its tokens."""
    rows, unit_T, r = tokens.rows, tokens.place_T, pair[0]
    E, V = job.a.routers[r].experts, len(tokens.unit_V)
    counts = PairRouterCounts.zero(E, V)
    if rows.alike and not job.load:
        return counts
    slots_a = rows.read(0, Shard.slots, r)
    slots_b = slots_a if rows.alike else rows.read(1, Shard.slots, pair[1])
    counts.load_UE = load(unit_T, slots_a, V, E)
    if counts.load_UE.sum() < len(unit_T) * len(slots_a):
        short_T = kernels.nowhere_in_both(slots_a, slots_b, E)
        kernels.add_cells(counts.short_UX, unit_T, rows.cell_T, short_T)
    margin_T, decile_T = None, np.zeros(0, np.int64)
    if job.margins is not None and r in job.margins.edges:
        margin_T = kernels.logit_margin(rows.read(0, logits_of, r)[0], slots_a)
        decile_T = np.searchsorted(job.margins.edges[r], margin_T)
        at = np.flatnonzero(np.isfinite(margin_T))
        kernels.add_cells(counts.margin_UM, unit_T[at], decile_T[at])
    if rows.alike:
        if margin_T is not None:
            counts.flip_margins[number] = margin_T[:0]
        return counts

    at, a_KN, b_KN = kernels.unequal(slots_a, slots_b)
    lost_KN, gained_KN, missing_N = kernels.sets(a_KN, b_KN, E)
    unit_N, cell_N = unit_T[at], rows.cell_T[at]
    counts.reordered_U += np.bincount(unit_N, minlength=V)
    counts.first_differs_U += np.bincount(unit_N[a_KN[0] != b_KN[0]], minlength=V)
    kernels.add_cells(counts.mismatch_UX, unit_N, cell_N, missing_N > 0)
    kernels.add_cells(counts.missing_UX, unit_N, cell_N, missing_N)
    kernels.add_moves(a_KN, b_KN, lost_KN, gained_KN, unit_N, counts.moved_UE, counts.flips_EE)
    if job.weights:
        weights = rows.both(Shard.slot_weights, pair)
        l1_T = kernels.weight_difference(a_KN, b_KN, E, at, *weights)
        counts.l1_U += np.rint(np.bincount(unit_T, l1_T, V) * UNIT).astype(np.int64)
        counts.weights_differ = int(np.count_nonzero(l1_T))
    if tokens.shift_T is not None:
        (logits_a,), (logits_b,) = rows.both(logits_of, pair)
        shift_T, kl_T = kernels.logit_shift(logits_a, logits_b, slots_a, job.a.routers[r].scoring)
        tokens.shift_T += shift_T
        counts.kl = fixed(float(kl_T.sum()))

    # counts that depend on the routers before this one, or on single tokens
    tokens.zero_2T[:, at] += np.stack([(a_KN == 0).all(0), (b_KN == 0).all(0)])
    at = at[missing_N > 0]
    counts.new = int((tokens.differs_T[at] == 0).sum())
    counts.last_mismatch = int(rows.last_T[at].sum())
    tokens.differs_T[at] += 1
    if margin_T is not None:
        at = at[np.isfinite(margin_T[at])]
        kernels.add_cells(counts.margin_mismatch_UM, unit_T[at], decile_T[at])
        counts.flip_margins[number] = margin_T[at[:: -(-len(at) // MOST_FLIPS) or 1]]
    return counts


# --- a pass of its own, since few need it: sizes of what experts return


def output_sums(job: Job, segments: align.Segments) -> dict[int, Sums]:
    """Sums of output norms by router of A, if both traces have norms. load, norm, gated: of A and
    of B, float64 [2, U, E]: assignments, Σ of the norms of outputs, Σ of gate weight × norm (NaN
    without weights). Of the assignments that both made, float64 [E]: both, their number; both_norm,
    Σ of A's norms; both_change, Σ of |B's norm − A's|."""
    total = _outputs(job, [])
    for _, part in by_runs(job, segments, _outputs):
        for r, sums in part.items():
            for name, values in sums.items():
                total[r][name] += values
    return total


def _outputs(job: Job, shards: list[align.Segments]) -> dict[int, Sums]:
    U, total = len(job.domains) * CLUSTERS, dict[int, Sums]()
    for r, _ in job.routers:
        E = job.a.routers[r].experts
        total[r] = {name: np.zeros((2, U, E)) for name in ("load", "norm", "gated")}
        total[r] |= {name: np.zeros(E) for name in ("both", "both_norm", "both_change")}
    for segments in shards:
        for _, rows, routers in job.rows_by_stack(segments):
            for pair in routers:
                _add_outputs(job, rows, pair, total[pair[0]])
    return total


def _add_outputs(job: Job, rows: align.AlignedRows, pair: tuple[int, int], total: Sums) -> None:
    (_, U, E), ids = total["load"].shape, rows.both(Shard.slots, pair)
    norms = rows.both(lambda shard, router: shard.slot_values(router, "norm"), pair)
    for side, trace in enumerate((job.a, job.b)):
        gated = tuple(np.full_like(norm_T, np.nan, float) for norm_T in norms[side])
        if trace.has_weights:
            weights = rows.read(side, Shard.slot_weights, pair[side])
            gated = tuple(
                norm_T * weight_T.astype(np.float64)
                for norm_T, weight_T in zip(norms[side], weights, strict=True)
            )
        total["load"][side] += load(rows.unit_T, ids[side], U, E)
        total["norm"][side] += weight_sum(rows.unit_T, ids[side], norms[side], U, E)
        total["gated"][side] += weight_sum(rows.unit_T, ids[side], gated, U, E)
    for id_a_T, norm_a_T in zip(ids[0], norms[0], strict=True):
        for id_b_T, norm_b_T in zip(ids[1], norms[1], strict=True):
            at = np.flatnonzero((id_a_T == id_b_T) & (id_a_T != E))
            expert, before, now = id_a_T[at], norm_a_T[at], norm_b_T[at]
            total["both"] += np.bincount(expert, minlength=E)
            total["both_norm"] += np.bincount(expert, before, E)
            total["both_change"] += np.bincount(expert, np.abs(now - before), E)
