"""What the routing of each token id comes to at a router: its tables, and what they say.

V token ids, X those of them that are counted by domain too, E experts, T tokens of a shard, D
domains, U units (domain × cluster of documents), R shuffles. Metrics are of the most frequent
token ids, at least MIN_COUNT times each and no more of them than CELLS allows: what that leaves out
is `coverage`. Memory does not grow with the trace; where all token ids are listed it does with the
vocabulary.

Which token ids occur how often, and in which units, is known from the tokens alone: the rows of all
tables, and how their labels are shuffled, are settled before the first decision is read
(`plans_of`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moe_inspect.analysis.counting.count_shard import SelectedTokens, count_shard, selected_tokens
from moe_inspect.analysis.counting.counts import Counts
from moe_inspect.analysis.counting.kernels_numpy import Slots
from moe_inspect.analysis.counting.router_counts import ByTokenId
from moe_inspect.analysis.counting.select import Selection
from moe_inspect.analysis.metrics import specialization as sp
from moe_inspect.analysis.metrics.uncertainty import SEED
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.schema import Router
from moe_inspect.trace.shard import Shard

SLOTS = 64
WIDE = 2**16 // SLOTS  # occurrences whose assignments 16 bits may not count, of up to SLOTS each
MIN_COUNT = 8  # occurrences from which the routing of a token id can be told from chance
CELLS = 2**24  # of a table by token id, or by token id and unit
SHUFFLES = (
    5  # of the token ids, where there are few tokens; over many, one hardly differs from the next
)
SHORT = 100_000  # tokens
# clusters of documents per domain: the most that let every token id in
UNIT_CLUSTERS = (127, 61, 31, 17)
ROUNDING = np.float32(1e-6)
Accumulate = Callable[[np.ndarray, np.ndarray, np.ndarray, Slots], None]


@dataclass(frozen=True)
class TokenIds:
    """Some token ids, those that occur WIDE times first, then by id. `row_of[id]` is the row of a
    token id among them, −1 where it is left out; occurrences_V: of each, in the selected tokens;
    `coverage`: the share of the selected tokens they are."""

    ids_V: np.ndarray
    occurrences_V: np.ndarray
    row_of: np.ndarray
    coverage: float

    @property
    def wide(self) -> int:
        """How many occur WIDE times."""
        return int((self.occurrences_V >= WIDE).sum())

    def rows(self, token_id_T: np.ndarray) -> np.ndarray:
        return self.row_of[np.minimum(token_id_T, len(self.row_of) - 1)]  # -1 is the last too


def frequent(counts: Counts, min_count: int, most: int, router: int | None = None) -> TokenIds:
    """The token ids that occur at least `min_count` times, the `most` most frequent of them; among
    the tokens a router saw, or all."""
    occurrences = counts.token_ids_V if router is None else counts.token_ids_V_of(router)
    tokens = counts.tokens if router is None else counts.tokens_of(router)
    ids_V = np.flatnonzero(occurrences >= max(min_count, 1))
    if len(ids_V) > most:
        ids_V = np.sort(ids_V[np.argsort(-occurrences[ids_V], kind="stable")[:most]])
    ids_V = ids_V[np.argsort(occurrences[ids_V] < WIDE, kind="stable")]
    row_of = np.full(len(occurrences) + 1, -1, np.int32)  # the last is for what is no token id
    row_of[ids_V] = np.arange(len(ids_V))
    return TokenIds(
        ids_V, occurrences[ids_V], row_of, float(occurrences[ids_V].sum() / max(tokens, 1))
    )


def pair_ids_of(counts: Counts, E: int, router: int | None = None) -> tuple[TokenIds, int]:
    """The token ids that are counted by domain too, and the clusters of documents per domain."""
    occurrences = counts.token_ids_V if router is None else counts.token_ids_V_of(router)
    D, frequent_enough = len(counts.domains), int((occurrences >= MIN_COUNT).sum())
    fitting = [c for c in UNIT_CLUSTERS if frequent_enough * D * c * E <= CELLS]
    clusters = fitting[0] if fitting else UNIT_CLUSTERS[-1]
    return frequent(counts, MIN_COUNT, max(1, CELLS // (D * clusters * E)), router), clusters


# --- before the decisions are read


@dataclass(frozen=True)
class Plan:
    """What is counted by token id at the routers of one stack. `listed`: the token ids of the
    tables; `judged`: those of them that metrics are of; `paired`: those of these that are counted
    by domain too. shuffled_RXU: the domain of each unit of a token id with the domains permuted,
    separately for each token id, among the units that hold it."""

    listed: TokenIds
    judged: TokenIds
    paired: TokenIds
    shuffles: int
    domains: list[str]
    clusters: int
    shuffled_RXU: np.ndarray

    @cached_property
    def start_V(self) -> np.ndarray:
        """The first row of each listed token id, and the end: a row per domain where it is paired,
        else one."""
        rows_V = np.where(self.paired.rows(self.listed.ids_V) >= 0, len(self.domains), 1)
        return np.r_[0, np.cumsum(rows_V)]

    @property
    def pairs(self) -> tuple[int, int]:
        """Rows of a table by paired token id and domain, and how many of them are wide."""
        D = len(self.domains)
        return len(self.paired.ids_V) * D, self.paired.wide * D

    def bytes(self, E: int) -> int:
        """Of the tables of one router."""
        shuffled = 2 * len(self.judged.ids_V) + self.pairs[0]
        rows = int(self.start_V[-1]) + len(self.listed.ids_V) + self.shuffles * shuffled
        return rows * (E + 1) * np.dtype(np.uint16).itemsize


def plans_of(trace: Trace, selection: Selection, every: bool) -> dict[str, Plan]:
    """Reads the tokens, no decisions. `every`: lists every token id that occurs. By stack."""
    counts = Counts(trace.routers, selection.routers)
    for shard in trace.shards:
        counts.add(count_shard(shard, selection, frozenset(), routers=()))
    first_of = {trace.routers[r].stack: r for r in reversed(selection.routers)}
    return {stack: _plan(trace, selection, counts, r, every) for stack, r in first_of.items()}


def _plan(trace: Trace, selection: Selection, counts: Counts, router: int, every: bool) -> Plan:
    widest = max(trace.routers[r].experts for r in selection.routers)
    judged = frequent(counts, MIN_COUNT, CELLS // widest, router)
    listed = frequent(counts, 1, len(counts.token_ids_V_of(router)), router) if every else judged
    paired, clusters = frequent(counts, MIN_COUNT, 0, router), 0
    if len(counts.domains) > 1:
        paired, clusters = pair_ids_of(counts, widest, router)
    shuffles = SHUFFLES if counts.tokens < SHORT else 1
    there_XU = np.zeros((len(paired.ids_V), len(counts.domains) * clusters), bool)
    for shard in trace.shards if there_XU.size else ():
        seen = selected_tokens(shard, selection, trace.routers[router].stack)
        row_T, domain_T = paired.rows(seen.token_id_T), _domains(seen, counts.domains)
        unit_T = domain_T * clusters + seen.document_T % clusters
        there_XU[row_T[row_T >= 0], unit_T[row_T >= 0]] = True
    # drawn in the order of the ids
    order_X, shuffled_RXU = np.argsort(paired.ids_V), np.zeros((shuffles, *there_XU.shape), int)
    shuffled_RXU[:, order_X] = _shuffled_domains(there_XU[order_X], clusters, shuffles)
    return Plan(listed, judged, paired, shuffles, counts.domains, clusters, shuffled_RXU)


def _shuffled_domains(there_XU: np.ndarray, clusters: int, R: int) -> np.ndarray:
    token_P, unit_P = np.nonzero(there_XU)
    domain_P, rng = unit_P // max(clusters, 1), np.random.default_rng([SEED, len(token_P)])
    shuffled_RXU = np.zeros((R, *there_XU.shape), np.int32)
    for r in range(R):
        order_P = np.lexsort((rng.random(len(token_P)), token_P))
        shuffled_RXU[r, token_P, unit_P] = domain_P[order_P]
    return shuffled_RXU


def _domains(seen: SelectedTokens, domains: list[str]) -> np.ndarray:
    """The domain of each token, as a row of `domains`."""
    code = {domain: d for d, domain in enumerate(domains)}
    return np.array([code.get(domain, 0) for domain in seen.domains], np.int64)[seen.domain_T]


# --- while they are


@dataclass(frozen=True)
class Ordered:
    """Tokens of a shard in the order of their rows in a table, so that a row stays in the nearest
    cache: `by_T` which they are, row_T the row of each. Those that have none are left out."""

    by_T: np.ndarray
    row_T: np.ndarray

    @staticmethod
    def of(row_T: np.ndarray) -> Ordered:
        # numpy sorts 16 bits by radix
        fits = row_T.max(initial=0) < np.iinfo(np.uint16).max
        by_T = np.argsort((row_T + 1).astype(np.uint16) if fits else row_T, kind="stable")
        by_T = by_T[int((row_T < 0).sum()) :].astype(np.int32)
        return Ordered(by_T, row_T[by_T].astype(np.int32))


@dataclass(frozen=True)
class ShardRows:
    """The rows of a shard's tokens in the tables of any router of a stack: with token ids as they
    are, by id and domain and by id; with the domains shuffled; with the token ids shuffled."""

    by_domain: Ordered
    by_id: Ordered
    shuffled_domains: list[Ordered]
    shuffled_ids: list[Ordered]

    @staticmethod
    def of(shard: Shard, seen: SelectedTokens, plan: Plan) -> ShardRows:
        row_T, judged_T = plan.listed.rows(seen.token_id_T), plan.judged.rows(seen.token_id_T)
        paired_T, domain_T = plan.paired.rows(seen.token_id_T), _domains(seen, plan.domains)
        within_T = np.where(paired_T >= 0, domain_T, 0)
        by_domain = Ordered.of(np.where(row_T >= 0, plan.start_V[row_T] + within_T, -1))
        shuffled_domains = list[Ordered]()
        for shuffled_XU in plan.shuffled_RXU if plan.shuffled_RXU.size else ():
            unit_T = domain_T * plan.clusters + seen.document_T % plan.clusters
            shuffled_T = paired_T * len(plan.domains) + shuffled_XU[paired_T, unit_T]
            shuffled_domains.append(Ordered.of(np.where(paired_T >= 0, shuffled_T, -1)))
        # one order for all routers and for a whole decision: its k distinct experts stay together
        rng = np.random.default_rng([SEED, shard.files.rank, shard.files.index])
        shuffled_ids = [
            Ordered.of(judged_T[rng.permutation(len(row_T))]) for _ in range(plan.shuffles)
        ]
        # by domain they are in the order of their ids too
        by_id = Ordered(by_domain.by_T, row_T[by_domain.by_T])
        return ShardRows(by_domain, by_id, shuffled_domains, shuffled_ids)


class Counters:
    """Assignments by row and expert; a column more than there are experts takes what routed
    nowhere. The first `wide` rows are of 32 bits, the others of 16."""

    def __init__(self, rows: int, wide: int, experts: int):
        self.wide = np.zeros((wide, experts + 1), np.uint32)
        self.narrow = np.zeros((rows - wide, experts + 1), np.uint16)

    def add(self, ordered: Ordered, slots: Slots, accumulate: Accumulate) -> None:
        wide = len(self.wide)
        at = int(np.searchsorted(ordered.row_T, wide))
        accumulate(self.wide, ordered.by_T[:at], ordered.row_T[:at], slots)
        accumulate(self.narrow, ordered.by_T[at:], ordered.row_T[at:] - wide, slots)

    @property
    def rows_XE(self) -> np.ndarray:
        """uint32"""
        return np.concatenate([self.wide[:, :-1], self.narrow[:, :-1]])


class TokenTables:
    """The tables of one router: assignments by token id and domain, first choices by token id
    (None: unknown), and the same with labels shuffled."""

    def __init__(self, plan: Plan, router: Router):
        def zeros(rows: int, wide: int) -> Counters:
            return Counters(rows, wide if router.top_k <= SLOTS else rows, router.experts)

        ranked, shuffles, pairs = router.first_choice_known, range(plan.shuffles), plan.pairs
        listed, judged = ((len(ids.ids_V), ids.wide) for ids in (plan.listed, plan.judged))
        self.plan = plan
        self.by_domain = zeros(int(plan.start_V[-1]), int(plan.start_V[plan.listed.wide]))
        self.first = zeros(*listed) if ranked else None
        self.shuffled_domains = [zeros(*pairs) for _ in shuffles if pairs[0]]
        self.shuffled_any = [zeros(*judged) for _ in shuffles]
        self.shuffled_first = [zeros(*judged) for _ in shuffles if ranked]

    def add(self, rows: ShardRows, slots: Slots, accumulate: Accumulate) -> None:
        """Counts the decisions of a shard."""
        self.by_domain.add(rows.by_domain, slots, accumulate)
        if self.first is not None:
            self.first.add(rows.by_id, slots[:1], accumulate)
        for tables, shuffled, of in (
            (self.shuffled_domains, rows.shuffled_domains, slots),
            (self.shuffled_any, rows.shuffled_ids, slots),
            (self.shuffled_first, rows.shuffled_ids, slots[:1]),
        ):
            for table, ordered in zip(tables, shuffled, strict=False):
                table.add(ordered, of, accumulate)


# --- afterwards


def by_token_id(tables: TokenTables, top: int) -> ByTokenId:
    """What the tables of a router come to. `top`: token ids per expert, 0 for all."""
    plan, by_domain_RE = tables.plan, tables.by_domain.rows_XE
    listed, judged = plan.listed, plan.listed.rows(plan.judged.ids_V)
    any_VE = by_domain_RE
    if plan.pairs[0]:
        any_VE = np.add.reduceat(by_domain_RE, plan.start_V[:-1])
    first_VE = None if tables.first is None else tables.first.rows_XE
    columns = _columns(tables, any_VE[judged], None if first_VE is None else first_VE[judged])
    if tables.shuffled_domains:
        shape = len(plan.paired.ids_V), len(plan.domains), any_VE.shape[1]
        first_X = plan.start_V[listed.rows(plan.paired.ids_V)]
        counts_XDE = by_domain_RE[first_X[:, None] + np.arange(len(plan.domains))]
        columns["domain_mi_given_token_bits"] = sp.conditional_mi_bits(counts_XDE)
        columns["domain_mi_given_token_null_bits"] = _mean(
            [sp.conditional_mi_bits(s.rows_XE.reshape(shape)) for s in tables.shuffled_domains]
        )
    expert_N, row_N = top_token_ids(any_VE, listed, top)
    return ByTokenId(
        columns,
        expert_N,
        listed.ids_V[row_N],
        any_VE[row_N, expert_N].astype(np.int64),
        None if first_VE is None else first_VE[row_N, expert_N].astype(np.int64),
        listed.occurrences_V[row_N],
    )


def _columns(
    tables: TokenTables, any_VE: np.ndarray, first_VE: np.ndarray | None
) -> dict[str, float]:
    """The metrics of token ids, each beside its mean with the token ids shuffled."""
    occurrences_V = tables.plan.judged.occurrences_V
    shuffled_any = [shuffled.rows_XE for shuffled in tables.shuffled_any]
    columns = {
        "token_mi_bits": sp.token_mi_bits(any_VE),
        "token_mi_null_bits": _mean([sp.token_mi_bits(s_VE) for s_VE in shuffled_any]),
        "vocabulary_specialization_any": sp.vocabulary_specialization_any(any_VE, occurrences_V),
        "vocabulary_specialization_any_null": _mean(
            [sp.vocabulary_specialization_any(s_VE, occurrences_V) for s_VE in shuffled_any]
        ),
    }
    if first_VE is not None:
        columns["vocabulary_specialization"] = sp.vocabulary_specialization(first_VE)
        columns["vocabulary_specialization_null"] = _mean(
            [sp.vocabulary_specialization(s.rows_XE) for s in tables.shuffled_first]
        )
    return columns


def _mean(values: list[float]) -> float:
    return float(np.mean(values))


def top_token_ids(any_VE: np.ndarray, listed: TokenIds, top: int) -> tuple[np.ndarray, np.ndarray]:
    """The `top` token ids of each expert by the fraction of their occurrences that goes to it, then
    by count, then by id, highest first; 0: all that ever went there. Returns (expert, row), expert
    by expert."""
    (V, E), occurrences_V = any_VE.shape, listed.occurrences_V
    share_VE = any_VE.astype(np.float32) * (1 / occurrences_V).astype(np.float32)[:, None]
    least_E, blocks = np.float32(0), 8 * top
    if 0 < 2 * blocks < V:
        # of the largest shares of blocks of token ids, `top` are no less than the one at this rank
        highest_BE = share_VE[: V - V % blocks].reshape(blocks, -1, E).max(1)
        least_E = np.partition(highest_BE, -top, axis=0)[-top] * (1 - ROUNDING)
    row_N, expert_N = np.nonzero((share_VE >= least_E) & (any_VE > 0))
    count_N = any_VE[row_N, expert_N]
    fraction_N = np.minimum(count_N / occurrences_V[row_N], 1)
    order_N = np.lexsort((-listed.ids_V[row_N], -count_N.astype(np.int64), -fraction_N, expert_N))
    row_N, expert_N = row_N[order_N], expert_N[order_N]
    rank_N = np.arange(len(expert_N)) - np.searchsorted(expert_N, expert_N)
    kept_N = rank_N < (top or V)
    return expert_N[kept_N], row_N[kept_N]
