"""The routing of each token id at a router, counted in tables; what they come to is in
`token_id_tables`.

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

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from moe_inspect.analysis.counting.count_shard import SelectedTokens, count_shard, selected_tokens
from moe_inspect.analysis.counting.counts import Counts
from moe_inspect.analysis.counting.kernels_numpy import Slots, Visits
from moe_inspect.analysis.counting.select import Selection
from moe_inspect.analysis.metrics.chance import shuffled_within
from moe_inspect.analysis.metrics.uncertainty import SEED
from moe_inspect.analysis.tasks import by_shard
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.schema import Router
from moe_inspect.trace.shard import Shard

# the types of counts, and what each holds less than: a row has the narrowest that surely holds it
WIDTHS = {np.uint32: 2**32, np.uint16: 2**16, np.uint8: 2**8}
MIN_COUNT = 8  # occurrences from which the routing of a token id can be told from chance
CELLS = 2**24  # of a table by token id, or by token id and unit
# of the token ids, where there are few tokens; over many, one hardly differs from the next
SHUFFLES = 5
SHORT = 100_000  # tokens
# clusters of documents per domain: the most that let every token id in
UNIT_CLUSTERS = (127, 61, 31, 17)


@dataclass(frozen=True)
class TokenIds:
    """Some token ids, those whose assignments take wider counts first, then by id. `row_of[id]` is
    the row of a token id among them, −1 where it is left out; occurrences_V: of each, in the
    selected tokens; `coverage`: the share of the selected tokens they are; `sizes`: how many take
    each of WIDTHS."""

    ids_V: np.ndarray
    occurrences_V: np.ndarray
    row_of: np.ndarray
    coverage: float
    sizes: np.ndarray

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
    top_k = max(counts.routers[r].top_k for r in counts.indices)
    # a damaged decision may name one expert k times
    most_V, (_, *limits) = occurrences[ids_V] * top_k, WIDTHS.values()
    width_V = np.sum([most_V < limit for limit in limits], axis=0)
    ids_V = ids_V[np.argsort(width_V, kind="stable")]
    row_of = np.full(len(occurrences) + 1, -1, np.int32)  # the last is for what is no token id
    row_of[ids_V] = np.arange(len(ids_V))
    return TokenIds(
        ids_V,
        occurrences[ids_V],
        row_of,
        float(occurrences[ids_V].sum() / max(tokens, 1)),
        np.bincount(width_V, minlength=len(WIDTHS)),
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
        return np.r_[0, np.cumsum(rows_V)].astype(np.int32)

    @cached_property
    def paired_V(self) -> np.ndarray:
        """The row of each listed token id among the paired, −1 where it is none, and the same for
        what is not listed."""
        return np.append(self.paired.rows(self.listed.ids_V), np.int32(-1))

    @property
    def by_domain_sizes(self) -> np.ndarray:
        """Of the table by listed token id and domain: rows of each of WIDTHS."""
        return np.diff(self.start_V[np.r_[0, np.cumsum(self.listed.sizes)]])

    @property
    def pair_sizes(self) -> np.ndarray:
        """Of a table by paired token id and domain: rows of each of WIDTHS."""
        return self.paired.sizes * len(self.domains)

    def bytes(self, E: int) -> int:
        """Of the tables of one router."""
        shuffled = 2 * self.judged.sizes + self.pair_sizes
        rows = self.by_domain_sizes + self.listed.sizes + self.shuffles * shuffled
        return int(rows @ [np.dtype(width).itemsize for width in WIDTHS]) * (E + 1)


def plans_of(trace: Trace, selection: Selection, every: bool) -> dict[str, Plan]:
    """Reads the tokens, no decisions. `every`: lists every token id that occurs. By stack."""
    counts = Counts(trace.routers, selection.routers)
    for part in by_shard(trace, "reading tokens", _tokens_of, selection):
        counts.add(part)
    first_of = {trace.routers[r].stack: r for r in reversed(selection.routers)}
    return {stack: _plan(trace, selection, counts, r, every) for stack, r in first_of.items()}


def _tokens_of(shard: Shard, selection: Selection) -> Counts:
    return count_shard(shard, selection, frozenset(), routers=())


def _plan(trace: Trace, selection: Selection, counts: Counts, router: int, every: bool) -> Plan:
    widest = max(trace.routers[r].experts for r in selection.routers)
    judged = frequent(counts, MIN_COUNT, CELLS // widest, router)
    listed = frequent(counts, 1, len(counts.token_ids_V_of(router)), router) if every else judged
    paired, clusters = frequent(counts, MIN_COUNT, 0, router), 0
    if len(counts.domains) > 1:
        paired, clusters = pair_ids_of(counts, widest, router)
    shuffles = SHUFFLES if counts.tokens < SHORT else 1
    there_XU = np.zeros((len(paired.ids_V), len(counts.domains) * clusters), bool)
    asked = selection, trace.routers[router].stack, paired, counts.domains, clusters
    for cells in by_shard(trace, None, _cells, *asked) if there_XU.size else ():
        there_XU.reshape(-1)[cells] = True
    # drawn in the order of the ids
    order_X, shuffled_RXU = (
        np.argsort(paired.ids_V),
        np.zeros((shuffles, *there_XU.shape), np.int32),
    )
    shuffled_RXU[:, order_X] = _shuffled_domains(there_XU[order_X], clusters, shuffles)
    return Plan(listed, judged, paired, shuffles, counts.domains, clusters, shuffled_RXU)


def _cells(
    shard: Shard,
    selection: Selection,
    stack: str,
    paired: TokenIds,
    domains: list[str],
    clusters: int,
) -> np.ndarray:
    """The cells of there_XU that a shard has tokens of, ascending."""
    seen = selected_tokens(shard, selection, stack)
    row_T, domain_T = paired.rows(seen.token_id_T), _domains(seen, domains)
    units, unit_T = len(domains) * clusters, domain_T * clusters + seen.document_T % clusters
    there_XU = np.zeros((len(paired.ids_V), units), bool)
    there_XU[row_T[row_T >= 0], unit_T[row_T >= 0]] = True
    return np.flatnonzero(there_XU)


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
    return np.array([code.get(domain, 0) for domain in seen.domains], np.int32)[seen.domain_T]


# --- while they are


@dataclass(frozen=True)
class ShardRows:
    """The rows of a shard's tokens in the tables of any router of a stack, in each of WIDTHS: with
    token ids as they are, by id and domain; with the domains shuffled; with the token ids
    shuffled."""

    by_domain: list[Visits]
    shuffled_domains: list[list[Visits]]
    shuffled_ids: list[list[Visits]]

    @staticmethod
    def of(shard: Shard, seen: SelectedTokens, plan: Plan, by: Any) -> ShardRows:
        D, domain_T = len(plan.domains), _domains(seen, plan.domains)
        listed_T = plan.listed.rows(seen.token_id_T)
        judged_T = listed_T if plan.judged is plan.listed else plan.judged.rows(seen.token_id_T)
        paired_T = plan.paired_V[listed_T]  # −1 is the last
        row_T = plan.start_V[listed_T]
        row_T += np.where(paired_T >= 0, domain_T, 0)
        row_T[listed_T < 0] = -1
        # by domain they are in the order of their ids too
        by_domain = _visits(by, row_T, plan.by_domain_sizes, listed_T, plan.listed.sizes)
        shuffled_domains = list[list[Visits]]()
        for shuffled_XU in plan.shuffled_RXU if plan.shuffled_RXU.size else ():
            unit_T = domain_T * plan.clusters + seen.document_T % plan.clusters
            cell_T = np.maximum(paired_T, 0) * np.int32(shuffled_XU.shape[1]) + unit_T
            shuffled_T = paired_T * D + shuffled_XU.reshape(-1)[cell_T]
            shuffled_T[paired_T < 0] = -1
            shuffled_domains.append(_visits(by, shuffled_T, plan.pair_sizes))
        # one order for all routers and for a whole decision: its k distinct experts stay together
        rng = np.random.default_rng([SEED, shard.files.rank, shard.files.index])
        shuffled_ids = [
            _visits(by, judged_T[shuffled_within(seen.document_T, rng)], plan.judged.sizes)
            for _ in range(plan.shuffles)
        ]
        return ShardRows(by_domain, shuffled_domains, shuffled_ids)


def _visits(
    by: Any,
    row_T: np.ndarray,
    sizes: np.ndarray,
    first_row_T: np.ndarray | None = None,
    first_sizes: np.ndarray | None = None,
) -> list[Visits]:
    """`sizes`: rows of each of WIDTHS. first_row_T: where the rows of first choices are others."""
    by_N, row_N = by.sorted_rows(row_T, int(sizes.sum()))
    rows = [(row_N, np.cumsum(sizes) - sizes)]
    if first_row_T is not None and first_sizes is not None:
        first_row_N = first_row_T[by_N].astype(np.uint32)
        rows.append((first_row_N, np.cumsum(first_sizes) - first_sizes))
    cuts = [*np.searchsorted(row_N, rows[0][1]), len(row_N)]
    visits = list[Visits]()
    for i, (start, end) in enumerate(itertools.pairwise(cuts)):
        within = [of_N[start:end] - np.uint32(before[i]) for of_N, before in rows]
        visits.append(Visits(by_N[start:end], within[0], within[-1]))
    return visits


class Counters:
    """Assignments by row and expert; a column more than there are experts takes what routed
    nowhere. `sizes`: rows of each of WIDTHS."""

    def __init__(self, sizes: np.ndarray, experts: int):
        self.tables = [
            np.zeros((rows, experts + 1), width)
            for rows, width in zip(sizes.tolist(), WIDTHS, strict=True)
        ]

    @property
    def rows_XE(self) -> np.ndarray:
        """uint32"""
        return np.concatenate([table[:, :-1] for table in self.tables], dtype=np.uint32)


@dataclass(frozen=True)
class Counted:
    """Assignments by row and, where that is known and asked for, first choices."""

    any: Counters
    first: Counters | None

    def add(self, visits: list[Visits], ids_TK: np.ndarray, by: Any) -> None:
        first = [None] * len(WIDTHS) if self.first is None else self.first.tables
        for any_XE, first_XE, of in zip(self.any.tables, first, visits, strict=True):
            by.accumulate(any_XE, first_XE, of, ids_TK)


class TokenTables:
    """The tables of one router: assignments by token id and domain with first choices by token id,
    and the same with labels shuffled."""

    def __init__(self, plan: Plan, router: Router):
        def counted(sizes: np.ndarray, first_sizes: np.ndarray | None) -> Counted:
            known = first_sizes if router.first_choice_known else None
            first = None if known is None else Counters(known, router.experts)
            return Counted(Counters(sizes, router.experts), first)

        shuffles, listed, judged = range(plan.shuffles), plan.listed.sizes, plan.judged.sizes
        self.plan = plan
        self.by_domain = counted(plan.by_domain_sizes, listed)
        self.shuffled_domains = [
            counted(plan.pair_sizes, None) for _ in shuffles if len(plan.paired.ids_V)
        ]
        self.shuffled_ids = [counted(judged, judged) for _ in shuffles]

    def add(self, rows: ShardRows, slots: Slots, by: Any) -> None:
        """Counts the decisions of a shard. `by`: the kernels."""
        ids_TK = by.by_token(slots)
        self.by_domain.add(rows.by_domain, ids_TK, by)
        for counted, visits in (
            *zip(self.shuffled_domains, rows.shuffled_domains, strict=False),
            *zip(self.shuffled_ids, rows.shuffled_ids, strict=True),
        ):
            counted.add(visits, ids_TK, by)
